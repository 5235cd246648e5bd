"""How the values of latents are distributed, channel by channel."""

from __future__ import annotations

import math

import torch

HISTOGRAM_BINS = 48


class LatentHistograms:
    """How the values of each latent channel are distributed, for the target and each rung, over one range for all."""

    def __init__(self, rungs):
        self.rungs = tuple(rungs)
        self.limit = None
        self.counts = {}

    def add(self, latents: dict) -> None:
        """{rung: scaled latents (B, C, h, w)}; the first batch's target ("vae2") settles the range for all."""
        if self.limit is None:
            spread = latents["vae2"].float().square().mean().sqrt().item()
            self.limit = math.ceil(4 * spread * 2) / 2 if 0 < spread < math.inf else 1.0
        for rung in self.rungs:
            values = latents[rung].float().nan_to_num().clamp(-self.limit, self.limit)
            bins = ((values + self.limit) / (2 * self.limit) * HISTOGRAM_BINS).long().clamp(max=HISTOGRAM_BINS - 1)
            channels = bins.shape[1]
            bins = bins + torch.arange(channels, device=bins.device).view(1, -1, 1, 1) * HISTOGRAM_BINS
            counts = torch.bincount(bins.flatten(), minlength=channels * HISTOGRAM_BINS).cpu().view(channels, -1)
            self.counts[rung] = self.counts.get(rung, 0) + counts

    def result(self) -> dict:
        """{limit: the range is ±limit, what lies beyond counts at its ends; rows: {rung: counts by channel and bin}}."""
        return {"limit": self.limit, "rows": {rung: counts.tolist() for rung, counts in self.counts.items()}}
