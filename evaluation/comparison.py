"""The main module against decode + re-encode: the figures on which the verdict rests. No words; those are in `verdict`."""

from __future__ import annotations

import math
from dataclasses import dataclass

PSNR_NOISE = 0.05  # dB: smaller differences are none
BIAS_SEEN = 1  # 8-bit levels of colour bias from which it is called a weakness
SOFT = 0.8  # fine detail relative to decode + re-encode's, below which a picture visibly lacks it
FEW_IMAGES = 30


@dataclass(frozen=True)
class Comparison:
    """How the main module compares with decode + re-encode.

    Attributes:
        answer: whether it is worth using instead: "yes", "equal", "no", or "unknown" without a PSNR.
        gains: its PSNR over that of decode + re-encode, dB, of each image on which both are finite.
        gain_db: their mean; gain_error_db: the 95% interval of that mean, ±; None where undefined.
        below_vae2_db: its mean PSNR below that of VAE2's own reconstruction; negative: above it.
        macs_fraction, time_fraction: its cost, of that of decode + re-encode; None where not measured.
    """

    answer: str
    gains: tuple[float, ...]
    gain_db: float | None
    gain_error_db: float | None
    below_vae2_db: float | None
    macs_fraction: float | None
    time_fraction: float | None

    @property
    def better_on(self) -> int:
        """On how many images it is the better."""
        return sum(gain > 0 for gain in self.gains)

    @property
    def worse_on(self) -> int:
        """On how many images decode + re-encode is the better."""
        return sum(gain < 0 for gain in self.gains)

    @property
    def broken(self) -> bool:
        """Whether the module's latents are not finite."""
        return self.answer == "no" and self.gain_db is None


def compare(results: dict) -> Comparison:
    """The comparison of `results`, a judgement as `judge.judge` returns it."""
    ladder, per_image = results["ladder"], results["per_image"]
    aligned, rival, vae2 = (ladder[rung] for rung in ("aligned", "reencode", "vae2"))
    pairs = zip(per_image["aligned"]["psnr"], per_image["reencode"]["psnr"])
    gains = tuple(ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None)
    broken = aligned["latent_mse"] is None
    gain, error = _mean_and_interval(() if broken else gains)
    both = None not in (aligned["psnr"], vae2["psnr"])
    return Comparison(
        answer="no" if broken else _answer(gain, error),
        gains=gains,
        gain_db=gain,
        gain_error_db=error,
        below_vae2_db=vae2["psnr"] - aligned["psnr"] if both and not broken else None,
        macs_fraction=_fraction(aligned, rival, "macs"),
        time_fraction=_fraction(aligned, rival, "milliseconds"),
    )


def _mean_and_interval(gains) -> tuple[float | None, float | None]:
    """Mean of `gains` and half the width of its 95% interval, by the normal distribution; None where undefined."""
    if not gains:
        return None, None
    mean = math.fsum(gains) / len(gains)
    if len(gains) == 1:
        return mean, None
    variance = math.fsum((one - mean) ** 2 for one in gains) / (len(gains) - 1)
    return mean, 1.96 * math.sqrt(variance / len(gains))


def _answer(gain: float | None, error: float | None) -> str:
    if gain is None:
        return "unknown"
    noise = max(PSNR_NOISE, error or 0)
    return "yes" if gain > noise else "no" if gain < -noise else "equal"


def _fraction(aligned: dict, rival: dict, cost: str) -> float | None:
    return aligned[cost] / rival[cost] if aligned.get(cost) and rival.get(cost) else None


def softness(results: dict) -> tuple[float, float] | None:
    """(detail of the module's pictures, of those of decode + re-encode), of the originals', where the module's are visibly
    softer; else None."""
    detail = results.get("spectrum", {}).get("detail", {})
    ours, theirs = detail.get("aligned"), detail.get("reencode")
    return (ours, theirs) if ours is not None and theirs is not None and ours < SOFT * theirs else None


def better_checkpoint(results: dict) -> str | None:
    """The rung of the further checkpoint that has the highest PSNR, if that is above the main one's."""
    ladder = results["ladder"]
    ours = ladder["aligned"]["psnr"]
    others = {name: rung["psnr"] for name, rung in ladder.items() if rung["kind"] == "aligned" and name != "aligned"}
    better = {name: psnr for name, psnr in others.items() if psnr is not None and ours is not None and psnr > ours}
    return max(better, key=better.get) if better else None


def coloured(results: dict) -> bool:
    """Whether the module's mean colours are visibly off VAE2's own."""
    return any(level is None or abs(level) > BIAS_SEEN for level in results["ladder"]["aligned"]["colour_bias"])


def no_better_than(results: dict) -> list[tuple[str, float]]:
    """[(rung, its PSNR)] of the trivial rungs that the trained module does not clearly pass."""
    ladder = results["ladder"]
    ours = ladder["aligned"]["psnr"]
    trivial = [(rung, ladder.get(rung, {}).get("psnr")) for rung in ("linear", "untrained")]
    return [(rung, psnr) for rung, psnr in trivial if None not in (psnr, ours) and psnr > ours - PSNR_NOISE]
