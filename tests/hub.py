"""A hub of our own on the loopback interface, and the environment of a program that meets no other."""

import base64
import contextlib
import json
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

TOKEN, OTHER_TOKEN, BAD_TOKEN = "hf_secretOfTheFirstVariable", "hf_secretOfTheSecondVariable", "hf_secretThatExpired"
COMMIT = "0123456789abcdef" * 2 + "01234567"


class Server(ThreadingHTTPServer):
    """`seen` keeps (method, path, headers with names in lower case) of every request."""

    daemon_threads = True

    def __init__(self, handler, **attributes):
        super().__init__(("127.0.0.1", 0), handler)
        self.seen = []
        vars(self).update(attributes)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *args):
        pass

    def note(self):
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append((self.command, self.path, headers))

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class HubHandler(Handler):
    """What hf_hub_download asks for: HEAD and GET /{owner}/{name}/resolve/{revision}/{file}."""

    def do_GET(self):
        self.note()
        path = urlsplit(self.path).path
        listed, separator, _ = path.removeprefix("/api/models/").partition("/tree/")
        if separator and listed in self.server.repos:
            files = self.server.repos[listed]
            return self.tell([{"type": "file", "path": name, "size": len(files[name]), "oid": COMMIT} for name in files])
        if path == "/api/whoami-v2":
            return self.tell({"type": "user", "name": "owner", "auth": {"accessToken": {"role": "write"}}})
        model = path.removeprefix("/api/models/").partition("/revision/")[0]
        if model in self.server.repos:
            return self.tell({"id": model, "sha": COMMIT, "siblings": []})
        repo, separator, rest = path.lstrip("/").partition("/resolve/")
        name, signed_in = rest.partition("/")[2], "Authorization" in self.headers
        if not separator:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif BAD_TOKEN in self.headers.get("Authorization", ""):
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        elif repo == "owner/forbidden":
            self.answer(403, X_Error_Message="this token may not read that")
        elif repo not in self.server.repos:
            self.answer(404 if signed_in else 401, X_Error_Code="RepoNotFound")
        elif repo == "owner/gated" and OTHER_TOKEN not in self.headers.get("Authorization", ""):
            self.answer(403 if signed_in else 401, X_Error_Code="GatedRepo")
        elif name not in self.server.repos[repo]:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            body = self.server.repos[repo][name]
            self.answer(200, body, ETag=f'"{sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_POST(self):
        """What an upload asks for: a repository made, the files' kinds, and one commit with all of them."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.note()
        path = urlsplit(self.path).path
        if TOKEN not in self.headers.get("Authorization", ""):
            return self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            told = json.loads(body)
            repo = "/".join(filter(None, (told.get("organization"), told["name"])))
            self.server.repos.setdefault(repo, {})
            return self.tell({"url": f"{self.server.url}/{repo}", "id": repo, "name": repo})
        if path == "/api/validate-yaml":
            return self.tell({"errors": [], "warnings": []})
        repo, separator, _ = path.removeprefix("/api/models/").partition("/preupload/")
        if separator:
            files = [file | {"uploadMode": "regular", "shouldIgnore": False, "oid": None} for file in json.loads(body)["files"]]
            return self.tell({"files": files})
        repo, separator, _ = path.removeprefix("/api/models/").partition("/commit/")
        if not separator:
            return self.answer(404)
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.tell({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.url}/{repo}/commit/{COMMIT}"})

    def tell(self, value):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")


@contextlib.contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def hub_environment(home, endpoint, **changes):
    """(environment changes, names to unset) for a program that keeps everything it writes below `home`."""
    home.mkdir(parents=True, exist_ok=True)
    places = {"HOME": "", "HF_HOME": "hf_home", "HF_HUB_CACHE": "hub_cache", "XDG_CACHE_HOME": "xdg", "TMPDIR": ""}
    return {
        **{name: str(home / place) for name, place in places.items()},
        "HF_ENDPOINT": endpoint,
        "HF_HUB_ETAG_TIMEOUT": "120",  # its ten seconds may pass on a busy machine
        "HF_HUB_DOWNLOAD_TIMEOUT": "120",
        "NO_COLOR": "1",
        **changes,
    }
