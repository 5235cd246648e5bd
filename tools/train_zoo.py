"""Train, judge and ship the zoo: a module from each latent space into itself, of which any two make a pair.

    python tools/train_zoo.py --train_data_dir PHOTOS --eval_data_dir OTHER_PHOTOS

Each space's tiny autoencoder gives a decoder, and a module of the recipe in config/zoo.json learns its encoder from photos.
VAE1's decoder with VAE2's learned encoder behind it is a pair's module: five trainings make twenty pairs. What VAE1's decoder
moves the means of VAE2's latents by is measured on training photos and taken back.

One command does it all, and may be killed: run again, it goes on with the space and the step, or the pair, where it was.
--output_dir gets a file per space and the manifest zoo.json; RESULTS.md beside it is made of the manifest alone.
"""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from share_checkpoint import FIGURES, figures_in
from tqdm import tqdm
from zoo_results import carried_psnr, results_page

from dataloader import ImageDataset, eval_loader, find_images
from evaluation.ladder import Ladder, evaluate
from evaluation.metrics import Measures
from evaluation.summary import finite
from evaluation.verdict import verdict
from latents.families import family_of
from latents.pipeline import PipelineWithVAEs
from latents.spaces import Codec
from latents.vaes import load_vae_model
from runtime.cli import Parser, claim_writable_folder, integer, real, run
from runtime.device import PRECISIONS, autocast, get_dtype, keep_freed_memory, resolve_device, resolve_precision
from training.linear_start import RidgeRegression
from training.vae_start import start_from_vaes
from utils import UserError, atomic_file, file_digest, read_json, write_json
from vae_align import IMAGE, ZOO, ZOO_NAME, AlignModule, AlignPipeline, newest_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SPACES = ("sd15", "sdxl", "sd3", "flux1", "flux2")
RECIPE = ROOT / "config" / "zoo.json"
OWNER = "madebyollin"  # of the tiny autoencoders on the hub
CALIBRATION_PHOTOS = 128  # for the means of latents and the linear map
RUNGS = {True: ("vae2", "reencode", "linear", "aligned"), False: ("vae2", "aligned")}  # with latents as input, without
VERDICT = ("answer", "gain_db", "gain_error_db", "perceptual_gain", "perceptual_gain_error", "macs_fraction")


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", required=True, help="folder of photos to train on")
    parser.add_argument("--eval_data_dir", required=True, help="folder of other photos, on which every pair is judged")
    parser.add_argument("--vaes", help="folder that holds taesd, taesdxl, … (default: the hub)")
    parser.add_argument("--pairs", nargs="+", metavar="VAE1:VAE2", help="spaces by name, or image:VAE2 (default: all)")
    parser.add_argument(
        "--minutes", type=real(0, above=True), default=10, help="of training, each space; its cache comes on top"
    )
    parser.add_argument("--photos", type=integer(1), help="judge on that many only")
    parser.add_argument("--work_dir", default="zoo", help="where checkpoints and latent caches are kept")
    parser.add_argument("--output_dir", default=str(ZOO), help="where modules and manifest go")
    parser.add_argument("--results", default=str(ROOT / "RESULTS.md"), help="the page that is made of the manifest")
    parser.add_argument("--image_size", type=integer(32, 4096), default=256, help="to train and to judge at, px")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, mps or cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16", help="of VAEs and autocast")
    return parser


def wanted_pairs(typed: list[str] | None) -> list[tuple[str, str]]:
    """[(VAE1's space or "image", VAE2's)], by default every one of them. UserError for a name that is none."""
    if not typed:
        return [(one, into) for into in SPACES for one in (IMAGE, *SPACES) if one != into]
    pairs = [tuple(pair.split(":")) for pair in typed]
    for text, pair in zip(typed, pairs):
        if len(pair) != 2 or pair[0] == pair[1] or pair[1] not in SPACES or pair[0] not in (IMAGE, *SPACES):
            raise UserError(f"--pairs {text}: name two of {', '.join(SPACES)}, or image:VAE2, such as sd15:flux1")
    return pairs


class Zoo:
    """The zoo as far as it is made.

    Attributes:
        manifest: what zoo.json holds, see `vae_align.read_zoo`.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self._args, self._device, self._codecs = args, device, {}
        self._folder = claim_writable_folder(args.output_dir, "--output_dir")
        self._work = claim_writable_folder(args.work_dir, "--work_dir")
        self._precision = resolve_precision(args.precision, device, "precision" in args.typed_flags)
        self._dtype = get_dtype(self._precision)
        path = self._folder / ZOO_NAME
        self.manifest = read_json(path) if path.exists() else {"spaces": {}, "pairs": {}}
        self._judged = find_images(args.eval_data_dir, "default", False, "--eval_data_dir").paths[: args.photos]
        trained = find_images(args.train_data_dir, "default", False, "--train_data_dir").paths
        self._calibrating = trained[:: max(1, len(trained) // CALIBRATION_PHOTOS)][:CALIBRATION_PHOTOS]

    def place_of(self, space: str) -> str:
        """Folder or hub id of the space's tiny autoencoder."""
        name = family_of(space).tiny[0]
        return str(Path(self._args.vaes) / name) if self._args.vaes else f"{OWNER}/{name}"

    def codec(self, space: str) -> Codec:
        """The space's tiny autoencoder, opened once."""
        if space not in self._codecs:
            place = self.place_of(space)
            vae = load_vae_model(place, "", None, self._device, self._dtype, "--vaes")
            self._codecs[space] = Codec(vae, place, "", space)
        return self._codecs[space]

    def has_space(self, space: str) -> bool:
        """Whether the space's file is there, as the manifest describes it."""
        known = self.manifest["spaces"].get(space)
        file = self._folder / f"{space}.safetensors"
        return bool(known) and file.exists() and file_digest(file).hex() == known["sha256"]

    def has_pair(self, one: str, into: str) -> bool:
        """Whether the pair is judged with the files that are there."""
        pair = self.manifest["pairs"].get(one, {}).get(into)
        files = {name: self.manifest["spaces"].get(name, {}).get("sha256") for name in (one, into) if name != IMAGE}
        return bool(pair) and pair["of"] == files

    def train(self, space: str) -> None:
        """Learn the space's encoder, and write the file of its module into itself."""
        folder = self._work / space
        self._run_training(space, folder)
        checkpoint, content = newest_checkpoint(folder)
        codec = self.codec(space)
        image = AlignPipeline.from_checkpoint(checkpoint)
        module = AlignModule(replace(image.config, input_types=("latent",)))
        start_from_vaes(PipelineWithVAEs(module, codec, codec), str(checkpoint))
        file = self._folder / f"{space}.safetensors"
        pipeline = AlignPipeline(module, codec.space, codec.space).to(torch.float16)
        pipeline.save_pretrained(file, vaes=[f"{OWNER}/{family_of(space).tiny[0]}"] * 2)
        self.manifest["spaces"][space] = {
            "file": file.name, "sha256": file_digest(file).hex(), "steps": content["step"], "minutes": self._args.minutes,
        }  # fmt: skip
        self._write()

    def _run_training(self, space, folder):
        place = self.place_of(space)
        flags = {
            "load_config": RECIPE, "vae1_path": place, "vae2_path": place, "vae1_space": space, "vae2_space": space,
            "vae1_subfolder": "", "vae2_subfolder": "", "train_data_dir": self._args.train_data_dir, "save_dir": folder,
            "eval_data_dir": self._args.eval_data_dir, "log_dir": folder / "log", "device": self._device,
            "latent_cache_dir": self._work / "latent_cache", "minutes": self._args.minutes, "precision": self._precision,
            "image_size": self._args.image_size,
        }  # fmt: skip
        command = [sys.executable, str(ROOT / "train_align_with_args.py"), "--resume"]
        command += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        ended = subprocess.run(command).returncode
        if ended:
            raise UserError(f"the training of {space} ended with code {ended}; the same command goes on where it was")

    def judge(self, one: str, into: str) -> None:
        """Measure the pair's shift and its figures, and put both into the manifest."""
        pipeline, shift = self._pipeline(one, into)
        measures = Measures(("ssim", "st_lpips", "texture"), self._args.image_size, self._device)
        ladder = Ladder(pipeline, self._dtype, only=RUNGS[pipeline.uses_latents])
        results = finite(evaluate(ladder, self._loader(self._judged), measures, costs=True))
        entry = {"of": {name: self.manifest["spaces"][name]["sha256"] for name in (one, into) if name != IMAGE}}
        entry["shift"] = shift
        first = None if one == IMAGE else self._module(one)
        entry["embedded_psnr"] = round(carried_psnr(first, self._module(into), shift), 3)
        entry["figures"] = figures_in(
            results | {"image_size": self._args.image_size}, (*FIGURES, "st_lpips_alex", "latent_variance", "grid", "macs")
        )
        if pipeline.uses_latents:
            answer = verdict(results)
            entry["verdict"] = {name: answer[name] for name in VERDICT}
        self.manifest["pairs"].setdefault(one, {})[into] = entry
        self._write()

    def _pipeline(self, one, into) -> tuple[PipelineWithVAEs, list[float] | None]:
        """The pair with its VAEs, its shift taken back and its linear map remembered; the shift."""
        second, codec2 = self._module(into), self.codec(into)
        if one == IMAGE:
            return PipelineWithVAEs(AlignPipeline.joined(None, second).module, codec2, codec2), None
        first, codec1 = self._module(one), self.codec(one)
        pipeline = PipelineWithVAEs(AlignPipeline.joined(first, second).module, codec1, codec2)
        shift, linear = self._calibrate(pipeline)
        module = AlignPipeline.joined(first, second, shift).module
        module.remember_ridge(*linear)
        return PipelineWithVAEs(module, codec1, codec2), shift

    def _module(self, space) -> AlignPipeline:
        return AlignPipeline.from_checkpoint(self._folder / self.manifest["spaces"][space]["file"], self._device)

    @torch.no_grad()
    def _calibrate(self, pipeline: PipelineWithVAEs):
        """(what the mean of each raw channel of the pair's latents lacks of VAE2's; the closed-form linear map), on training
        photos."""
        module, fold = pipeline.module.eval(), pipeline.config.out_fold
        regression = RidgeRegression(module.ridge_weight.shape[1], pipeline.config.out_channels)
        lacking = []
        for batch in self._loader(self._calibrating):
            images = batch["pixel_values"].to(self._device)
            latents, target = pipeline.codec1.encode(images), pipeline.codec2.encode(images)
            with autocast(self._device, self._dtype):
                made = module(latents)
            lacking.append(torch.pixel_shuffle(target.float() - made.float(), fold).mean(dim=(2, 3)))
            regression.add(module.on_output_grid(latents), target)
        shift = torch.cat(lacking).mean(dim=0)
        return [round(value, 4) for value in shift.tolist()], regression.solve()

    def _loader(self, paths):
        return eval_loader(ImageDataset(paths, self._args.image_size), 4, 1)

    def _write(self) -> None:
        for name in ("spaces", "pairs"):
            self.manifest[name] = dict(sorted(self.manifest[name].items()))
        write_json(self._folder / ZOO_NAME, self.manifest)
        with atomic_file(Path(self._args.results)) as file:
            file.write(results_page(self.manifest).encode())


def main():
    args = build_parser().parse()
    pairs = wanted_pairs(args.pairs)
    device = resolve_device(args.device, "device" in args.typed_flags)
    keep_freed_memory(device)
    zoo = Zoo(args, device)
    spaces = [space for space in SPACES if any(space in pair for pair in pairs)]
    with tqdm(total=len(spaces) + len(pairs), unit="part") as progress:
        for space in spaces:
            progress.set_description(f"train {space}")
            if not zoo.has_space(space):
                zoo.train(space)
            progress.update()
        for one, into in pairs:
            progress.set_description(f"judge {one} to {into}")
            if not zoo.has_pair(one, into):
                zoo.judge(one, into)
            progress.update()
    print(results_page(zoo.manifest))
    print(f"{args.output_dir}: {len(spaces)} modules and {ZOO_NAME}; {args.results}")


if __name__ == "__main__":
    run(main)
