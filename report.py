"""Pictures, tables and the verdict from what `eval_align.evaluate` returns. Knows no model."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import math
import os
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from metrics import to_8bit
from utils import atomic_file, count_of

DIFFERENCE_GAIN = 5  # differences are shown this many times amplified around mid-grey
PADDING = 6  # px
PLAIN_SIGNS = str.maketrans("×−", "x-")  # Pillow's own font lacks these
PAGE_PANEL = 512  # px: larger pictures are shown smaller on the page
PAGE_BYTES = 6_000_000  # of pictures on the page, all together
PSNR_NOISE = 0.05  # dB: smaller differences are none
BIAS_SEEN = 1  # 8-bit levels of colour bias from which it is called a weakness
SOFT = 0.8  # fine detail relative to decode + re-encode's, below which a picture visibly lacks it
FEW_IMAGES = 30


def difference_map(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(image - reference), amplified `DIFFERENCE_GAIN` times around grey: (…, 3, H, W) in [-1, 1]."""
    return ((image - reference) / 2 * DIFFERENCE_GAIN).clamp(-1, 1)


def latent_projection(channels: int) -> torch.Tensor:
    """A fixed (3, channels) matrix that shows latents as RGB; the same for every picture of that channel count."""
    generator = torch.Generator().manual_seed(channels)
    basis, _ = torch.linalg.qr(torch.randn(max(3, channels), 3, generator=generator))
    return basis[:channels].T


def latents_as_rgb(latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents (…, C, h, w) -> (…, 3, h, w) in [-1, 1] by a fixed projection, so that panels can be compared."""
    projection = latent_projection(latents.shape[-3]).to(latents)
    return torch.einsum("rc,...chw->...rhw", projection, latents).div(2.5).clamp(-1, 1)


def to_pil(image: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB image."""
    return Image.fromarray(to_8bit(image).byte().permute(1, 2, 0).cpu().numpy())


def comparison_rows(original: torch.Tensor, made: dict, names: dict) -> list[list[tuple[str, torch.Tensor | None]]]:
    """One image as three rows of (caption, panel): pictures, below each its amplified difference, below that its latents.

    Pictures and differences are (3, S, S), latents (3, h, w), all in [-1, 1]. None is a place without a panel; its caption
    says what is in the row. VAE1 and VAE2 are held against the original, everything else against VAE2.

    Args:
        original: (3, S, S) in [-1, 1]; made: {row: (latents (C, h, w), picture (3, S, S))}.
        names: {row: what it is called}, of the rows to show, in order; "ceiling" is among them.
    """
    pictures = {row: made[row][1].clamp(-1, 1) for row in names}
    rows = [
        [("original", original)],
        [(f"differences, amplified ×{DIFFERENCE_GAIN} around grey", None)],
        [("latents, by one fixed projection to RGB", None)],
    ]
    for row, name in names.items():
        than, reference = ("original", original) if row in ("vae1", "ceiling") else ("VAE2", pictures["ceiling"])
        rows[0].append((name, pictures[row]))
        rows[1].append((f"{name} − {than}, ×{DIFFERENCE_GAIN}", difference_map(pictures[row], reference)))
        rows[2].append((f"{name} latents", latents_as_rgb(made[row][0])))
    return rows


def comparison_picture(rows: list[list[tuple[str, torch.Tensor | None]]], size: int) -> Image.Image:
    """Rows of captioned panels on one sheet; the caption of a place without a panel is written into it.

    Each panel is (caption, (3, h, w) in [-1, 1]), shown `size` px wide or as wide as its caption needs.
    """
    font = ImageFont.load_default(max(13, round(size * 0.06)))
    line = round(1.5 * font.size)
    shown = [[(caption.translate(PLAIN_SIGNS), image) for caption, image in row] for row in rows]
    captions = [caption for row in shown for caption, image in row if image is not None]
    panel = max(size, *(math.ceil(font.getlength(caption)) + 4 for caption in captions))
    height = panel + line + PADDING
    width = max(len(row) for row in rows) * (panel + PADDING) + PADDING
    sheet = Image.new("RGB", (width, len(rows) * height + PADDING), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(shown):
        for x, (caption, image) in enumerate(row):
            left, top = PADDING + x * (panel + PADDING), PADDING + y * height
            if image is None:
                lines = textwrap.wrap(caption, max(1, int(panel / font.getlength("n"))))
                draw.text((left + 2, top), "\n".join(lines), fill="black", font=font)
                continue
            sheet.paste(to_pil(image).resize((panel, panel), Image.Resampling.NEAREST), (left, top))
            draw.text((left + 2, top + panel + 2), caption, fill="black", font=font)
    return sheet


def ladder_table(results: dict) -> str:
    """The baseline ladder as aligned text: one line a row, a dash where a figure has no meaning."""
    columns = {
        "latent MSE": ("latent_mse", "{:.4f}".format),
        "PSNR dB": ("psnr", "{:.2f}".format),
        "SSIM": ("ssim", "{:.4f}".format),
        "colour bias": ("colour_bias", lambda bias: " ".join("–" if level is None else f"{level:+.1f}" for level in bias)),
        "ms": ("milliseconds", "{:.2f}".format),
        "M params": ("parameters", lambda count: f"{count / 1e6:.2f}"),
        "G MACs": ("macs", lambda count: f"{count / 1e9:.2f}"),
    }
    lines = [("", *columns)]
    for row in results["ladder"].values():
        cells = [form(row[key]) if row.get(key) is not None else "–" for key, form in columns.values()]
        lines.append((row["label"], *cells))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )


def csv_rows(results: dict):
    """metrics.csv, row by row: a header, then one row per image and rung; nothing where a figure has no meaning."""
    plain, triples = {}, {}
    for metrics in results["per_image"].values():
        for name, numbers in metrics.items():
            if not isinstance(numbers[0], list):
                plain[name] = None
            elif name == "colour_bias":
                triples[name] = ("r", "g", "b")
    yield ["image", "rung", *plain, *(f"{name}_{part}" for name, parts in triples.items() for part in parts)]
    for place, path in enumerate(results["paths"]):
        for row, metrics in results["per_image"].items():
            figures = [metrics[name][place] if name in metrics else None for name in plain]
            figures += [part for name in triples for part in metrics[name][place]]
            yield [path, row, *("" if figure is None else figure for figure in figures)]


def write_files(folder: Path, results: dict, page: str) -> None:
    """metrics.json, metrics.csv and report.html in `folder`; bytes of a file name that are no UTF-8 come out as escapes.

    Whatever is there of the three tells of one evaluation, at every moment and after a kill: all new files are whole before
    the old ones go, and these have gone before the first new one gets its name. The page comes last.
    """
    paths = [folder / name for name in ("report.html", "metrics.csv", "metrics.json")]
    with contextlib.ExitStack() as stack:  # which renames them in the reverse order
        options = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        files = [stack.enter_context(atomic_file(path, "w", **options)) for path in paths]
        files[0].write(page)
        csv.writer(files[1]).writerows(csv_rows(results))
        files[2].write(json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        for path in paths:
            path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# The verdict


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


def decibels(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1f}".replace("-", "−")


def percent(fraction: float) -> str:
    """A share in per cent, to two digits; never 0% for what is not nothing."""
    return f"{100 * fraction:.0f}%" if fraction >= 0.1 else f"{100 * fraction:.2g}%"


def shown_name(path: str, folder: str) -> str:
    """An image's name as people know it: its path below the folder that was judged."""
    return os.path.relpath(path, folder) if os.path.isabs(path) == os.path.isabs(folder) and os.path.dirname(path) else path


def chosen_images(results: dict, wanted: int) -> dict:
    """{"worst" | "median" | "best": [place in `paths`, …]}: about `wanted` images by what the main module loses to VAE2's own
    reconstruction, in dB of PSNR against the original. Without that figure an image is perfect, or if the latents are not
    finite, the worst."""
    per_image = results["per_image"]
    losses = []
    for place, (ours, ceiling) in enumerate(zip(per_image["aligned"]["psnr"], per_image["ceiling"]["psnr"])):
        if ours is not None and ceiling is not None:
            losses.append(ceiling - ours)
        else:
            losses.append(math.inf if per_image["aligned"]["latent_mse"][place] is None else -math.inf)
    order = sorted(range(len(losses)), key=lambda place: (-losses[place], place))
    wanted = min(wanted, len(order))
    worst, best = -(-wanted // 3), wanted // 3
    middle = wanted - worst - best
    start = min(max(worst, (len(order) - middle) // 2), len(order) - best - middle)
    groups = {"worst": order[:worst], "median": order[start : start + middle], "best": order[len(order) - best :][::-1]}
    return {name: places for name, places in groups.items() if places}


# ----------------------------------------------------------------------------------------------------------------------
# Pictures on the page


def picture_uri(image: torch.Tensor, side: int, limit: int) -> str:
    """(3, h, w) in [-1, 1] as a data URI of a JPEG of at most `side` px and, as far as that can be had, `limit` bytes."""
    picture = to_pil(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    for quality in (90, 80, 65, 45):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, subsampling=0)
        if file.tell() <= limit:
            break
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def pixels_uri(image: torch.Tensor, limit: int) -> str:
    """(3, h, w) in [-1, 1], as small as latents are, as a data URI of a PNG; of a JPEG if that is over `limit` bytes."""
    file = io.BytesIO()
    to_pil(image).save(file, "PNG", optimize=True)
    if file.tell() > limit:
        return picture_uri(image, max(image.shape[-2:]), limit)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def page_panels(rows: list[list[tuple[str, torch.Tensor | None]]], panels_on_page: int) -> list[list[dict]]:
    """`comparison_rows` for the page: {caption, uri, pixelated} for each place, with None as `uri` where there is no panel.

    `panels_on_page` panels share the page's bytes.
    """
    limit = PAGE_BYTES // max(1, panels_on_page)
    side = max(64, min(PAGE_PANEL, int(math.sqrt(limit * 2))))  # at half a byte per pixel photos look as they are

    def for_page(caption, image, pixelated):
        uri = None if image is None else pixels_uri(image, limit) if pixelated else picture_uri(image, side, limit)
        return {"caption": caption, "uri": uri, "pixelated": pixelated}

    return [[for_page(caption, image, row is rows[-1]) for caption, image in row] for row in rows]
