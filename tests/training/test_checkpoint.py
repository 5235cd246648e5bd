"""Which files a run keeps and deletes beside its checkpoints, and the name that belongs to it alone."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import as_argv, run_script
from runs import QUIET, train

from training.checkpoint import claim_name, drop_abandoned, release_name
from utils import UserError


def test_half_written_checkpoints_do_not_pile_up(tmp_path):
    """A disk that kills fill up; a file deleted under a run that is writing it; another file's deletion."""
    names = (".align_best_20260101_000000.pth.x.tmp", ".model.safetensors.x.tmp", "my.tmp", "align_x.pth")
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".align_pipeline_20260101_000001.pth.y.tmp").touch()
    drop_abandoned(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {*names[2:], ".align_pipeline_20260101_000001.pth.y.tmp"}
    drop_abandoned(tmp_path / "nowhere")


def test_runs_that_start_together_have_names_of_their_own(tmp_path):
    """Two runs that write one log or one best checkpoint; two that resume one run; a claim that outlives its run."""
    claims = [claim_name(tmp_path / "runs", tmp_path / "ckpt") for _ in range(3)]
    claims += [claim_name(tmp_path / "elsewhere", tmp_path / "ckpt") for _ in range(3)]
    assert len({name for name, _ in claims}) == 6
    assert len(list((tmp_path / "elsewhere").iterdir())) == 3  # no folder of a name that was given up
    name, lock = claim_name(tmp_path / "a", tmp_path)
    (tmp_path / f"align_best_{name.removeprefix('align_')}.pth").touch()
    release_name(lock)
    assert claim_name(tmp_path / "b", tmp_path)[0] > name
    folder = tmp_path / "resumed"
    name, lock = claim_name(folder, folder)
    with pytest.raises(UserError, match=f"^{name}: another process is going on with this run"):
        claim_name(folder, folder, name)
    release_name(lock)
    release_name(claim_name(folder, folder, name)[1])
    assert not list(folder.glob(".*.lock"))


def test_programs_that_start_together_keep_their_results_apart(flags, tmp_path):
    """A name that is looked at by both before either takes it: two processes, one cache, one folder of logs."""
    train(flags, tmp_path, **QUIET, cache_only=True)
    changes = {"max_train_steps": 2, "visualize_frequency": 0}
    runs = [as_argv(flags | changes | {"learning_rate": rate}) for rate in (1e-3, 1e-2)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda argv: run_script("train_align_with_args.py", *argv, cwd=tmp_path), runs))
    logs = sorted((tmp_path / "runs").iterdir())
    assert len(logs) == len(list((tmp_path / "ckpt").glob("align_best_*.pth"))) == 2
    for log in logs:
        steps = [json.loads(line)["step"] for line in (log / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps)
        assert len(list(log.glob("events.*"))) == 1
