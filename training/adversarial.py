"""The game between the module and a discriminator, which learns to tell what the module makes from what VAE2 makes.

A squared error rewards the mean of all that a target could be, which is smooth. A discriminator does not see the one target but
what targets look like, and so asks for texture that a mean lacks. Both sides have the hinge loss (Lim & Ye 2017,
arXiv:1705.02894): the discriminator's is the mean of `max(0, 1 - logit)` on VAE2's and `max(0, 1 + logit)` on the module's, 2
where it knows nothing and 0 where it is sure of everything; the module's is the mean of `-logit`.

A step of the game is a part of the module's step: `term` before the module's backward pass, `learn` after its update, on what
the module made before it. No extra pass of the module, the decoder or the frozen features is needed.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

from training.bad_steps import leave_out
from training.meter import Meter
from training.restore import load_optimizer, on_cpu

log = logging.getLogger(__name__)

BETAS = (0.5, 0.95)  # short memories: what the discriminator judges changes with every step
WEIGHT_DECAY = 1e-4
SILENT = 0.1  # a mean hinge loss of the discriminator below which its gradient has all but gone
MEMORY = 0.99  # of that mean, per step: it begins at 2, so 300 steps of a loss of 0 pass before it is silent


@dataclass(frozen=True)
class Rules:
    """When and how fast discriminators play.

    Attributes:
        learning_rate: of their AdamW. start_step: at which they begin, until when they cost nothing.
        warmup_steps: after that, in which the weight of the module's term grows from 0 while the discriminator learns.
    """

    learning_rate: float
    start_step: int
    warmup_steps: int


class Adversary:
    """A discriminator with its optimizer and its place in the game. It is part of a run's state and not of the module's file.

    Args:
        flag: the one that gave `weight`, the factor of the module's term; its name, such as "latent_adversarial_weight".
        discriminator: a network from `training.discriminators`; it is moved to `device` and computes in `dtype`.

    Its gradients are averaged over the processes here, without DDP: its networks take part in two backward passes of each step,
    once frozen and once not, which DDP's bookkeeping does not allow for.
    """

    def __init__(
        self, flag: str, discriminator: nn.Module, weight: float, rules: Rules, device: torch.device, dtype: torch.dtype
    ):
        self.flag = flag
        self.discriminator = discriminator.to(device, memory_format=torch.channels_last)
        self.weight = weight
        self.rules = rules
        self.dtype = dtype
        self.optimizer = torch.optim.AdamW(
            discriminator.parameters(),
            rules.learning_rate,
            BETAS,
            weight_decay=WEIGHT_DECAY,
            fused=device.type in ("cuda", "cpu"),
        )
        self._meter = Meter(device, (3,))
        self._recent_loss = torch.full((), 2.0, device=device)
        self._complained = False

    def plays(self, step: int) -> bool:
        """Whether the game is on at a step, counted from 0."""
        return step >= self.rules.start_step

    def term(self, made: list[torch.Tensor], step: int) -> torch.Tensor:
        """The module's weighted term for what it made: the discriminator's inputs, with their gradient."""
        self.discriminator.requires_grad_(False).eval()  # in eval mode the spectral norms stand still
        logits = self._judge(made)
        ramp = min(1.0, (step - self.rules.start_step + 1) / max(1, self.rules.warmup_steps))
        return self.weight * ramp * -sum(each.mean() for each in logits) / len(logits)

    def learn(
        self, real: list[torch.Tensor], made: list[torch.Tensor], term: torch.Tensor, ok: torch.Tensor, accelerator
    ) -> None:
        """One step of the discriminator on VAE2's and the module's inputs, which need no gradient; no step if the module's
        was not `ok` or this one's gradient is not finite. `term` is what `term` returned for them, for the log."""
        self.discriminator.requires_grad_(True).train()
        on_real, on_made = self._judge(real), self._judge(made)
        loss = sum(F.relu(1 - r).mean() + F.relu(1 + m).mean() for r, m in zip(on_real, on_made)) / len(on_real)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = list(self.discriminator.parameters())
        _average_gradients(parameters, accelerator)
        ok = ok & nn.utils.clip_grad_norm_(parameters, math.inf).isfinite()
        leave_out(self.optimizer, ok)
        self.optimizer.step()
        with torch.no_grad():
            right = [((r > 0).float().mean() + (m < 0).float().mean()) / 2 for r, m in zip(on_real, on_made)]
            self._meter.add(torch.stack([term.detach(), loss, sum(right) / len(right)]), ok)
            self._recent_loss = torch.where(ok, self._recent_loss.lerp(loss, 1 - MEMORY), self._recent_loss)

    def read(self, accelerator) -> dict[str, float]:
        """The means since the last time: the module's weighted term, the discriminator's loss and its accuracy, the share of
        places that it judges rightly. Says once when the discriminator has nothing left to learn. Waits for the device."""
        recent = accelerator.reduce(self._recent_loss, "mean").item()
        if recent < SILENT and not self._complained:
            self._complained = True
            if accelerator.is_main_process:
                with logging_redirect_tqdm():
                    log.warning(
                        "--%s: its discriminator tells all that the module makes from what VAE2 makes (mean loss %.3f), "
                        "so it no longer teaches the module; start anew with a lower --adversarial_lr or --learning_rate",
                        self.flag, recent,
                    )  # fmt: skip
        where = self.flag.removesuffix("adversarial_weight")
        names = (f"{where}adversarial", f"{where}discriminator_loss", f"{where}discriminator_accuracy")
        return dict(zip(names, self._meter.read(accelerator)))

    def state_dict(self) -> dict:
        """Tensors on the CPU, and plain values."""
        return {
            "discriminator": on_cpu(self.discriminator.state_dict()),
            "optimizer": on_cpu(self.optimizer.state_dict()),
            "recent_loss": self._recent_loss.cpu(),
            "complained": self._complained,
            **self._meter.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """RuntimeError or ValueError for the state of another discriminator."""
        self.discriminator.load_state_dict(state["discriminator"])
        load_optimizer(self.optimizer, state["optimizer"])
        self._meter.load_state_dict(state)
        self._recent_loss = state["recent_loss"].reshape(()).to(self._recent_loss)
        self._complained = bool(state["complained"])

    def _judge(self, inputs):
        return [logits.float() for logits in self.discriminator(*(tensor.to(self.dtype) for tensor in inputs))]


def _average_gradients(parameters: list, accelerator) -> None:
    """Give every process the mean of all processes' gradients, in one exchange."""
    if accelerator.num_processes > 1:
        gradients = [parameter.grad for parameter in parameters]
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(mean.view_as(gradient))
