"""What is measured on latents and on decoded images: per image, over a set, and summed up. Knows no model.

Images are (B, 3, H, W) in [-1, 1] and are compared as the clamped 8-bit values a viewer would get to see; latents are
scaled latents (B, C, h, w).
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import torch

from utils import UserError, one_line

OPTIONAL = ("ssim", "ms_ssim", "lpips", "rfid")
DEFAULT_OPTIONAL = ("ssim", "ms_ssim", "lpips")
HIGHER_IS_BETTER = frozenset(("psnr", "ssim", "ms_ssim", "psnr_vs_vae2", "ssim_vs_vae2", "latent_cosine"))
MS_SSIM_SIDE = 176  # px: a sixteenth of it must exceed 10, or torchmetrics raises
LPIPS_SIDE = 32  # px: below that nothing is left after AlexNet's pooling
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names its download
SPECTRUM_BANDS = 24
HISTOGRAM_BINS = 48


def to_8bit(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> levels 0..255, clamped and rounded, still float: what a viewer would get to see."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round()


# ----------------------------------------------------------------------------------------------------------------------
# Per image


def image_metrics(image: torch.Tensor, original: torch.Tensor, ssim: bool = True) -> dict:
    """Per image PSNR in dB, SSIM and the mean shift of R, G, B in 8-bit levels: lists of B values, B x 3 for the shift.

    SSIM as Wang et al. 2004 (11x11 Gaussian, sigma 1.5; mirrored borders).
    """
    image, original = to_8bit(image), to_8bit(original)
    error = (image - original).square().cpu().mean(dim=(1, 2, 3), dtype=torch.float64)
    figures = {
        "psnr": (10 * torch.log10(255**2 / error)).tolist(),
        "colour_bias": (image - original).cpu().mean(dim=(2, 3), dtype=torch.float64).tolist(),
    }
    if ssim:
        from torchmetrics.functional.image import structural_similarity_index_measure

        scores = structural_similarity_index_measure(image, original, data_range=255.0, reduction="none")
        figures["ssim"] = scores.reshape(-1).tolist()
    return figures


def latent_metrics(latents: torch.Tensor, target: torch.Tensor) -> dict:
    """Per image MSE, L1 and cosine similarity of latents, and the MSE of each channel: lists of B values, B x C for it."""
    error = (latents - target).float()
    by_channel = error.square().mean(dim=(2, 3))
    return {
        "latent_mse": by_channel.mean(dim=1).tolist(),
        "latent_l1": error.abs().mean(dim=(1, 2, 3)).tolist(),
        "latent_cosine": torch.cosine_similarity(latents.float().flatten(1), target.float().flatten(1)).tolist(),
        "latent_mse_by_channel": by_channel.tolist(),
    }


def lpips_network(device: torch.device) -> torch.nn.Module:
    """LPIPS with AlexNet (Zhang et al. 2018): two image batches (B, 3, H, W) in [-1, 1] -> distances; frozen, in eval mode,
    gradients flow to the images. UserError that says what to fetch when the machine lacks something."""
    if not importlib.util.find_spec("torchvision"):
        raise UserError("needs torchvision, which is not installed (pip install torchvision)")
    from torchvision.models import AlexNet_Weights

    url = AlexNet_Weights.DEFAULT.url
    if not _weights_file(url.rsplit("/", 1)[-1]).is_file():
        raise UserError(f"its AlexNet weights are not on this machine: {_fetch_hint(url)}")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex").net.to(device).eval().requires_grad_(False)


class OptionalMetrics:
    """The metrics that cost time or need weights of their own: those of `names` that can be had here.

    `left_out` says in a phrase why the others cannot: {name: why}. Nothing is ever downloaded. MS-SSIM is from five scales
    (Wang et al. 2003), LPIPS with AlexNet, rFID the Fréchet distance of Inception features to those of the originals; all
    against the original image.
    """

    def __init__(self, names=("ssim",), image_size: int = 256, device: str | torch.device = "cpu"):
        self.left_out = {}
        self.device = device
        self._lpips = self._inception = self._originals = None
        self._distances = {}
        for name, check in (("ms_ssim", self._check_ms_ssim), ("lpips", self._load_lpips), ("rfid", self._load_inception)):
            if name in names:
                try:
                    why = check(image_size)
                except Exception as error:  # a damaged file of weights, a library of another version: said, not raised
                    why = one_line(error)
                if why:
                    self.left_out[name] = why
        self.names = tuple(name for name in OPTIONAL if name in names and name not in self.left_out)

    @staticmethod
    def _check_ms_ssim(image_size):
        return None if image_size >= MS_SSIM_SIDE else f"needs images of at least {MS_SSIM_SIDE} px, these have {image_size}"

    def _load_lpips(self, image_size):
        if image_size < LPIPS_SIDE:
            return f"needs images of at least {LPIPS_SIDE} px, these have {image_size}"
        try:
            self._lpips = lpips_network(self.device)
        except UserError as error:
            return str(error)
        return None

    def _load_inception(self, _):
        if not importlib.util.find_spec("torch_fidelity"):
            return "needs torch-fidelity, which is not installed (pip install torch-fidelity)"
        weights = _weights_file(INCEPTION_WEIGHTS)
        if not weights.is_file():
            url = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_WEIGHTS}"
            return f"its Inception weights are not on this machine: {_fetch_hint(url)}"
        from torchmetrics.image.fid import NoTrainInceptionV3

        self._inception = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights)).to(self.device)
        return None

    def begin_batch(self, originals: torch.Tensor) -> None:
        """Take note of a batch of original images, once before the rungs are measured on it."""
        if "rfid" in self.names:
            self._originals = self._originals or FeatureStatistics()
            self._originals.add(self._features(originals))

    def measure(self, row: str, image: torch.Tensor, original: torch.Tensor) -> dict:
        """{metric: [value per image]} of what `row` made of a batch; rFID is only collected."""
        figures = {}
        if "ms_ssim" in self.names:
            from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

            scores = multiscale_structural_similarity_index_measure(
                to_8bit(image), to_8bit(original), data_range=255.0, reduction="none"
            )
            figures["ms_ssim"] = scores.reshape(-1).tolist()
        if "lpips" in self.names:
            pair = (to_8bit(side) / 127.5 - 1 for side in (image, original))
            figures["lpips"] = self._lpips(*pair).reshape(-1).tolist()
        if "rfid" in self.names:
            self._distances.setdefault(row, FeatureStatistics()).add(self._features(image))
        return figures

    def of_the_set(self, row: str) -> dict:
        """{metric: value} of `row` over all images."""
        if "rfid" not in self.names:
            return {}
        return {"rfid": frechet_distance(self._distances[row], self._originals)}

    def _features(self, images):
        return self._inception(to_8bit(images).to(torch.uint8))


def _weights_file(name: str) -> Path:
    """Where torch keeps a file of weights that a library has downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _fetch_hint(url: str) -> str:
    return f"python -c \"import torch; torch.hub.load_state_dict_from_url('{url}')\" fetches them"


class FeatureStatistics:
    """Running mean and covariance of feature vectors: memory that does not grow with their number."""

    def __init__(self):
        self.count, self.sum, self.products = 0, 0, 0

    def add(self, features: torch.Tensor) -> None:
        """Features (B, F)."""
        features = features.cpu().double()
        self.count += len(features)
        self.sum = self.sum + features.sum(dim=0)
        self.products = self.products + features.T @ features

    def mean_and_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.sum / self.count
        return mean, (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float | None:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) of two sets of features (Heusel et al. 2017); None for fewer than two images."""
    if min(first.count, second.count) < 2:
        return None
    (mean1, covariance1), (mean2, covariance2) = first.mean_and_covariance(), second.mean_and_covariance()
    # tr (C1 C2)^½ is the sum of the roots of the eigenvalues of C1^½ C2 C1^½, which is symmetric: ten times as fast
    values, vectors = torch.linalg.eigh(covariance1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    roots = torch.linalg.eigvalsh(root @ covariance2 @ root).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * roots)


# ----------------------------------------------------------------------------------------------------------------------
# Over a set


def summarise(values: dict) -> dict:
    """{row: {metric: [value per image]}} -> {row: {metric: {mean, std, worst, worst_image}}}.

    `std` is over images (n - 1); `worst` is the least where higher is better, else the greatest; what is not a number is
    worse than any. `worst_image` is its place in the list. Metrics with several values per image are left out.
    """
    summary = {}
    for row, metrics in values.items():
        summary[row] = {}
        for name, numbers in metrics.items():
            if numbers and not isinstance(numbers[0], list):
                summary[row][name] = _summary_of(numbers, -1 if name in HIGHER_IS_BETTER else 1)
    return summary


def _summary_of(numbers, sign):
    mean = math.fsum(numbers) / len(numbers)
    std = None
    if math.isfinite(mean) and len(numbers) > 1:
        std = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))
    worst = max(range(len(numbers)), key=lambda place: math.inf if math.isnan(numbers[place]) else sign * numbers[place])
    return {"mean": finite(mean), "std": std, "worst": finite(numbers[worst]), "worst_image": worst}


def finite(value):
    """`value` with every number that JSON cannot hold replaced by None."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def mean_of(numbers: list):
    """Mean over images, per component for lists; None if it is not finite (the PSNR of identical images is infinite)."""
    if isinstance(numbers[0], list):
        return [mean_of(component) for component in zip(*numbers)]
    mean = math.fsum(numbers) / len(numbers)
    return mean if math.isfinite(mean) else None


class ErrorSpectrum:
    """Where in spatial frequency the error of each rung lies: its power relative to the original's, by frequency band. And how
    much fine detail its pictures have, true or not, which PSNR does not tell: a soft picture errs less than a crisp one.

    Of the mean of R, G, B in 8-bit levels under a Hann window, summed over images; bands of equal width from 0 to 0.5 cycles
    per pixel, the mean level left out.
    """

    def __init__(self, size: int, rows):
        bands = max(2, min(SPECTRUM_BANDS, size // 4))
        across = torch.fft.fftfreq(size)
        radius = torch.sqrt(across[:, None] ** 2 + across[None, :] ** 2)
        self.band = (radius * 2 * bands).long().clamp(max=bands).flatten()  # the corners beyond 0.5 share the last, unused one
        self.band[0] = bands
        window = torch.hann_window(size)
        self.window = window[:, None] * window[None, :]
        self.frequencies = [(band + 0.5) / (2 * bands) for band in range(bands)]
        self.original = torch.zeros(bands + 1, dtype=torch.float64)
        self.errors = {row: torch.zeros(bands + 1, dtype=torch.float64) for row in rows}
        self.pictures = {row: torch.zeros(bands + 1, dtype=torch.float64) for row in rows}

    def add(self, originals: torch.Tensor, pictures: dict) -> None:
        """Originals (B, 3, S, S) and {row: pictures of the same shape}, in [-1, 1]."""
        originals = to_8bit(originals).mean(dim=1)
        self.original += self._power(_without_mean(originals))
        for row in self.errors:
            picture = to_8bit(pictures[row]).mean(dim=1)
            self.errors[row] += self._power(picture - originals)
            self.pictures[row] += self._power(_without_mean(picture))

    def _power(self, planes):
        spectrum = torch.fft.fft2(planes * self.window.to(planes)).abs().square().sum(dim=0).flatten().cpu().double()
        return torch.zeros_like(self.original).index_add_(0, self.band, spectrum)

    def result(self) -> dict:
        """{frequency: cycles per pixel at each band's middle, rows: {row: error power / original's power, per band},
        detail: {row: the picture's power / original's, of the upper half of the bands: at most 4 pixels a cycle}}."""
        rows = {row: finite((power / self.original)[:-1].tolist()) for row, power in self.errors.items()}
        fine = slice(len(self.frequencies) // 2, -1)
        detail = {row: (power[fine].sum() / self.original[fine].sum()).item() for row, power in self.pictures.items()}
        return {"frequency": self.frequencies, "rows": rows, "detail": dict(zip(detail, finite(list(detail.values()))))}


def _without_mean(planes: torch.Tensor) -> torch.Tensor:
    return planes - planes.mean(dim=(1, 2), keepdim=True)


class LatentHistograms:
    """How the values of each latent channel are distributed, for the target and each rung, over one range for all."""

    def __init__(self, rows):
        self.rows = tuple(rows)
        self.limit, self.counts = None, {}

    def add(self, latents: dict) -> None:
        """{row: scaled latents (B, C, h, w)}; the first batch's target ("ceiling") settles the range for all."""
        if self.limit is None:
            spread = latents["ceiling"].float().square().mean().sqrt().item()
            self.limit = math.ceil(4 * spread * 2) / 2 if 0 < spread < math.inf else 1.0
        for row in self.rows:
            values = latents[row].float().nan_to_num().clamp(-self.limit, self.limit)
            place = ((values + self.limit) / (2 * self.limit) * HISTOGRAM_BINS).long().clamp(max=HISTOGRAM_BINS - 1)
            channels = place.shape[1]
            place = place + torch.arange(channels, device=place.device).view(1, -1, 1, 1) * HISTOGRAM_BINS
            counts = torch.bincount(place.flatten(), minlength=channels * HISTOGRAM_BINS).cpu().view(channels, -1)
            self.counts[row] = self.counts.get(row, 0) + counts

    def result(self) -> dict:
        """{limit: the range is ±limit, what lies beyond counts at its ends; rows: {row: counts by channel and bin}}."""
        return {"limit": self.limit, "rows": {row: counts.tolist() for row, counts in self.counts.items()}}
