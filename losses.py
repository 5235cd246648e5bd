"""Losses on latents: each takes (prediction, target) of one shape and returns a scalar, differentiable in prediction.

A new loss is a function of that form and one line in `LOSSES`; `--loss_type` then offers it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import logging
import math
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm.contrib.logging import logging_redirect_tqdm

from training.bad_steps import leave_out
from training.meter import Meter
from training.restore import load_optimizer, on_cpu
from utils import UserError, one_line
from vaes.codec import Codec, decode_picture
from vaes.loading import load_vae_model
from vaes.pipeline import PipelineWithVAEs, encoded_batches
from vaes.seen_through import SeenThrough

log = logging.getLogger(__name__)


def weighted_l1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on latents (B, C, h, w) that counts errors on detail more than errors on flat areas.

    The weight of an element is 1 plus its contrast, which is the target's distance from the mean of its 3x3 neighbourhood,
    divided by the mean contrast of its channel. The weights are then scaled to mean 1, so that values compare with `l1`. Most
    of a photo is smooth and soon learnt. Decoders turn errors on edges and texture into artefacts, and a plain mean over
    positions hides those errors.
    """
    with torch.no_grad():
        smooth = F.avg_pool2d(target, 3, stride=1, padding=1, count_include_pad=False)
        contrast = (target - smooth).abs()
        weight = 1 + contrast / contrast.mean(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6)
        weight = weight / weight.mean()
    return (weight * (prediction - target).abs()).mean()


def channel_moments(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How far the mean and the standard deviation of each channel of latents (B, C, h, w), over the whole batch, are off.

    The mean over channels of (difference of means)² + (difference of standard deviations)². A squared error alone shrinks
    what cannot be predicted towards its mean, and losses on decoded images move the mean of those channels that hold a
    decoder's sharpness: a tenth of a standard deviation halves the finest detail, at next to no cost in squared error.
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
# objective


PERCEPTUAL_LOSSES = ("decoder", "lpips", "stlpips")  # what --perceptual_loss offers


@dataclass
class Encoded:
    """A training batch, encoded and on the device.

    Attributes:
        inputs: keyword arguments of `AlignModule.forward`. target: VAE2's scaled latents (B, C, h, w). images: (B, 3, H, W) in
            [-1, 1], or None where nothing reads them. reencoded: what decode + re-encode makes of it, where that is asked for.
    """

    inputs: dict[str, torch.Tensor]
    target: torch.Tensor
    images: torch.Tensor | None = None
    reencoded: Reencoded | None = None


@dataclass
class Round:
    """What a discriminator is given in a step: its inputs from VAE2, those from the module, and the module's term for these."""

    adversary: Adversary
    real: list[torch.Tensor]
    made: list[torch.Tensor]
    term: torch.Tensor


@dataclass
class Seen:
    """What a step's loss leaves for `Objective.after_step`."""

    bias: torch.Tensor | None = None
    rounds: list[Round] = field(default_factory=list)


class Objective:
    """The weighted sum of the latent loss and, where asked for, of losses on what VAE2's decoder makes of the latents, and of
    what discriminators say to either.

    Raises UserError when the VAE of --decoder_loss_path has another latent space, a network's weights are not at hand, or the
    decoded window is too small for it.

    Attributes:
        adversaries: the discriminators in play, {"latent" or "window": `Adversary`}.
    """

    def __init__(self, pipeline: PipelineWithVAEs, args: argparse.Namespace):
        self._pipeline = pipeline
        self.latent_loss = get_loss_function(args.loss_type)
        self.latent_weight = args.loss_weight
        self.moments_weight = args.moments_loss_weight
        self._seen_through = seen_through(args, pipeline.device, pipeline.codec2.vae.dtype)
        self._reencoder = _reencoder(pipeline, args)
        self.decoded = _decoded_loss(pipeline, args) if decodes_pictures(args) else None
        self._decoded_start = args.decoder_loss_start
        self.reads_images = reads_images(args)
        self.adversaries = _adversaries(pipeline, args, self.decoded)

    def encode(self, batch: dict, sample: bool = False, generator: torch.Generator | None = None) -> Encoded:
        """A training batch as a step needs it; see `PipelineWithVAEs.encode_batch`."""
        if self._seen_through and "decoded" not in batch:
            batch = batch | {"decoded": self._seen_through(batch["pixel_values"].to(self._pipeline.device))}
        inputs, target, images = self._pipeline.encode_batch(batch, sample, generator, self.reads_images)
        return Encoded(inputs, target, images, self._reencoder and self._reencoder(batch, inputs.get("latents")))

    def decodes_at(self, progress: float) -> bool:
        """Whether losses on the decoded image have begun when that share of the run is done."""
        return self.decoded is not None and progress >= self._decoded_start

    def __call__(self, aligned: torch.Tensor, encoded: Encoded, step: int, progress: float = 1.0):
        """Aligned latents (B, C, h, w), the batch they were made of, the share of the run that is done, in [0, 1] -> (the loss,
        a scalar; what `after_step` is to be given)."""
        target, reencoded = encoded.target, encoded.reencoded
        loss = self.latent_weight * self._latent_loss(aligned, target, reencoded)
        if self.moments_weight:
            loss = loss + self.moments_weight * channel_moments(aligned, target)
        seen, window = Seen(), None
        if self.decodes_at(progress):
            decoded_loss, window = self.decoded(aligned, target, encoded.images, step, reencoded)
            loss, seen.bias = loss + decoded_loss, window.bias
        for name, adversary in self.adversaries.items():
            if adversary.plays(step) and (name != "window" or window):
                real, made = INPUTS[name](aligned, target, encoded.inputs, window)
                term = adversary.term(made, step)
                loss = loss + term
                seen.rounds.append(Round(adversary, real, [tensor.detach() for tensor in made], term))
        return loss, seen

    def _latent_loss(self, aligned, target, reencoded):
        loss = self.latent_loss(aligned, target)
        return loss.lerp(self.latent_loss(aligned, reencoded.latents), reencoded.weight) if reencoded else loss

    def begin_at_once(self) -> None:
        """Have what begins later in a run begin with its first step, so that a trial of a few steps takes what others take."""
        self._decoded_start = 0.0
        for adversary in self.adversaries.values():
            adversary.rules = replace(adversary.rules, start_step=0)

    def before_first_step(self, pipeline: PipelineWithVAEs, loader, accelerator) -> None:
        """Measure on some training images what the losses compare with."""
        if self.decoded:
            self.decoded.measure_colours(pipeline, loader, accelerator)

    def after_step(self, seen: Seen, ok: torch.Tensor, accelerator) -> None:
        """After an optimizer step, which was `ok` if its loss and gradient were finite."""
        if seen.bias is not None:
            self.decoded.colours.correct(seen.bias, ok, accelerator)
        for each in seen.rounds:
            each.adversary.learn(each.real, each.made, each.term, ok, accelerator)

    def read(self, accelerator) -> dict[str, float]:
        """What the discriminators have to log, as means since the last time; nan before their start. Waits for the device."""
        figures = {}
        for adversary in self.adversaries.values():
            figures |= adversary.read(accelerator)
        return figures

    def state_dict(self) -> dict:
        return {
            "colours": self.decoded.colours.state_dict() if self.decoded else {},
            "adversaries": {name: adversary.state_dict() for name, adversary in self.adversaries.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        if self.decoded:
            self.decoded.colours.load_state_dict(state["colours"])
        for name, adversary in self.adversaries.items():
            adversary.load_state_dict(state["adversaries"][name])


# ----------------------------------------------------------------------------------------------------------------------
# Losses on the decoded image


def _decoded_loss(pipeline, args):
    codec = pipeline.codec2
    if args.decoder_loss_path:
        label = "--decoder_loss_path"
        vae = load_vae_model(
            args.decoder_loss_path, args.decoder_loss_subfolder, args.cache_dir, codec.vae.device, codec.vae.dtype, label
        )
        codec = Codec(vae, args.decoder_loss_path, args.decoder_loss_subfolder)
        if (codec.channels, codec.stride) != (pipeline.codec2.channels, pipeline.codec2.stride):
            raise UserError(f"{label} {args.decoder_loss_path}: its latent space is not VAE2's (other channels or stride)")
    return DecodedImageLoss(
        codec,
        batch_size=args.decoder_loss_batch,
        window=args.decoder_loss_window,
        reference=args.decoder_loss_reference,
        seed=args.seed,
        terms=_terms(args, pipeline.device),
        eyes=_eyes(args, codec),
    )


def _reencoder(pipeline, args) -> Reencoder | None:
    if not args.reencode_target:
        return None
    if not (pipeline.uses_latents or args.seen_through):
        raise UserError(
            f"--reencode_target {args.reencode_target:g}: the module does not see VAE1's latents, which are re-encoded; "
            "add latent to --input_types"
        )
    return Reencoder(pipeline.codec1, pipeline.codec2, args.reencode_target)


def seen_through(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> SeenThrough | None:
    """The VAEs of --seen_through, whose weights are read when something first needs them. UserError where the module takes
    VAE1's latents."""
    if not args.seen_through:
        return None
    if "latent" in args.input_types:
        raise UserError("--seen_through: a module that takes VAE1's latents sees VAE1's picture; add --input_types image")
    places = [(place, args.vae1_subfolder) for place in args.seen_through]
    options = (args.cache_dir, device, dtype, "--seen_through")
    return SeenThrough([Codec(load_vae_model(*place, *options), *place) for place in places])


def _terms(args, device) -> list[tuple]:
    """The terms on the decoded window that the flags ask for, each with its weight."""
    terms = []
    if args.decoder_loss_weight:
        terms.append((args.decoder_loss_weight, pixel_difference(args.decoder_loss_type)))
    if args.perceptual_loss_weight:
        terms.append((args.perceptual_loss_weight, _perceptual_term(args.perceptual_loss, device)))
    return terms


def _perceptual_term(name, device):
    if name == "lpips":
        return picture_distance(_network("--perceptual_loss lpips", lambda: lpips_network(device)))
    return {"decoder": decoder_difference, "stlpips": eyes_difference}[name]


def _eyes(args, codec) -> PerceptualDistance | None:
    """The frozen network that terms and discriminator look through, if any does: ST-LPIPS' AlexNet, since the verdict of an
    evaluation looks through VGG. In the precision of the VAEs."""
    asking = []
    if args.perceptual_loss_weight and args.perceptual_loss == "stlpips":
        asking.append("--perceptual_loss stlpips")
    if args.adversarial_weight:
        asking.append(f"--adversarial_weight {args.adversarial_weight:g}")
    if not asking:
        return None
    _require_side(args, codec.stride, asking[0])
    return _network(asking[0], lambda: st_lpips("alex", codec.vae.device)).to(codec.vae.dtype)


def _require_side(args, stride, asking):
    """UserError where the compared part of a window is too small for ST-LPIPS."""
    whole = args.image_size // stride
    window = min(args.decoder_loss_window or whole, whole)
    margins = 2 * DecodedImageLoss.margin * (window < whole)
    if (window - margins) * stride >= SMALLEST_SIDE:
        return
    if window == whole:
        raise UserError(f"--image_size {args.image_size}: {asking} needs at least {SMALLEST_SIDE} px")
    least = -(-SMALLEST_SIDE // stride) + 2 * DecodedImageLoss.margin
    raise UserError(f"--decoder_loss_window {args.decoder_loss_window}: {asking} needs at least {least} latents")


def _network(asking, load):
    """The network that `load` gives; its errors name the flag that asks for it."""
    try:
        return load()
    except UserError as error:
        remedy = "; or use --perceptual_loss decoder, which needs no weights" if "perceptual" in asking else ""
        raise UserError(f"{asking}: {error}{remedy}") from None


def decodes_pictures(args: argparse.Namespace) -> bool:
    """Whether a loss looks at decoded pictures."""
    return bool(args.decoder_loss_weight or args.perceptual_loss_weight or args.adversarial_weight)


def reads_images(args: argparse.Namespace) -> bool:
    """Whether a loss compares with the original images."""
    return decodes_pictures(args) and args.decoder_loss_reference == "original"


def needs_pixels(args: argparse.Namespace) -> bool:
    """Whether training batches must carry the image beside its latents."""
    return ("image" in args.input_types and not args.seen_through) or reads_images(args)


def draws_pictures(args: argparse.Namespace) -> bool:
    """Whether the module looks at the picture that VAE1 decodes; see `AlignConfig.has_decoder`."""
    return args.architecture != "plain" and set(args.input_types) == {"latent"}


def needs_decoded(args: argparse.Namespace) -> bool:
    """Whether training batches must carry that picture, or the one of --seen_through."""
    return draws_pictures(args) or bool(args.seen_through) or (bool(args.reencode_target) and decodes_pictures(args))


# ----------------------------------------------------------------------------------------------------------------------
# Adversarial terms


def _adversaries(pipeline, args, decoded) -> dict[str, Adversary]:
    rules = Rules(args.adversarial_lr, args.adversarial_start_step, args.adversarial_warmup_steps)
    place = {"rules": rules, "device": pipeline.device, "dtype": pipeline.codec2.vae.dtype}
    found = {}
    if args.latent_adversarial_weight:
        given = pipeline.codec1.channels if pipeline.uses_latents else 0
        network = LatentDiscriminator(pipeline.codec2.channels, given)
        found["latent"] = Adversary("latent_adversarial_weight", network, args.latent_adversarial_weight, **place)
    if args.adversarial_weight:
        network = PictureDiscriminator([decoded.eyes.channels[stage] for stage in JUDGED_STAGES])
        found["window"] = Adversary("adversarial_weight", network, args.adversarial_weight, **place)
    return found


def _latents_to_judge(aligned, target, inputs, window: DecodedWindow | None):
    given = [inputs["latents"]] if "latents" in inputs else []
    return [target, *given], [aligned, *given]


def _pictures_to_judge(aligned, target, inputs, window: DecodedWindow | None):
    real = [window.vae2, *(window.vae2_features[stage] for stage in JUDGED_STAGES)]
    return real, [window.visible, *(window.features[stage] for stage in JUDGED_STAGES)]


# of each discriminator, a function of what a step has -> (its inputs from VAE2, its inputs from the module)
INPUTS = {"latent": _latents_to_judge, "window": _pictures_to_judge}


# ----------------------------------------------------------------------------------------------------------------------
# decoded_image


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
        codec: the `vaes.codec.Codec` to decode with: VAE2's, or a cheaper one that shares its latent space.
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


# ----------------------------------------------------------------------------------------------------------------------
# reencoded


@dataclass
class Reencoded:
    """What decode + re-encode makes of a batch.

    Attributes:
        latents: VAE2's, of the picture that VAE1 decodes, (B, channels, h, w). picture: that, (B, 3, H, W) in [-1, 1], or None
            where a cache has left it out because nothing reads it. weight: W.
    """

    latents: torch.Tensor
    picture: torch.Tensor | None
    weight: float


@dataclass
class Reencoder:
    """Decodes with VAE1 and encodes with VAE2, without gradients, what the latent cache has not.

    Attributes:
        codec1, codec2: the frozen VAEs. weight: W in [0, 1), the share of what is re-encoded in the target.
    """

    codec1: Codec
    codec2: Codec
    weight: float

    def __call__(self, batch: dict, source: torch.Tensor | None) -> Reencoded:
        """A training batch and VAE1's latents of it (B, channels, h, w), which may be None where the batch has the picture."""
        if "reencoded" not in batch:
            picture = batch["decoded"] if "decoded" in batch else decode_picture(source, self.codec1)
            return Reencoded(self.codec2.encode(picture), picture, self.weight)
        device = self.codec2.vae.device
        latents, picture = (
            batch[name].to(device, non_blocking=True) if name in batch else None for name in ("reencoded", "decoded")
        )
        return Reencoded(latents, picture, self.weight)


# ----------------------------------------------------------------------------------------------------------------------
# window


@dataclass(frozen=True)
class Window:
    """A rectangle in latents, and the number of items at the start of a batch that are looked at in it.

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
        """The index of the part of a decoded window (height · stride, width · stride) that is at least `margin` latents
        from what the decoder could not see. At an edge of the image the decoder sees all that there is: nothing is left out."""
        margin = min(margin, (min(self.height, self.width) - 1) // 2) * stride
        below, right = self.whole[0] - self.top - self.height, self.whole[1] - self.left - self.width
        above, under, before, after = (margin * (room > 0) for room in (self.top, below, self.left, right))
        return ..., slice(above, self.height * stride - under), slice(before, self.width * stride - after)


def draw_window(whole: tuple[int, int], side: int, items: int, seed: int, step: int) -> Window:
    """The window of a step on latents of that height and width, `side` latents wide (0: all of them). It depends on (seed,
    step) alone."""
    high, wide = (min(side or length, length) for length in whole)
    # the place is drawn from half a window beyond the edges and then moved inside, so that the outermost latents are
    # decoded in a quarter of the steps; drawn from inside alone, they would be decoded in one of many
    at = 2 * np.random.default_rng((seed, step)).random(2) - 0.5
    top, left = (round(place * slack) for place, slack in zip(at.clip(0, 1), (whole[0] - high, whole[1] - wide)))
    return Window(items, top, left, high, wide, tuple(whole))


# ----------------------------------------------------------------------------------------------------------------------
# adversarial


BETAS = (0.5, 0.95)  # short memories: what the discriminator judges changes with every step
WEIGHT_DECAY = 1e-4
SILENT = 0.1  # a mean hinge loss of the discriminator below which its gradient has all but gone
MEMORY = 0.99  # of that mean, per step: it begins at 2, so 300 steps of a loss of 0 pass before it is silent


@dataclass(frozen=True)
class Rules:
    """When and how fast discriminators play.

    Attributes:
        learning_rate: of their AdamW. start_step: at which they begin, until when they cost nothing.
        warmup_steps: after that, in which the weight of the module's term grows from 0 while the discriminator learns.
    """

    learning_rate: float
    start_step: int
    warmup_steps: int


class Adversary:
    """A discriminator with its optimizer and its place in the game. It is part of a run's state and not of the module's file.

    Args:
        flag: the one that gave `weight`, the factor of the module's term; its name, such as "latent_adversarial_weight".
        discriminator: a network from `losses`; it is moved to `device` and computes in `dtype`.

    Its gradients are averaged over the processes here, without DDP: its networks take part in two backward passes of each step,
    once frozen and once not, which DDP's bookkeeping does not allow for.
    """

    def __init__(
        self, flag: str, discriminator: nn.Module, weight: float, rules: Rules, device: torch.device, dtype: torch.dtype
    ):
        self.flag = flag
        self.discriminator = discriminator.to(device, memory_format=torch.channels_last)
        self.weight = weight
        self.rules = rules
        self.dtype = dtype
        self.optimizer = torch.optim.AdamW(
            discriminator.parameters(),
            rules.learning_rate,
            BETAS,
            weight_decay=WEIGHT_DECAY,
            fused=device.type in ("cuda", "cpu"),
        )
        self._meter = Meter(device, (3,))
        self._recent_loss = torch.full((), 2.0, device=device)
        self._complained = False

    def plays(self, step: int) -> bool:
        """Whether the game is on at a step, counted from 0."""
        return step >= self.rules.start_step

    def term(self, made: list[torch.Tensor], step: int) -> torch.Tensor:
        """The module's weighted term for what it made: the discriminator's inputs, with their gradient."""
        self.discriminator.requires_grad_(False).eval()  # in eval mode the spectral norms stand still
        logits = self._judge(made)
        ramp = min(1.0, (step - self.rules.start_step + 1) / max(1, self.rules.warmup_steps))
        return self.weight * ramp * -sum(each.mean() for each in logits) / len(logits)

    def learn(
        self, real: list[torch.Tensor], made: list[torch.Tensor], term: torch.Tensor, ok: torch.Tensor, accelerator
    ) -> None:
        """One step of the discriminator on VAE2's and the module's inputs, which need no gradient; no step if the module's
        was not `ok` or this one's gradient is not finite. `term` is what `term` returned for them, for the log."""
        self.discriminator.requires_grad_(True).train()
        on_real, on_made = self._judge(real), self._judge(made)
        loss = sum(F.relu(1 - r).mean() + F.relu(1 + m).mean() for r, m in zip(on_real, on_made)) / len(on_real)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = list(self.discriminator.parameters())
        _average_gradients(parameters, accelerator)
        ok = ok & nn.utils.clip_grad_norm_(parameters, math.inf).isfinite()
        leave_out(self.optimizer, ok)
        self.optimizer.step()
        with torch.no_grad():
            right = [((r > 0).float().mean() + (m < 0).float().mean()) / 2 for r, m in zip(on_real, on_made)]
            self._meter.add(torch.stack([term.detach(), loss, sum(right) / len(right)]), ok)
            self._recent_loss = torch.where(ok, self._recent_loss.lerp(loss, 1 - MEMORY), self._recent_loss)

    def read(self, accelerator) -> dict[str, float]:
        """The means since the last time: the module's weighted term, the discriminator's loss and its accuracy, the share of
        places that it judges rightly. Says once when the discriminator has nothing left to learn. Waits for the device."""
        recent = accelerator.reduce(self._recent_loss, "mean").item()
        if recent < SILENT and not self._complained:
            self._complained = True
            if accelerator.is_main_process:
                with logging_redirect_tqdm():
                    log.warning(
                        "--%s: its discriminator tells all that the module makes from what VAE2 makes (mean loss %.3f), "
                        "so it no longer teaches the module; start anew with a lower --adversarial_lr or --learning_rate",
                        self.flag, recent,
                    )  # fmt: skip
        where = self.flag.removesuffix("adversarial_weight")
        names = (f"{where}adversarial", f"{where}discriminator_loss", f"{where}discriminator_accuracy")
        return dict(zip(names, self._meter.read(accelerator)))

    def state_dict(self) -> dict:
        """Tensors on the CPU, and plain values."""
        return {
            "discriminator": on_cpu(self.discriminator.state_dict()),
            "optimizer": on_cpu(self.optimizer.state_dict()),
            "recent_loss": self._recent_loss.cpu(),
            "complained": self._complained,
            **self._meter.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """RuntimeError or ValueError for the state of another discriminator."""
        self.discriminator.load_state_dict(state["discriminator"])
        load_optimizer(self.optimizer, state["optimizer"])
        self._meter.load_state_dict(state)
        self._recent_loss = state["recent_loss"].reshape(()).to(self._recent_loss)
        self._complained = bool(state["complained"])

    def _judge(self, inputs):
        return [logits.float() for logits in self.discriminator(*(tensor.to(self.dtype) for tensor in inputs))]


def _average_gradients(parameters: list, accelerator) -> None:
    """Give every process the mean of all processes' gradients, in one exchange."""
    if accelerator.num_processes > 1:
        gradients = [parameter.grad for parameter in parameters]
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(mean.view_as(gradient))


# ----------------------------------------------------------------------------------------------------------------------
# discriminators


SLOPE = 0.2  # of the leaky ReLUs, as in most discriminators
HEAD_WIDTH = 64  # channels of a head on frozen features
PIXEL_WIDTHS = (32, 64, 96)  # of the head on pixels, which halves the resolution with each
JUDGED_STAGES = (1, 2, 4)  # of AlexNet's five, at strides 4, 8 and 8: texture, shapes, things


class Convolution(nn.Conv2d):
    """A convolution in the precision of its input; its weights, and their spectral norm, are float32."""

    def forward(self, x):
        return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def convolution(*shape, **options) -> nn.Module:
    return spectral_norm(Convolution(*shape, **options))


class LatentDiscriminator(nn.Module):
    """Judges latents of VAE2's space, beside VAE1's latents of the same picture where the module sees those: 0.3 M parameters.

    Args:
        channels: of VAE2's latents. given_channels: of VAE1's, 0 for a module that does not see them.
    """

    def __init__(self, channels: int, given_channels: int, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            convolution(channels + given_channels, width, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            convolution(width, width, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            convolution(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE),
            convolution(2 * width, 2 * width, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            convolution(2 * width, 1, 1),
        )

    def forward(self, latents: torch.Tensor, given: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Latents (B, channels, h, w), given (B, given_channels, h', w') in the same precision -> [logits (B, 1, h/2, w/2)]."""
        if given is not None:
            if given.shape[2:] != latents.shape[2:]:  # VAEs of different stride
                given = F.interpolate(given, latents.shape[2:], mode="area")
            latents = torch.cat([latents, given], dim=1)
        return [self.layers(latents)]


class PictureDiscriminator(nn.Module):
    """Judges pictures by a frozen network's features at several strides (Projected GAN, Sauer et al. 2021, arXiv:2111.01007),
    and by their pixels, where a pattern too fine for those features shows.

    Args:
        feature_channels: of the feature maps.
    """

    def __init__(self, feature_channels: list[int]):
        super().__init__()
        self.heads = nn.ModuleList(self._head(channels) for channels in feature_channels)
        layers, channels = [], 3
        for width in PIXEL_WIDTHS:
            layers += [convolution(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
            channels = width
        self.pixels = nn.Sequential(*layers, convolution(channels, 1, 3, padding=1))

    @staticmethod
    def _head(channels):
        return nn.Sequential(
            convolution(channels, HEAD_WIDTH, 1),
            nn.LeakyReLU(SLOPE),
            convolution(HEAD_WIDTH, HEAD_WIDTH, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            convolution(HEAD_WIDTH, 1, 1),
        )

    def forward(self, pictures: torch.Tensor, *features: torch.Tensor) -> list[torch.Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] and their feature maps (B, channels, h, w), all in one precision -> a map of logits
        for each feature map, and one for the pixels."""
        judged = [head(_level(stage)) for head, stage in zip(self.heads, features, strict=True)]
        return [*judged, self.pixels(pictures)]


def _level(features: torch.Tensor) -> torch.Tensor:
    """Features at a root mean square of 1 for each picture, since those of the stages differ by orders of magnitude."""
    scale = features.detach().float().square().mean(dim=(1, 2, 3), keepdim=True).add(1e-6).rsqrt()
    return features * scale.to(features.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# st_lpips


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


# ----------------------------------------------------------------------------------------------------------------------
# networks


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
