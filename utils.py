"""Errors, files, words, and the machine: device, precision, memory. For every other module."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import logging
import os
import re
import reprlib
import secrets
import stat
import sys
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import unquote

import torch

log = logging.getLogger(__name__)


STAMP_FORMAT = "%Y%m%d_%H%M%S"
JSON_BYTES = 1 << 24  # a longer file is no config, but of another kind
URL_USER = re.compile(r"(?<=://)[^\s'\"]*@")


class UserError(Exception):
    """A mistake that the user can correct. The message is one line without secrets: the thing, its value, the remedy."""

    def __init__(self, message: str):
        super().__init__(printable(" ".join(message.split())))


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of `error`, or its class where it has none, on one line of at most `limit` characters without secrets."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    """`text` without secrets, its unprintable characters written as in Python: `\\n`, `\\x1b`, `\\udcff`.

    A file name may hold such characters: newlines, terminal commands, bytes that are not UTF-8.
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in without_secrets(text))


def without_secrets(text: str) -> str:
    """`text` with `***` in place of tokens, passwords and the user part of URLs."""
    for secret in (*hub_tokens(), *proxy_passwords()):
        text = text.replace(secret, "***")
    return URL_USER.sub("***@", text)


def hub_token() -> str | None:
    """The Hugging Face token of the environment, or None. Callers pass it to the hub client and store it nowhere."""
    return next(iter(hub_tokens()), None)


def hub_tokens() -> list[str]:
    """Every token that is set, then that of `hf auth login`, without white space: an HTTP client quotes a header that contains
    a newline in its error."""
    tokens = [os.environ.get(name, "") for name in ("HUGGINGFACE_TOKEN", "HF_TOKEN")]
    return [token for token in ("".join(text.split()) for text in (*tokens, _login_token())) if token]


def _login_token() -> str:
    """The token that `hf auth login` has stored, or ""."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    place = os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token"))
    with contextlib.suppress(OSError, ValueError):
        require_regular(place)
        return Path(place).read_text(encoding="utf-8")
    return ""


def proxy_passwords() -> list[str]:
    """The passwords of the proxies that are set, as typed and percent-decoded, longest first.

    A password of one or two letters is left out, since `without_secrets` would replace those letters in every message; the
    user part of the proxy's URL is replaced in any case.
    """
    urls = (
        os.environ.get(name, "")
        for scheme in ("HTTP", "HTTPS", "ALL")
        for name in (f"{scheme}_PROXY", f"{scheme.lower()}_proxy")
    )
    typed = {url.rpartition("@")[0].rpartition("://")[2].partition(":")[2] for url in urls}
    return sorted((word for word in typed | {unquote(word) for word in typed} if len(word) > 2), key=len, reverse=True)


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


def require_regular(path: str | os.PathLike) -> None:
    """OSError unless `path` is a regular file: opening a pipe waits for a writer, and reading a device may never end."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("a folder, not a file")
    if not stat.S_ISREG(mode):
        raise OSError("a pipe, socket or device, not a file")


def shown(value) -> str:
    """The repr of `value`, cut to at most a few hundred characters, for error messages."""
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = 100
    return short.repr(value)


def next_stamp(folder: str | os.PathLike, prefix: str) -> str:
    """A time stamp, YYYYMMDD_HHMMSS, for a new `{prefix}_{stamp}` in `folder` that sorts after every existing one.

    It is the present time, or one second past the newest entry where that is not earlier (two files within a second, or a
    clock that was set back).
    """
    pattern = re.compile(re.escape(prefix) + r"_(\d{8}_\d{6})")
    taken = (pattern.match(entry.name) for entry in Path(folder).glob(f"{prefix}_*"))
    newest = max((match.group(1) for match in taken if match), default="")
    stamp = datetime.now().strftime(STAMP_FORMAT)
    if stamp > newest:
        return stamp
    with contextlib.suppress(ValueError):
        return (datetime.strptime(newest, STAMP_FORMAT) + timedelta(seconds=1)).strftime(STAMP_FORMAT)
    return stamp


def file_digest(path: str | os.PathLike) -> bytes:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


# ----------------------------------------------------------------------------------------------------------------------
# Words


def plain_stem(path: str | os.PathLike, limit: int = 80) -> str:
    """The name of `path` without its ending, as part of a new file's name: printable, of at most `limit` bytes in UTF-8."""
    stem = "".join(letter if letter.isprintable() else "_" for letter in Path(path).stem)
    return stem.encode()[:limit].decode(errors="ignore")


def count_of(number: int, noun: str) -> str:
    """'1 image', '2 images', '2 processes'."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


# ----------------------------------------------------------------------------------------------------------------------
# device


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
