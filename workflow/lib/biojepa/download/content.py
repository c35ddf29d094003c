"""Tell by its first bytes whether a file is what its name says.

Where no checksum is known, this is what keeps a login page or an error message of a server from being
recorded as the data.
"""

from __future__ import annotations

from pathlib import Path

from biojepa.errors import InputError

_GZIP = (0, b"\x1f\x8b", "a gzip file")
_HDF5 = (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file")
# The longest suffix first: .tar.gz is a gzip file. Where the bytes stand, which, and what they mean.
SIGNATURES = {
    ".gz": _GZIP,
    ".tgz": _GZIP,
    ".zip": (0, b"PK", "a zip archive"),
    ".tar": (257, b"ustar", "a tar archive"),
    ".h5ad": _HDF5,
    ".h5": _HDF5,
}


def require_kind(path: Path, name: str, address: str) -> None:
    """Refuse a file that does not begin as files of its name do.

    Parameters
    ----------
    path
        The file.
    name
        The name that it will have; its suffix says what it should be.
    address
        Where it came from, for the message.

    Raises
    ------
    InputError
        When the first bytes are others. Names with other suffixes pass.
    """
    offset, signature, kind = SIGNATURES.get(Path(name).suffix.lower(), (0, b"", ""))
    with path.open("rb") as file:
        head = file.read(512)
    if head[offset : offset + len(signature)] != signature:
        raise InputError(
            address,
            f"{path.stat().st_size} bytes that begin with {head[:24]!r}",
            f"{kind}, as {name} must be",
            "open the address in a browser: it may ask to log in, or have moved; or put the file at a local "
            "path and name that in the dataset table",
        )
