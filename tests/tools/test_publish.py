"""tools/publish.py against a hub on the loopback interface, and what others load from it."""

import json
import sys

import pytest
import torch
from conftest import ROOT, run_script
from hub import BAD_TOKEN, TOKEN, HubHandler, Server, hub_environment, serving
from huggingface_hub import ModelCard
from PIL import Image

from vae_align import AlignPipeline

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
    """Other weights than were given; AutoModel that finds no class; a missing model as a traceback."""
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
    for said in (
        "| VAE2's own reconstruction | 20.50 |",
        "| **this module** | 22.50 |",
        "3 images at 64 px",
        "(comparison.png)",
    ):
        assert said in card.text
    assert "SSIM" not in card.text  # undefined in every row
    assert 'from_pretrained("owner/name")' in card.text and "## Limits" in card.text


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
