"""Unpack archives that come from elsewhere, so that nothing gets outside the folder they belong in.

An archive is opened after its checksum was verified, and taken as a whole or not at all: a member that is
no plain file, whose name leads out of the folder, or that is there twice refuses it. What is written is
bounded by the free space and by the size of the archive, since a small one can hold a huge file.
"""

from __future__ import annotations

import gzip
import logging
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from biojepa.disk import free_bytes, full_disk_named, require_space, size_text
from biojepa.errors import InputError
from biojepa.files import atomic_path
from biojepa.raw_files import SINGLE_FILE_FORMATS, RawFile

log = logging.getLogger(__name__)

BLOCK = 1 << 20
LARGEST_RATIO = 200
"""Unpacked bytes for each byte of an archive; count matrices compress to a fifth or a twentieth."""
SMALLEST_BOUND = 100 * 10**6
"""Bytes that any archive may unpack to: small ones can be nearly empty."""
MOST_MEMBERS = 10_000
# Hidden files, and what macOS adds: left out.
LITTER = re.compile(r"(^|/)(__MACOSX(/|$)|\.[^./][^/]*$)")
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile, RuntimeError)


class _Readable(Protocol):
    """What gives the content of a member."""

    def read(self, size: int, /) -> bytes: ...


def unpack_archives(archives: Sequence[str | Path], folder: str | Path) -> list[str]:
    """Unpack archives into a folder and return the names of the files in it.

    Parameters
    ----------
    archives
        ``.tar``, ``.tar.gz``, ``.tgz`` or ``.zip``. One is unpacked into ``folder`` itself, several each
        into a folder of its own there, called as the archive without its suffix. A single folder that
        holds all else is left out: ``matrix/barcodes.tsv.gz`` becomes ``barcodes.tsv.gz``.
    folder
        Where the files belong. It appears whole or not at all; what was there before is replaced.

    Raises
    ------
    InputError
        When an archive is damaged, holds something that may not be unpacked, or there is no space.
    """
    paths, folder = [Path(archive) for archive in archives], Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir()
        for path in paths:
            _unpack(path, fresh / RawFile(str(path), path.name).stem if len(paths) > 1 else fresh)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.replace(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    log.info("%s: %d files, such as %s", folder, len(names), ", ".join(names[:10]))
    return names


def unpack_file(packed: str | Path, destination: str | Path) -> None:
    """Get one file out of a ``.gz``, or the only one of its suffix out of an archive.

    Parameters
    ----------
    packed
        ``….h5ad.gz`` or ``….h5.gz``, or an archive.
    destination
        Where the file belongs; of an archive, the one member with the suffix of this name is taken.

    Raises
    ------
    InputError
        When it is damaged, holds none or several such files or something that may not be unpacked, or
        there is no space. Nothing is left then.
    """
    packed, destination = Path(packed), Path(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    if RawFile(str(packed), packed.name).is_archive:
        folder = destination.with_name(f"{destination.name}.members.partial")
        try:
            found = [name for name in unpack_archives([packed], folder) if name.endswith(destination.suffix)]
            if len(found) != 1:
                formats = {suffix: name for name, suffix in SINGLE_FILE_FORMATS.items()}
                raise InputError(
                    packed,
                    f"{len(found)} {destination.suffix} files in the archive"
                    + (f": {', '.join(found[:10])}" if found else ""),
                    f"exactly one, as the format {formats.get(destination.suffix, '')} is one file",
                    "set `format` in the dataset table, or unpack it yourself and name the file",
                )
            (folder / found[0]).replace(destination)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    else:
        with _damage_named(packed), atomic_path(destination) as temporary, gzip.open(packed) as content:
            _Bounded(packed, destination.parent).copy(content, temporary)
    log.info("%s: %s", destination, size_text(destination.stat().st_size))


class _Bounded:
    """Copies the content of an archive, and stops where it is more than the archive may hold.

    Parameters
    ----------
    archive
        Archive whose size sets the bound.
    folder
        Folder on the disk that is written to.
    """

    def __init__(self, archive: Path, folder: Path) -> None:
        self.archive = archive
        self.folder = folder
        self.most = max(SMALLEST_BOUND, LARGEST_RATIO * archive.stat().st_size)
        self.left = self.most

    def require(self, needed: int) -> None:
        """Stop before anything is written when an archive announces too much; ``needed`` in bytes."""
        if needed > self.left:
            self._refuse(f"{size_text(needed)} of files")
        require_space(self.folder, needed, f"the content of {self.archive.name}")

    def copy(self, content: _Readable, path: Path) -> None:
        """Copy a stream to a file, counting what comes and not what was announced."""
        with full_disk_named(self.folder, f"the content of {self.archive.name}"), path.open("wb") as file:
            while block := content.read(BLOCK):
                self.left -= len(block)
                if self.left < 0:
                    self._refuse(f"more than {size_text(self.most)} of files")
                file.write(block)

    def _refuse(self, found: str) -> None:
        raise InputError(
            self.archive,
            f"{found} in an archive of {size_text(self.archive.stat().st_size)}",
            f"at most {size_text(self.most)}, {LARGEST_RATIO} times its size",
            "make sure that it is what you want; then unpack it yourself and name the folder or file in the "
            f"dataset table ({size_text(free_bytes(self.folder))} are free)",
        )


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack one archive into a folder, leaving out the folder that holds all else."""
    target = folder / ".members.partial"
    target.mkdir(parents=True)
    read = _zip_members if archive.name.lower().endswith(".zip") else _tar_members
    seen: set[str] = set()
    bound = _Bounded(archive, folder)
    with _damage_named(archive):
        for name, content in read(archive, bound):
            parts = _checked_parts(archive, name)
            if name.casefold() in seen:
                _refuse(archive, name, "is there twice")
            seen.add(name.casefold())
            if len(seen) > MOST_MEMBERS:
                raise InputError(
                    archive,
                    f"more than {MOST_MEMBERS} files",
                    "a screen in fewer",
                    "unpack it yourself and name the folder in the dataset table",
                )
            path = target.joinpath(*parts)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                bound.copy(content, path)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                _refuse(archive, name, "is a file and a folder")
    if not seen:
        raise InputError(
            archive, "no files", "an archive that holds the screen", "check it, or use another address"
        )
    inner = target
    while len(entries := list(inner.iterdir())) == 1 and entries[0].is_dir():
        inner = entries[0]
    for entry in sorted(inner.iterdir()):
        entry.replace(folder / entry.name)
    shutil.rmtree(target)


def _tar_members(archive: Path, bound: _Bounded) -> Iterator[tuple[str, _Readable]]:
    """Yield name and content of the files of a tar archive, in one pass."""
    mode = "r|" if archive.name.lower().endswith(".tar") else "r|gz"
    with tarfile.open(archive, mode) as file:  # type: ignore[call-overload]
        for member in file:
            if member.isdir() or LITTER.search(member.name):
                continue
            if not member.isreg():
                kind = "a link" if member.issym() or member.islnk() else "a device or pipe"
                _refuse(archive, member.name, f"is {kind}")
            bound.require(member.size)
            content = file.extractfile(member)
            if content is not None:
                yield member.name, content


def _zip_members(archive: Path, bound: _Bounded) -> Iterator[tuple[str, _Readable]]:
    """Yield name and content of the files of a zip archive."""
    with zipfile.ZipFile(archive) as file:
        members = [
            entry for entry in file.infolist() if not (entry.is_dir() or LITTER.search(entry.filename))
        ]
        bound.require(sum(entry.file_size for entry in members))
        for entry in members:
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                _refuse(
                    archive, entry.filename, "is a link" if kind == stat.S_IFLNK else "is a device or pipe"
                )
            if entry.flag_bits & 1:
                _refuse(archive, entry.filename, "is encrypted")
            with file.open(entry) as content:
                yield entry.filename, content


def _checked_parts(archive: Path, name: str) -> list[str]:
    """Return the parts of the path of a member, when it stays in the folder and can be written."""
    parts = name.removeprefix("./").split("/")
    if any(part in ("", ".", "..") for part in parts):
        _refuse(archive, name, "leads out of the folder, or to no file")
    if re.search(r"[\x00-\x1f\x7f\\:]", name) or any(part.startswith((".", "-", "~")) for part in parts):
        _refuse(archive, name, "has a name with characters that mean something else here")
    return parts


def _refuse(archive: Path, name: str, what: str) -> None:
    raise InputError(
        f"{archive}, member {name!r}",
        f"one that {what}",
        "an archive of plain files with plain names, which can be unpacked without a look at it",
        "unpack it yourself, with care, and name the folder or file in the dataset table",
    )


@contextmanager
def _damage_named(archive: Path) -> Iterator[None]:
    """Turn the errors of the readers of archives into a message."""
    try:
        yield
    except _DAMAGED as error:
        raise InputError(
            archive,
            f"an archive that cannot be read to its end ({error})",
            "a whole archive of the kind that its name says",
            f"delete it, and {archive.name}.sha256 where there is one, and run again, which fetches it anew",
        ) from error
