"""VAE folders from a hostile hand, VAEs beyond float16's range, and too little memory."""

import json
import math
import os
import pickle
import shutil
import sys

import pytest
import torch
from hostile import refusal
from pipelines import Payload, make_pipeline, save
from runs import judge
from safetensors.torch import load_file, save_file

from cache.build import CacheOptions, cache_latents
from cache.read import CachedDataset
from dataloader import ImageDataset
from vaes.codec import Codec
from vaes.loading import load_vae_model

CONFIG, WEIGHTS, PICKLED = "config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"


@pytest.fixture
def folder(vae_folders, tmp_path):
    """A copy of kl4, to be damaged."""
    folder = tmp_path / "hostile_vae"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((vae_folders["kl4"] / name).read_bytes())
    return folder


def load(folder, dtype=torch.float32):
    return load_vae_model(folder, "vae", None, "cpu", dtype, "--vae2_path")


def images(count=1):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def config(**changes):
    def edit(folder):
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**values, **changes}))

    return edit


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def weights(change):
    """`change` the dict of tensors and store it again."""

    def edit(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def replace_by(make, name):
    def edit(folder):
        (folder / name).unlink()
        make(folder / name)

    return edit


def cut_by_a_byte(path):
    os.truncate(path, path.stat().st_size - 1)


NAME = "decoder.conv_out.bias"
KINDS = {  # kind: (what makes it of a good folder, what the message says)
    "no config": (lambda folder: (folder / CONFIG).unlink(), "config.json"),
    "class of another kind": (config(_class_name="UNet2DModel"), "known VAE classes"),
    "config that is an array": (write(CONFIG, b"[]"), "config.json"),
    "config with a key twice": (write(CONFIG, b'{"_class_name": "AutoencoderKL", "_class_name": "Other"}'), "twice"),
    "config that is a pipe": (replace_by(os.mkfifo, CONFIG), "config.json"),
    "class with a newline": (config(_class_name="two\nlines"), "two"),
    "scale of zero": (config(scaling_factor=0), "scaling_factor 0"),
    "scale in quotes": (config(scaling_factor="0.18"), "scaling_factor '0.18'"),
    "no latent channels": (config(latent_channels=0), "latent_channels 0"),
    "a billion latent channels": (config(latent_channels=10**9), "latent_channels 1000000000"),
    "widths in words": (config(block_out_channels=["8", "8", "16", "16"]), "config.json"),
    "a hundred thousand widths": (config(block_out_channels=[8] * 100_000), "block_out_channels"),
    "a billion layers": (config(layers_per_block=10**9), "layers_per_block 1000000000"),
    "widths that the file does not hold": (config(block_out_channels=[8192] * 4), "weights cannot be loaded"),
    "grey images": (config(in_channels=1), "config.json"),
    "four channels of colour": (config(out_channels=4), "config.json"),
    "a level left out": (config(down_block_types=["DownEncoderBlock2D"] * 3), "have no place"),
    "weights cut by a byte": (lambda folder: cut_by_a_byte(folder / WEIGHTS), "cannot be loaded"),
    "weights of another shape": (weights(lambda tensors: tensors.update({NAME: torch.zeros(5)})), NAME),
    "weights that lack one": (weights(lambda tensors: tensors.pop(NAME)), NAME),
    "weights of NaN": (weights(lambda tensors: tensors[NAME].fill_(math.nan)), "not finite"),
    "weights that are a pipe": (replace_by(os.mkfifo, WEIGHTS), "no VAE there"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_vae_is_one_line(folder, kind):
    """A traceback; a scale that is silently taken for 1; hours of building layers; memory for what a file only claims."""
    make, said = KINDS[kind]
    make(folder)
    refusal(lambda: Codec(load(folder)).encode(images()), "--vae2_path", "hostile_vae", said)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_pickled_weights_is_not_run(folder, tmp_path, form):
    """diffusers' older weights format, which is a pickle, loaded as one."""
    marker = tmp_path / "executed"
    (folder / WEIGHTS).unlink()
    if form == "pickle":
        (folder / PICKLED).write_bytes(pickle.dumps(Payload(marker), protocol=2) + bytes(1 << 20))
    else:
        content = {"x": Payload(marker), "room": torch.zeros(1 << 18)}
        torch.save(content, folder / PICKLED)
    refusal(lambda: Codec(load(folder)).encode(images()), "--vae2_path", "weights cannot be loaded")
    assert not marker.exists()


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000, "/dev/zero/vae"], ids=["", "NUL", "too long", "device"])
def test_a_vae_path_that_leads_nowhere_is_one_line(path, tmp_path, monkeypatch):
    """A ValueError or OSError of the system's in place of a message."""
    monkeypatch.chdir(tmp_path)
    refusal(lambda: load(path), "--vae2_path")


def test_what_is_there_instead_of_a_vae_is_named(folder, tmp_path):
    """A message that knows the customary name alone; a missing file looked for on the hub."""
    shutil.copytree(folder, tmp_path / "model" / "vae_1_0")
    refusal(lambda: load(tmp_path / "model"), "there are models in vae_1_0; name the VAE's as the subfolder")
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "ae.safetensors").write_bytes(b"")
    refusal(lambda: load(tmp_path / "single"), "there is ae.safetensors; name the file itself")
    refusal(lambda: load("models/vae.safetensors"), "models/vae.safetensors: no such file")


def test_a_library_that_cannot_be_imported_is_no_fault_of_the_config(folder, monkeypatch):
    """A config that is said to be wrong, where a variable such as HF_HUB_DOWNLOAD_TIMEOUT=soon is."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refusal(lambda: load(folder), "hostile_vae", "diffusers cannot be imported")


def test_no_vae_runs_in_float16(folder):
    """NaN latents where activations exceed float16's range; weights rounded to float16 and back."""
    weights(lambda tensors: tensors["encoder.conv_in.weight"].mul_(1e5))(folder)
    exact = Codec(load(folder))
    codec = Codec(load(folder, torch.float16))
    assert codec.vae.dtype == next(codec.vae.model.parameters()).dtype == torch.float32  # a CPU has no fast bfloat16
    assert torch.equal(codec.encode(images(2)), exact.encode(images(2)))
    assert Codec(load(folder).model.half()).encode(images(2)).isfinite().all()


def real_lack_of_memory():
    torch.empty(1 << 50)


def short_of_memory(space, most):
    """Have the VAE behind `space` fail like torch on more than `most` images at once; the list of sizes that it was given."""
    sizes, encode = [], space.vae.model.encode

    def guarded(batch):
        sizes.append(len(batch))
        if len(batch) > most:
            real_lack_of_memory()
        return encode(batch)

    space.vae.model.encode = guarded
    return sizes


def test_encoding_goes_on_with_half_the_batch_and_gives_the_same(vae_folders, caplog):
    """A run that ends where a smaller batch would have done; other draws from the posterior than with enough memory."""
    plenty, short = Codec(load(vae_folders["kl4"])), Codec(load(vae_folders["kl4"]))
    sizes = short_of_memory(short, 3)
    for _ in range(2):
        draws = [torch.Generator().manual_seed(0) for _ in range(2)]
        made = short.encode(images(10), True, draws[0])
        torch.testing.assert_close(made, plenty.encode(images(10), True, draws[1]), rtol=1e-4, atol=1e-5)
    assert sizes == [10, 5, *[2] * 10]  # found once, kept from then on
    assert caplog.text.count("out of memory") == 2


def test_a_damaged_cache_is_mended(vae_folders, photo_folders, tmp_path):
    """A traceback from mmap in the first step; rows of zeros where a copy was cut short; no line if it is lost while used."""
    spaces = [Codec(load(vae_folders[vae])) for vae in ("kl4", "kl16")]
    dataset = ImageDataset(sorted(map(str, photo_folders[0].rglob("*.png")))[:2], 16, random_crop=True)

    def cached():
        return cache_latents(dataset, *spaces, CacheOptions(tmp_path / "cache", 1, True))

    whole = cached()
    before = whole.__getitems__([(0, 0), (1, 0)])
    (chunk,) = whole.cache.folder.glob("*.safetensors")
    cut_by_a_byte(chunk)
    fresh = CachedDataset(whole.cache, dataset, whole.images, whole.rows)
    whole.cache._maps.clear()
    refusal(lambda: fresh.__getitems__([(1, 0)]), "latent cache", "start again")
    again = cached().__getitems__([(0, 0), (1, 0)])
    for name in ("latents1", "latents2", "pixel_values"):
        torch.testing.assert_close(again[name], before[name], rtol=1e-3, atol=1e-4)


def test_a_cache_that_not_even_one_image_fits_is_one_line(vae_folders, photo_folders, tmp_path):
    """Halving for ever."""
    spaces = [Codec(load(vae_folders[vae])) for vae in ("kl4", "kl16")]
    short_of_memory(spaces[1], 0)
    dataset = ImageDataset(sorted(map(str, photo_folders[0].rglob("*.png"))), 16, random_crop=True)
    refusal(
        lambda: cache_latents(dataset, *spaces, CacheOptions(tmp_path / "cache", 2, True)),
        "out of memory while encoding", "image_size 16", "precision float32", "use precision bfloat16",
    )  # fmt: skip


def test_an_evaluation_out_of_memory_is_one_line(vae_folders, photo_folders, tmp_path, monkeypatch):
    """The other program, whose batch is a flag."""
    config = {"image_size": 16, "precision": "float32"}
    path = save(make_pipeline(vae_folders["kl4"], vae_folders["kl16"]), tmp_path, config=config)
    monkeypatch.setattr("evaluation.ladder.Ladder.reconstruct", lambda *_, **__: real_lack_of_memory())
    refusal(lambda: judge(path, photo_folders[1], tmp_path), "out of memory while evaluating", "lower eval_batch_size")
