"""Which guides a cell carries, from its guide UMI counts.

Three rules. *dominance* is for screens with one guide per cell: the top guide must hold a minimum
share of the guide UMIs of the cell. *threshold* is for cells that carry two or more guides by
design: every guide that reaches a minimum count and a minimum share of the top guide is called.
*mixture* is for either: each guide gets a threshold of its own, from the counts of that guide in all
cells, so that an abundant guide in the ambient RNA is not called where a rare one rightly is.
"""

from biojepa.guides.assign import (
    ASSIGNED,
    GUIDE_JOIN,
    NO_GUIDE,
    TOO_MANY_GUIDES,
    GuideCalls,
    assign_guides,
    call_guides,
)
from biojepa.guides.mixture import GuideFits, fit_guides
from biojepa.guides.settings import GuideAssignment

__all__ = [
    "ASSIGNED",
    "GUIDE_JOIN",
    "NO_GUIDE",
    "TOO_MANY_GUIDES",
    "GuideAssignment",
    "GuideCalls",
    "GuideFits",
    "assign_guides",
    "call_guides",
    "fit_guides",
]
