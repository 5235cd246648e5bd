"""Translate files of VAE1's latents, or images through VAE1, into files of VAE2's latents.

    python tools/translate.py assets/pretrained/taesd_to_taef1_latent.safetensors saved/*.latent --output_dir flux
    python tools/translate.py MODULE photos/ --output_dir flux --vae1_path sd-legacy/stable-diffusion-v1-5

A folder stands for the files in it. Readable are `.latent` (ComfyUI's, always raw), `.safetensors` (a tensor `latents`, or its
only one), `.pt` and `.pth` (a tensor, or a dict of tensors in the same way), `.npy`, and images. Images are cropped around the
centre to a multiple of VAE1's stride; a module that takes the image gets them too. Latents are (B, C, h, w) or (C, h, w). Each
result keeps its file's name and kind; images become `.safetensors`. The program names each file that it cannot translate, goes
on with the others, and then exits with status 1.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from safetensors.torch import load_file, save
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dataloader import ImageDataset, UnreadableImage
from images.decoding import to_pixel_values
from images.files import list_images
from runtime.cli import MISTAKES, claim_writable_folder, run
from utils import UserError, atomic_file, compute_policy, one_line, read_torch, resolve_device
from vaes.codec import SPACES
from vaes.pipeline import PipelineWithVAEs

log = logging.getLogger(__name__)

LATENT_FILES = (".latent", ".safetensors", ".pt", ".pth", ".npy")
COMFYUI_KEY, RAW_MARK = "latent_tensor", "latent_format_version_0"  # files without the mark are ComfyUI's oldest, of SD1.5
NAMES = ("latents", "samples", COMFYUI_KEY)  # of the tensor in a file that holds several


def read_latents(path: Path) -> tuple[torch.Tensor, bool]:
    """(latents, whether the file itself says that they are raw). UserError for a file that holds none."""
    try:
        if path.suffix == ".npy":
            content = torch.from_numpy(np.load(path, allow_pickle=False))
        elif path.suffix in (".pt", ".pth"):
            content = read_torch(path)
        else:
            content = load_file(path)
    except Exception as error:  # numpy, torch and safetensors have errors of their own
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
    comfyui, scale = path.suffix == ".latent", 1.0
    if isinstance(content, dict):
        if comfyui and RAW_MARK not in content:
            scale = SPACES["sd15"].std[0]
        tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor) and value.ndim >= 3}
        named = [tensors[name] for name in NAMES if name in tensors] or list(tensors.values())[: len(tensors) == 1]
        content = named[0] if named else None
    if not isinstance(content, torch.Tensor) or content.ndim not in (3, 4) or not content.is_floating_point():
        raise UserError(f"{path}: holds no latents (B, C, h, w); name the tensor `latents`")
    return content * scale, comfyui


def write_latents(path: Path, latents: torch.Tensor) -> None:
    """Write latents in the kind of file that the ending names, atomically."""
    latents = latents.cpu().contiguous()
    with atomic_file(path) as file:
        if path.suffix == ".npy":
            np.save(file, latents.numpy())
        elif path.suffix in (".pt", ".pth"):
            torch.save(latents, file)
        elif path.suffix == ".latent":
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


def translate_file(path: Path, pipeline: PipelineWithVAEs, raw: bool) -> torch.Tensor:
    """VAE2's latents of a file of latents, or of an image through VAE1; the result has as many dimensions as the file's tensor.

    `raw`: read and return raw latents; a `.latent` file is always raw. UserError or AlignError if the file does not fit.
    """
    if path.suffix in LATENT_FILES:
        latents, says_raw = read_latents(path)
        if pipeline.uses_image:
            raise UserError(f"{path}: this module also takes the image; give it the images, or use a module of latents alone")
        translated = pipeline.translate(latents if latents.ndim == 4 else latents[None], raw=raw or says_raw)
        return translated if latents.ndim == 4 else translated[0]
    image = read_image(path, max(pipeline.config.latent_stride, pipeline.config.out_stride)).to(pipeline.device)
    scaled = pipeline.translate(pipeline.codec1.encode(image) if pipeline.uses_latents else None, image)
    if raw and not pipeline.space2.map_is_known:
        raise UserError("--latents raw: the module's file does not name VAE2's latent space; leave the flag out")
    return pipeline.space2.to_raw(scaled) if raw else scaled


def planned(inputs: list[str], output_dir: Path) -> dict[Path, Path]:
    """{file: result}; a folder stands for the latents and images in it. UserError if two results would be one file."""
    plan, sources = {}, {}
    for given in map(Path, inputs):
        if not given.exists():
            raise UserError(f"{given}: no such file or folder")
        found = [given]
        if given.is_dir():
            latents = {file for file in given.iterdir() if file.suffix in LATENT_FILES}
            found = sorted(latents | set(map(Path, list_images(given))))
            if not found:
                raise UserError(f"{given}: no latents and no images in this folder")
        for file in found:
            result = output_dir / (file.name if file.suffix in LATENT_FILES else f"{file.stem}.safetensors")
            if sources.setdefault(result, file) != file:
                raise UserError(f"{file}, {sources[result]}: both would become {result}; rename one")
            if result.exists() and result.samefile(file):
                raise UserError(f"--output_dir {output_dir}: {file} would be replaced by its own result; name another folder")
            plan[file] = result
    return plan


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="file (.safetensors or .pth), or a folder: its newest checkpoint")
    parser.add_argument("inputs", nargs="+", metavar="IN", help="latents, images, or folders of them")
    parser.add_argument("--output_dir", required=True, help="folder of the results")
    kinds = "in .safetensors, .pt and .npy files, read and written, and in results of images (default: scaled, as in diffusers)"
    parser.add_argument("--latents", choices=("scaled", "raw"), default="scaled", help=kinds)
    parser.add_argument("--vae1_path", help="hub id or folder of VAE1, which encodes images (default: what the module names)")
    parser.add_argument("--vae1_subfolder", default="vae", help="folder in it that holds the VAE, if there is one")
    parser.add_argument("--cache_dir", help="where downloads go (default: the hub client's)")
    parser.add_argument("--device", help="cuda, cuda:N, mps or cpu (default: the first of cuda, mps, cpu that is there)")
    args = parser.parse_args()

    default = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = resolve_device(args.device or default, True)
    compute_policy(device)
    output_dir = claim_writable_folder(args.output_dir, "--output_dir")
    plan = planned(args.inputs, output_dir)
    options = {"device": device, "cache_dir": args.cache_dir, "vae1_subfolder": args.vae1_subfolder}
    pipeline = PipelineWithVAEs.from_checkpoint(args.module, args.vae1_path, labels=("--vae1_path", "VAE2"), **options)
    if any(file.suffix not in LATENT_FILES for file in plan) and pipeline.uses_latents:
        pipeline.codec1  # noqa: B018 - a missing VAE ends the program before the work begins
    failed = 0
    with logging_redirect_tqdm():
        for file, result in tqdm(plan.items(), desc="translate", unit="file"):
            try:
                write_latents(result, translate_file(file, pipeline, args.latents == "raw"))
            except MISTAKES as error:
                failed += 1
                log.warning("left out: %s", one_line(error) if str(file) in str(error) else f"{file}: {one_line(error)}")
    print(f"{len(plan) - failed} of {len(plan)} translated into {output_dir}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
