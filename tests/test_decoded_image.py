"""The loss on the decoded image."""

import shutil
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import QUIET, same_weights, train
from safetensors.torch import load_file, save_file

from losses import (
    ColourReference,
    DecodedImageLoss,
    _eyes,
    _terms,
    decoder_difference,
    picture_distance,
    pixel_difference,
    st_lpips,
)
from train_align_with_args import parse_args
from utils import UserError
from vae_align import AlignConfig, align_module
from vaes.codec import Codec
from vaes.loading import load_vae_model
from vaes.pipeline import PipelineWithVAEs


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
    """Catches a "vae2" reference that is cut or decoded otherwise than the aligned latents."""
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    target = space.encode(images)
    assert all(DecodedImageLoss(space, 2, 4, "vae2", 0)(target, target, None, step)[0] == 0 for step in range(4))


def test_an_empty_comparison_is_impossible(space):
    """A window so small that the margins on both sides leave nothing of it: a loss of nan."""
    target = torch.randn(2, 16, 6, 6)
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
    """Catches a bias measured against another window, with another sign or of another place; a "vae2" reference that is given
    a bias."""
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
    """Catches a correction of the wrong sign, one that forgets that VAE2 itself has a bias, and one by a step that was not
    finite: an image that follows the reference but for a bias of its own ends with VAE2's."""
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
    """A start that is read as a number of steps, or never comes; a term that begins before it."""
    changes = {"perceptual_loss_weight": 1.0, "image_size": 64, "decoder_loss_start": 0.5, **QUIET}
    for steps, corrected in ((2, True), (1, False)):  # begins after the first of two
        run = train(flags, tmp_path / str(steps), max_train_steps=steps, **changes)
        colours = run.last["training"]["colours"]
        assert bool((colours["shift"] != colours["vae2_bias"]).any()) == corrected
    plain = train(flags, tmp_path / "plain", max_train_steps=1, **QUIET | {"image_size": 64})
    assert same_weights(run.last, plain.last)


def test_training_measures_and_corrects_the_colours(flags, tmp_path):
    """Catches colours that are never measured or corrected, or are lost to a checkpoint and so to the run that resumes."""
    states = []
    for name, red in (("as it is", 0.0), ("redder", 0.25)):
        vae = Path(shutil.copytree(flags["vae2_path"], tmp_path / name / "vae2"))
        (file,) = vae.glob("*.safetensors")
        weights = load_file(file)
        weights["decoder.conv_out.bias"][0] += red
        save_file(weights, file)
        changes = {"decoder_loss_weight": 1.0, "decoder_loss_batch": 3, "decoder_loss_window": 2, "max_train_steps": 2}
        run = train(flags, tmp_path / name, vae2_path=vae, **changes, **QUIET)
        states.append(run.last["training"]["colours"])
    redder = (states[1]["vae2_bias"] - states[0]["vae2_bias"]).mean(dim=(1, 2))
    assert redder.tolist() == pytest.approx([0.25, 0, 0], abs=1e-4)
    assert all((state["shift"] != state["vae2_bias"]).all() for state in states)


def test_a_decoder_of_its_own(flags, tmp_path):
    """Catches a --decoder_loss_path that is read and not used, or used for the targets too."""
    plain, same, other = (
        train(flags, tmp_path / name, decoder_loss_weight=1.0, max_train_steps=3, **QUIET, **changes).last
        for name, changes in (
            ("plain", {}),
            ("same", {"decoder_loss_path": flags["vae2_path"]}),
            ("other", {"decoder_loss_path": another_decoder(flags["vae2_path"], tmp_path)}),
        )
    )
    assert same_weights(plain, same) and not same_weights(plain, other)


def another_decoder(folder, tmp_path):
    vae = Path(shutil.copytree(folder, tmp_path / "another"))
    (file,) = vae.glob("*.safetensors")
    weights = load_file(file)
    weights["decoder.conv_out.weight"].neg_()
    save_file(weights, file)
    return vae


def test_the_edges_of_an_image_are_decoded_as_often_as_a_quarter_of_the_time(space):
    """Catches windows drawn evenly over the image, which touch an edge once in as many steps as there is room for."""
    loss = DecodedImageLoss(space, 1, 4, "vae2", 0)
    rows = torch.arange(12.0).view(1, 1, 12, 1).expand(1, 1, 12, 12)
    tops = [int(loss.window_of(rows.shape[2:], step).cut(rows).min()) for step in range(400)]
    assert tops.count(0) > 80 and tops.count(8) > 80 and set(tops) == set(range(9))


def test_what_lacks_its_surroundings_is_not_compared(space):
    """Catches a margin that is not trimmed: at a window's edge inside the image the decoder's padding is no error of ours."""
    target = torch.randn(1, 16, 12, 12)
    images = space.decode(target).detach()
    loss = DecodedImageLoss(space, 1, 4, "original", 0, margin=1)
    for step in range(30):
        window = loss.window_of(target.shape[2:], step)
        inner = window.inner(1, 8)
        decoded, image = space.decode(window.cut(target))[inner], window.cut(images, 8)[inner]
        top = int(window.cut(torch.arange(12.0).view(1, 1, 12, 1).expand(1, 1, 12, 12)).min())
        assert decoded.shape[2] == 32 - 8 * (top > 0) - 8 * (top < 8)
        assert torch.allclose(loss(target, target, images, step)[0], (decoded - image).abs().mean())


def test_same_step_same_window(space):
    """Catches a window drawn from global random state, which a resumed run would not repeat."""
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    target = space.encode(images)
    loss = DecodedImageLoss(space, 1, 4, "original", 0)
    assert loss(target, target, images, 3)[0] == loss(target, target, images, 3)[0]
    assert len({float(loss(target, target, images, step)[0]) for step in range(6)}) > 1


def test_a_vae_first_used_in_evaluation_still_takes_part_in_training(space):
    """Catches weights that were read under inference_mode, which autograd then refuses."""
    with torch.inference_mode():
        space.decode(torch.zeros(1, 16, 2, 2))
    latents = torch.zeros(1, 16, 2, 2, requires_grad=True)
    space.decode(latents).sum().backward()
    assert latents.grad.abs().sum() > 0


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


def test_a_perceptual_network_sees_both_pictures_and_passes_its_gradient(space):
    """LPIPS on pictures in another range, in the wrong order, or under no_grad; its weights need not be here for that."""
    seen = []

    def network(shown, wanted):
        seen.append((shown, wanted))
        return (shown - wanted).square().mean(dim=(1, 2, 3))

    images = torch.rand(2, 3, 48, 48) * 2 - 1
    target = space.encode(images)
    aligned = (target + torch.randn_like(target)).requires_grad_()
    loss = DecodedImageLoss(space, 2, 0, "original", 0, terms=[(2.0, picture_distance(network))])
    value, _ = loss(aligned, target, images, 0)
    ((shown, wanted),) = seen
    assert torch.equal(wanted, images) and shown.abs().max() <= 1
    assert torch.allclose(value, 2 * (shown - images).square().mean())
    assert torch.autograd.grad(value, aligned)[0].any()


def test_st_lpips_looks_through_alexnet_and_its_gradient_reaches_the_latents(space):
    """A loss with the verdict's own network, which would flatter itself; a gradient that stops at the pictures."""
    args = parse_args(["--perceptual_loss", "stlpips", "--perceptual_loss_weight", "1"])
    network = _eyes(args, space)
    assert network.channels == st_lpips("alex").channels
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    target = space.encode(images)
    aligned = (target + torch.randn_like(target)).requires_grad_()
    loss = DecodedImageLoss(space, 2, 0, "vae2", 0, terms=_terms(args, "cpu"), eyes=network)
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
