"""The main module against decode + re-encode: the figures on which the verdict rests. No words; those are in `verdict`."""

from __future__ import annotations

from dataclasses import dataclass

from evaluation.summary import mean_and_interval

PSNR_NOISE = 0.05  # dB: smaller differences are none
PERCEPTION_NOISE = 0.002  # of ST-LPIPS, likewise
BIAS_SEEN = 1  # 8-bit levels of colour bias from which it is called a weakness
SOFT = 0.8  # fine detail relative to decode + re-encode's, below which a picture visibly lacks it
FEW_IMAGES = 30


@dataclass(frozen=True)
class Gain:
    """By how much the module is better than decode + re-encode in one metric; negative: worse.

    Attributes:
        by_image: of each image on which both figures are finite.
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
        """On how many images the module is the better."""
        return sum(gain > 0 for gain in self.by_image)

    @property
    def worse_on(self) -> int:
        """On how many images decode + re-encode is the better."""
        return sum(gain < 0 for gain in self.by_image)


@dataclass(frozen=True)
class Comparison:
    """How the main module compares with decode + re-encode, in distortion and in perception.

    Attributes:
        answer: whether it is worth using instead: "yes": worse in neither, better in one; "equal": neither better nor worse;
            "no": worse in one; "unknown" without a PSNR.
        distortion: the gain in PSNR, dB. perception: the gain in ST-LPIPS (VGG), where it was measured.
        broken: whether the module's latents are not finite.
        below_vae2_db: its mean PSNR below that of VAE2's own reconstruction; negative: above it.
        macs_fraction, time_fraction: its cost, of that of decode + re-encode; None where not measured.
    """

    answer: str
    distortion: Gain
    perception: Gain
    broken: bool
    below_vae2_db: float | None
    macs_fraction: float | None
    time_fraction: float | None


def compare(results: dict) -> Comparison:
    """The comparison of `results`, a judgement as `judge.judge` returns it."""
    ladder = results["ladder"]
    aligned, rival, vae2 = (ladder[rung] for rung in ("aligned", "reencode", "vae2"))
    broken = aligned["latent_mse"] is None
    distortion = _gain(results, "psnr", +1, PSNR_NOISE, broken)
    perception = _gain(results, "st_lpips_vgg", -1, PERCEPTION_NOISE, broken)
    both = None not in (aligned["psnr"], vae2["psnr"])
    return Comparison(
        answer="no" if broken else _answer(distortion.sign, perception.sign),
        distortion=distortion,
        perception=perception,
        broken=broken,
        below_vae2_db=vae2["psnr"] - aligned["psnr"] if both and not broken else None,
        macs_fraction=_fraction(aligned, rival, "macs"),
        time_fraction=_fraction(aligned, rival, "milliseconds"),
    )


def _gain(results: dict, metric: str, better: int, noise: float, broken: bool) -> Gain:
    ours, theirs = (results["per_image"][rung].get(metric, []) for rung in ("aligned", "reencode"))
    pairs = [] if broken else zip(ours, theirs)
    by_image = tuple(better * (one - other) for one, other in pairs if one is not None and other is not None)
    return Gain(by_image, *mean_and_interval(by_image), noise)


def _answer(distortion: int | None, perception: int | None) -> str:
    if distortion is None:
        return "unknown"
    signs = {distortion, perception or 0}
    return "no" if -1 in signs else "yes" if 1 in signs else "equal"


def _fraction(aligned: dict, rival: dict, cost: str) -> float | None:
    return aligned[cost] / rival[cost] if aligned.get(cost) and rival.get(cost) else None


def softness(results: dict) -> tuple[float, float] | None:
    """(power of the finest detail in the module's pictures, in those of decode + re-encode), of VAE2's, where the module's
    are visibly softer than those and than VAE2's; else None. Ratios above one are detail that VAE2's pictures do not have."""
    ours, theirs = (results["ladder"][rung].get("detail") for rung in ("aligned", "reencode"))
    return (ours, theirs) if ours is not None and theirs is not None and ours < SOFT * min(theirs, 1) else None


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
