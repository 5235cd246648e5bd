"""What a latent space is: diffusers' own convention, the VAE's own class, frozen weights; and how VAEs fail to load."""

import json
import shutil

import pytest
import torch
from conftest import make_tiny_vae
from diffusers import AutoencoderKL, AutoencoderTiny
from hostile import refusal
from pipelines import load_vae
from safetensors.torch import load_file, save_file

from vaes.codec import Codec, good_image_size

WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_images(height=32, width=24, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    "images, said",
    [
        (torch.ones(1, 3, 8, 8).byte(), ("uint8", "[-1, 1]")),
        (torch.zeros(3, 32, 32), ("32", "[-1, 1]")),
        (torch.zeros(2, 3, 36, 32), ("(36, 32)", "8")),
        (torch.zeros(2, 3, 32, 20), ("(32, 20)", "8")),
    ],
    ids=["uint8", "no batch", "height", "width"],
)
def test_images_that_cannot_be_encoded_are_refused(vae_folders, images, said):
    """An IndexError of torch's; latents of a rounded size, which fit nothing later on."""
    refusal(lambda: Codec(load_vae(vae_folders["kl4"])).encode(images), *said)


def test_the_tiny_autoencoders_latents_are_taken_as_scaled(vae_folders):
    """Scale applied a second time, a missing posterior asked for, or the image range shifted to [0, 1] twice."""
    reference = AutoencoderTiny.from_pretrained(vae_folders["tiny4"]).eval()
    space, images = Codec(load_vae(vae_folders["tiny4"])), make_images()
    with torch.no_grad():
        expected = reference.encode(images).latents
        torch.testing.assert_close(space.encode(images), expected)
        torch.testing.assert_close(space.encode(images, sample=True), expected)  # it has no posterior to draw from
        torch.testing.assert_close(space.decode(expected), reference.decode(expected).sample)
    assert (space.channels, space.stride, space.space.name, space.space.map_is_known) == (4, 8, None, False)


def test_sample_draws_from_the_posterior_with_the_given_generator(vae_folders):
    """A generator that is ignored, a draw without scale or shift, or a draw that is the mean."""
    reference = AutoencoderKL.from_pretrained(vae_folders["kl16"]).eval()
    space, images = Codec(load_vae(vae_folders["kl16"])), make_images()

    def draw(seed):
        return space.encode(images, sample=True, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(3)
    first = draw(7)
    torch.manual_seed(4)  # the global generator must not matter
    assert torch.equal(draw(7), first)
    assert not torch.equal(draw(8), first)
    assert not torch.equal(space.encode(images), first)
    with torch.no_grad():
        raw = reference.encode(images).latent_dist.sample(torch.Generator().manual_seed(7))
    torch.testing.assert_close(first, (raw - 0.1159) * 0.3611)


def test_latents_and_images_are_float32_whatever_the_vaes_precision(vae_folders):
    """bfloat16 targets, which cost the loss three digits; a scale applied after rounding would show in the tolerance."""
    space = Codec(load_vae(vae_folders["kl16"], dtype=torch.bfloat16))
    exact = Codec(load_vae(vae_folders["kl16"]))
    latents = space.encode(make_images())
    assert latents.dtype == torch.float32
    assert space.decode(latents).dtype == torch.float32
    torch.testing.assert_close(latents, exact.encode(make_images()), rtol=0.05, atol=0.05)
    assert {parameter.dtype for parameter in space.vae.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("given", ["folder", "object"])
def test_weights_take_no_gradient_but_decode_passes_it_to_the_latents(vae_folders, given):
    """decode under no_grad (a decoded-image loss that teaches nothing), or a VAE that trains along, such as a caller's."""
    vae = load_vae(vae_folders["kl4"]) if given == "folder" else make_tiny_vae(4).train()
    space = Codec(vae)
    assert vae in (space.vae, space.vae.model)
    latents = torch.zeros(1, 4, 2, 2, requires_grad=True)
    space.decode(latents).square().mean().backward()
    assert latents.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in space.vae.model.parameters())
    assert not space.encode(make_images().requires_grad_()).requires_grad
    assert not space.vae.model.training


def test_subfolder_is_looked_at_first_and_the_folder_itself_second(vae_folders, tmp_path):
    """A subfolder that is required, ignored, or loses against a VAE in the folder itself."""
    assert load_vae(vae_folders["nested"], "vae").config.latent_channels == 16
    assert load_vae(vae_folders["kl4"], "vae").config.latent_channels == 4  # no such subfolder: the folder is a VAE
    assert load_vae(vae_folders["kl4"], None).config.latent_channels == 4
    shutil.copytree(vae_folders["kl4"], tmp_path / "both")
    shutil.copytree(vae_folders["kl16"], tmp_path / "both" / "vae")
    assert load_vae(tmp_path / "both", "vae").config.latent_channels == 16
    assert load_vae(tmp_path / "both", "").config.latent_channels == 4


def test_fingerprint_changes_with_the_weights_and_with_the_config(vae_folders, tmp_path):
    """A latent cache that is taken for another VAE's because only the path, the shapes or the weights count."""
    folder = shutil.copytree(vae_folders["kl4"], tmp_path / "vae")
    prints = {Codec(load_vae(vae_folders["kl4"])).fingerprint, Codec(load_vae(folder)).fingerprint}
    assert len(prints) == 1  # a copy elsewhere is the same VAE
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.2}))
    prints.add(Codec(load_vae(folder)).fingerprint)
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1e-3}, folder / WEIGHTS, metadata={"format": "pt"})
    prints.add(Codec(load_vae(folder)).fingerprint)
    assert len(prints) == 3


def test_good_image_size_names_the_nearest():
    """Always rounding down (0 for small sizes), or one stride looked at instead of both."""
    assert good_image_size(256, 8, 8) == 256
    assert good_image_size(24, 4, 8) == 24
    for size, strides, nearest in ((250, (8, 8), 248), (253, (8, 8), 256), (36, (4, 16), 32), (3, (8,), 8), (0, (8, 4), 8)):
        text = refusal(lambda size=size, strides=strides: good_image_size(size, *strides), f"image_size {size}")
        assert text.endswith(f"nearest is {nearest}")
