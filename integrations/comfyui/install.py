"""Put the node pack into a ComfyUI: the nodes, vae_align.py and the modules that the project ships. Standard library only.

    python integrations/comfyui/install.py PATH_TO_COMFYUI [MODULE.safetensors …]

Writes custom_nodes/align_latents, with it the zoo, and models/latent_align; further modules that are named go along.
PATH_TO_COMFYUI is the folder that holds custom_nodes and models. What an earlier install wrote is replaced; nothing else is
touched. Restart ComfyUI afterwards.
"""

import argparse
import shutil
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parent
ROOT = PACK.parent.parent
ZOO = ROOT / "assets" / "zoo"  # where vae_align.py looks for it, from wherever it is
FILES = [PACK / name for name in ("__init__.py", "nodes.py", "latent_dict.py", "pyproject.toml", "README.md")]
FILES += [ROOT / "vae_align.py", ROOT / "LICENSE"]


def install(comfyui: Path, modules: list[Path]) -> tuple[Path, Path]:
    """Copy the pack and the modules; the two folders that were written."""
    pack, models = comfyui / "custom_nodes" / "align_latents", comfyui / "models" / "latent_align"
    for folder in (pack, models, pack / "example_workflows"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        shutil.copyfile(file, pack / file.name)
    for workflow in (PACK / "workflows").glob("*.json"):
        shutil.copyfile(workflow, pack / "example_workflows" / workflow.name)
    if ZOO.is_dir():
        shutil.copytree(ZOO, pack / ZOO.relative_to(ROOT), dirs_exist_ok=True)
    for module in modules:
        shutil.copyfile(module, models / module.name)
    return pack, models


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, help="folder of ComfyUI")
    parser.add_argument("modules", type=Path, nargs="*", help="further modules, as .safetensors")
    args = parser.parse_args()
    if not (args.comfyui / "custom_nodes").is_dir():
        sys.exit(f"error: {args.comfyui}: no ComfyUI (it has no folder custom_nodes); name the folder that holds custom_nodes")
    absent = [str(module) for module in args.modules if not module.is_file()]
    if absent:
        sys.exit(f"error: {absent[0]}: no such file; name a module as .safetensors")
    modules = [*sorted((ROOT / "assets" / "pretrained").glob("*.safetensors")), *args.modules]
    try:
        pack, models = install(args.comfyui, modules)
    except OSError as error:
        sys.exit(f"error: {args.comfyui}: cannot write there ({error.strerror or error})")
    print(f"nodes:   {pack}")
    print(f"modules: {', '.join(module.name for module in modules)} in {models}")
    print("Restart ComfyUI; the nodes are under latent/align.")


if __name__ == "__main__":
    main()
