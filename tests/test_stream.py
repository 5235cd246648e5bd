"""Training images that are read as they come: shards and data sets, their order, and runs that go on where they were."""

import functools
import http.server
import itertools
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, as_argv, make_photo, run_script, tiny_flags
from drawn import encoded
from hostile import refusal
from runs import LAUNCHER, QUIET, assert_same_tensors, results_of, tiny_of, train, write_shard

import train_align_with_args as train_script
from dataloader import StreamDataset, StreamSampler, WorkersLost, open_stream, shards_of, stream_loader

IMAGES = (7, 5, 6)  # in each shard


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


def test_every_image_of_a_shard_is_read_whatever_its_format(tmp_path, caplog):
    """Half of the images lost since the first samples are JPEG; samples that need the same files; captions that are parsed."""
    photo = make_photo(np.random.default_rng(1), (48, 40))
    jpeg, png, webp = (encoded(kind, photo) for kind in ("JPEG", "PNG", "WEBP"))
    files = {f"{number}.jpg": jpeg for number in range(6)}
    write_shard(tmp_path / "0.tar", files | {"6.PNG": png, "7.json": b"{", "7.webp": webp})
    write_shard(tmp_path / "1.tar", {"8.mask.png": webp, "8.png": png, "8.txt": b"\xff", "._9.png": b"", "10.jpeg": jpeg})
    dataset = dataset_of(tmp_path)
    with caplog.at_level("INFO"):
        dataset.look_at_first("--flag")
    assert "a sample has several images, .mask.png, .png; using .png" in caplog.text
    images = in_one_row(itertools.islice(iter(sampler_of(tmp_path, batch_size=1)), 10))
    contents = [content for _, (_, content) in images]
    assert (contents.count(jpeg), contents.count(png), contents.count(webp)) == (7, 2, 1)


def cut(content):
    return content[: len(content) // 2]


BROKEN = {  # kind: (what is done to a shard, what is said)
    "cut short": (lambda content: content[:1500], "unexpected end of data"),
    "cut between two files": (cut, "empty header"),
    "empty": (lambda content: b"", "empty header"),
    "zeros": (lambda content: bytes(len(content)), "no file in it"),
    "damaged header": (lambda content: content.replace(b"1_2.jpg", b"\0_2.jpg"), "checksum"),
    "zeros to its end": (lambda content: cut(content)[: len(content) // 1024 * 512] + bytes(4 << 20), ""),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_shard_is_named_and_left_out_and_may_be_gone_at_a_resume(shards, tmp_path, caplog, kind):
    """A run that ends at one of a thousand shards without its name, that loses the rest of it without a word, or that can never
    go on once the shard is taken away."""
    damage, said = BROKEN[kind]
    for shard in shards.iterdir():
        (tmp_path / shard.name).write_bytes(damage(shard.read_bytes()) if shard.name == "1.tar" else shard.read_bytes())
    whole = sampler_of(tmp_path)
    batches = list(itertools.islice(iter(whole), 40))
    names = {name for batch in batches for _, (name, _) in batch}
    good = {f"{tmp_path}/{shard}.tar#{shard}_{image}" for shard in (0, 2) for image in range(IMAGES[shard])}
    assert {name for name in names if "1.tar" not in name} == good
    assert caplog.text.count("left out") == 1 and f"{tmp_path / '1.tar'}" in caplog.text and said in caplog.text
    place = whole.state_after(20)
    resumed = sampler_of(tmp_path)
    resumed.go_on(20, place)
    assert list(itertools.islice(iter(resumed), 20)) == batches[20:]
    (tmp_path / "1.tar").unlink()
    sampler_of(tmp_path).go_on(21, resumed.state_after(21))  # before it has come to the shard itself
    without = sampler_of(tmp_path)
    without.go_on(20, place)
    assert all("1.tar" not in name for name in in_one_row(draw(without, 20)))
    again = sampler_of(tmp_path)
    again.go_on(30, without.state_after(30))
    (tmp_path / "2.tar").unlink()
    refusal(lambda: sampler_of(tmp_path).go_on(20, place), "not the shards")


def test_a_server_that_is_gone_is_no_broken_shard(shards, monkeypatch):
    """An epoch of what was read before the network failed, all other shards left out as missing."""
    import datasets

    for name in ("STREAMING_READ_MAX_RETRIES", "STREAMING_OPEN_MAX_RETRIES"):
        monkeypatch.setattr(datasets.config, name, 1)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}/{{0..3}}.tar"  # of which the last is not there
        passes = in_one_row(draw(sampler_of(place, batch_size=1, buffer=1), sum(IMAGES)))
        assert len(set(passes)) == sum(IMAGES)
        batches = iter(sampler_of(place, batch_size=1, buffer=1))
        next(batches)
        server.shutdown()
    with pytest.raises(WorkersLost, match=r"cannot be read on \(http://.*\.tar"):
        list(itertools.islice(batches, 40))


def test_braces_and_empty_shards_are_refused_in_one_line(tmp_path):
    """A list of a billion names, which takes all memory; a traceback where no shard can be read."""
    for place in ("a{0..999999999999}.tar", "a{0..9999}{0..9999}.tar", "http://a.b/{0..99999999}.tar"):
        refusal(lambda place=place: open_stream(place, "--flag"), f"--flag {place}: more than")
    (tmp_path / "0.tar").touch()
    (tmp_path / "1.tar").mkdir()
    refusal(lambda: dataset_of(tmp_path).look_at_first("--flag"), "none of 2 shards can be read")


def test_images_of_which_none_can_be_read_are_not_the_learning_rates_fault(flags, tmp_path):
    """Advice to lower the learning rate where the data set is broken."""
    photo = encoded("JPEG", make_photo(np.random.default_rng(1), (48, 40)))
    write_shard(tmp_path / "0.tar", {"0.jpg": photo} | {f"{number}.jpg": b"no picture" for number in range(1, 30)})
    changes = {**QUIET, "streaming": True, "train_data_dir": tmp_path / "0.tar", "epoch_images": 30, "train_batch_size": 1}
    changes |= {"shuffle_buffer": 1, "max_bad_steps": 3, "init": "random"}
    text = refusal(lambda: train(flags, tmp_path, **changes), "--train_data_dir")
    assert "none of its images can be read" in text and "learning_rate" not in text


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
