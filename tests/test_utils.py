"""utils.py: messages and secrets, files, device and precision, memory, the request to stop."""

import errno
import os
import signal
from datetime import datetime, timedelta

import pytest
import torch
from hostile import refusal

import utils

# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_atomic_file_shows_the_old_content_until_the_new_one_is_whole(tmp_path):
    """A reader that sees half a file; an interrupted save that destroys the last good one or litters the folder."""
    path = tmp_path / "sub" / "file"
    with utils.atomic_file(path) as file:
        file.write(b"old")
    with utils.atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    with pytest.raises(KeyboardInterrupt), utils.atomic_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


def test_write_json_refuses_nan_and_bears_a_file_system_without_fsync(tmp_path, monkeypatch):
    """A metrics.json with NaN, which other readers refuse; no cache and no checkpoint on gcsfuse."""

    def refuse(_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    path = tmp_path / "metrics.json"
    utils.write_json(path, {"name": "é"})
    with pytest.raises(ValueError):
        utils.write_json(path, {"psnr": float("nan")})
    assert path.read_text(encoding="utf-8") == '{\n  "name": "é"\n}\n'
    monkeypatch.setattr(os, "fsync", refuse)
    utils.write_json(path, 1)
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_stamp_is_the_present_time_or_sorts_after_entries_from_the_future(tmp_path):
    """A stamp in UTC, 235959 + 1 = 235960, or one that sorts first after the clock went back."""
    (tmp_path / "other_29991231_235959.pth").touch()
    (tmp_path / "align_pipeline_99999999_999999.pth").touch()
    stamp = datetime.strptime(utils.next_stamp(tmp_path, "align_pipeline"), "%Y%m%d_%H%M%S")
    assert abs(stamp - datetime.now()) < timedelta(minutes=2)
    for name in ("align_pipeline_29991231_235959.pth", "align_pipeline_20200101_000000.pth"):
        (tmp_path / name).touch()
    assert utils.next_stamp(tmp_path, "align_pipeline") == "30000101_000000"
    (tmp_path / "align_pipeline_99991231_235959.pth").touch()
    refusal(lambda: utils.next_stamp(tmp_path, "align_pipeline"), "99991231_235959.pth", "rename it")


def test_one_line_is_one_short_line_without_secrets(monkeypatch):
    """A library's error that fills the screen or is empty; a token or password in it; asterisks for no secret."""
    assert utils.one_line(ValueError("a\n  b\r\n\tc")) == "a b c"
    assert utils.one_line(ValueError()) == "ValueError"
    assert len(utils.one_line(ValueError("word " * 1000), limit=50)) == 50
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_first\n")
    monkeypatch.setenv("HF_TOKEN", "hf_second")
    assert utils.one_line(ValueError("401 for Bearer hf_first, hf_second\n")) == "401 for Bearer ***, ***"
    assert "hf_f" not in utils.one_line(ValueError("x" * 20 + "hf_first"), limit=25)  # cut only after it is hidden
    stored = "hf_" + "aBcD" * 9
    assert utils.one_line(ValueError(f"Bearer {stored}; http://me:se@cret@proxy:1 of hf_transfer")) == (
        "Bearer ***; http://***@proxy:1 of hf_transfer"
    )
    text = "a bad port at http://127.0.0.1:7890, ask a@b.org"
    assert utils.without_secrets(text) == text


def test_the_token_of_a_login_counts_after_that_of_the_environment(tmp_path, monkeypatch):
    """A user who has logged in as for every other tool, and is told that there is no such model."""
    for name in ("HUGGINGFACE_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert utils.hub_token() is None
    (tmp_path / "token").write_text("hf_stored\n")
    assert utils.hub_token() == "hf_stored"
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_set\n")
    assert utils.hub_token() == "hf_set"


# ----------------------------------------------------------------------------------------------------------------------
# Device and precision


def test_a_mistyped_precision_is_one_line():
    """A KeyError for `fp16`."""
    refusal(lambda: utils.get_dtype("fp16"), "precision fp16: choose from bfloat16, float16, float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_default_cuda_falls_back_with_one_warning_and_typed_cuda_is_an_error(caplog):
    """A user who asks for the GPU and trains on the CPU without knowing; a default that stops who has no GPU."""
    for name in ("cuda", "cuda:1"):
        with pytest.raises(utils.UserError, match=f"^device {name}: not available"):
            utils.resolve_device(name, typed=True)
    assert not caplog.records
    assert utils.resolve_device("cuda", typed=False).type in ("cpu", "mps")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.fixture
def gpus(monkeypatch):
    """A function: a machine with so many GPUs; gives the list of devices that became the current one."""

    def pretend(count, bfloat16=True):
        current = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16 or including_emulation)
        return current

    return pretend


@pytest.mark.parametrize(("name", "count", "current"), [("cuda", 8, 3), ("cuda", 1, 0), ("cuda:2", 8, 2)])
def test_each_process_of_a_launcher_computes_on_its_own_gpu(gpus, monkeypatch, name, count, current):
    """Eight processes whose trial of torch.compile opens eight contexts on the first GPU."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    became = gpus(count)
    assert utils.resolve_device(name, typed=False) == torch.device(name)
    assert became == [current]


@pytest.mark.parametrize("name", ["", "cuda:-1", "meta"])
@pytest.mark.parametrize("typed", [True, False])
def test_what_is_no_device_is_an_error_even_from_a_config(name, typed):
    """torch's own traceback; `meta`, which torch takes and which computes nothing."""
    with pytest.raises(utils.UserError, match=r"^device"):
        utils.resolve_device(name, typed)


@pytest.mark.parametrize(
    ("precision", "typed", "with_bfloat16", "without"),
    [
        ("float32", False, "float32", "float32"),
        ("bfloat16", False, "bfloat16", "float32"),
        ("bfloat16", True, "bfloat16", "bfloat16"),
        ("float16", False, "bfloat16", "float32"),
        ("float16", True, "bfloat16", "float32"),
    ],
)
def test_precision_on_a_cpu(monkeypatch, caplog, precision, typed, with_bfloat16, without):
    """float16 on a CPU, which has no gradient scaler; bfloat16 where it is slower; a typed choice not respected."""
    monkeypatch.setattr(utils, "_made_by_amd", lambda: False)
    for capability, expected in ((True, with_bfloat16), (False, without)):
        caplog.clear()
        capabilities = {"avx2": True, "avx512_bf16": True, "amx_bf16": capability}
        monkeypatch.setattr(torch.cpu, "get_capabilities", capabilities.copy, raising=False)
        assert utils.cpu_has_bfloat16() == capability
        assert utils.resolve_precision(precision, torch.device("cpu"), typed) == expected
        assert len(caplog.records) == (expected != precision)


@pytest.mark.parametrize("amd", [True, False])
def test_avx512_bf16_is_fast_on_amd_alone(monkeypatch, amd):
    """float32 on an EPYC, bfloat16 on a Xeon without AMX; a torch without torch.cpu.get_capabilities."""
    monkeypatch.setattr(utils, "_made_by_amd", lambda: amd)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": True}, raising=False)
    assert utils.cpu_has_bfloat16() == amd
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert not utils.cpu_has_bfloat16()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert utils.resolve_precision("bfloat16", torch.device("cpu"), typed=False) in ("bfloat16", "float32")


@pytest.mark.parametrize("supported", [True, False])
def test_precision_on_a_gpu(gpus, caplog, supported):
    """bfloat16 on a T4, V100 or RTX 20xx, which emulate it at a fraction of their speed; the rules for CPUs on a GPU."""
    gpus(1, bfloat16=supported)
    for name in ("bfloat16", "float16", "float32"):
        expected = "float16" if name == "bfloat16" and not supported else name
        assert utils.resolve_precision(name, torch.device("cuda"), typed=True) == expected
    assert len(caplog.records) == (not supported)


def test_float32_is_exact_where_it_is_asked_for(monkeypatch):
    """Figures and translations in TF32, with 10 bits of mantissa; a training run that leaves TF32 unused."""
    for switch in ("allow_tf32", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, switch, getattr(torch.backends.cudnn, switch))
    found = []
    for device, precision in (("cuda", "bfloat16"), ("cpu", "float32"), ("cuda", "float32"), ("cpu", "bfloat16")):
        utils.compute_policy(torch.device(device), precision)
        cudnn = torch.backends.cudnn
        found.append((cudnn.allow_tf32, cudnn.benchmark, torch.get_float32_matmul_precision()))
    assert found == [(True, True, "high")] * 2 + [(False, False, "highest")] * 2


def test_a_machine_without_a_compiler_is_one_line(monkeypatch):
    """torch.compile's page of errors at the first training step."""
    monkeypatch.setattr(torch, "compile", lambda function: lambda value: 1 / 0)
    refusal(lambda: utils.require_compiler(torch.device("cpu")), "compile: torch.compile does not work", "division by zero")


def test_autocast_keeps_float32_exact_and_casts_otherwise():
    """float32 asked for, bfloat16 got."""
    matrix = torch.eye(2)
    for dtype in (torch.float32, torch.bfloat16):
        with utils.autocast(torch.device("cpu"), dtype):
            assert (matrix @ matrix).dtype == dtype


# ----------------------------------------------------------------------------------------------------------------------
# Memory

OUT_OF_MEMORY = (
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    MemoryError(),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_running_out_of_memory_says_what_was_done_and_which_flags_help(error):
    """torch's page of allocator statistics; a RuntimeError that nobody takes for what it is."""

    def work(batch):
        precision = "float32" if batch > 1 else "bfloat16"
        with utils.memory_advice("training", train_batch_size=batch, num_workers=0, precision=precision):
            raise error

    text = refusal(lambda: work(64), "out of memory while training", "train_batch_size 64", "precision float32")
    assert "lower train_batch_size or use precision bfloat16" in text
    refusal(lambda: work(1), "use a machine with more of it")


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyboardInterrupt()])
def test_other_errors_pass_through_and_torchs_own_is_known(error):
    """A bug that is reported as too little memory; a wording of torch's that changes with its version."""
    with pytest.raises(type(error)) as caught, utils.memory_advice("training", train_batch_size=4):
        raise error
    assert caught.value is error and not utils.is_out_of_memory(error)
    with pytest.raises(RuntimeError) as own:
        torch.empty(1 << 50)
    assert utils.is_out_of_memory(own.value)


# ----------------------------------------------------------------------------------------------------------------------
# The request to stop


@pytest.fixture(autouse=True)
def handlers_of_the_suite():
    """A run that is stopped leaves the default handlers behind; this interpreter runs on."""
    before = {number: signal.getsignal(number) for number in utils.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_a_launcher_passes_on_is_no_second_signal(monkeypatch, capfd):
    """Ctrl-C under `accelerate launch`, which comes twice to each process, ends it unsaved."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    times = iter([0.0, 1.0, 1.0 + utils.RELAY / 2])
    monkeypatch.setattr("utils.time.monotonic", lambda: next(times))
    with utils.StopRequest() as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
    assert capfd.readouterr().err.count("finishing the step") == 1


def test_a_signal_is_heard_when_nobody_reads_the_log_any_more():
    """Ctrl-C under `2>&1 | tee log`, which ends tee as well: the run would fail on its own message, unsaved."""
    reader, writer = os.pipe()
    stderr = os.dup(2)
    os.close(reader)
    os.dup2(writer, 2)
    try:
        with utils.StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(writer)


@pytest.mark.parametrize("number", utils.WARNINGS, ids=lambda number: number.name)
def test_a_warning_stops_the_run_and_a_second_one_does_not_kill_it(number):
    """A closed terminal or a scheduler's warning that ends the run unsaved; a closed terminal sends two."""
    with utils.StopRequest() as stop:
        for _ in range(2):
            signal.raise_signal(number)
        assert stop.signal == number
    signal.raise_signal(number)  # while the checkpoint is written out


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(number):
    """A run under nohup that a closed terminal stops; a script's background job that ends with Ctrl-C for another one."""
    signal.signal(number, signal.SIG_IGN)
    with utils.StopRequest() as stop:
        signal.raise_signal(number)
    assert stop.signal is None and signal.getsignal(number) == signal.SIG_IGN
