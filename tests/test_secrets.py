"""The hub token and the proxy's password: in no file and no output, whether a run succeeds or fails."""

import json

import pytest
from conftest import as_argv, run_script

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


def test_a_run_leaves_no_secret_behind(flags, secret_config, tmp_path):
    """A token in a checkpoint's config, a TensorBoard event or a log line."""
    out = tmp_path / "out"
    places = {"latent_cache_dir": out / "cache", "log_dir": out / "runs", "save_dir": out / "ckpt", "num_workers": None}
    argv = as_argv({"load_config": secret_config} | flags | places)
    ended = run_script("train_align_with_args.py", *argv, env=SECRETS, cwd=tmp_path)
    output = (ended.stdout + ended.stderr).encode()
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
