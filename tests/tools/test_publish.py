"""tools/publish.py: one file, and a repository on a hub on the loopback interface, loaded from there."""

import json
import sys

import pytest
import torch
from conftest import ROOT, run_each, run_script
from hub import BAD_TOKEN, TOKEN, HubHandler, Server, hub_environment, serving
from huggingface_hub import ModelCard
from PIL import Image

from vae_align import AlignPipeline
from vaes.codec import SPACES

SHIPPED = ROOT / "assets" / "pretrained" / "taesd_to_taef1_latent.safetensors"
READER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from vae_align import AlignError, AlignPipeline
torch.set_num_threads(1)
latents = torch.linspace(-1, 1, 4 * 6 * 8).view(1, 4, 6, 8)
torch.save(AlignPipeline.from_pretrained("owner/name").translate(latents), "hub.pt")
import diffusers
align = diffusers.AutoModel.from_pretrained("owner/name", trust_remote_code=True)
torch.save(align.translate(latents), "auto.pt")
half = diffusers.AutoModel.from_pretrained("owner/name", trust_remote_code=True, torch_dtype=torch.bfloat16)
assert half.module.out.weight.dtype == torch.bfloat16
try:
    AlignPipeline.from_pretrained("owner/missing")
except AlignError as error:
    print(error)
"""


def publish(*argv, env, **options):
    return run_script("tools/publish.py", str(SHIPPED), "--repo", "owner/name", *map(str, argv), env=env, **options)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder that was written, repository on the hub, program's output, home) after an upload."""
    home = tmp_path_factory.mktemp("home")
    figures = {name: {"psnr": 20.5 + number, "ssim": None} for number, name in enumerate(("vae2", "reencode", "aligned"))}
    (home / "results").mkdir()
    (home / "results" / "metrics.json").write_text(json.dumps({"ladder": figures, "images": 3, "image_size": 64}))
    Image.new("RGB", (8, 8)).save(home / "results" / "photo.png")
    with serving(Server(HubHandler, repos={})) as hub:
        env = hub_environment(home, hub.url, HF_TOKEN=TOKEN)
        told = publish("--metrics", home / "results" / "metrics.json", "--output_dir", home / "out", env=env)
        read = run_script("", launcher=[sys.executable, "-c", READER], env=env, cwd=home)
        yield home / "out", hub.repos["owner/name"], told, (home, read)


def test_what_is_on_the_hub_is_what_was_written(published):
    """A file that stays behind, such as the code without which AutoModel loads nothing."""
    folder, repo, told, _ = published
    names = {"README.md", "comparison.png", "config.json", "model.safetensors", "vae_align.py"}
    assert {name: content for name, content in repo.items() if name in names} == {
        name: (folder / name).read_bytes() for name in names
    }
    assert "uploaded: " in told.stdout and TOKEN not in told.stdout + told.stderr


def test_the_module_is_read_back_by_name(published):
    """Other weights than were given; AutoModel that finds no class or drops the dtype; a missing model as a traceback."""
    home, read = published[3]
    latents = torch.linspace(-1, 1, 4 * 6 * 8).view(1, 4, 6, 8)
    expected = AlignPipeline.from_pretrained(SHIPPED).translate(latents)
    for name in ("hub.pt", "auto.pt"):
        torch.testing.assert_close(torch.load(home / name), expected)
    assert read.stdout.count("\n") == 1 and "owner/missing: no such folder here, and not to be had" in read.stdout


def test_the_card_says_what_the_module_is(published):
    """A card that no model tree shows, figures without their baselines, a picture that is not there, no licence."""
    card = ModelCard(published[1]["README.md"].decode())
    assert card.data.base_model == ["madebyollin/taesd", "madebyollin/taef1"] and card.data.license == "apache-2.0"
    assert "sd15" in card.data.tags and "flux1" in card.data.tags
    rows = ("| VAE2's own reconstruction | 20.50 |", "| **this module** | 22.50 |", "3 images at 64 px", "(comparison.png)")
    for said in (*rows, 'from_pretrained("owner/name")', "align.translate(latents)", "## Limits"):
        assert said in card.text
    assert "SSIM" not in card.text  # undefined in every row


def test_a_dry_run_asks_nobody(tmp_path):
    """An upload by somebody who only wanted to look."""
    told = publish("--dry_run", env=hub_environment(tmp_path, "http://127.0.0.1:9"), cwd=tmp_path)
    assert "nothing was uploaded" in told.stdout
    assert (tmp_path / "published" / "name" / "README.md").is_file()


def test_a_refused_token_is_one_line(tmp_path):
    """The hub client's traceback, with the token in it."""
    with serving(Server(HubHandler, repos={})) as hub:
        env = hub_environment(tmp_path, hub.url, HF_TOKEN=BAD_TOKEN)
        ended = publish("--output_dir", tmp_path / "out", env=env, check=False)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr and BAD_TOKEN not in ended.stderr
    assert "set HF_TOKEN to a token that may write" in ended.stderr.splitlines()[-1]


def test_a_module_is_shared_from_a_training_checkpoint(tmp_path):
    """Flags or weights of the wrong kind in the file; a nameless space that nobody hears of."""
    module = AlignPipeline.from_pretrained(SHIPPED).module
    vaes = {f"vae{n}": {"path": "/a/folder", "subfolder": None, "channels": c, "stride": 8} for n, c in ((1, 4), (2, 16))}
    training = {"config": {"train_data_dir": "/a/folder"}, "step": 3, "epoch": 1.0, "metrics": {"aligned": {"psnr": 20.5}}}
    content = {"format": "vae-align", "align_config": module.config.to_dict(), "state_dict": module.state_dict()}
    torch.save(content | vaes | training, tmp_path / "training.pth")
    output = tmp_path / "shared.safetensors"
    paths = ("--vae1_path", "owner/vae1", "--vae2_path", "owner/vae2", "--vae1_space", "sd15")
    result = run_script("tools/publish.py", str(tmp_path / "training.pth"), str(output), *paths)
    assert f"{output}: 4.92" in result.stdout
    assert "VAE2's latent space has no name" in result.stderr and "VAE1's" not in result.stderr
    assert b"/a/folder" not in output.read_bytes()
    pipeline = AlignPipeline.from_pretrained(output)
    assert pipeline.figures == training["metrics"]
    assert (pipeline.space1, pipeline.space2.name) == (SPACES["sd15"], None)


def test_an_output_that_cannot_be_shared_is_one_line(tmp_path):
    """A private path in a shared file, which nobody else can open; a file that is replaced; a name that no reader knows."""
    output, existing = tmp_path / "shared.safetensors", tmp_path / "existing.safetensors"
    existing.write_bytes(b"mine")
    said = {
        "name a hub id": [[output, "--vae1_path", place] for place in (tmp_path, "vaes/taesd/vae", "~/taesd")],
        "exists already": [[existing]],
        "ends in .safetensors": [[tmp_path / "shared.pth"]],
        "name either": [[], [output, "--repo", "owner/name"]],
        "name it owner/name": [["--repo", "name"]],
    }
    given = [(part, [SHIPPED, *argv]) for part, argvs in said.items() for argv in argvs]
    for (part, _), result in zip(given, run_each("tools/publish.py", [argv for _, argv in given], tmp_path, "torch")):
        assert result.returncode == 1 and part in result.stderr and "Traceback" not in result.stderr, result.args
    assert not output.exists() and existing.read_bytes() == b"mine"
