"""What is measured on one image, against formulas written out in numpy."""

import formulas
import numpy as np
import pytest
import torch
from pairs import noisy_pair

from evaluation import per_image
from evaluation.per_image import to_8bit


@pytest.mark.parametrize("size", [40, 48])
def test_psnr_and_ssim_of_textured_pictures_match_the_formula(size):
    """A window of another size or sigma, or borders filled with black: invisible on smooth pictures, plain on noise."""
    images, originals = noisy_pair(size)
    levels, reference = (to_8bit(torch.from_numpy(each)) for each in (images, originals))
    assert per_image.ssim(levels, reference) == pytest.approx(
        [formulas.ssim(*pair) for pair in zip(images, originals)], abs=1e-4
    )
    assert per_image.psnr(levels, reference) == pytest.approx(
        [formulas.psnr(*pair) for pair in zip(images, originals)], abs=1e-4
    )


def test_ms_ssim_matches_the_formula_per_image():
    """Another window or number of scales, a mean over the batch, values that were not clamped to 8 bits."""
    images, originals = noisy_pair(192)
    measured = per_image.ms_ssim(*(to_8bit(torch.from_numpy(each)) for each in (images, originals)))
    expected = [formulas.ms_ssim(*pair) for pair in zip(images, originals)]
    assert measured == pytest.approx(expected, abs=1e-4)
    assert max(expected) < 0.99


def test_colour_bias_is_positive_where_the_picture_is_brighter():
    """A bias with the sign turned, in image values, or with red and blue exchanged."""
    original = torch.zeros(1, 3, 16, 16)
    shifted = original + torch.tensor([20, 0, -10]).view(1, 3, 1, 1) / 127.5
    assert per_image.colour_bias(to_8bit(shifted), to_8bit(original)) == [pytest.approx([20, 0, -10], abs=0.51)]


def test_latent_metrics_match_the_formulas():
    """A mean over the batch in place of one per image, a square that is missing, a cosine by place instead of the whole."""
    rng = np.random.default_rng(2)
    latents, target = (rng.normal(size=(3, 5, 4, 6)).astype(np.float32) for _ in range(2))
    pair = torch.from_numpy(latents), torch.from_numpy(target)
    error = latents - target
    assert per_image.latent_mse(*pair) == pytest.approx((error**2).mean(axis=(1, 2, 3)).tolist(), rel=1e-5)
    assert per_image.latent_l1(*pair) == pytest.approx(np.abs(error).mean(axis=(1, 2, 3)).tolist(), rel=1e-5)
    cosines = [formulas.cosine(*each) for each in zip(latents, target)]
    assert per_image.latent_cosine(*pair) == pytest.approx(cosines, abs=1e-5)
    np.testing.assert_allclose(per_image.latent_mse_by_channel(*pair), (error**2).mean(axis=(2, 3)), rtol=1e-5)
