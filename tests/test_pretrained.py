"""The shipped modules: fit to be given away, usable without their VAEs, and as good as the README says."""

import math
import re

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open

from dataloader import ImageDataset, eval_loader
from evaluation.ladder import Ladder, evaluate
from evaluation.metrics import Measures
from images.files import ImageFiles, list_images
from vae_align import AlignPipeline
from vaes.codec import SPACES
from vaes.pipeline import PipelineWithVAEs, read_checkpoint

PRETRAINED = [ROOT / "assets" / "pretrained" / f"taesd_to_taef1{kind}.safetensors" for kind in ("", "_latent")]
SIZE = 160  # pixels of the photos on which modules are judged here
RECORDED = {  # mean, standard deviation and three values of what `test_gives_the_recorded_latents` translates
    "taesd_to_taef1": (-0.0825, 0.8142, 0.7437, 0.222, 0.2175),
    "taesd_to_taef1_latent": (-0.0755, 0.5711, 0.3915, -1.062, 0.4502),
}


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_is_fit_to_be_given_away(path):
    """A folder of the machine that trained it, spaces without names, figures that are not the README's."""
    content = read_checkpoint(path)
    assert "training" not in content and not content["config"]
    assert [content[name]["path"] for name in ("vae1", "vae2")] == ["madebyollin/taesd", "madebyollin/taef1"]
    pipeline = AlignPipeline.from_pretrained(path)
    assert (pipeline.space1, pipeline.space2) == (SPACES["sd15"], SPACES["flux1"])
    for name in ("st_lpips_vgg", "latent_mse"):
        assert pipeline.figures["aligned"][name] < pipeline.figures["reencode"][name]
    with safe_open(path, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    figures = pipeline.figures["aligned"]
    row = next(line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith(f"| **`{path.name}`**"))
    cells = [cell.strip(" *") for cell in row.split("|")]
    assert cells[3:5] == [f"{figures['psnr']:.2f}", f"{figures['latent_mse']:.3f}"]


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readmes_lines_for_use_run_as_printed(name):
    """A name that nothing has imported or made; a device that is not there; a result that is translated a second time."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), re.DOTALL)
    exec(block, made := {})
    torch.testing.assert_close(made["flux_latents"], made["pipeline"].translate(made["sd15_latents"]))


def waves(*shape):
    """Numbers from -1 to 1 that are the same on every machine."""
    return torch.arange(math.prod(shape), dtype=torch.float64).mul(12.9898).sin().view(shape).float()


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_gives_the_recorded_latents(path):
    """Other weights under the same name, or a change of the code that alters what shipped weights compute."""
    latents = AlignPipeline.from_pretrained(path).translate(waves(1, 4, 8, 8), waves(1, 3, 64, 64))
    summary = [latents.mean().item(), latents.std().item(), *latents[0, :3, 4, 4].tolist()]
    assert summary == pytest.approx(RECORDED[path.stem], abs=1e-3)


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_beats_decoding_and_encoding_again(path, shared):
    """Shipped weights that do not belong to the figures in the README."""
    vaes = (str(shared / "vaes" / name) for name in ("taesd", "taef1"))
    pipeline = PipelineWithVAEs.from_checkpoint(path, *vaes, vae1_subfolder="", vae2_subfolder="")
    photos = ImageDataset(ImageFiles(list_images(shared / "photos" / "eval")[::17]), SIZE)  # six, of many kinds
    loader = eval_loader(photos, 6, 0)
    rungs = Ladder(pipeline, torch.float32, only=("reencode", "aligned"))
    ladder = evaluate(rungs, loader, Measures(("st_lpips",), SIZE), show_progress=False)["ladder"]
    aligned, reencode = (ladder[name] for name in ("aligned", "reencode"))
    assert aligned["latent_mse"] < reencode["latent_mse"]
    assert aligned["st_lpips_vgg"] < reencode["st_lpips_vgg"]
    if pipeline.uses_image:
        assert aligned["psnr"] > reencode["psnr"]
    else:  # on a hundred photos they are level
        assert aligned["psnr"] > reencode["psnr"] - 0.3
