"""What is taken from some training images before the first step."""

from types import SimpleNamespace

import torch

from latents.pipeline import PipelineWithVAEs
from training.linear_start import RidgeRegression, encoded_batches, fit_ridge
from vae_align import AlignConfig, AlignModule

ONE_PROCESS = SimpleNamespace(num_processes=1)


class Loader(list):
    dataset = range(12)


def latents_only(batches=6):
    pipeline = PipelineWithVAEs(AlignModule(AlignConfig(input_types=("latent",), hidden_channels=8)), None, None)
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
