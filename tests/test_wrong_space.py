"""Latents of another space with as many channels, and raw ones given as scaled ones, told by their statistics."""

import itertools
import logging
import re

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image, ImageDraw, ImageOps
from pipelines import latents_of
from safetensors.torch import save_file

from images.decoding import to_pixel_values
from images.files import list_images
from vae_align import HALF_WAY, AlignConfig, AlignPipeline, LatentSpace, align_module, detect_wrong_space
from vaes.codec import Codec
from vaes.families import SPACES
from vaes.loading import load_vae_model

OTHER = {"sd15": "sdxl", "sdxl": "sd15", "sd3": "flux1", "flux1": "sd3"}
REAL = {"sd15": "taesd", "sdxl": "taesdxl", "sd3": "taesd3", "flux1": "taef1"}


def pipeline_from(name):
    torch.manual_seed(0)
    config = AlignConfig(("latent",), SPACES[name].channels, 16, hidden_channels=8, num_blocks=1)
    return AlignPipeline(align_module(config).eval(), SPACES[name], SPACES["wan21"])


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("raw", [False, True], ids=["scaled", "raw"])
def test_another_spaces_latents_are_said_once_in_one_line_and_translated(name, raw, caplog):
    """SDXL's latents in a module for SD 1.5's, which gives a picture that is wrong and no word; a word for every batch;
    ComfyUI's raw latents, which the other space's map does not make its own."""
    pipeline, wrong = pipeline_from(OTHER[name]), latents_of(name)
    wrong = SPACES[name].to_raw(wrong) if raw else wrong
    for _ in range(2):
        translated = pipeline.translate(wrong, raw=raw)
    assert translated.isfinite().all() and translated.shape == (1, 16, 24, 24)
    (line,) = warnings_of(caplog)
    assert f"look like those of {name}" in line and f"takes those of {OTHER[name]}" in line and "\n" not in line
    assert f"use a module for {name}" in line and re.search(r"per latent -?\d+\.\d\d against -?\d", line)


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("raw", [False, True], ids=["scaled", "raw"])
@pytest.mark.parametrize("given", [False, True], ids=["as scaled", "as raw"])
def test_a_spaces_own_latents_are_taken_without_a_word_unless_given_as_the_other_kind(name, raw, given, caplog):
    """A false alarm, which teaches users to pass warnings over; latents several times too strong or too weak, and no word, or a
    word for every batch, or one that forgets the scale where the space is wrong too."""
    pipeline, own = pipeline_from(name), SPACES[name].to_raw(latents_of(name)) if raw else latents_of(name)
    for _ in range(2):
        pipeline.translate(own, raw=given)
    told = raw != given and name in HALF_WAY
    assert len(warnings_of(caplog)) == told
    if told:
        line, other = warnings_of(caplog)[0], detect_wrong_space(own, SPACES[OTHER[name]], given)
        ones = f"look like {'raw' if raw else 'scaled'} ones of {name}"
        assert ones in line and ("pass raw=True" if raw else "leave raw out") in line and "\n" not in line
        assert ones in other and f"use a module for {name} with{'' if raw else 'out'} raw=True" in other


@pytest.mark.parametrize("name", OTHER)
def test_latents_that_tell_nothing_raise_no_warning(name):
    """A word about an empty latent image, noise, a few latents, numbers that are none, or a space that nobody measured."""
    space = SPACES[name]
    for latents in (
        torch.zeros(1, space.channels, 32, 32),
        torch.full((1, space.channels, 32, 32), 3.0),
        torch.full((1, space.channels, 32, 32), torch.nan),
        torch.randn(2, space.channels, 64, 64, generator=torch.Generator().manual_seed(0)),
        14 * torch.randn(2, space.channels, 64, 64, generator=torch.Generator().manual_seed(0)),
        (latents_of(name) + torch.randn(1, space.channels, 24, 24, generator=torch.Generator().manual_seed(0))) / 2**0.5,
        latents_of(OTHER[name])[..., :6, :6],
        torch.zeros(1, space.channels, 3, 1),
    ):
        assert detect_wrong_space(latents, space) is None
        assert detect_wrong_space(space.to_raw(latents), space, True) is None
    unnamed = LatentSpace.from_scale(None, space.channels, 8)
    assert detect_wrong_space(latents_of(name), unnamed) is None
    assert detect_wrong_space(torch.randn(1, 32, 16, 16), SPACES["sana"]) is None


def test_precision_does_not_decide():
    """Sums in float16 that overflow, or a comparison that only float32 passes."""
    for name, other in OTHER.items():
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            assert detect_wrong_space(latents_of(name).to(dtype), SPACES[name]) is None
            assert detect_wrong_space(latents_of(name).to(dtype), SPACES[other])


def test_files_of_another_space_are_said_by_the_tool(tmp_path):
    """A folder of SDXL's latents translated as SD 1.5's by a program that swallows the library's word."""
    pipeline_from("sd15").save_pretrained(tmp_path / "module.safetensors")
    save_file({"latents": latents_of("sdxl")}, tmp_path / "a.safetensors")
    given = ["module.safetensors", "a.safetensors", "--output_dir", "out"]
    told = run_script("tools/translate.py", *given, cwd=tmp_path)
    lines = told.stderr.replace("\r", "\n").splitlines()
    assert sum("look like those of sdxl" in line for line in lines) == 1 and "1 of 1 translated" in told.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Real latents


def drawing(size):
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 30, 120, 140), fill="orange", outline="black", width=3)
    draw.rectangle((90, 80, 180, 170), fill="navy")
    draw.line((0, 10, 190, 180), fill="green", width=5)
    return image


@pytest.fixture(scope="module")
def real(shared):
    """{space: [scaled latents of a photo, …, of a drawing, of a plain colour]}, of tiny autoencoders."""
    size = 160
    photos = [
        ImageOps.fit(Image.open(path).convert("RGB"), (size, size)) for path in list_images(shared / "photos" / "eval")[::12]
    ]
    pictures = [*photos, drawing(size), Image.new("RGB", (size, size), "teal")]
    pictures = to_pixel_values(torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]))
    codecs = {name: Codec(load_vae_model(shared / "vaes" / vae, "", None, "cpu", torch.bfloat16)) for name, vae in REAL.items()}
    return {name: list(codec.encode(pictures).split(1)) for name, codec in codecs.items()}


@pytest.mark.parametrize("name", OTHER)
def test_real_latents_are_told_apart(real, name):
    """Statistics of one VAE's photos that do not hold for other pictures: false alarms, or photos that pass."""
    assert [detect_wrong_space(latents, SPACES[name]) for latents in real[name]] == [None] * len(real[name])
    *photos, _drawing, _colour = real[name]
    for wanted, raw, given in itertools.product((name, OTHER[name]), (False, True), (False, True)):
        told = wanted != name or (raw != given and name in HALF_WAY)
        given_latents = [SPACES[name].to_raw(latents) if raw else latents for latents in photos]
        assert {bool(detect_wrong_space(latents, SPACES[wanted], given)) for latents in given_latents} == {told}
