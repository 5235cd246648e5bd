"""Finding and loading frozen VAEs: a folder or a hub id in, a diffusers model out that reads its weights when first needed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from utils import UserError, file_digest, hub_token, one_line
from vaes.conventions import CONVENTIONS
from vaes.sources import SINGLE_FILES, WEIGHT_FILES, Misfit, find_weights, shards_of, source_at
from vaes.tiny import find_tiny_files

HUB_PAGE = re.compile(r"^https?://(www\.)?(huggingface\.co|hf\.co|hf-mirror\.com)/|/tree/main/?$")
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")


def locate_vae(model_path: str, subfolder: str | None, cache_dir: str | None = None, label: str = "VAE") -> Path:
    """The local folder that holds a VAE's config.json and weights, downloaded from the hub if `model_path` is a repo id.

    `model_path/subfolder` is looked at first, then `model_path` itself, both on disk and on the hub. The address of a hub page
    stands for the repo id in it. UserError says what is there instead.
    """
    root = Path(model_path).expanduser()
    places = [place for place in dict.fromkeys((subfolder or "", "")) if not Path(place).is_absolute()]
    if os.path.isdir(root):  # `Path.is_dir` fails for too long a name
        for place in places:
            if (root / place / "config.json").is_file() and find_weights(root / place):
                return root / place
        for place in places:
            if (root / place).is_dir() and find_tiny_files(root / place, label):
                return root / place
        looked = " or ".join(str(root / place) for place in places)
        there = (file.relative_to(root).as_posix() for pattern in ("*", "*/*") for file in root.glob(pattern) if file.is_file())
        raise UserError(
            f"{label} {model_path}: no VAE there (config.json and {WEIGHT_FILES[0]} in {looked}); {_said_of(there)}"
        )
    if os.path.isfile(root) and root.suffix in SINGLE_FILES:
        return root
    if os.path.isdir(root.parent) and find_tiny_files(root, label):
        return root
    if root.suffix in SINGLE_FILES and not os.path.exists(root):
        raise UserError(f"{label} {model_path}: no such file")
    repo = HUB_PAGE.sub("", model_path).rstrip("/")
    if os.path.exists(root) or repo.count("/") != 1 or model_path.startswith((".", "~", "/")):
        raise UserError(
            f"{label} {model_path}: neither a folder on this machine, nor a file of weights ({', '.join(SINGLE_FILES)}), nor "
            "a hub id of the form owner/name (a folder within it is the subfolder)"
        )
    return _download_vae(repo, places, cache_dir, label)


def _said_of(names: Iterable[str]) -> str:
    """What a message says of the files, by their paths, among which no VAE was found where it was looked for."""
    names = sorted(name for name in names if not name.startswith("."))
    models = [
        place
        for place in sorted({name.rpartition("/")[0] for name in names} - {""})
        if f"{place}/config.json" in names and any(f"{place}/{weights}" in names for weights in WEIGHT_FILES)
    ]
    if models:
        return f"there are models in {_few(models)}; name the VAE's as the subfolder"
    files = [name for name in names if name.endswith(SINGLE_FILES)]
    if files:
        return f"there is {_few(files)}; name the file itself, on this machine"
    return f"there is {_few(names)}" if names else "there are no files"


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _download_vae(repo: str, places: list[str], cache_dir: str | None, label: str) -> Path:
    from huggingface_hub import errors, hf_hub_download, list_repo_files

    def fetch(place, name, local):
        return hf_hub_download(
            repo, name, subfolder=place or None, cache_dir=cache_dir, token=hub_token() or False, local_files_only=local
        )

    def find(local: bool) -> Path | None:
        for place in places:
            for name in WEIGHT_FILES:
                try:
                    config_file = fetch(place, "config.json", local)
                    file = Path(fetch(place, name, local))
                    for shard in shards_of(file):
                        fetch(place, shard, local)
                    return Path(config_file).parent
                except errors.RemoteEntryNotFoundError:
                    continue
                except errors.LocalEntryNotFoundError:
                    if not local:
                        raise
        return None

    try:
        try:
            folder = find(local=False)
        except errors.LocalEntryNotFoundError as error:  # the hub cannot be asked: what is on this machine?
            folder = find(local=True)
            if folder is None:
                raise error.__cause__ or error from None
        if folder:
            return folder
        there = _said_of(list_repo_files(repo, token=hub_token() or False))
    except errors.GatedRepoError:
        raise UserError(
            f"{label} {repo}: a gated model; accept its licence on its hub page and set HUGGINGFACE_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{label} {repo}: no such folder here, and no such model on the hub; if it is private or gated, set "
            "HUGGINGFACE_TOKEN"
        ) from None
    except Exception as error:  # offline, timeout, proxy down, disk full: the hub client has no common base for them
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise UserError(
                f"{label} {repo}: the hub refused the token or its rights ({one_line(error)}); check HUGGINGFACE_TOKEN"
            ) from None
        reason = one_line(error)
        proxies = [name for name in PROXIES if os.environ.get(name) or os.environ.get(name.lower())]
        proxy = f"the proxy of {', '.join(proxies)}" if proxies else "the proxy"
        raise UserError(
            f"{label} {repo}: no such folder here, and it could not be downloaded ({reason}); check the network and {proxy}"
        ) from None
    looked = " or ".join(place or "its root" for place in places)
    raise UserError(f"{label} {repo}: this hub model has no VAE in {looked}; {there}")


@dataclass(frozen=True)
class Described:
    """What a config says of a model: the config with its class' defaults, (channels, stride) of raw latents, and how many
    parameters it has."""

    config: dict
    raw_shape: tuple[int, int]
    parameters: int


_DESCRIBED: dict[tuple[type, str], Described] = {}  # to find out takes half a second, and a run opens a VAE more than once


def _described(vae_class: type, config) -> Described:
    """What `config` describes, without memory for weights. Raises whatever a hand-edited one makes the constructor raise."""
    key = vae_class, json.dumps(config, sort_keys=True, default=repr)
    if key not in _DESCRIBED:
        with torch.device("meta"):
            plan = vae_class.from_config(config)
            raw_shape = CONVENTIONS[vae_class.__name__].measure(plan)
        _DESCRIBED[key] = Described(plan.config, raw_shape, sum(parameter.numel() for parameter in plan.parameters()))
    return _DESCRIBED[key]


class FrozenVAE:
    """One frozen autoencoder: evaluation mode, no gradients, `channels_last`. Its weights are read from disk when something
    first asks for `model`.

    Attributes:
        config: of the model, with its class' defaults. class_name: such as "AutoencoderKL". convention: of that class.
        raw_channels, raw_stride: of the latents that its encoder gives; channels, stride: of scaled latents, which differ where
            the class folds (FLUX.2). Strides are image pixels per latent.
        device, dtype: where and in which precision the weights live; never float16, which the activations of some VAEs exceed.
        label: what messages call it, such as the flag that named it. folder: where its files are, or None.
        space_name: the latent space that the files' names or content tell, or None. has_own_map: whether config or weights say
            how raw latents are scaled; a single file in the original layout does not.
    """

    def __init__(self, config, class_name: str, raw_shape: tuple[int, int], device, dtype: torch.dtype, label: str):
        self.config = config
        self.class_name = class_name
        self.convention = CONVENTIONS[class_name]
        self.raw_channels, self.raw_stride = raw_shape
        self.device = torch.device(device)
        self.dtype = _without_float16(dtype, self.device)
        self.label = label
        self.folder = None
        self.space_name = None
        self.has_own_map = True
        self._source = None
        self._model = None
        self._parameters = 0

    @classmethod
    def of_model(cls, model: nn.Module, label: str = "VAE") -> FrozenVAE:
        """Around a model that the caller has; it is frozen. UserError for a class that this tool does not know."""
        class_name = type(model).__name__
        if class_name not in CONVENTIONS:
            raise UserError(f"{label}: a {class_name}; known VAE classes are {', '.join(CONVENTIONS)}")
        try:
            raw_shape = _described(type(model), model.config).raw_shape
        except Exception as error:
            raise UserError(f"{label}: a {class_name} that cannot be used ({one_line(error)})") from None
        parameter = next(model.parameters())
        vae = cls(model.config, class_name, raw_shape, parameter.device, parameter.dtype, label)
        vae._model = freeze(model if parameter.dtype == vae.dtype else model.to(vae.dtype))
        return vae

    @classmethod
    def in_place(cls, place: Path, device, dtype: torch.dtype, label: str = "VAE") -> FrozenVAE:
        """Around the files of a folder, a single file, or the stem of a tiny autoencoder's two files. UserError if they do not
        describe a VAE that this tool knows."""
        source = source_at(place, label)
        try:
            described = _described(source.vae_class, source.config)
        except Exception as error:  # whatever a hand-edited config makes the constructor raise
            reason = one_line(error)
            raise UserError(f"{label} {place}: {source.what} does not describe a {source.class_name} ({reason})") from None
        vae = cls(described.config, source.class_name, described.raw_shape, device, dtype, label)
        vae.folder, vae._source = place, source
        vae.space_name, vae.has_own_map = source.space_name, source.has_own_map
        vae._parameters = described.parameters
        return vae

    @property
    def fold(self) -> int:
        return self.convention.fold_of(self.config)

    @property
    def channels(self) -> int:
        return self.raw_channels * self.fold**2

    @property
    def stride(self) -> int:
        return self.raw_stride * self.fold

    @property
    def where(self) -> str:
        """How messages name it: the label and the folder, or the class of a model that the caller made."""
        return f"{self.label} {self.folder}" if self.folder else f"{self.label} ({self.class_name})"

    @property
    def files(self) -> list[Path]:
        """The files that make the VAE what it is: its config, where it has one, and its weights."""
        return self._source.files

    def digest(self) -> str:
        """SHA-256 of config and weights: of the files where there are any, else of the tensors."""
        digest = hashlib.sha256()
        if self.folder:
            for file in self.files:
                digest.update(file.name.encode() + file_digest(file))
        else:
            digest.update(repr(sorted(self.config.items())).encode())
            for name, tensor in self.model.state_dict().items():
                digest.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def loaded(self) -> bool:
        return self._model is not None

    @property
    @torch.inference_mode(False)  # weights that are first read during an evaluation must serve a backward pass later
    def model(self) -> nn.Module:
        if self._model is None:
            model = self._read()
            bad = _not_finite(model)
            if bad:
                raise UserError(f"{self.where}: its weights are not finite ({bad} first)")
            self._model = freeze(model).to(self.device)
        return self._model

    def _read(self) -> nn.Module:
        try:
            size = sum(file.stat().st_size for file in self.files if file.suffix != ".json")
            if self._parameters > size:  # before memory is taken for what a config merely claims
                raise ValueError(f"{self._parameters} of them are described, in a file of {size} bytes")
            return self._source.read(self.dtype)
        except Misfit as error:
            raise UserError(f"{self.where}: {error}") from None
        except Exception as error:  # truncated, wrong shapes, another kind of file: each library has its own error
            raise UserError(f"{self.where}: its weights cannot be loaded ({one_line(error)})") from None

    def to(self, device: str | torch.device) -> FrozenVAE:
        self.device = torch.device(device)
        if self.loaded:
            self._model.to(self.device)
        return self


def _without_float16(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a VAE runs when `dtype` is asked for: the activations of SDXL's and others exceed float16's range,
    so bfloat16 stands in for it where the device computes in it, else float32."""
    if dtype != torch.float16:
        return dtype
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def _not_finite(model: nn.Module) -> str | None:
    """The name of a weight that holds NaN or infinity, or None."""
    return next((name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()), None)


def freeze(vae: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients, `channels_last` (in bfloat16 on a CPU worth ten times the speed), which a VAE of frames
    does not have."""
    vae.eval().requires_grad_(False)
    has_frames = any(parameter.ndim == 5 for parameter in vae.parameters())
    return vae if has_frames else vae.to(memory_format=torch.channels_last)


def load_vae_model(model_path, subfolder, cache_dir, device, dtype, label: str = "VAE") -> FrozenVAE:
    """A frozen VAE from a folder or the hub, of the class that its own config.json names; or from a single file in the original
    layout, or a tiny autoencoder's two files.

    Args:
        model_path: local folder, file, stem of two files, or hub id; `subfolder` is looked for in it, then the folder itself.
        cache_dir: where the hub client keeps downloads; None is its own default.
        device, dtype: where and in which precision the weights will live; float16 becomes bfloat16 or float32.
        label: what error messages call it, such as the flag that named it.

    The hub client takes its token from HUGGINGFACE_TOKEN or HF_TOKEN and its proxy from HTTPS_PROXY. Raises UserError.
    """
    return FrozenVAE.in_place(locate_vae(str(model_path), subfolder, cache_dir, label), device, dtype, label)
