"""Figures of a set: texture, detail, the latents' variance and spectrum; and their intervals."""

import math

import formulas
import numpy as np
import pytest
import torch

from evaluation import set_figures
from evaluation.sample import Sample

RNG = np.random.default_rng(5)


def noise(*shape):
    return torch.from_numpy(RNG.uniform(-0.5, 0.5, shape).astype(np.float32))


def figure_of(measure, rungs, original=None, vae2_picture=None, vae2_latents=None):
    """(results, intervals) of {rung: (pictures, latents)}, added image by image."""
    for image in range(len(next(iter(rungs.values()))[0])):
        one = slice(image, image + 1)
        pick = [None if each is None else each[one] for each in (original, vae2_picture, vae2_latents)]
        original_of_batch = pick[0] if pick[0] is not None else torch.zeros(1, 3, 8, 8)
        for name, (pictures, latents) in rungs.items():
            made = pictures[one], None if latents is None else latents[one]
            measure.add(name, Sample(original_of_batch, *made, *pick[1:], (image,)))
    return measure.result(), measure.intervals()


def test_detail_is_that_of_the_picture_not_of_its_error():
    """A soft picture that passes for a crisp one since it errs less, and coarse shapes that count as detail."""
    original = noise(2, 3, 32, 32)
    wave = 0.4 * torch.sin(2 * torch.pi * torch.arange(32.0) / 16).expand(2, 3, 32, 32)
    none = original.mean(dim=(2, 3), keepdim=True).expand_as(original)
    rungs = {"same": original, "half": original / 2, "none": none, "coarse": none + wave}
    rungs = {name: (pictures, None) for name, pictures in rungs.items()}
    detail, intervals = figure_of(set_figures.detail(), rungs, vae2_picture=original)
    assert detail["same"] == pytest.approx(1) and intervals["same"] == pytest.approx(0, abs=1e-9)
    assert detail["half"] == pytest.approx(0.25, rel=0.02)  # rounding to 8 bits
    assert detail["none"] < 1e-6 and detail["coarse"] < 0.01


def test_a_faint_grid_is_seen_and_texture_is_none():
    """A grid of one period in the image's size taken for none, fine texture or coarse shapes that pass for a grid, latents that
    are counted along the other side, a number for images in which there is no telling."""
    original = 0.1 * noise(2, 3, 80, 120) + torch.linspace(-0.5, 0.5, 120)
    pattern = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).repeat(10, 15) / 127.5
    shifted = torch.nn.functional.pad(pattern, (3, 0))[:, :120]
    wave = 0.1 * torch.sin(2 * torch.pi * torch.arange(120.0) / 7)
    rungs = {"same": original, "grid": original + pattern, "shifted": original + shifted, "period of 7": original + wave}
    rungs = {name: (pictures, None) for name, pictures in rungs.items()}
    grid, _ = figure_of(set_figures.grid(), rungs, vae2_latents=torch.zeros(2, 4, 10, 15))
    assert 0.5 < grid["same"] < 1.5 and grid["period of 7"] < 1.5
    assert grid["grid"] > 3 and grid["shifted"] > 3
    small = figure_of(set_figures.grid(), {"small": (original[..., :64, :64], None)}, vae2_latents=torch.zeros(2, 4, 8, 8))
    assert small[0]["small"] is None


def test_texture_is_the_frechet_distance_at_every_position_over_the_originals_variance():
    """Features averaged over positions, a stage that is left out, originals counted once per rung."""
    originals, pictures = noise(3, 3, 8, 8), 0.5 * noise(3, 3, 8, 8)
    measure = set_figures.texture(lambda images: [images, images[:, :2, ::2, ::2]])
    texture, _ = figure_of(measure, {"vae2": (originals, None), "aligned": (pictures, None)}, originals)
    shares = []
    for stage in (lambda each: each, lambda each: each[:, :2, ::2, ::2]):
        ours, theirs = (stage(each).numpy().transpose(0, 2, 3, 1) for each in (pictures, originals))
        ours, theirs = (each.reshape(-1, each.shape[-1]) for each in (ours, theirs))
        shares.append(100 * formulas.frechet_distance(ours, theirs) / np.cov(theirs.T).trace())
    assert texture["aligned"] == pytest.approx(np.mean(shares), rel=1e-3)
    assert texture["vae2"] == pytest.approx(0, abs=1e-6)


def test_latent_variance_is_that_of_all_places_by_channel():
    """A variance within each image, which a shift between images escapes; channels pooled before the ratio."""
    latents = noise(4, 2, 6, 6) + torch.arange(4.0).view(4, 1, 1, 1)
    ours = latents * torch.tensor([0.5, 2.0]).view(1, 2, 1, 1)
    by_channel, _ = figure_of(set_figures.latent_variance_by_channel(), {"aligned": (ours, ours)}, vae2_latents=latents)
    assert by_channel["aligned"] == pytest.approx([0.25, 4.0])
    mean, _ = figure_of(set_figures.latent_variance(), {"aligned": (ours, ours)}, vae2_latents=latents)
    assert mean["aligned"] == pytest.approx(2.125)


def test_latent_spectrum_tells_coarse_from_fine():
    """Bands in another order; a smooth latent that counts as one with detail."""
    latents = noise(2, 3, 32, 32)
    smooth = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(latents, (2, 2, 2, 2), mode="reflect"), 5, 1)
    spectrum, _ = figure_of(set_figures.latent_spectrum(), {"aligned": (smooth, smooth)}, vae2_latents=latents)
    assert len(spectrum["aligned"]) == set_figures.BANDS
    assert spectrum["aligned"][0] > 0.5 > 0.05 > spectrum["aligned"][-1]
    detail, _ = figure_of(set_figures.latent_detail(), {"half": (latents / 2, latents / 2)}, vae2_latents=latents)
    assert detail["half"] == pytest.approx(0.25)


def test_jackknife_of_a_mean_is_the_known_interval():
    """A factor of the jackknife; groups that are left out twice."""
    values = noise(set_figures.GROUPS, 1, 1, 1)
    measure = set_figures.SetFigure(
        lambda sample: [(one.sum(), 1) for one in sample.picture],
        lambda sample: [(0,)] * len(sample.picture),
        lambda own, reference: (own[0] / own[1]).item(),
    )
    result, intervals = figure_of(measure, {"aligned": (values, None)})
    assert result["aligned"] == pytest.approx(values.mean().item(), rel=1e-5)
    expected = 1.96 * values.numpy().std(ddof=1) / math.sqrt(set_figures.GROUPS)
    assert intervals["aligned"] == pytest.approx(expected, rel=1e-4)


def test_one_image_has_no_interval():
    """A division by zero, or an interval of nothing."""
    picture = noise(1, 3, 16, 16)
    detail, intervals = figure_of(set_figures.detail(), {"aligned": (picture, None)}, vae2_picture=picture)
    assert detail["aligned"] == pytest.approx(1) and intervals["aligned"] is None
