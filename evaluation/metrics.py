"""The metrics: one table, `METRICS`, that the ladder, the tables, metrics.csv and the page read.

A new metric is one entry. A metric of each image names a function of a `Sample` that gives a list with one value per image;
the rung's figure is their mean. A metric of the set names a class with `add` and `result` (see `SetMeasure`), such as a
distance between two distributions. What a metric needs beyond its formula, such as a network, is loaded by `load`, which
raises UserError with the reason when this machine does not have it; the metric is then left out by name.

    Metric("crispness", "Crispness", "image", each_image(lambda sample: crispness(sample.levels)), "{:.2f}".format, better=+1)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from evaluation import per_image, set_figures
from evaluation.exact_sum import ExactSums
from evaluation.frechet import FeatureSums, frechet_distance
from evaluation.sample import Sample
from losses import SMALLEST_SIDE, inception_network, lpips_network, st_lpips
from utils import UserError, one_line

LPIPS_SIDE = 32  # px: below that nothing is left after AlexNet's pooling


@dataclass(frozen=True)
class Setting:
    """What a metric may ask before it is loaded: the side of the images in px, the device, and the precision of ST-LPIPS'
    networks. `perceptual` keeps these, which several metrics look through, by name."""

    image_size: int
    device: torch.device | str
    dtype: torch.dtype = torch.float32
    perceptual: dict[str, PerceptualFeatures] = field(default_factory=dict)


class SetMeasure(Protocol):
    """A metric of a set of images, for all rungs."""

    def add(self, name: str, sample: Sample) -> None:
        """Take note of what the rung `name` made of a batch."""

    def gather(self, accelerator) -> None:
        """Bring together what all processes have taken note of."""

    def result(self) -> dict[str, float | list | None]:
        """{rung: value over all batches}; None where undefined."""

    def intervals(self) -> dict[str, float | None]:
        """{rung: half the width of the value's 95% interval}; rungs without one may be missing."""


@dataclass(frozen=True)
class Metric:
    """One figure of a rung of the ladder.

    Attributes:
        name: its key in metrics.json and its column in metrics.csv.
        label: its heading on the page.
        scope: "image": a value for each image, of which the figure is the mean; "set": one value for all images; "cost": what
            the rung takes (see `ladder.Ladder.costs`).
        load: Setting -> what measures it: for "image" a function Sample -> list of B values, for "set" a `SetMeasure`; None
            for "cost". UserError with the reason when it cannot be had.
        text: value -> how the tables show it; None: only in metrics.json and metrics.csv.
        better: +1: higher is better, -1: lower is better, 0: neither.
        unit: beside the heading, such as "dB".
        heading: of its column on the terminal; "": not shown there.
        choice: the word of --metrics that asks for it; "": always measured. Two metrics may share a choice.
        by_default: whether that word is among the defaults of --metrics.
        of_latents: needs latents in VAE2's space, which VAE1's own are not.
        components: names of its numbers where a value has several; None: as many as there are latent channels, which
            metrics.csv leaves out.
        decides: whether the verdict rests on it; the terminal then shows its interval too.
    """

    name: str
    label: str
    scope: str
    load: Callable[[Setting], Callable[[Sample], list] | SetMeasure] | None
    text: Callable | None
    better: int = 0
    unit: str = ""
    heading: str = ""
    choice: str = ""
    by_default: bool = False
    of_latents: bool = False
    components: tuple[str, ...] | None = ()
    decides: bool = False


# ----------------------------------------------------------------------------------------------------------------------
# What measures them


def each_image(measure: Callable[[Sample], list]) -> Callable[[Setting], Callable[[Sample], list]]:
    """The `load` of a metric that needs nothing but a formula."""
    return lambda setting: measure


def require_side(setting: Setting, side: int) -> None:
    """UserError unless the images are at least `side` px wide."""
    if setting.image_size < side:
        raise UserError(f"needs images of at least {side} px, these have {setting.image_size}")


def load_ms_ssim(setting: Setting) -> Callable[[Sample], list]:
    require_side(setting, per_image.MS_SSIM_SIDE)
    return lambda sample: per_image.ms_ssim(sample.levels, sample.original_levels)


def load_lpips(setting: Setting) -> Callable[[Sample], list]:
    require_side(setting, LPIPS_SIDE)
    network = lpips_network(setting.device)

    def measure(sample):
        return network(sample.levels / 127.5 - 1, sample.original_levels / 127.5 - 1).reshape(-1).tolist()

    return measure


class PerceptualFeatures:
    """An ST-LPIPS network and what it made of the last few batches, since rungs and metrics share them."""

    KEPT = 2  # the originals, and what the rung at hand made of them

    def __init__(self, network: str, device: torch.device | str, dtype: torch.dtype = torch.float32):
        self.network = st_lpips(network, device).to(dtype)
        self._recent = []

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> the network's features of their 8-bit levels, see `PerceptualDistance.features`."""
        found = next((kept for kept in self._recent if kept[0] is images), None)
        found = found or (images, [stage.float() for stage in self.network.features(per_image.to_8bit(images) / 127.5 - 1)])
        others = [kept for kept in self._recent if kept[0] is not images]
        self._recent = [*others[1 - self.KEPT :], found]
        return found[1]

    def distance(self, first: torch.Tensor, second: torch.Tensor) -> list[float]:
        """ST-LPIPS between images of two batches, pair by pair."""
        reference = self(second)  # first, so that what the rungs share is the last to be forgotten
        return self.network.distance(self(first), reference).tolist()


def perceptual_features(setting: Setting, network: str) -> PerceptualFeatures:
    require_side(setting, SMALLEST_SIDE)
    if network not in setting.perceptual:
        setting.perceptual[network] = PerceptualFeatures(network, setting.device, setting.dtype)
    return setting.perceptual[network]


def load_st_lpips(network: str) -> Callable[[Setting], Callable[[Sample], list]]:
    """The `load` of ST-LPIPS with that network."""

    def load(setting):
        features = perceptual_features(setting, network)
        return lambda sample: features.distance(sample.picture, sample.original)

    return load


def load_texture(setting: Setting) -> set_figures.SetFigure:
    features = perceptual_features(setting, "vgg")
    return set_figures.texture(lambda images: features(images)[: set_figures.TEXTURE_STAGES])


def of_the_set(figure: Callable[[], SetMeasure]) -> Callable[[Setting], SetMeasure]:
    """The `load` of a figure of the set that needs no network."""
    return lambda setting: figure()


class FrechetToOriginals:
    """A `SetMeasure`: the Fréchet distance between the features of a rung's pictures and those of the originals.

    Args:
        features: 8-bit levels (B, 3, H, W), float -> feature vectors (N, F).
    """

    def __init__(self, features: Callable[[torch.Tensor], torch.Tensor]):
        self.features = features
        self.sums = ExactSums()  # by rung
        self._counted = None

    def add(self, name: str, sample: Sample) -> None:
        if self._counted is not sample.original:  # all rungs of a batch share the originals
            self._counted = sample.original
            self.sums.add(set_figures.REFERENCE, FeatureSums.of(self.features(sample.original_levels)))
        self.sums.add(name, FeatureSums.of(self.features(sample.levels)))

    def gather(self, accelerator) -> None:
        self.sums.gather(accelerator)

    def result(self) -> dict[str, float | None]:
        sums = {name: FeatureSums(*self.sums.total([name])) for name in self.sums.added}
        originals = sums.pop(set_figures.REFERENCE, None)
        return {name: frechet_distance(of_rung, originals) for name, of_rung in sums.items()}

    def intervals(self) -> dict[str, float | None]:
        return {}


def load_rfid(setting: Setting) -> FrechetToOriginals:
    network = inception_network(setting.device)
    return FrechetToOriginals(lambda levels: network(levels.to(torch.uint8)))


# ----------------------------------------------------------------------------------------------------------------------
# The table


def _levels_of_rgb(bias: list) -> str:
    return " ".join("–" if level is None else f"{level:+.1f}" for level in bias)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}"


DECIBELS, FOUR_DIGITS = "{:.2f}".format, "{:.4f}".format

# in the order in which tables show them
METRICS = {
    metric.name: metric
    for metric in (
        Metric("latent_mse", "Latent MSE", "image",
               each_image(lambda sample: per_image.latent_mse(sample.latents, sample.vae2_latents)),
               FOUR_DIGITS, better=-1, heading="latent MSE", of_latents=True),
        Metric("psnr", "PSNR", "image", each_image(lambda sample: per_image.psnr(sample.levels, sample.original_levels)),
               DECIBELS, better=+1, unit="dB", heading="PSNR dB", decides=True),
        Metric("st_lpips_vgg", "ST-LPIPS, VGG", "image", load_st_lpips("vgg"), "{:.3f}".format, better=-1,
               heading="ST-LPIPS", choice="st_lpips", by_default=True, decides=True),
        Metric("st_lpips_alex", "ST-LPIPS, AlexNet", "image", load_st_lpips("alex"), "{:.3f}".format, better=-1,
               choice="st_lpips", by_default=True),
        Metric("texture", "Texture distance", "set", load_texture, "{:.1f}".format, better=-1, heading="texture",
               choice="texture", by_default=True),
        Metric("detail", "Finest detail", "set", of_the_set(set_figures.detail), "{:.2f}".format, unit="of VAE2's",
               heading="detail"),
        Metric("grid", "Grid", "set", of_the_set(set_figures.grid), "{:.1f}".format, better=-1, unit="of its surroundings",
               heading="grid"),
        Metric("ssim", "SSIM", "image", each_image(lambda sample: per_image.ssim(sample.levels, sample.original_levels)),
               FOUR_DIGITS, better=+1, heading="SSIM", choice="ssim", by_default=True),
        Metric("ms_ssim", "MS-SSIM", "image", load_ms_ssim, FOUR_DIGITS, better=+1, choice="ms_ssim", by_default=True),
        Metric("lpips", "LPIPS", "image", load_lpips, FOUR_DIGITS, better=-1, choice="lpips"),
        Metric("rfid", "rFID", "set", load_rfid, DECIBELS, better=-1, choice="rfid"),
        Metric("colour_bias", "Colour bias", "image",
               each_image(lambda sample: per_image.colour_bias(sample.levels, sample.vae2_levels)),
               _levels_of_rgb, unit="R G B, levels", heading="colour bias", components=("r", "g", "b")),
        Metric("latent_variance", "Latent variance", "set", of_the_set(set_figures.latent_variance), "{:.2f}".format,
               unit="of VAE2's", heading="latent var", of_latents=True),
        Metric("latent_detail", "Latents' finest detail", "set", of_the_set(set_figures.latent_detail), "{:.2f}".format,
               unit="of VAE2's", of_latents=True),
        Metric("milliseconds", "Time", "cost", None, "{:.2f}".format, better=-1, unit="ms", heading="ms"),
        Metric("parameters", "Weights", "cost", None, _millions, better=-1, unit="millions", heading="M params"),
        Metric("macs", "Multiply-adds", "cost", None, _billions, better=-1, unit="billions", heading="G MACs"),
        Metric("psnr_vs_vae2", "PSNR to VAE2", "image",
               each_image(lambda sample: per_image.psnr(sample.levels, sample.vae2_levels)), DECIBELS, better=+1, unit="dB"),
        Metric("ssim_vs_vae2", "SSIM to VAE2", "image",
               each_image(lambda sample: per_image.ssim(sample.levels, sample.vae2_levels)),
               None, better=+1, choice="ssim", by_default=True),
        Metric("latent_l1", "Latent L1", "image",
               each_image(lambda sample: per_image.latent_l1(sample.latents, sample.vae2_latents)),
               FOUR_DIGITS, better=-1, of_latents=True),
        Metric("latent_cosine", "Latent cosine", "image",
               each_image(lambda sample: per_image.latent_cosine(sample.latents, sample.vae2_latents)),
               FOUR_DIGITS, better=+1, of_latents=True),
        Metric("latent_mse_by_channel", "Latent MSE by channel", "image",
               each_image(lambda sample: per_image.latent_mse_by_channel(sample.latents, sample.vae2_latents)),
               None, better=-1, of_latents=True, components=None),
        Metric("latent_variance_by_channel", "Latent variance by channel", "set",
               of_the_set(set_figures.latent_variance_by_channel), None, of_latents=True, components=None),
        Metric("latent_spectrum", "Latent spectrum", "set", of_the_set(set_figures.latent_spectrum), None, of_latents=True,
               components=None),
    )
}  # fmt: skip

CHOICES = tuple(dict.fromkeys(metric.choice for metric in METRICS.values() if metric.choice))
DEFAULT_CHOICES = tuple(dict.fromkeys(metric.choice for metric in METRICS.values() if metric.by_default))


class Measures:
    """The metrics that are wanted and can be had on this machine, loaded, for one evaluation.

    Args:
        choices: words of `CHOICES`; the metrics that need no choice are always measured.
        image_size: side of the images, px. device: where networks are put. dtype: the precision of ST-LPIPS' networks.

    Attributes:
        names: of the metrics that are measured, in the order of `METRICS`.
        left_out: {metric: in a phrase, why it cannot be had}. Nothing is ever downloaded.
    """

    def __init__(
        self,
        choices=("ssim",),
        image_size: int = 256,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.left_out = {}
        self._of_each_image = {}
        self._of_the_set = {}
        setting = Setting(image_size, device, dtype)
        for metric in METRICS.values():
            if metric.scope == "cost" or (metric.choice and metric.choice not in choices):
                continue
            try:
                measure = metric.load(setting)
            except UserError as error:
                self.left_out[metric.name] = str(error)
            except Exception as error:  # a damaged file of weights, a library of another version: said, not raised
                self.left_out[metric.name] = one_line(error)
            else:
                into = self._of_each_image if metric.scope == "image" else self._of_the_set
                into[metric.name] = measure
        self.names = tuple(name for name in METRICS if name in self._of_each_image or name in self._of_the_set)

    def of_each_image(self, sample: Sample) -> dict[str, list]:
        """{metric: [value per image]} of what one rung made of a batch."""
        return {
            name: measure(sample)
            for name, measure in self._of_each_image.items()
            if sample.latents is not None or not METRICS[name].of_latents
        }

    def add(self, rung: str, sample: Sample) -> None:
        """Take note of what a rung made of a batch, for the metrics of the set."""
        for name, measure in self._of_the_set.items():
            if sample.latents is not None or not METRICS[name].of_latents:
                measure.add(rung, sample)

    def gather(self, accelerator) -> None:
        """Bring together what all processes have taken note of."""
        for name in sorted(self._of_the_set):
            self._of_the_set[name].gather(accelerator)

    def of_the_set(self) -> dict[str, dict[str, float | list | None]]:
        """{metric: {rung: value over all images}}."""
        return {name: measure.result() for name, measure in self._of_the_set.items()}

    def intervals_of_the_set(self) -> dict[str, dict[str, float | None]]:
        """{metric: {rung: half the width of its 95% interval}}, as far as there is one."""
        return {name: measure.intervals() for name, measure in self._of_the_set.items()}
