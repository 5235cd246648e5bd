"""Latents from the real pipeline classes with `output_type="latent"`, tiny and with random weights: our code takes them as they
come, and decodes them to the same picture as the pipeline does.

Not here: QwenImage21Pipeline, which asks a processor for tokens even where embeddings are given, and GlmImagePipeline. Their
formulas and their unpacking are in tests/vaes/test_families.py.
"""

import pytest
import torch
from real_pipelines import PIPELINES, SIZE, build

from vae_align import AlignConfig, AlignPipeline, align_module
from vaes.codec import SPACES, Codec

pytest.importorskip("transformers", reason="diffusers' pipelines need the package transformers")
SPACE_OF = {"z-image": "flux1", "qwen-image": "wan21"}  # the others are called like their space
COARSE = {"cosmos1": 1.01 / 255}  # it rounds its pictures to 8 bits for its safety checker


@pytest.mark.parametrize("name", PIPELINES)
def test_a_real_pipelines_latents_are_taken_as_they_come(name):
    """Another packing, order of axes, scale or shift than the pipeline's own decoding undoes: a picture that is another."""
    *_, given, shape = PIPELINES[name]
    torch.manual_seed(0)
    pipeline = build(name)

    def made(output_type):
        generator = torch.Generator().manual_seed(0)
        height, width = SIZE
        options = {"height": height, "width": width, "num_inference_steps": 2, "generator": generator, **given}
        told = pipeline(output_type=output_type, **options)
        return next(iter(told.values()))

    latents = made("latent")
    assert tuple(latents.shape) == shape
    vae = pipeline.vae
    if name == "ltx2":  # raw latents: the line that the README names makes scaled ones of them
        picture = vae.decode(latents)[0] / 2 + 0.5
        latents = pipeline._normalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    else:
        picture = made("pt")
    picture = picture.movedim(1, 2)[:, :, 0] if picture.shape[1] == 1 else picture[:, :, 0] if picture.ndim == 5 else picture
    codec = Codec(vae, space="kandinsky5" if name == "kandinsky5" else None)
    scaled = codec.space.from_pipeline(latents, SIZE)
    assert codec.space.name == SPACE_OF.get(name, name)
    ours = codec.decode(scaled) / 2 + 0.5
    torch.testing.assert_close(ours.clamp(0, 1), picture.clamp(0, 1), atol=COARSE.get(name, 2e-5), rtol=0)
    assert picture.std() > 0.02  # a picture that is one grey would agree with any

    config = AlignConfig(("latent",), codec.channels, 16, 8, 1, latent_stride=codec.stride)
    align = AlignPipeline(align_module(config).eval(), codec.space, SPACES["flux1"])
    assert torch.equal(align.translate(latents, size=SIZE), align.translate(scaled))
