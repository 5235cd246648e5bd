"""ST-LPIPS: the published distances, from weights that are on every machine."""

import importlib.util

import pytest
import torch

import losses as module
from losses import PerceptualDistance, st_lpips
from utils import UserError


def waves(size):
    """One picture (1, 3, height, width) of a few sine waves."""
    high, wide = (torch.arange(side) for side in size)
    planes = [torch.sin(0.37 * (1 + c) * high[:, None] + 0.21 * wide[None, :] * (2 - 0.5 * c)) for c in range(3)]
    return 0.8 * torch.stack(planes)[None]


PUBLISHED = [  # what the package's own code, version 0.0.2, puts out
    ("alex", (64, 64), 0.107119),
    ("alex", (40, 57), 0.143925),
    ("vgg", (64, 64), 0.715362),
    ("vgg", (40, 57), 0.742099),
]


@pytest.mark.parametrize(("network", "size", "published"), PUBLISHED)
def test_distances_are_the_packages_own(network, size, published):
    """A layer, a padding or a weight in the wrong place; a normalisation that is forgotten."""
    first = waves(size)
    with torch.no_grad():
        assert st_lpips(network)(first, 0.6 * first.flip(3)).item() == pytest.approx(published, rel=1e-4)


def test_gradients_reach_the_pictures_and_stay_finite():
    """A loss that teaches nothing; a picture without features whose gradient is not a number; weights that train along."""
    distance = st_lpips("alex")
    flat = torch.zeros(1, 3, 48, 48, requires_grad=True)
    distance(flat, waves((48, 48))).sum().backward()
    assert flat.grad.isfinite().all() and flat.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_pictures_that_are_too_small_are_refused():
    """An obscure error of a pooling layer."""
    with pytest.raises(UserError, match="at least 32 px"):
        PerceptualDistance("vgg").features(torch.zeros(1, 3, 16, 64))


def test_a_missing_package_and_a_torn_file_are_named(monkeypatch, tmp_path):
    """A traceback for what one command repairs."""
    torn = tmp_path / "alex.pth"
    torn.write_bytes(b"PK\x03\x04")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be read"):
        patch.setattr(module, "_weights_file", lambda network: torn)
        st_lpips("alex")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install stlpips_pytorch"):
        st_lpips("alex")
