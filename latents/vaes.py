"""Finding and loading frozen VAEs: a folder or a hub id in, a diffusers model out that reads its weights when first needed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch import nn

from utils import UserError, hub_token, one_line, read_json, shown

log = logging.getLogger(__name__)

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")


def locate_vae(model_path: str, subfolder: str | None, cache_dir: str | None = None, flag: str = "--vae1_path") -> Path:
    """The local folder that holds a VAE's config.json and weights, downloaded from the hub if `model_path` is a repo id.

    `model_path/subfolder` is looked at first, then `model_path` itself, both on disk and on the hub.
    """
    root = Path(model_path).expanduser()
    places = [place for place in dict.fromkeys((subfolder or "", "")) if not Path(place).is_absolute()]
    if os.path.isdir(root):  # `Path.is_dir` fails for too long a name
        for place in places:
            if (root / place / "config.json").is_file() and any((root / place / name).is_file() for name in WEIGHT_FILES):
                return root / place
        looked = " or ".join(str(root / place) for place in places)
        raise UserError(f"{flag} {model_path}: no VAE there (config.json and {WEIGHT_FILES[0]} in {looked})")
    if os.path.exists(root) or model_path.count("/") != 1 or model_path.startswith((".", "~", "/")):
        raise UserError(f"{flag} {model_path}: neither a folder on this machine nor a hub id of the form owner/name")
    return _download_vae(model_path, places, cache_dir, flag)


def _download_vae(repo: str, places: list[str], cache_dir: str | None, flag: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    def fetch(place, name, local):
        return hf_hub_download(
            repo, name, subfolder=place or None, cache_dir=cache_dir, token=hub_token() or False, local_files_only=local
        )

    def find(local: bool) -> Path | None:
        for place in places:
            for name in WEIGHT_FILES:
                try:
                    config_file = fetch(place, "config.json", local)
                    fetch(place, name, local)
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
    except errors.GatedRepoError:
        raise UserError(f"{flag} {repo}: a gated model; accept its licence on its hub page and set HUGGINGFACE_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{flag} {repo}: no such model on the hub; if it is private or gated, set HUGGINGFACE_TOKEN") from None
    except Exception as error:  # offline, timeout, proxy down, disk full: the hub client has no common base for them
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise UserError(
                f"{flag} {repo}: the hub refused the token or its rights ({one_line(error)}); check HUGGINGFACE_TOKEN"
            ) from None
        raise UserError(
            f"{flag} {repo}: could not be downloaded ({one_line(error)}); check the network and --proxy, or name a local folder"
        ) from None
    raise UserError(f"{flag} {repo}: this hub model has no VAE in {' or '.join(repr(place) for place in places)}")


class LazyVAE:
    """A frozen diffusers VAE that is read from disk when something first needs its weights.

    `config`, `device` and `dtype` are there at once; every other attribute is the model's own.
    """

    def __init__(self, folder: Path, device: str | torch.device, dtype: torch.dtype, flag: str = "--vae1_path"):
        import diffusers

        try:
            stored = read_json(folder / "config.json")
            class_name = stored["_class_name"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{flag} {folder}: its config.json cannot be read as a VAE's ({one_line(error)})") from None
        if class_name not in VAE_CLASSES:
            raise UserError(f"{flag} {folder}: a {shown(class_name)}; known VAE classes are {', '.join(VAE_CLASSES)}")
        self.folder, self.flag = folder, flag
        self.device, self.dtype = torch.device(device), dtype
        self.model_class = getattr(diffusers, class_name)
        try:
            _check_sizes(stored)
            with torch.device("meta"):  # shapes and defaults without memory
                plan = self.model_class.from_config(stored)
                self.config = plan.config
                _check_shapes(plan, image_stride(plan))
        except Exception as error:  # whatever a hand-edited config makes the constructor raise
            raise UserError(f"{flag} {folder}: its config.json does not describe a {class_name} ({one_line(error)})") from None
        self._model = None
        self._weights = sum(parameter.numel() for parameter in plan.parameters())

    @property
    def files(self) -> list[Path]:
        """The files that make the VAE what it is: its config and its weights."""
        weights = next(self.folder / name for name in WEIGHT_FILES if (self.folder / name).is_file())
        return [self.folder / "config.json", weights]

    @property
    def loaded(self) -> bool:
        return self._model is not None

    @property
    @torch.inference_mode(False)  # weights first read while evaluating must still serve a backward pass later
    def model(self) -> nn.Module:
        if self._model is None:
            model = self._read()
            if self.dtype == torch.float16 and _not_finite(model):
                self.widen()
                model = self._read()
            if _not_finite(model):
                raise UserError(f"{self.flag} {self.folder}: its weights are not finite ({_not_finite(model)} first)")
            self._model = freeze(model).to(self.device)
        return self._model

    def _read(self) -> nn.Module:
        try:
            room = self.files[1].stat().st_size
            if self._weights > room:  # before memory is taken for what a config merely claims
                raise ValueError(f"{self._weights} of them are described, in a file of {room} bytes")
            model, report = self.model_class.from_pretrained(
                self.folder,
                torch_dtype=self.dtype,
                low_cpu_mem_usage=False,
                output_loading_info=True,
                local_files_only=True,
            )
        except Exception as error:  # truncated, wrong shapes, another kind of file: each library has its own error
            raise UserError(f"{self.flag} {self.folder}: its weights cannot be loaded ({one_line(error)})") from None
        if report["missing_keys"]:
            missing = report["missing_keys"]
            raise UserError(f"{self.flag} {self.folder}: {len(missing)} weights are missing, {sorted(missing)[0]} first")
        unused = sorted(name for name in report["unexpected_keys"] if name.startswith(("encoder.", "decoder.")))
        if unused:  # a part of the network that its config leaves out
            raise UserError(f"{self.flag} {self.folder}: {len(unused)} weights have no place in its config, {unused[0]} first")
        return model

    def widen(self) -> None:
        """Go over to float32, with the weights read anew: float16 has rounded them."""
        log.warning("%s %s overflows in %s: running it in float32", self.flag, self.folder, str(self.dtype).split(".")[-1])
        self.dtype, self._model = torch.float32, None

    def __getattr__(self, name):
        if name.startswith("__") or name == "_model":  # copy and pickle probe for these before __init__ ran
            raise AttributeError(name)
        return getattr(self.model, name)

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def to(self, device: str | torch.device):
        self.device = torch.device(device)
        if self.loaded:
            self._model.to(self.device)
        return self


def image_stride(vae) -> int:
    """Image pixels per latent of a diffusers VAE (a model or a `LazyVAE`), from its config."""
    widths = vae.config.get("encoder_block_out_channels") or vae.config["block_out_channels"]
    return 2 ** (len(widths) - 1)


def _check_sizes(config) -> None:
    """ValueError for a config with numbers that no VAE has, and that would take the constructor hours or all memory."""
    for name, value in config.items():
        items = value if isinstance(value, list) else [value]
        most = 64 if name in ("layers_per_block", "num_encoder_blocks", "num_decoder_blocks") else 1 << 16
        if (len(items) > 12 and name.endswith("block_out_channels")) or any(
            isinstance(item, (int, float)) and not abs(item) <= most for item in items
        ):
            raise ValueError(f"{name} {shown(value)}")
    if config.get("latent_channels", 1) == 0:
        raise ValueError("latent_channels 0")


def _check_shapes(plan: nn.Module, stride: int) -> None:
    """ValueError unless the VAE turns an RGB image into latents of its channels and stride, and those into an image. For a
    model on the meta device, which computes shapes only."""
    image = torch.empty(1, 3, 2 * stride, 2 * stride)
    encoded = plan.encode(image)
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    if latents.shape != (1, plan.config["latent_channels"], 2, 2):
        raise ValueError(f"its latents of a {2 * stride} px image are {tuple(latents.shape)}")
    if plan.decode(latents).sample.shape != image.shape:
        raise ValueError("it decodes to another size or number of channels than RGB")


def _not_finite(model: nn.Module) -> str | None:
    """The name of a weight that holds NaN or infinity, or None."""
    return next((name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()), None)


def freeze(vae: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients, `channels_last` (in bfloat16 on a CPU worth ten times the speed)."""
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def load_vae_model(model_path, subfolder, cache_dir, device, dtype, flag: str = "--vae1_path") -> LazyVAE:
    """A frozen VAE from a folder or the hub, of the class that its own config.json names.

    Args:
        model_path: local folder or hub id; `subfolder` is looked for in it, then the folder itself.
        cache_dir: where the hub client keeps downloads; None is its own default.
        device, dtype: where and in which precision the weights will live.
        flag: the command-line flag that error messages name.

    The hub client takes its token from HUGGINGFACE_TOKEN or HF_TOKEN and its proxy from HTTPS_PROXY. Raises UserError.
    """
    return LazyVAE(locate_vae(str(model_path), subfolder, cache_dir, flag), device, dtype, flag)
