"""Training images that come as a stream: WebDataset shards and 🤗 data sets that are read as they are needed, not downloaded.

`datasets` reads the shards and knows its place in them. Each process reads its own share: whole shards where their number is a
multiple of the processes', otherwise one
image of as many as there are processes. It takes `shuffle_buffer` images at a time and gives them out in
an order drawn from (seed, process, place); then it takes the next ones. When its share ends it begins another pass, with the
shards in another order.

An epoch is a number of images, `epoch_images`, over all processes; it says when things are due and no more. A pass ends where
it ends, for each process by itself.

    stream = open_stream("shards/{000..127}.tar", "--train_data_dir")
    loader = stream_loader(StreamDataset(stream, image_size), batch_size, num_workers, seed, rank=rank, world=world)
    place = loader.batch_sampler.state_after(step)      # plain values
    loader.batch_sampler.go_on(step, place)             # the next iteration gives what came after that step, bit for bit
"""

from __future__ import annotations

import contextlib
import copy
import glob
import hashlib
import io
import itertools
import logging
import os
import queue
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Sampler

from dataloader import ImageDataset, UnreadableImage, collate
from images.decoding import open_image, to_pixel_values
from images.files import digest_of
from images.hub_data import hub_split, image_column
from runtime.workers import WorkerLoader, WorkersLost, loader_options
from utils import UserError, one_line

log = logging.getLogger(__name__)

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
