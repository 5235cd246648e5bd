"""The shipped modules: fit to be given away, usable without their VAEs, and as good as the README says."""

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open

from dataloader import ImageDataset, ImageFiles, eval_loader, list_images
from evaluation.ladder import Ladder, evaluate
from latents.pipeline import PipelineWithVAEs
from latents.spaces import SPACES
from vae_align import AlignPipeline, read_checkpoint

PRETRAINED = [ROOT / "assets" / "pretrained" / f"taesd_to_taef1{kind}.safetensors" for kind in ("", "_latent")]


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_is_fit_to_be_given_away(path):
    """A folder of the machine that trained it; spaces without names, which no host of raw latents can use; no figures."""
    content = read_checkpoint(path)
    assert "training" not in content and not content["config"]
    assert [content[name]["path"] for name in ("vae1", "vae2")] == ["madebyollin/taesd", "madebyollin/taef1"]
    pipeline = AlignPipeline.from_pretrained(path)
    assert (pipeline.space1, pipeline.space2) == (SPACES["sd15"], SPACES["flux1"])
    assert pipeline.figures["aligned"]["psnr"] > pipeline.figures["reencode"]["psnr"]
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_the_digits_that_float16_drops_are_worth_a_hundredth_of_a_decibel_at_most(path, shared):
    """Weights that lose their picture with their digits: others within the same rounding must give the same PSNR."""
    vaes = (str(shared / "vaes" / name) for name in ("taesd", "taef1"))
    pipeline = PipelineWithVAEs.from_checkpoint(path, *vaes, vae1_subfolder="", vae2_subfolder="")
    loader = eval_loader(ImageDataset(ImageFiles(list_images(shared / "photos" / "eval")[::25]), 256), 4, 0)

    def psnr():
        results = evaluate(Ladder(pipeline, torch.float32, only=("aligned",)), loader, show_progress=False)
        return results["ladder"]["aligned"]["psnr"]

    shipped = psnr()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in pipeline.module.parameters():
            parameter.mul_(1 + (2 * torch.rand_like(parameter) - 1) * 2**-11)  # float16 keeps 11 bits
    assert psnr() == pytest.approx(shipped, abs=0.01)


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
    photos = ImageDataset(ImageFiles(list_images(shared / "photos" / "eval")[::17]), 256)  # six, of many kinds
    loader = eval_loader(photos, 6, 0)
    rungs = Ladder(pipeline, torch.float32, only=("vae2", "reencode", "aligned"))
    ladder = evaluate(rungs, loader, show_progress=False)["ladder"]
    aligned, reencode, vae2 = (ladder[name] for name in ("aligned", "reencode", "vae2"))
    assert aligned["psnr"] > reencode["psnr"]
    assert aligned["latent_mse"] < reencode["latent_mse"]
    if pipeline.uses_image:
        assert aligned["psnr"] > vae2["psnr"]
