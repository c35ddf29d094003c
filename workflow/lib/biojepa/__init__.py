"""BioJEPA: predict what an unseen perturbation does to a cell, in embedding space."""

from __future__ import annotations

__version__ = "0.1.0"
