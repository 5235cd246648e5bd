"""Train, judge and ship the zoo: a module from each latent space into itself, of which any two make a pair.

    python tools/train_zoo.py --train_data_dir PHOTOS --eval_data_dir OTHER_PHOTOS

Each space's tiny autoencoder gives a decoder, and a module of the recipe in config/zoo.json learns its encoder from photos.
VAE1's decoder with VAE2's learned encoder behind it is a pair's module: five trainings make twenty pairs. An encoder is shown
its photos as they are and as the other spaces' autoencoders decode them, in turn.

One command does it all, and may be killed: run again, it goes on with the space and the step, or the pair, where it was.
--output_dir gets a file per space, the manifest zoo.json and two sheets of pictures; RESULTS.md is made of the manifest.
"""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import zoo_trials
from share_checkpoint import FIGURES, figures_in
from tqdm import tqdm
from training.linear_start import RidgeRegression
from training.vae_start import start_from_vaes
from zoo_results import (
    DRIFT_PHOTOS,
    PHOTOS_SHEET,
    STRANGE_SHEET,
    carried_psnr,
    embedded_photos,
    gains_in,
    pairs_in,
    results_page,
    write_page,
)

from dataloader import ImageDataset, eval_loader, find_images
from evaluation.figures import finite
from evaluation.ladder import Ladder, Rung, evaluate
from evaluation.metrics import Measures, PerceptualFeatures
from evaluation.verdict import verdict
from runtime.cli import Parser, claim_writable_folder, integer, real, run
from utils import (
    PRECISIONS,
    UserError,
    atomic_file,
    file_digest,
    get_dtype,
    keep_freed_memory,
    read_json,
    resolve_device,
    resolve_precision,
    write_json,
)
from vae_align import IMAGE, ZOO, ZOO_NAME, AlignConfig, AlignPipeline, align_module
from vaes.codec import Codec
from vaes.families import family_of
from vaes.loading import load_vae_model
from vaes.pipeline import PipelineWithVAEs, newest_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SPACES = ("sd15", "sdxl", "sd3", "flux1", "flux2")
RECIPE = ROOT / "config" / "zoo.json"
OWN_FLAGS = {"sd3": {"decoder_loss_weight": 2.5}, "flux2": {"decoder_loss_weight": 2.5}}  # in place of the recipe's, by space
WHY = {  # it has flags of its own
    "sd3": "with the recipe's 1.6, pairs into it lay up to 0.08 dB behind re-encoding",
    "flux2": "as SD3, whose reconstruction is about as near to the original",
}
OWNER = "madebyollin"  # of the tiny autoencoders on the hub
REGRESSED_PHOTOS = 64  # for the linear map: some ten thousand latents
RUNGS = {True: ("vae2", "reencode", "linear", "aligned"), False: ("vae2", "aligned")}  # with latents as input, without
VERDICT = ("answer", "gain_db", "gain_error_db", "perceptual_gain", "perceptual_gain_error", "macs_fraction")


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", required=True, help="folder of photos to train on")
    parser.add_argument("--eval_data_dir", required=True, help="folder of other photos, on which every pair is judged")
    parser.add_argument("--vaes", help="folder that holds taesd, taesdxl, … (default: the hub)")
    parser.add_argument(
        "--pairs",
        nargs="+",
        metavar="VAE1:VAE2",
        help="spaces by name, or image:VAE2 (default: all); the spaces among them are learned, each for the others",
    )
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


def _from_images(one: str, ladder: Ladder) -> list[Rung]:
    """The rungs of a pair but VAE2's own, each with VAE1's space in its name, for a ladder of VAE2 that has another VAE1."""
    codec1 = ladder.pipeline.codec1

    def with_own_latents(rung):
        return lambda latents, images: rung(codec1.encode(images), images)

    rungs = [rung for rung in ladder.rungs.values() if rung.kind != "vae2"]
    return [replace(rung, name=f"{one} {rung.name}", translate=with_own_latents(rung)) for rung in rungs]


def _results_of(one: str, judged: dict) -> dict:
    """What `evaluate` would have returned of the pair alone."""
    results = dict(judged)
    for part in ("ladder", "per_image", "summary", "intervals"):
        of_pair = {name.removeprefix(f"{one} "): value for name, value in judged[part].items() if name.startswith(f"{one} ")}
        results[part] = {"vae2": dict(judged[part]["vae2"])} | of_pair
    return results


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
        self._regressed = trained[:: max(1, len(trained) // REGRESSED_PHOTOS)][:REGRESSED_PHOTOS]
        self._features = PerceptualFeatures("vgg", device, self._dtype)

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
        return bool(pair) and pair["of"] == self._digests_of(one, into)

    def has_trial(self, one: str, into: str) -> bool:
        """Whether the pair, judged with the files that are there, is tried out too."""
        return self.has_pair(one, into) and "drift" in self.manifest["pairs"][one][into]

    def train(self, space: str, others: list[str]) -> None:
        """Learn the space's encoder, to stand behind the others' decoders, and write the file of its module into itself."""
        folder = self._work / space
        self._run_training(space, others, folder)
        checkpoint, content = newest_checkpoint(folder)
        codec = self.codec(space)
        config = replace(AlignConfig.from_dict(content["align_config"]), input_types=("latent",))
        module = align_module(config)
        start_from_vaes(PipelineWithVAEs(module, codec, codec), str(checkpoint))
        file = self._folder / f"{space}.safetensors"
        pipeline = AlignPipeline(module, codec.space, codec.space).to(torch.float16)
        pipeline.save_pretrained(file, vaes=[f"{OWNER}/{family_of(space).tiny[0]}"] * 2)
        self.manifest["spaces"][space] = {
            "file": file.name, "sha256": file_digest(file).hex(), "steps": content["step"],
            "minutes": content["config"]["minutes"], "seen_through": others, "own_flags": OWN_FLAGS.get(space, {}),
            "why": WHY.get(space, ""),
        }  # fmt: skip
        self._write()

    def _run_training(self, space, others, folder):
        place = self.place_of(space)
        flags = {
            "load_config": RECIPE, "vae1_path": place, "vae2_path": place, "vae1_space": space, "vae2_space": space,
            "vae1_subfolder": "", "vae2_subfolder": "", "train_data_dir": self._args.train_data_dir, "save_dir": folder,
            "eval_data_dir": self._args.eval_data_dir, "log_dir": folder / "log", "device": self._device,
            "latent_cache_dir": self._work / "latent_cache", "minutes": self._args.minutes, "precision": self._precision,
            "image_size": self._args.image_size, **OWN_FLAGS.get(space, {}),
        }  # fmt: skip
        command = [sys.executable, str(ROOT / "train_align_with_args.py"), "--resume"]
        command += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        command += ["--seen_through", *map(self.place_of, others)]
        ended = subprocess.run(command).returncode
        if ended:
            raise UserError(f"the training of {space} ended with code {ended}; the same command goes on where it was")

    def judge(self, into: str, ones: list[str]) -> None:
        """Put the figures of the pairs from these into one space into the manifest. They are judged at once, since all are held
        against the same photos and the same VAE2."""
        second, codec2 = self._module(into), self.codec(into)
        ladders = {one: Ladder(self._pipeline(one, into), self._dtype, only=RUNGS[one != IMAGE]) for one in ones}
        image = PipelineWithVAEs(AlignPipeline.compose(None, second).module, codec2, codec2)
        more = [rung for one, ladder in ladders.items() for rung in _from_images(one, ladder)]
        measures = Measures(("ssim", "st_lpips", "texture"), self._args.image_size, self._device, self._dtype)
        judged = evaluate(Ladder(image, self._dtype, only=("vae2",), more=more), self._loader(self._judged), measures)
        for one, ladder in ladders.items():
            results = _results_of(one, judged)
            for name, cost in ladder.costs(self._args.image_size).items():
                results["ladder"][name] |= cost
            results = finite(results | {"image_size": self._args.image_size})
            entry = {
                "of": self._digests_of(one, into),
                "embedded_psnr": round(carried_psnr(None if one == IMAGE else self._module(one), second), 3),
                "figures": figures_in(results, (*FIGURES, "st_lpips_alex", "latent_variance", "grid", "macs")),
            }
            if one != IMAGE:
                answer = verdict(results)
                entry["verdict"] = {name: answer[name] for name in VERDICT}
            self.manifest["pairs"].setdefault(one, {})[into] = entry
        self._write()

    def try_out(self, one: str, into: str) -> None:
        """Put into the manifest what many hops, unseen photos and strange latents do to the pair."""
        there, back = self._ladder(one, into), self._ladder(into, one)
        photos = self._pixels(self._judged[:: max(1, len(self._judged) // DRIFT_PHOTOS)][:DRIFT_PHOTOS])
        self.manifest["pairs"][one][into] |= {
            "drift": zoo_trials.drift(there, back, photos, self._features),
            "photos": zoo_trials.transfer(there, self._embedded(there.pipeline.codec1), self._features),
            "transfer": zoo_trials.transfer(there, self._strange(there.pipeline.codec1), self._features),
        }
        self._write()

    def draw(self) -> None:
        """Write a sheet of the best and the worst photos into each space, and one of what each strange input is at its worst;
        nothing before there is a trial."""
        tried = [each for each in pairs_in(self.manifest) if "transfer" in each[2]]
        photos, strange = [], []
        for group in ([each for each in tried if each[1] == into] for into in SPACES):
            found = sorted(gains_in(group, "photos", "st_lpips_vgg"))
            chosen = zip(("best", "worst"), found[-1:] + found[:1])
            photos += [self._shown(word, *each, self._embedded) for word, each in chosen]
        for name in tried[0][2]["transfer"] if tried else ():
            worst = min(each for each in gains_in(tried, "transfer", "psnr") if each[-1] == name)
            strange.append(self._shown(name, *worst, self._strange))
        for name, rows in ((PHOTOS_SHEET, photos), (STRANGE_SHEET, strange)):
            if rows:
                with atomic_file(self._folder / name) as file:
                    zoo_trials.sheet_of(rows).save(file, "JPEG", quality=85)
        self._write()

    def _shown(self, word: str, gain: float, one: str, into: str, name: str, inputs) -> tuple[str, list[torch.Tensor]]:
        ladder = self._ladder(one, into)
        return f"{word}: {one} to {into}", zoo_trials.carried(ladder, inputs(ladder.pipeline.codec1)[name])

    def _embedded(self, codec: Codec) -> dict[str, torch.Tensor]:
        photos = embedded_photos(None, self._args.image_size).to(self._device)
        return {str(number): photo[None] for number, photo in enumerate(photos)}

    def _strange(self, codec: Codec) -> dict[str, torch.Tensor]:
        photos = torch.cat(list(self._embedded(codec).values()))
        return zoo_trials.strange_inputs(photos, codec.encode(photos))

    def _ladder(self, one, into) -> Ladder:
        module = AlignPipeline.compose(self._module(one), self._module(into)).module
        return Ladder(PipelineWithVAEs(module, self.codec(one), self.codec(into)), self._dtype, only=zoo_trials.WAYS)

    def _pipeline(self, one, into) -> PipelineWithVAEs:
        """The pair with its VAEs, and its linear map remembered."""
        second, codec2 = self._module(into), self.codec(into)
        if one == IMAGE:
            return PipelineWithVAEs(AlignPipeline.compose(None, second).module, codec2, codec2)
        codec1 = self.codec(one)
        module = AlignPipeline.compose(self._module(one), second).module
        pipeline = PipelineWithVAEs(module, codec1, codec2)
        module.remember_ridge(*self._linear_map(pipeline))
        return pipeline

    def _module(self, space) -> AlignPipeline:
        return AlignPipeline.from_checkpoint(self._folder / self.manifest["spaces"][space]["file"], self._device)

    def _linear_map(self, pipeline: PipelineWithVAEs):
        """The closed-form linear map between the pair's latents of training photos."""
        module = pipeline.module
        regression = RidgeRegression(module.ridge_weight.shape[1], pipeline.config.out_channels)
        for batch in self._loader(self._regressed):
            images = batch["pixel_values"].to(self._device)
            latents, target = pipeline.codec1.encode(images), pipeline.codec2.encode(images)
            regression.add(module.on_output_grid(latents), target)
        return regression.solve()

    def _pixels(self, paths) -> torch.Tensor:
        return torch.cat([batch["pixel_values"] for batch in self._loader(paths)]).to(self._device)

    def _loader(self, paths):
        return eval_loader(ImageDataset(paths, self._args.image_size), 4, 1)

    def _digests_of(self, *names) -> dict[str, str | None]:
        return {name: self.manifest["spaces"].get(name, {}).get("sha256") for name in names if name != IMAGE}

    def _write(self) -> None:
        for name in ("spaces", "pairs"):
            self.manifest[name] = dict(sorted(self.manifest[name].items()))
        write_json(self._folder / ZOO_NAME, self.manifest)
        write_page(self.manifest, Path(self._args.results), self._folder)


def main():
    args = build_parser().parse()
    pairs = wanted_pairs(args.pairs)
    device = resolve_device(args.device, "device" in args.typed_flags)
    keep_freed_memory(device)
    zoo = Zoo(args, device)
    spaces = [space for space in SPACES if any(space in pair for pair in pairs)]
    between = [pair for pair in pairs if pair[0] != IMAGE]
    with tqdm(total=len(spaces) + len(pairs) + len(between), unit="part") as progress:
        for space in spaces:
            progress.set_description(f"train {space}")
            if not zoo.has_space(space):
                zoo.train(space, [other for other in (spaces if len(spaces) > 1 else SPACES) if other != space])
            progress.update()
        for into in spaces:
            wanted = [one for one, other in pairs if other == into]
            if missing := [one for one in wanted if not zoo.has_pair(one, into)]:
                progress.set_description(f"judge {', '.join(missing)} to {into}")
                zoo.judge(into, missing)
            progress.update(len(wanted))
        for one, into in between:
            progress.set_description(f"try {one} to {into}")
            if not zoo.has_trial(one, into):
                zoo.try_out(one, into)
            progress.update()
        zoo.draw()
    print(results_page(zoo.manifest))
    print(f"{args.output_dir}: {len(spaces)} modules, {ZOO_NAME} and two sheets of pictures; {args.results}")


if __name__ == "__main__":
    run(main)
