"""Files to pixels: what becomes of every kind of image, of files that are none, and of hostile ones."""

import os
import resource
import stat
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from drawn import BLACK, BLUE, GREEN, GREY, PNG, RED, UPRIGHT, WHITE, bands, encoded, levels, oriented, smooth_picture
from hostile import is_one_line, no_hang
from PIL import EpsImagePlugin, Image, ImageCms

from dataloader import ImageDataset, eval_loader, find_images
from images import decoding
from images.files import list_images

# ----------------------------------------------------------------------------------------------------------------------
# Kinds of file


def with_palette(colours, indices=(0, 1, 2)):
    image = Image.fromarray(bands(*indices)).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([level for colour in colours for level in colour])
    return image


RGB = (RED, GREEN, BLUE)
GREYS = (BLACK, GREY, WHITE)
INKS = bands((0, 255, 255, 0), (255, 0, 255, 0), (0, 0, 0, 255))  # red, green, black in CMYK

KINDS = {  # name: (file, what it holds, how it is written, the three colours a viewer shows, tolerance)
    "alpha": ("a.png", bands((255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 127)), {}, (RED, WHITE, GREY), 1),
    "palette with alpha per colour": (
        "a.png",
        with_palette((RED, BLACK, BLACK)),
        {"transparency": bytes([255, 127, 0])},
        (RED, GREY, WHITE),
        1,
    ),
    "grey with a transparent level": ("a.png", bands(0, 128, 200), {"transparency": 200}, GREYS, 0),
    "rgb with a transparent colour": ("a.png", bands(*RGB), {"transparency": (0, 255, 0)}, (RED, WHITE, BLUE), 0),
    "16-bit grey png": ("a.png", bands(0, 32896, 65535, np.uint16), {}, GREYS, 0),
    "16-bit grey png of a dark scene": ("a.png", bands(0, 100, 200, np.uint16), {}, (BLACK, BLACK, (1, 1, 1)), 0),
    "float tiff with a missing value": ("a.tiff", bands(np.nan, 128 / 255, 1, np.float32), {}, GREYS, 0),
    "cmyk jpeg": ("a.jpg", Image.frombytes("CMYK", (24, 24), INKS.tobytes()), {"quality": 100}, (RED, GREEN, BLACK), 4),
    "animated gif with transparency": (
        "a.gif",
        with_palette(RGB),
        {"save_all": True, "append_images": [with_palette(GREYS)], "transparency": 0, "disposal": 2},
        (WHITE, GREEN, BLUE),
        0,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_every_kind_of_file_comes_out_as_a_viewer_shows_it(tmp_path, kind, training):
    """Alpha over black, 16 bits clipped to white, inverted CMYK, a GIF's last frame, transparent pixels' hidden colour."""
    name, image, options, colours, tolerance = KINDS[kind]
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(tmp_path / name, **options)
    dataset = ImageDataset([str(tmp_path / name)], 24, random_crop=training)
    item = dataset[(0, 0) if training else 0]
    assert item["unreadable"] == []
    picture = levels(item["pixel_values"]).astype(int)
    for band, colour in enumerate(colours):
        inner = picture[2:22, 8 * band + 2 : 8 * band + 6]
        worst = abs(inner - colour).max()
        assert worst <= tolerance, f"band {band} is {inner[0, 0].tolist()}, not {colour}"


@pytest.mark.parametrize(("white", "kind", "overshoots"), [
    (1, np.float32, (1.001, 1.02, 2)), (255, np.float32, (1, 1.02, 1.2)), (65535, np.float32, (1, 1.1)),
    (255, np.int32, (1, 1.01, 1.2)), (65535, np.int32, (1, 1.1)),
])  # fmt: skip
def test_values_beyond_a_range_do_not_change_the_range(tmp_path, caplog, white, kind, overshoots):
    """A float picture that was sharpened, read as 0..255 since one value is a hair above 1: black, without a word."""
    ramp = np.tile(np.linspace(0, 1, 64), (48, 1))
    for overshoot in overshoots:
        decoding.SAID.clear()
        caplog.clear()
        Image.fromarray((ramp * white * overshoot).astype(kind)).save(tmp_path / "a.tiff")
        seen = np.asarray(ImageDataset([str(tmp_path / "a.tiff")], 8).open(0))[..., 0]
        assert abs(seen - (ramp * 255 * overshoot).clip(0, 255)).max() <= 1
        assert f"a.tiff': a grey image of mode {'F' if kind == np.float32 else 'I'}" in caplog.text
        assert f"is read as 0 (black) to {white} (white);" in caplog.text


def test_a_picture_that_comes_out_nearly_black_is_named(tmp_path, caplog):
    """12-bit levels in 16 bits, or floats of a wrong scale, trained on as black without a word."""
    decoding.SAID.clear()
    for name, picture in (("a", bands(0, 2000, 4095, np.uint16)), ("b", bands(0, 0.01, 0.02, np.float32))):
        Image.fromarray(picture).save(tmp_path / f"{name}.tiff")
        ImageDataset([str(tmp_path / f"{name}.tiff")], 8).open(0)
        assert f"{name}.tiff" in caplog.text and "nearly black" in caplog.text


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


@pytest.mark.parametrize("size", [(60, 100), (97, 33), (13, 21), (32, 32)], ids=str)
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


def test_training_crop_is_a_function_of_seed_content_and_view(tmp_path):
    """Crops from a global generator or by the place in the folder: runs and caches that cannot be repeated."""
    picture = smooth_picture(90, 70)
    first = training_set(tmp_path, picture, count=3)
    wanted = {(index, view): first[index, view]["pixel_values"] for index in range(3) for view in range(4)}
    torch.manual_seed(1)
    np.random.seed(1)
    again = training_set(tmp_path, picture, count=3)
    for item in reversed(wanted):
        assert torch.equal(again[item]["pixel_values"], wanted[item])
        assert torch.equal(again[0, item[1]]["pixel_values"], wanted[item])  # the files are copies of one
    with open(again.source.paths[1], "ab") as file:
        file.write(b"another content of the same picture")
    drawn = [again[index, view]["pixel_values"] for index in (0, 1) for view in range(4)]
    drawn.append(training_set(tmp_path, picture, seed=6)[0, 0]["pixel_values"])
    assert len({pixels.numpy().tobytes() for pixels in drawn}) == 9  # all of the same picture, none alike


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
        assert item["index"] == replacement and item["path"] == dataset.name(replacement)
        assert torch.equal(item["pixel_values"], dataset[replacement, 7]["pixel_values"])
        assert len(item["unreadable"]) == len(broken)
        for message, letter in zip(item["unreadable"], broken):
            assert os.path.join(str(some_broken), f"{letter}.") in message and "\n" not in message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_in_evaluation_is_dropped_and_named(some_broken, num_workers, spawned):
    """An average over a picture that is not there, or over a replacement counted twice; names lost between processes."""
    dataset = ImageDataset(list_images(some_broken), 32)
    batches = list(eval_loader(dataset, 2, num_workers))
    assert [batch["index"].tolist() for batch in batches] == [[0], [3], []]
    assert [[os.path.basename(path) for path in batch["path"]] for batch in batches] == [["a.png"], ["d.png"], []]
    assert [len(batch["pixel_values"]) for batch in batches] == [1, 1, 0]
    named = ["".join(os.path.basename(text.split("'")[1])[0] for text in batch["unreadable"]) for batch in batches]
    assert named == ["b", "c", "e"]


# ----------------------------------------------------------------------------------------------------------------------
# Hostile files: each is used as a viewer would show it, or left out by name

USED = None  # in place of what the message says of a file that is left out


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks, colour=0, bits=8):
    """A PNG whose header promises `width` x `height` px, grey unless `colour` says else, with whatever chunks follow."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def with_exif(content):
    return encoded("JPEG", exif=b"Exif\0\0" + content)


# lies on its side, in an EXIF block that Pillow reads but cannot write back, as it does on rotating
UNTURNABLE = with_exif(
    bytes.fromhex("4d4d002a00000008 0002 011200030000000100060000 036900100000000100000026 d3000000")
    + bytes.fromhex("0001 b3030002000000050000003800 0000 00 3230323000 00")
)


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


JPEG, GIF, TIFF = (encoded(form) for form in ("JPEG", "GIF", "TIFF"))
TIFF_DIRECTORY = struct.unpack("<I", TIFF[4:8])[0]
TEXT_BOMB = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 << 20)))
WORKFLOW = png_chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"x" * 2_400_000))
PIXELS, IDAT = (png_chunk(b"IDAT", zlib.compress(bytes(count))) for count in (90, 9))


def device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except OSError:
        path.symlink_to("/dev/zero")


FILES = {  # kind: (file name, content or what makes it, USED or what the message says)
    "png called jpg": ("a.jpg", PNG, USED),
    "png with a broken checksum": ("a.png", flipped(PNG, PNG.index(b"IDAT") + 8), "a.png"),
    "png of zero width": ("a.png", png(0, 9), "a.png"),
    "tiff whose directories form a ring": ("a.tif", TIFF[:-4] + struct.pack("<I", TIFF_DIRECTORY), USED),
    "bomb in a png": ("a.png", png(50_000, 50_000, png_chunk(b"IDAT", zlib.compress(b"0"))), "decompression bomb"),
    "bomb that Pillow only warns of": ("a.png", png(17_000, 17_000), "decompression bomb"),
    "bomb of transparent pixels": ("a.png", png(12_000, 12_000, IDAT, colour=6), "decompression bomb"),
    "bomb of 16-bit pixels": ("a.png", png(12_000, 12_000, IDAT, bits=16), "decompression bomb"),
    "bomb of a colour that is transparent": (
        "a.png",
        png(12_000, 12_000, png_chunk(b"tRNS", bytes(6)), IDAT, colour=2),
        "decompression bomb",
    ),
    "bomb in a png's text": ("a.png", png(9, 9, TEXT_BOMB, PIXELS), USED),
    "ComfyUI's workflow behind the pixels": ("a.png", png(9, 9, PIXELS, WORKFLOW), USED),
    "exif orientation 9": ("a.jpg", with_exif(b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0" + bytes(4)), USED),
    "exif cut short": ("a.jpg", with_exif(b"II*\0\x08\0\0\0\xff\xff"), USED),
    "exif that cannot be written back": ("a.jpg", UNTURNABLE, USED),
    "icc profile of noise": ("a.jpg", encoded("JPEG", icc_profile=bytes(range(256)) * 3), USED),
    "name with a newline": ("two\nlines.png", b"no picture", "two\\nlines"),
    "name that is not utf-8": (os.fsdecode(b"\xff\xfe.png"), b"no picture", "\\udcff\\udcfe.png"),
    "named pipe": ("a.png", os.mkfifo, "a pipe, socket or device"),
    "device": ("a.png", device, "a pipe, socket or device"),
    "dangling link": ("a.png", lambda path: path.symlink_to("nowhere.png"), "No such file"),
}


def is_used_or_named(folder, name, said):
    """Judge and train on `folder`, which holds a good image and `name`: that is used, or left out with a message of one line
    that has `said` in it; the good one is used anyway."""
    source = find_images(str(folder), "default", True, "--train_data_dir")
    assert len(source) == 2
    with no_hang(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's of corrupt metadata
        (batch,) = eval_loader(ImageDataset(source, 16), 2, 0)
        training = ImageDataset(source, 16, random_crop=True)
        drawn = [training[(index, view)] for index in range(2) for view in range(2)]
    assert all(torch.isfinite(item["pixel_values"]).all() and item["pixel_values"].shape == (3, 16, 16) for item in drawn)
    names = {os.path.basename(path) for path in batch["path"]}
    messages = batch["unreadable"]
    if said is USED:
        assert names == {name, "good.png"} and not messages, messages
        assert {os.path.basename(item["path"]) for item in drawn} == names
    else:
        assert names == {"good.png"} and len(messages) == 1
        assert said in messages[0] and is_one_line(messages[0]), messages
        assert messages[0] in {message for item in drawn for message in item["unreadable"]}


@pytest.fixture
def folder(tmp_path):
    """A folder with one good image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "good.png").write_bytes(PNG)
    return folder


@pytest.mark.parametrize("kind", FILES)
def test_a_hostile_image_is_used_or_left_out_by_name(folder, kind):
    """A traceback in a worker, a picture dropped for its metadata, a broken line, waiting for a pipe's writer."""
    name, content, said = FILES[kind]
    make = content if callable(content) else lambda path: path.write_bytes(content)
    make(folder / name)
    is_used_or_named(folder, name, said)


@pytest.mark.parametrize("name", ["a.eps", "a.png"])
def test_an_image_never_runs_a_program(folder, tmp_path, monkeypatch, name):
    """Pillow's PostScript reader, which hands the file to Ghostscript to execute, whatever the file is called."""
    marker, program = tmp_path / "executed", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(program))
    (folder / name).write_bytes(encoded("EPS"))
    with pytest.raises(Exception), Image.open(folder / name) as image:  # noqa: B017
        image.load()
    assert marker.exists()  # the trap works
    marker.unlink()
    is_used_or_named(folder, name, "cannot identify")
    assert not marker.exists()


@pytest.mark.parametrize("error", [MemoryError(), PermissionError(13, "Permission denied")], ids=["memory", "permission"])
def test_an_image_that_the_system_refuses_is_left_out_by_name(folder, monkeypatch, error):
    """One huge image that ends the run of a machine that is short of memory; a file of another user among one's own."""
    (folder / "a.png").write_bytes(PNG)
    open_image = Image.open

    def guarded(path, *rest, **options):
        if str(path).endswith("a.png"):
            raise error
        return open_image(path, *rest, **options)

    monkeypatch.setattr(Image, "open", guarded)
    is_used_or_named(folder, "a.png", type(error).__name__ if not error.args else "Permission denied")


# ----------------------------------------------------------------------------------------------------------------------
# Images as people have them


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
TURNED = SRGB  # a profile whose red looks green, green blue, and blue red
for tag, stored in ((b"rXYZ", b"?XYZ"), (b"gXYZ", b"rXYZ"), (b"bXYZ", b"gXYZ"), (b"?XYZ", b"bXYZ")):
    TURNED = TURNED.replace(tag, stored)


@pytest.mark.parametrize("ending, options", [("png", {}), ("jpg", {"quality": 100, "subsampling": 0}), ("tif", {})])
def test_colours_are_converted_to_srgb(tmp_path, ending, options):
    """Pale photos: the numbers of a phone's or camera's wide colours taken for sRGB's."""
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (24, 24), (180, 100, 60)).save(path, icc_profile=TURNED, **options)
    seen = np.array(ImageDataset([str(path)], 8).open(0))[12, 12].astype(int)
    assert np.abs(seen - (60, 180, 100)).max() <= 2, seen


def test_a_profile_costs_neither_transparency_nor_a_picture(tmp_path):
    """A transparent logo on black; a picture refused for a damaged profile, or one of another kind of picture."""
    clear = Image.new("RGBA", (24, 24), (180, 100, 60, 0))
    clear.save(tmp_path / "clear.png", icc_profile=TURNED)
    Image.new("RGB", (24, 24), (1, 200, 3)).save(tmp_path / "damaged.png", icc_profile=TURNED[:150])
    Image.new("L", (24, 24), 77).save(tmp_path / "grey.png", icc_profile=TURNED)
    middle = [
        ImageDataset([str(tmp_path / f"{name}.png")], 8).open(0).getpixel((9, 9)) for name in ("clear", "damaged", "grey")
    ]
    assert middle[:2] == [WHITE, (1, 200, 3)] and max(abs(level - 77) for level in middle[2]) <= 1


def test_a_photo_of_a_hundred_megapixels_is_used(tmp_path):
    """A medium-format camera's photos refused as decompression bombs."""
    path = tmp_path / "gfx100.jpg"
    Image.new("L", (11_648, 8_736), 99).save(path)
    assert ImageDataset([str(path)], 64, random_crop=True).open(0).getpixel((0, 0)) == (99, 99, 99)


def test_pictures_of_formats_that_cannot_be_read_are_counted(tmp_path, caplog):
    """A phone's HEIC photos passed over without a word."""
    for name in ("a.png", "b.HEIC", "c.NEF", "d.jxl", "notes.txt"):
        (tmp_path / name).write_bytes(PNG)
    with caplog.at_level("WARNING"):
        list_images(tmp_path)
    endings = [ending for ending in (".heic", ".jxl", ".nef") if ending not in Image.registered_extensions()]
    assert f"{len(endings)} files are of formats that Pillow here does not read ({', '.join(endings)})" in caplog.text
