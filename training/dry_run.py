"""--dry_run: what the whole run would take, by two steps of the real loop and one evaluation batch."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from utils import count_of


class FewBatches:
    """A stand-in for a loader that gives a few of its batches, and keeps how long a pass over them took its reader.

    Attributes:
        dataset, batch_sampler: the loader's own; its length stays too. seconds: of each whole pass.
    """

    def __init__(self, loader, batches: list):
        self.dataset = loader.dataset
        self.batch_sampler = loader.batch_sampler
        self.seconds = []
        self._length = len(loader)
        self._batches = batches

    def __len__(self):
        return self._length

    def __iter__(self):
        start = time.perf_counter()
        yield from self._batches
        self.seconds.append(time.perf_counter() - start)


def first_batches(loader, count: int) -> list:
    return list(itertools.islice(loader, count))


@dataclass
class Plan:
    """What a run would take. `seconds_to_encode` is for a batch; `views` of each image are cached, 0 without a cache."""

    steps: int
    steps_per_epoch: int
    batch_size: int
    train_images: int
    eval_images: int
    views: int
    view_bytes: int
    checkpoint_bytes: int
    evaluations: int
    seconds_per_step: float
    seconds_to_encode: float
    seconds_to_evaluate: float
    peak_memory: int

    def text(self) -> str:
        encoded_batches = self.train_images * self.views / self.batch_size if self.views else 0
        seconds = self.steps * self.seconds_per_step
        seconds += encoded_batches * self.seconds_to_encode
        seconds += self.evaluations * self.seconds_to_evaluate
        cache = self.train_images * self.views * self.view_bytes
        return (
            f"dry run: two steps and an evaluation batch went well; nothing was written\n"
            f"steps:            {self.steps} ({self.steps_per_epoch} in an epoch) of {count_of(self.batch_size, 'image')}\n"
            f"images:           {self.train_images} to train on, {self.eval_images} to judge by\n"
            f"expected time:    {seconds / 60:.1f} minutes ({self.seconds_per_step:.2f} s a step, "
            f"{self.seconds_to_encode:.2f} s to encode a batch, {count_of(self.evaluations, 'evaluation')})\n"
            f"latent cache:     {cache / 1e6:.0f} MB for {count_of(self.views, 'view')} of each image\n"
            f"a checkpoint:     {self.checkpoint_bytes / 1e6:.1f} MB\n"
            f"peak memory:      {self.peak_memory / 1e9:.1f} GB"
        )
