"""The Fréchet distance against its formula."""

import formulas
import numpy as np
import pytest
import torch

from evaluation.frechet import FeatureStatistics, frechet_distance


def test_frechet_distance_matches_the_formula_whatever_the_batches():
    """A covariance over n instead of n - 1, sums that forget a batch, the square root of a matrix taken by element."""
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)), rng.normal(0.5, 2, size=(30, 6))
    statistics = [FeatureStatistics(), FeatureStatistics()]
    for features, into in zip((first, second), statistics):
        for part in np.array_split(features, 7):
            into.add(torch.from_numpy(part))
    assert frechet_distance(*statistics) == pytest.approx(formulas.frechet_distance(first, second), rel=1e-6)
    assert frechet_distance(statistics[0], statistics[0]) == pytest.approx(0, abs=1e-4)
    alone = FeatureStatistics()
    alone.add(torch.ones(1, 6))
    assert frechet_distance(alone, statistics[1]) is None
