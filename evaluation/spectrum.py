"""Where in spatial frequency the pictures of each rung err."""

from __future__ import annotations

import torch

from evaluation.exact_sum import ExactSums
from evaluation.per_image import to_8bit
from evaluation.power import power, radial_frequency, without_mean
from evaluation.summary import finite

SPECTRUM_BANDS = 24
ORIGINALS = ""  # no rung's name


class ErrorSpectrum:
    """The power of each rung's error relative to the original's, by frequency band.

    Of the mean of R, G, B in 8-bit levels under a Hann window, summed over images; bands of equal width from 0 to 0.5 cycles
    per pixel, the mean level left out.
    """

    def __init__(self, size: int, rungs):
        bands = max(2, min(SPECTRUM_BANDS, size // 4))
        radius = radial_frequency((size, size))
        self.band = (
            (radius * 2 * bands).long().clamp(max=bands).flatten()
        )  # the corners beyond 0.5 share the last band, which is not used
        self.band[0] = bands
        self.frequencies = [(band + 0.5) / (2 * bands) for band in range(bands)]
        self.rungs = tuple(rungs)
        self.sums = ExactSums()  # by rung, and the originals'

    def add(self, originals: torch.Tensor, pictures: dict) -> None:
        """Originals (B, 3, S, S) and {rung: pictures of the same shape}, in [-1, 1]."""
        originals = to_8bit(originals).mean(dim=1)
        self.sums.add(ORIGINALS, (self._power(without_mean(originals)),))
        for rung in self.rungs:
            self.sums.add(rung, (self._power(to_8bit(pictures[rung]).mean(dim=1) - originals),))

    def gather(self, accelerator) -> None:
        """Bring together what all processes have added."""
        self.sums.gather(accelerator)

    def _power(self, planes):
        spectrum = power(planes).sum(dim=0).flatten().cpu().double()
        return torch.zeros(len(self.frequencies) + 1, dtype=torch.float64).index_add_(0, self.band, spectrum)

    def result(self) -> dict:
        """{frequency: cycles per pixel at each band's middle, rows: {rung: error power / original's power, per band}}."""
        (original,) = self.sums.total([ORIGINALS])
        errors = {rung: self.sums.total([rung])[0] for rung in self.rungs}
        rungs = {rung: finite((error / original)[:-1].tolist()) for rung, error in errors.items()}
        return {"frequency": self.frequencies, "rows": rungs}
