"""The zoo: modules of a space into itself joined to pairs, what is shipped of it, and the tool that makes it."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, as_argv, child_environment, make_photo
from diffusers import AutoencoderTiny
from hostile import refusal
from pipelines import make_zoo, of_itself

from tools.make.zoo import embedded_psnr, results_page
from utils import read_json
from vae_align import IMAGE, ZOO, AlignError, AlignPipeline, read_zoo, zoo_pairs
from vaes.codec import SPACES
from vaes.families import family_of
from vaes.pipeline import PipelineWithVAEs, read_checkpoint

SPACE_NAMES = ("sd15", "sdxl", "sd3", "flux1", "flux2")  # that are shipped


@pytest.mark.parametrize("one, into", [("sd15", "flux1"), ("flux2", "sd15"), ("flux1", "flux2")])
def test_a_pair_is_the_first_ones_picture_in_the_second_ones_latents(one, into):
    """Catches parts taken from the wrong side, and a grid of the other's."""
    first, second = of_itself(one, 1), of_itself(into, 2, pooled_decoder=into == "flux2")
    pair = AlignPipeline.compose(first, second)
    latents = torch.randn(1, SPACES[one].channels, 64 // SPACES[one].stride, 96 // SPACES[one].stride)
    image = first.module.picture(latents)
    encoder = AlignPipeline.compose(None, second)
    expected = encoder.translate(image=image)
    torch.testing.assert_close(pair.translate(latents), expected)
    assert (pair.space1.name, pair.space2.name, encoder.config.input_types) == (one, into, ("image",))


@pytest.mark.parametrize(
    "first, second, said",
    [
        ({}, {"hidden_channels": 16}, "hidden_channels 8 and 16"),
        ({"input_types": ("image",)}, {}, "has no decoder"),
        ({}, {"architecture": "plain"}, "encodes no picture"),
    ],
)
def test_what_makes_no_pair_is_refused(first, second, said):
    """Catches a traceback of torch's, and a pair that computes something that nobody trained."""
    with pytest.raises(AlignError, match=said):
        AlignPipeline.compose(of_itself("sd15", **first), of_itself("flux1", **second))


def test_a_module_that_knows_its_own_latents_takes_no_others():
    """Catches a pair's module, trained with SD1.5's latents, that is given SDXL's in their place."""
    second = of_itself("flux1")
    torch.nn.init.ones_(second.module.latent_in.weight)
    with pytest.raises(AlignError, match="latents of its own VAE1"):
        AlignPipeline.compose(of_itself("sd15"), second)


def test_names_lead_to_the_pair_with_its_figures(tmp_path):
    """Catches figures left behind, names taken for files, an unknown name that ends in a traceback or lists every pair."""
    pair = make_zoo(tmp_path / "assets" / "zoo", "sd15", "flux1")
    shutil.copy(ROOT / "vae_align.py", tmp_path)  # the zoo is searched beside the file, as in ComfyUI's pack
    torch.save(torch.randn(1, 4, 8, 8), tmp_path / "latents.pt")
    program = (
        "import torch, vae_align as v; p = v.AlignPipeline.from_pretrained('sd15', 'flux1', dtype=torch.float64)\n"
        "print(v.zoo_pairs(), p.figures, p.space1.name, p.space2.name)\n"
        "torch.save(p.translate(torch.load('latents.pt').double()), 'carried.pt')\n"
        "v.AlignPipeline.pair('sd15', 'flux9')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=child_environment(), capture_output=True, text=True
    )
    assert ended.stdout == "[('sd15', 'flux1')] {'aligned': {}} sd15 flux1\n"
    assert ended.stderr.endswith("AlignError: 'sd15' to 'flux9': no such pair; nearest in name: flux1\n")
    expected = pair.translate(torch.load(tmp_path / "latents.pt"))
    torch.testing.assert_close(torch.load(tmp_path / "carried.pt").float(), expected, atol=1e-4, rtol=1e-4)


def test_a_pair_is_known_by_every_name_of_its_spaces(caplog):
    """Names that the README's table lists, or capital letters, refused; a space alone taken for a file that is missing; half of
    a pair taken for a module into another space, without a word."""
    for name, of in read_zoo()["spaces"].items():
        assert tuple(of["aliases"]) == family_of(name).aliases
    pair = AlignPipeline.from_pretrained("sd1.5", "FLUX")
    assert (pair.space1.name, pair.space2.name) == ("sd15", "flux1")
    assert AlignPipeline.from_pretrained("SD1:z-image").space2.name == "flux1"
    content = read_checkpoint("sd15 to flux1")
    assert PipelineWithVAEs.from_checkpoint(content).translate(torch.zeros(1, 4, 4, 4)).shape == (1, 16, 4, 4)
    for asked, said in ((("sdx", "FLUX"), "name: sdxl,"), (("sd15", "wan"), "known: flux1,"), (("a", "b"), "known: image,")):
        refusal(lambda asked=asked: AlignPipeline.from_pretrained(*asked), said)
    refusal(lambda: read_checkpoint("SD15"), "name a pair", "sd15:flux1")
    refusal(lambda: read_checkpoint("nothing:here"), "no such file")
    assert read_checkpoint("taesd_to_taef1")["vae1"]["space"]["name"] == "sd15" and not caplog.records
    for read in (AlignPipeline.from_pretrained, read_checkpoint):
        read(ZOO / "flux1.safetensors")
    assert caplog.text.count("from flux1 into itself; a pair is named by its two spaces") == 2


def test_a_mistyped_path_that_the_hub_may_know_is_said(tmp_path, monkeypatch, caplog):
    """`ckpt/final` that is not here, loaded from a stranger called ckpt without a word."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    refusal(lambda: AlignPipeline.from_pretrained("ckpt/final", local_files_only=True, cache_dir=tmp_path), "ckpt/final")
    assert "ckpt/final: no such file or folder here" in caplog.text and "on the hub" in caplog.text


def test_a_downloaded_module_is_used_whatever_keeps_the_hub_away(tmp_path, monkeypatch, caplog):
    """A module of the cache refused for a proxy that cannot work; an old one in place of what was to be fetched anew."""

    def download(name, file, local_files_only=False, force_download=False, **_):
        if not local_files_only or force_download:
            raise ValueError("Unknown scheme for proxy URL")
        return tmp_path / file

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    AlignPipeline.from_pretrained("sd15", "flux1").save_pretrained(tmp_path)
    assert AlignPipeline.from_pretrained("owner/module").space2.name == "flux1"
    assert "an earlier download is used; the hub gives none (Unknown scheme" in caplog.text
    refusal(lambda: AlignPipeline.from_pretrained("owner/module", force_download=True), "Unknown scheme")


HOSTILE = {  # what the manifest says, and what is said of it
    "a file elsewhere": ({"spaces": {"sd15": {"file": "../x.safetensors", "sha256": "0"}}, "pairs": {}}, "another folder"),
    "an absolute path": ({"spaces": {"sd15": {"file": "/x.safetensors", "sha256": "0"}}, "pairs": {}}, "another folder"),
    "no digest": ({"spaces": {"sd15": {"file": "x.safetensors"}}, "pairs": {}}, "sha256"),
    "a space that is missing": ({"spaces": {}, "pairs": {"sd15": {"flux1": {}}}}, "not in it"),
    "a list of pairs": ({"spaces": {}, "pairs": {"sd15": ["flux1"]}}, "cannot be read"),
    "nesting": ("[" * 200_000, "cannot be read"),
    "no JSON": ('{"spaces": []', "cannot be read"),
    "a pipe": (None, "a pipe"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_manifest_is_one_line(kind, tmp_path):
    """A file outside the zoo's folder that is loaded, a wait for a pipe's writer, a traceback."""
    manifest, said = HOSTILE[kind]
    path = tmp_path / "zoo.json"
    if manifest is None:
        os.mkfifo(path)
    else:
        path.write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    refusal(lambda: read_zoo(tmp_path), path, said)


def test_another_file_than_the_manifest_describes_is_refused(tmp_path, monkeypatch):
    """Weights that somebody has swapped, beside the figures of the old ones."""
    make_zoo(tmp_path, "sd15", "flux1")
    monkeypatch.setattr("vae_align.ZOO", tmp_path)
    monkeypatch.setattr(read_zoo, "__defaults__", (tmp_path,))
    AlignPipeline.pair("sd15", "flux1")
    of_itself("sd15", seed=9).save_pretrained(tmp_path / "sd15.safetensors")
    refusal(lambda: AlignPipeline.pair("sd15", "flux1"), tmp_path / "sd15.safetensors", "not the file that zoo.json describes")


@pytest.fixture(scope="module")
def shipped():
    """(the manifest, {space: the pipeline of its file})."""
    manifest = read_zoo()
    return manifest, {name: AlignPipeline.from_checkpoint(ZOO / of["file"]) for name, of in manifest["spaces"].items()}


@pytest.mark.parametrize("name", SPACE_NAMES)
def test_a_file_is_what_the_manifest_says(name, shipped):
    """Other weights beside the figures of the old ones; a file of another space under this one's name."""
    manifest, pipelines = shipped
    content = (ZOO / manifest["spaces"][name]["file"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == manifest["spaces"][name]["sha256"]
    assert (pipelines[name].space1, pipelines[name].space2) == (SPACES[name], SPACES[name])
    judged_with = [pair["of"][name] for pairs in manifest["pairs"].values() for pair in pairs.values() if name in pair["of"]]
    assert set(judged_with) == {manifest["spaces"][name]["sha256"]}
    assert b"/" not in re.sub(rb"madebyollin/\w+", b"", content[: content.index(b"}}") + 2])  # a folder of a machine


@pytest.mark.parametrize("into", SPACE_NAMES)
def test_a_pair_carries_photos_as_well_as_the_manifest_says(into, shipped):
    """Code that computes something else than was judged; a pair that the README names and that is not shipped."""
    manifest, pipelines = shipped
    for one in (IMAGE, *SPACE_NAMES):
        if one != into:
            pair = manifest["pairs"][one][into]
            psnr = embedded_psnr(pipelines.get(one), pipelines[into])
            assert psnr == pytest.approx(pair["embedded_psnr"], abs=0.05), one


def test_the_page_is_made_of_the_manifest(shipped):
    """Figures that were edited by hand, or trained anew without the page."""
    assert (ROOT / "RESULTS.md").read_text("utf-8") == results_page(shipped[0]), "run python tools/make/zoo.py"


def test_a_missing_manifest_is_said(tmp_path):
    """A missing zoo that is taken for an empty one."""
    with pytest.raises(AlignError, match="no such file"):
        read_zoo(tmp_path)
    assert zoo_pairs(tmp_path) == []


def test_a_killed_zoo_goes_on_where_it_was(tmp_path):
    """Catches a space trained again after a kill, and a manifest or a page that a kill leaves half written."""
    torch.manual_seed(0)
    for name, channels in (("taesd", 4), ("taef1", 16)):
        AutoencoderTiny(latent_channels=channels).save_pretrained(tmp_path / "vaes" / name)
    rng = np.random.default_rng(0)
    for folder in ("train", "eval"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            make_photo(rng, (256, 256)).save(tmp_path / folder / f"{number}.png")
    flags = {"pairs": "sd15:flux1", "minutes": 0.05, "image_size": 64, "device": "cpu", "precision": "float32", "vaes": "vaes"}
    flags |= {"train_data_dir": "train", "eval_data_dir": "eval", "work_dir": "work", "output_dir": "zoo", "results": "page.md"}
    command = [sys.executable, str(ROOT / "tools" / "make" / "zoo.py"), *as_argv(flags)]
    options = {"cwd": tmp_path, "env": child_environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    killed = subprocess.Popen(command, start_new_session=True, **options)
    manifest = tmp_path / "zoo" / "zoo.json"
    while not manifest.exists() and killed.poll() is None:
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    trained = (tmp_path / "zoo" / "sd15.safetensors").stat().st_mtime_ns
    ended = subprocess.run(command, **options)
    assert ended.returncode == 0, ended.stdout.decode()
    assert (tmp_path / "zoo" / "sd15.safetensors").stat().st_mtime_ns == trained
    made = read_json(manifest)
    assert set(made["spaces"]) == {"sd15", "flux1"} and set(made["pairs"]) == {"sd15"}
    assert "| SD1.5 → FLUX.1 |" in (tmp_path / "page.md").read_text("utf-8")
