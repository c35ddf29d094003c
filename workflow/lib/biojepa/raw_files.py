"""The files that a row of the table of datasets names: where they are, and what they will be called.

Nothing is opened and no request is made here: Snakemake has to know every file before the first job, and a
config is checked with this. It imports no other part of the library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

SEPARATOR = ";"
ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
# HDF5 cannot be read through gzip, so these are decompressed; tables and MTX files stay as they are.
DECOMPRESSED = (".h5ad.gz", ".h5.gz")
SINGLE_FILE_FORMATS = {"h5ad": ".h5ad", "10x_h5": ".h5"}
"""Formats whose screen is one file, and the suffix of that file."""
IN_SEVERAL_FILES = (".mtx", ".tsv", ".csv", ".txt")
# Names of our own beside the files of a screen, and of their records and logs.
RESERVED_NAMES = ("provenance", "unpacked", "unpack", "simulate")
RESERVED_SUFFIXES = (".part", ".etag", ".sha256", ".partial")
PLAIN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True)
class RawFile:
    """One file of a screen.

    Attributes
    ----------
    address
        ``http(s)`` address or local path.
    name
        Name that it has in the folder of the dataset: what stands after ``#`` in its address, or else the
        last part of the path. Not yet checked, see :func:`unusable_file_names`.
    checksum
        ``sha256:…`` or ``md5:…``, empty where none is known.
    """

    address: str
    name: str
    checksum: str = ""

    @property
    def is_remote(self) -> bool:
        """Whether it is fetched."""
        return self.address.startswith(("http://", "https://"))

    @property
    def is_archive(self) -> bool:
        """Whether it holds other files."""
        return self.name.lower().endswith(ARCHIVES)

    @property
    def is_compressed(self) -> bool:
        """Whether it is one file that has to be decompressed before it is read."""
        return self.name.lower().endswith(DECOMPRESSED)

    @property
    def is_opened(self) -> bool:
        """Whether something has to be got out of it before it is read."""
        return self.is_archive or self.is_compressed

    @property
    def stem(self) -> str:
        """Name without the suffix of the archive or compression."""
        suffixes = (*ARCHIVES, ".gz")
        longest = next((end for end in suffixes if self.name.lower().endswith(end)), "")
        return self.name[: len(self.name) - len(longest)]

    @property
    def identity(self) -> str:
        """What tells it from other files, whatever the protocol and spelling of the host."""
        if not self.is_remote:
            return str(Path(self.address).resolve())
        parts = urlsplit(self.address)
        return "\t".join([parts.netloc.lower(), unquote(parts.path), parts.query])


def is_own_note(name: str) -> bool:
    """Tell whether a file is hidden, as Snakemake's time of a folder is, or is left by a download."""
    return name.startswith(".") or name.endswith(RESERVED_SUFFIXES)


def listed_files(source: str, checksum: str = "") -> tuple[RawFile, ...]:
    """Read the columns ``source`` and ``checksum``, each one or several joined by ``;``.

    Checksums are those of the files in their order; one that is empty, or not there, is not known.
    """
    addresses = [address.strip() for address in source.split(SEPARATOR) if address.strip()]
    sums = [part.strip() for part in checksum.split(SEPARATOR)]
    sums += [""] * (len(addresses) - len(sums))
    return tuple(_raw_file(address, digest) for address, digest in zip(addresses, sums, strict=False))


def _raw_file(address: str, checksum: str) -> RawFile:
    if address.startswith(("http://", "https://")):
        parts = urlsplit(address)
        # Decoded after the split, so that an encoded slash shows and is refused.
        return RawFile(address, unquote(parts.fragment or parts.path.rpartition("/")[2]), checksum)
    path = local_path(address)
    return RawFile(path, Path(path).name, checksum)


def local_path(address: str) -> str:
    """Return the path that a local address means: a path as it is, or a ``file://`` address decoded."""
    if not address.startswith("file://"):
        return address
    return unquote(re.sub(r"^file://(localhost(?=/))?", "", address))


def unusable_file_names(files: Sequence[RawFile]) -> Iterator[str]:
    """Yield which files could not be kept under their names, and what to do.

    A name comes from an address or path and becomes a path here, so that only plain ones are taken.
    """
    seen: set[str] = set()
    for file in files:
        fix = (
            f"Fix: give it one after #, such as {file.address.partition('#')[0]}#screen.h5ad"
            if file.is_remote
            else "Fix: rename it"
        )
        if not re.fullmatch(PLAIN_NAME, file.name):
            yield (
                f"{file.address} does not end in a plain file name (letters, digits, dot, - and _). {fix}"
                if file.is_remote
                else f"{file.address} has no plain file name (letters, digits, dot, - and _). {fix}"
            )
        elif file.name.lower() in RESERVED_NAMES or file.name.lower().endswith(RESERVED_SUFFIXES):
            yield f"{file.name} is the name of a file of our own. {fix}"
        elif file.name.lower() in seen:
            yield f"{file.name} is there twice; expected files of different names. {fix}"
        seen.add(file.name.lower())
