"""The table of metrics: what a new entry gets, what cannot be had, and what is measured over a set."""

import sys
import urllib.request

import formulas
import numpy as np
import pytest
import torch
from pairs import noisy_pair

from evaluation import page, per_image, tables
from evaluation.metrics import (
    CHOICES,
    DEFAULT_CHOICES,
    METRICS,
    FrechetToOriginals,
    Measures,
    Metric,
    Setting,
    each_image,
    perceptual_features,
)
from evaluation.per_image import MS_SSIM_SIDE
from evaluation.sample import Sample
from evaluation.summary import summarise


def sample_of(images, originals):
    """What a rung made of a batch, without latents; VAE2's picture is the original."""
    images, originals = (torch.as_tensor(each) for each in (images, originals))
    return Sample(originals, images, None, originals, torch.zeros(len(images), 1, 2, 2), tuple(range(len(images))))


def test_ms_ssim_is_left_out_where_the_library_refuses():
    """A crash on images a little larger than 160 px, whose sixteenth the library rounds down."""
    for size in (MS_SSIM_SIDE - 8, MS_SSIM_SIDE):
        measures = Measures(("ms_ssim",), size)
        assert (set(measures.left_out) == {"ms_ssim"}) == (size < MS_SSIM_SIDE)
        assert ("ms_ssim" in measures.of_each_image(sample_of(*noisy_pair(size, count=1)))) == (size == MS_SSIM_SIDE)


def test_a_metric_of_the_set_compares_each_rung_with_the_originals():
    """Rungs that share a sum, originals counted once per rung, features of unclamped pictures."""
    distance = FrechetToOriginals(lambda levels: levels.mean(dim=(2, 3)) / 255)
    images, originals = noisy_pair(32, count=8)
    for part in range(0, 8, 2):
        batch = torch.from_numpy(originals[part : part + 2])
        distance.add("vae2", sample_of(batch, batch))
        distance.add("aligned", sample_of(images[part : part + 2], batch))
    features = [np.stack([formulas.levels(image).mean(axis=(1, 2)) / 255 for image in each]) for each in (images, originals)]
    assert distance.result()["aligned"] == pytest.approx(formulas.frechet_distance(*features), rel=1e-3)
    assert distance.result()["vae2"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("scope", ["image", "set"])
def test_one_entry_in_the_table_is_measured_summed_up_and_shown(monkeypatch, judged, scope):
    """A metric that is added to the table and that the ladder, a table or the page does not know."""

    class Brightness:
        def __init__(self):
            self.levels = {}

        def add(self, name, sample):
            self.levels.setdefault(name, []).extend(brightness(sample))

        def result(self):
            return {name: float(np.mean(levels)) for name, levels in self.levels.items()}

    def brightness(sample):
        return sample.levels.mean(dim=(1, 2, 3)).tolist()

    load = each_image(brightness) if scope == "image" else lambda setting: Brightness()
    entry = Metric("brightness", "Brightness", scope, load, "{:.1f} lm".format, better=+1, heading="bright", choice="light")
    monkeypatch.setitem(METRICS, "brightness", entry)
    monkeypatch.setattr(page, "COLUMNS", [*page.COLUMNS, entry])
    measures = Measures(("light",))
    sample = sample_of(np.full((2, 3, 8, 8), 1.0, dtype=np.float32), np.zeros((2, 3, 8, 8), dtype=np.float32))
    measures.add("aligned", sample)
    if scope == "image":
        value = measures.of_each_image(sample)["brightness"][0]
        assert summarise({"aligned": {"brightness": [1.0, 3.0]}})["aligned"]["brightness"]["worst"] == 1.0
    else:
        value = measures.of_the_set()["brightness"]["aligned"]
    assert value == 255
    results = judged.results | {
        "ladder": {name: rung | {"brightness": value} for name, rung in judged.results["ladder"].items()}
    }
    assert "255.0 lm" in tables.ladder_table(results)
    assert "bright" in tables.ladder_table(results).splitlines()[0]
    assert "Brightness<small>↑</small>" in page.render(results, [], None)


def test_metrics_that_cannot_be_had_are_named(monkeypatch, tmp_path):
    """A crash at the end of a long run, a metric that is left out silently, a traceback where there is no network."""

    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    measures = Measures(CHOICES, 32)
    assert {METRICS[name].choice for name in measures.names} == {"", "ssim", "st_lpips", "texture"}
    assert set(measures.left_out) == {"ms_ssim", "lpips", "rfid"}
    assert "no route to host" in measures.left_out["lpips"] and "python -c" in measures.left_out["lpips"]
    assert f"{MS_SSIM_SIDE} px" in measures.left_out["ms_ssim"]
    assert all("\n" not in why for why in measures.left_out.values())


def test_nothing_is_downloaded_unasked(monkeypatch, tmp_path):
    """An evaluation with its defaults that reaches for the network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("a request"))
    assert set(Measures(DEFAULT_CHOICES, 32).left_out) == {"ms_ssim"}


def test_the_networks_see_what_each_rung_made(monkeypatch):
    """Features of another rung's pictures that are taken from the memory; originals that are looked at once per rung."""
    setting = Setting(32, "cpu")
    features = perceptual_features(setting, "alex")
    looked = []
    network = features.network.features
    monkeypatch.setattr(features.network, "features", lambda images: looked.append(1) or network(images))
    images, originals = (torch.from_numpy(each) for each in noisy_pair(32))
    found = [features.distance(picture, originals) for picture in (images, originals, 0.5 * images)]
    assert len(looked) == 3
    assert found[0] == pytest.approx(features.network(per_image.to_8bit(images) / 127.5 - 1, originals).tolist(), rel=1e-4)
    assert found[1] == [0, 0] and found[2] != found[0]


def test_a_library_that_breaks_is_a_reason_not_a_crash(monkeypatch):
    """A damaged installation of a library that ends an evaluation which did not need it."""
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it raises; finding it raises too
    measures = Measures(("ssim", "lpips"), 64)
    assert "ssim" in measures.names and "lpips" not in measures.names
    assert measures.left_out["lpips"]
