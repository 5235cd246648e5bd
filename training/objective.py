"""What training minimises: the latent loss and the loss on the decoded image that the flags ask for, as one scalar."""

from __future__ import annotations

import argparse

import torch

from evaluation.networks import lpips_network
from evaluation.st_lpips import SMALLEST_SIDE, st_lpips
from latents.pipeline import PipelineWithVAEs
from latents.spaces import Codec
from latents.vaes import load_vae_model
from losses import get_loss_function
from training.decoded_image import DecodedImageLoss
from utils import UserError


class Objective:
    """The weighted sum of the latent loss and, where asked for, of a loss on what VAE2's decoder makes of the latents.

    Raises UserError when the VAE of --decoder_loss_path has another latent space, or LPIPS' weights are not at hand.
    """

    def __init__(self, pipeline: PipelineWithVAEs, args: argparse.Namespace):
        self.latent_loss = get_loss_function(args.loss_type)
        self.latent_weight = args.loss_weight
        self.decoded = _decoded_loss(pipeline, args) if decodes_pictures(args) else None
        self.reads_images = reads_images(args)

    def __call__(self, aligned: torch.Tensor, target: torch.Tensor, images: torch.Tensor | None, step: int):
        """Aligned and target latents (B, C, h, w), images (B, 3, H, W) or None where `reads_images` is false -> (the loss, a
        scalar; what `after_step` is to be given)."""
        loss = self.latent_weight * self.latent_loss(aligned, target)
        if not self.decoded:
            return loss, None
        decoded_loss, colour_bias = self.decoded(aligned, target, images, step)
        return loss + decoded_loss, colour_bias

    def before_first_step(self, pipeline: PipelineWithVAEs, loader, accelerator) -> None:
        """Measure on some training images what the losses compare with."""
        if self.decoded:
            self.decoded.measure_colours(pipeline, loader, accelerator)

    def after_step(self, colour_bias: torch.Tensor | None, ok: torch.Tensor, accelerator) -> None:
        """After an optimizer step, which was `ok` if its loss and gradient were finite."""
        if self.decoded:
            self.decoded.colours.correct(colour_bias, ok, accelerator)

    def state_dict(self) -> dict:
        return {"colours": self.decoded.colours.state_dict() if self.decoded else {}}

    def load_state_dict(self, state: dict) -> None:
        if self.decoded:
            self.decoded.colours.load_state_dict(state["colours"])


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
    perceptual = None
    if args.perceptual_loss_weight:
        _require_window(args, codec.stride)
        perceptual = PERCEPTUAL_LOSSES[args.perceptual_loss](pipeline.device)
    return DecodedImageLoss(
        codec,
        batch_size=args.decoder_loss_batch,
        window=args.decoder_loss_window,
        reference=args.decoder_loss_reference,
        seed=args.seed,
        kind=args.decoder_loss_type,
        weight=args.decoder_loss_weight,
        perceptual=perceptual,
        perceptual_weight=args.perceptual_loss_weight,
    )


def _require_window(args, stride):
    """UserError where the compared part of a window is too small for ST-LPIPS."""
    side = (args.decoder_loss_window - 2 * DecodedImageLoss.margin) * stride
    if args.perceptual_loss == "stlpips" and args.decoder_loss_window and side < SMALLEST_SIDE:
        least = -(-SMALLEST_SIDE // stride) + 2 * DecodedImageLoss.margin
        raise UserError(
            f"--decoder_loss_window {args.decoder_loss_window}: --perceptual_loss stlpips needs at least {least} latents"
        )


def _network(name, load):
    """A function device -> the perceptual network that `load` gives; its errors name the flag."""

    def load_on(device):
        try:
            return load(device)
        except UserError as error:
            raise UserError(
                f"--perceptual_loss {name}: {error}; or use --perceptual_loss decoder, which needs no weights"
            ) from None

    return load_on


# what --perceptual_loss offers: a function device -> what `DecodedImageLoss` takes; stlpips looks through AlexNet, since the
# verdict of an evaluation looks through VGG
PERCEPTUAL_LOSSES = {
    "decoder": lambda device: "decoder",
    "lpips": _network("lpips", lpips_network),
    "stlpips": _network("stlpips", lambda device: st_lpips("alex", device)),
}


def decodes_pictures(args: argparse.Namespace) -> bool:
    """Whether a loss looks at decoded pictures."""
    return bool(args.decoder_loss_weight or args.perceptual_loss_weight)


def reads_images(args: argparse.Namespace) -> bool:
    """Whether a loss compares with the original images."""
    return decodes_pictures(args) and args.decoder_loss_reference == "original"


def needs_pixels(args: argparse.Namespace) -> bool:
    """Whether training batches must carry the image beside its latents."""
    return "image" in args.input_types or reads_images(args)
