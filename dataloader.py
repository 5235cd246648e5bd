"""Images in, batches out: folders, ImageNet layouts and hub data sets.

A batch is a dict: `pixel_values` (B, 3, S, S) float32 in [-1, 1], `index` (B,) int64, `path`, a list of B names, and
`unreadable`, a list of messages, one for each file that could not be decoded. The crop and flip of a training image are a
function of (seed, content of its file, view), and the order of the images is a function of (seed, epoch). Neither depends on
the number of workers or processes, or on what was read before, and the crops not on what else is in the folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from images.decoding import resized_crop, to_pixel_values, to_rgb
from images.files import ImageFiles, SomeImages, list_imagenet, list_images, said_of_endings
from images.hub_data import HubImages, load_hub_split
from runtime.device import physical_memory
from runtime.workers import WorkerLoader, loader_options
from utils import UserError, one_line

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
