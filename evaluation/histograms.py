"""How the values of latents are distributed, channel by channel."""

from __future__ import annotations

import math

import torch

from runtime.processes import gathered, summed

HISTOGRAM_BINS = 48
WIDEST = 32.0  # values beyond it count at the ends
FINEST = 1 / HISTOGRAM_BINS  # width in which values are counted; the width of every range's bins is a multiple of it


class LatentHistograms:
    """How the values of each latent channel are distributed, for the target and each rung, over one range for all: four times
    the target's root mean square, on either side. Values are counted in fine bins first, since the range is known last."""

    def __init__(self, rungs):
        self.rungs = tuple(rungs)
        self._counts = {}

    def add(self, latents: dict) -> None:
        """{rung: scaled latents (B, C, h, w)}."""
        fine = round(2 * WIDEST / FINEST)
        for rung in self.rungs:
            values = latents[rung].float().nan_to_num()
            bins = ((values + WIDEST) / FINEST).long().clamp(0, fine - 1)
            channels = bins.shape[1]
            bins = bins + torch.arange(channels, device=bins.device).view(1, -1, 1, 1) * fine
            counts = torch.bincount(bins.flatten(), minlength=channels * fine).cpu().view(channels, -1)
            self._counts[rung] = self._counts.get(rung, 0) + counts

    def gather(self, accelerator) -> None:
        """Bring together what all processes have counted."""
        if accelerator is None or accelerator.num_processes == 1:
            return
        shapes = [{rung: tuple(counts.shape) for rung, counts in self._counts.items()}]
        shapes = max(gathered(shapes[0], accelerator), key=len)
        for rung in self.rungs:
            none = torch.zeros(shapes[rung], dtype=torch.int64)
            self._counts[rung] = summed(self._counts.get(rung, none), accelerator)

    @property
    def limit(self) -> float:
        """The range is ±limit, a multiple of a half."""
        counts = self._counts["vae2"].sum(dim=0).double()
        middles = (torch.arange(len(counts)) + 0.5) * FINEST - WIDEST
        spread = ((counts * middles.square()).sum() / counts.sum()).sqrt().item()
        return min(WIDEST, max(0.5, math.ceil(4 * spread * 2) / 2))

    def result(self) -> dict:
        """{limit: the range is ±limit, what lies beyond counts at its ends; rows: {rung: counts by channel and bin}}."""
        limit = self.limit
        return {"limit": limit, "rows": {rung: _coarse(counts, limit).tolist() for rung, counts in self._counts.items()}}


def _coarse(counts: torch.Tensor, limit: float) -> torch.Tensor:
    """Fine counts (C, N) -> (C, `HISTOGRAM_BINS`) over ±limit."""
    within = round(2 * limit / FINEST)
    beyond = (counts.shape[1] - within) // 2
    coarse = counts[:, beyond : beyond + within].reshape(len(counts), HISTOGRAM_BINS, -1).sum(dim=2)
    coarse[:, 0] += counts[:, :beyond].sum(dim=1)
    coarse[:, -1] += counts[:, beyond + within :].sum(dim=1)
    return coarse
