"""The hub token and the proxy's password: in no file and no output, whether a run succeeds or fails."""

import json

import pytest
from conftest import as_argv, run_script
from hostile import no_hang

from runtime.cli import run
from utils import UserError, without_secrets

SECRETS = {"HF_TOKEN": "hf_alphaSecret1", "HUGGINGFACE_TOKEN": "hf_betaSecret2", "HUGGING_FACE_HUB_TOKEN": "hf_epsilonSecret5"}
PASSWORD, USER = "gammaSecret3", "deltaUser4"
PROXY = f"http://{USER}:{PASSWORD}@127.0.0.1:9"
WORDS = [*SECRETS.values(), PASSWORD, USER]


def shows_none(text):
    return [word for word in WORDS if word in text] == []


def test_a_run_leaves_no_secret_behind(flags, tmp_path):
    """A token in a checkpoint's config, a TensorBoard event or a log line."""
    config, out = tmp_path / "config.json", tmp_path / "out"
    config.write_text(json.dumps({"proxy": PROXY, "max_train_steps": 2, "num_workers": 1}))
    places = {"latent_cache_dir": out / "cache", "log_dir": out / "runs", "save_dir": out / "ckpt", "num_workers": None}
    argv = as_argv({"load_config": config} | flags | places)
    ended = run_script("train_align_with_args.py", *argv, env=SECRETS, cwd=tmp_path)
    output = (ended.stdout + ended.stderr).encode()
    files = [file for file in out.rglob("*") if file.is_file()]
    assert {".pth", ".json", ".safetensors"} <= {file.suffix for file in files}
    assert any("tfevents" in file.name for file in files)
    for content in (output, *(file.read_bytes() for file in files)):
        assert shows_none(content.decode("latin-1"))
        assert all(word.encode("utf-16-le") not in content for word in WORDS)
    saved = json.loads(next((out / "ckpt").glob("*.json")).read_text())
    assert saved["proxy"] == "http://127.0.0.1:9"


ERRORS = {
    "user error": lambda: UserError(f"--proxy {PROXY}: {SECRETS['HF_TOKEN']}"),
    "older name": lambda: UserError(f"no rights for {SECRETS['HUGGING_FACE_HUB_TOKEN']}"),
    "system error": lambda: OSError(13, "Permission denied", f"/home/{SECRETS['HF_TOKEN']}"),
    "bug": lambda: RuntimeError(f"Invalid port in {PROXY} with Bearer {SECRETS['HUGGINGFACE_TOKEN']}"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_no_way_to_fail_shows_a_secret(monkeypatch, kind):
    """A secret typed into the wrong flag; the traceback of a library that quotes the URL or header that it could not use."""
    for name, value in (SECRETS | {"HTTPS_PROXY": PROXY}).items():
        monkeypatch.setenv(name, value)

    def main():
        raise ERRORS[kind]()

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert shows_none(stop.value.code) and "***" in stop.value.code
    assert ("Traceback" in stop.value.code) == (kind == "bug")


@pytest.mark.parametrize("part", ["://", "://a", "@://", "hf_", "-hf_a", "api_org_.", "://@", "'://", "\n"])
def test_a_long_name_is_searched_for_secrets_in_one_pass(part):
    """A member of a tar whose name of some 100 kB takes half a minute to print, each time it is named."""
    with no_hang():
        without_secrets(part * 500_000)


def test_only_the_user_of_a_url_is_hidden():
    """A password with an @, a slash or another URL in it, of which a part stays; a token behind a password."""
    token = "hf_" + "a1B2" * 8
    for secret in ("me:pa@ss", "me:p/ss", "://me", token):
        found = without_secrets(f"at 'https://{secret}@host/x?token={token}' and a@b://c")
        assert found == "at 'https://***@host/x?token=***' and a@b://c"
