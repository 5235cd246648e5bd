"""The metrics: their formulas, the table of them, metrics that cannot be had, and the summary over images."""

import math
import sys
import urllib.request

import formulas
import numpy as np
import pytest
import torch
from drawn import noisy_pair

from evaluation import metrics, report, tables
from evaluation.figures import Sample, SetFigure, to_8bit


def sample_of(images, originals):
    """What a rung made of a batch, without latents; VAE2's picture is the original."""
    images, originals = (torch.as_tensor(each) for each in (images, originals))
    return Sample(originals, images, None, originals, torch.zeros(len(images), 1, 2, 2), tuple(range(len(images))))


@pytest.mark.parametrize(("name", "size"), [("psnr", 40), ("psnr", 48), ("ssim", 40), ("ssim", 48), ("ms_ssim", 192)])
def test_figures_of_textured_pictures_match_the_formula(name, size):
    """Another window, sigma, border or number of scales; a mean over the batch; values not clamped to 8 bits."""
    images, originals = noisy_pair(size)
    measured = getattr(metrics, name)(*(to_8bit(torch.from_numpy(each)) for each in (images, originals)))
    expected = [getattr(formulas, name)(*pair) for pair in zip(images, originals)]
    assert measured == pytest.approx(expected, abs=1e-4)
    assert name == "psnr" or max(expected) < 0.99


def test_latent_metrics_match_the_formulas():
    """A mean over the batch in place of one per image, a square that is missing, a cosine by place instead of the whole."""
    rng = np.random.default_rng(2)
    latents, target = (rng.normal(size=(3, 5, 4, 6)).astype(np.float32) for _ in range(2))
    pair = torch.from_numpy(latents), torch.from_numpy(target)
    error = latents - target
    assert metrics.latent_mse(*pair) == pytest.approx((error**2).mean(axis=(1, 2, 3)).tolist(), rel=1e-5)
    assert metrics.latent_l1(*pair) == pytest.approx(np.abs(error).mean(axis=(1, 2, 3)).tolist(), rel=1e-5)
    cosines = [formulas.cosine(*each) for each in zip(latents, target)]
    assert metrics.latent_cosine(*pair) == pytest.approx(cosines, abs=1e-5)
    np.testing.assert_allclose(metrics.latent_mse_by_channel(*pair), (error**2).mean(axis=(2, 3)), rtol=1e-5)


@pytest.mark.parametrize("scope", ["image", "set"])
def test_one_entry_in_the_table_is_measured_summed_up_and_shown(monkeypatch, judged, scope):
    """A metric that is added to the table and that the ladder, a table or the page does not know."""

    def brightness(sample):
        return sample.levels.mean(dim=(1, 2, 3))

    def of_the_set(measures):
        def sums(sample):
            return [(value, 1) for value in brightness(sample)]

        return SetFigure(sums, sums, lambda own, reference: (own[0] / own[1]).item())

    load = metrics.each_image(brightness) if scope == "image" else of_the_set
    entry = metrics.Metric(
        "brightness", "Brightness", scope, load, "{:.1f} lm".format, better=+1, heading="bright", choice="light"
    )
    monkeypatch.setitem(metrics.METRICS, "brightness", entry)
    monkeypatch.setattr(report, "COLUMNS", [*report.COLUMNS, entry])
    measures = metrics.Measures(("light",))
    sample = sample_of(np.full((2, 3, 8, 8), 1.0, dtype=np.float32), np.zeros((2, 3, 8, 8), dtype=np.float32))
    measures.add("aligned", sample)
    if scope == "image":
        value = measures.of_each_image(sample)["brightness"][0]
        assert metrics.summarise({"aligned": {"brightness": [1.0, 3.0]}})["aligned"]["brightness"]["worst"] == 1.0
    else:
        value, _ = measures.of_the_set()["brightness"]["aligned"]
    assert value == 255
    results = judged.results | {
        "ladder": {name: rung | {"brightness": value} for name, rung in judged.results["ladder"].items()}
    }
    assert "255.0 lm" in tables.ladder_table(results)
    assert "bright" in tables.ladder_table(results).splitlines()[0]
    assert "Brightness<small>↑</small>" in report.render(results, [], None)


def test_metrics_that_cannot_be_had_are_named(monkeypatch, tmp_path):
    """A crash without network, without torchvision or on small images; defaults that reach for the network."""

    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    measures = metrics.Measures(metrics.CHOICES, 32)
    assert {metrics.METRICS[name].choice for name in measures.names} == {"", "ssim", "st_lpips", "texture"}
    assert set(measures.left_out) == {"ms_ssim", "lpips", "rfid"}
    assert "no route to host" in measures.left_out["lpips"] and "python -c" in measures.left_out["lpips"]
    assert f"{metrics.MS_SSIM_SIDE} px" in measures.left_out["ms_ssim"]
    assert all("\n" not in why for why in measures.left_out.values())
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("a request"))
    assert set(metrics.Measures(metrics.DEFAULT_CHOICES, 32).left_out) == {"ms_ssim"}
    for size in (metrics.MS_SSIM_SIDE - 8, metrics.MS_SSIM_SIDE):
        measures = metrics.Measures(("ms_ssim",), size)
        assert (set(measures.left_out) == {"ms_ssim"}) == (size < metrics.MS_SSIM_SIDE)
        assert ("ms_ssim" in measures.of_each_image(sample_of(*noisy_pair(size, count=1)))) == (size == metrics.MS_SSIM_SIDE)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it raises; finding it raises too
    measures = metrics.Measures(("ssim", "lpips"), 64)
    assert "ssim" in measures.names and "lpips" not in measures.names
    assert measures.left_out["lpips"]


def test_the_networks_see_what_each_rung_made(monkeypatch):
    """Features of another rung's pictures that are taken from the memory; originals that are looked at once per rung."""
    measures = metrics.Measures((), 32)
    features = measures.perceptual("alex")
    looked = []
    network = features.network.features
    monkeypatch.setattr(features.network, "features", lambda images: looked.append(1) or network(images))
    images, originals = (torch.from_numpy(each) for each in noisy_pair(32))
    found = [features.distance(picture, originals).tolist() for picture in (images, originals, 0.5 * images)]
    assert len(looked) == 3
    assert found[0] == pytest.approx(features.network(to_8bit(images) / 127.5 - 1, originals).tolist(), rel=1e-4)
    assert found[1] == [0, 0] and found[2] != found[0]


def test_summary_knows_which_way_is_worse():
    """The best image called the worst, a deviation over n, colours that cancel out, infinity in a JSON file."""
    values = {"aligned": {"psnr": [20.0, 26.0, 23.0], "latent_mse": [0.1, 0.4, 0.1], "colour_bias": [[1, 2, 3]] * 3}}
    summary = metrics.summarise(values)["aligned"]
    assert summary["psnr"] == {"mean": pytest.approx(23), "std": pytest.approx(3), "worst": 20.0, "worst_image": 0}
    assert summary["latent_mse"]["worst"] == 0.4
    assert summary["latent_mse"]["worst_image"] == 1
    assert "colour_bias" not in summary
    for odd, worst in ((math.inf, (30.0, 0)), (math.nan, (None, 1))):
        figures = metrics.summarise({"aligned": {"psnr": [30.0, odd]}})["aligned"]["psnr"]
        assert figures["mean"] is None
        assert figures["std"] is None
        assert (figures["worst"], figures["worst_image"]) == worst
    assert metrics.summarise({"aligned": {"psnr": [30.0]}})["aligned"]["psnr"]["std"] is None
