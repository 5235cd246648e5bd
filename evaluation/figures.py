"""Figures of a set of images, from float64 sums over it: texture, detail, grid, latent statistics, spectra, histograms.

No model and no network is known here: `metrics.METRICS` names the figures, and loads the networks that some need.
"""

from __future__ import annotations

import functools
import math
from collections import ChainMap
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from runtime.processes import gathered, place_of, summed

GROUPS = 10  # of images, each left out once by the jackknife
FINE = 0.25  # cycles per pixel from which detail is fine: at most 4 pixels a cycle
NEAR_GRID = (3, 4)  # coefficients from the period of a latent: beyond the Hann window's own width of two
LATENT_BANDS = 8  # of the latents' spectrum, from 0 to 0.5 cycles per latent
TEXTURE_STAGES = 3  # of VGG: strides 1, 2 and 4
ERROR_BANDS = 24  # of the error's spectrum, from 0 to 0.5 cycles per pixel
HISTOGRAM_BINS = 48
WIDEST = 32.0  # latent values beyond it count in the outermost bins
FINEST = 1 / HISTOGRAM_BINS  # width of the bins that are counted; every range's bins are a multiple of it
REFERENCE = ""  # the key of the sums that all rungs are compared with; no rung has this name


# ----------------------------------------------------------------------------------------------------------------------
# A batch, and numbers over it


def to_8bit(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> levels 0..255, clamped and rounded, still float, as a viewer sees them."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round()


@dataclass(frozen=True)
class Sample:
    """The latents and pictures that one rung of the ladder made of a batch, beside those that they are compared with.

    Attributes:
        original: the images (B, 3, H, W) in [-1, 1].
        picture: the decoded latents of the rung, (B, 3, H, W), about [-1, 1].
        latents: the rung's scaled latents (B, C, h, w) in VAE2's space; None for VAE1's own, which are in another space.
        vae2_picture, vae2_latents: VAE2's own reconstruction, and its posterior mean.
        index: place of each image in the set.
    """

    original: torch.Tensor
    picture: torch.Tensor
    latents: torch.Tensor | None
    vae2_picture: torch.Tensor
    vae2_latents: torch.Tensor
    index: tuple[int, ...]

    @functools.cached_property
    def levels(self) -> torch.Tensor:
        """`picture` as 8-bit levels (B, 3, H, W), float."""
        return to_8bit(self.picture)

    @functools.cached_property
    def original_levels(self) -> torch.Tensor:
        return to_8bit(self.original)

    @functools.cached_property
    def vae2_levels(self) -> torch.Tensor:
        return to_8bit(self.vae2_picture)


def in_float64(values: torch.Tensor) -> torch.Tensor:
    """`values` in float64 on their device, or on the CPU where the device has no float64, such as Apple's."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def on_cpu(tensors: list[torch.Tensor], accelerator=None) -> list[torch.Tensor]:
    """Float64 copies, on the CPU, of tensors of one device; with an `accelerator` their sums over all processes. They move in
    one piece, since each move waits for the device."""
    if not tensors:
        return []
    whole = summed(torch.cat([in_float64(one).flatten() for one in tensors]), accelerator)
    return [part.view(one.shape) for part, one in zip(whole.split([one.numel() for one in tensors]), tensors)]


def finite(value):
    """`value` with every number that JSON cannot hold replaced by None."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def mean_of(numbers: list):
    """Mean over images, per component for lists; None if it is not finite (the PSNR of identical images is infinite)."""
    if isinstance(numbers[0], list):
        return [mean_of(component) for component in zip(*numbers)]
    return finite(math.fsum(numbers) / len(numbers))


def mean_and_std(numbers) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1) of `numbers`; the latter is None for one number or where the mean is not finite."""
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) == 1 or not math.isfinite(mean):
        return mean, None
    return mean, math.sqrt(math.fsum((one - mean) ** 2 for one in numbers) / (len(numbers) - 1))


def mean_and_interval(numbers) -> tuple[float | None, float | None]:
    """Mean of `numbers` and half the width of its 95% interval, by the normal distribution; None where undefined."""
    if not numbers:
        return None, None
    mean, std = mean_and_std(numbers)
    return mean, None if std is None else 1.96 * std / math.sqrt(len(numbers))


class Sums(dict):
    """Float64 sums of tuples of numbers and tensors, by key; all tuples of a key have the same shapes. Until `gather` they stay
    on `device`, where the tensors are."""

    device = "cpu"

    def add(self, key: Hashable, values: tuple) -> None:
        """Add a tuple of numbers and tensors to the sums of `key`."""
        numbers = (value if isinstance(value, torch.Tensor) else torch.full((), value, device=self.device) for value in values)
        tensors = [in_float64(number) for number in numbers]
        self[key] = [one + other for one, other in zip(self[key], tensors)] if key in self else tensors

    def gather(self, accelerator) -> None:
        """Move the sums to the CPU and add up those of all processes: each process then holds the total."""
        shapes = {}
        for own in gathered({key: [tuple(sum_.shape) for sum_ in sums] for key, sums in self.items()}, accelerator):
            shapes |= own
        none = {key: [torch.zeros(shape, device=self.device) for shape in shapes[key]] for key in sorted(shapes)}
        totals = iter(on_cpu([sum_ for sums in (none | self).values() for sum_ in sums], accelerator))
        self.update({key: [next(totals) for _ in sums] for key, sums in none.items()})

    def total(self, *keys: Hashable) -> tuple[torch.Tensor, ...]:
        """The sums over several keys, as a tuple of float64 tensors."""
        return tuple(sum(parts) for parts in zip(*(self[key] for key in keys)))


class SetFigure:
    """A figure of each rung: a function of two sums, one over its images and one over a reference that all rungs share.

    The interval is the jackknife's (Efron & Tibshirani 1993, chapter 11). The place of an image in the set decides its group,
    and the figure is computed without each group g of G: 1.96 · sqrt((G - 1)/G · Σ (f_g - mean f)²).

    Args:
        own: Sample -> [a tuple of tensors and numbers per image], which are summed; reference: the same for the reference.
            The tensors stay on the sample's device.
        figure: (the sums of `own`, those of `reference`) -> a number, or a list of numbers, which has no interval.
        groups: 1 where no interval is wanted; `own` and `reference` may then give one tuple for the whole batch.
    """

    def __init__(self, own: Callable, reference: Callable, figure: Callable, groups: int = GROUPS):
        self.own = own
        self.reference = reference
        self.figure = figure
        self.groups = groups
        self.sums = Sums()  # by (rung, group), and by (REFERENCE, group)
        self._referred = None

    def add(self, name: str, sample: Sample) -> None:
        """Add a batch of the rung `name` to its sums."""
        self.sums.device = sample.picture.device
        if self._referred is not sample.original:  # all rungs of a batch have the same reference
            self._referred = sample.original
            self._add(REFERENCE, sample, self.reference(sample))
        self._add(name, sample, self.own(sample))

    def _add(self, name, sample, of_each_image):
        for index, values in zip(sample.index, of_each_image):
            self.sums.add((name, index % self.groups), values)

    def result(self, accelerator=None) -> dict[str, tuple[float | list | None, float | None]]:
        """{rung: (its figure over all images, half the width of that figure's 95% interval)}; None where undefined. With an
        `accelerator` its processes call this together and share the rungs: an eigenvalue problem may take seconds."""
        self.sums.gather(accelerator)
        groups = {}
        for name, group in sorted(self.sums):
            groups.setdefault(name, []).append(group)
        groups.pop(REFERENCE, None)
        rank, world = place_of(accelerator)
        own = {name: (self._figure(name, groups[name]), self._interval(name, groups[name])) for name in [*groups][rank::world]}
        return dict(ChainMap(*gathered(own, accelerator)))

    def _figure(self, name, groups):
        return self.figure(*(self.sums.total(*((key, group) for group in groups)) for key in (name, REFERENCE)))

    def _interval(self, name, groups: list) -> float | None:
        if len(groups) < 2:
            return None
        without = [self._figure(name, [group for group in groups if group != left_out]) for left_out in groups]
        if any(not isinstance(figure, float) for figure in without):
            return None
        interval = mean_and_interval(without)[1]  # Σ (f_g - mean f)² is G - 1 times the variance
        return None if interval is None else (len(groups) - 1) * interval


# ----------------------------------------------------------------------------------------------------------------------
# Distances between distributions of features


class FeatureSums(NamedTuple):
    """Sums over feature vectors: their number, their sum (F) and the sum of their outer products (F, F), float64. Memory does
    not grow with the number of vectors."""

    count: torch.Tensor | int
    sum: torch.Tensor
    products: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> FeatureSums:
        """The sums over features (B, F)."""
        features = in_float64(features)
        return cls(len(features), features.sum(dim=0), features.T @ features)

    def mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (F) and covariance (F, F), over n - 1, in float64."""
        mean = self.sum / self.count
        return mean, (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(first: FeatureSums, second: FeatureSums) -> float | None:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) of two sets of features (Heusel et al. 2017); None for fewer than two vectors,
    or features that are not finite."""
    if min(first.count, second.count) < 2 or not (first.products.isfinite().all() and second.products.isfinite().all()):
        return None
    mean1, covariance1 = first.mean_and_covariance()
    mean2, covariance2 = second.mean_and_covariance()
    # tr (C1 C2)^½ is the sum of the roots of the eigenvalues of C1^½ C2 C1^½, which is symmetric: ten times as fast
    values, vectors = torch.linalg.eigh(covariance1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    roots = torch.linalg.eigvalsh(root @ covariance2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * roots)


def frechet_to_originals(features: Callable[[torch.Tensor], torch.Tensor]) -> SetFigure:
    """The Fréchet distance between the features of a rung's pictures and those of the originals; it has no interval.

    Args:
        features: 8-bit levels (B, 3, H, W), float -> feature vectors (N, F).
    """
    return SetFigure(
        lambda sample: [FeatureSums.of(features(sample.levels))],
        lambda sample: [FeatureSums.of(features(sample.original_levels))],
        lambda own, originals: frechet_distance(FeatureSums(*own), FeatureSums(*originals)),
        groups=1,
    )


def texture(features: Callable[[torch.Tensor], list[torch.Tensor]]) -> SetFigure:
    """How far the pictures' textures are from the originals': the Fréchet distance between early features at every position,
    as a share of the originals' total variance, in per cent, mean over the stages.

    Args:
        features: images (B, 3, H, W) in [-1, 1] -> the early stages of a network, each (B, C, h, w).
    """

    def sums_of(images):
        stages = features(images)
        of_each_image = ([FeatureSums.of(stage[image].flatten(1).T) for stage in stages] for image in range(len(images)))
        return [tuple(number for sums in of_image for number in sums) for of_image in of_each_image]

    def distance(own, reference):
        shares = []
        for stage in range(0, len(own), 3):
            pictures, originals = (FeatureSums(*sums[stage : stage + 3]) for sums in (own, reference))
            distance = frechet_distance(pictures, originals)
            variance = originals.mean_and_covariance()[1].trace().item()
            if distance is None or not variance > 0:
                return None
            shares.append(100 * max(0.0, distance) / variance)
        return math.fsum(shares) / len(shares)

    return SetFigure(lambda sample: sums_of(sample.picture), lambda sample: sums_of(sample.original), distance)


# ----------------------------------------------------------------------------------------------------------------------
# Power by spatial frequency


def power(planes: torch.Tensor) -> torch.Tensor:
    """The power of each frequency of planes (…, H, W), under a Hann window. All frequencies together give the sum of squares
    of the windowed planes (Parseval)."""
    high, wide = (torch.hann_window(side, dtype=planes.dtype, device=planes.device) for side in planes.shape[-2:])
    return torch.fft.fft2(planes * (high[:, None] * wide[None, :]), norm="ortho").abs().square()


def without_mean(planes: torch.Tensor) -> torch.Tensor:
    """Planes (…, H, W), each less its mean."""
    return planes - planes.mean(dim=(-2, -1), keepdim=True)


def fine_power(planes: torch.Tensor) -> torch.Tensor:
    """`power` of planes less their means, in float64: the power of fine detail is a small part of the whole."""
    return power(without_mean(in_float64(planes)))


def radial_frequency(size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The frequency, in cycles per sample, of each coefficient of `power` for planes of height and width `size`."""
    high, wide = (torch.fft.fftfreq(side, device=device) for side in size)
    return torch.sqrt(high[:, None] ** 2 + wide[None, :] ** 2)


def detail() -> SetFigure:
    """The power of the finest detail (`FINE` to 0.5 cycles per pixel) of the pictures, true or invented, relative to that of
    VAE2's own reconstructions: of the mean of R, G and B in 8-bit levels, under a Hann window."""

    def sums_of(levels):
        powers = fine_power(levels.mean(dim=1))
        radius = radial_frequency(powers.shape[-2:], powers.device)
        fine = (radius >= FINE) & (radius < 0.5)  # a factor: an index by a mask waits for the device
        return [(one,) for one in (powers * fine).sum(dim=(-2, -1))]

    return SetFigure(
        lambda sample: sums_of(sample.levels),
        lambda sample: sums_of(sample.vae2_levels),
        lambda own, reference: _ratio(own[0], reference[0]),
    )


def grid() -> SetFigure:
    """The power of the pictures at the period of a latent, relative to the power around it: about 1 where there is no grid.

    Of the mean of R, G and B in 8-bit levels, under a Hann window: the mean over the frequencies, but 0, of which both parts
    are multiples of 1 / stride cycles per pixel, over the mean over those that are `NEAR_GRID` coefficients away from one.
    None for images with too few latents to tell these apart.
    """

    def sums_of(sample):
        powers = fine_power(sample.levels.mean(dim=1))
        at, near = _grid_masks(powers.shape[-2:], sample.vae2_latents.shape[-2:], powers.device)
        return [((one * at).sum(), at.sum(), (one * near).sum(), near.sum()) for one in powers]

    def relative(own, reference):
        at, places, near, places_near = own
        return _ratio(at / places, near / places_near) if places_near else None

    return SetFigure(sums_of, lambda sample: [(0,)] * len(sample.picture), relative)


def _grid_masks(size: tuple[int, int], latents: tuple[int, int], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two masks over the coefficients of `power` for images of height and width `size` with `latents` latents: those at the
    period of a latent, and those near it."""

    def distance(places, period):
        return torch.minimum(places % period, -places % period)

    def farther(*periods):  # from multiples of the periods
        high, wide = (distance(torch.arange(side, device=device), period) for side, period in zip(size, periods))
        return torch.maximum(high[:, None], wide)

    from_period, from_zero = farther(*latents), farther(*size)
    first, last = NEAR_GRID
    near = (from_period >= first) & (from_period <= last) & (from_zero > last)
    return (from_period == 0) & (from_zero > 0), near & (min(latents) > 2 * last)


def _ratio(own: torch.Tensor, reference: torch.Tensor) -> float | None:
    return (own / reference).item() if reference > 0 else None


def error_bands(size: int) -> list[float]:
    """The middles of the bands of `error_spectrum` for images of `size` px, in cycles per pixel."""
    bands = max(2, min(ERROR_BANDS, size // 4))
    return [(band + 0.5) / (2 * bands) for band in range(bands)]


def error_spectrum(size: int) -> SetFigure:
    """The power of the pictures' error relative to the original's power, a number for each of `error_bands`: where in spatial
    frequency pictures of `size` px err.

    Of the mean of R, G, B in 8-bit levels under a Hann window; bands of equal width from 0 to 0.5 cycles per pixel.
    """
    bands = len(error_bands(size))

    def sums_of(planes):
        powers = in_float64(power(planes)).sum(dim=0).flatten()
        radius = radial_frequency((size, size), powers.device).flatten()
        # the mean level and the corners beyond 0.5 cycles share a last band, which is not used
        band = (radius * 2 * bands).long().clamp(max=bands).masked_fill(radius == 0, bands)
        return [(powers.new_zeros(bands + 1).index_add_(0, band, powers),)]

    return SetFigure(
        lambda sample: sums_of(sample.levels.mean(dim=1) - sample.original_levels.mean(dim=1)),
        lambda sample: sums_of(without_mean(sample.original_levels.mean(dim=1))),
        lambda own, reference: (own[0] / reference[0])[:-1].tolist(),
        groups=1,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Latents


def latent_variance(by_channel: bool = False) -> SetFigure:
    """The variance of each latent channel, over all images and places, relative to that of VAE2's own; mean over channels, or
    a number for each channel."""

    def sums_of(latents):
        latents = in_float64(latents).flatten(2)
        return [(one.shape[1], one.sum(dim=1), one.square().sum(dim=1)) for one in latents]

    def variance(sums):
        count, total, squares = sums
        return squares / count - (total / count).square()

    def relative(own, reference):
        ratios = variance(own) / variance(reference).clamp_min(1e-12)
        return ratios.tolist() if by_channel else ratios.mean().item()

    return SetFigure(lambda sample: sums_of(sample.latents), lambda sample: sums_of(sample.vae2_latents), relative)


def latent_detail() -> SetFigure:
    """The power of the latents' finest detail (`FINE` to 0.5 cycles per latent), mean over channels, of VAE2's own."""
    first = round(LATENT_BANDS * FINE / 0.5)
    return _latent_powers(lambda own, reference: _mean_ratio(own[first:], reference[first:]))


def latent_spectrum() -> SetFigure:
    """The power of the latents in `LATENT_BANDS` bands of spatial frequency, from 0 to 0.5 cycles per latent, mean over
    channels, relative to VAE2's own."""
    return _latent_powers(lambda own, reference: [_mean_ratio(own[[band]], reference[[band]]) for band in range(LATENT_BANDS)])


def _latent_powers(figure: Callable) -> SetFigure:
    def sums_of(latents):
        powers = fine_power(latents).flatten(2)
        bands = (radial_frequency(latents.shape[-2:], powers.device) * 2 * LATENT_BANDS).long().flatten()
        by_band = torch.stack([(powers * (bands == band)).sum(dim=2) for band in range(LATENT_BANDS)], dim=1)
        return [(one,) for one in by_band]

    return SetFigure(
        lambda sample: sums_of(sample.latents),
        lambda sample: sums_of(sample.vae2_latents),
        lambda own, reference: figure(own[0], reference[0]),
    )


def _mean_ratio(own: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Powers (bands, channels) -> the ratio of each channel's sum over the bands, mean over channels; None where undefined."""
    own, reference = own.sum(dim=0), reference.sum(dim=0)
    return (own / reference).mean().item() if bool((reference > 0).all()) else None


def latent_histograms() -> SetFigure:
    """How the values of each latent channel are distributed: {limit: the range is ±limit, counts: C lists of
    `HISTOGRAM_BINS`}. Values beyond the range count at its ends. It is one range for all rungs: four times the root mean square
    of VAE2's latents. It is known last, so values are counted in fine bins first."""
    fine = round(2 * WIDEST / FINEST)

    def counts_of(latents):
        # clamped first: what an infinite float becomes as an integer depends on the device
        bins = ((latents.float().nan_to_num() + WIDEST) / FINEST).clamp(0, fine - 1).long().flatten(2)
        channels = bins.shape[1]
        bins = (bins + torch.arange(channels, device=bins.device).view(1, -1, 1) * fine).flatten()
        counts = bins.new_zeros(channels * fine).index_add_(0, bins, torch.ones_like(bins))  # bincount waits for the device
        return [(counts.view(channels, -1),)]

    def histogram(own, reference):
        of_vae2, (counts,) = reference[0].sum(dim=0), own
        middles = (torch.arange(fine) + 0.5) * FINEST - WIDEST
        spread = ((of_vae2 * middles.square()).sum() / of_vae2.sum()).sqrt().item()
        limit = min(WIDEST, max(0.5, math.ceil(4 * spread * 2) / 2))  # a multiple of a half
        within = round(2 * limit / FINEST)
        beyond = (fine - within) // 2
        coarse = counts[:, beyond : beyond + within].reshape(len(counts), HISTOGRAM_BINS, -1).sum(dim=2)
        coarse[:, 0] += counts[:, :beyond].sum(dim=1)
        coarse[:, -1] += counts[:, beyond + within :].sum(dim=1)
        return {"limit": limit, "counts": coarse.long().tolist()}

    return SetFigure(
        lambda sample: counts_of(sample.latents), lambda sample: counts_of(sample.vae2_latents), histogram, groups=1
    )
