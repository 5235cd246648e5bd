"""Building the latent cache: each training image through both frozen VAEs once, ever; and training batches out of it."""

from __future__ import annotations

import contextlib
import logging
import math

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataloader import EpochSampler, ImageDataset, UnreadableImage, WorkerLoader, loader_options, to_pixel_values
from latents.cache import CHUNK_IMAGES, LatentCache, cache_key
from runtime.device import memory_advice
from utils import UserError

log = logging.getLogger(__name__)

ENCODE_BATCH = 16  # views encoded at once for the cache


class AllViews(Dataset):
    """Every view of a training image at once, for the latent cache: (index, (views, 3, S, S) uint8, None), or
    (index, None, why) for one that cannot be read."""

    def __init__(self, dataset: ImageDataset, views: int):
        self.dataset, self.views = dataset, views

    def __getitem__(self, index):
        try:
            image = self.dataset.open(index)
            return index, torch.stack([self.dataset.crop(image, index, view) for view in range(self.views)]), None
        except UnreadableImage as error:
            return index, None, str(error)

    def collate(self, items):
        """Items -> (indices, pixels (B · views, 3, S, S) with zeros for the unreadable, {index: why})."""
        size = self.dataset.image_size
        blank = torch.zeros(self.views, 3, size, size, dtype=torch.uint8)
        pixels = torch.cat([blank if views is None else views for _, views, _ in items])
        return [index for index, _, _ in items], pixels, {index: why for index, _, why in items if why}


class CachedDataset(Dataset):
    """Training batches out of a complete latent cache, asked for as lists of (index, view).

    The index counts the images that are in the cache; the batch carries `latents1`, `latents2` and, where the cache has
    pixels, `pixel_values`, beside what every batch has.
    """

    def __init__(self, cache: LatentCache, dataset: ImageDataset):
        self.cache, self.dataset = cache, dataset
        left_out = cache.left_out()
        self.images = np.array([image for image in range(cache.length) if image not in left_out], dtype=np.int64)

    def __len__(self):
        return len(self.images)

    def __getitems__(self, items):
        places, views = np.array(items).T
        images = self.images[places]
        batch = {
            "index": torch.from_numpy(images),
            "path": [self.dataset.name(image) for image in images.tolist()],
            "unreadable": [],
        }
        for name in self.cache.columns:
            rows = torch.from_numpy(self.cache.read(name, images, views))
            batch[name] = to_pixel_values(rows) if name == "pixel_values" else rows.float()
        return batch


def cache_latents(dataset, space1, space2, with_images, root, views, num_workers, sample=False, rank=0, world=1, barrier=None):
    """The complete latent cache of a training set, built or finished now if need be; as a `CachedDataset`.

    Args:
        space1, space2: `vae_align.Codec`s; their VAEs are not loaded when the cache is already complete.
        with_images: also store the pixels, for modules that take the image.
        root: folder of caches; sample: store a draw from the posterior in place of its mean.
    """
    size = dataset.image_size
    columns = {
        f"latents{number}": ((space.channels, size // space.stride, size // space.stride), "float16")
        for number, space in ((1, space1), (2, space2))
    }
    if with_images:
        columns["pixel_values"] = ((3, size, size), "uint8")
    key = cache_key(
        vaes=[space1.fingerprint, space2.fingerprint],
        precision=[str(space1.vae.dtype), str(space2.vae.dtype)],
        sample=sample,
        columns={name: list(shape) for name, (shape, _) in columns.items()},
        views=views,
        **dataset.content_key(),
    )
    cache = LatentCache(root, key, len(dataset), views, columns)
    every_view = AllViews(dataset, views)
    images_per_batch = 2 ** max(0, int(math.log2(max(1, ENCODE_BATCH / views))))

    def loader_for(images):
        options = loader_options(num_workers) | {"collate_fn": every_view.collate, "persistent_workers": False}
        return WorkerLoader(every_view, batch_size=images_per_batch, sampler=images, **options)

    def encode(indices, pixels):
        precision = str(space1.vae.dtype).rpartition(".")[2]
        with memory_advice("encoding images for the latent cache", image_size=size, cache_views=views, precision=precision):
            return encode_views(indices, pixels)

    def encode_views(indices, pixels):
        images = to_pixel_values(pixels)
        rows = {"pixel_values": pixels.numpy()} if with_images else {}
        for number, space in ((1, space1), (2, space2)):
            generator = None
            if sample:  # a function of the images, so that a build that was cut short draws the same
                seed = np.random.SeedSequence((dataset.seed, indices[0], number)).generate_state(1)[0]
                generator = torch.Generator(space.vae.device).manual_seed(int(seed))
            rows[f"latents{number}"] = space.encode(images, sample, generator).half().cpu().numpy()
        return rows

    def progress(total):
        return tqdm(total=total, desc="encode", unit="image", disable=rank != 0 or not total)

    build(cache, loader_for, encode, dataset.name, progress, rank, world, barrier or (lambda: None))
    cached = CachedDataset(cache, dataset)
    left_out = list(cache.left_out().values())
    for why in left_out if rank == 0 else ():
        log.warning("left out: %s", why)
    if not len(cached):
        raise UserError(f"no training image could be encoded; the last failure: {left_out[-1]}")
    return cached


def cached_loader(
    dataset: CachedDataset, batch_size: int, num_workers: int, seed: int, views: int, rank=0, world=1
) -> DataLoader:
    """As `dataloader.train_loader`, of batches out of a latent cache. They are read in this process unless a device computes
    meanwhile: there is nothing to decode."""
    sampler = EpochSampler(len(dataset), batch_size, seed, views, rank, world)
    options = loader_options(num_workers if torch.cuda.is_available() else 0) | {"collate_fn": _as_it_is}
    return WorkerLoader(dataset, batch_sampler=sampler, **options)


def _as_it_is(batch):
    return batch


def build(cache: LatentCache, loader_for, encode, name, progress, rank: int = 0, world: int = 1, barrier=lambda: None) -> None:
    """Fill in what `cache` lacks; process `rank` of `world` takes every `world`-th missing chunk.

    Args:
        loader_for: (images) -> iterable of (images, pixels or None, {image: why it is unreadable}) batches in that order,
            each within one chunk; `pixels` (len(images) · views, 3, S, S) uint8 holds zeros for the unreadable.
        encode: (images, pixels) -> {column: rows as a numpy array}.
        name: (image) -> what to call it in a message.
        progress: (total images) -> a tqdm-like bar.
        barrier: waits for the other processes.
    """
    with cache.lock() if rank == 0 else contextlib.nullcontext():
        barrier()
        if not cache.complete:
            if rank == 0:
                cache.prepare()
            barrier()
            done = cache.journal()
            chunks = [chunk for chunk in range(cache.chunks) if chunk not in done][rank::world]
            barrier()  # all have read the journal before anyone writes to it
            _build_chunks(cache, chunks, loader_for, encode, name, progress)
            barrier()
            if rank == 0:
                cache.finish()
        barrier()


def _build_chunks(cache, chunks, loader_for, encode, name, progress):
    images = [image for chunk in chunks for image in cache.chunk_images(chunk)]
    bar = progress(len(images))
    rows, left_out, seen = {column: [] for column in cache.columns}, {}, 0
    remaining = iter(chunks)
    for batch, pixels, unreadable in loader_for(images):
        encoded = encode(batch, pixels)
        left_out |= unreadable
        for image, *finite in zip(batch, *(_finite(rows, len(batch)) for rows in encoded.values())):
            if not all(finite):
                left_out.setdefault(image, f"{name(image)!r} (its latents are not finite in float16)")
        for column, values in encoded.items():
            rows[column].append(values)
        seen += len(batch)
        bar.update(len(batch))
        if seen == CHUNK_IMAGES or batch[-1] == cache.length - 1:
            cache.write_chunk(next(remaining), {column: np.concatenate(values) for column, values in rows.items()}, left_out)
            rows, left_out, seen = {column: [] for column in cache.columns}, {}, 0
    bar.close()


def _finite(rows: np.ndarray, images: int) -> np.ndarray:
    """For each image whether all its views' rows are finite: (images,) bool."""
    return np.isfinite(rows).reshape(images, -1).all(axis=1)
