"""Latents of the real pipeline classes, tiny and with random weights: our code takes them as they come, and decodes them to the
same picture as the pipeline does; what integrations/diffusers.md prints; packing.

Not here: QwenImage21Pipeline, which asks a processor for tokens even where embeddings are given, and GlmImagePipeline. Their
formulas and their unpacking are in tests/vaes/test_families.py.
"""

import inspect
import re

import diffusers
import pytest
import torch
from conftest import ROOT
from families import make_family
from pipelines import untrained

from vae_align import AlignPipeline, pack
from vaes.codec import Codec

PAGE = (ROOT / "integrations" / "diffusers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SPACE_OF = {"z-image": "flux1", "qwen-image": "wan21"}  # the others are called like their space
COARSE = {"cosmos1": 1.01 / 255}  # it rounds its pictures to 8 bits for its safety checker
SIZE = (64, 96)
WORDS = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
POOLED, MASK = WORDS[:, 0], torch.ones(1, 5, dtype=torch.long)
BOTH = {"prompt_embeds": WORDS, "negative_prompt_embeds": WORDS}
BOTH_POOLED = {**BOTH, "pooled_prompt_embeds": POOLED, "negative_pooled_prompt_embeds": POOLED}
ONE_POOLED = {"prompt_embeds": WORDS, "pooled_prompt_embeds": POOLED}
FRAME = {**BOTH, "num_frames": 1}
MASKED = {"prompt_attention_mask": MASK, "negative_prompt_attention_mask": MASK}
TWO = {"prompt_embeds": WORDS, "prompt_embeds_mask": MASK, "prompt_embeds_2": WORDS, "prompt_embeds_mask_2": MASK}
SCALES = {f"{which}{what}_scale": 1.0 for which in ("", "audio_") for what in ("guidance", "modality")}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
FLUX = {**HEADS, "num_single_layers": 1, "joint_attention_dim": 32}
WAN = {**HEADS, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 16, "ffn_dim": 32}
VIDEO = {**HEADS, "text_embed_dim": 32, "time_embed_dim": 8}
UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}  # fmt: skip
SDXL = {**UNET, "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
PIPELINES = {  # space: pipeline, denoiser, its sizes, what a call is given, the shape of its latents
    "sd15": ("StableDiffusion", "UNet2DConditionModel", UNET, BOTH, (1, 4, 8, 12)),
    "sdxl": ("StableDiffusionXL", "UNet2DConditionModel", SDXL, BOTH_POOLED, (1, 4, 8, 12)),
    "playground25": ("StableDiffusionXL", "UNet2DConditionModel", SDXL, BOTH_POOLED, (1, 4, 8, 12)),
    "sd3": ("StableDiffusion3", "SD3Transformer2DModel",
            {**HEADS, "sample_size": 8, "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 32},
            BOTH_POOLED, (1, 16, 8, 12)),
    "flux1": ("Flux", "FluxTransformer2DModel", {**FLUX, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)},
              ONE_POOLED, (1, 24, 64)),
    "z-image": ("ZImage", "ZImageTransformer2DModel",
                {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32,
                 "axes_dims": [4, 6, 6], "axes_lens": [64] * 3},
                {"prompt_embeds": [WORDS[0]], "negative_prompt_embeds": [WORDS[0]]}, (1, 16, 8, 12)),
    "kandinsky5": ("Kandinsky5T2I", "Kandinsky5Transformer3DModel",
                   {"in_visual_dim": 16, "out_visual_dim": 16, "in_text_dim": 32, "in_text_dim2": 32, "time_dim": 16,
                    "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 6, 6)},
                   {f"{which}prompt_{what}": value for which in ("", "negative_") for what, value in (
                       ("embeds_qwen", WORDS), ("embeds_clip", POOLED), ("cu_seqlens", torch.tensor([0, 5])))},
                   (1, 1, 8, 12, 16)),
    "flux2": ("Flux2", "Flux2Transformer2DModel", {**FLUX, "axes_dims_rope": (4, 4, 4, 4)}, {"prompt_embeds": WORDS},
              (1, 24, 128)),
    "qwen-image": ("QwenImage", "QwenImageTransformer2DModel",
                   {**HEADS, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)},
                   {"prompt_embeds": WORDS, "prompt_embeds_mask": MASK, "true_cfg_scale": 1.0}, (1, 24, 64)),
    "wan21": ("Wan", "WanTransformer3DModel", WAN, FRAME, (1, 16, 1, 8, 12)),
    "wan22": ("Wan", "WanTransformer3DModel", {**WAN, "in_channels": 48, "out_channels": 48}, FRAME, (1, 48, 1, 4, 6)),
    "sana": ("Sana", "SanaTransformer2DModel",
             {**HEADS, "attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
              "cross_attention_dim": 16, "caption_channels": 32, "sample_size": 8},
             {**BOTH, **MASKED, "negative_prompt": None, "use_resolution_binning": False}, (1, 32, 2, 3)),
    "hunyuan-image": ("HunyuanImage", "HunyuanImageTransformer2DModel",
                      {**HEADS, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 32, "text_embed_2_dim": 32,
                       "rope_axes_dim": (8, 8)},
                      TWO | {f"negative_{name}": value for name, value in TWO.items()}, (1, 64, 2, 3)),
    "hunyuan-video": ("HunyuanVideo", "HunyuanVideoTransformer3DModel",
                      {**HEADS, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 32,
                       "pooled_projection_dim": 32, "rope_axes_dim": (4, 6, 6)},
                      {**ONE_POOLED, "prompt_attention_mask": MASK, "num_frames": 1}, (1, 16, 1, 8, 12)),
    "hunyuan-video-1.5": ("HunyuanVideo15", "HunyuanVideo15Transformer3DModel",
                          {**HEADS, "num_refiner_layers": 1, "text_embed_dim": 32, "text_embed_2_dim": 32,
                           "image_embed_dim": 8, "rope_axes_dim": (4, 6, 6), "task_type": "t2v"},
                          {**TWO, "num_frames": 1}, (1, 32, 1, 4, 6)),
    "ltx": ("LTX", "LTXVideoTransformer3DModel", {**HEADS, "cross_attention_dim": 32, "caption_channels": 32},
            {**FRAME, **MASKED}, (1, 6, 128)),
    "ltx2": ("LTX2", "LTX2VideoTransformer3DModel",
             {**HEADS, "attention_head_dim": 8, "cross_attention_dim": 16, "audio_num_attention_heads": 2,
              "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "caption_channels": 32, "rope_type": "split"},
             {**FRAME, **MASKED, **SCALES, "stg_scale": 0.0, "audio_stg_scale": 0.0}, (1, 128, 1, 2, 3)),
    "cogvideox": ("CogVideoX", "CogVideoXTransformer3DModel",
                  {**VIDEO, "sample_width": 12, "sample_height": 8, "sample_frames": 1, "max_text_seq_length": 5},
                  FRAME, (1, 1, 16, 8, 12)),
    "easyanimate": ("EasyAnimate", "EasyAnimateTransformer3DModel",
                    {**VIDEO, "in_channels": 16, "out_channels": 16, "patch_size": 2, "mmdit_layers": 1, "sample_width": 12,
                     "sample_height": 8},
                    {**FRAME, **MASKED}, (1, 16, 1, 8, 12)),
    "mochi": ("Mochi", "MochiTransformer3DModel",
              {**VIDEO, "num_layers": 2, "pooled_projection_dim": 32, "max_sequence_length": 5},
              FRAME | {name: mask.bool() for name, mask in MASKED.items()}, (1, 12, 1, 8, 12)),
    "cosmos1": ("CosmosTextToWorld", "CosmosTransformer3DModel",
                {**HEADS, "in_channels": 16, "out_channels": 16, "mlp_ratio": 2, "text_embed_dim": 32, "adaln_lora_dim": 4,
                 "max_size": (4, 32, 32)},
                FRAME, (1, 16, 1, 8, 12)),
}  # fmt: skip


class NoSafety(torch.nn.Module):
    """In the place of Cosmos' checker, a model of several gigabytes."""

    device = torch.device("cpu")

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


def further_parts(name):
    """The parts that only one or two pipelines have."""
    if name == "sd15":
        return {"scheduler": diffusers.DDIMScheduler(clip_sample=False), "requires_safety_checker": False}
    if name in ("sdxl", "playground25"):
        return {"scheduler": diffusers.DDIMScheduler(clip_sample=False)}
    if name == "wan22":
        return {"expand_timesteps": True}
    if name == "hunyuan-video-1.5":
        return {"guider": diffusers.ClassifierFreeGuidance(guidance_scale=1.0)}
    if name == "ltx2":
        of_each = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_learnable_registers": None}
        named = {f"{which}_connector_{part}": value for which in ("video", "audio") for part, value in of_each.items()}
        connectors = diffusers.pipelines.ltx2.LTX2TextConnectors(
            caption_channels=32, text_proj_in_factor=1, rope_type="split", **named
        )
        return {"audio_vae": diffusers.AutoencoderKLLTX2Audio(ch_mult=(1, 1, 1), num_res_blocks=1), "connectors": connectors}
    if name == "cogvideox":
        return {"scheduler": diffusers.CogVideoXDDIMScheduler()}
    if name == "cosmos1":
        scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min")
        return {"scheduler": scheduler, "safety_checker": NoSafety()}
    return {}


def build(name):
    """A pipeline of the space's class; parts that it demands and that are not made here, such as text encoders, are None."""
    kind, denoiser, sizes, _, _ = PIPELINES[name]
    pipeline_class = getattr(diffusers, f"{kind}Pipeline")
    demanded = inspect.signature(pipeline_class.__init__).parameters.values()
    parts = {part.name: None for part in demanded if part.default is part.empty and part.name != "self"}
    parts["unet" if "unet" in parts else "transformer"] = getattr(diffusers, denoiser)(**sizes)
    parts |= {"vae": make_family("flux1" if name == "z-image" else name)}
    parts |= {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()} | further_parts(name)
    pipeline = pipeline_class(**parts)
    pipeline.resolutions = [SIZE[::-1]]  # Kandinsky 5's own begin at 640 px
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("transformers", reason="diffusers' pipelines need the package transformers")


@pytest.mark.parametrize("name", PIPELINES)
def test_a_real_pipelines_latents_are_taken_as_they_come(name, transformers):
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

    align = untrained(codec.space)
    assert torch.equal(align.translate(latents, size=SIZE), align.translate(scaled))


class Prompted:
    """A pipeline without text encoders that takes prompts: each becomes the same random embedding."""

    def __init__(self, pipeline, **embeddings):
        self.pipeline, self.embeddings = pipeline, embeddings
        pipeline.set_progress_bar_config(disable=True)

    def __call__(self, prompt, **options):
        return self.pipeline(num_inference_steps=2, **self.embeddings, **options)


@pytest.fixture(scope="module")
def pipelines(transformers):
    """{"sd15", "sdxl", "flux": a pipeline of the real class, for 64 x 96 px where no size is given}."""
    torch.manual_seed(0)
    made = {name: Prompted(build(name), height=64, width=96, **PIPELINES[name][3]) for name in ("sd15", "sdxl")}
    flux = diffusers.FluxImg2ImgPipeline.from_pipe(build("flux1"))
    return made | {"flux": Prompted(flux, **PIPELINES["flux1"][3])}


@pytest.mark.parametrize("source", ["sd15", "sdxl"])
def test_the_printed_lines_work(source, pipelines, tmp_path, monkeypatch):
    """A recipe that fails as printed: packed where unpacked is taken, a size left out, a keyword of another pipeline."""
    align = untrained(source)
    align.save_pretrained(tmp_path / "assets" / "pretrained" / "taesd_to_taef1_latent.safetensors")
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
