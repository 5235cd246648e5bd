"""Folders to batches: which images are found, in which order they come, and the same through workers."""

import itertools
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import as_argv
from drawn import BLUE, PNG, RED, levels
from hostile import refusal
from PIL import Image

from dataloader import (
    MOST_HELD_OUT,
    EpochSampler,
    ImageDataset,
    eval_loader,
    find_images,
    hold_out,
    open_stream,
    train_loader,
)
from images.files import list_images
from train_align_with_args import create_data_loaders, open_datasets, parse_args, resolve
from utils import UserError

# ----------------------------------------------------------------------------------------------------------------------
# Order


def draw(sampler, steps):
    batches = iter(sampler)
    return [next(batches) for _ in range(steps)]


@pytest.mark.parametrize(("length", "batch_size", "world"), [(10, 4, 1), (10, 3, 2), (3, 4, 2), (1, 4, 1), (8, 4, 2)])
@pytest.mark.parametrize("views", [0, 3])
def test_every_image_is_seen_in_every_epoch_in_batches_of_one_size(length, batch_size, world, views):
    """A last batch that is dropped or short; an image that only one process would have seen."""
    samplers = [EpochSampler(length, batch_size, 0, views, rank, world) for rank in range(world)]
    steps = samplers[0].steps_per_epoch
    assert len(samplers[0]) == steps == -(-length // (batch_size * world))
    drawn = [draw(sampler, 3 * steps) for sampler in samplers]
    assert {len(batch) for batches in drawn for batch in batches} == {batch_size}
    for epoch in range(3):
        seen = [item for batches in drawn for batch in batches[epoch * steps : (epoch + 1) * steps] for item in batch]
        counts = np.bincount([index for index, _ in seen], minlength=length)
        assert counts.min() >= 1 and counts.max() - counts.min() <= 1 and len(counts) == length
        assert all(0 <= view < views if views else view == epoch for _, view in seen)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 8, 11])
def test_evaluation_batches_are_shared_out_whole(length, world):
    """An image that two processes judge, or none; a batch of other images than one process would have."""
    dataset = ImageDataset(["a.png"] * length, 8)
    whole = eval_loader(dataset, 4, 0).batch_sampler
    shares = [eval_loader(dataset, 4, 0, rank, world) for rank in range(world)]
    assert [share.batch_sampler for share in shares] == [whole[rank::world] for rank in range(world)]
    assert [len(share) for share in shares] == [len(whole[rank::world]) for rank in range(world)]
    assert [index for batch in whole for index in batch] == list(range(length))


@pytest.mark.parametrize("views", [0, 4])
def test_two_processes_see_in_each_step_what_one_with_twice_the_batch_sees(views):
    """Ranks that see the same images, or another order than one process, so that runs do not compare."""
    pair = [draw(EpochSampler(11, 3, 7, views, rank, 2), 8) for rank in range(2)]
    assert [first + second for first, second in zip(*pair)] == draw(EpochSampler(11, 6, 7, views), 8)


@pytest.mark.parametrize("first_step", [0, 1, 4, 5, 6, 13])
def test_starting_at_a_step_gives_what_the_uninterrupted_stream_gives_from_there(first_step):
    """A resumed run that repeats the epoch, skips its rest, or loses count in the epochs that follow."""
    whole = draw(EpochSampler(18, 4, 3, 2), 25)
    resumed = EpochSampler(18, 4, 3, 2)
    resumed.first_step = first_step
    assert draw(resumed, 25 - first_step) == whole[first_step:]


def test_order_and_views_differ_between_epochs_and_seeds_and_repeat_with_them():
    """The same order in every epoch; the same view of an image for ever."""
    epochs = [draw(EpochSampler(50, 50, 1, 4), 5)[epoch] for epoch in range(5)]
    assert len({tuple(index for index, _ in epoch) for epoch in epochs}) == 5
    assert all(len({dict(epoch)[image] for epoch in epochs}) > 1 for image in range(5))
    assert {view for _, view in epochs[0]} == {0, 1, 2, 3}
    assert draw(EpochSampler(50, 50, 1, 4), 1) == epochs[:1] != draw(EpochSampler(50, 50, 2, 4), 1)


def test_batches_do_not_depend_on_workers(photo_folders, start_method):
    """Order or crops that change with --num_workers; a loader that ends after an epoch or has another length; what only a
    forked worker inherits, without which each worker's first image counts as unreadable."""
    dataset = ImageDataset(list_images(photo_folders[0]), 32, random_crop=True, random_flip=True, seed=1)
    runs = []
    for num_workers, device in ((0, None), (2, "cpu")):
        loader = train_loader(dataset, 4, num_workers, seed=1, views=2, device=device)
        assert len(loader) == 3
        batches = iter(loader)
        runs.append([next(batches) for _ in range(4)])
    for first, second in zip(*runs):
        assert not second["unreadable"]
        assert first["path"] == second["path"] and torch.equal(first["index"], second["index"])
        assert torch.equal(first["pixel_values"], second["pixel_values"])
        assert first["pixel_values"].shape == (4, 3, 32, 32) and first["index"].dtype == torch.int64


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def touch_image(path, colour=RED, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, format="PNG")


def test_images_are_found_recursively_through_links_and_each_folder_once(tmp_path):
    """Upper-case endings missed, hidden thumbnails taken, links not followed, a link to a parent followed for ever; a folder
    called .jpg opened as an image, or the images in it forgotten."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for name in ("b.png", "album.jpg/b.png", "a/deep/deeper/c.JPG", "a/ä ö.webp", ".thumbnails/t.png", "a/.d.png"):
        touch_image(root / name)
    touch_image(elsewhere / "e.PNG")
    (root / "notes.txt").write_text("")
    (root / "noending").write_text("")
    (root / "z_link").symlink_to(elsewhere, target_is_directory=True)
    (root / "a" / "loop").symlink_to(root, target_is_directory=True)
    (elsewhere / "self").symlink_to(elsewhere, target_is_directory=True)
    (root / "f.png").symlink_to(elsewhere / "e.PNG")
    found = list_images(root)
    assert [os.path.relpath(path, root) for path in found] == [
        "a/deep/deeper/c.JPG",
        "a/ä ö.webp",
        "album.jpg/b.png",
        "b.png",
        "f.png",
        "z_link/e.PNG",
    ]


def test_imagenet_layout_gives_each_split_its_own_images(tmp_path):
    """Training on the validation images, or the reverse; folders that are no class taken for one."""
    for name in ("train/n01440764/n01440764_1.JPEG", "train/n01443537/n01443537_2.JPEG", "val/n01440764/v_3.JPEG"):
        touch_image(tmp_path / name)
    touch_image(tmp_path / "train" / "other" / "x.JPEG")
    touch_image(tmp_path / "train" / "n1" / "y.JPEG")

    def names(folder, train):
        return [os.path.basename(path) for path in find_images(str(folder), "imagenet", train, "--flag").paths]

    assert names(tmp_path, True) == names(tmp_path / "train", True) == ["n01440764_1.JPEG", "n01443537_2.JPEG"]
    assert names(tmp_path, False) == names(tmp_path / "val", False) == ["v_3.JPEG"]


def data_flags(train, evaluation, **others):
    flags = {"train_data_dir": train, "eval_data_dir": evaluation, "image_size": 8, "num_workers": 0, **others}
    return parse_args([text for name, value in flags.items() for text in (f"--{name}", str(value))])


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("missing", "no such folder"),
        ("empty", "there is no file"),
        ("only text", "there are 1 .txt"),
        ("a file", "a file"),
        ("nothing readable", "none of 2 files"),
        ("hidden only", "no image there"),
    ],
)
@pytest.mark.parametrize("flag", ["train_data_dir", "eval_data_dir"])
def test_a_folder_without_images_is_one_line_that_names_the_flag(tmp_path, mistake, said, flag):
    """A traceback, a run over zero batches, or an error that does not say which of the two folders it means."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    touch_image(good / "a.png")
    if mistake == "a file":
        bad.write_text("")
    elif mistake != "missing":
        bad.mkdir()
    if mistake == "only text":
        (bad / "notes.txt").write_text("x")
    if mistake == "nothing readable":
        (bad / "a.png").write_text("x")
        (bad / "b.jpg").write_bytes(b"\xff\xd8\xff")
    if mistake == "hidden only":
        touch_image(bad / ".a.png")
    folders = (bad, good) if flag == "train_data_dir" else (good, bad)
    with pytest.raises(UserError) as error:
        create_data_loaders(data_flags(*folders))
    message = str(error.value)
    assert message.startswith(f"--{flag} {bad}: ") and said in message and "\n" not in message


def test_imagenet_without_class_folders_is_one_line_that_says_what_to_do(tmp_path):
    """--dataset_type imagenet on a plain folder: an empty set, or class folders invented."""
    touch_image(tmp_path / "photos" / "a.png")
    with pytest.raises(UserError, match=r"^--train_data_dir .*n01440764.*the dataset_type default$"):
        create_data_loaders(data_flags(tmp_path, tmp_path, dataset_type="imagenet"))


@pytest.mark.parametrize("folder", ["photos", "./photos/train", "/nowhere/photos", "a/b/c"])
def test_a_mistyped_imagenet_folder_is_not_looked_up_on_the_hub(folder):
    """A path sent to a server, and its error in place of "no such folder"."""
    with pytest.raises(UserError, match=r"^--train_data_dir .*no such folder"):
        find_images(folder, "imagenet", True, "--train_data_dir")


def test_a_hub_id_without_the_dataset_type_is_told_of_it():
    """Of two readings of an input the message knows one."""
    refusal(
        lambda: find_images("owner/photos", "default", True, "--flag"), "no such folder", "the hub", "dataset_type imagenet"
    )


def test_loaders_of_a_run_read_both_folders(tmp_path):
    """The two folders swapped; flips or random crops in evaluation; --seed or --random_flip not passed on."""
    for number in range(3):
        touch_image(tmp_path / "train" / f"{number}.png", RED)
        touch_image(tmp_path / "eval" / f"{number}.png", BLUE)
    args = data_flags(tmp_path / "train", tmp_path / "eval", train_batch_size=2, eval_batch_size=3, seed=9)
    train, evaluation = create_data_loaders(args)
    assert len(train) == 2
    assert (levels(next(iter(train))["pixel_values"][0]) == RED).all()
    assert [batch["index"].tolist() for batch in evaluation] == [[0, 1, 2]]
    assert (levels(next(iter(evaluation))["pixel_values"][0]) == BLUE).all()
    assert (train.dataset.random_crop, train.dataset.random_flip, train.dataset.seed) == (True, True, 9)
    assert (evaluation.dataset.random_crop, evaluation.dataset.random_flip) == (False, False)


def test_folders_that_a_file_server_keeps_are_left_out_with_a_word(tmp_path, caplog):
    """Training on a NAS's thumbnails and deleted photos."""
    kept = ("@eaDir/a.png/SYNOPHOTO_THUMB_S.jpg", "b/@eaDir/d.jpg", "#recycle/e.png", "$RECYCLE.BIN/f.png")
    for name in ("a.png", "b/c.png", *kept):
        touch_image(tmp_path / name)
    found = [os.path.relpath(path, tmp_path) for path in list_images(tmp_path)]
    assert found == ["a.png", "b/c.png"] and "2 @eaDir" in caplog.text and "#recycle" in caplog.text
    streamed = [row["name"] for row in open_stream(str(tmp_path), "--flag").data]
    assert [os.path.relpath(path, tmp_path) for path in streamed] == found


def test_without_a_cache_every_epoch_has_new_crops(photo_folders):
    """--no_cache_latents that sees each image in as many crops as a cache would hold."""
    train, _ = create_data_loaders(data_flags(*photo_folders, train_batch_size=10, image_size=32, cache_views=2))
    assert len(train) == 1
    seen = [dict(zip(batch["path"], batch["pixel_values"])) for batch in itertools.islice(iter(train), 8)]
    views = [{epoch[name].numpy().tobytes() for epoch in seen} for name in seen[0]]
    assert min(map(len, views)) > 4  # two of eight may fall together


# ----------------------------------------------------------------------------------------------------------------------
# Hostile folders


@pytest.fixture
def folder(tmp_path):
    """A folder with one good image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "good.png").write_bytes(PNG)
    return folder


def test_folders_within_folders_to_any_depth(folder):
    """A stack frame for every level, and so a RecursionError at a thousand of them."""
    before, limit = os.getcwd(), sys.getrecursionlimit()
    os.chdir(folder)
    try:
        for _ in range(400):
            os.mkdir("d")
            os.chdir("d")
        shutil.copy(folder / "good.png", "deep.png")
    finally:
        os.chdir(before)
    sys.setrecursionlimit(300)
    try:
        assert sorted(map(os.path.basename, list_images(folder))) == ["deep.png", "good.png"]
    finally:
        sys.setrecursionlimit(limit)


def test_a_folder_that_may_not_be_read_is_named(folder, monkeypatch, caplog):
    """Half of the images missing from training without a word."""
    (folder / "private\n").mkdir()
    scandir = os.scandir

    def guarded(place):
        if "private" in str(place):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", guarded)
    assert len(list_images(folder)) == 1
    assert "private\\n" in caplog.text and "Permission denied" in caplog.text
    refusal(lambda: find_images(str(folder / "private\n"), "default", True, "--train_data_dir"), "--train_data_dir")


def test_a_worker_that_runs_out_of_images_says_so_in_one_line(folder, spawned):
    """torch's copy of the worker's traceback in place of the message."""
    loader = train_loader(ImageDataset(list_images(folder), 16, random_crop=True), 1, 1, 0)
    os.remove(folder / "good.png")
    text = refusal(lambda: next(iter(loader)), "no image can be read any more", "good.png")
    assert "Original" not in text


def test_images_that_must_be_enlarged_are_counted(tmp_path, caplog):
    """Thumbnails trained on and judged as if they had the detail of the size that is asked for."""
    for number, side in enumerate((20, 20, 64)):
        touch_image(tmp_path / f"{number}.png", RED, (side, side))
    with caplog.at_level("WARNING"):
        ImageDataset(list_images(tmp_path), 64).warn_of_small("--flag")
    assert "--flag: 2 of the 3 images looked at are smaller than 64 px" in caplog.text


def test_held_out_images_are_not_trained_on(flags, photo_folders):
    """Catches a module that is judged by what it was trained on, a share that leaves none to train on, a draw that a resumed
    run does not make again, and a typed --eval_data_dir that is not looked at."""
    flags |= {"hold_out": 0.4}
    typed, *_ = resolve(parse_args(as_argv(flags)))
    assert typed.hold_out == 0
    del flags["eval_data_dir"]
    settings, *_ = resolve(parse_args(as_argv(flags)))
    sets = open_datasets(settings)
    names = [{dataset.name(index) for index in range(len(dataset))} for dataset in sets]
    whole = {str(path) for path in list_images(photo_folders[0])}
    assert not names[0] & names[1] and names[0] | names[1] == whole and len(names[1]) == round(0.4 * len(whole))
    assert [dataset.source.paths for dataset in open_datasets(settings)] == [dataset.source.paths for dataset in sets]
    assert [dataset.random_crop for dataset in sets] == [True, False]
    many = find_images(photo_folders[0], "default", True, "--train_data_dir")
    many.paths = many.paths * 40
    assert len(hold_out(many, 0.5, 0, "")[1]) == MOST_HELD_OUT
    many.paths = many.paths[:2]
    assert [len(part) for part in hold_out(many, 0.9, 0, "")] == [1, 1]
    many.paths = many.paths[:1]
    assert "one image" in refusal(lambda: hold_out(many, 0.5, 0, "--train_data_dir x"), "--train_data_dir x")
