"""Put a module on the hub: weights, config.json, vae_align.py and a model card with figures, baselines and a picture.

    python tools/publish.py CHECKPOINT --repo owner/name --metrics eval_results/metrics.json --dry_run
    HF_TOKEN=… python tools/publish.py CHECKPOINT --repo owner/name --metrics eval_results/metrics.json

The files are written into --output_dir first; --dry_run ends there. `AlignPipeline.from_pretrained("owner/name")` reads them
back, and so does diffusers' `AutoModel.from_pretrained("owner/name", trust_remote_code=True)`. What a checkpoint holds of the
training stays behind, as with tools/share_checkpoint.py.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from huggingface_hub import HfApi, ModelCardData
from share_checkpoint import add_arguments, pipeline_to_share, require_hub_id

from runtime.cli import claim_writable_folder, run
from utils import UserError, atomic_file, hub_token, one_line, shown
from vae_align import AlignPipeline

ROWS = {
    "vae2": "VAE2's own reconstruction",
    "reencode": "decode with VAE1, re-encode with VAE2",
    "linear": "the best linear map",
    "aligned": "**this module**",
}
COLUMNS = {
    "psnr": ("PSNR dB", "{:.2f}"),
    "st_lpips_vgg": ("ST-LPIPS (VGG)", "{:.3f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "latent_mse": ("latent MSE", "{:.4f}"),
}
PICTURE = "comparison.png"
DIFFUSERS = """
In diffusers 0.33 or newer the latents go into the image-to-image pipeline of VAE2's family unpacked, as `image=`, with
`height={stride} * aligned.shape[2]` and `width={stride} * aligned.shape[3]`; for FLUX.1 both must be multiples of 16.
"""


def card_data(pipeline: AlignPipeline, repo: str, base_models: list[str], licence: str) -> str:
    """The card's YAML header."""
    data = ModelCardData(
        license=licence,
        base_model=base_models,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["latent-interposer", "vae", *(space.name for space in (pipeline.space1, pipeline.space2) if space.name)],
        model_name=repo.rpartition("/")[2],
    )
    return data.to_yaml()


def figures_table(figures: dict) -> str:
    """The module's figures beside its baselines, as a Markdown table; "" where none are known."""
    rows = {name: figures[name] for name in ROWS if isinstance(figures.get(name), dict)}
    if "aligned" not in rows:
        return ""
    columns = {name: column for name, column in COLUMNS.items() if any(row.get(name) is not None for row in rows.values())}
    lines = ["| |" + "".join(f" {title} |" for title, _ in columns.values()), "|---|" + "---|" * len(columns)]
    for name, row in rows.items():
        cells = ("–" if row.get(column) is None else form.format(row[column]) for column, (_, form) in columns.items())
        lines.append(f"| {ROWS[name]} |" + "".join(f" {cell} |" for cell in cells))
    judged = rows["aligned"]
    if judged.get("images"):
        lines += ["", f"*Means of {judged['images']} images at {judged.get('image_size')} px, decoded with VAE2.*"]
    return "\n".join(lines)


def model_card(pipeline: AlignPipeline, repo: str, vaes: list[str], args: argparse.Namespace, picture: bool) -> str:
    """README.md of the repository."""
    inputs = ", ".join(["latents"] * pipeline.uses_latents + ["image"] * pipeline.uses_image)
    takes = " and ".join(["VAE1's latents"] * pipeline.uses_latents + ["the image"] * pipeline.uses_image)
    parts = [
        f"---\n{card_data(pipeline, repo, args.base_model or vaes, args.license)}\n---",
        f"# {repo.rpartition('/')[2]}",
        f"Carries latents of {pipeline.space1} into the latent space {pipeline.space2}, without decoding and encoding again. "
        f"It takes {takes}. VAE1 is `{vaes[0]}`, VAE2 is `{vaes[1]}`.",
        f"![original, VAE1, VAE2, re-encoded and aligned]({PICTURE})" if picture else "",
        "## Figures" if figures_table(pipeline.figures) else "",
        figures_table(pipeline.figures),
        "## Use",
        "```python\nfrom vae_align import AlignPipeline  # vae_align.py of this repository; needs torch and safetensors\n\n"
        f'align = AlignPipeline.from_pretrained("{repo}")\n'
        f"aligned = align.translate({inputs})  # scaled latents; raw=True for raw ones, as ComfyUI keeps them\n```",
        f'or `align = diffusers.AutoModel.from_pretrained("{repo}", trust_remote_code=True)`.',
        DIFFUSERS.format(stride=pipeline.space2.stride).strip(),
        "## Limits",
        "One direction between these two latent spaces. What VAE1's latents do not hold cannot come back: without the image "
        "fine detail is softer than VAE2's own, which image-to-image at a strength of 0.4 and more hides. Latents far outside "
        "what photos give, such as noise, are not translated faithfully.",
        f"## Licence\n\n{args.license} for these weights. The VAEs named above have licences of their own.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def find_picture(args: argparse.Namespace) -> Path | None:
    """The comparison picture: the one that was named, else the first that eval_align.py left beside its metrics.json."""
    if args.picture:
        if not Path(args.picture).is_file():
            raise UserError(f"--picture {args.picture}: no such file")
        return Path(args.picture)
    return next(iter(sorted(Path(args.metrics).parent.glob("*.png"))), None) if args.metrics else None


def upload(folder: Path, repo: str, private: bool) -> str:
    """Upload the folder's files as one commit, to a repository that is made where it is missing; the commit's address."""
    api = HfApi(token=hub_token() or False)
    try:
        api.create_repo(repo, exist_ok=True, private=private)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload the module")
    except Exception as error:  # no network, no rights, a refused token: the hub client has no common base for them
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        remedy = "set HF_TOKEN to a token that may write" if refused else "check the network, then start again"
        raise UserError(f"{repo}: could not be uploaded ({one_line(error)}); {remedy}. The files are in {folder}") from None
    return done.commit_url


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="file (.pth or .safetensors), or a folder: its newest")
    parser.add_argument("--repo", required=True, help="owner/name on the hub")
    parser.add_argument("--dry_run", action="store_true", help="write the files and upload nothing")
    parser.add_argument("--output_dir", help="folder of the files (default: published/NAME)")
    parser.add_argument("--picture", help="PNG for the card (default: the first one beside --metrics)")
    parser.add_argument("--license", default="apache-2.0", help="the hub's short name of the weights' licence")
    parser.add_argument("--base_model", nargs="+", help="hub ids of the models on both sides (default: the VAEs')")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    add_arguments(parser, vaes_required=False)
    args = parser.parse_args()

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", args.repo, re.ASCII):
        raise UserError(f"--repo {shown(args.repo)}: name it owner/name")
    for model in args.base_model or ():
        require_hub_id("--base_model", model)
    pipeline, vaes = pipeline_to_share(args)
    picture = find_picture(args)
    folder = claim_writable_folder(args.output_dir or Path("published") / args.repo.rpartition("/")[2], "--output_dir")
    pipeline.save_pretrained(folder, vaes=vaes)
    if picture and picture.resolve() != (folder / PICTURE).resolve():
        shutil.copyfile(picture, folder / PICTURE)
    with atomic_file(folder / "README.md", "w", encoding="utf-8") as file:
        file.write(model_card(pipeline, args.repo, vaes, args, picture is not None))
    AlignPipeline.from_pretrained(folder)
    for file in sorted(folder.iterdir()):
        print(f"{file}: {file.stat().st_size / 1e6:.3f} MB")
    if args.dry_run:
        print("--dry_run: nothing was uploaded")
    else:
        print(f"uploaded: {upload(folder, args.repo, args.private)}")


if __name__ == "__main__":
    run(main)
