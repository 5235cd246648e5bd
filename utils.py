"""Errors, files, words, the machine (device, precision, memory) and the request to stop. For every other module."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import logging
import os
import pickle
import re
import secrets
import signal
import stat
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import torch

from vae_align import require_regular, shown

log = logging.getLogger(__name__)


STAMP_FORMAT = "%Y%m%d_%H%M%S"
JSON_BYTES = 1 << 24  # a longer file is no config
AFTER_SCHEME = re.compile(r"://[^\s'\"]*")  # the rest of a URL, whose user and password end at the last @
TOKEN = re.compile(r"\b(hf|api_org)_[\w.-]{20,}")  # Hugging Face's
TOKEN_NAMES = ("HUGGINGFACE_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
CLAIM = 4, 1 << 26  # a file may claim this multiple of its bytes, as tied weights do, or this number of bytes
SAFE_TORCH = "2.10"  # older versions can be made to run code by a file, `weights_only` or not


class UserError(Exception):
    """A mistake that the user can correct. The message is one line without secrets: the thing, its value, the remedy."""

    def __init__(self, message: str):
        super().__init__(printable(message.strip()))  # a line break or tab within is part of a value, and shown as one


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of `error`, or its class where it has none, on one line of at most `limit` characters without secrets."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str, keep: str = "") -> str:
    """`text` without secrets, its unprintable characters but those to `keep` written as in Python: `\\n`, `\\x1b`, `\\udcff`.

    A file name may hold such characters: newlines, terminal commands, bytes that are not UTF-8.
    """
    written = (letter if letter.isprintable() or letter in keep else repr(letter)[1:-1] for letter in without_secrets(text))
    return "".join(written)


def without_secrets(text: str) -> str:
    """`text` with `***` in place of Hugging Face tokens and of the user and password in URLs."""
    for name in TOKEN_NAMES:
        if token := "".join(os.environ.get(name, "").split()):
            text = text.replace(token, "***")
    text = AFTER_SCHEME.sub(lambda url: f"://***@{url[0].rpartition('@')[2]}" if "@" in url[0] else url[0], text)
    return TOKEN.sub("***", text)


def hub_token() -> str | None:
    """The Hugging Face token of HUGGINGFACE_TOKEN, else of HF_TOKEN or `hf auth login`, or None. Callers store it nowhere."""
    from huggingface_hub import get_token

    # without white space, such as that of a pasted line: the HTTP client would quote the header in its error
    return "".join(os.environ.get("HUGGINGFACE_TOKEN", "").split()) or get_token()


def plain_stem(path: str | os.PathLike, limit: int = 80) -> str:
    """The name of `path` without its ending, as part of a new file's name: printable, of at most `limit` bytes in UTF-8."""
    stem = "".join(letter if letter.isprintable() else "_" for letter in Path(path).stem)
    return stem.encode()[:limit].decode(errors="ignore")


def count_of(number: int, noun: str) -> str:
    """'1 image', '2 images', '2 processes'."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


# ----------------------------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "wb", exclusive: bool = False, **open_options):
    """Open a temporary neighbour of `path` for writing; flush it to disk and rename it on success, remove it on failure.

    A reader sees the old file or the whole new one, never a part. With `exclusive`, an existing `path` stays and
    FileExistsError is raised.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # not mkstemp: its 0600 would hide the file from the user's group, and some file systems refuse chmod
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, mode, **open_options) as file:
            yield file
            flush_to_disk(file)
        if exclusive:
            try:
                os.link(temporary, path)
                return
            except FileExistsError:
                raise
            except OSError:  # this file system has no hard links: check and rename in two steps
                if path.exists():
                    raise FileExistsError(path) from None
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def flush_to_disk(file) -> None:
    """Have what was written to an open file reach the disk, where the file system can say so."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # some network file systems have no such call
            raise


def write_json(path: str | os.PathLike, value) -> None:
    """Write `value` as indented JSON, atomically. Bytes of a file name that are not UTF-8 become JSON escapes."""
    with atomic_file(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path: str | os.PathLike):
    """The JSON value in a file, in UTF-8 with or without a byte order mark.

    OSError when it cannot be read or is no regular file. ValueError when it is no JSON, is longer than `JSON_BYTES`, nests too
    deep, or holds a key twice (JSON readers silently take the last one).
    """

    def pairs(items):
        found = {}
        for name, value in items:
            if name in found:
                raise ValueError(f"the key {shown(name)} is there twice")
            found[name] = value
        return found

    require_regular(path)
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(JSON_BYTES + 1)
    if len(text) > JSON_BYTES:
        raise ValueError(f"longer than {JSON_BYTES >> 20} MB")
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("nested too deep") from None


def open_regular(path: str | os.PathLike, mode: str = "rb"):
    """Open a file of a folder in which others write. OSError for a link, which may lead to a file that they cannot write, and
    for a pipe, socket or device."""

    def opener(name, flags):
        handle = os.open(name, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError("a pipe, socket or device, not a file")
        return handle

    return open(path, mode, opener=opener)


def require_safe_torch() -> None:
    """UserError where this torch can be made to run code by a file that it reads; .safetensors files are safe with any."""
    if torch.__version__ < SAFE_TORCH:
        raise UserError(
            f"torch {torch.__version__}: a .pth, .pt, .ckpt or .bin file could run code in it; install torch {SAFE_TORCH} or "
            "newer, or use .safetensors files"
        )


def read_torch(path: str | os.PathLike, device: str | torch.device = "cpu", mmap: bool = False):
    """The tensors and plain values in a file that `torch.save` wrote: .pth, .pt, .ckpt, .bin. It runs no code.

    UserError with a torch before `SAFE_TORCH`; UnpicklingError for a file that asks to run code, or is none of these;
    ValueError for tensors that claim far more than the file holds; otherwise OSError or torch's own errors. `mmap`: read no
    tensor before it is used.
    """
    require_safe_torch()
    require_regular(path)
    try:
        plan = torch.load(path, map_location="meta", weights_only=True)  # shapes without memory
        require_held(path, claimed_bytes(plan))
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:  # whose text advises to let the file run its code
        asks = "GLOBAL" in str(error).upper()
        raise pickle.UnpicklingError("it asks to run code, which is refused" if asks else "not a file of torch's") from None


def require_held(path: str | os.PathLike, claimed: int) -> None:
    """ValueError if a file's tensors claim far more bytes than it holds, such as one number as a tensor of any shape."""
    times, least = CLAIM
    if claimed > max(times * os.path.getsize(path), least):
        raise ValueError(f"its tensors claim {claimed / 1e9:.1f} GB, far more than the file holds")


def claimed_bytes(content, deepest: int = 64) -> int:
    """The bytes of all tensors in a file's content, by their shapes. ValueError where it nests deeper than `deepest`."""
    waiting, seen, claimed = [(content, 0)], set(), 0
    while waiting:  # no recursion: a list may nest deep, or hold itself
        value, depth = waiting.pop()
        if depth > deepest:
            raise ValueError("nested too deep")
        if isinstance(value, torch.Tensor):
            claimed += value.numel() * value.element_size()
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            waiting += [(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]
    return claimed


def next_stamp(folder: str | os.PathLike, prefix: str) -> str:
    """A time stamp, YYYYMMDD_HHMMSS, for a new `{prefix}_{stamp}` in `folder` that sorts after every existing one.

    It is the present time, or one second past the newest entry: two files may come within a second, a clock may be set back.
    UserError where the newest entry is of the year 9999, after which there is no other.
    """
    stamp = datetime.now().replace(microsecond=0)
    for entry in Path(folder).glob(f"{prefix}_*"):
        if taken := stamp_of(entry, prefix):
            if taken.year == datetime.max.year:
                raise UserError(f"{entry}: stamped in the year {taken.year}, and new names must sort after it; rename it")
            stamp = max(stamp, taken + timedelta(seconds=1))
    return stamp.strftime(STAMP_FORMAT)


def stamp_of(path: Path, prefix: str) -> datetime | None:
    """The time in a name that begins with `{prefix}_{stamp}`, or None."""
    with contextlib.suppress(ValueError):  # digits that are no time
        match = re.match(re.escape(prefix) + r"_(\d{8}_\d{6})", path.name)
        return match and datetime.strptime(match[1], STAMP_FORMAT)


def file_digest(path: str | os.PathLike) -> bytes:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


# ----------------------------------------------------------------------------------------------------------------------
# Device and precision


PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def get_dtype(precision: str) -> torch.dtype:
    """A name in `PRECISIONS` -> the torch dtype. UserError for any other name."""
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision}: choose from {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def resolve_device(name: str, typed: bool) -> torch.device:
    """The device to run on: cuda, cuda:N, mps or cpu. On CUDA it also becomes torch's current device.

    A device that the machine lacks is a UserError if the user `typed` it. A default falls back, with one warning, to the first
    of cuda, mps and cpu that the machine has. A name that is no such device is a UserError in both cases.
    """
    present = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    try:
        device = torch.device(name)
        there = present[device.type]()
    except (RuntimeError, KeyError):
        raise UserError(f"device {name}: not a device to compute on; use cuda, cuda:N, mps or cpu") from None
    if not there or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        if typed:
            raise UserError(f"device {name}: not available on this machine; use cpu, or leave the choice to the program")
        device = torch.device(next(kind for kind in ("cuda", "mps", "cpu") if present[kind]()))
        log.warning("no %s here: running on %s", name, device)
    if device.type == "cuda":  # else every process that a launcher starts would open a context on the first GPU
        local = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count() if device.index is None else device.index
        torch.cuda.set_device(local)
    return device


def resolve_precision(precision: str, device: torch.device, typed: bool) -> str:
    """The precision to run in: a name in `PRECISIONS`, with a warning where it is not the given one.

    A GPU that only emulates bfloat16 (Turing, Volta and older) gets float16; the current CUDA device is asked. A CPU gets
    bfloat16 in place of float16, for which it has no gradient scaler and no speed. Most CPUs are slower in bfloat16 than in
    float32 (see `cpu_has_bfloat16`): those get float32 in place of bfloat16, unless the user `typed` bfloat16.
    """
    get_dtype(precision)
    chosen = precision
    if device.type == "cuda" and precision == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        chosen = "float16"
    if device.type == "cpu":
        if precision == "float16":
            chosen = "bfloat16"
        if chosen == "bfloat16" and not (typed and precision == chosen) and not cpu_has_bfloat16():
            chosen = "float32"
    if chosen != precision:
        log.warning("precision %s does not suit this %s: using %s", precision, device.type.upper(), chosen)
    return chosen


def compute_policy(device: torch.device, precision: str = "float32") -> None:
    """Set how CUDA computes float32 in this process; no effect on other devices.

    "float32" asks for exact and repeatable figures: no TF32 (10 bits of mantissa in place of 23), and cuDNN's kernels by its
    own rule. `eval_align.py` and the translating tools use it, whatever precision their networks have. Training in "bfloat16"
    or "float16" asks for speed: what stays float32 there, such as losses and the evaluations on its way, uses TF32, and cuDNN
    tries its kernels out for each new size. A program that imports this project's parts keeps torch's own choice.
    """
    if device.type == "cuda":
        fast = precision != "float32"
        torch.set_float32_matmul_precision("high" if fast else "highest")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = fast


def autocast(device: torch.device, dtype: torch.dtype):
    """A context in which the module computes in `dtype` while its weights stay float32; no effect for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def require_compiler(device: torch.device) -> None:
    """UserError unless torch.compile works on `device`. It needs a C++ compiler or Triton; torch itself would only say so at
    the first training step."""
    try:
        torch.compile(lambda value: value * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # each of its many parts fails in its own way
        reason = one_line(error, limit=200)
        raise UserError(f"compile: torch.compile does not work on this machine ({reason}); run without it") from None


def cpu_has_bfloat16() -> bool:
    """Whether this CPU is faster in bfloat16 than in float32: with matrix instructions (AMX), on Arm, with AMD's AVX512-BF16.

    Intel's AVX512-BF16 alone is slower. On such a Xeon TAESD's encoder made 6.2 images/s, and 10.8 in float32.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot tell
    present = [name for name, there in capabilities.items() if there and "bf16" in name]
    return any(not name.startswith("avx") for name in present) or (bool(present) and _made_by_amd())


def _made_by_amd() -> bool:
    with contextlib.suppress(OSError):  # no such file outside Linux
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return False


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU with glibc, have malloc keep the memory of freed tensors; no effect elsewhere.

    By default each large tensor is a new mapping whose pages the kernel clears, a third of a tiny VAE's encoding time. The
    process's memory then does not shrink between batches.
    """
    if device.type == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD of malloc.h
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def physical_memory() -> int:
    """Bytes of memory of this machine, or of its container's limit; 2**60 where the system does not tell."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with contextlib.suppress(ValueError, OSError):  # no such file, or "max"
            memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
        return memory
    return 1 << 60


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
    """Within this context, running out of memory is a UserError: what the program was `doing`, and which settings help.

    `settings` are the names and values that decide how much memory it takes: `train_batch_size=4, precision="float32"`.
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


# ----------------------------------------------------------------------------------------------------------------------
# The request to stop

# a terminal's Ctrl-C, a scheduler's end, then two warnings: the terminal has gone, the job's time is nearly up
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
WARNINGS = STOP_SIGNALS[2:]  # a second one ends nothing: a closed terminal sends SIGHUP twice
RELAY = 2.0  # seconds within which a launcher repeats a signal to its processes


def handle_stop_signals(handler) -> dict:
    """Let `handler(number, frame)` handle `STOP_SIGNALS`; returns {signal number: its handler before}.

    What the process was started to ignore stays ignored, such as SIGHUP under nohup or SIGINT in a script's background job.
    """
    before = {}
    with contextlib.suppress(ValueError):  # outside the main thread the caller handles signals
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler) or signal.SIG_DFL
    return before


class StopWaiting(SystemExit):
    """The run is to stop on a signal; `code` is the exit status, 128 + the signal's number."""


class StopRequest:
    """Within this context `STOP_SIGNALS` ask the run to stop; `signal` is the number of the last one, or None.

    The second SIGINT, or the second SIGTERM, ends the process at once. Under a launcher (LOCAL_RANK is set) a second one within
    `RELAY` seconds is ignored: the launcher repeats to its processes the signal that the terminal has sent to all.
    """

    def __init__(self):
        self.signal: int | None = None
        self._came_at = {}  # {signal number: when it came first, seconds}

    def __enter__(self):
        self._handlers_before = handle_stop_signals(self._note)
        return self

    def _note(self, number, _):
        self.signal, now = number, time.monotonic()
        if number in self._came_at:
            if number not in WARNINGS and now - self._came_at[number] > RELAY:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self._came_at[number] = now
        if "LOCAL_RANK" not in os.environ and number not in WARNINGS:
            signal.signal(number, signal.SIG_DFL)
        said = f"\n{signal.Signals(number).name}: finishing the step and saving; once more to leave at once\n"
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended the reader of stderr
            os.write(2, said.encode())  # not print: the signal may have come within a print, which refuses a second one

    def __exit__(self, *exception):
        for number, handler in self._handlers_before.items():
            if self.signal:  # while the rest is written, one more SIGINT or SIGTERM ends the process at once
                handler = signal.SIG_IGN if number in WARNINGS else signal.SIG_DFL
            signal.signal(number, handler)

    def raise_if_asked(self) -> None:
        """StopWaiting if the run is to stop."""
        if self.signal:
            raise StopWaiting(128 + self.signal)
