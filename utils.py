"""Small helpers shared by every room. Nothing here knows a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from datetime import datetime, timedelta
from pathlib import Path

STAMP_FORMAT = "%Y%m%d_%H%M%S"


class UserError(Exception):
    """Something the user can mend. The message is one line: the thing, its value, the remedy."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of `error` on a single line of at most `limit` characters, the hub token blotted out."""
    text = " ".join(str(error).split()) or type(error).__name__
    for token in hub_tokens():
        text = text.replace(token, "***")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def hub_token() -> str | None:
    """The Hugging Face token of the environment, or None. It is handed to the calls that need it and stored nowhere."""
    return next(iter(hub_tokens()), None)


def hub_tokens() -> list[str]:
    """Every token that is set; stripped, for HTTP clients quote a header with a stray newline in their error."""
    tokens = ("".join(os.environ.get(name, "").split()) for name in ("HUGGINGFACE_TOKEN", "HF_TOKEN"))
    return [token for token in tokens if token]


def use_proxy(url: str | None) -> None:
    """Send the hub client (and everything else that honours the standard variables) through `url`."""
    if url:
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            os.environ[name] = os.environ[name.lower()] = url


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "wb", exclusive: bool = False, **open_options):
    """Open a temporary neighbour of `path` for writing; flush it to disk and rename it on success, remove it on failure.

    A reader sees the old file or the whole new one, never a part. With `exclusive`, an existing `path` is left alone and
    FileExistsError is raised.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would hide the file from the user's group
        with os.fdopen(handle, mode, **open_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            try:
                os.link(temporary, path)
                return
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links cannot do it in one step
                if path.exists():
                    raise FileExistsError(path) from None
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write_json(path: str | os.PathLike, value) -> None:
    """Write `value` as indented JSON, atomically. Bytes of a file name that are no UTF-8 come out as JSON's own escapes."""
    with atomic_file(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def claim_writable_folder(path: str | os.PathLike, flag: str, create: bool = True) -> Path:
    """Create folder `path` if need be and prove that it can be written; UserError naming `flag` otherwise.

    Without `create` nothing is touched: the folder, or the nearest that exists above it, must look writable.
    """
    path = Path(path)
    if not create:
        existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"{flag} {path}: cannot write there ({existing} is no writable folder); name another folder")
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot write there ({one_line(error)}); name another folder") from None


def next_stamp(folder: str | os.PathLike, prefix: str) -> str:
    """A time stamp for a new `{prefix}_{stamp}` in `folder` that sorts after every one already there.

    Now, or one second past the newest entry when two come within a second or the clock went back.
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


def count_of(number: int, noun: str) -> str:
    """'1 image', '2 images', '2 processes'."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"
