"""The promises of SECURITY.md that no other test holds: which files run no code, on which versions, and what is fetched."""

import ast
import json
import pickle
import re
import shutil

import pytest
import torch
from conftest import ROOT, as_argv, make_kl_vae, run_script
from families import save_tiny
from hostile import no_hang, refusal
from pipelines import Payload, load_vae
from torch.torch_version import TorchVersion

import losses
from losses import lpips_network, st_lpips
from runtime.cli import run
from tools.translate import read_latents
from train_align_with_args import load_vaes, parse_args
from utils import SAFE_TORCH, UserError, read_torch, without_secrets
from vae_align import AlignPipeline
from vaes.pipeline import PipelineWithVAEs, read_checkpoint


def floors(lines):
    """{package: oldest version} of requirements."""
    found = (re.match(r"([\w.-]+)>=([\w.]+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in found if match}


def test_the_oldest_versions_are_those_of_security_md():
    """A requirement that lets a version in which loading runs code; a promise that the requirements do not keep."""
    rows = re.findall(r"^\| (\w+) \| (\d[\d.]*) \|", (ROOT / "SECURITY.md").read_text("utf-8"), re.MULTILINE)
    promised = {name.lower(): version for name, version in rows}
    required = floors((ROOT / "requirements.txt").read_text("utf-8").splitlines())
    extra = floors((ROOT / "pyproject.toml").read_text("utf-8").partition("train = [")[2].replace('"', " ").split())
    assert promised["torch"] == SAFE_TORCH and {"pillow", "filelock"} <= promised.keys()
    for found in (required, extra):
        assert {name: found[name] for name in promised} == promised
    assert extra.items() <= required.items()
    exact = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").lower().split() if "==" in line)
    for name, oldest in required.items():
        assert TorchVersion(exact[name]) >= oldest, name


def test_files_of_torch_are_read_in_one_place():
    """A reader beside `utils.read_torch`, with neither `weights_only` nor a check of torch's version."""
    for file in (file for file in ROOT.rglob("*.py") if not {"tests", "node_modules", ".venv"} & {*file.parts}):
        calls = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
        for call in calls:
            name, options = ast.unparse(call.func), {option.arg: ast.unparse(option.value) for option in call.keywords}
            assert name != "torch.load" or (file.name == "utils.py" and options["weights_only"] == "True"), file
            assert name != "np.load" or options.get("allow_pickle", "False") == "False", file
            assert not name.endswith("load_state_dict_from_url") or options["weights_only"] == "True", file
            assert "trust_remote_code" not in options, file


def test_no_file_of_torch_is_read_with_a_torch_that_could_run_its_code(monkeypatch, tmp_path, vae_folders):
    """One door of six that nobody has locked; .safetensors files refused too."""
    make_kl_vae(4).save_pretrained(tmp_path / "pickled", safe_serialization=False)
    save_tiny(tmp_path, "taesd", ".pth", latent_channels=4)
    torch.save({}, tmp_path / "vae.ckpt")
    torch.save(torch.zeros(1, 4, 2, 2), tmp_path / "latents.pt")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1"))
    for read in (
        lambda: load_vae(tmp_path / "pickled").model,
        lambda: load_vae(tmp_path / "taesd").model,
        lambda: load_vae(tmp_path / "vae.ckpt"),
        lambda: read_latents(tmp_path / "latents.pt"),
        lambda: read_checkpoint(ROOT / "tests" / "files" / "module.pth"),
        lambda: st_lpips("alex"),
    ):
        refusal(read, "torch 2.9.1", f"install torch {SAFE_TORCH}", ".safetensors")
    assert load_vae(vae_folders["kl4"]).model
    assert AlignPipeline.from_pretrained(ROOT / "tests" / "files" / "module.safetensors")


def test_the_one_file_to_copy_reads_no_file_of_torch(tmp_path):
    """A pickle in a host with an old torch, under whatever name."""
    torch.save({"format": Payload(tmp_path / "ran")}, tmp_path / "module.safetensors")
    shutil.copy(tmp_path / "module.safetensors", tmp_path / "module.pth")
    for name in ("module.safetensors", "module.pth"):
        refusal(lambda name=name: AlignPipeline.from_pretrained(tmp_path / name), name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_other_weights_than_the_published_ones_of_st_lpips_are_refused(tmp_path, monkeypatch, network):
    """A swapped file that judges every figure."""
    weights = read_torch(losses._weights_file(network))
    name = next(iter(weights))
    torch.save({**weights, name: weights[name] + 1e-3}, tmp_path / "other.pth")
    monkeypatch.setattr(losses, "_weights_file", lambda _: tmp_path / "other.pth")
    refusal(lambda: st_lpips(network), "other.pth", "SHA-256", "reinstall")


def test_a_planted_file_of_alexnet_runs_no_code(tmp_path, monkeypatch):
    """torchvision, which reads what lies in torch's cache without `weights_only`."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = losses.weights_file("alexnet-owt-7be5be79.pth")
    file.parent.mkdir(parents=True)
    file.write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=2))
    refusal(lambda: lpips_network("cpu"), file.name, "cannot be read")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def asked(monkeypatch):
    """The hub models for which the hub itself was asked; it gives none, and none was downloaded before."""
    from huggingface_hub import errors

    found = []

    def download(repo, name, *, local_files_only, **_):
        if not local_files_only:
            found.append(repo)
        raise errors.LocalEntryNotFoundError("nothing here")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return found


def test_a_hub_model_that_a_checkpoint_names_is_not_asked_for_at_the_hub(asked):
    """A stranger's checkpoint, judged or resumed, that sends the user's token for a model of its own choice."""
    content = read_checkpoint(ROOT / "tests" / "files" / "module.pth")
    content = content | {"vae2": content["vae2"] | {"path": "attacker/beacon"}}
    refusal(lambda: PipelineWithVAEs.from_checkpoint(content).codec2, "attacker/beacon", "name it yourself")
    resumed = parse_args(["--vae1_path", "attacker/beacon"])
    resumed.resume, resumed.given_flags = "latest", ()
    refusal(lambda: load_vaes(resumed), "--vae1_path attacker/beacon", "name it yourself")
    refusal(lambda: load_vae("//attacker/share", typed=False), "on another machine")  # to which Windows would send a password
    assert asked == []
    refusal(lambda: PipelineWithVAEs.from_checkpoint(content, vae2="attacker/beacon").codec2, "could not be downloaded")
    content["vae2"]["path"] = "madebyollin/taef1"
    refusal(lambda: PipelineWithVAEs.from_checkpoint(content).codec2, "could not be downloaded")
    assert asked == ["attacker/beacon", "madebyollin/taef1"]


# ----------------------------------------------------------------------------------------------------------------------
# The hub token and the proxy's password: in no file and no output, whether a run succeeds or fails

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
