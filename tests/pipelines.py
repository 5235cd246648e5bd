"""Untrained pipelines with random weights, their checkpoints, latents of a named space, and a file that would run code."""

import shutil

import torch

from utils import file_digest, write_json
from vae_align import ZOO_NAME, AlignConfig, AlignPipeline, align_module, moments_of
from vaes.codec import SPACES, Codec
from vaes.loading import load_vae_model
from vaes.pipeline import PipelineWithVAEs


def load_vae(path, subfolder="vae", dtype=torch.float32, **options):
    """A VAE on the CPU."""
    return load_vae_model(path, subfolder, None, "cpu", dtype, **options)


def make_pipeline(path1, path2, seed=0, subfolder="vae", **options):
    """An untrained pipeline with random weights everywhere, the buffers included."""
    spaces = []
    for path in (path1, path2):
        spaces.append(Codec(load_vae(path, subfolder), str(path), subfolder))
    sizes = {
        "latent_channels": spaces[0].channels,
        "latent_stride": spaces[0].stride,
        "out_channels": spaces[1].channels,
        "out_stride": spaces[1].stride,
    }
    torch.manual_seed(seed)
    module = align_module(AlignConfig(**{"hidden_channels": 8, "num_blocks": 1, **sizes, **options})).eval()
    if "latent" in module.config.input_types:
        module.remember_ridge(torch.randn_like(module.ridge_weight), torch.randn_like(module.ridge_bias))
    return PipelineWithVAEs(module, *spaces)


def untrained(space1="sd15", space2="flux1", input_types=("latent",), **options):
    """A module of random weights between two spaces, themselves or by name, without VAEs."""
    one, two = (SPACES[space] if isinstance(space, str) else space for space in (space1, space2))
    shape = {"latent_channels": one.channels, "latent_stride": one.stride, "out_stride": two.stride}
    options = {"hidden_channels": 8, "num_blocks": 1} | shape | options
    torch.manual_seed(0)
    return AlignPipeline(align_module(AlignConfig(input_types, out_channels=two.channels, **options)).eval(), one, two)


def of_itself(name, seed=0, **changes):
    """A module from a space into itself with random weights, but none for its latents."""
    torch.manual_seed(seed)
    space = SPACES[name]
    fold = 2 if name == "flux2" else 1
    sides = {f"{side}_{what}": value for side in ("latent", "out")
             for what, value in (("channels", space.channels), ("stride", space.stride), ("fold", fold))}  # fmt: skip
    options = {"input_types": ("latent",), "architecture": "tiny", "hidden_channels": 8, "num_blocks": 1}
    module = align_module(AlignConfig(**sides | options | changes)).eval()
    if module.config.uses_latents:
        for parameter in module.latent_in.parameters():
            torch.nn.init.zeros_(parameter)
    return AlignPipeline(module, space, space)


def make_zoo(folder, one, into):
    """A zoo of two spaces and of the pair between them, in place of one that is there; the pair as it should be."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pipelines = {name: of_itself(name, seed) for seed, name in enumerate((one, into))}
    files = {name: pipeline.save_pretrained(folder / f"{name}.safetensors") for name, pipeline in pipelines.items()}
    spaces = {name: {"file": file.name, "sha256": file_digest(file).hex()} for name, file in files.items()}
    write_json(folder / ZOO_NAME, {"spaces": spaces, "pairs": {one: {into: {"figures": {"aligned": {}}}}}})
    return AlignPipeline.compose(*pipelines.values())


def latents_of(name, batch=1, side=24):
    """Scaled latents (batch, C, side, side) with the second moments of that space, up to their scale."""
    moments = moments_of(name)
    generator = torch.Generator().manual_seed(0)

    def drawn(matrix, rows):
        channels = torch.randn(batch, rows, rows, len(matrix), generator=generator, dtype=torch.float64)
        return (channels @ torch.linalg.cholesky(matrix).T).permute(0, 3, 1, 2)

    if len(moments) == 1:
        return drawn(moments[0], side).float()
    down, across, diagonal = (drawn(matrix, side // 2) for matrix in moments)  # an inverse Haar transform
    windows = [down + across + diagonal, down - across - diagonal, across - down - diagonal, diagonal - down - across]
    latents = torch.nn.functional.pixel_shuffle(torch.stack(windows, 2).flatten(1, 2) / 2, 2).float()
    return latents / latents.square().mean().sqrt() * 0.85  # of scaled latents with all their bands


def save(pipeline, folder, **changes):
    return pipeline.save_checkpoint(folder, **{"config": {"seed": 1}, "step": 7, "epoch": 1.5, "metrics": {}, **changes})


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")
