"""The machine: which device and precision a program runs on, how much memory there is, and advice where it runs out.

The rules say in one log line what they chose. Errors name the setting ("device cuda:9: …"); the command line adds the flag.
"""

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
    """A name in `PRECISIONS` -> the torch dtype. UserError for any other name."""
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision}: choose from {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def resolve_device(name: str, typed: bool) -> torch.device:
    """The device to run on: cuda, cuda:N, mps or cpu.

    A device that the machine lacks is a UserError if the user `typed` it. A default falls back, with one warning, to the first
    of cuda, mps and cpu that the machine has. A name that is no such device is a UserError in both cases.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name}: not a device; use cuda, cuda:N, mps or cpu") from None
    present = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if device.type not in present:
        raise UserError(f"device {name}: not supported; use cuda, cuda:N, mps or cpu")
    if present[device.type]() and (device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()):
        return device
    if typed:
        raise UserError(f"device {name}: not available on this machine; use cpu, or leave the choice to the program")
    fallback = next(kind for kind in ("cuda", "mps", "cpu") if present[kind]())
    log.warning("no %s here: running on %s", name, fallback)
    return torch.device(fallback)


def resolve_precision(precision: str, device: torch.device, typed: bool) -> str:
    """The precision to run in: a name in `PRECISIONS`, with a warning where it is not the given one.

    On a CPU bfloat16 replaces float16, which has no gradient scaler and no speed there. Most CPUs are slower in bfloat16 than
    in float32 (see `cpu_has_bfloat16`): on those, float32 replaces bfloat16 unless the user `typed` bfloat16.
    """
    get_dtype(precision)
    chosen = precision
    if device.type == "cpu":
        if precision == "float16":
            chosen = "bfloat16"
        if chosen == "bfloat16" and not (typed and precision == chosen) and not cpu_has_bfloat16():
            chosen = "float32"
        if chosen != precision:
            log.warning("precision %s does not suit this CPU: using %s", precision, chosen)
    return chosen


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU with glibc, have malloc keep the memory of freed tensors instead of giving it back to the system.

    By default every feature map of more than a few MB is a new mapping, and the kernel clears its pages: a third of a tiny
    VAE's encoding time. The price is that the process's memory does not shrink between batches. No effect on other devices
    and other C libraries.
    """
    if device.type == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def require_compiler(device: torch.device) -> None:
    """UserError unless torch.compile works on `device`. It needs a C++ compiler or Triton; torch itself would only say so at
    the first training step."""
    try:
        torch.compile(lambda value: value * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # each of its many parts fails in its own way
        reason = one_line(error, limit=200)
        raise UserError(f"compile: torch.compile does not work on this machine ({reason}); run without it") from None


def physical_memory() -> int:
    """Bytes of memory of this machine, or of its container's limit; 2**60 where the system does not tell."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with contextlib.suppress(ValueError, OSError):  # no such file, or "max"
            memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
        return memory
    return 1 << 60


def cpu_has_bfloat16() -> bool:
    """Whether this CPU is faster in bfloat16 than in float32: with matrix instructions (AMX), on Arm, or with AMD's
    AVX512-BF16.

    Intel's AVX512-BF16 alone is slower: on such a Xeon a 64-channel convolution ran at 200 GFLOPS against 351 in float32, and
    TAESD's encoder at 6.2 images/s against 10.8. On an EPYC, whose AVX512-BF16 has twice float32's rate, the latent cache of
    TAESD and TAEF1 was built at 2.9 images/s on one core against 2.1 on two in float32.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot tell
    present = [name for name, there in capabilities.items() if there and "bf16" in name]
    return any(not name.startswith("avx") for name in present) or (bool(present) and _made_by_amd())


def _made_by_amd() -> bool:
    with contextlib.suppress(OSError):  # no such file outside Linux
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return False


def peak_memory(device: torch.device) -> int:
    """The most memory in use so far, bytes: the device's where torch counts it (CUDA), else this process's; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, of the device or of the CPU (for which torch has no exception class)."""
    said = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )


@contextlib.contextmanager
def memory_advice(doing: str, **settings):
    """Within this context, running out of memory is a UserError that says what the program did and which settings help.

    Args:
        doing: follows "out of memory while" in the message, such as "training".
        settings: name and value of those that decide how much memory it takes, such as `train_batch_size=4,
            precision="float32"`.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        values = ", ".join(f"{name} {value}" for name, value in settings.items())
        lower = [name for name, value in settings.items() if isinstance(value, int) and value > 1]
        advice = [f"lower {' or '.join(lower)}"] if lower else []
        advice += ["use precision bfloat16"] if settings.get("precision") == "float32" else []
        raise UserError(
            f"out of memory while {doing} with {values} ({one_line(error, limit=200)}): "
            f"{' or '.join(advice) or 'use a machine with more of it'}"
        ) from None


def release_memory() -> None:
    """Return the CUDA allocator's unused memory to the device, so that it can allocate blocks of another size."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def autocast(device: torch.device, dtype: torch.dtype):
    """A context in which the module computes in `dtype` while its weights stay float32; no effect for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
