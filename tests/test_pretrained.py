"""The shipped modules: fit to be given away, usable without their VAEs, and as good as the README says."""

import json

import pytest
import torch
from conftest import ROOT

from dataloader import ImageDataset, eval_loader
from evaluation.ladder import Ladder, evaluate
from latents.pipeline import PipelineWithVAEs
from vae_align import read_checkpoint

PRETRAINED = [ROOT / "assets" / "pretrained" / f"taesd_to_taef1{kind}.pth" for kind in ("", "_latent")]


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_is_fit_to_be_given_away(path):
    """A folder of the machine that trained it; the state of its training, three times its size; another recipe's module."""
    content = read_checkpoint(path)
    assert "training" not in content
    assert [content[name]["path"] for name in ("vae1", "vae2")] == ["madebyollin/taesd", "madebyollin/taef1"]
    folders = [value for value in content["config"].values() if isinstance(value, str) and value.startswith("/")]
    assert not folders
    recipe = json.loads((ROOT / "config" / f"{path.stem}.json").read_text())
    different = {name for name, value in content["config"].items() if name in recipe and recipe[name] != value}
    # the machine's own, and a stop by time instead of by epochs
    assert different <= {"epochs", "max_train_steps", "device", "precision", "num_workers", "eval_batch_size",
                         "eval_frequency", "save_frequency", "visualize_frequency"}  # fmt: skip


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_translates_any_size_without_its_vaes(path):
    """A module that needs the hub to be used, or that knows one size only."""
    pipeline = PipelineWithVAEs.from_checkpoint(path)
    image = torch.zeros(1, 3, 192, 320) if pipeline.uses_image else None
    assert pipeline.translate(torch.randn(1, 4, 24, 40), image).shape == (1, 16, 24, 40)


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_a_large_picture_is_translated_as_its_parts_are(path):
    """Anything that looks at the whole picture, such as a normalisation: good at the training size, wrong at any other."""
    pipeline = PipelineWithVAEs.from_checkpoint(path)
    latents, image = torch.randn(1, 4, 48, 80), torch.rand(1, 3, 384, 640) * 2 - 1
    whole = pipeline.translate(latents, image if pipeline.uses_image else None)
    part = pipeline.translate(latents[..., 8:40, 8:40], image[..., 64:320, 64:320] if pipeline.uses_image else None)
    reach = 15  # latents; beyond it nothing of a neighbour is seen
    assert torch.allclose(
        whole[..., 8:40, 8:40][..., reach:-reach, reach:-reach], part[..., reach:-reach, reach:-reach], atol=1e-4
    )


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_beats_decoding_and_encoding_again(path, shared):
    """Shipped weights that do not belong to the figures in the README."""
    vaes = (str(shared / "vaes" / name) for name in ("taesd", "taef1"))
    pipeline = PipelineWithVAEs.from_checkpoint(path, *vaes, vae1_subfolder="", vae2_subfolder="")
    photos = ImageDataset(sorted((shared / "photos" / "eval").iterdir())[::17], 256)  # six, of many kinds
    loader = eval_loader(photos, 6, 0)
    rungs = Ladder(pipeline, torch.float32, only=("vae2", "reencode", "aligned"))
    ladder = evaluate(rungs, loader, show_progress=False)["ladder"]
    aligned, reencode, vae2 = (ladder[name] for name in ("aligned", "reencode", "vae2"))
    assert aligned["psnr"] > reencode["psnr"]
    assert aligned["latent_mse"] < reencode["latent_mse"]
    if pipeline.uses_image:
        assert aligned["psnr"] > vae2["psnr"]
