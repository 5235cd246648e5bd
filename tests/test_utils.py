"""Files, stamps and messages of utils.py."""

import errno
import os
import re
from datetime import datetime, timedelta

import pytest
from hostile import no_hang

from utils import atomic_file, hub_token, next_stamp, one_line, write_json

# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_atomic_file_shows_the_old_content_until_the_new_one_is_whole(tmp_path):
    """A reader that sees half a file."""
    path = tmp_path / "sub" / "file"
    with atomic_file(path) as file:
        file.write(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_file_leaves_the_old_file_and_no_other_on_failure(tmp_path, error):
    """A failed save that destroys the last good checkpoint or litters the folder; Ctrl-C as well."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_file_exclusive_refuses_to_overwrite(tmp_path):
    """Two runs that save under one name within the same second."""
    path = tmp_path / "file"
    with atomic_file(path, exclusive=True) as file:
        file.write(b"first")
    with pytest.raises(FileExistsError), atomic_file(path, exclusive=True) as file:
        file.write(b"second")
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_file_obeys_the_umask(tmp_path):
    """Checkpoints that the user's group cannot read, since temporary files are private."""
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as file:
            file.write(b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_write_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    """A metrics.json with NaN in it, which is no JSON and which other readers refuse."""
    path = tmp_path / "metrics.json"
    write_json(path, {"name": "é"})
    with pytest.raises(ValueError):
        write_json(path, {"psnr": float("nan")})
    assert path.read_text(encoding="utf-8") == '{\n  "name": "é"\n}\n'
    assert os.listdir(tmp_path) == ["metrics.json"]


# ----------------------------------------------------------------------------------------------------------------------
# Stamps


def test_stamps_within_one_second_neither_collide_nor_fall_out_of_order(tmp_path):
    """Two checkpoints in one second that share a name."""
    stamps = []
    for _ in range(3):
        stamps.append(next_stamp(tmp_path, "align_pipeline"))
        (tmp_path / f"align_pipeline_{stamps[-1]}.pth").touch()
    assert stamps == sorted(set(stamps))
    assert all(re.fullmatch(r"\d{8}_\d{6}", stamp) for stamp in stamps)


def test_stamp_is_the_present_time_where_nothing_is_in_the_way(tmp_path):
    """A stamp in UTC, or one after another prefix's entries."""
    (tmp_path / "other_29991231_235959.pth").touch()
    (tmp_path / "align_pipeline_latest.pth").touch()
    for folder in (tmp_path, tmp_path / "missing"):
        stamp = datetime.strptime(next_stamp(folder, "align_pipeline"), "%Y%m%d_%H%M%S")
        assert abs(stamp - datetime.now()) < timedelta(minutes=2)


@pytest.mark.parametrize(
    ("newest", "expected"), [("29990228_235959", "29990301_000000"), ("29991231_235959", "30000101_000000")]
)
def test_stamp_sorts_after_entries_from_the_future(tmp_path, newest, expected):
    """A clock that went back, after which the newest checkpoint no longer sorts last; 235959 + 1 = 235960."""
    for name in (f"align_pipeline_{newest}.pth", f"align_pipeline_{newest}.json", "align_pipeline_20200101_000000.pth"):
        (tmp_path / name).touch()
    assert next_stamp(tmp_path, "align_pipeline") == expected


# ----------------------------------------------------------------------------------------------------------------------
# Messages, token, proxy


def test_one_line_is_one_short_line():
    """An error of a library that fills the screen, or an empty line for one without a message."""
    assert one_line(ValueError("a\n  b\r\n\tc")) == "a b c"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("word " * 1000), limit=50)) == 50


@pytest.mark.parametrize("name", ["HUGGINGFACE_TOKEN", "HF_TOKEN"])
def test_one_line_hides_the_token(monkeypatch, name):
    """A token in the terminal's scrollback and in CI logs."""
    for other in ("HUGGINGFACE_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "hf_secret")
    assert one_line(ValueError("401 for Bearer hf_secret, hf_secret\n")) == "401 for Bearer ***, ***"
    assert "hf_s" not in one_line(ValueError("x" * 20 + "hf_secret"), limit=25)  # cut only after it is hidden


def test_one_line_hides_a_token_set_with_a_newline(monkeypatch):
    """The HTTP client refuses such a header and quotes it, with the token in plain sight."""
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_secret\n")
    assert "hf_secret" not in one_line(ValueError(f"Illegal header value {b'Bearer hf_secret' + bytes([10])!r}"))


def test_one_line_hides_both_tokens_when_two_are_set(monkeypatch):
    """The hub client may use HF_TOKEN on its own account, so that its errors quote the other one."""
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_first")
    monkeypatch.setenv("HF_TOKEN", "hf_second")
    assert one_line(ValueError("hf_first hf_second")) == "*** ***"


@pytest.mark.parametrize("calls, number", [(("chmod", "fchmod"), errno.EPERM), (("fsync",), errno.EINVAL)], ids=str)
def test_a_file_system_without_a_comfort_of_posix_takes_files(tmp_path, monkeypatch, calls, number):
    """Neither cache nor checkpoint on CIFS, exFAT, gcsfuse and the like, which refuse chmod or know no fsync."""
    refused = []

    def refuse(*_, **__):
        refused.append(number)
        raise OSError(number, os.strerror(number))

    for call in calls:
        monkeypatch.setattr(os, call, refuse)
    write_json(tmp_path / "a.json", 1)
    assert os.listdir(tmp_path) == ["a.json"]
    assert bool(refused) == ("fsync" in calls)  # no mode is set after the file is there: the umask has its say at once


def test_a_token_file_that_is_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    """A run, or a mere error message, that waits for ever for somebody to write a token."""
    os.mkfifo(tmp_path / "token")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HUGGINGFACE_TOKEN", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with no_hang():
        assert hub_token() is None


def test_the_token_of_a_login_counts_after_that_of_the_environment(tmp_path, monkeypatch):
    """A user who has logged in as for every other tool, and is told that there is no such model."""
    for name in ("HUGGINGFACE_TOKEN", "HF_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert hub_token() is None
    (tmp_path / "token").write_text("hf_stored\n")
    assert hub_token() == "hf_stored" and "hf_stored" not in one_line(ValueError("with hf_stored"))
    monkeypatch.setenv("HF_TOKEN", "hf_set")
    assert hub_token() == "hf_set"
