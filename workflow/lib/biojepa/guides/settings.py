"""Settings of guide assignment: the section ``preprocess.guide_assignment`` of the config."""

from __future__ import annotations

from dataclasses import dataclass

from biojepa.errors import InputError

DOMINANCE, THRESHOLD, MIXTURE = "dominance", "threshold", "mixture"
DEFAULT_SHARE = {DOMINANCE: 0.6, THRESHOLD: 0.2, MIXTURE: 0.6}


@dataclass(frozen=True)
class GuideAssignment:
    """How guides are called.

    Parameters
    ----------
    method
        ``dominance``: one guide per cell (low multiplicity of infection). ``threshold``: all
        guides above a threshold, for cells with several guides by design. ``mixture``: all guides
        above a threshold that is fitted for each guide, for any number of guides per cell.
    min_umis
        Fewest UMIs of a guide for it to be called.
    min_share
        dominance: smallest share of the guide UMIs of the cell on its top guide, default 0.6.
        threshold: smallest count relative to the top guide of the cell, default 0.2. mixture:
        smallest share of the guide UMIs of the cell on its called guides together, default 0.6; a
        cell with less carries no guide that stands out of its background. 0 is off.
    max_guides
        threshold and mixture: cells with more called guides are dropped. Ignored by dominance.
    min_posterior
        mixture: smallest probability that a cell with that many UMIs carries the guide. Ignored by
        the others.
    """

    method: str = DOMINANCE
    min_umis: int = 5
    min_share: float | None = None
    max_guides: int = 2
    min_posterior: float = 0.5

    def __post_init__(self) -> None:
        if self.method not in DEFAULT_SHARE:
            raise InputError(
                "config, preprocess.guide_assignment.method",
                repr(self.method),
                f"{DOMINANCE}, {THRESHOLD} or {MIXTURE}",
                "use dominance for one guide per cell, threshold or mixture for several",
            )
        # Only the mixture tells guides from background without a look at the rest of the cell.
        lowest = "0 ≤" if self.method == MIXTURE else "0 <"
        low_share = self.share < 0 if self.method == MIXTURE else self.share <= 0
        # Written so that NaN fails as well.
        if self.min_umis < 1 or self.max_guides < 1 or low_share or not self.share <= 1:
            raise InputError(
                "config, preprocess.guide_assignment",
                f"min_umis {self.min_umis}, min_share {self.share}, max_guides {self.max_guides}",
                f"min_umis ≥ 1, {lowest} min_share ≤ 1, max_guides ≥ 1",
                "correct the value that is out of range",
            )
        if not 0 < self.min_posterior < 1:
            raise InputError(
                "config, preprocess.guide_assignment.min_posterior",
                str(self.min_posterior),
                "0 < min_posterior < 1",
                "use 0.5, or a value near 1 to call fewer guides",
            )

    @property
    def share(self) -> float:
        """The share that applies: ``min_share`` or the default of the method."""
        return DEFAULT_SHARE[self.method] if self.min_share is None else self.min_share
