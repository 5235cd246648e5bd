"""The loss on the decoded image: how what VAE2's frozen decoder makes of the aligned latents differs from a reference."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from evaluation.st_lpips import PerceptualDistance
from latents.pipeline import PipelineWithVAEs, encoded_batches
from latents.spaces import Codec
from training.reencoded import Reencoded
from training.window import Window, draw_window

BIAS_RATE = 0.01  # of the remaining colour bias, per step: a hundred steps correct it, and as many are averaged over
LARGEST_CORRECTION = 8 / 127.5  # eight 8-bit levels: a bias that no correction moves must not shift the reference without end
COLOUR_WINDOWS = 256  # windows that give VAE2's mean colours to a fifth of an 8-bit level, its pattern to a tenth

KINDS = {"l1": F.l1_loss, "mse": F.mse_loss}


class ColourReference:
    """The shift of the reference by which the aligned images get the mean colours of VAE2's reconstruction, at each place
    within a latent.

    A colour bias of a level or two costs the loss less than the errors of detail do, so a loss of detail alone leaves the
    images a little too dark. Nor does it feel that the stride x stride pixels of a latent are off by a fixed pattern of a
    level, which on flat areas is a visible grid. An integral controller corrects both: after each step the shift moves against
    the bias that the aligned images had beyond VAE2's, until the two agree in the mean over many steps.

    Args:
        stride: of VAE2's latents.

    Attributes, each (3, stride, stride) in image values, where 1 is half of the range:
        vae2_bias: mean of VAE2's reconstruction minus that of the originals. shift: what is added to the reference.
    """

    def __init__(self, device: torch.device, stride: int):
        self.vae2_bias = torch.zeros(3, stride, stride, device=device)
        self.shift = self.vae2_bias

    def bias_of(self, decoded: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """By how much decoded pictures (B, 3, H, W) of whole latents exceed those wanted in the mean, without a gradient."""
        stride = self.shift.shape[-1]
        return (decoded.detach() - wanted).unflatten(3, (-1, stride)).unflatten(2, (-1, stride)).mean(dim=(0, 2, 4))

    def shifted(self, reference: torch.Tensor) -> torch.Tensor:
        """A reference (B, 3, H, W) as the aligned images are to be compared with it."""
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
    """What VAE2's decoder shows in a step's window. Each part is made once, and only if a term asks for it.

    Attributes, pictures (B, 3, H, W) in image values of the part of the window that is compared:
        shown: the decoded aligned latents, with their gradient, not clamped. wanted: what its pixels should be.
        visible: what is shown as a viewer sees it, clamped to [-1, 1].
        visible_wanted: what that should look like: `wanted`, or VAE1's picture where that has a share in it, since a mixture of
            two pictures is none.
        vae2: what the decoder makes of VAE2's latents, clamped too.
        features, wanted_features, vae2_features: what the frozen network `eyes` sees in those three.
        decoder_features, wanted_decoder_features: what the decoder's stages put out, see `decoder_features`.
        bias: by how much `shown` exceeds the reference in the mean, see `ColourReference`.
    """

    def __init__(self, loss: DecodedImageLoss, aligned, target, images, step: int, reencoded: Reencoded | None = None):
        self._codec, self._eyes, self._target = loss.codec, loss.eyes, target
        self._reencoded = reencoded
        self._by_decoder = decoder_difference in (term for _, term in loss.terms)
        self.window = loss.window_of(aligned.shape[2:], step)
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
        with decoder_features(self._codec.vae.model, self._by_decoder) as features:
            return self._codec.decode(latents)[self._inner], features

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

    @cached_property
    def vae2(self) -> torch.Tensor:
        return self._vae2[0].clamp(-1, 1)

    @cached_property
    def features(self) -> list[torch.Tensor]:
        return self._eyes.features(self.visible)

    @cached_property
    @torch.no_grad()
    def wanted_features(self) -> list[torch.Tensor]:
        return self._eyes.features(self.visible_wanted)

    @cached_property
    @torch.no_grad()
    def vae2_features(self) -> list[torch.Tensor]:
        return self._eyes.features(self.vae2)

    def eyes_distance(self) -> torch.Tensor:
        """How far apart `eyes` find what is shown and what is wanted: (B,)."""
        return self._eyes.distance(self.features, self.wanted_features)


# Terms: functions (DecodedWindow) -> scalar. Another one is a function of that form and a line in `objective._terms`.


def pixel_difference(kind: str) -> Callable[[DecodedWindow], torch.Tensor]:
    """The term of that name in `KINDS`: the absolute or squared difference by pixel."""
    return lambda window: KINDS[kind](window.shown, window.wanted)


def decoder_difference(window: DecodedWindow) -> torch.Tensor:
    """How far the decoder's own features are from those of VAE2's latents (see `feature_distance`)."""
    return feature_distance(window.decoder_features, window.wanted_decoder_features)


def eyes_difference(window: DecodedWindow) -> torch.Tensor:
    """The mean ST-LPIPS distance, by the network whose features are at hand."""
    return window.eyes_distance().mean()


def picture_distance(network: Callable) -> Callable[[DecodedWindow], torch.Tensor]:
    """The mean of a function (pictures, wanted pictures) -> distances, such as LPIPS."""
    return lambda window: network(window.visible, window.visible_wanted).mean()


@dataclass
class DecodedImageLoss:
    """Weighted terms on how the decoded aligned latents differ from a reference picture, in image values [-1, 1].

    Gradients flow through the frozen decoder into the aligned latents. To stay affordable it decodes the first
    `batch_size` items of a batch, of each a random window of `window` x `window` latents (0: the whole).

    Args:
        codec: the `latents.spaces.Codec` to decode with: VAE2's, or a cheaper one that shares its latent space.
        reference: "original" compares with the image that was encoded, in VAE2's colours (see `ColourReference`), "vae2" with
            what the decoder makes of VAE2's latents.
        margin: latents at the window's edge that are decoded and not compared, since the decoder lacks their surroundings.
        terms: (weight, function of a `DecodedWindow`) each.
        eyes: the frozen network whose features terms look at, such as that of ST-LPIPS; None where no term does.
    """

    codec: Codec
    batch_size: int
    window: int
    reference: str
    seed: int
    margin: int = 1
    terms: Sequence[tuple[float, Callable]] = ((1.0, pixel_difference("l1")),)
    eyes: PerceptualDistance | None = None

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

        Where `reencoded` is given, VAE1's picture has its share in the reference of pixels, and is the reference of whatever
        looks at features or at whole pictures.
        """
        window = DecodedWindow(self, aligned, target, images, step, reencoded)
        loss = aligned.new_zeros(())
        for weight, term in self.terms:
            loss = loss + weight * term(window)
        return loss, window

    def measure_colours(self, pipeline: PipelineWithVAEs, loader, accelerator) -> None:
        """Take VAE2's colour bias from some training images. Where VAE2's reconstruction is the reference it has none."""
        if self.reference == "original":
            batches = encoded_batches(pipeline, loader, accelerator, COLOUR_WINDOWS, self.batch_size, images_needed=True)
            self.colours.start_from(self._biases_of_vae2(batches), accelerator)

    @torch.no_grad()
    def _biases_of_vae2(self, batches):
        for step, (_, target, images) in enumerate(batches):
            yield DecodedWindow(self, target, target, images, step).bias

    def window_of(self, whole: torch.Size, step: int) -> Window:
        """The window of a step on latents of that height and width."""
        return draw_window(tuple(whole), self.window, self.batch_size, self.seed, step)


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
