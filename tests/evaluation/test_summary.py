"""Values per image summed up."""

import math

import pytest

from evaluation.summary import summarise


def test_summary_knows_which_way_is_worse():
    """The best image called the worst; a deviation over n; a mean of colours that cancel out."""
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
