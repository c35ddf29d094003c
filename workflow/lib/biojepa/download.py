"""Download a file so that it is either whole and verified, or not there.

The transfer goes to ``<file>.part`` beside the destination and continues there after an
interruption; only a verified file gets the final name. Sums are taken from the table of datasets;
where none is known, the one that was seen is written to ``<file>.sha256`` and holds from then on.
Uses ``requests``, which also honours ``HTTPS_PROXY`` and its kin.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
from tqdm import tqdm

from biojepa.errors import InputError
from biojepa.files import sha256_of, write_text

log = logging.getLogger(__name__)

USER_AGENT = "biojepa/0.1 (research software; downloads public Perturb-seq data)"
DIGEST_LENGTHS = {"sha256": 64, "md5": 32}
BLOCK = 1 << 17
# Answers after which waiting can help; 202 is what figshare.com sends to scripts, with no body.
TRY_AGAIN = frozenset({202, 408, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT_SECONDS = 60.0


class _TransferError(Exception):
    """A transfer that may succeed when tried again."""

    def __init__(self, message: str, wait_seconds: float | None = None) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class Checksum:
    """An expected digest.

    Parameters
    ----------
    algorithm
        sha256 or md5.
    digest
        Hexadecimal, lower case.
    """

    algorithm: str
    digest: str

    @classmethod
    def parse(cls, text: str | None) -> Checksum | None:
        """Read ``sha256:…`` or ``md5:…``; None for an empty text.

        Raises
        ------
        InputError
            When the algorithm is another or the digest is no hexadecimal number of its length.
        """
        if not text:
            return None
        algorithm, _, digest = text.strip().lower().partition(":")
        length = DIGEST_LENGTHS.get(algorithm, 0)
        if not re.fullmatch(rf"[0-9a-f]{{{length}}}", digest) or not length:
            raise InputError(
                f"checksum {text!r}",
                "something else",
                "sha256: and 64 hexadecimal digits, or md5: and 32",
                "copy the checksum from the site that publishes the file, or leave it empty",
            )
        return cls(algorithm, digest)

    def of(self, path: Path) -> str:
        """Return the digest of a file by the same algorithm."""
        return sha256_of(path, self.algorithm)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.digest}"


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
        ``https://`` or ``http://`` address; ``file://`` or a local path is copied.
    destination
        Where the file belongs. Untouched when it is there already with the right checksum.
    checksum
        ``sha256:…`` or ``md5:…``; None or empty where none is known.
    attempts
        How often a transfer is started; each continues where the last one broke off.
    backoff_seconds
        Wait before the second attempt, doubled each time, at most a minute. A server's
        ``Retry-After`` is honoured instead.
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
    destination.parent.mkdir(parents=True, exist_ok=True)
    record = destination.with_name(f"{destination.name}.sha256")
    given = Checksum.parse(checksum)
    expected = given or _recorded(record)
    if destination.is_file() and expected and expected.of(destination) == expected.digest:
        log.info("%s is there already, with %s", destination, expected)
        return sha256_of(destination)

    part = destination.with_name(f"{destination.name}.part")
    source = _local_path(url)
    if source is not None:
        _copy(source, part)
        _verify(part, expected, url, destination, record, given)
    else:
        continued = part.is_file()
        _transfer(url, part, expected, attempts, backoff_seconds, timeout_seconds, sleep)
        if continued and expected and expected.of(part) != expected.digest:
            # The old part may be of another version of the file: once more, from the start.
            log.warning("%s: the continued transfer has a wrong checksum, starting over", destination.name)
            _forget(part)
            _transfer(url, part, expected, attempts, backoff_seconds, timeout_seconds, sleep)
        _verify(part, expected, url, destination, record, given)
    digest = sha256_of(part)
    if not given:
        write_text(f"{digest}  {destination.name}\n", record)
    _tag_of(part).unlink(missing_ok=True)
    part.replace(destination)
    log.info("%s: %d bytes, sha256:%s", destination, destination.stat().st_size, digest)
    return digest


def _local_path(url: str) -> Path | None:
    """Return the path of a local file, None for a web address."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        return None
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    # One letter is a drive, not a scheme.
    if len(parts.scheme) > 1 and "://" in url:
        raise InputError(
            url,
            f"an address that starts with {parts.scheme}://",
            "https://, http://, file:// or a path",
            "use one of them",
        )
    return Path(url)


def _copy(source: Path, part: Path) -> None:
    if not source.is_file():
        raise InputError(source, "no such file", "a local file", "correct the path in the dataset table")
    _require_space(part, source.stat().st_size)
    shutil.copyfile(source, part)


def _transfer(
    url: str,
    part: Path,
    expected: Checksum | None,
    attempts: int,
    backoff_seconds: float,
    timeout_seconds: float,
    sleep: Callable[[float], None],
) -> None:
    """Fetch ``url`` into ``part``, starting again as often as allowed."""
    wait = backoff_seconds
    with requests.Session() as session:
        session.headers.update({"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
        for attempt in range(1, attempts + 1):
            try:
                _attempt(session, url, part, expected, timeout_seconds)
                return
            except (_TransferError, requests.ConnectionError, requests.Timeout) as error:
                failure: Exception = error
            except requests.exceptions.ChunkedEncodingError as error:
                failure = error
            except requests.RequestException as error:
                raise InputError(
                    url, f"an address that cannot be used ({error})", "a web address", "correct it"
                ) from error
            log.warning("%s: attempt %d of %d failed: %s", part.name, attempt, attempts, failure)
            if attempt < attempts:
                asked = getattr(failure, "wait_seconds", None)
                sleep(min(wait if asked is None else asked, LONGEST_WAIT_SECONDS))
                wait *= 2
    kept = part.stat().st_size if part.is_file() else 0
    raise InputError(
        url,
        f"{attempts} failed attempts, the last: {failure}",
        f"a complete download ({kept} bytes are kept in {part.name})",
        "run the same command again, which continues; behind a proxy set HTTPS_PROXY; or put the file at "
        "a local path and name that in the dataset table",
    )


def _attempt(
    session: requests.Session, url: str, part: Path, expected: Checksum | None, timeout_seconds: float
) -> None:
    """Fetch what is missing of ``part`` once."""
    tag_file = _tag_of(part)
    tag = tag_file.read_text(encoding="utf-8") if tag_file.is_file() else ""
    have = part.stat().st_size if part.is_file() else 0
    if have and not (tag or expected):
        # Neither the server nor a checksum could tell that the rest belongs to another version.
        have = 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and tag:
        headers["If-Range"] = tag
    with session.get(url, headers=headers, stream=True, timeout=timeout_seconds) as answer:
        if answer.status_code == 416 and have:
            total = re.fullmatch(r"bytes \*/(\d+)", answer.headers.get("Content-Range", ""))
            if total and int(total[1]) == have:
                return
            _forget(part)
            raise _TransferError("the part is longer than the file; starting over")
        _require_content(answer, url, part)
        start = have if answer.status_code == 206 else 0
        if answer.status_code == 206:
            given = re.fullmatch(r"bytes (\d+)-\d+/(?:\d+|\*)", answer.headers.get("Content-Range", ""))
            if not have or not given or int(given[1]) != have:
                _forget(part)
                raise _TransferError(f"the server sent another range ({answer.headers.get('Content-Range')})")
        else:
            _remember_tag(tag_file, answer)
        length = answer.headers.get("Content-Length")
        size = start + int(length) if length and length.isdigit() else None
        _require_space(part, (size or start) - start)
        _write_body(answer, part, start, size)


def _require_content(answer: requests.Response, url: str, part: Path) -> None:
    """Refuse answers that are no file."""
    status = answer.status_code
    if status in TRY_AGAIN:
        after = answer.headers.get("Retry-After", "")
        hint = (
            " (figshare.com answers scripts so; use the host ndownloader.figshare.com)"
            if status == 202
            else ""
        )
        raise _TransferError(
            f"HTTP {status} {answer.reason}{hint}", float(after) if after.isdigit() else None
        )
    if status not in (200, 206):
        raise InputError(
            url,
            f"HTTP {status} {answer.reason}",
            "the file",
            "check the address in the dataset table in a browser",
        )
    kind = answer.headers.get("Content-Type", "").split(";")[0].strip().lower()
    if kind == "text/html" and not re.search(r"\.html?(\.part)?$", part.name):
        _forget(part)
        raise InputError(
            url,
            "a web page (text/html)",
            "a data file",
            "use the address of the file itself, not of the page about it",
        )


def _write_body(answer: requests.Response, part: Path, start: int, size: int | None) -> None:
    """Append the body to the first ``start`` bytes of ``part`` and check the length."""
    mode = "r+b" if start else "wb"
    with (
        part.open(mode) as file,
        tqdm(
            total=size, initial=start, unit="B", unit_scale=True, desc=part.stem, mininterval=1, disable=None
        ) as bar,
    ):
        file.seek(start)
        file.truncate()
        for block in answer.iter_content(BLOCK):
            file.write(block)
            bar.update(len(block))
    have = part.stat().st_size
    if have == 0:
        part.unlink()
        raise _TransferError(f"HTTP {answer.status_code} with an empty body")
    if size is not None and have != size:
        if have > size:
            _forget(part)
        raise _TransferError(f"{have} bytes of {size}")


def _verify(
    part: Path, expected: Checksum | None, url: str, destination: Path, record: Path, given: Checksum | None
) -> None:
    """Delete ``part`` and stop when it has another checksum than expected."""
    if part.stat().st_size == 0:
        _forget(part)
        raise InputError(url, "an empty file", "data", "check the address in the dataset table")
    if expected is None:
        log.warning("%s: no checksum is known; the one seen now is kept in %s", destination.name, record.name)
        return
    found = expected.of(part)
    if found == expected.digest:
        return
    _forget(part)
    source = "the dataset table" if given else f"{record.name}, written at the first download"
    raise InputError(
        destination,
        f"checksum {expected.algorithm}:{found} from {url}",
        f"{expected} ({source})",
        "run again in case the transfer was damaged; if the publisher replaced the file, compare with the "
        f"sum on its page and correct {'the table' if given else f'or delete {record.name}'}",
    )


def _recorded(record: Path) -> Checksum | None:
    """Return the checksum that an earlier download wrote down."""
    if not record.is_file():
        return None
    words = record.read_text(encoding="utf-8").split()
    return Checksum.parse(f"sha256:{words[0]}") if words else None


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


def _require_space(part: Path, needed: int) -> None:
    """Stop before the disk is full; ``needed`` in bytes."""
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise InputError(
            part.parent,
            f"{free / 1e9:.1f} GB free",
            f"{needed / 1e9:.1f} GB for {part.stem}",
            "free some space",
        )
