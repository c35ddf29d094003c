"""The page of quality control: what a screen's owner asks of a screen before any model is trained."""

from biojepa.qc_report.inputs import CellFacts, QcInputs
from biojepa.qc_report.page import build_qc_report

__all__ = ["CellFacts", "QcInputs", "build_qc_report"]
