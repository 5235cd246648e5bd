"""Small helpers shared by every room. Nothing here knows a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import reprlib
import stat
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import unquote

STAMP_FORMAT = "%Y%m%d_%H%M%S"
JSON_BYTES = 1 << 24  # no config is this long; what is, is another kind of file
URL_USER = re.compile(r"(?<=://)[^\s'\"]*@")


class UserError(Exception):
    """Something the user can mend. The message is one line without secrets: the thing, its value, the remedy."""

    def __init__(self, message: str):
        if message.startswith("Caught UserError in DataLoader worker"):  # torch passes a worker's whole traceback on
            message = message.rpartition(f"{__name__}.UserError: ")[2]
        super().__init__(printable(" ".join(message.split())))


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of `error` on a single line of at most `limit` characters, secrets blotted out."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    """`text` without secrets, and with everything that is no printable character (a file name may hold newlines, terminal
    commands, bytes that are not UTF-8) written as in Python: `\\n`, `\\x1b`, `\\udcff`."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in without_secrets(text))


def without_secrets(text: str) -> str:
    """`text` with tokens, passwords and the user part of URLs blotted out."""
    for secret in (*hub_tokens(), *proxy_passwords()):
        text = text.replace(secret, "***")
    return URL_USER.sub("***@", text)


def hub_token() -> str | None:
    """The Hugging Face token of the environment, or None. It is handed to the calls that need it and stored nowhere."""
    return next(iter(hub_tokens()), None)


def hub_tokens() -> list[str]:
    """Every token that is set; stripped, for HTTP clients quote a header with a stray newline in their error."""
    tokens = ("".join(os.environ.get(name, "").split()) for name in ("HUGGINGFACE_TOKEN", "HF_TOKEN"))
    return [token for token in tokens if token]


def proxy_passwords() -> list[str]:
    """The passwords of the proxies that are set, as typed and as percent-decoded. One of a letter or two would blot out
    half of any message; in its URL it is blotted out anyway."""
    urls = (os.environ.get(name, "") for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"))
    typed = {url.rpartition("@")[0].rpartition("://")[2].partition(":")[2] for url in urls}
    return sorted((word for word in typed | {unquote(word) for word in typed} if len(word) > 2), key=len, reverse=True)


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
    """Write `value` as indented JSON, atomically; bytes of a file name that are not UTF-8 as JSON escapes."""
    with atomic_file(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path: str | os.PathLike):
    """The JSON value in a file, in UTF-8 with or without a byte order mark.

    OSError or ValueError when it cannot be read, is no regular file (a named pipe would be waited for), is longer than any
    config, nests too deep, or holds a key twice (of which JSON readers take the last without a word).
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
    """OSError unless `path` is a file with content of its own: opening a pipe waits for a writer, a device may never end."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("a folder, not a file")
    if not stat.S_ISREG(mode):
        raise OSError("a pipe, socket or device, not a file")


def shown(value) -> str:
    """`value` as an error message shows it: its repr, but of at most a few hundred characters, however long or deep it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = 100
    return short.repr(value)


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
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"0")  # a disk that is full takes names to the last
            file.flush()
            return path
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: cannot write there ({one_line(error)}); name another folder") from None


def claim_writable_file(path: str | os.PathLike, flag: str) -> None:
    """Prove that file `path` could be written, without touching what is there; UserError naming `flag` otherwise."""
    if os.path.isdir(path):
        raise UserError(f"{flag} {path}: a folder; name a file")
    try:
        claim_writable_folder(Path(path).parent, flag)
    except UserError:
        raise UserError(f"{flag} {path}: cannot write there; name a file in another folder") from None


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


def plain_stem(path: str | os.PathLike, limit: int = 80) -> str:
    """The name of `path` without its ending, as part of a new file's name: printable, of at most `limit` bytes in UTF-8."""
    stem = "".join(letter if letter.isprintable() else "_" for letter in Path(path).stem)
    return stem.encode()[:limit].decode(errors="ignore")


def count_of(number: int, noun: str) -> str:
    """'1 image', '2 images', '2 processes'."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"
