"""The ladder of baselines: the alternatives to the module, and how near each comes to the original.

    ladder = Ladder(pipeline, torch.float32)
    results = evaluate(ladder, loader)
    results["ladder"]["aligned"]["psnr"]

A library: it knows no command line and writes no file.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from tqdm import tqdm

from evaluation.figures import Sample, finite, mean_and_interval, mean_of, on_cpu, to_8bit
from evaluation.metrics import METRICS, Measures, summarise
from runtime.processes import gathered, is_main, together
from utils import UserError, autocast, one_line
from vae_align import AlignModule, align_module
from vaes.codec import Codec, reencode
from vaes.pipeline import PipelineWithVAEs

MOVED = ("aligned",)  # the rungs that training moves
KEPT_BYTES = 256e6  # of pictures that an evaluation keeps for the next one

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rung:
    """One way to latents, called as `rung(latents, images)`: VAE1's scaled latents (B, C1, h, w) and images (B, 3, H, W) in
    [-1, 1] -> scaled latents of `codec`'s space, float32.

    Attributes:
        name: its key in every result; label: its name in tables.
        kind: "vae1", "vae2", "reencode", "linear", "untrained", or "aligned" for the main module and each further one.
        codec: the VAE that decodes its latents: VAE2, but for VAE1's own reconstruction.
        translate: the function that a call runs; weights: the tensors that it computes with.
        caption: the text below its picture; "": no picture is shown.
    """

    name: str
    label: str
    kind: str
    codec: Codec
    translate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    weights: Callable[[], Iterable[torch.Tensor]]
    caption: str = ""

    def __call__(self, latents: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return self.translate(latents, images)


class Reconstruction(NamedTuple):
    """Scaled latents (B, C, h, w) that a rung made of images, and the pictures (B, 3, H, W) that they decode to."""

    latents: torch.Tensor
    picture: torch.Tensor


class Ladder:
    """The rungs that mean something for a pipeline: without latents as input there is no linear map.

    Args:
        pipeline: its module is the rung "aligned".
        dtype: of the modules' autocast. In float32 a rung computes the same as `translate`; in a lower precision it differs
            by that precision's rounding, as training does.
        others: {label: pipeline} of the same two VAEs, whose modules are judged too: the rungs "aligned_2", "aligned_3", …
        only: names of rungs; the others are left out. None: all.
        more: further rungs of the same VAE2, below the others.

    Attributes:
        rungs: {name: `Rung`}, in the order in which tables show them.
        vae2: the rung that all others are compared with, whether it is among `rungs` or not.
    """

    def __init__(self, pipeline: PipelineWithVAEs, dtype: torch.dtype, others: dict | None = None, only=None, more=()):
        self.pipeline = pipeline
        self.dtype = dtype
        rungs = self._all_rungs(others or {})
        self.vae2 = next(rung for rung in rungs if rung.kind == "vae2")
        self.rungs = {rung.name: rung for rung in rungs if only is None or rung.name in only}
        self.rungs |= {rung.name: rung for rung in more}

    def _all_rungs(self, others: dict[str, PipelineWithVAEs]) -> list[Rung]:
        codec1, codec2 = self.pipeline.codec1, self.pipeline.codec2
        modules = [self.pipeline.module, *(other.module for other in others.values())]
        with_map = next((module for module in modules if module.has_ridge), None)
        untrained = functools.cache(lambda: untrained_module(self.pipeline))  # built by the first call, if there is one
        rungs = [
            Rung("vae1", "VAE1 reconstruction", "vae1", codec1,
                 lambda latents, images: latents, lambda: encoder_weights(codec1), "VAE1"),
            Rung("vae2", "VAE2 reconstruction", "vae2", codec2,
                 lambda latents, images: codec2.encode(images), lambda: encoder_weights(codec2), "VAE2"),
            Rung("reencode", "decode with VAE1, re-encode with VAE2", "reencode", codec2,
                 lambda latents, images: reencode(latents, codec1, codec2),
                 lambda: decoder_weights(codec1) + encoder_weights(codec2), "re-encode"),
        ]  # fmt: skip
        if with_map is not None:
            rungs.append(
                Rung("linear", "closed-form linear map", "linear", codec2,
                     lambda latents, images: with_map.linear_map(latents),
                     lambda: (with_map.ridge_weight, with_map.ridge_bias))
            )  # fmt: skip
        rungs.append(self._rung_of(untrained, "untrained", "untrained module", "untrained"))
        rungs.append(self._rung_of(lambda: modules[0], "aligned", "aligned", "aligned", "aligned"))
        for number, (label, module) in enumerate(zip(others, modules[1:]), 2):
            caption = f"aligned {number}"
            rungs.append(self._rung_of(lambda module=module: module, f"aligned_{number}", label, "aligned", caption))
        return rungs

    def _rung_of(self, module: Callable[[], AlignModule], name: str, label: str, kind: str, caption: str = "") -> Rung:
        def translate(latents, images):
            takes = module().config.input_types
            given = (latents if "latent" in takes else None, images if "image" in takes else None)
            with autocast(self.pipeline.device, self.dtype):
                return module()(*given).float()

        return Rung(name, label, kind, self.pipeline.codec2, translate, lambda: module().parameters(), caption)

    @property
    def captions(self) -> dict[str, str]:
        """{rung: the text below its picture}, for the rungs that are shown."""
        return {name: rung.caption for name, rung in self.rungs.items() if rung.caption}

    @torch.inference_mode()
    def reconstruct(self, images: torch.Tensor, only=None, kept: dict | None = None) -> dict[str, Reconstruction]:
        """{rung: its `Reconstruction` of `images` (B, 3, H, W) in [-1, 1]}: every rung and VAE2, or those named in `only`.

        `kept`: an empty dict, which then holds VAE1's latents and VAE2's reconstruction for the next call with these images.
        """
        kept = {} if kept is None else kept
        latents1 = kept["latents1"] if kept else self.pipeline.codec1.encode(images)
        made = {}
        for name, rung in {"vae2": self.vae2, **self.rungs}.items():
            if name == "vae2" and kept:
                made[name] = kept[name]
            elif only is None or name in only:
                latents = rung(latents1, images)
                made[name] = Reconstruction(latents, rung.codec.decode(latents))
        kept |= {"latents1": latents1, "vae2": made.get("vae2")}
        return made

    @torch.inference_mode()
    def costs(self, image_size: int, repeats: int = 3) -> dict[str, dict]:
        """The cost of VAE2's latents of one image: {rung: {milliseconds, parameters, macs}}.

        For "vae2" from the image, for the others from VAE1's latents (and the image, where the module takes it). Decoding with
        VAE2, which all have in common, is left out. `macs` are multiply-adds of convolutions and matrix products; the time is
        the fastest of `repeats` runs at batch size 1. A rung whose cost cannot be measured is left out with a warning.
        """
        images = torch.zeros(1, 3, image_size, image_size, device=self.pipeline.device)
        latents1 = self.pipeline.codec1.encode(images)
        costs = {}
        for name, rung in self.rungs.items():
            if rung.kind == "vae1":
                continue
            try:
                costs[name] = _cost(rung, latents1, images, repeats)
            except Exception as error:  # the set has been judged by now, and its figures must not be lost for want of a cost
                log.warning("%s: its cost cannot be measured (%s)", rung.label, one_line(error))
        return costs


def _cost(rung: Rung, latents: torch.Tensor, images: torch.Tensor, repeats: int) -> dict:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        rung(latents, images)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        rung(latents, images)[0, 0, 0, 0].item()  # reading a value waits for the device
        times.append(time.perf_counter() - start)
    return {
        "milliseconds": 1e3 * min(times),
        "parameters": sum(weight.numel() for weight in rung.weights()),
        "macs": counter.get_total_flops() // 2,
    }


def encoder_weights(codec: Codec) -> list[torch.Tensor]:
    """The weights that a VAE encodes with."""
    model = codec.vae.model
    modules = model.encoder, getattr(model, "quant_conv", None)
    return [weight for module in modules if module is not None for weight in module.parameters()]


def decoder_weights(codec: Codec) -> list[torch.Tensor]:
    """The weights that a VAE decodes with: all others, since not every class has a part named `decoder`."""
    of_encoder = {id(weight) for weight in encoder_weights(codec)}
    return [weight for weight in codec.vae.model.parameters() if id(weight) not in of_encoder]


def untrained_module(pipeline: PipelineWithVAEs) -> AlignModule:
    """The pipeline's module as it would start at random, from its run's seed."""
    with torch.random.fork_rng(devices=[]):  # the module is made on the CPU; no GPU's generator is touched
        torch.default_generator.manual_seed(pipeline.progress["config"].get("seed", 42))
        return align_module(pipeline.config).to(pipeline.device).eval()


def evaluate(
    ladder: Ladder,
    loader,
    measures: Measures | None = None,
    visit: Callable[[dict, dict[str, Reconstruction]], None] | None = None,
    show_progress: bool = True,
    accelerator=None,
    kept: dict | None = None,
) -> dict:
    """Judge every rung of `ladder` on every image of `loader`. UserError when not one image could be read.

    Several processes judge a set together: each calls this with its `accelerator` and its share of the batches (see
    `dataloader.eval_loader`), and each gets the figures of the whole set. They agree with those of one process to 1e-9.

    Args:
        loader: batches {pixel_values (B, 3, H, W) in [-1, 1], index, path, unreadable}, see `dataloader.eval_loader`.
        measures: which metrics beyond the plain ones; by default SSIM alone. Good for one evaluation.
        visit: called with (batch, the result of `Ladder.reconstruct`) for each batch, for pictures and further sums.
        kept: a dict that keeps of each batch what `Ladder.reconstruct` keeps, for the next evaluation of the same images.

    Returns a dict of plain values:
        images: how many were judged; unreadable: the messages of those that could not be.
        ladder: {rung: {label, caption: a short one, kind (see `Rung`), every metric of `metrics.METRICS`}}: means over images.
            Names with `latent` are against VAE2's posterior mean; `psnr_vs_vae2`, `ssim_vs_vae2` and `colour_bias`
            (signed 8-bit levels of R, G, B) are against VAE2's own reconstruction; `detail` and the statistics of latents are
            relative to VAE2's; the others are against the original. None where undefined or not measured. For milliseconds,
            parameters and macs see `Ladder.costs`.
        summary: {rung: {metric: {mean, std, worst, worst_image}}}, see `metrics.summarise`.
        intervals: {rung: {metric: half the width of its figure's 95% interval}}, as far as there is one.
        per_image: {rung: {metric: [value per image]}}; paths: the images' names in the same order; indices: their places.
    """
    measures = measures or Measures()
    module = ladder.pipeline.module
    was_training = module.training
    module.eval()
    show_progress = show_progress and is_main(accelerator)
    batches = tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=not show_progress)
    judged = together(lambda: [_judge_batch(ladder, batch, measures, visit, kept) for batch in batches], accelerator)
    judged = gathered(judged, accelerator)
    # of P processes, number r has the batches r, r + P, …
    judged = [batch for turn in itertools.zip_longest(*judged) for batch in turn if batch is not None]
    paths, indices, unreadable = ([item for batch in judged for item in batch[key]] for key in ("path", "index", "unreadable"))
    if not paths:
        raise UserError(f"no image could be evaluated; the last failure: {(unreadable or ['the folder is empty'])[-1]}")
    values = {name: {} for name in ladder.rungs}
    for batch in judged:
        for name, metrics in batch["values"].items():
            for metric, per_image in metrics.items():
                values[name].setdefault(metric, []).extend(per_image)
    figures, intervals = _figures_of(ladder, values, measures.of_the_set(accelerator))
    module.train(was_training)
    return {
        "images": len(paths),
        "unreadable": unreadable,
        "ladder": figures,
        "summary": summarise(values),
        "intervals": intervals,
        "per_image": finite(values),
        "paths": paths,
        "indices": indices,
    }


def _judge_batch(ladder: Ladder, batch: dict, measures: Measures, visit, kept: dict | None) -> dict:
    """The plain values of a batch, which processes exchange: {path, index, unreadable, values: {rung: {metric: [value per
    image]}}}."""
    index, values = batch["index"].tolist(), {}
    if batch["path"]:
        images = batch["pixel_values"] = batch["pixel_values"].to(ladder.pipeline.device)  # once, also for `visit`
        made = ladder.reconstruct(images, kept=None if kept is None else kept.setdefault(tuple(index), {}))
        target = made["vae2"]
        for name, rung in ladder.rungs.items():
            latents = None if rung.kind == "vae1" else made[name].latents
            sample = Sample(images, made[name].picture, latents, target.picture, target.latents, tuple(index))
            values[name] = measures.of_each_image(sample, name)
            measures.add(name, sample)
        moved = iter(on_cpu([numbers for of_rung in values.values() for numbers in of_rung.values()]))
        values = {name: {metric: next(moved).tolist() for metric in of_rung} for name, of_rung in values.items()}
        if visit:
            visit(batch, made)
    return {"path": batch["path"], "index": index, "unreadable": batch["unreadable"], "values": values}


def _figures_of(ladder: Ladder, values: dict, of_the_set: dict) -> tuple[dict, dict]:
    """(`ladder`, `intervals`) as `evaluate` returns them, from the values per image and the metrics of the set."""
    not_measured = dict.fromkeys(name for name, metric in METRICS.items() if metric.scope != "cost")
    figures, intervals = {}, {}
    for name, rung in ladder.rungs.items():
        own = {metric: by_rung.get(name, (None, None)) for metric, by_rung in of_the_set.items()}
        figures[name] = {"label": rung.label, "kind": rung.kind, "caption": rung.caption or rung.kind} | not_measured
        figures[name] |= {metric: mean_of(numbers) for metric, numbers in values[name].items()}
        figures[name] |= finite({metric: figure for metric, (figure, _) in own.items()})
        found = {
            metric: mean_and_interval(numbers)[1]
            for metric, numbers in values[name].items()
            if METRICS[metric].components == ()
        }
        found |= {metric: interval for metric, (_, interval) in own.items()}
        intervals[name] = {metric: finite(interval) for metric, interval in found.items() if interval is not None}
    return figures, intervals


# ----------------------------------------------------------------------------------------------------------------------
# Again and again on the same images


@dataclass
class FixedRungs:
    """The memory of an evaluator that judges the same images again and again while a module is trained: the rungs that training
    cannot move are measured once.

    Attributes:
        images: a digest of the pixels that the rungs were measured on; "" before the first evaluation.
        vaes: digests of both VAEs with which they were measured.
        figures: {rung: {metric: value}} of every rung but the trained module's.
        unreadable: messages of the last evaluation, one for each image that could not be decoded.
    """

    images: str = ""
    vaes: list[str] = field(default_factory=list)
    figures: dict = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    _kept: dict = field(default_factory=dict)

    def evaluate(
        self,
        pipeline: PipelineWithVAEs,
        loader,
        dtype: torch.dtype,
        accelerator=None,
        choices: tuple[str, ...] = ("ssim",),
        image_size: int = 256,
    ) -> dict:
        """{rung: {metric: value}} of the whole ladder (see `evaluate`) on the images of `loader`; for `choices` see `Measures`.
        ST-LPIPS is measured of the module alone.

        The first call measures every rung; the next ones only the module, as long as pixels and VAEs are the same. With an
        `accelerator` its processes do so together, each on its share of the images.
        """
        vaes = [pipeline.codec1.content, pipeline.codec2.content]

        def judge(only):
            seen = _PixelDigest()
            measures = Measures(choices, image_size, pipeline.device, st_lpips_of=MOVED)
            fits = 12 * image_size**2 * len(loader.dataset) < KEPT_BYTES
            options = {"accelerator": accelerator, "kept": self._kept if fits else None}
            results = evaluate(Ladder(pipeline, dtype, only=only), loader, measures, seen, **options)
            self.unreadable = results["unreadable"]
            return results["ladder"], seen.hexdigest(accelerator)

        if self.figures and self.vaes == vaes:
            moved, images = judge(MOVED)
            if images == self.images:
                return self.figures | moved
        self.vaes, self._kept = vaes, {}
        ladder, self.images = judge(None)
        self.figures = {rung: figures for rung, figures in ladder.items() if rung not in MOVED}
        return ladder

    def state_dict(self) -> dict:
        return {"images": self.images, "vaes": self.vaes, "figures": self.figures}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`. The next evaluation finds out whether the images are still the same."""
        self.images, self.vaes = str(state["images"]), list(state.get("vaes", ()))
        self.figures = dict(state["figures"])


class _PixelDigest:
    """A digest of the images of every batch that it is called with. It depends neither on the batch size nor on which process
    had which batch."""

    def __init__(self):
        self._of_each_image = []

    def __call__(self, batch: dict, made: dict) -> None:
        for index, image in zip(batch["index"].tolist(), to_8bit(batch["pixel_values"]).to(torch.uint8).cpu()):
            content = repr(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes()
            self._of_each_image.append((index, hashlib.blake2b(content, digest_size=16).digest()))

    def hexdigest(self, accelerator=None) -> str:
        """The digest over the images of all processes."""
        digest = hashlib.blake2b(digest_size=16)
        for _, of_image in sorted(image for images in gathered(self._of_each_image, accelerator) for image in images):
            digest.update(of_image)
        return digest.hexdigest()
