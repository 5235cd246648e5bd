"""Training images that are read as they come: shards and data sets, their order, and runs that go on where they were."""

import functools
import http.server
import io
import itertools
import tarfile
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, as_argv, make_photo, run_script, tiny_flags
from drawn import encoded
from hostile import refusal
from runs import LAUNCHER, QUIET, assert_same_tensors, results_of, tiny_of, train

import train_align_with_args as train_script
from dataloader import StreamDataset, StreamSampler, open_stream, shards_of, stream_loader

IMAGES = (7, 5, 6)  # in each shard


def write_shard(path, files):
    with tarfile.open(path, "w") as shard:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of three shards, 0.tar, 1.tar and 2.tar."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(2)
    for number, count in enumerate(IMAGES):
        files = {}
        for image in range(count):
            files[f"{number}_{image}.jpg"] = encoded("JPEG", make_photo(rng, (48, 40)))
            files[f"{number}_{image}.json"] = b'{"caption": "a photo"}'
        write_shard(folder / f"{number}.tar", files)
    return folder


def dataset_of(place, **options):
    return StreamDataset(open_stream(str(place), "--train_data_dir"), 32, **{"seed": 3, "random_flip": True, **options})


def sampler_of(place, rank=0, world=1, buffer=4, batch_size=2):
    return StreamSampler(dataset_of(place), batch_size, 3, buffer, rank, world)


def draw(sampler, batches):
    """[[name of each image] of so many batches]."""
    return [[name for _, (name, _) in batch] for batch in itertools.islice(iter(sampler), batches)]


def in_one_row(batches):
    return [name for batch in batches for name in batch]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_pass_holds_every_image_once_and_passes_differ(shards, world):
    """Images that two processes train on, or none; a buffer whose rest is dropped at the end of a pass; one order for ever."""
    passes = {0: [], 1: []}
    for rank in range(world):
        sampler = sampler_of(shards, rank, world, batch_size=1)
        names = in_one_row(draw(sampler, 2 * max(IMAGES) if world == 3 else 2 * sum(IMAGES) // world))
        for step, name in enumerate(names, 1):
            passes.setdefault(sampler.state_after(step)["turn"], []).append(name)
    assert sorted(passes[0]) == sorted(set(passes[0])) and len(passes[0]) == sum(IMAGES)
    assert passes[1] != passes[0] and passes[1]


@pytest.mark.parametrize("world", [1, 2])
def test_an_iteration_from_any_place_goes_on_bit_for_bit(shards, world):
    """A buffer that is refilled with other images, a pass that starts again, a crop drawn by another number."""
    whole = sampler_of(shards, 0, world)
    batches = list(itertools.islice(iter(whole), 30))
    for step in (1, 2, 3, 4, 9, 10, 17, 29):
        resumed = sampler_of(shards, 0, world)
        resumed.go_on(step, whole.state_after(step))
        assert list(itertools.islice(iter(resumed), 30 - step)) == batches[step:], step


def test_the_order_does_not_depend_on_workers(shards, spawned):
    """A stream that every worker reads for itself, which another number of them would deal out anew."""
    seen = []
    for workers in (0, 2):
        loader = stream_loader(dataset_of(shards), 3, workers, 3, 4)
        seen.append(list(itertools.islice(iter(loader), 8)))
    for alone, shared in zip(*seen):
        assert alone["path"] == shared["path"] and len(set(alone["path"])) == 3
        assert torch.equal(alone["pixel_values"], shared["pixel_values"])


def test_one_image_has_another_crop_in_another_pass(shards):
    """A run over a small stream that sees each image in one crop only."""
    loader = stream_loader(dataset_of(shards / "1.tar"), 5, 0, 3, 5)
    first, second = itertools.islice(iter(loader), 2)
    assert sorted(first["path"]) == sorted(second["path"])
    crops = [dict(zip(batch["path"], batch["pixel_values"])) for batch in (first, second)]
    assert sum(torch.equal(crops[0][name], crops[1][name]) for name in crops[0]) <= 2  # small ones may fall together


def test_places_of_shards(tmp_path):
    """A glob that is taken for a name, shards in the order of the file system, braces that the shell would have expanded."""
    for number in (10, 9, 8):
        (tmp_path / f"{number:03d}.tar").touch()
    every = [str(tmp_path / f"{number:03d}.tar") for number in (8, 9, 10)]
    assert shards_of(str(tmp_path)) == shards_of(str(tmp_path / "*.tar")) == every
    assert shards_of(str(tmp_path / "{008..010}.tar")) == every
    assert shards_of("https://a.b/{08..10}.tar") == [f"https://a.b/{number}.tar" for number in ("08", "09", "10")]


def test_shards_by_url(shards):
    """Shards that must be downloaded first."""
    pytest.importorskip("aiohttp")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{{0..2}}.tar"
        names = in_one_row(draw(sampler_of(url, batch_size=1), sum(IMAGES)))
        server.shutdown()
    assert len(set(names)) == sum(IMAGES)


def test_a_data_set_says_how_many_images_it_has(tmp_path):
    """A data set of the hub that streaming cannot read, or whose epoch is a guess although its size is known."""
    import datasets

    rng = np.random.default_rng(1)
    rows = {"image": [{"bytes": encoded("PNG", make_photo(rng, (40, 40))), "path": None} for _ in range(6)]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    (tmp_path / "photos").mkdir()
    data.to_parquet(str(tmp_path / "photos" / "train.parquet"))
    dataset = dataset_of(tmp_path / "photos")
    assert len(dataset) in (6, 10_000)  # what the folder's own metadata says, if any
    assert len(dataset_of(tmp_path / "photos", epoch_images=12)) == 12
    batch = next(iter(stream_loader(dataset, 6, 0, 3, 6)))
    assert batch["pixel_values"].shape == (6, 3, 32, 32) and sorted(batch["path"])[0].endswith("photos[0]")


def test_images_that_cannot_be_read_are_named_and_replaced(tmp_path):
    """A run that ends at the first broken image of millions, or trains on a black one; a batch without any image."""
    photo = encoded("JPEG", make_photo(np.random.default_rng(1), (48, 40)))
    write_shard(tmp_path / "0.tar", {"0.jpg": b"no picture", "1.jpg": photo, "2.jpg": photo[:100]})
    batch = next(iter(stream_loader(dataset_of(tmp_path / "0.tar"), 3, 0, 3, 3)))
    assert batch["pixel_values"].isfinite().all() and batch["pixel_values"].std() > 0.05
    assert len(batch["unreadable"]) == 2 and "0.tar#0" in "".join(batch["unreadable"])
    alone = list(itertools.islice(iter(stream_loader(dataset_of(tmp_path / "0.tar"), 1, 0, 3, 3)), 3))
    assert sorted(bool(batch["pixel_values"].isfinite().all()) for batch in alone) == [False, False, True]


@pytest.mark.parametrize(("files", "said"), [
    (None, "no such shard"),
    ({"a.txt": b"text"}, "no image in this row"),
    ({"a.jpg": b"no picture"}, "none of 1 files can be read as an image"),
])  # fmt: skip
def test_what_is_no_stream_of_images_is_refused(flags, tmp_path, files, said):
    """A traceback of a library's, or a run that begins and ends at its first step."""
    if files:
        write_shard(tmp_path / "0.tar", files)
    changes = {"streaming": True, "train_data_dir": tmp_path / "0.tar"}
    refusal(lambda: train_script.main(as_argv(flags | changes)), f"--train_data_dir {tmp_path / '0.tar'}", said)


def test_shards_need_streaming(flags, shards):
    """A file that is called no folder, without a word of what would read it."""
    refusal(lambda: train_script.main(as_argv(flags | {"train_data_dir": shards / "0.tar"})), "streaming")


def test_a_run_counts_its_epochs_and_refuses_other_shards_at_a_resume(flags, tmp_path, shards):
    """An epoch that ends with a pass, which no process knows; a resumed run that goes on with other images."""
    changes = {**QUIET, "streaming": True, "train_data_dir": shards, "epoch_images": 8, "shuffle_buffer": 4}
    run = train(flags, tmp_path, **changes, epochs=3)
    assert run.last["step"] == 6 and run.last["epoch"] == 3
    assert not (tmp_path / "cache").exists()
    more = changes | {"resume": True, "epochs": 4}
    refusal(lambda: train(flags, tmp_path, **more | {"train_data_dir": shards / "0.tar"}), "not the shards")
    assert train(flags, tmp_path, **more).last["step"] == 8


def test_a_stream_is_tried_before_hours_go_into_it(flags, tmp_path, shards, capsys):
    """--dry_run that knows no streams, or counts a cache that there will not be."""
    train_script.main(as_argv(flags | {"streaming": True, "train_data_dir": shards, "epoch_images": 8, "dry_run": True}))
    said = capsys.readouterr().out
    assert "(2 in an epoch) of 4 images" in said and "0 MB for 0 views" in said


def test_two_processes_of_which_one_is_killed_end_bit_identical(vae_folders, photo_folders, shards, tmp_path):
    """Processes that go on at each other's places in the stream, or at those that were read ahead."""
    flags = tiny_flags(vae_folders, photo_folders, tmp_path) | QUIET
    flags |= {"streaming": True, "train_data_dir": shards / "{0..1}.tar", "epoch_images": 12, "shuffle_buffer": 4}
    flags |= {"epochs": 4, "save_steps": 3, "train_batch_size": 2, "num_workers": 1, "ema_decay": 0.9}
    env = {"ACCELERATE_USE_CPU": "true"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    run_script("train_align_with_args.py", *as_argv(tiny_of(flags, whole)), launcher=LAUNCHER, env=env, cwd=whole)
    argv = ["kept", "2", "--", *as_argv(tiny_of(flags, broken))]  # after the checkpoint at step 6
    killed = run_script(str(ROOT / "tests" / "mortal.py"), *argv, launcher=LAUNCHER, env=env, cwd=broken, check=False)
    assert killed.returncode and results_of(broken).last["step"] == 6, killed.stderr
    argv = as_argv(tiny_of(flags, broken) | {"resume": True})
    run_script("train_align_with_args.py", *argv, launcher=LAUNCHER, env=env, cwd=broken)
    assert results_of(broken).last["step"] == 12
    assert_same_tensors(results_of(broken).last, results_of(whole).last)
