"""A run's name belongs to one run."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import as_argv, run_script
from runs import QUIET, train

from training.claims import RunClaim
from utils import UserError


def test_runs_that_start_together_have_names_of_their_own(tmp_path):
    """Two runs of one second that write one log and one best checkpoint; also where they share only `save_dir`."""
    claims = [RunClaim(tmp_path / "runs", tmp_path / "ckpt") for _ in range(3)]
    claims += [RunClaim(tmp_path / "elsewhere", tmp_path / "ckpt") for _ in range(3)]
    assert len({claim.name for claim in claims}) == 6
    assert len(list((tmp_path / "elsewhere").iterdir())) == 3  # no folder of a name that was given up


def test_a_name_whose_best_checkpoint_is_there_is_not_taken(tmp_path):
    """A best module that a run with another `log_dir` overwrites after the first one ended."""
    first = RunClaim(tmp_path / "a", tmp_path)
    (tmp_path / f"align_best_{first.name.removeprefix('align_')}.pth").touch()
    first.release()
    assert RunClaim(tmp_path / "b", tmp_path).name > first.name


def test_a_run_that_goes_on_elsewhere_is_refused(tmp_path):
    """Two processes that resume one run and write into each other's logs; a claim that outlives its run."""
    first = RunClaim(tmp_path, tmp_path)
    with pytest.raises(UserError, match=f"^{first.name}: another process is going on with this run"):
        RunClaim(tmp_path, tmp_path, first.name)
    first.release()
    RunClaim(tmp_path, tmp_path, first.name).release()
    assert not list(tmp_path.glob(".*.lock"))


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
