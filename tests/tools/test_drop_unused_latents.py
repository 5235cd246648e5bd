"""tools/drop_unused_latents.py on real caches."""

import contextlib
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_photo

from cache.build import CacheOptions, cache_latents
from cache.store import today
from dataloader import ImageDataset
from images.files import list_images
from vaes.codec import Codec
from vaes.loading import load_vae_model


@pytest.fixture
def photos(tmp_path):
    folder, rng = tmp_path / "photos", np.random.default_rng(1)
    folder.mkdir()
    for number in range(4):
        make_photo(rng, (48, 40)).save(folder / f"{number}.png")
    return folder


def cached(photos, vae_folders, root):
    spaces = [Codec(load_vae_model(vae_folders[name], "vae", None, "cpu", torch.float32)) for name in ("kl4", "kl16")]
    dataset = ImageDataset(list_images(photos), 32, True, True)
    return cache_latents(dataset, *spaces, CacheOptions(root, 2, True))


def drop(root, *argv):
    from tools.drop_unused_latents import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main(["--latent_cache_dir", str(root), *argv])
    return said.getvalue()


def set_days(cache, rows, day):
    for shard in cache.shards():
        days = cache.days(shard)
        days[rows] = day
        (cache.folder / shard / "used.bin").write_bytes(days.astype("<u2").tobytes())


def size_of(root):
    return sum(file.stat().st_size for file in root.rglob("*.bin"))


def test_rows_that_no_run_wants_are_listed_and_dropped(photos, vae_folders, tmp_path):
    """Rows in use that are dropped, or come back as others'; a folder that can only grow; a listing that deletes."""
    root = tmp_path / "cache"
    data = cached(photos, vae_folders, root)
    before = data.__getitems__([(index, 1) for index in range(4)])
    set_days(data.cache, data.rows[:2].ravel(), today() - 40)
    (root / "old").mkdir()
    (root / "old" / "journal.jsonl").write_text("{}")
    data.cache._hold.close()
    size, said = size_of(root), drop(root)
    assert "8 rows" in said and "of which 4, " in said and "kl4" in said and "earlier version" in said
    drop(root, "--drop", "--unused_days", "50")
    assert size_of(root) == size
    drop(root, "--drop")
    assert "4 rows" in drop(root) and size_of(root) < 0.6 * size and (root / "old").is_dir()
    for path in sorted(photos.iterdir())[:2]:
        path.unlink()
    kept = cached(photos, vae_folders, root)
    assert not kept.cache._own  # nothing was encoded
    for name in ("latents1", "latents2", "pixel_values"):
        assert torch.equal(kept.__getitems__([(0, 1), (1, 1)])[name], before[name][2:])


USER = """
import fcntl, sys
file = open(sys.argv[1], "rb")
fcntl.flock(file, fcntl.LOCK_SH)
print(flush=True)
sys.stdin.read()
"""  # what LatentCache.hold does


def test_a_cache_in_use_is_left_alone(photos, vae_folders, tmp_path):
    """A run of weeks whose latents are deleted under its hands; one that starts while they are being deleted."""
    root = tmp_path / "cache"
    data = cached(photos, vae_folders, root)
    set_days(data.cache, slice(None), 1)
    folder = data.cache.folder
    assert "in use by a run: left alone" in drop(root, "--drop")
    data.cache._hold.close()
    user = subprocess.Popen([sys.executable, "-c", USER, str(folder / "in_use")], stdin=-1, stdout=-1)
    user.stdout.readline()
    assert "in use by a run: left alone" in drop(root, "--drop") and list(folder.glob("*/rows.bin"))
    user.communicate()
    assert "dropped: 0.0 MB" in drop(root, "--drop") and not folder.exists()
