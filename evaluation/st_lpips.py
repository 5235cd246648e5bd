"""ST-LPIPS: how far apart two pictures look, as a frozen ImageNet network sees them. Its weights come with a package.

Shift-tolerant LPIPS (Ghildyal & Liu, ECCV 2022, arXiv:2207.13686) is LPIPS (Zhang et al. 2018, arXiv:1801.03924) with blurred
downsampling in place of strides, so that a picture moved by a pixel keeps its features. The package `stlpips_pytorch` carries
the weights of an AlexNet and of a VGG-16. Its code imports IPython and torchsummary, so only its weight files are read here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from utils import UserError, one_line

PACKAGE = "stlpips_pytorch"
SMALLEST_SIDE = 32  # px: below that the last of VGG's five stages has next to nothing to look at
EPSILON = 1e-10  # beside a feature vector's length, as published

# Of each stage the layers, in order: a number is a 3x3 convolution to so many channels with its ReLU, "pool" a maximum over
# neighbours followed by the blurred downsampling.
VGG_STAGES = ((64, 64), ("pool", 128, 128), ("pool", 256, 256, 256), ("pool", 512, 512, 512), ("pool", 512, 512, 512))


class BlurDownsample(nn.Module):
    """Halves the resolution under a 3x3 binomial blur, two reflected pixels at each edge (Zhang 2019, arXiv:1904.11486)."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("filt", torch.zeros(channels, 1, 3, 3))  # the file brings the filter

    def forward(self, x):
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=self.filt.shape[0])


def _alexnet_stages() -> list[list[nn.Module]]:
    """The five stages of the shift-tolerant AlexNet, each up to its ReLU: strides 2, 4, 8, 8, 8."""

    def pool(channels):
        return [nn.MaxPool2d(3, stride=1), BlurDownsample(channels)]

    return [
        [nn.Conv2d(3, 64, 11, padding=2), BlurDownsample(64), nn.ReLU()],
        [*pool(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()],
        [*pool(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()],
    ]


def _vgg_stages() -> list[list[nn.Module]]:
    """The five stages of the shift-tolerant VGG-16, each up to its last ReLU: strides 1, 2, 4, 8, 16."""
    stages, channels = [], 3
    for plan in VGG_STAGES:
        layers = []
        for layer in plan:
            if layer == "pool":
                layers += [nn.MaxPool2d(2, stride=1), BlurDownsample(channels)]
            else:
                layers += [nn.Conv2d(channels, layer, 3, padding=1), nn.ReLU()]
                channels = layer
        stages.append(layers)
    return stages


NETWORKS = {"alex": _alexnet_stages, "vgg": _vgg_stages}


class PerceptualDistance(nn.Module):
    """ST-LPIPS between two batches of pictures: frozen, in eval mode; gradients flow to the pictures.

    It computes in the precision of its weights, and the distances in float32.

    Attributes:
        channels: of the five feature maps that `features` returns.
    """

    def __init__(self, network: str = "alex"):
        super().__init__()
        stages = NETWORKS[network]()
        self.stages = nn.ModuleList(nn.Sequential(*layers) for layers in stages)
        self.channels = [[layer for layer in layers if isinstance(layer, nn.Conv2d)][-1].out_channels for layers in stages]
        self.weights = nn.ParameterList(torch.zeros(1, channels, 1, 1) for channels in self.channels)
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def features(self, images: torch.Tensor, stages: int = 5) -> list[torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1], H and W at least `SMALLEST_SIDE` -> what the first `stages` stages put out, each
        (B, channels, about H/stride, about W/stride). UserError for smaller pictures."""
        if min(images.shape[2:]) < SMALLEST_SIDE:
            raise UserError(f"ST-LPIPS: needs pictures of at least {SMALLEST_SIDE} px, these are {tuple(images.shape[2:])}")
        hidden, outputs = (images.to(self.shift.dtype) - self.shift) / self.scale, []
        for stage in self.stages[:stages]:
            hidden = stage(hidden)
            outputs.append(hidden)
        return outputs

    def distance(self, first: list[torch.Tensor], second: list[torch.Tensor]) -> torch.Tensor:
        """What `features` made of two batches -> distances (B), float32: the weighted squared difference of the unit feature
        vectors, mean over positions, sum over stages. 0 where the pictures agree."""
        return sum(
            ((unit(one) - unit(other)).square() * weight.float()).sum(dim=1).mean(dim=(1, 2))
            for one, other, weight in zip(first, second, self.weights)
        )

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Two batches of pictures (B, 3, H, W) in [-1, 1] -> distances (B)."""
        return self.distance(self.features(first), self.features(second))


def unit(features: torch.Tensor) -> torch.Tensor:
    """Features (B, C, h, w), each position's vector scaled to length 1, float32; a vector of zeros stays, and its gradient is
    finite."""
    features = features.float()
    return features / ((features.square().sum(dim=1, keepdim=True) + EPSILON**2).sqrt() + EPSILON)


def st_lpips(network: str = "alex", device: str | torch.device = "cpu") -> PerceptualDistance:
    """ST-LPIPS with the published weights of "alex" or "vgg", float32. UserError without the package or its file."""
    distance, path = PerceptualDistance(network), _weights_file(network)
    try:
        distance.load_state_dict(_renamed(torch.load(path, map_location="cpu", weights_only=True), network))
    except Exception as error:  # truncated, of another version, no file of weights: each fails in its own way
        raise UserError(
            f"ST-LPIPS weights {path}: cannot be read ({one_line(error)}); reinstall the package {PACKAGE}"
        ) from None
    return distance.to(device, memory_format=torch.channels_last)


def _weights_file(network: str) -> Path:
    """Where the package keeps a network's weights; UserError without the package."""
    try:
        found = importlib.util.find_spec(PACKAGE)  # finds a top-level package without running any of it
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"the package {PACKAGE}, which carries its weights, is not installed; pip install {PACKAGE}")
    return Path(next(iter(found.submodule_search_locations))) / "weights" / "vST0.0" / f"{network}_shift_tolerant.pth"


def _renamed(stored: dict, network: str) -> dict:
    """The package's weights by this module's names. Its stages count their layers on from one stage to the next
    (`net.slice2.5.weight` is the sixth layer of all); a stage's weights are called `lin0.model.1.weight`."""
    weights = {name: stored[f"scaling_layer.{name}"] for name in ("shift", "scale")}
    first = 0
    for number, layers in enumerate(NETWORKS[network]()):
        weights[f"weights.{number}"] = stored[f"lin{number}.model.1.weight"]
        for place, layer in enumerate(layers):
            for name in layer.state_dict():
                weights[f"stages.{number}.{place}.{name}"] = stored[f"net.slice{number + 1}.{first + place}.{name}"]
        first += len(layers)
    return weights
