"""The closed-form start: the linear map, and the training images that it is fitted on."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from runs import QUIET, same_weights, train

from training.starts import SHIPPED, RidgeRegression, fit_ridge, grids_of, start_from_shipped, start_from_vaes
from utils import UserError
from vae_align import PRETRAINED_NAME, AlignConfig, AlignPipeline, align_module
from vaes.pipeline import PipelineWithVAEs, encoded_batches
from vaes.tiny import TinyAutoencoder

ONE_PROCESS = SimpleNamespace(num_processes=1)


class Loader(list):
    dataset = range(12)


def latents_only(batches=6):
    pipeline = PipelineWithVAEs(align_module(AlignConfig(input_types=("latent",), hidden_channels=8)), None, None)
    pairs = [{"latents1": torch.randn(2, 4, 6, 6), "latents2": torch.randn(2, 16, 6, 6)} for _ in range(batches)]
    return pipeline, Loader(pairs)


def test_the_linear_map_leaves_out_what_is_not_finite():
    """A map of NaN for one image that overflows; the solver's traceback where nothing is finite."""
    pipeline, loader = latents_only()
    expected = RidgeRegression(4, 16)
    for number, batch in enumerate(loader):
        if number in (1, 4):
            batch["latents1" if number == 1 else "latents2"][0, 0, 0, 0] = float("nan")
        else:
            expected.add(batch["latents1"], batch["latents2"])
    fit_ridge(pipeline, loader, ONE_PROCESS)
    weight, bias = expected.solve()
    assert torch.equal(pipeline.module.ridge_weight, weight) and torch.equal(pipeline.module.ridge_bias, bias)
    without, _ = latents_only()
    fit_ridge(without, Loader([loader[1]]), ONE_PROCESS)
    assert not without.module.has_ridge


def test_as_many_images_as_asked_for():
    """Catches images that count although only a part of each batch is looked at, and a pass over all of a large set."""
    pipeline, loader = latents_only()
    assert len(list(encoded_batches(pipeline, loader, ONE_PROCESS, 6))) == 3
    assert len(list(encoded_batches(pipeline, loader, ONE_PROCESS, 5, of_each=1))) == 5
    assert len(list(encoded_batches(pipeline, loader, SimpleNamespace(num_processes=2), 8))) == 2


def test_matches_least_squares():
    """Catches wrong normal equations, a penalised bias, or a weight laid out otherwise than a convolution's."""
    generator = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(6, 3, 8, 8, generator=generator), torch.randn(6, 2, 8, 8, generator=generator) + 5
    regression = RidgeRegression(3, 2)
    regression.add(z1[:4], z2[:4])
    regression.add(z1[4:], z2[4:])
    weight, bias = regression.solve()
    x = F.unfold(z1, 3, padding=1).transpose(1, 2).reshape(-1, 27).double().numpy()
    y = z2.permute(0, 2, 3, 1).reshape(-1, 2).double().numpy()
    expected = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), y, rcond=None)[0]
    assert np.allclose(weight.reshape(2, 27), expected[:27].T, atol=1e-3)
    assert np.allclose(bias, expected[27], atol=1e-3)
    residual = F.conv2d(z1, weight, bias, padding=1) - z2
    assert residual.square().mean() < z2.var(dim=(0, 2, 3)).mean()


def test_a_module_starts_exactly_at_the_linear_map():
    """Catches a deep path that disturbs the start, and a map that does not survive the checkpoint's state_dict."""
    module = align_module(AlignConfig(latent_channels=4, out_channels=16, hidden_channels=8, input_types=("image", "latent")))
    assert not module.has_ridge
    module.remember_ridge(torch.randn_like(module.linear.weight), torch.randn_like(module.linear.bias))
    module.start_from_ridge()
    latents, image = torch.randn(2, 4, 5, 7), torch.rand(2, 3, 40, 56)
    assert torch.allclose(module(latents, image), module.linear_map(latents), atol=1e-5)
    with torch.no_grad():
        module.linear.weight.zero_()
    copy = align_module(module.config)
    copy.load_state_dict(module.state_dict())
    assert copy.has_ridge and torch.equal(copy.linear_map(latents), module.linear_map(latents))


# ----------------------------------------------------------------------------------------------------------------------
# Tiny autoencoders' layers


WIDTH = 8


def tiny(channels, **options):
    widths = {name: (WIDTH,) * 4 for name in ("encoder_block_out_channels", "decoder_block_out_channels")}
    return AutoencoderTiny(latent_channels=channels, **widths, **options).eval().requires_grad_(False)


def started(*input_types, num_blocks=2, vaes=None, file=None, **changes):
    """A module that starts at two tiny autoencoders of four and six channels; the two; what is said."""
    vae1, vae2 = vaes or (tiny(4), tiny(6))
    values = {"architecture": "tiny", "hidden_channels": WIDTH, "out_channels": 6, "num_blocks": num_blocks} | changes
    module = align_module(AlignConfig(input_types=input_types, **values))
    pipeline = SimpleNamespace(module=module, codec1=_codec(vae1), codec2=_codec(vae2))
    return module, vae1, vae2, start_from_vaes(pipeline, file)


def _codec(model):
    channels = model.config["latent_channels"]
    fold = model.config.get("fold", 1)

    def decode(latents):
        return model.decode(F.pixel_shuffle(latents, fold)).sample

    parts = {"vae": SimpleNamespace(model=model), "channels": channels * fold**2, "decode": decode}
    return SimpleNamespace(**parts, warn_of_difference=lambda recorded, what: None)


def by_stages(module, vae2, image):
    """What the module's own first layers and the stages of VAE2's encoder behind them make of an image."""
    for layer in list(module.image_in)[:4]:
        image = layer(image)
    encoder = vae2.encoder.layers
    return encoder[10:](encoder[6:10](encoder[3](image)))


@pytest.mark.parametrize("input_types", [("image",), ("image", "latent")])
def test_an_image_goes_through_the_encoders_stages(input_types):
    """Catches stages paired from the fine end, where the module has fewer blocks, and latents that disturb the start."""
    module, _, vae2, said = started(*input_types)
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    aligned = module(torch.randn(2, 4, 4, 6), image) if len(input_types) == 2 else module(image=image)
    torch.testing.assert_close(aligned, by_stages(module, vae2, image))
    assert said == "the module starts with 10 layers of 10 from VAE2's encoder"


def test_latents_alone_go_through_the_picture_that_vae1_decodes():
    """Catches a decoder's layer copied to another's place, a missing clamp, and pixels of another range than an image's."""
    module, vae1, vae2, said = started("latent")
    latents = 3 * torch.randn(2, 4, 5, 6)
    image = vae1.decode(latents).sample.clamp(-1, 1)
    torch.testing.assert_close(module.picture(latents), image)
    torch.testing.assert_close(module(latents), by_stages(module, vae2, image))
    other = torch.rand_like(image)
    torch.testing.assert_close(module(latents, other), by_stages(module, vae2, other))  # who has the picture passes it
    assert said.startswith("the module starts with 15 layers of 15 from VAE1's decoder and 10 layers of 10 from VAE2's")


@pytest.mark.parametrize("hidden_channels", [WIDTH, 2 * WIDTH])
def test_a_trained_module_gives_its_layers_and_no_other_pairs_map(hidden_channels, tmp_path):
    """Catches layers left at the VAEs', a picture or a linear map of another pair, and a width that does not fit."""
    config = AlignConfig(("image", "latent"), 4, 6, hidden_channels, architecture="tiny")
    trained = AlignPipeline(align_module(config))
    trained.module.remember_ridge(torch.ones(6, 4, 3, 3), torch.ones(6))
    trained.save_pretrained(tmp_path)
    file = str(tmp_path / PRETRAINED_NAME)
    if hidden_channels != WIDTH:
        with pytest.raises(UserError, match=r"^--init_module .*: its latent_in.weight is .* of another shape"):
            started("latent", file=file)
        return
    module, vae1, _, said = started("latent", file=file)
    latents = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(module(latents), trained.module(latents, vae1.decode(latents).sample.clamp(-1, 1)))
    assert not module.has_ridge
    assert said.endswith(f"and the trained layers of {file}")


POOLED = {"pooled_decoder": True, "pooled_encoder": True}


def test_folded_latents_are_drawn_and_made_on_their_own_grid():
    """Catches 2x2 latents unfolded in another order, a pooled block without its pool, and a grid of stride 16 in between."""
    vae1, vae2 = vaes = [TinyAutoencoder(8, pooled=True, fold=2).requires_grad_(False) for _ in range(2)]
    for layer in (*vae1.decoder.modules(), *vae2.encoder.modules()):
        if isinstance(layer, torch.nn.GroupNorm):
            torch.nn.init.normal_(layer.weight, 1.0)
    sides = {
        f"{side}_{what}": value for side in ("latent", "out") for what, value in (("channels", 32), ("stride", 16), ("fold", 2))
    }
    module, *_, said = started("latent", vaes=vaes, hidden_channels=64, **sides | POOLED)
    latents = torch.randn(1, 32, 4, 6)
    image = vae1.decode(F.pixel_shuffle(latents, 2)).sample.clamp(-1, 1)
    torch.testing.assert_close(module.picture(latents), image, atol=1e-4, rtol=1e-4)
    encoder = [layer for layer in vae2.encoder if any(True for _ in layer.parameters())]
    for layer in [*list(module.image_in)[:4], encoder[3], *encoder[6:]]:
        image = layer(image)
    torch.testing.assert_close(module(latents), F.pixel_unshuffle(image, 2), atol=1e-4, rtol=1e-4)
    assert said.startswith("the module starts with 15 layers of 15 from VAE1's decoder and 10 layers of 10 from VAE2's")


def test_the_plain_architecture_knows_nothing_of_the_vaes_own_grids():
    """A key that older versions refuse; a trained module that is built with another grid than its own."""
    codec = SimpleNamespace(vae=SimpleNamespace(fold=2, config={"pooled": True}))
    grids = {"latent_fold": 2, "out_fold": 2, **POOLED}
    assert grids_of(codec, codec, "plain") == {}
    assert grids_of(codec, codec, "tiny") == grids
    assert grids_of(codec, codec, "tiny", AlignConfig(architecture="tiny"))["out_fold"] == 1


@pytest.mark.parametrize(
    "problem, changes",
    [
        ("add --architecture tiny", {"architecture": "plain"}),
        ("set --hidden_channels to the autoencoder's width", {"hidden_channels": 16}),
        ("VAE1 is no tiny autoencoder", {"vaes": (AutoencoderKL(block_out_channels=(32,), norm_num_groups=8), tiny(6))}),
        ("12 layers of 16 from VAE1's decoder fit", {"vaes": (tiny(4, num_decoder_blocks=(3, 3, 4, 1)), tiny(6))}),
        ("cannot hold VAE1's decoder .* pictures differ", {"vaes": (tiny(4, act_fn="gelu"), tiny(6))}),
    ],
)
def test_what_cannot_be_a_start_is_said(problem, changes):
    """Catches a traceback, and a random start that nobody asked for."""
    with pytest.raises(UserError, match=f"^--init vaes: .*{problem}"):
        started("latent", **changes)


@pytest.mark.parametrize("input_types", [("image",), ("latent",)])
def test_the_whole_architecture_starts_as_decode_and_reencode(input_types):
    """Catches a layer of VAE2's encoder that is left out, and an edge beyond which it sees grey in place of black."""
    module, vae1, vae2, said = started(*input_types, architecture="whole")
    latents, image = 3 * torch.randn(2, 4, 5, 6), torch.rand(2, 3, 40, 48) * 2 - 1
    if input_types == ("latent",):
        image = vae1.decode(latents).sample.clamp(-1, 1)
        torch.testing.assert_close(module(latents), vae2.encode(image).latents)
    else:
        torch.testing.assert_close(module(image=image), vae2.encode(image).latents)
    assert said.endswith("15 layers of 15 from VAE2's encoder")


@pytest.mark.parametrize("stride1, stride2", [(8, 16), (16, 8), (32, 8)])
@pytest.mark.parametrize("input_types", [("latent",), ("image", "latent")])
def test_grids_of_different_stride_meet(input_types, stride1, stride2):
    """Catches stages that end on another grid than VAE2's."""
    module = align_module(
        AlignConfig(input_types=input_types, architecture="tiny", hidden_channels=8, latent_stride=stride1, out_stride=stride2)
    )
    inputs = {"latents": torch.zeros(1, 4, 64 // stride1, 96 // stride1)}
    if "image" in input_types:
        inputs["image"] = torch.zeros(1, 3, 64, 96)
    assert module(**inputs).shape == (1, 16, 64 // stride2, 96 // stride2)


def test_a_picture_that_the_cache_holds_is_not_drawn_again():
    """Catches steps that decode what is on the disk, at twice the time."""
    pipeline = PipelineWithVAEs(started("latent")[0], None, None)
    batch = {"latents1": torch.randn(2, 4, 4, 6), "latents2": torch.randn(2, 6, 4, 6), "decoded": torch.rand(2, 3, 32, 48)}
    inputs, target, images = pipeline.encode_batch(batch)
    assert torch.equal(inputs["image"], batch["decoded"]) and torch.equal(target, batch["latents2"])
    assert images is None


@pytest.mark.parametrize(
    "shipped",
    [
        lambda: AlignPipeline.from_pretrained(SHIPPED / "taesd_to_taef1.safetensors"),
        lambda: AlignPipeline.pair("flux2", "sdxl"),
        lambda: AlignPipeline.pair("image", "sd3"),
    ],
)
def test_training_starts_at_what_is_shipped(shipped):
    """Catches a shipped module that is not found by its spaces, and one that is taken for another architecture or space."""
    shipped = shipped()
    started = AlignPipeline(align_module(shipped.config), shipped.space1, shipped.space2)
    assert start_from_shipped(started)
    assert same_weights({"state_dict": started.module.state_dict()}, {"state_dict": shipped.module.state_dict()})
    other = AlignPipeline(align_module(replace(shipped.config, num_blocks=1)), shipped.space1, shipped.space2)
    unnamed = AlignPipeline(align_module(shipped.config))
    assert start_from_shipped(other) is None and start_from_shipped(unnamed) is None


def test_a_run_without_a_shipped_module_starts_as_usual(flags, tmp_path, caplog):
    """Catches a recipe that fails, or starts at random, between VAEs for which nothing is shipped."""
    caplog.set_level("INFO")
    usual = train(flags, tmp_path / "usual", **QUIET, max_train_steps=2)
    assert same_weights(train(flags, tmp_path / "shipped", **QUIET, max_train_steps=2, init="shipped").last, usual.last)
    assert "as with --init ridge" in caplog.text


def test_a_run_starts_there_resumes_and_is_given_away(flags, tmp_path):
    """A start made anew on resuming, a decoder that is trained, an architecture that is not in the file."""
    for number, channels in ((1, 4), (2, 6)):
        tiny(channels).save_pretrained(tmp_path / f"tiny{number}")
        flags[f"vae{number}_path"] = tmp_path / f"tiny{number}"
    changes = {**QUIET, "architecture": "tiny", "init": "vaes", "hidden_channels": WIDTH, "optimizer": "muon"}
    changes["input_types"] = ["latent"]
    whole = train(flags, tmp_path / "whole", **changes, max_train_steps=3)
    train(flags, tmp_path / "parts", **changes, max_train_steps=2)
    parts = train(flags, tmp_path / "parts", **changes, max_train_steps=3, resume="latest")
    assert same_weights(whole.last, parts.last)
    vae1, vae2 = (AutoencoderTiny.from_pretrained(tmp_path / f"tiny{number}") for number in (1, 2))
    pipeline = PipelineWithVAEs.from_checkpoint(whole.checkpoints[-1])
    assert torch.equal(pipeline.module.picture[1].weight, vae1.decoder.layers[0].weight)
    assert pipeline.module.blocks[0].conv[0].weight.ne(vae2.encoder.layers[11].conv[0].weight).any()
    pipeline.save_pretrained(tmp_path / "given")
    assert AlignPipeline.from_pretrained(tmp_path / "given").config.architecture == "tiny"
