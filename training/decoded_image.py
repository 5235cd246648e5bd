"""The loss on the decoded image: how what VAE2's frozen decoder makes of the aligned latents differs from a reference."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from latents.pipeline import PipelineWithVAEs, encoded_batches
from latents.spaces import Codec

BIAS_RATE = 0.01  # of the remaining colour bias, per step: a hundred steps correct it, and as many are averaged over
LARGEST_CORRECTION = 8 / 127.5  # eight 8-bit levels: a bias that no correction moves must not shift the reference without end
COLOUR_WINDOWS = 256  # windows that give VAE2's mean colours to a fifth of an 8-bit level

KINDS = {"l1": F.l1_loss, "mse": F.mse_loss}


class ColourReference:
    """The shift of the reference's R, G and B by which the aligned images get the mean colours of VAE2's reconstruction.

    A colour bias of a level or two costs the loss less than the errors of detail do, so a loss of detail alone leaves the
    images a little too dark. An integral controller corrects it: after each step the shift moves against the bias that the
    aligned images had beyond VAE2's, until the two agree in the mean over many steps.

    Attributes, each (3,) in image values, where 1 is half of the range:
        vae2_bias: mean colour of VAE2's reconstruction minus that of the originals.
        shift: what is added to the reference.
    """

    def __init__(self, device: torch.device):
        self.vae2_bias = torch.zeros(3, device=device)
        self.shift = self.vae2_bias

    def start_from(self, biases, accelerator) -> None:
        """Take VAE2's bias as the mean of `biases`, one (3,) for each batch, over all processes; the shift starts there."""
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
        """ValueError for anything but two tensors of three colours."""
        device = self.shift.device
        vae2_bias, shift = (state[name].to(device) for name in ("vae2_bias", "shift"))
        if vae2_bias.shape != (3,) or shift.shape != (3,):
            raise ValueError(f"colours of shape {tuple(vae2_bias.shape)} and {tuple(shift.shape)}")
        self.vae2_bias = vae2_bias
        self.shift = shift


@dataclass
class DecodedImageLoss:
    """The weighted difference between the decoded aligned latents and a reference picture, in image values [-1, 1].

    Gradients flow through the frozen decoder into the aligned latents. To stay affordable it decodes the first
    `batch_size` items of a batch, of each a random window of `window` x `window` latents (0: the whole).

    Args:
        codec: the `latents.spaces.Codec` to decode with: VAE2's, or a cheaper one that shares its latent space.
        reference: "original" compares with the image that was encoded, in VAE2's colours (see `ColourReference`), "vae2" with
            what the decoder makes of VAE2's latents.
        margin: latents at the window's edge that are decoded and not compared, since the decoder lacks their surroundings.
        kind, weight: "l1" takes the absolute difference by pixel, "mse" the squared one; and its factor.
        perceptual: a function (decoded, reference pictures) -> distances, such as LPIPS, or "decoder": how far the decoder's
            own features are from those of VAE2's latents (see `feature_distance`); None for neither.
        perceptual_weight: the factor of that distance.
    """

    codec: Codec
    batch_size: int
    window: int
    reference: str
    seed: int
    margin: int = 1
    kind: str = "l1"
    weight: float = 1.0
    perceptual: Callable | str | None = None
    perceptual_weight: float = 0.0

    def __post_init__(self):
        self.colours = ColourReference(self.codec.vae.device)

    def __call__(self, aligned: torch.Tensor, target: torch.Tensor, images: torch.Tensor | None, step: int):
        """Aligned and target latents (B, C, h, w), images (B, 3, H, W) in [-1, 1], all on the codec's device -> (the loss, a
        scalar; the colour bias of what was decoded, (3,)). The window depends on (seed, step) alone."""
        cut, inner = self._window(aligned.shape[2:], step)
        by_features = self.perceptual == "decoder"
        with decoder_features(self.codec.vae.model, by_features) as features:
            decoded = self.codec.decode(cut(aligned))
        if self.reference == "vae2" or by_features:
            with torch.no_grad(), decoder_features(self.codec.vae.model, by_features) as wanted_features:
                wanted = self.codec.decode(cut(target))
        if self.reference == "original":
            wanted = cut(images, self.codec.stride)
        bias = _colour_bias(decoded[inner], wanted[inner])
        wanted = wanted + self.colours.shift.view(3, 1, 1)
        loss = self.weight * KINDS[self.kind](decoded[inner], wanted[inner])
        if by_features:
            loss = loss + self.perceptual_weight * feature_distance(features, wanted_features)
        elif self.perceptual:
            distances = self.perceptual(decoded[inner].clamp(-1, 1), wanted[inner].clamp(-1, 1))
            loss = loss + self.perceptual_weight * distances.mean()
        return loss, bias

    def measure_colours(self, pipeline: PipelineWithVAEs, loader, accelerator) -> None:
        """Take VAE2's colour bias from some training images. Where VAE2's reconstruction is the reference it has none."""
        if self.reference == "original":
            batches = encoded_batches(pipeline, loader, accelerator, COLOUR_WINDOWS, self.batch_size, images_needed=True)
            self.colours.start_from(self._biases_of_vae2(batches), accelerator)

    @torch.no_grad()
    def _biases_of_vae2(self, batches):
        for step, (_, target, images) in enumerate(batches):
            cut, inner = self._window(target.shape[2:], step)
            yield _colour_bias(self.codec.decode(cut(target))[inner], cut(images, self.codec.stride)[inner])

    def _window(self, size: torch.Size, step: int):
        """Of a step, on latents of that height and width: the function that cuts the window out of a batch, and the index of
        the part of the decoded window that is compared."""
        stride = self.codec.stride
        height, width = size
        high, wide = min(self.window or height, height), min(self.window or width, width)
        # the place is drawn from half a window beyond the edges and then moved inside, so that the outermost latents are
        # decoded in a quarter of the steps; drawn from inside alone, they would be decoded in one of many
        at = 2 * np.random.default_rng((self.seed, step)).random(2) - 0.5
        top, left = (round(place * slack) for place, slack in zip(at.clip(0, 1), (height - high, width - wide)))

        def cut(tensor, scale=1):
            tensor = tensor[: self.batch_size]
            return tensor[..., top * scale : (top + high) * scale, left * scale : (left + wide) * scale]

        # at an edge of the image the decoder sees all that there is, so nothing is left out there
        margin = min(self.margin, (min(high, wide) - 1) // 2) * stride
        above, below, before, after = (margin * (side > 0) for side in (top, height - top - high, left, width - left - wide))
        return cut, (..., slice(above, high * stride - below), slice(before, wide * stride - after))


def _colour_bias(decoded: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """By how much the mean R, G and B of decoded pictures (B, 3, H, W) exceed those wanted: (3,), without a gradient."""
    return (decoded.detach() - wanted).mean(dim=(0, 2, 3))


@contextlib.contextmanager
def decoder_features(vae, wanted: bool = True):
    """Within this context collect what the stages of `vae`'s decoder put out: a list with a list of tensors per stage."""
    features, hooks = [], []
    for stage in decoder_stages(vae.decoder) if wanted else ():
        kept = []
        features.append(kept)
        hooks.append(stage.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output)))
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


def decoder_stages(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The last layer at each resolution but the finest: an AutoencoderKL's up blocks, a tiny one's layers before upsampling."""
    if hasattr(decoder, "up_blocks"):
        return list(decoder.up_blocks)[:-1]
    return [layer for layer, following in itertools.pairwise(decoder.layers) if isinstance(following, torch.nn.Upsample)]


def feature_distance(features: list, wanted: list) -> torch.Tensor:
    """Mean squared difference relative to the wanted features' mean square, averaged over the stages: 0 where they agree."""
    distances = []
    for stage, reference in zip(features, wanted):
        stage, reference = torch.cat(stage).float(), torch.cat(reference).float()
        distances.append(F.mse_loss(stage, reference) / reference.square().mean().clamp_min(1e-12))
    return torch.stack(distances).mean()
