"""A set judged by two real processes, each with its share of the images, against one process."""

import numpy as np
import pytest
from conftest import as_argv, make_photo, run_script
from reports import read_json, save_checkpoint
from runs import LAUNCHER

import eval_align


@pytest.fixture(scope="module")
def folders(vae_folders, tmp_path_factory):
    """{processes: the output folder of eval_align.py}: seven photos and a broken one, in batches of 2."""
    root = tmp_path_factory.mktemp("shared")
    (root / "photos").mkdir()
    rng = np.random.default_rng(3)
    for number in range(7):
        make_photo(rng, (48, 40)).save(root / "photos" / f"{number}.png")
    (root / "photos" / "3_broken.png").write_bytes(b"no picture")
    flags = {
        "checkpoint": save_checkpoint(root, vae_folders),
        "eval_data_dir": root / "photos",
        "eval_batch_size": 2,
        "num_workers": 0,
        "device": "cpu",
        "metrics": ["ssim", "st_lpips", "texture"],
        "num_samples": 2,
        "save_visualizations": True,
    }
    eval_align.main(as_argv(flags | {"output_dir": root / "1"}))
    shared = as_argv(flags | {"output_dir": root / "2"})
    run_script("eval_align.py", *shared, launcher=LAUNCHER, env={"ACCELERATE_USE_CPU": "true"})
    return {processes: root / str(processes) for processes in (1, 2)}


def without_times(metrics):
    """What metrics.json holds, but for what no two evaluations have in common."""
    ladder = {rung: {name: value for name, value in figures.items() if name != "milliseconds"}
              for rung, figures in metrics["ladder"].items()}  # fmt: skip
    verdict = {name: value for name, value in metrics["verdict"].items() if name != "sentences"}
    return metrics | {"ladder": ladder, "verdict": verdict, "settings": None}


def test_two_processes_find_the_figures_of_one_to_the_last_digit(folders):
    """Images judged twice or by nobody; means of means; sums in the order in which processes end; an interval whose groups
    are those of one process; values in another order than the paths."""
    one, two = (without_times(read_json(folders[processes] / "metrics.json")) for processes in (1, 2))
    assert one["images"] == 7 and len(one["unreadable"]) == 1
    assert one["ladder"]["aligned"]["texture"] > 0 and one["intervals"]["aligned"]["texture"] > 0
    assert one.keys() == two.keys()
    for name in one:
        if name != "verdict":
            assert one[name] == two[name], name
    assert (folders[1] / "metrics.csv").read_text().count("\n") == (folders[2] / "metrics.csv").read_text().count("\n")


def test_every_image_has_its_picture(folders):
    """Pictures of the main process's share alone."""
    names = [sorted(picture.name for picture in folders[processes].glob("*.png")) for processes in (1, 2)]
    assert names[0] == names[1] and len(names[0]) == 7
    for name in names[0]:
        assert (folders[1] / name).read_bytes() == (folders[2] / name).read_bytes()
