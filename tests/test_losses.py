"""The loss terms against their plain formulas."""

import importlib.util
import shutil
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import QUIET, same_weights, train
from safetensors.torch import load_file, save_file

import losses as module
import train_align_with_args as train_script
from losses import (
    LOSSES,
    ColourReference,
    DecodedImageLoss,
    PerceptualDistance,
    channel_moments,
    decoded_image_loss,
    decoder_difference,
    draw_window,
    feature_distance,
    get_loss_function,
    picture_distance,
    pixel_difference,
    reencoded_of,
    st_lpips,
)
from utils import UserError
from vae_align import AlignConfig, align_module
from vaes.codec import Codec
from vaes.loading import load_vae_model
from vaes.pipeline import PipelineWithVAEs


@pytest.fixture
def pair():
    """(prediction, target): latents (2, 3, 5, 7), the channels of very different scale."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1)
    prediction, target = (torch.randn(2, 3, 5, 7, generator=generator) * scale for _ in range(2))
    return prediction.requires_grad_(), target


def weights_of(target):
    """The weights that the docstring of `weighted_l1` promises, element by element in float64."""
    target = target.double().numpy()
    distance = np.empty_like(target)
    for item, channel, row, column in np.ndindex(target.shape):
        around = target[item, channel, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        distance[item, channel, row, column] = abs(target[item, channel, row, column] - around.mean())
    weights = 1 + distance / distance.mean(axis=(0, 2, 3), keepdims=True)
    return torch.from_numpy(weights / weights.mean())


@pytest.mark.parametrize("name, formula", [("mse", np.square), ("l1", np.abs)])
def test_loss_is_its_formula_averaged_over_all_elements(pair, name, formula):
    """A sum in place of a mean, a factor forgotten, two names swapped."""
    prediction, target = pair
    error = (prediction - target).detach().double().numpy()
    assert get_loss_function(name)(prediction, target).item() == pytest.approx(formula(error).mean(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_a_scalar_zero_for_equals_and_falls_along_its_gradient(pair, name):
    """A term under no_grad, of the wrong sign, or that leaves a rest for a perfect prediction."""
    prediction, target = pair
    loss = LOSSES[name](prediction, target)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert loss.shape == () and gradient.isfinite().all()
    assert (gradient.sign() == (prediction - target).sign()).all()
    assert LOSSES[name](prediction - 1e-3 * gradient.sign(), target) < loss
    assert LOSSES[name](target, target).item() == pytest.approx(0, abs=1e-8)


def test_weighted_l1_is_the_formula_of_its_docstring(pair):
    """Padding counted as zeros, small channels drowned, weights not of mean 1, infinite or lowered by training."""
    prediction, target = pair[0], pair[1].clone().requires_grad_()
    expected = (weights_of(pair[1]) * (prediction - target).detach().abs()).mean().item()
    assert get_loss_function("weighted_l1")(prediction, target).item() == pytest.approx(expected, rel=1e-5)
    to_prediction, to_target = torch.autograd.grad(LOSSES["weighted_l1"](prediction, target), (prediction, target))
    expected = weights_of(pair[1]) * (prediction - target).detach().sign() / target.numel()
    torch.testing.assert_close(to_prediction.double(), expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(to_target, -to_prediction)
    flat = torch.full((1, 4, 4, 4), 3.0)
    assert get_loss_function("weighted_l1")(flat - 0.25, flat).item() == pytest.approx(0.25, rel=1e-4)


def test_unknown_loss_is_an_error_that_lists_the_known():
    """A KeyError traceback."""
    with pytest.raises(UserError, match=r"loss_type l3: choose from mse, l1, weighted_l1"):
        get_loss_function("l3")


def test_channel_moments_see_mean_and_spread_of_a_channel_and_no_place(pair):
    """A term per image instead of per channel, one that a mirrored picture changes, a gradient of nan for a flat channel."""
    prediction, target = pair
    made = [latents.detach().double().numpy() for latents in pair]
    expected = sum(
        np.mean((figure(made[0], axis=(0, 2, 3)) - figure(made[1], axis=(0, 2, 3))) ** 2) for figure in (np.mean, np.std)
    )
    assert channel_moments(prediction, target).item() == pytest.approx(expected, rel=1e-4)
    assert channel_moments(target.flip(3), target).item() == pytest.approx(0, abs=1e-8)
    flat = torch.zeros(1, 2, 3, 3, requires_grad=True)
    channel_moments(flat, target[:1, :2, :3, :3]).backward()
    assert flat.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Re-encoded targets


@pytest.fixture(scope="module", params=["kl4", "kl4_stride4"])
def codecs(vae_folders, request):
    return [Codec(load_vae_model(vae_folders[name], "", None, "cpu", torch.float32)) for name in (request.param, "kl16")]


def reencoded(codecs, images, weight=0.75):
    return reencoded_of({}, codecs[0].encode(images), *codecs, weight)


def test_latents_and_picture_are_those_of_decode_and_re_encode(codecs):
    """A target of another image or stride, not clamped, or with a gradient; a cache that is not read."""
    codec1, codec2 = codecs
    source = codec1.encode(torch.rand(3, 3, 48, 64) * 2 - 1).requires_grad_()
    made = reencoded_of({}, source, codec1, codec2, 0.5)
    picture = codec1.decode(source).clamp(-1, 1)
    torch.testing.assert_close(made.latents, codec2.encode(picture))
    assert not made.latents.requires_grad
    torch.testing.assert_close(made.picture, picture)
    cached = {"reencoded": torch.randn_like(made.latents), "decoded": torch.rand_like(picture)}
    made = reencoded_of(cached, source, codec1, codec2, 0.5)
    assert torch.equal(made.latents, cached["reencoded"]) and torch.equal(made.picture, cached["decoded"])
    assert reencoded_of({"reencoded": cached["reencoded"]}, source, codec1, codec2, 0.5).picture is None


def test_pixels_and_perception_follow_the_re_encoded_picture(codecs):
    """Shares swapped, perception of the mixture, colours measured against VAE1's picture."""
    codec1, codec2 = codecs
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    target, seen = codec2.encode(images), []
    made = reencoded(codecs, images)
    picture = codec1.decode(codec1.encode(images)).clamp(-1, 1)
    network = picture_distance(lambda shown, wanted: seen.append((shown, wanted)) or shown.mean(dim=(1, 2, 3)))
    loss = DecodedImageLoss(codec2, 2, 0, "original", 0, terms=[(1.0, pixel_difference("mse")), (0.0, network)])
    value, window = loss(target, target, images, 0, made)
    shown = codec2.decode(target)
    torch.testing.assert_close(value, (shown - 0.25 * images - 0.75 * picture).square().mean())
    torch.testing.assert_close(seen[0][1], picture)
    assert seen[0][0].abs().max() <= 1
    torch.testing.assert_close(window.bias.mean(dim=(1, 2)), (shown - images).mean(dim=(0, 2, 3)))


def test_decoder_features_are_those_of_the_re_encoded_latents(codecs):
    """Features of VAE2's own latents, which ask for what re-encoding cannot know."""
    codec2 = codecs[1]
    target = torch.randn(2, 16, 6, 6)
    made = reencoded(codecs, torch.rand(2, 3, 48, 48))
    loss = DecodedImageLoss(codec2, 2, 0, "vae2", 0, terms=[(1.0, decoder_difference)])
    kept = [codec2.decode_with_features(latents)[1] for latents in (target, made.latents)]
    torch.testing.assert_close(loss(target, target, None, 0, made)[0], feature_distance(*kept))


def test_training_moves_towards_re_encoded_latents(flags, tmp_path):
    """A flag that changes nothing; one that needs a decoded loss to be on, or the images that a cache of latents lacks."""
    changes = {**QUIET, "epochs": 1, "input_types": ["latent"]}
    plain = train(flags, tmp_path / "plain", **changes)
    run = train(flags, tmp_path / "mixed", **changes, reencode_target=0.7)
    assert not same_weights(plain.last, run.last)


def test_the_latent_loss_has_the_gradient_of_that_of_the_mixture(flags, tmp_path):
    """Shares that do not add up to 1, or a second term that stays outside --loss_weight."""
    args = train_script.parse_args(["--reencode_target", "0.7", "--decoder_loss_batch", "2", "--loss_weight", "3"])
    vaes = [load_vae_model(flags[f"vae{number}_path"], "", None, "cpu", torch.float32) for number in (1, 2)]
    pipeline = train_script.create_align_pipeline(*vaes, args)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    objective = train_script.create_objective(pipeline, args)
    encoded = objective.encode({"pixel_values": images})
    target = pipeline.codec2.encode(images)
    again = pipeline.codec2.encode(pipeline.codec1.decode(pipeline.codec1.encode(images)).clamp(-1, 1))
    aligned = torch.randn_like(target).requires_grad_()
    loss, _ = objective(aligned, encoded, 0)
    mixture = 3 * (aligned - 0.3 * target - 0.7 * again).square().mean()
    gradients = [torch.autograd.grad(value, aligned)[0] for value in (loss, mixture)]
    torch.testing.assert_close(*gradients)


# ----------------------------------------------------------------------------------------------------------------------
# The decoded image


@pytest.fixture
def space(vae_folders):
    return Codec(load_vae_model(vae_folders["kl16"], "vae", None, "cpu", torch.float32))


@pytest.mark.parametrize("reference", ["original", "vae2"])
@pytest.mark.parametrize(("kind", "power"), [("l1", 1), ("mse", 2)])
def test_gradient_is_that_of_the_formula(space, reference, kind, power):
    """Catches a loss under no_grad, one that trains the decoder, and a wrong reference."""
    images = torch.rand(3, 3, 48, 32) * 2 - 1
    target = space.encode(images)
    aligned = (target + 0.3 * torch.randn_like(target)).requires_grad_()
    loss = DecodedImageLoss(space, 2, 0, reference, seed=0, terms=[(1.0, pixel_difference(kind))])(
        aligned, target, images, step=5
    )[0]
    wanted = images[:2] if reference == "original" else space.decode(target[:2])
    expected = (space.decode(aligned[:2]) - wanted).abs().pow(power).mean()
    assert torch.allclose(loss, expected)
    (gradient,) = torch.autograd.grad(loss, aligned, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected, aligned)
    assert torch.allclose(gradient, expected_gradient)
    assert gradient[:2].abs().min() > 0 and not gradient[2:].any()
    assert not any(parameter.requires_grad for parameter in space.vae.model.parameters())


def test_window_belongs_to_its_place_in_the_image(space):
    """Catches a reference cut elsewhere than the latents, and a window that never leaves the image's top or left."""
    images = (torch.rand(1, 3, 64, 64) * 2 - 1).requires_grad_()
    latents = space.encode(images.detach()).requires_grad_()
    loss, corners = DecodedImageLoss(space, 1, 4, "original", seed=0, margin=0), set()

    def extent(gradient):
        used = gradient.abs().sum(dim=(0, 1)).nonzero()
        return *used.min(dim=0).values.tolist(), *(used.max(dim=0).values + 1).tolist()

    for step in range(8):
        by_latents, by_images = torch.autograd.grad(loss(latents, latents.detach(), images, step)[0], (latents, images))
        assert extent(by_images) == tuple(8 * edge for edge in extent(by_latents))
        corners.add(extent(by_latents)[:2])
    tops, lefts = (set(places) for places in zip(*corners))
    assert len(tops) > 1 and len(lefts) > 1


def test_perfect_latents_look_like_vae2(space):
    """A "vae2" reference cut or decoded otherwise than the aligned latents; a loss of nan for a tiny window."""
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    target = space.encode(images)
    assert all(DecodedImageLoss(space, 2, 4, "vae2", 0)(target, target, None, step)[0] == 0 for step in range(4))
    for window in (1, 2, 3):
        assert DecodedImageLoss(space, 2, window, "vae2", 0)(target + 0.1, target, None, 5)[0] > 0


ONE_PROCESS = SimpleNamespace(reduce=lambda tensor, how: tensor, num_processes=1)


class Loader(list):
    dataset = range(4)


OK = torch.tensor(True)


@pytest.mark.parametrize("reference", ["original", "vae2"])
def test_the_reference_is_compared_in_shifted_colours(space, reference):
    """Catches a shift that never reaches the loss, or reaches it in another channel or at another place."""
    images = torch.rand(2, 3, 48, 48) * 1.6 - 0.8
    target = space.encode(images)
    loss = DecodedImageLoss(space, 2, 0, reference, 0, terms=[(1.0, pixel_difference("mse"))])
    loss.colours.shift = torch.randn(3, 8, 8)
    wanted = images if reference == "original" else space.decode(target)
    shift = torch.stack([torch.stack([loss.colours.shift[:, y % 8, x % 8] for x in range(48)], 1) for y in range(48)], 1)
    expected = (space.decode(target) - wanted - shift).square().mean()
    assert torch.allclose(loss(target, target, images, 3)[0], expected)


def test_the_colour_bias_of_vae2_is_measured(space):
    """A bias of another window, sign or place; a "vae2" reference that is given a bias."""
    images = torch.rand(4, 3, 48, 48) * 1.6 - 0.8
    target = space.encode(images)
    batches = [{"latents2": latents, "pixel_values": pixels} for latents, pixels in zip(target.split(2), images.split(2))]
    loader = Loader(batches)
    pipeline = PipelineWithVAEs(align_module(AlignConfig(input_types=("image",), hidden_channels=8)), None, space)
    by_place = torch.stack([(space.decode(target) - images)[..., place // 8 :: 8, place % 8 :: 8] for place in range(64)])
    bias = by_place.mean(dim=(1, 3, 4)).T.reshape(3, 8, 8)
    for reference, expected in (("original", bias), ("vae2", torch.zeros(3, 8, 8))):
        loss = DecodedImageLoss(space, 2, 0, reference, 0)
        loss.measure_colours(pipeline, loader, ONE_PROCESS)
        assert torch.allclose(loss.colours.vae2_bias, expected, atol=1e-6)
        assert torch.equal(loss.colours.shift, loss.colours.vae2_bias)


def test_colours_are_led_to_those_of_vae2():
    """A correction of the wrong sign, without VAE2's own bias, or by a step that was not finite."""
    colours = ColourReference("cpu", 2)
    first, second = 0.03 * torch.randn(2, 3, 2, 2)
    colours.start_from([first, second], ONE_PROCESS)
    torch.testing.assert_close(colours.vae2_bias, (first + second) / 2)
    own = 0.02 * torch.randn(3, 2, 2)
    for _ in range(1000):
        bias = colours.shift + own
        colours.correct(bias, OK, ONE_PROCESS)
    torch.testing.assert_close(bias, colours.vae2_bias, atol=1e-3, rtol=0)
    before = colours.shift
    colours.correct(torch.full((3, 2, 2), float("nan")), ~OK, ONE_PROCESS)
    assert torch.equal(colours.shift, before)
    for _ in range(1000):  # an image that does not follow
        colours.correct(torch.ones(3, 2, 2), OK, ONE_PROCESS)
    torch.testing.assert_close(colours.vae2_bias - colours.shift, torch.full((3, 2, 2), 8 / 127.5))


def test_losses_on_the_decoded_image_begin_when_told(flags, tmp_path):
    """A start read as a number of steps; a term before it; colours never measured, corrected or saved."""
    changes = {"perceptual_loss_weight": 1.0, "image_size": 64, "decoder_loss_start": 0.5, **QUIET}
    for steps, corrected in ((2, True), (1, False)):  # begins after the first of two
        run = train(flags, tmp_path / str(steps), max_train_steps=steps, **changes)
        colours = run.last["training"]["colours"]
        assert bool((colours["shift"] != colours["vae2_bias"]).any()) == corrected
        assert colours["vae2_bias"].any()
    plain = train(flags, tmp_path / "plain", max_train_steps=1, **QUIET | {"image_size": 64})
    assert same_weights(run.last, plain.last)


def test_a_decoder_of_its_own(flags, tmp_path):
    """Catches a --decoder_loss_path that is read and not used, or used for the targets too."""
    changed = Path(shutil.copytree(flags["vae2_path"], tmp_path / "changed"))
    (file,) = changed.glob("*.safetensors")
    weights = load_file(file)
    weights["decoder.conv_out.weight"].neg_()
    save_file(weights, file)
    plain, same, other = (
        train(flags, tmp_path / name, decoder_loss_weight=1.0, max_train_steps=3, **QUIET, **changes).last
        for name, changes in (
            ("plain", {}),
            ("same", {"decoder_loss_path": flags["vae2_path"]}),
            ("other", {"decoder_loss_path": changed}),
        )
    )
    assert same_weights(plain, same) and not same_weights(plain, other)


def test_the_edges_of_an_image_are_decoded_as_often_as_a_quarter_of_the_time():
    """Catches windows drawn evenly over the image, which touch an edge once in as many steps as there is room for."""
    rows = torch.arange(12.0).view(1, 1, 12, 1).expand(1, 1, 12, 12)
    tops = [int(draw_window((12, 12), 4, 1, 0, step).cut(rows).min()) for step in range(400)]
    assert tops.count(0) > 80 and tops.count(8) > 80 and set(tops) == set(range(9))


def test_what_lacks_its_surroundings_is_not_compared(space):
    """Catches a margin that is not trimmed: at a window's edge inside the image the decoder's padding is no error of ours."""
    target = torch.randn(1, 16, 12, 12)
    images = space.decode(target).detach()
    loss = DecodedImageLoss(space, 1, 4, "original", 0, margin=1)
    for step in range(30):
        window = draw_window((12, 12), 4, 1, 0, step)
        inner = window.inner(1, 8)
        decoded, image = space.decode(window.cut(target))[inner], window.cut(images, 8)[inner]
        top = int(window.cut(torch.arange(12.0).view(1, 1, 12, 1).expand(1, 1, 12, 12)).min())
        assert decoded.shape[2] == 32 - 8 * (top > 0) - 8 * (top < 8)
        assert torch.allclose(loss(target, target, images, step)[0], (decoded - image).abs().mean())


@pytest.mark.parametrize("folder", ["kl16", "tiny4"])
def test_decoder_features_pull_towards_the_target(vae_folders, folder):
    """A distance without a gradient, hooks that stay in the decoder, or features of the wrong latents."""
    space = Codec(load_vae_model(vae_folders[folder], "", None, "cpu", torch.float32))
    target = torch.randn(2, space.channels, 6, 6)
    aligned = (target + 0.5 * torch.randn_like(target)).requires_grad_()
    loss = DecodedImageLoss(space, 2, 0, "vae2", 0, terms=[(3.0, decoder_difference)])
    assert loss(target, target, None, 0)[0] == 0
    far, _ = loss(aligned, target, None, 0)
    (gradient,) = torch.autograd.grad(far, aligned)
    nearer = loss((aligned - 0.1 * gradient / gradient.norm()).detach(), target, None, 0)[0]
    assert 0 < nearer < far
    doubled = DecodedImageLoss(space, 2, 0, "vae2", 0, terms=[(6.0, decoder_difference)])
    assert doubled(aligned, target, None, 0)[0].item() == pytest.approx(2 * far.item(), rel=1e-5)
    assert not any(module._forward_hooks for module in space.vae.model.modules())


def test_st_lpips_looks_through_alexnet_and_its_gradient_reaches_the_latents(space, monkeypatch):
    """A loss with the verdict's own network, which would flatter itself; a gradient that stops at the pictures."""
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    target = space.encode(images)
    aligned = (target + torch.randn_like(target)).requires_grad_()
    options = {"perceptual_loss": "stlpips", "perceptual_weight": 1.0, "reference": "vae2", "batch_size": 2, "window": 0}
    networks = []
    monkeypatch.setattr(module, "st_lpips", lambda network, device: networks.append(network) or st_lpips(network, device))
    loss = decoded_image_loss(space, 48, **options)
    assert networks == ["alex"]
    value, _ = loss(aligned, target, images, 0)
    assert torch.autograd.grad(value, aligned)[0].any()
    assert loss(target, target, images, 0)[0].item() == pytest.approx(0, abs=1e-6)


def test_a_window_too_small_for_st_lpips_is_named_before_the_first_step(flags, tmp_path):
    """A run that ends in its first step with an error about pictures that the user never chose."""
    with pytest.raises(UserError, match=r"^--decoder_loss_window 3: .* needs at least \d+ latents$"):
        train(flags, tmp_path, perceptual_loss="stlpips", perceptual_loss_weight=1.0, decoder_loss_window=3)


def test_lpips_without_its_weights_says_what_to_fetch(flags, tmp_path, monkeypatch):
    """A traceback, or a run that quietly goes without the loss."""

    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(UserError, match=r"^--perceptual_loss lpips: .*(pip install|fetch|not on this machine)"):
        train(flags, tmp_path, perceptual_loss="lpips", perceptual_loss_weight=1.0)


# ----------------------------------------------------------------------------------------------------------------------
# ST-LPIPS and other networks


def waves(size):
    """One picture (1, 3, height, width) of a few sine waves."""
    high, wide = (torch.arange(side) for side in size)
    planes = [torch.sin(0.37 * (1 + c) * high[:, None] + 0.21 * wide[None, :] * (2 - 0.5 * c)) for c in range(3)]
    return 0.8 * torch.stack(planes)[None]


@pytest.mark.parametrize(("network", "published"), [("alex", 0.143925), ("vgg", 0.742099)])
def test_distances_are_the_packages_own(network, published):
    """A layer, padding or weight in the wrong place. The numbers are from the package's code, version 0.0.2."""
    first = waves((40, 57))
    with torch.no_grad():
        assert st_lpips(network)(first, 0.6 * first.flip(3)).item() == pytest.approx(published, rel=1e-4)


def test_gradients_reach_the_pictures_and_stay_finite():
    """A loss that teaches nothing; a picture without features whose gradient is not a number; weights that train along."""
    distance = st_lpips("alex")
    flat = torch.zeros(1, 3, 48, 48, requires_grad=True)
    distance(flat, waves((48, 48))).sum().backward()
    assert flat.grad.isfinite().all() and flat.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_a_missing_package_a_torn_file_and_a_small_picture_are_named(monkeypatch, tmp_path):
    """A traceback for what one command repairs; an obscure error of a pooling layer for a picture that is too small."""
    with pytest.raises(UserError, match="at least 32 px"):
        PerceptualDistance("vgg").features(torch.zeros(1, 3, 16, 64))
    torn = tmp_path / "alex.pth"
    torn.write_bytes(b"PK\x03\x04")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be read"):
        patch.setattr(module, "_weights_file", lambda network: torn)
        st_lpips("alex")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install stlpips_pytorch"):
        st_lpips("alex")
