"""The adversarial terms: what discriminators are given, what the module hears of it, and what a run remembers of the game."""

import json
from types import SimpleNamespace

import pytest
import torch
from runs import QUIET, assert_same_tensors, same_weights, tensors_of, train

import train_align_with_args as train_script
from losses import Adversary, DecodedImageLoss, LatentDiscriminator, PictureDiscriminator, Rules, _eyes, eyes_difference
from utils import UserError
from vaes.codec import Codec
from vaes.loading import load_vae_model

ALONE = SimpleNamespace(reduce=lambda tensor, how: tensor, num_processes=1, is_main_process=True)
OK = torch.tensor(True)
BOTH = {
    "adversarial_weight": 0.02,
    "latent_adversarial_weight": 0.03,
    "adversarial_start_step": 1,
    "adversarial_warmup_steps": 4,
}


def adversary(network=None, weight=2.0, start=0, warmup=0, learning_rate=3e-3, dtype=torch.float32):
    torch.manual_seed(0)
    network = network or LatentDiscriminator(4, 0, width=8)
    return Adversary(
        "latent_adversarial_weight", network, weight, Rules(learning_rate, start, warmup), torch.device("cpu"), dtype
    )


def test_the_discriminator_learns_and_the_module_can_follow_it():
    """Sides that are swapped, a hinge of the wrong sign, or a gradient that leads the module away from what is real."""
    game = adversary()
    target = torch.randn(4, 4, 8, 8) + 1
    made = [torch.randn(4, 4, 8, 8) - 1]
    for _ in range(60):
        game.learn([target], made, torch.zeros(()), OK, ALONE)
    figures = game.read(ALONE)
    assert figures["latent_discriminator_accuracy"] > 0.8 and 0 < figures["latent_discriminator_loss"] < 1.5
    latents = made[0].clone().requires_grad_()
    before = game.term([latents], 0)
    (gradient,) = torch.autograd.grad(before, latents)
    assert game.term([latents - 0.1 * gradient / gradient.std()], 0) < before
    assert ((target - latents) * -gradient).sum() > 0


def test_the_module_pass_leaves_the_discriminator_alone():
    """A module's backward pass that adds to the discriminator's gradients, which would teach it to be fooled; a spectral norm
    that moves in a pass which is only asked for an opinion."""
    game = adversary()
    before = {name: tensor.clone() for name, tensor in game.discriminator.state_dict().items()}
    game.term([torch.randn(2, 4, 8, 8, requires_grad=True)], 0).backward()
    assert all(parameter.grad is None for parameter in game.discriminator.parameters())
    assert_same_tensors(before, game.discriminator.state_dict())


def test_the_weight_grows_from_the_start_step_on():
    """A term that begins with its full weight, or before its time."""
    game, made = adversary(start=10, warmup=4), [torch.randn(2, 4, 8, 8)]
    assert [game.plays(step) for step in (0, 9, 10, 11)] == [False, False, True, True]
    whole = game.term(made, 100)
    assert [float(game.term(made, step) / whole) for step in (10, 11, 13, 14)] == pytest.approx([0.25, 0.5, 1, 1])


def test_a_step_that_is_not_finite_changes_no_discriminator():
    """NaN in the discriminator after one bad batch, or after a bad step of the module alone."""
    game = adversary()
    good, bad = [torch.randn(2, 4, 8, 8)], [torch.full((2, 4, 8, 8), float("nan"))]
    game.learn(good, good, torch.zeros(()), OK, ALONE)
    before = {name: value.clone() for name, value in tensors_of(game.state_dict()).items() if "parametrizations" not in name}
    for made, ok in ((bad, OK), (good, ~OK)):
        game.learn(good, made, torch.zeros(()), ok, ALONE)
    after = tensors_of(game.state_dict())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    originals = [name for name in after if name.endswith("weight.original")]
    assert originals and all(after[name].isfinite().all() for name in after)


def test_a_discriminator_that_has_won_is_said_once(caplog):
    """A collapsed game that nobody hears of, one that is announced at every log entry, or after one lucky batch."""
    game = adversary(learning_rate=0.0)
    game._judge = lambda inputs: [inputs[0] * next(game.discriminator.parameters()).sum().mul(0).add(1)]
    sure, unsure = [torch.full((1, 1, 2, 2), 3.0)], [torch.zeros(1, 1, 2, 2)]
    for real, steps, said in ((unsure, 400, 0), (sure, 100, 0), (sure, 400, 1), (sure, 100, 1)):
        for _ in range(steps):
            game.learn(real, [-real[0]], torch.zeros(()), OK, ALONE)
        game.read(ALONE)
        assert caplog.text.count("lower --adversarial_lr") == said
    assert "--latent_adversarial_weight" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_judge_every_size_they_meet(dtype):
    """Maps that do not fit: a source of another stride, an odd window, bfloat16 against weights in float32."""
    latents = LatentDiscriminator(16, 4, width=8)
    (logits,) = latents(torch.randn(2, 16, 9, 7, dtype=dtype), torch.randn(2, 4, 18, 14, dtype=dtype))
    assert logits.shape == (2, 1, 4, 3) and logits.dtype == dtype
    pictures = PictureDiscriminator([6, 5])
    features = [torch.randn(2, 6, 10, 9, dtype=dtype), 1000 * torch.randn(2, 5, 5, 4, dtype=dtype)]
    judged = pictures(torch.randn(2, 3, 40, 33, dtype=dtype), *features)
    assert [tuple(each.shape) for each in judged] == [(2, 1, 10, 9), (2, 1, 5, 4), (2, 1, 5, 4)]


def test_features_and_decoding_are_shared(vae_folders, monkeypatch):
    """A second decode or a second pass of AlexNet over what is shown: the dearest parts of a step, paid for twice."""
    space = Codec(load_vae_model(vae_folders["kl16"], "vae", None, "cpu", torch.float32))
    args = train_script.parse_args(
        ["--perceptual_loss", "stlpips", "--perceptual_loss_weight", "1", "--adversarial_weight", "1"]
    )
    eyes = _eyes(args, space)
    seen, decoded = [], []
    features, decode = eyes.features, space.decode
    monkeypatch.setattr(eyes, "features", lambda pictures: seen.append(pictures) or features(pictures))
    monkeypatch.setattr(space, "decode", lambda latents: decoded.append(latents) or decode(latents))
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    target = space.encode(images)
    aligned = (target + torch.randn_like(target)).requires_grad_()
    loss = DecodedImageLoss(space, 2, 0, "vae2", 0, terms=[(1.0, eyes_difference)], eyes=eyes)
    _, window = loss(aligned, target, images, 0)
    assert window.vae2_features[1].requires_grad is False and window.features[1].requires_grad
    assert len(decoded) == 2 and len(seen) == 3  # of the module's and VAE2's; of those and of the reference in its colours
    assert not window.vae2.requires_grad and window.vae2.abs().max() <= 1


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("flag", ["adversarial_weight", "latent_adversarial_weight"])
@pytest.mark.parametrize("inputs", [["latent"], ["image"]])
def test_each_term_reaches_the_module_and_the_logs(flags, tmp_path, flag, inputs):
    """A term that is computed and not added, one that needs latents where the module has none, figures that nobody can read."""
    changes = {**QUIET, "input_types": inputs, "epochs": 2}
    plain = train(flags, tmp_path / "plain", **changes)
    run = train(flags, tmp_path / "game", **changes, **{flag: 0.1, "adversarial_start_step": 2, "adversarial_warmup_steps": 0})
    assert not same_weights(plain.last, run.last)
    where = "train/" + flag.removesuffix("adversarial_weight")
    for name in ("adversarial", "discriminator_loss", "discriminator_accuracy"):
        assert [step for step, _ in run.scalars[where + name]] == [3, 4, 5, 6]
        assert where + name not in plain.scalars
    assert all(0 < value < 4 for _, value in run.scalars[f"{where}discriminator_loss"])
    assert all(0 <= value <= 1 for _, value in run.scalars[f"{where}discriminator_accuracy"])
    (lines,) = ((file.parent / "training.jsonl").read_text().splitlines() for file in run.event_files)
    assert f"{where[6:]}discriminator_loss" not in json.loads(lines[1]) and json.loads(lines[-1])[f"{where[6:]}adversarial"]


def test_before_its_start_the_game_changes_nothing(flags, tmp_path):
    """A discriminator whose weights take numbers from the generator that the module's would have had."""
    changes = {**QUIET, "epochs": 1, "decoder_loss_weight": 1.0}
    plain = train(flags, tmp_path / "plain", **changes)
    game = train(flags, tmp_path / "game", **changes, **BOTH | {"adversarial_start_step": 3})
    assert same_weights(plain.last, game.last)


@pytest.mark.parametrize(
    "changes",
    [
        {"perceptual_loss": "stlpips", "perceptual_loss_weight": 1.0, "ema_decay": 0.9},
        {"precision": "bfloat16", "optimizer": "muon", "no_cache_latents": True, "decoder_loss_weight": 1.0},
    ],
    ids=["float32", "bfloat16"],
)
def test_a_resumed_game_ends_bit_identical(flags, tmp_path, changes):
    """A discriminator, its moments, its spectral norms or its sums that start anew; a start step counted from the resume."""
    changes = {**QUIET, **BOTH, **changes, "log_frequency": 4}
    whole = train(flags, tmp_path / "whole", **changes, max_train_steps=6)
    for steps in (1, 3, 6):
        again = train(flags, tmp_path / "broken", **changes, max_train_steps=steps, resume=True)
    assert_same_tensors(again.last, whole.last)
    assert len(whole.last["training"]["adversaries"]["window"]["optimizer"]["state"]) > 10
    assert again.scalars["train/latent_discriminator_loss"][-1] == whole.scalars["train/latent_discriminator_loss"][-1]


def test_a_dry_run_tries_the_game_too(flags, tmp_path, monkeypatch):
    """A plan whose time and memory are those of the steps before the discriminators begin."""
    played = []
    learn = Adversary.learn
    monkeypatch.setattr(Adversary, "learn", lambda self, *rest: played.append(self.flag) or learn(self, *rest))
    train(flags, tmp_path, **BOTH | {"adversarial_start_step": 500}, dry_run=True)
    assert played == ["latent_adversarial_weight", "adversarial_weight"] * 2


def test_a_bad_batch_spoils_no_discriminator(flags, tmp_path, monkeypatch):
    """Weights or sums of the game that are NaN after a step that was skipped."""
    endless = train_script.endless

    def poisoned(loader):
        for number, batch in enumerate(endless(loader), start=1):
            yield batch | ({"latents1": torch.full_like(batch["latents1"], float("nan"))} if number == 3 else {})

    monkeypatch.setattr(train_script, "endless", poisoned)
    run = train(flags, tmp_path, **QUIET, **BOTH, max_train_steps=4)
    assert all(tensor.isfinite().all() for tensor in tensors_of(run.last["training"]).values())
    assert run.last["training"]["bad_steps"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def test_a_window_too_small_to_look_at_is_named(flags, tmp_path):
    """A run that ends in its step 500 with an error about pictures that the user never chose."""
    with pytest.raises(UserError, match=r"^--decoder_loss_window 3: --adversarial_weight 1 needs at least \d+ latents$"):
        train(flags, tmp_path, adversarial_weight=1.0, decoder_loss_window=3)
    with pytest.raises(UserError, match=r"^--image_size 24: --adversarial_weight 1 needs at least 32 px$"):
        train(flags, tmp_path, adversarial_weight=1.0, image_size=24)


def test_another_weight_upon_resume_is_refused(flags, tmp_path):
    """A resumed run that quietly plays another game."""
    train(flags, tmp_path, **QUIET, **BOTH, max_train_steps=2)
    with pytest.raises(UserError, match=r"^--latent_adversarial_weight 0.5: the run to resume has 0.03"):
        train(flags, tmp_path, **QUIET, **BOTH | {"latent_adversarial_weight": 0.5}, max_train_steps=3, resume=True)


def test_a_game_that_never_begins_is_warned_of(flags, tmp_path, caplog):
    """A short trial that compares a term with itself switched off."""
    train(flags, tmp_path, **QUIET, latent_adversarial_weight=1.0, max_train_steps=1)
    assert "--adversarial_start_step 500: the run has 1" in caplog.text
