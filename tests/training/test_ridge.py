"""The closed-form start."""

import numpy as np
import torch
import torch.nn.functional as F

from training.linear_start import RidgeRegression
from vae_align import AlignConfig, AlignModule


def test_matches_least_squares():
    """Catches wrong normal equations, a penalised bias, or a weight laid out otherwise than a convolution's."""
    generator = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(6, 3, 8, 8, generator=generator), torch.randn(6, 2, 8, 8, generator=generator) + 5
    regression = RidgeRegression(3, 2)
    regression.add(z1[:4], z2[:4])
    regression.add(z1[4:], z2[4:])
    weight, bias = regression.solve()
    x = F.unfold(z1, 3, padding=1).transpose(1, 2).reshape(-1, 27).double().numpy()
    y = z2.permute(0, 2, 3, 1).reshape(-1, 2).double().numpy()
    expected = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), y, rcond=None)[0]
    assert np.allclose(weight.reshape(2, 27), expected[:27].T, atol=1e-3)
    assert np.allclose(bias, expected[27], atol=1e-3)
    residual = F.conv2d(z1, weight, bias, padding=1) - z2
    assert residual.square().mean() < z2.var(dim=(0, 2, 3)).mean()


def test_a_module_starts_exactly_at_the_linear_map():
    """Catches a deep path that disturbs the start, and a map that does not survive the checkpoint's state_dict."""
    module = AlignModule(AlignConfig(latent_channels=4, out_channels=16, hidden_channels=8, input_types=("image", "latent")))
    assert not module.has_ridge
    module.remember_ridge(torch.randn_like(module.linear.weight), torch.randn_like(module.linear.bias))
    module.start_from_ridge()
    latents, image = torch.randn(2, 4, 5, 7), torch.rand(2, 3, 40, 56)
    assert torch.allclose(module(latents, image), module.linear_map(latents), atol=1e-5)
    with torch.no_grad():
        module.linear.weight.zero_()
    copy = AlignModule(module.config)
    copy.load_state_dict(module.state_dict())
    assert copy.has_ridge and torch.equal(copy.linear_map(latents), module.linear_map(latents))
