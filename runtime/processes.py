"""This process among the others of a run: 🤗 Accelerate's view of them, and the values that they exchange."""

from __future__ import annotations

import datetime
import functools
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import distributed

from utils import UserError, get_dtype, one_line

if TYPE_CHECKING:
    from accelerate import Accelerator

ACCELERATE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}
LAUNCHERS = ("ACCELERATE_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "TORCHELASTIC_", "OMPI_COMM_", "PMI_", "MPI_", "MV2_")
MEETING = datetime.timedelta(minutes=10)  # within which all processes of a run must have come, or there are no others
WORK = datetime.timedelta(hours=12)  # for which they wait for each other afterwards, such as while the cache is built

log = logging.getLogger(__name__)


def create_accelerator(device: str | torch.device, precision: str) -> Accelerator:
    """Accelerate's view of this process: its device and its place among the others.

    In all processes but the first the log level becomes ERROR: what all of them find, one says. UserError where the launcher's
    environment variables do not fit.
    """
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
    found = ", ".join(sorted(name for name in os.environ if name.startswith(LAUNCHERS))) or "none"  # Accelerate adds to them
    device, mixed = torch.device(device), ACCELERATE_NAMES[get_dtype(precision)]
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Accelerate takes the current one
    # an earlier run in this interpreter may have had another device or precision
    AcceleratorState._reset_state(reset_partial_state=not (distributed.is_available() and distributed.is_initialized()))
    try:
        patience = InitProcessGroupKwargs(init_method="meeting://", timeout=WORK)
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed, kwargs_handlers=[patience])
    except (ImportError, ValueError, RuntimeError, KeyError) as error:  # variables that launchers set, and that do not fit
        raise UserError(
            f"the launcher's environment does not fit this program ({one_line(error)}); its variables: {found}; unset them, or "
            "start with `accelerate launch`"
        ) from None
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.ERROR)
    return accelerator


def _meet(url: str, timeout: datetime.timedelta, **options):
    """How the processes find each other, within `MEETING`; torch would give this the patience of their later work."""
    yield from distributed.rendezvous(url.replace("meeting", "env", 1), timeout=MEETING, **options)


if distributed.is_available():
    distributed.register_rendezvous_handler("meeting", _meet)


def is_main(accelerator: Accelerator | None) -> bool:
    """Whether this process is the one that writes; without an accelerator it is the only one."""
    return accelerator is None or accelerator.is_main_process


def place_of(accelerator: Accelerator | None) -> tuple[int, int]:
    """(the number of this process, the number of all)."""
    return (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)


def gathered(value, accelerator: Accelerator | None) -> list:
    """[the value of each process], plain values, in the order of the processes; every process gets the list."""
    if place_of(accelerator)[1] == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def from_first(work: Callable[[], object], accelerator: Accelerator | None):
    """The result of `work()`, a plain value, which only the first process calls; every process gets it."""
    value = [work() if is_main(accelerator) else None]
    if place_of(accelerator)[1] > 1:
        distributed.broadcast_object_list(value)
    return value[0]


@functools.lru_cache(1)
def _hosts(accelerator: Accelerator):
    return distributed.new_group(timeout=WORK, backend="gloo")


def together(work: Callable[[], object], accelerator: Accelerator | None):
    """The result of `work()` in this process. An error in one process is raised in all of them, so that none waits for it.

    The processes wait for each other, and not for their devices. An error that the first process tells too is marked `told`.
    """
    result = failure = None
    try:
        result = work()
    except (Exception, SystemExit) as error:
        failure = error
    if accelerator is not None and accelerator.num_processes > 1:
        failed = torch.tensor(int(failure is not None))
        distributed.all_reduce(failed, distributed.ReduceOp.MAX, group=_hosts(accelerator))
        if failed:
            failures = [None] * accelerator.num_processes
            distributed.all_gather_object(failures, failure, group=_hosts(accelerator))
            failure = failure or next(filter(None, failures))
            failure.told = not accelerator.is_main_process
    if failure is not None:
        raise failure
    return result


def summed(tensor: torch.Tensor, accelerator: Accelerator | None) -> torch.Tensor:
    """The sum over all processes of tensors of one shape, on the CPU."""
    if place_of(accelerator)[1] > 1:
        tensor = accelerator.reduce(tensor.to(accelerator.device), "sum")
    return tensor.cpu()
