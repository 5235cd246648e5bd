"""Share a module: as one .safetensors file, or on the hub with vae_align.py, a model card, figures and a picture.

    python tools/publish.py CHECKPOINT sd15_to_flux1.safetensors --vae1_path madebyollin/taesd --vae2_path madebyollin/taef1
    python tools/publish.py CHECKPOINT --repo owner/name --metrics eval_results/metrics.json --dry_run
    HF_TOKEN=… python tools/publish.py CHECKPOINT --repo owner/name --metrics eval_results/metrics.json

The weights, both latent spaces and the figures are written; flags, folders of this machine and the state of the training are
not. So no run can resume from the result, but --load_checkpoint starts one from its weights.

With --repo the files are first written into --output_dir, and --dry_run stops there. Both
`AlignPipeline.from_pretrained("owner/name")` and diffusers' `AutoModel.from_pretrained("owner/name", trust_remote_code=True)`
load the repository.
"""

import argparse
import contextlib
import logging
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from PIL import Image

from evaluation.pictures import is_sheet
from images.decoding import open_image, to_rgb
from runtime.cli import alone_in, claim_writable_folder, run
from utils import UserError, atomic_file, hub_token, one_line, printable, read_json, require_regular, shown
from vae_align import PRETRAINED_NAME, AlignPipeline, is_finite, module_of
from vaes.codec import same_numbers
from vaes.families import named_space
from vaes.pipeline import read_checkpoint, spaces_of, weights_digest

log = logging.getLogger(__name__)

FIGURES = ("psnr", "st_lpips_vgg", "texture", "detail", "ssim", "psnr_vs_vae2", "latent_mse", "colour_bias")
RUNGS = ("vae2", "reencode", "linear", "aligned")
COLUMNS = {"psnr": "%.2f", "st_lpips_vgg": "%.3f", "ssim": "%.4f", "latent_mse": "%.4f"}  # of the card, and their formats
CARD = Path(__file__).with_name("model_card.md.jinja")
CARD_NAME, PICTURE = "README.md", "comparison.png"  # in the repository


def require_hub_id(flag: str, value: str) -> None:
    """UserError for a local folder: nobody else can open it, and it reveals how this machine's disks are laid out."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value, re.ASCII) or Path(value).is_dir():
        raise UserError(f"{flag} {shown(value)}: a folder of this machine goes into no shared file; name a hub id, owner/name")


def figures_in(results: dict, names: tuple[str, ...] = FIGURES) -> dict:
    """{rung: {metric: mean}} from the results of `ladder.evaluate` with their `image_size`; KeyError where one is missing."""
    rungs = {rung: results["ladder"][rung] for rung in RUNGS if rung in results["ladder"]}
    judged_on = {"images": results["images"], "image_size": results["image_size"]}
    return {rung: {name: figures.get(name) for name in names} | judged_on for rung, figures in rungs.items()}


def numbers_in(figures: dict) -> dict:
    """The figures {rung: {metric: value}} that are finite numbers, lists of such, or None: a file may hold anything."""

    def fits(value):
        return value is None or is_finite(value) or (isinstance(value, list) and all(map(fits, value)))

    rows = {rung: row for rung, row in figures.items() if isinstance(row, dict)}
    return {rung: {name: value for name, value in row.items() if fits(value)} for rung, row in rows.items()}


def judged_figures(path: str, weights: str) -> dict:
    """`figures_in` of the metrics.json at `path` about the module with the digest `weights`. UserError for a file that judged
    other modules; a warning where it does not say which."""
    try:
        results = read_json(path)
        judged = {each.get("weights"): each["row"] for each in results.get("checkpoints", [])}
        if weights in judged:
            results["ladder"]["aligned"] = results["ladder"][judged[weights]]
        elif judged.keys() - {None}:
            other = shown(results["checkpoint"])
            raise UserError(f"{path}: judged other weights than this checkpoint's ({other}); judge this checkpoint")
        else:
            log.warning("%s: does not say which weights it judged; its figures may be another module's", path)
        if results.get("wrong_spaces"):
            raise UserError(f"{path}: no figures of this module; {' '.join(results['wrong_spaces'])}")
        for remark in results.get("remarks", []):
            log.warning("%s: %s", path, remark)
        return figures_in(results)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a metrics.json of eval_align.py ({one_line(error)})") from None


def pipeline_to_share(args: argparse.Namespace) -> tuple[AlignPipeline, dict]:
    """(the pipeline of `args.checkpoint` without its training, {"vaes": hub ids of its VAEs, "vae_digests": their digests or
    None}). UserError for local folders."""
    content = read_checkpoint(args.checkpoint)
    vaes, spaces = [], []
    for number, recorded in enumerate(spaces_of(content), 1):
        name = getattr(args, f"vae{number}_space")
        vaes.append(getattr(args, f"vae{number}_path") or content[f"vae{number}"]["path"] or "")
        spaces.append(named_space(name) if name else recorded)
        if recorded.map_is_known and not same_numbers(spaces[-1], recorded):
            raise UserError(f"--vae{number}_space {name}: the checkpoint was trained in {recorded}; leave the flag out")
        require_hub_id(f"--vae{number}_path", vaes[-1])
        if not spaces[-1].map_is_known:
            said = "VAE%d's latent space has no name: the file serves scaled latents only; --vae%d_space names it"
            log.warning(said, number, number)
    module = module_of(content)
    weights, figures = weights_digest(module), content["metrics"]
    if args.metrics:
        figures = judged_figures(args.metrics, weights)
    elif isinstance(figures.get("aligned"), dict) and figures["aligned"].get("weights", weights) != weights:
        log.warning("its figures are those of an earlier step and stay out; judge it, and name the metrics.json by --metrics")
        figures = {}
    origin = {"vaes": vaes, "vae_digests": [content[name].get("content") for name in ("vae1", "vae2")]}
    return AlignPipeline(module, *spaces, figures=numbers_in(figures)).to(getattr(torch, args.dtype)), origin


def model_card(pipeline: AlignPipeline, vaes: list[str], args: argparse.Namespace, picture: str | None) -> ModelCard:
    """README.md of the repository."""
    figures = {rung: pipeline.figures[rung] for rung in RUNGS if rung in pipeline.figures}
    spaces = [pipeline.space1, pipeline.space2]
    data = ModelCardData(
        license=args.license,
        base_model=args.base_model or vaes,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["latent-interposer", "vae", *(space.name for space in spaces if space.name)],
        model_name=args.repo.rpartition("/")[2],
    )
    columns = {name: form for name, form in COLUMNS.items() if any(row.get(name) is not None for row in figures.values())}
    values = {"pipeline": pipeline, "repo": args.repo, "vaes": vaes, "figures": figures, "columns": columns, "picture": picture}
    return ModelCard.from_template(data, template_path=CARD, spaces=[printable(str(space)) for space in spaces], **values)


def upload(files: list[Path], repo: str, private: bool) -> str:
    """Upload these files as one commit, to a new repository where there is none; the commit's address."""
    api = HfApi(token=hub_token() or False)
    try:
        api.create_repo(repo, exist_ok=True, private=private)
        added = [CommitOperationAdd(file.name, file.read_bytes()) for file in files]
        done = api.create_commit(repo, added, commit_message="Upload the module")
    except Exception as error:  # no network, no rights, a refused token: the hub client has no common base for them
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        remedy = "set HF_TOKEN to a token that may write" if refused else "check the network, then start again"
        where = files[0].parent
        raise UserError(f"{repo}: could not be uploaded ({one_line(error)}); {remedy}. The files are in {where}") from None
    return done.commit_url


def find_picture(args: argparse.Namespace) -> Image.Image | None:
    """The pixels for the card, without metadata: of --picture, or of the first PNG beside --metrics, eval_align.py's own first.
    A link is not followed."""
    beside = Path(args.metrics).parent.glob("*.png") if args.metrics else ()
    for path in [Path(args.picture)] if args.picture else sorted(beside, key=lambda path: (not is_sheet(path), path.name)):
        try:
            if path.is_symlink():
                raise OSError("a link; name the file itself")
            require_regular(path)
            return to_rgb(open_image(str(path)))
        except Exception as error:  # every Pillow plugin raises its own classes
            if args.picture:
                raise UserError(f"--picture {path}: cannot be read as a picture ({one_line(error)})") from None
            log.warning("%s does not come along: it cannot be read as a picture (%s)", path, one_line(error))
    return None


def write_repository(folder: Path, pipeline: AlignPipeline, origin: dict, picture, args) -> list[Path]:
    """Write the files of the repository `args.repo` into `folder`; their paths. `pipeline` and `origin` come from
    `pipeline_to_share`, `picture` from `find_picture`."""
    for model in args.base_model or ():
        require_hub_id("--base_model", model)
    pipeline.save_pretrained(folder, **origin)
    names = [PRETRAINED_NAME, "config.json", "vae_align.py", CARD_NAME]
    if picture:
        names.append(PICTURE)
        with atomic_file(folder / PICTURE) as file:
            picture.save(file, "PNG")
    with atomic_file(folder / CARD_NAME, "w", encoding="utf-8") as file:
        file.write(str(model_card(pipeline, origin["vaes"], args, picture and PICTURE)) + "\n")
    return [folder / name for name in sorted(names)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="file (.pth or .safetensors), or a folder: its best module")
    parser.add_argument("output", nargs="?", help="the .safetensors file to write; replaces none")
    parser.add_argument("--repo", help="owner/name on the hub, in place of a file")
    parser.add_argument("--dry_run", action="store_true", help="write the repository's files and upload nothing")
    parser.add_argument("--output_dir", help="folder of the repository's files (default: published/NAME)")
    parser.add_argument("--picture", help="picture for the card (default: the first PNG beside --metrics)")
    parser.add_argument("--license", default="apache-2.0", help="the hub's short name of the weights' licence")
    parser.add_argument("--base_model", nargs="+", help="hub ids of the models on both sides (default: the VAEs')")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    for number in (1, 2):
        recorded = "(default: what the checkpoint records)"
        parser.add_argument(f"--vae{number}_path", help=f"hub id of VAE{number}, for those who judge the module {recorded}")
        parser.add_argument(f"--vae{number}_space", help=f"name or alias of its latent space {recorded}")
    parser.add_argument("--metrics", help="a metrics.json of eval_align.py about this checkpoint: its figures go along")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the weights")
    args = parser.parse_args()

    if bool(args.output) == bool(args.repo):
        raise UserError("name either a .safetensors file to write, or --repo owner/name")
    written = Path(args.output or "")
    if args.output and written.suffix != ".safetensors":
        raise UserError(f"{written}: name a file that ends in .safetensors")
    if args.output and written.exists():
        raise UserError(f"{written}: exists already; name another file or delete it")
    if args.repo and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", args.repo, re.ASCII):
        raise UserError(f"--repo {shown(args.repo)}: name it owner/name")
    picture = find_picture(args) if args.repo else None
    pipeline, origin = pipeline_to_share(args)
    place = args.output_dir or Path("published") / (args.repo or "").rpartition("/")[2]
    folder = claim_writable_folder(place, "--output_dir") if args.repo else None
    with alone_in(folder, "--output_dir", "publishing") if args.repo else contextlib.nullcontext():
        if args.repo:
            files = write_repository(folder, pipeline, origin, picture, args)
        else:
            files = [pipeline.save_pretrained(written, **origin)]
        AlignPipeline.from_pretrained(folder or written)
        for file in files:
            print(printable(f"{file}: {file.stat().st_size / 1e6:.3f} MB"))
        if args.repo and not args.dry_run:
            print(f"uploaded: {upload(files, args.repo, args.private)}")
        elif args.repo:
            print("--dry_run: nothing was uploaded")


if __name__ == "__main__":
    run(main)
