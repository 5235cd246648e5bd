"""Chunks of a latent cache that several processes encode at once: real processes, real locks, real kills."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_photo

from cache import build as encode_once
from cache import claims as claims_module
from cache.build import CacheOptions, cache_latents
from cache.claims import ChunkClaims
from dataloader import ImageDataset
from images.files import list_images
from vaes.codec import Codec
from vaes.loading import load_vae_model

HOLDER = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX, 1, 1)
print(flush=True)
if sys.stdin.readline():
    os.pwrite(file, b"\\1", 1)
"""  # claims the second chunk; finishes it when it is given a line, and dies without


def start_holder(path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=-1, stdout=-1, text=True)
    holder.stdout.readline()
    return holder


@pytest.fixture
def pair(tmp_path):
    """(claims on three chunks, a process that has claimed the second one)."""
    holder = start_holder(tmp_path / "set.claims")
    with ChunkClaims(tmp_path / "set.claims") as claims:
        claims.look(3)
        yield claims, holder
    holder.kill()
    holder.communicate()


def test_what_another_has_claimed_or_finished_is_not_encoded_again(pair, tmp_path):
    """Chunks that two runs encode; counts of an earlier build, such as one whose rows were deleted, that are taken for news."""
    claims, holder = pair
    held = []
    assert list(claims.taken([0, 1, 2], held)) == [0, 2] and held == [1]
    holder.communicate("finish\n")
    assert claims.left_undone(held) == [] and list(claims.taken(held, [])) == []
    claims.look(3)
    assert list(claims.taken(held, [])) == [1]


@pytest.mark.parametrize("end", ["finish\n", ""])
def test_one_that_works_is_waited_for(pair, monkeypatch, caplog, end):
    """A chunk that is encoded twice since its claimer takes longer than the other's patience; one of a dead claimer that nobody
    encodes."""
    claims, holder = pair
    looks = []

    def look(seconds):
        looks.append(seconds)
        claims.show_life()
        os.utime(claims._file, ns=(len(looks), len(looks)))
        if len(looks) == 8:
            holder.communicate(end)

    monkeypatch.setattr(claims_module.time, "sleep", look)
    monkeypatch.setattr(claims_module, "STALE", 2 * claims_module.POLL)
    assert claims.left_undone([1]) == ([] if end else [1])
    assert len(looks) == 8 and "have done nothing" not in caplog.text
    assert list(claims.taken([1], [])) == ([] if end else [1])


def test_what_one_that_stands_still_has_claimed_is_encoded_last(vae_folders, tmp_path, monkeypatch, caplog):
    """A run that waits for ever for one that was stopped (Ctrl-Z) while it built the cache, or that waits although there is
    something to encode meanwhile."""
    monkeypatch.setattr(encode_once, "CHUNK_IMAGES", 2)
    monkeypatch.setattr(claims_module, "STALE", 3 * claims_module.POLL)
    monkeypatch.setattr(claims_module.time, "sleep", lambda seconds: None)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(1)
    for number in range(6):
        make_photo(rng, (48, 40)).save(tmp_path / "photos" / f"{number}.png")
    spaces = [Codec(load_vae_model(vae_folders[name], "vae", None, "cpu", torch.float32)) for name in ("kl4", "kl16")]

    def cached(root):
        dataset = ImageDataset(list_images(tmp_path / "photos"), 32, True, True)
        return cache_latents(dataset, *spaces, CacheOptions(root, 1))

    cached(tmp_path / "alone")
    (path,) = (file.relative_to(tmp_path / "alone") for file in (tmp_path / "alone").rglob("*.claims"))
    (tmp_path / "cache" / path).parent.mkdir(parents=True)
    holder = start_holder(tmp_path / "cache" / path)
    holder.send_signal(signal.SIGSTOP)
    try:
        data = cached(tmp_path / "cache")
    finally:
        holder.kill()
        holder.communicate()
    assert data.rows[:, 0].tolist() == [0, 1, 4, 5, 2, 3] and "have done nothing" in caplog.text
