"""The verdict in words: is the main module worth using in place of decode + re-encode? Its figures are in `comparison`."""

from __future__ import annotations

from evaluation.comparison import (
    FEW_IMAGES,
    PSNR_NOISE,
    Comparison,
    Gain,
    better_checkpoint,
    coloured,
    compare,
    no_better_than,
    softness,
)
from evaluation.tables import decibels, percent, signed
from utils import count_of

TRIVIAL = {"linear": "the closed-form linear map", "untrained": "the untrained module"}


def verdict(results: dict) -> dict:
    """Is the main module worth using in place of decoding with VAE1 and encoding with VAE2?

    `results` is a judgement as `judge.judge` returns it, with `image_size` and `settings` where they are known.

    Returns {answer: "yes", "equal", "no" or "unknown"; sentences: what to say first; weaknesses: what speaks against it;
    gain_db, gain_error_db, better_on: of PSNR, see `comparison.Gain`; perceptual_gain, perceptual_gain_error,
    perceptually_better_on: the same of ST-LPIPS (VGG); below_vae2_db, macs_fraction, time_fraction: see
    `comparison.Comparison`}.
    """
    compared = compare(results)
    return {
        "answer": compared.answer,
        "sentences": _sentences(results, compared),
        "weaknesses": [] if compared.broken else _weaknesses(results, compared),
        "gain_db": compared.distortion.mean,
        "gain_error_db": compared.distortion.error,
        "better_on": compared.distortion.better_on,
        "perceptual_gain": compared.perception.mean,
        "perceptual_gain_error": compared.perception.error,
        "perceptually_better_on": compared.perception.better_on,
        "below_vae2_db": compared.below_vae2_db,
        "macs_fraction": compared.macs_fraction,
        "time_fraction": compared.time_fraction,
    }


def _sentences(results: dict, compared: Comparison) -> list[str]:
    if compared.broken:
        return ["Do not use it: what the module puts out is not finite."]
    if compared.answer == "unknown":
        return ["No verdict: PSNR is undefined or infinite on every image."]
    found = [_answer(results, compared), _beside_vae2(results, compared)]
    soft = softness(results)
    if soft:
        found.append(
            f"It looks softer: its pictures have {percent(soft[0])} of the power of VAE2's finest detail (up to 4 pixels a "
            f"cycle), those of decode + re-encode {percent(soft[1])}, true or invented; PSNR does not mind softness."
        )
    best = better_checkpoint(results)
    if best:
        rung = results["ladder"][best]
        found.append(f"Of the other checkpoints, “{rung['label']}” is the best, with {rung['psnr']:.2f} dB.")
    return [sentence for sentence in found if sentence]


def _answer(results: dict, compared: Comparison) -> str:
    """The answer itself, with its figures."""
    fraction = compared.macs_fraction
    cost = f", at {percent(fraction)} of the multiply-adds" if fraction is not None else ""
    found = [_distortion(results, compared.distortion), _perception(results, compared.perception)]
    better, worse, level = ([text for text, sign in found if sign == wanted] for wanted in (+1, -1, 0))
    aside = f"; {' and '.join(level)}" if level else ""
    if compared.answer == "yes":
        return f"Worth using instead of decode + re-encode: its pictures {' and '.join(better)}{aside}{cost}."
    if compared.answer == "equal":
        images = count_of(len(compared.distortion.by_image), "image")
        return f"As good as decode + re-encode, as far as {images} can tell: {' and '.join(level)}{cost}."
    beside = f", though they {' and '.join(better)}" if better else ""
    first = f"Not for quality: beside those of decode + re-encode its pictures {' and '.join(worse)}{beside}{aside}."
    if fraction is not None and fraction < 1:
        first += f" What speaks for the module is cost: {percent(fraction)} of the multiply-adds."
    return first


def _distortion(results: dict, gain: Gain) -> tuple[str, int | None]:
    """What is to be said of PSNR, and whether the module is better (+1), worse (-1) or neither."""
    ours, theirs = (decibels(results["ladder"][rung]["psnr"]) for rung in ("aligned", "reencode"))
    figures = f"{ours} against {theirs} dB PSNR"
    if gain.sign == 0:
        return f"PSNR is level ({gain.mean:+.2f} ± {gain.error or 0:.2f} dB; {figures})", 0
    on = f"on {_most(gain)} of {count_of(len(gain.by_image), 'image')}"
    nearer = "nearer to" if gain.sign == 1 else "farther from"
    return f"are {abs(gain.mean):.2f} dB {nearer} the originals ({figures}; {on})", gain.sign


def _perception(results: dict, gain: Gain) -> tuple[str, int | None]:
    """What is to be said of the perceptual distance, likewise; the sign is None where it was not measured."""
    if gain.sign is None:
        return "", None
    ours, theirs = (results["ladder"][rung]["st_lpips_vgg"] for rung in ("aligned", "reencode"))
    figures = f"ST-LPIPS {ours:.3f} against {theirs:.3f}"
    if gain.sign == 0:
        return f"the perceptual distance is level ({gain.mean:+.3f} ± {gain.error or 0:.3f}; {figures})", 0
    look = "look more like" if gain.sign == 1 else "look less like"
    return f"{look} the originals ({figures}; on {_most(gain)} of {count_of(len(gain.by_image), 'image')})", gain.sign


def _most(gain: Gain) -> int:
    return gain.better_on if gain.sign == 1 else gain.worse_on


def _beside_vae2(results: dict, compared: Comparison) -> str | None:
    """On which side of VAE2's own reconstruction the module stands."""
    below, vae2 = compared.below_vae2_db, results["ladder"]["vae2"]
    if below is None:
        return None
    if below >= 0:
        return f"It stays {below:.2f} dB below VAE2's own reconstruction ({vae2['psnr']:.2f} dB)."
    return (
        f"It passes VAE2's own reconstruction ({vae2['psnr']:.2f} dB) by {-below:.2f} dB: trained on the decoded "
        "picture, a module can find latents that decode better than those of VAE2's encoder."
    )


def _weaknesses(results: dict, compared: Comparison) -> list[str]:
    """What speaks against the main module, or against trusting these figures, a sentence each."""
    aligned, rival = (results["ladder"][rung] for rung in ("aligned", "reencode"))
    found = []
    if coloured(results):
        bias = zip(("red", "green", "blue"), aligned["colour_bias"])
        shown = ", ".join(f"{name} {signed(level)}" for name, level in bias)
        found.append(f"Colour bias against VAE2's own reconstruction: {shown} of 255 levels.")
    if rival["latent_mse"] is not None and aligned["latent_mse"] > rival["latent_mse"]:
        found.append(
            f"Its latents are farther from VAE2's than those of decode + re-encode: MSE {aligned['latent_mse']:.4f} against "
            f"{rival['latent_mse']:.4f}."
        )
    ssim = (aligned["ssim"], rival["ssim"])
    if None not in ssim and compared.answer != "no" and ssim[0] < ssim[1]:
        found.append(f"SSIM is lower than that of decode + re-encode: {ssim[0]:.4f} against {ssim[1]:.4f}.")
    for rung, psnr in no_better_than(results):
        found.append(f"It is no better than {TRIVIAL[rung]} ({psnr:.2f} dB): the training has not helped.")
    gains = compared.distortion.by_image
    if compared.answer == "yes" and min(gains) < -PSNR_NOISE:
        farther = count_of(compared.distortion.worse_on, "image")
        found.append(f"On {farther} decode + re-encode is nearer, by up to {-min(gains):.2f} dB.")
    if compared.perception.sign is None:
        found.append("No perceptual distance was measured: the verdict rests on PSNR, which does not mind softness.")
    return found + _limits(results)


def _limits(results: dict) -> list[str]:
    """What limits the trust in these figures."""
    found = []
    if results["images"] < FEW_IMAGES:
        found.append(f"Judged on {count_of(results['images'], 'image')} only; on others the figures will differ.")
    if results["unreadable"]:
        found.append(f"{count_of(len(results['unreadable']), 'file')} could not be read and had to be left out.")
    trained_at = results.get("settings", {}).get("trained_image_size")
    if trained_at and trained_at != results.get("image_size"):
        found.append(f"Judged at {results['image_size']} px, trained at {trained_at} px.")
    return found
