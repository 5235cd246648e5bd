"""Pairs of VAEs whose strides differ: trained, resumed, judged and used."""

import pytest
import torch
from families import make_family
from runs import QUIET, judge, train

from vaes.pipeline import PipelineWithVAEs

STRIDES = {"sd15": 8, "sana": 32, "flux2": 16}


@pytest.fixture(scope="module")
def family_folders(tmp_path_factory):
    """{name: folder} of tiny models of strides 8, 16 and 32."""
    root = tmp_path_factory.mktemp("families")
    for name in STRIDES:
        make_family(name).save_pretrained(root / name)
    return {name: root / name for name in STRIDES}


@pytest.mark.parametrize(("first", "second"), [("sd15", "sana"), ("sana", "sd15"), ("flux2", "sd15")])
def test_pairs_of_different_stride_train_resume_judge_and_translate(flags, family_folders, tmp_path, first, second):
    """A grid that a module, the linear map, the ladder or a resumed run takes for the other one's."""
    flags = flags | QUIET | {"image_size": 64, "vae1_path": family_folders[first], "vae2_path": family_folders[second]}
    flags |= {"vae1_subfolder": "", "vae2_subfolder": "", "vae1_space": first, "vae2_space": second, "input_types": ["latent"]}
    train(flags, tmp_path, max_train_steps=2)
    run = train(flags, tmp_path, max_train_steps=3, resume=True)
    assert run.last["step"] == 3
    judged = judge(run.checkpoints[-1], flags["eval_data_dir"], tmp_path / "out")
    assert all(judged["ladder"][rung]["latent_mse"] is not None for rung in ("aligned", "linear", "reencode"))
    pipeline = PipelineWithVAEs.from_checkpoint(run.checkpoints[-1])
    latents = torch.randn(1, pipeline.space1.channels, 128 // STRIDES[first], 192 // STRIDES[first])
    grid = (128 // STRIDES[second], 192 // STRIDES[second])
    assert pipeline.translate(latents).shape == (1, pipeline.space2.channels, *grid)
