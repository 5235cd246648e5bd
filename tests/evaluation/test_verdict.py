"""The verdict: its figures and its words."""

import math
import re

import numpy as np
import pytest
from reports import results_of

from evaluation.verdict import TRIVIAL, as_text, verdict

BETTER = "The checkpoint “aligned_2” is worse in PSNR (25.00 against 26.00 dB) and better in ST-LPIPS (0.100 against 0.200)."


@pytest.mark.parametrize(
    ("gains", "answer"),
    [([1.0] * 40, "yes"), ([-1.0] * 40, "no"), ([0.01] * 40, "equal"), ([3.0, -3.0] * 20, "equal"), ([1.0], "yes")],
)
def test_verdict_answers_by_the_gain_and_its_uncertainty(gains, answer):
    """A mean within its own uncertainty that is called better; an interval over n instead of n - 1."""
    found = verdict(results_of(gains))
    assert (found["answer"], found["headline"]) == (answer, {"yes": "Yes", "no": "No", "equal": "On a par"}[answer])
    assert found["gain_db"] == pytest.approx(np.mean(gains))
    assert found["macs_fraction"] == 0.25
    if len(gains) > 1:
        assert found["gain_error_db"] == pytest.approx(1.96 * np.std(gains, ddof=1) / math.sqrt(len(gains)))


@pytest.mark.parametrize(
    ("gain", "nearer", "answer", "said"),
    [
        (1.0, 0.1, "yes", "1.00 dB nearer to the originals"),
        (0.0, 0.1, "yes", "look more like the originals"),
        (1.0, -0.1, "no", "less like the originals than those of decode + re-encode (ST-LPIPS 0.300 against 0.200; on 40 of"),
        (-1.0, 0.1, "no", "1.00 dB farther from the originals"),
        (-0.9, -0.02, "no", "0.90 dB farther from the originals"),  # which its cost may outweigh
        (0.0, 0.0, "equal", "PSNR is level with that of decode + re-encode, as far as 40 images can tell"),
    ],
)
def test_verdict_weighs_distortion_and_perception(gain, nearer, answer, said):
    """A soft module that is praised for its PSNR; a no that does not say what is worse; a broken picture praised as cheap."""
    found = verdict(results_of([gain] * 40, nearer=nearer))
    assert found["answer"] == answer
    assert said in found["sentences"][0]
    assert ("It takes 25% of the multiply-adds" in found["sentences"][2]) == (answer != "no" or gain == -0.9)
    assert found["perceptual_gain"] == pytest.approx(nearer)
    assert found["perceptually_better_on"] == (40 if nearer > 0 else 0)


@pytest.mark.parametrize(
    ("gain", "nearer", "words"), [(4.0, 0.0, "worse worse"), (6.0, 0.0, "better worse"), (6.0, 0.15, "better level")]
)
def test_verdict_says_on_which_side_of_vae2_the_module_stands(gain, nearer, words):
    """A module that passes VAE2's own reconstruction in PSNR, praised although it looks worse."""
    sentences = " ".join(verdict(results_of([gain] * 40, nearer=nearer))["sentences"])
    assert re.findall("(better|level|worse) in", sentences) == words.split()
    assert ("VAE2's encoder" in sentences) == ("worse" not in words)


@pytest.mark.parametrize("rung", TRIVIAL)
@pytest.mark.parametrize(
    ("psnr", "distance", "words"),
    [(27, 0.1, "worse worse"), (26, 0.2, "level level"), (27, 0.3, "worse better"), (25, 0.1, "better worse"), (25, 0.2, "")],
)
def test_training_was_in_vain_only_where_neither_metric_gained(rung, psnr, distance, words):
    """A training that helped in one metric and is called useless, from the other one alone."""
    name, conclusion = TRIVIAL[rung]
    found = verdict(results_of([1.0] * 40, others={rung: (psnr, distance)}))["weaknesses"]
    said = " ".join(sentence for sentence in found if name in sentence)
    assert re.findall("(better|level|worse) in", said) == words.split()
    assert (conclusion in said) == bool(words and "better" not in words)


def test_a_short_training_is_named_as_the_cause():
    """A bad figure with no way on; a long training, one that is ahead, or one without gain called too short; minutes that are
    spent already; a module without its training, such as a best one of a long run."""

    def flags(step, config, gain=-3.0, linear=20.0, seconds=180.0):
        trained = {"steps": step, "epochs": 2.3, "seconds": seconds, "without_gain": 3}
        checkpoint = {"step": 60, "epoch": 2.0, "trained": trained, "config": config}
        results = results_of([gain] * 40, others={"linear": (linear, 0.2)}, checkpoints=[checkpoint])
        said = [sentence for sentence in verdict(results)["weaknesses"] if f"for only {step} step" in sentence]
        return [sentence.partition("--resume")[2] for sentence in said]

    assert flags(69, {"minutes": 3.0, "epochs": 100, "warmup_steps": 20}) == [" --minutes 22"]
    assert flags(1, {"minutes": 3.0}) == [" --minutes 30"]  # one step tells no pace
    assert flags(69, {"minutes": 60.0, "patience": 4}) == [""]
    assert flags(69, {"minutes": 60.0, "patience": 3}) == flags(69, {"minutes": 3.0}, seconds=None) == []
    limits = {"epochs": 3, "max_train_steps": 100, "warmup_steps": 200}
    assert flags(100, limits, gain=1.0, linear=30.0) == [" --max_train_steps 1000 --epochs 23"]
    assert flags(500, {"minutes": 3.0}) == flags(69, {"minutes": 3.0}, gain=1.0) == []


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
    reasons, mind = ["VAE1 x: latents of sdxl."], ["VAE2 is another."]
    assert (found["answer"], found["sentences"], found["weaknesses"]) == ("unknown", reasons, mind)
    assert as_text(found, reasons + mind).endswith("? No verdict.\nThe warning above says why.")  # the log said the rest


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
    for sentence, part in zip(said, ("+0.2 -1.4 +0.0", "0.2000 against 0.1000", "SSIM", "On 1 image", "1 file")):
        assert part in sentence
    few = results_of([1.0] * 3, settings={"trained_image_size": 128})
    assert [sentence.split()[0] for sentence in verdict(few)["weaknesses"]] == ["Judged", "Judged"]


def test_verdict_on_what_is_not_finite():
    """A crash at the end of a run whose module has gone wrong, or a kind word for it."""
    broken = results_of([1.0] * 3, aligned={"latent_mse": None, "psnr": None, "colour_bias": [None] * 3})
    assert verdict(broken)["answer"] == "no"
    perfect = results_of([1.0] * 3, aligned={"psnr": None})
    perfect["per_image"]["aligned"]["psnr"] = [None] * 3
    assert verdict(perfect)["answer"] == "unknown"


@pytest.mark.parametrize(("psnr", "distance", "said"), [(26.0, 0.2, []), (25.0, 0.1, [BETTER]), (25.0, 0.2, [])])
def test_other_checkpoints_that_are_better_are_named(psnr, distance, said):
    """A further checkpoint that is better in one metric and goes unmentioned, or is called the best for that metric alone."""
    results = results_of([1.0] * 40, others={"aligned_2": (psnr, distance), "aligned_3": (20.0, 0.5)})
    assert [sentence for sentence in verdict(results)["sentences"] if "checkpoint" in sentence] == said
