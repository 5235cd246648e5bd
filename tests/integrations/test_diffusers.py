"""What integrations/diffusers.md prints, run with tiny random pipelines of the real classes; packing; AutoModel."""

import re

import pytest
import torch
from conftest import ROOT
from real_pipelines import PIPELINES, build

from runtime.cli import MISTAKES
from vae_align import AlignConfig, AlignPipeline, align_module, pack
from vaes.codec import SPACES

PAGE = (ROOT / "integrations" / "diffusers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


class Prompted:
    """A pipeline without text encoders that takes prompts: each becomes the same random embedding."""

    def __init__(self, pipeline, **embeddings):
        self.pipeline, self.embeddings = pipeline, embeddings
        pipeline.set_progress_bar_config(disable=True)

    def __call__(self, prompt, **options):
        return self.pipeline(num_inference_steps=2, **self.embeddings, **options)


@pytest.fixture(scope="module")
def pipelines():
    """{"sd15", "sdxl", "flux": a pipeline of the real class, for 64 x 96 px where no size is given}."""
    pytest.importorskip("transformers", reason="diffusers' pipelines need the package transformers")
    import diffusers

    torch.manual_seed(0)
    made = {name: Prompted(build(name), height=64, width=96, **PIPELINES[name][3]) for name in ("sd15", "sdxl")}
    flux = diffusers.FluxImg2ImgPipeline.from_pipe(build("flux1"))
    return made | {"flux": Prompted(flux, **PIPELINES["flux1"][3])}


def module_from(space):
    torch.manual_seed(0)
    module = align_module(AlignConfig(("latent",), hidden_channels=8, num_blocks=1)).eval()
    return AlignPipeline(module, SPACES[space], SPACES["flux1"])


@pytest.mark.parametrize("source", ["sd15", "sdxl"])
def test_the_printed_lines_work(source, pipelines, tmp_path, monkeypatch):
    """A recipe that fails as printed: packed where unpacked is taken, a size left out, a keyword of another pipeline."""
    module_from(source).save_pretrained(tmp_path / "assets" / "pretrained" / "taesd_to_taef1_latent.safetensors")
    monkeypatch.chdir(tmp_path)
    names = {"AlignPipeline": AlignPipeline, "prompt": "a lighthouse"}
    names |= {"sd": pipelines[source], "flux": pipelines["flux"]}
    exec(BLOCKS[0], names)
    assert names["z"].shape == (1, 16, 8, 12) and names["picture"].size == (96, 64)
    exec(BLOCKS[1], names)
    assert names["latents"].shape == (1, 16, 8, 12)


def test_the_traps_are_still_there(pipelines):
    """A table that warns of what diffusers does no more, or that misses the silent one."""
    flux, z = pipelines["flux"], torch.randn(1, 16, 8, 12)
    size = {"height": 64, "width": 96}
    with pytest.raises(RuntimeError, match="128"):
        flux("", image=z, strength=0.6)
    with pytest.raises(RuntimeError):
        flux("", image=torch.randn(1, 16, 9, 12), height=72, width=96, strength=0.6)
    with pytest.raises(RuntimeError):
        flux("", image=torch.cat([z, z]), strength=0.6, **size)
    one, two = (flux("", image=z, latents=pack(z), strength=0.6, output_type="latent", **size).images for _ in range(2))
    assert torch.equal(one, two)  # no noise was added: every call gives the same
    one, two = (flux("", image=z, strength=0.6, output_type="latent", **size).images for _ in range(2))
    assert not torch.equal(one, two)


def test_packing_is_the_pipelines_own(pipelines):
    """Tokens in another order than the transformer reads; height and width mixed up."""
    flux = pipelines["flux"].pipeline
    latents = torch.randn(2, 16, 8, 12)
    packed = pack(latents)
    assert torch.equal(packed, flux._pack_latents(latents, 2, 16, 8, 12))
    assert torch.equal(SPACES["flux1"].from_pipeline(packed, (64, 96)), latents)


def test_what_cannot_be_packed_is_one_line():
    """A reshape that fails, or that fits by chance and mixes the picture."""
    with pytest.raises(MISTAKES, match="even h and w"):
        pack(torch.randn(1, 16, 7, 8))
