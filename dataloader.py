"""Images in, batches out: folders, ImageNet layouts and hub data sets.

A batch is a dict: `pixel_values` (B, 3, S, S) float32 in [-1, 1], `index` (B,) int64 and `path`, a list of names. What a
training image looks like depends on (seed, index, view) alone, and the order on (seed, epoch) alone: never on workers,
processes or what was read before.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import signal
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler

from runtime.device import physical_memory
from utils import UserError, hub_token, one_line, require_regular

log = logging.getLogger(__name__)

WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # grey with more than 8 bits; Pillow would clip them at 255
PROGRAMS = ("EPS",)  # Pillow hands these to Ghostscript, which executes them; whatever the file's name says it is
SYNSET = re.compile(r"n\d{8}$")
ZOOM = 1.25  # training draws the short side between image_size and this multiple of it (never above the image's own)
PREPROCESSING = 1  # counts changes to what `ImageDataset.crop` makes of a file, so that no older cache is read


class UnreadableImage(Exception):
    """An image file that cannot be decoded; the message says which and why."""


# ----------------------------------------------------------------------------------------------------------------------
# Files


def list_images(folder: str | os.PathLike) -> list[str]:
    """Every file below `folder` whose ending Pillow knows how to read, sorted; links are followed, loops are not.

    A folder that cannot be read is named and left out.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found, visited, waiting = [], set(), [os.fspath(folder)]
    while waiting:  # not os.walk, which before Python 3.12 takes a stack frame per level
        place = waiting.pop()
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(place) as entries:
                entries = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        except OSError as error:
            log.warning("left out: the folder %r (%s)", place, one_line(error))
            continue
        folders = [entry.path for entry in entries if os.path.isdir(entry.path)]
        waiting += reversed(folders)
        images = {entry.path for entry in entries if os.path.splitext(entry.name)[1].lower() in endings}
        found += images.difference(folders)
    return sorted(found)


def list_imagenet(folder: str | os.PathLike, split: str) -> list[str]:
    """The images of an ImageNet layout: `folder/{split}/nXXXXXXXX/*.JPEG`, or `folder` itself holding the class folders."""
    root = Path(folder)
    root = root / split if (root / split).is_dir() else root
    classes = sorted(entry for entry in root.iterdir() if entry.is_dir() and SYNSET.fullmatch(entry.name))
    if not classes and split == "val" and root.name == split and any(entry.is_file() for entry in root.iterdir()):
        return list_images(root)  # the validation images are often kept without class folders
    if not classes:
        raise UserError(
            f"{folder}: no ImageNet class folders (n01440764, …) there nor in its {split}/; for any other folder of images "
            "use --dataset_type default"
        )
    return [path for place in classes for path in list_images(place)]


def file_list_digest(paths: list[str]) -> str:
    """A digest of the files' names, sizes and modification times, in order."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
            line = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"
        except OSError:
            line = f"{path}\0unreadable\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as the RGB picture a viewer would show: upright, first frame, over white, 16 bits scaled to 8."""
    image.load()  # what fails here is the picture
    with contextlib.suppress(Exception):  # metadata that cannot be parsed leave the picture as it is stored
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
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def resized_crop(image: Image.Image, short_side: int, size: int, at: tuple[float, float] = (0.5, 0.5)) -> torch.Tensor:
    """Resize the short side to `short_side` px, then crop `size` x `size`: (3, size, size) uint8.

    `at` is the crop's place along height and width, from 0 (top, left) to 1; the default is the centre. Only the pixels
    of the crop are resampled, so a 30,000 x 1 image costs no more than any other.
    """
    scale = short_side / min(image.size)
    width, height = (max(short_side, round(side * scale)) for side in image.size)
    top, left = round(at[0] * (height - size)), round(at[1] * (width - size))
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))  # a rounding error beyond the edge is refused
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pixel_values(levels: torch.Tensor) -> torch.Tensor:
    """8-bit levels, uint8 -> float32 in [-1, 1]."""
    return levels.float() / 127.5 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Data sets


class ImageDataset(Dataset):
    """Images of one size from a list of files, or from a 🤗 `datasets` split.

    For training (`random_crop`) an item is asked for as (index, view) and cropped and flipped at random, each view its own
    way; an unreadable image is replaced by the next readable one. For evaluation it is asked for as index, gets the centre
    crop, and an unreadable image gives `pixel_values` None, which the loader drops. Either way the item says so.
    """

    def __init__(self, source, image_size: int, random_crop: bool = False, random_flip: bool = False, seed: int = 0):
        self.source = source
        self.image_size = image_size
        self.random_crop, self.random_flip, self.seed = random_crop, random_flip, seed

    def __len__(self):
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source[index] if isinstance(self.source, list) else f"{self.source.info.dataset_name}[{index}]"

    def open(self, index: int) -> Image.Image:
        """The whole image as RGB; for training, a large JPEG is decoded at a reduced scale that is still large enough."""
        try:
            with warnings.catch_warnings():
                # Pillow only warns up to twice its limit; an image of that size is no photo
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                if isinstance(self.source, list):
                    require_regular(self.source[index])
                    image = Image.open(self.source[index], formats=[kind for kind in Image.OPEN if kind not in PROGRAMS])
                else:
                    image = self.source[index]["image"]
                with image:
                    if 0 in image.size:
                        raise ValueError(f"{image.width}x{image.height} pixels")
                    if self.random_crop:
                        image.draft(None, (int(self.image_size * ZOOM),) * 2)
                    return to_rgb(image)
        except Exception as error:  # every Pillow plugin has its own way to fail; whichever, this one file is left out
            raise UnreadableImage(f"{self.name(index)!r} ({one_line(error)})") from None

    def content_key(self) -> dict:
        """What the pixels of every view depend on, for the latent cache's key."""
        return {
            "files": file_list_digest(self.source) if isinstance(self.source, list) else self.source._fingerprint,
            "image_size": self.image_size,
            "random_flip": self.random_flip,
            "seed": self.seed,
            "preprocessing": PREPROCESSING,
        }

    def require_readable(self, where: str) -> None:
        """UserError unless one of the images can be decoded; `where` opens the message."""
        failure = None
        for index in range(len(self)):
            try:
                self.open(index)
                return
            except UnreadableImage as error:
                failure = error
        raise UserError(f"{where}: none of {len(self)} files can be read as an image; the last: {failure}")

    def crop(self, image: Image.Image, index: int, view: int) -> torch.Tensor:
        """View `view` of training image `index`: (3, S, S) uint8, a function of (seed, index, view)."""
        zoom, top, left, flip = np.random.default_rng((self.seed, index, view)).random(4)
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
                pixels = to_pixel_values(self.crop(self.open(candidate), candidate, view))
                return {"pixel_values": pixels, "index": candidate, "path": self.name(candidate), "unreadable": unreadable}
            except UnreadableImage as error:
                unreadable.append(str(error))
        raise UserError(f"no image can be read any more; the last failure: {unreadable[-1]}")


def collate(items: list[dict]) -> dict:
    """Items -> batch; items without pixels are dropped, `unreadable` names every file that failed on the way."""
    good = [item for item in items if item["pixel_values"] is not None]
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in good]) if good else torch.empty(0),
        "index": torch.tensor([item["index"] for item in good], dtype=torch.int64),
        "path": [item["path"] for item in good],
        "unreadable": [message for item in items for message in item["unreadable"]],
    }


def open_dataset(folder: str, dataset_type: str, train: bool, flag: str, cache_dir: str | None = None):
    """The list of files behind a data flag, or a 🤗 `datasets` split for a hub id. UserError when there is nothing to read."""
    if os.path.isdir(folder):
        try:
            paths = list_imagenet(folder, "train" if train else "val") if dataset_type == "imagenet" else list_images(folder)
        except UserError as error:
            raise UserError(f"{flag} {error}") from None
        except OSError as error:
            raise UserError(f"{flag} {folder}: cannot be read ({one_line(error)}); check its permissions") from None
        if not paths:
            raise UserError(f"{flag} {folder}: no image there (searched recursively for every format that Pillow reads)")
        return paths
    if os.path.exists(folder):
        raise UserError(f"{flag} {folder}: a file; name the folder that holds the images")
    if dataset_type == "imagenet" and folder.count("/") == 1 and not folder.startswith((".", "/", "~")):
        return open_hub_dataset(folder, train, flag, cache_dir)
    raise UserError(f"{flag} {folder}: no such folder")


def open_hub_dataset(name: str, train: bool, flag: str, cache_dir: str | None = None):
    """A split of a hub data set with its image column named `image`, not yet decoded."""
    import datasets

    try:
        splits = datasets.get_dataset_split_names(name, cache_dir=cache_dir, token=hub_token() or False)
        wanted = ("train",) if train else ("validation", "val", "test")
        split = next((name for name in wanted if name in splits), splits[0])
        if split not in wanted:
            log.warning("%s %s: no %s split; using %s", flag, name, wanted[0], split)
        data = datasets.load_dataset(name, split=split, cache_dir=cache_dir, token=hub_token() or False)
    except Exception as error:  # the hub client has no common base for its errors
        raise UserError(
            f"{flag} {name}: no such folder, and as a hub data set it could not be loaded ({one_line(error)}); "
            "a gated one needs HUGGINGFACE_TOKEN"
        ) from None
    columns = [column for column, feature in data.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise UserError(f"{flag} {name}: this data set has no image column")
    return data.select_columns(columns[:1]).rename_column(columns[0], "image") if columns[0] != "image" else data


# ----------------------------------------------------------------------------------------------------------------------
# Order


class EpochSampler(Sampler):
    """Batches of (index, view) for one process: epoch after epoch without end, from any step on.

    Every process draws the same permutation of (seed, epoch) and takes its own slice of each global batch, so P processes
    with batch B see what one process with batch P·B sees. The last batch of an epoch is filled up from the epoch's start:
    all batches have one size and every image is seen in every epoch. `views` 0 gives each epoch views of its own.
    """

    def __init__(self, length: int, batch_size: int, seed: int, views: int = 0, rank: int = 0, world: int = 1):
        self.length, self.batch_size, self.seed, self.views = length, batch_size, seed, views
        self.rank, self.world = rank, world
        self.first_step = 0

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.length // (self.batch_size * self.world))

    def __len__(self):
        return self.steps_per_epoch

    def epoch_items(self, epoch: int) -> np.ndarray:
        """The epoch's (index, view)s over all processes, a whole number of global batches: (items, 2)."""
        draw = np.random.default_rng((self.seed, epoch))
        order = draw.permutation(self.length)
        views = draw.integers(self.views, size=self.length) if self.views else np.full(self.length, epoch)
        places = np.arange(self.steps_per_epoch * self.batch_size * self.world) % self.length
        return np.stack([order[places], views[order[places]]], axis=1)

    def __iter__(self):
        step = self.first_step
        while True:
            epoch, offset = divmod(step, self.steps_per_epoch)
            items = self.epoch_items(epoch)
            for batch in range(offset, self.steps_per_epoch):
                start = (batch * self.world + self.rank) * self.batch_size
                yield [tuple(item) for item in items[start : start + self.batch_size].tolist()]
            step += self.steps_per_epoch - offset


def train_loader(dataset, batch_size: int, num_workers: int, seed: int, views=0, rank=0, world=1) -> DataLoader:
    """An endless loader of training batches; `len(loader)` is the number of steps in an epoch."""
    sampler = EpochSampler(len(dataset), batch_size, seed, views, rank, world)
    return WorkerLoader(dataset, batch_sampler=sampler, **loader_options(num_workers))


def eval_loader(dataset: ImageDataset, batch_size: int, num_workers: int) -> DataLoader:
    """One pass over the evaluation images, in order."""
    return WorkerLoader(dataset, batch_size=batch_size, shuffle=False, **loader_options(num_workers))


class WorkerLoader(DataLoader):
    """A DataLoader whose workers are born deaf to SIGINT and SIGTERM: before `leave_signals_to_parent` has run, one that is
    sent to all processes of a job would end them, and with them the run that it asks to stop."""

    def __iter__(self):
        if not hasattr(signal, "sigwaitinfo") or threading.current_thread() is not threading.main_thread():
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int) -> None:
    """For a worker: an interrupt goes to every process of a terminal or a job, and it is the parent that ends the run.

    A SIGTERM of the parent's own still ends the worker, or a parent that leaves in haste would wait for it for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # elsewhere a SIGTERM to all ends the workers at once
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_sigterm_of, args=(os.getppid(),), daemon=True).start()


def _await_sigterm_of(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def require_memory(batch_size: int, image_size: int, flag: str) -> None:
    """UserError unless a batch of images, float32, fits into this machine's memory, which would end the run unsaid."""
    needed, there = batch_size * 3 * image_size**2 * 4, physical_memory()
    if needed > there:
        raise UserError(
            f"{flag} {batch_size}: such a batch of {image_size} px images takes {needed / 1e9:.0f} GB and this machine has "
            f"{there / 1e9:.0f} GB; lower it or --image_size"
        )


def loader_options(num_workers: int) -> dict:
    num_workers = min(num_workers, os.cpu_count() or 1)  # more would only take turns
    return {
        "num_workers": num_workers,
        "collate_fn": collate,
        "worker_init_fn": leave_signals_to_parent,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }
