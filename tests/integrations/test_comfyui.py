"""The ComfyUI pack: installed, loaded and used in an emulated host, and in a real ComfyUI where COMFYUI_PATH names one."""

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, child_environment
from PIL import Image
from pipelines import latents_of, make_zoo, untrained
from safetensors.torch import load_file, save_file

from vae_align import AlignPipeline, LatentSpace
from vaes.codec import SPACES

INSTALL = ROOT / "integrations" / "comfyui" / "install.py"
WORKFLOWS = ROOT / "integrations" / "comfyui" / "workflows"
MODULES = sorted(path.name for path in (ROOT / "assets" / "pretrained").glob("*.safetensors"))

HOST = {  # what of ComfyUI a pack meets: its folders, its devices, and its own package `utils`
    "utils/__init__.py": "OWNER = 'ComfyUI'\n",
    "comfy/__init__.py": "",
    "comfy/utils.py": "OWNER = 'ComfyUI'\n",
    "comfy/model_management.py": "import torch\n\ndef get_torch_device():\n    return torch.device('cpu')\n",
    "server.py": "from unittest.mock import Mock\n\nPromptServer = Mock()\n",
    "folder_paths.py": (
        "import os\n"
        "models_dir = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'models')\n"
        "folder_names_and_paths = {}\n"
        "def get_filename_list(name):\n"
        "    paths, extensions = folder_names_and_paths[name]\n"
        "    files = {file for path in paths if os.path.isdir(path) for file in os.listdir(path)}\n"
        "    return sorted(file for file in files if os.path.splitext(file)[1] in extensions)\n"
        "def get_full_path_or_raise(name, file):\n"
        "    for path in folder_names_and_paths[name][0]:\n"
        "        if os.path.isfile(os.path.join(path, file)):\n"
        "            return os.path.join(path, file)\n"
        "    raise FileNotFoundError(file)\n"
    ),
}


class Host:
    """An emulated ComfyUI with the pack installed and loaded; `monkeypatch` takes its modules away again."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder = folder
        for name, text in HOST.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        (folder / "custom_nodes").mkdir()
        installed = subprocess.run([sys.executable, str(INSTALL), str(folder)], capture_output=True, text=True)
        assert installed.returncode == 0, installed.stderr
        for name in ("utils", "comfy", "comfy.utils", "comfy.model_management", "folder_paths", "server"):
            monkeypatch.setitem(sys.modules, name, None)
            del sys.modules[name]
        monkeypatch.syspath_prepend(str(folder))
        pack = folder / "custom_nodes" / "align_latents"
        name = str(pack).replace(".", "_x_")  # as ComfyUI's `load_custom_node` does: by its file, under its path as a name
        spec = importlib.util.spec_from_file_location(name, pack / "__init__.py")
        self.pack = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.pack)
        self.utils = __import__("utils")
        self.nodes = self.pack.NODE_CLASS_MAPPINGS

    def add(self, pipeline, name):
        pipeline.save_pretrained(self.folder / "models" / "latent_align" / name)
        return name

    def align(self, latent, name, image=None):
        return self.nodes["AlignLatents"]().align(latent, name, image=image)[0]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Host(tmp_path_factory.mktemp("ComfyUI"), monkeypatch)


def test_the_pack_is_complete_and_takes_no_name_of_its_host(host):
    """A file that install.py forgets; an import of our own `utils`, which is ComfyUI's there."""
    assert host.utils.OWNER == "ComfyUI"
    assert set(host.nodes) == {"AlignLatents", "LoadAlignModule"} == set(host.pack.NODE_DISPLAY_NAME_MAPPINGS)
    chosen = host.nodes["AlignLatents"].INPUT_TYPES()["required"]["module_name"][0]
    assert set(MODULES) <= set(chosen)
    own = sys.modules[host.nodes["AlignLatents"].align.__globals__["AlignPipeline"].__module__]
    assert Path(own.__file__).parent == host.folder / "custom_nodes" / "align_latents"


def test_what_is_no_comfyui_is_refused(tmp_path):
    """A pack copied into a folder in which nothing looks for it."""
    ended = subprocess.run([sys.executable, str(INSTALL), str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == 1 and "no ComfyUI" in ended.stderr and "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())


def test_the_registry_finds_what_it_asks_for():
    """A pack that the registry refuses: a name that it forbids, a version that is no X.Y.Z, no publisher."""
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((INSTALL.parent / "pyproject.toml").read_text())
    name = settings["project"]["name"]
    assert "comfyui" not in name.lower() and len(name) < 100 and not name[0].isdigit()
    assert [part.isdigit() for part in settings["project"]["version"].split(".")] == [True] * 3
    assert settings["tool"]["comfy"]["PublisherId"] and settings["tool"]["comfy"]["DisplayName"]


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_a_workflow_uses_the_nodes_as_they_are(path, host):
    """A workflow that names an input or a module that is no more."""
    workflow = json.loads(path.read_text())
    aligning = [node for node in workflow.values() if node["class_type"] == "AlignLatents"]
    assert len(aligning) == 1
    assert aligning[0]["inputs"]["module_name"] in MODULES
    inputs = host.nodes["AlignLatents"].INPUT_TYPES()
    assert set(inputs["required"]) <= set(aligning[0]["inputs"]) <= set(inputs["required"]) | set(inputs["optional"])
    links = [link for node in workflow.values() for link in node["inputs"].values() if isinstance(link, list)]
    assert all(link[0] in workflow for link in links)


def test_a_pair_of_the_zoo_is_chosen_by_its_name(host):
    """A pair that the list leaves out, or that is searched among the files of models/latent_align."""
    pair = make_zoo(host.folder / "custom_nodes" / "align_latents" / "assets" / "zoo", "sd15", "flux1")
    chosen = host.nodes["LoadAlignModule"].INPUT_TYPES()["required"]["module_name"][0]
    assert "sd15 to flux1" in chosen and set(MODULES) <= set(chosen)
    raw = torch.randn(1, 4, 6, 8)
    loaded, described = host.nodes["LoadAlignModule"]().load("sd15 to flux1")
    assert described == "SD1.5 -> FLUX.1, from latents"
    for given in ({}, {"align_module": loaded}):
        aligned = host.nodes["AlignLatents"]().align({"samples": raw}, "sd15 to flux1", **given)[0]["samples"]
        torch.testing.assert_close(aligned, pair.translate(raw, raw=True))


@pytest.mark.parametrize("name", MODULES)
def test_the_node_gives_the_pipelines_raw_latents(name, host):
    """ComfyUI's raw latents taken for scaled ones; an image in the wrong order or range."""
    pipeline = AlignPipeline.from_pretrained(ROOT / "assets" / "pretrained" / name)
    raw, image = torch.randn(2, 4, 6, 8) * 4, torch.rand(2, 48, 64, 3)
    expected = pipeline.translate(raw, image.permute(0, 3, 1, 2) * 2 - 1, raw=True)
    loaded, described = host.nodes["LoadAlignModule"]().load(name)
    for given in ({}, {"align_module": loaded}):
        aligned = host.nodes["AlignLatents"]().align({"samples": raw}, name, image=image, **given)[0]["samples"]
        torch.testing.assert_close(aligned, expected)
    assert described.startswith("SD1.5 -> FLUX.1, from latents") and ("image" in described) == pipeline.uses_image


def test_what_other_nodes_attached_goes_along(host):
    """A mask or a batch's numbers lost, so that inpainting paints everything; the old grid's ratio kept; the input changed."""
    name = host.add(untrained(), "plain.safetensors")
    mask = torch.rand(1, 1, 64, 64)
    latent = {"samples": torch.randn(2, 4, 8, 8), "noise_mask": mask, "batch_index": [3, 5], "downscale_ratio_spacial": 8}
    aligned = host.align(latent, name)
    assert set(aligned) == {"samples", "noise_mask", "batch_index"}
    assert aligned["noise_mask"] is mask and aligned["batch_index"] == [3, 5]
    assert latent["samples"].shape[1] == 4 and "downscale_ratio_spacial" in latent
    assert aligned["samples"].dtype == torch.float32 and aligned["samples"].shape == (2, 16, 8, 8)


def test_frames_are_carried_one_by_one(host):
    """Frames and channels mixed up when latents of videos are folded; a picture's VAE that gets an axis of frames."""
    name = host.add(untrained(), "plain.safetensors")
    video = torch.randn(2, 4, 3, 6, 8)
    became = host.align({"samples": video, "batch_index": [0, 1]}, name)
    aligned = became["samples"]
    assert aligned.shape == (6, 16, 6, 8) and "batch_index" not in became
    torch.testing.assert_close(aligned[4:5], host.align({"samples": video[1:, :, 1]}, name)["samples"])
    to_video = host.add(untrained(space2=LatentSpace.from_scale("wan21", 16, 8, 0.3611, 0.1159)), "video.safetensors")
    kept = host.align({"samples": video}, to_video)["samples"]
    assert kept.shape == (2, 16, 3, 6, 8)
    torch.testing.assert_close(kept.movedim(2, 1).flatten(0, 1), aligned)
    assert host.align({"samples": video[:, :, 0]}, to_video)["samples"].shape == (2, 16, 1, 6, 8)


def test_what_latents_look_like_is_shown_on_the_node_at_each_run(host):
    """A line in the log alone, once, where nobody looks; a word about latents as ComfyUI keeps them."""
    name, say = host.add(untrained(), "plain.safetensors"), __import__("server").PromptServer.instance.send_progress_text
    for samples in (SPACES["sd15"].to_raw(latents_of("sd15")), latents_of("sd15"), latents_of("sd15")):
        host.nodes["AlignLatents"]().align({"samples": samples}, name, unique_id="7")
    first, again = (call.args for call in say.call_args_list)
    assert "look like scaled ones of sd15, given as raw ones" in first[0] and first[1] == "7" and again == first


def test_an_empty_latent_stays_empty(host):
    """Empty Latent Image through the bias of the module: a grey picture's latents, to which the sampler adds noise."""
    name = host.add(untrained(), "plain.safetensors")
    assert not host.align({"samples": torch.zeros(1, 4, 8, 8)}, name)["samples"].any()


def test_the_image_is_cropped_as_vae_encode_crops_it(host):
    """An image of another size than its latents, shifted against them by the crop; one image for a batch of latents."""
    pipeline = untrained(input_types=("image", "latent"))
    name = host.add(pipeline, "image.safetensors")
    image, raw = torch.rand(1, 53, 70, 4), torch.randn(2, 4, 6, 8)
    cropped = image[:, 2:50, 3:67, :3].permute(0, 3, 1, 2) * 2 - 1
    expected = pipeline.translate(raw, cropped.expand(2, -1, -1, -1), raw=True)
    torch.testing.assert_close(host.align({"samples": raw}, name, image)["samples"], expected)


def test_a_space_that_the_host_folds_itself_is_taken_as_it_is(host):
    """FLUX.2's latents normalised twice: ComfyUI's VAE folds and normalises them."""
    folded = LatentSpace("flux2", 128, 16, (0.5,) * 128, (2.0,) * 128, 2)
    pipeline = untrained(space2=folded)
    name = host.add(pipeline, "folded.safetensors")
    raw = torch.randn(1, 4, 6, 8)
    expected = pipeline.translate(SPACES["sd15"].to_scaled(raw))
    torch.testing.assert_close(host.align({"samples": raw}, name)["samples"], expected)


SMALL = torch.randn(1, 4, 8, 8)
BOTH = ("image", "latent")


@pytest.mark.parametrize(
    "samples, inputs, space2, image, said",
    [
        (torch.randn(1, 16, 8, 8), ("latent",), "flux1", None, "takes 4: sd15 .*look like latents of flux1 "),
        (torch.randn(1, 128, 8, 8), ("latent",), "flux1", None, "latents of flux2, ltx, ltx2 have 128"),
        (torch.randn(1, 5, 8, 8), ("latent",), "flux1", None, "5 channels; this module takes 4: sd15"),
        (torch.randn(1, 8, 100), ("latent",), "flux1", None, "no pictures' latents"),
        (SMALL, BOTH, "flux1", None, "connect the image"),
        (SMALL, BOTH, "flux1", torch.rand(1, 128, 128, 3), "does not belong"),
        (SMALL, ("latent",), LatentSpace.from_scale(None, 16, 8), None, "does not name VAE2's latent space"),
    ],
    ids=("FLUX.1", "FLUX.2", "no known space", "sound", "no image", "another image", "no name"),
)
def test_an_input_that_does_not_fit_is_refused(samples, inputs, space2, image, said, host):
    """A bare "expected 4 channels, got 16", without a remedy; sound taken for a picture; a module run without its image."""
    name = host.add(untrained("sd15", space2, inputs), "refusing.safetensors")
    with pytest.raises(ValueError, match=said) as error:
        host.align({"samples": samples}, name, image)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# A real ComfyUI


class Server:
    """A real ComfyUI's HTTP interface on the loopback interface."""

    def __init__(self, url: str):
        self.url = url

    def ask(self, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def run(self, workflow: dict) -> dict:
        """Post a workflow and wait; {node: its outputs}. AssertionError with the server's words if it fails."""
        try:
            number = self.ask("/prompt", {"prompt": workflow})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        for _ in range(600):
            history = self.ask(f"/history/{number}").get(number)
            if history:
                assert history["status"]["status_str"] == "success", history["status"]["messages"]
                return history["outputs"]
            time.sleep(0.2)
        raise AssertionError("the workflow does not end")


@contextlib.contextmanager
def serving(comfyui: Path, python: str, base: Path, port: int):
    """A real ComfyUI on the CPU whose models, nodes, input and output are in `base`; its `Server`, and its log in base/log."""
    page = base / "page"
    page.mkdir()
    (page / "index.html").write_text("<!doctype html>")
    switches = ["--cpu", "--disable-api-nodes", "--front-end-root", str(page), "--base-directory", str(base)]
    command = [python, str(comfyui / "main.py"), *switches, "--port", str(port), "--database-url", "sqlite:///:memory:"]
    with open(base / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=base, stdout=log, stderr=log, env=child_environment())
    server = Server(f"http://127.0.0.1:{port}")
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                server.ask("/system_stats")
                break
            assert process.poll() is None, (base / "log").read_text()
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    """(server, its base folder) of a real ComfyUI with the pack, the shipped modules and the tiny autoencoders."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH names no ComfyUI")
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "input", "models/vae_approx"):
        (base / name).mkdir(parents=True)
    subprocess.run([sys.executable, str(INSTALL), str(base)], check=True)
    for name in ("taesd", "taef1"):
        halves = {"encoder": {}, "decoder": {}}
        for key, tensor in load_file(shared / "vaes" / name / "diffusion_pytorch_model.safetensors").items():
            half, _, number, rest = key.split(".", 3)
            number = int(number) + (half == "decoder")  # ComfyUI's decoder counts the clamp as its first layer
            halves[half][f"{number}.{rest}"] = tensor
        for half, tensors in halves.items():
            save_file(tensors, base / "models" / "vae_approx" / f"{name}_{half}.safetensors")
    shutil.copy(sorted((shared / "photos" / "eval").glob("*.jpg"))[0], base / "photo.jpg")
    photo = Image.open(base / "photo.jpg").convert("RGB")
    photo.crop((0, 0, 250, 203)).save(base / "input" / "example.png")  # sides that VAEEncode must crop
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving(Path(path), os.environ.get("COMFYUI_PYTHON", sys.executable), base, port) as server:
        yield server, base


@pytest.mark.parametrize("name", MODULES)
def test_a_real_comfyui_draws_our_pipelines_picture(name, real, shared):
    """Whatever the emulated host does not have: the loader, the folders, the latents' scale, the crop of the real program."""
    from vaes.codec import Codec
    from vaes.loading import load_vae_model

    server, base = real
    workflow = json.loads((WORKFLOWS / "tiny_autoencoders_cpu.json").read_text())
    node = next(key for key, node in workflow.items() if node["class_type"] == "AlignLatents")
    pipeline = AlignPipeline.from_pretrained(ROOT / "assets" / "pretrained" / name)
    workflow[node]["inputs"] |= {"module_name": name} | ({"image": ["1", 0]} if pipeline.uses_image else {})
    outputs = server.run(workflow)
    saved = next(iter(outputs.values()))["images"][0]["filename"]
    drawn = np.array(Image.open(base / "output" / saved)).astype(int)

    codecs = [Codec(load_vae_model(str(shared / "vaes" / vae), "", None, "cpu", torch.float32)) for vae in ("taesd", "taef1")]
    levels = torch.from_numpy(np.array(Image.open(base / "input" / "example.png"))[1:201, 1:249])
    image = (levels.permute(2, 0, 1)[None].float() / 255) * 2 - 1
    decoded = codecs[1].decode(pipeline.translate(codecs[0].encode(image), image))[0].permute(1, 2, 0)
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).numpy().astype(int)  # SaveImage cuts the digits off
    assert drawn.shape == expected.shape == (200, 248, 3)
    assert abs(drawn - expected).max() <= 1


def test_a_real_comfyui_knows_every_node_of_the_refine_workflow(real):
    """A node or an input that ComfyUI does not have; FLUX.1 itself does not fit into a test."""
    server, _ = real
    workflow = json.loads((WORKFLOWS / "sd15_to_flux1_refine.json").read_text())
    known = server.ask("/object_info")
    for node in workflow.values():
        inputs = known[node["class_type"]]["input"]
        names = set(inputs.get("required", {})) | set(inputs.get("optional", {}))
        assert set(inputs.get("required", {})) <= set(node["inputs"]) <= names, node
