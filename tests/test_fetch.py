"""Downloads: a second address, a checksum, and no half file that passes for the whole."""

import functools
import hashlib
import http.server
import importlib.util
import threading

import pytest
from folders import ROOT

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def fetch():
    spec = importlib.util.spec_from_file_location("gpt_train", ROOT / "gpt/train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fetch


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write({"/short": CONTENT[:1000], "/other": CONTENT[::-1]}.get(self.path, CONTENT))

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def home():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_second_address(fetch, home, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    path = fetch("sets/a.bin", MD5, f"{home}/missing", f"{home}/short", f"{home}/other", f"{home}/good")
    assert path == tmp_path / "sets/a.bin" and path.read_bytes() == CONTENT
    assert fetch("sets/a.bin", MD5) == path  # there already: no address is asked
    assert [file.name for file in (tmp_path / "sets").iterdir()] == ["a.bin"]


def test_nothing_half(fetch, home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        fetch("a.bin", MD5, f"{home}/short", f"{home}/other", "http://127.0.0.1:9/refused")
    assert stop.value.code == 2 and list(tmp_path.iterdir()) == []
    assert "DATA_DIR" in capsys.readouterr().err.splitlines()[-1]
