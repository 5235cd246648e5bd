"""The latent cache: the same training as without it, nothing stale, nothing broken by a kill, a race or a full disk."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, as_argv, child_environment, make_photo, run_script
from hostile import refusal
from runs import QUIET, train

import train_align_with_args as train_script
from cache import contents as contents_of_images
from cache import store as latent_cache
from cache.build import CHUNK_IMAGES, CacheOptions, LatentEncoder, cache_latents
from dataloader import ImageDataset
from images import files
from images.decoding import to_pixel_values
from images.files import list_images
from utils import UserError
from vaes.codec import Codec
from vaes.loading import load_vae_model


@pytest.fixture
def spaces(vae_folders):
    return [Codec(load_vae_model(vae_folders[name], "vae", None, "cpu", torch.float32)) for name in ("kl4", "kl16")]


@pytest.fixture
def photos(tmp_path):
    """A folder of 6 small photos that a test may change."""
    folder, rng = tmp_path / "photos", np.random.default_rng(1)
    folder.mkdir()
    for number in range(6):
        make_photo(rng, (48, 40)).save(folder / f"{number}.png")
    return folder


def cached(photos, spaces, root, views=2, seed=0, size=32, with_images=False, workers=0):
    dataset = ImageDataset(list_images(photos), size, True, True, seed)
    options = CacheOptions(root, views, with_images, reencoded=with_images, decoded=with_images)
    return cache_latents(dataset, *spaces, options, workers)


def test_cached_and_online_training_agree(flags, tmp_path):
    """Catches a cache that stores other views, another order, or latents of another convention than online training."""
    curves = {}
    for name, extra in (("cached", {}), ("online", {"no_cache_latents": True})):
        run = train(flags | QUIET, tmp_path / name, max_train_steps=12, epochs=50, cache_views=2, **extra)
        curves[name] = run.scalars["train/loss"]
    assert len(curves["cached"]) == 12
    assert np.allclose(curves["cached"], curves["online"], rtol=2e-3)


def test_rows_are_the_views_encoded(photos, spaces, tmp_path, spawned):
    """Catches rows stored in another order than (image, view), float16 used for raw instead of scaled latents, and what a
    worker lacks that is no fork."""
    data = cached(photos, spaces, tmp_path / "cache", with_images=True, workers=1)
    batch = data.__getitems__([(4, 1), (0, 0)])
    for row, (index, view) in enumerate([(4, 1), (0, 0)]):
        photo = data.dataset
        pixels = to_pixel_values(photo.crop(photo.open(index), photo.content(index), view))
        assert torch.equal(batch["pixel_values"][row], pixels)
        for name, space in (("latents1", spaces[0]), ("latents2", spaces[1])):
            assert torch.allclose(batch[name][row], space.encode(pixels[None])[0], atol=2e-3)
        picture = spaces[0].decode(batch["latents1"][row][None]).clamp(-1, 1)
        assert torch.allclose(batch["reencoded"][row], spaces[1].encode(picture)[0], atol=2e-3)
        assert torch.allclose(batch["decoded"][row], picture[0], atol=1.01 / 255)  # half a level of 8 bits


@pytest.fixture
def encoded(monkeypatch):
    """A list of how many images each build has encoded."""
    counts = []
    encode = LatentEncoder.encode

    def counted(encoder, missing, *rest, **options):
        counts.append(sum(map(len, missing.values())))
        return encode(encoder, missing, *rest, **options)

    monkeypatch.setattr(LatentEncoder, "encode", counted)
    return counts


def test_only_what_is_new_is_encoded(photos, spaces, tmp_path, encoded, monkeypatch):
    """A cache that is built anew for one more photo in the middle, a touched, renamed or copied file, another spelling of the
    path; rows that belong to another image since the order changed."""
    monkeypatch.chdir(tmp_path)
    first = cached(photos, spaces, "cache").__getitems__([(index, 1) for index in range(6)])
    for change in (
        lambda: None,
        lambda: [os.utime(path, ns=(1, 1)) for path in photos.iterdir()],
        lambda: shutil.copy(photos / "1.png", photos / "z.png"),
        lambda: shutil.copytree(photos, tmp_path / "copy"),
    ):
        change()
        for place in ("photos", "./photos/", photos, *tmp_path.glob("copy")):
            data = cached(place, spaces, "cache")
    assert encoded == [6]
    make_photo(np.random.default_rng(7), (48, 40)).save(photos / "3b.png")
    (photos / "5.png").rename(photos / "3a.png")
    data = cached(photos, spaces, "cache")
    assert encoded == [6, 1]
    again = data.__getitems__([(place, 1) for place in (0, 1, 2, 3, 6, 4, 7)])
    assert torch.equal(again["latents2"][:6], first["latents2"][[0, 1, 2, 3, 4, 5]])
    assert torch.equal(again["latents2"][6], first["latents2"][1])  # the copy
    data = cached(photos, spaces, "cache", views=3)
    assert encoded == [6, 1, 7]
    assert torch.equal(data.__getitems__([(0, 1)])["latents2"][0], first["latents2"][0])


def test_what_a_row_depends_on_is_encoded_anew(photos, spaces, vae_folders, tmp_path, encoded):
    """Catches an address that forgets seed, size, VAE weights, or the content of a file whose size and time are as before."""
    root = tmp_path / "cache"
    cached(photos, spaces, root)
    cached(photos, spaces, root, seed=1)
    cached(photos, spaces, root, size=40)
    other = vae_folders["kl4"].parent / "kl4_changed"
    shutil.copytree(vae_folders["kl4"], other, dirs_exist_ok=True)
    weights = bytearray((other / "diffusion_pytorch_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    changed = Codec(load_vae_model(other, "vae", None, "cpu", torch.float32))
    cached(photos, [changed, spaces[1]], root)
    assert encoded == [6] * 4
    before = (photos / "3.png").stat()
    with open(photos / "3.png", "r+b") as file:  # the last byte of a checksum that Pillow does not look at
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    os.utime(photos / "3.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (photos / "3.png").stat().st_size == before.st_size
    cached(photos, spaces, root)
    assert encoded == [6] * 4 + [1]


def test_an_unchanged_file_is_not_read_again(photos, spaces, tmp_path, monkeypatch):
    """A warm start that reads every photo; a file that changed within one tick of the clock, taken for the old one; notes of
    what was read that pile up, or are trusted where they are cut short."""
    monkeypatch.setattr(files, "SETTLED", 3600.0)
    cached(photos, spaces, tmp_path / "cache")
    read, content = [], files.ImageFiles.content
    monkeypatch.setattr(files.ImageFiles, "content", lambda source, index: read.append(index) or content(source, index))
    notes = tmp_path / "cache" / "contents"

    def images_read(settled):
        del read[:]
        monkeypatch.setattr(files, "SETTLED", settled)
        cached(photos, spaces, tmp_path / "cache")
        return len(read)

    # just changed; not just changed, but not noted yet; noted
    assert [images_read(settled) for settled in (3600.0, -3600.0, -3600.0)] == [6, 6, 0]
    for number in range(contents_of_images.MOST_FILES + 1):
        (notes / f"{number}.bin").write_bytes(bytes(33))
    assert [images_read(-3600.0) for _ in range(2)] == [0, 0]
    assert len(list(notes.iterdir())) == 1


def test_a_complete_cache_needs_no_vae(photos, vae_folders, tmp_path):
    """Catches a second run that loads the VAEs, or encodes, although everything is there."""
    for expected in (True, False):
        vaes = [load_vae_model(vae_folders[name], "vae", None, "cpu", torch.float32) for name in ("kl4", "kl16")]
        cached(photos, [Codec(vae) for vae in vaes], tmp_path / "cache")
        assert [vae.loaded for vae in vaes] == [expected] * 2


def test_training_on_cached_latents_loads_no_vae(flags, tmp_path):
    """Catches a loop, a checkpoint or a setup that touches a VAE although the module takes latents and they are cached."""
    argv = as_argv(flags | {"input_types": "latent", "max_train_steps": 3, "eval_frequency": 0, "visualize_frequency": 0})
    args = train_script.parse_args(argv)
    for expected in (True, False):
        vaes = [load_vae_model(path, "vae", None, "cpu", torch.float32) for path in (args.vae1_path, args.vae2_path)]
        loaders = train_script.create_data_loaders(args, *vaes)
        assert train_script.train_align_pipeline(args, *vaes, *loaders, torch.Generator()).is_file()
        assert [vae.loaded for vae in vaes] == [expected] * 2


def test_unreadable_and_infinite_are_left_out_and_named(photos, spaces, tmp_path, caplog):
    """Catches a bad file, or a latent beyond float16, that ends up as zeros or infinities in training."""
    (photos / "2.png").write_bytes(b"not a picture")
    encode = spaces[1].encode

    def overflowing(images, *rest):
        latents = encode(images, *rest)
        latents[0] *= 1e6 if overflowing.calls == 0 else 1
        overflowing.calls += 1
        return latents

    overflowing.calls = 0
    spaces[1].encode = overflowing
    data = cached(photos, spaces, tmp_path / "cache")
    assert data.images.tolist() == [1, 3, 4, 5]
    assert "2.png" in caplog.text and "0.png" in caplog.text and "not finite" in caplog.text


def cache_command(flags, photos, root):
    argv = as_argv(flags | {"train_data_dir": photos, "latent_cache_dir": root, "cache_views": 2, "cache_only": True})
    return [sys.executable, str(ROOT / "train_align_with_args.py"), *argv]


@pytest.fixture
def many_photos(tmp_path):
    folder, rng = tmp_path / "many", np.random.default_rng(2)
    folder.mkdir()
    for number in range(5 * CHUNK_IMAGES + 3):
        make_photo(rng, (40, 40)).save(folder / f"{number:03d}.png")
    return folder


def rows_of(root):
    """{address: its row in every column} of the one cache below `root`; no address is there twice."""
    (about,) = root.glob("*/about.json")
    columns = {name: (tuple(shape), dtype) for name, (shape, dtype) in json.loads(about.read_text())["columns"].items()}
    cache = latent_cache.LatentCache(root, about.parent.name, columns)
    addresses = np.concatenate([cache.addresses(shard) for shard in cache.shards()])
    found = cache.find(addresses)
    assert len({tuple(address) for address in addresses.tolist()}) == len(addresses)
    return {
        tuple(address): [column.tobytes() for column in cache.read(np.array([row])).values()]
        for address, row in zip(addresses.tolist(), found)
    }


def test_two_runs_finish_a_killed_build_together(flags, many_photos, tmp_path):
    """Catches a build that starts over or keeps half-written rows as done; rows that two runs encode, or that one corrupts."""
    root = tmp_path / "killed"
    argv = cache_command(flags, many_photos, root)[2:]
    # a chunk is flushed in four files, after one about the cache, so that this one dies in its third
    died = run_script("tests/mortal.py", "addresses", "11", "--", *argv, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    (shard,) = (file.parent for file in root.glob("*/*/rows.bin"))
    with open(shard / "rows.bin", "ab") as file:
        assert file.tell() == 2 * 2 * CHUNK_IMAGES * 16
        file.write(b"half of it")  # as if the kill had come in the middle of an address

    command = cache_command(flags, many_photos, root)
    processes = [subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    messages = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], messages
    whole = tmp_path / "whole"
    train_script.main(cache_command(flags, many_photos, whole)[2:])
    assert len(rows_of(root)) == 2 * (5 * CHUNK_IMAGES + 3)
    assert rows_of(root) == rows_of(whole)


def test_a_full_disk_is_one_clear_error(photos, spaces, tmp_path, monkeypatch):
    """Catches a full disk that shows as a traceback, or as a cache that calls itself complete."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"^latent_cache_dir .*lower cache_views"):
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        cached(photos, spaces, tmp_path / "cache")

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="the disk is full"):
        patch.setattr(os, "fsync", no_space)
        cached(photos, spaces, tmp_path / "cache")
    data = cached(photos, spaces, tmp_path / "cache")
    assert len(data) == 6


def test_a_complete_cache_is_read_where_nothing_can_be_written(photos, spaces, tmp_path, monkeypatch):
    """A colleague's finished cache, on a disk that is read-only here, refused; an unfinished one must be, in one line."""
    cached(photos, spaces, tmp_path / "cache")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("cache.store.tempfile.TemporaryFile", refuse)
    assert len(cached(photos, spaces, tmp_path / "cache")) == 6
    refusal(lambda: cached(photos, spaces, tmp_path / "cache", seed=1), "latent_cache_dir", "Read-only", "no complete cache")


@pytest.mark.parametrize("what", ["locks", "maps"])
def test_a_cache_needs_neither_locks_nor_memory_maps(photos, spaces, tmp_path, monkeypatch, what):
    """A traceback on network file systems that know no flock; "damaged" on those that cannot map a file."""

    def refuse(*_, **__):
        raise OSError({"locks": errno.ENOLCK, "maps": errno.ENODEV}[what], "not here")

    whole = cached(photos, spaces, tmp_path / "a").__getitems__([(0, 0), (5, 1)])
    monkeypatch.setattr(*{"locks": ("fcntl.lockf", refuse), "maps": (np, "memmap", refuse)}[what])
    again = cached(photos, spaces, tmp_path / "b").__getitems__([(0, 0), (5, 1)])
    assert torch.equal(whole["latents2"], again["latents2"])
