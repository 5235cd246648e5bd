"""tools/translate.py: latents in every kind of file, images through VAE1, and files that cannot be translated."""

import numpy as np
import pytest
import torch
from conftest import run_script
from hostile import refusal
from PIL import Image
from safetensors.torch import load_file, save_file

from tools.translate import planned, translate_file
from vae_align import AlignConfig, AlignPipeline, align_module
from vaes.codec import SPACES, Codec
from vaes.loading import load_vae_model
from vaes.pipeline import PipelineWithVAEs


def translate(tmp_path, *argv, **options):
    """Run the program; its results go into the folder `out`."""
    return run_script("tools/translate.py", *map(str, argv), "--output_dir", str(tmp_path / "out"), **options)


def save_module(path, *input_types):
    """A module of random weights from sd15 to flux1, in a file; its pipeline."""
    torch.manual_seed(0)
    module = align_module(AlignConfig(input_types, hidden_channels=8, num_blocks=1)).eval()
    AlignPipeline(module, SPACES["sd15"], SPACES["flux1"]).save_pretrained(path)
    return AlignPipeline.from_pretrained(path)


@pytest.fixture
def latents(tmp_path):
    """{file: its scaled latents} of every kind that is read."""
    torch.manual_seed(1)
    folder = tmp_path / "in"
    folder.mkdir()
    names = ("a.latent", "b.latent", "c.safetensors", "d.pt", "e.npy", "f.pt")
    made = {folder / name: torch.randn(2, 4, 6, 8) for name in names}
    mark, raw = {"latent_format_version_0": torch.tensor([])}, SPACES["sd15"].to_raw
    save_file({"latent_tensor": raw(made[folder / "a.latent"])} | mark, folder / "a.latent")
    save_file({"latent_tensor": made[folder / "b.latent"]}, folder / "b.latent")  # the oldest kind holds scaled ones
    save_file({"latents": made[folder / "c.safetensors"], "noise": torch.zeros(2, 4, 6, 8)}, folder / "c.safetensors")
    torch.save(made[folder / "d.pt"], folder / "d.pt")
    np.save(folder / "e.npy", made[folder / "e.npy"].numpy())
    made[folder / "f.pt"] = made[folder / "f.pt"][0]
    torch.save({"samples": made[folder / "f.pt"]}, folder / "f.pt")
    return made


def read(path):
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path))
    content = torch.load(path) if path.suffix == ".pt" else load_file(path)
    return content if isinstance(content, torch.Tensor) else content["latent_tensor" if path.suffix == ".latent" else "latents"]


def test_every_kind_of_file_comes_out_as_it_went_in(tmp_path, latents):
    """A kind that is read in another convention than it is written, old .latent files taken for raw ones, a lost batch axis."""
    pipeline = save_module(tmp_path / "module.safetensors", "latent")
    told = translate(tmp_path, tmp_path / "module.safetensors", tmp_path / "in")
    assert "6 of 6 translated" in told.stdout and "6/6" in told.stderr
    for file, scaled in latents.items():
        expected = pipeline.translate(scaled if scaled.ndim == 4 else scaled[None])
        expected = SPACES["flux1"].to_raw(expected) if file.suffix == ".latent" else expected
        result = read(tmp_path / "out" / file.name)
        torch.testing.assert_close(result, expected if scaled.ndim == 4 else expected[0], atol=1e-4, rtol=1e-4)
    assert "latent_format_version_0" in load_file(tmp_path / "out" / "a.latent")


def test_raw_is_said_by_name(tmp_path, latents):
    """Raw latents taken for scaled ones: five times too strong, and everything after is noise."""
    pipeline = save_module(tmp_path / "module.safetensors", "latent")
    file = next(file for file in latents if file.suffix == ".npy")
    np.save(file, SPACES["sd15"].to_raw(latents[file]).numpy())
    translate(tmp_path, tmp_path / "module.safetensors", file, "--latents", "raw")
    expected = SPACES["flux1"].to_raw(pipeline.translate(latents[file]))
    torch.testing.assert_close(read(tmp_path / "out" / file.name), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("input_types", [("image",), ("image", "latent")], ids="-".join)
def test_images_go_through_vae1(tmp_path, input_types, vae_folders, photo_folders):
    """An image whose sides are no multiples of the stride, another scale than VAE1's own, an image that the module misses."""
    pipeline = save_module(tmp_path / "module.safetensors", *input_types)
    photo = Image.open(sorted(photo_folders[1].glob("*.jpg"))[0]).convert("RGB").crop((0, 0, 61, 50))
    photo.save(tmp_path / "photo.png")
    translate(tmp_path, tmp_path / "module.safetensors", tmp_path / "photo.png", "--vae1_path", vae_folders["kl4"])
    image = torch.from_numpy(np.array(photo)[1:49, 2:58]).permute(2, 0, 1)[None] / 127.5 - 1
    codec = Codec(load_vae_model(str(vae_folders["kl4"]), "vae", None, "cpu", torch.float32))
    expected = pipeline.translate(codec.encode(image), image)
    torch.testing.assert_close(read(tmp_path / "out" / "photo.safetensors"), expected, atol=1e-4, rtol=1e-4)


def test_a_bad_file_is_left_out_and_named(tmp_path, latents):
    """One file of a thousand that ends the work, or that is passed over in silence with status 0."""
    save_module(tmp_path / "module.safetensors", "latent")
    (tmp_path / "in" / "broken.pt").write_bytes(b"no tensor")
    np.save(tmp_path / "in" / "other.npy", np.zeros((1, 16, 4, 4), np.float32))
    torch.save({"step": 3}, tmp_path / "in" / "empty.pt")
    ended = translate(tmp_path, tmp_path / "module.safetensors", tmp_path / "in", check=False)
    assert ended.returncode == 1 and "6 of 9 translated" in ended.stdout and "Traceback" not in ended.stderr
    left_out = [line for line in ended.stderr.replace("\r", "\n").splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 3 and any("other.npy" in line and "look like latents of flux1" in line for line in left_out)
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_results_that_would_replace_something_are_left_out(tmp_path, latents):
    """A result that replaces its own source or another's; a file that is not there, which ends the work of the others."""
    folder, other, out = tmp_path / "in", tmp_path / "other", tmp_path / "out"
    other.mkdir()
    np.save(other / "e.npy", np.zeros((1, 4, 4, 4), np.float32))
    plan, left_out = planned([folder], folder)
    assert not plan and len(left_out) == 6 and all("its own result" in line for line in left_out)
    (tmp_path / "empty").mkdir()
    given = (folder / "e.npy", other / "e.npy", tmp_path / "nothing", tmp_path / "empty")
    plan, (collision, missing, empty) = planned(given, out)
    assert plan == {folder / "e.npy": out / "e.npy"} and "both would become" in collision and str(other) in collision
    assert "no such file" in missing and "no latents and no images" in empty


def test_what_a_module_needs_is_said(tmp_path, latents):
    """A module without its image, or images without a VAE1, which ends in a traceback."""
    save_module(tmp_path / "module.safetensors", "image", "latent")
    pipeline, photo = PipelineWithVAEs.from_checkpoint(tmp_path / "module.safetensors"), tmp_path / "photo.png"
    refusal(lambda: translate_file(tmp_path / "in" / "e.npy", pipeline, False), "also takes the image", "e.npy")
    Image.new("RGB", (16, 16)).save(photo)
    refusal(lambda: translate_file(photo, pipeline, False), "VAE1: the checkpoint does not say where it is")
    Image.new("RGB", (16, 7)).save(photo)
    refusal(lambda: translate_file(photo, pipeline, False), "16x7 px")
