"""Translate files of VAE1's latents, or images through VAE1, into files of VAE2's latents.

    python tools/translate.py sd15:flux1 saved/*.latent --output_dir flux
    python tools/translate.py MODULE photos/ --output_dir flux --vae1_path sd-legacy/stable-diffusion-v1-5

MODULE is a file, a folder, a pair of the zoo (sd15:flux1 or sd15 flux1; image:flux1 takes images without VAE1), or a model on
the hub. A folder stands for the files in and below it; results keep its subfolders. Readable are `.latent` (ComfyUI's, in its
layout), `.safetensors` and `.npz` (a tensor `latents`, or its only one; also trainers' caches), `.pt` and `.pth` (a tensor, or
a dict of tensors in the same way), `.npy`, and images. Images are cropped around the centre to a multiple of VAE1's stride; a
module that takes the image gets them too. Latents are (B, C, h, w), (C, h, w), frames (B, C, frames, h, w), or packed, with
--size. Each result keeps its file's name and kind; images become `.safetensors`. The program names each file that it cannot
translate, goes on with the others, and then exits with status 1.
"""

import argparse
import logging
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dataloader import ImageDataset, UnreadableImage
from images.decoding import to_pixel_values
from images.files import list_images
from runtime.cli import MISTAKES, claim_writable_folder, integer, run
from utils import (
    UserError,
    atomic_file,
    compute_policy,
    is_out_of_memory,
    one_line,
    plain_stem,
    read_torch,
    require_held,
    resolve_device,
)
from vae_align import or_from_hub, pair_named, require_regular
from vaes.codec import SPACES
from vaes.pipeline import PipelineWithVAEs

log = logging.getLogger(__name__)

LATENT_FILES = (".latent", ".safetensors", ".pt", ".pth", ".npy", ".npz")
COMFYUI_KEY, RAW_MARK = "latent_tensor", "latent_format_version_0"  # files without the mark are ComfyUI's oldest, of SD1.5
NAMES = ("latents", "samples", COMFYUI_KEY)  # of the tensor in a file that holds several
CACHED = re.compile(r"latents_(?!flipped)(\d+x)+\d+(_\w+)?")  # a trainer's name for it: latents_64x64, latents_1x64x64_bfloat16
LONGEST = 200  # bytes of a result's name without its ending; file systems hold 255 of a temporary file's


def is_latents(path: Path) -> bool:
    return path.suffix.lower() in LATENT_FILES


def read_latents(path: Path) -> torch.Tensor:
    """The latents in a file, finite; a trainer's of frames (C, frames, h, w) become (1, C, frames, h, w). UserError if there
    are none, or if the file claims far more than it holds."""
    kind, name = path.suffix.lower(), ""
    try:
        require_regular(path)
        if kind in (".latent", ".safetensors"):
            with safe_open(path, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                latents = file.get_tensor(name := _name_of(shapes))
            if kind == ".latent" and RAW_MARK not in shapes:
                latents = latents * SPACES["sd15"].std[0]
        else:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as parts:
                    require_held(path, sum(part.file_size for part in parts.infolist()))
            of_torch = kind in (".pt", ".pth")
            latents = read_torch(path) if of_torch else np.load(path, allow_pickle=False)
            if not isinstance(latents, (torch.Tensor, np.ndarray)):
                content = dict(latents)
                name = _name_of({name: getattr(value, "shape", ()) for name, value in content.items()})
                latents = content[name]
            latents = torch.as_tensor(latents)
        if latents.layout != torch.strided or latents.is_meta or not latents.is_floating_point():
            raise ValueError(f"a tensor of {latents.dtype}, {latents.layout}, on {latents.device}")
        require_held(path, latents.numel() * latents.element_size())
    except Exception as error:  # numpy, torch and safetensors have errors of their own
        runs = isinstance(error, pickle.UnpicklingError) or "pickle" in str(error)
        why = "it asks to run code, which is refused, or holds no tensors" if runs else one_line(error)
        raise UserError(f"{path}: no latents can be read from it ({why})") from None
    if not latents.isfinite().all():
        raise UserError(f"{path}: its latents hold values that are not finite (NaN or infinity)")
    of_frames = CACHED.fullmatch(name) and latents.ndim == 4 and "x".join(map(str, latents.shape[1:])) in name
    return latents[None] if of_frames else latents


def _name_of(shapes: dict[str, tuple]) -> str:
    """The name of the latents among tensors {name: shape}; ValueError where it cannot be told."""
    fitting = [name for name, shape in shapes.items() if len(shape) >= 3]
    cached = [name for name in fitting if CACHED.fullmatch(name)]
    named = [name for name in NAMES if name in fitting][:1] or cached or fitting
    if len(named) != 1:
        found = f"several tensors, {', '.join(named[:4])}" if named else "no tensor of 3 or more dimensions"
        raise ValueError(f"it holds {found}; the latents must be one, or be called `latents`")
    return named[0]


def write_latents(path: Path, latents: torch.Tensor) -> None:
    """Write latents in the kind of file that the ending names, atomically."""
    latents, kind = latents.cpu().contiguous(), path.suffix.lower()
    with atomic_file(path) as file:
        if kind == ".npy":
            np.save(file, latents.numpy())
        elif kind == ".npz":
            np.savez(file, latents=latents.numpy())
        elif kind in (".pt", ".pth"):
            torch.save(latents, file)
        elif kind == ".latent":
            file.write(save({COMFYUI_KEY: latents, RAW_MARK: torch.tensor([])}))
        else:
            file.write(save({"latents": latents}))


def read_image(path: Path, stride: int) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1], cropped around its centre to multiples of `stride`."""
    try:
        image = ImageDataset([str(path)], stride).open(0)
    except UnreadableImage as error:
        raise UserError(str(error)) from None
    if min(image.size) < stride:
        raise UserError(f"{path}: {image.width}x{image.height} px is less than one latent of {stride} px")
    width, height = (side // stride * stride for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    levels = np.array(image.crop((left, top, left + width, top + height)))
    return to_pixel_values(torch.from_numpy(levels).permute(2, 0, 1)[None])


def translate_file(path: Path, pipeline: PipelineWithVAEs, raw: bool, size: tuple[int, int] | None = None) -> torch.Tensor:
    """VAE2's latents of a file of latents, or of an image through VAE1; a picture without batch axis comes out without one.

    `raw`: read and return raw latents; a `.latent` file always has ComfyUI's. `size`: (height, width) of the image of packed
    latents, px. UserError or AlignError if the file does not fit.
    """
    if not is_latents(path):
        image = read_image(path, max(pipeline.config.latent_stride, pipeline.config.out_stride)).to(pipeline.device)
        scaled = pipeline.translate(pipeline.codec1.encode(image) if pipeline.uses_latents else None, image)
        translated = pipeline.space2.to_raw(scaled) if raw else scaled
    elif pipeline.uses_image:
        raise UserError(f"{path}: this module also takes the image; give it the images, or use a module of latents alone")
    else:
        latents = read_latents(path)
        shape, raw = tuple(latents.shape), "comfyui" if path.suffix.lower() == ".latent" else raw
        if latents.ndim not in (3, 4, 5) or not latents.numel():
            raise UserError(f"{path}: latents of shape {shape}: give (B, C, h, w), (C, h, w), frames, or packed ones")
        if size is None and latents.ndim == 3 and not raw and pipeline.space1.are_packed(latents):
            why = "packed (then add --size HEIGHT WIDTH of the image, px) or have their channels last (then permute them)"
            raise UserError(f"{path}: latents of shape {shape} are {why}")
        translated = pipeline.translate(latents, raw=raw, size=size)
    if not translated.isfinite().all():
        raise UserError(f"{path}: its translation holds values that are not finite: these are no latents of {pipeline.space1}")
    return translated


def planned(inputs: list[str], output_dir: Path) -> tuple[dict[Path, Path], list[str]]:
    """({file: result}, [an input that is left out, and why]); a folder stands for the latents and images in and below it."""
    plan, left_out, sources, results = {}, [], {}, output_dir.absolute()
    for given in map(Path, inputs):
        found, above = [given] * os.path.lexists(given), given.parent
        if os.path.isdir(given):
            found, above = list(map(Path, list_images(given, further=LATENT_FILES))), given
            if results != given.absolute():  # earlier results are no inputs
                found = [file for file in found if results not in file.absolute().parents]
        if not found:
            left_out.append(f"{given}: no such file, or no latents and no images in this folder")
        for file in found:
            stem = file.stem if len(os.fsencode(file.stem)) <= LONGEST else plain_stem(file, LONGEST)
            name = stem + (file.suffix if is_latents(file) else ".safetensors")
            result = output_dir / file.relative_to(above).with_name(name)
            if sources.setdefault(result, file) != file:
                left_out.append(f"{file}: {sources[result]} and it both would become {result}; rename one")
            elif os.path.exists(result) and result.samefile(file):
                left_out.append(f"{file}: would be replaced by its own result; name another --output_dir")
            else:
                plan[file] = result
    return plan, left_out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="file (.safetensors or .pth), folder (its best module), pair such as sd15:flux1")
    parser.add_argument("inputs", nargs="+", metavar="IN", help="latents, images, or folders of them")
    parser.add_argument("--output_dir", required=True, help="folder of the results")
    kinds = "in all files but .latent, read and written, and in results of images (default: scaled, as in diffusers)"
    parser.add_argument("--latents", choices=("scaled", "raw"), help=kinds)
    sides = {"type": integer(1), "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
    parser.add_argument("--size", help="of the image of packed latents, px", **sides)
    parser.add_argument("--vae1_path", help="hub id or folder of VAE1, which encodes images (default: what the module names)")
    parser.add_argument("--vae1_subfolder", default="vae", help="folder in it that holds the VAE, if there is one")
    parser.add_argument("--cache_dir", help="where downloads go (default: the hub client's)")
    parser.add_argument("--device", help="cuda, cuda:N, mps or cpu (default: the first of cuda, mps, cpu that is there)")
    args = parser.parse_args()

    pair = f"{args.module}:{args.inputs[0]}"
    if not any(map(os.path.lexists, (args.module, args.inputs[0]))) and len(args.inputs) > 1 and pair_named(pair):
        args.module, args.inputs = pair, args.inputs[1:]
    default = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = resolve_device(args.device or default, True)
    compute_policy(device)
    output_dir = claim_writable_folder(args.output_dir, "--output_dir")
    plan, left_out = planned(args.inputs, output_dir)
    options = {"device": device, "cache_dir": args.cache_dir, "vae1_subfolder": args.vae1_subfolder}
    module = or_from_hub(args.module, {"cache_dir": args.cache_dir})
    pipeline = PipelineWithVAEs.from_checkpoint(module, args.vae1_path, labels=("--vae1_path", "VAE2"), **options)
    raw, spaces = args.latents == "raw", (pipeline.space1, pipeline.space2)[not pipeline.uses_latents :]
    if raw and not all(space.map_is_known for space in spaces):
        raise UserError("--latents raw: the module's file does not name its latent spaces; leave the flag out")
    if args.latents is None and any(file.suffix.lower() == ".npz" for file in plan):
        log.warning(".npz files are read as scaled latents; trainers keep those of SD and SDXL raw: add --latents raw")
    if not any(map(is_latents, plan)) and plan and pipeline.uses_latents:
        pipeline.codec1  # noqa: B018 - a missing VAE ends the program before the work begins
    with logging_redirect_tqdm():
        for message in left_out:
            log.warning("left out: %s", message)
        failed = len(left_out)
        for file, result in tqdm(plan.items(), desc="translate", unit="file"):
            try:
                write_latents(result, translate_file(file, pipeline, raw, args.size))
            except (*MISTAKES, MemoryError, OSError, RuntimeError) as error:  # RuntimeError: torch's, of a CPU's memory too
                failed += 1
                why = f"out of memory ({one_line(error)}); a smaller one fits" if is_out_of_memory(error) else one_line(error)
                log.warning("left out: %s", why if str(file) in why else f"{file}: {why}")
    print(f"{len(plan) + len(left_out) - failed} of {len(plan) + len(left_out)} translated into {output_dir}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
