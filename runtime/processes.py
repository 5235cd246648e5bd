"""This process among the others of a run: 🤗 Accelerate's view of them, and what they tell each other."""

from __future__ import annotations

import argparse
import datetime
import logging
import os
from typing import TYPE_CHECKING

import torch

from runtime.device import ACCELERATE_NAMES, get_dtype
from utils import UserError, one_line

if TYPE_CHECKING:
    from accelerate import Accelerator

LAUNCHER_VARIABLES = ("ACCELERATE_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_", "FSDP_")

MEETING = datetime.timedelta(minutes=10)  # within which all processes of a run must have come, or there are no others
WORK = datetime.timedelta(hours=12)  # for which they wait for each other afterwards, such as while another run builds the cache

log = logging.getLogger(__name__)


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate's view of this process, by `args.device` and `args.precision`: its device and its place among the others."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes", "on"):
            raise UserError(
                f"ACCELERATE_USE_{name}: a launcher's config asks for it, and this program does not run under it; run "
                "`accelerate config` anew without it, or start with plain `python`"
            )
    for name in ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND"):  # flags and seed alone shape weights
        if os.environ.pop(name, "1").lower() not in ("", "1", "no"):
            log.warning("%s of the environment has no effect", name)
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Accelerate takes the current one
    precision = ACCELERATE_NAMES[get_dtype(args.precision)]
    if AcceleratorState._shared_state:  # of an earlier run in this interpreter, which may have had another device or precision
        earlier = AcceleratorState()
        if (earlier.mixed_precision, earlier.device.type) != (precision, device.type):
            AcceleratorState._reset_state(reset_partial_state=earlier.device.type != device.type)
    try:
        patience = InitProcessGroupKwargs(timeout=MEETING)
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision, kwargs_handlers=[patience])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.distributed_c10d._set_pg_timeout(WORK, torch.distributed.group.WORLD)
        return accelerator
    except (ImportError, ValueError, RuntimeError, KeyError) as error:  # variables that launchers set, and that do not fit
        AcceleratorState._reset_state(reset_partial_state=True)
        found = ", ".join(sorted(name for name in os.environ if name.startswith(LAUNCHER_VARIABLES))) or "none"
        raise UserError(
            f"the launcher's environment does not fit this program ({one_line(error)}); its variables: {found}; unset them, or "
            "start with `accelerate launch`"
        ) from None


def is_main(accelerator: Accelerator | None) -> bool:
    """Whether this process is the one that writes; without an accelerator it is the only one."""
    return accelerator is None or accelerator.is_main_process


def gathered(value, accelerator: Accelerator | None) -> list:
    """[the value of each process], plain values, in the order of the processes; every process gets the list."""
    if accelerator is None or accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def summed(tensor: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """The sum over all processes of tensors of one shape, on the CPU."""
    return accelerator.reduce(tensor.to(accelerator.device), "sum").cpu()
