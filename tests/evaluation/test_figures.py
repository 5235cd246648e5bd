"""Figures of a set: sums, Fréchet distance, texture, detail, spectra, latent statistics, histograms, and their intervals."""

import math

import formulas
import numpy as np
import pytest
import torch
from drawn import noisy_pair

from evaluation import figures
from evaluation.figures import Sample, SetFigure

RNG = np.random.default_rng(5)


def noise(*shape):
    return torch.from_numpy(RNG.uniform(-0.5, 0.5, shape).astype(np.float32))


def figures_of(measure, rungs, original=None, vae2_picture=None, vae2_latents=None, batch_size=1):
    """{rung: (figure, interval)} for {rung: (pictures, latents)}, added batch by batch."""
    count = len(next(iter(rungs.values()))[0])
    original = torch.zeros(count, 3, 8, 8) if original is None else original
    for start in range(0, count, batch_size):
        part = slice(start, start + batch_size)
        originals, *vae2 = (None if each is None else each[part] for each in (original, vae2_picture, vae2_latents))
        index = tuple(range(count)[part])
        for name, (pictures, latents) in rungs.items():
            latents = None if latents is None else latents[part]
            measure.add(name, Sample(originals, pictures[part], latents, *vae2, index))
    return measure.result()


def test_the_frechet_distance_compares_each_rung_with_the_originals():
    """Rungs that share a sum, unclamped pictures, a forgotten batch, a covariance over n, a root taken by element."""
    measure = figures.frechet_to_originals(lambda levels: levels.mean(dim=(2, 3)) / 255)
    images, originals = noisy_pair(32, count=8)
    rungs = {"vae2": (torch.from_numpy(originals), None), "aligned": (torch.from_numpy(images), None)}
    found = figures_of(measure, rungs, torch.from_numpy(originals), batch_size=3)
    features = [np.stack([formulas.levels(image).mean(axis=(1, 2)) / 255 for image in each]) for each in (images, originals)]
    assert found["aligned"] == (pytest.approx(formulas.frechet_distance(*features), rel=1e-3), None)
    assert found["vae2"][0] == pytest.approx(0, abs=1e-9)
    alone = figures.frechet_to_originals(lambda levels: levels.mean(dim=(2, 3)) / 255)
    assert figures_of(alone, {"aligned": (torch.from_numpy(images[:1]), None)})["aligned"][0] is None


def test_texture_is_the_frechet_distance_at_every_position_over_the_originals_variance():
    """Features averaged over positions, a stage that is left out, originals counted once per rung."""
    originals, pictures = noise(3, 3, 8, 8), 0.5 * noise(3, 3, 8, 8)
    measure = figures.texture(lambda images: [images, images[:, :2, ::2, ::2]])
    found = figures_of(measure, {"vae2": (originals, None), "aligned": (pictures, None)}, originals)
    shares = []
    for stage in (lambda each: each, lambda each: each[:, :2, ::2, ::2]):
        ours, theirs = (stage(each).numpy().transpose(0, 2, 3, 1) for each in (pictures, originals))
        ours, theirs = (each.reshape(-1, each.shape[-1]) for each in (ours, theirs))
        shares.append(100 * formulas.frechet_distance(ours, theirs) / np.cov(theirs.T).trace())
    assert found["aligned"][0] == pytest.approx(np.mean(shares), rel=1e-3)
    assert found["vae2"][0] == pytest.approx(0, abs=1e-6)


def test_detail_is_that_of_the_picture_not_of_its_error():
    """A soft picture that passes for a crisp one since it errs less, and coarse shapes that count as detail."""
    original = noise(2, 3, 32, 32)
    wave = 0.4 * torch.sin(2 * torch.pi * torch.arange(32.0) / 16).expand(2, 3, 32, 32)
    none = original.mean(dim=(2, 3), keepdim=True).expand_as(original)
    rungs = {"same": original, "half": original / 2, "none": none, "coarse": none + wave}
    rungs = {name: (pictures, None) for name, pictures in rungs.items()}
    found = figures_of(figures.detail(), rungs, vae2_picture=original)
    assert found["same"] == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    assert found["half"][0] == pytest.approx(0.25, rel=0.02)  # rounding to 8 bits
    assert found["none"][0] < 1e-6 and found["coarse"][0] < 0.01


def test_a_faint_grid_is_seen_and_texture_is_none():
    """A grid taken for none, texture or coarse shapes taken for a grid, a number for images too small to tell."""
    original = 0.1 * noise(2, 3, 80, 120) + torch.linspace(-0.5, 0.5, 120)
    pattern = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).repeat(10, 15) / 127.5
    shifted = torch.nn.functional.pad(pattern, (3, 0))[:, :120]
    wave = 0.1 * torch.sin(2 * torch.pi * torch.arange(120.0) / 7)
    rungs = {"same": original, "grid": original + pattern, "shifted": original + shifted, "period of 7": original + wave}
    rungs = {name: (pictures, None) for name, pictures in rungs.items()}
    found = figures_of(figures.grid(), rungs, vae2_latents=torch.zeros(2, 4, 10, 15))
    assert 0.5 < found["same"][0] < 1.5 and found["period of 7"][0] < 1.5
    assert found["grid"][0] > 3 and found["shifted"][0] > 3
    small = figures_of(figures.grid(), {"small": (original[..., :64, :64], None)}, vae2_latents=torch.zeros(2, 4, 8, 8))
    assert small["small"][0] is None


def test_error_spectrum_matches_the_formula_and_does_not_depend_on_batches():
    """A window that is missing, bands of another width, the mean level counted, a mean of ratios over batches."""
    images, originals = noisy_pair(32, count=3)
    pair = {"aligned": (torch.from_numpy(images), None)}, torch.from_numpy(originals)
    whole, single = (figures_of(figures.error_spectrum(32), *pair, batch_size=size)["aligned"][0] for size in (3, 1))
    assert len(figures.error_bands(32)) == 8
    assert figures.error_bands(32)[0] == pytest.approx(0.5 / 16)
    assert whole == pytest.approx(single, rel=1e-4)
    np.testing.assert_allclose(whole, formulas.error_power(images, originals, 8), rtol=1e-3)


def test_latent_variance_is_that_of_all_places_by_channel():
    """A variance within each image, which a shift between images escapes; channels pooled before the ratio."""
    latents = noise(4, 2, 6, 6) + torch.arange(4.0).view(4, 1, 1, 1)
    ours = latents * torch.tensor([0.5, 2.0]).view(1, 2, 1, 1)
    by_channel = figures_of(figures.latent_variance(by_channel=True), {"aligned": (ours, ours)}, vae2_latents=latents)
    assert by_channel["aligned"] == (pytest.approx([0.25, 4.0]), None)
    mean = figures_of(figures.latent_variance(), {"aligned": (ours, ours)}, vae2_latents=latents)
    assert mean["aligned"][0] == pytest.approx(2.125)


def test_latent_spectrum_tells_coarse_from_fine():
    """Bands in another order; a smooth latent that counts as one with detail."""
    latents = noise(2, 3, 32, 32)
    smooth = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(latents, (2, 2, 2, 2), mode="reflect"), 5, 1)
    spectrum = figures_of(figures.latent_spectrum(), {"aligned": (smooth, smooth)}, vae2_latents=latents)["aligned"][0]
    assert len(spectrum) == figures.LATENT_BANDS
    assert spectrum[0] > 0.5 > 0.05 > spectrum[-1]
    detail = figures_of(figures.latent_detail(), {"half": (latents / 2, latents / 2)}, vae2_latents=latents)
    assert detail["half"][0] == pytest.approx(0.25)


def test_histograms_count_every_value_once_in_its_channel():
    """Values beyond the range that are lost or at its other end, channels mixed up, a range of its own for each batch."""
    target = np.random.default_rng(4).normal(size=(4, 3, 8, 8)).astype(np.float32)
    target[:, 1] += 1.5
    latents = torch.from_numpy(target)
    rungs = {"vae2": (latents, latents), "aligned": (latents, latents * 100), "infinite": (latents, latents.abs() / 0)}
    found = {name: figure for name, (figure, _) in figures_of(
        figures.latent_histograms(), rungs, vae2_latents=latents, batch_size=3).items()}  # fmt: skip
    limit = found["vae2"]["limit"]
    assert found["aligned"]["limit"] == limit
    assert [counts[-1] for counts in found["infinite"]["counts"]] == [4 * 64] * 3
    edges = np.linspace(-limit, limit, figures.HISTOGRAM_BINS + 1)
    for channel in range(3):
        expected = np.histogram(np.clip(target[:, channel], -limit, limit), edges)[0]
        counted = np.array(found["vae2"]["counts"][channel])
        assert counted.sum() == sum(found["aligned"]["counts"][channel]) == 4 * 64
        assert np.abs(counted - expected).sum() <= 2  # a value on an edge may round either way


def test_jackknife_of_a_mean_is_the_known_interval():
    """A factor of the jackknife; groups that are left out twice; an interval of a single image."""
    values = noise(figures.GROUPS, 1, 1, 1)

    def measured(pictures):
        return figures_of(
            SetFigure(
                lambda sample: [(one.sum(), 1) for one in sample.picture],
                lambda sample: [(0,)] * len(sample.picture),
                lambda own, reference: (own[0] / own[1]).item(),
            ),
            {"aligned": (pictures, None)},
        )["aligned"]

    expected = 1.96 * values.numpy().std(ddof=1) / math.sqrt(figures.GROUPS)
    assert measured(values) == (pytest.approx(values.mean().item(), rel=1e-5), pytest.approx(expected, rel=1e-4))
    assert measured(values[:1]) == (pytest.approx(values[0].item(), rel=1e-5), None)
