"""What the real pipeline classes give with `output_type="latent"`, tiny and with random weights: taken as it is, and decoded by
us to the very picture that the pipeline decodes it to.

Not here: QwenImage21Pipeline, which asks a processor for tokens even where embeddings are given, and GlmImagePipeline. Their
formulas and their unpacking are in tests/vaes/test_families.py.
"""

import pytest
import torch
from families import make_family

from vae_align import AlignConfig, AlignPipeline, align_module
from vaes.codec import SPACES, Codec

pytest.importorskip("transformers", reason="diffusers' pipelines need the package transformers")
import diffusers

SIZE = (64, 96)
WORDS = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
POOLED, MASK = WORDS[:, 0], torch.ones(1, 5, dtype=torch.long)
NO_TEXT = {"text_encoder": None, "tokenizer": None}
NO_TEXT_2 = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}
BOTH = {"prompt_embeds": WORDS, "negative_prompt_embeds": WORDS}
MASKED = {"prompt_attention_mask": MASK, "negative_prompt_attention_mask": MASK}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}  # fmt: skip
POOLED_UNET = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}


def flow():
    return diffusers.FlowMatchEulerDiscreteScheduler()


class NoSafety(torch.nn.Module):
    """In the place of Cosmos' checker, a model of several gigabytes."""

    device = torch.device("cpu")

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


def sd15():
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, **NO_TEXT}
    unet, scheduler = diffusers.UNet2DConditionModel(**UNET), diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.StableDiffusionPipeline(vae=make_family("sd15"), unet=unet, scheduler=scheduler, **parts), BOTH


def sdxl(family="sdxl"):
    unet, scheduler = diffusers.UNet2DConditionModel(**UNET, **POOLED_UNET), diffusers.DDIMScheduler(clip_sample=False)
    pipeline = diffusers.StableDiffusionXLPipeline(vae=make_family(family), unet=unet, scheduler=scheduler, **NO_TEXT_2)
    return pipeline, {**BOTH, "pooled_prompt_embeds": POOLED, "negative_pooled_prompt_embeds": POOLED}


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=8, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32
    )
    parts = {"scheduler": flow(), "text_encoder_3": None, "tokenizer_3": None, **NO_TEXT_2}
    pipeline = diffusers.StableDiffusion3Pipeline(transformer=transformer, vae=make_family("sd3"), **parts)
    return pipeline, {**BOTH, "pooled_prompt_embeds": POOLED, "negative_pooled_prompt_embeds": POOLED}


def flux1():
    transformer = diffusers.FluxTransformer2DModel(
        **HEADS, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8)
    )
    pipeline = diffusers.FluxPipeline(scheduler=flow(), vae=make_family("flux1"), transformer=transformer, **NO_TEXT_2)
    return pipeline, {"prompt_embeds": WORDS, "pooled_prompt_embeds": POOLED}


def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[64] * 3,
    )
    pipeline = diffusers.ZImagePipeline(scheduler=flow(), vae=make_family("flux1"), transformer=transformer, **NO_TEXT)
    return pipeline, {"prompt_embeds": [WORDS[0]], "negative_prompt_embeds": [WORDS[0]]}


def kandinsky5():
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=16, out_visual_dim=16, in_text_dim=32, in_text_dim2=32, time_dim=16, model_dim=32, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6),
    )  # fmt: skip
    vae = make_family("kandinsky5")
    pipeline = diffusers.Kandinsky5T2IPipeline(transformer=transformer, vae=vae, scheduler=flow(), **NO_TEXT_2)
    pipeline.resolutions = [SIZE[::-1]]  # its own begin at 640 px
    given = {f"{which}prompt_{what}": value for which in ("", "negative_") for what, value in (
        ("embeds_qwen", WORDS), ("embeds_clip", POOLED), ("cu_seqlens", torch.tensor([0, 5])))}  # fmt: skip
    return pipeline, given


def flux2():
    transformer = diffusers.Flux2Transformer2DModel(
        **HEADS, num_single_layers=1, joint_attention_dim=32, axes_dims_rope=(4, 4, 4, 4)
    )
    pipeline = diffusers.Flux2Pipeline(scheduler=flow(), vae=make_family("flux2"), transformer=transformer, **NO_TEXT)
    return pipeline, {"prompt_embeds": WORDS}


def qwen_image():
    transformer = diffusers.QwenImageTransformer2DModel(**HEADS, joint_attention_dim=32, axes_dims_rope=(4, 6, 6))
    vae = make_family("qwen-image")
    pipeline = diffusers.QwenImagePipeline(scheduler=flow(), vae=vae, transformer=transformer, **NO_TEXT)
    return pipeline, {"prompt_embeds": WORDS, "prompt_embeds_mask": MASK, "true_cfg_scale": 1.0}


def wan(family="wan21", channels=16):
    transformer = diffusers.WanTransformer3DModel(
        **HEADS | {"attention_head_dim": 12}, in_channels=channels, out_channels=channels, text_dim=32, freq_dim=16, ffn_dim=32
    )
    parts = {"expand_timesteps": family == "wan22", **NO_TEXT}
    vae = make_family(family)
    return diffusers.WanPipeline(transformer=transformer, vae=vae, scheduler=flow(), **parts), {**BOTH, "num_frames": 1}


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        **HEADS | {"attention_head_dim": 8}, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=32, sample_size=8,
    )  # fmt: skip
    pipeline = diffusers.SanaPipeline(transformer=transformer, vae=make_family("sana"), scheduler=flow(), **NO_TEXT)
    return pipeline, {**BOTH, **MASKED, "negative_prompt": None, "use_resolution_binning": False}


def hunyuan_image():
    transformer = diffusers.HunyuanImageTransformer2DModel(
        **HEADS, num_single_layers=1, num_refiner_layers=1, text_embed_dim=32, text_embed_2_dim=32, rope_axes_dim=(8, 8)
    )
    vae = make_family("hunyuan-image")
    pipeline = diffusers.HunyuanImagePipeline(scheduler=flow(), vae=vae, transformer=transformer, **NO_TEXT_2)
    given = {f"{which}prompt_embeds{what}": value for which in ("", "negative_") for what, value in (
        ("", WORDS), ("_mask", MASK), ("_2", WORDS), ("_mask_2", MASK))}  # fmt: skip
    return pipeline, given


def hunyuan_video():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **HEADS, num_single_layers=1, num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=32, rope_axes_dim=(4, 6, 6)
    )
    vae = make_family("hunyuan-video")
    pipeline = diffusers.HunyuanVideoPipeline(transformer=transformer, vae=vae, scheduler=flow(), **NO_TEXT_2)
    return pipeline, {"prompt_embeds": WORDS, "pooled_prompt_embeds": POOLED, "prompt_attention_mask": MASK, "num_frames": 1}


def hunyuan_video15():
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        **HEADS, num_refiner_layers=1, text_embed_dim=32, text_embed_2_dim=32, image_embed_dim=8, rope_axes_dim=(4, 6, 6),
        task_type="t2v",
    )  # fmt: skip
    parts = {"scheduler": flow(), "guider": diffusers.ClassifierFreeGuidance(guidance_scale=1.0), **NO_TEXT_2}
    vae = make_family("hunyuan-video-1.5")
    pipeline = diffusers.HunyuanVideo15Pipeline(transformer=transformer, vae=vae, **parts)
    given = {"prompt_embeds": WORDS, "prompt_embeds_mask": MASK, "prompt_embeds_2": WORDS, "prompt_embeds_mask_2": MASK}
    return pipeline, {**given, "num_frames": 1}


def ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(**HEADS, cross_attention_dim=32, caption_channels=32)
    pipeline = diffusers.LTXPipeline(transformer=transformer, vae=make_family("ltx"), scheduler=flow(), **NO_TEXT)
    return pipeline, {**BOTH, **MASKED, "num_frames": 1}


def ltx2():
    transformer = diffusers.LTX2VideoTransformer3DModel(
        **HEADS | {"attention_head_dim": 8}, cross_attention_dim=16, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, caption_channels=32, rope_type="split",
    )  # fmt: skip
    of_each = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_learnable_registers": None}
    named = {f"{which}_connector_{name}": value for which in ("video", "audio") for name, value in of_each.items()}
    connectors = diffusers.pipelines.ltx2.LTX2TextConnectors(
        caption_channels=32, text_proj_in_factor=1, rope_type="split", **named
    )
    audio = diffusers.AutoencoderKLLTX2Audio(ch_mult=(1, 1, 1), num_res_blocks=1)
    parts = {"audio_vae": audio, "connectors": connectors, "vocoder": None, "scheduler": flow(), **NO_TEXT}
    pipeline = diffusers.LTX2Pipeline(transformer=transformer, vae=make_family("ltx2"), **parts)
    scales = {f"{which}{what}_scale": float(what != "stg") for which in ("", "audio_") for what in (
        "guidance", "stg", "modality")}  # fmt: skip
    return pipeline, {**BOTH, **MASKED, **scales, "num_frames": 1}


def cogvideox():
    transformer = diffusers.CogVideoXTransformer3DModel(
        **HEADS, time_embed_dim=8, text_embed_dim=32, sample_width=12, sample_height=8, sample_frames=1, max_text_seq_length=5
    )
    parts = {"scheduler": diffusers.CogVideoXDDIMScheduler(), **NO_TEXT}
    pipeline = diffusers.CogVideoXPipeline(transformer=transformer, vae=make_family("cogvideox"), **parts)
    return pipeline, {**BOTH, "num_frames": 1}


def easyanimate():
    transformer = diffusers.EasyAnimateTransformer3DModel(
        **HEADS, in_channels=16, out_channels=16, patch_size=2, mmdit_layers=1, time_embed_dim=8, text_embed_dim=32,
        sample_width=12, sample_height=8,
    )  # fmt: skip
    vae = make_family("easyanimate")
    pipeline = diffusers.EasyAnimatePipeline(vae=vae, transformer=transformer, scheduler=flow(), **NO_TEXT)
    return pipeline, {**BOTH, **MASKED, "num_frames": 1}


def mochi():
    transformer = diffusers.MochiTransformer3DModel(
        **HEADS | {"num_layers": 2}, pooled_projection_dim=32, text_embed_dim=32, time_embed_dim=8, max_sequence_length=5
    )
    pipeline = diffusers.MochiPipeline(transformer=transformer, vae=make_family("mochi"), scheduler=flow(), **NO_TEXT)
    masks = {name: mask.bool() for name, mask in MASKED.items()}
    return pipeline, {**BOTH, **masks, "num_frames": 1}


def cosmos1():
    transformer = diffusers.CosmosTransformer3DModel(
        **HEADS, in_channels=16, out_channels=16, mlp_ratio=2, text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32)
    )
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min")
    parts = {"scheduler": scheduler, "safety_checker": NoSafety(), **NO_TEXT}
    pipeline = diffusers.CosmosTextToWorldPipeline(transformer=transformer, vae=make_family("cosmos1"), **parts)
    return pipeline, {**BOTH, "num_frames": 1}


PIPELINES = {  # space: how a pipeline of it is built, and what its latents look like
    "sd15": (sd15, (1, 4, 8, 12)),
    "sdxl": (sdxl, (1, 4, 8, 12)),
    "playground25": (lambda: sdxl("playground25"), (1, 4, 8, 12)),
    "sd3": (sd3, (1, 16, 8, 12)),
    "flux1": (flux1, (1, 24, 64)),
    "z-image": (z_image, (1, 16, 8, 12)),
    "kandinsky5": (kandinsky5, (1, 1, 8, 12, 16)),
    "flux2": (flux2, (1, 24, 128)),
    "qwen-image": (qwen_image, (1, 24, 64)),
    "wan21": (wan, (1, 16, 1, 8, 12)),
    "wan22": (lambda: wan("wan22", 48), (1, 48, 1, 4, 6)),
    "sana": (sana, (1, 32, 2, 3)),
    "hunyuan-image": (hunyuan_image, (1, 64, 2, 3)),
    "hunyuan-video": (hunyuan_video, (1, 16, 1, 8, 12)),
    "hunyuan-video-1.5": (hunyuan_video15, (1, 32, 1, 4, 6)),
    "ltx": (ltx, (1, 6, 128)),
    "ltx2": (ltx2, (1, 128, 1, 2, 3)),
    "cogvideox": (cogvideox, (1, 1, 16, 8, 12)),
    "easyanimate": (easyanimate, (1, 16, 1, 8, 12)),
    "mochi": (mochi, (1, 12, 1, 8, 12)),
    "cosmos1": (cosmos1, (1, 16, 1, 8, 12)),
}
SPACE_OF = {"z-image": "flux1", "qwen-image": "wan21"}  # the others are called like their space
COARSE = {"cosmos1": 1.01 / 255}  # it rounds its pictures to 8 bits for its safety checker


@pytest.mark.parametrize("name", PIPELINES)
def test_a_real_pipelines_latents_are_taken_as_they_come(name):
    """Another packing, order of axes, scale or shift than the pipeline's own decoding undoes: a picture that is another."""
    build, shape = PIPELINES[name]
    torch.manual_seed(0)
    pipeline, given = build()
    pipeline.set_progress_bar_config(disable=True)

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
