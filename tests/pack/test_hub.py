"""--push-to-hub against a server that speaks the Hub's protocol, and adapters fetched from it again."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from makers import make_adapter

from lvnas.adapters import read_adapter
from lvnas.errors import InputError
from lvnas.hub import push, repositories
from lvnas.pack import pack

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Creates repositories, takes commits and large files, and gives nothing to owner `forbidden`."""

    repositories: dict[str, dict[str, bytes]]
    large: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **headers,
        }.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/{path}"

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            if name.startswith("forbidden/"):
                return self.answer({"error": "no right to write"}, 403)
            self.repositories.setdefault(name, {})
            return self.answer({"url": self.address(name), "name": name, "id": name})
        if self.path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self.answer(
                {"errors": [] if head["library_name"] == "peft" else [{"message": "?"}], "warnings": []}
            )
        if matched := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in files
            ]
            return self.answer({"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{"upload": {"href": self.address(f"large/{o['oid']}")}} for o in objects]
            return self.answer(
                {
                    "transfer": "basic",
                    "objects": [o | {"actions": a} for o, a in zip(objects, actions, strict=True)],
                }
            )
        if matched := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            files = self.repositories[matched[1]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.large[value["oid"]]
            return self.answer(
                {"commitOid": COMMIT, "commitUrl": self.address(f"{matched[1]}/commit/{COMMIT}")}
            )
        return self.answer({"error": self.path}, 404)

    def do_PUT(self) -> None:
        data = self.body()
        assert self.path.rpartition("/")[2] == hashlib.sha256(data).hexdigest()
        self.large[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_GET(self) -> None:
        if matched := re.fullmatch(
            r"/api/models/([^/]+/[^/?]+)(/revision/main|/revision/" + COMMIT + r")?(\?.*)?", self.path
        ):
            name = matched[1]
            if name not in self.repositories:
                return self.answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
            files = [{"rfilename": path} for path in self.repositories[name]]
            return self.answer({"id": name, "modelId": name, "sha": COMMIT, "siblings": files, "tags": []})
        if matched := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/?]+(\?.*)?", self.path):
            files = self.repositories[matched[1]]
            return self.answer(
                [{"type": "file", "path": p, "size": len(d), "oid": "0"} for p, d in files.items()]
            )
        if matched := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
            data = self.repositories[matched[1]][matched[2]]
            tag = hashlib.sha256(data).hexdigest()
            return self.answer(data, ETag=f'"{tag}"', **{"X-Repo-Commit": COMMIT})
        return self.answer({"error": self.path}, 404)

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    """A Hub on this machine; huggingface_hub is pointed at it."""
    from huggingface_hub import constants, hf_api

    handler = type("Fresh", (Hub,), {"repositories": {}, "large": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield handler
    server.shutdown()
    server.server_close()


def test_adapters_go_up_whole_and_come_back(hub: type[Hub], tmp_path: Path) -> None:
    from lvnas.sources import find_adapters

    manifest = pack(
        [read_adapter(make_adapter(tmp_path / n, seed=i)) for i, n in enumerate("ab")], tmp_path / "pack"
    )
    addresses = push(tmp_path / "pack", manifest, "me")
    assert addresses["a"].endswith(f"/me/a/commit/{COMMIT}")
    for entry in manifest["adapters"]:
        folder = tmp_path / "pack" / entry["path"]
        uploaded = {
            name: data
            for name, data in hub.repositories[f"me/{entry['name']}"].items()
            if name != ".gitattributes"
        }
        assert uploaded == {path.name: path.read_bytes() for path in folder.iterdir()}
    card = hub.repositories["me/a"]["README.md"].decode()
    assert card.startswith("---\nbase_model: example/tiny-base\n")
    (fetched,) = find_adapters(["me/a"])
    packed = read_adapter(tmp_path / "pack" / manifest["adapters"][0]["path"], "a")
    assert (fetched.name, fetched.ranks, fetched.base) == ("a", packed.ranks, packed.base)
    (renamed,) = find_adapters(["again=me/b@main"])
    assert renamed.name == "again"


def test_what_the_hub_refuses_is_one_line(hub: type[Hub], tmp_path: Path) -> None:
    from lvnas.sources import find_adapters

    manifest = pack([read_adapter(make_adapter(tmp_path / "a"))], tmp_path / "pack")
    with pytest.raises(InputError, match="the Hub did not take forbidden/a"):
        push(tmp_path / "pack", manifest, "forbidden")
    with pytest.raises(InputError, match="no folder 'me/nothing' here, and the Hub did not give it"):
        find_adapters(["me/nothing"])


def test_repository_names() -> None:
    one, two = {"adapters": [{"name": "a"}]}, {"adapters": [{"name": "a"}, {"name": "b"}]}
    assert repositories(one, "me/other") == {"a": "me/other"}
    assert repositories(two, "me") == {"a": "me/a", "b": "me/b"}
    with pytest.raises(InputError, match="one repository for 2 adapters"):
        repositories(two, "me/other")
    for wrong in ("", "a/b/c", "me/", "/x"):
        with pytest.raises(InputError, match="expected an owner"):
            repositories(one, wrong)
