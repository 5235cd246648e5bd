"""What a pair of the zoo is tried on besides single photos: many hops there and back, latents of no photo, other sizes.

Everything is held against decode + re-encode, the other way between the same two spaces.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image, ImageDraw, ImageFont

from evaluation.figures import finite, to_8bit
from evaluation.ladder import Ladder
from evaluation.metrics import PerceptualFeatures, psnr
from evaluation.pictures import comparison_picture
from images.decoding import to_pixel_values
from vaes.codec import decode_picture

HOPS = 5  # there and back, each
WAYS = ("reencode", "aligned")  # rungs of the ladder
CAPTIONS = ("decode + re-encode", "the module")
SIDE = 256  # px, of what is drawn here
FINER = 4  # times finer is drawn, for smooth edges
LINE = "Latents of one model, pictures of another: 0123456789"
GRAPH = ((20, 200), (80, 60), (140, 170), (236, 30))


def figures(picture: torch.Tensor, reference: torch.Tensor, features: PerceptualFeatures) -> dict[str, list[float]]:
    """PSNR in dB and ST-LPIPS (VGG) between two batches of pictures (B, 3, H, W) in [-1, 1], of each picture."""
    return {
        "psnr": psnr(to_8bit(picture), to_8bit(reference)),
        "st_lpips_vgg": features.distance(picture, reference),
    }


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


@torch.inference_mode()
def drift(there: Ladder, back: Ladder, photos: torch.Tensor, features: PerceptualFeatures) -> dict:
    """Photos (B, 3, H, W) in [-1, 1], carried from VAE1's latents to VAE2's and back `HOPS` times -> {way: {metric: [mean of
    VAE1's own reconstruction, after 1 hop, after 2, …]}}. `back` is the ladder of the opposite pair."""
    codec, found = there.pipeline.codec1, {}
    for way in WAYS:
        latents, after = codec.encode(photos), []
        for hop in range(HOPS + 1):
            if hop:
                latents = back.rungs[way](there.rungs[way](latents, photos), photos)
            after.append(figures(codec.decode(latents), photos, features))
        found[way] = {metric: [_mean(each[metric]) for each in after] for metric in after[0]}
    return found


@torch.inference_mode()
def carried(ladder: Ladder, given: torch.Tensor) -> list[torch.Tensor]:
    """An image (1, 3, H, W) in [-1, 1], or VAE1's scaled latents, of which VAE1's picture stands for the image -> [the image,
    VAE2's picture of the re-encoded latents, of the module's], all in [-1, 1]."""
    codec1, codec2 = ladder.pipeline.codec1, ladder.pipeline.codec2
    latents = given if given.shape[1] == codec1.channels else codec1.encode(given)
    image = decode_picture(latents, codec1) if latents is given else given
    return [image, *(decode_picture(ladder.rungs[way](latents, image), codec2) for way in WAYS)]


@torch.inference_mode()
def transfer(ladder: Ladder, inputs: dict[str, torch.Tensor], features: PerceptualFeatures) -> dict:
    """{name: what `carried` takes} -> {name: {way: {metric: figure against the image}}}."""
    found = {}
    for name, given in inputs.items():
        image, *pictures = carried(ladder, given)
        found[name] = {
            way: finite({metric: _mean(value) for metric, value in figures(picture, image, features).items()})
            for way, picture in zip(WAYS, pictures)
        }
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What is carried


def strange_inputs(photos: torch.Tensor, latents: torch.Tensor) -> dict[str, torch.Tensor]:
    """{what it is: image (1, 3, H, W) in [-1, 1], or scaled latents of noise}, the latter and two mosaics made of photos
    (B, 3, S, S) and their latents (B, C, …)."""
    drawn = {"drawing": _drawing(), "text": _text(), "flat colour": Image.new("RGB", (SIDE, SIDE), (60, 120, 200))}
    images = {name: _pixels(picture).to(photos) for name, picture in drawn.items()}
    images["noise"] = noise_like(latents)
    for rows, columns in ((3, 2), (4, 4)):
        picture = mosaic(photos, rows, columns)
        images[f"{picture.shape[3]}x{picture.shape[2]} px"] = picture
    return images


def noise_like(latents: torch.Tensor) -> torch.Tensor:
    """Noise in place of latents, (1, C, h, w), with the mean and standard deviation of each channel of these (B, C, h, w)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, *latents.shape[1:], generator=generator).to(latents)
    return noise * latents.std(dim=(0, 2, 3), keepdim=True) + latents.mean(dim=(0, 2, 3), keepdim=True)


def mosaic(photos: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Photos (B, 3, h, w) side by side, every second one that comes again mirrored: (1, 3, rows · h, columns · w)."""
    tiles = [photos[place % len(photos)] for place in range(rows * columns)]
    tiles = [tile.flip(-1) if place // len(photos) % 2 else tile for place, tile in enumerate(tiles)]
    lines = [torch.cat(tiles[start : start + columns], dim=2) for start in range(0, len(tiles), columns)]
    return torch.cat(lines, dim=1)[None]


def _pixels(picture: Image.Image) -> torch.Tensor:
    levels = torch.tensor(list(picture.tobytes()), dtype=torch.uint8)
    return to_pixel_values(levels.view(1, picture.height, picture.width, 3).movedim(3, 1))


def _drawing() -> Image.Image:
    """Thin lines and plain areas."""
    sheet = Image.new("RGB", (SIDE * FINER,) * 2, "white")
    draw = ImageDraw.Draw(sheet)

    def at(*points):
        return [FINER * coordinate for point in points for coordinate in point]

    draw.ellipse(at((30, 30), (110, 110)), fill="gold", outline="black", width=2 * FINER)
    draw.rectangle(at((140, 120), (226, 226)), fill="firebrick", outline="black", width=FINER)
    draw.polygon(at((130, 120), (183, 70), (236, 120)), fill="steelblue", outline="black", width=2 * FINER)
    draw.line(at(*GRAPH), fill="black", width=FINER)
    for ray in range(8, 120, 8):
        draw.line(at((20, 240), (ray, 150)), fill="seagreen", width=FINER // 2)
    return sheet.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _text() -> Image.Image:
    """Lines of text, each larger than the one above."""
    sheet = Image.new("RGB", (SIDE, SIDE), "white")
    draw, top = ImageDraw.Draw(sheet), 6
    for size in range(9, 30, 3):
        draw.text((6, top), LINE, fill="black", font=ImageFont.load_default(size))
        top += round(1.6 * size)
    return sheet


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def sheet_of(rows: list[tuple[str, list[torch.Tensor]]], size: int = 224) -> Image.Image:
    """Rows of what `carried` returns, of each picture the middle `size` px; below the first its row's name."""
    panels = []
    for name, pictures in rows:
        panels.append([(caption, _middle(picture[0], size)) for caption, picture in zip((name, *CAPTIONS), pictures)])
    return comparison_picture(panels, size)


def _middle(picture: torch.Tensor, size: int) -> torch.Tensor:
    size = min(size, *picture.shape[1:])
    top, left = ((side - size) // 2 for side in picture.shape[1:])
    return picture[:, top : top + size, left : left + size]
