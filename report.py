"""Pictures and tables from what `eval_align.evaluate` returns. Knows no model."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw, ImageFont

from metrics import to_8bit

DIFFERENCE_GAIN = 5  # differences are shown this many times amplified around mid-grey
PADDING, CAPTION = 6, 20  # px


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


def comparison_picture(rows: list[list[tuple[str, torch.Tensor]]], panel: int) -> Image.Image:
    """Rows of captioned panels on one sheet. Each panel is (caption, (3, h, w) in [-1, 1]), shown `panel` px wide."""
    height = panel + CAPTION + PADDING
    width = max(len(row) for row in rows) * (panel + PADDING) + PADDING
    sheet = Image.new("RGB", (width, len(rows) * height + PADDING), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for y, row in enumerate(rows):
        for x, (caption, image) in enumerate(row):
            corner = (PADDING + x * (panel + PADDING), PADDING + y * height)
            sheet.paste(to_pil(image).resize((panel, panel), Image.Resampling.NEAREST), corner)
            draw.text((corner[0] + 2, corner[1] + panel + 2), caption, fill="black", font=font)
    return sheet


def ladder_table(results: dict) -> str:
    """The baseline ladder as aligned text: one line a row, a dash where a figure has no meaning."""
    columns = {
        "latent MSE": ("latent_mse", "{:.4f}".format),
        "PSNR dB": ("psnr", "{:.2f}".format),
        "SSIM": ("ssim", "{:.4f}".format),
        "colour bias": ("colour_bias", lambda bias: " ".join(f"{level:+.1f}" for level in bias)),
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
