"""Reading back what a training run logged."""

import itertools
import json

from reports import RUN

from evaluation import run_logs


def test_logs_that_are_missing_or_damaged_give_no_curves(tmp_path):
    """A report that fails for want of a log, or a name in a checkpoint that leads out of the log folder."""
    content = {"run": RUN, "config": {"log_dir": "elsewhere"}}
    checkpoint = tmp_path / "ckpt" / "align_pipeline_20260101_000000.pth"
    assert run_logs.read_curves(checkpoint, content) is None
    folder = tmp_path / "elsewhere" / RUN  # moved together with the checkpoints
    folder.mkdir(parents=True)
    assert run_logs.read_curves(checkpoint, content) is None
    (folder / "metrics.jsonl").write_bytes(
        b'\xff\xfe\n[1]\n{"step": "x", "ladder": 3}\n{"step": 1, "ladder": {"aligned": 5}}\n{"step": 2, "loss": "x"}\n'
    )
    assert run_logs.read_curves(checkpoint, content) is None
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "ladder": {"aligned": {"psnr": 20, "ssim": NaN}}}\n')
    assert run_logs.read_curves(checkpoint, content)["evaluations"] == {"aligned": {"psnr": [(1, 20)]}}
    for run in (None, 5, "", "../" + RUN):
        assert run_logs.run_folder(checkpoint, {**content, "run": run}) is None


def test_an_older_runs_log_is_read_under_the_names_of_today():
    """Curves that go missing after an update: older runs wrote no losses, and called VAE2's own reconstruction otherwise."""
    entries = [{"step": 4, "epoch": 1.0, "ladder": {"vae2": {"psnr": 30.0}, "aligned": {"psnr": 20.0}}}]
    curves = run_logs.evaluation_curves(entries)
    assert curves == {"vae2": {"psnr": [(4, 30.0)]}, "aligned": {"psnr": [(4, 20.0)]}}
    assert run_logs.loss_curve(entries) == []


def test_a_long_runs_loss_is_thinned_out_evenly(tmp_path):
    """A page of many megabytes from a run of a million steps; a curve that is cut off instead."""
    lines = [json.dumps({"step": step, "loss": float(step), "learning_rate": 0.1}) for step in range(5000)]
    (tmp_path / "training.jsonl").write_text("\n".join(lines))
    points = run_logs.loss_curve(run_logs.read_lines(tmp_path / run_logs.TRAINING_FILE))
    assert 1000 < len(points) <= run_logs.LONGEST_CURVE
    assert points[-1][0] > 4990
    assert {second[0] - first[0] for first, second in itertools.pairwise(points)} == {3}
