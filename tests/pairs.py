"""Pairs of pictures to measure."""

import numpy as np
from conftest import make_photo


def noisy_pair(size, seed=1, count=2):
    """(images, originals) (count, 3, size, size) float32: photos, and the same with noise and a shift."""
    rng = np.random.default_rng(seed)
    originals = np.stack([np.asarray(make_photo(rng, (size, size)), dtype=np.float32) for _ in range(count)])
    originals = originals.transpose(0, 3, 1, 2) / 127.5 - 1
    images = originals * 0.9 + rng.normal(0, 0.15, originals.shape)
    return images.astype(np.float32), originals.astype(np.float32)
