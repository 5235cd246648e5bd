"""The latent cache on disk, and training batches out of it.

A row is one view of an image (a random crop and flip, the same that training without a cache would draw): both VAEs' scaled
latents in float16 and, where the module takes the image, its pixels in uint8. Its address is made of the digest of the image's
content and the view's number, so a file that is touched, copied, renamed or joined by others keeps its rows. Everything else
that a row depends on (VAEs, size, seed, …) names the folder, by a digest. A folder holds

    about.json          what its name was made of, for people
    NAME.safetensors    a chunk: the rows of up to 32 images, their addresses, and which images could not be encoded
    NAME.lock           the lock of the process that encodes this chunk (`cache.build`)

A chunk appears whole, by a rename, and never changes. Others may write in the folder: neither it nor a file in it may be a
link.
"""

from __future__ import annotations

import bisect
import json
import logging
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch.utils.data import Dataset

from dataloader import ImageDataset
from utils import UserError, open_regular

log = logging.getLogger(__name__)

WORD = np.dtype("<u8")  # a digest is two of them
MOST_MAPS = 1 << 14  # chunks that are mapped at once; Linux allows 65530 maps
OF_ANOTHER_KIND = (KeyError, OverflowError, RecursionError, TypeError, ValueError)  # what a stranger's file may end in


def places_in(table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where addresses (N, 2) are in a table (M, 2), both uint64: (N,) int64, -1 for those that are not there."""
    if not len(table):
        return np.full(len(wanted), -1)
    order = np.argsort(table[:, 0], kind="stable")
    places = order[np.searchsorted(table[:, 0], wanted[:, 0], sorter=order).clip(max=len(table) - 1)]
    return np.where((table[places] == wanted).all(axis=1), places, -1)


class LatentCache:
    """The rows in a folder, which need not be there yet.

    Args:
        row: the dtype of a row, whose fields are the columns.

    Attributes:
        addresses: (R, 2) uint64, of the rows that this process has seen; a row's number is its place here.
        left_out: [(digest of the content of an image that could not be encoded, number of views, `image_reader`, why)].
    """

    def __init__(self, folder: Path, row: np.dtype):
        self.folder, self.row = folder, row
        self.addresses, self.left_out = np.empty((0, 2), WORD), []
        self._names = []  # of the chunks
        self._starts = [0]  # the number of each chunk's first row, and of the row after the last one
        self._maps = {}

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def chunk(self, name: str) -> dict[str, np.ndarray] | None:
        """A chunk as memory maps, "addresses" (R, 2) uint64 and "rows" (R, bytes) uint8, and the list "left_out"; None unless
        it is whole. No file stays open: a process may open fewer files than there are chunks."""
        try:
            with open_regular(self.path(name)) as file:
                try:
                    tensors = safetensors.torch.load_file(self.path(name))
                except (OSError, safetensors.SafetensorError):  # damaged, or on a file system that cannot map files
                    tensors = safetensors.torch.load(file.read())
            chunk = {key: tensor.numpy() for key, tensor in tensors.items()}
            chunk["addresses"] = chunk["addresses"].view(WORD)
            chunk["left_out"] = [
                (bytes.fromhex(entry["content"]), int(entry["views"]), str(entry["reader"]), str(entry["why"]))
                for entry in json.loads(chunk["left_out"].tobytes())
            ]
            shapes = [(array.dtype, array.shape) for array in (chunk["addresses"], chunk["rows"])]
            rows = len(chunk["addresses"])
            return chunk if shapes == [(WORD, (rows, 2)), (np.uint8, (rows, self.row.itemsize))] else None
        except (OSError, safetensors.SafetensorError, *OF_ANOTHER_KIND):
            return None

    def look(self) -> None:
        """Take in the chunks that have appeared since this process last looked."""
        found = [self.addresses]
        for name in sorted({path.stem for path in self.folder.glob("*.safetensors")}.difference(self._names)):
            if chunk := self.chunk(name):
                found.append(chunk["addresses"].copy())
                self.left_out += chunk["left_out"]
                self._names.append(name)
                self._starts.append(self._starts[-1] + len(found[-1]))
            else:
                log.warning("%s: damaged or not readable: its images are encoded again", self.path(name))
        self.addresses = np.concatenate(found)

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The rows with these numbers, copied into memory: {column: (B, *shape)}. UserError if they are gone."""
        found, columns = [], {}
        for row in rows.tolist():
            number = bisect.bisect_right(self._starts, row) - 1
            if number not in self._maps:
                chunk = self.chunk(self._names[number])
                if chunk is None:
                    raise UserError(f"latent cache {self.path(self._names[number])}: gone or damaged; start again")
                if len(self._maps) >= MOST_MAPS:
                    self._maps.clear()
                self._maps[number] = memoryview(chunk["rows"]).cast("B")
            found.append((self._maps[number], (row - self._starts[number]) * self.row.itemsize))
        for name, (field, offset) in self.row.fields.items():
            parts = [chunk[start + offset : start + offset + field.itemsize] for chunk, start in found]
            columns[name] = np.frombuffer(bytearray().join(parts), field.base).reshape(-1, *field.shape)
        return columns

    def __getstate__(self):
        """What a worker process needs to read rows; it makes its own maps."""
        return self.__dict__ | {"addresses": None, "left_out": None, "_maps": {}}


class CachedDataset(Dataset):
    """Training batches out of a latent cache, asked for as lists of (index, view).

    The index counts the images that are in the cache; the batch carries `latents1`, `latents2` and, where the cache has them,
    `reencoded`, `decoded` and `pixel_values`, beside what every batch has: latents in float16 and pictures in uint8, as they
    are stored, which the `Loader` widens.

    Attributes:
        images: (M,) the indices in `dataset` of the images that are in this cache. rows: (M, views) their rows' numbers.
    """

    def __init__(self, cache: LatentCache, dataset: ImageDataset, images: np.ndarray, rows: np.ndarray):
        self.cache, self.dataset, self.images, self.rows = cache, dataset, images, rows

    def __len__(self):
        return len(self.images)

    def __getitems__(self, items):
        places, views = np.array(items).T
        images, rows = self.images[places], self.rows[places, views]
        batch = {
            "index": torch.from_numpy(images),
            "path": [self.dataset.name(image) for image in images.tolist()],
            "unreadable": [],
        }
        return batch | {name: torch.from_numpy(column) for name, column in self.cache.read(rows).items()}
