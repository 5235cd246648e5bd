"""The error's spectrum against its formula."""

import formulas
import numpy as np
import pytest
import torch
from pairs import noisy_pair

from evaluation.spectrum import ErrorSpectrum


def test_spectrum_matches_the_formula_and_does_not_depend_on_batches():
    """A window that is missing, bands of another width, the mean level counted, a mean of ratios over batches."""
    images, originals = noisy_pair(32, count=3)
    spectra = [ErrorSpectrum(32, ["aligned"]), ErrorSpectrum(32, ["aligned"])]
    for spectrum, size in zip(spectra, (3, 1)):
        for part in range(0, 3, size):
            pictures = {"aligned": torch.from_numpy(images[part : part + size])}
            spectrum.add(torch.from_numpy(originals[part : part + size]), pictures)
    measured = spectra[0].result()
    assert len(measured["frequency"]) == 8
    assert measured["frequency"][0] == pytest.approx(0.5 / 16)
    assert measured["rows"]["aligned"] == pytest.approx(spectra[1].result()["rows"]["aligned"], rel=1e-4)
    np.testing.assert_allclose(measured["rows"]["aligned"], formulas.error_power(images, originals, 8), rtol=1e-3)


def test_detail_is_that_of_the_picture_not_of_its_error():
    """Catches a soft picture that passes for a crisp one since it errs less, and coarse shapes that count as detail."""
    rng = np.random.default_rng(3)
    original = torch.from_numpy(rng.uniform(-0.5, 0.5, (2, 3, 32, 32)).astype(np.float32))
    wave = 0.4 * torch.sin(2 * torch.pi * torch.arange(32.0) / 16).expand(2, 3, 32, 32)
    pictures = {"same": original, "half": original / 2, "none": original.mean(dim=(2, 3), keepdim=True).expand_as(original)}
    pictures["coarse"] = pictures["none"] + wave
    spectrum = ErrorSpectrum(32, pictures)
    for part in range(2):
        spectrum.add(original[part : part + 1], {row: picture[part : part + 1] for row, picture in pictures.items()})
    detail = spectrum.result()["detail"]
    assert detail["same"] == pytest.approx(1)
    assert detail["half"] == pytest.approx(0.25, rel=0.02)  # rounding to 8 bits
    assert detail["none"] < 1e-6 and detail["coarse"] < 0.01
