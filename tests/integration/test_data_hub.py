"""C4 and a tokenizer over HTTP, from a server on this machine that answers as the hub does."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
TOKEN = "hf_" + "x" * 34


class Hub(BaseHTTPRequestHandler):
    """One dataset and one model, each with files at one commit."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, dict[str, bytes]]
    asked: list[tuple[str, str]]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(body)

    def _answer(self, body: bytes = b"") -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.asked.append((self.command, path))
        for name, files in self.repositories.items():
            if path in (f"/api/{name}", f"/api/{name}/revision/main", f"/api/{name}/revision/{COMMIT}"):
                listing = [{"rfilename": file} for file in files]
                return self._json({"id": name.partition("/")[2], "sha": COMMIT, "siblings": listing, "private": False})
            for revision in ("main", COMMIT):
                if path.startswith(f"/api/{name}/tree/{revision}"):
                    folder = path.removeprefix(f"/api/{name}/tree/{revision}").strip("/")
                    return self._json(_tree(files, f"{folder}/" if folder else "", "recursive=true" in address.query))
                if path == f"/api/{name}/paths-info/{revision}":
                    wanted = json.loads(body)["paths"] if body.startswith(b"{") else []
                    return self._json([_entry(file, files[file]) for file in wanted if file in files])
                place = f"/{name.removeprefix('models/')}/resolve/{revision}/"
                if path.startswith(place):
                    file = path.removeprefix(place)
                    return self._file(files[file]) if file in files else self._missing("EntryNotFound")
        return self._missing("RepoNotFound")

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, content: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self._send(206, content[start : end + 1], headers)
        return self._send(200, content, headers)

    def _missing(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]]:
    """What lies in a folder: its files and folders, or all files below."""
    below = [name for name in files if name.startswith(folder)]
    flat = [_entry(name, files[name]) for name in below if recursive or "/" not in name.removeprefix(folder)]
    folders = {folder + name.removeprefix(folder).split("/")[0] for name in below} - files.keys()
    return flat + [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The server's address, and what it has been asked for."""
    from trainer.data import tokenizer

    made = tokenizer.load("bytes", [])
    made.save_pretrained(tmp_path / "tokenizer")

    def shard(number: int) -> bytes:
        rows = ({"text": f"shard {number} row {row} " * 9, "timestamp": "", "url": "u"} for row in range(300))
        return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())

    kind = type("OwnHub", (Hub,), {"repositories": {}, "asked": []})
    kind.repositories["datasets/allenai/c4"] = {
        "README.md": b"---\nlicense: odc-by\n---\n",
        **{f"en/c4-train.{number:05}-of-01024.json.gz": shard(number) for number in range(3)},
        "en/c4-validation.00000-of-00008.json.gz": shard(9),
    }
    kind.repositories["models/EleutherAI/gpt-neox-20b"] = {
        path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", kind.asked
    server.shutdown()
    thread.join()
    server.server_close()


def precache(root: Path, endpoint: str, **flags: object) -> subprocess.CompletedProcess[str]:
    """`python -m trainer precache` in a process of its own (the hub's address is read at import), its cache empty."""
    values = {
        "model": "gpt-neo-x:test",
        "dataset": "c4",
        "max_samples": 500,
        "sequence_length": 64,
        "validation_fraction": 0.1,
        "device": "cpu",
        "nodes": 1,
        "run_dir": root / "run",
        **flags,
    }
    command = [sys.executable, "-m", "trainer", "precache"]
    for name, value in values.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "DILOCO_"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(root / "hf"), "HF_TOKEN": TOKEN}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.timeout(600)
def test_c4_is_streamed_from_the_hub(tmp_path: Path, hub: tuple[str, list[tuple[str, str]]]) -> None:
    endpoint, asked = hub
    done = precache(tmp_path, endpoint)
    assert done.returncode == 0, done.stderr
    [manifest_path] = (tmp_path / "run").rglob("manifest.json")
    manifest = json.loads(manifest_path.read_text())
    assert manifest["revision"] == COMMIT
    assert manifest["tokenizer"] == "EleutherAI/gpt-neox-20b"
    assert manifest["train"]["documents"] + manifest["validation"]["documents"] == 500
    opened = {path.rpartition("/")[2] for method, path in asked if method == "GET" and "json.gz" in path}
    assert opened == {f"c4-train.{number:05}-of-01024.json.gz" for number in range(2)}, (
        "500 documents are in two shards"
    )
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes()
    assert TOKEN not in done.stdout + done.stderr
    assert "HTTP Request" not in done.stderr

    asked.clear()
    again = precache(tmp_path, "http://127.0.0.1:9")
    assert again.returncode == 0, again.stderr
    assert "is already precached in" in again.stdout


@pytest.mark.timeout(600)
def test_no_hub_is_one_sentence(tmp_path: Path) -> None:
    failed = precache(tmp_path, "http://127.0.0.1:9")
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("error: dataset c4 cannot be fetched from the hub (")
    assert "Traceback" not in failed.stderr
