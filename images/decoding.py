"""From a file's bytes to the RGB picture that a viewer would show, and to pixels: formats, metadata, colour profiles, crops."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL import __version__ as pillow_version

log = logging.getLogger(__name__)

Image.MAX_IMAGE_PIXELS = 1 << 28  # Pillow's limit is a third of it, and phones and cameras have 102 to 200 megapixels

WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # grey with more than 8 bits; Pillow would clip them at 255
CLEAR_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
SAID = set()  # (mode, white, whether nearly black) of images whose range was warned of in this process
EXECUTED_FORMATS = ("EPS",)  # Pillow passes such a file, under any name, to Ghostscript, which executes it
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
METADATA_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"tIME", b"pHYs")


def open_image(file: str | io.BytesIO) -> Image.Image:
    """The picture in a file, by path or as bytes, not yet decoded. An exception of Pillow's if it is none."""
    try:
        image = Image.open(file, formats=readable_formats())
        require_decodable(image)
        if image.format == "PNG":
            image.load()  # texts may stand behind the pixels
        return image
    except (ValueError, UnidentifiedImageError):
        plain = without_metadata(file)
        if plain is None:
            raise
        with contextlib.suppress(Exception):
            return Image.open(plain, formats=("PNG",))
        raise


def require_decodable(image: Image.Image) -> None:
    """DecompressionBombError unless the image, with the copies that `to_rgb` makes of it, takes at most about 2 GB."""
    several = image.mode in (*WIDE_MODES, *CLEAR_MODES) or "transparency" in image.info  # copies of the whole picture
    if image.width * image.height > Image.MAX_IMAGE_PIXELS // (2 if several else 1):
        size = f"{image.width}x{image.height} pixels of mode {image.mode}"
        raise Image.DecompressionBombError(f"{size} take too much memory, could be a decompression bomb")


def without_metadata(file: str | io.BytesIO) -> io.BytesIO | None:
    """A PNG without the chunks that are no picture; None for any other file. Pillow refuses a PNG whose texts are longer than
    it likes, such as the workflow that made the picture."""
    with open(file, "rb") if isinstance(file, str) else io.BytesIO(file.getvalue()) as file:
        if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
            return None
        content = file.read()
    kept, place = [PNG_SIGNATURE], 0
    while place + 8 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] not in METADATA_CHUNKS:
            kept.append(content[place:end])
        place = end
    return io.BytesIO(b"".join(kept))


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """The formats that Pillow reads here, without those that it would execute, HEIC, AVIF and JPEG XL where a plug-in is
    installed. A worker that is no fork knows none of them before."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    for plugin in ("pillow_avif", "pillow_jxl"):
        with contextlib.suppress(ImportError):
            importlib.import_module(plugin)
    return tuple(kind for kind in Image.OPEN if kind not in EXECUTED_FORMATS)


def image_reader() -> str:
    """What decodes images here: another version or a further plug-in may read what this one does not."""
    return f"Pillow {pillow_version} with {', '.join(sorted(readable_formats()))}"


def to_rgb(image: Image.Image, name: str = "an image") -> Image.Image:
    """Any Pillow image as the RGB picture a viewer would show: upright, first frame, over white, 16 bits scaled to 8.

    `name`: what a warning calls it, see `wide_levels`."""
    image.load()  # raises if the pixels cannot be decoded
    require_decodable(image)  # an icon's size and mode are known only now
    profile = image.info.get("icc_profile")
    with contextlib.suppress(Exception):  # metadata that cannot be parsed: the picture stays as it is stored
        image = ImageOps.exif_transpose(image)
    if image.mode in WIDE_MODES:
        return Image.fromarray(wide_levels(image, name)).convert("RGB")
    if profile:
        with contextlib.suppress(Exception):  # a profile that cannot be parsed or is for another mode
            image = in_srgb(image, profile)
    if image.mode in CLEAR_MODES or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def wide_levels(image: Image.Image, name: str) -> np.ndarray:
    """A grey image of more than 8 bits -> (H, W) uint8; values beyond its range are clipped, and NaN is black.

    The range is 0 to 65535 for 16 bits. Other kinds state none: floats within 0..1 have that one, and else it is the one of
    0..1 (floats alone), 0..255 and 0..65535 within which most pixels are neither clipped nor nearly black. A line in the log
    says that it was guessed, or that the picture is nearly black.
    """
    values = np.asarray(image, np.float32)
    finite = values[np.isfinite(values)]
    lowest, highest = finite.min(initial=0), finite.max(initial=0)
    whole = image.mode != "F" or (finite == np.floor(finite)).all()
    guessed = not image.mode.startswith("I;16") and (image.mode != "F" or highest > 1)
    if guessed:
        ranges = (255, 65535) if whole else (1, 255, 65535)
        white = max(ranges, key=lambda white: np.count_nonzero((values > white / 32) & (values <= white)))
    else:
        white = 1 if image.mode == "F" else 65535
    dark = 0 < highest < white / 16
    kind = image.mode, white, dark
    if (guessed or dark or lowest < -white / 16) and kind not in SAID:
        SAID.add(kind)
        log.warning(
            "%r: a grey image of mode %s with values from %g to %g is read as 0 (black) to %d (white)%s; others like it are "
            "not named",
            name, image.mode, lowest, highest, white, ": it is nearly black" if dark else "",
        )  # fmt: skip
    return np.nan_to_num(values * (255 / white)).clip(0, 255).round().astype(np.uint8)


def in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """`image`, whose colours are those of an ICC profile, in sRGB, with its transparency. An exception of Pillow's if the
    profile is damaged or of another colour space than the image's."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if image.mode == "CMYK":
        if space != "CMYK":
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    if space == "GRAY":
        if image.mode not in ("L", "LA"):
            return image
        levels = ImageCms.profileToProfile(image.getchannel("L"), source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    elif space == "RGB":
        transparent = "transparency" in image.info
        opaque = image.convert("RGBA").convert("RGB") if transparent or image.mode != "RGB" else image
        levels = ImageCms.profileToProfile(opaque, source, ImageCms.createProfile("sRGB"))
    else:
        return image
    if image.mode in CLEAR_MODES or "transparency" in image.info:
        levels.putalpha(image.convert("RGBA").getchannel("A"))
    return levels


def resized_crop(image: Image.Image, short_side: int, size: int, at: tuple[float, float] = (0.5, 0.5)) -> torch.Tensor:
    """Resize the short side to `short_side` px, then crop `size` x `size`: (3, size, size) uint8.

    `at` is the position of the crop along height and width, from 0 (top, left) to 1; the default is the centre. Only the
    pixels of the crop are resampled, so that an image of 30,000 x 1 px takes no more memory than any other.
    """
    scale = short_side / min(image.size)
    width, height = (max(short_side, round(side * scale)) for side in image.size)
    top, left = round(at[0] * (height - size)), round(at[1] * (width - size))
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))  # Pillow refuses one that a rounding error enlarged
    image = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pixel_values(levels: torch.Tensor) -> torch.Tensor:
    """8-bit levels, uint8 -> float32 in [-1, 1]."""
    # by a tensor: for a plain number CUDA multiplies by its rounded reciprocal, and gives other digits than the CPU
    return levels.float() / torch.full((), 127.5, device=levels.device) - 1


def to_levels(pixel_values: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> 8-bit levels, uint8."""
    return ((pixel_values + 1) * 127.5).round().to(torch.uint8)
