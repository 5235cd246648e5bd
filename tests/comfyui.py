"""ComfyUI for the tests: a small host with its names and its way of loading packs, and a client for the real server."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from conftest import ROOT, child_environment

INSTALL = ROOT / "integrations" / "comfyui" / "install.py"
HOST = {  # what of ComfyUI a pack meets: its folders, its devices, and its own package `utils`
    "utils/__init__.py": "OWNER = 'ComfyUI'\n",
    "comfy/__init__.py": "",
    "comfy/utils.py": "OWNER = 'ComfyUI'\n",
    "comfy/model_management.py": "import torch\n\ndef get_torch_device():\n    return torch.device('cpu')\n",
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


def make_host(folder: Path) -> Path:
    """A folder that looks like ComfyUI to a node pack."""
    for name, text in HOST.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "custom_nodes").mkdir()
    return folder


def load_pack(pack: Path):
    """Import a pack as ComfyUI's `load_custom_node` does: by its file, under its path as a name, its folder not on sys.path."""
    name = str(pack).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, pack / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


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
