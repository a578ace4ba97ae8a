#!/usr/bin/env python3
"""One cache for two: huggingface_hub reads what kto-tokenize has fetched, and the other way round.

    pip install huggingface_hub==2.4.0
    cargo build --release -p kto-tokenize -p kto-eval && scripts/check-hub.py [MODEL_DIR]

A hub on loopback serves MODEL_DIR (testdata/trl/llama/model) as org/tiny, large files by a redirection. Both download it into a
cache of their own; the two trees must be equal (but for locks and lists that only one keeps), each must find the other's
model offline, and the lists of the cache must agree on its size. The server ends with the script.
"""

import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 100_000


def etag(data):
    if len(data) > LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(BaseHTTPRequestHandler):
    files = {}

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/tiny/revision/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            info = {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": siblings, "tags": [], "downloads": 0,
                    "private": False, "likes": 0}
            return self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
        if path.startswith("/api/models/org/tiny/tree/"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in self.files.items()]
            return self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
        for prefix in (f"/org/tiny/resolve/{COMMIT}/", "/org/tiny/resolve/main/"):
            if path.startswith(prefix) and (data := self.files.get(path.removeprefix(prefix))) is not None:
                named = {"ETag": f'"{etag(data)}"', "X_Repo_Commit": COMMIT}
                if len(data) <= LARGE:
                    return self.reply(200, data, **named)
                linked = {"X_Linked_Etag": f'"{etag(data)}"', "X_Linked_Size": str(len(data))}
                # Another host, as the real one's storage is: neither of the two may send a token there.
                name = path.removeprefix(prefix)
                port = self.server.server_port
                return self.reply(302, b"", Location=f"{self.server.scheme}://localhost:{port}/storage/{name}", **linked, **named)
        if path.startswith("/storage/"):
            return self.reply(200, self.files[path.removeprefix("/storage/")])
        return self.reply(404, b"", X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


def serve(certificate=None):
    """A hub on a free port of loopback; with TLS when it has a certificate."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.scheme = "https" if certificate else "http"
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"{server.scheme}://127.0.0.1:{server.server_port}"


def run(command, cache, endpoint, offline=False, **more):
    env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache / "home"), "HF_ENDPOINT": endpoint}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    env |= more
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def tree(cache):
    """Links with their targets, other files with their hashes; without locks and marks."""
    found = {}
    for path in sorted((cache / "models--org--tiny").rglob("*")):
        name = str(path.relative_to(cache))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file() and not path.name.startswith(".") and path.parent.name != "trees":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


PYTHON = """
import huggingface_hub, sys
print(huggingface_hub.snapshot_download("org/tiny", allow_patterns=sys.argv[1:] or None))
"""
SCAN = "import huggingface_hub; print(sum(r.size_on_disk for r in huggingface_hub.scan_cache_dir().repos))"


def tls(folder, answer, first):
    """The same over TLS, with a certificate that only SSL_CERT_FILE knows."""
    key, certificate, both = (folder / name for name in ("key.pem", "cert.pem", "both.pem"))
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1", *names]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    endpoint = serve(both)
    cache = folder / "tls"
    cache.mkdir()
    env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_ENDPOINT": endpoint}
    refused = subprocess.run(answer, env=env, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 69 and "cannot reach" in refused.stderr, refused.stderr
    assert run(answer, cache, endpoint, SSL_CERT_FILE=str(certificate)) == first
    print("over TLS too; a certificate nobody vouches for is refused:", refused.stderr.splitlines()[0])


def main():
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "testdata/trl/llama/model"
    Hub.files = {path.name: path.read_bytes() for path in sorted(model.iterdir()) if path.is_file()}
    endpoint = serve()
    tool = str(ROOT / "target/release/kto-eval")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
        ours.mkdir(), theirs.mkdir()
        prompts = Path(folder) / "p.jsonl"
        prompts.write_text('{"prompt": "hello"}\n')
        answer = [tool, "generate", "-q", "--model", "org/tiny", "--max-new-tokens", "4", str(prompts)]
        first = run(answer, ours, endpoint)
        names = [p.name for p in (ours / f"models--org--tiny/snapshots/{COMMIT}").iterdir()]
        run([sys.executable, "-c", PYTHON, *names], theirs, endpoint)
        a, b = tree(ours), tree(theirs)
        assert a == b, {k: (a.get(k), b.get(k)) for k in a.keys() | b.keys() if a.get(k) != b.get(k)}
        print(f"{len(a)} files and links are equal")
        assert run(answer, theirs, "http://127.0.0.1:9", offline=True) == first
        path = run([sys.executable, "-c", PYTHON, *names], ours, "http://127.0.0.1:9", offline=True).strip()
        assert path == str(ours / f"models--org--tiny/snapshots/{COMMIT}"), path
        print("each finds the other's model offline")
        listed = json.loads(run([tool, "models", "-q", "--json"], ours, endpoint))
        scanned = int(run([sys.executable, "-c", SCAN], ours, endpoint))
        assert (listed["complete"], listed["size"]) == (True, scanned), (listed, scanned)
        print(f"both lists say {scanned} bytes; ours: {listed['form']}, last used {listed['last_used']}")
        if shutil.which("openssl"):
            tls(Path(folder), answer, first)


if __name__ == "__main__":
    main()
