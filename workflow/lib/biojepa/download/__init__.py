"""Get the raw files of a screen: fetched or linked, verified, and unpacked where they are archives."""

from biojepa.download.archives import unpack_archives, unpack_file
from biojepa.download.checksums import Checksum
from biojepa.download.transfer import download_file, link_file

__all__ = ["Checksum", "download_file", "link_file", "unpack_archives", "unpack_file"]
