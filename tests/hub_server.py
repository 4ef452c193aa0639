"""A stand-in for the Hugging Face hub on this machine: as much of its protocol as an upload of a model needs."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_of_the_tests"


@dataclass
class StandIn:
    """What the server was asked for."""

    address: str = ""
    repositories: dict[str, dict[str, object]] = field(default_factory=dict)
    """By name what they were made with."""
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)
    """(repository, message, content by path)."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""
    refuses: str = ""
    """Requests whose path holds this are answered by an error."""

    def answer(self, path: str, body: bytes) -> object:
        """The JSON that answers a POST."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, asked)
            return {"url": f"{self.address}/{name}", "id": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            found = json.loads(body)["objects"]
            for one in found:
                one["actions"] = {"upload": {"href": f"{self.address}/stored/{one['oid']}"}}
            return {"transfer": "basic", "objects": found}
        _, _, owner, name, what, _ = path.strip("/").split("/")
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {"path": file["path"], "uploadMode": modes[file["path"].endswith(".safetensors")], "shouldIgnore": False}
                    for file in files
                ]
            }
        assert what == "commit", path
        header, *rest = (json.loads(line) for line in body.splitlines())
        files = {}
        for line in rest:
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        self.commits.append((f"{owner}/{name}", header["value"]["summary"], files))
        number = f"{len(self.commits):040x}"
        return {"commitUrl": f"{self.address}/{owner}/{name}/commit/{number}", "commitOid": number, "success": True}


@contextmanager
def hub_server() -> Iterator[StandIn]:
    """A server that takes what has `TOKEN`."""
    state = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.body()
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.reply(401, {"error": "Invalid username or password."})
            elif state.refuses and state.refuses in self.path:
                self.reply(403, {"error": "You may not."})
            else:
                self.reply(200, state.answer(self.path, body))

        def do_PUT(self) -> None:
            body = self.body()
            digest = hashlib.sha256(body).hexdigest()
            assert self.path == f"/stored/{digest}"
            state.stored[digest] = body
            self.reply(200, {})

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def reply(self, status: int, answer: object) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.address = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
