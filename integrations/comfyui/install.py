"""Install the node pack into a ComfyUI: the nodes, vae_align.py and the shipped modules. Standard library only.

    python integrations/comfyui/install.py PATH_TO_COMFYUI [MODULE.safetensors …]

PATH_TO_COMFYUI is the folder that holds custom_nodes and models. Writes custom_nodes/align_latents, which includes the zoo, and
models/latent_align, with the named modules too. Replaces the files of an earlier install and touches nothing else. Restart
ComfyUI afterwards.
"""

import argparse
import shutil
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parent
ROOT = PACK.parent.parent
FILES = [PACK / name for name in ("__init__.py", "nodes.py", "latent_dict.py", "pyproject.toml", "README.md")]
FILES += [ROOT / "vae_align.py", ROOT / "LICENSE"]
ZOO = Path("assets", "zoo")  # vae_align.py looks for it beside itself


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
    pack, models = args.comfyui / "custom_nodes" / "align_latents", args.comfyui / "models" / "latent_align"
    try:
        shutil.copytree(PACK / "workflows", pack / "example_workflows", dirs_exist_ok=True)
        if (ROOT / ZOO).is_dir():
            shutil.copytree(ROOT / ZOO, pack / ZOO, dirs_exist_ok=True)
        models.mkdir(parents=True, exist_ok=True)
        for file, folder in [(file, pack) for file in FILES] + [(module, models) for module in modules]:
            shutil.copyfile(file, folder / file.name)
    except OSError as error:
        sys.exit(f"error: {args.comfyui}: cannot write there ({error.strerror or error})")
    print(f"nodes:   {pack}")
    print(f"modules: {', '.join(module.name for module in modules)} in {models}")
    print("Restart ComfyUI; the nodes are under latent/align.")


if __name__ == "__main__":
    main()
