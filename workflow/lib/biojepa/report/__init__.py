"""Reports: one self-contained page per dataset and split, and an index over all of them."""

from biojepa.report.index import IndexEntry, UnevaluatedEntry, build_index
from biojepa.report.inputs import Profile, ReportInputs
from biojepa.report.page import build_report

__all__ = ["IndexEntry", "Profile", "ReportInputs", "UnevaluatedEntry", "build_index", "build_report"]
