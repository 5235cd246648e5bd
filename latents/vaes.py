"""Finding and loading frozen VAEs: a folder or a hub id in, a diffusers model out that reads its weights when first needed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import nn

from utils import UserError, file_digest, hub_token, one_line, read_json, shown

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")


def locate_vae(model_path: str, subfolder: str | None, cache_dir: str | None = None, label: str = "VAE") -> Path:
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
        raise UserError(f"{label} {model_path}: no VAE there (config.json and {WEIGHT_FILES[0]} in {looked})")
    if os.path.exists(root) or model_path.count("/") != 1 or model_path.startswith((".", "~", "/")):
        raise UserError(f"{label} {model_path}: neither a folder on this machine nor a hub id of the form owner/name")
    return _download_vae(model_path, places, cache_dir, label)


def _download_vae(repo: str, places: list[str], cache_dir: str | None, label: str) -> Path:
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
        raise UserError(
            f"{label} {repo}: a gated model; accept its licence on its hub page and set HUGGINGFACE_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{label} {repo}: no such model on the hub; if it is private or gated, set HUGGINGFACE_TOKEN") from None
    except Exception as error:  # offline, timeout, proxy down, disk full: the hub client has no common base for them
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise UserError(
                f"{label} {repo}: the hub refused the token or its rights ({one_line(error)}); check HUGGINGFACE_TOKEN"
            ) from None
        reason = one_line(error)
        raise UserError(
            f"{label} {repo}: could not be downloaded ({reason}); check the network and the proxy, or name a local folder"
        ) from None
    raise UserError(f"{label} {repo}: this hub model has no VAE in {' or '.join(repr(place) for place in places)}")


class FrozenVAE:
    """One frozen diffusers autoencoder: evaluation mode, no gradients, `channels_last`. Its weights are read from disk
    when something first asks for `model`.

    Attributes:
        config: of the model, with its class' defaults. class_name: such as "AutoencoderKL". stride: image pixels per latent.
        device, dtype: where and in which precision the weights live; never float16, which the activations of some VAEs exceed.
        label: what messages call it, such as the flag that named it. folder: where its files are, or None.
    """

    def __init__(self, config, class_name: str, device, dtype: torch.dtype, label: str, folder: Path | None = None):
        self.config = config
        self.class_name = class_name
        self.device = torch.device(device)
        self.dtype = _without_float16(dtype, self.device)
        self.label = label
        self.folder = folder
        self._model = None
        self._parameters = 0

    @classmethod
    def of_model(cls, model: nn.Module, label: str = "VAE") -> FrozenVAE:
        """Around a model that the caller has; it is frozen."""
        parameter = next(model.parameters())
        vae = cls(model.config, type(model).__name__, parameter.device, parameter.dtype, label)
        vae._model = freeze(model.to(vae.dtype))
        return vae

    @classmethod
    def in_folder(cls, folder: Path, device, dtype: torch.dtype, label: str = "VAE") -> FrozenVAE:
        """Around the files of a folder. UserError if its config.json does not describe a VAE that this tool knows."""
        import diffusers

        try:
            stored = read_json(folder / "config.json")
            class_name = stored["_class_name"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{label} {folder}: its config.json cannot be read as a VAE's ({one_line(error)})") from None
        if class_name not in VAE_CLASSES:
            raise UserError(f"{label} {folder}: a {shown(class_name)}; known VAE classes are {', '.join(VAE_CLASSES)}")
        try:
            _check_sizes(stored)
            with torch.device("meta"):  # shapes and defaults without memory
                plan = getattr(diffusers, class_name).from_config(stored)
                _check_shapes(plan, image_stride(plan.config))
        except Exception as error:  # whatever a hand-edited config makes the constructor raise
            reason = one_line(error)
            raise UserError(f"{label} {folder}: its config.json does not describe a {class_name} ({reason})") from None
        vae = cls(plan.config, class_name, device, dtype, label, folder)
        vae._parameters = sum(parameter.numel() for parameter in plan.parameters())
        return vae

    @property
    def stride(self) -> int:
        return image_stride(self.config)

    @property
    def where(self) -> str:
        """How messages name it: the label and the folder, or the class of a model that the caller made."""
        return f"{self.label} {self.folder}" if self.folder else f"{self.label} ({self.class_name})"

    @property
    def files(self) -> list[Path]:
        """The files that make the VAE what it is: its config and its weights."""
        weights = next(self.folder / name for name in WEIGHT_FILES if (self.folder / name).is_file())
        return [self.folder / "config.json", weights]

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
        import diffusers

        try:
            size = self.files[1].stat().st_size
            if self._parameters > size:  # before memory is taken for what a config merely claims
                raise ValueError(f"{self._parameters} of them are described, in a file of {size} bytes")
            model, report = getattr(diffusers, self.class_name).from_pretrained(
                self.folder,
                torch_dtype=self.dtype,
                low_cpu_mem_usage=False,
                output_loading_info=True,
                local_files_only=True,
            )
        except Exception as error:  # truncated, wrong shapes, another kind of file: each library has its own error
            raise UserError(f"{self.where}: its weights cannot be loaded ({one_line(error)})") from None
        missing = sorted(report["missing_keys"])
        if missing:
            raise UserError(f"{self.where}: {len(missing)} weights are missing, {missing[0]} first")
        unused = sorted(name for name in report["unexpected_keys"] if name.startswith(("encoder.", "decoder.")))
        if unused:  # a part of the network that its config leaves out
            raise UserError(f"{self.where}: {len(unused)} weights have no place in its config, {unused[0]} first")
        return model

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


def raw_latents(encoded: list, sample: bool = False, generator: torch.Generator | None = None) -> torch.Tensor:
    """The raw latents of what a VAE's `encode` returned for the pieces of a batch: the posterior mean, or with `sample` one
    draw for the whole batch. A tiny autoencoder has no posterior and gives its latents as they are."""
    if hasattr(encoded[0], "latents"):
        return torch.cat([part.latents for part in encoded])
    posterior = type(encoded[0].latent_dist)(torch.cat([part.latent_dist.parameters for part in encoded]))
    return posterior.sample(generator=generator) if sample else posterior.mode()


def image_stride(config) -> int:
    """Image pixels per latent of a diffusers VAE, from its config."""
    widths = config.get("encoder_block_out_channels") or config["block_out_channels"]
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
    latents = raw_latents([plan.encode(image)])
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


def load_vae_model(model_path, subfolder, cache_dir, device, dtype, label: str = "VAE") -> FrozenVAE:
    """A frozen VAE from a folder or the hub, of the class that its own config.json names.

    Args:
        model_path: local folder or hub id; `subfolder` is looked for in it, then the folder itself.
        cache_dir: where the hub client keeps downloads; None is its own default.
        device, dtype: where and in which precision the weights will live; float16 becomes bfloat16 or float32.
        label: what error messages call it, such as the flag that named it.

    The hub client takes its token from HUGGINGFACE_TOKEN or HF_TOKEN and its proxy from HTTPS_PROXY. Raises UserError.
    """
    return FrozenVAE.in_folder(locate_vae(str(model_path), subfolder, cache_dir, label), device, dtype, label)
