"""Untrained pipelines with random weights, their checkpoints, and a file that would run code."""

import shutil

import torch

from utils import file_digest, write_json
from vae_align import ZOO_NAME, AlignConfig, AlignPipeline, align_module
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


def save(pipeline, folder, **changes):
    return pipeline.save_checkpoint(folder, **{"config": {"seed": 1}, "step": 7, "epoch": 1.5, "metrics": {}, **changes})


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")
