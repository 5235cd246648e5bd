"""Where a module of architecture tiny or whole starts: at VAE2's encoder, behind VAE1's decoder where it sees no image.

The last stages of a tiny autoencoder's encoder hold how VAE2's latents say what is in an image, its decoder what VAE1's look
like. A module that has both need not learn either.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from utils import UserError, count_of
from vae_align import GRID_KEYS, STAGE_BLOCKS, AlignConfig, StageBlock, module_of
from vaes.codec import Codec
from vaes.pipeline import PipelineWithVAEs, read_checkpoint

LARGEST_DIFFERENCE = 0.05  # between VAE1's pictures and the module's, of their spread: more than bfloat16 rounds off


def grids_of(codec1: Codec, codec2: Codec, architecture: str, trained_for: AlignConfig | None = None) -> dict:
    """What a module's config says of its VAEs' own grids and blocks: architecture plain does not work on these. A module that
    was trained before keeps what it was trained for."""
    if trained_for:
        return {name: getattr(trained_for, name) for name in GRID_KEYS}
    if architecture == "plain":
        return {}
    vaes = (codec1.vae, codec2.vae)
    return dict(zip(GRID_KEYS, (*(vae.fold for vae in vaes), *(bool(vae.config.get("pooled")) for vae in vaes))))


@torch.no_grad()
def start_from_vaes(pipeline: PipelineWithVAEs, file: str | None = None) -> str:
    """Copy into the module what fits of its two tiny autoencoders, and make an identity of every further block; then the
    layers of the module in `file`, if one is named.

    Returns a line that says what was copied. UserError where a VAE that is needed is no tiny autoencoder, where none of its
    layers has the width of the module, or where the file's module has other layers.
    """
    module = pipeline.module
    if module.config.architecture == "plain":
        raise UserError("--init vaes: the plain architecture has no layers like theirs; add --architecture tiny or whole")
    copied = [_copy_decoder(pipeline)] if module.config.has_decoder else []
    encoder = _layers(pipeline.codec2.vae.model, "encoder", "VAE2")
    pairs = [*zip(module.blocks, encoder[-1 - STAGE_BLOCKS : -1]), (module.out, encoder[-1])]
    if module.config.has_image_encoder:
        mine, theirs = [layer for layer in module.image_in if _has_weights(layer)], encoder[: -1 - STAGE_BLOCKS]
        if (
            module.config.architecture == "tiny"
        ):  # from the back, since the fine end differs: its first layers work on 2x2 pixels
            pairs += _stages_from_the_back(mine[2:], theirs)
        else:
            pairs += itertools.zip_longest(mine, theirs)
    copied.append(_copy(pairs, "VAE2's encoder"))
    new = [block.conv[-1] for block in [*module.blocks][STAGE_BLOCKS:]]
    if "latent" in module.config.input_types:
        new.append(module.latent_in)
    for layer in new:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    if file:
        copied.append(_copy_module(module, file))
    return "the module starts with " + " and ".join(copied)


def _copy_decoder(pipeline: PipelineWithVAEs) -> str:
    """Make the module's picture of latents VAE1's. UserError unless it then draws what VAE1 decodes."""
    codec, picture = pipeline.codec1, pipeline.module.picture
    decoder = _layers(codec.vae.model, "decoder", "VAE1")
    mine = [layer for layer in picture if _has_weights(layer)]
    said = _copy([*itertools.zip_longest(mine, decoder)], "VAE1's decoder")
    mine[-1].weight.mul_(2)  # the decoder's pixels are in [0, 1], the module's in [-1, 1]
    mine[-1].bias.mul_(2).sub_(1)
    latents = torch.randn(1, codec.channels, 8, 8, generator=torch.Generator().manual_seed(0)).to(mine[-1].weight.device)
    decoded = codec.decode(latents)
    unclamped = nn.Sequential(*list(picture)[:-1])
    spread = (decoded - decoded.mean(dim=(2, 3), keepdim=True)).std()
    difference = ((unclamped(latents) - decoded).std() / spread).item()
    if not difference < LARGEST_DIFFERENCE:
        raise UserError(
            f"--init vaes: the module cannot hold VAE1's decoder ({said} fit, and pictures differ by {difference:.0%}): train "
            "with another tiny autoencoder of its latent space, or with --architecture plain"
        )
    return said


def _copy_module(module: nn.Module, file: str) -> str:
    """Take every trained layer from the module in a file; maps and VAE1's decoder are the pair's own."""
    found = module_of(read_checkpoint(file)).state_dict()
    own = module.state_dict()
    wanted = [name for name in own if name.startswith(("latent_in.", "image_in.", "blocks.", "out."))]
    other = [name for name in wanted if name in found and found[name].shape != own[name].shape]
    missing = [name for name in wanted if name not in found and not name.startswith("latent_in.")]
    if other or missing:
        raise UserError(
            f"--init_module {file}: its {(missing + other)[0]} is missing or of another shape than the module's; name one with "
            "an image among its inputs and the same --architecture, --hidden_channels and --num_blocks"
        )
    for name in wanted:
        if name in found:
            own[name].copy_(found[name])
    return f"the trained layers of {file}"


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
        if mine is None or theirs is None:
            continue
        if isinstance(mine, StageBlock):
            if mine.pool is not None:
                if getattr(theirs, "pool", None) is None:
                    continue
                mine.pool.load_state_dict(theirs.pool.state_dict())
            mine, theirs = mine.conv, getattr(theirs, "conv", theirs)  # beside it blocks may have layers for a skip
        weights = [layer for layer in theirs.modules() if isinstance(layer, nn.Conv2d)]
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
