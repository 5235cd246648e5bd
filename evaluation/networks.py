"""The frozen networks of metrics that are measured only when asked for by name."""

from __future__ import annotations

import importlib.util
import urllib.request
from pathlib import Path

import torch

from utils import UserError, one_line

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names its download
NETWORK_TIMEOUT = 10  # seconds for the first answer


def lpips_network(device: torch.device | str) -> torch.nn.Module:
    """LPIPS with AlexNet (Zhang et al. 2018): two image batches (B, 3, H, W) in [-1, 1] -> distances; frozen, in eval mode,
    gradients flow to the images. Its AlexNet weights are downloaded once. UserError that says what to fetch when they
    cannot be had."""
    if not importlib.util.find_spec("torchvision"):
        raise UserError("needs torchvision, which is not installed (pip install torchvision)")
    from torchvision.models import AlexNet_Weights

    url = AlexNet_Weights.DEFAULT.url
    if not weights_file(url.rsplit("/", 1)[-1]).is_file():
        _download(url)
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex").net.to(device).eval().requires_grad_(False)


def inception_network(device: torch.device | str) -> torch.nn.Module:
    """The Inception network of FID (Heusel et al. 2017): uint8 images (B, 3, H, W) -> features (B, 2048). UserError that says
    what to fetch when the machine lacks something."""
    if not importlib.util.find_spec("torch_fidelity"):
        raise UserError("needs torch-fidelity, which is not installed (pip install torch-fidelity)")
    weights = weights_file(INCEPTION_WEIGHTS)
    if not weights.is_file():
        url = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_WEIGHTS}"
        raise UserError(f"its Inception weights are not on this machine: {fetch_hint(url)}")
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights)).to(device)


def _download(url: str) -> None:
    """Download weights to where `weights_file` looks, with a progress bar. UserError where the network does not give them."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=NETWORK_TIMEOUT):
            pass  # torch's own download waits for an answer without end
        torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, another answer; a file that came incomplete
        raise UserError(
            f"its weights are not on this machine and cannot be downloaded ({one_line(error)}): {fetch_hint(url)}"
        ) from None


def weights_file(name: str) -> Path:
    """Where torch keeps a file of weights that a library has downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def fetch_hint(url: str) -> str:
    """The command that downloads the weights at `url` to where `weights_file` looks."""
    return f"python -c \"import torch; torch.hub.load_state_dict_from_url('{url}')\" fetches them"
