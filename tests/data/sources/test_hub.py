"""A Hub dataset is read at one commit, through the Hub's own clients; the Hub is a stand-in that speaks its protocol."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COMMIT = "5" * 40
TEXTS = [f"text {i}" for i in range(60)]

READ = """
import json, sys
from mikoshi.data.sources.sources import *
source = open_source(SourceSpec(sys.argv[1], on_invalid="skip"))
found = [(d.name, d.text) for p in pieces(source, int(sys.argv[2])) for d in documents(source, p)]
print(json.dumps([source.describe(), found]))
"""


def repository():
    data = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), data, row_group_size=20)
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: data/*}\n- config_name: small\n"
    card += "  data_files:\n  - {split: dev, path: lines/dev.json}\n---\n"
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    return {
        "org/cards": {"README.md": card.encode(), "data/0.parquet": data.getvalue(), "data/1.parquet": data.getvalue(),
                      "lines/dev.json": rows.encode()},
        "org/script": {"script.py": b"raise SystemExit('ran')", "README.md": b""},
        "org/images": {"train/a.png": b"png", "train/b.png": b"png"},
    }  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        _, _, _, org, name, _, _ = urlparse(self.path).path.split("/")
        wanted = body["paths"] if isinstance(body["paths"], list) else [body["paths"]]
        self.json([e for e in entries(self.server.repositories[f"{org}/{name}"]) if e["path"] in wanted])

    def do_GET(self):
        path = unquote(urlparse(self.path).path).strip("/").split("/")
        if path[:2] == ["api", "datasets"]:
            self.api("/".join(path[2:4]), path[4:])
        elif path[0] == "datasets" and path[3] == "resolve":
            self.file(self.server.repositories.get("/".join(path[1:3]), {}).get("/".join(path[5:])))
        else:
            self.json({}, 404)

    def api(self, name, rest):
        files = self.server.repositories.get(name)
        if files is None:
            return self.json({}, 404, {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", "v1", COMMIT):
            return self.json({}, 404, {"X-Error-Code": "RevisionNotFound"})
        if rest and rest[0] == "tree":
            under = "/".join(rest[2:])
            inside = [e for e in entries(files) if not under or e["path"].startswith(under + "/")]
            deep = "recursive=true" in self.path.lower()
            return self.json([e for e in inside if deep or "/" not in e["path"].removeprefix(under).strip("/")])
        siblings = [{"rfilename": path} for path in files]
        return self.json({"_id": "1", "id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    def file(self, content):
        if content is None:
            self.json({}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        start, stop = 0, len(content)
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last) + 1) if last else stop
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:stop])

    def json(self, value, status=200, headers=None):
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def entries(files):
    folders = {path.rpartition("/")[0] for path in files} - {""}
    listed = [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)]
    for path, content in sorted(files.items()):
        listed.append({"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()})
    return listed


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories = repository()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    home = tmp_path_factory.mktemp("home")
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def read(source, target=1 << 20):
        command = [sys.executable, "-c", READ, source, str(target)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", **settings}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    yield read
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_dataset_is_read_at_its_commit(hub):
    done = hub("hub:org/cards@v1:main/train", 400)
    assert done.returncode == 0, done.stderr
    described, found = json.loads(done.stdout)
    assert [name for name, _ in described] == [f"data/{i}.parquet#{COMMIT}" for i in range(2)]
    assert found == [[f"data/{i}.parquet:{n}", text] for i in range(2) for n, text in enumerate(TEXTS, 1)]


def test_a_configuration_and_split_are_chosen(hub):
    done = hub("hub:org/cards:small/dev", 300)
    assert done.returncode == 0, done.stderr
    described, found = json.loads(done.stdout)
    assert [name for name, _ in described] == [f"lines/dev.json#{COMMIT}"]
    assert [text for _, text in found] == TEXTS


def test_files_of_a_repository_are_read_by_their_address(hub):
    done = hub("hf://datasets/org/cards@v1/data/*.parquet")
    assert done.returncode == 0, done.stderr
    assert [text for _, text in json.loads(done.stdout)[1]] == TEXTS * 2


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hub:org/none", "the Hub has no dataset org/none"),
        ("hub:org/cards@v9", "the Hub has no revision 'v9' of org/cards"),
        ("hub:org/cards:main/test", "has no split 'test'; it has train"),
        ("hub:org/cards:big/train", "'hub:org/cards:big/train': "),
        ("hub:org/script", "needs code of its own, which is not run"),
        ("hub:org/images", "holds imagefolder files; readable are json, parquet"),
    ],
)
def test_a_dataset_that_cannot_be_had_is_told(hub, source, words):
    done = hub(source)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mikoshi.data.errors.DataError: data.source: ") and words in last
