"""The ladder of baselines: what people could do instead of the module, and how near each rung comes to the original.

    ladder = Ladder(pipeline, torch.float32)
    results = evaluate(ladder, loader)
    results["ladder"]["aligned"]["psnr"]

A library: it knows no command line and writes no file.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tqdm import tqdm

from evaluation.metrics import METRICS, Measures
from evaluation.sample import Sample
from evaluation.summary import finite, mean_and_interval, mean_of, summarise
from runtime.processes import gathered, is_main
from utils import UserError, autocast
from vae_align import AlignModule, align_module
from vaes.codec import Codec, reencode
from vaes.pipeline import PipelineWithVAEs


@dataclass(frozen=True)
class Rung:
    """One way to latents, called as `rung(latents, images)`: VAE1's scaled latents (B, C1, h, w) and images (B, 3, H, W) in
    [-1, 1] -> scaled latents of `codec`'s space, float32.

    Attributes:
        name: its key in every result; label: what tables call it.
        kind: "vae1", "vae2", "reencode", "linear", "untrained", or "aligned" for the main module and each further one.
        codec: the VAE that decodes its latents: VAE2, but for VAE1's own reconstruction.
        translate: what a call does; weights: the tensors that it computes with.
        caption: what stands below its picture; "": no picture is shown.
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

    @property
    def parameters(self) -> int:
        """How many weights it uses."""
        return sum(weight.numel() for weight in self.weights())


class Reconstruction(NamedTuple):
    """What a rung made of images: scaled latents (B, C, h, w), and the pictures (B, 3, H, W) that they decode to."""

    latents: torch.Tensor
    picture: torch.Tensor


class Ladder:
    """The rungs that mean something for a pipeline: without latents as input there is no linear map.

    Args:
        pipeline: its module is the rung "aligned".
        dtype: of the modules' autocast. In float32 a rung computes what `translate` computes; in a lower precision it differs
            by that precision's rounding, as training does.
        others: {label: pipeline} of the same two VAEs, whose modules are judged too: the rungs "aligned_2", "aligned_3", …
        only: names of rungs; the others are left out. None: all.
        more: further rungs of the same VAE2, below the others.

    Attributes:
        rungs: {name: `Rung`}, in the order in which tables show them.
        vae2: the rung that all others are held against, whether it is among `rungs` or not.
    """

    def __init__(self, pipeline: PipelineWithVAEs, dtype: torch.dtype, others: dict | None = None, only=None, more=()):
        self.pipeline = pipeline
        self.dtype = dtype
        rungs = self._baselines() + self._modules(others or {})
        self.vae2 = next(rung for rung in rungs if rung.kind == "vae2")
        self.rungs = {rung.name: rung for rung in rungs if only is None or rung.name in only}
        self.rungs |= {rung.name: rung for rung in more}

    def _baselines(self) -> list[Rung]:
        codec1, codec2 = self.pipeline.codec1, self.pipeline.codec2

        return [
            Rung("vae1", "VAE1 reconstruction", "vae1", codec1,
                 lambda latents, images: latents, lambda: encoder_weights(codec1), "VAE1"),
            Rung("vae2", "VAE2 reconstruction", "vae2", codec2,
                 lambda latents, images: codec2.encode(images), lambda: encoder_weights(codec2), "VAE2"),
            Rung("reencode", "decode with VAE1, re-encode with VAE2", "reencode", codec2,
                 lambda latents, images: reencode(latents, codec1, codec2),
                 lambda: decoder_weights(codec1) + encoder_weights(codec2), "re-encode"),
        ]  # fmt: skip

    def _modules(self, others: dict[str, PipelineWithVAEs]) -> list[Rung]:
        modules = [self.pipeline.module, *(other.module for other in others.values())]
        with_map = next((module for module in modules if module.has_ridge), None)
        codec2 = self.pipeline.codec2

        def by_module(module: Callable[[], AlignModule], name, label, kind, caption=""):
            return Rung(name, label, kind, codec2, self._translation(module), lambda: module().parameters(), caption)

        def known(module: AlignModule) -> Callable[[], AlignModule]:
            return lambda: module

        rungs = []
        if with_map is not None:
            rungs.append(
                Rung("linear", "closed-form linear map", "linear", codec2,
                     lambda latents, images: with_map.linear_map(latents),
                     lambda: (with_map.ridge_weight, with_map.ridge_bias))
            )  # fmt: skip
        untrained = functools.cache(lambda: untrained_module(self.pipeline))  # built by the first call, if there is one
        rungs.append(by_module(untrained, "untrained", "untrained module", "untrained"))
        rungs.append(by_module(known(modules[0]), "aligned", "aligned", "aligned", "aligned"))
        for number, (label, module) in enumerate(zip(others, modules[1:]), 2):
            rungs.append(by_module(known(module), f"aligned_{number}", label, "aligned", f"aligned {number}"))
        return rungs

    def _translation(self, module: Callable[[], AlignModule]):
        def translate(latents, images):
            takes = module().config.input_types
            given = (latents if "latent" in takes else None, images if "image" in takes else None)
            with autocast(self.pipeline.device, self.dtype):
                return module()(*given).float()

        return translate

    @property
    def captions(self) -> dict[str, str]:
        """{rung: what stands below its picture}, of the rungs that are shown."""
        return {name: rung.caption for name, rung in self.rungs.items() if rung.caption}

    @torch.inference_mode()
    def reconstruct(self, images: torch.Tensor, only=None) -> dict[str, Reconstruction]:
        """{rung: what it makes of `images` (B, 3, H, W) in [-1, 1]}, of every rung and VAE2, or of those named in `only`."""
        latents1 = self.pipeline.codec1.encode(images)
        made = {}
        for name, rung in {"vae2": self.vae2, **self.rungs}.items():
            if only is None or name in only:
                latents = rung(latents1, images)
                made[name] = Reconstruction(latents, rung.codec.decode(latents))
        return made

    @torch.inference_mode()
    def costs(self, image_size: int, repeats: int = 3) -> dict[str, dict]:
        """What it takes to come by VAE2's latents of one image: {rung: {milliseconds, parameters, macs}}.

        For "vae2" from the image, for the others from VAE1's latents (and the image, where the module takes it). Decoding with
        VAE2, which all have in common, is left out. `macs` are multiply-adds of convolutions and matrix products; the time is
        the fastest of `repeats` runs at batch size 1.
        """
        from torch.utils.flop_counter import FlopCounterMode

        images = torch.zeros(1, 3, image_size, image_size, device=self.pipeline.device)
        latents1 = self.pipeline.codec1.encode(images)
        costs = {}
        for name, rung in self.rungs.items():
            if rung.kind == "vae1":
                continue
            with FlopCounterMode(display=False) as counter:
                rung(latents1, images)
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                rung(latents1, images)[0, 0, 0, 0].item()  # reading a value waits for the device
                times.append(time.perf_counter() - start)
            costs[name] = {
                "milliseconds": 1e3 * min(times),
                "parameters": rung.parameters,
                "macs": counter.get_total_flops() // 2,
            }
        return costs


def encoder_weights(codec: Codec) -> list[torch.Tensor]:
    """The weights that a VAE encodes with."""
    return _weights_of(codec.vae.model, "encoder", "quant_conv")


def decoder_weights(codec: Codec) -> list[torch.Tensor]:
    """The weights that a VAE decodes with."""
    return _weights_of(codec.vae.model, "decoder", "post_quant_conv")


def _weights_of(model: torch.nn.Module, coder: str, quant: str) -> list[torch.Tensor]:
    modules = getattr(model, coder), getattr(model, quant, None)
    return [weight for module in modules if module is not None for weight in module.parameters()]


def untrained_module(pipeline: PipelineWithVAEs) -> AlignModule:
    """The pipeline's module as it would start at random, from its run's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(pipeline.progress["config"].get("seed", 42))
        return align_module(pipeline.config).to(pipeline.device).eval()


def evaluate(
    ladder: Ladder,
    loader,
    measures: Measures | None = None,
    visit: Callable[[dict, dict[str, Reconstruction]], None] | None = None,
    costs: bool = False,
    show_progress: bool = True,
    accelerator=None,
) -> dict:
    """Judge every rung of `ladder` on every image of `loader`. UserError when not one image could be read.

    Several processes judge a set together: each calls this with its `accelerator` and its share of the batches (see
    `dataloader.eval_loader`), and each gets the figures of the whole set, to the last digit those of one process.

    Args:
        loader: batches {pixel_values (B, 3, H, W) in [-1, 1], index, path, unreadable}, see `dataloader.eval_loader`.
        measures: which metrics beyond the plain ones; by default SSIM alone. Good for one evaluation.
        visit: called with (batch, what `Ladder.reconstruct` returned) for each batch, for pictures and for what is summed up.
        costs: also measure what each rung costs (see `Ladder.costs`), at the size of the last batch, on the main process.

    Returns a dict of plain values:
        images: how many were judged; unreadable: the messages of those that could not be.
        ladder: {rung: {label, caption: a short one, kind (see `Rung`), every metric of `metrics.METRICS`}}: means over images.
            What begins with `latent` is against VAE2's posterior mean; `psnr_vs_vae2`, `ssim_vs_vae2` and `colour_bias`
            (signed 8-bit levels of R, G, B) are against VAE2's own reconstruction; `detail` and the statistics of latents are
            relative to VAE2's; the others are against the original. None where undefined or not measured. milliseconds,
            parameters and macs come with `costs` only.
        summary: {rung: {metric: {mean, std, worst, worst_image}}}, see `summary.summarise`.
        intervals: {rung: {metric: half the width of its figure's 95% interval}}, as far as there is one.
        per_image: {rung: {metric: [value per image]}}; paths: the images' names in the same order; indices: their places.
    """
    measures = measures or Measures()
    module = ladder.pipeline.module
    was_training = module.training
    module.eval()
    judged = []
    show_progress = show_progress and is_main(accelerator)
    for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=not show_progress):
        judged.append(_judge_batch(ladder, batch, measures, visit))
    judged = _in_order(gathered(judged, accelerator))
    measures.gather(accelerator)
    unreadable = [message for batch in judged for message in batch.unreadable]
    paths = [path for batch in judged for path in batch.paths]
    if not paths:
        raise UserError(f"no image could be evaluated; the last failure: {(unreadable or ['the folder is empty'])[-1]}")
    values = {name: {} for name in ladder.rungs}
    for batch in judged:
        for name, metrics in batch.values.items():
            for metric, per_image in metrics.items():
                values[name].setdefault(metric, []).extend(per_image)
    figures = _means(ladder, values, measures)
    image_size = [batch.image_size for batch in judged if batch.paths][-1]
    for name, cost in ladder.costs(image_size).items() if costs and is_main(accelerator) else ():
        figures[name] |= cost
    module.train(was_training)
    return {
        "images": len(paths),
        "unreadable": unreadable,
        "ladder": figures,
        "summary": summarise(values),
        "intervals": _intervals(values, measures),
        "per_image": finite(values),
        "paths": paths,
        "indices": [index for batch in judged for index in batch.indices],
    }


@dataclass
class JudgedBatch:
    """What is kept of a batch, as plain values: names, places in the set and width of its images, messages of those that could
    not be read, and {rung: {metric: [value per image]}}."""

    paths: list[str]
    indices: list[int]
    image_size: int
    unreadable: list[str]
    values: dict


def _judge_batch(ladder: Ladder, batch: dict, measures: Measures, visit) -> JudgedBatch:
    values = {}
    if batch["path"]:
        images = batch["pixel_values"].to(ladder.pipeline.device)
        made = ladder.reconstruct(images)
        target, index = made["vae2"], tuple(batch["index"].tolist())
        for name, rung in ladder.rungs.items():
            latents = None if rung.kind == "vae1" else made[name].latents
            sample = Sample(images, made[name].picture, latents, target.picture, target.latents, index)
            values[name] = measures.of_each_image(sample)
            measures.add(name, sample)
        if visit:
            visit(batch, made)
    return JudgedBatch(batch["path"], batch["index"].tolist(), batch["pixel_values"].shape[-1], batch["unreadable"], values)


def _in_order(of_each_process: list[list[JudgedBatch]]) -> list[JudgedBatch]:
    """The batches of all processes in the order of the set: of P processes, number r has the batches r, r + P, …"""
    turns = itertools.zip_longest(*of_each_process)
    return [batch for turn in turns for batch in turn if batch is not None]


def _means(ladder: Ladder, values: dict, measures: Measures) -> dict:
    of_the_set = measures.of_the_set()
    not_measured = dict.fromkeys(name for name, metric in METRICS.items() if metric.scope != "cost")
    figures = {}
    for name, rung in ladder.rungs.items():
        figures[name] = {"label": rung.label, "kind": rung.kind, "caption": rung.caption or rung.kind} | not_measured
        figures[name] |= {metric: mean_of(numbers) for metric, numbers in values[name].items()}
        figures[name] |= finite({metric: values_of_set.get(name) for metric, values_of_set in of_the_set.items()})
    return figures


def _intervals(values: dict, measures: Measures) -> dict:
    of_the_set = measures.intervals_of_the_set()
    intervals = {}
    for rung, metrics in values.items():
        own = {name: mean_and_interval(numbers)[1] for name, numbers in metrics.items() if METRICS[name].components == ()}
        own |= {name: by_rung.get(rung) for name, by_rung in of_the_set.items()}
        intervals[rung] = {name: finite(interval) for name, interval in own.items() if interval is not None}
    return intervals
