"""Hub access against a hub and a proxy of our own on the loopback interface: nothing here reaches the network."""

import functools
import http.client
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import torch
from conftest import as_argv, make_kl_vae, run_script, tiny_flags
from hub import BAD_TOKEN, OTHER_TOKEN, TOKEN, Handler, HubHandler, Server, hub_environment, serving
from runs import QUIET

from vae_align import AlignConfig, align_module
from vaes.codec import Codec
from vaes.pipeline import PipelineWithVAEs

PROXY_PASSWORD = "proxypassword"
UNKNOWN_PROXY = "socks://127.0.0.1:7891/"  # a scheme that the hub client does not know
HUB_NAME = "hub.invalid"  # a name that no resolver knows: only the proxy can get there


# ----------------------------------------------------------------------------------------------------------------------
# A hub and a proxy


class ProxyHandler(Handler):
    """A forward proxy for plain HTTP that knows one host."""

    def do_GET(self):
        self.note()
        url = urlsplit(self.path)
        if url.hostname != HUB_NAME:
            return self.answer(502)
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.hub_port, timeout=30)
        headers = {name: value for name, value in self.headers.items() if not name.lower().startswith("proxy-")}
        upstream.request(self.command, url.path, headers=headers)
        reply = upstream.getresponse()
        body = reply.read()
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in ("server", "date"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        upstream.close()

    do_HEAD = do_GET

    def do_CONNECT(self):
        self.note()
        self.answer(502)


@pytest.fixture(scope="module")
def repos(vae_folders, tmp_path_factory):
    """What the hub holds: flat (the repository is the VAE), nested (in `vae`), pickled (.bin weights), gated, no_vae."""
    pickled = tmp_path_factory.mktemp("pickled")
    vae = make_kl_vae(4)
    vae.save_config(pickled)
    torch.save(vae.state_dict(), pickled / "diffusion_pytorch_model.bin")

    def files(folder, prefix=""):
        return {prefix + entry.name: entry.read_bytes() for entry in folder.iterdir()}

    return {
        "owner/flat": files(vae_folders["kl4"]),
        "owner/nested": {"model_index.json": b"{}", **files(vae_folders["kl16"], "vae/")},
        "owner/pickled": files(pickled),
        "owner/gated": files(vae_folders["kl16"]),
        "owner/no_vae": {"config.json": b"{}"},
    }


@pytest.fixture(scope="module")
def hub(repos):
    with serving(Server(HubHandler, repos=repos)) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(hub):
    with serving(Server(ProxyHandler, hub_port=hub.server_port)) as server:
        yield server


# ----------------------------------------------------------------------------------------------------------------------
# Programs that use them


@pytest.fixture(scope="module", autouse=True)
def no_proxy_or_token_of_the_machine():
    """Subprocesses inherit this interpreter's environment, and the machine's own proxy and token must not be in it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
            patch.delenv(name, raising=False)
            patch.delenv(name.lower(), raising=False)
        for name in ("HUGGINGFACE_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"):
            patch.delenv(name, raising=False)
        yield


LOADER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
from utils import UserError
from vaes.codec import Codec
from vaes.loading import load_vae_model
told = {}
for name, (repo, subfolder, cache_dir, environment) in json.loads(sys.argv[2]).items():
    for variable in ("HUGGINGFACE_TOKEN", "HF_TOKEN", "ALL_PROXY"):
        os.environ.pop(variable, None)
    os.environ.update(environment)
    try:
        vae = load_vae_model(repo, subfolder, cache_dir, "cpu", torch.float32, "--vae2_path")
        latents = Codec(vae).encode(torch.zeros(1, 3, 16, 16))
        told[name] = {"channels": latents.shape[1]}
    except UserError as error:
        told[name] = {"error": str(error)}
print(json.dumps(told))
"""


def run_loader(cases, env, cwd):
    """{case: what came of it} of loading VAEs by hub id in a fresh interpreter, and everything it printed."""
    launcher = [sys.executable, "-c", LOADER]  # run_script adds the repository as its first argument
    ended = run_script("", json.dumps(cases), launcher=launcher, env=env, cwd=cwd)
    return SimpleNamespace(told=json.loads(ended.stdout), output=ended.stdout + ended.stderr)


def load_one_after_another(hub, home):
    """One interpreter that loads, or fails to load, one VAE after another; then one that may not use the network."""
    first, in_two_lines = {"HUGGINGFACE_TOKEN": TOKEN}, f"{TOKEN[:9]}\n{TOKEN[9:]}\n"
    cases = {
        "broken_proxy": ("owner/other", "vae", None, {"ALL_PROXY": UNKNOWN_PROXY}),
        "flat": ("owner/flat", "vae", None, {}),
        "nested": ("owner/nested", "vae", str(home / "my_cache"), first),
        "other_variable": ("owner/gated", "vae", None, {"HF_TOKEN": OTHER_TOKEN}),
        "pickled": ("owner/pickled", "", None, {}),
        "wrong_subfolder": ("owner/nested", "", None, {}),
        "no_vae": ("owner/no_vae", "vae", None, {}),
        "page": ("https://huggingface.co/owner/flat/tree/main", "vae", None, {}),
        "gated": ("owner/gated", "vae", str(home / "second_cache"), {}),
        "gated_with_token": ("owner/gated", "vae", str(home / "second_cache"), first),
        "missing": ("owner/missing", "vae", None, {}),
        "missing_with_token": ("owner/missing", "vae", None, first),
        "bad_token": ("owner/flat", "vae", str(home / "third_cache"), {"HUGGINGFACE_TOKEN": BAD_TOKEN}),
        "forbidden": ("owner/forbidden", "vae", None, first),
        "token_in_two_lines": ("owner/flat", "vae", str(home / "fourth_cache"), {"HUGGINGFACE_TOKEN": in_two_lines}),
    }
    online = run_loader(cases, hub_environment(home, hub.url), home)
    cases = {"cached": ("owner/flat", "vae", None, {}), "not_cached": ("owner/other", "vae", None, {})}
    offline = run_loader(cases, hub_environment(home, hub.url, HF_HUB_OFFLINE="1"), home)
    return SimpleNamespace(told=online.told, output=online.output, offline=offline, seen=hub.seen, home=home)


def prepare_programs(hub, proxy, photo_folders, home):
    """{name: function that runs a program}: training and evaluation through the proxy, training with a gated VAE."""
    flags = tiny_flags({"kl4": "owner/flat", "kl16": "owner/nested"}, photo_folders, home)
    flags |= {**QUIET, "max_train_steps": 1, "cache_latents": None, "no_cache_latents": True, "cache_dir": home}
    with_password = f"http://user:{PROXY_PASSWORD}@127.0.0.1:{proxy.server_port}"
    pipeline = PipelineWithVAEs(
        align_module(AlignConfig(hidden_channels=8)),
        Codec(make_kl_vae(4), "owner/flat", "vae"),
        Codec(make_kl_vae(16, scaling_factor=0.3611, shift_factor=0.1159), "owner/nested", "vae"),
    )
    config = {"image_size": 32, "precision": "float32"}
    judging = {
        "checkpoint": pipeline.save_checkpoint(home / "given", config, step=1, epoch=1, metrics={}),
        "vae1_path": "owner/flat",
        "vae2_path": "owner/nested",
        "eval_data_dir": photo_folders[1],
        "output_dir": home / "eval" / "results",
        "num_workers": 0,
        "device": "cpu",
        "cache_dir": home,
    }
    through_proxy = f"http://{HUB_NAME}"
    runs = {
        "train": ("train_align_with_args.py", {**flags, "proxy": with_password}, through_proxy, TOKEN),
        "eval": ("eval_align.py", {**judging, "proxy": proxy.url}, through_proxy, OTHER_TOKEN),
        "gated": ("train_align_with_args.py", {**flags, "vae2_path": "owner/gated"}, hub.url, TOKEN),
    }

    def run_one(name):
        script, given, endpoint, token = runs[name]
        env = hub_environment(home / name, endpoint, HUGGINGFACE_TOKEN=token)
        if "proxy" in given:  # what is typed wins
            env |= {"ALL_PROXY": UNKNOWN_PROXY, "all_proxy": UNKNOWN_PROXY, "NO_PROXY": HUB_NAME}
        places = {key: home / name / key for key in ("log_dir", "save_dir", "cache_dir") if key in given}
        return run_script(script, *as_argv({**given, **places}), env=env, cwd=home / name, check=False)

    return {name: functools.partial(run_one, name) for name in runs}


@pytest.fixture(scope="module")
def everything(repos, hub, proxy, photo_folders, tmp_path_factory):
    """(what loading by hub id told, the ended programs): all subprocesses of this file, two at a time."""
    homes = [tmp_path_factory.mktemp(name) for name in ("loads", "programs")]
    with serving(Server(HubHandler, repos=repos)) as hub_of_loads, ThreadPoolExecutor(2) as pool:
        loads = pool.submit(load_one_after_another, hub_of_loads, homes[0])
        programs = {name: pool.submit(run) for name, run in prepare_programs(hub, proxy, photo_folders, homes[1]).items()}
        ended = {name: future.result() for name, future in programs.items()}
        return loads.result(), SimpleNamespace(**ended, home=homes[1])


@pytest.fixture(scope="module")
def loads(everything):
    return everything[0]


@pytest.fixture(scope="module")
def programs(everything):
    return everything[1]


def test_a_hub_id_is_downloaded_with_and_without_the_subfolder(loads):
    """A subfolder that is required or ignored, .bin weights or an address refused, a token with its line ends."""
    expected = {"flat": 4, "nested": 16, "other_variable": 16, "pickled": 4, "page": 4, "token_in_two_lines": 4}
    assert {name: loads.told[name].get("channels") for name in expected} == expected, loads.told


def test_only_config_and_weights_are_asked_for(loads):
    """A snapshot of a repository that holds a whole diffusion model, or files fetched twice."""
    fetched = [
        path.rpartition("/")[2] for method, path, _ in loads.seen if method == "GET" and "/owner/nested/resolve/" in path
    ]
    assert sorted(fetched) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_cached_vae_needs_no_network(loads):
    """The subfolder that does not exist looked for on the hub every time; the folder itself never tried offline."""
    assert loads.offline.told["cached"].get("channels") == 4, loads.offline.told
    text = loads.offline.told["not_cached"]["error"]
    assert "--vae2_path owner/other" in text
    assert "\n" not in text


def test_the_token_arrives_as_a_bearer_header(loads):
    """Only one of the two variables read, or a token that is sent with half of the requests."""

    def sent(repo):
        return {headers.get("authorization") for _, path, headers in loads.seen if path.startswith(f"/owner/{repo}/")}

    assert f"Bearer {TOKEN}" in sent("nested")
    assert f"Bearer {OTHER_TOKEN}" in sent("gated")
    assert sent("pickled") == {None}  # no token in the environment: none is sent
    assert sent("missing") == {None, f"Bearer {TOKEN}"}


def test_nobody_logs_in_and_the_token_is_neither_written_nor_printed(loads, programs):
    """login(), which writes the token below HF_HOME; a config, log or library's error that shows it."""
    assert not [path for _, path, _ in loads.seen if "whoami" in path]
    texts = [loads.output, loads.offline.output]
    texts += [ended.stdout + ended.stderr for ended in (programs.train, programs.eval, programs.gated)]
    for home in (loads.home, programs.home):
        entries = list(home.rglob("*"))
        assert len(entries) > 20
        assert not {"token", "stored_tokens"} & {entry.name for entry in entries}
        texts += [str(entry.relative_to(home)) for entry in entries]
        texts += [entry.read_bytes().decode(errors="replace") for entry in entries if entry.is_file()]
    for secret in (TOKEN, OTHER_TOKEN, BAD_TOKEN, PROXY_PASSWORD):
        assert not any(secret in text for text in texts)


@pytest.mark.parametrize(
    "case, repo, said",
    [
        ("gated", "owner/gated", "HUGGINGFACE_TOKEN"),
        ("gated_with_token", "owner/gated", "licence"),
        ("missing", "owner/missing", "HUGGINGFACE_TOKEN"),
        ("missing_with_token", "owner/missing", "no such model"),
        ("no_vae", "owner/no_vae", "no VAE in vae or its root; there is config.json"),
        ("wrong_subfolder", "owner/nested", "there are models in vae; name the VAE's as the subfolder"),
        ("broken_proxy", "owner/other", "the proxy of ALL_PROXY"),
        ("bad_token", "owner/flat", "HUGGINGFACE_TOKEN"),
        ("forbidden", "owner/forbidden", "HUGGINGFACE_TOKEN"),
    ],
)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(loads, case, repo, said):
    """The hub client's page of text, or `check the network` where the token is what is wrong."""
    text = loads.told[case].get("error")
    assert text, loads.told[case]
    assert f"--vae2_path {repo}" in text
    assert said in text
    assert "\n" not in text and len(text) < 600


def test_the_program_ends_with_one_line(programs):
    """A traceback, exit status 0, or the hub client's chatter around the message."""
    ended = programs.gated
    (line,) = ended.stderr.strip().splitlines()
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "--vae2_path owner/gated" in line
    assert "licence" in line


@pytest.mark.parametrize("name, token", [("train", TOKEN), ("eval", OTHER_TOKEN)], ids=["train", "eval"])
def test_a_program_reaches_the_hub_through_the_proxy(programs, proxy, name, token):
    """A --proxy that yields to the environment's, a --cache_dir for one VAE only, telemetry that leaves the machine."""
    ended, home = getattr(programs, name), programs.home / name
    assert ended.returncode == 0, ended.stderr
    assert {urlsplit(path).hostname for _, path, _ in proxy.seen} == {HUB_NAME}
    through = [(path, headers) for _, path, headers in proxy.seen if headers.get("authorization") == f"Bearer {token}"]
    asked = {urlsplit(path).path.split("/resolve/")[0] for path, _ in through}
    assert asked == {"/owner/flat", "/owner/nested"}
    kept = {entry.parent.name for entry in (home / "cache_dir").glob("*/snapshots")}
    assert kept == {"models--owner--flat", "models--owner--nested"}
    assert not list((home / "hub_cache").glob("models--*"))
    if name == "train":
        assert all("proxy-authorization" in headers for _, headers in through)  # user and password of the URL
        assert list((home / "save_dir").glob("*.pth"))
    else:
        assert json.loads((home / "results" / "metrics.json").read_text())["images"] == 5
