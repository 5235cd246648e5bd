"""What training minimises: the latent losses and the loss on the decoded image that the flags ask for, as one scalar."""

from __future__ import annotations

import argparse

import torch

from evaluation.metrics import lpips_network
from latents.pipeline import PipelineWithVAEs
from latents.spaces import Codec
from latents.vaes import load_vae_model
from losses import get_loss_function
from training.decoded_image import DecodedImageLoss
from utils import UserError


class Objective:
    """The weighted sum of the latent losses and, where asked for, of what VAE2's decoder shows (`decoded`, else None).

    Raises UserError when the VAE of --decoder_loss_path has another latent space, or LPIPS' weights are not at hand.
    """

    def __init__(self, pipeline: PipelineWithVAEs, args: argparse.Namespace):
        self.terms = [(args.loss_weight, get_loss_function(args.loss_type))]
        self.decoded = _decoded_loss(pipeline, args) if decodes_pictures(args) else None

    def __call__(self, aligned: torch.Tensor, target: torch.Tensor, images: torch.Tensor | None, step: int) -> torch.Tensor:
        """Aligned and target latents (B, C, h, w), images (B, 3, H, W) or None where no loss needs them -> scalar."""
        loss = sum(weight * term(aligned, target) for weight, term in self.terms)
        return loss + self.decoded(aligned, target, images, step) if self.decoded else loss


def _decoded_loss(pipeline, args):
    space = pipeline.codec2
    if args.decoder_loss_path:
        flag = "--decoder_loss_path"
        vae = load_vae_model(
            args.decoder_loss_path, args.decoder_loss_subfolder, args.cache_dir, space.vae.device, space.vae.dtype, flag
        )
        space = Codec(vae, args.decoder_loss_path, args.decoder_loss_subfolder)
        if (space.channels, space.stride) != (pipeline.codec2.channels, pipeline.codec2.stride):
            raise UserError(f"{flag} {args.decoder_loss_path}: its latent space is not VAE2's (other channels or stride)")
    perceptual = None
    if args.perceptual_loss_weight:
        perceptual = "decoder" if args.perceptual_loss == "decoder" else _lpips(pipeline.device)
    return DecodedImageLoss(
        space, args.decoder_loss_batch, args.decoder_loss_window, args.decoder_loss_reference, args.seed,
        kind=args.decoder_loss_type, weight=args.decoder_loss_weight,
        perceptual=perceptual, perceptual_weight=args.perceptual_loss_weight,
    )  # fmt: skip


def _lpips(device):
    try:
        return lpips_network(device)
    except UserError as error:
        raise UserError(f"--perceptual_loss lpips: {error}; or use --perceptual_loss decoder, which needs no weights") from None


def decodes_pictures(args: argparse.Namespace) -> bool:
    """Whether a loss looks at decoded pictures."""
    return bool(args.decoder_loss_weight or args.perceptual_loss_weight)


def needs_pixels(args: argparse.Namespace) -> bool:
    """Whether training batches must carry the image beside its latents."""
    return "image" in args.input_types or (decodes_pictures(args) and args.decoder_loss_reference == "original")
