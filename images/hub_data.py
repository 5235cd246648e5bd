"""Images of 🤗 `datasets` data sets: which configuration, split and column, and what each image's content is."""

from __future__ import annotations

import functools
import logging

from PIL import Image

from images.files import ImageFiles, digest_of
from utils import UserError, hub_token, one_line

log = logging.getLogger(__name__)


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
