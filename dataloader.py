"""Images in, batches out: folders, ImageNet layouts and hub data sets.

A batch is a dict: `pixel_values` (B, 3, S, S) float32 in [-1, 1], `index` (B,) int64, `path`, a list of B names, and
`unreadable`, a list of messages, one for each file that could not be decoded. The crop and flip of a training image are a
function of (seed, content of its file, view), and the order of the images is a function of (seed, epoch). Neither depends on
the number of workers or processes, or on what was read before, and the crops not on what else is in the folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import logging
import multiprocessing.process
import os
import pickle
import re
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL import __version__ as pillow_version
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils.pin_memory import pin_memory

from runtime.device import physical_memory
from runtime.interrupts import leave_signals_to_parent, signals_held_back
from utils import UserError, hub_token, one_line, require_regular

log = logging.getLogger(__name__)

Image.MAX_IMAGE_PIXELS = 1 << 28  # Pillow's limit is a third of it, and phones and cameras have 102 to 200 megapixels

WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # grey with more than 8 bits; Pillow would clip them at 255
EXECUTED_FORMATS = ("EPS",)  # Pillow passes such a file, under any name, to Ghostscript, which executes it
# endings of pictures, of which Pillow may lack the format: to say that files are passed over
PICTURES = frozenset({
    ".heic", ".heif", ".hif", ".avif", ".jxl", ".jxr", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".sr2", ".dng", ".orf", ".rw2",
    ".raf", ".pef", ".srw", ".raw", ".svg", ".exr", ".hdr", ".psb", ".xcf",
})  # fmt: skip
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
METADATA_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"tIME", b"pHYs")
SAMPLED = 32  # images that are looked at to say how many are small
SYNSET = re.compile(r"n\d{8}$")  # the name of an ImageNet class folder
ZOOM = 1.25  # training draws the short side between image_size and this multiple of it (at most the image's own)
PATIENCE = 120.0  # seconds without a batch after which data workers are given up
TIMED_OUT = "DataLoader timed out"  # how torch's message begins
LOST = "lower it (0: none), or give the machine or container more memory (docker: --memory, --shm-size)"
TICK = 5.0  # seconds after which the wait for a batch looks whether all workers live
SETTLED = 2.0  # seconds after its last change in which a file may change again under the same time stamp
PREPROCESSING = 3  # raised with every change to the pixels that `ImageDataset.crop` returns, so that no older cache is read


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message says which and why.

    Attributes:
        why: it cannot be. passing: whether that may change though the content stays, such as an error of the disk.
    """

    def __init__(self, name: str, why: str, passing: bool = False):
        super().__init__(name, why, passing)
        self.why, self.passing = why, passing

    def __str__(self):
        return f"{self.args[0]!r} ({self.why})"


# ----------------------------------------------------------------------------------------------------------------------
# Files


def list_images(folder: str | os.PathLike) -> list[str]:
    """The sorted paths of all files below `folder` whose name ending is that of a format that Pillow reads.

    Hidden files and folders are left out. Links are followed, and each folder is visited once. A folder that cannot be read
    is left out with a warning.
    """
    readable_formats()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = []
    others = Counter()
    visited = set()
    waiting = [os.fspath(folder)]
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
        waiting += reversed(folders)
        images = {entry.path for entry in entries if os.path.splitext(entry.name)[1].lower() in endings}
        found += images.difference(folders)
        unread = (os.path.splitext(entry.name)[1].lower() for entry in entries if entry.path not in images)
        others.update(ending for ending in unread if ending in PICTURES)
    if others:
        log.warning(
            "%s: %s of formats that Pillow here does not read (%s): convert them, or install a plug-in (.heic: "
            "pillow-heif, .jxl: pillow-jxl-plugin)",
            folder, "1 file is" if others.total() == 1 else f"{others.total()} files are",
            ", ".join(sorted(others)),
        )  # fmt: skip
    return sorted(found)


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
    return [path for class_folder in classes for path in list_images(class_folder)]


def digest_of(blocks: Iterable[bytes]) -> bytes:
    """16 bytes that name a content."""
    digest = hashlib.blake2b(digest_size=16)
    for block in blocks:
        digest.update(block)
    return digest.digest()


def open_image(file: str | io.BytesIO) -> Image.Image:
    """The picture in a file, by path or as bytes, not yet decoded. An exception of Pillow's if it is none."""
    try:
        image = Image.open(file, formats=readable_formats())
        if image.format == "PNG":
            image.load()  # texts may stand behind the pixels
        return image
    except (ValueError, UnidentifiedImageError):
        plain = without_metadata(file)
        if plain is None:
            raise
        with contextlib.suppress(Exception):
            return Image.open(plain, formats=("PNG",))
        raise


def without_metadata(file: str | io.BytesIO) -> io.BytesIO | None:
    """A PNG without the chunks that are no picture; None for any other file. Pillow refuses a PNG whose texts are longer than
    it likes, such as the workflow that made the picture."""
    with open(file, "rb") if isinstance(file, str) else io.BytesIO(file.getvalue()) as file:
        if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
            return None
        content = file.read()
    kept, place = [PNG_SIGNATURE], 0
    while place + 8 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] not in METADATA_CHUNKS:
            kept.append(content[place:end])
        place = end
    return io.BytesIO(b"".join(kept))


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """The formats that Pillow reads here, without those that it would execute, HEIC, AVIF and JPEG XL where a plug-in is
    installed. A worker that is no fork knows none of them before."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    for plugin in ("pillow_avif", "pillow_jxl"):
        with contextlib.suppress(ImportError):
            importlib.import_module(plugin)
    return tuple(kind for kind in Image.OPEN if kind not in EXECUTED_FORMATS)


def image_reader() -> str:
    """What decodes images here: another version or a further plug-in may read what this one does not."""
    return f"Pillow {pillow_version} with {', '.join(sorted(readable_formats()))}"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as the RGB picture a viewer would show: upright, first frame, over white, 16 bits scaled to 8."""
    image.load()  # raises if the pixels cannot be decoded
    profile = image.info.get("icc_profile")
    with contextlib.suppress(Exception):  # metadata that cannot be parsed: the picture stays as it is stored
        image = ImageOps.exif_transpose(image)
    if image.mode in WIDE_MODES:
        levels = np.asarray(image, dtype=np.float32)
        brightest = levels.max(where=np.isfinite(levels), initial=0)
        if image.mode.startswith("I;16"):
            white = 65535
        elif image.mode == "F" and brightest <= 1:
            white = 1
        else:
            white = 255 if brightest <= 255 else 65535
        levels = np.nan_to_num(levels * (255 / white)).clip(0, 255).round().astype(np.uint8)
        return Image.fromarray(levels).convert("RGB")
    if profile:
        with contextlib.suppress(Exception):  # a profile that cannot be parsed or is for another mode
            image = in_srgb(image, profile)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """`image`, whose colours are those of an ICC profile, in sRGB, with its transparency. An exception of Pillow's if the
    profile is damaged or of another colour space than the image's."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if image.mode == "CMYK":
        if space != "CMYK":
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    if space == "GRAY":
        if image.mode not in ("L", "LA"):
            return image
        levels = ImageCms.profileToProfile(image.getchannel("L"), source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    elif space == "RGB":
        transparent = "transparency" in image.info
        opaque = image.convert("RGBA").convert("RGB") if transparent or image.mode != "RGB" else image
        levels = ImageCms.profileToProfile(opaque, source, ImageCms.createProfile("sRGB"))
    else:
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        levels.putalpha(image.convert("RGBA").getchannel("A"))
    return levels


def resized_crop(image: Image.Image, short_side: int, size: int, at: tuple[float, float] = (0.5, 0.5)) -> torch.Tensor:
    """Resize the short side to `short_side` px, then crop `size` x `size`: (3, size, size) uint8.

    `at` is the position of the crop along height and width, from 0 (top, left) to 1; the default is the centre. Only the
    pixels of the crop are resampled, so that an image of 30,000 x 1 px takes no more memory than any other.
    """
    scale = short_side / min(image.size)
    width, height = (max(short_side, round(side * scale)) for side in image.size)
    top, left = round(at[0] * (height - size)), round(at[1] * (width - size))
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))  # Pillow refuses one that a rounding error enlarged
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pixel_values(levels: torch.Tensor) -> torch.Tensor:
    """8-bit levels, uint8 -> float32 in [-1, 1]."""
    return levels.float() / 127.5 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Sources


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


class HubImages:
    """A source of images: a split of a 🤗 `datasets` data set with an image column named `image`. Methods as `ImageFiles`."""

    paths = None  # it has no files of its own

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return len(self.split)

    def open(self, index: int) -> Image.Image:
        return self.split[index]["image"]

    def name(self, index: int) -> str:
        return f"{self.split.info.dataset_name}[{index}]"

    @functools.cached_property
    def _stored(self):
        import datasets

        return self.split.cast_column("image", datasets.Image(decode=False))

    def content(self, index: int) -> bytes:
        stored = self._stored[index]["image"]
        return digest_of([stored["bytes"]]) if stored["bytes"] else ImageFiles([stored["path"]]).content(0)

    def stamp(self, index: int) -> str | None:
        return f"{self.split._fingerprint}\0{index}"


class SomeImages:
    """A source of images: some of those of another one, by index. Methods as `ImageFiles`."""

    def __init__(self, source: ImageFiles | HubImages, indices: np.ndarray):
        self.source, self.indices = source, indices

    def __len__(self):
        return len(self.indices)

    def open(self, index: int) -> Image.Image:
        return self.source.open(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def content(self, index: int) -> bytes:
        return self.source.content(int(self.indices[index]))

    def stamp(self, index: int) -> str | None:
        return self.source.stamp(int(self.indices[index]))


def find_images(
    folder: str, dataset_type: str, train: bool, label: str, cache_dir: str | None = None
) -> ImageFiles | HubImages:
    """The images in `folder`, or of the hub data set with that id.

    Args:
        folder: searched recursively, or with `dataset_type` "imagenet" in the ImageNet layout. A hub id, owner/name, is
            tried only with "imagenet", and only where there is no such folder.
        train: whether the images are for training or for evaluation, of those that come in splits.
        label: begins the message of a UserError, which is raised when there is nothing to read.
        cache_dir: where the hub client keeps downloads; None is its own default.
    """
    if os.path.isdir(folder):
        try:
            paths = list_imagenet(folder, "train" if train else "val") if dataset_type == "imagenet" else list_images(folder)
        except UserError as error:
            raise UserError(f"{label} {error}") from None
        except OSError as error:
            raise UserError(f"{label} {folder}: cannot be read ({one_line(error)}); check its permissions") from None
        if not paths:
            raise UserError(f"{label} {folder}: no image there (searched recursively for every format that Pillow reads)")
        return ImageFiles(paths)
    if os.path.exists(folder):
        tar = "; shards are read by streaming" if folder.endswith(".tar") else ""
        raise UserError(f"{label} {folder}: a file; name the folder that holds the images{tar}")
    if dataset_type == "imagenet" and folder.count("/") == 1 and not folder.startswith((".", "/", "~")):
        return load_hub_split(folder, train, label, cache_dir)
    raise UserError(f"{label} {folder}: no such folder")


def load_hub_split(name: str, train: bool, label: str, cache_dir: str | None = None) -> HubImages:
    """The training or evaluation split of hub data set `name`, or `name:configuration`. UserError, which begins with `label`,
    if it has no images or cannot be loaded."""
    data, column = hub_split(name, train, label, cache_dir)
    return HubImages(data if column == "image" else data.rename_column(column, "image"))


def hub_split(name: str, train: bool, label: str, cache_dir: str | None = None, streaming: bool = False):
    """(a split as in `load_hub_split` with its image column alone, that column's name). With `streaming` nothing is downloaded
    before it is read, and the images are encoded ones, {bytes, path}."""
    import datasets

    folder, colon, choice = name.partition(":")
    try:
        if not colon:
            choice = _only_configuration(name, label, cache_dir)
        splits = datasets.get_dataset_split_names(folder, choice, cache_dir=cache_dir, token=hub_token() or False)
        wanted = ("train",) if train else ("validation", "val", "test")
        split = next((name for name in wanted if name in splits), splits[0])
        if split not in wanted:
            log.warning("%s %s: no %s split; using %s", label, name, wanted[0], split)
        data = datasets.load_dataset(
            folder, choice, split=split, cache_dir=cache_dir, token=hub_token() or False, streaming=streaming
        )
    except UserError:
        raise
    except Exception as error:  # the hub client's errors have no common base class
        raise UserError(
            f"{label} {name}: no such folder, and as a hub data set it could not be loaded ({one_line(error)}); "
            "a gated one needs HUGGINGFACE_TOKEN"
        ) from None
    column = image_column(data.features, f"{label} {name}")
    data = data.select_columns([column])
    return (data.cast_column(column, datasets.Image(decode=False)) if streaming else data), column


def image_column(features: dict | None, label: str) -> str:
    """The name of the column that holds the images; UserError, which begins with `label`, if none does."""
    import datasets

    columns = [column for column, feature in (features or {}).items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise UserError(f"{label}: this data set has no image column")
    column = next((name for name in ("image", "img", "jpg", "png", "picture", "photo") if name in columns), columns[0])
    if len(columns) > 1:
        log.info("%s: image columns %s; using %s", label, ", ".join(columns), column)
    return column


def _only_configuration(name: str, label: str, cache_dir: str | None) -> str | None:
    """The configuration of a hub data set that need not be chosen: its only one or its default. UserError names the others."""
    import datasets

    choices = datasets.get_dataset_config_names(name, cache_dir=cache_dir, token=hub_token() or False)
    if len(choices) < 2 or "default" in choices:
        return None
    raise UserError(f"{label} {name}: it has several configurations; name one: {', '.join(f'{name}:{one}' for one in choices)}")


# ----------------------------------------------------------------------------------------------------------------------
# Data sets


class ImageDataset(Dataset):
    """Square images of `image_size` px from a source.

    For training (`random_crop`) an item is asked for as (index, view). Each view of an image has its own random crop and,
    with `random_flip`, its own chance of being mirrored. The next readable image replaces an unreadable one.

    For evaluation an item is asked for as index and gets the centre crop. An unreadable image has `pixel_values` None, and
    `collate` drops it. In both cases `unreadable` of the item says why.

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
        """The images of those indices as a data set."""
        source = SomeImages(self.source, indices)
        return ImageDataset(source, self.image_size, self.random_crop, self.random_flip, self.seed)

    def name(self, index: int) -> str:
        """What messages and results call that image."""
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
                    return to_rgb(image)
        except Exception as error:  # every Pillow plugin raises its own classes
            raise UnreadableImage(self.name(index), one_line(error), _is_passing(error)) from None

    def content(self, index: int) -> bytes:
        """The digest of what the image's file holds. UnreadableImage if it cannot be read."""
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
        """Say how many of the images are smaller than `image_size` and will be enlarged, by a sample of their headers."""
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
        unreadable = []
        if not self.random_crop:
            try:
                pixels = to_pixel_values(resized_crop(self.open(item), self.image_size, self.image_size))
            except UnreadableImage as error:
                pixels = None
                unreadable.append(str(error))
            return {"pixel_values": pixels, "index": item, "path": self.name(item), "unreadable": unreadable}
        index, view = item
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            try:
                pixels = to_pixel_values(self.crop(self.open(candidate), self.content(candidate), view))
                return {"pixel_values": pixels, "index": candidate, "path": self.name(candidate), "unreadable": unreadable}
            except UnreadableImage as error:
                unreadable.append(str(error))
        raise UserError(f"no image can be read any more; the last failure: {unreadable[-1]}")


def _is_passing(error: Exception) -> bool:
    """Whether an image may be readable later though its content stays. Pillow's own errors have no number."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)


def collate(items: list[dict]) -> dict:
    """Items -> batch. Items without pixels are dropped; `unreadable` holds the messages of all items."""
    good = [item for item in items if item["pixel_values"] is not None]
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in good]) if good else torch.empty(0),
        "index": torch.tensor([item["index"] for item in good], dtype=torch.int64),
        "path": [item["path"] for item in good],
        "unreadable": [message for item in items for message in item["unreadable"]],
    }


# ----------------------------------------------------------------------------------------------------------------------
# Order


@dataclass(eq=False)
class EpochSampler(Sampler):
    """Batches of (index, view) for one process, epoch after epoch without end.

    Every process draws the same permutation of (seed, epoch) and takes its own slice of each global batch. P processes with
    batch B therefore see what one process with batch P·B sees. The last batch of an epoch is filled up from the start of the
    epoch, so that all batches have one size and every image is seen in every epoch.

    Attributes:
        length: number of images; batch_size: images per batch of this process.
        views: number of views per image, of which each epoch draws one; 0: view e in epoch e.
        rank, world: this process and the number of processes.
        part, least_steps: where `length` counts one part of several of the images, each with processes of its own: its number,
            and the steps of an epoch of the largest part, which all parts have.
        first_step: the step at which an iteration starts; a resumed run sets it.
    """

    length: int
    batch_size: int
    seed: int
    views: int = 0
    rank: int = 0
    world: int = 1
    part: int = 0
    least_steps: int = 0
    first_step: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return max(self.least_steps, -(-self.length // (self.batch_size * self.world)))

    def __len__(self):
        return self.steps_per_epoch

    def state_after(self, step: int) -> None:
        """What is to be remembered after `step` steps: nothing, the place in the order is a function of the step."""

    def go_on(self, step: int, place: None) -> None:
        """Let the next iteration begin after `step` steps."""
        self.first_step = step

    def epoch_items(self, epoch: int) -> np.ndarray:
        """The (index, view) pairs of an epoch over all processes, a whole number of global batches: (pairs, 2) int64."""
        draw = np.random.default_rng((self.seed, epoch, self.part))
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


@dataclass(eq=False)
class BatchesInOrder(Sampler):
    """The batches of one pass over `length` images that are one process's: `rank`, `rank` + `world`, … Whole batches are
    shared out, so that an image has the same neighbours, and to the last digit the same results, on one process or many."""

    length: int
    batch_size: int
    rank: int = 0
    world: int = 1

    def __len__(self):
        return len(range(self.rank, -(-self.length // self.batch_size), self.world))

    def __iter__(self):
        for start in range(self.rank * self.batch_size, self.length, self.world * self.batch_size):
            yield list(range(start, min(start + self.batch_size, self.length)))


# ----------------------------------------------------------------------------------------------------------------------
# Loaders


def train_loader(dataset, batch_size: int, num_workers: int, seed: int, views=0, rank=0, world=1) -> DataLoader:
    """A loader of training batches without end, in the order of `EpochSampler`; its `len` is the number of steps in an
    epoch."""
    sampler = EpochSampler(len(dataset), batch_size, seed, views, rank, world)
    return WorkerLoader(dataset, batch_sampler=sampler, **loader_options(num_workers))


def eval_loader(dataset: ImageDataset, batch_size: int, num_workers: int, rank: int = 0, world: int = 1) -> DataLoader:
    """One pass over the evaluation images, in order; of `world` processes, number `rank` has every `world`-th batch from its
    own on."""
    return WorkerLoader(
        dataset, batch_sampler=BatchesInOrder(len(dataset), batch_size, rank, world), **loader_options(num_workers)
    )


class WorkersLost(UserError):
    """No further batch will come: a data worker has died, stands still, or could not be started, or a stream has ended. Begins
    with the setting that it is about."""


class WorkerLoader(DataLoader):
    """A DataLoader that never waits in vain: its workers survive a signal to all processes, its errors are those that its
    workers raised, and a worker that cannot deliver is `WorkersLost`.

    A worker's batch comes through its pipe as bytes (`Parcel`), not through shared memory. Containers have little of that, and
    a worker whose queue fails to get any says so to nobody.

    Args:
        patience: seconds to wait for a batch beyond 2 s for each of its images.
        options: of the DataLoader.
    """

    def __init__(self, dataset, patience: float = PATIENCE, **options):
        workers = options.get("num_workers", 0)
        super().__init__(dataset, timeout=min(TICK, patience) if workers else 0, **options)
        if workers:
            self.collate_fn = Parcelled(self.collate_fn)
        self._patience = patience + 2 * (getattr(self.batch_sampler, "batch_size", None) or 1)

    def __iter__(self):
        if not self.num_workers:
            yield from super().__iter__()
            return
        batches, waited = self._started(), 0.0
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except WorkersLost:  # no worker's: raised here, where the order of the images is drawn
                raise
            except UserError as error:  # torch puts the worker's traceback into its message
                raise UserError(str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2]) from None
            except RuntimeError as error:
                waited += self.timeout  # by the count: a suspended program waits for nobody
                if not str(error).startswith(TIMED_OUT) or waited >= self._patience:
                    raise self._lost(error, batches) from None
                continue
            waited = 0.0
            yield batch.open() if isinstance(batch, Parcel) else batch

    def _started(self):
        """torch's iterator, with its workers at work."""
        batches = self._iterator
        if batches:  # it first waits for what its workers still do for an iteration that nobody reads any more
            batches._timeout = self._patience
        try:
            with signals_held_back(), _signal_of_children_kept():
                batches = super().__iter__()
        except OSError as error:  # no memory, processes or semaphores for them
            raise WorkersLost(f"num_workers {self.num_workers}: they cannot be started ({one_line(error)}); {LOST}") from None
        except RuntimeError as error:
            raise self._lost(error, batches) from None
        batches._timeout = self.timeout
        return batches

    def _lost(self, error: RuntimeError, batches) -> Exception:
        """`error` as `WorkersLost`, if that is what it says; the workers end, for one that stands still never would."""
        if str(error).startswith(TIMED_OUT):
            why = "no data worker has delivered anything for minutes, such as from a disk that does not answer"
        elif str(error).startswith("DataLoader worker (pid"):
            why = "a data worker has ended unexpectedly, most often killed for want of memory"
        else:
            return error
        for worker in batches._workers:
            worker.kill()
        for worker in batches._workers:
            worker.join(min(TICK, self._patience))
            if worker.is_alive():  # its disk does not answer: Python would wait for it at its own end
                multiprocessing.process._children.discard(worker)
        return WorkersLost(f"num_workers {self.num_workers}: {why}; {LOST}")


class Parcel:
    """A batch as the bytes in which a worker sends it. Where torch pins memory it opens the parcel too."""

    def __init__(self, batch):
        self._bytes = pickle.dumps(batch, protocol=pickle.HIGHEST_PROTOCOL)

    def open(self):
        return pickle.loads(self._bytes)

    def pin_memory(self):
        return pin_memory(self.open())


@dataclass
class Parcelled:
    """A `collate_fn` whose batches leave their worker as parcels."""

    collate_fn: Callable

    def __call__(self, items):
        return Parcel(self.collate_fn(items))


@contextlib.contextmanager
def _signal_of_children_kept():
    """Within this context torch's handler of SIGCHLD is not installed. It raises wherever the program happens to be when a
    worker dies, such as between a step's update and its count; the loader notices at the next batch."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


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


def loader_options(num_workers: int) -> dict:
    """The options of a `WorkerLoader` with at most `num_workers` processes, and at most one per CPU core."""
    num_workers = min(num_workers, os.cpu_count() or 1)
    return {
        "num_workers": num_workers,
        "collate_fn": collate,
        "worker_init_fn": leave_signals_to_parent,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }
