"""Where frozen VAEs are found and how their files are read.

A VAE is a folder of diffusers, on disk or on the hub; a single file in the original layout; or a tiny autoencoder's two files.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils import UserError, count_of, hub_token, one_line, read_json, read_torch, require_regular, require_safe_torch, shown
from vae_align import HUB_NAME
from vaes.conventions import CONVENTIONS
from vaes.families import FAMILIES, space_of_file
from vaes.tiny import TinyAutoencoder

log = logging.getLogger(__name__)

STEM = "diffusion_pytorch_model"
# in the order in which they are looked for; full precision first
WEIGHT_ENDINGS = ("safetensors", "bin", "safetensors.index.json", "fp16.safetensors", "fp16.bin", "safetensors.index.fp16.json")
WEIGHT_FILES = tuple(f"{STEM}.{ending}" for ending in WEIGHT_ENDINGS)
TINY_PARTS, TINY_SUFFIXES = ("encoder", "decoder"), (".safetensors", ".pth")
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth")
HUB_PAGE = re.compile(r"^https?://(www\.)?(huggingface\.co|hf\.co|hf-mirror\.com)/|/tree/main/?$")
KNOWN_OWNERS = ("black-forest-labs", "madebyollin", "sd-legacy", "stabilityai")  # whose hub models a checkpoint may name
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
VAE_PREFIXES = ("first_stage_model.", "vae.")  # of a VAE's weights within a whole model's file
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "bn.")  # a VAE's own; others are losses and averages
OF_ANOTHER_CLASS = "not in the layout of the original AutoencoderKL; name the folder of its diffusers version"


class Misfit(ValueError):
    """Weights and config that do not belong together; the message follows "the VAE's path: "."""


@dataclass(frozen=True)
class Source:
    """A VAE's class and config, and a function that reads its weights.

    Attributes:
        vae_class: the model's class. config: for `vae_class.from_config`.
        read: dtype -> the model with its weights; raises `Misfit`, or a library's error.
        place: the folder, the file, or the path that names a tiny autoencoder's two files; None for a model in memory.
        files: config and weights. Their content identifies the VAE.
        described_by: names the origin of `config` in messages. space_name, has_own_map: see `FrozenVAE`.
    """

    vae_class: type
    config: dict
    read: Callable[[torch.dtype], nn.Module]
    place: Path | None = None
    files: Sequence[Path] = ()
    described_by: str = "its config.json"
    space_name: str | None = None
    has_own_map: bool = True


def find_source(
    model_path: str, subfolder: str | None, cache_dir: str | None = None, label: str = "VAE", typed: bool = True
) -> Source:
    """The files of a VAE, downloaded from the hub if `model_path` is a repository's id or the address of its page.

    `model_path/subfolder` is looked at first, then `model_path` itself, both on disk and on the hub. If the user has not
    `typed` the path, the hub is asked for models of `KNOWN_OWNERS` alone: a stranger's checkpoint may name any model, and the
    request would carry the user's token. UserError names the models and files that are there instead.
    """
    if not model_path:  # an unset variable in a job's script; as a path it would mean the working directory
        raise UserError(f"{label} '': names nothing; name a folder, a file or a hub id")
    if not typed and model_path.startswith(("\\\\", "//")):  # where Windows would log in
        raise UserError(f"{label} {model_path}: on another machine; name it yourself to have it read there")
    root = Path(model_path).expanduser()
    places = [place for place in dict.fromkeys((subfolder or "", "")) if not Path(place).is_absolute()]
    cached = re.fullmatch("models--(.+?)--(.+)", root.name)
    if cached and os.path.isdir(root / "snapshots"):  # the hub client's own folder of a model
        return _of_folder(_download("/".join(cached.groups()), places, str(root.parent), label, online=False), label)
    if os.path.isdir(root):  # `Path.is_dir` fails for too long a name
        folders = [root / place for place in places if (root / place).is_dir()]
        for folder in folders:
            if (folder / "config.json").is_file() and find_weights(folder):
                return _of_folder(folder, label)
        for folder in folders:
            if tiny := find_tiny_files(folder, label):
                return _of_tiny_files(folder, tiny, label)
        looked = " or ".join(str(root / place) for place in places)
        levels = ("*", "*/*", "*/*/*")
        there = (file.relative_to(root).as_posix() for level in levels for file in root.glob(level) if file.is_file())
        raise UserError(
            f"{label} {model_path}: no VAE there (config.json and {WEIGHT_FILES[0]} in {looked}); {_names_of_others(there)}"
        )
    if os.path.isdir(root.parent) and (tiny := find_tiny_files(root, label)):
        return _of_tiny_files(root, tiny, label)
    if root.suffix in SINGLE_FILES:
        if os.path.isfile(root):
            return _of_single_file(root, label)
        if not os.path.exists(root):
            raise UserError(f"{label} {model_path}: no such file")
    repo = HUB_PAGE.sub("", model_path).rstrip("/")
    if os.path.exists(root) or not HUB_NAME.fullmatch(repo):
        raise UserError(
            f"{label} {model_path}: neither a folder on this machine, nor a file of weights ({', '.join(SINGLE_FILES)}), nor "
            "a hub id of the form owner/name (a folder within it is the subfolder)"
        )
    online = typed or repo.partition("/")[0] in KNOWN_OWNERS
    return _of_folder(_download(repo, places, cache_dir, label, online), label)


def _names_of_others(files: Iterable[str]) -> str:
    """A message's clause on the files of a place without a VAE, given by their paths in it."""
    names = sorted(name for name in files if not name.startswith("."))
    models = sorted({name.rpartition("/")[0] for name in names if name.endswith(WEIGHT_FILES)} - {""})
    single_files = [name for name in names if name.endswith(SINGLE_FILES)]
    for found, said, remedy in (
        (models, "there are models in", "; name the VAE's as the subfolder"),
        (single_files, "there is", "; name the file itself, on this machine"),
        (names, "there is", ""),
    ):
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            return f"{said} {', '.join(found[:5])}{more}{remedy}"
    return "there are no files"


# ----------------------------------------------------------------------------------------------------------------------
# The hub


def _download(repo: str, places: list[str], cache_dir: str | None, label: str, online: bool) -> Path:
    """The folder of a hub model's VAE in the hub client's cache, with its config and weights. The hub itself is asked only if
    `online`."""
    try:
        from huggingface_hub import errors, hf_hub_download, list_repo_files

        token = hub_token() or False
    except Exception as error:  # the environment can make its import fail, such as HF_HUB_ETAG_TIMEOUT
        raise UserError(f"{label} {repo}: the hub's client cannot be imported ({one_line(error)})") from None

    def fetch(local: bool) -> Path | None:
        for place, name in itertools.product(places, WEIGHT_FILES):
            get = functools.partial(
                hf_hub_download, repo, subfolder=place or None, cache_dir=cache_dir or None, token=token, local_files_only=local
            )
            try:
                config_file = Path(get("config.json"))
                for shard in shards_of(Path(get(name))):
                    get(shard)
                return config_file.parent
            except errors.RemoteEntryNotFoundError:
                continue
            except errors.LocalEntryNotFoundError:
                if not local:
                    raise
        return None

    try:
        try:
            folder = fetch(local=not online)
        except Exception as error:  # no network, a proxy or certificate that cannot work, a refusal: the cache may hold the VAE
            cause = (isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__) or error
            folder = fetch(local=True)
            if folder is None:
                raise cause from None
            log.warning("%s %s: an earlier download is used; the hub gives none (%s)", label, repo, one_line(cause, 150))
        if folder:
            return folder
        said = "no earlier download holds it; name it yourself to have it fetched from the hub"
        if online:
            there = _names_of_others(list_repo_files(repo, token=token))
            said = f"this hub model has no VAE in {' or '.join(place or 'its root' for place in places)}; {there}"
    except Exception as error:  # offline, timeout, proxy down, disk full: the hub client has no common base for them
        if isinstance(error, errors.GatedRepoError):
            said = "a gated model; accept its licence on its hub page and set HUGGINGFACE_TOKEN"
        elif isinstance(error, errors.RepositoryNotFoundError):
            said = "no such folder here, and no such model on the hub; if it is private or gated, set HUGGINGFACE_TOKEN"
        elif getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            said = f"the hub refused the token or its rights ({one_line(error)}); check HUGGINGFACE_TOKEN"
        else:
            proxies = [name for name in PROXIES if os.environ.get(name) or os.environ.get(name.lower())]
            proxy = f"the proxy of {', '.join(proxies)}" if proxies else "the proxy"
            said = f"no such folder here, and it could not be downloaded ({one_line(error)}); check the network and {proxy}"
    raise UserError(f"{label} {repo}: {said}")


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


def _of_folder(folder: Path, label: str) -> Source:
    try:
        config = read_json(folder / "config.json")
        class_name = str(config["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{label} {folder}: its config.json cannot be read as a VAE's ({one_line(error)})") from None
    if class_name not in CONVENTIONS:
        raise UserError(f"{label} {folder}: a {shown(class_name)}; known VAE classes are {', '.join(CONVENTIONS)}")
    vae_class = _diffusers_class(class_name, f"{label} {folder}")
    weights = find_weights(folder)
    try:
        _check_sizes(config)
        files = [folder / "config.json", weights, *(folder / name for name in shards_of(weights))]
    except Exception as error:
        reason = one_line(error)
        raise UserError(f"{label} {folder}: its config.json does not describe a {class_name} ({reason})") from None
    return Source(vae_class, config, functools.partial(_read_folder, vae_class, folder, weights), folder, files)


def _diffusers_class(class_name: str, where: str) -> type:
    """The class of that name; UserError, which begins with `where`, if the installed diffusers does not have it."""
    try:
        import diffusers

        return getattr(diffusers, class_name)
    except AttributeError:
        raise UserError(
            f"{where}: a {class_name}, which diffusers {diffusers.__version__} does not have; install a newer one"
        ) from None
    except Exception as error:  # the environment can make its import fail in any way
        raise UserError(
            f"{where}: diffusers cannot be imported ({one_line(error)}); install requirements.txt anew, or unset the variable "
            "of the environment that it names"
        ) from None


def _read_folder(vae_class: type, folder: Path, weights: Path, dtype: torch.dtype) -> nn.Module:
    if not all(name.endswith(".safetensors") for name in shards_of(weights) or [weights.name]):
        require_safe_torch()
    model, report = vae_class.from_pretrained(
        folder,
        torch_dtype=dtype,
        variant="fp16" if ".fp16" in weights.name else None,
        low_cpu_mem_usage=False,
        output_loading_info=True,
        local_files_only=True,
    )
    unused = [name for name in report["unexpected_keys"] if name.startswith(("encoder.", "decoder."))]
    for names, said in ((report["missing_keys"], "are missing"), (unused, "have no place in its config")):
        if names:
            raise Misfit(f"{len(names)} weights {said}, {min(names)} first")
    return model


def _check_sizes(config) -> None:
    """ValueError for sizes that no VAE has: the constructor would take hours or all memory."""
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


def find_tiny_files(path: Path, label: str) -> tuple[Path, Path] | None:
    """(encoder, decoder) of a tiny autoencoder in its author's format; None if `path` names none.

    `path` is a folder that holds one pair `X_encoder.*`, `X_decoder.*`, one of the two files, or the two files' common stem,
    such as models/vae_approx/taesd. UserError for a folder with several pairs, or for half of one.
    """
    if os.path.isdir(path):
        stems = sorted({_stem_of(file) for file in path.iterdir()} - {""})
        if len(stems) > 1:
            raise UserError(f"{label} {path}: {count_of(len(stems), 'tiny autoencoder')} there; name one: {path / stems[0]}")
        if not stems:
            return None
        stem = path / stems[0]
    else:
        stem = path.with_name(_stem_of(path)) if _stem_of(path) else path
    candidates = [[stem.with_name(f"{stem.name}_{part}{suffix}") for suffix in TINY_SUFFIXES] for part in TINY_PARTS]
    pair = [next(filter(os.path.isfile, files), None) for files in candidates]
    if not any(pair):
        return None
    for part, file in zip(TINY_PARTS, pair):
        if file is None:
            raise UserError(f"{label} {stem}: its {part} is missing ({stem.name}_{part}.safetensors or .pth beside the other)")
    return tuple(pair)


def _stem_of(file: Path) -> str:
    """Such as "taesd" of taesd_encoder.pth; "" for the name of another file."""
    stem, _, part = file.stem.rpartition("_")
    return stem if part in TINY_PARTS and file.suffix in TINY_SUFFIXES else ""


def _of_tiny_files(place: Path, files: tuple[Path, Path], label: str) -> Source:
    try:
        encoder = _read_layers(files[0])
        first, last = encoder.get("0.weight"), max((int(name.split(".")[0]) for name in encoder), default=0)
        if first is None or first.ndim != 4 or f"{last}.weight" not in encoder:
            raise ValueError(f"{files[0].name} is no tiny autoencoder's encoder")
    except Exception as error:  # torch and safetensors have errors of their own for a damaged file
        raise UserError(f"{label} {files[0]}: its weights cannot be loaded ({one_line(error)})") from None
    channels, pooled = len(encoder[f"{last}.weight"]), any(".pool." in name for name in encoder)
    fold = 2 if pooled and channels == 32 else 1
    config = {"latent_channels": channels, "stride": 32 if len(first) == 32 else 8, "pooled": pooled, "fold": fold}
    read = functools.partial(_read_tiny, files, config)
    return Source(TinyAutoencoder, config, read, place, files, "its encoder", space_of_file(_stem_of(files[0]), "tiny"))


def _read_tiny(files: tuple[Path, Path], config: dict, dtype: torch.dtype) -> TinyAutoencoder:
    with torch.device("meta"):
        model = TinyAutoencoder.from_config(config)
    for part, file in zip((model.encoder, model.decoder), files):
        part.load_state_dict(_read_layers(file), assign=True)
    return model.to(dtype)


def _read_layers(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file. ComfyUI's files may put the part's name before each layer's number."""
    prefix = "encoder." if "encoder" in file.stem else "decoder."
    weights = {name.removeprefix(prefix): tensor for name, tensor in _read_tensors(file, "cpu").items()}
    if not all(name.split(".")[0].isdigit() for name in weights):
        raise ValueError(f"{file.name} does not number its layers as the author's files do")
    return weights


# ----------------------------------------------------------------------------------------------------------------------
# A single file in the original layout


def _of_single_file(file: Path, label: str) -> Source:
    try:
        tensors = _read_tensors(file, "meta")
        names = _names_of_vae(tensors)
        config = _config_of({name: tensors[stored] for name, stored in names.items()})
    except Exception as error:  # torch and safetensors have errors of their own for a damaged file
        raise UserError(f"{label} {file}: cannot be read as a VAE in the original layout ({one_line(error)})") from None
    vae_class = _diffusers_class("AutoencoderKL", f"{label} {file}")
    read = functools.partial(_read_single_file, vae_class, file, names, config)
    return Source(vae_class, config, read, file, [file], "its content", _space_of_single_file(file, tensors), has_own_map=False)


def _read_tensors(file: Path, device: str, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of these names alone, by default all; on the "meta" device shapes without values."""
    require_regular(file)
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            names = names or [*opened.keys()]
            if device == "meta":
                return {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in names}
            return {name: opened.get_tensor(name) for name in names}
    content = read_torch(file, device, mmap=names is not None)
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    return {name: tensors[name] for name in names or tensors}


def _names_of_vae(stored: Iterable[str]) -> dict[str, str]:
    """{name in the original AutoencoderKL: name in the file} of the VAE's weights. A whole model's file puts a prefix before
    them. ValueError if there are none."""
    for prefix in (*VAE_PREFIXES, ""):
        names = {name.removeprefix(prefix): name for name in stored if name.startswith(prefix)}
        names = {name: full for name, full in names.items() if name.startswith(PARTS)}
        if "encoder.conv_in.weight" in names:
            return names
    if any(name.startswith(prefix + part) for name in stored for prefix in (*VAE_PREFIXES, "") for part in PARTS[:2]):
        raise ValueError(OF_ANOTHER_CLASS)
    raise ValueError("it holds no VAE")


def _config_of(tensors: dict[str, torch.Tensor]) -> dict:
    """The config of an AutoencoderKL in the original layout, read off the shapes of its weights."""
    if "encoder.down.0.block.0.conv1.weight" not in tensors or "bn.running_mean" in tensors:  # the latter: FLUX.2's
        raise ValueError(OF_ANOTHER_CLASS)

    def count(pattern):
        return next(number for number in itertools.count() if pattern.format(number) not in tensors)

    levels = count("encoder.down.{}.block.0.conv1.weight")
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": len(tensors["decoder.conv_out.weight"]),
        "block_out_channels": [len(tensors[f"encoder.down.{level}.block.0.conv1.weight"]) for level in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": count("encoder.down.0.block.{}.conv1.weight"),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in tensors,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }


def _space_of_single_file(file: Path, tensors: dict[str, torch.Tensor]) -> str | None:
    """The space of a single file. diffusers recognises a whole model's; otherwise the file's name may tell."""
    told = space_of_file(file.stem, "files")
    if not any(name.startswith(VAE_PREFIXES) for name in tensors):
        return told
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    kind = infer_diffusers_model_type(tensors)
    begins = {begin: family.name for family in FAMILIES for begin in family.model_types if kind.startswith(begin)}
    return begins[max(begins, key=len)] if begins else told


def _read_single_file(vae_class: type, file: Path, names: dict[str, str], config: dict, dtype: torch.dtype) -> nn.Module:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    tensors = _read_tensors(file, "cpu", names.values())
    weights = convert_ldm_vae_checkpoint({name: tensors[stored] for name, stored in names.items()}, config)
    if len(weights) != len(names):  # the conversion drops a name that it does not know
        raise Misfit(f"{len(names) - len(weights)} of its {len(names)} weights have no place in an AutoencoderKL")
    with torch.device("meta"):
        model = vae_class.from_config(config)
    model.load_state_dict(weights, assign=True)
    return model.to(dtype)
