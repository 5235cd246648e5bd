"""The zoo's figures as a page: RESULTS.md, made of the manifest alone.

    python tools/zoo_results.py

writes it anew, after the manifest or this file has changed.
"""

import functools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dataloader import ImageDataset
from evaluation import charts
from evaluation.verdict import PERCEPTION_NOISE, PSNR_NOISE
from images.files import list_images
from runtime.cli import run
from utils import atomic_file
from vae_align import IMAGE, ZOO, AlignPipeline, read_zoo

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "RESULTS.md"
EMBEDDED_PHOTOS, EMBEDDED_SIZE = 2, 128  # how many of assets/photos/eval, px: a figure that any machine computes in a moment
DRIFT_PHOTOS = 8  # that are carried there and back again
PHOTOS_SHEET, STRANGE_SHEET = "photos.jpg", "unseen.jpg"
BROKEN_DB = 0.5
CHARTS = (("drift_psnr.svg", "psnr", "PSNR after hops"), ("drift_st_lpips.svg", "st_lpips_vgg", "ST-LPIPS after hops"))
TITLES = {"sd15": "SD1.5", "sdxl": "SDXL", "sd3": "SD3", "flux1": "FLUX.1", "flux2": "FLUX.2", IMAGE: "the image"}
COLUMNS = {  # of a rung's figures
    "psnr": ("PSNR dB", "{:.2f}"),
    "st_lpips_vgg": ("ST-LPIPS", "{:.3f}"),
    "texture": ("texture", "{:.1f}"),
    "detail": ("detail", "{:.2f}"),
    "latent_variance": ("variance", "{:.2f}"),
    "latent_mse": ("latent MSE", "{:.3f}"),
}
RUNGS = {
    "vae2": "VAE2's own reconstruction",
    "reencode": "decode + re-encode",
    "linear": "the closed-form linear map",
    "aligned": "**the module**",
}
HEAD = """# Results: the zoo

`AlignPipeline.from_pretrained("{one}", "{into}")` is a pair by the names of its two latent spaces. Written by
`tools/train_zoo.py`, from `assets/zoo/zoo.json`; do not edit.

The VAEs are the spaces' tiny autoencoders (TAESD and its kin), which work on the same latents as the full ones.
Judged on {images} photos that no training has seen, {size} px, bfloat16. PSNR and ST-LPIPS (VGG, smaller is nearer) against
the original; texture: Fréchet distance of early features from the originals', per cent of their variance; detail: power of the
finest detail; variance: of the latents; both relative to VAE2's own. A verdict is "yes" where the module is better than decode
+ re-encode in PSNR or ST-LPIPS and worse in neither, beyond the 95 % interval and at least 0.05 dB or 0.002; "equal" where it
is neither better nor worse.
"""
DRIFT = f"""## Drift

{DRIFT_PHOTOS} of the photos, carried there and back again and again: PSNR in dB / ST-LPIPS against the original after so many
hops; *none* is VAE1's own reconstruction. The charts show the mean over all pairs: solid the modules, dotted re-encoding.
"""
PHOTOS = f"""## Pictures

Into each space the photo on which a module gains most over decode + re-encode, in ST-LPIPS, and the one on which it gains least
or loses most, of all pairs and the photos of `assets/photos/eval`. The middle of each picture, pixel by pixel.

![best and worst photos](assets/zoo/{PHOTOS_SHEET})
"""
STRANGE = """## What no training has seen

By how much PSNR in dB / ST-LPIPS differ from decode + re-encode's. *noise* has the mean and standard deviation of each channel
of latents, and is held against VAE1's picture of it; the two larger inputs are mosaics of photos.
"""


@functools.cache
def embedded_photos(count: int | None, size: int) -> torch.Tensor:
    """The first `count` photos that are part of this repository and train nothing, or all: (B, 3, size, size) in [-1, 1]."""
    dataset = ImageDataset(list_images(ROOT / "assets" / "photos" / "eval")[:count], size)
    return torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))]).float()


@torch.no_grad()
def carried_psnr(first: AlignPipeline | None, second: AlignPipeline) -> float:
    """PSNR in dB of two `embedded_photos`, put into `first`'s latents by its learned encoder, carried into `second`'s and drawn
    by second's decoder: needs no VAE. With None put into second's at once. Both are modules of a space into itself; float32."""
    photos = embedded_photos(EMBEDDED_PHOTOS, EMBEDDED_SIZE)
    latents = AlignPipeline.compose(None, first or second).translate(image=photos)
    if first is not None:
        latents = AlignPipeline.compose(first, second).translate(latents)
    squares = (second.module.picture(latents) - photos).square().mean(dim=(1, 2, 3))
    return (20 * torch.log10(2 / squares.sqrt())).mean().item()


def pairs_in(manifest: dict) -> list[tuple[str, str, dict]]:
    """[(VAE1's space, VAE2's, what the manifest has of the pair)], in the order of `TITLES`."""
    pairs = manifest["pairs"]
    return [(one, into, pairs[one][into]) for one in TITLES for into in TITLES if into in pairs.get(one, {})]


def gains_in(pairs: list[tuple[str, str, dict]], trial: str, metric: str) -> list[tuple[float, str, str, str]]:
    """By how much each pair is better than decode + re-encode at each thing of its trial "photos" or "transfer": [(gain, VAE1's
    space, VAE2's, thing)]; a figure that is not finite gives no gain."""
    sign, found = (1 if metric == "psnr" else -1), []
    for one, into, pair in pairs:
        for name, ways in pair[trial].items():
            ours, theirs = (ways[way][metric] for way in ("aligned", "reencode"))
            if ours is not None and theirs is not None:
                found.append((sign * (ours - theirs), one, into, name))
    return found


def results_page(manifest: dict) -> str:
    """The page of a manifest, see `vae_align.read_zoo`: Markdown. Figures that are missing leave their cell empty."""
    pairs = pairs_in(manifest)
    between = [each for each in pairs if each[0] != IMAGE]
    if not pairs:
        return "# Results: the zoo\n\nNo pair is judged yet.\n"
    one, into, first = (between or pairs)[0]
    judged = first["figures"]["aligned"]
    parts = [HEAD.format(one=one, into=into, images=judged["images"], size=judged["image_size"])]
    parts += [_training(manifest["spaces"])]
    parts += [_matrix(between), _behind(between)] if between else []
    parts += [_pairs(between)] if between else []
    parts += [_images([each for each in pairs if each[0] == IMAGE])]
    tried = [each for each in between if "drift" in each[2]]
    parts += [_drift(tried), PHOTOS, _strange(tried)] if tried else []
    return "\n".join(part for part in parts if part)


def _training(spaces: dict) -> str:
    learned = []
    for name, of in spaces.items():
        own = [f"`--{flag} {value}`" for flag, value in of.get("own_flags", {}).items()]
        flags = f" with {' '.join(own)} ({of['why']})" if own else ""
        learned.append(f"{TITLES[name]} {of['steps']} steps in {of['minutes']:g} minutes{flags}")
    return f"Of each space one encoder was learned, by the recipe `config/zoo.json`: {'; '.join(learned)}.\n"


def _matrix(pairs) -> str:
    names = [name for name in TITLES if any(name in pair[:2] for pair in pairs)]
    verdicts = {(one, into): _shortly(pair["verdict"]) for one, into, pair in pairs}
    rows = [[f"**{TITLES[one]}**", *(verdicts.get((one, into), "") for into in names)] for one in names]
    lines = ["## Verdicts", "", "In brackets by how much PSNR and ST-LPIPS differ from decode + re-encode's.", ""]
    return "\n".join([*lines, *_table(["from ↓ to →", *(TITLES[name] for name in names)], rows), ""])


def _shortly(verdict: dict) -> str:
    gains = [f"{verdict['gain_db']:+.2f} dB", f"{-verdict['perceptual_gain']:+.3f}"]
    return f"{verdict['answer']} ({', '.join(gains)})"


def _behind(pairs) -> str:
    lines = ["## What each pair is behind in", ""]
    lines.append("Beyond the interval, against decode + re-encode; the cost is the share of its multiply-adds.")
    rows = []
    for one, into, pair in pairs:
        verdict, found = pair["verdict"], []
        for name, unit, digits in (("gain", " dB PSNR", 2), ("perceptual_gain", " ST-LPIPS", 3)):
            mean = verdict["gain_db" if name == "gain" else name]
            error = verdict["gain_error_db" if name == "gain" else f"{name}_error"] or 0
            found += [f"{-mean:.{digits}f} ± {error:.{digits}f}{unit}"] if mean < -error else []
        cost = verdict.get("macs_fraction")
        rows.append([f"{TITLES[one]} → {TITLES[into]}", " and ".join(found) or "nothing", f"{cost:.0%}" if cost else ""])
    return "\n".join([*lines, "", *_table(["pair", "behind in", "cost"], rows), ""])


def _pairs(pairs) -> str:
    rows = []
    for one, into, pair in pairs:
        for rung, label in RUNGS.items():
            if figures := pair["figures"].get(rung):
                name = f"{TITLES[one]} → {TITLES[into]}" if rung == "vae2" else ""
                rows.append([name, label, *_cells(figures), _colours(figures)])
    head = ["pair", "latents from", *(title for title, _ in COLUMNS.values()), "colour, levels"]
    return "\n".join(["## Figures", "", *_table(head, rows), ""])


def _images(pairs) -> str:
    if not pairs:
        return ""
    rows = [
        [TITLES[into], label, *_cells(pair["figures"][rung]), f"{pair['figures'][rung]['macs'] / 1e9:.1f}"]
        for _, into, pair in pairs
        for rung, label in (("vae2", "the tiny encoder itself"), ("aligned", "**the module**"))
    ]
    head = ["into", "latents from", *(title for title, _ in COLUMNS.values()), "G multiply-adds"]
    text = """## From the image

`AlignPipeline.from_pretrained("image", "flux1")` encodes an image into a space's latents without the space's encoder.
"""
    better = [TITLES[into] for _, into, pair in pairs if _gains(pair["figures"]["aligned"], pair["figures"]["vae2"])]
    rest = [TITLES[into] for _, into, _ in pairs if TITLES[into] not in better]
    said = f"Better than the tiny encoder in PSNR or ST-LPIPS, by the bounds above, and worse in neither: {_listed(better)}."
    said += f" Not so: {_listed(rest)}, whose tiny encoder costs as much." if rest else ""
    return "\n".join([text, *_table(head, rows), "", said, ""])


def _gains(ours: dict, theirs: dict) -> bool:
    """Whether figures are better than others in distortion or perception and worse in neither."""
    gains = [(ours["psnr"] - theirs["psnr"]) / PSNR_NOISE]
    gains.append((theirs["st_lpips_vgg"] - ours["st_lpips_vgg"]) / PERCEPTION_NOISE)
    return max(gains) >= 1 and min(gains) > -1


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _drift(pairs) -> str:
    hops = len(pairs[0][2]["drift"]["aligned"]["psnr"]) - 1
    rows = []
    for one, into, pair in pairs:
        ours, theirs = (pair["drift"][way] for way in ("aligned", "reencode"))
        cells = [f"{theirs['psnr'][0]:.2f} / {theirs['st_lpips_vgg'][0]:.3f}"]
        for hop in (1, 2, hops):
            cells += [f"{way['psnr'][hop]:.2f} / {way['st_lpips_vgg'][hop]:.3f}" for way in (theirs, ours)]
        rows.append([f"{TITLES[one]} → {TITLES[into]} → {TITLES[one]}", *cells])
    head = ["there and back", "none"] + [f"{hop}, {way}" for hop in (1, 2, hops) for way in ("re-encode", "**module**")]
    shown = " ".join(f"![{text}](assets/zoo/{name})" for name, _, text in CHARTS)
    return "\n".join([DRIFT, shown, "", *_table(head, rows), ""])


def drift_charts(manifest: dict) -> dict[str, str]:
    """{file name: SVG}: figures over hops, the mean over all pairs that were tried."""
    tried = [pair["drift"] for _, _, pair in pairs_in(manifest) if "drift" in pair]
    found = {}
    for name, metric, text in CHARTS if tried else ():
        series = []
        for way, label in (("aligned", "modules"), ("reencode", "decode + re-encode")):
            means = [statistics.fmean(hops) for hops in zip(*(drift[way][metric] for drift in tried))]
            series.append((label, list(enumerate(means)), f"c-{way}"))
        found[name] = charts.as_file(charts.lines(text, series, "hops there and back", COLUMNS[metric][0]))
    return found


def _strange(pairs) -> str:
    names = list(pairs[0][2]["transfer"])
    rows = []
    for one, into, pair in pairs:
        cells = []
        for name in names:
            ours, theirs = (pair["transfer"][name][way] for way in ("aligned", "reencode"))
            gains = [_difference(ours[metric], theirs[metric], digits) for metric, digits in (("psnr", 1), ("st_lpips_vgg", 3))]
            cells.append(" / ".join(gains))
        rows.append([f"{TITLES[one]} → {TITLES[into]}", *cells])
    broken = [
        f"- {TITLES[one]} → {TITLES[into]}, {name}: {-gain:.1f} dB"
        for gain, one, into, name in sorted(gains_in(pairs, "transfer", "psnr"))
        if gain < -BROKEN_DB
    ]
    breaks = f"What breaks, by more than {BROKEN_DB:g} dB behind decode + re-encode:"
    picture = f"The pair that is worst at each:\n\n![the worst of each](assets/zoo/{STRANGE_SHEET})"
    return "\n".join([STRANGE, *_table(["pair", *names], rows), "", breaks, "", *(broken or ["- nothing"]), "", picture, ""])


def _difference(ours: float | None, theirs: float | None, digits: int) -> str:
    return "–" if ours is None or theirs is None else f"{ours - theirs:+.{digits}f}"


def _cells(figures: dict) -> list[str]:
    return [form.format(figures[name]) if figures.get(name) is not None else "" for name, (_, form) in COLUMNS.items()]


def _colours(figures: dict) -> str:
    return " ".join(f"{level:+.1f}" for level in figures["colour_bias"])


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def write_page(manifest: dict, page: Path, folder: Path) -> None:
    """Write the page, and its charts beside the manifest."""
    written = {page: results_page(manifest)} | {folder / name: chart for name, chart in drift_charts(manifest).items()}
    for path, content in written.items():
        with atomic_file(path) as file:
            file.write(content.encode())


def main():
    write_page(read_zoo(), PAGE, ZOO)
    print(PAGE)


if __name__ == "__main__":
    run(main)
