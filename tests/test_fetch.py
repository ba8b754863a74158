"""Downloads: a second address, a checksum, and no partial file that passes for a complete one."""

import hashlib
import http.server
import threading

import pytest
from folders import copy_alone, load_file, result, run_here

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()

fetch = load_file("gpt", "data").fetch


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


def test_addresses(tmp_path, monkeypatch, capsys):
    """Addresses are tried in turn until one gives the whole file; of what is not, nothing is left."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        fetch("sets/a.bin", MD5, f"{home}/short", f"{home}/other", "http://127.0.0.1:9/refused")
    assert stop.value.code == 2 and not list((tmp_path / "sets").iterdir())
    assert "DATA_DIR" in capsys.readouterr().err.splitlines()[-1]
    path = fetch("sets/a.bin", MD5, f"{home}/missing", f"{home}/short", f"{home}/other", f"{home}/good")
    assert path == tmp_path / "sets/a.bin" and path.read_bytes() == CONTENT
    server.shutdown()
    assert fetch("sets/a.bin", MD5) == path  # already there: nothing is requested
    assert [file.name for file in (tmp_path / "sets").iterdir()] == ["a.bin"]


def test_folder_of_downloads(tmp_path):
    """A folder data/ beside data.py, where downloads go, does not shadow it."""
    folder = copy_alone("mlp", tmp_path / "mlp")
    (folder / "data").mkdir()
    result(folder, "mlx", "--steps", 2, run=run_here)
