"""The file to give away, and `vae_align.py` itself: copied, installed, written, read, and files from a hostile hand."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hostile import flip_bit, refusal
from pipelines import untrained
from safetensors.torch import load_file, save_file

from vae_align import AlignConfig, AlignPipeline, LatentSpace, _crc_of_tensors, align_module, check_weights
from vaes.pipeline import PipelineWithVAEs, read_checkpoint

SHIPPED = ROOT / "assets" / "pretrained" / "taesd_to_taef1_latent.safetensors"
FILES = ROOT / "tests" / "files"
HOST = """
import sys
import torch
for name in ("numpy", "diffusers", "huggingface_hub", "accelerate", "PIL"):
    sys.modules[name] = None  # importing it raises
import utils, device, metrics
assert utils.OWNER == device.OWNER == metrics.OWNER == "the host"
{imported}
torch.set_num_threads(1)
latents = torch.linspace(-2, 2, 4 * 12 * 10).view(1, 4, 12, 10)
torch.save(AlignPipeline.from_checkpoint(sys.argv[1]).translate(latents), "translated.pt")
"""
SPACE1 = LatentSpace.from_scale("sd15", 4, 8, 0.18215)
SPACE2 = LatentSpace("other", 16, 8, tuple(range(16)), tuple(range(1, 17)))


def make_pipeline():
    pipeline = untrained(SPACE1, SPACE2)
    pipeline.figures = {"aligned": {"psnr": 24.5, "ssim": None}}
    return pipeline


@pytest.mark.parametrize("form", ["file", "module of a package"])
def test_a_copy_works_in_a_foreign_host(tmp_path, form):
    """An import of ours, of numpy or diffusers, or a top-level name that a host such as ComfyUI owns; other results there."""
    (tmp_path / "utils").mkdir()
    for name in ("utils/__init__.py", "device.py", "metrics.py"):
        (tmp_path / name).write_text("OWNER = 'the host'\n")
    place = tmp_path / "pack" if form == "module of a package" else tmp_path
    place.mkdir(exist_ok=True)
    shutil.copy(ROOT / "vae_align.py", place)
    imported = "from vae_align import AlignPipeline"
    if form == "module of a package":
        (place / "__init__.py").write_text("from .vae_align import AlignPipeline\n")
        imported = "from pack import AlignPipeline"
    (tmp_path / "host.py").write_text(HOST.format(imported=imported))
    command = [sys.executable, "host.py", str(SHIPPED)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    latents = torch.linspace(-2, 2, 4 * 12 * 10).view(1, 4, 12, 10)
    expected = AlignPipeline.from_pretrained(SHIPPED).translate(latents)
    assert torch.equal(torch.load(tmp_path / "translated.pt"), expected)


def test_what_is_installed_is_the_inference_file():
    """`pip install .` that ships the workshop, or that pulls in what training needs."""
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"] == {"py-modules": ["vae_align"], "packages": []}
    needed = {line.partition(">")[0] for line in settings["project"]["dependencies"]}
    assert needed == {"torch", "safetensors"}
    listed = {
        line.partition(">")[0] for line in (ROOT / "requirements.txt").read_text().split("# tests")[0].splitlines() if line
    }
    extras = {line.partition(">")[0] for line in settings["project"]["optional-dependencies"]["train"]}
    assert needed | extras == listed


@pytest.mark.parametrize("open_file", [AlignPipeline.from_pretrained, PipelineWithVAEs.from_checkpoint])
@pytest.mark.parametrize("name", ["module.safetensors", "module.pth"])
def test_files_of_earlier_versions_are_read_as_they_were(name, open_file):
    """A renamed weight, key or class: every module that somebody has trained would be lost."""
    if name.endswith(".pth") and open_file == AlignPipeline.from_pretrained:
        refusal(lambda: open_file(FILES / name), FILES / name, "save_pretrained", ".safetensors")
        return
    pipeline = open_file(FILES / name)
    latents = torch.arange(60, dtype=torch.float64).mul(12.9898).sin().view(1, 4, 3, 5).float()
    recorded = [237.386139, -152.029739, 36.227005, 90.488853]
    assert pipeline.translate(latents)[0, :, 1, 2].tolist() == pytest.approx(recorded, rel=1e-5)
    assert (pipeline.space1.name, pipeline.figures) == ("sd15", {"aligned": {"psnr": 20.5}})


@pytest.mark.parametrize("place", ["folder", "file.safetensors"])
def test_a_saved_pipeline_comes_back(tmp_path, place):
    """A space, a figure or a digit that the file forgets."""
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / place)
    again = AlignPipeline.from_pretrained(tmp_path / place)
    assert (again.config, again.space1, again.space2) == (pipeline.config, pipeline.space1, pipeline.space2)
    assert again.figures == pipeline.figures
    latents = torch.randn(1, 4, 5, 7)
    assert torch.equal(again.translate(latents), pipeline.translate(latents))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_weights_are_stored_as_they_are_and_computed_in_float32(tmp_path, dtype):
    """Weights widened in the file, a file of twice the size; or a computation in float16 because the file is."""
    path = make_pipeline().to(dtype).save_pretrained(tmp_path / "module.safetensors")
    assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}
    assert AlignPipeline.from_pretrained(path).module.out.weight.dtype == torch.float32
    assert AlignPipeline.from_pretrained(path, dtype=torch.bfloat16).module.out.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("figures", [{"psnr": math.nan}, {"psnr": object()}], ids=["NaN", "object"])
def test_figures_that_json_does_not_know_are_one_line_and_leave_nothing(tmp_path, figures):
    """json's traceback; a file that other readers of JSON refuse."""
    pipeline = make_pipeline()
    pipeline.figures = figures
    refusal(lambda: pipeline.save_pretrained(tmp_path / "module.safetensors"), "figures", "module.safetensors")
    refusal(lambda: pipeline.save_pretrained(tmp_path / "folder"), "figures")
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("config.json"))


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    """An OSError's traceback where the folder is a file."""
    (tmp_path / "taken").write_text("")
    refusal(lambda: make_pipeline().save_pretrained(tmp_path / "taken" / "module.safetensors"), "cannot be written")


def test_a_planted_link_is_not_written_through(tmp_path, monkeypatch):
    """A temporary file whose name can be guessed, planted as a link to a file of the user's, which is then overwritten."""
    (tmp_path / "victim").write_text("precious")
    monkeypatch.setattr(os, "urandom", bytes)
    for name in (f".module.safetensors.{os.getpid()}.tmp", ".module.safetensors.00000000.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    refusal(lambda: make_pipeline().save_pretrained(tmp_path / "module.safetensors"), "cannot be written")
    assert (tmp_path / "victim").read_text() == "precious"


def test_weights_that_claim_more_than_they_hold_take_no_memory(tmp_path):
    """Views of one number that stand for gigabytes, in a file of a few kilobytes; one storage that serves all weights."""
    config = AlignConfig(("latent",), hidden_channels=8192, num_blocks=3)
    with torch.device("meta"):
        shapes = align_module(config).state_dict()
    weights = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in shapes.items()}
    refusal(lambda: check_weights(weights, config), "claim more numbers than it holds")
    config = make_pipeline().config
    one = torch.zeros(100_000)
    shared = {name: one[: tensor.numel()].view(tensor.shape) for name, tensor in make_pipeline().module.state_dict().items()}
    shared |= {f"{name}.again": one for name in shared}
    refusal(lambda: check_weights(shared, config), "claim more numbers than it holds")


# ----------------------------------------------------------------------------------------------------------------------
# Files from a hostile hand

DESCRIPTIONS = {  # what the description says in place of the truth, and what the message says
    "another architecture": ({"align_config.activation": "gelu"}, "'activation'"),
    "weights that are not there": ({"align_config.num_blocks": 2}, "do not fit"),
    "a later format": ({"format_number": 2}, "newer version"),
    "a format in words": ({"format_number": "one"}, "format_number 'one'"),
    "another tool's": ({"format": "other"}, "not a checkpoint"),
    "a space with an unknown key": ({"space1.rotation": 90}, "'rotation'"),
    "a space of other channels": ({"space1.channels": 8}, "8 numbers"),
    "a space of another stride": ({"space2.stride": 16}, "contradicts"),
    "a deviation of zero": ({"space1.std": [1, 1, 0, 1]}, "std"),
    "a mean in words": ({"space1.mean": [0, 0, 0, "zero"]}, "mean"),
    "a name that is a number": ({"space2.name": 7}, "name"),
    "figures in a list": ({"figures": []}, "incomplete"),
    "one VAE": ({"vaes": ["owner/name"]}, "incomplete"),
}


@pytest.fixture
def path(tmp_path):
    """A sound file, to be damaged."""
    return make_pipeline().save_pretrained(tmp_path / "module.safetensors")


def describe(path, changes):
    """Rewrite the file with `changes` of its description, {"key.key": value}, and a sound checksum of its tensors."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    description = json.loads(header["__metadata__"]["vae_align"])
    for name, value in changes.items():
        *outer, last = name.split(".")
        place = description
        for part in outer:
            place = place[part]
        place[last] = value
    tensors = load_file(path)
    save_file(tensors, path, {"vae_align": json.dumps(description)})
    description["crc32"] = _crc_of_tensors(path.read_bytes())
    save_file(tensors, path, {"vae_align": json.dumps(description)})


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_a_hostile_description_is_one_line(path, kind):
    """A traceback; an architecture key that is passed over, so that the module computes something else than was trained."""
    changes, said = DESCRIPTIONS[kind]
    describe(path, changes)
    refusal(lambda: read_checkpoint(path), path, said)
    refusal(lambda: AlignPipeline.from_pretrained(path), path)


DAMAGE = {
    "one bit of a weight flipped": (flip_bit, "damaged"),  # .safetensors has no checksum of its own
    "cut by a byte": (lambda path: os.truncate(path, path.stat().st_size - 1), "damaged"),
    "a header without end": (lambda path: path.write_bytes(b"\xff" * 7 + b"\x0f{" + bytes(99)), "damaged"),
    "tensors without a description": (lambda path: save_file(load_file(path), path), "not a checkpoint"),
    "a description that is no JSON": (lambda path: save_file(load_file(path), path, {"vae_align": "{"}), "damaged"),
    "gone": (lambda path: path.unlink(), "no such file"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "pipe"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_one_line(path, kind):
    """NaN that is translated to NaN, a pipe that is waited for, a traceback of safetensors."""
    make, said = DAMAGE[kind]
    make(path)
    refusal(lambda: AlignPipeline.from_pretrained(path), path, said)


def test_a_file_of_another_ending_is_read_by_what_it_is(path):
    """A .safetensors file that was renamed, handed to torch's unpickler."""
    renamed = path.rename(path.with_suffix(".pth"))
    assert AlignPipeline.from_checkpoint(renamed).space1 == SPACE1
