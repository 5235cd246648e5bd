"""The loss on the decoded image."""

import pytest
import torch
from runs import train

from decoded_loss import DecodedImageLoss
from utils import UserError
from vae_align import LatentSpace, load_vae_model


@pytest.fixture
def space(vae_folders):
    return LatentSpace(load_vae_model(vae_folders["kl16"], "vae", None, "cpu", torch.float32))


@pytest.mark.parametrize("reference", ["original", "vae2"])
@pytest.mark.parametrize(("kind", "power"), [("l1", 1), ("mse", 2)])
def test_gradient_is_that_of_the_formula(space, reference, kind, power):
    """Catches a loss under no_grad, one that trains the decoder, and a wrong reference."""
    images = torch.rand(3, 3, 48, 32) * 2 - 1
    target = space.encode(images)
    aligned = (target + 0.3 * torch.randn_like(target)).requires_grad_()
    loss = DecodedImageLoss(space, 2, 0, reference, seed=0, kind=kind)(aligned, target, images, step=5)
    wanted = images[:2] if reference == "original" else space.decode(target[:2])
    expected = (space.decode(aligned[:2]) - wanted).abs().pow(power).mean()
    assert torch.allclose(loss, expected)
    (gradient,) = torch.autograd.grad(loss, aligned, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected, aligned)
    assert torch.allclose(gradient, expected_gradient)
    assert gradient[:2].abs().min() > 0 and not gradient[2:].any()
    assert not any(parameter.requires_grad for parameter in space.vae.parameters())


def test_window_belongs_to_its_place_in_the_image(space):
    """Catches a reference cut elsewhere than the latents, and a window that never leaves the image's top or left."""
    images = (torch.rand(1, 3, 64, 64) * 2 - 1).requires_grad_()
    latents = space.encode(images.detach()).requires_grad_()
    loss, corners = DecodedImageLoss(space, 1, 4, "original", seed=0, margin=0), set()

    def extent(gradient):
        used = gradient.abs().sum(dim=(0, 1)).nonzero()
        return *used.min(dim=0).values.tolist(), *(used.max(dim=0).values + 1).tolist()

    for step in range(8):
        by_latents, by_images = torch.autograd.grad(loss(latents, latents.detach(), images, step), (latents, images))
        assert extent(by_images) == tuple(8 * edge for edge in extent(by_latents))
        corners.add(extent(by_latents)[:2])
    tops, lefts = (set(places) for places in zip(*corners))
    assert len(tops) > 1 and len(lefts) > 1


def test_perfect_latents_look_like_vae2(space):
    """Catches a "vae2" reference that is cut or decoded otherwise than the aligned latents."""
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    target = space.encode(images)
    assert all(DecodedImageLoss(space, 2, 4, "vae2", 0)(target, target, None, step) == 0 for step in range(4))


def test_same_step_same_window(space):
    """Catches a window drawn from global random state, which a resumed run would not repeat."""
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    target = space.encode(images)
    loss = DecodedImageLoss(space, 1, 4, "original", 0)
    assert loss(target, target, images, 3) == loss(target, target, images, 3)
    assert len({float(loss(target, target, images, step)) for step in range(6)}) > 1


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
    space = LatentSpace(load_vae_model(vae_folders[folder], "", None, "cpu", torch.float32))
    target = torch.randn(2, space.channels, 6, 6)
    aligned = (target + 0.5 * torch.randn_like(target)).requires_grad_()
    loss = DecodedImageLoss(space, 2, 0, "vae2", 0, weight=0.0, perceptual="decoder", perceptual_weight=3.0)
    assert loss(target, target, None, 0) == 0
    far = loss(aligned, target, None, 0)
    (gradient,) = torch.autograd.grad(far, aligned)
    nearer = loss((aligned - 0.1 * gradient / gradient.norm()).detach(), target, None, 0)
    assert 0 < nearer < far
    doubled = DecodedImageLoss(space, 2, 0, "vae2", 0, weight=0.0, perceptual="decoder", perceptual_weight=6.0)
    assert doubled(aligned, target, None, 0).item() == pytest.approx(2 * far.item(), rel=1e-5)
    assert not any(module._forward_hooks for module in space.vae.modules())


def test_a_perceptual_network_sees_both_pictures_and_passes_its_gradient(space):
    """LPIPS on pictures in another range, in the wrong order, or under no_grad; its weights need not be here for that."""
    seen = []

    def network(shown, wanted):
        seen.append((shown, wanted))
        return (shown - wanted).square().mean(dim=(1, 2, 3))

    images = torch.rand(2, 3, 48, 48) * 2 - 1
    target = space.encode(images)
    aligned = (target + torch.randn_like(target)).requires_grad_()
    loss = DecodedImageLoss(space, 2, 0, "original", 0, weight=0.0, perceptual=network, perceptual_weight=2.0)
    value = loss(aligned, target, images, 0)
    ((shown, wanted),) = seen
    assert torch.equal(wanted, images) and shown.abs().max() <= 1
    assert torch.allclose(value, 2 * (shown - images).square().mean())
    assert torch.autograd.grad(value, aligned)[0].any()


def test_lpips_without_its_weights_says_what_to_fetch(flags, tmp_path, monkeypatch):
    """A download without being asked, a traceback, or a run that quietly goes without the loss."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"^--perceptual_loss lpips: .*(pip install|fetch|not on this machine)"):
        train(flags, tmp_path, perceptual_loss="lpips", perceptual_loss_weight=1.0)
