"""Images in, batches out: folders, ImageNet layouts and hub data sets.

A batch is a dict: `pixel_values` (B, 3, S, S) float32 in [-1, 1], `index` (B,) int64, `path`, a list of B names, and
`unreadable`, a list of messages, one for each file that could not be decoded. The crop and flip of a training image are a
function of (seed, content of its file, view), and the order of the images is a function of (seed, epoch). Neither depends on
the number of workers or processes, or on what was read before, and the crops not on what else is in the folder.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import glob
import hashlib
import io
import itertools
import logging
import multiprocessing
import multiprocessing.process
import os
import pickle
import queue
import re
import signal
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils.pin_memory import pin_memory

from images.decoding import open_image, resized_crop, to_pixel_values, to_rgb
from images.files import ImageFiles, SomeImages, digest_of, list_imagenet, list_images, said_of_endings
from runtime.interrupts import leave_signals_to_parent, signals_held_back
from utils import UserError, hub_token, one_line, physical_memory

log = logging.getLogger(__name__)

SAMPLED = 32  # images that are looked at to say how many are small
ZOOM = 1.25  # training draws the short side between image_size and this multiple of it (at most the image's own)
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
            raise UserError(
                f"{label} {folder}: no image there (searched recursively for every format that Pillow reads); "
                + said_of_endings(folder)
            )
        return ImageFiles(paths)
    if os.path.exists(folder):
        tar = "; shards are read by streaming" if folder.endswith(".tar") else ""
        raise UserError(f"{label} {folder}: a file; name the folder that holds the images{tar}")
    if folder.count("/") != 1 or folder.startswith((".", "/", "~")):
        raise UserError(f"{label} {folder}: no such folder")
    if dataset_type == "imagenet":
        return load_hub_split(folder, train, label, cache_dir)
    raise UserError(f"{label} {folder}: no such folder; if it is a data set of the hub, choose the dataset_type imagenet")


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
    return WorkerLoader(dataset, batch_sampler=sampler, collate_fn=collate, **loader_options(num_workers))


def eval_loader(dataset: ImageDataset, batch_size: int, num_workers: int, rank: int = 0, world: int = 1) -> DataLoader:
    """One pass over the evaluation images, in order; of `world` processes, number `rank` has every `world`-th batch from its
    own on."""
    sampler = BatchesInOrder(len(dataset), batch_size, rank, world)
    return WorkerLoader(dataset, batch_sampler=sampler, collate_fn=collate, **loader_options(num_workers))


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


# ----------------------------------------------------------------------------------------------------------------------
# workers


IMPORTS = 480.0  # seconds more for the first batch of workers that are no forks: each imports torch, from whatever disk
PATIENCE = 120.0  # seconds without a batch after which data workers are given up
TIMED_OUT = "DataLoader timed out"  # how torch's message begins
LOST = "lower it (0: none), or give the machine or container more memory (docker: --memory, --shm-size)"
TICK = 5.0  # seconds after which the wait for a batch looks whether all workers live


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
        batches = self._started()
        waited = 0.0 if multiprocessing.get_start_method() == "fork" else -IMPORTS
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


def loader_options(num_workers: int) -> dict:
    """The options of a `WorkerLoader` with at most `num_workers` processes, and at most one per CPU core."""
    num_workers = min(num_workers, os.cpu_count() or 1)
    return {
        "num_workers": num_workers,
        "worker_init_fn": leave_signals_to_parent,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# hub_data


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
        kinds = [
            f"{column} ({getattr(feature, 'dtype', type(feature).__name__)})" for column, feature in (features or {}).items()
        ]
        raise UserError(
            f"{label}: this data set has no image column, which holds images and not their addresses; its columns "
            f"are {', '.join(kinds) or 'unknown'}"
        )
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
# stream


EPOCH_IMAGES = 10_000  # an epoch of a stream that does not say how many images it has
PEEKED = 32  # images that are looked at before a run begins
KEPT_PLACES = 4096  # batches that may be on their way from the stream to the training loop
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


# ----------------------------------------------------------------------------------------------------------------------
# The stream


@dataclass
class Stream:
    """A 🤗 stream of images that are not decoded.

    Attributes:
        data: the `datasets.IterableDataset`. column: of the image. name: what messages call it.
        digest: changes when the stream is another one.
        length: number of images, where the stream says so; else None.
    """

    data: object
    column: str
    name: str
    digest: str
    length: int | None = None

    def image_of(self, row: dict, number: int) -> tuple[str, bytes | None]:
        """(name, encoded image) of a row, the `number`-th that was read."""
        image = row[self.column] or {}
        name = f"{row['__url__']}#{row['__key__']}" if "__key__" in row else f"{self.name}[{number}]"
        return name, image.get("bytes")


def shards_of(place: str) -> list[str]:
    """The shards that a path, a glob or a URL names; `{000..127}` stands for 128 of them, and a folder for its .tar files."""
    found = BRACES.search(place)
    if found:
        first, last = found.groups()
        numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        return [shard for number in numbers for shard in shards_of(place[: found.start()] + number + place[found.end() :])]
    if "://" in place:
        return [place]
    return sorted(glob.glob(os.path.join(glob.escape(place), "*.tar") if os.path.isdir(place) else place))


def open_stream(place: str, label: str, cache_dir: str | None = None) -> Stream:
    """The stream of training images at `place`: .tar shards by path, glob or URL, else a 🤗 data set by id or folder.
    UserError, which begins with `label`, if there is none."""
    shards = shards_of(place) if ".tar" in place or glob.glob(os.path.join(glob.escape(place), "*.tar")) else []
    if not shards:
        if ".tar" in place:
            raise UserError(f"{label} {place}: no such shard")
        data, column = hub_split(place, True, label, cache_dir, streaming=True)
        split = (data.info.splits or {}).get(str(data.split))
        return Stream(data, column, place, _digest([place]), split.num_examples if split else None)
    import datasets

    try:
        files = {"train": [shard if "://" in shard else os.path.abspath(shard) for shard in shards]}
        data = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True, cache_dir=cache_dir)
        column = image_column(data.features, f"{label} {place}")
    except UserError:
        raise
    except Exception as error:  # each file system has its own classes
        raise UserError(f"{label} {place}: cannot be read as WebDataset shards ({one_line(error)})") from None
    data = data.select_columns([column, "__key__", "__url__"]).cast_column(column, datasets.Image(decode=False))
    return Stream(data, column, place, _digest([os.path.basename(shard) for shard in shards]))


def _digest(names: list[str]) -> str:
    return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Images


class EncodedImages:
    """A source of images for `ImageDataset`: some that were read, [(name, encoded image or None)]."""

    paths = None  # it has no files of its own

    def __init__(self, images: list[tuple[str, bytes | None]]):
        self.images = images

    def __len__(self):
        return len(self.images)

    def open(self, index: int) -> Image.Image:
        content = self.images[index][1]
        if content is None:
            raise ValueError("no image in this row")
        return open_image(io.BytesIO(content))

    def name(self, index: int) -> str:
        return self.images[index][0]

    def content(self, index: int) -> bytes:
        return digest_of([self.images[index][1]])


class StreamDataset(ImageDataset):
    """Square training images of a stream. A batch is asked for as a list of (number, (name, encoded image)), and the crop
    and flip are a function of (seed, the image's content, number).

    The next readable image of the batch replaces an unreadable one. Where none is readable the pixels are not-a-number, so
    that the step is skipped.

    Args:
        epoch_images: that count as an epoch; 0: as many as the stream has, or `EPOCH_IMAGES`. It is this data set's length.
    """

    def __init__(self, stream: Stream, image_size: int, random_flip: bool = False, seed: int = 0, epoch_images: int = 0):
        super().__init__(EncodedImages([]), image_size, True, random_flip, seed)
        self.stream = stream
        self.epoch_images = epoch_images or stream.length or EPOCH_IMAGES

    def __len__(self):
        return self.epoch_images

    def __getstate__(self):
        return self.__dict__ | {"stream": None}  # a worker is given what the main process has read

    def of(self, images: list[tuple[str, bytes | None]]) -> ImageDataset:
        """Images of this stream as a data set of their own."""
        return ImageDataset(EncodedImages(images), self.image_size, True, self.random_flip, self.seed)

    def __getitems__(self, items: list) -> list[dict]:
        batch, unreadable, opened = self.of([image for _, image in items]), [], []
        for place in range(len(items)):
            try:
                opened.append(batch.open(place))
            except UnreadableImage as error:
                opened.append(None)
                unreadable.append(str(error))
        made = []
        for first, (number, (name, _)) in enumerate(items):
            places = [*range(first, len(items)), *range(first)]
            readable = next((place for place in places if opened[place] is not None), None)
            pixels = torch.full((3, self.image_size, self.image_size), torch.nan)
            if readable is not None:
                pixels = to_pixel_values(batch.crop(opened[readable], batch.source.content(readable), number))
            made.append({"pixel_values": pixels, "index": number, "path": name, "unreadable": []})
        made[0]["unreadable"] = unreadable
        return made

    def look_at_first(self, label: str) -> None:
        """UserError, which begins with `label`, unless one of the stream's first images can be decoded; says how many of them
        are small."""
        try:
            rows = list(itertools.islice(copy.copy(self.stream.data), PEEKED))
        except Exception as error:
            raise UserError(f"{label}: cannot be read ({one_line(error)})") from None
        first = self.of([self.stream.image_of(row, number) for number, row in enumerate(rows)])
        if not len(first):
            raise UserError(f"{label}: no image there")
        first.require_readable(label)
        first.warn_of_small(label)


# ----------------------------------------------------------------------------------------------------------------------
# Order


@dataclass(frozen=True)
class Block:
    """Images that were read at once.

    Attributes:
        turn: of the stream, counted from 0; count: images that this process read before these.
        state: of the 🤗 stream before these; None at the start of a pass.
        images: [(name, encoded image)]; of those `StreamSampler` gives the ones from its offset on.
    """

    turn: int
    count: int
    state: dict | None
    images: list


class StreamSampler(Sampler):
    """Batches of a stream's encoded images for one process, without end: what `StreamDataset` takes. The stream is read here,
    by a thread of the main process, so that the order does not depend on the number of workers, who decode.

    Attributes:
        batch_size: images per batch of this process; first_step: the step at which an iteration starts.
    """

    def __init__(self, dataset: StreamDataset, batch_size: int, seed: int, buffer: int, rank: int = 0, world: int = 1):
        from datasets.distributed import split_dataset_by_node

        self.batch_size, self.seed, self.buffer, self.rank, self.world = batch_size, seed, max(1, buffer), rank, world
        self.length = len(dataset)
        self.first_step = 0
        self._stream = copy.copy(dataset.stream)
        self._stream.data = split_dataset_by_node(dataset.stream.data, rank, world)
        self._start = self._place(Block(0, 0, None, []), 0)
        self._places = OrderedDict()
        self._reader = None

    def __len__(self):
        return -(-self.length // (self.batch_size * self.world))

    def state_after(self, step: int) -> dict:
        """This process's place in the stream after `step` steps, as plain values."""
        return self._start if step == self.first_step else self._places[step]

    def go_on(self, step: int, place: dict) -> None:
        """Let the next iteration begin after `step` steps, at a place that `state_after` gave. UserError if it is that of
        another stream."""
        if place["stream"] != self._stream.digest:
            raise UserError(f"train_data_dir {self._stream.name}: not the shards that the run to resume had; name the same")
        self.first_step, self._start = step, place

    def _place(self, block: Block, offset: int) -> dict:
        digest = self._stream.digest
        return {"stream": digest, "turn": block.turn, "count": block.count, "state": block.state, "offset": offset}

    def __iter__(self):
        step, start = self.first_step, self._start
        self._places.clear()
        if self._reader:
            self._reader.stop()  # an iteration that nobody finished: two must not read one stream
        self._reader = ReadAhead(lambda stopped: self._blocks(start, stopped), self._stream.name)
        batch, offset = [], start["offset"]
        for block in self._reader.blocks():
            order = np.random.default_rng((self.seed, self.rank, block.count)).permutation(len(block.images))
            for place in range(offset, len(order)):
                batch.append((block.count + place, block.images[order[place]]))
                if len(batch) == self.batch_size:
                    step += 1
                    self._places[step] = self._place(block, place + 1)
                    if len(self._places) > KEPT_PLACES:
                        self._places.popitem(last=False)
                    yield batch
                    batch = []
            offset = 0

    def _blocks(self, start: dict, stopped: Callable[[], bool]):
        """What the stream holds from a place on, pass after pass."""
        turn, count, state = start["turn"], start["count"], start["state"]
        data, name = self._stream.data, self._stream.name
        while not stopped():
            data.set_epoch(1 + int(np.random.SeedSequence((self.seed, turn)).generate_state(1)[0] >> 1))
            data.load_state_dict(state)
            rows, begun = iter(data), state is not None
            while True:
                images = []
                for row in itertools.islice(rows, self.buffer):
                    images.append(self._stream.image_of(row, count + len(images)))
                    if stopped():
                        return
                if not images:
                    break
                yield Block(turn, count, state, images)
                begun, count, state = True, count + len(images), data.state_dict()
            if not begun:
                raise UserError(f"train_data_dir {name}: no image in the share of process {self.rank}; give it more shards")
            turn, state = turn + 1, None


class ReadAhead:
    """A thread that reads the next block of a stream while one is used.

    Args:
        read: called in the thread with a function that says whether to stop; gives the blocks. name: of the stream.
    """

    def __init__(self, read: Callable, name: str):
        self._blocks, self._name = read(lambda: self._stop.is_set()), name
        self._ahead, self._stop = queue.Queue(maxsize=1), threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)

    def blocks(self):
        """The blocks, until `stop` or until nobody wants them any more. WorkersLost when the stream cannot be read on."""
        self._thread.start()
        try:
            while True:
                block = self._ahead.get()
                if isinstance(block, Exception):
                    raise block
                yield block
        finally:
            self.stop()

    def stop(self) -> None:
        """Return when the thread has ended, which first reads the image at hand."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self):
        try:
            for block in self._blocks:
                self._put(block)
        except UserError as error:
            self._put(error)
        except Exception as error:  # a network, a file system, a shard that is cut short
            self._put(WorkersLost(f"train_data_dir {self._name}: cannot be read on ({one_line(error)})"))

    def _put(self, item):
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ahead.put(item, timeout=0.1)
                return


def stream_loader(
    dataset: StreamDataset, batch_size: int, num_workers: int, seed: int, buffer: int, rank: int = 0, world: int = 1
) -> DataLoader:
    """As `dataloader.train_loader`, of a stream."""
    shards = dataset.stream.data.num_shards
    if world > 1 and shards % world and rank == 0:
        log.warning(
            "%s: %d shards are no multiple of %d processes, so each reads them all and keeps its share; with a multiple each "
            "reads its own only",
            dataset.stream.name, shards, world,
        )  # fmt: skip
    sampler = StreamSampler(dataset, batch_size, seed, buffer, rank, world)
    return WorkerLoader(dataset, batch_sampler=sampler, collate_fn=collate, **loader_options(num_workers))
