"""What training minimises: losses on latents, on the decoded image, and on re-encoded targets, and their weighted sum.

A loss on latents is a function (prediction, target) of one shape -> a scalar, differentiable in prediction, and one line in
`LOSSES`. A loss on the decoded image is a function (DecodedWindow) -> a scalar and one line in `decoded_image_loss`.
"""

from __future__ import annotations

import importlib.util
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils import UserError, file_digest, one_line, read_torch
from vaes.codec import Codec, SeenThrough, decode_picture
from vaes.pipeline import PipelineWithVAEs, encoded_batches


def weighted_l1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on latents (B, C, h, w) that counts errors on detail more than errors on flat areas.

    An element's contrast is the target's distance from the mean of its 3x3 neighbourhood. Its weight is 1 plus this contrast
    divided by the channel's mean contrast. The weights are scaled to mean 1, so that values compare with `l1`. Most of a photo
    is smooth, and a plain mean hides the errors on edges and texture, which decoders turn into artefacts.
    """
    with torch.no_grad():
        smooth = F.avg_pool2d(target, 3, stride=1, padding=1, count_include_pad=False)
        contrast = (target - smooth).abs()
        weight = 1 + contrast / contrast.mean(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6)
        weight = weight / weight.mean()
    return (weight * (prediction - target).abs()).mean()


def channel_moments(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared differences of each channel's mean and standard deviation, over a batch of latents (B, C, h, w); a scalar.

    The mean over channels of (difference of means)² + (difference of standard deviations)². A squared error alone shrinks the
    unpredictable part of a channel towards its mean. Losses on decoded images shift the channels that hold a decoder's
    sharpness. A shift of a tenth of a standard deviation halves the finest detail and adds little squared error.
    """
    means, deviations = zip(_moments(prediction), _moments(target))
    return F.mse_loss(*means) + F.mse_loss(*deviations)


def _moments(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    variance, mean = torch.var_mean(latents.float(), dim=(0, 2, 3), correction=0)
    return mean, (variance + 1e-6).sqrt()  # a constant channel has a gradient too


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "weighted_l1": weighted_l1,
}


def get_loss_function(loss_type: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss of that name: a function (prediction, target) -> scalar tensor. UserError for an unknown name."""
    if loss_type not in LOSSES:
        raise UserError(f"loss_type {loss_type}: choose from {', '.join(LOSSES)}")
    return LOSSES[loss_type]


# ----------------------------------------------------------------------------------------------------------------------
# Re-encoded targets


@dataclass
class Reencoded:
    """What decode + re-encode makes of a batch.

    Attributes:
        latents: VAE2's latents of the picture that VAE1 decodes, (B, channels, h, w).
        picture: that picture, (B, 3, H, W) in [-1, 1]; None where the cache left it out because no loss reads it.
        weight: share of the re-encoded latents in the target, in [0, 1).
    """

    latents: torch.Tensor
    picture: torch.Tensor | None
    weight: float


def reencoded_of(batch: dict, source: torch.Tensor | None, codec1: Codec, codec2: Codec, weight: float) -> Reencoded:
    """Out of the latent cache, or where it has none made without gradients: decoded with VAE1 and encoded with VAE2.

    `source` are VAE1's latents of the training batch, (B, channels, h, w); None is fine where the batch has the picture.
    """
    on_device = {"device": codec2.vae.device, "non_blocking": True}
    latents, picture = (batch[name].to(**on_device) if name in batch else None for name in ("reencoded", "decoded"))
    if latents is None:
        picture = decode_picture(source, codec1) if picture is None else picture
        latents = codec2.encode(picture)
    return Reencoded(latents, picture, weight)


# ----------------------------------------------------------------------------------------------------------------------
# The decoded image


@dataclass(frozen=True)
class Window:
    """A rectangle of latents in the first `items` of a batch.

    Attributes:
        items: of the batch. top, left, height, width: of the rectangle, latents. whole: height and width of all latents.
    """

    items: int
    top: int
    left: int
    height: int
    width: int
    whole: tuple[int, int]

    def cut(self, tensor: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """The window of a batch (B, C, h, w) that has `scale` values where latents have one."""
        rows = slice(self.top * scale, (self.top + self.height) * scale)
        return tensor[: self.items][..., rows, self.left * scale : (self.left + self.width) * scale]

    def inner(self, margin: int, stride: int) -> tuple:
        """The index of a decoded window's part that is at least `margin` latents from latents which the decoder did not see.

        At an edge of the image the decoder sees everything, so nothing is left out there."""
        margin = min(margin, (min(self.height, self.width) - 1) // 2) * stride
        below, right = self.whole[0] - self.top - self.height, self.whole[1] - self.left - self.width
        above, under, before, after = (margin * (room > 0) for room in (self.top, below, self.left, right))
        return ..., slice(above, self.height * stride - under), slice(before, self.width * stride - after)


def draw_window(whole: tuple[int, int], side: int, items: int, seed: int, step: int) -> Window:
    """The window of a step on latents (height, width), `side` latents wide (0: all of them); a function of (seed, step)."""
    high, wide = (min(side or length, length) for length in whole)
    # the place is drawn from half a window beyond the edges and then moved inside, so that the outermost latents are
    # decoded in a quarter of the steps; drawn from inside alone, they would be decoded in one of many
    at = 2 * np.random.default_rng((seed, step)).random(2) - 0.5
    top, left = (round(place * slack) for place, slack in zip(at.clip(0, 1), (whole[0] - high, whole[1] - wide)))
    return Window(items, top, left, high, wide, tuple(whole))


BIAS_RATE = 0.01  # of the remaining colour bias, per step: a hundred steps correct it, and as many are averaged over
LARGEST_CORRECTION = 8 / 127.5  # eight 8-bit levels: a bias that no correction moves must not shift the reference without end
COLOUR_WINDOWS = 256  # windows that give VAE2's mean colours to a fifth of an 8-bit level, its pattern to a tenth

KINDS = {"l1": F.l1_loss, "mse": F.mse_loss}
PERCEPTUAL_LOSSES = ("decoder", "lpips", "stlpips")


class ColourReference:
    """A shift of the reference that gives the aligned images the mean colours of VAE2's reconstruction.

    A colour bias of one or two 8-bit levels costs the loss less than errors of detail do, so training leaves it in the images.
    The same holds for a fixed pattern of one level within the stride x stride pixels of a latent, a visible grid on flat areas.
    An integral controller corrects both. After each step it moves the shift against the bias that the aligned images had beyond
    VAE2's, until the two agree in the mean over many steps.

    Args:
        stride: of VAE2's latents.

    Attributes, each (3, stride, stride) in image values, where 1 is half of the range:
        vae2_bias: mean of VAE2's reconstruction minus that of the originals. shift: what is added to the reference.
    """

    def __init__(self, device: torch.device, stride: int):
        self.vae2_bias = torch.zeros(3, stride, stride, device=device)
        self.shift = self.vae2_bias

    def bias_of(self, decoded: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Mean excess of decoded pictures (B, 3, H, W) over the wanted ones at each place within a latent, without gradient."""
        stride = self.shift.shape[-1]
        return (decoded.detach() - wanted).unflatten(3, (-1, stride)).unflatten(2, (-1, stride)).mean(dim=(0, 2, 4))

    def shifted(self, reference: torch.Tensor) -> torch.Tensor:
        """A reference (B, 3, H, W) with the shift added."""
        rows, columns = (side // self.shift.shape[-1] for side in reference.shape[2:])
        return reference + self.shift.repeat(1, rows, columns)

    def start_from(self, biases, accelerator) -> None:
        """Take VAE2's bias as the mean of `biases`, one for each batch, over all processes; the shift starts there."""
        total = torch.zeros_like(self.vae2_bias)
        count = 0
        for bias in biases:
            total = total + bias
            count += 1
        total, count = (accelerator.reduce(number, "sum") for number in (total, total.new_tensor(count)))
        self.vae2_bias = self.shift = total / count.clamp_min(1)

    def correct(self, bias: torch.Tensor, ok: torch.Tensor, accelerator) -> None:
        """After a step whose aligned images had this `bias`; a step that was not `ok` changes nothing."""
        error = accelerator.reduce(torch.where(ok, bias - self.vae2_bias, 0), "mean")
        shift = self.shift - BIAS_RATE * error
        self.shift = self.vae2_bias + (shift - self.vae2_bias).clamp(-LARGEST_CORRECTION, LARGEST_CORRECTION)

    def state_dict(self) -> dict:
        """Tensors on the CPU."""
        return {"vae2_bias": self.vae2_bias.cpu(), "shift": self.shift.cpu()}

    def load_state_dict(self, state: dict) -> None:
        """ValueError for anything but two tensors of three colours at each place."""
        device, shape = self.shift.device, self.shift.shape
        vae2_bias, shift = (state[name].to(device) for name in ("vae2_bias", "shift"))
        if vae2_bias.shape != shape or shift.shape != shape:
            raise ValueError(f"colours of shape {tuple(vae2_bias.shape)} and {tuple(shift.shape)}")
        self.vae2_bias = vae2_bias
        self.shift = shift


class DecodedWindow:
    """A step's window as VAE2's decoder shows it. Each part is computed once, and only if a term asks for it.

    Attributes, pictures (B, 3, H, W) in image values of the part of the window that is compared:
        shown: the decoded aligned latents, with their gradient, not clamped. wanted: the reference of its pixels.
        visible: `shown`, clamped to [-1, 1] as a viewer sees it.
        visible_wanted: its reference; VAE1's picture where that has a share in `wanted`, since a mixture of two is no picture.
        decoder_features, wanted_decoder_features: see `Codec.decode_with_features`.
        bias: mean excess of `shown` over the reference, see `ColourReference`.
    """

    def __init__(self, loss: DecodedImageLoss, aligned, target, images, step: int, reencoded: Reencoded | None = None):
        self._codec, self._target, self._reencoded = loss.codec, target, reencoded
        self._by_decoder = decoder_difference in (term for _, term in loss.terms)
        self.window = draw_window(aligned.shape[2:], loss.window, loss.batch_size, loss.seed, step)
        self._inner = self.window.inner(loss.margin, self._codec.stride)
        self.shown, self.decoder_features = self._decode(self.window.cut(aligned))
        by_image = loss.reference == "original"
        reference = self.window.cut(images, self._codec.stride)[self._inner] if by_image else self._vae2[0]
        self.bias = loss.colours.bias_of(self.shown, reference)
        self.wanted = self._seen_wanted = loss.colours.shifted(reference)
        if reencoded:
            self._seen_wanted = loss.colours.shifted(self.window.cut(reencoded.picture, self._codec.stride)[self._inner])
            self.wanted = self.wanted.lerp(self._seen_wanted, reencoded.weight)

    def _decode(self, latents):
        if not self._by_decoder:
            return self._codec.decode(latents)[self._inner], []
        shown, features = self._codec.decode_with_features(latents)
        return shown[self._inner], features

    @cached_property
    @torch.no_grad()
    def _vae2(self):
        return self._decode(self.window.cut(self._target))

    @cached_property
    @torch.no_grad()
    def wanted_decoder_features(self) -> list:
        return self._decode(self.window.cut(self._reencoded.latents))[1] if self._reencoded else self._vae2[1]

    @cached_property
    def visible(self) -> torch.Tensor:
        return self.shown.clamp(-1, 1)

    @cached_property
    def visible_wanted(self) -> torch.Tensor:
        return self._seen_wanted.clamp(-1, 1)


# Terms: functions (DecodedWindow) -> a scalar. `decoded_image_loss` chooses among them.


def pixel_difference(kind: str) -> Callable[[DecodedWindow], torch.Tensor]:
    """The term of that name in `KINDS`: the absolute or squared difference by pixel."""
    return lambda window: KINDS[kind](window.shown, window.wanted)


def decoder_difference(window: DecodedWindow) -> torch.Tensor:
    """Distance of the decoder's own features from those of VAE2's latents, see `feature_distance`."""
    return feature_distance(window.decoder_features, window.wanted_decoder_features)


def picture_distance(network: Callable) -> Callable[[DecodedWindow], torch.Tensor]:
    """The mean of a function (pictures, wanted pictures) -> distances, such as LPIPS or ST-LPIPS."""
    return lambda window: network(window.visible, window.visible_wanted).mean()


@dataclass
class DecodedImageLoss:
    """Weighted terms on the difference between the decoded aligned latents and a reference picture, in image values [-1, 1].

    Gradients flow through the frozen decoder into the aligned latents. To save time it decodes only the first `batch_size`
    items of a batch, and of each a random window of `window` x `window` latents (0: all latents).

    Args:
        codec: the `vaes.codec.Codec` to decode with: VAE2's, or a cheaper one that shares its latent space.
        reference: "original" compares with the image that was encoded, in VAE2's colours (see `ColourReference`), "vae2" with
            the decoded VAE2 latents.
        margin: latents at the window's edge that are decoded and not compared, since the decoder lacks their surroundings.
        terms: (weight, function of a `DecodedWindow`) each.
    """

    codec: Codec
    batch_size: int
    window: int
    reference: str
    seed: int
    margin: int = 1
    terms: Sequence[tuple[float, Callable]] = ((1.0, pixel_difference("l1")),)

    def __post_init__(self):
        self.colours = ColourReference(self.codec.vae.device, self.codec.stride)

    def __call__(
        self,
        aligned: torch.Tensor,
        target: torch.Tensor,
        images: torch.Tensor | None,
        step: int,
        reencoded: Reencoded | None = None,
    ):
        """Aligned and target latents (B, C, h, w), images (B, 3, H, W) in [-1, 1], all on the codec's device -> (the loss, a
        scalar; the `DecodedWindow` of what was decoded). The window depends on (seed, step) alone.

        With `reencoded`, VAE1's picture has its share in the reference of pixels. It is the whole reference of terms that look
        at features or pictures.
        """
        window = DecodedWindow(self, aligned, target, images, step, reencoded)
        loss = aligned.new_zeros(())
        for weight, term in self.terms:
            loss = loss + weight * term(window)
        return loss, window

    @torch.no_grad()
    def measure_colours(self, pipeline: PipelineWithVAEs, loader, accelerator) -> None:
        """Measure VAE2's colour bias on some training images. With the reference "vae2" there is none."""
        if self.reference == "original":
            batches = encoded_batches(pipeline, loader, accelerator, COLOUR_WINDOWS, self.batch_size, images_needed=True)
            windows = (DecodedWindow(self, target, target, images, step) for step, (_, target, images) in enumerate(batches))
            self.colours.start_from((window.bias for window in windows), accelerator)


def decoded_image_loss(
    codec: Codec,
    image_size: int,
    *,
    pixel_weight: float = 0.0,
    pixel_kind: str = "l1",
    perceptual_weight: float = 0.0,
    perceptual_loss: str = "decoder",
    batch_size: int = 4,
    window: int = 16,
    reference: str = "original",
    seed: int = 0,
) -> DecodedImageLoss | None:
    """The losses on the decoded image with a weight above 0; None where there is none.

    Args:
        codec, batch_size, window, reference, seed: of `DecodedImageLoss`. image_size: side of the training images, pixels.
        pixel_kind: key of `KINDS`. perceptual_loss: one of `PERCEPTUAL_LOSSES`.

    UserError, which begins with the setting's name, where a network's weights are missing or the window is too small for it.
    """
    terms = []
    if pixel_weight:
        terms.append((pixel_weight, pixel_difference(pixel_kind)))
    if perceptual_weight:
        term = decoder_difference
        if perceptual_loss == "stlpips":
            _require_side(image_size, window, codec.stride)
        try:
            if perceptual_loss == "lpips":
                term = picture_distance(lpips_network(codec.vae.device))
            elif perceptual_loss == "stlpips":  # AlexNet: the verdict of an evaluation looks through VGG
                term = picture_distance(st_lpips("alex", codec.vae.device).to(codec.vae.dtype))
        except UserError as error:
            remedy = "or choose the perceptual loss decoder, which needs no weights"
            raise UserError(f"perceptual_loss {perceptual_loss}: {error}; {remedy}") from None
        terms.append((perceptual_weight, term))
    return DecodedImageLoss(codec, batch_size, window, reference, seed, terms=terms) if terms else None


def _require_side(image_size: int, window: int, stride: int) -> None:
    """UserError where the compared part of a window is too small for ST-LPIPS."""
    whole = image_size // stride
    window = min(window or whole, whole)
    margins = 2 * DecodedImageLoss.margin * (window < whole)
    if (window - margins) * stride >= SMALLEST_SIDE:
        return
    if window == whole:
        raise UserError(f"image_size {image_size}: ST-LPIPS needs at least {SMALLEST_SIDE} px")
    least = -(-SMALLEST_SIDE // stride) + 2 * DecodedImageLoss.margin
    raise UserError(f"decoder_loss_window {window}: ST-LPIPS needs at least {least} latents")


def feature_distance(features: list, wanted: list) -> torch.Tensor:
    """Mean squared difference relative to the wanted features' mean square, averaged over the stages: 0 where they agree."""
    distances = []
    for stage, reference in zip(features, wanted):
        stage, reference = stage.float(), reference.float()
        distances.append(F.mse_loss(stage, reference) / reference.square().mean().clamp_min(1e-12))
    return torch.stack(distances).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Perceptual networks


PACKAGE = "stlpips_pytorch"
STLPIPS_SHA256 = {
    "alex": "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee",
    "vgg": "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250",
}
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
    """

    def __init__(self, network: str = "alex"):
        super().__init__()
        stages = NETWORKS[network]()
        self.stages = nn.ModuleList(nn.Sequential(*layers) for layers in stages)
        last = ([layer for layer in layers if isinstance(layer, nn.Conv2d)][-1] for layers in stages)
        self.weights = nn.ParameterList(torch.zeros(1, layer.out_channels, 1, 1) for layer in last)
        self.register_buffer("shift", torch.zeros(1, 3, 1, 1))
        self.register_buffer("scale", torch.ones(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, H, W) in [-1, 1], H and W at least `SMALLEST_SIDE` -> the outputs of the five stages, each
        (B, channels, about H/stride, about W/stride). UserError for smaller pictures."""
        if min(images.shape[2:]) < SMALLEST_SIDE:
            raise UserError(f"ST-LPIPS: needs pictures of at least {SMALLEST_SIDE} px, these are {tuple(images.shape[2:])}")
        hidden, outputs = (images.to(self.shift.dtype) - self.shift) / self.scale, []
        for stage in self.stages:
            hidden = stage(hidden)
            outputs.append(hidden)
        return outputs

    def distance(self, first: list[torch.Tensor], second: list[torch.Tensor]) -> torch.Tensor:
        """The features of two batches -> distances (B), float32: the weighted squared difference of the unit feature
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
        if file_digest(path).hex() != STLPIPS_SHA256[network]:
            raise ValueError("its SHA-256 is not the published file's")
        # the published file has this module's tensors in the same order, under the names of the package's
        distance.load_state_dict(dict(zip(distance.state_dict(), read_torch(path).values(), strict=True)))
    except Exception as error:  # truncated, of another version, no file of weights: each fails in its own way
        raise UserError(
            f"ST-LPIPS weights {path}: cannot be read ({one_line(error)}); reinstall the package {PACKAGE}"
        ) from None
    return distance.to(device, memory_format=torch.channels_last)


def _weights_file(network: str) -> Path:
    """Where the package keeps a network's weights; UserError without the package."""
    found = importlib.util.find_spec(PACKAGE)  # finds a top-level package without running any of it
    if found is None or not found.submodule_search_locations:
        raise UserError(f"the package {PACKAGE}, which carries its weights, is not installed; pip install {PACKAGE}")
    return Path(next(iter(found.submodule_search_locations))) / "weights" / "vST0.0" / f"{network}_shift_tolerant.pth"


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
    file = weights_file(url.rsplit("/", 1)[-1])
    if not file.is_file():
        _download(url)
    try:
        read_torch(file)  # torchvision would run the code that another file asks to run
    except Exception as error:  # torch has errors of its own for a damaged file
        raise UserError(f"its weights {file}: cannot be read ({one_line(error)}); delete the file") from None
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
        torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
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


# ----------------------------------------------------------------------------------------------------------------------
# The sum


@dataclass
class Encoded:
    """A training batch, encoded and on the device.

    Attributes:
        inputs: keyword arguments of the module's `forward`.
        target: VAE2's scaled latents, (B, C, h, w).
        images: (B, 3, H, W) in [-1, 1]; None where no loss reads them.
        reencoded: the re-encoded target; None where no loss asks for it.
    """

    inputs: dict[str, torch.Tensor]
    target: torch.Tensor
    images: torch.Tensor | None = None
    reencoded: Reencoded | None = None


class Objective:
    """The weighted sum of the losses.

    Args:
        loss_type: key of `LOSSES`, of the loss on latents. loss_weight: its factor.
        moments_weight: factor of `channel_moments`; 0: none.
        reencode_weight: share of re-encoded latents in the target, in [0, 1); 0: none.
        decoded: the losses on the decoded image, or None. decoded_start: share of the run after which they begin.
        seen_through: shows the module images as other VAEs decode them, or None.
    """

    def __init__(
        self,
        pipeline: PipelineWithVAEs,
        loss_type: str = "mse",
        loss_weight: float = 1.0,
        moments_weight: float = 0.0,
        reencode_weight: float = 0.0,
        decoded: DecodedImageLoss | None = None,
        decoded_start: float = 0.0,
        seen_through: SeenThrough | None = None,
    ):
        self._pipeline = pipeline
        self.latent_loss = get_loss_function(loss_type)
        self.latent_weight, self.moments_weight = loss_weight, moments_weight
        self.decoded, self.decoded_start = decoded, decoded_start
        self._reads_images = decoded is not None and decoded.reference == "original"
        self.seen_through = seen_through
        self._reencode_weight = reencode_weight
        if reencode_weight and not (pipeline.uses_latents or seen_through):
            raise UserError(
                f"reencode_target {reencode_weight:g}: the module does not see VAE1's latents, which are re-encoded; "
                "train with latent among the input types"
            )

    def encode(self, batch: dict, sample: bool = False, generator: torch.Generator | None = None) -> Encoded:
        """A training batch as a step needs it; see `PipelineWithVAEs.encode_batch`."""
        if self.seen_through and "decoded" not in batch:
            batch = batch | {"decoded": self.seen_through(batch["pixel_values"].to(self._pipeline.device))}
        inputs, target, images = self._pipeline.encode_batch(batch, sample, generator, self._reads_images)
        if not self._reencode_weight:
            return Encoded(inputs, target, images)
        codecs = self._pipeline.codec1, self._pipeline.codec2
        return Encoded(inputs, target, images, reencoded_of(batch, inputs.get("latents"), *codecs, self._reencode_weight))

    def decodes_at(self, progress: float) -> bool:
        """Whether losses on the decoded image have begun after this share of the run, in [0, 1]."""
        return self.decoded is not None and progress >= self.decoded_start

    def __call__(self, aligned: torch.Tensor, encoded: Encoded, step: int, progress: float = 1.0):
        """Aligned latents (B, C, h, w), their batch, the step and the share of the run that is done, in [0, 1]
        -> (the loss, a scalar; the colour bias of the decoded window, or None without one)."""
        target, reencoded = encoded.target, encoded.reencoded
        latent_loss = self.latent_loss(aligned, target)
        if reencoded:
            latent_loss = latent_loss.lerp(self.latent_loss(aligned, reencoded.latents), reencoded.weight)
        loss, bias = self.latent_weight * latent_loss, None
        if self.moments_weight:
            loss = loss + self.moments_weight * channel_moments(aligned, target)
        if self.decodes_at(progress):
            decoded_loss, window = self.decoded(aligned, target, encoded.images, step, reencoded)
            loss, bias = loss + decoded_loss, window.bias
        return loss, bias

    def before_first_step(self, loader, accelerator) -> None:
        """Measure on some training images VAE2's colour bias, with which the decoded image is compared."""
        if self.decoded:
            self.decoded.measure_colours(self._pipeline, loader, accelerator)

    def after_step(self, bias: torch.Tensor | None, ok: torch.Tensor, accelerator) -> None:
        """Correct the colours after an optimizer step. `ok`: whether its loss and gradient were finite."""
        if bias is not None:
            self.decoded.colours.correct(bias, ok, accelerator)

    def state_dict(self) -> dict:
        return {"colours": self.decoded.colours.state_dict() if self.decoded else {}}

    def load_state_dict(self, state: dict) -> None:
        if self.decoded:
            self.decoded.colours.load_state_dict(state["colours"])
