"""The hub token and the proxy's password: in no file, no output and no process list, whether a run succeeds or fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, as_argv

import train_align_with_args as train_script
from runtime.cli import run
from utils import UserError, without_secrets

SECRETS = {"HF_TOKEN": "hf_alphaSecret1", "HUGGINGFACE_TOKEN": "hf_betaSecret2"}
PASSWORD, USER = "gammaSecret3", "deltaUser4"
PROXY = f"http://{USER}:{PASSWORD}@127.0.0.1:9"
WORDS = [*SECRETS.values(), PASSWORD, USER]


def shows_none(text):
    return [word for word in WORDS if word in text] == []


@pytest.fixture
def secret_config(flags, tmp_path):
    """A config that names a proxy with its password, outside the folder that the run writes to."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"proxy": PROXY, "max_train_steps": 2, "num_workers": 1}))
    return path


def process_lists(process):
    """What `ps` would show of `process` and its children until it ends."""
    seen = set()
    while process.poll() is None:
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line, status = entry.read_bytes(), entry.with_name("stat").read_text()
            except OSError:
                continue  # it ended meanwhile
            if str(process.pid) in (entry.parent.name, status.rpartition(")")[2].split()[1]):
                seen.add(line.decode(errors="replace"))
        time.sleep(0.2)
    return seen


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc here")
def test_a_run_leaves_no_secret_behind(flags, secret_config, tmp_path):
    """A token in a checkpoint's config, a TensorBoard event, a log line, or handed to a worker on its command line."""
    out = tmp_path / "out"
    places = {"latent_cache_dir": out / "cache", "log_dir": out / "runs", "save_dir": out / "ckpt", "num_workers": None}
    command = [sys.executable, str(ROOT / "train_align_with_args.py"), "--load_config", str(secret_config)]
    with open(tmp_path / "output", "w+b") as printed:
        env = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        argv = command + as_argv(flags | places)
        process = subprocess.Popen(argv, stdout=printed, stderr=printed, env=env, cwd=tmp_path)
        lines = process_lists(process)
    output = (tmp_path / "output").read_bytes()
    assert process.returncode == 0, output.decode()
    assert any("train_align" in line for line in lines) and all(map(shows_none, lines))
    files = [file for file in out.rglob("*") if file.is_file()]
    assert {".pth", ".json", ".bin"} <= {file.suffix for file in files} and any("tfevents" in file.name for file in files)
    for content in (output, *(file.read_bytes() for file in files)):
        assert shows_none(content.decode("latin-1"))
        assert all(word.encode("utf-16-le") not in content for word in WORDS)
    saved = json.loads(next((out / "ckpt").glob("*.json")).read_text())
    assert saved["proxy"] == "http://127.0.0.1:9"


MISTAKES = {"vae1_path": PROXY, "train_data_dir": f"/none/{SECRETS['HF_TOKEN']}"}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_run_that_fails_shows_no_secret(flags, secret_config, tmp_path, monkeypatch, capfd, name):
    """A secret typed into the wrong flag, quoted by the message that refuses it."""
    monkeypatch.chdir(tmp_path)
    for variable, value in SECRETS.items():
        monkeypatch.setenv(variable, value)
    argv = ["--load_config", str(secret_config), *as_argv(flags | {name: MISTAKES[name]})]
    with pytest.raises(SystemExit) as stop:
        run(lambda: train_script.main(argv))
    printed = capfd.readouterr()
    assert "***" in stop.value.code and shows_none(stop.value.code + printed.out + printed.err)


ERRORS = {
    "user error": lambda: UserError(f"--proxy {PROXY}: {SECRETS['HF_TOKEN']}"),
    "system error": lambda: OSError(13, "Permission denied", f"/home/{SECRETS['HF_TOKEN']}"),
    "bug": lambda: RuntimeError(f"Invalid port in {PROXY} with Bearer {SECRETS['HUGGINGFACE_TOKEN']}"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_no_way_to_fail_shows_a_secret(monkeypatch, kind):
    """The traceback of a library that quotes the URL or the header that it could not use."""
    for name, value in (SECRETS | {"HTTPS_PROXY": PROXY}).items():
        monkeypatch.setenv(name, value)

    def main():
        raise ERRORS[kind]()

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert shows_none(stop.value.code) and "***" in stop.value.code
    assert ("Traceback" in stop.value.code) == (kind == "bug")


def test_what_is_no_secret_stays_readable():
    """Messages full of asterisks, for a URL without a password or an address of a mail."""
    text = "a bad port at http://127.0.0.1:7890, ask a@b.org"
    assert without_secrets(text) == text
