"""The zoo's figures as a page: RESULTS.md, made of the manifest alone.

    python tools/zoo_results.py

writes it anew, after the manifest or this file has changed.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dataloader import ImageDataset
from images.files import list_images
from runtime.cli import run
from utils import atomic_file
from vae_align import IMAGE, AlignPipeline, read_zoo

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "RESULTS.md"
EMBEDDED_PHOTOS, EMBEDDED_SIZE = 2, 128  # how many of assets/photos/eval, px: a figure that any machine computes in a moment
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

The VAEs are the tiny autoencoders of the five spaces (TAESD and its kin), which work on the same latents as the full ones.
Judged on {images} photos that no training has seen, {size} px, bfloat16. PSNR and ST-LPIPS (VGG, smaller is nearer) against
the original; texture: Fréchet distance of early features from the originals', per cent of their variance; detail: power of the
finest detail; variance: of the latents; both relative to
VAE2's own. A verdict is "yes" where the module is behind decode + re-encode in neither PSNR nor ST-LPIPS beyond the 95 %
interval.
"""


@functools.cache
def embedded_photos() -> torch.Tensor:
    """Some of the photos that are part of this repository, (B, 3, H, W) in [-1, 1]."""
    dataset = ImageDataset(list_images(ROOT / "assets" / "photos" / "eval")[:EMBEDDED_PHOTOS], EMBEDDED_SIZE)
    return torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))]).float()


@torch.no_grad()
def carried_psnr(first: AlignPipeline | None, second: AlignPipeline, shift: list[float] | None) -> float:
    """PSNR in dB of `embedded_photos`, put into `first`'s latents by its learned encoder, carried into `second`'s and drawn by
    second's decoder: needs no VAE. With None put into second's at once. Both are modules of a space into itself; float32."""
    photos = embedded_photos()
    latents = AlignPipeline.joined(None, first or second).translate(image=photos)
    if first is not None:
        latents = AlignPipeline.joined(first, second, shift).translate(latents)
    squares = (second.module.picture(latents) - photos).square().mean(dim=(1, 2, 3))
    return (20 * torch.log10(2 / squares.sqrt())).mean().item()


def results_page(manifest: dict) -> str:
    """The page of a manifest, see `vae_align.read_zoo`: Markdown. Figures that are missing leave their cell empty."""
    pairs = [(one, into, pair) for one, group in manifest["pairs"].items() for into, pair in group.items()]
    between = [each for each in pairs if each[0] != IMAGE]
    if not pairs:
        return "# Results: the zoo\n\nNo pair is judged yet.\n"
    one, into, first = (between or pairs)[0]
    judged = first["figures"]["aligned"]
    parts = [HEAD.format(one=one, into=into, images=judged["images"], size=judged["image_size"])]
    parts += [_matrix(between), _behind(between)] if between else []
    parts += [_pairs(between)] if between else []
    parts += [_images([each for each in pairs if each[0] == IMAGE])]
    return "\n".join(part for part in parts if part)


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
    return "\n".join([text, *_table(head, rows), ""])


def _cells(figures: dict) -> list[str]:
    return [form.format(figures[name]) if figures.get(name) is not None else "" for name, (_, form) in COLUMNS.items()]


def _colours(figures: dict) -> str:
    return " ".join(f"{level:+.1f}" for level in figures["colour_bias"])


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def main():
    with atomic_file(PAGE) as file:
        file.write(results_page(read_zoo()).encode())
    print(PAGE)


if __name__ == "__main__":
    run(main)
