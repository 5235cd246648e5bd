"""Files and folders that are not what they say: each image is used as a viewer would show it, or left out by name."""

import io
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, make_photo
from hostile import is_one_line, no_hang, refusal
from PIL import EpsImagePlugin, Image, ImageOps

from dataloader import ImageDataset, eval_loader, list_images, open_dataset, train_loader
from utils import plain_stem

PHOTO = make_photo(np.random.default_rng(0), (48, 40))
USED = None  # in place of what the message says of a file that is left out


def encoded(form, image=PHOTO, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks):
    """A PNG whose header promises `width` x `height` px of grey, with whatever chunks follow."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def with_exif(content):
    return encoded("JPEG", exif=b"Exif\0\0" + content)


def with_orientation(kind, count, value):
    """A JPEG whose EXIF block is one entry, the orientation: of TIFF type `kind`, with four bytes of `value`."""
    return with_exif(b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI", 0x112, kind, count) + value + bytes(4))


# lies on its side, in an EXIF block that Pillow reads but cannot write back, as it does on rotating
UNTURNABLE = with_exif(
    bytes.fromhex("4d4d002a00000008 0002 011200030000000100060000 036900100000000100000026 d3000000")
    + bytes.fromhex("0001 b3030002000000050000003800 0000 00 3230323000 00")
)


def flipped(content, at, bits=0xFF):
    changed = bytearray(content)
    changed[at] ^= bits
    return bytes(changed)


JPEG, PNG, GIF, TIFF = encoded("JPEG"), encoded("PNG"), encoded("GIF"), encoded("TIFF")
TIFF_DIRECTORY = struct.unpack("<I", TIFF[4:8])[0]
TEXT_BOMB = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 << 20)))

FILES = {  # kind: (file name, content, USED or what the message says)
    "truncated jpeg": ("a.jpg", JPEG[: len(JPEG) // 2], "runcated"),
    "truncated png": ("a.png", PNG[: len(PNG) // 2], "a.png"),
    "jpeg of its first two bytes": ("a.jpg", JPEG[:2], "cannot identify"),
    "zero bytes": ("a.jpg", b"", "cannot identify"),
    "text called jpg": ("a.jpg", b"not a picture\n" * 9, "cannot identify"),
    "html called png": ("a.png", b"<!DOCTYPE html><title>404</title>", "cannot identify"),
    "svg called png": ("a.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot identify"),
    "png called jpg": ("a.jpg", PNG, USED),
    "jpeg called png": ("a.png", JPEG, USED),
    "png with a broken checksum": ("a.png", flipped(PNG, PNG.index(b"IDAT") + 8), "a.png"),
    "png without pixels": ("a.png", png(9, 9), "a.png"),
    "png of zero width": ("a.png", png(0, 9), "a.png"),
    "ppm of zero height": ("a.ppm", b"P6 9 0 255\n", "a.ppm"),
    "gif without a frame": ("a.gif", b"GIF89a\x10\0\x10\0\0\0\0;", "a.gif"),
    "truncated gif": ("a.gif", GIF[:60], "a.gif"),
    "tiff whose directories form a ring": ("a.tif", TIFF[:-4] + struct.pack("<I", TIFF_DIRECTORY), USED),
    "tiff whose directory lies beyond its end": ("a.tif", TIFF[:4] + struct.pack("<I", 1 << 30) + TIFF[8:], "a.tif"),
    "truncated webp": ("a.webp", encoded("WEBP")[:50], "a.webp"),
    "bomb in a png": ("a.png", png(50_000, 50_000, png_chunk(b"IDAT", zlib.compress(b"0"))), "decompression bomb"),
    "bomb that Pillow only warns of": ("a.png", png(9500, 9500), "decompression bomb"),
    "bomb in a bmp": ("a.bmp", b"BM" + bytes(8) + struct.pack("<IIiiHH", 54, 40, 50_000, 50_000, 1, 24) + bytes(24), "bomb"),
    "bomb in a png's text": ("a.png", png(9, 9, TEXT_BOMB, png_chunk(b"IDAT", zlib.compress(bytes(90)))), "a.png"),
    "cmyk": ("a.jpg", encoded("JPEG", PHOTO.convert("CMYK")), USED),
    "16 bits": ("a.png", encoded("PNG", Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40)), USED),
    "palette with transparency": ("a.png", encoded("PNG", PHOTO.convert("P"), transparency=3), USED),
    "animated gif": ("a.gif", encoded("GIF", save_all=True, append_images=[PHOTO.rotate(90)] * 3), USED),
    "one pixel": ("a.png", encoded("PNG", Image.new("RGB", (1, 1), "red")), USED),
    "30,000 x 1": ("a.png", encoded("PNG", Image.new("RGB", (30_000, 1), "red")), USED),
    "1 x 30,000": ("a.png", encoded("PNG", Image.new("RGB", (1, 30_000), "red")), USED),
    "exif orientation 9": ("a.jpg", with_orientation(3, 1, b"\x09\0\0\0"), USED),
    "exif orientation 0": ("a.jpg", with_orientation(3, 1, b"\0\0\0\0"), USED),
    "exif orientation as text": ("a.jpg", with_orientation(2, 3, b"up\0\0"), USED),
    "exif of noise": ("a.jpg", with_exif(bytes(range(256))), USED),
    "exif cut short": ("a.jpg", with_exif(b"II*\0\x08\0\0\0\xff\xff"), USED),
    "exif that cannot be written back": ("a.jpg", UNTURNABLE, USED),
    "icc profile of noise": ("a.jpg", encoded("JPEG", icc_profile=bytes(range(256)) * 3), USED),
    "postscript": ("a.eps", encoded("EPS"), "cannot identify"),
    "postscript called png": ("a.png", encoded("EPS"), "cannot identify"),
    "name with a newline": ("two\nlines.png", b"no picture", "two\\nlines"),
    "name with a terminal command": ("\x1b[2Jx.png", b"no picture", "\\x1b[2Jx.png"),
    "name that is not utf-8": (os.fsdecode(b"\xff\xfe.png"), b"no picture", "\\udcff\\udcfe.png"),
    "name as long as can be": ("x" * 251 + ".png", b"no picture", "x" * 100),
}


def pipe(path):
    os.mkfifo(path)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as end:
        before = os.getcwd()
        os.chdir(path.parent)  # a socket's address is at most some 100 bytes long
        try:
            end.bind(path.name)
        finally:
            os.chdir(before)


def device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except OSError:
        path.symlink_to("/dev/zero")


PLACES = {  # kind: (what makes it, what the message says)
    "named pipe": (pipe, "a pipe, socket or device"),
    "link to a named pipe": (lambda path: (pipe(path.parent / "pipe"), path.symlink_to("pipe")), "a pipe, socket or device"),
    "socket": (unix_socket, "a pipe, socket or device"),
    "device": (device, "a pipe, socket or device"),
    "link to a terminal": (lambda path: path.symlink_to("/dev/tty"), ""),
    "dangling link": (lambda path: path.symlink_to("nowhere.png"), "No such file"),
    "link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
}


def is_used_or_named(folder, name, said):
    """Judge and train on `folder`, which holds a good image and `name`: that is used, or left out with a message of one line
    that has `said` in it; the good one is used anyway."""
    source = open_dataset(str(folder), "default", True, "--train_data_dir")
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
    """A traceback in a worker process, a good picture dropped for its metadata, a message that breaks its line."""
    name, content, said = FILES[kind]
    (folder / name).write_bytes(content)
    is_used_or_named(folder, name, said)


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_file_is_left_out_by_name(folder, kind):
    """Waiting forever for someone to write into a pipe; reading from a terminal or without end from a device."""
    make, said = PLACES[kind]
    make(folder / "a.png")
    is_used_or_named(folder, "a.png", said)


def test_the_metadata_that_break_a_rotation_do():
    """That one kind above is hostile at all; a Pillow that copes with it makes it one of the others."""
    with Image.open(io.BytesIO(UNTURNABLE)) as image:
        assert image.getexif()[0x112] == 6
        with pytest.raises(struct.error):
            ImageOps.exif_transpose(image)


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


def test_a_folder_called_jpg_is_a_folder(folder):
    """A folder opened as an image, or the images in it forgotten."""
    (folder / "album.jpg").mkdir()
    (folder / "album.jpg" / "b.png").write_bytes(PNG)
    assert [os.path.relpath(path, folder) for path in list_images(folder)] == ["album.jpg/b.png", "good.png"]


def test_hidden_files_are_left_alone(folder):
    """macOS' `._photo.jpg` companions, which are no images, taken for broken ones."""
    (folder / "..png").write_bytes(PNG)
    (folder / "._good.png").write_bytes(b"\0\5\x16\7")
    assert len(list_images(folder)) == 1


def test_loops_of_links_end_and_no_image_counts_twice(folder):
    """A folder that holds itself, by one link or by two that lead to each other."""
    (folder / "self").symlink_to(folder)
    for here, there in (("a", "b"), ("b", "a")):
        (folder / here).mkdir()
        (folder / here / "back").symlink_to(folder / there)
    (folder / "ring1").symlink_to("ring2")
    (folder / "ring2").symlink_to("ring1")
    with no_hang():
        assert len(list_images(folder)) == 1


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
    refusal(lambda: open_dataset(str(folder / "private\n"), "default", True, "--train_data_dir"), "--train_data_dir")


def test_an_imagenet_folder_that_may_not_be_read_is_one_line(folder, monkeypatch):
    """A PermissionError's traceback."""

    def denied(_):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "listdir", denied)
    monkeypatch.setattr(os, "scandir", denied)
    refusal(lambda: open_dataset(str(folder), "imagenet", True, "--eval_data_dir"), "--eval_data_dir", folder)


def test_an_image_that_may_not_be_read_is_left_out_by_name(folder, monkeypatch):
    """A file of another user among one's own."""
    (folder / "a.png").write_bytes(PNG)
    open_image = Image.open

    def guarded(path, *rest, **options):
        if str(path).endswith("a.png"):
            raise PermissionError(13, "Permission denied", path)
        return open_image(path, *rest, **options)

    monkeypatch.setattr(Image, "open", guarded)
    is_used_or_named(folder, "a.png", "Permission denied")


def test_an_image_that_needs_more_memory_than_there_is_is_left_out_by_name(folder, monkeypatch):
    """One huge image that ends the run of a machine that is short of memory."""
    (folder / "a.png").write_bytes(PNG)
    open_image = Image.open

    def guarded(path, *rest, **options):
        if str(path).endswith("a.png"):
            raise MemoryError
        return open_image(path, *rest, **options)

    monkeypatch.setattr(Image, "open", guarded)
    is_used_or_named(folder, "a.png", "MemoryError")


def test_a_folder_of_nothing_but_hostile_files_is_one_line(folder):
    """The last file's own failure in several lines, or a hang at the first pipe."""
    os.remove(folder / "good.png")
    pipe(folder / "a.png")
    (folder / "two\nlines.png").write_bytes(b"")
    dataset = ImageDataset(open_dataset(str(folder), "default", True, "--train_data_dir"), 16)
    refusal(lambda: dataset.require_readable(f"--train_data_dir {folder}"), "none of 2 files", "two\\nlines.png")


def test_a_worker_that_runs_out_of_images_says_so_in_one_line(folder):
    """torch's copy of the worker's traceback in place of the message."""
    loader = train_loader(ImageDataset(list_images(folder), 16, random_crop=True), 1, 1, 0)
    os.remove(folder / "good.png")
    text = refusal(lambda: next(iter(loader)), "no image can be read any more", "good.png")
    assert "Original" not in text


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("a/photo.jpg", "photo"),
        ("a/two\nlines\x1b.jpg", "two_lines_"),
        (os.fsdecode(b"\xff\xfe.png"), "__"),
        ("\N{GRINNING FACE}" * 62 + ".jpg", "\N{GRINNING FACE}" * 20),  # 251 bytes: with anything before it too long a name
        ("x" * 250 + ".png", "x" * 80),
    ],
)
def test_a_picture_is_named_after_its_image_as_far_as_names_go(tmp_path, path, stem):
    """A judged image whose picture cannot be saved, after all the work, since its own name is at the limit already."""
    assert plain_stem(path) == stem
    (tmp_path / f"00000_{plain_stem(path)}.png").touch()


def test_the_programs_survive_names_that_no_terminal_can_show():
    """UnicodeEncodeError while a file is named or the table is printed, where the terminal's encoding is ASCII."""
    program = f"""
import logging, os, sys
sys.path.insert(0, {str(ROOT)!r})
from runtime.cli import run
def main():
    name = os.fsdecode(bytes([255])) + "图\\n\\x1b"
    print("–", name.strip())
    logging.getLogger("any").warning("left out: %s", name)
    raise OSError(28, "No space left on device", name)
run(main)
"""
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, env=env, timeout=240, check=False)
    assert result.returncode == 1
    assert result.stdout.splitlines()[0].startswith(b"\\u2013 \\udcff\\u56fe")
    lines = result.stderr.decode("ascii").splitlines()
    assert len(lines) == 2 and lines[0] == "left out: \\udcff\\u56fe\\n\\x1b"
    assert lines[1].startswith("error: ") and "No space left on device" in lines[1] and "free some space" in lines[1]


def test_the_programs_end_quietly_when_their_reader_leaves():
    """`eval_align.py … | head -1` that ends in a BrokenPipeError's traceback."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from cli import run; run(lambda: print('x', flush=True))"
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, timeout=240, check=False)
    os.close(write_end)
    assert (result.returncode, result.stderr) == (1, b"")
