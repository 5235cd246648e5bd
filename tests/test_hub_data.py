"""Data sets of the hub's kind: which configuration, split and column, the pixels that files give, and content."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from drawn import BLUE, PNG, RED, bands, encoded, levels, oriented, smooth_picture
from hostile import no_hang, refusal
from PIL import EpsImagePlugin, Image

from dataloader import EncodedImages, HubImages, ImageDataset, eval_loader, load_hub_split, open_stream
from images.files import ImageFiles, list_images
from utils import UserError


def test_hub_data_set_gives_the_pixels_that_files_give(tmp_path):
    """A photo that `datasets` turned upright and we turn again; a reduced decode of what is decoded already."""
    import datasets

    oriented(tmp_path / "0.jpg", np.asarray(smooth_picture(640, 320)), 6, quality=95)
    Image.fromarray(bands((255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 255, 255))).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    Image.fromarray(bands(0, 32896, 65535, np.uint16)).save(tmp_path / "3.png")
    paths = list_images(tmp_path)
    rows = [{"bytes": (tmp_path / os.path.basename(path)).read_bytes(), "path": None} for path in paths]
    data = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    from_hub, from_files = (list(eval_loader(ImageDataset(source, 24), 4, 0)) for source in (HubImages(data), paths))
    assert from_hub[0]["index"].tolist() == [0, 1, 3]
    assert torch.equal(from_hub[0]["pixel_values"], from_files[0]["pixel_values"])
    assert len(from_hub[0]["unreadable"]) == 1 and "[2]" in from_hub[0]["unreadable"][0]
    trained = [ImageDataset(source, 24, random_crop=True)[0, 1]["pixel_values"] for source in (HubImages(data), paths)]
    assert torch.equal(*trained)
    item = ImageDataset(HubImages(data), 24, random_crop=True)[2, 0]
    assert item["index"] == 3 and len(item["unreadable"]) == 1


@pytest.fixture
def hub_folder(tmp_path):
    """A data set folder as the hub has them: parquet files per split, the image column named `picture` beside others."""
    import datasets

    folder = tmp_path / "data set"
    folder.mkdir()
    features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
    for split, colour, count in (("train", RED, 3), ("validation", BLUE, 2)):
        rows = [{"bytes": encoded("PNG", Image.new("RGB", (8, 8), colour)), "path": None}] * count
        data = datasets.Dataset.from_dict({"label": list(range(count)), "picture": rows}, features=features)
        data.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_hub_data_set_gives_the_split_and_column_asked_for(hub_folder, tmp_path, train):
    """Judging on training images since the splits are not known before the first download; a column of another name."""
    data = load_hub_split(str(hub_folder), train, "--flag", str(tmp_path / "cache"))
    assert data.split.column_names == ["picture"] and len(data) == (3 if train else 2)
    assert (levels(ImageDataset(data, 8)[0]["pixel_values"]) == (RED if train else BLUE)).all()


def test_images_of_a_hub_data_set_are_known_by_their_content(hub_folder, tmp_path):
    """A latent cache that is built anew in every run, or for every row when one is added."""
    first, again = (load_hub_split(str(hub_folder), True, "--flag", str(tmp_path / "cache")) for _ in range(2))
    assert [first.stamp(index) for index in range(3)] == [again.stamp(index) for index in range(3)]
    assert len({first.stamp(index) for index in range(3)}) == 3
    (tmp_path / "red.png").write_bytes(encoded("PNG", Image.new("RGB", (8, 8), RED)))
    assert first.content(2) == ImageFiles([str(tmp_path / "red.png")]).content(0)


def rows_as_parquet(folder, rows):
    """A data set in `folder` whose table holds these {bytes, path} as they are."""
    import datasets

    table = pa.table({"image": pa.array(rows, datasets.Image().pa_type)})
    about = {"info": {"features": {"image": {"_type": "Image"}}}}
    folder.mkdir(exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), folder / "train.parquet")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_opens_no_file_outside_its_data_set(tmp_path, streaming, monkeypatch):
    """A stranger's table that has any file of the user read, a URL fetched or a PostScript program executed; pictures beside
    their table that cannot be read."""
    secret, home = tmp_path / "secret.png", tmp_path / "photos"
    secret.write_bytes(PNG)
    good = [{"bytes": None, "path": path} for path in ("a.png", str(home / "a.png"))] + [{"bytes": PNG, "path": "/etc/passwd"}]
    bad = [str(secret), "../secret.png", "link.png", "http://127.0.0.1:9/a.png", f"zip://a.png::{secret}", f"file://{secret}"]
    bad += [f"{home}/../secret.png", f"file://{secret}::{home}/a.png", "pipe.png", str(tmp_path / "photos_of_others.png")]
    bad = [{"bytes": None, "path": path} for path in bad] + [{"bytes": encoded("EPS"), "path": None}]
    rows_as_parquet(home, good + bad)
    (home / "a.png").write_bytes(PNG)
    (home / "link.png").symlink_to(secret)
    os.mkfifo(home / "pipe.png")
    (tmp_path / "photos_of_others.png").write_bytes(PNG)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)
    if streaming:
        stream = open_stream(str(home), "--flag")
        source = EncodedImages([stream.image_of(row, number) for number, row in enumerate(stream.data)])
    else:
        source = load_hub_split(str(home), True, "--flag", str(tmp_path / "cache"))
    assert len(source) == len(good + bad)
    dataset = ImageDataset(source, 8)
    with no_hang():
        assert [dataset[index]["pixel_values"] is not None for index in range(len(dataset))] == [True] * 3 + [False] * len(bad)
    assert "outside the data set" in dataset[3]["unreadable"][0] and "a pipe" in dataset[11]["unreadable"][0]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_table_that_is_cut_short_is_left_out(tmp_path, broken):
    """A data set of a hundred files of which one stops the run, streamed or not."""
    home = tmp_path / "photos"
    for number in range(2):
        rows_as_parquet(home, [{"bytes": PNG, "path": None}] * 3)
        (home / "train.parquet").rename(home / f"train-{number}.parquet")
    (home / f"train-{broken}.parquet").write_bytes((home / "train-0.parquet").read_bytes()[:200])
    assert len(list(open_stream(str(home), "--flag").data)) == 3
    assert len(load_hub_split(str(home), True, "--flag", str(tmp_path / "cache"))) == 3


def test_data_set_without_images_is_one_line(tmp_path):
    """A traceback from the first batch."""
    import datasets

    (tmp_path / "words").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "words" / "train.parquet"))
    with pytest.raises(UserError, match=r"^--flag .*no image column.* its columns are text \(string\)$"):
        load_hub_split(str(tmp_path / "words"), True, "--flag", str(tmp_path / "cache"))


def test_the_column_called_image_is_used_whatever_comes_before_it(tmp_path):
    """Training on masks or conditioning pictures since they are the first column."""
    import datasets

    names = {"mask": "black", "conditioning_image": "blue", "image": "red"}
    rows = {name: [{"bytes": encoded("PNG", Image.new("RGB", (8, 8), colour)), "path": None}] for name, colour in names.items()}
    features = datasets.Features(dict.fromkeys(names, datasets.Image()))
    folder = tmp_path / "masked photos"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "train.parquet"))
    data = load_hub_split(str(folder), True, "--flag", str(tmp_path / "cache"))
    assert ImageDataset(data, 8).open(0).getpixel((0, 0)) == RED


def test_a_configuration_of_a_data_set_can_be_chosen(hub_folder, tmp_path):
    """A data set that demands a choice which no flag can make."""
    (hub_folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: full\n  data_files: train*\n- config_name: small\n  data_files: valid*\n---\n"
    )
    name, cache = str(hub_folder), str(tmp_path / "cache")
    refusal(lambda: load_hub_split(name, True, "--flag", cache), f"{name}:full, {name}:small")
    assert len(load_hub_split(f"{name}:small", True, "--flag", cache)) == 2
