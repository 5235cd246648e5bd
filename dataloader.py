"""Images in, batches out: folders, ImageNet layouts, hub data sets and shards -> crops -> order -> batches.

A batch is a dict: `pixel_values` (B, 3, S, S) float32 in [-1, 1], `index` (B,) int64, `path`, a list of B names, `enlarged`, a
list that says of each image whether it was smaller than S, and `unreadable`, a list of messages, one for each file that could
not be decoded. Crop and flip of a training image depend only
on (seed, content of its file, view). The order of the images depends only on (seed, epoch). Neither depends on the number of
workers or processes, or on earlier reads.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import copyreg
import glob
import hashlib
import io
import itertools
import logging
import math
import multiprocessing
import multiprocessing.process
import os
import pickle
import queue
import re
import signal
import tarfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from concurrent import futures
from dataclasses import dataclass, field
from multiprocessing import resource_tracker, util

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler
from tqdm.contrib.logging import logging_redirect_tqdm

from images.decoding import open_image, resized_crop, to_pixel_values, to_rgb
from images.files import (
    ImageFiles,
    SomeImages,
    digest_of,
    image_endings,
    in_nfc,
    list_imagenet,
    list_images,
    said_of_endings,
)  # fmt: skip
from utils import STOP_SIGNALS, UserError, count_of, hub_token, one_line, physical_memory, require_regular

log = logging.getLogger(__name__)

MOST_HELD_OUT = 8  # images: an evaluation of more takes too long beside a short training
SAMPLED = 32  # images whose size is looked at before a run begins
ZOOM = 1.25  # training draws the short side between image_size and this multiple of it (at most the image's own)
PREPROCESSING = 3  # raised with every change to the pixels that `ImageDataset.crop` returns, so that no older cache is read
EPOCH_IMAGES = 10_000  # an epoch of a stream whose number of images is unknown
TICK = 1.0  # seconds between two looks at the workers, and at the request to stop, while no data come
BRACES = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
MOST_SHARDS = 1 << 20
MOST_BYTES = 1 << 30  # are read of an image in a data set: an archive may claim more
SAMPLE = re.compile(r"((?:.*/)?[^./][^.]*)\.([^/]*)")  # a shard's file: the name of its sample, and its own ending
COLUMNS = ("image", "img", "jpg", "png", "picture", "photo", "jpeg", "webp")  # which one of several is the image
TABLES = (".parquet", ".arrow", ".zip", ".tar", ".tar.gz")  # a data set's files that hold images, or say where they are
# errors that another try meets again, unlike those of a network or a disk
LASTING = (
    tarfile.TarError, EOFError, FileNotFoundError, PermissionError, IsADirectoryError, io.UnsupportedOperation,
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def find_images(
    folder: str, dataset_type: str, train: bool, label: str, cache_dir: str | None = None
) -> ImageFiles | HubImages:
    """The images in `folder`, or in the hub data set with that id.

    Args:
        folder: searched recursively, or with `dataset_type` "imagenet" in the ImageNet layout. A hub id, owner/name, is
            tried only with "imagenet", and only where there is no such folder.
        train: whether to take the training or the evaluation split, where there are splits.
        label: begins the message of a UserError, which is raised when there is nothing to read.
        cache_dir: where the hub client keeps downloads; None is its own default.
    """
    require_place(folder, dataset_type, label)
    if os.path.isdir(folder):
        try:
            paths = list_imagenet(folder, "train" if train else "val") if dataset_type == "imagenet" else list_images(folder)
        except UserError as error:
            raise UserError(f"{label} {error}") from None
        except OSError as error:
            raise UserError(f"{label} {folder}: cannot be read ({one_line(error)}); check its permissions") from None
        if not paths:
            raise UserError(
                f"{label} {folder}: no image there (searched recursively for every format that Pillow reads); "
                + said_of_endings(folder)
            )
        return ImageFiles(paths)
    return load_hub_split(folder, train, label, cache_dir)


def require_place(folder: str, dataset_type: str, label: str) -> None:
    """UserError, which begins with `label`, unless `folder` is a folder, or with "imagenet" may be a hub data set's id."""
    if os.path.isdir(folder):
        return
    if os.path.exists(folder):
        tar = "; shards are read by streaming" if folder.endswith(".tar") else ""
        raise UserError(f"{label} {folder}: a file; name the folder that holds the images{tar}")
    if folder.count("/") != 1 or folder.startswith((".", "/", "~")):
        raise UserError(f"{label} {folder}: no such folder")
    if dataset_type != "imagenet":
        raise UserError(f"{label} {folder}: no such folder; if it is a data set of the hub, choose the dataset_type imagenet")


# ----------------------------------------------------------------------------------------------------------------------
# Hub data sets


class HubImages:
    """A source of images: a split of a 🤗 `datasets` data set, with image columns alone. Methods as `ImageFiles`.

    Args:
        homes: where a file may be that a row names in place of an image's bytes, as from `homes_of`.
    """

    paths = None  # it has no files of its own

    def __init__(self, split, homes: tuple[str, ...] = ()):
        self.split, self.homes = split, homes
        self._encoded = still_encoded(split)

    def __len__(self):
        return len(self.split)

    def open(self, index: int) -> Image.Image:
        return open_image(io.BytesIO(image_in(self._encoded[index], self.homes)))

    def name(self, index: int) -> str:
        return f"{self.split.info.dataset_name}[{index}]"

    def content(self, index: int) -> bytes:
        return digest_of([image_in(self._encoded[index], self.homes)])

    def stamp(self, index: int) -> str | None:
        return f"{self.split._fingerprint}\0{index}"


def still_encoded(data):
    """A 🤗 data set whose image columns are {bytes, path}: the library would open any file or URL that a row names, and in any
    format."""
    import datasets

    for column in data.column_names:
        data = data.cast_column(column, datasets.Image(decode=False))
    return data


def image_in(row: dict, homes: tuple[str, ...]) -> bytes:
    """The encoded image of a row, in the first of its columns that has one. A file that it names is read below `homes` alone.

    ValueError if there is none or it may not be read; the errors of file systems as they come.
    """
    images = [value for value in row.values() if isinstance(value, dict) and (value.get("bytes") or value.get("path"))]
    if not images:
        raise ValueError("no image in this row")
    content, path = images[0].get("bytes"), images[0].get("path")
    if content:
        return content
    *archives, place = path.split("::")
    if "://" not in place:
        files = [os.path.realpath(os.path.join(home, place)) for home in (*homes[:1], "")]
        remote = [homes[-1] + place] if homes and "://" in homes[-1] and not os.path.isabs(place) else files
        place = next((file for file in files if file.startswith(homes) and os.path.exists(file)), remote[0])
    if not place.startswith(homes) or ".." in place.split("/") or not all(each.startswith("zip://") for each in archives):
        raise ValueError(f"it is in {path}, outside the data set")
    if "://" not in place:
        require_regular(place)
    with open_anywhere("::".join([*archives, place])) as file:
        return file.read(MOST_BYTES)


def open_anywhere(place: str):
    """The file at a path or URL, to be read from its start."""
    from datasets import DownloadConfig
    from datasets.utils.file_utils import xopen

    return xopen(place, "rb", block_size=0, download_config=DownloadConfig(token=hub_token()))


def homes_of(name: str) -> tuple[str, ...]:
    """Where the files of a hub data set are, by its id, or those of a data set in a folder: beginnings of paths and URLs."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    if os.path.isdir(name):
        return (os.path.join(os.path.realpath(name), ""),)
    cache = os.path.join(os.path.realpath(HF_HUB_CACHE), repo_folder_name(repo_id=name, repo_type="dataset"), "")
    return cache, f"hf://datasets/{name}@", f"hf://datasets/{name}/"


def load_hub_split(name: str, train: bool, label: str, cache_dir: str | None = None) -> HubImages:
    """The training or evaluation split of hub data set `name`, or `name:configuration`. UserError, which begins with `label`,
    if it has no images or cannot be loaded."""
    return HubImages(*hub_split(name, train, label, cache_dir))


def hub_split(name: str, train: bool, label: str, cache_dir: str | None = None, streaming: bool = False):
    """(split with its image columns alone, its `homes_of`), chosen as by `load_hub_split`. With `streaming` nothing is
    downloaded before it is read."""
    import datasets

    folder, colon, choice = name.partition(":")
    access = {"cache_dir": cache_dir, "token": hub_token() or False}
    try:
        if not colon:
            choices = datasets.get_dataset_config_names(name, **access)
            if len(choices) > 1 and "default" not in choices:
                named = ", ".join(f"{name}:{one}" for one in choices)
                raise UserError(f"{label} {name}: it has several configurations; name one: {named}")
        if datasets.load_dataset_builder(folder, choice or None, **access).name == "parquet":
            access["on_bad_files"] = "warn"  # which names a file that is cut short, and goes on
        splits = datasets.get_dataset_split_names(folder, choice or None, **access)
        wanted = ("train",) if train else ("validation", "val", "test")
        split = next((name for name in wanted if name in splits), splits[0])
        if split not in wanted:
            log.warning("%s %s: no %s split; using %s", label, name, wanted[0], split)
        data = datasets.load_dataset(folder, choice or None, split=split, streaming=streaming, **access)
    except UserError:
        raise
    except Exception as error:  # the hub client's errors have no common base class
        raise UserError(
            f"{label} {name}: no such folder, and as a hub data set it could not be loaded ({one_line(error)}); "
            "a gated one needs HUGGINGFACE_TOKEN"
        ) from None
    return data.select_columns(image_columns(data.features, f"{label} {name}")), homes_of(folder)


def image_columns(features: dict | None, label: str) -> list[str]:
    """The column that holds the images, and those that may do so in its place, as .jpg and .png do; UserError, which begins
    with `label`, if none does."""
    import datasets

    features = features or {}
    columns = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        kinds = [f"{column} ({getattr(feature, 'dtype', type(feature).__name__)})" for column, feature in features.items()]
        raise UserError(
            f"{label}: this data set has no image column, which holds images and not their addresses; its columns "
            f"are {', '.join(kinds) or 'unknown'}"
        )
    first = min(columns, key=rank_of)
    others = [column for column in columns if {f".{first}", f".{column}"} <= image_endings() and column != first]
    if len(columns) > 1:
        log.info("%s: image columns %s; using %s", label, ", ".join(columns), " or ".join([first, *others]))
    return [first, *others]


def rank_of(column: str) -> int:
    """The place of an image column, or of a file's ending in a shard, among several: the first is used."""
    return COLUMNS.index(column) if column in COLUMNS else len(COLUMNS) + ("." in column)


# ----------------------------------------------------------------------------------------------------------------------
# Shards


@dataclass
class Stream:
    """A 🤗 stream of rows, each with an encoded image.

    Attributes:
        data: the `datasets.IterableDataset`. name: for messages. digest: differs between two streams.
        homes: as in `HubImages`. length: number of images, where the stream says so; else None.
        shards: the .tar files of `data`, if it is made of such. left_out: {one that cannot be read to its end: its index}.
    """

    data: object
    name: str
    digest: str
    homes: tuple[str, ...] = ()
    length: int | None = None
    shards: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def image_of(self, row: dict, number: int) -> tuple[str, bytes | str] | None:
        """(name, encoded image or why there is none) of a row, the `number`-th that was read; None for the end of a shard that
        is broken there, which is said once."""
        if "broken" in row:
            shard = row["broken"]
            if shard not in self.left_out:
                self.left_out[shard] = self.shards.index(shard)
                log.warning("left out: %r, %s", shard, row["why"])
            return None
        name = row.get("name") or f"{self.name}[{number}]"
        try:
            if file := row.get("file"):
                require_regular(file)
                with open(file, "rb") as content:
                    return name, content.read()
            return name, image_in(row, self.homes)
        except (ValueError, *LASTING) as error:
            return name, one_line(error)

    def put_back(self, left_out: dict[str, int]) -> None:
        """Count shards that a run left out, and that are no longer there, among the shards again: the places of all others
        in the order depend on them."""
        names = set(map(os.path.basename, self.shards))
        for shard, index in sorted(left_out.items(), key=lambda item: item[1]):
            if os.path.basename(shard) not in names:
                log.warning("%s: %r is gone, which the run to resume had left out", self.name, shard)
                self.shards = [*self.shards[:index], shard, *self.shards[index:]]
                self.left_out[shard] = index
        self.data, self.digest = rows_in(shard_rows, self.shards), digest_of_names(map(os.path.basename, self.shards))


def shards_of(place: str, label: str = "shards") -> list[str]:
    """The shards that a path, a glob or a URL names; `{000..127}` stands for 128 of them, and a folder for its .tar files.
    UserError, which begins with `label`, if there are more than `MOST_SHARDS`."""
    ranges = [(int(first), int(last)) for first, last in BRACES.findall(place)]
    if math.prod(max(0, last - first + 1) for first, last in ranges) > MOST_SHARDS:
        raise UserError(f"{label} {place}: more than {MOST_SHARDS} shards; name fewer")
    found = BRACES.search(place)
    if found:
        first, last = found.groups()
        numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        return [shard for number in numbers for shard in shards_of(place[: found.start()] + number + place[found.end() :])]
    if "://" in place:
        return [place]
    found = glob.glob(os.path.join(glob.escape(place), "*.tar") if os.path.isdir(place) else place)
    return sorted(found, key=in_nfc)


def digest_of_names(names: Iterable[str]) -> str:
    return hashlib.sha256(in_nfc("\0".join(names))[0].encode(errors="surrogateescape")).hexdigest()[:16]


def rows_in(read: Callable, files: list[str]):
    """The `datasets.IterableDataset` of what `read` yields for a list of these files."""
    import datasets

    return datasets.IterableDataset.from_generator(read, gen_kwargs={"files": files})


def file_rows(files: list[str]):
    """A row for each image file."""
    return ({"name": file, "file": file} for file in files)


class ShardMember(tarfile.TarInfo):
    """A file in a shard. A damaged header is an error, and so is a shard without the mark at its end: Python takes both for the
    end of the archive."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def shard_rows(files: list[str]):
    """A row for each sample of .tar shards: its name and its image, which is None where it has none, as {bytes}.

    A sample is what follows each other with one name up to the first dot. Of several images in it the one that `rank_of` puts
    first is used. A shard that cannot be read on ends with a row that says so. An error of the network names the shard.
    """
    endings = image_endings()
    for shard in files:
        samples = 0
        try:
            if "://" not in shard:
                require_regular(shard)
            with open_anywhere(shard) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=ShardMember) as archive:
                for name, members in itertools.groupby(members_of(archive), key=lambda member: member[0]):
                    images = {}
                    for _, ending, member in members:
                        if f".{ending.rpartition('.')[2]}" in endings:
                            images[ending] = archive.extractfile(member).read(MOST_BYTES)
                    chosen = min(images, key=rank_of, default=None)
                    samples += 1
                    yield {"name": f"{shard}#{name}", "image": images and {"bytes": images[chosen]}, "endings": [*images]}
                if not samples:
                    raise tarfile.ReadError("no file in it")
                if len(archive.fileobj.read(1 << 20)) == 1 << 20:  # more than the zeros that fill up an archive
                    raise tarfile.ReadError("its archive ends before the file does")
        except Exception as error:  # each file system has its own classes
            missing, cause = isinstance(error, FileNotFoundError), error.__cause__  # fsspec says so too where no server answers
            if not isinstance(error, LASTING) or (missing and cause and getattr(cause, "status", None) != 404):
                raise OSError(f"{shard}: {one_line(error)}") from error
            why = "no such file" if missing else one_line(error)
            yield {"broken": shard, "why": f"from sample {samples + 1} on ({why})"}


def members_of(archive: tarfile.TarFile):
    """(name of the sample, ending in lower case, member) of each file in a shard that is not hidden."""
    for member in iter(archive.next, None):
        archive.members = []  # else all stay in memory
        found = SAMPLE.fullmatch(member.name)
        if member.isreg() and found and not os.path.basename(member.name).startswith((".", "__")):
            yield found[1], found[2].lower(), member


def open_stream(place: str, label: str, cache_dir: str | None = None) -> Stream:
    """The stream of training images at `place`: .tar shards by path, glob or URL, a folder of images, or a 🤗 data set by id or
    folder. UserError, which begins with `label`, if there is none."""
    from datasets.data_files import resolve_pattern

    shards = shards_of(place, label) if ".tar" in place or glob.glob(os.path.join(glob.escape(place), "*.tar")) else []
    if not shards and ".tar" in place:
        raise UserError(f"{label} {place}: no such shard")
    if shards:
        files = [shard if "://" in shard else os.path.abspath(shard) for shard in shards]
        if "://" in place and not place.startswith("http") and glob.has_magic(place):
            try:
                files = [file for shard in shards for file in resolve_pattern(shard, "")]
            except Exception as error:  # each file system has its own classes
                raise UserError(f"{label} {place}: cannot be looked for ({one_line(error)})") from None
        return Stream(rows_in(shard_rows, files), place, digest_of_names(map(os.path.basename, shards)), shards=files)
    tables = os.path.isdir(place) and any(name.endswith(TABLES) for _, _, names in os.walk(place) for name in names)
    if os.path.isdir(place) and not tables and (files := list_images(place)):
        digest = digest_of_names(os.path.relpath(file, place) for file in files)
        return Stream(rows_in(file_rows, files), place, digest, length=len(files))
    data, homes = hub_split(place, True, label, cache_dir, streaming=True)
    split = (data.info.splits or {}).get(str(data.split))
    return Stream(still_encoded(data), place, digest_of_names([place]), homes, split.num_examples if split else None)


class EncodedImages:
    """A source of images: some that were read, [(name, encoded image or why there is none)]. Methods as `ImageFiles`."""

    paths = None  # it has no files of its own

    def __init__(self, images: list[tuple[str, bytes | str]]):
        self.images = images

    def __len__(self):
        return len(self.images)

    def open(self, index: int) -> Image.Image:
        content = self.images[index][1]
        if isinstance(content, str):
            raise ValueError(content)
        return open_image(io.BytesIO(content))

    def name(self, index: int) -> str:
        return self.images[index][0]

    def content(self, index: int) -> bytes:
        return digest_of([self.images[index][1]])


# ----------------------------------------------------------------------------------------------------------------------
# Crops


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message says which and why.

    Attributes:
        why: the reason. passing: whether the image may become readable without a change to its content, such as after an
            error of the disk.
    """

    def __init__(self, name: str, why: str, passing: bool = False):
        super().__init__(name, why, passing)
        self.why, self.passing = why, passing

    def __str__(self):
        return f"{self.args[0]!r} ({self.why})"


class ImageDataset(Dataset):
    """Square images of `image_size` px from a source.

    For training (`random_crop`) an item is asked for as (index, view). Each view of an image has its own random crop and,
    with `random_flip`, its own chance of being mirrored. The next readable image replaces an unreadable one.

    For evaluation an item is asked for as index and gets the centre crop. An unreadable image has `pixel_values` None, and
    `collate` drops it. In both cases `unreadable` of the item says why.

    One item has `pixel_values` as float32 in [-1, 1]. A list of items, as a loader asks for them, has uint8 levels, which
    take a quarter of the memory on their way out of a worker.

    Args:
        source: `ImageFiles`, `HubImages`, or a list of paths, which stands for `ImageFiles`.
    """

    def __init__(self, source, image_size: int, random_crop: bool = False, random_flip: bool = False, seed: int = 0):
        self.source = ImageFiles(source) if isinstance(source, list) else source
        self.image_size = image_size
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.seed = seed

    def __len__(self):
        return len(self.source)

    def part(self, indices: np.ndarray) -> ImageDataset:
        """The images with those indices as a data set."""
        source = SomeImages(self.source, indices)
        return ImageDataset(source, self.image_size, self.random_crop, self.random_flip, self.seed)

    def name(self, index: int) -> str:
        """The image's name in messages and results."""
        return self.source.name(index)

    def open(self, index: int) -> Image.Image:
        """The whole image as RGB. For training, a large JPEG is decoded at a reduced scale that is still large enough.
        UnreadableImage if it cannot be decoded."""
        try:
            with warnings.catch_warnings():
                # between its limit and twice that Pillow only warns; a photo is smaller
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with self.source.open(index) as image:
                    if 0 in image.size:
                        raise ValueError(f"{image.width}x{image.height} pixels")
                    if self.random_crop:
                        image.draft(None, (int(self.image_size * ZOOM),) * 2)
                    return to_rgb(image, self.name(index))
        except Exception as error:  # every Pillow plugin raises its own classes
            # Pillow's own errors have no number; the system's have one, and the next read may succeed
            passing = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
            raise UnreadableImage(self.name(index), one_line(error), passing) from None

    def content(self, index: int) -> bytes:
        """The digest of the bytes in the image's file. UnreadableImage if it cannot be read."""
        try:
            return self.source.content(index)
        except Exception as error:  # of the disk, or of the hub client's table
            raise UnreadableImage(self.name(index), one_line(error), passing=True) from None

    def view_key(self) -> dict:
        """Everything that the pixels of a view depend on beside the image's content, as plain JSON values."""
        return {
            "image_size": self.image_size,
            "random_flip": self.random_flip,
            "seed": self.seed,
            "preprocessing": PREPROCESSING,
        }

    def require_readable(self, label: str) -> None:
        """UserError, which begins with `label`, unless at least one of the images can be decoded."""
        failure = None
        for index in range(len(self)):
            try:
                self.open(index)
                return
            except UnreadableImage as error:
                failure = error
        raise UserError(f"{label}: none of {len(self)} files can be read as an image; the last: {failure}")

    def warn_of_small(self, label: str) -> None:
        """Log how many images of a sample are smaller than `image_size` and will be enlarged."""
        looked_at = range(0, len(self), -(-len(self) // SAMPLED))
        small = 0
        for index in looked_at:
            with contextlib.suppress(Exception), self.source.open(index) as image:
                small += min(image.size) < self.image_size
        if small:
            log.warning(
                "%s: %d of the %d images looked at are smaller than %d px; they are enlarged, which adds no detail",
                label, small, len(looked_at), self.image_size,
            )  # fmt: skip

    def crop(self, image: Image.Image, content: bytes, view: int) -> torch.Tensor:
        """View `view` of a training image: (3, S, S) uint8, a function of (seed, the digest of its content, view)."""
        zoom, top, left, flip = np.random.default_rng((self.seed, int.from_bytes(content, "little"), view)).random(4)
        largest = min(int(self.image_size * ZOOM), max(self.image_size, min(image.size)))
        short_side = self.image_size + int(zoom * (largest - self.image_size + 1))
        pixels = resized_crop(image, short_side, self.image_size, (top, left))
        return pixels.flip(-1) if self.random_flip and flip < 0.5 else pixels

    def __getitem__(self, item):
        (made,) = self.__getitems__([item])
        if made["pixel_values"] is not None:
            made["pixel_values"] = to_pixel_values(made["pixel_values"])
        return made

    def __getitems__(self, items: list) -> list[dict]:
        made = [self._levels_of(item) for item in items]
        if self.random_crop and any(item["pixel_values"] is None for item in made):
            raise UserError(f"no image can be read any more; the last failure: {made[-1]['unreadable'][-1]}")
        return made

    def _levels_of(self, item) -> dict:
        """An item with uint8 levels; `pixel_values` is None if neither the image nor a replacement can be read."""
        index, view = item if self.random_crop else (item, None)
        unreadable = []
        for place in range(index, index + (len(self) if self.random_crop else 1)):
            place %= len(self)
            try:
                image = self.open(place)
                if self.random_crop:
                    pixels = self.crop(image, self.content(place), view)
                else:
                    pixels = resized_crop(image, self.image_size, self.image_size)
                return {
                    "pixel_values": pixels,
                    "index": place,
                    "path": self.name(place),
                    "enlarged": min(image.size) < self.image_size,
                    "unreadable": unreadable,
                }
            except UnreadableImage as error:
                unreadable.append(str(error))
        return {"pixel_values": None, "index": index, "path": self.name(index), "enlarged": False, "unreadable": unreadable}


class StreamDataset(ImageDataset):
    """Square training images of a stream. A batch is asked for as a list of (number, (name, encoded image)). Crop and flip
    are a function of (seed, the image's content, number).

    The next readable image of the batch replaces an unreadable one. If a batch has no readable image, its pixels are
    not-a-number and its paths empty, so that the training loop skips the step.

    Args:
        epoch_images: number of images in an epoch, and the length of this data set; 0: the stream's own number, or
            `EPOCH_IMAGES` if it is unknown.
    """

    def __init__(self, stream: Stream, image_size: int, random_flip: bool = False, seed: int = 0, epoch_images: int = 0):
        super().__init__(EncodedImages([]), image_size, True, random_flip, seed)
        self.stream = stream
        self.epoch_images = epoch_images or stream.length or EPOCH_IMAGES

    def __len__(self):
        return self.epoch_images

    def __getstate__(self):
        return self.__dict__ | {"stream": None}  # the main process reads; a worker gets the encoded images

    def of(self, images: list[tuple[str, bytes | str]]) -> ImageDataset:
        """Images of this stream as a data set of their own."""
        return ImageDataset(EncodedImages(images), self.image_size, True, self.random_flip, self.seed)

    def __getitems__(self, items: list) -> list[dict]:
        batch = self.of([image for _, image in items])
        made = [batch._levels_of((place, number)) | {"index": number} for place, (number, _) in enumerate(items)]
        for item in made:
            if item["pixel_values"] is None:
                item |= {"pixel_values": torch.full((3, self.image_size, self.image_size), torch.nan), "path": ""}
        return made

    def look_at_first(self, label: str) -> None:
        """UserError, which begins with `label`, unless one of the stream's first images can be decoded. Logs how many of them
        are small."""
        images, several = [], []
        try:
            for row in copy.copy(self.stream.data):
                if image := self.stream.image_of(row, len(images)):
                    images.append(image)
                if len(row.get("endings", ())) > 1:
                    several = row["endings"]
                if len(images) == SAMPLED:
                    break
        except Exception as error:
            raise UserError(f"{label}: cannot be read ({one_line(error)})") from None
        if several:
            using = min(several, key=rank_of)
            log.info("%s: a sample has several images, .%s; using .%s", label, ", .".join(several), using)
        first = self.of(images)
        if not images:
            shards = self.stream.left_out
            raise UserError(f"{label}: " + (f"none of {len(shards)} shards can be read" if shards else "no image there"))
        first.require_readable(label)
        first.warn_of_small(label)


def hold_out(source, share: float, seed: int, label: str) -> tuple[SomeImages, SomeImages]:
    """(the images to train on, those to judge by): a random `share` of a source's, at least one and at most `MOST_HELD_OUT`.
    UserError, which begins with `label`, if there is only one image."""
    if len(source) < 2:
        raise UserError(f"{label}: one image cannot be held out and trained on; add images")
    held = min(max(1, round(share * len(source))), len(source) - 1, MOST_HELD_OUT)
    order = np.random.default_rng(seed).permutation(len(source))
    return SomeImages(source, np.sort(order[held:])), SomeImages(source, np.sort(order[:held]))


# ----------------------------------------------------------------------------------------------------------------------
# Order


@contextlib.contextmanager
def waiting_for(source: str):
    """Within this context a thread says, as a `Wait` does, that no data come from `source`."""
    done, wait = threading.Event(), Wait(source)

    def look():
        while not done.wait(TICK):
            wait.tick()

    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        done.set()


class Wait:
    """A wait for data that is looked at every `TICK`.

    Args:
        source: where the data come from. check: as of a `Loader`.

    Attributes:
        seconds: so far, by the number of looks: a suspended program waits for nobody.
    """

    def __init__(self, source: str, check: Callable[[], None] = bool):
        self.seconds = 0.0
        self._source, self._check, self._next_word = source, check, SILENCE

    def tick(self) -> None:
        """`TICK` has passed. Logs that no data come, after ever longer times."""
        self.seconds += TICK
        self._check()
        if self.seconds >= self._next_word:
            self._next_word *= 2
            with logging_redirect_tqdm():
                log.warning("no data for %.0f s from %s", self.seconds, self._source)


@dataclass(eq=False)
class EpochSampler(Sampler):
    """Batches of (index, view) for one process, epoch after epoch without end.

    Every process draws the same permutation of (seed, epoch) and takes its own slice of each global batch. P processes with
    batch B therefore see the images that one process with P·B sees. The last batch of an epoch is filled up from the start
    of the epoch: all batches have one size, and every epoch holds every image.

    Attributes:
        length: number of images; batch_size: images per batch of this process.
        views: number of views per image, of which each epoch draws one; 0: view e in epoch e.
        rank, world: this process and the number of processes.
        first_step: the step at which an iteration starts; a resumed run sets it.
    """

    length: int
    batch_size: int
    seed: int
    views: int = 0
    rank: int = 0
    world: int = 1
    first_step: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.length // (self.batch_size * self.world))

    def __len__(self):
        return self.steps_per_epoch

    def state_after(self, step: int) -> None:
        """The state to save after `step` steps: none, the step alone gives the place in the order."""

    def go_on(self, step: int, place: None, places: Iterable = ()) -> None:
        """Let the next iteration begin after `step` steps."""
        self.first_step = step

    def epoch_items(self, epoch: int) -> np.ndarray:
        """The (index, view) pairs of an epoch over all processes, a whole number of global batches: (pairs, 2) int64."""
        draw = np.random.default_rng((self.seed, epoch))
        order = draw.permutation(self.length)
        views = draw.integers(self.views, size=self.length) if self.views else np.full(self.length, epoch)
        indices = order[np.arange(self.steps_per_epoch * self.batch_size * self.world) % self.length]
        return np.stack([indices, views[indices]], axis=1)

    def __iter__(self):
        step = self.first_step
        while True:
            epoch, offset = divmod(step, self.steps_per_epoch)
            items = self.epoch_items(epoch)
            for batch in range(offset, self.steps_per_epoch):
                start = (batch * self.world + self.rank) * self.batch_size
                yield [tuple(item) for item in items[start : start + self.batch_size].tolist()]
            step += self.steps_per_epoch - offset


class StreamSampler(Sampler):
    """Batches of a stream's encoded images for one process, without end, as `StreamDataset` takes them.

    The main process reads the stream and workers only decode, so the order does not depend on the number of workers. The
    stream is read in blocks of `buffer` images, each shuffled by (seed, rank, number of images before it). A thread reads
    the next block meanwhile.

    Attributes:
        batch_size: images per batch of this process; first_step: the step at which an iteration starts.
        check: as of a `Loader`, which sets it.
    """

    KEPT = 4096  # places that are remembered: of batches on their way from the stream to the training loop

    def __init__(self, dataset: StreamDataset, batch_size: int, seed: int, buffer: int, rank: int = 0, world: int = 1):
        from datasets.distributed import split_dataset_by_node

        self.batch_size, self.seed, self.buffer, self.rank, self.world = batch_size, seed, max(1, buffer), rank, world
        self.length = len(dataset)
        self.first_step = 0
        self.check = bool
        self._stream = copy.copy(dataset.stream)
        self._stream.data = split_dataset_by_node(dataset.stream.data, rank, world)
        # turn: passes before this one; count: images read before this block; state: the 🤗 stream's at the block's start
        self._start = {"stream": self._stream.digest, "turn": 0, "count": 0, "state": None, "offset": 0}
        self._places = {}

    def __len__(self):
        return -(-self.length // (self.batch_size * self.world))

    def state_after(self, step: int) -> dict:
        """This process's place in the stream after `step` steps, as plain values."""
        return self._start if step == self.first_step else self._places[step]

    def go_on(self, step: int, place: dict, places: Iterable[dict] = ()) -> None:
        """Let the next iteration begin after `step` steps, at a place from `state_after`; `places`: those of all processes.
        UserError for a place in another stream. Shards that the run had left out may be gone."""
        from datasets.distributed import split_dataset_by_node

        left_out = {shard: index for each in (place, *places) for shard, index in each.get("left_out", {}).items()}
        if place["stream"] != self._stream.digest:
            self._stream.put_back(left_out)
            self._stream.data = split_dataset_by_node(self._stream.data, self.rank, self.world)
        if place["stream"] != self._stream.digest:
            raise UserError(f"train_data_dir {self._stream.name}: not the shards that the run to resume had; name the same")
        self._stream.left_out |= left_out  # a later resume needs them too
        self.first_step, self._start = step, place

    def __iter__(self):
        step, offset, batch = self.first_step, self._start["offset"], []
        self._places = {}
        for start, images in self._read_ahead(self._start):
            order = np.random.default_rng((self.seed, self.rank, start["count"])).permutation(len(images))
            for place in range(offset, len(order)):
                batch.append((start["count"] + place, images[order[place]]))
                if len(batch) == self.batch_size:
                    step += 1
                    self._places[step] = start | {"offset": place + 1}
                    self._places.pop(step - self.KEPT, None)
                    yield batch
                    batch = []
            offset = 0

    def _read_ahead(self, place: dict):
        """(place of a block, its images), block after block. WorkersLost if the stream breaks off."""
        ahead, unwanted = queue.Queue(maxsize=1), threading.Event()
        data = copy.deepcopy(self._stream.data)  # an iteration that nobody reads any more may still be at its last image
        threading.Thread(target=self._read, args=(data, place, ahead, unwanted), daemon=True).start()
        wait = Wait(self._stream.name, self.check)
        try:
            while True:
                try:
                    block = ahead.get(timeout=TICK)
                except queue.Empty:
                    wait.tick()
                    continue
                wait = Wait(self._stream.name, self.check)
                if isinstance(block, Exception):
                    raise block
                yield block
        finally:  # the thread ends at its next image; nobody waits for one that a server keeps waiting
            unwanted.set()
            if not ahead.empty():
                ahead.get()

    def _read(self, data, place: dict, ahead: queue.Queue, unwanted: threading.Event) -> None:
        """Thread: put the blocks from a place on into `ahead`, pass after pass, and last the error that ends them."""
        turn, count, state = place["turn"], place["count"], place["state"]
        try:
            while True:
                data.set_epoch(1 + int(np.random.SeedSequence((self.seed, turn)).generate_state(1)[0] >> 1))
                data.load_state_dict(state)
                rows, begun = iter(data), state is not None
                while images := self._block(rows, count, unwanted):
                    place = {"stream": self._stream.digest, "turn": turn, "count": count, "state": state}
                    ahead.put((place | {"left_out": dict(self._stream.left_out)}, images))
                    begun, count, state = True, count + len(images), data.state_dict()
                if unwanted.is_set():
                    return
                if not begun:  # after a pass the shards have gone since
                    share = f"no image in the share of process {self.rank}; give it more shards"
                    raise (WorkersLost if turn else UserError)(f"train_data_dir {self._stream.name}: {share}")
                turn, state = turn + 1, None
        except UserError as error:
            ahead.put(error)
        except Exception as error:  # a network, a file system, a shard that is cut short
            ahead.put(WorkersLost(f"train_data_dir {self._stream.name}: cannot be read on ({one_line(error)})"))

    def _block(self, rows, count: int, unwanted: threading.Event) -> list:
        images = []
        for row in rows:
            if unwanted.is_set():
                return []
            if image := self._stream.image_of(row, count + len(images)):
                images.append(image)
            if len(images) == self.buffer:
                break
        return images


# ----------------------------------------------------------------------------------------------------------------------
# Batches


AHEAD = 2  # batches for each worker that are asked for before they are wanted
IMPORTS = 480.0  # seconds more for the first batch of workers that are no forks: each imports torch, from whatever disk
PATIENCE = 120.0  # seconds without a batch after which data workers are given up
DIED = "a data worker has ended unexpectedly, most often killed for want of memory"
LOST = "lower it (0: none), or give the machine or container more memory (docker: --memory)"
REMEDIES = {  # for workers that cannot be started, by the words of the system's error
    "AF_UNIX path too long": "set TMPDIR to a folder with a shorter name",
    "Too many open files": "lower it (0: none), or raise the limit of open files (ulimit -n)",
    "Resource temporarily unavailable": "lower it (0: none), or raise the limit of processes (ulimit -u, docker: --pids-limit)",
}
GONE = (EOFError, OSError)  # what a pipe says whose other end is gone; a worker sends no such errors
POSIX = hasattr(signal, "pthread_sigmask")  # not Windows
SILENCE = 30.0  # seconds without data after which a word is said for the first time


class WorkersLost(UserError):
    """No further batch will come: a data worker has died, stands still, or could not be started, or a stream has ended. Begins
    with the setting that it is about."""


def train_loader(dataset, batch_size: int, num_workers: int, seed: int, views=0, rank=0, world=1, device=None) -> Loader:
    """A loader of training batches without end, in the order of `EpochSampler`; its `len` is the number of steps in an
    epoch."""
    return Loader(dataset, EpochSampler(len(dataset), batch_size, seed, views, rank, world), num_workers, device=device)


def eval_loader(dataset: ImageDataset, batch_size: int, num_workers: int, rank: int = 0, world: int = 1, device=None) -> Loader:
    """One pass over the evaluation images, in order; process `rank` of `world` has every `world`-th batch.

    Processes share whole batches: an image always has the same neighbours, and the same results to the last digit.
    """
    indices = range(len(dataset))
    batches = [list(indices[start : start + batch_size]) for start in range(0, len(dataset), batch_size)]
    return Loader(dataset, batches[rank::world], num_workers, device=device, patience=PATIENCE + 2 * batch_size)


def stream_loader(
    dataset: StreamDataset, batch_size: int, num_workers: int, seed: int, buffer: int, rank=0, world=1, device=None
) -> Loader:
    """As `train_loader`, from a stream."""
    shards = dataset.stream.data.num_shards
    if world > 1 and shards % world and rank == 0:
        log.warning(
            "%s: %d shards are no multiple of %d processes, so each reads them all and keeps its share; with a multiple each "
            "reads its own only",
            dataset.stream.name, shards, world,
        )  # fmt: skip
    return Loader(dataset, StreamSampler(dataset, batch_size, seed, buffer, rank, world), num_workers, device=device)


def collate(items: list[dict] | dict) -> dict:
    """Items -> batch. Items without pixels are dropped; `unreadable` holds the messages of all items, each once. A batch, as
    a latent cache gives it, stays as it is."""
    if isinstance(items, dict):
        return items
    good = [item for item in items if item["pixel_values"] is not None]
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in good]) if good else torch.empty(0),
        "index": torch.tensor([item["index"] for item in good], dtype=torch.int64),
        "path": [item["path"] for item in good],
        "enlarged": [item["enlarged"] for item in good],
        "unreadable": list(dict.fromkeys(message for item in items for message in item["unreadable"])),
    }


def widened(batch, device=None):
    """A batch whose 8-bit pixels are float32 in [-1, 1] and whose other values are float32, on `device` if one is given."""
    if not isinstance(batch, dict):
        return batch
    for name, values in batch.items():
        if isinstance(values, torch.Tensor) and (values.dtype == torch.uint8 or values.is_floating_point()):
            values = values.to(device, non_blocking=True) if device else values
            batch[name] = to_pixel_values(values) if values.dtype == torch.uint8 else values.float()
    return batch


def require_memory(batch_size: int, image_size: int, label: str) -> None:
    """UserError, which begins with `label`, unless this machine's memory holds a batch of images in float32.

    Without this check the operating system would kill the run without a message. `image_size` is the side of an image, px.
    """
    needed = batch_size * 3 * image_size**2 * 4
    available = physical_memory()
    if needed > available:
        raise UserError(
            f"{label} {batch_size}: such a batch of {image_size} px images takes {needed / 1e9:.0f} GB and this machine has "
            f"{available / 1e9:.0f} GB; lower it or the image size"
        )


class Loader:
    """Batches of a data set in the order of a sampler, made by worker processes, with waits that end: dead or stalled workers
    raise `WorkersLost`. A worker's UserError keeps its own message.

    Each worker has a pipe of its own, and a thread here that waits for it. Workers share no lock and no memory, so one can be
    killed or stopped at any moment. torch's DataLoader waits for ever for the rest of what a killed worker was sending.

    Args:
        batch_sampler: what to ask `dataset` for, batch by batch.
        num_workers: processes that decode, at most one per CPU core; 0: this process decodes.
        device: where the batches are wanted; None leaves them in the CPU's memory, and nothing is pinned.
        patience: seconds without a batch, beyond 2 s for each of its images, after which workers are given up.

    Attributes:
        check: called every `TICK` while no batch comes; what it raises ends the wait.
    """

    def __init__(self, dataset, batch_sampler, num_workers=0, collate_fn=collate, device=None, patience: float = PATIENCE):
        self.dataset, self.batch_sampler, self.collate_fn = dataset, batch_sampler, collate_fn
        self.num_workers = min(num_workers, os.cpu_count() or 1)
        self.device = torch.empty(0, device=device).device if device else None  # with the number of a CUDA device
        self.patience = patience + 2 * (getattr(batch_sampler, "batch_size", None) or 1)
        self.check: Callable[[], None] = bool
        self._workers, self._tasks, self._importing = [], queue.SimpleQueue(), 0.0

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        if isinstance(self.batch_sampler, StreamSampler):
            self.batch_sampler.check = self.check
        if not self.num_workers:
            for items in self.batch_sampler:
                yield widened(made_of(self.dataset, items, self.collate_fn), self.device)
            return
        if not self._workers:
            self._start()
        order, pending = iter(self.batch_sampler), collections.deque()
        try:
            while True:
                for items in itertools.islice(order, AHEAD * self.num_workers + 1 - len(pending)):
                    pending.append(futures.Future())
                    self._tasks.put((items, pending[-1]))
                if not pending:
                    return
                yield widened(self._result(pending.popleft()), self.device)
        finally:
            for future in pending:
                future.cancel()

    def _start(self) -> None:
        """Start the workers. They end with this loader, or with the program."""
        self._workers, self._tasks, pipes = [], queue.SimpleQueue(), []
        if multiprocessing.get_start_method() != "fork":
            resource_tracker.ensure_running()  # it would lift the block when it starts
            self._importing = IMPORTS
        self._end = util.Finalize(self, end_workers, (self._workers, self._tasks), exitpriority=0)  # in this process alone
        # a signal to all processes of a job would end a worker that does not ignore it yet
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS) if POSIX else None
        try:
            for _ in range(self.num_workers):
                pipe, theirs = multiprocessing.Pipe()
                with theirs:  # no other process holds it, so that a worker's death ends its pipe
                    worker = multiprocessing.Process(target=work, args=(self.dataset, self.collate_fn, theirs), daemon=True)
                    worker.start()
                self._workers.append(worker)
                pipes.append(pipe)
        except OSError as error:
            self._end()
            remedy = next((remedy for said, remedy in REMEDIES.items() if said in str(error)), LOST)
            raise WorkersLost(f"num_workers {self.num_workers}: they cannot be started ({one_line(error)}); {remedy}") from None
        finally:
            if POSIX:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for pipe in pipes:
            threading.Thread(target=attend, args=(pipe, self._tasks, self.device), daemon=True).start()

    def _result(self, future: futures.Future):
        """The batch, or the worker's error. WorkersLost, and all workers are killed, when it will not come."""
        wait, why = Wait(count_of(self.num_workers, "data worker"), self.check), None
        while not why and not futures.wait([future], TICK).done:
            wait.tick()
            if not all(worker.is_alive() for worker in self._workers):
                why = DIED
            elif wait.seconds >= self.patience + self._importing:
                why = "no data worker has delivered anything for minutes, such as from a disk that does not answer"
        self._importing = 0.0
        try:
            if not why:
                return future.result()
        except GONE:
            why = DIED
        self._end()
        raise WorkersLost(f"num_workers {self.num_workers}: {why}; {LOST}")


# ----------------------------------------------------------------------------------------------------------------------
# Workers and signals


def parcel_of(value) -> bytes:
    """`value` for a pipe, its tensors as arrays: torch would put them into shared memory, of which a container has little."""
    pickler = pickle.Pickler(file := io.BytesIO(), protocol=pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = copyreg.dispatch_table | {torch.Tensor: lambda tensor: (torch.from_numpy, (tensor.numpy(),))}
    pickler.dump(value)
    return file.getvalue()


def made_of(dataset, items, collate_fn: Callable):
    """The batch that a sampler asks for by `items`."""
    return collate_fn(dataset.__getitems__(items) if hasattr(dataset, "__getitems__") else [dataset[item] for item in items])


def work(dataset, collate_fn: Callable, pipe) -> None:
    """The life of a worker: for each list of items that comes through the pipe it sends the batch, or its error. It ignores the
    signals of a terminal or a job, and ends with its parent."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    with contextlib.suppress(*GONE):  # nobody asks any more
        while True:
            items = pipe.recv()
            try:
                parcel = parcel_of(made_of(dataset, items, collate_fn))
            except Exception as error:
                known = isinstance(error, (UserError, MemoryError))
                parcel = parcel_of(error if known else RuntimeError(traceback.format_exc()))
            pipe.send_bytes(parcel)


def attend(pipe, tasks: queue.SimpleQueue, device: torch.device | None) -> None:
    """Thread: have one worker make batch after batch, until it is gone. For a CUDA device they are put into pinned memory."""
    pinned = device is not None and device.type == "cuda"
    with pipe, torch.cuda.device(device) if pinned else contextlib.nullcontext():
        for items, future in iter(tasks.get, None):
            if not future.set_running_or_notify_cancel():  # the pass that asked for it is over
                continue
            try:
                pipe.send(items)
                made = pickle.loads(pipe.recv_bytes())
                if isinstance(made, Exception):
                    raise made
                if pinned and isinstance(made, dict):
                    made = {name: each.pin_memory() if isinstance(each, torch.Tensor) else each for name, each in made.items()}
                future.set_result(made)
            except Exception as error:
                future.set_exception(error)
                if isinstance(error, GONE):
                    return


def _end_with_parent(parent: int) -> None:
    main = multiprocessing.parent_process()
    while os.getppid() == parent and main.is_alive():  # the first of a fork, the second of a fork server's
        time.sleep(TICK)
    os._exit(1)


def end_workers(workers: list, tasks: queue.SimpleQueue) -> None:
    """Kill data workers and let their threads end. One whose disk does not answer outlives even that; it is left behind, and
    Python does not wait."""
    for worker in workers:
        worker.kill()
        tasks.put(None)
    for worker in workers:
        worker.join(TICK)
        if worker.is_alive():
            multiprocessing.process._children.discard(worker)
    workers.clear()
