"""The metrics: formulas on one image, and the table `METRICS` that the ladder, the tables, metrics.csv and the report read.

A new metric is one entry. A metric of each image names a function of a `Sample` that gives a tensor on the sample's device,
with one value, or a row of values, per image; the rung's figure is their mean. A metric of the set names a `figures.SetFigure`,
such as a distance between two distributions. Whatever a metric needs beyond its formula, such as a network, is loaded by
`load`. It raises UserError with the reason when this machine does not have it; the metric is then left out by name.

    Metric("crispness", "Crispness", "image", each_image(lambda sample: crispness(sample.levels)), "{:.2f}".format, better=+1)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from evaluation import figures
from evaluation.figures import Sample, SetFigure, finite, in_float64, mean_and_std, to_8bit
from losses import SMALLEST_SIDE, inception_network, lpips_network, st_lpips
from utils import UserError, one_line

LPIPS_SIDE = 32  # px: below that nothing is left after AlexNet's pooling
MS_SSIM_SIDE = 176  # px: a sixteenth of it must exceed 10, or torchmetrics raises


@dataclass(frozen=True)
class Metric:
    """One figure of a rung of the ladder.

    Attributes:
        name: its key in metrics.json and its column in metrics.csv.
        label: its heading in the report.
        scope: "image": a value for each image, and their mean as the figure; "set": one value for all images; "cost": see
            `ladder.Ladder.costs`.
        load: `Measures` -> for "image" a function Sample -> values (B) or (B, N), for "set" a `SetFigure`; None for "cost".
            UserError with the reason when it cannot be had.
        text: value -> how the tables show it; None: only in metrics.json and metrics.csv.
        better: +1: higher is better, -1: lower is better, 0: neither.
        unit: beside the heading, such as "dB".
        heading: of its column on the terminal; "": not shown there.
        note: the legend below the tables, in a phrase; "": the heading says it all.
        choice: the word of --metrics that asks for it; "": always measured. Two metrics may share a choice.
        by_default: whether that word is among the defaults of --metrics.
        of_latents: needs latents in VAE2's space, which VAE1's own are not.
        components: names of its numbers where a value has several; None: one number per latent channel, which metrics.csv
            leaves out.
        decides: whether the verdict rests on it; the terminal then shows its interval too.
    """

    name: str
    label: str
    scope: str
    load: Callable[[Measures], Callable[[Sample], torch.Tensor] | SetFigure] | None
    text: Callable | None
    better: int = 0
    unit: str = ""
    heading: str = ""
    note: str = ""
    choice: str = ""
    by_default: bool = False
    of_latents: bool = False
    components: tuple[str, ...] | None = ()
    decides: bool = False


# ----------------------------------------------------------------------------------------------------------------------
# Formulas: each returns a value, or a row of values, per image


def psnr(levels: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """PSNR in dB between 8-bit levels (B, 3, H, W): infinite for equal images."""
    error = in_float64((levels - reference).square()).mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def colour_bias(levels: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean of `levels` - `reference` (B, 3, H, W), for R, G and B each, in 8-bit levels: (B, 3)."""
    return in_float64(levels - reference).mean(dim=(2, 3))


def ssim(levels: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """SSIM of 8-bit levels (B, 3, H, W), as Wang et al. 2004 (11x11 Gaussian window, sigma 1.5; mirrored borders)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(levels, reference, data_range=255.0, reduction="none").reshape(-1)


def ms_ssim(levels: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """MS-SSIM of 8-bit levels (B, 3, H, W) from five scales (Wang et al. 2003). Both sides at least `MS_SSIM_SIDE` px."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    scores = multiscale_structural_similarity_index_measure(levels, reference, data_range=255.0, reduction="none")
    return scores.reshape(-1)


def latent_mse_by_channel(latents: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each channel of latents (B, C, h, w): (B, C)."""
    return (latents - target).float().square().mean(dim=(2, 3))


def latent_mse(latents: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error over all channels and places of latents (B, C, h, w)."""
    return latent_mse_by_channel(latents, target).mean(dim=1)


def latent_l1(latents: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute error over all channels and places of latents (B, C, h, w)."""
    return (latents - target).float().abs().mean(dim=(1, 2, 3))


def latent_cosine(latents: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cosine of the angle between the whole latents (B, C, h, w), each taken as one vector."""
    return torch.cosine_similarity(latents.float().flatten(1), target.float().flatten(1))


# ----------------------------------------------------------------------------------------------------------------------
# Loading


class PerceptualFeatures:
    """An ST-LPIPS network and its features of the last few batches, since rungs and metrics share them."""

    KEPT = 2  # the originals, and the pictures of the current rung

    def __init__(self, network: str, device: torch.device | str, dtype: torch.dtype = torch.float32):
        self.network = st_lpips(network, device).to(dtype)
        self._recent = []

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> the network's features of their 8-bit levels, see `PerceptualDistance.features`."""
        found = next((kept for kept in self._recent if kept[0] is images), None)
        found = found or (images, [stage.float() for stage in self.network.features(to_8bit(images) / 127.5 - 1)])
        others = [kept for kept in self._recent if kept[0] is not images]
        self._recent = [*others[1 - self.KEPT :], found]
        return found[1]

    def distance(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """ST-LPIPS between images of two batches, pair by pair."""
        reference = self(second)  # first, so that the originals, which the rungs share, are the last to be forgotten
        return self.network.distance(self(first), reference)


def require_side(image_size: int, side: int) -> None:
    """UserError unless images are at least `side` px wide."""
    if image_size < side:
        raise UserError(f"needs images of at least {side} px, these have {image_size}")


def each_image(measure: Callable[[Sample], torch.Tensor]) -> Callable[[Measures], Callable[[Sample], torch.Tensor]]:
    """The `load` of a metric of each image that needs nothing but a formula."""
    return lambda measures: measure


def load_ms_ssim(measures: Measures) -> Callable[[Sample], torch.Tensor]:
    require_side(measures.image_size, MS_SSIM_SIDE)
    return lambda sample: ms_ssim(sample.levels, sample.original_levels)


def load_lpips(measures: Measures) -> Callable[[Sample], torch.Tensor]:
    require_side(measures.image_size, LPIPS_SIDE)
    network = lpips_network(measures.device)
    return lambda sample: network(sample.levels / 127.5 - 1, sample.original_levels / 127.5 - 1).reshape(-1)


def load_st_lpips(network: str) -> Callable[[Measures], Callable[[Sample], torch.Tensor]]:
    """The `load` of ST-LPIPS with that network."""

    def load(measures):
        features = measures.perceptual(network)
        return lambda sample: features.distance(sample.picture, sample.original)

    return load


def load_texture(measures: Measures) -> SetFigure:
    features = measures.perceptual("vgg")
    return figures.texture(lambda images: features(images)[: figures.TEXTURE_STAGES])


def load_rfid(measures: Measures) -> SetFigure:
    network = inception_network(measures.device)
    return figures.frechet_to_originals(lambda levels: network(levels.to(torch.uint8)))


# ----------------------------------------------------------------------------------------------------------------------
# The table


def _levels_of_rgb(bias: list) -> str:
    return " ".join("–" if level is None else f"{level:+.1f}" for level in bias)


DECIBELS, FOUR_DIGITS = "{:.2f}".format, "{:.4f}".format

# in the order in which tables show them
METRICS = {
    metric.name: metric
    for metric in (
        Metric("latent_mse", "Latent MSE", "image",
               each_image(lambda sample: latent_mse(sample.latents, sample.vae2_latents)),
               FOUR_DIGITS, better=-1, heading="latent MSE", of_latents=True),
        Metric("psnr", "PSNR", "image", each_image(lambda sample: psnr(sample.levels, sample.original_levels)),
               DECIBELS, better=+1, unit="dB", heading="PSNR dB", decides=True),
        Metric("st_lpips_vgg", "ST-LPIPS, VGG", "image", load_st_lpips("vgg"), "{:.3f}".format, better=-1,
               heading="ST-LPIPS", choice="st_lpips", by_default=True, decides=True),
        Metric("st_lpips_alex", "ST-LPIPS, AlexNet", "image", load_st_lpips("alex"), "{:.3f}".format, better=-1,
               choice="st_lpips", by_default=True),
        Metric("texture", "Texture distance", "set", load_texture, "{:.1f}".format, better=-1, heading="texture",
               note="VGG features' distance / variance, %", choice="texture", by_default=True),
        Metric("detail", "Finest detail", "set", lambda measures: figures.detail(), "{:.2f}".format, unit="of VAE2's",
               heading="detail", note="power at up to 4 px a cycle / VAE2's"),
        Metric("grid", "Grid", "set", lambda measures: figures.grid(), "{:.1f}".format, better=-1, unit="of its surroundings",
               heading="grid", note="power at the latents' period / around"),
        Metric("ssim", "SSIM", "image", each_image(lambda sample: ssim(sample.levels, sample.original_levels)),
               FOUR_DIGITS, better=+1, heading="SSIM", choice="ssim", by_default=True),
        Metric("ms_ssim", "MS-SSIM", "image", load_ms_ssim, FOUR_DIGITS, better=+1, choice="ms_ssim", by_default=True),
        Metric("lpips", "LPIPS", "image", load_lpips, FOUR_DIGITS, better=-1, choice="lpips"),
        Metric("rfid", "rFID", "set", load_rfid, DECIBELS, better=-1, choice="rfid"),
        Metric("colour_bias", "Colour bias", "image",
               each_image(lambda sample: colour_bias(sample.levels, sample.vae2_levels)),
               _levels_of_rgb, unit="R G B, levels", heading="colour bias",
               note="R G B minus VAE2's, of 255", components=("r", "g", "b")),
        Metric("latent_variance", "Latent variance", "set", lambda measures: figures.latent_variance(), "{:.2f}".format,
               unit="of VAE2's", heading="latent var", note="variance / VAE2's", of_latents=True),
        Metric("latent_detail", "Latents' finest detail", "set", lambda measures: figures.latent_detail(), "{:.2f}".format,
               unit="of VAE2's", of_latents=True),
        Metric("milliseconds", "Time", "cost", None, "{:.2f}".format, better=-1, unit="ms", heading="ms",
               note="time for one image"),
        Metric("parameters", "Weights", "cost", None, lambda count: f"{count / 1e6:.2f}", better=-1, unit="millions",
               heading="M params", note="million weights"),
        Metric("macs", "Multiply-adds", "cost", None, lambda count: f"{count / 1e9:.2f}", better=-1, unit="billions",
               heading="G MACs", note="billion multiply-adds"),
        Metric("psnr_vs_vae2", "PSNR to VAE2", "image",
               each_image(lambda sample: psnr(sample.levels, sample.vae2_levels)), DECIBELS, better=+1, unit="dB"),
        Metric("ssim_vs_vae2", "SSIM to VAE2", "image",
               each_image(lambda sample: ssim(sample.levels, sample.vae2_levels)),
               None, better=+1, choice="ssim", by_default=True),
        Metric("latent_l1", "Latent L1", "image",
               each_image(lambda sample: latent_l1(sample.latents, sample.vae2_latents)),
               FOUR_DIGITS, better=-1, of_latents=True),
        Metric("latent_cosine", "Latent cosine", "image",
               each_image(lambda sample: latent_cosine(sample.latents, sample.vae2_latents)),
               FOUR_DIGITS, better=+1, of_latents=True),
        Metric("latent_mse_by_channel", "Latent MSE by channel", "image",
               each_image(lambda sample: latent_mse_by_channel(sample.latents, sample.vae2_latents)),
               None, better=-1, of_latents=True, components=None),
        Metric("latent_variance_by_channel", "Latent variance by channel", "set",
               lambda measures: figures.latent_variance(by_channel=True), None, of_latents=True, components=None),
        Metric("latent_spectrum", "Latent spectrum", "set", lambda measures: figures.latent_spectrum(), None, of_latents=True,
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
        st_lpips_of: the rungs whose ST-LPIPS is measured; None: all.

    Attributes:
        left_out: {metric: the reason, in a phrase}. Only LPIPS downloads weights.
    """

    def __init__(
        self,
        choices=("ssim",),
        image_size: int = 256,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        st_lpips_of: tuple[str, ...] | None = None,
    ):
        self.st_lpips_of = st_lpips_of
        self.image_size = image_size
        self.device = device
        self.dtype = dtype
        self.left_out = {}
        self._perceptual = {}
        self._measures = {}
        for metric in METRICS.values():
            if metric.scope == "cost" or (metric.choice and metric.choice not in choices):
                continue
            try:
                self._measures[metric.name] = metric.load(self)
            except UserError as error:
                self.left_out[metric.name] = str(error)
            except Exception as error:  # a damaged file of weights, a library of another version: said, not raised
                self.left_out[metric.name] = one_line(error)

    def perceptual(self, network: str) -> PerceptualFeatures:
        """The features of ST-LPIPS' network of that name, which its metrics share."""
        require_side(self.image_size, SMALLEST_SIDE)
        if network not in self._perceptual:
            self._perceptual[network] = PerceptualFeatures(network, self.device, self.dtype)
        return self._perceptual[network]

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics that are measured, in the order of `METRICS`."""
        return tuple(self._measures)

    def _wanted(self, scope: str, sample: Sample | None = None) -> dict:
        """{metric: its measure} for a scope, without those that need latents which `sample` does not have."""
        without_latents = sample is not None and sample.latents is None
        return {
            name: measure
            for name, measure in self._measures.items()
            if METRICS[name].scope == scope and not (without_latents and METRICS[name].of_latents)
        }

    def of_each_image(self, sample: Sample, rung: str = "") -> dict[str, torch.Tensor]:
        """{metric: its values (B) or (B, N)} for one rung and a batch, on the sample's device."""
        without = self.st_lpips_of is not None and rung not in self.st_lpips_of
        wanted = self._wanted("image", sample).items()
        return {name: measure(sample) for name, measure in wanted if not (without and METRICS[name].choice == "st_lpips")}

    def add(self, rung: str, sample: Sample) -> None:
        """Add a rung's batch to the metrics of the set."""
        for figure in self._wanted("set", sample).values():
            figure.add(rung, sample)

    def of_the_set(self, accelerator=None) -> dict[str, dict[str, tuple]]:
        """{metric: {rung: (value over all images, half the width of its 95% interval)}}, see `SetFigure.result`."""
        return {name: figure.result(accelerator) for name, figure in self._wanted("set").items()}


# ----------------------------------------------------------------------------------------------------------------------
# Summary over images


def summarise(values: dict) -> dict:
    """{rung: {metric: [value per image]}} -> {rung: {metric: {mean, std, worst, worst_image}}}.

    `std` is over images (n - 1). `worst` is the least value where higher is better, else the greatest; not-a-number counts
    as worse than any number. `worst_image` is the index of that image in the list. Metrics with several numbers per image
    are left out.
    """
    return {
        rung: {
            name: _summary_of(numbers, -1 if METRICS[name].better > 0 else 1)
            for name, numbers in metrics.items()
            if numbers and METRICS[name].components == ()
        }
        for rung, metrics in values.items()
    }


def _summary_of(numbers, sign):
    mean, std = mean_and_std(numbers)
    worst = max(range(len(numbers)), key=lambda index: math.inf if math.isnan(numbers[index]) else sign * numbers[index])
    return {"mean": finite(mean), "std": std, "worst": finite(numbers[worst]), "worst_image": worst}
