"""The nodes: Load Align Module, and Align Latents."""

import contextlib
import functools
import os

import comfy.model_management
import folder_paths

from .latent_dict import align_latent, describe
from .vae_align import ZOO, ZOO_NAME, AlignPipeline, zoo_pairs

FOLDER = "latent_align"  # below ComfyUI's models
TO = " to "  # between the two spaces of a pair of the zoo


def _register_folder() -> None:
    """Modules are searched in models/latent_align, and where extra_model_paths.yaml says."""
    own = os.path.join(folder_paths.models_dir, FOLDER)
    paths = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))[0]
    folder_paths.folder_names_and_paths[FOLDER] = ([*paths, *[own] * (own not in paths)], {".safetensors"})


def _module_names() -> list[str]:
    """The files of models/latent_align, and the pairs of the zoo in this pack, such as "sd15 to flux1"."""
    return [*folder_paths.get_filename_list(FOLDER), *map(TO.join, zoo_pairs())]


def _path_of(module_name: str) -> str:
    if tuple(module_name.split(TO)) in zoo_pairs():
        return str(ZOO / ZOO_NAME)
    return folder_paths.get_full_path_or_raise(FOLDER, module_name)


def _version_of(module_name: str) -> int:
    return os.stat(_path_of(module_name)).st_mtime_ns


@functools.lru_cache(maxsize=4)
def _load(module_name: str, version: int) -> AlignPipeline:
    pair = tuple(module_name.split(TO))
    return AlignPipeline.pair(*pair) if pair in zoo_pairs() else AlignPipeline.from_pretrained(_path_of(module_name))


class LoadAlignModule:
    """Load a file of models/latent_align or a pair of the zoo: its module, and a line that describes it."""

    CATEGORY = "latent/align"
    DESCRIPTION = "Loads a module that translates latents from one VAE's latent space into another's."
    RETURN_TYPES = ("ALIGN_MODULE", "STRING")
    RETURN_NAMES = ("align_module", "description")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"module_name": (_module_names(),)}}

    @classmethod
    def IS_CHANGED(cls, module_name):
        return _version_of(module_name)

    def load(self, module_name):
        pipeline = _load(module_name, _version_of(module_name))
        return pipeline, describe(pipeline)


class AlignLatents:
    """Translate VAE1's LATENT into VAE2's LATENT."""

    CATEGORY = "latent/align"
    DESCRIPTION = "Translates latents into another model family's latent space."
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "align"

    @classmethod
    def INPUT_TYPES(cls):
        image_help = "The image that the latents were encoded from, for modules that were trained with it."
        return {
            "required": {"samples": ("LATENT",), "module_name": (_module_names(),)},
            "optional": {
                "image": ("IMAGE", {"tooltip": image_help}),
                "align_module": ("ALIGN_MODULE", {"tooltip": "From Load Align Module; takes the place of module_name."}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, module_name, align_module=None, **_):
        return 0 if align_module else _version_of(module_name)

    def align(self, samples, module_name, image=None, align_module=None, unique_id=None):
        pipeline = align_module or _load(module_name, _version_of(module_name))
        pipeline.to(comfy.model_management.get_torch_device())
        pipeline.remarks.clear()  # they are said for each run
        aligned = align_latent(pipeline, samples, image)
        if pipeline.remarks:
            with contextlib.suppress(AttributeError, ImportError):  # of an older ComfyUI, whose log has them
                from server import PromptServer

                PromptServer.instance.send_progress_text("\n".join(pipeline.remarks.values()), unique_id)
        return (aligned,)


_register_folder()
NODE_CLASS_MAPPINGS = {"AlignLatents": AlignLatents, "LoadAlignModule": LoadAlignModule}
NODE_DISPLAY_NAME_MAPPINGS = {"AlignLatents": "Align Latents", "LoadAlignModule": "Load Align Module"}
