"""Pictures whose colours a test knows, and the files that hold them."""

import io

import numpy as np
import torch
from conftest import make_photo
from PIL import Image

RED, GREEN, BLUE, BLACK, WHITE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255,) * 3, (128,) * 3


def levels(pixel_values):
    """(3, H, W) in [-1, 1] -> (H, W, 3) 8-bit levels."""
    assert pixel_values.dtype == torch.float32 and pixel_values.min() >= -1 and pixel_values.max() <= 1
    return ((pixel_values + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def bands(left, middle, right, dtype=np.uint8):
    """Three vertical bands of 8 px: (24, 24) for numbers, (24, 24, C) for tuples."""
    return np.repeat(np.array([[left, middle, right]], dtype=dtype).repeat(24, axis=0), 8, axis=1)


def smooth_picture(width, height, seed=0):
    """A colourful picture without detail finer than 10 px: sharp enough to tell places apart."""
    return make_photo(np.random.default_rng(seed), (width, height))


UPRIGHT = {  # EXIF orientation: the upright picture -> what is stored
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: np.rot90,
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, -1),
}


def oriented(path, picture, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](picture))).save(path, exif=exif, **options)


PHOTO = make_photo(np.random.default_rng(0), (48, 40))


def encoded(form, image=PHOTO, **options):
    """`image` as the bytes of a file of that format."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


PNG = encoded("PNG")


def noisy_pair(size, seed=1, count=2):
    """(images, originals) (count, 3, size, size) float32: photos, and the same with noise and a shift."""
    rng = np.random.default_rng(seed)
    originals = np.stack([np.asarray(make_photo(rng, (size, size)), dtype=np.float32) for _ in range(count)])
    originals = originals.transpose(0, 3, 1, 2) / 127.5 - 1
    images = originals * 0.9 + rng.normal(0, 0.15, originals.shape)
    return images.astype(np.float32), originals.astype(np.float32)
