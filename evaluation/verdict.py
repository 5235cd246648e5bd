"""Whether the main module is worth using in place of decode + re-encode, in figures and in words."""

from __future__ import annotations

import math

from evaluation.tables import decibels, percent, signed
from utils import count_of

PSNR_NOISE = 0.05  # dB: smaller differences are none
BIAS_SEEN = 1  # 8-bit levels of colour bias from which it is called a weakness
SOFT = 0.8  # fine detail relative to decode + re-encode's, below which a picture visibly lacks it
FEW_IMAGES = 30


def verdict(results: dict) -> dict:
    """Is the main module worth using in place of decoding with VAE1 and encoding with VAE2?

    Returns {answer: "yes", "equal", "no" or "unknown"; sentences: what to say first; weaknesses: what speaks against it;
    gain_db: its PSNR over that of decode + re-encode, mean over images; gain_error_db: 95% interval of that mean, ±;
    better_on: images on which it is the better; below_ceiling_db; macs_fraction, time_fraction: of decode + re-encode's}.
    """
    ladder, per_image = results["ladder"], results["per_image"]
    aligned, rival, ceiling = (ladder[row] for row in ("aligned", "reencode", "ceiling"))
    pairs = zip(per_image["aligned"]["psnr"], per_image["reencode"]["psnr"])
    gains = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    facts = {"gain_db": None, "gain_error_db": None, "better_on": sum(gain > 0 for gain in gains), "below_ceiling_db": None}
    for name, cost in (("macs_fraction", "macs"), ("time_fraction", "milliseconds")):
        facts[name] = aligned[cost] / rival[cost] if aligned.get(cost) and rival.get(cost) else None
    if aligned["latent_mse"] is None:
        return {
            "answer": "no",
            "sentences": ["Do not use it: what the module puts out is not finite."],
            "weaknesses": [],
        } | facts
    if aligned["psnr"] is not None and ceiling["psnr"] is not None:
        facts["below_ceiling_db"] = ceiling["psnr"] - aligned["psnr"]
    if not gains:
        sentence = "No verdict: PSNR is undefined or infinite on every image."
        return {"answer": "unknown", "sentences": [sentence], "weaknesses": weaknesses(results, gains, "unknown")} | facts

    gain = facts["gain_db"] = math.fsum(gains) / len(gains)
    if len(gains) > 1:
        variance = math.fsum((one - gain) ** 2 for one in gains) / (len(gains) - 1)
        facts["gain_error_db"] = 1.96 * math.sqrt(variance / len(gains))
    noise = max(PSNR_NOISE, facts["gain_error_db"] or 0)
    answer = "yes" if gain > noise else "no" if gain < -noise else "equal"
    figures = f"{decibels(aligned['psnr'])} against {decibels(rival['psnr'])} dB PSNR"
    nearer_on = facts["better_on"] if answer == "yes" else sum(gain < 0 for gain in gains)
    nearer = f"nearer on {nearer_on} of {count_of(len(gains), 'image')}"
    fraction = facts["macs_fraction"]
    cost = f"at {percent(fraction)} of the multiply-adds" if fraction is not None else ""
    cheaper = fraction is not None and fraction < 1
    if answer == "yes":
        first = f"Worth using instead of decode + re-encode: its pictures are {gain:.2f} dB nearer to the originals"
        first = f"{first} ({figures}; {nearer})" + (f", {cost}." if cost else ".")
    elif answer == "equal":
        first = f"As good as decode + re-encode, as far as {count_of(len(gains), 'image')} can tell"
        first = f"{first} ({gain:+.2f} ± {facts['gain_error_db'] or 0:.2f} dB; {figures})" + (f", {cost}." if cost else ".")
    else:
        first = f"Not for quality: decode + re-encode is {-gain:.2f} dB nearer to the originals ({figures}; {nearer})."
        if cheaper:
            first += f" What speaks for the module is cost: {percent(fraction)} of the multiply-adds."
    sentences = [first]
    below = facts["below_ceiling_db"]
    if below is not None and below >= 0:
        sentences.append(f"It stays {below:.2f} dB below VAE2's own reconstruction ({ceiling['psnr']:.2f} dB).")
    elif below is not None:
        sentences.append(
            f"It passes VAE2's own reconstruction ({ceiling['psnr']:.2f} dB) by {-below:.2f} dB: trained on the decoded "
            "picture, a module can find latents that decode better than those of VAE2's encoder."
        )
    detail = results.get("spectrum", {}).get("detail", {})
    ours, theirs = detail.get("aligned"), detail.get("reencode")
    if ours is not None and theirs is not None and ours < SOFT * theirs:
        sentences.append(
            f"But it looks softer: its pictures have {percent(ours)} of the power of the originals' finest detail (up to 4 "
            f"pixels a cycle), those of decode + re-encode {percent(theirs)}, true or invented; PSNR does not mind softness."
        )
    others = {row: figures["psnr"] for row, figures in ladder.items() if row.startswith("aligned") and row != "aligned"}
    better = {row: psnr for row, psnr in others.items() if psnr is not None and psnr > (aligned["psnr"] or math.inf)}
    if better:
        best = max(better, key=better.get)
        sentences.append(f"Of the other checkpoints, “{ladder[best]['label']}” is the best, with {better[best]:.2f} dB.")
    return {"answer": answer, "sentences": sentences, "weaknesses": weaknesses(results, gains, answer)} | facts


def weaknesses(results: dict, gains: list[float], answer: str) -> list[str]:
    """What speaks against the main module, or against trusting these figures, a sentence each."""
    ladder = results["ladder"]
    aligned, rival = ladder["aligned"], ladder["reencode"]
    found = []
    bias = aligned["colour_bias"]
    if any(level is None or abs(level) > BIAS_SEEN for level in bias):
        shown = ", ".join(f"{name} {signed(level)}" for name, level in zip(("red", "green", "blue"), bias))
        found.append(f"Colour bias against VAE2's own reconstruction: {shown} of 255 levels.")
    if rival["latent_mse"] is not None and aligned["latent_mse"] > rival["latent_mse"]:
        found.append(
            f"Its latents are farther from VAE2's than those of decode + re-encode: MSE {aligned['latent_mse']:.4f} against "
            f"{rival['latent_mse']:.4f}."
        )
    if aligned["ssim"] is not None and rival["ssim"] is not None and answer != "no" and aligned["ssim"] < rival["ssim"]:
        found.append(f"SSIM is lower than that of decode + re-encode: {aligned['ssim']:.4f} against {rival['ssim']:.4f}.")
    for row, what in (("linear", "the closed-form linear map"), ("untrained", "the untrained module")):
        below = ladder.get(row, {}).get("psnr")
        if None not in (below, aligned["psnr"]) and below > aligned["psnr"] - PSNR_NOISE:
            found.append(f"It is no better than {what} ({below:.2f} dB): the training has not helped.")
    if answer == "yes" and gains and min(gains) < -PSNR_NOISE:
        worse = sum(gain < 0 for gain in gains)
        found.append(f"On {count_of(worse, 'image')} decode + re-encode is nearer, by up to {-min(gains):.2f} dB.")
    if results["images"] < FEW_IMAGES:
        found.append(f"Judged on {count_of(results['images'], 'image')} only; on others the figures will differ.")
    if results["unreadable"]:
        found.append(f"{count_of(len(results['unreadable']), 'file')} could not be read and had to be left out.")
    trained_at = results.get("settings", {}).get("trained_image_size")
    if trained_at and trained_at != results.get("image_size"):
        found.append(f"Judged at {results['image_size']} px, trained at {trained_at} px.")
    return found
