"""Sums that no order changes."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from evaluation.exact_sum import ExactSum, ExactSums

RNG = np.random.default_rng(8)
# thousands of unlike size, which float64 adds to other digits in every order
VALUES = RNG.normal(size=(400, 5)) * 10.0 ** RNG.integers(-3, 9, size=(400, 5))


def total_of(values):
    total = ExactSum(values.shape[1])
    for vector in values:
        total.add(torch.from_numpy(vector))
    return total.total()


def test_the_order_changes_no_digit():
    """Figures of a set that differ in the last digits with the number of processes."""
    assert torch.from_numpy(VALUES).sum(dim=0).tolist() != torch.from_numpy(VALUES[::-1].copy()).sum(dim=0).tolist()
    first = total_of(VALUES)
    for _ in range(3):
        assert torch.equal(total_of(RNG.permutation(VALUES)), first)
    exact = [float(sum(map(Fraction, column))) for column in VALUES.T.tolist()]
    assert first.tolist() == pytest.approx(exact, rel=1e-14, abs=400 * 2**-41)


def test_what_is_not_finite_spoils_its_own_place_only():
    """A whole number that infinity is cast to and that passes for a figure."""
    total = ExactSum(3)
    total.add(torch.tensor([1.0, math.inf, math.nan], dtype=torch.float64))
    total.add(torch.tensor([-2.5, 1.0, 1.0], dtype=torch.float64))
    assert total.total()[0] == -1.5
    assert total.total()[1:].isnan().all()


def test_tuples_come_back_in_their_shapes():
    """Sums of one key that end up in another, or whose numbers change places."""
    sums = ExactSums()
    for factor in (1, 2):
        sums.add("a", (factor, torch.full((2, 3), 0.5 * factor)))
        sums.add("b", (10 * factor, torch.full((2, 3), 5.0 * factor)))
    number, tensor = sums.total(["a"])
    assert number == 3 and torch.equal(tensor, torch.full((2, 3), 1.5, dtype=torch.float64))
    number, tensor = sums.total(["a", "b"])
    assert number == 33 and torch.equal(tensor, torch.full((2, 3), 16.5, dtype=torch.float64))
