"""Expected digests, from the table of datasets or from an earlier download."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from biojepa.errors import InputError
from biojepa.files import sha256_of, write_text

DIGEST_LENGTHS = {"sha256": 64, "md5": 32}


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


def record_of(destination: Path) -> Path:
    """Name the file that holds the checksum seen at the first download, as ``sha256sum`` writes it."""
    return destination.with_name(f"{destination.name}.sha256")


def recorded(destination: Path) -> Checksum | None:
    """Return the checksum that an earlier download wrote down, None where there was none.

    Raises
    ------
    InputError
        When the record holds something else.
    """
    record = record_of(destination)
    if not record.is_file():
        return None
    words = record.read_text(encoding="utf-8", errors="replace").split()
    if not words or not re.fullmatch(r"[0-9a-f]{64}", words[0]):
        raise InputError(
            record,
            repr(" ".join(words)[:80]) if words else "an empty file",
            "the SHA-256 of the file that was downloaded first, 64 hexadecimal digits",
            "delete it, which accepts the next download as it comes",
        )
    return Checksum("sha256", words[0])


def write_record(destination: Path, digest: str) -> None:
    """Write down the SHA-256 of a file, so that later downloads are compared with it."""
    write_text(f"{digest}  {destination.name}\n", record_of(destination))
