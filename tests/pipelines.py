"""Untrained pipelines with random weights, their checkpoints, and a file that would run code."""

import torch

from latents.pipeline import PipelineWithVAEs
from latents.spaces import Codec
from latents.vaes import load_vae_model
from vae_align import AlignConfig, AlignModule


def make_pipeline(path1, path2, seed=0, subfolder="vae", **options):
    """An untrained pipeline with random weights everywhere, the buffers included."""
    spaces = []
    for path in (path1, path2):
        spaces.append(Codec(load_vae_model(path, subfolder, None, "cpu", torch.float32), str(path), subfolder))
    sizes = {
        "latent_channels": spaces[0].channels,
        "latent_stride": spaces[0].stride,
        "out_channels": spaces[1].channels,
        "out_stride": spaces[1].stride,
    }
    torch.manual_seed(seed)
    module = AlignModule(AlignConfig(**{"hidden_channels": 8, "num_blocks": 1, **sizes, **options})).eval()
    if "latent" in module.config.input_types:
        module.remember_ridge(torch.randn_like(module.ridge_weight), torch.randn_like(module.ridge_bias))
    return PipelineWithVAEs(module, *spaces)


def save(pipeline, folder, **changes):
    return pipeline.save_checkpoint(folder, **{"config": {"seed": 1}, "step": 7, "epoch": 1.5, "metrics": {}, **changes})


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")
