"""Downloads that break, lie, or come back with nothing, from a server on this machine."""

import hashlib
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from biojepa import download
from biojepa.download import Checksum, download_file
from biojepa.errors import InputError

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


class Server:
    """What the server does, and what it was asked."""

    def __init__(self):
        self.content = CONTENT
        self.etag = '"v1"'
        self.ranges = True
        self.break_after = []  # bytes after which the connection of each coming request is cut
        self.statuses = []  # answers of the coming requests in place of the file
        self.headers = {}
        self.requests = []
        self.url = ""

    def asked(self, header):
        return [request.get(header) for request in self.requests]


@contextmanager
def running():
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(dict(self.headers))
            if server.statuses:
                self.send_response(server.statuses.pop(0))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start, content = 0, server.content
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            same = self.headers.get("If-Range") in (None, server.etag)
            if asked and server.ranges and same:
                start = int(asked[1])
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            headers = {"Content-Length": str(len(content) - start), **server.headers}
            if server.etag:
                headers["ETag"] = server.etag
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            end = start + server.break_after.pop(0) if server.break_after else len(content)
            self.wfile.write(content[start:end])
            self.close_connection = True

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}/screen.h5ad"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running() as it:
        yield it


@pytest.fixture
def target(tmp_path):
    return tmp_path / "data" / "screen.h5ad"


def fetch(server, target, checksum=SHA256, **options):
    options = {"sleep": lambda _: None, "timeout_seconds": 5, **options}
    return download_file(server.url, target, checksum, **options)


def names(target):
    return sorted(path.name for path in target.parent.iterdir())


@pytest.mark.parametrize("checksum", [SHA256, MD5, SHA256.upper()])
def test_a_whole_file_arrives_and_nothing_else(server, target, checksum):
    assert f"sha256:{fetch(server, target, checksum)}" == SHA256
    assert target.read_bytes() == CONTENT
    assert names(target) == ["screen.h5ad"]
    assert "biojepa" in server.asked("User-Agent")[0]
    assert server.asked("Accept-Encoding") == ["identity"]


def test_a_verified_file_is_not_fetched_again(server, target):
    fetch(server, target)
    fetch(server, target)
    assert len(server.requests) == 1


def test_a_broken_transfer_continues_where_it_stopped(server, target):
    server.break_after = [400_000, 300_000]
    waits = []
    fetch(server, target, sleep=waits.append, backoff_seconds=2.0)
    assert target.read_bytes() == CONTENT
    assert waits == [2.0, 4.0]
    offsets = [int(asked[6:-1]) for asked in server.asked("Range")[1:]]
    assert 0 < offsets[0] <= 400_000
    assert offsets[0] < offsets[1] <= offsets[0] + 300_000
    assert names(target) == ["screen.h5ad"]


def test_an_interrupted_run_is_continued_by_the_next(server, target):
    server.break_after = [500_000]
    with pytest.raises(
        InputError, match=r"1 failed attempts.*bytes are kept in screen\.h5ad\.part.*same command"
    ):
        fetch(server, target, attempts=1)
    assert names(target) == ["screen.h5ad.part", "screen.h5ad.part.etag"]
    kept = (target.parent / "screen.h5ad.part").stat().st_size
    fetch(server, target)
    assert server.asked("Range")[1] == f"bytes={kept}-"
    assert server.asked("If-Range")[1] == '"v1"'
    assert target.read_bytes() == CONTENT
    assert names(target) == ["screen.h5ad"]


def test_a_part_that_was_complete_is_only_verified(server, target):
    target.parent.mkdir()
    (target.parent / "screen.h5ad.part").write_bytes(CONTENT)
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.asked("Range") == [f"bytes={len(CONTENT)}-"]


def test_a_server_that_ignores_ranges_sends_the_whole_file_once(server, target):
    server.ranges = False
    server.break_after = [400_000]
    fetch(server, target)
    assert target.read_bytes() == CONTENT


def test_a_file_replaced_between_runs_is_not_mixed(server, target):
    server.break_after = [500_000]
    with pytest.raises(InputError):
        fetch(server, target, None, attempts=1)
    server.content, server.etag = CONTENT[::-1], '"v2"'
    fetch(server, target, None)
    assert target.read_bytes() == CONTENT[::-1]


def test_a_foreign_part_is_replaced_when_the_checksum_tells(server, target):
    server.etag = ""
    target.parent.mkdir()
    (target.parent / "screen.h5ad.part").write_bytes(b"x" * 1000)
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.asked("Range") == ["bytes=1000-", None]


def test_a_part_that_nothing_can_vouch_for_is_not_continued(server, target):
    server.etag = 'W/"weak"'
    server.break_after = [400_000]
    fetch(server, target, None)
    assert server.asked("Range") == [None, None]
    assert target.read_bytes() == CONTENT


def test_wrong_content_names_both_sums_and_leaves_nothing(server, target):
    server.content = CONTENT[:-1] + b"!"
    seen = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(InputError) as caught:
        fetch(server, target)
    message = str(caught.value)
    assert str(target) in message
    assert seen in message
    assert SHA256 in message
    assert "Fix: run again" in message
    assert names(target) == []


def test_a_body_shorter_than_promised_is_no_file(server, target):
    server.etag = ""  # nothing to continue by
    server.headers = {"Content-Length": str(len(CONTENT) + 10)}
    with pytest.raises(InputError, match="2 failed attempts"):
        fetch(server, target, None, attempts=2)
    assert not target.exists()


@pytest.mark.parametrize("status", [202, 200])
def test_an_empty_answer_is_no_file(server, target, status):
    server.statuses = [status] * 3
    with pytest.raises(InputError, match=rf"3 failed attempts, the last: HTTP {status}"):
        fetch(server, target, None, attempts=3)
    assert names(target) == []


def test_a_busy_server_is_asked_again_after_the_time_it_names(server, target):
    server.statuses = [503, 429]
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_a_missing_address_fails_at_once(server, target):
    server.statuses = [404]
    with pytest.raises(InputError, match=r"screen\.h5ad: found HTTP 404.*address in the dataset table"):
        fetch(server, target)
    assert len(server.requests) == 1


def test_a_web_page_in_place_of_the_file_is_refused(server, target):
    server.headers = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(InputError, match="web page"):
        fetch(server, target, None)
    assert names(target) == []


def test_the_first_checksum_seen_is_recorded_and_holds(server, target):
    fetch(server, target, None)
    record = target.parent / "screen.h5ad.sha256"
    assert record.read_text() == f"{SHA256[7:]}  screen.h5ad\n"
    target.unlink()
    server.content = CONTENT[::-1]
    with pytest.raises(InputError, match=r"screen\.h5ad\.sha256, written at the first download.*delete"):
        fetch(server, target, None)
    assert names(target) == ["screen.h5ad.sha256"]


def test_a_full_disk_is_noticed_before_the_transfer(server, target, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"0\.0 GB free"):
        fetch(server, target)
    assert not target.exists()


@pytest.mark.parametrize("scheme", ["file://{}", "{}"])
def test_a_local_file_is_copied_and_verified(tmp_path, target, scheme):
    source = tmp_path / "with space.h5ad"
    source.write_bytes(CONTENT)
    url = scheme.format(str(source).replace(" ", "%20") if "file" in scheme else source)
    assert f"sha256:{download_file(url, target, MD5)}" == SHA256
    assert target.read_bytes() == CONTENT
    source.write_bytes(b"other")
    with pytest.raises(InputError, match="checksum"):
        download_file(url, target, "md5:" + "0" * 32)


@pytest.mark.parametrize("text", ["abc", "sha256:abc", "sha1:" + "a" * 40, "md5:" + "z" * 32])
def test_a_malformed_checksum_is_refused(text):
    with pytest.raises(InputError, match=r"sha256: and 64 hexadecimal digits"):
        Checksum.parse(text)


def test_other_schemes_are_refused(target):
    with pytest.raises(InputError, match="ftp://"):
        download_file("ftp://example.org/x", target)


def test_the_script_downloads_and_reports_in_one_message(tmp_path, target):
    source = tmp_path / "source.h5ad"
    source.write_bytes(CONTENT)
    script = Path(__file__).resolve().parents[2] / "workflow" / "scripts" / "download.py"

    def run(checksum):
        code = f"""
import runpy
from types import SimpleNamespace as N
snakemake = N(params=N(url={str(source)!r}, checksum={checksum!r}), output=[{str(target)!r}],
              log=[{str(tmp_path / "log.txt")!r}])
runpy.run_path({str(script)!r}, {{"snakemake": snakemake}}, run_name="__main__")
"""
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert run(MD5).returncode == 0
    assert target.read_bytes() == CONTENT
    target.unlink()
    failed = run("md5:" + "0" * 32)
    assert failed.returncode == 1
    assert MD5 in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not target.exists()
