"""The rungs of the ladder, and the figures of `evaluate`, against formulas written out in numpy."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_photo
from families import make_family
from formulas import levels, psnr, ssim

from dataloader import ImageDataset, eval_loader
from evaluation import ladder, tables
from evaluation.judge import judge
from evaluation.ladder import FixedRungs, Ladder, evaluate
from evaluation.metrics import Measures
from images.files import list_images
from vae_align import AlignConfig, align_module
from vaes.codec import Codec
from vaes.loading import load_vae_model
from vaes.pipeline import PipelineWithVAEs

METRICS = ("latent_mse", "psnr", "ssim", "psnr_vs_vae2")


@pytest.fixture(scope="module")
def pipeline(vae_folders):
    spaces = [Codec(load_vae_model(vae_folders[name], "", None, "cpu", torch.float32)) for name in ("kl4", "kl16")]
    torch.manual_seed(0)
    return PipelineWithVAEs(align_module(AlignConfig(hidden_channels=8, num_blocks=1)), *spaces)


def loader_of(folder, batch_size=2):
    return eval_loader(ImageDataset(list_images(folder), 32), batch_size, 0)


@pytest.fixture(scope="module")
def judged(pipeline, photo_folders):
    """(results of the whole evaluation folder in batches of 2, the images, VAE2's and the aligned pictures) as numpy."""
    seen = {"images": [], "vae2": [], "aligned": [], "aligned_latents": [], "target": []}

    def visit(batch, made):
        seen["images"] += list(batch["pixel_values"].numpy())
        seen["vae2"] += list(made["vae2"][1].numpy())
        seen["aligned"] += list(made["aligned"][1].numpy())
        seen["aligned_latents"] += list(made["aligned"][0].numpy())
        seen["target"] += list(made["vae2"][0].numpy())

    results = evaluate(Ladder(pipeline, torch.float32), loader_of(photo_folders[1], 2), visit=visit, show_progress=False)
    return results, seen


def test_means_do_not_depend_on_the_batch_size(pipeline, photo_folders, judged):
    """Only the first batch judged, or a short last batch (5 images in batches of 2) weighted like a full one."""
    assert len(set(judged[0]["per_image"]["aligned"]["psnr"])) == 5  # the images differ, or this test proves nothing
    for batch_size in (5, 1):
        loader = loader_of(photo_folders[1], batch_size)
        other = evaluate(Ladder(pipeline, torch.float32), loader, show_progress=False)
        assert other["images"] == judged[0]["images"] == 5
        assert other["paths"] == judged[0]["paths"] == list_images(photo_folders[1])
        assert other["ladder"].keys() == judged[0]["ladder"].keys()
        for row in other["ladder"]:
            for name in METRICS:
                expected = judged[0]["ladder"][row][name]
                assert other["ladder"][row][name] == (None if expected is None else pytest.approx(expected, rel=1e-3)), name


def test_psnr_and_ssim_against_the_original_match_independent_formulas(judged):
    """PSNR over the batch, a wrong peak, unclamped values, another SSIM window, rows mixed up."""
    results, seen = judged
    for row in ("vae2", "aligned"):
        for name, formula in (("psnr", psnr), ("ssim", ssim)):
            expected = [formula(made, original) for made, original in zip(seen[row], seen["images"])]
            assert results["per_image"][row][name] == pytest.approx(expected, abs=1e-3)
            assert results["ladder"][row][name] == pytest.approx(np.mean(results["per_image"][row][name]), rel=1e-6)


def test_figures_against_vae2_match_independent_formulas(judged):
    """`psnr_vs_vae2` against the original, raw latents compared, a bias of the wrong sign, infinity in JSON."""
    results, seen = judged
    per_image = results["per_image"]["aligned"]
    expected = [psnr(made, vae2) for made, vae2 in zip(seen["aligned"], seen["vae2"])]
    assert per_image["psnr_vs_vae2"] == pytest.approx(expected, abs=1e-3)
    expected = [np.mean((made - target) ** 2) for made, target in zip(seen["aligned_latents"], seen["target"])]
    assert per_image["latent_mse"] == pytest.approx(expected, rel=1e-4)
    for got, made, vae2 in zip(per_image["colour_bias"], seen["aligned"], seen["vae2"]):
        assert got == pytest.approx((levels(made) - levels(vae2)).mean(axis=(1, 2)), abs=1e-3)
    vae2 = results["ladder"]["vae2"]
    assert vae2["latent_mse"] == 0
    assert vae2["psnr_vs_vae2"] is None
    assert vae2["colour_bias"] == [0, 0, 0]
    assert results["per_image"]["vae2"]["psnr_vs_vae2"] == [None] * 5
    assert results["ladder"]["vae1"]["latent_mse"] is None  # VAE1's latents are not in VAE2's space


def test_ssim_of_pictures_smaller_than_its_window_is_none_or_a_number(pipeline, photo_folders):
    """An 8 px picture has no 11x11 window: not-a-number must not reach the JSON file or the table."""
    loader = eval_loader(ImageDataset(list_images(photo_folders[1]), 8), 2, 0)
    results = evaluate(Ladder(pipeline, torch.float32), loader, show_progress=False)
    value = results["ladder"]["aligned"]["ssim"]
    assert value is None or math.isfinite(value)
    assert "nan" not in tables.ladder_table(results)


def test_only_the_rungs_that_are_asked_for_are_computed(pipeline, photo_folders, monkeypatch):
    """Baselines decoded for figures that nobody reads; training that goes on in evaluation mode."""
    monkeypatch.setattr(pipeline.codec1, "decode", lambda latents: pytest.fail("VAE1's decoder ran"))
    rungs = Ladder(pipeline, torch.float32, only=("aligned", "linear"))
    for training in (True, False):
        pipeline.module.train(training)
        results = evaluate(rungs, loader_of(photo_folders[1], 5), show_progress=False)
        assert list(results["ladder"]) == ["aligned"]  # this module knows no linear map
        assert pipeline.module.training is training


@pytest.mark.parametrize("name", ["sd15", "consistency", "flux2", "sana"])
def test_a_rung_costs_the_weights_that_run(name):
    """A decoder counted where only the encoder runs; a class without a part named `decoder`."""
    codec = Codec(make_family(name))
    shape = {"latent_channels": codec.channels, "out_channels": codec.channels}
    strides = {"latent_stride": codec.stride, "out_stride": codec.stride}
    module = align_module(AlignConfig(input_types=("latent",), hidden_channels=8, num_blocks=1, **shape, **strides))
    rungs = Ladder(PipelineWithVAEs(module, codec, codec), torch.float32)
    found = rungs.costs(32)
    images = torch.zeros(1, 3, 32, 32)
    latents = codec.encode(images)
    for rung in ("vae2", "reencode", "untrained", "aligned"):
        used = {}

        def note(part, *_, used=used):
            used |= {id(weight): weight.numel() for weight in part.parameters(recurse=False)}

        with torch.inference_mode(), torch.nn.modules.module.register_module_forward_hook(note):
            rungs.rungs[rung](latents, images)
        assert found[rung]["parameters"] == sum(used.values()), rung
    assert found["reencode"]["macs"] > found["vae2"]["macs"] > 0
    assert found["untrained"]["macs"] == found["aligned"]["macs"] > 0
    assert "vae1" not in found


def test_a_cost_that_cannot_be_measured_loses_no_figure(pipeline, photo_folders, monkeypatch, caplog):
    """An evaluation of hours that is lost at its end, since costs are measured after judging."""
    broken = Ladder(pipeline, torch.float32)
    broken.rungs["reencode"] = replace(broken.rungs["reencode"], weights=lambda: 1 / 0)
    results = judge(broken, loader_of(photo_folders[1]), Measures(), 32)["ladder"]
    assert results["reencode"]["psnr"] and "macs" not in results["reencode"] and results["aligned"]["macs"]
    assert "re-encode with VAE2: its cost cannot be measured (division by zero)" in caplog.text


@pytest.fixture
def judged_rungs(monkeypatch):
    """The names of the rungs of each evaluation, in the order in which they are made."""
    calls = []

    def recorded(rungs, *args, **options):
        calls.append(list(rungs.rungs))
        return real(rungs, *args, show_progress=False, **options)

    real = ladder.evaluate
    monkeypatch.setattr(ladder, "evaluate", recorded)
    return calls


def test_fixed_rungs_are_measured_once_and_survive_a_resume(pipeline, photo_folders, judged_rungs, monkeypatch):
    """Baselines that are measured at every evaluation, or again after each resume, also with another batch size; images that
    are encoded again for each."""
    fixed = FixedRungs()
    first = fixed.evaluate(pipeline, loader_of(photo_folders[1]), torch.float32)
    resumed = FixedRungs()
    resumed.load_state_dict(fixed.state_dict())
    again = resumed.evaluate(pipeline, loader_of(photo_folders[1], batch_size=3), torch.float32)
    assert judged_rungs == [["vae1", "vae2", "reencode", "untrained", "aligned"], ["aligned"]]
    assert list(first) == list(again)
    assert {name: again[name] for name in fixed.figures} == {name: first[name] for name in fixed.figures}
    assert again["aligned"]["psnr"] == pytest.approx(first["aligned"]["psnr"], rel=1e-5)
    monkeypatch.setattr(Codec, "encode", None)
    assert fixed.evaluate(pipeline, loader_of(photo_folders[1]), torch.float32) == first


def test_other_pictures_of_the_same_names_are_measured_anew(pipeline, photo_folders, judged_rungs, tmp_path):
    """Baselines of the old pictures beside the module's figures on the new ones: in the log, the checkpoint, the report."""
    folder = tmp_path / "photos"
    shutil.copytree(photo_folders[1], folder)
    fixed = FixedRungs()
    before = fixed.evaluate(pipeline, loader_of(folder), torch.float32)
    rng = np.random.default_rng(9)
    for photo in sorted(folder.iterdir()):
        make_photo(rng, (80, 64)).save(photo, quality=95)
    after = fixed.evaluate(pipeline, loader_of(folder), torch.float32)
    fresh = FixedRungs().evaluate(pipeline, loader_of(folder), torch.float32)
    assert after == fresh
    assert after["vae2"]["psnr"] != before["vae2"]["psnr"]
