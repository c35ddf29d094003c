"""Downloads that break, lie, or come back with nothing, from a server on this machine."""

import errno
import gzip
import hashlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from biojepa import disk
from biojepa.download import Checksum, download_file, link_file, transfer
from biojepa.errors import InputError
from broken_server import CONTENT, HDF5, running

SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


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
    # Each attempt got further than the one before, so that the wait does not grow.
    assert waits == [2.0, 2.0]
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
    server.content, server.etag = HDF5 + CONTENT[::-1], '"v2"'
    fetch(server, target, None)
    assert target.read_bytes() == HDF5 + CONTENT[::-1]


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


def test_a_length_that_is_too_short_is_found_by_the_checksum(server, target):
    server.headers = {"Content-Length": str(len(CONTENT) - 10)}
    with pytest.raises(InputError, match=r"found checksum sha256:.* \(1\.05 MB\) from"):
        fetch(server, target)
    assert names(target) == []
    server.headers = {}
    fetch(server, target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("status", [202, 200])
def test_an_empty_answer_is_no_file(server, target, status):
    server.statuses = [status] * 3
    with pytest.raises(InputError, match=rf"3 failed attempts, the last: HTTP {status}"):
        fetch(server, target, None, attempts=3)
    assert names(target) == []


def test_a_busy_server_is_asked_again_after_the_time_it_names(server, target):
    server.statuses = [503, 429]
    server.headers = {"Retry-After": "17"}
    waits = []
    fetch(server, target, sleep=waits.append)
    assert target.read_bytes() == CONTENT
    assert waits == [17.0, 17.0]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("after", "waits"),
    [
        ("", [2.0, 4.0, 8.0]),
        ("soon", [2.0, 4.0, 8.0]),
        ("3600", [60.0] * 3),
        ("Wed, 01 Jan 2020 00:00:00 GMT", [0.0] * 3),
        ("Wed, 01 Jan 2020 00:00:00 -0000", [0.0] * 3),
    ],
)
def test_waits_double_up_to_a_minute_unless_the_server_names_a_time(server, target, after, waits):
    server.statuses = [503] * 3
    server.headers = {"Retry-After": after}
    found = []
    fetch(server, target, sleep=found.append)
    assert found == waits


def test_a_long_transfer_that_keeps_breaking_goes_on_while_it_gets_further(server, target):
    server.break_after = [100_000] * 9
    fetch(server, target, attempts=2)
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 10


def test_a_transfer_that_never_gets_further_ends(server, target):
    server.ranges = False
    server.break_after = [300_000, 200_000, 300_000, 100_000]
    with pytest.raises(InputError, match="3 failed attempts"):
        fetch(server, target, attempts=3)
    assert len(server.requests) == 3


def test_a_missing_address_fails_at_once(server, target):
    server.statuses = [404]
    with pytest.raises(InputError, match=r"screen\.h5ad: found HTTP 404.*address in the dataset table"):
        fetch(server, target)
    assert len(server.requests) == 1


@pytest.mark.parametrize(("has_checksum"), [True, False])
def test_a_range_of_another_version_is_not_joined(server, target, has_checksum):
    checksum = SHA256 if has_checksum else None
    server.honours_if_range = False
    server.content, server.etag = bytes(len(CONTENT)), '"v0"'
    server.break_after = [500_000]
    with pytest.raises(InputError, match="1 failed attempts"):
        fetch(server, target, checksum, attempts=1)
    server.content, server.etag = CONTENT, '"v1"'
    fetch(server, target, checksum)
    assert target.read_bytes() == CONTENT
    assert server.asked("Range")[1:] == [server.asked("Range")[1], None]
    assert server.asked("If-Range")[1] == '"v0"'
    assert names(target) == sorted(["screen.h5ad", *([] if has_checksum else ["screen.h5ad.sha256"])])


def test_the_part_of_an_older_version_is_gone_before_the_new_tag_is_noted(server, target, monkeypatch):
    server.break_after = [500_000]
    with pytest.raises(InputError):
        fetch(server, target, None, attempts=1)
    server.content, server.etag = HDF5 + bytes(len(CONTENT)), '"v2"'
    usage = type("usage", (), {"free": 10})
    with monkeypatch.context() as full:
        full.setattr(disk.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(InputError, match="10 bytes free"):
            fetch(server, target, None)
    fetch(server, target, None)
    assert target.read_bytes() == server.content


def test_another_range_than_was_asked_for_starts_over(server, target, monkeypatch):
    target.parent.mkdir()
    (target.parent / "screen.h5ad.part").write_bytes(CONTENT[:1000])
    server.headers = {"Content-Range": "bytes 7-9/10"}
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.asked("Range") == ["bytes=1000-", None]


def test_a_part_longer_than_the_file_starts_over(server, target):
    target.parent.mkdir()
    (target.parent / "screen.h5ad.part").write_bytes(CONTENT + b"more")
    fetch(server, target)
    assert target.read_bytes() == CONTENT
    assert server.asked("Range") == [f"bytes={len(CONTENT) + 4}-", None]


def test_redirections_are_followed_with_the_range_and_without_the_name(server, target):
    server.redirects = {"/35773219": "/stored/a/b"}
    server.break_after = [500_000]
    url = server.url.replace("screen.h5ad", "35773219#screen.h5ad")
    download_file(url, target, SHA256, sleep=lambda _: None)
    assert target.read_bytes() == CONTENT
    assert server.paths == ["/35773219", "/stored/a/b"] * 2
    assert server.asked("Range")[2:] == [server.asked("Range")[2]] * 2
    assert server.asked("Range")[2].startswith("bytes=")


def test_a_circle_of_redirections_ends_with_a_message(server, target):
    server.redirects = {"/screen.h5ad": "/other", "/other": "/screen.h5ad"}
    with pytest.raises(InputError, match=r"screen\.h5ad: found an address that cannot be used.*redirects"):
        fetch(server, target)
    assert names(target) == []


def test_an_unprotected_redirection_needs_a_checksum(target):
    answer = SimpleNamespace(status_code=200, url="http://a.org/x", headers={}, reason="OK")
    request = transfer._Request("https://a.org/x", target, "x.h5ad", True, 5)
    transfer._require_content(answer, request)
    with pytest.raises(InputError, match=r"redirection to the unprotected address http://a\.org/x"):
        transfer._require_content(answer, replace(request, is_known=False))


def test_bytes_are_kept_as_they_are_stored(server, target):
    server.content = gzip.compress(b"barcode")
    server.headers = {"Content-Encoding": "gzip"}
    path = target.with_name("barcodes.tsv.gz")
    fetch(server, path, f"md5:{hashlib.md5(server.content).hexdigest()}")
    assert path.read_bytes() == server.content


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("screen.h5ad", b'{"message": "log in"}', "an HDF5 file"),
        ("screen.h5", b"<!DOCTYPE html>", "an HDF5 file"),
        ("matrix.mtx.gz", b"%%MatrixMarket", "a gzip file"),
        ("screen.tgz", b"PK\x03\x04", "a gzip file"),
        ("screen.zip", b"\x1f\x8b", "a zip archive"),
        ("screen.tar", bytes(600), "a tar archive"),
    ],
)
def test_wrong_content_without_a_checksum_is_told_by_its_first_bytes(server, target, name, content, kind):
    server.content = content
    path = target.with_name(name)
    with pytest.raises(InputError) as caught:
        fetch(server, path, None)
    message = str(caught.value)
    assert f"{len(content)} bytes that begin with {content[:24]!r}; expected {kind}, as {name}" in message
    assert server.url in message
    # Not recorded either: the right file would be refused later.
    assert names(target) == []


def test_what_is_no_part_of_the_table_of_kinds_is_taken_as_it_is(server, target):
    server.content = b"guide,target\n"
    path = target.with_name("guides.csv")
    fetch(server, path, None)
    assert path.read_bytes() == b"guide,target\n"


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
    usage = type("usage", (), {"free": 1_040_000})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        InputError, match=r"data: found 1\.04 MB free; expected 1\.05 MB for screen\.h5ad\. Fix: free some"
    ):
        fetch(server, target)
    assert names(target) == ["screen.h5ad.part.etag"]


def test_of_a_continued_file_only_the_rest_needs_space(server, target, monkeypatch):
    target.parent.mkdir()
    (target.parent / "screen.h5ad.part").write_bytes(CONTENT[:-1000])
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    fetch(server, target)
    assert target.read_bytes() == CONTENT


def test_a_disk_that_fills_up_on_the_way_is_named_and_the_part_is_kept(server, target, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 400_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    opened = Path.open
    with monkeypatch.context() as full:
        full.setattr(
            Path,
            "open",
            lambda path, mode="r", **k: Full(path, "wb") if mode == "wb" else opened(path, mode, **k),
        )
        with pytest.raises(InputError, match=r"no quota left; expected room for the rest of screen\.h5ad"):
            fetch(server, target)
    kept = target.with_name("screen.h5ad.part").stat().st_size
    assert 0 < kept <= 400_000
    fetch(server, target)
    assert server.asked("Range")[-1] == f"bytes={kept}-"
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (698_680_199, "699 MB"),
        (8.8e9, "8.80 GB"),
        (3e15, "3000 TB"),
    ],
)
def test_sizes_are_written_for_people(n_bytes, text):
    assert disk.size_text(n_bytes) == text


def test_a_damaged_record_is_named(server, target):
    target.parent.mkdir()
    (target.parent / "screen.h5ad.sha256").write_text("not a sum  screen.h5ad\n")
    with pytest.raises(InputError, match=r"screen\.h5ad\.sha256: found 'not a sum screen\.h5ad'.*delete it"):
        fetch(server, target, None)
    assert server.requests == []


def test_without_a_terminal_the_log_says_how_far_it_is(server, target, monkeypatch, caplog):
    monkeypatch.setattr(transfer, "SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level("INFO")
    fetch(server, target)
    said = [record.getMessage() for record in caplog.records]
    assert "screen.h5ad: from byte 0, 1.05 MB, from 127.0.0.1" in said
    assert "screen.h5ad: 32.8 kB of 1.05 MB" in said
    assert said[-1] == f"{target}: 1.05 MB, {SHA256}"


def test_a_proxy_of_the_environment_is_used(server, target, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/screen.h5ad"))
    download_file("http://data.invalid/screen.h5ad", target, SHA256, sleep=lambda _: None)
    assert target.read_bytes() == CONTENT
    # What a proxy is asked for is the whole address.
    assert server.paths == ["http://data.invalid/screen.h5ad"]


@pytest.mark.parametrize("scheme", ["file://{}", "file://localhost{}", "{}"])
@pytest.mark.parametrize("checksum", [MD5, SHA256, None])
def test_a_local_file_is_verified_and_linked(tmp_path, target, scheme, checksum):
    source = tmp_path / "with space.h5ad"
    source.write_bytes(CONTENT)
    url = scheme.format(str(source).replace(" ", "%20") if "file" in scheme else source)
    assert f"sha256:{link_file(url, target, checksum)}" == SHA256
    assert target.is_symlink() and target.read_bytes() == CONTENT
    assert target.readlink() == source
    # The user's own file may change, so nothing is recorded.
    assert names(target) == ["screen.h5ad"]
    source.write_bytes(b"other")
    if checksum is None:
        link_file(url, target)
    else:
        with pytest.raises(InputError) as caught:
            link_file(url, target, checksum)
        assert str(caught.value).startswith(f"{source}: found checksum {checksum.partition(':')[0]}:")
        assert f"expected {checksum} (the dataset table)" in str(caught.value)
    assert source.read_bytes() == b"other"


def test_a_relative_path_is_linked_from_anywhere(tmp_path, target, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.h5ad").write_bytes(CONTENT)
    link_file("mine.h5ad", target, SHA256)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("there", [False, True])
def test_a_local_file_that_is_not_right_gets_no_link(tmp_path, target, there):
    source = tmp_path / "mine.h5ad"
    if there:
        source.write_bytes(b"other")
    with pytest.raises(InputError, match="put the right file there" if there else "no such file"):
        link_file(source, target, SHA256)
    assert not target.parent.exists()


@pytest.mark.parametrize("text", ["abc", "sha256:abc", "sha1:" + "a" * 40, "md5:" + "z" * 32])
def test_a_malformed_checksum_is_refused(text):
    with pytest.raises(InputError, match=r"sha256: and 64 hexadecimal digits"):
        Checksum.parse(text)


@pytest.mark.parametrize("address", ["ftp://example.org/x", "/data/x", "file:///data/x"])
def test_what_is_no_web_address_is_not_fetched(target, address):
    with pytest.raises(InputError, match=f"{address}: found no web address"):
        download_file(address, target)
    assert not target.parent.exists()


@pytest.mark.parametrize("is_local", [True, False])
def test_the_script_gets_a_file_and_reports_in_one_message(server, tmp_path, target, is_local):
    source = tmp_path / "source.h5ad"
    source.write_bytes(CONTENT)
    script = Path(__file__).resolve().parents[2] / "workflow" / "scripts" / "download.py"
    log, record = tmp_path / "log.txt", tmp_path / "provenance" / "screen.h5ad.json"

    def run(checksum):
        code = f"""
import runpy
from types import SimpleNamespace as N
from snakemake.iocontainers import Namedlist
named = lambda **k: Namedlist(fromdict=k)
snakemake = N(rule="download", threads=1, wildcards=named(), config={{}},
              input={[str(source)] if is_local else []!r},
              params=named(url={server.url!r}, checksum={checksum!r}),
              output=named(file={str(target)!r}, record={str(record)!r}), log=[{str(log)!r}])
runpy.run_path({str(script)!r}, {{"snakemake": snakemake}}, run_name="__main__")
"""
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    done = run(MD5)
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == CONTENT
    assert target.is_symlink() is is_local
    assert json.loads(record.read_text())["outputs"][str(target)]["sha256"] == SHA256[7:]
    target.unlink()
    failed = run("md5:" + "0" * 32)
    assert failed.returncode == 1
    assert MD5 in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not target.exists()
