"""The latent cache: the same training as without it, nothing stale, nothing broken by a kill, a race or a full disk."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import safetensors.numpy
import torch
from conftest import ROOT, as_argv, child_environment, make_photo, run_script
from filelock import FileLock
from hostile import no_hang, refusal

import train_align_with_args as train_script
from cache import build
from cache.build import ENCODE_BATCH, CacheOptions, ChunkLocks, LatentEncoder, cache_latents
from cache.read import LatentCache
from dataloader import ImageDataset, widened
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


def cached(photos, spaces, root, views=2, seed=0, size=32, with_images=False, workers=0, accelerator=None):
    dataset = ImageDataset(list_images(photos), size, True, True, seed)
    options = CacheOptions(root, views, with_images, reencoded=with_images, decoded=with_images)
    return cache_latents(dataset, *spaces, options, workers, accelerator)


def test_rows_are_the_views_encoded(photos, spaces, tmp_path, spawned):
    """Catches rows stored in another order than (image, view), float16 used for raw instead of scaled latents, rows that are
    widened before they are on the device, and what a worker lacks that is no fork."""
    data = cached(photos, spaces, tmp_path / "cache", with_images=True, workers=1)
    stored = data.__getitems__([(4, 1), (0, 0)])
    assert stored["latents1"].dtype == torch.float16 and stored["pixel_values"].dtype == torch.uint8
    batch = widened(stored)
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
    counts, built = [], LatentEncoder.build

    def counted(encoder, missing, *place):
        counts.append(sum(map(len, missing.values())))
        return built(encoder, missing, *place)

    monkeypatch.setattr(LatentEncoder, "build", counted)
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
    """A warm start that reads every photo; a file that changed within one tick of the clock, taken for the old one; a traceback
    where the list of what was read is damaged."""
    monkeypatch.setattr(files, "SETTLED", 3600.0)
    cached(photos, spaces, tmp_path / "cache")
    read, content = [], files.ImageFiles.content
    monkeypatch.setattr(files.ImageFiles, "content", lambda source, index: read.append(index) or content(source, index))

    def images_read(settled):
        del read[:]
        monkeypatch.setattr(files, "SETTLED", settled)
        cached(photos, spaces, tmp_path / "cache")
        return len(read)

    # just changed; not just changed, but not noted yet; noted
    assert [images_read(settled) for settled in (3600.0, -3600.0, -3600.0)] == [6, 6, 0]
    (tmp_path / "cache" / "contents.npy").write_bytes(b"half of it")
    assert [images_read(-3600.0) for _ in range(2)] == [6, 0]


def test_training_on_cached_latents_loads_no_vae(flags, tmp_path):
    """Catches a loop, a checkpoint or a setup that touches a VAE although the module takes latents and they are cached;
    workers for what is only read."""
    argv = as_argv(flags | {"input_types": "latent", "max_train_steps": 3, "eval_frequency": 0, "visualize_frequency": 0})
    args = train_script.parse_args(argv)
    for expected in (True, False):
        vaes = [load_vae_model(path, "vae", None, "cpu", torch.float32) for path in (args.vae1_path, args.vae2_path)]
        loaders = train_script.create_data_loaders(args, *vaes)
        assert train_script.train_align_pipeline(args, *vaes, *loaders, torch.Generator()).is_file()
        assert [vae.loaded for vae in vaes] == [expected] * 2
    args.num_workers = 2
    assert train_script.create_data_loaders(args, *vaes)[0].num_workers == 0


def test_unreadable_and_infinite_are_left_out_and_named(photos, spaces, tmp_path, caplog, encoded):
    """Catches a bad file, or a latent beyond float16, that becomes zeros or infinities in training or is tried in each run."""
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
    (photos / "6.png").write_bytes(b"no picture either")  # a chunk without rows
    for _ in range(2):
        assert cached(photos, spaces, tmp_path / "cache").images.tolist() == [1, 3, 4, 5]
    assert encoded == [6, 1]


def rows_of(root):
    """{address: its row in every column} of the one cache below `root`; no address is there twice."""
    (about,) = root.glob("*/about.json")
    columns = json.loads(about.read_text())["columns"]
    cache = LatentCache(about.parent, np.dtype([(name, kind, tuple(shape)) for name, kind, shape in columns]))
    cache.look()
    addresses = list(map(tuple, cache.addresses.tolist()))
    assert len(set(addresses)) == len(addresses)
    rows = [cache.read(np.array([row])) for row in range(len(addresses))]
    return {address: [column.tobytes() for column in row.values()] for address, row in zip(addresses, rows)}


CHUNK = ENCODE_BATCH // 2  # images of two views each that make a chunk of a small set


def test_two_runs_finish_a_killed_build_together(flags, tmp_path):
    """Catches a build that starts over or takes a half-written chunk for a whole one; rows that two runs encode, or that one
    corrupts; locks and temporary files that pile up."""
    (tmp_path / "many").mkdir()
    rng = np.random.default_rng(2)
    for number in range(5 * CHUNK + 3):
        make_photo(rng, (40, 40)).save(tmp_path / "many" / f"{number:03d}.png")
    root, whole = tmp_path / "killed", tmp_path / "whole"
    flags |= {"train_data_dir": tmp_path / "many", "cache_views": 2, "cache_only": True}
    argv = as_argv(flags | {"latent_cache_dir": root})
    died = run_script("tests/mortal.py", "cache", "3", "--", *argv, check=False)  # while it writes its third chunk
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert len(rows_of(root)) == 2 * 2 * CHUNK

    command = [sys.executable, str(ROOT / "train_align_with_args.py"), *argv]
    processes = [subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    messages = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], messages
    train_script.main(as_argv(flags | {"latent_cache_dir": whole}))
    assert len(rows_of(root)) == 2 * (5 * CHUNK + 3)
    assert rows_of(root) == rows_of(whole)
    assert not list(root.rglob("*.lock"))


def test_a_full_disk_is_one_clear_error(photos, spaces, tmp_path, monkeypatch):
    """Catches a full disk that shows as a traceback, or as a cache that calls itself complete."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"^latent_cache_dir .*lower cache_views"):
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        cached(photos, spaces, tmp_path / "cache")

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="the disk is full"):
        patch.setattr(build, "atomic_file", no_space)
        cached(photos, spaces, tmp_path / "cache")
    data = cached(photos, spaces, tmp_path / "cache")
    assert len(data) == 6


def test_what_was_encoded_before_ctrl_c_is_kept(photos, spaces, tmp_path, monkeypatch, encoded):
    """Minutes of encoding lost, under words that promise to keep them."""
    encode, calls = LatentEncoder._encode_batch, []

    def interrupted(encoder, items):
        calls.append(items)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(encoder, items)

    monkeypatch.setattr(build, "ENCODE_BATCH", 4)  # two images of two views
    monkeypatch.setattr(LatentEncoder, "_encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(photos, spaces, tmp_path / "cache")
    assert len(cached(photos, spaces, tmp_path / "cache")) == 6 and encoded == [6, 2]


def test_a_chunk_is_written_while_the_next_is_encoded(photos, spaces, tmp_path, monkeypatch):
    """A device that waits for each chunk to be on the disk."""
    encoded, encode, write = threading.Semaphore(0), LatentEncoder._encode_batch, LatentEncoder._write
    in_time = []

    def counted(encoder, items):
        encoded.release()
        return encode(encoder, items)

    def waiting(encoder, *chunk):
        in_time.append(all(encoded.acquire(timeout=60) for _ in range(1 + (len(in_time) == 0))))
        write(encoder, *chunk)

    monkeypatch.setattr(build, "CHUNK_IMAGES", 1)
    monkeypatch.setattr(LatentEncoder, "_encode_batch", counted)
    monkeypatch.setattr(LatentEncoder, "_write", lambda *given: waiting(*given) if len(in_time) < 5 else write(*given))
    assert len(cached(photos, spaces, tmp_path / "cache")) == 6
    assert in_time == [True] * 5


def test_a_complete_cache_is_read_where_nothing_can_be_written(photos, spaces, tmp_path, monkeypatch):
    """A colleague's finished cache, on a disk that is read-only here, refused; an unfinished one must be, in one line."""
    cached(photos, spaces, tmp_path / "cache")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(build, "write_json", refuse)
    assert len(cached(photos, spaces, tmp_path / "cache")) == 6
    refusal(lambda: cached(photos, spaces, tmp_path / "cache", seed=1), "latent_cache_dir", "Read-only", "no complete cache")


@pytest.mark.parametrize("what", ["locks", "maps"])
def test_a_cache_needs_neither_locks_nor_memory_maps(photos, spaces, tmp_path, monkeypatch, what):
    """A traceback on network file systems that know no flock; "damaged" on those that cannot map a file."""

    def refuse(*_, **__):
        raise OSError({"locks": errno.ENOLCK, "maps": errno.ENODEV}[what], "not here")

    whole = cached(photos, spaces, tmp_path / "a").__getitems__([(0, 0), (5, 1)])
    monkeypatch.setattr(*{"locks": ("fcntl.flock", refuse), "maps": ("safetensors.torch.load_file", refuse)}[what])
    again = cached(photos, spaces, tmp_path / "b").__getitems__([(0, 0), (5, 1)])
    assert torch.equal(whole["latents2"], again["latents2"])


# ----------------------------------------------------------------------------------------------------------------------
# Chunks that several processes encode at once; a lock that is opened twice counts as that of another process


def test_one_that_works_is_waited_for(tmp_path, monkeypatch, caplog):
    """A chunk that is encoded twice since its claimer takes longer than the other's patience; a chunk that nobody encodes since
    its claimer has failed; one that is taken to stand still, as it shows no life for chunks that it has only claimed so far."""
    holder, locks, looks = FileLock(tmp_path / "chunk.lock"), ChunkLocks(tmp_path), []
    holder.acquire()

    def sleep(_):
        looks.append(1)
        os.utime(tmp_path / "chunk.lock", ns=(len(looks), len(looks)))  # as `show_life` of the holder does
        if len(looks) == 8:
            holder.release()

    monkeypatch.setattr(build.time, "sleep", sleep)
    monkeypatch.setattr(build, "STALE", 2 * build.POLL)
    assert not locks.claim("chunk")
    assert locks.wait("chunk") and len(looks) == 8
    assert locks.patient and "have done nothing" not in caplog.text
    assert not ChunkLocks(tmp_path).claim("chunk")  # it is this one's now
    claimer = ChunkLocks(tmp_path)
    assert claimer.claim("a") and claimer.claim("b")
    for name in "ab":
        os.utime(tmp_path / f"{name}.lock", ns=(1, 1))
    claimer.show_life()
    assert all((tmp_path / f"{name}.lock").stat().st_mtime_ns > 1 for name in "ab")


@pytest.fixture
def three_chunks(photos, spaces, tmp_path, monkeypatch):
    """Builds a cache of six photos in three chunks, in the folder of that name."""
    monkeypatch.setattr(build, "CHUNK_IMAGES", 2)
    return lambda name, **options: cached(photos, spaces, tmp_path / name, views=1, **options)


@pytest.fixture
def written(monkeypatch):
    """The names of the chunks that are written, in order."""
    names, write = [], build.LatentEncoder._write
    monkeypatch.setattr(
        build.LatentEncoder, "_write", lambda encoder, name, *rest: names.append(name) or write(encoder, name, *rest)
    )
    return names


def test_what_one_that_stands_still_has_claimed_is_encoded_last(three_chunks, written, tmp_path, monkeypatch, caplog):
    """A run that waits for ever for one that was stopped (Ctrl-Z) while it built the cache, or that waits although there is
    something to encode meanwhile."""
    monkeypatch.setattr(build, "STALE", 3 * build.POLL)
    monkeypatch.setattr(build.time, "sleep", lambda seconds: None)
    folder = three_chunks("alone").cache.folder
    first, second, third = written
    (tmp_path / "cache" / folder.name).mkdir(parents=True)
    with FileLock(tmp_path / "cache" / folder.name / f"{second}.lock"):
        assert len(three_chunks("cache")) == 6
    assert written[3:] == [first, third, second] and "have done nothing" in caplog.text


def test_what_another_has_finished_meanwhile_is_not_encoded_again(three_chunks, written, tmp_path, monkeypatch):
    """Chunks that two runs encode: one that looks before the other has written, and encodes afterwards."""
    missing, other = build.LatentEncoder.missing, []

    def slow(encoder):
        found = missing(encoder)
        if not other:
            other.append(1)
            three_chunks("cache")
        return found

    monkeypatch.setattr(build.LatentEncoder, "missing", slow)
    assert len(three_chunks("cache")) == 6 and len(written) == 3


def test_the_processes_of_a_run_begin_in_different_places(three_chunks, written, monkeypatch):
    """Processes that all encode the whole cache in the same order where no file can be locked."""
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "not here")))
    three_chunks("a")
    monkeypatch.setattr(build, "place_of", lambda accelerator: (1, 3))
    three_chunks("b")
    assert written[3:] == [written[1], written[2], written[0]]


# ----------------------------------------------------------------------------------------------------------------------
# A folder in which others write


def test_links_and_pipes_in_a_shared_cache_are_left_alone(three_chunks, written, spaces, photos, tmp_path):
    """A file elsewhere that is overwritten or cut to nothing through a link; a run that waits for a pipe's writer."""
    folder, victim = three_chunks("cache").cache.folder, tmp_path / "victim"
    victim.write_text("precious")
    first, second, _ = (folder / f"{name}.safetensors" for name in written)
    for path in (folder / "about.json", first, second, tmp_path / "cache" / "contents.npy"):
        path.unlink()
    for link in (folder / "about.json", first, first.with_suffix(".lock")):
        link.symlink_to(victim)
    for pipe in (second, tmp_path / "cache" / "contents.npy"):
        os.mkfifo(pipe)
    with no_hang():
        assert len(three_chunks("cache")) == 6
    assert written[3:] == written[:2] and victim.read_text() == "precious"
    assert not (folder / "about.json").is_symlink() and first.is_file() and second.is_file()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    refusal(lambda: three_chunks("cache"), "latent cache", "a link")


LEFT_OUT = [b"[" * 10**5, b"3", b'[{"content": "xy", "views": 1, "reader": "", "why": ""}]', b"[1]", b"\xff"]


@pytest.mark.parametrize("text", LEFT_OUT, ids=["nested", "no list", "no digest", "no entry", "no text"])
def test_a_chunk_that_another_tool_wrote_is_encoded_again(three_chunks, written, text, caplog):
    """A traceback over a file in a shared folder."""
    data = three_chunks("cache")
    path = data.cache.path(written[0])
    chunk = safetensors.numpy.load_file(path) | {"left_out": np.frombuffer(text, np.uint8)}
    safetensors.numpy.save_file(chunk, path)
    assert len(three_chunks("cache")) == 6 and written[3:] == written[:1] and "damaged" in caplog.text
