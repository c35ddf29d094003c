"""Get a file so that it is either whole and verified, or not there.

A transfer goes to ``<file>.part`` beside the destination and continues there after an interruption; only
a verified file gets the final name. Sums are taken from the table of datasets; where none is known, the
one that was seen is written to ``<file>.sha256`` and holds from then on. Uses ``requests``, which also
honours ``HTTPS_PROXY`` and its kin.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import requests
from tqdm import tqdm

from biojepa.disk import full_disk_named, require_space, size_text
from biojepa.download.checksums import Checksum, record_of, recorded, write_record
from biojepa.download.content import require_kind
from biojepa.errors import InputError
from biojepa.files import sha256_of, write_text
from biojepa.raw_files import local_path

log = logging.getLogger(__name__)

USER_AGENT = "biojepa/0.1 (research software; downloads public Perturb-seq data)"
# What a broken connection can lose: the block that it broke in.
BLOCK = 1 << 15
# Answers after which waiting can help; 202 is what figshare.com sends to scripts, with no body.
TRY_AGAIN = frozenset({202, 408, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT_SECONDS = 60.0
# Without a terminal there is no progress bar; the log then says at these intervals how far it is.
SECONDS_BETWEEN_LINES = 30.0


class _TransferError(Exception):
    """A transfer that may succeed when tried again."""

    def __init__(self, message: str, wait_seconds: float | None = None) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class _Request:
    """What is asked of a server.

    Attributes
    ----------
    url
        Address.
    part
        File that grows.
    name
        Name that the file will have.
    is_known
        Whether a checksum will tell if parts of two versions were mixed.
    timeout_seconds
        Longest silence of the server.
    """

    url: str
    part: Path
    name: str
    is_known: bool
    timeout_seconds: float


def download_file(
    url: str,
    destination: str | Path,
    checksum: str | None = None,
    *,
    attempts: int = 6,
    backoff_seconds: float = 2.0,
    timeout_seconds: float = 60.0,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Download a file and return its SHA-256.

    Parameters
    ----------
    url
        ``https://`` or ``http://`` address. What follows a ``#`` is not sent.
    destination
        Where the file belongs. Untouched when it is there already with the right checksum.
    checksum
        ``sha256:…`` or ``md5:…``; None or empty where none is known.
    attempts
        How many failures in a row end the transfer. Each attempt continues where the last one broke off,
        and one that got further than all before it starts the count anew.
    backoff_seconds
        Wait before the second attempt, doubled each time, at most a minute. A server's
        ``Retry-After`` is honoured instead, up to the same minute.
    timeout_seconds
        Longest silence of the server.
    sleep
        Called with the seconds to wait; for tests.

    Raises
    ------
    InputError
        When the address does not exist, the transfer keeps failing (the part is kept for the next
        run), there is no space, or the content is not the expected one (nothing is kept).
    """
    destination = Path(destination)
    if urlsplit(url).scheme not in ("http", "https"):
        raise InputError(
            url, "no web address", "https://… or http://…", "use one, or the path of a local file"
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    given = Checksum.parse(checksum)
    expected = given or recorded(destination)
    if destination.is_file() and expected and expected.of(destination) == expected.digest:
        log.info("%s is there already, with %s", destination, expected)
        return sha256_of(destination)

    part = destination.with_name(f"{destination.name}.part")
    request = _Request(url, part, destination.name, expected is not None, timeout_seconds)
    continued = part.is_file()
    with full_disk_named(destination.parent, destination.name):
        _transfer(request, attempts, backoff_seconds, sleep)
        if continued and expected and expected.of(part) != expected.digest:
            # The old part may be of another version of the file: once more, from the start.
            log.warning("%s: the continued transfer has a wrong checksum, starting over", destination.name)
            _forget(part)
            _transfer(request, attempts, backoff_seconds, sleep)
    try:
        if expected is None:
            log.warning(
                "%s: no checksum is known; the one seen now is kept in %s",
                destination.name,
                record_of(destination).name,
            )
            require_kind(part, destination.name, url)
        else:
            _require_digest(part, expected, url, destination, is_given=given is not None)
    except InputError:
        _forget(part)
        raise
    # The sum was just compared; reading gigabytes once more would say the same.
    digest = expected.digest if expected and expected.algorithm == "sha256" else sha256_of(part)
    if not given:
        write_record(destination, digest)
    _tag_of(part).unlink(missing_ok=True)
    part.replace(destination)
    log.info("%s: %s, sha256:%s", destination, size_text(destination.stat().st_size), digest)
    return digest


def link_file(source: str | Path, destination: str | Path, checksum: str | None = None) -> str:
    """Verify a local file where it is, put a link to it at ``destination``, and return its SHA-256.

    Parameters
    ----------
    source
        Path or ``file://`` address.
    destination
        Where the link belongs; the link is absolute. What is there already is replaced.
    checksum
        ``sha256:…`` or ``md5:…``; None or empty where none is known, and then nothing is checked: the
        file is the user's own and may change.

    Raises
    ------
    InputError
        When there is no such file, or it has another checksum; then there is no link either.
    """
    path, destination = Path(local_path(str(source))), Path(destination)
    if not path.is_file():
        raise InputError(path, "no such file", "a local file", "correct the path in the dataset table")
    expected = Checksum.parse(checksum)
    if expected and (found := expected.of(path)) != expected.digest:
        raise InputError(
            path,
            f"checksum {expected.algorithm}:{found} ({size_text(path.stat().st_size)})",
            f"{expected} (the dataset table)",
            "put the right file there, or correct the checksum in the table",
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    fresh = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(Path(os.path.abspath(path)))  # noqa: PTH100 - resolve() would follow links of the user
    fresh.replace(destination)
    digest = sha256_of(path)
    log.info("%s: a link to %s, sha256:%s", destination, path, digest)
    return digest


def _transfer(
    request: _Request, attempts: int, backoff_seconds: float, sleep: Callable[[float], None]
) -> None:
    """Fetch a file, starting again until ``attempts`` failures in a row brought nothing more."""
    failures, furthest = 0, _size_of(request.part)
    with requests.Session() as session:
        session.headers.update({"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
        while True:
            try:
                _attempt(session, request)
                return
            except requests.exceptions.SSLError as error:
                raise InputError(
                    request.url,
                    f"no trustworthy certificate ({error})",
                    "a server whose certificate can be checked",
                    "check the date of this machine; behind a proxy with a certificate of its own set "
                    "REQUESTS_CA_BUNDLE",
                ) from error
            except (_TransferError, requests.ConnectionError, requests.Timeout) as error:
                failure: Exception = error
            except requests.exceptions.ChunkedEncodingError as error:
                failure = error
            except requests.RequestException as error:
                raise InputError(
                    request.url, f"an address that cannot be used ({error})", "a web address", "correct it"
                ) from error
            have = _size_of(request.part)
            failures = 1 if have > furthest else failures + 1
            furthest = max(have, furthest)
            log.warning(
                "%s: attempt failed (%d of %d in a row): %s", request.name, failures, attempts, failure
            )
            if failures >= attempts:
                break
            asked = getattr(failure, "wait_seconds", None)
            wait = backoff_seconds * 2 ** (failures - 1)
            sleep(min(wait if asked is None else asked, LONGEST_WAIT_SECONDS))
    kept = _size_of(request.part)
    raise InputError(
        request.url,
        f"{attempts} failed attempts, the last: {failure}",
        f"a complete download ({kept} bytes are kept in {request.part.name})",
        "run the same command again, which continues; behind a proxy set HTTPS_PROXY; or put the file at "
        "a local path and name that in the dataset table",
    )


def _attempt(session: requests.Session, request: _Request) -> None:
    """Fetch what is missing of a file once."""
    part, tag_file = request.part, _tag_of(request.part)
    tag = tag_file.read_text(encoding="utf-8") if tag_file.is_file() else ""
    have = _size_of(part)
    if have and not (tag or request.is_known):
        # Neither the server nor a checksum could tell that the rest belongs to another version.
        have = 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and tag:
        headers["If-Range"] = tag
    with session.get(request.url, headers=headers, stream=True, timeout=request.timeout_seconds) as answer:
        if answer.status_code == 416 and have:
            total = re.fullmatch(r"bytes \*/(\d+)", answer.headers.get("Content-Range", ""))
            if total and int(total[1]) == have:
                return
            _forget(part)
            raise _TransferError("the part is longer than the file; starting over")
        _require_content(answer, request)
        start = have if answer.status_code == 206 else 0
        if answer.status_code == 206:
            _require_same_file(answer, part, have, tag)
        else:
            # The old part first: were it left beside the new tag, a later range would be joined to it.
            part.unlink(missing_ok=True)
            _remember_tag(tag_file, answer)
        size = _announced_size(answer, start)
        if size is not None:
            require_space(part.parent, size - start, request.name)
        _write_body(answer, request, start, size)


def _require_same_file(answer: requests.Response, part: Path, have: int, tag: str) -> None:
    """Refuse a range that does not continue the part, or that is of another version of the file."""
    given = re.fullmatch(r"bytes (\d+)-\d+/(?:\d+|\*)", answer.headers.get("Content-Range", ""))
    if not have or not given or int(given[1]) != have:
        _forget(part)
        raise _TransferError(f"the server sent another range ({answer.headers.get('Content-Range')})")
    now = answer.headers.get("ETag", "")
    if tag and now and now != tag:
        # Such a server took no notice of If-Range.
        _forget(part)
        raise _TransferError(f"the file changed on the server (ETag {tag}, now {now}); starting over")


def _announced_size(answer: requests.Response, start: int) -> int | None:
    """Return how long the whole file will be, None where the server does not say."""
    length = answer.headers.get("Content-Length", "")
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        # Some servers call a .gz file an encoding of the file in it. We want the bytes as they are stored,
        # so that the decoder, which reads this header, must not know of it.
        answer.raw.headers.pop("Content-Encoding", None)
    return start + int(length) if length.isdigit() else None


def _require_content(answer: requests.Response, request: _Request) -> None:
    """Refuse answers that are no file."""
    status = answer.status_code
    if status in TRY_AGAIN:
        hint = (
            " (figshare.com answers scripts so; use the host ndownloader.figshare.com)"
            if status == 202
            else ""
        )
        after = answer.headers.get("Retry-After", "")
        raise _TransferError(f"HTTP {status} {answer.reason}{hint}", _seconds_to_wait(after))
    if status not in (200, 206):
        raise InputError(
            request.url,
            f"HTTP {status} {answer.reason}",
            "the file",
            "check the address in the dataset table in a browser",
        )
    if request.url.startswith("https:") and answer.url.startswith("http:") and not request.is_known:
        raise InputError(
            request.url,
            f"a redirection to the unprotected address {answer.url}",
            "https:// all the way, since no checksum is known that would show a changed file",
            "give the checksum of the file in the dataset table, or the address that it leads to",
        )
    kind = answer.headers.get("Content-Type", "").split(";")[0].strip().lower()
    if kind == "text/html" and not re.search(r"\.html?$", request.name):
        _forget(request.part)
        raise InputError(
            request.url,
            "a web page (text/html)",
            "a data file",
            "use the address of the file itself, not of the page about it",
        )


def _seconds_to_wait(after: str) -> float | None:
    """Read ``Retry-After``: seconds, or a date; None where it is neither."""
    if after.isdigit():
        return float(after)
    try:
        date = parsedate_to_datetime(after)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def _write_body(answer: requests.Response, request: _Request, start: int, size: int | None) -> None:
    """Append the body to the first ``start`` bytes of the part and check the length."""
    part, mode = request.part, "r+b" if start else "wb"
    whole = "unknown size" if size is None else size_text(size)
    log.info("%s: from byte %d, %s, from %s", request.name, start, whole, urlsplit(request.url).hostname)
    said, has_bar = time.monotonic(), sys.stderr.isatty()
    with (
        part.open(mode) as file,
        tqdm(
            total=size,
            initial=start,
            unit="B",
            unit_scale=True,
            desc=request.name,
            mininterval=1,
            disable=not has_bar,
        ) as bar,
    ):
        file.seek(start)
        file.truncate()
        for block in answer.iter_content(BLOCK):
            file.write(block)
            bar.update(len(block))
            if not has_bar and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                log.info("%s: %s of %s", request.name, size_text(file.tell()), whole)
    have = _size_of(part)
    if have == 0:
        _forget(part)
        raise _TransferError(f"HTTP {answer.status_code} with an empty body")
    if size is not None and have != size:
        if have > size:
            _forget(part)
        raise _TransferError(f"{have} bytes of {size}")


def _require_digest(part: Path, expected: Checksum, url: str, destination: Path, *, is_given: bool) -> None:
    """Stop when what arrived has another checksum than expected."""
    found = expected.of(part)
    if found == expected.digest:
        return
    record = record_of(destination).name
    source = "the dataset table" if is_given else f"{record}, written at the first download"
    raise InputError(
        destination,
        f"checksum {expected.algorithm}:{found} ({size_text(part.stat().st_size)}) from {url}",
        f"{expected} ({source})",
        "run again in case the transfer was damaged; if the publisher replaced the file, compare with the "
        f"sum on its page and {'correct the table' if is_given else f'delete {record}'}",
    )


def _tag_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _remember_tag(tag_file: Path, answer: requests.Response) -> None:
    """Keep the ETag by which the server recognizes the version of the file.

    A weak tag does not promise equal bytes; dates of some archives drift without a change.
    """
    tag = answer.headers.get("ETag", "")
    if tag and not tag.startswith("W/"):
        write_text(tag, tag_file)
    else:
        tag_file.unlink(missing_ok=True)


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_of(part).unlink(missing_ok=True)


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
