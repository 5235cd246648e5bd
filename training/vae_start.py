"""Where a module of architecture tiny starts: at the layers of VAE1's decoder and of VAE2's encoder.

A tiny autoencoder's decoder holds, on its two coarsest grids, what VAE1's latents say of an image; the last stage of an
encoder holds how VAE2's latents say it. A module that has both needs to learn the way between them, not the two ends.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from latents.pipeline import PipelineWithVAEs
from utils import UserError, count_of
from vae_align import STAGE_BLOCKS, StageBlock


@torch.no_grad()
def start_from_vaes(pipeline: PipelineWithVAEs) -> str:
    """Copy into the module what fits of its two tiny autoencoders, and make an identity of every further block.

    Returns a line that says what was copied. UserError where either VAE is no tiny autoencoder, or where none of its layers
    has the width of the module.
    """
    module = pipeline.module
    if module.config.architecture != "tiny":
        raise UserError("--init vaes: the plain architecture has no layers like theirs; add --architecture tiny")
    decoder = _layers(pipeline.codec1.vae.model, "decoder", "VAE1")
    encoder = _layers(pipeline.codec2.vae.model, "encoder", "VAE2")
    copied = []
    further = [*module.blocks][STAGE_BLOCKS:]
    coarse = [*zip(module.blocks, encoder[-1 - STAGE_BLOCKS : -1]), (module.out, encoder[-1])]
    last_halving = encoder[-2 - STAGE_BLOCKS]
    if "image" in module.config.input_types:
        # from the back, since the fine end differs: the module's first layers work on 2x2 pixels
        mine = [layer for layer in module.image_in if _has_weights(layer)][2:]
        theirs = encoder[: -1 - STAGE_BLOCKS]
        pairs = _stages_from_the_back(mine, theirs)
        if "latent" in module.config.input_types:
            nn.init.zeros_(module.latent_in.weight)
            nn.init.zeros_(module.latent_in.bias)
    else:
        *mine, halving = [layer for layer in module.latent_in if _has_weights(layer)]
        like_decoder = 2 * (1 + STAGE_BLOCKS)
        pairs = [*zip(mine[:like_decoder], decoder), (halving, last_halving)]
        further += mine[like_decoder:]
        copied.append(_copy(pairs[:-1], "VAE1's decoder"))
        pairs = pairs[-1:]
    copied.append(_copy(pairs + coarse, "VAE2's encoder"))
    for block in further:
        nn.init.zeros_(block.conv[-1].weight)
        nn.init.zeros_(block.conv[-1].bias)
    return "the module starts with " + " and ".join(copied)


def _layers(vae: nn.Module, part: str, label: str) -> list[nn.Module]:
    """The layers of a tiny autoencoder's part that have weights: convolutions and blocks, in order."""
    part = getattr(vae, part)
    layers = getattr(part, "layers", part)
    if not isinstance(layers, nn.Sequential):
        raise UserError(
            f"--init vaes: {label} is no tiny autoencoder (TAESD and its kin), whose layers a module can take; train with the "
            "tiny autoencoder of its latent space, or with --init ridge"
        )
    return [layer for layer in layers if _has_weights(layer)]


def _has_weights(layer: nn.Module) -> bool:
    return any(True for _ in layer.parameters())


def _stages_from_the_back(mine: list[nn.Module], theirs: list[nn.Module]) -> list[tuple[nn.Module, nn.Module]]:
    """Pair the blocks and halvings of two encoders, from the coarse end; of a shorter stage the first blocks."""
    pairs = []
    for own, other in itertools.zip_longest(_split(mine), _split(theirs)):
        if own is None or other is None:
            break
        (halving, blocks), (other_halving, other_blocks) = own, other
        pairs += [*zip(blocks, other_blocks), (halving, other_halving)]
    return pairs


def _split(layers: list[nn.Module]):
    """(halving, blocks before it) for each stage of an encoder, the coarsest first."""
    blocks, stages = [], []
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            stages.append((layer, blocks))
            blocks = []
        else:
            blocks.append(layer)
    return reversed(stages)


def _copy(pairs, whose: str) -> str:
    count = total = 0
    for mine, theirs in pairs:
        total += 1
        weights = [layer for layer in theirs.modules() if isinstance(layer, nn.Conv2d)]
        if isinstance(mine, StageBlock):
            weights = [layer for layer in theirs.conv if isinstance(layer, nn.Conv2d)]
        own = [layer for layer in mine.modules() if isinstance(layer, nn.Conv2d)]
        if [layer.weight.shape for layer in own] != [layer.weight.shape for layer in weights]:
            continue
        for target, source in zip(own, weights):
            target.weight.copy_(source.weight)
            if target.bias is not None:
                target.bias.copy_(source.bias if source.bias is not None else torch.zeros_like(target.bias))
        count += 1
    if not count:
        raise UserError(
            f"--init vaes: no layer of {whose} has the shape of the module's; set --hidden_channels to the autoencoder's width"
        )
    return f"{count_of(count, 'layer')} of {total} from {whose}"
