"""The metrics of a whole set against formulas written out in numpy, and what happens when one cannot be had."""

import math
import sys

import formulas
import numpy as np
import pytest
import torch
from conftest import make_photo
from runs import ONE_THREAD  # noqa: F401  one thread in this interpreter

from evaluation import metrics
from evaluation.metrics import ErrorSpectrum, FeatureStatistics, LatentHistograms, OptionalMetrics, summarise


def noisy_pair(size, seed=1, count=2):
    """(images, originals) (count, 3, size, size) float32: photos, and the same with noise and a shift."""
    rng = np.random.default_rng(seed)
    originals = np.stack([np.asarray(make_photo(rng, (size, size)), dtype=np.float32) for _ in range(count)])
    originals = originals.transpose(0, 3, 1, 2) / 127.5 - 1
    images = originals * 0.9 + rng.normal(0, 0.15, originals.shape)
    return images.astype(np.float32), originals.astype(np.float32)


def test_ms_ssim_matches_the_formula_per_image():
    """Another window or number of scales, a mean over the batch, values that were not clamped to 8 bits."""
    images, originals = noisy_pair(192)
    optional = OptionalMetrics(("ms_ssim",), 192)
    measured = optional.measure("aligned", torch.from_numpy(images), torch.from_numpy(originals))
    expected = [formulas.ms_ssim(*pair) for pair in zip(images, originals)]
    assert measured == {"ms_ssim": [pytest.approx(value, abs=1e-4) for value in expected]}
    assert max(expected) < 0.99


def test_ms_ssim_is_left_out_where_the_library_refuses():
    """A crash on images a little larger than 160 px, whose sixteenth the library rounds down."""
    smallest = metrics.MS_SSIM_SIDE
    for size in (smallest - 8, smallest):
        images, originals = (torch.from_numpy(each) for each in noisy_pair(size, count=1))
        optional = OptionalMetrics(("ms_ssim",), size)
        assert (set(optional.left_out) == {"ms_ssim"}) == (size < smallest)
        assert ("ms_ssim" in optional.measure("aligned", images, originals)) == (size == smallest)


def test_latent_metrics_match_the_formulas():
    rng = np.random.default_rng(2)
    latents, target = (rng.normal(size=(3, 5, 4, 6)).astype(np.float32) for _ in range(2))
    measured = metrics.latent_metrics(torch.from_numpy(latents), torch.from_numpy(target))
    error = latents - target
    assert measured["latent_mse"] == pytest.approx((error**2).mean(axis=(1, 2, 3)).tolist(), rel=1e-5)
    assert measured["latent_l1"] == pytest.approx(np.abs(error).mean(axis=(1, 2, 3)).tolist(), rel=1e-5)
    cosines = [formulas.cosine(*pair) for pair in zip(latents, target)]
    assert measured["latent_cosine"] == pytest.approx(cosines, abs=1e-5)
    np.testing.assert_allclose(measured["latent_mse_by_channel"], (error**2).mean(axis=(2, 3)), rtol=1e-5)


def test_frechet_distance_matches_the_formula_whatever_the_batches():
    """A covariance over n instead of n - 1, sums that forget a batch, the square root of a matrix taken by element."""
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6)), rng.normal(0.5, 2, size=(30, 6))
    statistics = [FeatureStatistics(), FeatureStatistics()]
    for features, into in zip((first, second), statistics):
        for part in np.array_split(features, 7):
            into.add(torch.from_numpy(part))
    assert metrics.frechet_distance(*statistics) == pytest.approx(formulas.frechet_distance(first, second), rel=1e-6)
    assert metrics.frechet_distance(statistics[0], statistics[0]) == pytest.approx(0, abs=1e-4)
    alone = FeatureStatistics()
    alone.add(torch.ones(1, 6))
    assert metrics.frechet_distance(alone, statistics[1]) is None


def test_rfid_compares_each_rung_with_the_originals():
    """Rungs that share a sum, originals counted once per rung, features of unclamped pictures."""
    optional = OptionalMetrics(())
    optional.names, optional._inception = ("rfid",), lambda levels: levels.float().mean(dim=(2, 3)) / 255
    images, originals = noisy_pair(32, count=8)
    for part in range(0, 8, 2):
        batch = torch.from_numpy(originals[part : part + 2])
        optional.begin_batch(batch)
        optional.measure("ceiling", batch, batch)
        optional.measure("aligned", torch.from_numpy(images[part : part + 2]), batch)
    features = [np.stack([formulas.levels(image).mean(axis=(1, 2)) / 255 for image in each]) for each in (images, originals)]
    assert optional.of_the_set("aligned")["rfid"] == pytest.approx(formulas.frechet_distance(*features), rel=1e-3)
    assert optional.of_the_set("ceiling")["rfid"] == pytest.approx(0, abs=1e-9)


def test_spectrum_matches_the_formula_and_does_not_depend_on_batches():
    images, originals = noisy_pair(32, count=3)
    spectra = [ErrorSpectrum(32, ["aligned"]), ErrorSpectrum(32, ["aligned"])]
    for spectrum, size in zip(spectra, (3, 1)):
        for part in range(0, 3, size):
            pictures = {"aligned": torch.from_numpy(images[part : part + size])}
            spectrum.add(torch.from_numpy(originals[part : part + size]), pictures)
    measured = spectra[0].result()
    assert len(measured["frequency"]) == 8
    assert measured["frequency"][0] == pytest.approx(0.5 / 16)
    assert measured["rows"]["aligned"] == pytest.approx(spectra[1].result()["rows"]["aligned"], rel=1e-4)
    np.testing.assert_allclose(measured["rows"]["aligned"], formulas.error_power(images, originals, 8), rtol=1e-3)


def test_detail_is_that_of_the_picture_not_of_its_error():
    """Catches a soft picture that passes for a crisp one since it errs less, and coarse shapes that count as detail."""
    rng = np.random.default_rng(3)
    original = torch.from_numpy(rng.uniform(-0.5, 0.5, (2, 3, 32, 32)).astype(np.float32))
    wave = 0.4 * torch.sin(2 * torch.pi * torch.arange(32.0) / 16).expand(2, 3, 32, 32)
    pictures = {"same": original, "half": original / 2, "none": original.mean(dim=(2, 3), keepdim=True).expand_as(original)}
    pictures["coarse"] = pictures["none"] + wave
    spectrum = ErrorSpectrum(32, pictures)
    for part in range(2):
        spectrum.add(original[part : part + 1], {row: picture[part : part + 1] for row, picture in pictures.items()})
    detail = spectrum.result()["detail"]
    assert detail["same"] == pytest.approx(1)
    assert detail["half"] == pytest.approx(0.25, rel=0.02)  # rounding to 8 bits
    assert detail["none"] < 1e-6 and detail["coarse"] < 0.01


def test_histograms_count_every_value_once_in_its_channel():
    """Values beyond the range that are lost, channels that are mixed up, a range of its own for each batch."""
    rng = np.random.default_rng(4)
    target = rng.normal(size=(4, 3, 8, 8)).astype(np.float32)
    target[:, 1] += 1.5
    histograms = LatentHistograms(["ceiling", "aligned"])
    for part in (target[:1], target[1:] * 1.0):
        histograms.add({"ceiling": torch.from_numpy(part), "aligned": torch.from_numpy(part * 100)})
    result = histograms.result()
    edges = np.linspace(-result["limit"], result["limit"], metrics.HISTOGRAM_BINS + 1)
    for channel in range(3):
        values = np.clip(target[:, channel], -result["limit"], result["limit"])
        expected = np.histogram(values, edges)[0]
        counted = np.array(result["rows"]["ceiling"][channel])
        assert counted.sum() == 4 * 64
        assert np.abs(counted - expected).sum() <= 2  # a value on an edge may round either way
        assert sum(result["rows"]["aligned"][channel]) == 4 * 64


def test_summary_knows_which_way_is_worse():
    values = {"aligned": {"psnr": [20.0, 26.0, 23.0], "latent_mse": [0.1, 0.4, 0.1], "colour_bias": [[1, 2, 3]] * 3}}
    summary = summarise(values)["aligned"]
    assert summary["psnr"] == {"mean": pytest.approx(23), "std": pytest.approx(3), "worst": 20.0, "worst_image": 0}
    assert summary["latent_mse"]["worst"] == 0.4
    assert summary["latent_mse"]["worst_image"] == 1
    assert "colour_bias" not in summary


@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_summary_of_infinite_and_undefined_figures_can_be_written(odd):
    """Infinity in a JSON file; an undefined figure that hides behind a finite worst one."""
    figures = summarise({"aligned": {"psnr": [30.0, odd]}})["aligned"]["psnr"]
    assert figures["mean"] is None
    assert figures["std"] is None
    assert (figures["worst"], figures["worst_image"]) == ((30.0, 0) if odd == math.inf else (None, 1))
    assert summarise({"aligned": {"psnr": [30.0]}})["aligned"]["psnr"]["std"] is None


def test_metrics_that_cannot_be_had_are_named_and_nothing_is_downloaded(monkeypatch, tmp_path):
    """A crash at the end of a long run, a download without being asked, a metric that is left out silently."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download"))
    optional = OptionalMetrics(metrics.OPTIONAL, 32)
    assert optional.names == ("ssim",)
    assert set(optional.left_out) == {"ms_ssim", "lpips", "rfid"}
    assert f"{metrics.MS_SSIM_SIDE} px" in optional.left_out["ms_ssim"]
    assert all("\n" not in why for why in optional.left_out.values())


def test_a_library_that_breaks_is_a_reason_not_a_crash(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it raises; finding it raises too
    optional = OptionalMetrics(("ssim", "lpips"), 64)
    assert optional.names == ("ssim",)
    assert optional.left_out["lpips"]
