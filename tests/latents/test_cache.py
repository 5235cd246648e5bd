"""The latent cache: the same training as without it, nothing stale, nothing broken by a kill, a race or a full disk."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, as_argv, make_photo, read_scalars, run_script
from hostile import refusal

import dataloader
import train_align_with_args as train_script
from latents import cache as latent_cache
from latents.encode_once import CacheOptions, cache_latents
from latents.spaces import Codec
from latents.vaes import load_vae_model
from utils import UserError


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


def cached(photos, spaces, root, views=2, seed=0, size=32, with_images=False):
    dataset = dataloader.ImageDataset(dataloader.list_images(photos), size, True, True, seed)
    return cache_latents(dataset, *spaces, CacheOptions(root, views, with_images))


def test_cached_and_online_training_agree(flags, tmp_path):
    """Catches a cache that stores other views, another order, or latents of another convention than online training."""
    curves = {}
    for name, extra in (("cached", {}), ("online", {"no_cache_latents": True})):
        run = flags | {"log_dir": tmp_path / name, "latent_cache_dir": tmp_path / "cache", "max_train_steps": 12, **extra}
        run |= {"epochs": 50, "eval_frequency": 0, "visualize_frequency": 0, "cache_views": 2}
        run_script("train_align_with_args.py", *as_argv(run))
        curves[name] = read_scalars(tmp_path / name)["train/loss"]
    assert len(curves["cached"]) == 12
    assert np.allclose(curves["cached"], curves["online"], rtol=2e-3)


def test_rows_are_the_views_encoded(photos, spaces, tmp_path):
    """Catches rows stored in another order than (image, view), and float16 used for raw instead of scaled latents."""
    data = cached(photos, spaces, tmp_path / "cache", with_images=True)
    batch = data.__getitems__([(4, 1), (0, 0)])
    for row, (index, view) in enumerate([(4, 1), (0, 0)]):
        pixels = dataloader.to_pixel_values(data.dataset.crop(data.dataset.open(index), index, view))
        assert torch.equal(batch["pixel_values"][row], pixels)
        for name, space in (("latents1", spaces[0]), ("latents2", spaces[1])):
            assert torch.allclose(batch[name][row], space.encode(pixels[None])[0], atol=2e-3)


def test_any_change_gives_another_cache(photos, spaces, vae_folders, tmp_path):
    """Catches a key that forgets views, seed, size, VAE weights, or the files' content."""
    root = tmp_path / "cache"
    folders = [cached(photos, spaces, root).cache.folder]
    assert cached(photos, spaces, root).cache.folder == folders[0]
    folders.append(cached(photos, spaces, root, views=3).cache.folder)
    folders.append(cached(photos, spaces, root, seed=1).cache.folder)
    folders.append(cached(photos, spaces, root, size=40).cache.folder)
    other = vae_folders["kl4"].parent / "kl4_changed"
    shutil.copytree(vae_folders["kl4"], other, dirs_exist_ok=True)
    weights = bytearray((other / "diffusion_pytorch_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    changed = Codec(load_vae_model(other, "vae", None, "cpu", torch.float32))
    folders.append(cached(photos, [changed, spaces[1]], root).cache.folder)
    os.utime(photos / "3.png", ns=(1, 1))
    folders.append(cached(photos, spaces, root).cache.folder)
    (photos / "3.png").unlink()
    folders.append(cached(photos, spaces, root).cache.folder)
    assert len(set(folders)) == len(folders)


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
    for number in range(5 * latent_cache.CHUNK_IMAGES + 3):
        make_photo(rng, (40, 40)).save(folder / f"{number:03d}.png")
    return folder


def contents(root):
    (folder,) = root.iterdir()
    assert (folder / "complete.json").is_file()
    return {file.name: file.read_bytes() for file in folder.glob("*.bin")}


def test_a_killed_build_goes_on_and_two_at_once_agree(flags, many_photos, tmp_path):
    """Catches a build that starts over, keeps half-written rows as done, or is corrupted by a second run."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    root = tmp_path / "killed"
    argv = cache_command(flags, many_photos, root)[2:]
    # a chunk is flushed in four files, so that this one dies in its third
    died = run_script("tests/mortal.py", "journal", "10", "--", *argv, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    (folder,) = root.iterdir()
    assert (folder / "journal.jsonl").read_text().count('"chunk"') == 2 and not (folder / "complete.json").exists()
    with open(folder / "journal.jsonl", "a") as file:
        file.write('\n{"chunk": 5, "left')  # as if the kill had come in the middle of a line

    first, second = tmp_path / "together", tmp_path / "together"
    commands = [cache_command(flags, many_photos, place) for place in (root, first, second)]
    processes = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for command in commands]
    messages = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], messages
    assert contents(root) == contents(first)
    assert (folder / "journal.jsonl").read_text().count('"left_out"') == 6  # no chunk was done twice


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

    for place in ("latents.cache.tempfile.TemporaryFile", "filelock.FileLock.acquire"):
        monkeypatch.setattr(place, refuse)
    assert len(cached(photos, spaces, tmp_path / "cache")) == 6
    refusal(lambda: cached(photos, spaces, tmp_path / "cache", seed=1), "latent_cache_dir", "Read-only", "no complete cache")


@pytest.mark.parametrize("what", ["locks", "maps"])
def test_a_cache_needs_neither_locks_nor_memory_maps(photos, spaces, tmp_path, monkeypatch, what):
    """A traceback on network file systems that know no flock; "damaged" on those that cannot map a file."""

    def refuse(*_, **__):
        raise OSError({"locks": errno.ENOLCK, "maps": errno.ENODEV}[what], "not here")

    whole = cached(photos, spaces, tmp_path / "a").__getitems__([(0, 0), (5, 1)])
    monkeypatch.setattr(*{"locks": ("filelock.FileLock.acquire", refuse), "maps": (np, "memmap", refuse)}[what])
    again = cached(photos, spaces, tmp_path / "b").__getitems__([(0, 0), (5, 1)])
    assert torch.equal(whole["latents2"], again["latents2"])
