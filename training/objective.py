"""What training minimises: the latent loss, the loss on the decoded image and the adversarial terms that the flags ask for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace

import torch

from evaluation.networks import lpips_network
from evaluation.st_lpips import SMALLEST_SIDE, PerceptualDistance, st_lpips
from latents.pipeline import PipelineWithVAEs
from latents.seen_through import SeenThrough
from latents.spaces import Codec
from latents.vaes import load_vae_model
from losses import channel_moments, get_loss_function
from training.adversarial import Adversary, Rules
from training.decoded_image import (
    DecodedImageLoss,
    DecodedWindow,
    decoder_difference,
    eyes_difference,
    picture_distance,
    pixel_difference,
)
from training.discriminators import JUDGED_STAGES, LatentDiscriminator, PictureDiscriminator
from training.reencoded import Reencoded, Reencoder
from utils import UserError

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
    """Whether the module looks at the picture that VAE1 decodes; see `AlignConfig.draws`."""
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
