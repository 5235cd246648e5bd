"""Re-encoded latents as a target: what is re-encoded, where it belongs, and what a run makes of it."""

import signal

import pytest
import torch
from runs import QUIET, assert_same_tensors, same_weights, train

import train_align_with_args as train_script
from losses import (
    DecodedImageLoss,
    Reencoder,
    decoder_difference,
    decoder_features,
    feature_distance,
    picture_distance,
    pixel_difference,
)
from utils import UserError
from vaes.codec import Codec
from vaes.loading import load_vae_model


@pytest.fixture(scope="module", params=["kl4", "kl4_stride4"])
def codecs(vae_folders, request):
    return [Codec(load_vae_model(vae_folders[name], "", None, "cpu", torch.float32)) for name in (request.param, "kl16")]


def reencoded(codecs, images, weight=0.75):
    return Reencoder(*codecs, weight)({}, codecs[0].encode(images))


def test_latents_and_picture_are_those_of_decode_and_re_encode(codecs):
    """A target of another image, of another stride, or not clamped as a picture is; one that carries a gradient."""
    codec1, codec2 = codecs
    source = codec1.encode(torch.rand(3, 3, 48, 64) * 2 - 1).requires_grad_()
    made = Reencoder(codec1, codec2, 0.5)({}, source)
    picture = codec1.decode(source).clamp(-1, 1)
    torch.testing.assert_close(made.latents, codec2.encode(picture))
    assert not made.latents.requires_grad
    torch.testing.assert_close(made.picture, picture)


def test_what_the_batch_brings_is_not_encoded_again(codecs):
    """A cache that is built and not read."""
    source, latents, picture = codecs[0].encode(torch.rand(2, 3, 48, 48)), torch.randn(2, 16, 6, 6), torch.rand(2, 3, 48, 48)
    made = Reencoder(*codecs, 0.5)({"reencoded": latents, "decoded": picture}, source)
    assert torch.equal(made.latents, latents) and torch.equal(made.picture, picture)
    assert Reencoder(*codecs, 0.5)({"reencoded": latents}, source).picture is None


def test_pixels_and_perception_follow_the_re_encoded_picture(codecs):
    """A mixture with the shares swapped, a perceptual target that is the mixture (two pictures at once are none), colours that
    are measured against VAE1's picture, whose bias the module would then take over."""
    codec1, codec2 = codecs
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    target, seen = codec2.encode(images), []
    made = reencoded(codecs, images)
    picture = codec1.decode(codec1.encode(images)).clamp(-1, 1)
    network = picture_distance(lambda shown, wanted: seen.append(wanted) or shown.mean(dim=(1, 2, 3)))
    loss = DecodedImageLoss(codec2, 2, 0, "original", 0, terms=[(1.0, pixel_difference("mse")), (0.0, network)])
    value, window = loss(target, target, images, 0, made)
    shown = codec2.decode(target)
    torch.testing.assert_close(value, (shown - 0.25 * images - 0.75 * picture).square().mean())
    torch.testing.assert_close(seen[0], picture)
    torch.testing.assert_close(window.bias.mean(dim=(1, 2)), (shown - images).mean(dim=(0, 2, 3)))


def test_decoder_features_are_those_of_the_re_encoded_latents(codecs):
    """Features of VAE2's own latents, which ask for what re-encoding cannot know."""
    codec2 = codecs[1]
    target = torch.randn(2, 16, 6, 6)
    made = reencoded(codecs, torch.rand(2, 3, 48, 48))
    loss = DecodedImageLoss(codec2, 2, 0, "vae2", 0, terms=[(1.0, decoder_difference)])
    kept = []
    for latents in (target, made.latents):
        with decoder_features(codec2.vae.model) as features:
            codec2.decode(latents)
        kept.append(features)
    torch.testing.assert_close(loss(target, target, None, 0, made)[0], feature_distance(*kept))


@pytest.mark.parametrize("decoded", [0.0, 1.0])
def test_training_moves_towards_re_encoded_latents(flags, tmp_path, decoded):
    """A flag that changes nothing; one that needs a decoded loss to be on, or the images that a cache of latents lacks."""
    changes = {**QUIET, "epochs": 1, "decoder_loss_weight": decoded, "input_types": ["latent"]}
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


def test_a_resumed_run_ends_bit_identical(flags, tmp_path, monkeypatch):
    """Re-encoded latents that the cache gives in another order than the others."""
    changes = {**QUIET, "reencode_target": 0.5, "perceptual_loss_weight": 1.0, "image_size": 64, "decoder_loss_window": 4,
               "max_train_steps": 4, "decoder_loss_start": 0.5}  # fmt: skip
    whole = train(flags, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(train_script.StopRequest, "agreed", lambda _, __, step: signal.SIGTERM if step == 1 else None)
        with pytest.raises(SystemExit):
            train(flags, tmp_path / "broken", **changes)
    assert_same_tensors(train(flags, tmp_path / "broken", **changes, resume=True).last, whole.last)


def test_a_module_without_latents_is_refused(flags, tmp_path):
    """A target that is no function of what the module sees: it would blur as before, at twice the cost."""
    with pytest.raises(UserError, match=r"^--reencode_target 0.5: .*latent among the input types$"):
        train(flags, tmp_path, input_types=["image"], reencode_target=0.5)
