"""The verdict: its figures and its words."""

import math

import numpy as np
import pytest
from reports import results_of

from evaluation.verdict import verdict


@pytest.mark.parametrize(
    ("gains", "answer"),
    [([1.0] * 40, "yes"), ([-1.0] * 40, "no"), ([0.01] * 40, "equal"), ([3.0, -3.0] * 20, "equal"), ([1.0], "yes")],
)
def test_verdict_answers_by_the_gain_and_its_uncertainty(gains, answer):
    """A mean within its own uncertainty that is called better; an interval over n instead of n - 1."""
    found = verdict(results_of(gains))
    assert found["answer"] == answer
    assert found["gain_db"] == pytest.approx(np.mean(gains))
    assert found["macs_fraction"] == 0.25
    assert "25% of the multiply-adds" in found["sentences"][0]
    assert 1 <= len(found["sentences"]) <= 2
    if len(gains) > 1:
        assert found["gain_error_db"] == pytest.approx(1.96 * np.std(gains, ddof=1) / math.sqrt(len(gains)))


@pytest.mark.parametrize(
    ("gain", "nearer", "answer", "said"),
    [
        (1.0, 0.1, "yes", "1.00 dB nearer to the originals"),
        (0.0, 0.1, "yes", "look more like the originals"),
        (1.0, -0.1, "no", "look less like the originals (ST-LPIPS 0.300 against 0.200; on 40 of 40 images), though they are"),
        (-1.0, 0.1, "no", "1.00 dB farther from the originals"),
        (0.0, 0.0, "equal", "the perceptual distance is level"),
    ],
)
def test_verdict_weighs_distortion_and_perception(gain, nearer, answer, said):
    """A soft module that is praised for its PSNR; a no that does not say what is worse."""
    found = verdict(results_of([gain] * 40, nearer=nearer))
    assert found["answer"] == answer
    assert said in found["sentences"][0]
    assert found["perceptual_gain"] == pytest.approx(nearer)
    assert found["perceptually_better_on"] == (40 if nearer > 0 else 0)


@pytest.mark.parametrize(("gain", "said"), [(4.0, "stays 1.00 dB below"), (6.0, "by 1.00 dB"), (5.0, "stays 0.00 dB below")])
def test_verdict_says_on_which_side_of_vae2_the_module_stands(gain, said):
    """A module that passes VAE2's own reconstruction, called below it or impossible."""
    assert said in verdict(results_of([gain] * 40))["sentences"][1]


@pytest.mark.parametrize(
    ("detail", "rival", "soft"),
    [(0.5, 1.0, True), (0.5, 14.58, True), (0.9, 1.0, False), (4.29, 14.58, False), (0.95, 1.3, False), (None, 1.0, False)],
)
def test_verdict_says_when_pictures_are_soft(detail, rival, soft):
    """Praise for a blurred picture, whose PSNR is the better for it; softness where the other's detail is invented."""
    results = results_of([1.0] * 40, aligned={"detail": detail}, reencode={"detail": rival})
    said = " ".join(verdict(results)["sentences"])
    assert ("softer" in said and "50% of the power" in said) == soft


@pytest.mark.parametrize("enlarged, silent", [(0, False), (19, False), (20, True), (40, True)])
def test_no_verdict_on_the_detail_of_enlarged_images(enlarged, silent):
    """Softness held against a module on images that have no detail; one small image that silences the verdict on all."""
    results = results_of([1.0] * 40, aligned={"detail": 0.5}, reencode={"detail": 1.0}, enlarged=enlarged)
    found = verdict(results)
    assert ("softer" in " ".join(found["sentences"])) != silent == ("no verdict on fine detail" in " ".join(found["sentences"]))
    assert [f"{enlarged} images of 40" in sentence for sentence in found["weaknesses"]] == [True] * bool(enlarged)


def test_no_verdict_on_vaes_of_other_spaces():
    """A no, or a yes, that is about VAEs which the module was never meant for; a doubt about them that nobody reads."""
    found = verdict(results_of([-9.0] * 40, wrong_spaces=["VAE1 x: latents of sdxl."], remarks=["VAE2 is another."]))
    assert (found["answer"], found["sentences"]) == ("unknown", ["No verdict: VAE1 x: latents of sdxl."])
    assert found["weaknesses"][-1] == "VAE2 is another."


def test_verdict_names_the_weaknesses_and_only_those():
    """A weakness that is passed over, or one that is held against a module which lacks it; a verdict on PSNR alone that passes
    for one on both."""
    assert verdict(results_of([1.0] * 40))["weaknesses"] == []
    results = results_of([1.0] * 40)
    for figures in results["per_image"].values():
        del figures["st_lpips_vgg"]
    found = verdict(results)
    assert found["answer"] == "yes" and found["perceptual_gain"] is None
    assert "No perceptual distance" in found["weaknesses"][0]
    weak = results_of(
        [1.0] * 39 + [-2.0], aligned={"colour_bias": [0.2, -1.4, 0.0], "latent_mse": 0.2, "ssim": 0.7}, unreadable=["x"]
    )
    said = verdict(weak)["weaknesses"]
    assert len(said) == 5
    for sentence, part in zip(said, ("green −1.4", "0.2000 against 0.1000", "SSIM", "On 1 image", "1 file")):
        assert part in sentence
    idle = results_of([1.0] * 40)
    idle["ladder"]["linear"] = {"kind": "linear", "psnr": idle["ladder"]["aligned"]["psnr"] - 0.01}
    assert ["linear map" in sentence for sentence in verdict(idle)["weaknesses"]] == [True]
    few = results_of([1.0] * 3, settings={"trained_image_size": 128})
    assert [sentence.split()[0] for sentence in verdict(few)["weaknesses"]] == ["Judged", "Judged"]


def test_verdict_on_what_is_not_finite():
    """A crash at the end of a run whose module has gone wrong, or a kind word for it."""
    broken = results_of([1.0] * 3, aligned={"latent_mse": None, "psnr": None, "colour_bias": [None] * 3})
    assert verdict(broken)["answer"] == "no"
    perfect = results_of([1.0] * 3, aligned={"psnr": None})
    perfect["per_image"]["aligned"]["psnr"] = [None] * 3
    assert verdict(perfect)["answer"] == "unknown"


def test_the_best_of_the_other_checkpoints_is_named():
    """A further checkpoint that is better than the judged one and goes unmentioned; a baseline that passes for one."""
    results = results_of([1.0] * 40)
    aligned = results["ladder"]["aligned"]
    results["ladder"] |= {f"aligned_{number}": aligned | {"label": f"other {number}"} for number in (2, 3)}
    assert len(verdict(results)["sentences"]) == 2
    results["ladder"]["aligned_3"]["psnr"] += 1
    assert verdict(results)["sentences"][-1] == "Of the other checkpoints, “other 3” is the best, with 27.00 dB."
