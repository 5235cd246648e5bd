"""From a file's bytes to the RGB picture that a viewer would show, and to pixels: formats, metadata, colour profiles, crops."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL import __version__ as pillow_version

Image.MAX_IMAGE_PIXELS = 1 << 28  # Pillow's limit is a third of it, and phones and cameras have 102 to 200 megapixels

WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # grey with more than 8 bits; Pillow would clip them at 255
EXECUTED_FORMATS = ("EPS",)  # Pillow passes such a file, under any name, to Ghostscript, which executes it
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
METADATA_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"tIME", b"pHYs")


def open_image(file: str | io.BytesIO) -> Image.Image:
    """The picture in a file, by path or as bytes, not yet decoded. An exception of Pillow's if it is none."""
    try:
        image = Image.open(file, formats=readable_formats())
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as the RGB picture a viewer would show: upright, first frame, over white, 16 bits scaled to 8."""
    image.load()  # raises if the pixels cannot be decoded
    profile = image.info.get("icc_profile")
    with contextlib.suppress(Exception):  # metadata that cannot be parsed: the picture stays as it is stored
        image = ImageOps.exif_transpose(image)
    if image.mode in WIDE_MODES:
        levels = np.asarray(image, dtype=np.float32)
        brightest = levels.max(where=np.isfinite(levels), initial=0)
        if image.mode.startswith("I;16"):
            white = 65535
        elif image.mode == "F" and brightest <= 1:
            white = 1
        else:
            white = 255 if brightest <= 255 else 65535
        levels = np.nan_to_num(levels * (255 / white)).clip(0, 255).round().astype(np.uint8)
        return Image.fromarray(levels).convert("RGB")
    if profile:
        with contextlib.suppress(Exception):  # a profile that cannot be parsed or is for another mode
            image = in_srgb(image, profile)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


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
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
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
