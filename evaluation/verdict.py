"""The verdict in words: is the main module worth using in place of decode + re-encode? Its figures are in `comparison`."""

from __future__ import annotations

from evaluation.comparison import (
    FEW_IMAGES,
    PSNR_NOISE,
    Comparison,
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
    gain_db, gain_error_db, better_on, below_vae2_db, macs_fraction, time_fraction: see `comparison.Comparison`}.
    """
    compared = compare(results)
    return {
        "answer": compared.answer,
        "sentences": _sentences(results, compared),
        "weaknesses": [] if compared.broken else _weaknesses(results, compared),
        "gain_db": compared.gain_db,
        "gain_error_db": compared.gain_error_db,
        "better_on": compared.better_on,
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
            f"But it looks softer: its pictures have {percent(soft[0])} of the power of the originals' finest detail (up to 4 "
            f"pixels a cycle), those of decode + re-encode {percent(soft[1])}, true or invented; PSNR does not mind softness."
        )
    best = better_checkpoint(results)
    if best:
        rung = results["ladder"][best]
        found.append(f"Of the other checkpoints, “{rung['label']}” is the best, with {rung['psnr']:.2f} dB.")
    return [sentence for sentence in found if sentence]


def _answer(results: dict, compared: Comparison) -> str:
    """The answer itself, with its figures."""
    aligned, rival = (results["ladder"][rung] for rung in ("aligned", "reencode"))
    gain, fraction = compared.gain_db, compared.macs_fraction
    figures = f"{decibels(aligned['psnr'])} against {decibels(rival['psnr'])} dB PSNR"
    nearer_on = compared.better_on if compared.answer == "yes" else compared.worse_on
    nearer = f"nearer on {nearer_on} of {count_of(len(compared.gains), 'image')}"
    cost = f", at {percent(fraction)} of the multiply-adds" if fraction is not None else ""
    if compared.answer == "yes":
        return (
            f"Worth using instead of decode + re-encode: its pictures are {gain:.2f} dB nearer to the originals "
            f"({figures}; {nearer}){cost}."
        )
    if compared.answer == "equal":
        return (
            f"As good as decode + re-encode, as far as {count_of(len(compared.gains), 'image')} can tell "
            f"({gain:+.2f} ± {compared.gain_error_db or 0:.2f} dB; {figures}){cost}."
        )
    first = f"Not for quality: decode + re-encode is {-gain:.2f} dB nearer to the originals ({figures}; {nearer})."
    if fraction is not None and fraction < 1:
        first += f" What speaks for the module is cost: {percent(fraction)} of the multiply-adds."
    return first


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
    if compared.answer == "yes" and min(compared.gains) < -PSNR_NOISE:
        farther = count_of(compared.worse_on, "image")
        found.append(f"On {farther} decode + re-encode is nearer, by up to {-min(compared.gains):.2f} dB.")
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
