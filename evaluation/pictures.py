"""Pictures of an image's way through the rungs of the ladder: panels, sheets, the page's bytes. Knows no model."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from evaluation.figures import to_8bit
from utils import atomic_file, require_regular

DIFFERENCE_GAIN = 5  # differences are shown this many times amplified around mid-grey
PADDING = 6  # px
PLAIN_SIGNS = str.maketrans("×−", "x-")  # Pillow's own font lacks these
MARK = "vae-align eval_align.py"  # in the files of sheets
PAGE_PANEL = 512  # px: larger pictures are shown smaller on the page
PAGE_BYTES = 6_000_000  # of pictures on the page, all together


def difference_map(image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(image - reference), amplified `DIFFERENCE_GAIN` times around grey: (…, 3, H, W) in [-1, 1]."""
    return ((image - reference) / 2 * DIFFERENCE_GAIN).clamp(-1, 1)


def latents_as_rgb(latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents (…, C, h, w) -> (…, 3, h, w) in [-1, 1] by a projection that is fixed for each C, so that panels can be
    compared."""
    channels = latents.shape[-3]
    basis, _ = torch.linalg.qr(torch.randn(max(3, channels), 3, generator=torch.Generator().manual_seed(channels)))
    projection = basis[:channels].T.to(latents)
    return torch.einsum("rc,...chw->...rhw", projection, latents).div(2.5).clamp(-1, 1)


def to_pil(image: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB image."""
    return Image.fromarray(to_8bit(image).byte().permute(1, 2, 0).cpu().numpy())


def comparison_rows(original: torch.Tensor, made: dict, captions: dict) -> list[list[tuple[str, torch.Tensor | None]]]:
    """One image as three rows of (caption, panel): pictures, below each its amplified difference, below that its latents.

    Pictures and differences are (3, S, S), latents (3, h, w), all in [-1, 1]. None is a place without a panel; its caption
    names the row. VAE1 and VAE2 are compared with the original, everything else with VAE2.

    Args:
        original: (3, S, S) in [-1, 1]; made: {rung: (latents (C, h, w), picture (3, S, S))}.
        captions: {rung: its caption}, for the rungs to show, in order; "vae2" is among them.
    """
    pictures = {rung: made[rung][1].clamp(-1, 1) for rung in captions}
    rows = [
        [("original", original)],
        [(f"differences, amplified ×{DIFFERENCE_GAIN} around grey", None)],
        [("latents, by one fixed projection to RGB", None)],
    ]
    for rung, caption in captions.items():
        against, reference = ("original", original) if rung in ("vae1", "vae2") else ("VAE2", pictures["vae2"])
        rows[0].append((caption, pictures[rung]))
        rows[1].append((f"{caption} − {against}, ×{DIFFERENCE_GAIN}", difference_map(pictures[rung], reference)))
        rows[2].append((f"{caption} latents", latents_as_rgb(made[rung][0])))
    return rows


def comparisons(images: torch.Tensor, made: dict, captions: dict):
    """The `comparison_rows` of each of `images` (B, 3, S, S); `made`: by `Ladder.reconstruct`."""
    for index, original in enumerate(images.cpu()):
        of_image = {rung: (made[rung][0][index].cpu(), made[rung][1][index].cpu()) for rung in captions}
        yield comparison_rows(original, of_image, captions)


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


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as a PNG that `is_sheet` knows again."""
    marks = PngInfo()
    marks.add_text("Software", MARK)
    marks.add_text("Title", path.name)
    with atomic_file(path) as file:
        sheet.save(file, "PNG", pnginfo=marks)


def is_sheet(path: Path) -> bool:
    """Whether `save_sheet` wrote the file at `path` under this name. A user's picture is none, nor a sheet's renamed copy."""
    try:
        require_regular(path)
        with Image.open(path, formats=("PNG",)) as picture:
            marks = picture.info
    except Exception:  # no picture, or one that Pillow refuses
        return False
    return marks.get("Software") == MARK and marks.get("Title", path.name) == path.name


def chosen_images(results: dict, wanted: int) -> dict:
    """{"worst" | "median" | "best": [index in `paths`, …]}: about `wanted` images, by how many dB of PSNR against the original
    the main module loses to VAE2's own reconstruction. An image without that figure is perfect; or the worst, if the latents
    are not finite."""
    per_image = results["per_image"]
    losses = []
    for index, (ours, vae2) in enumerate(zip(per_image["aligned"]["psnr"], per_image["vae2"]["psnr"])):
        if ours is not None and vae2 is not None:
            losses.append(vae2 - ours)
        else:
            losses.append(math.inf if per_image["aligned"]["latent_mse"][index] is None else -math.inf)
    order = sorted(range(len(losses)), key=lambda index: (-losses[index], index))
    wanted = min(wanted, len(order))
    worst = -(-wanted // 3)
    best = wanted // 3
    middle = wanted - worst - best
    start = min(max(worst, (len(order) - middle) // 2), len(order) - best - middle)
    groups = {"worst": order[:worst], "median": order[start : start + middle], "best": order[len(order) - best :][::-1]}
    return {name: indices for name, indices in groups.items() if indices}


# ----------------------------------------------------------------------------------------------------------------------
# Pictures on the page


def page_panels(rows: list[list[tuple[str, torch.Tensor | None]]], panels_on_page: int) -> list[list[dict]]:
    """`comparison_rows` for the page: {caption, uri, pixelated} for each place, with None as `uri` where there is no panel.

    `panels_on_page` panels share the page's bytes.
    """
    limit = PAGE_BYTES // max(1, panels_on_page)
    side = max(64, min(PAGE_PANEL, int(math.sqrt(limit * 2))))  # at half a byte per pixel photos look as they are

    def for_page(caption, image, pixelated):
        uri = None if image is None else picture_uri(image, None if pixelated else side, limit)
        return {"caption": caption, "uri": uri, "pixelated": pixelated}

    return [[for_page(caption, image, row is rows[-1]) for caption, image in row] for row in rows]


def picture_uri(image: torch.Tensor, side: int | None, limit: int) -> str:
    """(3, h, w) in [-1, 1] as a data URI of, where possible, at most `limit` bytes: a JPEG of at most `side` px, or with None a
    PNG of all pixels, such as latents are."""
    picture = to_pil(image)
    tried = [("JPEG", {"quality": quality, "subsampling": 0}) for quality in (90, 80, 65, 45)]
    if side is None:
        tried.insert(0, ("PNG", {"optimize": True}))
    else:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    for kind, options in tried:
        file = io.BytesIO()
        picture.save(file, kind, **options)
        if file.tell() <= limit:
            break
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()
