"""What `evaluate` measures, against formulas written here, and the pictures of the report."""

import math

import numpy as np
import pytest
import torch
from conftest import make_photo
from diffusers import AutoencoderKL
from formulas import levels, psnr, ssim
from runs import ONE_THREAD  # noqa: F401  one thread in this interpreter

from dataloader import ImageDataset, eval_loader, list_images
from evaluation import pictures, tables
from evaluation.ladder import LADDER, evaluate, picture_names
from evaluation.metrics import image_metrics
from evaluation.pictures import PADDING, comparison_picture, comparison_rows
from latents.pipeline import PipelineWithVAEs
from latents.spaces import Codec
from latents.vaes import load_vae_model
from vae_align import AlignConfig, AlignModule

METRICS = ("latent_mse", "psnr", "ssim", "psnr_vs_vae2")


@pytest.fixture(scope="module")
def pipeline(vae_folders):
    spaces = [Codec(load_vae_model(vae_folders[name], "", None, "cpu", torch.float32)) for name in ("kl4", "kl16")]
    torch.manual_seed(0)
    return PipelineWithVAEs(AlignModule(AlignConfig(hidden_channels=8, num_blocks=1)), *spaces)


def loader_of(folder, batch_size):
    return eval_loader(ImageDataset(list_images(folder), 32), batch_size, 0)


@pytest.fixture(scope="module")
def judged(pipeline, photo_folders):
    """(results of the whole evaluation folder in batches of 2, the images, VAE2's and the aligned pictures) as numpy."""
    seen = {"images": [], "ceiling": [], "aligned": [], "aligned_latents": [], "target": []}

    def visit(batch, made):
        seen["images"] += list(batch["pixel_values"].numpy())
        seen["ceiling"] += list(made["ceiling"][1].numpy())
        seen["aligned"] += list(made["aligned"][1].numpy())
        seen["aligned_latents"] += list(made["aligned"][0].numpy())
        seen["target"] += list(made["ceiling"][0].numpy())

    results = evaluate(pipeline, loader_of(photo_folders[1], 2), torch.float32, visit=visit, show_progress=False)
    return results, seen


def test_means_do_not_depend_on_the_batch_size(pipeline, photo_folders, judged):
    """Only the first batch judged, or a short last batch (5 images in batches of 2) weighted like a full one."""
    whole = evaluate(pipeline, loader_of(photo_folders[1], 5), torch.float32, show_progress=False)
    single = evaluate(pipeline, loader_of(photo_folders[1], 1), torch.float32, show_progress=False)
    assert len(set(judged[0]["per_image"]["aligned"]["psnr"])) == 5  # the images differ, or this test proves nothing
    for other in (whole, single):
        assert other["images"] == judged[0]["images"] == 5
        assert other["paths"] == judged[0]["paths"] == list_images(photo_folders[1])
        assert other["ladder"].keys() == judged[0]["ladder"].keys()
        for row in other["ladder"]:
            for name in METRICS:
                expected = judged[0]["ladder"][row][name]
                assert other["ladder"][row][name] == (None if expected is None else pytest.approx(expected, rel=1e-3)), name


def test_ladder_holds_the_means_of_the_per_image_values(judged):
    """A sum in place of a mean, or rows mixed up."""
    results, _ = judged
    for row, figures in results["ladder"].items():
        assert figures["label"] == LADDER[row]
        for name in ("psnr", "ssim"):
            values = results["per_image"][row][name]
            assert len(values) == 5
            assert figures[name] == pytest.approx(np.mean(values), rel=1e-6)


def test_psnr_and_ssim_against_the_original_match_independent_formulas(judged):
    """PSNR over the batch instead of per image, a peak of 1 or 2 for 8-bit levels, unclamped values, another SSIM window."""
    results, seen = judged
    for row in ("ceiling", "aligned"):
        expected = [psnr(made, original) for made, original in zip(seen[row], seen["images"])]
        assert results["per_image"][row]["psnr"] == pytest.approx(expected, abs=1e-3)
        expected = [ssim(made, original) for made, original in zip(seen[row], seen["images"])]
        assert results["per_image"][row]["ssim"] == pytest.approx(expected, abs=1e-3)


def test_figures_against_vae2_match_independent_formulas(judged):
    """`psnr_vs_vae2` taken against the original; a latent error of raw instead of scaled latents; bias with the sign turned."""
    results, seen = judged
    per_image = results["per_image"]["aligned"]
    expected = [psnr(made, ceiling) for made, ceiling in zip(seen["aligned"], seen["ceiling"])]
    assert per_image["psnr_vs_vae2"] == pytest.approx(expected, abs=1e-3)
    expected = [np.mean((made - target) ** 2) for made, target in zip(seen["aligned_latents"], seen["target"])]
    assert per_image["latent_mse"] == pytest.approx(expected, rel=1e-4)
    for got, made, ceiling in zip(per_image["colour_bias"], seen["aligned"], seen["ceiling"]):
        assert got == pytest.approx((levels(made) - levels(ceiling)).mean(axis=(1, 2)), abs=1e-3)


def test_ssim_of_textured_pictures_matches_the_formula():
    """A window of another size or sigma, or borders filled with black: invisible on smooth pictures, plain on noise."""
    rng = np.random.default_rng(1)
    original = np.asarray(make_photo(rng, (48, 40)), dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    image = np.clip(original + rng.normal(0, 0.2, original.shape), -1.2, 1.2).astype(np.float32)
    measured = image_metrics(torch.from_numpy(image)[None], torch.from_numpy(original)[None])
    assert measured["ssim"] == [pytest.approx(ssim(image, original), abs=1e-4)]
    assert measured["psnr"] == [pytest.approx(psnr(image, original), abs=1e-4)]


def test_ceiling_is_what_diffusers_itself_reconstructs(judged, vae_folders):
    """A ceiling that went through the align module, a sampled posterior, or a scale that encode and decode disagree on."""
    results, seen = judged
    vae = AutoencoderKL.from_pretrained(vae_folders["kl16"]).eval()
    with torch.no_grad():
        images = torch.from_numpy(np.stack(seen["images"]))
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.numpy()
    expected = [psnr(made, original) for made, original in zip(decoded, seen["images"])]
    assert results["per_image"]["ceiling"]["psnr"] == pytest.approx(expected, abs=0.01)


def test_ceiling_row_has_no_error_of_its_own(judged):
    """Infinity in a JSON file, or a target that is drawn twice."""
    ceiling = judged[0]["ladder"]["ceiling"]
    assert ceiling["latent_mse"] == 0
    assert ceiling["psnr_vs_vae2"] is None
    assert ceiling["colour_bias"] == [0, 0, 0]
    assert judged[0]["per_image"]["ceiling"]["psnr_vs_vae2"] == [None] * 5
    assert judged[0]["ladder"]["vae1"]["latent_mse"] is None  # VAE1's latents are not in VAE2's space


def test_colour_bias_is_positive_where_the_picture_is_brighter():
    original = torch.zeros(1, 3, 16, 16)
    shifted = original + torch.tensor([20, 0, -10]).view(1, 3, 1, 1) / 127.5
    assert image_metrics(shifted, original)["colour_bias"] == [pytest.approx([20, 0, -10], abs=0.51)]


def test_evaluation_leaves_the_modules_mode_as_it_was(pipeline, photo_folders):
    """Training that goes on in evaluation mode after the first evaluation."""
    for training in (True, False):
        pipeline.module.train(training)
        evaluate(pipeline, loader_of(photo_folders[1], 5), torch.float32, rows=("aligned",), show_progress=False)
        assert pipeline.module.training is training


def test_unreadable_image_is_named_and_left_out_of_the_means(pipeline, photo_folders, judged, tmp_path):
    """A broken file that stops the evaluation, counts as a black image, or makes an empty batch fail."""
    for photo in photo_folders[1].iterdir():
        (tmp_path / photo.name).symlink_to(photo)
    (tmp_path / "2_broken.jpg").write_bytes(b"\xff\xd8\xff not a photo")
    for batch_size in (1, 4):
        results = evaluate(pipeline, loader_of(tmp_path, batch_size), torch.float32, show_progress=False)
        assert results["images"] == 5
        assert len(results["unreadable"]) == 1
        assert "2_broken.jpg" in results["unreadable"][0]
        assert results["ladder"]["aligned"]["psnr"] == pytest.approx(judged[0]["ladder"]["aligned"]["psnr"], rel=1e-3)


def test_ssim_of_pictures_smaller_than_its_window_is_none_or_a_number(pipeline, photo_folders):
    """An 8 px picture has no 11x11 window: not-a-number must not reach the JSON file or the table."""
    loader = eval_loader(ImageDataset(list_images(photo_folders[1]), 8), 2, 0)
    results = evaluate(pipeline, loader, torch.float32, show_progress=False)
    value = results["ladder"]["aligned"]["ssim"]
    assert value is None or math.isfinite(value)
    assert "nan" not in tables.ladder_table(results)


def test_table_shows_every_row_and_a_dash_where_a_figure_has_no_meaning(judged):
    table = tables.ladder_table(judged[0]).splitlines()
    assert [line.split("  ")[0] for line in table[1:]] == [LADDER[row] for row in judged[0]["ladder"]]
    assert "–" in table[1]
    assert f"{judged[0]['ladder']['aligned']['psnr']:.2f}" in table[-1]


def test_every_way_to_vae2s_latents_has_its_picture_difference_and_latents_in_one_column():
    """Decode + re-encode or a further checkpoint left out; a difference against the wrong picture or without its factor."""
    names = picture_names(others=[None])
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


def test_comparison_picture_has_room_for_every_panel():
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
    colours = {
        (0, 0): (255, 0, 0),
        (1, 0): (0, 255, 0),
        (2, 0): (0, 0, 255),
        (0, 1): (0, 255, 0),
        (1, 1): (255, 0, 0),
    }
    for (column, row), colour in colours.items():
        assert sheet.getpixel((middle + column * (panel + PADDING), middle + row * row_height)) == colour
    corner = (PADDING + panel - 2, PADDING + row_height + panel - 2)
    assert sheet.getpixel(corner) == (0, 255, 0)
    long = comparison_picture([[("a caption of some length", red), ("", None)]], 40)
    assert long.width > 2 * 100


def test_difference_map_is_grey_for_equals_and_amplified_with_sign():
    """An absolute difference, a gain applied twice, or a wrap-around of large differences."""
    reference = torch.zeros(3, 4, 4)
    assert torch.equal(pictures.difference_map(reference, reference), torch.zeros(3, 4, 4))
    brighter = pictures.difference_map(reference + 0.02, reference)
    torch.testing.assert_close(brighter, torch.full((3, 4, 4), 0.01 * pictures.DIFFERENCE_GAIN))
    torch.testing.assert_close(pictures.difference_map(reference, reference + 0.02), -brighter)
    assert pictures.difference_map(reference + 1, reference - 1).max() == 1


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
def test_latents_are_shown_by_one_fixed_projection(channels):
    """A projection fitted or stretched per picture, so that panels cannot be compared; one that takes from the global
    random state, and so changes training; one that gives fewer than three colours."""
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
