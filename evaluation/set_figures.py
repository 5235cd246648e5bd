"""Figures of a whole set of images, from sums over it, with intervals by the jackknife: texture, detail, latent statistics."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from evaluation.exact_sum import ExactSums
from evaluation.frechet import FeatureSums, frechet_distance
from evaluation.power import power, radial_frequency, without_mean
from evaluation.sample import Sample

GROUPS = 10  # of images, that are left out in turn
FINE = 0.25  # cycles per pixel from which on detail is fine: at most 4 pixels a cycle
NEAR_GRID = (3, 4)  # coefficients from the period of a latent: beyond the Hann window's own width of two
BANDS = 8  # of the latents' spectrum, from 0 to 0.5 cycles per latent
TEXTURE_STAGES = 3  # of VGG: strides 1, 2 and 4
REFERENCE = ""  # no rung's name


class SetFigure:
    """A `metrics.SetMeasure`: a figure of the sums over a rung's images and of the sums over what these are held against.

    The sums are exact (`ExactSums`), so that neither batches nor processes change a digit of the figure. The interval is the
    jackknife's (Efron & Tibshirani 1993, chapter 11). The images are dealt to `GROUPS` groups by their place in the set, and
    the figure is computed without each group g of G: 1.96 · sqrt((G - 1)/G · Σ (f_g - mean f)²).

    Args:
        own: Sample -> [a tuple of tensors per image], which are summed; reference: the same, of what all rungs are held
            against.
        figure: (the sums of `own`, those of `reference`) -> a number, or a list of numbers, which has no interval.
    """

    def __init__(self, own: Callable, reference: Callable, figure: Callable):
        self.own = own
        self.reference = reference
        self.figure = figure
        self.sums = ExactSums()  # by (rung, group); what the rungs are held against by (REFERENCE, group)
        self._referred = None

    def add(self, name: str, sample: Sample) -> None:
        if self._referred is not sample.original:  # all rungs of a batch share what they are held against
            self._referred = sample.original
            self._add(REFERENCE, sample, self.reference(sample))
        self._add(name, sample, self.own(sample))

    def _add(self, name, sample, of_each_image):
        for index, values in zip(sample.index, of_each_image):
            self.sums.add((name, index % GROUPS), values)

    def gather(self, accelerator) -> None:
        self.sums.gather(accelerator)

    def result(self) -> dict[str, float | list | None]:
        return {name: self._figure(name, groups) for name, groups in self._groups().items()}

    def intervals(self) -> dict[str, float | None]:
        return {name: self._interval(name, groups) for name, groups in self._groups().items()}

    def _groups(self) -> dict[str, list[int]]:
        groups = {}
        for name, group in self.sums.added:
            if name != REFERENCE:
                groups.setdefault(name, []).append(group)
        return groups

    def _figure(self, name, groups):
        return self.figure(*(self.sums.total((of, group) for group in groups) for of in (name, REFERENCE)))

    def _interval(self, name, groups: list) -> float | None:
        if len(groups) < 2:
            return None
        without = [self._figure(name, [group for group in groups if group != left_out]) for left_out in groups]
        if any(not isinstance(figure, float) for figure in without):
            return None
        mean = math.fsum(without) / len(without)
        return 1.96 * math.sqrt((len(groups) - 1) / len(groups) * math.fsum((figure - mean) ** 2 for figure in without))


# ----------------------------------------------------------------------------------------------------------------------
# Texture


def texture(features: Callable[[torch.Tensor], list[torch.Tensor]]) -> SetFigure:
    """How far the pictures' textures are from the originals': the Fréchet distance between early features at every position,
    as a share of the originals' total variance, in per cent, mean over the stages.

    Args:
        features: images (B, 3, H, W) in [-1, 1] -> the early stages of a network, each (B, C, h, w).
    """

    def sums_of(images):
        return [
            _statistics([stage[image] for stage in stages]) for stages in [features(images)] for image in range(len(images))
        ]

    return SetFigure(lambda sample: sums_of(sample.picture), lambda sample: sums_of(sample.original), _texture_distance)


def _statistics(stages: list[torch.Tensor]) -> tuple:
    """Of one image's stages (C, h, w): for each the number of positions, and the sums of their vectors and of products."""
    return tuple(number for stage in stages for number in FeatureSums.of(stage.flatten(1).T))


def _texture_distance(own: tuple, reference: tuple) -> float | None:
    shares = []
    for stage in range(0, len(own), 3):
        pictures, originals = (FeatureSums(*sums[stage : stage + 3]) for sums in (own, reference))
        distance = frechet_distance(pictures, originals)
        variance = originals.mean_and_covariance()[1].trace().item()
        if distance is None or not variance > 0:
            return None
        shares.append(100 * max(0.0, distance) / variance)
    return math.fsum(shares) / len(shares)


# ----------------------------------------------------------------------------------------------------------------------
# Fine detail


def detail() -> SetFigure:
    """The power of the finest detail (`FINE` to 0.5 cycles per pixel) of the pictures, true or invented, relative to that of
    VAE2's own reconstructions: of the mean of R, G and B in 8-bit levels, under a Hann window."""

    def sums_of(levels):
        planes = levels.mean(dim=1)
        powers = _power(planes)
        radius = radial_frequency(planes.shape[-2:])
        fine = (radius >= FINE) & (radius < 0.5)
        return [(one[fine].sum(),) for one in powers]

    def relative(own, reference):
        return _ratio(own[0], reference[0])

    return SetFigure(lambda sample: sums_of(sample.levels), lambda sample: sums_of(sample.vae2_levels), relative)


def grid() -> SetFigure:
    """The power of the pictures at the period of a latent, relative to the power around it: about 1 where there is no grid.

    Of the mean of R, G and B in 8-bit levels, under a Hann window: the mean over the frequencies, but 0, of which both parts
    are multiples of 1 / stride cycles per pixel, over the mean over those that are `NEAR_GRID` coefficients away from one. None
    for images of so few latents that these are no longer apart.
    """

    def sums_of(sample):
        at, near = _period_of(sample.levels.shape[-2:], sample.vae2_latents.shape[-2:])
        return [(one[at].sum(), at.sum(), one[near].sum(), near.sum()) for one in _power(sample.levels.mean(dim=1))]

    def relative(own, reference):
        at, places, near, places_near = own
        return _ratio(at / places, near / places_near) if places_near else None

    return SetFigure(sums_of, lambda sample: [(0,)] * len(sample.picture), relative)


def _period_of(size: tuple[int, int], latents: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the coefficients of `power` for planes of that height and width, which are so many latents: those that belong to the
    period of a latent, and those near them. Two masks."""

    def distance(places, period):
        return torch.minimum(places % period, -places % period)

    def farther(*periods):  # from multiples of the periods
        high, wide = (distance(torch.arange(side), period) for side, period in zip(size, periods))
        return torch.maximum(high[:, None], wide)

    from_period, from_zero = farther(*latents), farther(*size)
    first, last = NEAR_GRID
    near = (from_period >= first) & (from_period <= last) & (from_zero > last)
    return (from_period == 0) & (from_zero > 0), near & (min(latents) > 2 * last)


def _power(planes: torch.Tensor) -> torch.Tensor:
    """Power of each frequency of planes (…, H, W), the mean taken off; on the CPU, float64, so that sums are exact enough."""
    return power(without_mean(planes.cpu().double()))


def _ratio(own: torch.Tensor, reference: torch.Tensor) -> float | None:
    return (own / reference).item() if reference > 0 else None


# ----------------------------------------------------------------------------------------------------------------------
# Latents


def latent_variance() -> SetFigure:
    """Mean over channels of the latents' variance, over all images and places, relative to that of VAE2's own."""
    return _latent_moments(lambda ratios: ratios.mean().item())


def latent_variance_by_channel() -> SetFigure:
    """The latents' variance of each channel relative to that of VAE2's own."""
    return _latent_moments(lambda ratios: ratios.tolist())


def _latent_moments(figure: Callable[[torch.Tensor], float | list]) -> SetFigure:
    def sums_of(latents):
        latents = latents.cpu().double().flatten(2)
        return [(one.shape[1], one.sum(dim=1), one.square().sum(dim=1)) for one in latents]

    def variance(sums):
        count, total, squares = sums
        return squares / count - (total / count).square()

    def relative(own, reference):
        return figure(variance(own) / variance(reference).clamp_min(1e-12))

    return SetFigure(lambda sample: sums_of(sample.latents), lambda sample: sums_of(sample.vae2_latents), relative)


def latent_detail() -> SetFigure:
    """The power of the latents' finest detail (`FINE` to 0.5 cycles per latent), mean over channels, of VAE2's own."""
    first = round(BANDS * FINE / 0.5)
    return _latent_powers(lambda own, reference: _mean_ratio(own[first:], reference[first:]))


def latent_spectrum() -> SetFigure:
    """The power of the latents in `BANDS` bands of spatial frequency, from 0 to 0.5 cycles per latent, mean over channels, of
    VAE2's own."""
    return _latent_powers(
        lambda own, reference: [_mean_ratio(own[band : band + 1], reference[band : band + 1]) for band in range(BANDS)]
    )


def _latent_powers(figure: Callable) -> SetFigure:
    def sums_of(latents):
        powers = _power(latents).flatten(2)
        bands = (radial_frequency(latents.shape[-2:]) * 2 * BANDS).long().flatten()
        by_band = torch.stack([powers[:, :, bands == band].sum(dim=2) for band in range(BANDS)], dim=1)
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
