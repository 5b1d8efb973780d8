"""A Hub on the loopback address: what huggingface.co answers when huggingface_hub downloads a model."""

import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is served: model id -> folder. `rates` slows a file down to so many bytes a second."""

    models: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    rates: dict[str, float] = field(default_factory=dict)
    url: str = ""
    commit: str = COMMIT  # the latest one
    downloads: list[str] = field(default_factory=list)  # MODEL/FILE asked for, in order
    asked: list[str] = field(default_factory=list)  # paths of all requests

    def files(self, model: str) -> list[Path]:
        folder = self.models[model]
        return sorted(path for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def serve(models: dict[str, Path], **options):
    """A running Hub; yields it with its `url`."""
    hub = Hub(models, **options)

    class Bound(Handler):
        pass

    Bound.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of /api/models/ID, /api/models/ID/tree/REVISION and /ID/resolve/REVISION/FILE."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        self.hub.asked.append(path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+)?", path):
            self.about(*found.groups())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.file(*found.groups())
        else:
            self.refuse(404, "EntryNotFound", f"nothing at {path}")

    def refuse(self, code, error, message):
        self.answer(code, b"{}", {"X-Error-Code": error, "X-Error-Message": message})

    def answer(self, code, body, headers=()):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def about(self, model, what):
        """A model's information, or the list of its files."""
        if model not in self.hub.models:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        root, files = self.hub.models[model], self.hub.files(model)
        named = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in files]
        if what == "tree":
            told = [
                {"type": "file", "path": name, "size": size, "oid": etag(root / name)} for name, size in named
            ]
        else:
            siblings = [{"rfilename": name, "size": size} for name, size in named]
            told = {
                "id": model,
                "sha": self.hub.commit,
                "siblings": siblings,
                "private": False,
                "tags": [],
                "downloads": 0,
            }
        return self.answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def file(self, model, name):
        """A file's bytes, or those of the range that is asked for."""
        if model not in self.hub.models:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if model in self.hub.gated:
            return self.refuse(401, "GatedRepo", f"Access to model {model} is restricted.")
        path = self.hub.models[model] / name
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", f"no {name}")
        data, code = path.read_bytes(), 200
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": self.hub.commit, "Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), int(asked[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, code = data[first : last + 1], 206
        if self.command == "GET":
            self.hub.downloads.append(f"{model}/{name}")
        if self.command == "HEAD" or name not in self.hub.rates:
            return self.answer(code, data, headers)
        self.send_response(code)
        for header in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(*header)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # of whoever was killed
            step = max(1, int(self.hub.rates[name] / 20))
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                time.sleep(0.05)
        return None


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
