"""A small Hub on loopback: repositories on disk, a log of requests, and faults that can be switched while it runs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"
USER = "tester"
PATIENCE = 60  # seconds that a held request is held at most


@dataclass
class Fault:
    """What goes wrong with some requests.

    Attributes:
        match: Regular expression for `METHOD path`.
        status: Answer with this status.
        drop: Close the connection in the middle of the request's body.
        hold: Do not answer before the faults are changed.
        times: How often; without end if None.
    """

    match: str = ""
    status: int | None = None
    drop: bool = False
    hold: bool = False
    times: int | None = None
    is_over: threading.Event = field(default_factory=threading.Event)


class Hub:
    """A server for one test module; `with Hub(folder) as hub`.

    `POST /faults` with a list of the fields of `Fault` replaces all faults. `GET /held` is answered once a request is
    held.

    Args:
        folder: Where `blobs/OID`, `repos/USER/NAME/commits/OID.json` and `refs.json` lie.

    Attributes:
        visibility: What each repository was created with.
        log: (begin, end, method, path, status) of every request that got an answer, status 0 for a dropped one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log: list[tuple[float, float, str, str, int]] = []
        self.faults: list[Fault] = []
        self.is_holding = threading.Event()
        self.visibility: dict[str, str | None] = {}
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        (folder / "blobs").mkdir(parents=True)

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.set_faults([])
        self._server.shutdown()
        self._server.server_close()

    def set_faults(self, faults: list[dict[str, Any]]) -> None:
        with self.lock:
            for fault in self.faults:
                fault.is_over.set()
            self.faults = [Fault(**fault) for fault in faults]

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if re.search(fault.match, request) and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    # ---- Repositories ----

    def blob(self, oid: str) -> Path:
        return self.folder / "blobs" / oid

    def _refs(self, repo: str) -> dict[str, str]:
        file = self.folder / "repos" / repo / "refs.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def exists(self, repo: str) -> bool:
        return (self.folder / "repos" / repo).is_dir()

    def create(self, repo: str) -> None:
        (self.folder / "repos" / repo / "commits").mkdir(parents=True)
        self.commit(repo, "main", "initial commit", {})

    def commit(self, repo: str, revision: str, message: str, files: dict[str, dict[str, Any]]) -> str:
        with self.lock:
            refs = self._refs(repo)
            parent = refs.get(revision, refs.get("main"))
            tree = {**(self.read(repo, parent)["files"] if parent else {}), **files}
            text = json.dumps({"message": message, "parent": parent, "files": tree, "time": time.time()})
            oid = hashlib.sha1(text.encode()).hexdigest()
            home = self.folder / "repos" / repo
            (home / "commits" / f"{oid}.json").write_text(text)
            (home / "refs.json").write_text(json.dumps({**refs, revision: oid}))
            return oid

    def resolve(self, repo: str, revision: str) -> str | None:
        oid = self._refs(repo).get(revision, revision)
        return oid if (self.folder / "repos" / repo / "commits" / f"{oid}.json").is_file() else None

    def read(self, repo: str, oid: str) -> dict[str, Any]:
        return json.loads((self.folder / "repos" / repo / "commits" / f"{oid}.json").read_text())

    def history(self, repo: str, revision: str = "main") -> list[dict[str, Any]]:
        """Commits that a push made, first one first."""
        commits, oid = [], self.resolve(repo, revision)
        while oid:
            commits.append(self.read(repo, oid))
            oid = commits[-1]["parent"]
        return commits[-2::-1]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a revision."""
        oid = self.resolve(repo, revision)
        return {path: self.blob(entry["oid"]).read_bytes() for path, entry in self.read(repo, oid)["files"].items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal; `Hub.log` has it."""

    def _handle(self) -> None:
        begin, self.status = time.time(), 0
        path = unquote(urlsplit(self.path).path)
        try:
            self._answer_request(path)
        except ConnectionError:
            self.close_connection = True
        self.hub.log.append((begin, time.time(), self.command, path, self.status))

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _answer_request(self, path: str) -> None:
        if path == "/faults":
            self.hub.set_faults(json.loads(self._body()))
            return self._answer({})
        if path == "/held":
            self.hub.is_holding.wait(PATIENCE)
            return self._answer({})
        fault = self.hub.fault_for(f"{self.command} {path}")
        if fault is not None and fault.drop:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            raise ConnectionAbortedError
        body = self._body()
        if fault is not None and fault.hold:
            self.hub.is_holding.set()
            fault.is_over.wait(PATIENCE)
            self.hub.is_holding.clear()
        elif fault is not None:
            return self._answer({"error": "made on purpose"}, fault.status)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/blobs/"):
            return self._answer({"error": "Invalid username or password."}, 401)
        for method, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return getattr(self, name)(body, *match.groups())
        return self._answer({"error": f"no such address: {self.command} {path}"}, 404)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            return b"".join(self._chunks())
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.status = status
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ---- What a Hub can do ----

    def validate(self, body: bytes) -> None:
        self._answer({"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        repo = f"{request.get('organization') or USER}/{request['name']}"
        status = 409 if self.hub.exists(repo) else 200
        if status == 200:
            self.hub.create(repo)
            self.hub.visibility[repo] = request.get("visibility")
        self._answer({"url": f"{self.hub.url}/{repo}"}, status)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if not self.hub.exists(repo):
            return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        oid = self.hub.resolve(repo, revision) or self.hub.resolve(repo, "main")
        known = self.hub.read(repo, oid)["files"]
        answers = []
        for file in json.loads(body)["files"]:
            is_large = file["path"].endswith((".safetensors", ".pt", ".pth", ".bin"))
            entry = known.get(file["path"], {})
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large else "regular",
                    "shouldIgnore": False,
                    "oid": entry.get("oid"),
                }
            )
        return self._answer({"files": answers})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            url = f"{self.hub.url}/blobs/{item['oid']}"
            actions = {} if self.hub.blob(item["oid"]).exists() else {"actions": {"upload": {"href": url}}}
            objects.append({**item, **actions})
        self._answer({"transfer": "basic", "objects": objects})

    def put_blob(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer({"error": "this is not what was announced"}, 400)
        self.hub.blob(oid).write_bytes(body)
        return self._answer({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        header, *operations = (json.loads(line) for line in body.splitlines())
        files = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                content = base64.b64decode(value["content"])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self.hub.blob(oid).write_bytes(content)
                files[value["path"]] = {"oid": oid, "size": len(content)}
            else:
                assert operation["key"] == "lfsFile"
                files[value["path"]] = {"oid": value["oid"], "size": value["size"], "lfs": True}
        oid = self.hub.commit(repo, revision, header["value"]["summary"], files)
        self._answer({"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def info(self, body: bytes, repo: str, revision: str | None) -> None:
        oid = self.hub.resolve(repo, revision or "main")
        if oid is None:
            return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": path} for path in self.hub.read(repo, oid)["files"]]
        return self._answer({"id": repo, "sha": oid, "siblings": siblings})

    def download(self, body: bytes, repo: str, revision: str, path: str) -> None:
        oid = self.hub.resolve(repo, revision)
        entry = self.hub.read(repo, oid)["files"].get(path) if oid else None
        if entry is None:
            return self._answer({}, 404, {"X-Error-Code": "EntryNotFound"} if oid else {"X-Error-Code": "RepoNotFound"})
        headers = {"X-Repo-Commit": oid, "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["oid"]}"', "X-Linked-Size": str(entry["size"])}
        return self._answer(self.hub.blob(entry["oid"]).read_bytes(), headers=headers)


_REPO = r"([^/]+/[^/]+)"
_ROUTES = [
    (("POST",), r"/api/validate-yaml", "validate"),
    (("POST",), r"/api/repos/create", "create"),
    (("POST",), rf"/api/models/{_REPO}/preupload/([^/]+)", "preupload"),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    (("PUT",), r"/blobs/(\w+)", "put_blob"),
    (("POST",), rf"/api/models/{_REPO}/commit/([^/]+)", "commit"),
    (("GET",), rf"/api/models/{_REPO}(?:/revision/([^/]+))?", "info"),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/([^/]+)/(.+)", "download"),
]
