"""The loss terms against their plain formulas."""

import numpy as np
import pytest
import torch

from losses import LOSSES, channel_moments, get_loss_function
from utils import UserError


@pytest.fixture
def pair():
    """(prediction, target): latents (2, 3, 5, 7), the channels of very different scale."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1)
    prediction, target = (torch.randn(2, 3, 5, 7, generator=generator) * scale for _ in range(2))
    return prediction.requires_grad_(), target


def weights_of(target):
    """The weights that the docstring of `weighted_l1` promises, element by element in float64."""
    target = target.double().numpy()
    distance = np.empty_like(target)
    for item, channel, row, column in np.ndindex(target.shape):
        around = target[item, channel, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        distance[item, channel, row, column] = abs(target[item, channel, row, column] - around.mean())
    weights = 1 + distance / distance.mean(axis=(0, 2, 3), keepdims=True)
    return torch.from_numpy(weights / weights.mean())


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("mse", lambda error: error**2),
        ("l1", abs),
    ],
)
def test_loss_is_its_formula_averaged_over_all_elements(pair, name, formula):
    """A sum in place of a mean, a factor forgotten, two names swapped."""
    prediction, target = pair
    error = (prediction - target).detach().double().numpy()
    assert get_loss_function(name)(prediction, target).item() == pytest.approx(formula(error).mean(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_a_scalar_zero_for_equals_and_falls_along_its_gradient(pair, name):
    """A term under no_grad, of the wrong sign, or that leaves a rest for a perfect prediction."""
    prediction, target = pair
    loss = LOSSES[name](prediction, target)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert loss.shape == () and gradient.isfinite().all()
    assert (gradient.sign() == (prediction - target).sign()).all()
    assert LOSSES[name](prediction - 1e-3 * gradient.sign(), target) < loss
    assert LOSSES[name](target, target).item() == pytest.approx(0, abs=1e-8)


def test_weighted_l1_is_the_formula_of_its_docstring(pair):
    """A neighbourhood that counts padding as zeros, channels of small scale drowned, weights not scaled to mean 1."""
    prediction, target = pair
    expected = (weights_of(target) * (prediction - target).detach().abs()).mean().item()
    assert get_loss_function("weighted_l1")(prediction, target).item() == pytest.approx(expected, rel=1e-5)


def test_weighted_l1_counts_an_error_on_detail_more_than_the_same_error_on_flat_ground():
    """weighted_l1 that is l1 under another name, or weights flat ground instead."""
    target = torch.zeros(1, 1, 16, 16)
    target[..., 8:] = 1.0  # an edge between columns 7 and 8
    on_edge, on_flat = target.clone(), target.clone()
    on_edge[..., 5, 8] += 0.5
    on_flat[..., 5, 2] += 0.5
    l1, weighted_l1 = LOSSES["l1"], LOSSES["weighted_l1"]
    assert l1(on_edge, target) == l1(on_flat, target)
    assert weighted_l1(on_edge, target) > 2 * weighted_l1(on_flat, target)
    assert weighted_l1(on_flat, target) < l1(on_flat, target) < weighted_l1(on_edge, target)


@pytest.mark.parametrize("kind", ["noise", "flat"])
def test_weighted_l1_of_a_constant_error_is_l1(pair, kind):
    """Weights whose mean is not 1, so --loss_weight means something else; a division by the zero contrast of flat ground."""
    target = pair[1] if kind == "noise" else torch.full((1, 4, 4, 4), 3.0)
    assert LOSSES["weighted_l1"](target - 0.25, target).item() == pytest.approx(0.25, rel=1e-4)


def test_weighted_l1_sends_no_gradient_through_its_weights(pair):
    """Weights that the optimizer could lower instead of the error."""
    prediction, target = pair[0], pair[1].clone().requires_grad_()
    to_prediction, to_target = torch.autograd.grad(LOSSES["weighted_l1"](prediction, target), (prediction, target))
    expected = weights_of(pair[1]) * (prediction - target).detach().sign() / target.numel()
    torch.testing.assert_close(to_prediction.double(), expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(to_target, -to_prediction)


def test_unknown_loss_is_an_error_that_lists_the_known():
    """A KeyError traceback."""
    with pytest.raises(UserError, match=r"loss_type l3: choose from mse, l1, weighted_l1"):
        get_loss_function("l3")


def test_channel_moments_see_mean_and_spread_of_a_channel_and_no_place(pair):
    """A term per image instead of per channel, one that a mirrored picture changes, a gradient of nan for a flat channel."""
    prediction, target = pair
    made = [latents.detach().double().numpy() for latents in pair]
    expected = sum(
        np.mean((figure(made[0], axis=(0, 2, 3)) - figure(made[1], axis=(0, 2, 3))) ** 2) for figure in (np.mean, np.std)
    )
    assert channel_moments(prediction, target).item() == pytest.approx(expected, rel=1e-4)
    assert channel_moments(target.flip(3), target).item() == pytest.approx(0, abs=1e-8)
    flat = torch.zeros(1, 2, 3, 3, requires_grad=True)
    channel_moments(flat, target[:1, :2, :3, :3]).backward()
    assert flat.grad.isfinite().all()
