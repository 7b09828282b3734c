"""A Hub on loopback: as much of its protocol as creating, pushing and pulling a model repository takes.

`Hub()` serves in a thread of its own until it is closed. Clients find it through `HF_ENDPOINT`, which huggingface_hub
reads when it is imported: they run in processes of their own.
"""

import base64
import fnmatch
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_writer"


class Hub:
    """
    The repositories, and the server.

    Args:
        failures (`int`): How many uploads of large files fail before one succeeds.
    """

    def __init__(self, failures: int = 0) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.failures = failures
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commits(self, name: str, branch: str) -> list[dict[str, Any]]:
        repo = self.repos[name]
        return repo["commits"] if branch == "main" else repo["branches"][branch]

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> str:
        commits = self.commits(name, branch)
        files = dict(commits[-1]["files"])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        sha = hashlib.sha1(f"{branch} {len(commits)} {message}".encode()).hexdigest()
        commits.append({"sha": sha, "message": message, "files": files})
        return sha

    def files(self, name: str, commit: int = -1) -> dict[str, bytes]:
        return self.repos[name]["commits"][commit]["files"]

    def messages(self, name: str) -> list[str]:
        return [commit["message"] for commit in self.repos[name]["commits"]]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, code: int, body: bytes | dict | list = b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, code: int, reason: str) -> None:
        self._answer(code, {"error": reason}, X_Error_Code=reason, X_Error_Message=reason)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str) -> dict[str, Any] | None:
        """A repository that the caller may see; as on the Hub, a private one is not there for others."""
        repo = self.hub.repos.get(name)
        return repo if repo is not None and (self._known or not repo["private"]) else None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            if not self._known:
                return self._refuse(401, "Unauthorized")
            return self._answer(200, {"name": "me", "type": "user", "orgs": [], "auth": {}})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path):
            name, kind, revision, folder = found.groups()
            repo = self._repo(name)
            if repo is None:
                return self._refuse(401, "RepoNotFound")
            branch = revision if revision in repo["branches"] else "main"
            commit = self.hub.commits(name, branch)[-1]
            if kind == "tree":
                inside = [name for name in commit["files"] if not folder or name.startswith(f"{folder}/")]
                if folder and not inside:
                    return self._refuse(404, "EntryNotFound")
                return self._answer(200, [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in inside])
            siblings = [{"rfilename": name} for name in commit["files"]]
            listed = {"_id": "0", "id": name, "modelId": name, "sha": commit["sha"], "private": repo["private"]}
            return self._answer(200, {**listed, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = found.groups()
            repo = self._repo(name)
            if repo is None:
                return self._refuse(401, "RepoNotFound")
            every = {branch: self.hub.commits(name, branch) for branch in ("main", *repo["branches"])}
            pushed = [one for commits in every.values() for one in commits]
            wanted = every.get(revision) or [one for one in pushed if revision == one["sha"]]
            if not wanted:
                return self._refuse(404, "RevisionNotFound")
            content = wanted[-1]["files"].get(file)
            if content is None:
                return self._refuse(404, "EntryNotFound")
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self._answer(200, content, ETag=etag, X_Repo_Commit=wanted[-1]["sha"])
        return self._refuse(404, "NotFound")

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.requests.append(f"PUT {self.path}")
        if self.hub.failures:
            self.hub.failures -= 1
            return self._answer(403, b"no room")  # which clients do not try again
        self.hub.blobs[self.path.rpartition("/")[2]] = content
        return self._answer(200)

    def do_POST(self) -> None:
        path = self.path.partition("?")[0]
        body = self._body()
        self.hub.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/verify":
            return self._answer(200, {})
        if not self._known:
            return self._refuse(401, "Unauthorized")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.hub.repos:
                return self._answer(409, {"url": f"{self.hub.url}/{name}"})
            first = {"sha": "0" * 40, "message": "initial commit", "files": {".gitattributes": b""}}
            self.hub.repos[name] = {"private": bool(asked.get("private")), "commits": [first], "branches": {}}
            return self._answer(200, {"url": f"{self.hub.url}/{name}"})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", path):
            self.hub.repos[found[1]]["branches"].setdefault(found[2], list(self.hub.repos[found[1]]["commits"]))
            return self._answer(200, {})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/[^/]+", path):
            large = ("*.safetensors", "*.bin", "*.pt", "*.png")

            def mode(name: str) -> str:
                return "lfs" if any(fnmatch.fnmatch(name, pattern) for pattern in large) else "regular"

            files = [one["path"] for one in json.loads(body)["files"]]
            answers = [{"path": one, "uploadMode": mode(one), "shouldIgnore": False, "oid": None} for one in files]
            return self._answer(200, {"files": answers})
        if path.endswith(".git/info/lfs/objects/batch"):
            answers = json.loads(body)["objects"]
            for one in answers:
                if one["oid"] not in self.hub.blobs:
                    places = {"upload": f"/lfs/{one['oid']}", "verify": "/verify"}
                    one["actions"] = {name: {"href": self.hub.url + place} for name, place in places.items()}
            return self._answer(200, {"transfer": "basic", "objects": answers})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            lines = [json.loads(line) for line in body.splitlines() if line]
            sha = self.hub.commit(found[1], found[2], lines)
            url = f"{self.hub.url}/{found[1]}/commit/{sha}"
            return self._answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})
        return self._refuse(404, "NotFound")
