"""The loss that looks at the picture: what VAE2's frozen decoder shows of the aligned latents."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import torch
import torch.nn.functional as F

from latents.pipeline import PipelineWithVAEs, encoded_batches

COLOUR_RATE = 0.01  # of the remaining cast, per step: a hundred steps to correct it, and as many to average over
COLOUR_WINDOWS = 256  # which give VAE2's mean colours to a fifth of an 8-bit level
LARGEST_CORRECTION = 8 / 127.5  # eight 8-bit levels, so that weights that do not follow cannot lead the shift astray

KINDS = {"l1": F.l1_loss, "mse": F.mse_loss}


class DecodedImageLoss:
    """The weighted difference between the decoded aligned latents and a reference picture, in image values [-1, 1].

    Gradients flow through the frozen decoder into the aligned latents. To stay affordable it decodes the first
    `batch_size` items of a batch, of each a random window of `window` x `window` latents (0: the whole).

    Args:
        space: `vae_align.Codec` to decode with: VAE2's, or a cheaper one that shares its latents.
        weight, kind: factor of the difference by pixel; "l1" takes the absolute one, "mse" the squared one.
        reference: "original" compares with the image that was encoded, in VAE2's colours (see `correct_colours`), "vae2" with
            the decoder's view of VAE2's latents.
        margin: latents at the window's edge that are decoded but not compared, since the decoder lacks their surroundings.
        perceptual: a function (shown, wanted pictures) -> distances, such as LPIPS, or "decoder": how far the decoder's own
            features are from those of VAE2's latents (see `feature_distance`); perceptual_weight: its factor.
    """

    def __init__(self, space, batch_size: int, window: int, reference: str, seed: int, margin: int = 1, kind: str = "l1",
                 weight: float = 1.0, perceptual=None, perceptual_weight: float = 0.0):  # fmt: skip
        self.space, self.batch_size, self.window, self.reference = space, batch_size, window, reference
        self.seed, self.margin, self.difference, self.weight = seed, margin, KINDS[kind], weight
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        # by how much decoded images' mean R, G and B exceed the reference's: VAE2's own on average, and the last aligned ones'
        self.vae2_cast = self.cast = torch.zeros(3, device=space.vae.device)
        self.reference_shift = self.vae2_cast  # what is added to the reference, see `correct_colours`

    def __call__(self, aligned: torch.Tensor, target: torch.Tensor, images: torch.Tensor | None, step: int) -> torch.Tensor:
        """Aligned and target latents (B, C, h, w), images (B, 3, H, W) in [-1, 1] -> scalar. The window depends on
        (seed, step) alone, so that a resumed run draws the same."""
        windowed, inner = self._window(aligned.shape[2:], step)
        by_features = self.perceptual == "decoder"
        with decoder_features(self.space.vae, by_features) as features:
            shown = self.space.decode(windowed(aligned))
        if self.reference == "vae2" or by_features:
            with torch.no_grad(), decoder_features(self.space.vae, by_features) as wanted_features:
                wanted = self.space.decode(windowed(target))
        if self.reference == "original":
            wanted = windowed(images[: self.batch_size].to(shown.device, non_blocking=True), self.space.stride)
        self.cast = (shown.detach() - wanted)[inner].mean(dim=(0, 2, 3))
        wanted = wanted + self.reference_shift.view(3, 1, 1)
        loss = self.weight * self.difference(shown[inner], wanted[inner])
        if by_features:
            loss = loss + self.perceptual_weight * feature_distance(features, wanted_features)
        elif self.perceptual:
            loss = loss + self.perceptual_weight * self.perceptual(shown[inner].clamp(-1, 1), wanted[inner].clamp(-1, 1)).mean()
        return loss

    @torch.no_grad()
    def measure_vae2(self, pairs, accelerator) -> None:
        """Take VAE2's cast from training images: `pairs` of (VAE2's latents, images), as for a call."""
        total, count = torch.zeros_like(self.cast), 0
        for step, (target, images) in enumerate(pairs):
            self(target, target, images, step)
            total, count = total + self.cast, count + 1
        total, count = (accelerator.reduce(number, "sum") for number in (total, total.new_tensor(count)))
        self.vae2_cast = self.reference_shift = total / count.clamp_min(1)

    def correct_colours(self, ok: torch.Tensor, accelerator) -> None:
        """After a step that was `ok`, shift the reference's colours against the cast that its images had beyond VAE2's.

        A cast of a level or two is so small beside the errors of detail that the losses leave it where it is cheapest, mostly
        on the dark side. As an integral controller the shift grows until the cast's mean over many steps is VAE2's.
        """
        error = accelerator.reduce(torch.where(ok, self.cast - self.vae2_cast, 0), "mean")
        shift = self.reference_shift - COLOUR_RATE * error
        self.reference_shift = self.vae2_cast + (shift - self.vae2_cast).clamp(-LARGEST_CORRECTION, LARGEST_CORRECTION)

    def state_dict(self) -> dict:
        """The colours, with which a resumed run goes on; tensors on the CPU."""
        return {"vae2_cast": self.vae2_cast.cpu(), "reference_shift": self.reference_shift.cpu()}

    def load_state_dict(self, state: dict) -> None:
        self.vae2_cast, self.reference_shift = (state[name].to(self.cast.device) for name in ("vae2_cast", "reference_shift"))

    def _window(self, size: torch.Size, step: int):
        """Of a step, on latents of that height and width: the function that cuts the window out of a batch, and the index of
        the part of the decoded window that counts."""
        stride, (height, width) = self.space.stride, size
        high, wide = min(self.window or height, height), min(self.window or width, width)
        # drawn from beyond the edges and moved to them: else what is near them would hardly ever be seen
        at = 2 * np.random.default_rng((self.seed, step)).random(2) - 0.5
        top, left = (round(where * room) for where, room in zip(at.clip(0, 1), (height - high, width - wide)))

        def windowed(tensor, scale=1):
            tensor = tensor[: self.batch_size]
            return tensor[..., top * scale : (top + high) * scale, left * scale : (left + wide) * scale]

        # an edge of the window that is an edge of the image has nothing beyond it to miss
        margin = min(self.margin, (min(high, wide) - 1) // 2) * stride
        above, below, before, after = (margin * (cut > 0) for cut in (top, height - top - high, left, width - left - wide))
        return windowed, (..., slice(above, high * stride - below), slice(before, wide * stride - after))


@contextlib.contextmanager
def decoder_features(vae, wanted: bool = True):
    """Within this context collect what the stages of `vae`'s decoder put out: a list with a list of tensors per stage."""
    features, hooks = [], []
    for stage in decoder_stages(vae.decoder) if wanted else ():
        kept = []
        features.append(kept)
        hooks.append(stage.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output)))
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


def decoder_stages(decoder: torch.nn.Module) -> list[torch.nn.Module]:
    """The last layer at each resolution but the finest: an AutoencoderKL's up blocks, a tiny one's layers before upsampling."""
    if hasattr(decoder, "up_blocks"):
        return list(decoder.up_blocks)[:-1]
    return [layer for layer, following in itertools.pairwise(decoder.layers) if isinstance(following, torch.nn.Upsample)]


def feature_distance(features: list, wanted: list) -> torch.Tensor:
    """Mean squared difference relative to the wanted features' mean square, averaged over the stages: 0 where they agree."""
    distances = []
    for stage, reference in zip(features, wanted):
        stage, reference = torch.cat(stage).float(), torch.cat(reference).float()
        distances.append(F.mse_loss(stage, reference) / reference.square().mean().clamp_min(1e-12))
    return torch.stack(distances).mean()


def fit_colours(decoded: DecodedImageLoss, pipeline: PipelineWithVAEs, loader, accelerator) -> None:
    """Measure the cast of VAE2's reconstruction, to which the decoded loss leads the aligned images; where that is itself the
    reference it has none."""
    if decoded.reference == "vae2":
        return
    batches = encoded_batches(pipeline, loader, accelerator, COLOUR_WINDOWS, decoded.batch_size)
    decoded.measure_vae2(((target, batch.get("pixel_values")) for _, target, batch in batches), accelerator)
