"""A Hugging Face Hub on 127.0.0.1 that really serves push and load; the standard library is all it needs.

    with LoopbackHub() as hub:
        subprocess.run(command, env=hub.environment(tmp_path))

Contents are addressed by their digest, repositories are lists of commits, as on the Hub. `hub.fail` makes requests
fail, `hub.requests` is what was asked. Clients read HF_ENDPOINT when they are imported: use a fresh process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "LoopbackCanary" + "0123456789abcdef"
_MISSING = "0" * 40


@dataclass(frozen=True)
class File:
    digest: str
    size: int
    large: bool


@dataclass
class Repository:
    private: bool
    head: str = _MISSING
    commits: dict[str, dict[str, File]] = field(default_factory=lambda: {_MISSING: {}})

    @property
    def files(self) -> dict[str, File]:
        return self.commits[self.head]


class LoopbackHub:
    """Starts on entering, stops on leaving."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        """`METHOD /path` of every request, in order"""
        self.fail: Callable[[str], int | None] = lambda request: None
        """`METHOD /path` -> the status to fail with, or None"""
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """For a fresh process: this hub, an empty cache, one token, one thread."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        ours |= {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        return ours | ({"HF_TOKEN": token} if token else {})

    def read(self, repo: str, path: str) -> bytes:
        return self.blobs[self.repositories[repo].files[path].digest]

    def store(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest

    def commit(self, repository: Repository, lines: list[dict[str, Any]]) -> str:
        """Apply the operations of one commit, all or none."""
        files = dict(repository.files)
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = File(self.store(content), len(content), False)
            elif key == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise KeyError(value["path"])
                files[value["path"]] = File(value["oid"], value["size"], True)
            elif key == "deletedFile":
                files.pop(value["path"])
            elif key != "header":
                raise NotImplementedError(key)
        name = hashlib.sha1(f"{repository.head} {sorted(files.items(), key=str)}".encode()).hexdigest()
        repository.commits[name] = files
        repository.head = name
        return name


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"  # clients keep the connection

    ROUTES = (
        (r"/api/repos/create", "create"),
        (r"/api/validate-yaml", "validate"),
        (r"/api/whoami-v2", "whoami"),
        (r"/([^/]+/[^/]+?)\.git/info/lfs/objects/batch", "batch"),
        (r"/lfs/([0-9a-f]{64})", "upload"),
        (r"/lfs-verify", "verify"),
        (r"/api/models/([^/]+/[^/]+)/preupload/(\w+)", "preupload"),
        (r"/api/models/([^/]+/[^/]+)/commit/(\w+)", "commit"),
        (r"/api/models/([^/]+/[^/]+)/tree/(\w+)", "tree"),
        (r"/api/models/([^/]+/[^/]+)(?:/revision/(\w+))?", "info"),
        (r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", "resolve"),
    )

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        self.body = self._read()
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(request)
            status = self.hub.fail(request)
            if status is not None:
                # a careless server: it repeats what it was sent
                return self._refuse(status, "Broken", f"failing for {self.headers.get('Authorization')}")
            if path.startswith("/api/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._refuse(401, "Unauthorized", "Invalid credentials")
            for pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if match:
                    return getattr(self, f"do_{name}")(*match.groups())
            self._refuse(404, "Unknown", f"unhandled {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def do_create(self) -> None:
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        answer = {"url": f"{self.hub.address}/{repo}", "name": repo, "id": repo}
        if repo in self.hub.repositories:
            return self._send(409, answer | {"error": "You already created this model repo"})
        self.hub.repositories[repo] = Repository(private)
        self._send(200, answer)

    def do_validate(self) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def do_whoami(self) -> None:
        self._send(200, {"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def do_batch(self, repo: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                upload, verify = f"{self.hub.address}/lfs/{wanted['oid']}", f"{self.hub.address}/lfs-verify"
                entry["actions"] = {"upload": {"href": upload, "header": {}}, "verify": {"href": verify, "header": {}}}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def do_upload(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            return self._refuse(400, "Digest", "other content than announced")
        self.hub.store(self.body)
        self._send(200, {})

    def do_verify(self) -> None:
        self._send(200 if json.loads(self.body)["oid"] in self.hub.blobs else 404, {})

    def do_preupload(self, repo: str, revision: str) -> None:
        found = self._repository(repo)
        if found is not None:
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            files = [
                {"path": path, "uploadMode": _mode(path), "shouldIgnore": False, "oid": self._known(found, path)}
                for path in paths
            ]
            self._send(200, {"files": files})

    def do_commit(self, repo: str, revision: str) -> None:
        found = self._repository(repo)
        if found is None:
            return
        name = self.hub.commit(found, [json.loads(line) for line in self.body.splitlines() if line.strip()])
        self._send(200, {"success": True, "commitOid": name, "commitUrl": f"{self.hub.address}/{repo}/commit/{name}"})

    def do_tree(self, repo: str, revision: str) -> None:
        files = self._files(repo, revision)
        if files is not None:
            self._send(
                200, [{"type": "file", "path": p, "oid": f.digest[:40], "size": f.size} for p, f in files.items()]
            )

    def do_info(self, repo: str, revision: str | None) -> None:
        files, found = self._files(repo, revision or "main"), self.hub.repositories.get(repo)
        if files is not None and found is not None:
            siblings = [{"rfilename": path} for path in files]
            info = {"id": repo, "sha": found.head, "private": found.private, "tags": [], "siblings": siblings}
            self._send(200, info)

    def do_resolve(self, repo: str, revision: str, path: str) -> None:
        files = self._files(repo, revision)
        if files is None:
            return
        commit = self.hub.repositories[repo].head if revision == "main" else revision
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found", **headers)
        file = files[path]
        headers |= {"ETag": f'"{file.digest}"', "Accept-Ranges": "bytes"}
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.digest}"', "X-Linked-Size": str(file.size)}
        content, status = self.hub.blobs[file.digest], 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.command == "GET":
            first, last = int(wanted[1]), int(wanted[2] or file.size - 1)
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{file.size}"
        self._send(status, content, kind="application/octet-stream", **headers)

    def _known(self, repository: Repository, path: str) -> str | None:
        """What a client compares its file with, to leave out what has not changed."""
        file = repository.files.get(path)
        if file is None:
            return None
        return file.digest if file.large else _git_id(self.hub.blobs[file.digest])

    def _repository(self, repo: str) -> Repository | None:
        found = self.hub.repositories.get(repo)
        if found is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
        return found

    def _files(self, repo: str, revision: str) -> dict[str, File] | None:
        found = self._repository(repo)
        if found is None:
            return None
        name = found.head if revision == "main" else revision
        if name not in found.commits:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return found.commits[name]

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refuse(self, status: int, code: str, text: str, **headers: str) -> None:
        self._send(status, {"error": text}, **headers, **{"X-Error-Code": code, "X-Error-Message": text})

    def _send(self, status: int, content: Any, kind: str = "application/json", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
