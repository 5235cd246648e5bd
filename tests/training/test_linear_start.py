"""The closed-form start: the linear map, and the training images that it is fitted on."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from training.linear_start import RidgeRegression, fit_ridge
from vae_align import AlignConfig, align_module
from vaes.pipeline import PipelineWithVAEs, encoded_batches

ONE_PROCESS = SimpleNamespace(num_processes=1)


class Loader(list):
    dataset = range(12)


def latents_only(batches=6):
    pipeline = PipelineWithVAEs(align_module(AlignConfig(input_types=("latent",), hidden_channels=8)), None, None)
    pairs = [{"latents1": torch.randn(2, 4, 6, 6), "latents2": torch.randn(2, 16, 6, 6)} for _ in range(batches)]
    return pipeline, Loader(pairs)


def test_the_linear_map_leaves_out_what_is_not_finite():
    """Catches a map of nothing but NaN, and with it a run whose every step is bad, for one image that overflows."""
    pipeline, loader = latents_only()
    expected = RidgeRegression(4, 16)
    for number, batch in enumerate(loader):
        if number in (1, 4):
            batch["latents1" if number == 1 else "latents2"][0, 0, 0, 0] = float("nan")
        else:
            expected.add(batch["latents1"], batch["latents2"])
    fit_ridge(pipeline, loader, ONE_PROCESS)
    weight, bias = expected.solve()
    assert torch.equal(pipeline.module.ridge_weight, weight) and torch.equal(pipeline.module.ridge_bias, bias)


def test_nothing_finite_is_no_map():
    """Catches a traceback of the solver's."""
    pipeline, loader = latents_only(2)
    for batch in loader:
        batch["latents1"].fill_(float("nan"))
    fit_ridge(pipeline, loader, ONE_PROCESS)
    assert not pipeline.module.has_ridge


def test_as_many_images_as_asked_for():
    """Catches images that count although only a part of each batch is looked at, and a pass over all of a large set."""
    pipeline, loader = latents_only()
    assert len(list(encoded_batches(pipeline, loader, ONE_PROCESS, 6))) == 3
    assert len(list(encoded_batches(pipeline, loader, ONE_PROCESS, 5, of_each=1))) == 5
    assert len(list(encoded_batches(pipeline, loader, SimpleNamespace(num_processes=2), 8))) == 2


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
    module = align_module(AlignConfig(latent_channels=4, out_channels=16, hidden_channels=8, input_types=("image", "latent")))
    assert not module.has_ridge
    module.remember_ridge(torch.randn_like(module.linear.weight), torch.randn_like(module.linear.bias))
    module.start_from_ridge()
    latents, image = torch.randn(2, 4, 5, 7), torch.rand(2, 3, 40, 56)
    assert torch.allclose(module(latents, image), module.linear_map(latents), atol=1e-5)
    with torch.no_grad():
        module.linear.weight.zero_()
    copy = align_module(module.config)
    copy.load_state_dict(module.state_dict())
    assert copy.has_ridge and torch.equal(copy.linear_map(latents), module.linear_map(latents))
