"""Every metric by name: plain functions with their formula, best value and role.

Notation: x̂ predicted mean, x observed mean of half B, c control mean, m training perturbed mean,
all log1p of counts per ``target_sum``; Δ = x − m unless "against control" is said; p perturbation,
g gene. Every function takes ``(perturbations, genes)`` arrays whose rows are the test perturbations
of one fold. A change whose norm is below ``FoldTruth.zero_norm`` correlates 0 by definition.
"""

from __future__ import annotations

from biojepa.evaluation import differential, headline, interaction, legacy, uncertainty
from biojepa.evaluation.distribution import DISTRIBUTION_METRICS
from biojepa.evaluation.registry import REGISTERED, Metric, Role

__all__ = ["METRICS", "PATHWAY_CORRELATION", "Metric", "Role", "all_metrics"]

# The order of the tables and figures.
METRICS: dict[str, Metric] = {
    name: metric
    for module in (headline, interaction, differential, uncertainty, legacy)
    for name, metric in REGISTERED.items()
    if metric.score.__module__ == module.__name__
}

# Its values come from gene-set enrichment, not from a function of two arrays.
PATHWAY_CORRELATION = Metric(
    "pathway_correlation",
    "secondary",
    "max",
    "Agreement of gene-set enrichment of predicted and observed change against control",
    "Spearman over gene sets of NES(x̂ − c) and NES(x − c), gseapy prerank",
    "perturbation",
)


def all_metrics() -> dict[str, Metric]:
    """Return every metric by name, gene-set agreement and those of single cells included."""
    return {**METRICS, PATHWAY_CORRELATION.name: PATHWAY_CORRELATION, **DISTRIBUTION_METRICS}
