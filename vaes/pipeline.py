"""A module together with its two VAEs, for training and evaluation, and its checkpoints."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from utils import UserError, atomic_file, next_stamp, one_line, physical_memory, read_torch, require_regular, shown, stamp_of
from vae_align import (
    CHECKPOINT_FORMAT,
    CHECKPOINT_PREFIX,
    FORMAT_NUMBER,
    PRETRAINED_NAME,
    ZOO,
    AlignConfig,
    AlignError,
    AlignModule,
    AlignPipeline,
    LatentSpace,
    align_module,
    check_weights,
    detect_wrong_space,
    errors_naming,
    is_finite,
    module_of,
    pair_named,
    read_safetensors,
    require_format,
    require_own_spaces,
    require_whole,
    warn_of_half,
)
from vaes.codec import Codec, same_numbers
from vaes.loading import FrozenVAE, load_vae_model

log = logging.getLogger(__name__)

BEST_PREFIX = "align_best"  # of the best module of a run, before the stamp of the run's name


def require_memory_for(config: AlignConfig) -> None:
    """UserError when this machine's memory could not hold a module of that config, in float32."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in align_module(config).parameters())
    memory = physical_memory()
    if 4 * parameters > memory:
        raise UserError(
            f"hidden_channels {config.hidden_channels}, num_blocks {config.num_blocks}: {parameters / 1e6:.0f} M parameters "
            f"do not fit into this machine's {memory / 1e9:.0f} GB; lower one of them"
        )


class PipelineWithVAEs(AlignPipeline):
    """An `AlignPipeline` together with the frozen VAEs of its two spaces.

    Attributes:
        module: the `AlignModule` that is judged, used and saved. float32.
        training_module: the one that the optimizer moves: the same, unless `module` is its running average.
        codec1, codec2: the codecs of the two VAEs. A checkpoint's pipeline opens them at first use, so it translates on a
            machine that has neither VAE.
        progress: a checkpoint's `step`, `epoch`, `metrics` and `config`.
    """

    def __init__(self, module: AlignModule, codec1: Codec | None, codec2: Codec | None):
        """A codec may be None where nothing is encoded or decoded with it."""
        super().__init__(module, codec1 and codec1.space, codec2 and codec2.space)
        self._begin(lambda: codec1, lambda: codec2)

    def _begin(self, *openers: Callable[[], Codec]) -> None:
        self.training_module = self.module
        self.progress = {"step": 0, "epoch": 0, "metrics": {}, "config": {}}
        self._openers = openers
        self._opened = {}

    def _codec(self, number: int) -> Codec:
        if number not in self._opened:
            self._opened[number] = self._openers[number - 1]()
            self._opened[number].vae.to(self.device)
        return self._opened[number]

    @property
    def codec1(self) -> Codec:
        return self._codec(1)

    @property
    def codec2(self) -> Codec:
        return self._codec(2)

    @property
    def vae1(self) -> FrozenVAE:
        return self.codec1.vae

    @property
    def vae2(self) -> FrozenVAE:
        return self.codec2.vae

    def to(self, device: str | torch.device) -> PipelineWithVAEs:
        """Move the module and the VAEs; the module stays in float32, in which it trains."""
        self.module.to(device)
        self.training_module.to(device)
        for codec in self._opened.values():
            codec.vae.to(device)
        return self

    def encode_batch(
        self, batch: dict, sample: bool = False, generator: torch.Generator | None = None, images_needed: bool = False
    ):
        """A training batch -> (keyword arguments of `AlignModule.forward`, VAE2's scaled latents as the target, the images).

        Latents from the latent cache are used unchanged; the others are encoded from `pixel_values`, the posterior mean or
        with `sample` a draw from the posterior. The images go to the device once, if the module, an encoder or, with
        `images_needed`, the caller reads them; otherwise they are None. If the batch has VAE1's picture, a module that makes
        this picture itself, or that takes the image alone, gets it.
        """
        on_device = {"device": self.device, "non_blocking": True}
        encoded = "latents2" in batch and (not self.uses_latents or "latents1" in batch)
        images = None
        sees_picture = "decoded" in batch and (self.config.has_decoder or not self.uses_latents)
        if (self.uses_image and not sees_picture) or images_needed or not encoded:
            images = batch["pixel_values"].to(**on_device)

        def latents(name, codec):
            return batch[name].to(**on_device) if name in batch else codec().encode(images, sample, generator)

        inputs = {"image": images} if self.uses_image else {}
        if sees_picture:
            inputs["image"] = batch["decoded"].to(**on_device)
        if self.uses_latents:
            inputs["latents"] = latents("latents1", lambda: self.codec1)
        return inputs, latents("latents2", lambda: self.codec2), images

    def save_checkpoint(
        self, folder: str | os.PathLike, config: dict, step: int, epoch: float, metrics: dict, name=None, **more
    ) -> Path:
        """Write `align_pipeline_YYYYMMDD_HHMMSS.pth` into `folder` and return its path.

        The file appears whole or not at all, never replaces another, and sorts after those already there. With `name` it gets
        that name, and replaces an older file. It holds tensors and plain values only, also in `more`, so that
        `torch.load(weights_only=True)` reads it. UserError if it cannot be written.
        """
        content = {
            "format": CHECKPOINT_FORMAT,
            "format_number": FORMAT_NUMBER,
            "align_config": self.config.to_dict(),
            "state_dict": {name: tensor.detach().cpu().contiguous() for name, tensor in self.module.state_dict().items()},
            "vae1": self.codec1.identity,
            "vae2": self.codec2.identity,
            "config": config,
            "step": step,
            "epoch": epoch,
            "metrics": metrics,
        } | more
        while True:
            path = Path(folder) / (name or f"{CHECKPOINT_PREFIX}_{next_stamp(folder, CHECKPOINT_PREFIX)}.pth")
            try:
                with atomic_file(path, exclusive=name is None) as file:
                    torch.save(content, file)
                return path
            except FileExistsError:
                continue  # another run took this second; take the next
            except (OSError, RuntimeError) as error:
                # torch's zip writer raises a RuntimeError of its own while it closes a file that could not be written
                cause = error if isinstance(error, OSError) else error.__context__
                if not isinstance(cause, OSError):
                    raise
                raise UserError(f"checkpoint {path}: cannot be written ({one_line(cause)}); free some space there") from None

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike | dict,
        vae1=None,
        vae2=None,
        device="cpu",
        dtype=torch.float32,
        cache_dir=None,
        vae1_subfolder=None,
        vae2_subfolder=None,
        labels=("VAE1", "VAE2"),
    ) -> PipelineWithVAEs:
        """A pipeline from `save_checkpoint`'s file or a shared .safetensors file. Executes no code from the file.

        Args:
            path: the file, or its content from `read_checkpoint`.
            vae1, vae2: a VAE, or a folder or hub id in place of the recorded one. By default the checkpoint's VAE, read at
                first use; `translate` does not use it.
            device, dtype: of the VAEs; the module stays in float32.
            vae1_subfolder, vae2_subfolder: in place of the recorded ones.
            labels: how error messages call the two VAEs.
        """
        content = path if isinstance(path, dict) else read_checkpoint(path)
        spaces = spaces_of(content)
        options = {"cache_dir": cache_dir, "device": device, "dtype": dtype}

        def opener(number, given, subfolder):
            recorded = content[f"vae{number}"]
            return lambda: _open_codec(labels[number - 1], recorded, spaces[number - 1], given, subfolder, options)

        pipeline = cls.__new__(cls)
        AlignPipeline.__init__(pipeline, module_of(content).to(device), *spaces, content["metrics"])
        pipeline._begin(opener(1, vae1, vae1_subfolder), opener(2, vae2, vae2_subfolder))
        pipeline.progress = {name: content[name] for name in ("step", "epoch", "metrics", "config")}
        return pipeline


def _open_codec(label: str, recorded: dict, space: LatentSpace, given, subfolder: str | None, options: dict) -> Codec:
    """The codec of a checkpoint's VAE, from `given` (a VAE, a folder, a hub id) or from the recorded place. UserError if its
    latent space is not the checkpoint's."""
    path = recorded["path"]
    subfolder = recorded["subfolder"] if subfolder is None else subfolder
    if given is None or isinstance(given, (str, os.PathLike)):
        typed, path = bool(given), str(given or path or "")
        if not path:
            raise UserError(f"{label}: the checkpoint does not say where it is; name a folder or a hub id")
        given = load_vae_model(path, subfolder, **options, label=label, typed=typed)
    codec = Codec(given, path, subfolder)
    for name in ("channels", "stride"):
        if getattr(codec, name) != getattr(space, name):
            raise UserError(
                f"{label} {path}: its latents have {name} {getattr(codec, name)}, those of the checkpoint's VAE "
                f"{getattr(space, name)}; name a VAE of the same latent space"
            )
    named = codec.space.name and space.name
    # files that are older than names record one scale even where each channel has its own
    numbered = "space" in recorded and codec.space.map_is_known and space.map_is_known
    if codec.space.name != space.name if named else numbered and not same_numbers(codec.space, space):
        raise UserError(
            f"{label} {path}: its latent space is {_with_scale(codec.space)}, the checkpoint's is {_with_scale(space)}; name a "
            "VAE of the checkpoint's"
        )
    if codec.vae.files and "content" in recorded:  # a model that the caller made may have another dtype
        codec.warn_of_difference(recorded, "the module")
    return codec


def _with_scale(space: LatentSpace) -> str:
    return space.name or f"one without a name (scale {1 / space.std[0]:.5g}, shift {space.mean[0]:.5g} in its first channel)"


def compare_vaes(content: dict, pipeline: PipelineWithVAEs, images: Callable[[], torch.Tensor]) -> tuple[list[str], list[str]]:
    """Compare the pipeline's VAEs with those that the module of a checkpoint's `content` was trained with.

    Args:
        images: gives some images (B, 3, H, W) in [-1, 1]. It is called where no digest shows that a VAE is the same.

    Returns two lists of sentences: on VAEs whose latents are those of another space, so that no figure tells anything about the
    module; and on VAEs of which nothing shows that they are the same.
    """
    wrong, remarks = [], []
    for number, codec, space in ((1, pipeline.codec1, pipeline.space1), (2, pipeline.codec2, pipeline.space2)):
        recorded, own = content[f"vae{number}"], codec.path
        if recorded.get("content") == codec.content:
            continue
        latents = codec.encode(images().to(pipeline.device)) if codec.space.name != space.name else None
        found = None if latents is None or not latents.numel() else detect_wrong_space(latents, space)
        if found:
            found = found.partition(": pass")[0]  # no remedy for a VAE whose scale is another
            said = f"VAE{number} {own}: {found if number == 1 else found.replace('takes', 'gives', 1)}."
            (wrong if number == 2 or pipeline.uses_latents else remarks).append(said)
        elif "content" in recorded:
            remarks.append(f"VAE{number} {own} is not the one of the training, {recorded['path']}: its files differ.")
        elif recorded["path"] != own:
            place = recorded["path"] or "none"
            remarks.append(f"VAE{number} is {own}; the module's file names {place}, and nothing shows that they are the same.")
    return wrong, remarks


def encoded_batches(
    pipeline: PipelineWithVAEs, loader, accelerator, images: int, of_each: int | None = None, images_needed: bool = False
):
    """Yield `PipelineWithVAEs.encode_batch` of batches with about `images` training images over all processes.

    Each batch counts as at most `of_each` images. A batch with values that are not finite is left out, as its training step
    would be."""
    wanted = min(images, len(loader.dataset))
    for batch in loader:
        inputs, target, pixels = pipeline.encode_batch(batch, images_needed=images_needed)
        if all(tensor.isfinite().all() for tensor in (target, *inputs.values())):
            yield inputs, target, pixels
        wanted -= min(len(target), of_each or len(target)) * accelerator.num_processes
        if wanted <= 0:
            break


def weights_digest(module: AlignModule) -> str:
    """A digest of a module's architecture and weights: the same for float32 weights and the float16 ones that are shared."""
    digest = hashlib.sha256(repr(sorted(module.config.to_dict().items())).encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.half().cpu().numpy().tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Reading checkpoints


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The content of a checkpoint as plain values and tensors on the CPU; of a folder, see `module_in`; of a pair of the zoo,
    such as "sd15:flux1"; of a shipped module, such as "taesd_to_taef1".

    A .pth file gives the keys that `PipelineWithVAEs.save_checkpoint` wrote. A .safetensors file gives the same keys without
    the training: `config` is empty, `epoch` is 0, `metrics` are its figures. In both, `align_config` and
    `state_dict` make the module (`module_of`), and `vae1` and `vae2` describe the VAEs (`spaces_of`).

    AlignError if the file is not ours, newer than this code, or damaged: checksums are compared, and the parts must belong
    together, before any memory is taken for what the file claims. Executes no code from the file.
    """
    if os.path.isdir(path):  # `Path.is_dir` fails for too long a name
        return module_in(path)[1]
    if pair := pair_named(path):
        pipeline = AlignPipeline.pair(*pair)
        weights = {"state_dict": pipeline.module.state_dict(), "vaes": [None, None], "vae_digests": [None, None], "step": 0}
        return _with_training_keys(pipeline.description() | weights)
    shipped = ZOO.parent / "pretrained" / f"{path}.safetensors"
    path = shipped if not os.path.lexists(path) and os.path.isfile(shipped) else Path(path)
    start = _first_bytes(path)
    if path.suffix == ".safetensors" or start[8:] == b"{":
        content = read_safetensors(path)
        warn_of_half(path, *(content[name]["name"] for name in ("space1", "space2")))
        return _with_training_keys(content)
    if not start.startswith(b"PK"):
        raise AlignError(f"checkpoint {path}: damaged or not a checkpoint of this tool; a pickle may run code and is not read")
    content = _read_torch(path)
    with errors_naming(path):
        require_format(content)
        _check_content(content)
    return content


def module_in(folder: str | os.PathLike, level: int = logging.INFO) -> tuple[Path, dict]:
    """(path, content) of the module that a folder stands for: the best one of the run that wrote its newest file, else its
    newest checkpoint, else its `model.safetensors`. Beside a best one the content has `newest`, that of the run's newest file.
    The log names it, at this level, and every damaged file that is left out. AlignError if nothing is left."""
    failure = f"no {CHECKPOINT_PREFIX}_YYYYMMDD_HHMMSS.pth and no {PRETRAINED_NAME} in this folder"
    found = [*checkpoints_in(folder, BEST_PREFIX), *Path(folder).glob(PRETRAINED_NAME)]
    others = sorted(path.name for path in Path(folder).glob("*") if path.suffix in (".pth", ".safetensors"))
    remedy = "" if found or not others else f"; to use {', '.join(others[-2:])} name the file"
    newest = {}
    while found:
        path = found.pop(0)
        try:
            content = read_checkpoint(path) | newest
        except AlignError as error:
            failure = str(error)
            if found:
                log.warning("%s; trying the one before it", error)
            continue
        best = Path(folder, f"{BEST_PREFIX}_{str(content.get('run')).removeprefix('align_')}.pth")
        if best not in found:
            log.log(level, "%s: its %s, step %d", folder, path.name, content["step"])
            return path, content
        found, newest = [best, path], {"newest": content}
    raise AlignError(f"checkpoint {folder}: {failure}{remedy}")


def checkpoints_in(folder: str | os.PathLike, *further: str) -> list[Path]:
    """The training checkpoints in a folder, and the files with `further` prefixes, newest first; a renamed copy has no time
    stamp and does not count."""
    prefixes = (CHECKPOINT_PREFIX, *further)
    found = (path for prefix in prefixes for path in Path(folder).glob(f"{prefix}_*.pth") if stamp_of(path, prefix))
    return sorted(found, key=lambda path: path.name.split("_", 2)[2], reverse=True)  # by what follows the prefix


def write_module(folder: str | os.PathLike) -> Path:
    """Write `model.safetensors` into `folder`: the module that the folder stands for (`module_in`), in a file that
    `AlignPipeline.from_pretrained` reads, with no setting and no place of this machine in it."""
    _, content = module_in(folder, logging.DEBUG)
    digests = [content[name].get("content") for name in ("vae1", "vae2")]
    pipeline = AlignPipeline(module_of(content), *spaces_of(content), content["metrics"])
    return pipeline.save_pretrained(Path(folder) / PRETRAINED_NAME, step=content["step"], vae_digests=digests)


def _first_bytes(path: Path) -> bytes:
    """The first 9 bytes of a file, which tell its kind."""
    try:
        require_regular(path)
        with open(path, "rb") as file:
            return file.read(9)
    except FileNotFoundError:
        raise AlignError(f"checkpoint {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise AlignError(f"checkpoint {path}: cannot be read ({one_line(error)})") from None


def _read_torch(path: Path):
    """The content of a .pth file. AlignError where a part does not match its CRC-32, which `torch.load` ignores, and where its
    tensors claim more than the file holds."""
    try:
        with zipfile.ZipFile(path) as parts:
            compressed = any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist())
            damaged = None if compressed else parts.testzip()
    except Exception as error:  # a damaged zip makes zipfile, struct and the codecs fail, each in its own way
        raise AlignError(f"checkpoint {path}: damaged ({one_line(error)})") from None
    if compressed:
        raise AlignError(f"checkpoint {path}: not a checkpoint of this tool, which compresses nothing")
    if damaged:
        raise AlignError(f"checkpoint {path}: damaged ({damaged} does not match its checksum)")
    try:
        return read_torch(path)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise AlignError(f"checkpoint {path}: not a checkpoint of this tool ({error})") from None
    except Exception as error:  # truncated or foreign files fail inside zipfile, pickle or torch, each with its own error
        raise AlignError(f"checkpoint {path}: damaged or not a checkpoint ({one_line(error)})") from None


def _with_training_keys(content: dict) -> dict:
    """The content of a .safetensors file (see `read_safetensors`) with the keys of a training checkpoint."""
    vaes = {}
    for number, (place, digest) in enumerate(zip(content["vaes"], content["vae_digests"]), 1):
        space = content[f"space{number}"]
        identity = {"path": place, "subfolder": None, "channels": space["channels"], "stride": space["stride"]}
        vaes[f"vae{number}"] = identity | {"space": space} | ({"content": digest} if digest else {})
    kept = {name: content[name] for name in ("format", "format_number", "align_config", "state_dict")}
    return kept | {"config": {}, "step": content["step"], "epoch": 0, "metrics": content["figures"]} | vaes


def _check_content(content: dict) -> None:
    """AttributeError, KeyError, TypeError or an AlignError unless a checkpoint's parts are of their kinds and agree."""
    config, weights = AlignConfig.from_dict(content["align_config"]), content["state_dict"]
    if not all(isinstance(content[name], dict) for name in ("state_dict", "vae1", "vae2", "config", "metrics")):
        raise TypeError
    content.pop("newest", None)  # which only `module_in` adds
    for name, side in (("vae1", "latent"), ("vae2", "out")):
        recorded = content[name]
        if not all(isinstance(recorded.get(part), (str, type(None))) for part in ("path", "subfolder", "content")):
            raise TypeError
        if any(recorded[part] != getattr(config, f"{side}_{part}") for part in ("channels", "stride")):
            raise AlignError(f"its description of {name} contradicts its module's")
    require_own_spaces(config, *spaces_of(content))
    require_whole("its step", content["step"], 0, 1 << 40)
    for name in ("seed", "image_size"):
        require_whole(f"its {name}", content["config"].get(name, 0), 0, 1 << 40)
    trained_on = content.get("trained_on", {"device": "", "precision": ""})
    words = (content["config"].get("precision", ""), trained_on["device"], trained_on["precision"])
    if not isinstance(content["epoch"], (int, float)) or not all(isinstance(word, str) for word in words):
        raise TypeError
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise AlignError(f"its weights do not fit its own description ({name} holds no weights)")
    check_weights(weights, config)


def spaces_of(content: dict) -> tuple[LatentSpace, LatentSpace]:
    """The latent spaces of VAE1 and VAE2 that a checkpoint's content records; unnamed ones, with the recorded scale and
    shift, in files that are older than names."""

    def space(recorded):
        if "space" in recorded:
            return LatentSpace.from_dict(recorded["space"])
        scale, shift = recorded.get("scaling_factor", 1.0), recorded.get("shift_factor", 0.0)
        if not (is_finite(scale) and is_finite(shift) and scale > 0):
            raise AlignError(f"its scaling_factor {shown(scale)} and shift_factor {shown(shift)} are no scale and shift")
        return LatentSpace.from_scale(None, recorded["channels"], recorded["stride"], scale, shift)

    return space(content["vae1"]), space(content["vae2"])
