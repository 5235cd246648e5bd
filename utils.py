"""Errors, files and words, for every other module. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import reprlib
import secrets
import stat
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import unquote

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
