"""tools/translate.py: latents in every kind of file, images through VAE1, and files that cannot be translated."""

import os
import sys

import numpy as np
import pytest
import torch
from conftest import run_script
from hostile import no_hang, refusal
from PIL import Image
from pipelines import Payload, untrained
from safetensors.torch import load_file, save_file

from tools import translate as program
from tools.translate import planned, read_latents, translate_file, write_latents
from vae_align import AlignPipeline, LatentSpace
from vaes.codec import SPACES, Codec
from vaes.loading import load_vae_model
from vaes.pipeline import PipelineWithVAEs

FULL_FLUX2 = LatentSpace("flux2", 128, 16, (0.5,) * 128, (2.0,) * 128, 2)
MARK = {"latent_format_version_0": torch.tensor([])}


def translate(tmp_path, *argv, **options):
    """Run the program; its results go into the folder `out`."""
    return run_script("tools/translate.py", *map(str, argv), "--output_dir", str(tmp_path / "out"), **options)


def save_module(path, *input_types):
    """A module of random weights from sd15 to flux1, in a file; its pipeline."""
    return AlignPipeline.from_pretrained(untrained("sd15", "flux1", input_types).save_pretrained(path))


@pytest.fixture
def latents(tmp_path):
    """{file: its scaled latents} of every kind that is read."""
    torch.manual_seed(1)
    folder = tmp_path / "in"
    folder.mkdir()
    names = ("a.latent", "b.latent", "c.safetensors", "d.pt", "e.npy", "f.pt")
    made = {folder / name: torch.randn(2, 4, 6, 8) for name in names}
    save_file({"latent_tensor": SPACES["sd15"].to_raw(made[folder / "a.latent"])} | MARK, folder / "a.latent")
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


def test_comfyuis_files_are_in_comfyuis_layout(tmp_path):
    """The full FLUX.2 VAE's raw latents (32 channels) where ComfyUI keeps normalised ones (128), written or asked for."""
    for spaces, shape in (((SPACES["sd15"], FULL_FLUX2), (1, 4, 8, 8)), ((FULL_FLUX2, SPACES["sd15"]), (1, 128, 4, 4))):
        pipeline, kept = untrained(*spaces), torch.randn(shape)
        save_file({"latent_tensor": kept} | MARK, tmp_path / "a.latent")
        translated = translate_file(tmp_path / "a.latent", pipeline, False)
        if spaces[0] is FULL_FLUX2:
            torch.testing.assert_close(translated, SPACES["sd15"].to_raw(pipeline.translate(kept)))
        else:
            torch.testing.assert_close(translated, pipeline.translate(SPACES["sd15"].to_scaled(kept)))


def test_frames_and_packed_latents_are_translated_as_the_library_does(tmp_path):
    """Video or packed latents of which the program says that they are none; frames translated as one; a frame axis lost."""
    pipeline, video = untrained("wan21", "flux1"), torch.randn(2, 16, 3, 4, 6)
    one_by_one = torch.cat([pipeline.translate(video[place, :, frame][None]) for place in range(2) for frame in range(3)])
    torch.save(video, tmp_path / "video.PT")
    torch.testing.assert_close(translate_file(tmp_path / "video.PT", pipeline, False), one_by_one)
    save_file(
        {"latent_tensor": SPACES["wan21"].to_raw(video[0, :, :1].movedim(1, 0))[:, :, None]} | MARK, tmp_path / "one.latent"
    )
    one = SPACES["flux1"].to_raw(one_by_one[:1])
    torch.testing.assert_close(translate_file(tmp_path / "one.latent", pipeline, False), one, atol=1e-4, rtol=1e-4)
    kept = untrained("sd15", "wan21").translate(video[:, :4])
    assert kept.shape == (2, 16, 3, 4, 6)
    tokens, pipeline = torch.randn(1, 6, 64), untrained("flux1", "sd15")
    np.save(tmp_path / "packed.npy", tokens.numpy())
    translated = translate_file(tmp_path / "packed.npy", pipeline, False, (32, 48))
    torch.testing.assert_close(translated, pipeline.translate(tokens, size=(32, 48)))
    refusal(lambda: translate_file(tmp_path / "packed.npy", pipeline, False), "packed.npy", "--size HEIGHT WIDTH")


def test_trainers_caches_are_read(tmp_path):
    """Cached latents taken for an image, or the mirrored ones for the picture's; frames of a picture taken for a batch."""
    latents, mirrored = torch.randn(4, 1, 6, 8), torch.zeros(4, 1, 6, 8)
    np.savez(tmp_path / "a.npz", latents=latents[:, 0].numpy(), crop_ltrb=np.array([0, 0, 48, 64]))
    np.savez(tmp_path / "b.npz", latents_6x8=latents[:, 0].numpy(), latents_flipped_6x8=mirrored[:, 0].numpy())
    save_file({"latents_1x6x8_float32": latents, "latents_flipped_1x6x8_float32": mirrored}, tmp_path / "c.safetensors")
    for name in ("a.npz", "b.npz"):
        assert torch.equal(read_latents(tmp_path / name), latents[:, 0])
    assert torch.equal(read_latents(tmp_path / "c.safetensors"), latents[None])
    write_latents(tmp_path / "out.NPZ", latents)
    assert torch.equal(read_latents(tmp_path / "out.NPZ"), latents)
    np.savez(tmp_path / "two.npz", latents_6x8=latents.numpy(), latents_8x6=latents.numpy())
    refusal(lambda: read_latents(tmp_path / "two.npz"), "several tensors", "latents_6x8, latents_8x6")


UNUSABLE = {  # file: (what makes it, what is said)
    "a.npy": (os.mkfifo, "a pipe"),
    "b.pt": (lambda path: torch.save(torch.zeros(1).expand(1, 4, 60000, 60000), path), "claim 57.6 GB"),
    "c.npz": (lambda path: np.savez_compressed(path, latents=np.zeros((4, 4096, 4096), np.float32)), "claim 0.3 GB"),
    "d.pt": (lambda path: torch.save(Payload("ran"), path), "asks to run code, which is refused"),
    "e.npy": (lambda path: np.save(path, np.array([Payload("ran")], dtype=object)), "asks to run code, which is refused"),
    "f.pt": (lambda path: torch.save(torch.full((1, 4, 2, 2), torch.nan), path), "not finite"),
    "g.pt": (lambda path: torch.save(torch.zeros(1, 4, 2, 2, dtype=torch.int8), path), "torch.int8"),
    "h.pt": (lambda path: torch.save(torch.zeros(1, 16, 16, 4), path), "channels last"),
    "i.pt": (lambda path: torch.save(torch.full((1, 4, 2, 2), 60000.0).half(), path), "its translation holds values"),
    "j.safetensors": (lambda path: save_file({"x": torch.zeros(3)}, path), "no tensor of 3 or more dimensions"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_file_that_cannot_be_used_is_one_line_with_the_reason(tmp_path, name):
    """A wait for a pipe's writer, gigabytes for a file of a kilobyte, a library's advice to load it unsafely, NaN passed on."""
    make, said = UNUSABLE[name]
    make(tmp_path / name)
    pipeline = untrained("sd15", "flux1")
    pipeline.module.out.weight.data.mul_(1e4)  # beyond float16
    refusal(lambda: translate_file(tmp_path / name, pipeline, False), said)


def test_a_batch_outlives_every_files_mistake(tmp_path, latents, monkeypatch, capsys, caplog):
    """One file's lack of memory, disk or VAE1 that ends the others' work; capital endings and subfolders passed over."""
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "sub").mkdir()
    (folder / "d.pt").rename(folder / "sub" / "D.PT")
    (folder / "e.npy").rename(folder / "E.NPY")
    (folder / "f.pt").rename(folder / f"{'x' * 244}.pt")
    os.mkfifo(folder / "pipe.pt")
    Image.new("RGB", (16, 16)).save(folder / "photo.png")
    failures = {"a.latent": RuntimeError("DefaultCPUAllocator: can't allocate memory"), "b.latent": MemoryError()}
    failures["c.safetensors"] = OSError(28, "No space left on device")
    opened, made = [], PipelineWithVAEs(untrained("sd15", "flux1").module, None, None)
    made.space1, made.space2 = SPACES["sd15"], SPACES["flux1"]
    made._openers = [lambda: refusing(), None]
    monkeypatch.setattr(program.PipelineWithVAEs, "from_checkpoint", lambda module, *_, **__: opened.append(module) or made)

    def refusing():
        raise program.UserError("no VAE1 here")

    def failing(path, *given):
        if path.name in failures:
            raise failures[path.name]
        return translate_file(path, *given)

    monkeypatch.setattr(program, "translate_file", failing)
    monkeypatch.setattr(sys, "argv", ["translate.py", "SD1", "Flux", str(folder), "--output_dir", str(out), "--device", "cpu"])
    with no_hang(), pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 1 and opened == ["SD1:Flux"]
    assert capsys.readouterr().out.endswith(f"3 of 8 translated into {out}\n")
    results = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert results == {"sub/D.PT", "E.NPY", f"{'x' * 200}.pt"}
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("left out: ")]
    assert len(said) == 5 and sum("out of memory" in line for line in said) == 2
    assert all(any(name in line for line in said) for name in ("pipe.pt", "photo.png: no VAE1 here", "No space left"))
