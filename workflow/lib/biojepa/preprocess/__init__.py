"""From raw counts to cells that can be trusted: labels, quality, normalization, effects."""

from biojepa.preprocess.screen import (
    Preprocessed,
    Tables,
    preprocess_file,
    preprocess_screen,
    write_preprocessed,
)
from biojepa.preprocess.settings import PreprocessSettings

__all__ = [
    "PreprocessSettings",
    "Preprocessed",
    "Tables",
    "preprocess_file",
    "preprocess_screen",
    "write_preprocessed",
]
