"""The rungs that training cannot move: measured once for a set of images, whatever these are called."""

import shutil

import numpy as np
import pytest
import torch
from conftest import make_photo

from dataloader import ImageDataset, eval_loader
from evaluation import fixed_rungs
from evaluation.fixed_rungs import FixedRungs
from images.files import list_images
from vae_align import AlignConfig, align_module
from vaes.codec import Codec
from vaes.loading import load_vae_model
from vaes.pipeline import PipelineWithVAEs


@pytest.fixture(scope="module")
def pipeline(vae_folders):
    spaces = [Codec(load_vae_model(vae_folders[name], "", None, "cpu", torch.float32)) for name in ("kl4", "kl16")]
    torch.manual_seed(0)
    return PipelineWithVAEs(align_module(AlignConfig(hidden_channels=8, num_blocks=1)), *spaces)


@pytest.fixture
def judged_rungs(monkeypatch):
    """The names of the rungs of each evaluation, in the order in which they are made."""
    calls = []

    def evaluate(ladder, *args, **options):
        calls.append(list(ladder.rungs))
        return real(ladder, *args, show_progress=False, **options)

    real = fixed_rungs.evaluate
    monkeypatch.setattr(fixed_rungs, "evaluate", evaluate)
    return calls


def loader_of(folder, batch_size=2):
    return eval_loader(ImageDataset(list_images(folder), 32), batch_size, 0)


def test_fixed_rungs_are_measured_once_and_survive_a_resume(pipeline, photo_folders, judged_rungs):
    """Baselines that are measured at every evaluation, or again after each resume, also with another batch size."""
    fixed = FixedRungs()
    first = fixed.evaluate(pipeline, loader_of(photo_folders[1]), torch.float32)
    resumed = FixedRungs()
    resumed.load_state_dict(fixed.state_dict())
    again = resumed.evaluate(pipeline, loader_of(photo_folders[1], batch_size=3), torch.float32)
    assert judged_rungs == [["vae1", "vae2", "reencode", "untrained", "aligned"], ["aligned"]]
    assert list(first) == list(again)
    assert {name: again[name] for name in fixed.figures} == {name: first[name] for name in fixed.figures}
    assert again["aligned"]["psnr"] == pytest.approx(first["aligned"]["psnr"], rel=1e-5)


def test_other_pictures_of_the_same_names_are_measured_anew(pipeline, photo_folders, judged_rungs, tmp_path):
    """Baselines of the old pictures beside the module's figures on the new ones: in the log, the checkpoint, the report."""
    folder = tmp_path / "photos"
    shutil.copytree(photo_folders[1], folder)
    fixed = FixedRungs()
    before = fixed.evaluate(pipeline, loader_of(folder), torch.float32)
    rng = np.random.default_rng(9)
    for photo in sorted(folder.iterdir()):
        make_photo(rng, (80, 64)).save(photo, quality=95)
    after = fixed.evaluate(pipeline, loader_of(folder), torch.float32)
    fresh = FixedRungs().evaluate(pipeline, loader_of(folder), torch.float32)
    assert after == fresh
    assert after["vae2"]["psnr"] != before["vae2"]["psnr"]
