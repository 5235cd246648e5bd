"""tools/publish.py: one file, and a repository on a hub on the loopback interface, loaded from there."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script
from hostile import refusal
from hub import BAD_TOKEN, TOKEN, HubHandler, Server, hub_environment, serving
from huggingface_hub import ModelCard
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tools import publish as publish_tool
from tools.publish import model_card, numbers_in, pipeline_to_share
from vae_align import AlignPipeline, LatentSpace
from vaes.codec import SPACES
from vaes.pipeline import read_checkpoint, weights_digest

SHIPPED = ROOT / "assets" / "pretrained" / "taesd_to_taef1_latent.safetensors"
SHARED = AlignPipeline.from_pretrained(SHIPPED)
PRIVATE = "not for everybody"
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


def write_metrics(path, **weights):
    """A metrics.json with a row for each of the digests `weights`."""
    names = ("vae2", "reencode", *reversed(weights))
    ladder = {name: {"psnr": 20.5 + number, "ssim": None} for number, name in enumerate(names)}
    checkpoints = [{"row": row, "weights": digest} for row, digest in weights.items()]
    results = {"ladder": ladder, "checkpoint": "given", "checkpoints": checkpoints, "images": 3, "image_size": 64}
    path.write_text(json.dumps(results))
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder that was written, repository on the hub, program's output, home) after an upload."""
    home = tmp_path_factory.mktemp("home")
    for folder in ("results", "out/sub"):
        (home / folder).mkdir(parents=True)
    write_metrics(home / "results" / "metrics.json", aligned="another module", aligned_2=weights_digest(SHARED.module))
    for private in ("token", "out/.env", "out/sub/id_rsa"):
        (home / private).write_text(PRIVATE)
    (home / "results" / "00000_photo.png").symlink_to(home / "token")
    (home / "results" / "00001_photo.png").write_text(PRIVATE)
    private = PngInfo()
    private.add_text("Comment", PRIVATE)
    Image.new("RGB", (8, 8), "red").save(home / "results" / "photo.png", pnginfo=private)
    with serving(Server(HubHandler, repos={})) as hub:
        env = hub_environment(home, hub.url, HF_TOKEN=TOKEN)
        told = publish("--metrics", home / "results" / "metrics.json", "--output_dir", home / "out", env=env)
        read = run_script("", launcher=[sys.executable, "-c", READER], env=env, cwd=home)
        yield home / "out", hub.repos["owner/name"], told, (home, read)


def test_what_is_on_the_hub_is_what_was_written(published):
    """A file that stays behind; a private one that goes along, or is linked to; a picture's text."""
    folder, repo, told, _ = published
    names = ("README.md", "comparison.png", "config.json", "model.safetensors", "vae_align.py")
    assert repo == {name: (folder / name).read_bytes() for name in names}
    assert not [name for name, content in repo.items() if PRIVATE.encode() in content]
    assert Image.open(io.BytesIO(repo["comparison.png"])).getpixel((0, 0)) == (255, 0, 0)
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


def test_a_stranger_writes_nothing_into_the_card(tmp_path):
    """HTML, a heading or a formatting error from a file where figures and a name should be."""
    evil = "<script>alert(1)</script>\n# Bought"
    figures = {"aligned": {"psnr": 20.5, "images": evil, "ssim": evil, "detail": float("nan"), "bias": [1, evil]}, "x": evil}
    assert numbers_in(figures) == {"aligned": {"psnr": 20.5}}
    space = LatentSpace(evil, 4, 8, (0.0,) * 4, (1.0,) * 4)
    pipeline = AlignPipeline(SHARED.module, space, SHARED.space2, numbers_in(figures))
    args = SimpleNamespace(license="mit", base_model=None, repo="owner/name")
    text = model_card(pipeline, ["owner/a", "owner/b"], args, None).text
    assert "20.50" in text and "<script>" not in text and "\n# Bought" not in text


@pytest.mark.parametrize("weights, kept", [("of an earlier step", False), (weights_digest(SHARED.module), True), (None, True)])
def test_figures_of_an_earlier_step_stay_out(monkeypatch, caplog, weights, kept):
    """A checkpoint between two evaluations that is shared with the figures of the one before it."""
    metrics = {"aligned": {"psnr": 20.5} | ({"weights": weights} if weights else {})}
    content = read_checkpoint(SHIPPED) | {"metrics": metrics}
    monkeypatch.setattr(publish_tool, "read_checkpoint", lambda _: content)
    options = dict.fromkeys(("vae1_path", "vae2_path", "vae1_space", "vae2_space", "metrics"))
    pipeline, _ = pipeline_to_share(SimpleNamespace(checkpoint="x", dtype="float16", **options))
    assert pipeline.figures == ({"aligned": {"psnr": 20.5}} if kept else {})
    assert ("earlier step" in caplog.text) != kept


def test_an_output_that_cannot_be_shared_is_one_line(tmp_path, monkeypatch):
    """A private path, a file replaced, an unknown ending, another module's figures, another space, a link."""
    output, existing = tmp_path / "shared.safetensors", tmp_path / "existing.safetensors"
    existing.write_bytes(b"mine")
    (tmp_path / "link.png").symlink_to(existing)
    other = write_metrics(tmp_path / "metrics.json", aligned="another module")
    said = {
        "name a hub id": [[output, "--vae1_path", place] for place in (tmp_path, "vaes/taesd/vae", "~/taesd")],
        "exists already": [[existing]],
        "ends in .safetensors": [[tmp_path / "shared.pth"]],
        "name either": [[], [output, "--repo", "owner/name"]],
        "name it owner/name": [["--repo", "name"]],
        "judged other weights than this checkpoint's": [[output, "--metrics", other]],
        "was trained in sd15": [[output, "--vae1_space", "sdxl"]],
        "cannot be read as a picture": [["--repo", "o/n", "--picture", tmp_path / name] for name in (existing, "link.png")],
    }
    monkeypatch.chdir(tmp_path)
    for part, argvs in said.items():
        for argv in argvs:
            monkeypatch.setattr(sys, "argv", ["publish.py", str(SHIPPED), *map(str, argv)])
            refusal(publish_tool.main, part)
    assert not output.exists() and existing.read_bytes() == b"mine"
