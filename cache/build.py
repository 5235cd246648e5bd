"""Building the latent cache: each training image through both frozen VAEs once, ever."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from cache.claims import ChunkClaims
from cache.contents import WORD, Contents, contents_of, words_of
from cache.read import CachedDataset, as_it_is
from cache.store import LatentCache, addresses_of, cache_key
from dataloader import ImageDataset, UnreadableImage, WorkerLoader, loader_options
from images.decoding import image_reader, to_levels, to_pixel_values
from images.files import digest_of
from runtime.processes import ALONE, Machine
from utils import UserError, count_of, memory_advice
from vaes.codec import Codec, SeenThrough, decode_picture

log = logging.getLogger(__name__)

ENCODE_BATCH = 16  # views encoded at once for the cache
CHUNK_IMAGES = 32  # a kill loses at most this many images' work

Chunks = dict[int, list[tuple[int, list[int]]]]  # {number: [(index of an image, numbers of its views)]}


@dataclass(frozen=True)
class EncodingItem:
    """Some views of a training image, or why there are none.

    Attributes:
        index: of the image. views: their numbers. content: the digest of what was decoded. pixels: (views, 3, S, S) uint8.
        failure: of decoding; lasting: whether the same content will fail again.
    """

    index: int
    views: list[int]
    content: bytes = b""
    pixels: torch.Tensor | None = None
    failure: str = ""
    lasting: bool = False


class SomeViews(Dataset):
    """Training images, asked for as (index, numbers of views), as `EncodingItem`s."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __getitem__(self, item):
        index, views = item
        content = b""
        try:
            image = self.dataset.open(index)
            content = self.dataset.content(index)
            pixels = torch.stack([self.dataset.crop(image, content, view) for view in views])
            return EncodingItem(index, views, content, pixels)
        except UnreadableImage as error:
            return EncodingItem(index, views, content, failure=error.why, lasting=not error.passing)


@dataclass(eq=False)
class BatchesOfChunks(Sampler):
    """Batches of (index, numbers of views), chunk after chunk. The numbers of the chunks that have begun are put into
    `in_work`, from which whoever is done with one takes it."""

    numbers: Iterator[int]
    chunks: Chunks
    batch_size: int
    in_work: deque

    def __iter__(self):
        for number in self.numbers:
            self.in_work.append(number)
            images = self.chunks[number]
            for start in range(0, len(images), self.batch_size):
                yield images[start : start + self.batch_size]


@dataclass(frozen=True)
class CacheOptions:
    """What a latent cache holds of each training image, and where it is.

    Attributes:
        root: folder of caches. views: random crops and flips of each image.
        with_images: store the pixels too, for whoever reads the image beside its latents.
        reencoded: store too what decode + re-encode makes of VAE1's latents. decoded: the picture that VAE1 decodes, 8 bits.
        seen_through: what makes that picture in VAE1's place.
        sample: store a draw from the posterior in place of its mean.
    """

    root: str | os.PathLike
    views: int
    with_images: bool = False
    reencoded: bool = False
    decoded: bool = False
    seen_through: SeenThrough | None = None
    sample: bool = False


def cache_latents(
    dataset: ImageDataset, codec1: Codec, codec2: Codec, options: CacheOptions, num_workers: int = 0, machine=ALONE
) -> CachedDataset:
    """A training set out of the latent cache, in which what is missing of it is built now.

    The codecs' VAEs are not loaded when nothing is missing. All processes of a `machine` encode together, and so do other runs
    that build the same cache meanwhile. Each of several machines has its share of the images, in a cache of its own. UserError
    if no image can be encoded, or the disk does not hold the cache.
    """
    share = share_of(machine, len(dataset))
    own = dataset if len(share) == len(dataset) else dataset.part(share)
    encoder = LatentEncoder(own, codec1, codec2, options, num_workers)
    encoder.cache.hold()
    encoder.contents = machine.of_first(lambda: contents_of(own, Path(options.root) / "contents", num_workers))
    if encoder.missing():  # else the cache may be where nothing can be written
        encoder.build(machine)
    if machine.accelerator:
        machine.accelerator.wait_for_everyone()
    present = machine.of_first(encoder.present)
    images = np.flatnonzero(present)
    if machine.rank == 0:
        failures = [encoder.why_left_out(index) for index in np.flatnonzero(~present).tolist()]
        for why in failures:
            log.warning("left out: %s", why)
        if not len(images):
            raise UserError(f"no training image could be encoded; the last failure: {failures[-1]}")
    rows = encoder.rows()[images]
    if machine.rank == 0:
        encoder.cache.mark_used(rows)
    return CachedDataset(encoder.cache, dataset, share[images], rows, machine.of_each(len(images)))


def share_of(machine: Machine, images: int) -> np.ndarray:
    """The indices of a machine's share of so many images, in proportion to its processes. UserError if there are too few."""
    world = machine.machines[-1].stop
    if images < world and len(machine.machines) > 1:
        raise UserError(f"{images} training images for {world} processes of several machines: each needs one; start fewer")
    processes = machine.machines[machine.number]
    place = np.arange(images) % world
    return np.flatnonzero((place >= processes.start) & (place < processes.stop))


class LatentEncoder:
    """Encodes the views of a training set with both VAEs, chunk by chunk, into a `LatentCache`.

    Attributes:
        cache: the cache, in the folder that the content's key names.
        contents: of the images, set before anything is asked for.
    """

    def __init__(self, dataset: ImageDataset, codec1: Codec, codec2: Codec, options: CacheOptions, num_workers: int):
        self.dataset = dataset
        self.codecs = {1: codec1, 2: codec2}
        self.options = options
        self.num_workers = num_workers
        self.contents: Contents | None = None
        self._rows = None  # where the views were when last looked
        self._failures = {}  # {index: why}, of this run alone
        size = dataset.image_size
        columns = {
            f"latents{number}": ((codec.channels, size // codec.stride, size // codec.stride), "float16")
            for number, codec in self.codecs.items()
        }
        if options.reencoded:
            columns["reencoded"] = columns["latents2"]
        if options.with_images:
            columns["pixel_values"] = ((3, size, size), "uint8")
        if options.decoded:
            columns["decoded"] = ((3, size, size), "uint8")
        key = {
            "vaes": [codec.fingerprint for codec in self.codecs.values()],
            "precision": [str(codec.vae.dtype) for codec in self.codecs.values()],
            "sample": options.sample,
            "columns": {name: list(shape) for name, (shape, _) in columns.items()},
            **dataset.view_key(),
        }
        if options.seen_through:
            key["seen_through"] = [codec.fingerprint for codec in options.seen_through.codecs]
        about = {"vae1": codec1.vae.where, "vae2": codec2.vae.where, **key}
        self.cache = LatentCache(options.root, cache_key(**key), columns, about)

    # ---- what is there

    def rows(self) -> np.ndarray:
        """Where in the cache the views are: (images, views) int64, -1 for those that are not there."""
        if self._rows is None:
            self._rows = self.cache.find(addresses_of(self.contents.digests[:, None], np.arange(self.options.views)[None]))
        return self._rows

    def present(self) -> np.ndarray:
        """Which images can be trained on: (images,) bool."""
        usable = ~np.isin(np.arange(len(self.dataset)), list(self._known_failures()))
        return (self.rows() >= 0).all(axis=1) & usable

    def missing(self) -> Chunks:
        """The images to encode, each content once, and which of their views, by a new look."""
        self._rows = None
        absent = self.rows() < 0
        failures, found = self._known_failures(), {}
        for index in np.flatnonzero(absent.any(axis=1)).tolist():
            if index not in failures:
                found.setdefault(self._content(index), (index, np.flatnonzero(absent[index]).tolist()))
        chunks = {}
        for index, views in found.values():
            chunks.setdefault(index // CHUNK_IMAGES, []).append((index, views))
        return chunks

    def name_of_set(self) -> str:
        """The name of the images and views that are wanted."""
        return digest_of([self.contents.digests.tobytes(), str(self.options.views).encode()]).hex()

    def why_left_out(self, index: int) -> str:
        failures = self._known_failures() | self._failures
        return f"{self.dataset.name(index)!r} ({failures.get(index, 'it could not be read when it was to be encoded')})"

    def _known_failures(self) -> dict[int, str]:
        """{index of an image that need not be tried again: why}."""
        left_out = self.cache.left_out(image_reader(), self.options.views)
        by_content = {index: left_out.get(self._content(index).hex()) for index in range(len(self.dataset))} if left_out else {}
        return self.contents.unreadable | {index: why for index, why in by_content.items() if why}

    def _content(self, index: int) -> bytes:
        return self.contents.digests[index].tobytes()

    # ---- building

    def build(self, machine: Machine) -> None:
        """Encode what is missing, together with all who do so at this moment; afterwards nothing is that can be encoded."""
        self.cache.begin()
        with ChunkClaims(self.cache.folder / f"{self.name_of_set()}.claims") as claims:
            claims.look(-(-len(self.dataset) // CHUNK_IMAGES))
            missing = self.missing()  # others may have built some of it meanwhile
            if machine.rank == 0:
                self.announce(missing)
            if not claims.works:
                missing = dict(list(missing.items())[machine.rank :: machine.world])
            self.encode(missing, claims, show_progress=machine.rank == 0)

    def announce(self, missing: Chunks) -> None:
        """Say what the cache will take, and stop at once if the disk does not have it."""
        to_encode = [image for images in missing.values() for image in images]
        images = len(self.dataset)
        log.info(
            "latent cache: %s x %s, %.0f MB in %s; %d to encode",
            count_of(images, "image"), count_of(self.options.views, "view"),
            images * self.options.views * self.cache.row_bytes / 1e6, self.cache.folder, len(to_encode),
        )  # fmt: skip
        self.cache.require_space(sum(len(views) for _, views in to_encode))

    def encode(self, missing: Chunks, claims: ChunkClaims, show_progress: bool) -> None:
        """Encode the chunks that nobody else does, and wait for those that others encode."""
        before = dict(zip(missing, itertools.accumulate(map(len, missing.values()), initial=0)))
        total = sum(map(len, missing.values()))
        with tqdm(total=total, desc="encode", unit="image", disable=not show_progress or not total) as bar:
            waiting = list(missing)
            while waiting:
                held = []
                taken = claims.taken(waiting, held)
                for number in taken:  # the loader starts its workers for at least one chunk
                    self._encode_taken(itertools.chain([number], taken), missing, before, claims, bar)
                waiting = claims.left_undone(held)
            bar.update(total - bar.n)
        self._rows = None

    def _encode_taken(self, numbers: Iterator[int], missing: Chunks, before: dict, claims: ChunkClaims, bar: tqdm) -> None:
        """Encode those chunks and write each when it is whole; `before`: the number of images in those that precede it."""
        in_work = deque()  # chunks of which batches are on their way
        addresses, rows, left_out, seen = [], {name: [] for name in self.cache.columns}, [], 0
        for items in self._loader(BatchesOfChunks(numbers, missing, self._images_per_batch(), in_work)):
            number = in_work[0]
            good = [item for item in items if self._may_be_encoded(item, left_out)]
            if good:
                encoded = self._encode_batch(good)
                finite = self._finite(good, encoded, left_out)
                for name, values in encoded.items():
                    rows[name].append(values[finite])
                addresses.append(_addresses_of(good)[finite])
            seen += len(items)
            bar.update(before[number] + seen - bar.n)
            claims.show_life()
            if seen == len(missing[number]):
                if addresses or left_out:
                    whole = {name: np.concatenate(values) for name, values in rows.items() if values}
                    self.cache.append(np.concatenate(addresses or [np.empty((0, 2), WORD)]), whole, left_out)
                claims.finish(in_work.popleft())
                addresses, rows, left_out, seen = [], {name: [] for name in self.cache.columns}, [], 0

    def _images_per_batch(self) -> int:
        """A power of two, so that whole batches make a chunk."""
        return 2 ** max(0, int(math.log2(max(1, ENCODE_BATCH / self.options.views))))

    def _loader(self, batches: BatchesOfChunks) -> DataLoader:
        """Batches of `EncodingItem`s."""
        options = loader_options(self.num_workers) | {"collate_fn": as_it_is, "persistent_workers": False}
        return WorkerLoader(SomeViews(self.dataset), batch_sampler=batches, **options)

    def _may_be_encoded(self, item: EncodingItem, left_out: list[dict]) -> bool:
        why = item.failure
        if not why and item.content != self._content(item.index):
            why = "it changed while it was being read"
        if why:
            self._leave_out(item, why, left_out if item.lasting else [])
        return not why

    def _leave_out(self, item: EncodingItem, why: str, left_out: list[dict]) -> None:
        self._failures[item.index] = why
        content = self._content(item.index).hex()
        left_out.append({"content": content, "views": self.options.views, "reader": image_reader(), "why": why})

    def _encode_batch(self, items: list[EncodingItem]) -> dict[str, np.ndarray]:
        """{column: rows} of all views of `items`."""
        advice = {
            "image_size": self.dataset.image_size,
            "cache_views": self.options.views,
            "precision": str(self.codecs[1].vae.dtype).rpartition(".")[2],
        }
        pixels = torch.cat([item.pixels for item in items])
        images = to_pixel_values(pixels)
        rows = {"pixel_values": pixels.numpy()} if self.options.with_images else {}
        with memory_advice("encoding images for the latent cache", **advice):
            for number, codec in self.codecs.items():
                generator = None
                if self.options.sample:  # a function of the images, so that a build that was cut short draws the same
                    first = int.from_bytes(items[0].content, "little")
                    seed = np.random.SeedSequence((self.dataset.seed, first, number)).generate_state(1)[0]
                    generator = torch.Generator(codec.vae.device).manual_seed(int(seed))
                rows[f"latents{number}"] = codec.encode(images, self.options.sample, generator).half().cpu().numpy()
            if self.options.reencoded or self.options.decoded:
                picture = self._picture(images, rows["latents1"])
            if self.options.reencoded:
                rows["reencoded"] = self.codecs[2].encode(picture).half().cpu().numpy()
            if self.options.decoded:
                rows["decoded"] = to_levels(picture).cpu().numpy()
        return rows

    def _picture(self, images: torch.Tensor, latents1: np.ndarray) -> torch.Tensor:
        device = self.codecs[1].vae.device
        if self.options.seen_through:
            return self.options.seen_through(images.to(device))
        return decode_picture(torch.from_numpy(latents1).to(device), self.codecs[1])

    def _finite(self, items: list[EncodingItem], encoded: dict[str, np.ndarray], left_out: list[dict]) -> np.ndarray:
        """Which rows are of images whose views are all finite in float16: (rows,) bool. The other images are left out."""
        of_item = np.repeat(np.arange(len(items)), [len(item.views) for item in items])
        finite = np.all([np.isfinite(rows).reshape(len(rows), -1).all(axis=1) for rows in encoded.values()], axis=0)
        bad = np.unique(of_item[~finite])
        for number in bad.tolist():
            self._leave_out(items[number], "its latents are not finite in float16", left_out)
        return ~np.isin(of_item, bad)


def _addresses_of(items: list[EncodingItem]) -> np.ndarray:
    """The addresses of all views of `items`: (rows, 2)."""
    counts = [len(item.views) for item in items]
    contents = np.repeat(words_of([item.content for item in items]), counts, axis=0)
    return addresses_of(contents, np.concatenate([item.views for item in items]))
