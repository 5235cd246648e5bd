"""Frozen VAEs, from a folder, a file or the hub, which read their weights at first use."""

from __future__ import annotations

import json

import torch
from torch import nn

from utils import UserError, one_line, require_regular
from vaes.conventions import CONVENTIONS
from vaes.sources import Misfit, Source, find_source

_DESCRIBED = {}  # reading a config takes half a second, and a run opens a VAE more than once


def _describe(vae_class: type, config) -> tuple[dict, tuple[int, int], int]:
    """(config with the class' defaults, (channels, stride) of raw latents, number of parameters) of a VAE, without memory for
    its weights. A config edited by hand can make the constructor raise anything."""
    key = vae_class, json.dumps(config, sort_keys=True, default=repr)
    if key not in _DESCRIBED:
        with torch.device("meta"):
            plan = vae_class.from_config(config)
            raw_shape = CONVENTIONS[vae_class.__name__].measure(plan)
        _DESCRIBED[key] = plan.config, raw_shape, sum(parameter.numel() for parameter in plan.parameters())
    return _DESCRIBED[key]


class FrozenVAE:
    """One frozen autoencoder: evaluation mode, no gradients, `channels_last`. The first use of `model` reads its weights.

    Attributes:
        config: the model's config with its class' defaults. class_name: such as "AutoencoderKL".
        convention: the `Convention` of that class.
        raw_channels, raw_stride: of its encoder's latents. Strides are image pixels per latent.
        channels, stride: of scaled latents. A class that folds (FLUX.2) has `fold` x `fold` raw latents in one.
        device, dtype: where and in which precision the weights live. float16 becomes bfloat16 or float32.
        label: how messages call it, such as the flag that named it.
        place: the folder, the file, or the path that names its two files; None for a model that the caller made.
        files: its config, if that is a file, and its weights.
        space_name: the latent space that the files' names or content tell, or None.
        has_own_map: whether config or weights hold the scale of raw latents. A single file in the original layout does not.
    """

    def __init__(self, source: Source, device, dtype: torch.dtype, label: str = "VAE"):
        """UserError if the source's config describes no VAE."""
        self.class_name = source.vae_class.__name__
        self.convention = CONVENTIONS[self.class_name]
        self.device = torch.device(device)
        if dtype == torch.float16:  # the activations of SDXL's VAE and others exceed its range
            fast = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = torch.bfloat16 if fast else torch.float32
        self.dtype = dtype
        self.label = label
        self.place = source.place
        self.files = source.files
        self.space_name = source.space_name
        self.has_own_map = source.has_own_map
        try:
            self.config, raw_shape, self._parameters = _describe(source.vae_class, source.config)
        except Exception as error:
            reason = f"{source.described_by} does not describe a {self.class_name} ({one_line(error)})"
            raise UserError(f"{self.where}: {reason}") from None
        self.fold = self.config["fold"] if self.convention.fold is None else self.convention.fold
        self.raw_channels, self.raw_stride = raw_shape
        self.channels = self.raw_channels * self.fold**2
        self.stride = self.raw_stride * self.fold
        self._read = source.read
        self._model = None

    @classmethod
    def of_model(cls, model: nn.Module) -> FrozenVAE:
        """A diffusers model that the caller made; it is frozen. UserError for an unknown class."""
        if type(model).__name__ not in CONVENTIONS:
            raise UserError(f"VAE: a {type(model).__name__}; known VAE classes are {', '.join(CONVENTIONS)}")
        parameter = next(model.parameters())
        vae = cls(Source(type(model), model.config, model.to, described_by="its config"), parameter.device, parameter.dtype)
        vae.config = model.config
        vae._model = freeze(model if parameter.dtype == vae.dtype else model.to(vae.dtype))
        return vae

    @property
    def where(self) -> str:
        """How messages name it: the label and the place, or the class of a model that the caller made."""
        return f"{self.label} {self.place or f'({self.class_name})'}"

    @property
    def loaded(self) -> bool:
        return self._model is not None

    @property
    @torch.inference_mode(False)  # weights that are first read during an evaluation must serve a backward pass later
    def model(self) -> nn.Module:
        if self._model is None:
            try:
                for file in self.files:
                    require_regular(file)
                size = sum(file.stat().st_size for file in self.files if file.suffix != ".json")
                if self._parameters > size:  # checked before memory is taken: a config can claim any size
                    raise ValueError(f"{self._parameters} of them are described, in a file of {size} bytes")
                model = self._read(self.dtype)
            except Misfit as error:
                raise UserError(f"{self.where}: {error}") from None
            except Exception as error:  # truncated, wrong shapes, another kind of file: each library has its own error
                raise UserError(f"{self.where}: its weights cannot be loaded ({one_line(error)})") from None
            bad = next((name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()), None)
            if bad:
                raise UserError(f"{self.where}: its weights are not finite ({bad} first)")
            self._model = freeze(model).to(self.device)
        return self._model

    def to(self, device: str | torch.device) -> FrozenVAE:
        self.device = torch.device(device)
        if self.loaded:
            self._model.to(self.device)
        return self


def freeze(vae: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients, `channels_last`: ten times as fast in bfloat16 on a CPU. Weights for frames, which have
    five dimensions, do not have this layout."""
    vae.eval().requires_grad_(False)
    has_frames = any(parameter.ndim == 5 for parameter in vae.parameters())
    return vae if has_frames else vae.to(memory_format=torch.channels_last)


def load_vae_model(model_path, subfolder, cache_dir, device, dtype, label: str = "VAE", typed: bool = True) -> FrozenVAE:
    """A frozen VAE from a folder or the hub, of the class that its config.json names; from a single file in the original
    layout; or from a tiny autoencoder's two files. Its weights are read at first use.

    Args:
        model_path: local folder, file, stem of two files, or hub id. `subfolder` is looked for in it, then the folder itself.
        cache_dir: where the hub client keeps downloads; None is its own default.
        device, dtype: where and in which precision the weights will live; float16 becomes bfloat16 or float32.
        label: how error messages call it, such as the flag that named it.
        typed: whether the user named the path; False for one that a checkpoint records, see `find_source`.

    The hub client takes its token from HUGGINGFACE_TOKEN or HF_TOKEN and its proxy from HTTPS_PROXY. Raises UserError.
    """
    return FrozenVAE(find_source(str(model_path), subfolder, cache_dir, label, typed), device, dtype, label)
