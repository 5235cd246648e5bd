"""The verdict: is the main module worth using in place of decode + re-encode? Its figures first, then its words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from evaluation.figures import mean_and_interval
from evaluation.metrics import METRICS, Metric
from evaluation.tables import figure_text, percent
from utils import count_of
from vae_align import is_finite

PSNR_NOISE = 0.05  # dB: smaller differences count as none
PERCEPTION_NOISE = 0.002  # of ST-LPIPS, likewise
BIAS_SEEN = 1  # 8-bit levels of colour bias from which it is called a weakness
SOFT = 0.8  # fine detail relative to decode + re-encode's, below which a picture visibly lacks it
FEW_IMAGES = 30
SHORT_STEPS, SHORT_WARMUPS = 500, 5  # fewer are a short training: the measured recipes pass re-encoding after 450 to 1000 steps
HEADLINES = {"yes": "Yes", "equal": "On a par", "no": "No", "unknown": "No verdict"}
# of the metrics on which the verdict rests
NAMES = {"psnr": "PSNR", "st_lpips_vgg": "ST-LPIPS"}
NOISE = {"psnr": PSNR_NOISE, "st_lpips_vgg": PERCEPTION_NOISE}
NEAR = {"psnr": 1.0, "st_lpips_vgg": 0.03}  # a loss that cost may outweigh: a third of re-encoding's own beside VAE2
LOOKS = {  # worse, better
    "psnr": ("are {:.2f} dB farther from", "are {:.2f} dB nearer to"),
    "st_lpips_vgg": ("look less like", "look more like"),
}
WORDS = {+1: "better", 0: "level", -1: "worse"}
TRIVIAL = {  # rung: its name, and what follows where the module is better in neither metric
    "linear": ("the closed-form linear map", "the training has gained nothing over it"),
    "untrained": ("the untrained module", "the training has not helped"),
}


@dataclass(frozen=True)
class Gain:
    """By how much one rung is better than another in a metric; negative: worse.

    Attributes:
        figures: the means of both, as "25.00 against 26.00 dB".
        by_image: the gain on each image on which both figures are finite.
        mean: of these; error: the 95% interval of that mean, ±; None where undefined.
    """

    metric: Metric
    name: str
    figures: str
    by_image: tuple[float, ...]
    mean: float | None
    error: float | None

    @property
    def sign(self) -> int | None:
        """+1: better, -1: worse, 0: neither beyond the interval; None without figures."""
        if self.mean is None:
            return None
        noise = max(NOISE[self.metric.name], self.error or 0)
        return (self.mean > noise) - (self.mean < -noise)

    def images(self, sign: int) -> int:
        """The number of images on which it is better (+1) or worse (-1)."""
        return sum(sign * gain > 0 for gain in self.by_image)

    @property
    def sentence(self) -> str:
        """The gain over decode + re-encode in words."""
        judged = count_of(len(self.by_image), "image")
        if self.sign == 0:
            level = f"{self.name} is level with that of decode + re-encode, as far as {judged} can tell"
            return f"{level} ({self.figures}, ±{self.metric.text(self.error or 0)})."
        how = LOOKS[self.metric.name][self.sign == 1].format(abs(self.mean))
        where = f"on {self.images(self.sign)} of {judged}"
        return f"Its pictures {how} the originals than those of decode + re-encode ({self.name} {self.figures}; {where})."


def _gains(results: dict, one: str = "aligned", other: str = "reencode") -> tuple[Gain, ...]:
    """The gains of a rung over another in PSNR and in ST-LPIPS."""
    found = []
    for key, name in NAMES.items():
        metric = METRICS[key]
        ours, theirs = (results["per_image"].get(rung, {}).get(key, []) for rung in (one, other))
        by_image = tuple(metric.better * (own - its) for own, its in zip(ours, theirs) if None not in (own, its))
        means = (figure_text(metric, results["ladder"].get(rung, {}).get(key)) for rung in (one, other))
        figures = f"{' against '.join(means)} {metric.unit}".strip()
        found.append(Gain(metric, name, figures, by_image, *mean_and_interval(by_image)))
    return tuple(found)


def _in_words(gains: tuple[Gain, ...]) -> str:
    """Gains as "better in PSNR (26.00 against 25.00 dB) and worse in ST-LPIPS (0.300 against 0.200)"; "" without figures."""
    return " and ".join(f"{WORDS[gain.sign]} in {gain.name} ({gain.figures})" for gain in gains if gain.sign is not None)


def verdict(results: dict) -> dict:
    """Is the main module worth using in place of decoding with VAE1 and encoding with VAE2?

    `results` is a judgement as `judge.judge` returns it, with `image_size` and `settings` where they are known.

    Returns:
        question: what `answer` answers; headline: the answer as "Yes", "On a par", "No" or "No verdict".
        answer: "yes": worse in neither distortion nor perception, better in one; "equal": neither better nor worse; "no": worse
            in one, or its latents are not finite; "unknown": without a PSNR, or with VAEs of other latent spaces.
        sentences: the reasons; weaknesses: reasons against the module.
        gain_db, gain_error_db, better_on: of PSNR, see `Gain`; perceptual_gain, perceptual_gain_error,
            perceptually_better_on: the same of ST-LPIPS (VGG), where it was measured.
        below_vae2_db: its mean PSNR below that of VAE2's own reconstruction; negative: above it.
        macs_fraction, time_fraction: its cost relative to that of decode + re-encode; None where not measured.
    """
    aligned, rival, vae2 = (results["ladder"][rung] for rung in ("aligned", "reencode", "vae2"))
    broken, wrong = aligned["latent_mse"] is None, results.get("wrong_spaces", [])
    gains = distortion, perception = _gains(results | {"per_image": {}} if broken else results)
    below = None if broken or None in (aligned["psnr"], vae2["psnr"]) else vae2["psnr"] - aligned["psnr"]
    macs, time = (
        aligned[cost] / rival[cost] if aligned.get(cost) and rival.get(cost) else None for cost in ("macs", "milliseconds")
    )
    if broken:
        answer, sentences = "no", ["Do not use it: what the module puts out is not finite."]
    elif wrong:
        answer, sentences = "unknown", wrong
    elif distortion.sign is None:
        answer, sentences = "unknown", ["PSNR is undefined or infinite on every image."]
    else:
        signs = {distortion.sign, perception.sign or 0}
        answer = "no" if -1 in signs else "yes" if 1 in signs else "equal"
        sentences = [*_reasons(answer, gains, macs), *_beside_others(results)]
    return {
        "question": "Is it worth using instead of decode + re-encode?",
        "answer": answer,
        "headline": HEADLINES[answer],
        "sentences": sentences,
        "weaknesses": [*([] if broken or wrong else _weaknesses(results, answer, gains)), *_limits(results)],
        "gain_db": distortion.mean,
        "gain_error_db": distortion.error,
        "better_on": distortion.images(+1),
        "perceptual_gain": perception.mean,
        "perceptual_gain_error": perception.error,
        "perceptually_better_on": perception.images(+1),
        "below_vae2_db": below,
        "macs_fraction": macs,
        "time_fraction": time,
    }


def as_text(found: dict, said=()) -> str:
    """A verdict for a terminal, a sentence a line; without the sentences that were `said` there before."""
    reasons = [sentence for sentence in found["sentences"] if sentence not in said]
    mind = [f"- {sentence}" for sentence in found["weaknesses"] if sentence not in said]
    if mind:
        mind.insert(0, "What to mind:")
    return "\n".join([f"{found['question']} {found['headline']}.", *(reasons or ["The warning above says why."]), *mind])


def _reasons(answer: str, gains: tuple[Gain, ...], fraction: float | None) -> list[str]:
    """The gains over decode + re-encode, those that decide first, and the module's `fraction` of its multiply-adds.

    Where the picture is far behind, no cost makes up for it, and none is said.
    """
    measured = [gain for gain in gains if gain.sign is not None]
    found = [gain.sentence for gain in sorted(measured, key=lambda gain: gain.sign if answer == "no" else -gain.sign)]
    near = measured == [*gains] and all(gain.mean > -NEAR[gain.metric.name] for gain in gains)
    if fraction is not None and (answer != "no" or near):
        found.append(f"It takes {percent(fraction)} of the multiply-adds of decode + re-encode.")
    return found


def _beside_others(results: dict) -> list[str]:
    """The module beside VAE2's own reconstruction, beside the sharpness of decode + re-encode, and beside other checkpoints."""
    ladder, found = results["ladder"], []
    beside_vae2 = [gain for gain in _gains(results, "aligned", "vae2") if gain.sign is not None]
    if beside_vae2:
        found.append(f"Beside VAE2's own reconstruction it is {_in_words(beside_vae2)}.")
    if {gain.sign for gain in beside_vae2} in ({1}, {0, 1}):
        found.append("Trained on the decoded picture, a module can find better latents than VAE2's encoder.")
    ours, theirs = (ladder[rung].get("detail") for rung in ("aligned", "reencode"))
    if 2 * results.get("enlarged", 0) >= results["images"]:
        found.append("There is no verdict on fine detail and texture: half of the images or more had to be enlarged.")
    # ratios above one are detail that VAE2's pictures do not have
    elif ours is not None and theirs is not None and ours < SOFT * min(theirs, 1):
        found.append(
            f"Its pictures are softer: they have {percent(ours)} of the power of VAE2's finest detail, those of decode + "
            f"re-encode {percent(theirs)}. PSNR rewards softness."
        )
    for name, rung in ladder.items():
        beside_first = _gains(results, name, "aligned")
        if rung["kind"] == "aligned" and any(gain.sign == 1 for gain in beside_first):
            found.append(f"The checkpoint “{rung['label']}” is {_in_words(beside_first)}.")
    return found


def _weaknesses(results: dict, answer: str, gains: tuple[Gain, ...]) -> list[str]:
    """The reasons against the main module, a sentence each."""
    aligned, rival = (results["ladder"][rung] for rung in ("aligned", "reencode"))
    beside_trivial = {rung: _gains(results, "aligned", rung) for rung in TRIVIAL}
    behind = any(gain.sign == -1 for gain in (*gains, *beside_trivial["linear"]))
    found = _short_training(results["checkpoints"][0]) if behind and "checkpoints" in results else []
    if any(level is None or abs(level) > BIAS_SEEN for level in aligned["colour_bias"]):
        bias = METRICS["colour_bias"].text(aligned["colour_bias"])
        found.append(f"Colour bias against VAE2's own reconstruction: R G B {bias} of 255 levels.")
    if rival["latent_mse"] is not None and aligned["latent_mse"] > rival["latent_mse"]:
        found.append(
            f"Its latents are farther from VAE2's than those of decode + re-encode: MSE {aligned['latent_mse']:.4f} against "
            f"{rival['latent_mse']:.4f}."
        )
    ssim = (aligned["ssim"], rival["ssim"])
    if None not in ssim and answer != "no" and ssim[0] < ssim[1]:
        found.append(f"SSIM is lower than that of decode + re-encode: {ssim[0]:.4f} against {ssim[1]:.4f}.")
    for rung, (name, conclusion) in TRIVIAL.items():
        measured = [gain for gain in beside_trivial[rung] if gain.sign is not None]
        gained = any(gain.mean > NOISE[gain.metric.name] for gain in measured)
        if measured and (not gained or any(gain.sign == -1 for gain in measured)):
            end = "." if gained or len(measured) < len(NAMES) else f": {conclusion}."
            found.append(f"Beside {name} it is {_in_words(measured)}{end}")
    for gain in gains if answer == "yes" else ():
        if min(gain.by_image, default=0) < -NOISE[gain.metric.name]:
            most = f"{gain.metric.text(-min(gain.by_image))} {gain.metric.unit}".strip()
            images = count_of(gain.images(-1), "image")
            found.append(f"On {images} decode + re-encode is better in {gain.name}, by up to {most}.")
    if gains[1].sign is None:
        found.append("No perceptual distance was measured: the verdict rests on PSNR, which rewards softness.")
    return found


def _short_training(checkpoint: dict) -> list[str]:
    """That the training was short, and how it goes on, where its checkpoint tells; see `JudgedCheckpoint.description`. Not if
    it had ended by `patience`."""
    trained, config = checkpoint["trained"], checkpoint["config"]
    step, epoch, seconds = trained["steps"], trained["epochs"] or 0, trained["seconds"]
    numbers = {name: value for name, value in config.items() if is_finite(value)}
    enough = max(SHORT_STEPS, SHORT_WARMUPS * numbers.get("warmup_steps", 0))
    ended = 0 < numbers.get("patience", 0) <= (trained["without_gain"] or 0)
    if not config or seconds is None or ended or not 0 < step < enough:
        return []
    minutes = seconds / 60 * min(1, 10 * step / enough)  # then ten times as long: few steps tell no pace
    used = {"max_train_steps": step} | ({"minutes": minutes} if numbers.get("minutes") else {"epochs": epoch})
    wanted = {name: math.ceil(spent * enough / step) for name, spent in used.items()}
    flags = "".join(f" --{name} {value}" for name, value in wanted.items() if 0 < numbers.get(name, 0) < value)
    said = f"It was trained for only {count_of(step, 'step')} ({epoch:.1f} epochs)"
    return [f"{said}; to go on: python train_align_with_args.py … --resume{flags}"]


def _limits(results: dict) -> list[str]:
    """The limits of the trust in these figures, a sentence each."""
    found = []
    if results["images"] < FEW_IMAGES:
        found.append(f"Judged on {count_of(results['images'], 'image')} only; on others the figures will differ.")
    if results["unreadable"]:
        first = "; ".join(results["unreadable"][:3]) + "; …" * (len(results["unreadable"]) > 3)
        found.append(f"{count_of(len(results['unreadable']), 'file')} could not be read and had to be left out: {first}")
    if results.get("enlarged"):
        images = count_of(results["enlarged"], "image")
        found.append(f"{images} of {results['images']} had to be enlarged to {results['image_size']} px, which adds no detail.")
    found += results.get("remarks", [])
    trained_at = results.get("settings", {}).get("trained_image_size")
    if trained_at and trained_at != results.get("image_size"):
        found.append(f"Judged at {results['image_size']} px, trained at {trained_at} px.")
    return found
