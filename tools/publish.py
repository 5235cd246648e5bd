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
import logging
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData

from runtime.cli import claim_writable_folder, run
from utils import UserError, atomic_file, hub_token, one_line, read_json, shown
from vae_align import AlignPipeline, module_of
from vaes.codec import named_space
from vaes.pipeline import read_checkpoint, spaces_of

log = logging.getLogger(__name__)

FIGURES = ("psnr", "st_lpips_vgg", "texture", "detail", "ssim", "psnr_vs_vae2", "latent_mse", "colour_bias")
RUNGS = ("vae2", "reencode", "linear", "aligned")
COLUMNS = {"psnr": "%.2f", "st_lpips_vgg": "%.3f", "ssim": "%.4f", "latent_mse": "%.4f"}  # of the card, and their formats
CARD = Path(__file__).with_name("model_card.md.jinja")
PICTURE = "comparison.png"


def require_hub_id(flag: str, value: str) -> None:
    """UserError for a local folder: nobody else can open it, and it reveals how this machine's disks are laid out."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value, re.ASCII) or Path(value).is_dir():
        raise UserError(f"{flag} {shown(value)}: a folder of this machine goes into no shared file; name a hub id, owner/name")


def figures_in(results: dict, names: tuple[str, ...] = FIGURES) -> dict:
    """{rung: {metric: mean}} from the results of `ladder.evaluate` with their `image_size`; KeyError where one is missing."""
    rungs = {rung: results["ladder"][rung] for rung in RUNGS if rung in results["ladder"]}
    judged_on = {"images": results["images"], "image_size": results["image_size"]}
    return {rung: {name: figures.get(name) for name in names} | judged_on for rung, figures in rungs.items()}


def pipeline_to_share(args: argparse.Namespace) -> tuple[AlignPipeline, list[str]]:
    """(the pipeline of `args.checkpoint` without its training, hub ids of its VAEs). UserError for local folders."""
    content = read_checkpoint(args.checkpoint)
    vaes, spaces = [], []
    for number, recorded in enumerate(spaces_of(content), 1):
        name = getattr(args, f"vae{number}_space")
        vaes.append(getattr(args, f"vae{number}_path") or content[f"vae{number}"]["path"] or "")
        spaces.append(named_space(name) if name else recorded)
        require_hub_id(f"--vae{number}_path", vaes[-1])
        if not spaces[-1].map_is_known:
            said = "VAE%d's latent space has no name: the file serves scaled latents only; --vae%d_space names it"
            log.warning(said, number, number)
    figures = content["metrics"]
    if args.metrics:
        try:
            figures = figures_in(read_json(args.metrics))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{args.metrics}: not a metrics.json of eval_align.py ({one_line(error)})") from None
    return AlignPipeline(module_of(content), *spaces, figures=figures).to(getattr(torch, args.dtype)), vaes


def model_card(pipeline: AlignPipeline, vaes: list[str], args: argparse.Namespace, picture: str | None) -> ModelCard:
    """README.md of the repository."""
    figures = {rung: pipeline.figures[rung] for rung in RUNGS if isinstance(pipeline.figures.get(rung), dict)}
    spaces = [space.name for space in (pipeline.space1, pipeline.space2) if space.name]
    data = ModelCardData(
        license=args.license,
        base_model=args.base_model or vaes,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["latent-interposer", "vae", *spaces],
        model_name=args.repo.rpartition("/")[2],
    )
    columns = {name: form for name, form in COLUMNS.items() if any(row.get(name) is not None for row in figures.values())}
    values = {"pipeline": pipeline, "repo": args.repo, "vaes": vaes, "figures": figures, "columns": columns, "picture": picture}
    return ModelCard.from_template(data, template_path=CARD, **values)


def upload(folder: Path, repo: str, private: bool) -> str:
    """Upload the folder's files as one commit, to a new repository where there is none; the commit's address."""
    api = HfApi(token=hub_token() or False)
    try:
        api.create_repo(repo, exist_ok=True, private=private)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload the module")
    except Exception as error:  # no network, no rights, a refused token: the hub client has no common base for them
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        remedy = "set HF_TOKEN to a token that may write" if refused else "check the network, then start again"
        raise UserError(f"{repo}: could not be uploaded ({one_line(error)}); {remedy}. The files are in {folder}") from None
    return done.commit_url


def write_repository(args: argparse.Namespace) -> Path:
    """Write the files of the repository `args.repo`; their folder."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", args.repo, re.ASCII):
        raise UserError(f"--repo {shown(args.repo)}: name it owner/name")
    for model in args.base_model or ():
        require_hub_id("--base_model", model)
    if args.picture and not Path(args.picture).is_file():
        raise UserError(f"--picture {args.picture}: no such file")
    found = sorted(Path(args.metrics).parent.glob("*.png")) if args.metrics else []
    picture = Path(args.picture) if args.picture else next(iter(found), None)
    pipeline, vaes = pipeline_to_share(args)
    folder = claim_writable_folder(args.output_dir or Path("published") / args.repo.rpartition("/")[2], "--output_dir")
    pipeline.save_pretrained(folder, vaes=vaes)
    if picture and picture.resolve() != (folder / PICTURE).resolve():
        shutil.copyfile(picture, folder / PICTURE)
    with atomic_file(folder / "README.md", "w", encoding="utf-8") as file:
        file.write(f"{model_card(pipeline, vaes, args, picture and PICTURE)}\n")
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="file (.pth or .safetensors), or a folder: its newest")
    parser.add_argument("output", nargs="?", help="the .safetensors file to write; replaces none")
    parser.add_argument("--repo", help="owner/name on the hub, in place of a file")
    parser.add_argument("--dry_run", action="store_true", help="write the repository's files and upload nothing")
    parser.add_argument("--output_dir", help="folder of the repository's files (default: published/NAME)")
    parser.add_argument("--picture", help="PNG for the card (default: the first one beside --metrics)")
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
    if args.repo:
        written = write_repository(args)
    else:
        written = Path(args.output)
        if written.suffix != ".safetensors":
            raise UserError(f"{written}: name a file that ends in .safetensors")
        if written.exists():
            raise UserError(f"{written}: exists already; name another file or delete it")
        pipeline, vaes = pipeline_to_share(args)
        pipeline.save_pretrained(written, vaes=vaes)
    AlignPipeline.from_pretrained(written)
    for file in sorted(written.iterdir()) if args.repo else [written]:
        print(f"{file}: {file.stat().st_size / 1e6:.3f} MB")
    if args.repo and not args.dry_run:
        print(f"uploaded: {upload(written, args.repo, args.private)}")
    elif args.repo:
        print("--dry_run: nothing was uploaded")


if __name__ == "__main__":
    run(main)
