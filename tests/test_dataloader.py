"""Files to pixels, order to batches: what dataloader.py makes of every kind of file, folder and mistake."""

import io
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from dataloader import (
    EpochSampler,
    ImageDataset,
    collate,
    eval_loader,
    list_images,
    open_dataset,
    open_hub_dataset,
    train_loader,
)
from train_align_with_args import create_data_loaders, parse_args
from utils import UserError


def levels(pixel_values):
    """(3, H, W) in [-1, 1] -> (H, W, 3) 8-bit levels."""
    assert pixel_values.dtype == torch.float32 and pixel_values.min() >= -1 and pixel_values.max() <= 1
    return ((pixel_values + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def bands(left, middle, right, dtype=np.uint8):
    """Three vertical bands of 8 px: (24, 24) for numbers, (24, 24, C) for tuples."""
    return np.repeat(np.array([[left, middle, right]], dtype=dtype).repeat(24, axis=0), 8, axis=1)


def smooth_picture(width, height, seed=0):
    """A colourful picture without detail finer than 10 px: sharp enough to tell places apart."""
    small = np.random.default_rng(seed).integers(0, 256, (max(2, height // 10), max(2, width // 10), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of file


def with_palette(colours, indices=(0, 1, 2)):
    image = Image.fromarray(bands(*indices)).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([level for colour in colours for level in colour])
    return image


def save(folder, name, image, **options):
    image.save(folder / name, **options)
    return str(folder / name)


RED, GREEN, BLUE, BLACK, WHITE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255,) * 3, (128,) * 3
RGB = (RED, GREEN, BLUE)
GREYS = (BLACK, GREY, WHITE)
INKS = bands((0, 255, 255, 0), (255, 0, 255, 0), (0, 0, 0, 255))  # red, green, black in CMYK

KINDS = {  # name: (function (folder) -> path, the three colours a viewer shows, tolerance)
    "rgb": (lambda f: save(f, "a.png", Image.fromarray(bands(*RGB))), RGB, 0),
    "grey": (lambda f: save(f, "a.png", Image.fromarray(bands(0, 128, 255))), GREYS, 0),
    "black and white": (lambda f: save(f, "a.png", Image.fromarray(bands(0, 0, 255)).convert("1")), (BLACK, BLACK, WHITE), 0),
    "alpha": (
        lambda f: save(f, "a.png", Image.fromarray(bands((255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 127)))),
        (RED, WHITE, GREY),
        1,
    ),
    "grey with alpha": (
        lambda f: save(f, "a.png", Image.fromarray(bands((0, 255), (0, 127), (0, 255)))),
        (BLACK, GREY, BLACK),
        1,
    ),
    "webp with alpha": (
        lambda f: save(f, "a.webp", Image.fromarray(bands((255, 0, 0, 255), (9, 9, 9, 0), (0, 0, 255, 255))), lossless=True),
        (RED, WHITE, BLUE),
        0,
    ),
    "palette": (lambda f: save(f, "a.png", with_palette(RGB)), RGB, 0),
    "palette with a transparent colour": (
        lambda f: save(f, "a.png", with_palette(RGB), transparency=1),
        (RED, WHITE, BLUE),
        0,
    ),
    "palette with alpha per colour": (
        lambda f: save(f, "a.png", with_palette((RED, BLACK, BLACK)), transparency=bytes([255, 127, 0])),
        (RED, GREY, WHITE),
        1,
    ),
    "grey with a transparent level": (
        lambda f: save(f, "a.png", Image.fromarray(bands(0, 128, 200)), transparency=200),
        GREYS,
        0,
    ),
    "rgb with a transparent colour": (
        lambda f: save(f, "a.png", Image.fromarray(bands(*RGB)), transparency=(0, 255, 0)),
        (RED, WHITE, BLUE),
        0,
    ),
    "16-bit grey png": (lambda f: save(f, "a.png", Image.fromarray(bands(0, 32896, 65535, np.uint16))), GREYS, 0),
    "16-bit grey png of a dark scene": (
        lambda f: save(f, "a.png", Image.fromarray(bands(0, 100, 200, np.uint16))),
        (BLACK, BLACK, (1, 1, 1)),
        0,
    ),
    "16-bit big-endian tiff": (
        lambda f: save(f, "a.tif", Image.frombytes("I;16B", (24, 24), bands(0, 32896, 65535, ">u2").tobytes())),
        GREYS,
        0,
    ),
    "16-bit pgm": (lambda f: save(f, "a.pgm", Image.fromarray(bands(0, 32896, 65535, np.int32))), GREYS, 0),
    "32-bit tiff of 16-bit levels": (
        lambda f: save(f, "a.tiff", Image.fromarray(bands(0, 32896, 65535, np.int32))),
        GREYS,
        0,
    ),
    "32-bit tiff of 8-bit levels": (lambda f: save(f, "a.tiff", Image.fromarray(bands(0, 128, 255, np.int32))), GREYS, 0),
    "float tiff in 0..1": (
        lambda f: save(f, "a.tiff", Image.fromarray(bands(0, 128 / 255, 1, np.float32))),
        GREYS,
        0,
    ),
    "float tiff in 0..255": (lambda f: save(f, "a.tiff", Image.fromarray(bands(0, 128, 255, np.float32))), GREYS, 0),
    "float tiff below zero": (
        lambda f: save(f, "a.tiff", Image.fromarray(bands(-3, 128 / 255, 1, np.float32))),
        GREYS,
        0,
    ),
    "float tiff with a missing value": (
        lambda f: save(f, "a.tiff", Image.fromarray(bands(np.nan, 128 / 255, 1, np.float32))),
        GREYS,
        0,
    ),
    "cmyk tiff": (
        lambda f: save(f, "a.tif", Image.frombytes("CMYK", (24, 24), INKS.tobytes())),
        (RED, GREEN, BLACK),
        1,
    ),
    "cmyk jpeg": (
        lambda f: save(f, "a.jpg", Image.frombytes("CMYK", (24, 24), INKS.tobytes()), quality=100),
        (RED, GREEN, BLACK),
        4,
    ),
    "jpeg": (lambda f: save(f, "a.JPEG", Image.fromarray(bands(*RGB)), quality=100, subsampling=0), RGB, 4),
    "animated gif": (
        lambda f: save(
            f, "a.gif", Image.fromarray(bands(*RGB)), save_all=True, append_images=[Image.new("RGB", (24, 24), BLACK)] * 2
        ),
        RGB,
        0,
    ),
    "animated gif with transparency": (
        lambda f: save(
            f, "a.gif", with_palette(RGB), save_all=True, append_images=[with_palette(GREYS)], transparency=0, disposal=2
        ),
        (WHITE, GREEN, BLUE),
        0,
    ),
    "animated png": (
        lambda f: save(
            f, "a.png", Image.fromarray(bands(*RGB)), save_all=True, append_images=[Image.new("RGB", (24, 24), BLACK)]
        ),
        RGB,
        0,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_every_kind_of_file_comes_out_as_a_viewer_shows_it(tmp_path, kind, training):
    """Alpha over black, 16 bits clipped to white, inverted CMYK, a GIF's last frame, transparent pixels' hidden colour."""
    make, colours, tolerance = KINDS[kind]
    dataset = ImageDataset([make(tmp_path)], 24, random_crop=training)
    item = dataset[(0, 0) if training else 0]
    assert item["unreadable"] == []
    picture = levels(item["pixel_values"]).astype(int)
    for band, colour in enumerate(colours):
        inner = picture[2:22, 8 * band + 2 : 8 * band + 6]
        worst = abs(inner - colour).max()
        assert worst <= tolerance, f"band {band} is {inner[0, 0].tolist()}, not {colour}"


UPRIGHT = {  # EXIF orientation: the upright picture -> what is stored
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: np.rot90,
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, -1),
}


def oriented(path, picture, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](picture))).save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_exif_orientation_comes_out_upright(tmp_path, orientation):
    """Photos of a phone held upright that come out lying; the crop taken before the turn."""
    picture = np.asarray(smooth_picture(40, 24))
    oriented(tmp_path / "a.png", picture, orientation)
    found = ImageDataset([str(tmp_path / "a.png")], 24)[0]["pixel_values"]
    assert (levels(found) == picture[:, 8:32]).all()


def test_large_jpeg_is_decoded_small_enough_for_speed_and_large_enough_for_the_crop(tmp_path):
    """A draft scale that leaves fewer pixels than are asked for, or that is lost on turned photos; none in evaluation."""
    path = str(tmp_path / "a.jpg")
    picture = np.asarray(smooth_picture(640, 1280))
    oriented(path, picture, 6, quality=95)
    trained, judged = (ImageDataset([path], 64, random_crop=training).open(0) for training in (True, False))
    assert judged.size == (640, 1280)
    assert trained.size == (80, 160)  # 1/8: the short side is still 64 · 1.25
    whole = np.asarray(judged.resize(trained.size, Image.Resampling.BOX)).astype(int)
    assert abs(whole - np.asarray(trained)).mean() < 2


# ----------------------------------------------------------------------------------------------------------------------
# Crops


@pytest.mark.parametrize(
    "size", [(100, 60), (60, 100), (97, 33), (33, 97), (41, 40), (301, 45), (20, 12), (13, 21), (32, 32), (64, 64)], ids=str
)
def test_evaluation_is_resize_of_the_short_side_then_centre_crop(tmp_path, size):
    """Width and height swapped, a squeezed picture, a crop off the centre, small images padded or not enlarged."""
    side = 32
    image = smooth_picture(*size)
    image.save(tmp_path / "a.png")
    scale = side / min(size)
    width, height = max(side, round(size[0] * scale)), max(side, round(size[1] * scale))
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = round((width - side) / 2), round((height - side) / 2)
    expected = np.asarray(resized.crop((left, top, left + side, top + side))).astype(int)
    difference = abs(levels(ImageDataset([str(tmp_path / "a.png")], side)[0]["pixel_values"]) - expected)
    assert difference.mean() < 0.5 and difference.max() <= 3


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000)], ids=str)
def test_a_long_thin_image_costs_no_memory(tmp_path, size):
    """A 3,840,000 x 128 px intermediate, which ends the run on most machines."""
    Image.new("RGB", size, RED).save(tmp_path / "a.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for dataset, item in (
        (ImageDataset([str(tmp_path / "a.png")], 128), 0),
        (ImageDataset([str(tmp_path / "a.png")], 128, random_crop=True), (0, 3)),
    ):
        assert (levels(dataset[item]["pixel_values"]) == RED).all()
    unit = 1024 if os.uname().sysname == "Darwin" else 1  # ru_maxrss is in bytes there, in KiB elsewhere
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit < 200_000


def training_set(folder, picture, count=1, **options):
    paths = []
    for number in range(count):
        picture.save(folder / f"{number}.png")
        paths.append(str(folder / f"{number}.png"))
    return ImageDataset(paths, **{"image_size": 32, "random_crop": True, "random_flip": True, "seed": 5} | options)


def test_training_crop_is_a_function_of_seed_index_and_view(tmp_path):
    """Crops from a global or a worker's generator: runs that cannot be repeated or resumed, caches that do not match."""
    picture = smooth_picture(90, 70)
    first = training_set(tmp_path, picture, count=3)
    wanted = {(index, view): first[index, view]["pixel_values"] for index in range(3) for view in range(4)}
    torch.manual_seed(1)
    np.random.seed(1)
    again = training_set(tmp_path, picture, count=3)
    for item in reversed(wanted):
        assert torch.equal(again[item]["pixel_values"], wanted[item])
    drawn = [*wanted.values(), training_set(tmp_path, picture, seed=6)[0, 0]["pixel_values"]]
    assert len({pixels.numpy().tobytes() for pixels in drawn}) == 13  # all of the same picture, none alike


@pytest.mark.parametrize("random_flip", [True, False])
def test_about_half_of_the_views_are_mirrored_and_none_without_random_flip(tmp_path, random_flip):
    """A flip that is always or never on, or that turns pictures upside down."""
    ramp = np.zeros((32, 32, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(32) * 8, np.arange(32)[:, None] * 8
    dataset = training_set(tmp_path, Image.fromarray(ramp), random_flip=random_flip)
    views = [levels(dataset[0, view]["pixel_values"]).astype(int) for view in range(60)]
    mirrored = [view[0, 0, 0] > view[0, -1, 0] for view in views]
    assert 18 <= sum(mirrored) <= 42 if random_flip else not any(mirrored)
    assert all(view[0, 0, 1] < view[-1, 0, 1] for view in views)


@pytest.mark.parametrize("size", [(256, 64), (64, 256)], ids=str)
def test_training_crops_reach_the_whole_picture_and_vary_in_scale(tmp_path, size):
    """Crops from the centre or a corner only; edges that are never seen; width taken for height."""
    along = np.linspace(0, 255, max(size)).round().astype(np.uint8)
    ramp = np.broadcast_to(along if size[0] > size[1] else along[:, None], (size[1], size[0]))
    dataset = training_set(tmp_path, Image.fromarray(ramp), random_flip=False)
    views = [levels(dataset[0, view]["pixel_values"])[..., 0] for view in range(60)]
    lows, highs = [int(view.min()) for view in views], [int(view.max()) for view in views]
    assert min(lows) < 15 and max(highs) > 240
    spans = [high - low for low, high in zip(lows, highs)]
    assert min(spans) < 52 and max(spans) > 60  # 32 px of a short side of 40 to 32


# ----------------------------------------------------------------------------------------------------------------------
# Files that cannot be read


@pytest.fixture
def some_broken(tmp_path):
    """A folder of a.png, b.png (text), c.jpg (cut off), d.png, e.gif (empty)."""
    smooth_picture(40, 40, 1).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    smooth_picture(200, 200, 2).save(tmp_path / "c.jpg")
    (tmp_path / "c.jpg").write_bytes((tmp_path / "c.jpg").read_bytes()[:3000])
    smooth_picture(40, 40, 3).save(tmp_path / "d.png")
    (tmp_path / "e.gif").write_bytes(b"")
    return tmp_path


def test_unreadable_image_in_training_is_replaced_by_the_next_and_named(some_broken):
    """One broken download that ends a night's run, or that is trained on as black."""
    dataset = ImageDataset(list_images(some_broken), 32, random_crop=True)
    for index, replacement, broken in ((0, 0, ""), (1, 3, "bc"), (2, 3, "c"), (4, 0, "e")):
        item = dataset[index, 7]
        assert item["index"] == replacement and item["path"] == dataset.source[replacement]
        assert torch.equal(item["pixel_values"], dataset[replacement, 7]["pixel_values"])
        assert len(item["unreadable"]) == len(broken)
        for message, letter in zip(item["unreadable"], broken):
            assert os.path.join(str(some_broken), f"{letter}.") in message and "\n" not in message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_in_evaluation_is_dropped_and_named(some_broken, num_workers):
    """An average over a picture that is not there, or over a replacement counted twice; names lost between processes."""
    dataset = ImageDataset(list_images(some_broken), 32)
    batches = list(eval_loader(dataset, 2, num_workers))
    assert [batch["index"].tolist() for batch in batches] == [[0], [3], []]
    assert [[os.path.basename(path) for path in batch["path"]] for batch in batches] == [["a.png"], ["d.png"], []]
    assert [len(batch["pixel_values"]) for batch in batches] == [1, 1, 0]
    assert ["".join(os.path.basename(text.split("'")[1])[0] for text in batch["unreadable"]) for batch in batches] == [
        "b",
        "c",
        "e",
    ]


def test_batch_without_a_readable_image_keeps_its_types(some_broken):
    """An index that turns into float32 for one batch of the set."""
    items = [ImageDataset(list_images(some_broken), 32)[index] for index in (1, 2)]
    assert collate(items)["index"].dtype == torch.int64
    assert len(collate(items)["pixel_values"]) == 0


def test_training_ends_with_one_line_when_nothing_is_left(some_broken):
    """An endless loop when a disk is taken away during the run."""
    dataset = ImageDataset(list_images(some_broken), 32, random_crop=True)
    for name in ("a.png", "d.png"):
        (some_broken / name).unlink()
    with pytest.raises(UserError, match=r"no image can be read any more; the last failure: .*c\.jpg"):
        dataset[3, 0]


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


def test_a_program_that_leaves_in_the_middle_of_an_epoch_does_not_wait_for_its_workers(photo_folders):
    """Workers that ignore their parent's SIGTERM, so that a failed run never ends."""
    program = """if True:
        import sys
        from dataloader import ImageDataset, eval_loader, list_images
        batches = iter(eval_loader(ImageDataset(list_images(sys.argv[1]), 16), 1, 1))
        next(batches)
        sys.exit(7)
    """
    left = subprocess.run([sys.executable, "-c", program, photo_folders[0]], cwd=ROOT, timeout=240)
    assert left.returncode == 7


def test_batches_do_not_depend_on_workers(photo_folders):
    """Order or crops that change with --num_workers; a loader that ends after an epoch or has another length."""
    dataset = ImageDataset(list_images(photo_folders[0]), 32, random_crop=True, random_flip=True, seed=1)
    runs = []
    for num_workers in (0, 2):
        loader = train_loader(dataset, 4, num_workers, seed=1, views=2)
        assert len(loader) == 3
        batches = iter(loader)
        runs.append([next(batches) for _ in range(4)])
    for first, second in zip(*runs):
        assert first["path"] == second["path"] and torch.equal(first["index"], second["index"])
        assert torch.equal(first["pixel_values"], second["pixel_values"])
        assert first["pixel_values"].shape == (4, 3, 32, 32) and first["index"].dtype == torch.int64


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def touch_image(path, colour=RED):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path, format="PNG")


def test_images_are_found_recursively_through_links_and_each_folder_once(tmp_path):
    """Upper-case endings missed, hidden thumbnails taken, links not followed, a link to a parent followed for ever."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for name in ("b.png", "a/deep/deeper/c.JPG", "a/ä ö.webp", ".thumbnails/t.png", "a/.d.png"):
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
        "b.png",
        "f.png",
        "z_link/e.PNG",
    ]


def test_a_link_that_leads_nowhere_is_one_unreadable_file(tmp_path):
    """A traceback for a photo that was moved away."""
    touch_image(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    batch = next(iter(eval_loader(ImageDataset(list_images(tmp_path), 8), 2, 0)))
    assert batch["index"].tolist() == [0] and "b.png" in batch["unreadable"][0]


def test_imagenet_layout_gives_each_split_its_own_images(tmp_path):
    """Training on the validation images, or the reverse; folders that are no class taken for one."""
    for name in ("train/n01440764/n01440764_1.JPEG", "train/n01443537/n01443537_2.JPEG", "val/n01440764/v_3.JPEG"):
        touch_image(tmp_path / name)
    touch_image(tmp_path / "train" / "other" / "x.JPEG")
    touch_image(tmp_path / "train" / "n1" / "y.JPEG")

    def names(folder, train):
        return [os.path.basename(path) for path in open_dataset(str(folder), "imagenet", train, "--flag")]

    assert names(tmp_path, True) == names(tmp_path / "train", True) == ["n01440764_1.JPEG", "n01443537_2.JPEG"]
    assert names(tmp_path, False) == names(tmp_path / "val", False) == ["v_3.JPEG"]


def data_flags(train, evaluation, **others):
    flags = {"train_data_dir": train, "eval_data_dir": evaluation, "image_size": 8, "num_workers": 0, **others}
    return parse_args([text for name, value in flags.items() for text in (f"--{name}", str(value))])


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("missing", "no such folder"),
        ("empty", "no image there"),
        ("only text", "no image there"),
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
    with pytest.raises(UserError, match=r"^--train_data_dir .*n01440764.*--dataset_type default$"):
        create_data_loaders(data_flags(tmp_path, tmp_path, dataset_type="imagenet"))


@pytest.mark.parametrize("folder", ["photos", "./photos/train", "/nowhere/photos", "a/b/c"])
def test_a_mistyped_imagenet_folder_is_not_looked_up_on_the_hub(folder):
    """A path sent to a server, and its error in place of "no such folder"."""
    with pytest.raises(UserError, match=r"^--train_data_dir .*no such folder$"):
        open_dataset(folder, "imagenet", True, "--train_data_dir")


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


# ----------------------------------------------------------------------------------------------------------------------
# Data sets of the hub's kind


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def test_hub_data_set_gives_the_pixels_that_files_give(tmp_path):
    """A photo that `datasets` turned upright and we turn again; a reduced decode of what is decoded already."""
    import datasets

    oriented(tmp_path / "0.jpg", np.asarray(smooth_picture(640, 320)), 6, quality=95)
    Image.fromarray(bands((255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 255, 255))).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    Image.fromarray(bands(0, 32896, 65535, np.uint16)).save(tmp_path / "3.png")
    paths = list_images(tmp_path)
    rows = [{"bytes": (tmp_path / os.path.basename(path)).read_bytes(), "path": None} for path in paths]
    data = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    from_hub, from_files = list(eval_loader(ImageDataset(data, 24), 4, 0)), list(eval_loader(ImageDataset(paths, 24), 4, 0))
    assert from_hub[0]["index"].tolist() == [0, 1, 3]
    assert torch.equal(from_hub[0]["pixel_values"], from_files[0]["pixel_values"])
    assert len(from_hub[0]["unreadable"]) == 1 and "[2]" in from_hub[0]["unreadable"][0]
    trained = [ImageDataset(source, 24, random_crop=True)[0, 1]["pixel_values"] for source in (data, paths)]
    assert (trained[0] - trained[1]).abs().mean() < 0.05
    item = ImageDataset(data, 24, random_crop=True)[2, 0]
    assert item["index"] == 3 and len(item["unreadable"]) == 1


@pytest.fixture
def hub_folder(tmp_path):
    """A data set folder as the hub has them: parquet files per split, the image column named `picture` beside others."""
    import datasets

    folder = tmp_path / "data set"
    folder.mkdir()
    features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
    for split, colour, count in (("train", RED, 3), ("validation", BLUE, 2)):
        rows = [{"bytes": encoded(Image.new("RGB", (8, 8), colour), format="PNG"), "path": None}] * count
        data = datasets.Dataset.from_dict({"label": list(range(count)), "picture": rows}, features=features)
        data.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_hub_data_set_gives_the_split_and_column_asked_for(hub_folder, tmp_path, train):
    """Judging on training images since the splits are not known before the first download; a column of another name."""
    data = open_hub_dataset(str(hub_folder), train, "--flag", str(tmp_path / "cache"))
    assert data.column_names == ["image"] and len(data) == (3 if train else 2)
    assert (levels(ImageDataset(data, 8)[0]["pixel_values"]) == (RED if train else BLUE)).all()


def test_hub_data_set_opened_twice_has_the_same_content_key(hub_folder, tmp_path):
    """A latent cache that is built anew in every run."""
    keys = []
    for _ in range(2):
        data = open_hub_dataset(str(hub_folder), True, "--flag", str(tmp_path / "cache"))
        keys.append(json.dumps(ImageDataset(data, 8, random_crop=True).content_key()))
    assert keys[0] == keys[1]


def test_data_set_without_images_is_one_line(tmp_path):
    """A traceback from the first batch."""
    import datasets

    (tmp_path / "words").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "words" / "train.parquet"))
    with pytest.raises(UserError, match=r"^--flag .*no image column$"):
        open_hub_dataset(str(tmp_path / "words"), True, "--flag", str(tmp_path / "cache"))
