"""Latent spaces and the file to give away: the map there and back, what the file carries, and files from a hostile hand."""

import json
import math
import os

import pytest
import torch
from hostile import refusal
from safetensors.torch import load_file, save_file

from vae_align import AlignConfig, AlignModule, AlignPipeline, LatentSpace, _crc_of_tensors, read_checkpoint

SPACE1 = LatentSpace.from_scale("sd15", 4, 8, 0.18215)
SPACE2 = LatentSpace("other", 16, 8, tuple(range(16)), tuple(range(1, 17)))


def make_pipeline(**options):
    torch.manual_seed(0)
    module = AlignModule(AlignConfig(**{"hidden_channels": 8, "num_blocks": 1, "input_types": ("latent",), **options})).eval()
    return AlignPipeline(module, SPACE1, SPACE2, {"aligned": {"psnr": 24.5, "ssim": None}})


# ----------------------------------------------------------------------------------------------------------------------
# Latent spaces


def test_scaled_latents_are_what_the_formula_says():
    """Mean and deviation swapped, one number for all channels, or the scale taken for its inverse."""
    raw = torch.randn(2, 16, 3, 5)
    scaled = SPACE2.to_scaled(raw)
    for channel in range(16):
        torch.testing.assert_close(scaled[:, channel], (raw[:, channel] - channel) / (channel + 1))
    shifted = LatentSpace.from_scale("flux1", 16, 8, 0.3611, 0.1159)
    torch.testing.assert_close(shifted.to_scaled(raw), (raw - 0.1159) * 0.3611)


@pytest.mark.parametrize("fold", [1, 2])
def test_a_space_undoes_its_own_map(fold):
    """The inverse in the wrong order, or latents unfolded in another order than they were folded."""
    space = LatentSpace("folded", 16 * fold**2, 8 * fold, tuple(range(16 * fold**2)), (0.5,) * 16 * fold**2, fold)
    raw = torch.randn(2, 16, 4, 6)
    scaled = space.to_scaled(raw)
    assert scaled.shape == (2, space.channels, 4 // fold, 6 // fold)
    torch.testing.assert_close(space.to_raw(scaled), raw)
    assert LatentSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space


def test_folding_orders_channel_row_column():
    """Rows and columns swapped, or places before channels: FLUX.2 orders (channel, row, column)."""
    space = LatentSpace("folded", 8, 16, (0,) * 8, (1,) * 8, 2)
    raw = torch.arange(8.0).view(1, 2, 2, 2)
    assert space.to_scaled(raw).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_only_an_unnamed_space_that_maps_nothing_is_unknown():
    """A tiny autoencoder's scale of 1 taken for the raw map of its space; a named space with that map refused."""
    assert not LatentSpace.from_scale(None, 4, 8).map_is_known
    assert LatentSpace.from_scale("flux2", 4, 8).map_is_known
    assert LatentSpace.from_scale(None, 4, 8, 0.5).map_is_known
    assert LatentSpace.from_scale(None, 4, 8, 1.0, 0.1).map_is_known


def test_inputs_that_are_no_latents_are_refused():
    """An AttributeError for a list; whole numbers that are rounded on the way out."""
    refusal(lambda: make_pipeline().translate([[1.0]]), "list", "tensor")
    refusal(lambda: make_pipeline().translate(torch.zeros(1, 4, 4, 4, dtype=torch.int64)), "int64")


# ----------------------------------------------------------------------------------------------------------------------
# The file


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


# ----------------------------------------------------------------------------------------------------------------------
# Files from a hostile hand

GONE = object()
DESCRIPTIONS = {  # what the description says in place of the truth, and what the message says
    "another architecture": ({"align_config.activation": "gelu"}, "'activation'"),
    "an architecture that is a list": ({"align_config": []}, "incomplete"),
    "a billion channels": ({"align_config.hidden_channels": 10**9}, "hidden_channels 1000000000"),
    "weights that are not there": ({"align_config.num_blocks": 2}, "do not fit"),
    "a later format": ({"format_number": 2}, "newer"),
    "a format in words": ({"format_number": "one"}, "format_number 'one'"),
    "no format number": ({"format_number": GONE}, "incomplete"),
    "another tool's": ({"format": "other"}, "not a checkpoint"),
    "no space": ({"space1": GONE}, "incomplete"),
    "a space with an unknown key": ({"space1.rotation": 90}, "'rotation'"),
    "a space of other channels": ({"space1.channels": 8}, "8 numbers"),
    "a space of another stride": ({"space2.stride": 16}, "contradicts"),
    "a deviation of zero": ({"space1.std": [1, 1, 0, 1]}, "std"),
    "a mean in words": ({"space1.mean": [0, 0, 0, "zero"]}, "mean"),
    "a mean that is too short": ({"space1.mean": [0]}, "mean"),
    "a name that is a number": ({"space2.name": 7}, "name"),
    "figures in a list": ({"figures": []}, "incomplete"),
    "no figures": ({"figures": GONE}, "incomplete"),
    "one VAE": ({"vaes": ["owner/name"]}, "incomplete"),
    "VAEs that are numbers": ({"vaes": [1, 2]}, "incomplete"),
}


@pytest.fixture
def path(tmp_path):
    """A sound file, to be damaged."""
    return make_pipeline().save_pretrained(tmp_path / "module.safetensors")


def describe(path, changes=None):
    """Rewrite the file with `changes` of its description, {"key.key": value or GONE}, and a sound checksum of its tensors."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    description = json.loads(header["__metadata__"]["vae_align"])
    for name, value in (changes or {}).items():
        *outer, last = name.split(".")
        place = description
        for part in outer:
            place = place[part]
        place.pop(last, None) if value is GONE else place.update({last: value})
    tensors = load_file(path)
    save_file(tensors, path, {"vae_align": json.dumps(description)})
    description["crc32"] = _crc_of_tensors(path.read_bytes())
    save_file(tensors, path, {"vae_align": json.dumps(description)})


def test_a_description_written_anew_is_read(path):
    """That the kinds below are refused for what they change."""
    describe(path)
    assert AlignPipeline.from_pretrained(path).space1 == SPACE1


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_a_hostile_description_is_one_line(path, kind):
    """A traceback; an architecture key that is passed over, so that the module computes something else than was trained."""
    changes, said = DESCRIPTIONS[kind]
    describe(path, changes)
    refusal(lambda: read_checkpoint(path), path, said)
    refusal(lambda: AlignPipeline.from_pretrained(path), path)


def poison(path):
    tensors = load_file(path)
    tensors["out.bias"][0] = math.nan
    metadata = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])["__metadata__"]
    save_file(tensors, path, metadata)
    describe(path)


DAMAGE = {
    "cut by a byte": (lambda path: os.truncate(path, path.stat().st_size - 1), "damaged"),
    "cut in half": (lambda path: os.truncate(path, path.stat().st_size // 2), "damaged"),
    "empty": (lambda path: os.truncate(path, 0), "damaged"),
    "a header without end": (lambda path: path.write_bytes(b"\xff" * 7 + b"\x0f{" + bytes(99)), "damaged"),
    "tensors without a description": (lambda path: save_file(load_file(path), path), "not a checkpoint"),
    "a description that is no JSON": (lambda path: save_file(load_file(path), path, {"vae_align": "{"}), "damaged"),
    "weights of NaN": (poison, "not finite"),
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
