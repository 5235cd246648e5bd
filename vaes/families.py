"""The latent spaces that models share: `families.json` has one row for each, with its numbers and every name in use.

The numbers come from the families' VAE configs and diffusers' class defaults; ComfyUI's latent formats have the same. FLUX.2
and LTX keep their statistics in the weights. Their raw latents are the normalised ones, as ComfyUI keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from utils import UserError, read_json, shown
from vae_align import LatentSpace, letters_of


@dataclass(frozen=True)
class Family:
    """One row of `families.json`: a latent space and the models that use it.

    Attributes:
        name: the space's name, as checkpoints record it.
        models: the models that work in it, for readers.
        channels, stride: of scaled latents; stride in image pixels per latent.
        vae: the class in diffusers.
        scale, shift: diffusers' `(raw - shift) * scale`, where one number serves all channels.
        mean, std: one number per channel of `(raw - mean) * scale / std`; None where scale and shift suffice. Where `scale` is
            None, each VAE's own config has the numbers.
        aliases: other names for the space. Only letters and digits count; case does not.
        files: stems of single-file VAEs. Such a file does not name its space.
        model_types: the first letters of diffusers' names for a whole model's file; the longest that fits counts.
        tiny: stems and hub names of tiny autoencoders. They give scaled latents and do not name their space.
        ignores_shift: the family's pipeline ignores the shift_factor of its VAE's config.
        note: a remark for the README's table.
    """

    name: str
    models: str
    channels: int
    stride: int
    vae: str
    scale: float | None = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    aliases: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ()
    ignores_shift: bool = False
    note: str = ""

    @cached_property
    def space(self) -> LatentSpace | None:
        """The space with its numbers; None where only each VAE's config has them."""
        if self.scale is None:
            return None
        mean = self.mean or (self.shift,) * self.channels
        std = self.std or (1.0,) * self.channels
        return LatentSpace(self.name, self.channels, self.stride, mean, tuple(value / self.scale for value in std))


FAMILIES = tuple(
    Family(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()})
    for row in read_json(Path(__file__).with_name("families.json"))
)
SPACES = {family.name: family.space for family in FAMILIES if family.space}


def family_of(name: str) -> Family:
    """The row of a space's name or alias; UserError lists the names."""
    wanted = letters_of(name)
    for family in FAMILIES:
        if wanted in map(letters_of, (family.name, *family.aliases)):
            return family
    raise UserError(f"latent space {shown(name)}: unknown; choose from {', '.join(family.name for family in FAMILIES)}")


def named_space(name: str) -> LatentSpace:
    """The latent space of that name or alias; UserError lists the names."""
    family = family_of(name)
    if family.space is None:
        raise UserError(f"latent space {family.name}: its numbers are in its VAE's config and not known without it")
    return family.space


def space_of_file(stem: str, kind: str) -> str | None:
    """The name of the space that lists this stem of a file under `kind`, "files" or "tiny"; None if there is none."""
    return next((family.name for family in FAMILIES if stem.lower() in getattr(family, kind)), None)


def spaces_with(channels: int, stride: int) -> list[Family]:
    """The rows with this number of channels and this stride."""
    return [family for family in FAMILIES if (family.channels, family.stride) == (channels, stride)]
