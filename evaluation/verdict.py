"""The verdict: is the main module worth using in place of decode + re-encode? Its figures first, then its words."""

from __future__ import annotations

from dataclasses import dataclass

from evaluation.figures import mean_and_interval
from evaluation.tables import decibels, percent, signed
from utils import count_of

PSNR_NOISE = 0.05  # dB: smaller differences count as none
PERCEPTION_NOISE = 0.002  # of ST-LPIPS, likewise
BIAS_SEEN = 1  # 8-bit levels of colour bias from which it is called a weakness
SOFT = 0.8  # fine detail relative to decode + re-encode's, below which a picture visibly lacks it
FEW_IMAGES = 30
TRIVIAL = {"linear": "the closed-form linear map", "untrained": "the untrained module"}


@dataclass(frozen=True)
class Gain:
    """By how much the module is better than decode + re-encode in one metric; negative: worse.

    Attributes:
        by_image: the gain on each image on which both figures are finite.
        mean: of these; error: the 95% interval of that mean, ±; None where undefined.
        noise: the difference that counts as none, whatever the interval.
    """

    by_image: tuple[float, ...]
    mean: float | None
    error: float | None
    noise: float

    @property
    def sign(self) -> int | None:
        """+1: better, -1: worse, 0: neither beyond the interval; None without figures."""
        if self.mean is None:
            return None
        noise = max(self.noise, self.error or 0)
        return (self.mean > noise) - (self.mean < -noise)

    @property
    def better_on(self) -> int:
        """The number of images on which the module is better."""
        return sum(gain > 0 for gain in self.by_image)

    @property
    def worse_on(self) -> int:
        """The number of images on which decode + re-encode is better."""
        return sum(gain < 0 for gain in self.by_image)

    @property
    def where(self) -> str:
        """On how many images the mean's sign holds, in words."""
        most = self.better_on if self.sign == 1 else self.worse_on
        return f"on {most} of {count_of(len(self.by_image), 'image')}"


def _gain(results: dict, metric: str, better: int, noise: float, broken: bool) -> Gain:
    ours, theirs = (results["per_image"][rung].get(metric, []) for rung in ("aligned", "reencode"))
    pairs = [] if broken else zip(ours, theirs)
    by_image = tuple(better * (one - other) for one, other in pairs if one is not None and other is not None)
    return Gain(by_image, *mean_and_interval(by_image), noise)


def verdict(results: dict) -> dict:
    """Is the main module worth using in place of decoding with VAE1 and encoding with VAE2?

    `results` is a judgement as `judge.judge` returns it, with `image_size` and `settings` where they are known.

    Returns:
        answer: "yes": worse in neither distortion nor perception, better in one; "equal": neither better nor worse; "no": worse
            in one, or its latents are not finite; "unknown": without a PSNR, or with VAEs of other latent spaces.
        sentences: the answer in words; weaknesses: reasons against the module.
        gain_db, gain_error_db, better_on: of PSNR, see `Gain`; perceptual_gain, perceptual_gain_error,
            perceptually_better_on: the same of ST-LPIPS (VGG), where it was measured.
        below_vae2_db: its mean PSNR below that of VAE2's own reconstruction; negative: above it.
        macs_fraction, time_fraction: its cost relative to that of decode + re-encode; None where not measured.
    """
    aligned, rival, vae2 = (results["ladder"][rung] for rung in ("aligned", "reencode", "vae2"))
    broken = aligned["latent_mse"] is None
    distortion = _gain(results, "psnr", +1, PSNR_NOISE, broken)
    perception = _gain(results, "st_lpips_vgg", -1, PERCEPTION_NOISE, broken)
    both = None not in (aligned["psnr"], vae2["psnr"])
    below = vae2["psnr"] - aligned["psnr"] if both and not broken else None
    macs, time = (
        aligned[cost] / rival[cost] if aligned.get(cost) and rival.get(cost) else None for cost in ("macs", "milliseconds")
    )
    if broken:
        answer, sentences = "no", ["Do not use it: what the module puts out is not finite."]
    elif results.get("wrong_spaces"):
        answer, sentences = "unknown", [f"No verdict: {sentence}" for sentence in results["wrong_spaces"]]
    elif distortion.sign is None:
        answer, sentences = "unknown", ["No verdict: PSNR is undefined or infinite on every image."]
    else:
        signs = {distortion.sign, perception.sign or 0}
        answer = "no" if -1 in signs else "yes" if 1 in signs else "equal"
        sentences = [_answer(results, answer, distortion, perception, macs), *_beside_others(results, below)]
    return {
        "answer": answer,
        "sentences": sentences,
        "weaknesses": [] if broken else [*_weaknesses(results, answer, distortion, perception), *_limits(results)],
        "gain_db": distortion.mean,
        "gain_error_db": distortion.error,
        "better_on": distortion.better_on,
        "perceptual_gain": perception.mean,
        "perceptual_gain_error": perception.error,
        "perceptually_better_on": perception.better_on,
        "below_vae2_db": below,
        "macs_fraction": macs,
        "time_fraction": time,
    }


def _beside_others(results: dict, below: float | None) -> list[str]:
    """The module beside VAE2's own reconstruction, beside the sharpness of decode + re-encode, and beside other checkpoints."""
    ladder = results["ladder"]
    aligned, rival, vae2 = (ladder[rung] for rung in ("aligned", "reencode", "vae2"))
    found = []
    if below is not None and below >= 0:
        found.append(f"It stays {below:.2f} dB below VAE2's own reconstruction ({vae2['psnr']:.2f} dB).")
    elif below is not None:
        found.append(
            f"It passes VAE2's own reconstruction ({vae2['psnr']:.2f} dB) by {-below:.2f} dB: trained on the decoded "
            "picture, a module can find latents that decode better than those of VAE2's encoder."
        )
    ours, theirs = aligned.get("detail"), rival.get("detail")
    if 2 * results.get("enlarged", 0) >= results["images"]:
        found.append("There is no verdict on fine detail and texture: half of the images or more had to be enlarged.")
    # ratios above one are detail that VAE2's pictures do not have
    elif ours is not None and theirs is not None and ours < SOFT * min(theirs, 1):
        found.append(
            f"It looks softer: its pictures have {percent(ours)} of the power of VAE2's finest detail (up to 4 pixels a "
            f"cycle), those of decode + re-encode {percent(theirs)}, true or invented; PSNR does not mind softness."
        )
    others = [rung for name, rung in ladder.items() if rung["kind"] == "aligned" and name != "aligned"]
    best = max((rung for rung in others if rung["psnr"] is not None), key=lambda rung: rung["psnr"], default=None)
    if best and aligned["psnr"] is not None and best["psnr"] > aligned["psnr"]:
        found.append(f"Of the other checkpoints, “{best['label']}” is the best, with {best['psnr']:.2f} dB.")
    return found


def _answer(results: dict, answer: str, distortion: Gain, perception: Gain, fraction: float | None) -> str:
    """The answer itself, with its figures; `fraction`: of the multiply-adds of decode + re-encode."""
    cost = f", at {percent(fraction)} of the multiply-adds" if fraction is not None else ""
    found = [_distortion(results, distortion), _perception(results, perception)]
    better, worse, level = ([text for text, sign in found if sign == wanted] for wanted in (+1, -1, 0))
    aside = f"; {' and '.join(level)}" if level else ""
    if answer == "yes":
        return f"Worth using instead of decode + re-encode: its pictures {' and '.join(better)}{aside}{cost}."
    if answer == "equal":
        images = count_of(len(distortion.by_image), "image")
        return f"As good as decode + re-encode, as far as {images} can tell: {' and '.join(level)}{cost}."
    beside = f", though they {' and '.join(better)}" if better else ""
    first = f"Not for quality: beside those of decode + re-encode its pictures {' and '.join(worse)}{beside}{aside}."
    if fraction is not None and fraction < 1:
        first += f" What speaks for the module is cost: {percent(fraction)} of the multiply-adds."
    return first


def _distortion(results: dict, gain: Gain) -> tuple[str, int | None]:
    """The words about PSNR, and whether the module is better (+1), worse (-1) or neither."""
    ours, theirs = (decibels(results["ladder"][rung]["psnr"]) for rung in ("aligned", "reencode"))
    figures = f"{ours} against {theirs} dB PSNR"
    if gain.sign == 0:
        return f"PSNR is level ({gain.mean:+.2f} ± {gain.error or 0:.2f} dB; {figures})", 0
    nearer = "nearer to" if gain.sign == 1 else "farther from"
    return f"are {abs(gain.mean):.2f} dB {nearer} the originals ({figures}; {gain.where})", gain.sign


def _perception(results: dict, gain: Gain) -> tuple[str, int | None]:
    """The words about the perceptual distance, likewise; the sign is None where it was not measured."""
    if gain.sign is None:
        return "", None
    ours, theirs = (results["ladder"][rung]["st_lpips_vgg"] for rung in ("aligned", "reencode"))
    figures = f"ST-LPIPS {ours:.3f} against {theirs:.3f}"
    if gain.sign == 0:
        return f"the perceptual distance is level ({gain.mean:+.3f} ± {gain.error or 0:.3f}; {figures})", 0
    look = "look more like" if gain.sign == 1 else "look less like"
    return f"{look} the originals ({figures}; {gain.where})", gain.sign


def _weaknesses(results: dict, answer: str, distortion: Gain, perception: Gain) -> list[str]:
    """The reasons against the main module, a sentence each."""
    ladder = results["ladder"]
    aligned, rival = ladder["aligned"], ladder["reencode"]
    found = []
    if any(level is None or abs(level) > BIAS_SEEN for level in aligned["colour_bias"]):
        bias = zip(("red", "green", "blue"), aligned["colour_bias"])
        shown = ", ".join(f"{name} {signed(level)}" for name, level in bias)
        found.append(f"Colour bias against VAE2's own reconstruction: {shown} of 255 levels.")
    if rival["latent_mse"] is not None and aligned["latent_mse"] > rival["latent_mse"]:
        found.append(
            f"Its latents are farther from VAE2's than those of decode + re-encode: MSE {aligned['latent_mse']:.4f} against "
            f"{rival['latent_mse']:.4f}."
        )
    ssim = (aligned["ssim"], rival["ssim"])
    if None not in ssim and answer != "no" and ssim[0] < ssim[1]:
        found.append(f"SSIM is lower than that of decode + re-encode: {ssim[0]:.4f} against {ssim[1]:.4f}.")
    for rung, name in TRIVIAL.items():
        psnr = ladder.get(rung, {}).get("psnr")
        if None not in (psnr, aligned["psnr"]) and psnr > aligned["psnr"] - PSNR_NOISE:
            found.append(f"It is no better than {name} ({psnr:.2f} dB): the training has not helped.")
    gains = distortion.by_image
    if answer == "yes" and min(gains) < -PSNR_NOISE:
        farther = count_of(distortion.worse_on, "image")
        found.append(f"On {farther} decode + re-encode is nearer, by up to {-min(gains):.2f} dB.")
    if perception.sign is None:
        found.append("No perceptual distance was measured: the verdict rests on PSNR, which does not mind softness.")
    return found


def _limits(results: dict) -> list[str]:
    """The limits of the trust in these figures, a sentence each."""
    found = []
    if results["images"] < FEW_IMAGES:
        found.append(f"Judged on {count_of(results['images'], 'image')} only; on others the figures will differ.")
    if results["unreadable"]:
        found.append(f"{count_of(len(results['unreadable']), 'file')} could not be read and had to be left out.")
    if results.get("enlarged"):
        images = count_of(results["enlarged"], "image")
        found.append(f"{images} of {results['images']} had to be enlarged to {results['image_size']} px, which adds no detail.")
    found += results.get("remarks", [])
    trained_at = results.get("settings", {}).get("trained_image_size")
    if trained_at and trained_at != results.get("image_size"):
        found.append(f"Judged at {results['image_size']} px, trained at {trained_at} px.")
    return found
