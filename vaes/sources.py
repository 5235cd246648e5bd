"""Where a VAE's config and weights are: a folder of diffusers, a single file in the original layout, or a tiny autoencoder's
two files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils import UserError, one_line, read_json, shown
from vaes.conventions import CONVENTIONS
from vaes.families import family_of_file
from vaes.tiny import TinyAutoencoder, find_tiny_files, read_tiny, read_tiny_config, stem_of

STEM = "diffusion_pytorch_model"
WEIGHT_FILES = (  # in the order in which they are looked for; full precision first
    f"{STEM}.safetensors",
    f"{STEM}.bin",
    f"{STEM}.safetensors.index.json",
    f"{STEM}.fp16.safetensors",
    f"{STEM}.fp16.bin",
    f"{STEM}.safetensors.index.fp16.json",
)
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth")
VAE_PREFIXES = ("first_stage_model.", "vae.")  # of a VAE's weights within a whole model's file
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "bn.")  # a VAE's own; others are losses and averages
OF_ANOTHER_CLASS = "not in the layout of the original AutoencoderKL; name the folder of its diffusers version"
MODEL_SPACES = {  # by the first letters of what diffusers calls a whole model's file
    "playground": "playground25",
    "xl": "sdxl",
    "sd3": "sd3",
    "flux-2": "flux2",
    "flux": "flux1",
    "chroma": "flux1",
    "v1": "sd15",
    "v2": "sd15",
    "inpainting": "sd15",
}


class Misfit(ValueError):
    """Weights and config that do not belong together; the message follows "the VAE's path: "."""


@dataclass(frozen=True)
class Source:
    """What describes a VAE and how its weights are read.

    Attributes:
        class_name, vae_class: of the model. config: for `vae_class.from_config`.
        files: whose content makes the VAE what it is.
        read: dtype -> the model with its weights; raises `Misfit`, or a library's error.
        what: describes the VAE, for messages. space_name, has_own_map: see `FrozenVAE`.
    """

    class_name: str
    vae_class: type
    config: dict
    files: list[Path]
    read: Callable[[torch.dtype], nn.Module]
    what: str = "its config.json"
    space_name: str | None = None
    has_own_map: bool = True


def source_at(place: Path, label: str) -> Source:
    """The source at a place that `locate_vae` found. UserError if it cannot be read as a VAE's."""
    if (place / "config.json").exists():
        return _folder(place, label)
    tiny = find_tiny_files(place, label)
    if tiny:
        return _tiny(tiny, label)
    if place.is_file():
        return _single_file(place, label)
    return _folder(place, label)


# ----------------------------------------------------------------------------------------------------------------------
# A folder of diffusers


def find_weights(folder: Path) -> Path | None:
    """The file of weights, or the index of its parts, in a folder of diffusers."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def shards_of(file: Path) -> list[str]:
    """The names of the parts that an index lists; none for a file of weights. ValueError for a broken index."""
    if file.suffix != ".json":
        return []
    try:
        names = sorted(set(read_json(file)["weight_map"].values()))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file.name} lists no parts ({one_line(error)})") from None
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{file.name} lists no parts beside it")
    return names


def _folder(folder: Path, label: str) -> Source:
    try:
        stored = read_json(folder / "config.json")
        class_name = str(stored["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{label} {folder}: its config.json cannot be read as a VAE's ({one_line(error)})") from None
    if class_name not in CONVENTIONS:
        raise UserError(f"{label} {folder}: a {shown(class_name)}; known VAE classes are {', '.join(CONVENTIONS)}")
    vae_class = diffusers_class(class_name, f"{label} {folder}")
    weights = find_weights(folder)
    try:
        _check_sizes(stored)
        files = [folder / "config.json", weights, *(folder / name for name in shards_of(weights))]
    except Exception as error:
        reason = one_line(error)
        raise UserError(f"{label} {folder}: its config.json does not describe a {class_name} ({reason})") from None
    return Source(class_name, vae_class, stored, files, lambda dtype: _read_folder(vae_class, folder, weights, dtype))


def diffusers_class(class_name: str, label: str) -> type:
    """The class of that name; UserError, which begins with `label`, where the installed diffusers does not have it."""
    try:
        import diffusers

        return getattr(diffusers, class_name)
    except AttributeError:
        raise UserError(
            f"{label}: a {class_name}, which diffusers {diffusers.__version__} does not have; install a newer one"
        ) from None
    except Exception as error:  # whatever its import makes of the environment
        raise UserError(
            f"{label}: diffusers cannot be imported ({one_line(error)}); install requirements.txt anew, or unset the variable "
            "of the environment that this is about"
        ) from None


def _read_folder(vae_class: type, folder: Path, weights: Path, dtype: torch.dtype) -> nn.Module:
    model, report = vae_class.from_pretrained(
        folder,
        torch_dtype=dtype,
        variant="fp16" if ".fp16" in weights.name else None,
        low_cpu_mem_usage=False,
        output_loading_info=True,
        local_files_only=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise Misfit(f"{len(missing)} weights are missing, {missing[0]} first")
    unused = sorted(name for name in report["unexpected_keys"] if name.startswith(("encoder.", "decoder.")))
    if unused:  # a part of the network that its config leaves out
        raise Misfit(f"{len(unused)} weights have no place in its config, {unused[0]} first")
    return model


def _check_sizes(config) -> None:
    """ValueError for a config with numbers that no VAE has, and that would take the constructor hours or all memory."""
    for name, value in config.items():
        items = value if isinstance(value, list) else [value]
        most = 64 if "layers" in name or ("num_" in name and "blocks" in name) else 1 << 16
        if (len(items) > 12 and name.endswith("block_out_channels")) or any(
            isinstance(item, (int, float)) and not abs(item) <= most for item in items
        ):
            raise ValueError(f"{name} {shown(value)}")
    if config.get("latent_channels", 1) == 0:
        raise ValueError("latent_channels 0")


# ----------------------------------------------------------------------------------------------------------------------
# A tiny autoencoder's two files


def _tiny(files: tuple[Path, Path], label: str) -> Source:
    try:
        config = read_tiny_config(*files)
    except Exception as error:  # torch and safetensors have errors of their own for a damaged file
        raise UserError(f"{label} {files[0]}: its weights cannot be loaded ({one_line(error)})") from None
    family = family_of_file(stem_of(files), "tiny")
    return Source(
        "TinyAutoencoder",
        TinyAutoencoder,
        config,
        list(files),
        lambda dtype: read_tiny(files, config).to(dtype),
        what="its encoder",
        space_name=family and family.name,
    )


# ----------------------------------------------------------------------------------------------------------------------
# A single file in the original layout


def _single_file(file: Path, label: str) -> Source:
    try:
        everything = _shapes_in(file)
        shapes = _vae_part(everything)
        config = _config_of(shapes)
    except Exception as error:  # torch and safetensors have errors of their own for a damaged file
        raise UserError(f"{label} {file}: cannot be read as a VAE in the original layout ({one_line(error)})") from None
    vae_class = diffusers_class("AutoencoderKL", f"{label} {file}")
    return Source(
        "AutoencoderKL",
        vae_class,
        config,
        [file],
        lambda dtype: _read_single_file(file, vae_class, config, dtype),
        what="its content",
        space_name=_space_of(file, everything),
        has_own_map=False,
    )


def _shapes_in(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the file on the meta device."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            names = opened.keys()
            return {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in names}
    return _tensors(torch.load(file, map_location="meta", weights_only=True))


def _tensors(content) -> dict[str, torch.Tensor]:
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}


def _vae_part(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The VAE's tensors, without the prefix that they have in a whole model's file. ValueError if there are none."""
    for prefix in (*VAE_PREFIXES, ""):
        part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        part = {name: tensor for name, tensor in part.items() if name.startswith(PARTS)}
        if "encoder.conv_in.weight" in part:
            return part
    if any(name.startswith(prefix + part) for name in tensors for prefix in (*VAE_PREFIXES, "") for part in PARTS[:2]):
        raise ValueError(OF_ANOTHER_CLASS)
    raise ValueError("it holds no VAE")


def _config_of(shapes: dict[str, torch.Tensor]) -> dict:
    """The config of an AutoencoderKL in the original layout, read off the shapes of its weights."""
    if "encoder.down.0.block.0.conv1.weight" not in shapes or "bn.running_mean" in shapes:  # FLUX.2's, which diffusers cannot
        raise ValueError(OF_ANOTHER_CLASS)

    def count(pattern):
        number = 0
        while pattern.format(number) in shapes:
            number += 1
        return number

    levels = count("encoder.down.{}.block.0.conv1.weight")
    widths = [len(shapes[f"encoder.down.{level}.block.0.conv1.weight"]) for level in range(levels)]
    config = {
        "in_channels": shapes["encoder.conv_in.weight"].shape[1],
        "out_channels": len(shapes["decoder.conv_out.weight"]),
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": count("encoder.down.0.block.{}.conv1.weight"),
        "latent_channels": shapes["decoder.conv_in.weight"].shape[1],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }
    return config


def _space_of(file: Path, tensors: dict[str, torch.Tensor]) -> str | None:
    """The space of a single file: what diffusers says of a whole model, else what the file's name says."""
    family = family_of_file(file.stem, "files")
    if not any(name.startswith(VAE_PREFIXES) for name in tensors):
        return family and family.name
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    kind = infer_diffusers_model_type(tensors)
    return next((space for start, space in MODEL_SPACES.items() if kind.startswith(start)), family and family.name)


def _read_single_file(file: Path, vae_class: type, config: dict, dtype: torch.dtype) -> nn.Module:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if name.removeprefix(_prefix_of(name)).startswith(PARTS)]  # noqa: SIM118
            weights = _vae_part({name: opened.get_tensor(name) for name in names})
    else:
        weights = _vae_part(_tensors(torch.load(file, map_location="cpu", weights_only=True, mmap=True)))
    count = len(weights)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"_class_name": vae_class.__name__, **config}), encoding="utf-8")
        model = vae_class.from_single_file(weights, config=folder, torch_dtype=dtype, local_files_only=True)
    missing = sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta)
    if missing:
        raise Misfit(f"{len(missing)} weights are missing, {missing[0]} first")
    if len(model.state_dict()) != count:
        raise Misfit(f"it holds {count} weights of a VAE, one of its shapes has {len(model.state_dict())}")
    return model


def _prefix_of(name: str) -> str:
    return next((prefix for prefix in VAE_PREFIXES if name.startswith(prefix)), "")
