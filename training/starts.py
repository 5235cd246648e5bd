"""Where training starts: at a shipped module, at the best linear map between two latent spaces, or at the layers of two tiny
autoencoders.

The linear map is in closed form, and it is also a rung that training must beat. The last stages of a tiny autoencoder's encoder
hold how VAE2's latents describe an image, its decoder how VAE1's latents look. A module with these layers need not learn them.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from utils import UserError, count_of
from vae_align import GRID_KEYS, IMAGE, STAGE_BLOCKS, ZOO, AlignConfig, AlignPipeline, StageBlock, module_of, zoo_pairs
from vaes.codec import Codec
from vaes.pipeline import PipelineWithVAEs, encoded_batches, read_checkpoint

DAMPING = 1e-4  # ridge penalty, relative to the mean squared input
RIDGE_IMAGES = 512  # half a million equations at 256 px


class RidgeRegression:
    """Accumulates normal equations for a 3x3 convolution with bias from one set of latents to another.

    Minimises ||Y - X W||² + λ ||W||² over all positions seen, X being the zero-padded 3x3 neighbourhoods and a one:
    W = (XᵀX + λI)⁻¹ XᵀY (Hoerl & Kennard 1970). float64, memory independent of how much is added.
    """

    def __init__(self, in_channels: int, out_channels: int):
        self.in_channels, self.out_channels = in_channels, out_channels
        size = in_channels * 9 + 1
        self.xx = torch.zeros(size, size, dtype=torch.float64)
        self.xy = torch.zeros(size, out_channels, dtype=torch.float64)

    @torch.no_grad()
    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add pairs of inputs (B, in, h, w) and targets (B, out, h, w)."""
        exact = torch.float64 if inputs.is_cuda else torch.float32  # training lets a GPU multiply float32 in TF32
        x = F.unfold(inputs.to(exact), 3, padding=1).transpose(1, 2).flatten(0, 1)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        y = targets.to(exact).flatten(2).transpose(1, 2).flatten(0, 1)
        self.xx += (x.T @ x).cpu().double()
        self.xy += (x.T @ y).cpu().double()

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight (out, in, 3, 3), bias (out,)) of the convolution, float32."""
        penalty = torch.full((len(self.xx),), DAMPING * self.xx.diagonal()[:-1].mean(), dtype=torch.float64)
        penalty[-1] = 0  # the bias is free
        solution = torch.linalg.solve(self.xx + torch.diag(penalty), self.xy).float().T
        return solution[:, :-1].reshape(self.out_channels, self.in_channels, 3, 3).contiguous(), solution[:, -1].contiguous()


def fit_ridge(pipeline: PipelineWithVAEs, loader, accelerator) -> None:
    """Fit the map between a pipeline's latents on some training images; its module keeps it beside the weights."""
    regression = RidgeRegression(pipeline.module.ridge_weight.shape[1], pipeline.config.out_channels)
    for inputs, target, _ in encoded_batches(pipeline, loader, accelerator, RIDGE_IMAGES):
        regression.add(pipeline.module.on_output_grid(inputs["latents"]), target)
    if accelerator.num_processes > 1:  # every process adds what it saw, and all start from the same map
        for name in ("xx", "xy"):
            setattr(regression, name, accelerator.reduce(getattr(regression, name).to(accelerator.device), "sum").cpu())
    if regression.xx.any():
        pipeline.module.remember_ridge(*regression.solve())


# ----------------------------------------------------------------------------------------------------------------------
# Shipped modules

SHIPPED = ZOO.parent / "pretrained"


def start_from_shipped(pipeline: PipelineWithVAEs) -> str | None:
    """Copy the weights of the shipped module that translates between the pipeline's two latent spaces.

    Returns a line that names it; None, with the module unchanged, if none has these spaces and this architecture.
    """
    one, into = pipeline.space1.name, pipeline.space2.name
    pair = (one if pipeline.uses_latents else IMAGE, into)
    for file in sorted(SHIPPED.glob("*.safetensors")):
        found = AlignPipeline.from_checkpoint(file)
        if (found.space1.name, found.space2.name, found.config) == (one, into, pipeline.config):
            pipeline.module.load_state_dict(found.module.state_dict())
            return f"the module starts as {file.name}, which is shipped for {one} to {into}"
    if pair in zoo_pairs():
        found = AlignPipeline.pair(*pair)
        if found.config == pipeline.config:
            pipeline.module.load_state_dict(found.module.state_dict())
            return f"the module starts as the shipped pair {':'.join(pair)}"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Tiny autoencoders' layers


LARGEST_DIFFERENCE = 0.05  # between VAE1's pictures and the module's, of their spread: more than bfloat16 rounds off


def grids_of(codec1: Codec, codec2: Codec, architecture: str, trained_for: AlignConfig | None = None) -> dict:
    """The config entries for the VAEs' own grids and blocks; {} for architecture plain, which does not work on them.

    A module that was trained before keeps the entries of its training, `trained_for`."""
    if trained_for:
        return {name: getattr(trained_for, name) for name in GRID_KEYS}
    if architecture == "plain":
        return {}
    vaes = (codec1.vae, codec2.vae)
    return dict(zip(GRID_KEYS, (*(vae.fold for vae in vaes), *(bool(vae.config.get("pooled")) for vae in vaes))))


@torch.no_grad()
def start_from_vaes(pipeline: PipelineWithVAEs, file: str | None = None) -> str:
    """Copy the fitting layers of the two tiny autoencoders into the module, make every further block an identity, and then
    copy the layers of the module in `file`, if one is named.

    Returns a line that names the copied layers. UserError where a needed VAE is no tiny autoencoder, where none of its layers
    has the module's width, or where the file's module has other layers.
    """
    module = pipeline.module
    if module.config.architecture == "plain":
        raise UserError("--init vaes: the plain architecture has no layers like theirs; add --architecture tiny or whole")
    copied = [_copy_decoder(pipeline)] if module.config.has_decoder else []
    encoder = _layers(pipeline.codec2.vae.model, "encoder", "VAE2")
    pairs = [*zip(module.blocks, encoder[-1 - STAGE_BLOCKS : -1]), (module.out, encoder[-1])]
    if module.config.has_image_encoder:
        mine, theirs = [layer for layer in module.image_in if _has_weights(layer)], encoder[: -1 - STAGE_BLOCKS]
        if module.config.architecture == "tiny":  # from the back: at the fine end its first layers work on 2x2 pixels
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
        copied.append(_copy_module(pipeline, file))
    return "the module starts with " + " and ".join(copied)


def _copy_decoder(pipeline: PipelineWithVAEs) -> str:
    """Copy VAE1's decoder into the module. UserError unless the module then decodes latents as VAE1 does."""
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


def _copy_module(pipeline: PipelineWithVAEs, file: str) -> str:
    """Copy every trained layer of the module in a file, but not its linear maps and VAE1's decoder."""
    content = read_checkpoint(file)
    pipeline.codec2.warn_of_difference(content["vae2"], f"--init_module {file}")  # of VAE1 these layers see the picture alone
    found, own = module_of(content).state_dict(), pipeline.module.state_dict()
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
    """The convolutions and blocks of a tiny autoencoder's encoder or decoder, in order."""
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
    """Pair the blocks and halvings of two encoders from the coarse end; a shorter stage takes the first blocks."""
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
