"""Each class of VAE wherever a VAE is used: the cache, training, every loss that decodes, judging, translating."""

import math
import sys

import numpy as np
import pytest
import torch
from conftest import make_photo, tiny_flags
from families import EVERY_CLASS, save_class
from runs import QUIET, judge, train
from safetensors.torch import load_file

from tools import translate
from vaes.loading import load_vae_model

LOSSES = {  # flags of training
    "pixels and re-encoded latents, uncached": {"decoder_loss_weight": 1.0, "reencode_target": 0.5, "no_cache_latents": True},
    "decoder features": {"perceptual_loss_weight": 1.0},
}


@pytest.fixture(scope="module", params=EVERY_CLASS)
def flags(request, tmp_path_factory):
    """Flags that train for two steps from a tiny VAE of the class to itself, at two latents a side or more."""
    folder = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(0)
    for name in ("train/0", "train/1", "eval/0"):
        (folder / name).parent.mkdir(exist_ok=True)
        make_photo(rng, (80, 64)).save(folder / f"{name}.png")
    save_class(request.param, folder / "vae")
    vaes = {"kl4": folder / "vae", "kl16": folder / "vae"}
    side = 2 * max(16, load_vae_model(folder / "vae", "", None, "cpu", torch.float32).stride)
    changes = {"image_size": side, "hidden_channels": 4, "train_batch_size": 2, "max_train_steps": 2}
    return tiny_flags(vaes, (folder / "train", folder / "eval"), folder) | QUIET | changes


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    return train(flags, tmp_path_factory.mktemp("trained"))


def test_training_from_the_latent_cache(trained):
    """A class that cannot be cached, or whose latents are not finite."""
    assert len(trained.losses) == 2 and all(map(math.isfinite, trained.losses))


@pytest.mark.parametrize("loss", LOSSES)
def test_training_with_each_loss(flags, tmp_path, loss):
    """A loss that reads a part of the VAE that this class does not have: the run ends at its first step."""
    losses = train(flags, tmp_path, **LOSSES[loss]).losses
    assert len(losses) == 2 and all(map(math.isfinite, losses))


def test_judging(flags, trained, tmp_path):
    """Costs that are measured after judging, on a part that this class does not have: the whole evaluation is lost."""
    judged = judge(trained.checkpoints[-1], flags["eval_data_dir"], tmp_path)
    assert judged["images"] == 1 and judged["ladder"]["reencode"]["parameters"] > 0


def test_translating_an_image(flags, trained, tmp_path, monkeypatch):
    """A class that the tool cannot find again by the checkpoint's record, or encode with."""
    photo = flags["eval_data_dir"] / "0.png"
    argv = ["translate.py", trained.checkpoints[-1], photo, "--output_dir", tmp_path, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    translate.main()
    assert load_file(tmp_path / "0.safetensors")["latents"].isfinite().all()
