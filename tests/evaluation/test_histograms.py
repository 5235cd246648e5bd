"""How latents are distributed."""

import numpy as np
import torch

from evaluation.histograms import HISTOGRAM_BINS, LatentHistograms


def test_histograms_count_every_value_once_in_its_channel():
    """Values beyond the range that are lost, channels that are mixed up, a range of its own for each batch."""
    rng = np.random.default_rng(4)
    target = rng.normal(size=(4, 3, 8, 8)).astype(np.float32)
    target[:, 1] += 1.5
    histograms = LatentHistograms(["vae2", "aligned"])
    for part in (target[:1], target[1:] * 1.0):
        histograms.add({"vae2": torch.from_numpy(part), "aligned": torch.from_numpy(part * 100)})
    result = histograms.result()
    edges = np.linspace(-result["limit"], result["limit"], HISTOGRAM_BINS + 1)
    for channel in range(3):
        values = np.clip(target[:, channel], -result["limit"], result["limit"])
        expected = np.histogram(values, edges)[0]
        counted = np.array(result["rows"]["vae2"][channel])
        assert counted.sum() == 4 * 64
        assert np.abs(counted - expected).sum() <= 2  # a value on an edge may round either way
        assert sum(result["rows"]["aligned"][channel]) == 4 * 64
