"""A tiny model of each class of VAEs, with random weights, and random statistics where the class keeps them in its weights."""

import diffusers
import torch
from conftest import make_tiny_vae
from safetensors.torch import save_file

from vaes.families import SPACES
from vaes.tiny import TinyAutoencoder

WIDTHS = (4, 4, 4, 4)
KL = {
    "block_out_channels": WIDTHS,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 2,
}
SMALL = {"block_out_channels": WIDTHS, "layers_per_block": 1, "norm_num_groups": 2}
WAN = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
NUMBERS = {
    "latents_mean": [0.1 * channel for channel in range(16)],
    "latents_std": [1 + 0.1 * channel for channel in range(16)],
}
RECIPES = {  # family: (class, what its constructor is given)
    "sd15": ("AutoencoderKL", {**KL, "scaling_factor": 0.18215}),
    "sdxl": ("AutoencoderKL", {**KL, "scaling_factor": 0.13025}),
    "playground25": (
        "AutoencoderKL",
        {
            **KL,
            "scaling_factor": 0.5,
            "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
            "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
        },
    ),
    "sd3": ("AutoencoderKL", {**KL, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
    "flux1": ("AutoencoderKL", {**KL, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
    "kandinsky5": ("AutoencoderKL", {**KL, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
    "glm-image": ("AutoencoderKL", {**KL, "latent_channels": 16, **NUMBERS}),
    "flux2": ("AutoencoderKLFlux2", {**SMALL, "latent_channels": 32}),
    "sana": (
        "AutoencoderDC",
        {
            "attention_head_dim": 4,
            "encoder_block_out_channels": (32,) * 6,
            "decoder_block_out_channels": (32,) * 6,
            "encoder_layers_per_block": (1,) * 6,
            "decoder_layers_per_block": (1,) * 6,
            "encoder_qkv_multiscales": ((),) * 6,
            "decoder_qkv_multiscales": ((),) * 6,
            "scaling_factor": 0.41407,
        },
    ),
    "hunyuan-image": (
        "AutoencoderKLHunyuanImage",
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 64,
            "block_out_channels": (32, 32, 32, 32, 64, 128),
            "layers_per_block": 1,
            "spatial_compression_ratio": 32,
            "sample_size": 64,
            "scaling_factor": 0.75289,
        },
    ),
    "wan21": ("AutoencoderKLWan", WAN),
    "qwen-image": ("AutoencoderKLQwenImage", WAN),
    "wan22": (
        "AutoencoderKLWan",
        {
            **WAN,
            "decoder_base_dim": 4,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        },
    ),
    "qwen-image-2.1": (
        "AutoencoderKLQwenImage21",
        {"base_dim": 4, "decoder_base_dim": 4, "dim_mult": [1] * 5, "num_res_blocks": 1},
    ),
    "hunyuan-video": ("AutoencoderKLHunyuanVideo", SMALL),
    "hunyuan-video-1.5": ("AutoencoderKLHunyuanVideo15", {"block_out_channels": (32, 32, 32, 64, 64), "layers_per_block": 1}),
    "ltx": (
        "AutoencoderKLLTXVideo",
        {
            "block_out_channels": (8,) * 4,
            "decoder_block_out_channels": (8,) * 4,
            "layers_per_block": (1,) * 5,
            "decoder_layers_per_block": (1,) * 5,
            "timestep_conditioning": True,
        },
    ),
    "ltx2": (
        "AutoencoderKLLTX2Video",
        {
            "block_out_channels": (8, 16, 32, 64),
            "decoder_block_out_channels": (8, 16, 32),
            "layers_per_block": (1,) * 5,
            "decoder_layers_per_block": (1,) * 4,
            "spatial_compression_ratio": 32,
            "temporal_compression_ratio": 8,
        },
    ),
    "cogvideox": ("AutoencoderKLCogVideoX", SMALL),
    "cogvideox-5b": ("AutoencoderKLCogVideoX", {**SMALL, "scaling_factor": 0.7}),
    "easyanimate": ("AutoencoderKLMagvit", SMALL),
    "mochi": (
        "AutoencoderKLMochi",
        {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4, "layers_per_block": (1,) * 5},
    ),
    "cosmos1": (
        "AutoencoderKLCosmos",
        {"encoder_block_out_channels": WIDTHS, "decode_block_out_channels": WIDTHS, "num_layers": 1, "resolution": 64},
    ),
    "asymmetric": (
        "AsymmetricAutoencoderKL",
        {
            "down_block_types": KL["down_block_types"],
            "up_block_types": KL["up_block_types"],
            "down_block_out_channels": WIDTHS,
            "up_block_out_channels": WIDTHS,
            "norm_num_groups": 2,
        },
    ),
    "consistency": (
        "ConsistencyDecoderVAE",
        {
            "encoder_block_out_channels": WIDTHS,
            "encoder_norm_num_groups": 2,
            "encoder_layers_per_block": 1,
            "decoder_block_out_channels": WIDTHS,
            "decoder_norm_num_groups": 2,
            "decoder_layers_per_block": 1,
        },
    ),
}


def make_family(name, seed=0):
    """The tiny model of that row, in eval mode."""
    class_name, options = RECIPES[name]
    if name == "wan22":
        options = options | {"latents_mean": list(SPACES["wan22"].mean), "latents_std": list(SPACES["wan22"].std)}
    torch.manual_seed(seed)
    model = getattr(diffusers, class_name)(**options).eval()
    if hasattr(model, "bn"):
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
    if "ltx" in name:
        model.latents_mean.normal_()
        model.latents_std.uniform_(0.5, 2)
    return model


def save_tiny(folder, stem, suffix=".pth", **options):
    """A random tiny autoencoder's two files in its author's format, and the model."""
    torch.manual_seed(0)
    model = TinyAutoencoder(**options)
    folder.mkdir(exist_ok=True)
    for part in ("encoder", "decoder"):
        weights = getattr(model, part).state_dict()
        file = folder / f"{stem}_{part}{suffix}"
        torch.save(weights, file) if suffix == ".pth" else save_file(weights, file)
    return model


EVERY_CLASS = {class_name: row for row, (class_name, _) in reversed(RECIPES.items())}  # the first row of each class
EVERY_CLASS |= {"AutoencoderTiny": None, "TinyAutoencoder": None}


def save_class(class_name, folder):
    """A tiny VAE of that class in `folder`."""
    if class_name == "TinyAutoencoder":  # TAEF2: it pools, and its latents are folded
        save_tiny(folder, "taef2", latent_channels=32, pooled=True, fold=2)
    else:
        model = make_tiny_vae(4) if class_name == "AutoencoderTiny" else make_family(EVERY_CLASS[class_name])
        model.save_pretrained(folder)
