"""VAEs that are no folder of diffusers: tiny autoencoders in their author's format, single files; variants and shards."""

import shutil
import ssl

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, AutoencoderTiny
from families import make_family, save_tiny
from hostile import refusal
from huggingface_hub import errors
from PIL import Image
from pipelines import load_vae
from safetensors.torch import load_file, save_file

from runtime.cli import load_config
from utils import one_line
from vae_align import AlignPipeline
from vaes.codec import SPACES, Codec
from vaes.pipeline import read_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


def images(side=64):
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Tiny autoencoders


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_authors_files_are_what_diffusers_converts(tmp_path, suffix):
    """Layers in another order, images in [-1, 1] where the author's are in [0, 1], latents scaled again."""
    model = save_tiny(tmp_path, "taesd", suffix, latent_channels=4)
    converted = AutoencoderTiny().eval()  # the keys as scripts/convert_tiny_autoencoder_to_diffusers.py renames them
    weights = {f"encoder.layers.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    for name, tensor in model.decoder.state_dict().items():
        number, rest = name.split(".", 1)
        weights[f"decoder.layers.{int(number) - 1}.{rest}"] = tensor
    converted.load_state_dict(weights)
    ours, theirs = Codec(load_vae(tmp_path), str(tmp_path)), Codec(converted)
    assert ours.space is SPACES["sd15"]
    latents = theirs.encode(images())
    torch.testing.assert_close(ours.encode(images()), latents)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents))


SHAPES = {
    "taesd3": ({"latent_channels": 16}, "sd3"),
    "taef2": ({"latent_channels": 32, "pooled": True, "fold": 2}, "flux2"),
    "taesana": ({"latent_channels": 32, "stride": 32}, "sana"),
}


@pytest.mark.parametrize("stem", SHAPES)
def test_shapes_of_tiny_autoencoders_are_read_off_their_weights(tmp_path, stem):
    """TAEF2's pooled blocks dropped, its latents not folded to FLUX.2's, or Sana's read with stride 8."""
    options, name = SHAPES[stem]
    model = save_tiny(tmp_path, stem, **options)
    codec = Codec(load_vae(tmp_path / stem), str(tmp_path / stem))  # the files' common stem
    assert codec.space is SPACES[name]
    with torch.no_grad():
        own = model.encoder(images() / 2 + 0.5)
        expected = torch.nn.functional.pixel_unshuffle(own, 2) if stem == "taef2" else own
        torch.testing.assert_close(codec.encode(images()), expected)
        torch.testing.assert_close(codec.decode(expected), model.decoder(own) * 2 - 1)


def test_a_folder_of_many_tiny_autoencoders_wants_a_name(tmp_path):
    """ComfyUI's vae_approx holds several: the first by chance, or half of one."""
    save_tiny(tmp_path, "taesd", latent_channels=4)
    save_tiny(tmp_path, "taef1", ".safetensors", latent_channels=16)
    refusal(lambda: load_vae(tmp_path), "2 tiny autoencoders", "taef1")
    assert Codec(load_vae(tmp_path / "taef1_decoder.safetensors")).space is SPACES["flux1"]
    (tmp_path / "taesd_decoder.pth").unlink()
    refusal(lambda: load_vae(tmp_path / "taesd"), "taesd", "its decoder is missing")


def test_no_weight_is_dropped(tmp_path):
    """A key without a place that `strict=False` would leave out: a picture of a network that was never trained."""
    save_tiny(tmp_path, "taesd", latent_channels=4)
    file = tmp_path / "taesd_decoder.pth"
    torch.save({**torch.load(file), "5.pool.0.weight": torch.zeros(4)}, file)
    refusal(lambda: load_vae(tmp_path).model, "5.pool.0.weight")


def test_the_real_taef2_reconstructs_photos(shared):
    """The pooled blocks' normalisation in other groups: 28 dB in place of 33, without an error."""
    photo = Image.open(ROOT / "assets" / "photos" / "eval" / "budgie_blue-periwinkle.jpg").convert("RGB").resize((256, 256))
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1
    codec = Codec(load_vae(shared / "vaes" / "taef2"))
    assert codec.space is SPACES["flux2"]
    error = (codec.decode(codec.encode(image)).clamp(-1, 1) - image).square().mean()
    assert 10 * torch.log10(4 / error) > 31


def test_half_precision_variants_and_sharded_weights_load(vae_folders, tmp_path):
    """A folder that holds only `.fp16.` files or parts with an index: no VAE there, or the first part alone."""
    model = AutoencoderKL.from_pretrained(vae_folders["kl4"])
    expected = Codec(load_vae(vae_folders["kl4"])).encode(images())
    prints = set()
    for name, options in {
        "fp16": {"variant": "fp16"},
        "shards": {"max_shard_size": "100KB"},
        "both": {"variant": "fp16", "max_shard_size": "100KB"},
    }.items():
        model.save_pretrained(tmp_path / name, **options)
        assert not (tmp_path / name / WEIGHTS).exists()
        codec = Codec(load_vae(tmp_path / name))
        torch.testing.assert_close(codec.encode(images()), expected)
        prints.add(codec.fingerprint)
    part = next((tmp_path / "shards").glob("*-of-*.safetensors"))
    save_file({key: tensor + 1 for key, tensor in load_file(part).items()}, part)
    assert Codec(load_vae(tmp_path / "shards")).fingerprint not in prints  # the parts count, not the index alone
    part.unlink()
    refusal(lambda: load_vae(tmp_path / "shards").model, "shards", "cannot be loaded")


# ----------------------------------------------------------------------------------------------------------------------
# Single files


ORIGINAL = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
            "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "conv_norm_out": "norm_out",
            "conv_shortcut": "nin_shortcut"}  # fmt: skip


def in_original_layout(model):
    """An AutoencoderKL's weights under their original names (CompVis ldm, first_stage_model)."""
    levels = len(model.config.block_out_channels)
    renamed = {}
    for name, tensor in model.state_dict().items():
        part, *rest = name.split(".")
        name = ".".join(rest)
        tensor = tensor[..., None, None] if "attentions" in name and tensor.ndim == 2 else tensor
        for theirs, original in ORIGINAL.items():
            name = name.replace(theirs, original)
        for level in range(levels):
            name = name.replace(f"down_blocks.{level}.resnets", f"down.{level}.block")
            name = name.replace(f"down_blocks.{level}.downsamplers.0", f"down.{level}.downsample")
            name = name.replace(f"up_blocks.{level}.resnets", f"up.{levels - 1 - level}.block")
            name = name.replace(f"up_blocks.{level}.upsamplers.0", f"up.{levels - 1 - level}.upsample")
        renamed[f"{part}.{name}"] = tensor.contiguous()
    return renamed


def make_original(channels, **options):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=(32, 32, 64, 64), latent_channels=channels, **blocks, **options).eval()


@pytest.mark.parametrize("kind", ["sd15", "flux1", "checkpoint"])
def test_single_files_in_the_original_layout(tmp_path, kind):
    """A file that needs the hub for its config, a scale that is taken for SD1.5's, a whole checkpoint refused."""
    if kind == "flux1":
        numbers = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
        model = make_original(16, use_quant_conv=False, use_post_quant_conv=False, **numbers)
    else:
        model = make_original(4, scaling_factor=0.18215)
    weights, file = in_original_layout(model), tmp_path / "ae.safetensors"
    if kind == "sd15":
        file = tmp_path / "vae-ft-mse-840000-ema-pruned.safetensors"
    if kind == "checkpoint":
        file = tmp_path / "some_model.ckpt"
        weights = {f"first_stage_model.{name}": tensor for name, tensor in weights.items()}
        weights["model.diffusion_model.out.2.bias"] = torch.zeros(4)
        torch.save({"state_dict": weights}, file)
    else:
        save_file(weights, file)
    ours, theirs = Codec(load_vae(file), str(file)), Codec(model)
    assert ours.space is theirs.space is SPACES["flux1" if kind == "flux1" else "sd15"]
    latents = theirs.encode(images())
    torch.testing.assert_close(ours.encode(images()), latents)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(latents))


def test_a_single_file_that_does_not_say_its_scale_wants_a_name(tmp_path):
    """SDXL's VAE has SD1.5's shapes: a guess would be wrong by a third, silently."""
    file = tmp_path / "my_vae.safetensors"
    model = make_original(4, scaling_factor=0.13025)
    save_file(in_original_layout(model), file)
    refusal(lambda: Codec(load_vae(file)), "my_vae", "sd15, sdxl, playground25")
    torch.testing.assert_close(Codec(load_vae(file), space="sdxl").encode(images()), Codec(model).encode(images()))
    shutil.copy(file, tmp_path / "sdxl_vae.safetensors")
    assert Codec(load_vae(tmp_path / "sdxl_vae.safetensors")).space is SPACES["sdxl"]
    refusal(lambda: Codec(load_vae(tmp_path / "sdxl_vae.safetensors"), space="sd15"), "sdxl", "sd15")


def test_a_damaged_single_file_is_one_line(tmp_path):
    """Weights left at random because a name is missing, or dropped because it has no place."""
    weights = in_original_layout(make_original(4))
    file = tmp_path / "sdxl_vae.safetensors"
    save_file({name: tensor for name, tensor in weights.items() if name != "decoder.mid.block_1.conv1.bias"}, file)
    refusal(lambda: load_vae(file).model, "sdxl_vae")
    save_file({**weights, "decoder.mid.block_3.conv1.bias": torch.zeros(3)}, file)
    refusal(lambda: load_vae(file).model, "sdxl_vae", "weights")
    save_file({"unet.weight": torch.zeros(3)}, file)
    refusal(lambda: load_vae(file), "sdxl_vae", "holds no VAE")
    file.write_bytes(b"nothing")
    refusal(lambda: load_vae(file), "sdxl_vae")


@pytest.mark.parametrize("family", ["flux2", "wan21", "ltx", "hunyuan-video", "sana"])
def test_a_single_file_of_another_class_is_one_line_with_the_remedy(family, tmp_path):
    """A Wan or LTX VAE of which it is said that it is none, or a first layer that fits by chance and weights left at random."""
    file = tmp_path / "vae.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in make_family(family).state_dict().items()}, file)
    refusal(lambda: load_vae(file), file.name, "layout of the original AutoencoderKL", "folder of its diffusers version")


# ----------------------------------------------------------------------------------------------------------------------
# What lies in place of a VAE


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 12345\n"
POINTED = {  # the file that is a pointer, and what reads it
    "weights": ("kl4/diffusion_pytorch_model.safetensors", lambda root: load_vae(root / "kl4").model),
    "config": ("kl4/config.json", lambda root: load_vae(root / "kl4")),
    "tiny": ("taesd_decoder.pth", lambda root: load_vae(root / "taesd").model),
    "single": ("ae.safetensors", lambda root: load_vae(root / "ae.safetensors")),
    "module": ("m.safetensors", lambda root: AlignPipeline.from_pretrained(root / "m.safetensors")),
    "checkpoint": ("m.pth", lambda root: read_checkpoint(root / "m.pth")),
    "flags": ("c.json", lambda root: load_config(root / "c.json")),
}


@pytest.mark.parametrize("kind", POINTED)
def test_a_pointer_of_git_lfs_is_named(tmp_path, vae_folders, kind):
    """ "1676291 weights are described, in a file of 132 bytes", or "header too large", to who has cloned without git-lfs."""
    shutil.copytree(vae_folders["kl4"], tmp_path / "kl4")
    save_tiny(tmp_path, "taesd", latent_channels=4)
    name, read = POINTED[kind]
    (tmp_path / name).write_text(POINTER)
    refusal(lambda: read(tmp_path), "git-lfs pointer", "git lfs pull")


def test_the_hub_clients_own_folder_of_a_model_is_taken(tmp_path, vae_folders):
    """ "there are no files", though they lie in snapshots/; the older of two downloads."""
    own = tmp_path / "models--owner--a-name"
    for commit, vae in (("0" * 40, "kl4"), ("1" * 40, "kl16")):
        shutil.copytree(vae_folders[vae], own / "snapshots" / commit / "vae")
    (own / "refs").mkdir()
    for commit, channels in (("0" * 40, 4), ("1" * 40, 16)):
        (own / "refs" / "main").write_text(commit)
        assert load_vae(own).channels == channels
    refusal(lambda: load_vae(own / "snapshots"), "there are models in", f"{'0' * 40}/vae")


@pytest.mark.parametrize(
    "error", [ValueError("a proxy"), FileNotFoundError("a certificate"), ssl.SSLError("of it"), KeyError()]
)
def test_a_downloaded_vae_is_used_whatever_keeps_the_hub_away(vae_folders, monkeypatch, caplog, error):
    """A model that is in the cache and that cannot be had, for a proxy's URL of another kind or a certificate that is gone."""

    def download(repo, name, *, local_files_only, **_):
        if not local_files_only:
            raise error
        if repo != "owner/cached":
            raise errors.LocalEntryNotFoundError("nothing here")
        return str(vae_folders["kl4"] / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_vae("owner/cached").channels == 4
    assert "owner/cached" in caplog.text and one_line(error) in caplog.text
    refusal(lambda: load_vae("owner/other"), "could not be downloaded", one_line(error))
