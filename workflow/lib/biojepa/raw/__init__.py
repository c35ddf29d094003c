"""Read a screen in the format it was published in."""

from biojepa.raw.read import GUIDE_COUNTS, GUIDE_NAMES, NOTES, RawScreen, open_screen, read_screen
from biojepa.raw.source import ScreenSource
from biojepa.raw.tables import require_column

__all__ = [
    "GUIDE_COUNTS",
    "GUIDE_NAMES",
    "NOTES",
    "RawScreen",
    "ScreenSource",
    "open_screen",
    "read_screen",
    "require_column",
]
