"""A checkpoint together with its VAEs: what training moves and what evaluation judges."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch

from latents.spaces import Codec
from latents.vaes import load_vae_model
from runtime.device import physical_memory
from utils import UserError, atomic_file, next_stamp, one_line
from vae_align import CHECKPOINT_FORMAT, CHECKPOINT_PREFIX, AlignConfig, AlignModule, ResidualBlock, read_checkpoint

log = logging.getLogger(__name__)


def build_module(config: AlignConfig) -> AlignModule:
    """A new `AlignModule`, started at random; UserError when this machine's memory could not hold it."""
    with torch.device("meta"):
        parts = AlignModule(replace(config, num_blocks=0)), ResidualBlock(config.hidden_channels)
    rest, block = (sum(parameter.numel() for parameter in part.parameters()) for part in parts)
    parameters, memory = rest + config.num_blocks * block, physical_memory()
    if 4 * parameters > memory:  # float32
        raise UserError(
            f"--hidden_channels {config.hidden_channels} --num_blocks {config.num_blocks}: {parameters / 1e6:.0f} M parameters "
            f"do not fit into this machine's {memory / 1e9:.0f} GB; lower one of them"
        )
    return AlignModule(config)


class PipelineWithVAEs:
    """Two frozen VAEs and the module between them.

    Attributes:
        module: the `AlignModule` that is judged, used and saved. float32.
        training_module: the one that the optimizer moves: the same, unless `module` is its running average.
        codec1, codec2: `Codec`s of VAE1 and VAE2. The constructor also takes functions that return them, called
            when something first asks: so a checkpoint's pipeline translates on a machine that has neither VAE.
        progress: what a checkpoint says of its training: `step`, `epoch`, `metrics`, `config`.
    """

    def __init__(self, module: AlignModule, codec1, codec2):
        # channels_last is worth a third of the training time on a CPU, and what tensor cores want
        self.module = self.training_module = module.to(memory_format=torch.channels_last)
        self._codecs = [codec1, codec2]
        self.progress = {"step": 0, "epoch": 0, "metrics": {}, "config": {}}

    def _codec(self, index: int) -> Codec:
        if callable(self._codecs[index]):
            self._codecs[index] = self._codecs[index]()
            self._codecs[index].vae.to(self.device)
        return self._codecs[index]

    @property
    def codec1(self) -> Codec:
        return self._codec(0)

    @property
    def codec2(self) -> Codec:
        return self._codec(1)

    @property
    def config(self) -> AlignConfig:
        return self.module.config

    @property
    def vae1(self):
        return self.codec1.vae

    @property
    def vae2(self):
        return self.codec2.vae

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def to(self, device: str | torch.device) -> PipelineWithVAEs:
        self.module.to(device)
        self.training_module.to(device)
        for space in self._codecs:
            if not callable(space):
                space.vae.to(device)
        return self

    @property
    def uses_image(self) -> bool:
        return "image" in self.config.input_types

    @property
    def uses_latents(self) -> bool:
        return "latent" in self.config.input_types

    def encode_batch(
        self, batch: dict, sample: bool = False, generator: torch.Generator | None = None, images_needed: bool = False
    ):
        """A training batch -> (keyword arguments of `AlignModule.forward`, VAE2's scaled latents as the target, the images).

        Latents that the batch already carries (from the latent cache) are taken as they are; the others are encoded from
        `pixel_values`, the posterior mean or with `sample` a draw from the posterior. The images go to the device once, and
        only if the module, an encoder or, with `images_needed`, the caller reads them; otherwise they are None.
        """
        on_device = {"device": self.device, "non_blocking": True}
        encoded = "latents2" in batch and (not self.uses_latents or "latents1" in batch)
        images = None
        if self.uses_image or images_needed or not encoded:
            images = batch["pixel_values"].to(**on_device)

        def latents(name, codec):
            return batch[name].to(**on_device) if name in batch else codec().encode(images, sample, generator)

        inputs = {"image": images} if self.uses_image else {}
        if self.uses_latents:
            inputs["latents"] = latents("latents1", lambda: self.codec1)
        return inputs, latents("latents2", lambda: self.codec2), images

    @torch.no_grad()
    def translate(self, latents: torch.Tensor | None, image: torch.Tensor | None = None) -> torch.Tensor:
        """VAE1's scaled latents (B, C1, h, w) -> VAE2's scaled latents (B, C2, h', w'), in the dtype that came in.

        `image`, float NCHW in [-1, 1], is needed by modules that were trained with it and ignored by the others.
        Works without either VAE.
        """
        given = latents if latents is not None else image
        if given is None:
            raise UserError("translate: pass latents, an image, or both, as the module was trained")
        take = {"device": self.device, "dtype": torch.float32}
        latents = latents.to(**take) if latents is not None else None
        image = image.to(**take) if image is not None else None
        return self.module(latents, image).to(given.device, given.dtype)

    def save_checkpoint(
        self, folder: str | os.PathLike, config: dict, step: int, epoch: float, metrics: dict, name=None, **more
    ) -> Path:
        """Write `align_pipeline_YYYYMMDD_HHMMSS.pth` into `folder` and return its path.

        The file appears whole or not at all, never replaces another, and sorts after those already there; with `name` it
        is called that instead, and replaces an older one. It holds tensors and plain values only (those of `more` too), so
        that `torch.load(weights_only=True)` reads it.
        """
        content = {
            "format": CHECKPOINT_FORMAT,
            "align_config": asdict(self.config) | {"input_types": list(self.config.input_types)},
            "state_dict": {name: tensor.detach().cpu().contiguous() for name, tensor in self.module.state_dict().items()},
            "vae1": self.codec1.identity,
            "vae2": self.codec2.identity,
            "config": config,
            "step": step,
            "epoch": epoch,
            "metrics": metrics,
        } | more
        while True:
            path = Path(folder) / (name or f"{CHECKPOINT_PREFIX}_{next_stamp(folder, CHECKPOINT_PREFIX)}.pth")
            try:
                with atomic_file(path, exclusive=name is None) as file:
                    torch.save(content, file)
                return path
            except FileExistsError:
                continue  # another run took this second; take the next
            except OSError as error:
                raise UserError(f"checkpoint {path}: cannot be written ({one_line(error)}); free some space there") from None

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        vae1=None,
        vae2=None,
        device="cpu",
        dtype=torch.float32,
        cache_dir=None,
        vae1_subfolder=None,
        vae2_subfolder=None,
    ) -> PipelineWithVAEs:
        """A pipeline from `save_checkpoint`'s file. Executes no code from the file.

        Args:
            vae1, vae2: a VAE, or a folder or hub id in place of the recorded one; by default the VAE that the checkpoint
                names, read only when something other than `translate` asks for it.
            device, dtype: of the VAEs; the module stays in float32.
            vae1_subfolder, vae2_subfolder: in place of the recorded ones.
        """
        content = read_checkpoint(path)
        module = build_module(AlignConfig(**content["align_config"]))
        module.load_state_dict(content["state_dict"])
        options = {"cache_dir": cache_dir, "device": device, "dtype": dtype}
        spaces = [
            functools.partial(_recorded_codec, content[name], given, subfolder, f"--{name}_path", options)
            for name, given, subfolder in (("vae1", vae1, vae1_subfolder), ("vae2", vae2, vae2_subfolder))
        ]
        pipeline = cls(module.to(device).eval(), *spaces)
        pipeline.progress = {name: content[name] for name in ("step", "epoch", "metrics", "config")}
        return pipeline


def _recorded_codec(recorded: dict, given, subfolder: str | None, flag: str, options: dict) -> Codec:
    """The latent space that a checkpoint names, from `given` (a VAE, a folder, a hub id) or from where it was recorded."""
    path, subfolder = recorded["path"], recorded["subfolder"] if subfolder is None else subfolder
    if given is None or isinstance(given, (str, os.PathLike)):
        path = str(given or path or "")
        if not path:
            raise UserError(f"the checkpoint does not say where this VAE is; name it with {flag}")
        given = load_vae_model(path, subfolder, **options, flag=flag)
    space = Codec(given, path, subfolder)
    for name in ("channels", "stride"):
        if space.identity[name] != recorded[name]:
            raise UserError(
                f"{flag} {path}: its latents have {name} {space.identity[name]}, those of the checkpoint's VAE "
                f"{recorded[name]}; name a VAE of the same latent space"
            )
    return space


def encoded_batches(
    pipeline: PipelineWithVAEs, loader, accelerator, images: int, of_each: int | None = None, images_needed: bool = False
):
    """What `PipelineWithVAEs.encode_batch` returns, for about `images` training images over all processes, of each batch the
    first `of_each` being counted. A batch that is not finite is left out, as its training step would be."""
    wanted = min(images, len(loader.dataset))
    for batch in loader:
        inputs, target, pixels = pipeline.encode_batch(batch, images_needed=images_needed)
        if all(tensor.isfinite().all() for tensor in (target, *inputs.values())):
            yield inputs, target, pixels
        wanted -= min(len(target), of_each or len(target)) * accelerator.num_processes
        if wanted <= 0:
            break
