"""Building the latent cache: each training image through both frozen VAEs once, ever."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from filelock import FileLock, Timeout
from torch.utils.data import Dataset
from tqdm import tqdm

from cache.read import OF_ANOTHER_KIND, WORD, CachedDataset, LatentCache, places_in
from dataloader import ImageDataset, Loader, UnreadableImage
from images.decoding import image_reader, to_levels, to_pixel_values
from images.files import digest_of
from runtime.processes import from_first, is_main, place_of
from utils import UserError, atomic_file, count_of, memory_advice, one_line, open_regular, write_json
from vaes.codec import Codec, SeenThrough, decode_picture

log = logging.getLogger(__name__)

LAYOUT = 2  # raised with every change to what a cache's folder holds, so that no older one is read
ENCODE_BATCH = 16  # views encoded at once, and at most on a GPU with memory for them
LARGEST_BATCH = 128
PIXEL_BYTES = 4096  # of a GPU's memory for each pixel that a VAE at full size encodes in float32
CHUNK_IMAGES = 32  # at most: a kill loses the chunks in work
FEW_IMAGES = 1024  # of fewer, a chunk is one batch: a short build loses little too
AHEAD = 2  # batches and chunks that may wait for the thread that writes
CHUNK_BYTES = 1 << 28  # a chunk is in memory until it is written; larger views make chunks of fewer images
POLL = 0.5  # seconds between looks at the locks of others
STALE = 600.0  # seconds without progress of the others, after which their locks do not count
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd: no two views of an image get the same address

Chunks = dict[str, list[tuple[int, list[int]]]]  # {name: [(index of an image, the numbers of its views)]}


@dataclass(frozen=True)
class CacheOptions:
    """What a latent cache holds of each training image, and where it is.

    Attributes:
        root: folder of caches. views: random crops and flips of each image.
        with_images: store the pixels too, for whoever reads the image beside its latents.
        reencoded: store too what decode + re-encode makes of VAE1's latents. decoded: the picture that VAE1 decodes, 8 bits.
        seen_through: what makes that picture in VAE1's place.
        sample: store a draw from the posterior in place of its mean.
        note: a line that is logged before anything is encoded.
    """

    root: str | os.PathLike
    views: int
    with_images: bool = False
    reencoded: bool = False
    decoded: bool = False
    seen_through: SeenThrough | None = None
    sample: bool = False
    note: str = ""


def cache_latents(
    dataset: ImageDataset, codec1: Codec, codec2: Codec, options: CacheOptions, num_workers: int = 0, accelerator=None
) -> CachedDataset:
    """The training set as rows of the latent cache, after the missing ones have been encoded.

    The codecs' VAEs are not loaded when nothing is missing. All processes encode together, and so do other runs that build the
    same cache meanwhile. UserError if no image can be encoded, or the disk does not hold the cache.
    """
    contents = from_first(lambda: contents_of(dataset, Path(options.root) / "contents.npy", num_workers), accelerator)
    encoder = LatentEncoder(dataset, codec1, codec2, options, num_workers, *contents)
    if encoder.cache.folder.is_symlink():
        raise UserError(f"latent cache {encoder.cache.folder}: a link, through which other files could be changed; remove it")
    if missing := encoder.missing():  # else the cache may be where nothing can be written
        encoder.build(missing, *place_of(accelerator))
    if accelerator:
        accelerator.wait_for_everyone()
    rows = encoder.rows()
    present = from_first(lambda: (rows >= 0).all(axis=1), accelerator)
    images, rows = np.flatnonzero(present), rows[present]
    if (rows < 0).any():
        raise UserError(f"latent cache {encoder.cache.folder}: another process sees more of it than this one; start again")
    if is_main(accelerator):
        left_out = encoder.left_out()
        for index in np.flatnonzero(~present).tolist():
            why = f"{dataset.name(index)!r} ({left_out.get(index, 'it could not be read when it was to be encoded')})"
            log.warning("left out: %s", why)
        if not len(images):
            raise UserError(f"no training image could be encoded; the last failure: {why}")
    return CachedDataset(encoder.cache, dataset, images, rows)


def contents_of(dataset: ImageDataset, path: Path, threads: int) -> tuple[list[bytes], dict[int, str]]:
    """([digest of each image's content, zero where it cannot be read], {index of such an image: why}).

    The file `path` holds pairs (digest of an image's stamp, digest of its content), so that an unchanged image is not read
    again, unless this file is lost. Threads read the others.
    """

    def stamp_of(index):
        with contextlib.suppress(OSError):
            if stamp := dataset.source.stamp(index):
                return digest_of([stamp.encode(errors="surrogateescape")])

    def read(index):
        try:
            return dataset.content(index), ""
        except UnreadableImage as error:
            return bytes(16), error.why

    known = {}
    with contextlib.suppress(OSError, EOFError, MemoryError, *OF_ANOTHER_KIND), open_regular(path) as file:
        known = dict(np.load(file).view("V16").reshape(-1, 2).tolist())
    stamps = [stamp_of(index) for index in range(len(dataset))]
    contents, unreadable = [known.pop(stamp, None) for stamp in stamps], {}
    waiting = [index for index, content in enumerate(contents) if content is None]
    with ThreadPoolExecutor(max(1, threads)) as pool, tqdm(total=len(waiting), desc="read", unit="image", delay=2) as bar:
        for start in range(0, len(waiting), 1024):
            part = waiting[start : start + 1024]
            for index, (content, why) in zip(part, pool.map(read, part)):
                contents[index] = content
                if why:
                    unreadable[index] = why
                bar.update()
    if waiting:
        known |= {stamp: content for stamp, content in zip(stamps, contents) if stamp and any(content)}
        with contextlib.suppress(OSError), atomic_file(path) as file:
            np.save(file, np.frombuffer(b"".join(itertools.chain(*known.items())), np.uint8))
    return contents, unreadable


class ChunkLocks:
    """This process's locks on the chunks that it encodes. The kernel drops them with the process.

    Attributes:
        patient: whether a chunk that another process has locked is left to it; False where no file can be locked.
    """

    def __init__(self, folder: Path):
        self._folder, self._held, self.patient = folder, {}, True
        probe = secrets.token_hex(8)  # nobody else locks this one
        self.patient = self.claim(probe)
        self.release(probe)

    def claim(self, name: str) -> bool:
        """Whether this process is to encode that chunk."""
        lock = FileLock(self._folder / f"{name}.lock", thread_local=False)  # the thread that writes a chunk releases it
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError, NotImplementedError):
            return not self.patient or os.path.islink(lock.lock_file)
        self._held[name] = lock
        return True

    def release(self, name: str) -> None:
        if lock := self._held.pop(name, None):
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)
            lock.release()

    def close(self) -> None:
        """Release all."""
        for name in list(self._held):
            self.release(name)

    def show_life(self) -> None:
        """Let those who wait for this process know that it encodes."""
        for lock in list(self._held.values()):
            with contextlib.suppress(OSError):
                os.utime(lock.lock_file)

    def wait(self, name: str) -> bool:
        """Claim a chunk as soon as its claimer has finished it, has died, or has shown no life for `STALE` seconds. True."""
        still, life = 0.0, None
        while not self.claim(name):
            before = life
            with contextlib.suppress(OSError):
                life = os.stat(self._folder / f"{name}.lock").st_mtime_ns
            still = still + POLL if life == before else 0.0
            if still >= STALE:
                log.warning("those who encode the rest of the latent cache have done nothing for %.0f s: doing it here", STALE)
                self.patient = False
            time.sleep(POLL)
        return True


class Behind(ThreadPoolExecutor):
    """A thread that does the work given to it, in its order, while this one goes on. Its end waits for the work, after an error
    too: what was encoded is kept."""

    def __init__(self):
        super().__init__(1)
        self._waiting = deque()

    def do(self, work: Callable, *given) -> None:
        """Have `work(*given)` done later; waits where more than `AHEAD` works are not done."""
        self._waiting.append(self.submit(work, *given))
        self.finish(AHEAD)

    def finish(self, left: int = 0) -> None:
        """Wait until at most `left` works are not done. An error of one is raised here."""
        while len(self._waiting) > left:
            self._waiting.popleft().result()


class SomeViews(Dataset):
    """Training images, asked for as (index, numbers of views): (index, views, digest of content, pixels (V, 3, S, S) uint8). An
    UnreadableImage stands for the pixels of an image that cannot be decoded."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __getitem__(self, item):
        index, views = item
        try:
            image, content = self.dataset.open(index), self.dataset.content(index)
            return index, views, content, torch.stack([self.dataset.crop(image, content, view) for view in views])
        except UnreadableImage as error:
            return index, views, b"", error


class LatentEncoder:
    """Encodes the views of a training set with both VAEs, chunk by chunk, into a `LatentCache`.

    Args:
        contents: [digest of each image's content]. unreadable: {index of an image that cannot be read: why}.
    """

    def __init__(
        self, dataset: ImageDataset, codec1: Codec, codec2: Codec, options: CacheOptions, num_workers: int, contents, unreadable
    ):
        self.dataset, self.options, self.num_workers = dataset, options, num_workers
        self.codecs = {1: codec1, 2: codec2}
        self.contents, self._failures = contents, unreadable
        size = dataset.image_size
        columns = [
            (f"latents{number}", "<f2", (codec.channels, size // codec.stride, size // codec.stride))
            for number, codec in self.codecs.items()
        ]
        columns += [("reencoded", *columns[1][1:])] if options.reencoded else []
        columns += [("pixel_values", "u1", (3, size, size))] if options.with_images else []
        columns += [("decoded", "u1", (3, size, size))] if options.decoded else []
        key = {
            "layout": LAYOUT,
            "vaes": [codec.fingerprint for codec in self.codecs.values()],
            "precision": [str(codec.vae.dtype) for codec in self.codecs.values()],
            "sample": options.sample,
            "columns": columns,
            **dataset.view_key(),
        }
        if options.seen_through:
            key["seen_through"] = [codec.fingerprint for codec in options.seen_through.codecs]
        self.about = {"vae1": codec1.vae.where, "vae2": codec2.vae.where, **key}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        self.cache = LatentCache(Path(options.root) / digest, np.dtype(columns))

    # ---- what is there

    def rows(self) -> np.ndarray:
        """The numbers of the views' rows: (images, views) int64, -1 for those that are not there at this moment."""
        self.cache.look()
        views = self.options.views
        wanted = addresses_of([each for each in self.contents for _ in range(views)], [*range(views)] * len(self.contents))
        return places_in(self.cache.addresses, wanted).reshape(-1, views)

    def left_out(self) -> dict[int, str]:
        """{index of an image that cannot be encoded: why}, as far as this process knows."""
        known = {}  # a content that could not be encoded is not tried again by the same decoder
        for content, views, reader, why in self.cache.left_out:
            if reader == image_reader() and views <= self.options.views:
                known[content] = why
        return self._failures | {index: known[content] for index, content in enumerate(self.contents) if content in known}

    def missing(self) -> Chunks:
        """The images to encode, each content once. A chunk is named by a digest of the rows that it will hold."""
        absent, found, chunks = self.rows() < 0, {}, {}
        left_out = self.left_out()
        for index in np.flatnonzero(absent.any(axis=1)).tolist():
            if index not in left_out:
                found.setdefault(self.contents[index], (index, np.flatnonzero(absent[index]).tolist()))
        most = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // (self.options.views * self.cache.row.itemsize)))
        if len(self.contents) < FEW_IMAGES:
            most = min(most, self._images_of(ENCODE_BATCH))
        for index, views in found.values():
            chunks.setdefault(index // most, []).append((index, views))
        return {self._name_of(images): images for images in chunks.values()}

    def _name_of(self, images: list[tuple[int, list[int]]]) -> str:
        wanted = [(self.contents[index], view) for index, views in images for view in views]
        return digest_of([addresses_of(*zip(*wanted)).tobytes(), image_reader().encode()]).hex()

    # ---- building

    def build(self, missing: Chunks, rank: int, world: int) -> None:
        """Encode the missing images, together with all other processes that do so now. UserError if nothing can be written."""
        folder = self.cache.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "about.json", self.about)
        except OSError as error:
            raise UserError(
                f"latent_cache_dir {folder.parent}: cannot write there ({one_line(error)}), and it holds no complete "
                "cache of these images; name another folder"
            ) from None
        if rank == 0:
            self._announce(missing)
        others, names = [], list(missing)
        start = rank * len(names) // world  # divides the work even where no file can be locked
        bar = tqdm(total=sum(map(len, missing.values())), desc="encode", unit="image", disable=rank != 0)
        with contextlib.closing(ChunkLocks(folder)) as locks, bar:

            def claimed(names, claim):
                for name in names:
                    if self.cache.chunk(name) is None and not claim(name):
                        others.append(name)
                    elif self.cache.chunk(name) is None:
                        yield name
                    else:  # another process has finished it
                        locks.release(name)
                        bar.update(len(missing[name]))

            self._encode(claimed(names[start:] + names[:start], locks.claim), missing, locks, bar)
            if others and rank == 0:
                log.info("latent cache: waiting for others, who encode the last %s", count_of(len(others), "chunk"))
            for name in others:
                self._encode(claimed([name], locks.wait), missing, locks, bar)

    def _announce(self, missing: Chunks) -> None:
        """Log the size of the cache. UserError at once if the disk has no room for it."""
        images, folder = list(itertools.chain.from_iterable(missing.values())), self.cache.folder
        row_bytes = self.cache.row.itemsize
        log.info(
            "latent cache: %s x %s, %.0f MB in %s; %d to encode",
            count_of(len(self.contents), "image"), count_of(self.options.views, "view"),
            len(self.contents) * self.options.views * row_bytes / 1e6, folder, len(images),
        )  # fmt: skip
        if self.options.note:
            log.info("%s", self.options.note)
        needed, free = row_bytes * sum(len(views) for _, views in images), shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"latent_cache_dir {folder.parent}: the cache takes {needed / 1e6:.0f} MB more and the disk has "
                f"{free / 1e6:.0f} MB; name another folder, lower cache_views, or train without cache_latents"
            )

    def _encode(self, names: Iterator[str], missing: Chunks, locks: ChunkLocks, bar: tqdm) -> None:
        """Encode these chunks and write each when it is whole."""
        chunk_of = {}  # {index of an image on its way: name}
        size = self._images_of(self._batch_size())

        def batches(name):
            chunk_of.update((index, name) for index, _ in missing[name])
            return (missing[name][start : start + size] for start in range(0, len(missing[name]), size))

        for first in names:  # the loader starts its workers for at least one chunk
            sampler = itertools.chain.from_iterable(map(batches, itertools.chain([first], names)))
            loader = Loader(SomeViews(self.dataset), sampler, self.num_workers, collate_fn=list)
            with Behind() as behind:
                for name, loaded in itertools.groupby(loader, lambda items: chunk_of[items[0][0]]):
                    self._encode_chunk(name, loaded, locks, bar, behind)
                behind.finish()

    def _images_of(self, views: int) -> int:
        """The number of images with about that many views, a power of two: whole batches make a chunk."""
        return 1 << max(1, views // self.options.views).bit_length() - 1

    def _batch_size(self) -> int:
        """Views to encode at once. Draws from the posterior depend on it, so there it is the same on all devices."""
        device = self.codecs[1].vae.device
        if device.type != "cuda" or self.options.sample:
            return ENCODE_BATCH
        fitting = torch.cuda.mem_get_info(device)[0] // (PIXEL_BYTES * self.dataset.image_size**2)
        return max(ENCODE_BATCH, min(LARGEST_BATCH, fitting))

    def _encode_chunk(self, name: str, loaded: Iterator[list[tuple]], locks: ChunkLocks, bar: tqdm, behind: Behind) -> None:
        parts, left_out = [], []
        for items in loaded:
            good = []
            for index, views, content, pixels in items:
                if isinstance(pixels, UnreadableImage):
                    self._leave_out(index, pixels.why, [] if pixels.passing else left_out)
                elif content != self.contents[index]:
                    self._leave_out(index, "it changed while it was being read", [])
                else:
                    good.append((index, views, content, pixels))
            if good:
                behind.do(self._add_rows, good, self._encode_batch(good), parts, left_out)
            bar.update(len(items))
            locks.show_life()
        behind.do(self._write, name, parts, left_out, locks)

    def _leave_out(self, index: int, why: str, left_out: list[dict]) -> None:
        self._failures[index] = why
        content, views = self.contents[index].hex(), self.options.views
        left_out.append({"content": content, "views": views, "reader": image_reader(), "why": why})

    def _encode_batch(self, items: list[tuple]) -> dict[str, torch.Tensor]:
        """{column: its values} of all views of the items, on the device, which may still be computing them."""
        _, _, contents, pixels = zip(*items)
        pixels = torch.cat(pixels)
        images, columns = to_pixel_values(pixels.to(self.codecs[1].vae.device)), {}
        settings = {"image_size": self.dataset.image_size, "cache_views": self.options.views}
        precision = str(self.codecs[1].vae.dtype).rpartition(".")[2]
        with memory_advice("encoding images for the latent cache", **settings, precision=precision):
            for number, codec in self.codecs.items():
                generator = None
                if self.options.sample:  # a function of the images, so that a build that was cut short draws the same
                    first = int.from_bytes(contents[0], "little")
                    seed = np.random.SeedSequence((self.dataset.seed, first, number)).generate_state(1)[0]
                    generator = torch.Generator(codec.vae.device).manual_seed(int(seed))
                columns[f"latents{number}"] = codec.encode(images, self.options.sample, generator).half()
            if self.options.reencoded or self.options.decoded:
                seen_through = self.options.seen_through
                picture = seen_through(images) if seen_through else decode_picture(columns["latents1"], self.codecs[1])
            if self.options.reencoded:
                columns["reencoded"] = self.codecs[2].encode(picture).half()
            if self.options.decoded:
                columns["decoded"] = to_levels(picture)
            if self.options.with_images:
                columns["pixel_values"] = pixels
        return columns

    def _add_rows(self, items: list[tuple], columns: dict[str, torch.Tensor], parts: list[tuple], left_out: list[dict]) -> None:
        """Add (addresses (R, 2), rows (R,)) of the items to `parts`, without images whose latents float16 cannot hold."""
        indices, views, contents, _ = zip(*items)
        rows = np.empty(sum(map(len, views)), self.cache.row)
        for name, values in columns.items():
            rows[name] = values.cpu()
        finite = np.all([np.isfinite(rows[name]).reshape(len(rows), -1).all(axis=1) for name in self.cache.row.names], axis=0)
        ends = np.cumsum(list(map(len, views)))
        whole = [each.all() for each in np.split(finite, ends[:-1])]
        for index in itertools.compress(indices, np.logical_not(whole)):
            self._leave_out(index, "its latents are not finite in float16", left_out)
        digests = [content for content, numbers in zip(contents, views) for _ in numbers]
        kept = np.repeat(whole, list(map(len, views)))
        parts.append((addresses_of(digests, list(itertools.chain(*views)))[kept], rows[kept]))

    def _write(self, name: str, parts: list[tuple[np.ndarray, np.ndarray]], left_out: list[dict], locks: ChunkLocks) -> None:
        """Store a chunk of addresses and rows. UserError if the disk is full or cannot be written."""
        addresses, rows = zip(*parts, (np.empty((0, 2), WORD), np.empty(0, self.cache.row)))
        chunk = {
            "addresses": np.concatenate(addresses).view(np.int64),
            "rows": np.concatenate(rows)[:, None].view(np.uint8),
            "left_out": np.frombuffer(json.dumps(left_out).encode(), np.uint8),
        }
        try:
            if parts or left_out:
                with atomic_file(self.cache.path(name)) as file:
                    file.write(safetensors.numpy.save(chunk))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = "the disk is full" if full else f"cannot be written ({one_line(error)})"
            raise UserError(
                f"latent_cache_dir {self.cache.folder.parent}: {why}; what is cached is kept. Free some of it or "
                "name another folder, then start again"
            ) from None
        locks.release(name)


def addresses_of(digests: list[bytes], views: list[int]) -> np.ndarray:
    """The digests of contents, of 16 bytes each, and the numbers of views -> addresses (R, 2) uint64."""
    addresses = np.frombuffer(b"".join(digests), WORD).reshape(-1, 2).copy()
    addresses[:, 0] += np.asarray(views, np.uint64) * SPREAD  # wraps around
    return addresses
