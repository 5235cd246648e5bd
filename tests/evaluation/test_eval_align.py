"""The program eval_align.py: its files, its flags, its refusals, and several processes."""

import io
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import as_argv, make_photo, run_script
from PIL import Image
from reports import HOSTILE, read_json, save_checkpoint
from runs import LAUNCHER

import eval_align
from evaluation import report
from evaluation.verdict import as_text
from runtime.cli import alone_in
from utils import UserError


def test_metrics_json_holds_what_was_measured_once_for_each_rung(judged):
    """Infinity where JSON has none, names that do not survive, keys that others read and that are gone; checkpoints of the
    same VAEs judged in two passes, rungs that overwrite one another, weights mixed up."""
    assert judged.metrics == judged.results
    assert judged.metrics["images"] == len(HOSTILE)
    assert {os.path.basename(path)[:-4] for path in judged.metrics["paths"]} == set(HOSTILE)
    assert len(judged.metrics["unreadable"]) == 1
    ladder = judged.metrics["ladder"]
    assert list(ladder) == ["vae1", "vae2", "reencode", "linear", "untrained", "aligned", "aligned_2"]
    assert [each["row"] for each in judged.metrics["checkpoints"]] == ["aligned", "aligned_2"]
    assert ladder["aligned"]["latent_mse"] != ladder["aligned_2"]["latent_mse"]
    assert [figures["kind"] for figures in ladder.values()] == [*list(ladder)[:-1], "aligned"]
    assert len({figures["label"] for figures in ladder.values()}) == len(ladder)
    aligned = ladder["aligned"]
    for name in ("label", "latent_mse", "psnr", "ssim", "psnr_vs_vae2", "ssim_vs_vae2", "colour_bias", "macs", "parameters"):
        assert name in aligned
    assert len(aligned["latent_mse_by_channel"]) == 16
    assert np.mean(aligned["latent_mse_by_channel"]) == pytest.approx(aligned["latent_mse"], rel=1e-5)
    assert judged.metrics["ladder"]["vae2"]["psnr_vs_vae2"] is None
    assert judged.metrics["left_out_metrics"].keys() == {"ms_ssim"}  # 32 px are too few


def test_a_checkpoint_of_other_vaes_is_refused_in_one_line(judged, vae_folders, tmp_path):
    """Figures beside each other that have other VAEs, and so other baselines."""
    other = save_checkpoint(tmp_path, vae_folders, ("tiny4", "kl16"), seed=2)
    checkpoints = [judged.flags["checkpoint"][0], other]
    flags = {**judged.flags, "checkpoint": checkpoints, "output_dir": tmp_path / "out", "proxy": None}
    with pytest.raises(UserError, match=f"--checkpoint {other}: goes between other VAEs .* judge it by itself"):
        eval_align.main(as_argv(flags))


def test_a_checkpoint_alone_has_the_figures_it_has_beside_others(judged, vae_folders, tmp_path):
    """Figures that depend on the checkpoints beside them; pictures that nobody asked for."""
    flags = {**judged.flags, "checkpoint": judged.flags["checkpoint"][1], "output_dir": tmp_path, "num_samples": 0}
    flags |= {"save_visualizations": None, "proxy": None, "metrics": "ssim"}
    alone = eval_align.main(as_argv(flags))["ladder"]["aligned"]
    beside = judged.metrics["ladder"]["aligned_2"]
    for name in ("psnr", "ssim", "latent_mse", "parameters", "macs"):
        assert alone[name] == pytest.approx(beside[name], rel=1e-4)
    assert "<img" not in (tmp_path / "report.html").read_text(encoding="utf-8").split("<dialog")[0]


def test_files_have_names_every_system_takes_and_keep_no_password(judged):
    """A picture whose name the file system refuses, or that overwrites another image's; a proxy's password in a file that is
    passed on; a command that does not make the report again."""
    pictures = sorted(path.name for path in judged.out.glob("*.png"))
    assert len(pictures) == len(HOSTILE)
    assert all(re.fullmatch(r"\d{5}_.*\.png", name) and name.isprintable() and len(name.encode()) < 255 for name in pictures)
    with Image.open(judged.out / pictures[0]) as picture:
        picture.load()
    for path in judged.out.glob("*.*"):
        assert b"secret" not in path.read_bytes(), path
    command = judged.metrics["settings"]["command"]
    assert "--proxy" not in command
    assert "--num_samples 4" in command
    assert eval_align.command_line(["--proxy=http://a:b@c", "--device", "cpu"]) == "python eval_align.py --device cpu"


def test_interrupt_leaves_the_older_report_whole(judged, tmp_path, monkeypatch):
    """Half a page, new figures beside an old page, temporary files that stay."""
    (tmp_path / "report.html").write_text("older")
    monkeypatch.setattr(report, "render", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    flags = {**judged.flags, "output_dir": tmp_path, "num_samples": 1, "save_visualizations": None, "proxy": None}
    with pytest.raises(KeyboardInterrupt):
        eval_align.main(as_argv({**flags, "checkpoint": flags["checkpoint"][0]}))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "older"


def test_module_that_has_gone_wrong_still_gets_its_report(judged, vae_folders, tmp_path, capsys):
    """A crash on the first figure that is not a number, at the end of a long run; a terminal that does not say what to mind."""
    path = save_checkpoint(tmp_path, vae_folders)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["out.bias"] += 3e38  # finite, as a checkpoint must be, but its latent error is not
    torch.save(content, path)
    flags = {"checkpoint": path, "eval_data_dir": judged.flags["eval_data_dir"], "output_dir": tmp_path / "out"}
    eval_align.main(as_argv({**flags, "num_workers": 0, "device": "cpu", "num_samples": 2, "metrics": "ssim"}))
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["ladder"]["aligned"]["psnr"] is None
    assert metrics["verdict"]["answer"] == "no"
    assert as_text(metrics["verdict"]) in capsys.readouterr().out and "broken.png" in as_text(metrics["verdict"])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "not finite" in page
    assert "nan" not in re.sub(r'"data:[^"]*"', "", page).lower()


def test_two_evaluations_do_not_share_a_folder(judged, tmp_path):
    """A report that another evaluation replaces, pictures that its tidying deletes, both without a word."""
    with alone_in(tmp_path, "--output_dir", "evaluation"):
        with pytest.raises(UserError, match=f"--output_dir {tmp_path}: another evaluation is at work there"):
            eval_align.main(as_argv({**judged.flags, "output_dir": tmp_path, "proxy": None}))
        assert [path.name for path in tmp_path.iterdir()] == [".evaluation.lock"]


def test_what_a_terminal_takes_for_a_command_is_printed_as_an_escape(capsys, monkeypatch):
    """A checkpoint's name that sets the window's title, or draws a line of its own; escapes for arrows that it lacks."""
    eval_align.say("a\x1b]0;title\x07b 長\n\udcff")
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07b 長\n\\udcff\n"
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    eval_align.say("PSNR ↑ ±1, MSE ↓")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().decode("latin-1") == "PSNR ^ ±1, MSE v\n"


def test_pictures_of_an_older_evaluation_do_not_stay(judged, vae_folders, tmp_path):
    """Pictures of other images, of an evaluation that was killed too, beside a report that does not know them; a user's own
    picture, or the copy that a user made of one, deleted with them; a killed evaluation's lock that ends all further ones."""
    path = save_checkpoint(tmp_path, vae_folders)
    for name in ("one", "two"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / "photos" / f"{name}.png")
    flags = {"checkpoint": path, "eval_data_dir": tmp_path / "photos", "output_dir": tmp_path / "out", "num_samples": 0}
    flags |= {"num_workers": 0, "device": "cpu", "metrics": "ssim", "save_visualizations": True}
    eval_align.main(as_argv(flags))
    (tmp_path / "out" / "metrics.json").unlink()  # as after a kill in the middle
    (tmp_path / "out" / ".evaluation.lock").touch()
    (tmp_path / "out" / ".00001_two.png.0123abcd.tmp").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "00007_mine.png")
    shutil.copy(tmp_path / "out" / "00001_two.png", tmp_path / "out" / "00008_kept.png")
    (tmp_path / "photos" / "two.png").unlink()
    eval_align.main(as_argv(flags))
    kept = ["00000_one.png", "00007_mine.png", "00008_kept.png"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir() if file.suffix in (".png", ".tmp")) == kept


def assert_close(one, two, where=()):
    """That two values from JSON agree to 1e-9."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        one, two = list(one.items()), [(name, two[name]) for name in one]
    if isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for place, pair in enumerate(zip(one, two)):
            assert_close(*pair, (*where, place))
    else:
        assert one == (pytest.approx(two, rel=1e-9, abs=1e-9) if isinstance(two, float) else two), where


def test_two_processes_find_the_figures_of_one(vae_folders, tmp_path):
    """Images judged twice or by nobody; means of means; an interval whose groups are those of one process; values in another
    order than the paths; pictures of the main process's share alone, on the page too; enlarged images that only one counts."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(3)
    for number in range(12):  # more than the groups of the jackknife
        make_photo(rng, (48, 40) if number > 2 else (40, 30)).save(tmp_path / "photos" / f"{number:02}.png")
    (tmp_path / "photos" / "03_broken.png").write_bytes(b"no picture")
    flags = {"checkpoint": save_checkpoint(tmp_path, vae_folders), "eval_data_dir": tmp_path / "photos", "device": "cpu"}
    flags |= {"eval_batch_size": 2, "num_workers": 0, "num_samples": 2, "save_visualizations": True}
    flags["metrics"] = ["ssim", "st_lpips", "texture"]
    out = [tmp_path / "one", tmp_path / "two"]
    eval_align.main(as_argv(flags | {"output_dir": out[0]}))
    shared = as_argv(flags | {"output_dir": out[1]})
    run_script("eval_align.py", *shared, launcher=LAUNCHER, env={"ACCELERATE_USE_CPU": "true"})
    one, two = (read_json(folder / "metrics.json") for folder in out)
    assert one["images"] == 12 and len(one["unreadable"]) == 1 and one["enlarged"] == 3
    assert one["ladder"]["aligned"]["texture"] > 0 and one["intervals"]["aligned"]["texture"] > 0
    for results in (one, two):
        del results["settings"], results["verdict"]["time_fraction"]
        for figures in results["ladder"].values():
            figures.pop("milliseconds", None)
    assert_close(one, two)
    pictures = [{picture.name: picture.read_bytes() for picture in folder.glob("*.png")} for folder in out]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 12
    pages = [re.findall('"data:image[^"]*"', (folder / "report.html").read_text(encoding="utf-8")) for folder in out]
    assert pages[0] == pages[1] and len(pages[0]) == 2 * 13
