"""A stand-in of the Hugging Face hub on loopback: repositories from folders, with the requests by path; and a guard
that refuses a program every connection to elsewhere.

    hub = Hub()                                # listens; environment() is what a program needs to ask it
    hub.add("models", "org/name", folder)      # every file of the folder, under a commit of their content
    hub.requests                               # ["GET /api/models/org/name", "HEAD /org/name/resolve/…", …]

It answers the requests that huggingface_hub and datasets make, with the fields that they read:
https://huggingface.co/docs/hub/api has the endpoints.
"""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.surroundings import ROOT

Repository = tuple[str, dict[str, bytes]]
"""The commit and the files by path."""


class Hub:
    """The server, in threads of this process."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.closed = False
        """Whether every request is answered with 503, and still listed."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, kind: str, name: str, folder: Path) -> str:
        """Makes a folder's files the newest revision of a repository (`models` or `datasets`); returns the commit."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        commit = hashlib.sha1(json.dumps([(path, _sha1(files[path])) for path in sorted(files)]).encode()).hexdigest()
        self.repositories[kind, name] = (commit, files)
        return commit

    def fetched(self) -> list[str]:
        """The files that were downloaded, sorted."""
        gets = [
            request.split("/resolve/")[1]
            for request in self.requests
            if request.startswith("GET") and "/resolve/" in request
        ]
        return sorted(path.split("/", 1)[1] for path in gets)

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a program that knows this hub alone, with caches of its own in `home`. The guard lists in
    home/connections what the program wanted to reach beside loopback.
    """
    home.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": hub.url,
        "HF_UPDATE_DOWNLOAD_COUNTS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "DPO_CACHE": str(home / "dpo"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{Path(__file__).parent / 'guard'}:{ROOT}",
        "GUARD_LOG": str(home / "connections"),
    }


def connections(home: Path) -> list[str]:
    """What guarded programs wanted to reach beside loopback."""
    log = home / "connections"
    return log.read_text().splitlines() if log.exists() else []


def _handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Prints nothing."""

        def do_GET(self) -> None:
            self._answer("GET")

        def do_HEAD(self) -> None:
            self._answer("HEAD")

        def do_POST(self) -> None:
            self._answer("POST")

        def _answer(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            url = urlsplit(self.path)
            hub.requests.append(f"{method} {unquote(url.path)}")
            status, headers, content = (
                (503, {}, b"") if hub.closed else _answer(hub, unquote(url.path), url.query, body)
            )
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if method != "HEAD":
                self.wfile.write(content)

    return Handler


Answer = tuple[int, dict[str, str], bytes]
CLOSED: Answer = (503, {}, b"")
MISSING: Answer = (404, {"X-Error-Code": "RepoNotFound"}, b"{}")


def _answer(hub: Hub, path: str, query: str, body: bytes) -> Answer:
    """The answer to a request: of the API, or a file."""
    parts = path.strip("/").split("/")
    is_api = parts[0] == "api"
    parts = parts[1:] if is_api else parts
    kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
    known = next(
        (name for of, name in hub.repositories if of == kind and "/".join([*parts, ""]).startswith(f"{name}/")), None
    )
    if known is None:
        return MISSING
    commit, files = hub.repositories[kind, known]
    rest = parts[known.count("/") + 1 :]
    if is_api:
        return _api(hub.repositories[kind, known], known, rest, query, body)
    return _file(commit, files, rest)


def _api(repository: Repository, name: str, rest: list[str], query: str, body: bytes) -> Answer:
    commit, files = repository
    verb, revision, below = (*rest, "", "")[0], (*rest, "", "")[1], "/".join(rest[2:])
    if revision not in ("", "main", commit):
        return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
    if verb == "tree":
        return _json(_tree(files, below, recursive="recursive=true" in query.lower()))
    if verb == "paths-info":
        form = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
        return _json(_paths_info(files, form["paths"]))
    siblings = [{"rfilename": path, "size": len(files[path])} for path in sorted(files)]
    facts = {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
    return _json({"id": name, "sha": commit, "siblings": siblings, **facts})


def _tree(files: dict[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
    """The entries of a folder, "" for the root: its files and folders, or those of all levels."""
    start = f"{below}/" if below else ""
    inside = [path for path in files if path.startswith(start)]
    folders = {str(parent) for path in inside for parent in Path(path).parents if len(str(parent)) >= len(start)}
    entries = [_entry(path, files[path]) for path in inside] + [_folder(path) for path in folders - {"."}]
    shown = [entry for entry in entries if recursive or "/" not in entry["path"].removeprefix(start)]
    return sorted(shown, key=lambda entry: entry["path"])


def _paths_info(files: dict[str, bytes], paths: list[str]) -> list[dict[str, Any]]:
    found = [_entry(path, files[path]) for path in paths if path in files]
    folders = [path for path in paths if any(name.startswith(f"{path}/") for name in files)]
    return found + [_folder(path) for path in folders]


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": _sha1(path.encode())}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _sha1(content)}


def _file(commit: str, files: dict[str, bytes], rest: list[str]) -> Answer:
    verb, revision, path = rest[0], rest[1], "/".join(rest[2:])
    if verb != "resolve" or revision not in ("main", commit):
        return 404, {"X-Error-Code": "RevisionNotFound", "X-Repo-Commit": commit}, b""
    if path not in files:
        return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
    return 200, {"ETag": f'"{_sha1(files[path])}"', "X-Repo-Commit": commit}, files[path]


def _json(value: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
