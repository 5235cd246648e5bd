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
