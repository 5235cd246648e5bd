"""Image files: which ones a folder holds, and what each one's content is."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from images.decoding import open_image, readable_formats
from utils import UserError, one_line, printable, require_regular

log = logging.getLogger(__name__)

# endings of pictures, of which Pillow may lack the format: to say that files are passed over
PICTURES = frozenset({
    ".heic", ".heif", ".hif", ".avif", ".jxl", ".jxr", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".sr2", ".dng", ".orf", ".rw2",
    ".raf", ".pef", ".srw", ".raw", ".svg", ".exr", ".hdr", ".psb", ".xcf",
})  # fmt: skip
# folders of file servers and systems, in lower case: thumbnails, deleted files, snapshots, the forks of zipped files
SYSTEM_FOLDERS = frozenset({
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "$recycle.bin", "system volume information",
    "lost+found", "__macosx",
})  # fmt: skip
SYNSET = re.compile(r"n\d{8}$")  # the name of an ImageNet class folder
MANY = 100_000  # files after which no more are counted
SETTLED = 2.0  # seconds after its last change in which a file may change again under the same time stamp


def image_endings() -> set[str]:
    """The name endings of the formats that Pillow reads here: {".png", ".jpg", …}."""
    readable_formats()
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def list_images(folder: str | os.PathLike, within: Iterable[str | os.PathLike] = (), further: Iterable[str] = ()) -> list[str]:
    """The sorted paths of all files below `folder` whose name ending is one of `further`, or of a format that Pillow reads.

    Hidden files and folders are left out, and with a warning `SYSTEM_FOLDERS` and folders that cannot be read. Links are
    followed, and each folder is visited once.

    Args:
        within: the folders in `folder` to look into; by default all.
    """
    endings = image_endings().union(further)
    found = []
    others, left_out = Counter(), Counter()
    visited = set()
    waiting = [os.fspath(each) for each in within or [folder]]
    while waiting:  # os.walk takes a stack frame per level before Python 3.12
        current = waiting.pop()
        try:
            status = os.stat(current)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(current) as entries:
                entries = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        except OSError as error:
            log.warning("left out: the folder %r (%s)", current, one_line(error))
            continue
        folders = [entry.path for entry in entries if os.path.isdir(entry.path)]
        systems = [path for path in folders if os.path.basename(path).lower() in SYSTEM_FOLDERS]
        left_out.update(map(os.path.basename, systems))
        waiting += [path for path in reversed(folders) if path not in systems]
        images = {entry.path for entry in entries if os.path.splitext(entry.name)[1].lower() in endings}
        found += images.difference(folders)
        unread = (os.path.splitext(entry.name)[1].lower() for entry in entries if entry.path not in images)
        others.update(ending for ending in unread if ending in PICTURES)
    if left_out:
        named = ", ".join(f"{count} {name}" for name, count in left_out.items())
        log.warning("%s: left out: folders that a file server or system keeps there (%s)", folder, printable(named))
    if others:
        log.warning(
            "%s: %s of formats that Pillow here does not read (%s): convert them, or install a plug-in (.heic: "
            "pillow-heif, .jxl: pillow-jxl-plugin)",
            folder, "1 file is" if others.total() == 1 else f"{others.total()} files are",
            ", ".join(sorted(others)),
        )  # fmt: skip
    return sorted(found, key=in_nfc)


def in_nfc(path: str) -> tuple[str, str]:
    """A key for sorting: a Mac's copy of a folder writes names in NFD, and its files have the same order."""
    return unicodedata.normalize("NFC", path), path


def said_of_endings(folder: str | os.PathLike) -> str:
    """What a message says of the files in and below a folder without images: "there are 12 .parquet, 1 .zip"."""
    endings = Counter()
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        endings.update(os.path.splitext(name)[1].lower() or "without ending" for name in names if not name.startswith("."))
        if endings.total() > MANY:
            break
    if not endings:
        return "there is no file"
    shards = "; .tar shards are read by streaming" if ".tar" in endings else ""
    return f"there are {', '.join(f'{count} {ending}' for ending, count in endings.most_common(5))}{shards}"


def list_imagenet(folder: str | os.PathLike, split: str) -> list[str]:
    """The images of an ImageNet layout: `folder/{split}/nXXXXXXXX/*.JPEG`, or `folder` itself holding the class folders.

    UserError without class folders, except for a `val` folder that holds the images themselves.
    """
    root = Path(folder)
    root = root / split if (root / split).is_dir() else root
    classes = sorted(entry for entry in root.iterdir() if entry.is_dir() and SYNSET.fullmatch(entry.name))
    if not classes and split == "val" and root.name == split and any(entry.is_file() for entry in root.iterdir()):
        return list_images(root)  # the validation images are often kept without class folders
    if not classes:
        raise UserError(
            f"{folder}: no ImageNet class folders (n01440764, …) there nor in its {split}/; for any other folder of images "
            "choose the dataset_type default"
        )
    return list_images(root, classes)


def digest_of(blocks: Iterable[bytes]) -> bytes:
    """16 bytes that name a content."""
    digest = hashlib.blake2b(digest_size=16)
    for block in blocks:
        digest.update(block)
    return digest.digest()


class ImageFiles:
    """A source of images: files, by path."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        """The image of that index, not yet decoded."""
        path = self.paths[index]
        require_regular(path)
        return open_image(path)

    def name(self, index: int) -> str:
        """What messages and results call that image."""
        return self.paths[index]

    def content(self, index: int) -> bytes:
        """The digest of the file's bytes. OSError if it cannot be read."""
        require_regular(self.paths[index])
        with open(self.paths[index], "rb") as file:
            return digest_of(iter(lambda: file.read(1 << 20), b""))

    def stamp(self, index: int) -> str | None:
        """What changes with the file, without reading it; None while a change could go unnoticed: clocks tick slowly.
        OSError if there is no such file."""
        path = self.paths[index]
        status = os.stat(path)
        if time.time() < max(status.st_mtime, status.st_ctime) + SETTLED:
            return None
        times = (status.st_mtime_ns, status.st_ctime_ns)
        return "\0".join(map(str, (os.path.abspath(path), status.st_ino, status.st_size, *times)))


class SomeImages:
    """A source of images: some of those of another one, by index. Methods as `ImageFiles`."""

    def __init__(self, source, indices: np.ndarray):
        self.source, self.indices = source, indices

    def __len__(self):
        return len(self.indices)

    @property
    def paths(self):
        paths = self.source.paths
        return [paths[index] for index in self.indices] if isinstance(paths, list) else paths

    def open(self, index: int) -> Image.Image:
        return self.source.open(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def content(self, index: int) -> bytes:
        return self.source.content(int(self.indices[index]))

    def stamp(self, index: int) -> str | None:
        return self.source.stamp(int(self.indices[index]))
