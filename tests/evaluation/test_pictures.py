"""Pictures: panels of the rungs, the sheet, the bytes on the page, and the images that are chosen; charts."""

import re

import numpy as np
import pytest
import torch
from reports import results_of

from evaluation import charts, pictures
from evaluation.pictures import PADDING, comparison_picture, comparison_rows


def test_every_rung_has_its_picture_difference_and_latents_in_one_column():
    """A rung left out; a difference against the wrong picture, without its sign or factor, or wrapped around."""
    names = {"vae1": "VAE1", "vae2": "VAE2", "reencode": "re-encode", "aligned": "aligned", "aligned_2": "aligned 2"}
    levels_of = dict(zip(names, (0.1, 0.2, 0.25, 0.3, 0.35)))
    made = {row: (torch.full((4, 2, 2), level), torch.full((3, 8, 8), level)) for row, level in levels_of.items()}
    panels, differences, latents = comparison_rows(torch.zeros(3, 8, 8), made, names)
    assert [caption for caption, _ in panels] == ["original", "VAE1", "VAE2", "re-encode", "aligned", "aligned 2"]
    expected = {"VAE1 − original": 0.1, "VAE2 − original": 0.2, "re-encode − VAE2": 0.05, "aligned − VAE2": 0.1}
    expected["aligned 2 − VAE2"] = 0.15
    assert [caption for caption, _ in differences[1:]] == [f"{pair}, ×{pictures.DIFFERENCE_GAIN}" for pair in expected]
    for (_, image), difference in zip(differences[1:], expected.values()):
        torch.testing.assert_close(image, torch.full((3, 8, 8), difference / 2 * pictures.DIFFERENCE_GAIN))
    for (_, image), row in zip(latents[1:], names):
        torch.testing.assert_close(image, pictures.latents_as_rgb(made[row][0]))
    assert differences[0][1] is latents[0][1] is None
    grey = torch.zeros(3, 4, 4)
    assert torch.equal(pictures.difference_map(grey, grey), grey)
    brighter = pictures.difference_map(grey + 0.02, grey)
    torch.testing.assert_close(brighter, torch.full((3, 4, 4), 0.01 * pictures.DIFFERENCE_GAIN))
    torch.testing.assert_close(pictures.difference_map(grey, grey + 0.02), -brighter)
    assert pictures.difference_map(grey + 1, grey - 1).max() == 1


def test_comparison_picture_shows_every_panel_apart():
    """Panels or captions that overlap or fall off the sheet; a panel smaller than the others that is not enlarged."""
    red, green, blue = (torch.full((3, 16, 16), -1.0) for _ in range(3))
    red[0], green[1], blue[2] = 1, 1, 1
    rows = [[("red", red), ("green", green), ("blue", blue)], [("latents", green[:, :2, :2]), ("red", red)]]
    sheet = comparison_picture(rows, 40)
    panel = (sheet.width - PADDING) // 3 - PADDING
    row_height = (sheet.height - PADDING) // 2
    assert panel >= 40
    assert row_height > panel + PADDING
    middle = PADDING + panel // 2
    pure = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    for (column, row), colour in zip(((0, 0), (1, 0), (2, 0), (0, 1), (1, 1)), (*pure, pure[1], pure[0])):
        assert sheet.getpixel((middle + column * (panel + PADDING), middle + row * row_height)) == colour
    corner = (PADDING + panel - 2, PADDING + row_height + panel - 2)
    assert sheet.getpixel(corner) == (0, 255, 0)
    long = comparison_picture([[("a caption of some length", red), ("", None)]], 40)
    assert long.width > 2 * 100


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
def test_latents_are_shown_by_one_fixed_projection(channels):
    """A projection fitted per picture, or drawn from the global random state; fewer than three colours."""
    latents = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(5)) * 0.2
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = pictures.latents_as_rgb(latents)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(pictures.latents_as_rgb(latents), first)
    assert first.shape == (2, 3, 4, 4)
    torch.testing.assert_close(pictures.latents_as_rgb(latents[1]), first[1])  # alone or in a batch
    torch.testing.assert_close(pictures.latents_as_rgb(latents / 2), first / 2)  # level is kept
    assert pictures.latents_as_rgb(latents * 1000).abs().max() <= 1
    assert first.std() > 0


def test_pictures_keep_within_the_pages_bytes():
    """A page of tens of megabytes from large or noisy images."""
    noise = torch.rand(3, 768, 768, generator=torch.Generator().manual_seed(0)) * 2 - 1
    names = {row: row for row in ("vae1", "vae2", "reencode", "aligned")}
    made = {row: (torch.randn(16, 96, 96), noise) for row in names}
    for count in (9, 100):
        rows = pictures.page_panels(pictures.comparison_rows(noise, made, names), 13 * count)
        assert [panel["caption"] for panel in rows[0]] == ["original", *names]
        panels = [panel for row in rows for panel in row if panel["uri"]]
        assert len(panels) == 13
        assert sum(len(panel["uri"]) for panel in panels) * count < 9_500_000
        assert [panel["pixelated"] for panel in rows[2] if panel["uri"]] == [True] * 4


@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 4, 9, 20])
@pytest.mark.parametrize("images", [1, 2, 7, 30])
def test_chosen_images_are_the_worst_the_median_and_the_best_each_once(wanted, images):
    """An image that is shown twice, a page of the best images only, or more images than were asked for."""
    gains = np.random.default_rng(images).permutation(images).astype(float).tolist()
    chosen = pictures.chosen_images(results_of(gains), wanted)
    places = [place for group in chosen.values() for place in group]
    assert len(places) == len(set(places)) == min(wanted, images)
    if wanted:
        assert chosen["worst"][0] == gains.index(0)
    if wanted == 9 and images == 30:
        assert [gains[place] for place in chosen["worst"]] == [0, 1, 2]
        assert sorted(gains[place] for place in chosen["median"]) in ([13, 14, 15], [14, 15, 16])
        assert [gains[place] for place in chosen["best"]] == [29, 28, 27]


def test_text_is_safe_and_shows_what_cannot_be_shown():
    """A file name that runs as a script, or that hides its end behind a control character."""
    assert charts.text('<a href="x">&\'') == "&lt;a href=&quot;x&quot;&gt;&amp;&#x27;"
    assert charts.text("a\nb\udcff\u202e") == "a\\nb\\udcff\\u202e"
    assert charts.text("長い ×") == "長い ×"


def test_charts_say_their_figures_and_survive_what_is_not_there():
    """A chart that a screen reader cannot tell, and one that breaks on a missing value, a single point or no line at all."""
    chart = charts.lines("t<", [("a", [(0, 1.0), (1, None), (2, 3.0)], "c-aligned"), ("b", [(0, None)], "c-linear")], "x", "y")
    assert "t&lt;" in chart
    assert "a: from 1 at 0 to 3 at 2" in chart
    assert "b" not in re.findall(r"</svg>(\w)</li>", chart)
    assert "nan" not in chart
    assert "nothing to draw" in charts.lines("t", [("a", [(0, 0.0)], "c-aligned")], "x", "y", log_y=True)
    assert "nan" not in charts.lines("t", [("a", [(5, 2.0)], "c-aligned")], "x", "y")
    assert "–" in charts.bars("t", [("a", None, "–", "c-aligned")])
    assert "1, –" in charts.columns("t", [("a", [1.0, None], "c-aligned")], "x", "y")
    assert "nothing to draw" in charts.columns("t", [], "x", "y")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 15, [0, 5, 10, 15]), (-2, -1, [-2, -1.8, -1.6, -1.4, -1.2, -1]), (3, 3, [3])],
)
def test_ticks_are_round_numbers_within_the_range(low, high, expected):
    """Ticks beyond the axis, an end that rounding loses, a range of no width that divides by zero."""
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0, "0"), (0.05, "0.05"), (12.345, "12.3"), (1234.5, "1234"), (2e-7, "2.0e−07"), (-5, "−5")],
)
def test_numbers_on_axes_are_short(value, shown):
    """Numbers too long for the axis, or so short that two ticks read the same."""
    assert charts.number(value) == shown
