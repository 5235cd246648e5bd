"""The rungs that training cannot move, measured once for a set of evaluation images and remembered."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch

from evaluation.ladder import Ladder, evaluate
from evaluation.per_image import to_8bit
from runtime.processes import gathered
from vaes.pipeline import PipelineWithVAEs

MOVED = ("aligned",)  # the rungs that training moves


@dataclass
class FixedRungs:
    """The memory of an evaluator that judges the same images again and again while a module is trained.

    Attributes:
        images: a digest of the pixels that the rungs were measured on; "" before the first evaluation.
        figures: {rung: {metric: value}} of every rung but the trained module's.
        unreadable: messages of the last evaluation, one for each image that could not be decoded.
    """

    images: str = ""
    figures: dict = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    def evaluate(self, pipeline: PipelineWithVAEs, loader, dtype: torch.dtype, accelerator=None) -> dict:
        """{rung: {metric: value}} of the whole ladder (see `ladder.evaluate`) on the images of `loader`.

        The first call measures every rung; the next ones only the module, as long as the pixels are the same. With an
        `accelerator` its processes do so together, each on its share of the images.
        """
        seen = _PixelDigest()
        if self.figures:
            results = evaluate(Ladder(pipeline, dtype, only=MOVED), loader, visit=seen, accelerator=accelerator)
            self.unreadable, moved = results["unreadable"], results["ladder"]
            if seen.hexdigest(accelerator) == self.images:
                return self.figures | moved
            seen = _PixelDigest()
        results = evaluate(Ladder(pipeline, dtype), loader, visit=seen, accelerator=accelerator)
        self.unreadable, ladder = results["unreadable"], results["ladder"]
        self.images = seen.hexdigest(accelerator)
        self.figures = {rung: figures for rung, figures in ladder.items() if rung not in MOVED}
        return ladder

    def state_dict(self) -> dict:
        return {"images": self.images, "figures": self.figures}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`. Whether the images are still the same is found at the next evaluation."""
        self.images = str(state["images"])
        self.figures = dict(state["figures"])


class _PixelDigest:
    """A digest of the images of every batch that it is called with; it depends neither on the batch size nor on which process
    had which batch."""

    def __init__(self):
        self._of_each_image = []

    def __call__(self, batch: dict, made: dict) -> None:
        for index, image in zip(batch["index"].tolist(), to_8bit(batch["pixel_values"]).to(torch.uint8)):
            content = repr(tuple(image.shape)).encode() + image.contiguous().cpu().numpy().tobytes()
            self._of_each_image.append((index, hashlib.blake2b(content, digest_size=16).digest()))

    def hexdigest(self, accelerator=None) -> str:
        """Of the images of all processes."""
        digest = hashlib.blake2b(digest_size=16)
        for _, of_image in sorted(image for images in gathered(self._of_each_image, accelerator) for image in images):
            digest.update(of_image)
        return digest.hexdigest()
