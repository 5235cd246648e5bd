"""Building the latent cache: each training image through both frozen VAEs once, ever; and training batches out of it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataloader import EpochSampler, ImageDataset, UnreadableImage, WorkerLoader, loader_options, to_pixel_values
from latents.cache import LatentCache, cache_key
from latents.spaces import Codec
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


@dataclass(frozen=True)
class CacheOptions:
    """What a latent cache holds of each training image, and where it is.

    Attributes:
        root: folder of caches. views: random crops and flips of each image.
        with_images: store the pixels too, for whoever reads the image beside its latents.
        sample: store a draw from the posterior in place of its mean.
    """

    root: str | os.PathLike
    views: int
    with_images: bool = False
    sample: bool = False


def cache_latents(
    dataset: ImageDataset, codec1: Codec, codec2: Codec, options: CacheOptions, num_workers: int = 0, accelerator=None
) -> CachedDataset:
    """The complete latent cache of a training set, built or finished now if need be.

    The codecs' VAEs are not loaded when the cache is already complete. With an `accelerator` of several processes each of them
    encodes its share. UserError if no image can be encoded, or the disk does not hold the cache.
    """
    encoder = LatentEncoder(dataset, codec1, codec2, options, num_workers)
    cache = encoder.cache
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    wait_for_all = accelerator.wait_for_everyone if accelerator else lambda: None
    # a complete cache needs no lock, and may be where nothing can be written
    with cache.lock() if rank == 0 and not cache.complete else contextlib.nullcontext():
        wait_for_all()
        if not cache.complete:
            if rank == 0:
                cache.prepare()
            wait_for_all()
            done = cache.journal()
            chunks = [chunk for chunk in range(cache.chunks) if chunk not in done][rank::world]
            wait_for_all()  # all have read the journal before anyone writes to it
            encoder.encode(chunks, show_progress=rank == 0)
            wait_for_all()
            if rank == 0:
                cache.finish()
        wait_for_all()
    cached = CachedDataset(cache, dataset)
    left_out = list(cache.left_out().values())
    for why in left_out if rank == 0 else ():
        log.warning("left out: %s", why)
    if not len(cached):
        raise UserError(f"no training image could be encoded; the last failure: {left_out[-1]}")
    return cached


class LatentEncoder:
    """Encodes the views of a training set with both VAEs, chunk by chunk, into a `LatentCache`.

    Attributes:
        cache: the cache, in the folder that the content's key names.
    """

    def __init__(self, dataset: ImageDataset, codec1: Codec, codec2: Codec, options: CacheOptions, num_workers: int):
        self.dataset = dataset
        self.codecs = {1: codec1, 2: codec2}
        self.options = options
        self.num_workers = num_workers
        size = dataset.image_size
        columns = {
            f"latents{number}": ((codec.channels, size // codec.stride, size // codec.stride), "float16")
            for number, codec in self.codecs.items()
        }
        if options.with_images:
            columns["pixel_values"] = ((3, size, size), "uint8")
        key = cache_key(
            vaes=[codec.fingerprint for codec in self.codecs.values()],
            precision=[str(codec.vae.dtype) for codec in self.codecs.values()],
            sample=options.sample,
            columns={name: list(shape) for name, (shape, _) in columns.items()},
            views=options.views,
            **dataset.content_key(),
        )
        self.cache = LatentCache(options.root, key, len(dataset), options.views, columns)

    def encode(self, chunks: list[int], show_progress: bool) -> None:
        """Encode those chunks and write each when it is whole."""
        images = [image for chunk in chunks for image in self.cache.chunk_images(chunk)]
        bar = tqdm(total=len(images), desc="encode", unit="image", disable=not show_progress or not images)
        batches = iter(self._loader(images))
        for chunk in chunks:
            missing = len(self.cache.chunk_images(chunk))
            rows = {name: [] for name in self.cache.columns}
            left_out = {}
            while missing:
                indices, pixels, unreadable = next(batches)
                encoded = self._encode_batch(indices, pixels)
                left_out |= unreadable | self._not_finite(indices, encoded, unreadable)
                for name, values in encoded.items():
                    rows[name].append(values)
                missing -= len(indices)
                bar.update(len(indices))
            self.cache.write_chunk(chunk, {name: np.concatenate(values) for name, values in rows.items()}, left_out)
        bar.close()

    def _loader(self, images: list[int]) -> DataLoader:
        """Batches of (indices, pixels, {index: why it is unreadable}) in the order of `images`, each within one chunk: a power
        of two that divides a chunk's images."""
        every_view = AllViews(self.dataset, self.options.views)
        images_per_batch = 2 ** max(0, int(math.log2(max(1, ENCODE_BATCH / self.options.views))))
        options = loader_options(self.num_workers) | {"collate_fn": every_view.collate, "persistent_workers": False}
        return WorkerLoader(every_view, batch_size=images_per_batch, sampler=images, **options)

    def _encode_batch(self, indices: list[int], pixels: torch.Tensor) -> dict[str, np.ndarray]:
        """Pixels (B · views, 3, S, S) uint8 -> {column: rows}."""
        advice = {
            "image_size": self.dataset.image_size,
            "cache_views": self.options.views,
            "precision": str(self.codecs[1].vae.dtype).rpartition(".")[2],
        }
        images = to_pixel_values(pixels)
        rows = {"pixel_values": pixels.numpy()} if self.options.with_images else {}
        with memory_advice("encoding images for the latent cache", **advice):
            for number, codec in self.codecs.items():
                generator = None
                if self.options.sample:  # a function of the images, so that a build that was cut short draws the same
                    seed = np.random.SeedSequence((self.dataset.seed, indices[0], number)).generate_state(1)[0]
                    generator = torch.Generator(codec.vae.device).manual_seed(int(seed))
                rows[f"latents{number}"] = codec.encode(images, self.options.sample, generator).half().cpu().numpy()
        return rows

    def _not_finite(self, indices: list[int], encoded: dict[str, np.ndarray], unreadable: dict) -> dict[int, str]:
        """{image whose views are not finite in float16: why it is left out}."""
        finite = np.all([np.isfinite(rows).reshape(len(indices), -1).all(axis=1) for rows in encoded.values()], axis=0)
        return {
            image: f"{self.dataset.name(image)!r} (its latents are not finite in float16)"
            for image, good in zip(indices, finite)
            if not good and image not in unreadable
        }


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
