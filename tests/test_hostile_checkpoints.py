"""Checkpoints from a hostile hand or a dying disk: each loads as it was saved, or is refused in one line, and runs no code."""

import json
import math
import os
import random
import resource
import shutil
import zipfile

import pytest
import torch
from conftest import as_argv, tiny_flags
from hostile import no_hang, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import Payload, make_pipeline, save
from runs import QUIET, train
from safetensors.torch import save_file

import eval_align
import train_align_with_args as train_script
from latents.pipeline import PipelineWithVAEs, require_memory_for
from runtime.cli import MISTAKES
from vae_align import AlignConfig, read_checkpoint


@pytest.fixture(scope="module")
def good(vae_folders, tmp_path_factory):
    """(pipeline kl4 -> kl16, its checkpoint, which no test changes)."""
    pipeline = make_pipeline(vae_folders["kl4"], vae_folders["kl16"])
    config = {"seed": 1, "image_size": 32, "precision": "float32"}
    return pipeline, save(pipeline, tmp_path_factory.mktemp("good"), config=config)


@pytest.fixture
def path(good, tmp_path):
    """A copy of the good checkpoint, to be damaged."""
    return shutil.copy(good[1], tmp_path / "align_pipeline_20260101_000000.pth")


def rewrite(path, change):
    """Load the checkpoint, `change` its dict, and save it as torch does, checksums and all."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def rezip(path, change, compression=zipfile.ZIP_STORED):
    """Copy the zip part by part with sound checksums; `change(name, content)` gives each part's new content."""
    with zipfile.ZipFile(path) as parts:
        contents = {name: parts.read(name) for name in parts.namelist()}
    with zipfile.ZipFile(path, "w", compression) as parts:
        for name, content in contents.items():
            parts.writestr(name, change(name, content))


def setting(part, **values):
    return lambda path: rewrite(path, lambda content: content[part].update(values))


def top(**values):
    return lambda path: rewrite(path, lambda content: content.update(values))


def without(*names):
    def drop(content):
        for name in names[:-1]:
            content = content[name]
        del content[names[-1]]

    return lambda path: rewrite(path, drop)


def cut(path, share):
    os.truncate(path, int(path.stat().st_size * share))


def claim_more_elements(path):
    """A storage that says it holds a billion numbers, in a part of the file that holds a few."""
    rezip(
        path,
        lambda name, content: (
            content.replace(b"K\x10", b"J" + (10**9).to_bytes(4, "little")) if name.endswith(".pkl") else content
        ),
    )


def flip_in_weights(path):
    with zipfile.ZipFile(path) as parts:
        part = max(parts.infolist(), key=lambda part: part.file_size)
    content = bytearray(path.read_bytes())
    content[part.header_offset + 200] ^= 1
    path.write_bytes(content)


BIAS = "out.bias"
KINDS = {  # kind: (what makes it of a good one, what the message says)
    "cut to nothing": (lambda path: cut(path, 0), "checkpoint"),
    "cut to a few bytes": (lambda path: path.write_bytes(b"PK"), "damaged"),
    "cut in half": (lambda path: cut(path, 0.5), "damaged"),
    "cut by a byte": (lambda path: os.truncate(path, path.stat().st_size - 1), "damaged"),
    "of zeros": (lambda path: path.write_bytes(bytes(4096)), "checkpoint"),
    "of noise": (lambda path: path.write_bytes(random.Random(0).randbytes(4096)), "checkpoint"),
    "one bit of a weight flipped": (flip_in_weights, "damaged"),
    "json": (lambda path: path.write_text(json.dumps({"format": "vae-align"})), "checkpoint"),
    "picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "checkpoint"),
    "safetensors": (lambda path: save_file({"out.bias": torch.zeros(3)}, path), "checkpoint"),
    "zip of something else": (lambda path: zipfile.ZipFile(path, "w").close(), "checkpoint"),
    "zip that compresses": (lambda path: rezip(path, lambda name, content: content, zipfile.ZIP_DEFLATED), "compresses"),
    "zip bomb": (lambda path: rezip(path, lambda name, content: bytes(1 << 18), zipfile.ZIP_DEFLATED), "compresses"),
    "state dict alone": (lambda path: torch.save(torch.load(path, weights_only=True)["state_dict"], path), "not a checkpoint"),
    "tensor alone": (lambda path: torch.save(torch.zeros(3), path), "not a checkpoint"),
    "list": (lambda path: torch.save([1, 2], path), "not a checkpoint"),
    "another tool's": (top(format="other"), "not a checkpoint"),
    "format of the wrong type": (top(format=["vae-align"]), "not a checkpoint"),
    "storage that claims more than it has": (claim_more_elements, "damaged"),
    "no weights": (top(state_dict={}), "do not fit"),
    "weights in a list": (top(state_dict=[]), "incomplete"),
    "a weight missing": (without("state_dict", BIAS), "out.bias"),
    "a weight too many": (setting("state_dict", extra=torch.zeros(1)), "extra"),
    "a weight whose name is a number": (lambda path: rewrite(path, lambda content: content["state_dict"].update({7: 7})), "7"),
    "a weight of another shape": (setting("state_dict", **{BIAS: torch.zeros(3)}), "out.bias"),
    "a weight of no shape": (setting("state_dict", **{BIAS: torch.tensor(1.0)}), "out.bias"),
    "a weight that is a number": (setting("state_dict", **{BIAS: 3.0}), "out.bias"),
    "a weight that is none": (setting("state_dict", **{BIAS: None}), "out.bias"),
    "a weight of whole numbers": (setting("state_dict", **{BIAS: torch.zeros(16, dtype=torch.int64)}), "out.bias"),
    "a weight that is complex": (setting("state_dict", **{BIAS: torch.zeros(16, dtype=torch.complex64)}), "out.bias"),
    "a weight without memory": (setting("state_dict", **{BIAS: torch.zeros(16, device="meta")}), "out.bias"),
    "a weight that is NaN": (setting("state_dict", **{BIAS: torch.full((16,), math.nan)}), "not finite"),
    "a weight that is infinite": (setting("state_dict", **{BIAS: torch.full((16,), math.inf)}), "not finite"),
    "a billion channels": (setting("align_config", hidden_channels=10**9), "hidden_channels 1000000000"),
    "a billion blocks": (setting("align_config", num_blocks=10**9), "num_blocks 1000000000"),
    "a thousand blocks that are not there": (setting("align_config", num_blocks=1000), "do not fit"),
    "8192 channels that are not there": (setting("align_config", hidden_channels=8192), "do not fit"),
    "a billion halvings": (setting("align_config", downsample_times=10**9), "downsample_times"),
    "a stride of 10**30": (setting("align_config", out_stride=10**30), "out_stride"),
    "strides that share no grid": (setting("align_config", latent_stride=3), "strides"),
    "zero channels": (setting("align_config", out_channels=0), "out_channels"),
    "half a channel": (setting("align_config", hidden_channels=8.5), "hidden_channels"),
    "true channels": (setting("align_config", hidden_channels=True), "hidden_channels"),
    "channels in words": (setting("align_config", hidden_channels="eight"), "hidden_channels"),
    "an input of another kind": (setting("align_config", input_types=["sound"]), "input_types"),
    "inputs in a list of lists": (setting("align_config", input_types=[["image"]]), "input_types"),
    "inputs of number": (setting("align_config", input_types=3), "checkpoint"),
    "no architecture": (without("align_config"), "incomplete"),
    "no VAE": (without("vae1"), "incomplete"),
    "a VAE without channels": (without("vae2", "channels"), "incomplete"),
    "a VAE of another space": (setting("vae1", channels=16), "contradicts"),
    "a VAE whose path is a number": (setting("vae1", path=3), "incomplete"),
    "a VAE whose subfolder is a list": (setting("vae2", subfolder=["vae"]), "incomplete"),
    "no step": (without("step"), "incomplete"),
    "a step before the first": (top(step=-1), "step"),
    "a step of NaN": (top(step=math.nan), "step"),
    "an epoch in words": (top(epoch="one"), "incomplete"),
    "metrics in a list": (top(metrics=[]), "incomplete"),
    "a config that is text": (top(config="{}"), "incomplete"),
    "a seed in words": (setting("config", seed="one"), "seed"),
    "an image size of 10**30": (setting("config", image_size=10**30), "image_size"),
    "a precision that is a list": (setting("config", precision=["float32"]), "incomplete"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_checkpoint_is_one_line(path, kind):
    """A traceback far from where the file was read; memory taken for a billion channels; NaN that trains on."""
    make, said = KINDS[kind]
    make(path)
    refusal(lambda: read_checkpoint(path), path, said)
    refusal(lambda: PipelineWithVAEs.from_checkpoint(path), path)


PLACES = {
    "folder without any": lambda path: path.mkdir(),
    "folder of one damaged": lambda path: (path.mkdir(), (path / "align_pipeline_20260101_000000.pth").write_bytes(b"PK")),
    "folder of one pipe": lambda path: (path.mkdir(), os.mkfifo(path / "align_pipeline_20260101_000000.pth")),
    "named pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_checkpoint_that_is_no_file_is_one_line(tmp_path, kind):
    """Waiting for someone to write into a pipe, or for a device to end."""
    PLACES[kind](tmp_path / "wanted")
    refusal(lambda: read_checkpoint(tmp_path / "wanted"), tmp_path / "wanted")


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 5000], ids=["NUL", "half a letter", "too long"])
def test_a_checkpoint_that_cannot_be_named_is_one_line(path):
    refusal(lambda: read_checkpoint(path))


def test_what_is_damaged_is_passed_over_in_a_folder(path, caplog):
    """A folder whose newest file a full disk cut short, or a pipe, that counts as holding none."""
    newer = path.with_name("align_pipeline_20260102_000000.pth")
    shutil.copy(path, newer)
    cut(newer, 0.9)
    os.mkfifo(path.with_name("align_pipeline_20260103_000000.pth"))
    with no_hang():
        assert read_checkpoint(path.parent)["step"] == 7
    assert caplog.text.count("trying the one before it") == 2


@pytest.mark.parametrize("part", ["top", "config", "vae1", "state_dict", "align_config"])
def test_code_anywhere_in_a_checkpoint_is_not_run(path, tmp_path, part):
    """A part of the file that is unpickled on its own, past torch's guard."""
    marker = tmp_path / "executed"
    content = torch.load(path, weights_only=True)
    (content if part == "top" else content[part])["step"] = Payload(marker)
    torch.save(content, path)
    refusal(lambda: read_checkpoint(path), "code")
    assert not marker.exists()


def same(content, other):
    """Whether two checkpoints' contents are equal, tensors bit for bit."""
    if isinstance(content, dict):
        return content.keys() == other.keys() and all(same(content[name], other[name]) for name in content)
    return torch.equal(content, other) if isinstance(content, torch.Tensor) else content == other


def test_a_checkpoint_with_any_bytes_changed_is_refused_or_read_as_it_was(good, tmp_path_factory):
    """A flipped bit that passes for a weight, or that makes zipfile, pickle or torch fail in a way of its own."""
    whole, expected = good[1].read_bytes(), read_checkpoint(good[1])
    path = tmp_path_factory.mktemp("flipped") / "any.pth"
    outcomes = set()
    edges = st.integers(0, 700) | st.integers(len(whole) - 3000, len(whole) - 1)  # headers, pickle and directory
    flip = st.tuples(edges | st.integers(0, len(whole) - 1), st.integers(1, 255))

    @settings(max_examples=120)
    @given(st.lists(flip, min_size=1, max_size=3), st.none() | st.integers(0, len(whole)))
    def check(flips, end):
        content = bytearray(whole)
        for place, bits in flips:
            content[place] ^= bits
        path.write_bytes(content[:end])
        try:
            with no_hang():
                found = read_checkpoint(path)
        except MISTAKES as error:
            assert str(error).isprintable()
            outcomes.add("refused")
        else:
            assert same(found, expected)
            outcomes.add("the same")

    check()
    assert "refused" in outcomes


def test_a_checkpoint_read_back_is_the_same(good):
    """The comparison above that would call anything equal."""
    content = read_checkpoint(good[1])
    assert same(content, read_checkpoint(good[1]))
    changed = read_checkpoint(good[1])
    changed["state_dict"][BIAS][0] += 1
    assert not same(content, changed)


def test_the_programs_refuse_a_hostile_checkpoint_at_once(flags, path, tmp_path, monkeypatch):
    """A flag of one of the programs that reads checkpoints past the checks above."""
    monkeypatch.chdir(tmp_path)
    setting("state_dict", **{BIAS: torch.zeros(3)})(path)
    refusal(lambda: train_script.main(as_argv(flags | {"load_checkpoint": path})), path, BIAS)
    judge = ["--checkpoint", str(path), "--eval_data_dir", str(flags["eval_data_dir"]), "--device", "cpu"]
    refusal(lambda: eval_align.main(judge), path, BIAS)


def test_a_checkpoint_for_other_vaes_is_one_line(flags, vae_folders, path, tmp_path, monkeypatch):
    """Weights of one pair of VAEs that are trained on for another."""
    monkeypatch.chdir(tmp_path)
    changes = {"vae1_path": vae_folders["kl16"], "vae2_path": vae_folders["kl4"], "load_checkpoint": path}
    for name in ("hidden_channels", "num_blocks"):
        changes[name] = None
    refusal(lambda: train_script.main(as_argv(flags | changes)), "trained for")


def test_a_module_larger_than_the_memory_is_refused_before_it_is_built(monkeypatch):
    """A process that the system ends without a word; a billion parameters started at random first."""
    monkeypatch.setattr("latents.pipeline.physical_memory", lambda: 4 * 100_000)
    refusal(lambda: require_memory_for(AlignConfig(hidden_channels=64)), "hidden_channels 64", "num_blocks 2")
    require_memory_for(AlignConfig(hidden_channels=8, num_blocks=0))


def test_a_full_disk_while_saving_is_one_line_and_leaves_nothing(good, tmp_path):
    """An hour of training that ends in torch's traceback, or half a checkpoint with the name of a whole one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        refusal(lambda: save(good[0], tmp_path / "full"), "cannot be written", tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "full").iterdir())


STATES = {  # what is set in the state of the training, or beside it
    "nothing in it": {"training": {}},
    "a list": {"training": [1]},
    "no order": {"order": {}},
    "an epoch of no steps": {"order": {"images": 10, "steps in an epoch": 0, "processes": 1}},
    "checkpoints of its own that are elsewhere": {"own": ["../precious.pth"]},
    "a name that is a path": {"run": "../../align_20260101_000000"},
    "no name": {"run": None},
    "a best in words": {"best": "yes"},
    "half a bad step": {"bad_steps": 0.5},
    "a sum of losses that is none": {"loss_sum": None},
    "a colour of one channel": {"colours": {"vae2_bias": torch.zeros(1), "shift": torch.zeros(3)}},
    "a colour of another name": {"colours": {"decoded": torch.zeros(3)}},
    "no optimizer": {"state": {"weights": None}},
    "another optimizer": {"optimizer": {"state": {}, "param_groups": []}},
    "moments of another shape": {"optimizer": "moments"},
    "a scheduler that is none": {"scheduler": None},
}


@pytest.fixture(scope="module")
def stopped(vae_folders, photo_folders, tmp_path_factory):
    """(flags of a short run, its checkpoint)."""
    folder = tmp_path_factory.mktemp("stopped")
    flags = tiny_flags(vae_folders, photo_folders, folder)
    return flags, train(flags, folder, **QUIET, max_train_steps=1).checkpoints[-1]


@pytest.mark.parametrize("kind", STATES)
def test_a_hostile_state_of_a_training_is_one_line(stopped, tmp_path, kind):
    """A traceback; a name in the file by which --keep_last deletes, or TensorBoard writes, whatever its author likes."""
    flags, path = stopped

    def change(content):
        training = content["training"]
        for name, value in STATES[kind].items():
            if value == "moments":
                for moments in training["state"]["optimizer"]["state"].values():
                    moments["exp_avg"] = torch.zeros(3)
                continue
            place = content if name in ("training", "run") else training if name in training else training["state"]
            place[name] = value

    path = shutil.copy(path, tmp_path / path.name)
    rewrite(path, change)
    changes = {**QUIET, "resume": path, "max_train_steps": 2}
    text = refusal(lambda: train(flags, tmp_path, **changes))
    assert "state of its training" in text, text
