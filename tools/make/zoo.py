"""Train, judge and ship the zoo: one module from each latent space into itself. Any two of them make a pair.

    python tools/make/zoo.py --train_data_dir PHOTOS --eval_data_dir OTHER_PHOTOS

A space's tiny autoencoder gives the decoder, and the recipe config/zoo.json trains the encoder on photos. VAE1's decoder with
VAE2's trained encoder behind it is a pair's module: five trainings make twenty pairs. Each encoder is trained on the photos as
they are and as the other spaces' autoencoders reconstruct them, in turn.

One command does everything and may be killed: the next one continues with the space and step, or the pair, where it stopped.
--output_dir gets a file for each space, the manifest zoo.json, two charts and two sheets of pictures. RESULTS.md is made from
the manifest; without any photos the program writes only RESULTS.md and the charts.
"""

import argparse
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jinja2
import torch
from accelerate import Accelerator
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

from dataloader import ImageDataset, eval_loader, find_images
from evaluation import charts
from evaluation.figures import finite, to_8bit
from evaluation.ladder import Ladder, evaluate
from evaluation.metrics import Measures, PerceptualFeatures, psnr
from evaluation.pictures import comparison_picture
from evaluation.verdict import PERCEPTION_NOISE, PSNR_NOISE, verdict
from images.files import ImageFiles, digest_of, list_images
from runtime.cli import Parser, alone_in, claim_writable_folder, integer, real, run
from tools.publish import FIGURES, figures_in
from training.starts import fit_ridge, start_from_vaes
from utils import (
    PRECISIONS,
    UserError,
    atomic_file,
    compute_policy,
    file_digest,
    get_dtype,
    keep_freed_memory,
    read_json,
    resolve_device,
    resolve_precision,
    write_json,
)
from vae_align import IMAGE, ZOO, ZOO_NAME, AlignConfig, AlignPipeline, align_module, read_zoo
from vaes.codec import Codec, decode_picture
from vaes.families import family_of
from vaes.loading import load_vae_model
from vaes.pipeline import PipelineWithVAEs, checkpoints_in, read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TITLES = {"sd15": "SD1.5", "sdxl": "SDXL", "sd3": "SD3", "flux1": "FLUX.1", "flux2": "FLUX.2", IMAGE: "the image"}
SPACES = tuple(name for name in TITLES if name != IMAGE)
OWN_FLAGS = {  # by space: flags in place of the recipe's, and why
    "sd3": ({"decoder_loss_weight": 2.5}, "with the recipe's 1.6, pairs into it lay up to 0.08 dB behind re-encoding"),
    "flux2": ({"decoder_loss_weight": 2.5}, "as SD3, whose reconstruction is about as near to the original"),
}
OWNER = "madebyollin"  # of the tiny autoencoders on the hub
REGRESSED_PHOTOS = 64  # for the linear map: some ten thousand latents
VERDICT = ("answer", "gain_db", "gain_error_db", "perceptual_gain", "perceptual_gain_error", "macs_fraction")
WAYS = ("reencode", "aligned")  # the two rungs that the trials compare
HOPS, DRIFT_PHOTOS = 5, 8  # round trips, and the photos that make them
EMBEDDED = list_images(ROOT / "assets" / "photos" / "eval")  # photos that train nothing
SHEETS = {"photos": "photos.jpg", "transfer": "unseen.jpg"}  # trial: its pictures


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", default="", help="folder of photos to train on")
    parser.add_argument("--eval_data_dir", default="", help="folder of other photos, on which every pair is judged")
    parser.add_argument("--vaes", help="folder that holds taesd, taesdxl, … (default: the hub)")
    pairs_help = "spaces by name, or image:VAE2 (default: all); only these spaces are trained, each for the others"
    pairs = [f"{one}:{into}" for into in SPACES for one in (IMAGE, *SPACES) if one != into]
    parser.add_argument("--pairs", nargs="+", metavar="VAE1:VAE2", choices=pairs, default=pairs, help=pairs_help)
    parser.add_argument("--minutes", type=real(0, above=True), default=10, help="of training per space, without its cache")
    parser.add_argument("--photos", type=integer(1), help="judge on the first N photos only")
    parser.add_argument("--work_dir", default="zoo", help="where checkpoints and latent caches are kept")
    parser.add_argument("--output_dir", default=str(ZOO), help="where modules and manifest go")
    parser.add_argument("--results", default=str(ROOT / "RESULTS.md"), help="the page that is made from the manifest")
    parser.add_argument("--image_size", type=integer(32, 4096), default=256, help="to train and to judge at, px")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, mps or cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16", help="of VAEs and autocast")
    return parser


class Zoo:
    """The zoo in --output_dir, which may be unfinished.

    Attributes:
        manifest: the content of zoo.json, see `vae_align.read_zoo`.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self._args, self._device, self._codecs = args, device, {}
        self._folder = Path(args.output_dir)
        self._work = claim_writable_folder(args.work_dir, "--work_dir")
        self._precision = resolve_precision(args.precision, device, "precision" in args.typed_flags)
        self._dtype = get_dtype(self._precision)
        path = self._folder / ZOO_NAME
        self.manifest = read_json(path) if path.exists() else {"spaces": {}, "pairs": {}}
        self._judged = find_images(args.eval_data_dir, "default", False, "--eval_data_dir").paths[: args.photos]
        contents = map(ImageFiles(self._judged).content, range(len(self._judged)))
        self._on = digest_of([f"{args.image_size} px".encode(), *contents]).hex()
        trained = find_images(args.train_data_dir, "default", False, "--train_data_dir").paths
        self._regressed = _spread(trained, REGRESSED_PHOTOS)
        self._features = PerceptualFeatures("vgg", device, self._dtype)

    def has_space(self, space: str) -> bool:
        """Whether the space's file is there, as the manifest describes it."""
        known = self.manifest["spaces"].get(space)
        file = self._folder / f"{space}.safetensors"
        return bool(known) and file.exists() and file_digest(file).hex() == known["sha256"]

    def has_pair(self, one: str, into: str) -> bool:
        """Whether the pair has been judged with the present files, on the present photos as far as its entry names them."""
        entry = self.manifest["pairs"].get(one, {}).get(into, {})
        return entry.get("of") == self._digests_of(one, into) and entry.get("on", self._on) == self._on

    def train(self, space: str, others: list[str]) -> None:
        """Train the space's encoder to stand behind the others' decoders, and write the file of its module into itself."""
        folder, place, codec = self._work / space, self._place_of(space), self._codec(space)
        own_flags, why = OWN_FLAGS.get(space, ({}, ""))
        flags = {
            "load_config": ROOT / "config" / "zoo.json", "vae1_path": place, "vae2_path": place, "vae1_space": space,
            "vae2_space": space, "vae1_subfolder": "", "vae2_subfolder": "", "train_data_dir": self._args.train_data_dir,
            "eval_data_dir": self._args.eval_data_dir, "save_dir": folder, "log_dir": folder / "log", "device": self._device,
            "latent_cache_dir": self._work / "latent_cache", "minutes": self._args.minutes, "precision": self._precision,
            "image_size": self._args.image_size, **own_flags,
        }  # fmt: skip
        command = [sys.executable, str(ROOT / "train_align_with_args.py"), "--resume"]
        command += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        ended = subprocess.run([*command, "--seen_through", *map(self._place_of, others)]).returncode
        if ended:
            raise UserError(f"the training of {space} ended with code {ended}; start the same command again to continue it")
        content = read_checkpoint(checkpoint := checkpoints_in(folder)[0])
        config = AlignConfig.from_dict(content["align_config"])
        module = align_module(replace(config, input_types=("latent",)))
        start_from_vaes(PipelineWithVAEs(module, codec, codec), str(checkpoint))
        file = self._folder / f"{space}.safetensors"
        pipeline = AlignPipeline(module, codec.space, codec.space).to(torch.float16)
        pipeline.save_pretrained(file, vaes=[f"{OWNER}/{family_of(space).tiny[0]}"] * 2)
        self.manifest["spaces"][space] = {
            "file": file.name, "sha256": file_digest(file).hex(), "steps": content["step"],
            "minutes": content["config"]["minutes"], "seen_through": others, "own_flags": own_flags, "why": why,
            "aliases": family_of(space).aliases,
        }  # fmt: skip
        self._write()

    def judge(self, one: str, into: str) -> None:
        """Put the pair's figures into the manifest. A pair between two spaces also gets its verdict, its drift over many hops,
        and its figures on unseen photos and strange inputs."""
        pipeline = self._pipeline(one, into)
        if one != IMAGE:
            fit_ridge(pipeline, self._loader(self._regressed), Accelerator(cpu=self._device.type == "cpu"))
        ladder = Ladder(pipeline, self._dtype, only=("vae2", "aligned") if one == IMAGE else ("vae2", "linear", *WAYS))
        measures = Measures(("ssim", "st_lpips", "texture"), self._args.image_size, self._device, self._dtype)
        results = evaluate(ladder, self._loader(self._judged), measures)
        for name, cost in ladder.costs(self._args.image_size).items():
            results["ladder"][name] |= cost
        results = finite(results | {"image_size": self._args.image_size})
        entry = {
            "of": self._digests_of(one, into),
            "on": self._on,
            "embedded_psnr": round(embedded_psnr(None if one == IMAGE else self._module(one), self._module(into)), 3),
            "figures": figures_in(results, (*FIGURES, "st_lpips_alex", "latent_variance", "grid", "macs")),
        }
        if one != IMAGE:
            answer = verdict(results)
            entry["verdict"] = {name: answer[name] for name in VERDICT}
            photos = pixels_of(_spread(self._judged, DRIFT_PHOTOS), self._args.image_size).to(self._device)
            back = Ladder(self._pipeline(into, one), self._dtype, only=WAYS)
            entry["drift"] = drift(ladder, back, photos, self._features)
            entry |= {trial: transfer(ladder, self._inputs(trial, pipeline.codec1), self._features) for trial in SHEETS}
        self.manifest["pairs"].setdefault(one, {})[into] = entry
        self._write()

    def draw(self) -> None:
        """Write a sheet of the best and the worst photo into each space, and a sheet of each strange input at its worst."""
        tried = [each for each in pairs_in(self.manifest) if each[0] != IMAGE]
        rows = {trial: [] for trial in SHEETS}
        for into in SPACES:
            found = sorted(gains_in([each for each in tried if each[1] == into], "photos", "st_lpips_vgg"))
            chosen = zip(("best", "worst"), found[-1:] + found[:1])
            rows["photos"] += [self._row(word, "photos", *gain) for word, gain in chosen]
        for name in tried[0][2]["transfer"] if tried else ():
            found = sorted(gain for gain in gains_in(tried, "transfer", "psnr") if gain[-1] == name)
            rows["transfer"] += [self._row(name, "transfer", *gain) for gain in found[:1]]
        for trial, sheet in SHEETS.items():
            if rows[trial]:
                with atomic_file(self._folder / sheet) as file:
                    comparison_picture(rows[trial], 224).save(file, "JPEG", quality=85)

    def _row(self, word, trial, gain, one, into, name) -> list[tuple[str, torch.Tensor]]:
        """The middle of the image and of both ways' pictures, with captions."""
        ladder = Ladder(self._pipeline(one, into), self._dtype, only=WAYS)
        pictures = carried(ladder, self._inputs(trial, ladder.pipeline.codec1)[name])
        captions = (f"{word}: {one} to {into}", "decode + re-encode", "the module")
        return [(text, center_crop(picture[0], min(224, *picture.shape[2:]))) for text, picture in zip(captions, pictures)]

    def _inputs(self, trial: str, codec: Codec) -> dict[str, torch.Tensor]:
        photos = pixels_of(EMBEDDED, self._args.image_size).to(self._device)
        if trial == "photos":
            return {str(number): photo[None] for number, photo in enumerate(photos)}
        return strange_inputs(photos, codec.encode(photos))

    def _pipeline(self, one: str, into: str) -> PipelineWithVAEs:
        second, codec2 = self._module(into), self._codec(into)
        first, codec1 = (None, codec2) if one == IMAGE else (self._module(one), self._codec(one))
        return PipelineWithVAEs(AlignPipeline.compose(first, second).module, codec1, codec2)

    def _module(self, space: str) -> AlignPipeline:
        return AlignPipeline.from_checkpoint(self._folder / self.manifest["spaces"][space]["file"], self._device)

    def _place_of(self, space: str) -> str:
        """Folder or hub id of the space's tiny autoencoder."""
        name = family_of(space).tiny[0]
        return str(Path(self._args.vaes) / name) if self._args.vaes else f"{OWNER}/{name}"

    def _codec(self, space: str) -> Codec:
        """The space's tiny autoencoder, opened once."""
        if space not in self._codecs:
            place = self._place_of(space)
            vae = load_vae_model(place, "", None, self._device, self._dtype, "--vaes")
            self._codecs[space] = Codec(vae, place, "", space)
        return self._codecs[space]

    def _loader(self, paths):
        return eval_loader(ImageDataset(paths, self._args.image_size), 4, 1, device=self._device)

    def _digests_of(self, *names) -> dict[str, str | None]:
        return {name: self.manifest["spaces"].get(name, {}).get("sha256") for name in names if name != IMAGE}

    def _write(self) -> None:
        self.manifest = {name: dict(sorted(entries.items())) for name, entries in self.manifest.items()}
        write_json(self._folder / ZOO_NAME, self.manifest)
        write_page(self.manifest, Path(self._args.results), self._folder)


def _spread(paths: list[str], count: int) -> list[str]:
    """At most `count` of the paths, at even distances."""
    return paths[:: max(1, len(paths) // count)][:count]


# ----------------------------------------------------------------------------------------------------------------------
# Trials: round trips, unseen photos and strange inputs, each against decode + re-encode


def figures_between(picture: torch.Tensor, reference: torch.Tensor, features: PerceptualFeatures) -> dict[str, float]:
    """Mean PSNR in dB and mean ST-LPIPS (VGG) between two batches of pictures (B, 3, H, W) in [-1, 1]."""
    found = {"psnr": psnr(to_8bit(picture), to_8bit(reference)), "st_lpips_vgg": features.distance(picture, reference)}
    return {metric: round(values.double().mean().item(), 4) for metric, values in found.items()}


@torch.inference_mode()
def drift(there: Ladder, back: Ladder, photos: torch.Tensor, features: PerceptualFeatures) -> dict:
    """Carry photos (B, 3, H, W) in [-1, 1] from VAE1's latents to VAE2's and back, `HOPS` times.

    Returns {way: {metric: [mean of VAE1's own reconstruction, after 1 hop, after 2, …]}}. `back` is the opposite pair's ladder.
    """
    codec, found = there.pipeline.codec1, {}
    for way in WAYS:
        latents, after = codec.encode(photos), []
        for hop in range(HOPS + 1):
            if hop:
                latents = back.rungs[way](there.rungs[way](latents, photos), photos)
            after.append(figures_between(codec.decode(latents), photos, features))
        found[way] = {metric: [each[metric] for each in after] for metric in after[0]}
    return found


@torch.inference_mode()
def carried(ladder: Ladder, given: torch.Tensor) -> list[torch.Tensor]:
    """[the image, VAE2's picture of the re-encoded latents, VAE2's picture of the module's latents], all in [-1, 1].

    `given` is an image (1, 3, H, W) in [-1, 1], or VAE1's scaled latents: VAE1's picture of them is then the image.
    """
    codec1, codec2 = ladder.pipeline.codec1, ladder.pipeline.codec2
    latents = given if given.shape[1] == codec1.channels else codec1.encode(given)
    image = decode_picture(latents, codec1) if latents is given else given
    return [image, *(decode_picture(ladder.rungs[way](latents, image), codec2) for way in WAYS)]


@torch.inference_mode()
def transfer(ladder: Ladder, inputs: dict[str, torch.Tensor], features: PerceptualFeatures) -> dict:
    """{name: an input of `carried`} -> {name: {way: {metric: figure against the image}}}."""
    found = {}
    for name, given in inputs.items():
        image, *pictures = carried(ladder, given)
        found[name] = {way: finite(figures_between(each, image, features)) for way, each in zip(WAYS, pictures)}
    return found


def strange_inputs(photos: torch.Tensor, latents: torch.Tensor) -> dict[str, torch.Tensor]:
    """{name: image (1, 3, H, W) in [-1, 1], or scaled latents of noise}: the pictures in unseen/, noise and two mosaics.

    The noise has the mean and standard deviation of each channel of `latents` (B, C, h, w); the mosaics show `photos`
    (B, 3, S, S).
    """
    drawn = sorted(map(str, Path(__file__).parent.glob("unseen/*.png")))
    inputs = {Path(path).stem: pixels[None].to(photos) for path, pixels in zip(drawn, pixels_of(drawn, 256))}
    noise = torch.randn(1, *latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)
    over = {"dim": (0, 2, 3), "keepdim": True}
    inputs["noise"] = noise * latents.std(**over) + latents.mean(**over)
    for rows, columns in ((3, 2), (4, 4)):
        picture = mosaic(photos, rows, columns)
        inputs[f"{picture.shape[3]}x{picture.shape[2]} px"] = picture
    return inputs


def mosaic(photos: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Photos (B, 3, h, w) side by side, repeated ones mirrored every second time: (1, 3, rows · h, columns · w)."""
    count = rows * columns
    tiles = torch.cat([photos, photos.flip(-1)]).repeat(-(-count // (2 * len(photos))), 1, 1, 1)[:count]
    return tiles.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None]


def pixels_of(paths: list[str], size: int) -> torch.Tensor:
    """The centre squares of photos: (B, 3, size, size) in [-1, 1]."""
    return torch.cat([batch["pixel_values"] for batch in eval_loader(ImageDataset(paths, size), 4, 0)])


@torch.no_grad()
def embedded_psnr(first: AlignPipeline | None, second: AlignPipeline) -> float:
    """Mean PSNR in dB of two embedded photos, carried from `first`'s latents into `second`'s and decoded by `second`.

    Both are modules of a space into itself; with `first` None the photos go into `second`'s latents at once. Computes in
    float32 and needs no VAE.
    """
    photos = pixels_of(EMBEDDED[:2], 128)  # few and small, so that any machine computes their PSNR in a moment
    latents = AlignPipeline.compose(None, first or second).translate(image=photos)
    if first is not None:
        latents = AlignPipeline.compose(first, second).translate(latents)
    squares = (second.module.picture(latents) - photos).square().mean(dim=(1, 2, 3))
    return (20 * torch.log10(2 / squares.sqrt())).mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# The page

BROKEN_DB = 0.5
CHARTS = (  # file, metric, title, label of the axis
    ("drift_psnr.svg", "psnr", "PSNR after hops", "PSNR dB"),
    ("drift_st_lpips.svg", "st_lpips_vgg", "ST-LPIPS after hops", "ST-LPIPS"),
)


def pairs_in(manifest: dict) -> list[tuple[str, str, dict]]:
    """[(VAE1's space, VAE2's, the manifest's entry of the pair)], in the order of `TITLES`."""
    pairs = manifest["pairs"]
    return [(one, into, pairs[one][into]) for one in TITLES for into in TITLES if into in pairs.get(one, {})]


def gains_in(pairs: list[tuple[str, str, dict]], trial: str, metric: str) -> list[tuple[float, str, str, str]]:
    """[(gain over decode + re-encode, VAE1's space, VAE2's, input)] of each pair on each input of the trial "photos" or
    "transfer". A figure that is not finite gives no gain."""
    sign, found = (1 if metric == "psnr" else -1), []
    for one, into, pair in pairs:
        for name, ways in pair[trial].items():
            theirs, ours = (ways[way][metric] for way in WAYS)
            if ours is not None and theirs is not None:
                found.append((sign * (ours - theirs), one, into, name))
    return found


def results_page(manifest: dict) -> str:
    """The page of a manifest, see `vae_align.read_zoo`: Markdown. Missing figures leave their cells empty."""
    pairs = [each for each in pairs_in(manifest) if each[0] != IMAGE]
    images = [each for each in pairs_in(manifest) if each[0] == IMAGE]
    better = [TITLES[into] for _, into, pair in images if _is_better(pair["figures"]["aligned"], pair["figures"]["vae2"])]
    text = (Path(__file__).parent / "results.md.jinja").read_text("utf-8")
    return jinja2.Template(text, trim_blocks=True, keep_trailing_newline=True).render(
        first=next(iter(pairs or images), None),
        trained=manifest["spaces"],
        pairs=pairs,
        spaces=[name for name in SPACES if any(name in each[:2] for each in pairs)],
        images=images,
        better=better,
        rest=[TITLES[into] for _, into, _ in images if TITLES[into] not in better],
        losses=[each for each in sorted(gains_in(pairs, "transfer", "psnr")) if each[0] < -BROKEN_DB],
        worse_by=_worse_by, titles=TITLES, charts=CHARTS, sheets=SHEETS, broken_db=BROKEN_DB, hops=(1, 2, HOPS),
        drift_photos=DRIFT_PHOTOS,
    )  # fmt: skip


def _worse_by(found: dict) -> str:
    """In which figures a pair's verdict finds it worse than decode + re-encode, beyond the interval."""
    gains = [(found["gain_db"], found["gain_error_db"], "{:.2f} ± {:.2f} dB PSNR")]
    gains += [(found["perceptual_gain"], found["perceptual_gain_error"], "{:.3f} ± {:.3f} ST-LPIPS")]
    worse = [form.format(-mean, error or 0) for mean, error, form in gains if mean < -(error or 0)]
    return " and ".join(worse) or "nothing"


def _is_better(ours: dict, theirs: dict) -> bool:
    """Whether figures are better than others in distortion or perception and worse in neither."""
    gains = [(ours["psnr"] - theirs["psnr"]) / PSNR_NOISE]
    gains.append((theirs["st_lpips_vgg"] - ours["st_lpips_vgg"]) / PERCEPTION_NOISE)
    return max(gains) >= 1 and min(gains) > -1


def write_page(manifest: dict, page: Path, folder: Path) -> None:
    """Write the page, and into `folder` its charts: figures over hops, the mean over all pairs between two spaces."""
    written = {page: results_page(manifest)}
    drifts = [pair["drift"] for _, _, pair in pairs_in(manifest) if "drift" in pair]
    for name, metric, text, axis in CHARTS if drifts else ():
        series = []
        for way, label in (("aligned", "modules"), ("reencode", "decode + re-encode")):
            means = [statistics.fmean(hops) for hops in zip(*(each[way][metric] for each in drifts))]
            series.append((label, list(enumerate(means)), f"c-{way}"))
        written[folder / name] = charts.as_file(charts.lines(text, series, "hops there and back", axis))
    for path, content in written.items():
        with atomic_file(path) as file:
            file.write(content.encode())


def main():
    args = build_parser().parse()
    if not args.train_data_dir and not args.eval_data_dir:
        write_page(read_zoo(args.output_dir), Path(args.results), Path(args.output_dir))
        return
    pairs = [tuple(pair.split(":")) for pair in args.pairs]
    device = resolve_device(args.device, "device" in args.typed_flags)
    compute_policy(device)
    keep_freed_memory(device)
    spaces = [space for space in SPACES if any(space in pair for pair in pairs)]
    alone = alone_in(claim_writable_folder(args.output_dir, "--output_dir"), "--output_dir", "zoo")
    with alone, tqdm(total=len(spaces) + len(pairs), unit="part") as progress:
        zoo = Zoo(args, device)
        for space in spaces:
            progress.set_description(f"train {space}")
            if not zoo.has_space(space):
                zoo.train(space, [other for other in (spaces if len(spaces) > 1 else SPACES) if other != space])
            progress.update()
        for one, into in pairs:
            progress.set_description(f"judge {one} to {into}")
            if not zoo.has_pair(one, into):
                zoo.judge(one, into)
            progress.update()
        zoo.draw()
    print(results_page(zoo.manifest))
    print(f"{args.output_dir}: {len(spaces)} modules, {ZOO_NAME} and two sheets of pictures; {args.results}")


if __name__ == "__main__":
    run(main)
