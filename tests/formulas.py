"""Image and latent metrics written out in numpy, as in the papers: references for `metrics.py` and `figures.py`.

Images are (3, H, W) in [-1, 1], latents (C, h, w), both numpy.
"""

import math

import numpy as np


def levels(image):
    """[-1, 1] -> the levels of an 8-bit file."""
    return np.clip(np.rint((image.astype(np.float64) + 1) * 127.5), 0, 255)


def psnr(image, reference):
    return 10 * math.log10(255**2 / np.mean((levels(image) - levels(reference)) ** 2))


def blur(plane):
    """An 11x11 Gaussian of sigma 1.5 over a plane with mirrored borders."""
    row = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    row /= row.sum()
    rows = np.lib.stride_tricks.sliding_window_view(np.pad(plane, 5, mode="reflect"), 11, axis=0) @ row
    return np.lib.stride_tricks.sliding_window_view(rows, 11, axis=1) @ row


def similarity(x, y):
    """(luminance, contrast · structure) of two planes of 8-bit levels at every place: Wang et al. 2004, equations 6 and 9."""
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1), (2 * covariance + c2) / (var_x + var_y + c2)


def ssim(image, reference):
    """Mean over places and channels."""
    pairs = [similarity(x, y) for x, y in zip(levels(image), levels(reference))]
    return float(np.mean([luminance * structure for luminance, structure in pairs]))


def ms_ssim(image, reference):
    """Five scales, each half the one before (Wang et al. 2003); contrast and structure without the mirrored borders, as
    torchmetrics takes them."""
    x, y, score = levels(image), levels(reference), 1.0
    for scale, exponent in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        pairs = [similarity(*planes) for planes in zip(x, y)]
        if scale == 4:
            value = np.mean([luminance * structure for luminance, structure in pairs])
        else:
            value = np.mean([structure[5:-5, 5:-5] for _, structure in pairs])
        score *= max(value, 0) ** exponent
        x, y = ((each[:, ::2, ::2] + each[:, 1::2, ::2] + each[:, ::2, 1::2] + each[:, 1::2, 1::2]) / 4 for each in (x, y))
    return float(score)


def cosine(latents, target):
    return float(np.sum(latents * target) / (np.linalg.norm(latents) * np.linalg.norm(target)))


def frechet_distance(first, second):
    """Between two sets of features (N, F): Heusel et al. 2017, by the eigenvalues of the covariances' product."""
    mean1, mean2 = first.mean(axis=0), second.mean(axis=0)
    covariance1, covariance2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    roots = np.sqrt(np.clip(np.linalg.eigvals(covariance1 @ covariance2).real, 0, None))
    return float(((mean1 - mean2) ** 2).sum() + np.trace(covariance1) + np.trace(covariance2) - 2 * roots.sum())


def error_power(images, originals, bands):
    """Error power over original's power by frequency band, the plain way: pixel by pixel of the spectrum."""
    size = images.shape[-1]
    window = np.outer(*[0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)] * 2)
    error, power = np.zeros(bands), np.zeros(bands)
    for image, original in zip(images, originals):
        grey, grey_original = levels(image).mean(axis=0), levels(original).mean(axis=0)
        spectrum = np.abs(np.fft.fft2((grey - grey_original) * window)) ** 2
        own = np.abs(np.fft.fft2((grey_original - grey_original.mean()) * window)) ** 2
        for y in range(size):
            for x in range(size):
                distance = math.hypot(min(y, size - y), min(x, size - x)) / size
                if 0 < distance < 0.5:
                    error[int(distance * 2 * bands)] += spectrum[y, x]
                    power[int(distance * 2 * bands)] += own[y, x]
    return error / power
