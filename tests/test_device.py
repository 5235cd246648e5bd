"""Device and precision: what is chosen, and what is said of it."""

import pytest
import torch
from hostile import refusal

import utils as device
from utils import (
    UserError,
    autocast,
    cpu_has_bfloat16,
    get_dtype,
    is_out_of_memory,
    memory_advice,
    resolve_device,
    resolve_precision,
)


def test_get_dtype_knows_the_three_precisions_and_names_them_otherwise():
    """Two precisions swapped; a KeyError for a mistyped one."""
    expected = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    assert {name: get_dtype(name) for name in expected} == expected
    for name in ("fp16", "float64", ""):
        with pytest.raises(UserError, match="choose from bfloat16, float16, float32"):
            get_dtype(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_default_cuda_falls_back_with_one_warning_and_typed_cuda_is_an_error(caplog):
    """A user who asks for the GPU and trains on the CPU without knowing; a default that stops who has no GPU."""
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"^device {name}: not available"):
            resolve_device(name, typed=True)
    assert not caplog.records
    assert resolve_device("cuda", typed=False).type in ("cpu", "mps")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_cpu_is_always_there_and_not_remarked_upon(caplog):
    """A warning about the device that the user asked for."""
    assert resolve_device("cpu", typed=True) == resolve_device("cpu", typed=False) == torch.device("cpu")
    assert not caplog.records


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "cuda:-1", "meta"])
@pytest.mark.parametrize("typed", [True, False])
def test_what_is_no_device_is_an_error_even_from_a_config(name, typed):
    """torch's own traceback; `meta`, which torch takes and which computes nothing."""
    with pytest.raises(UserError, match=r"^device"):
        resolve_device(name, typed)


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
    monkeypatch.setattr(device, "_made_by_amd", lambda: False)
    for capability, expected in ((True, with_bfloat16), (False, without)):
        caplog.clear()
        capabilities = {"avx2": True, "avx512_bf16": True, "amx_bf16": capability}
        monkeypatch.setattr(torch.cpu, "get_capabilities", capabilities.copy, raising=False)
        assert cpu_has_bfloat16() == capability
        assert resolve_precision(precision, torch.device("cpu"), typed) == expected
        assert len(caplog.records) == (expected != precision)


@pytest.mark.parametrize("amd", [True, False])
def test_avx512_bf16_is_fast_on_amd_alone(monkeypatch, amd):
    """float32 on an EPYC, at half the speed; bfloat16 on a Xeon without AMX."""
    monkeypatch.setattr(device, "_made_by_amd", lambda: amd)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": True}, raising=False)
    assert cpu_has_bfloat16() == amd
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert not cpu_has_bfloat16()


def test_precision_on_a_cpu_with_a_torch_that_cannot_tell(monkeypatch):
    """torch.cpu.get_capabilities is younger than the oldest torch of requirements.txt: a traceback before anything else."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_precision("bfloat16", torch.device("cpu"), typed=False) in ("bfloat16", "float32")


def test_precision_on_a_gpu_is_as_asked():
    """The rules for CPUs applied to a GPU; a mistyped precision that passes."""
    for precision in ("bfloat16", "float16", "float32"):
        assert resolve_precision(precision, torch.device("cuda"), typed=False) == precision
    with pytest.raises(UserError, match=r"^precision half"):
        resolve_precision("half", torch.device("cpu"), typed=True)


def test_autocast_keeps_float32_exact_and_casts_otherwise():
    """float32 asked for, bfloat16 got."""
    matrix = torch.eye(2)
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(torch.device("cpu"), dtype):
            assert (matrix @ matrix).dtype == dtype


# ----------------------------------------------------------------------------------------------------------------------
# Too little memory

OUT_OF_MEMORY = {
    "cuda": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_running_out_of_memory_says_what_was_done_and_which_flags_help(kind):
    """torch's page of allocator statistics; a RuntimeError that nobody takes for what it is."""
    error = OUT_OF_MEMORY[kind]
    assert is_out_of_memory(error)

    def work():
        with memory_advice("training", train_batch_size=64, num_workers=0, precision="float32"):
            raise error

    text = refusal(work, "out of memory while training", "train_batch_size 64", "precision float32")
    assert "lower train_batch_size or use precision bfloat16" in text


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory"), UserError("x"), KeyboardInterrupt()]
)
def test_other_errors_pass_through(error):
    """A bug that is reported as too little memory."""
    with pytest.raises(type(error)) as caught, memory_advice("training", train_batch_size=4):
        raise error
    assert caught.value is error and not is_out_of_memory(error)


def test_advice_when_nothing_can_be_lowered():
    """ "lower " and nothing after it."""

    def work():
        with memory_advice("training", train_batch_size=1, precision="bfloat16"):
            raise MemoryError

    refusal(work, "use a machine with more of it")


def test_torchs_own_error_on_the_cpu_is_known():
    """A wording of torch's that changes with its version."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50)
    assert is_out_of_memory(error.value)
