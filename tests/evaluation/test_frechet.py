"""The Fréchet distance against its formula."""

import formulas
import numpy as np
import pytest
import torch

from evaluation.exact_sum import ExactSums
from evaluation.frechet import FeatureSums, frechet_distance


def test_frechet_distance_matches_the_formula_whatever_the_batches():
    """A covariance over n instead of n - 1, sums that forget a batch, the square root of a matrix taken by element."""
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)), rng.normal(0.5, 2, size=(30, 6))
    sums = ExactSums()
    for number, features in enumerate((first, second)):
        for part in np.array_split(features, 7):
            sums.add(number, FeatureSums.of(torch.from_numpy(part)))
    statistics = [FeatureSums(*sums.total([number])) for number in range(2)]
    assert frechet_distance(*statistics) == pytest.approx(formulas.frechet_distance(first, second), rel=1e-6)
    assert frechet_distance(statistics[0], statistics[0]) == pytest.approx(0, abs=1e-4)
    alone = FeatureSums.of(torch.ones(1, 6))
    assert frechet_distance(alone, statistics[1]) is None
