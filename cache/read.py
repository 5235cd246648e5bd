"""Training batches out of the latent cache."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cache.store import LatentCache
from dataloader import EpochSampler, ImageDataset, WorkerLoader, loader_options
from images.decoding import to_pixel_values
from runtime.processes import ALONE


class CachedDataset(Dataset):
    """Training batches out of a latent cache, asked for as lists of (index, view).

    The index counts the images that are in the cache; the batch carries `latents1`, `latents2` and, where the cache has them,
    `reencoded`, `decoded` and `pixel_values`, beside what every batch has.

    Attributes:
        images: (M,) the indices in `dataset` of the images that are in this cache. rows: (M, views) their places in it.
        shares: [number of images in the cache of each machine], by default of this one alone; the data set's length is the sum.
    """

    def __init__(self, cache: LatentCache, dataset: ImageDataset, images: np.ndarray, rows: np.ndarray, shares=()):
        self.cache, self.dataset, self.images, self.rows = cache, dataset, images, rows
        self.shares = list(shares) or [len(images)]

    def __len__(self):
        return sum(self.shares)

    def __getitems__(self, items):
        places, views = np.array(items).T
        images, rows = self.images[places], self.rows[places, views]
        batch = {
            "index": torch.from_numpy(images),
            "path": [self.dataset.name(image) for image in images.tolist()],
            "unreadable": [],
        }
        for name, column in self.cache.read(rows).items():
            values = torch.from_numpy(column)
            batch[name] = to_pixel_values(values) if values.dtype == torch.uint8 else values.float()
        return batch


def cached_loader(
    dataset: CachedDataset, batch_size: int, num_workers: int, seed: int, views: int, machine=ALONE
) -> DataLoader:
    """As `dataloader.train_loader`, of batches out of a latent cache. They are read in this process unless a device computes
    meanwhile: there is nothing to decode. With several machines the order is one of each machine's images, in epochs of as many
    steps on all."""
    steps = [-(-images // (batch_size * len(each))) for images, each in zip(dataset.shares, machine.machines)]
    sampler = EpochSampler(
        len(dataset.images), batch_size, seed, views, machine.rank, machine.world, machine.number, max(steps)
    )
    options = loader_options(num_workers if torch.cuda.is_available() else 0) | {"collate_fn": as_it_is}
    return WorkerLoader(dataset, batch_sampler=sampler, **options)


def as_it_is(batch):
    return batch
