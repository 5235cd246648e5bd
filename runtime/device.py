"""Which device, which precision, which memory layout: chosen by rule, said in one line."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from pathlib import Path

import torch

from utils import UserError, one_line

log = logging.getLogger(__name__)

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters in malloc.h
ACCELERATE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}


def get_dtype(precision: str) -> torch.dtype:
    """'bfloat16', 'float16' or 'float32' -> the torch dtype. UserError for any other name."""
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: choose from {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def resolve_device(name: str, typed: bool) -> torch.device:
    """The device to run on. A default that the machine lacks falls back with one warning; a typed one is an error."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use cuda, cuda:N, mps or cpu") from None
    present = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if device.type not in present:
        raise UserError(f"--device {name}: use cuda, cuda:N, mps or cpu")
    if present[device.type]() and (device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()):
        return device
    if typed:
        raise UserError(f"--device {name}: not available on this machine; use --device cpu or leave the flag out")
    fallback = next(kind for kind in ("cuda", "mps", "cpu") if present[kind]())
    log.warning("no %s here: running on %s", name, fallback)
    return torch.device(fallback)


def resolve_precision(precision: str, device: torch.device, typed: bool) -> str:
    """The precision to run in.

    On a CPU float16 has no gradient scaler and no speed, so bfloat16 stands in for it; and most CPUs are
    slower in bfloat16 than in float32 (see `cpu_has_bfloat16`), so there the default gives way (a typed flag does not).
    """
    get_dtype(precision)
    chosen = precision
    if device.type == "cpu":
        if precision == "float16":
            chosen = "bfloat16"
        if chosen == "bfloat16" and not (typed and precision == chosen) and not cpu_has_bfloat16():
            chosen = "float32"
        if chosen != precision:
            log.warning("--precision %s does not suit this CPU: using %s", precision, chosen)
    return chosen


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU with glibc, have malloc keep what large tensors free instead of giving it back to the system.

    By default every feature map of more than a few MB is a fresh mapping whose pages the kernel must clear: a third of a tiny
    VAE's encoding time. The process's memory does not shrink between batches in return. No effect elsewhere.
    """
    if device.type == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def require_compiler(device: torch.device) -> None:
    """UserError unless torch.compile works here: it needs a C++ compiler or Triton, and says so at the first step only."""
    try:
        torch.compile(lambda value: value * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # whichever of its many parts is missing
        reason = one_line(error, limit=200)
        raise UserError(f"--compile: torch.compile does not work on this machine ({reason}); leave the flag out") from None


def physical_memory() -> int:
    """Bytes of memory that this machine has, or its container may use; a large number where the system does not tell."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # another system
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with contextlib.suppress(ValueError, OSError):  # no such file, or "max"
            memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
        return memory
    return 1 << 60


def cpu_has_bfloat16() -> bool:
    """Whether this CPU is faster in bfloat16 than in float32: by matrix instructions (AMX) or on Arm.

    AVX512-BF16 alone does not make it so: on such a Xeon a 64-channel convolution ran at 200 GFLOPS against 351 in float32,
    TAESD's encoder at 6.2 images/s against 10.8.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot tell
    return any(present and "bf16" in name and not name.startswith("avx") for name, present in capabilities.items())


def peak_memory(device: torch.device) -> int:
    """The most memory that was in use so far, in bytes: the device's where it keeps count, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: the device's, or the CPU's, for which torch has no class of its own."""
    said = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )


@contextlib.contextmanager
def memory_advice(doing: str, **flags):
    """Within this context, running out of memory is a UserError that says what was being done and which flags help.

    Args:
        doing: what the message says after "out of memory while", such as "training".
        flags: by name, those that decide how much memory it takes, such as `train_batch_size=4, precision="float32"`.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        given = ", ".join(f"--{name} {value}" for name, value in flags.items())
        lower = [f"--{name}" for name, value in flags.items() if isinstance(value, int) and value > 1]
        advice = [f"lower {' or '.join(lower)}"] if lower else []
        advice += ["use --precision bfloat16"] if flags.get("precision") == "float32" else []
        raise UserError(
            f"out of memory while {doing} with {given} ({one_line(error, limit=200)}): "
            f"{' or '.join(advice) or 'use a machine with more of it'}"
        ) from None


def release_memory() -> None:
    """Give back what the CUDA allocator keeps for later, so that pieces of another size find room."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def autocast(device: torch.device, dtype: torch.dtype):
    """Mixed precision around the module, whose weights stay float32; no effect for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
