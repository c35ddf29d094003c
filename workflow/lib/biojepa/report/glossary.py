"""What models, metrics and categories are called in a report, and how a reader should take them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from biojepa import contracts
from biojepa.evaluation.metrics import all_metrics
from biojepa.models import ABLATION_MODELS, LATENT_MODELS

HEADLINE, COMBINATION, SECONDARY = "headline", "combination", "secondary"
LEGACY = "legacy"

MAIN, ABLATION, BASELINE, NEGATIVE, POSITIVE, OTHER = (
    "main",
    "ablation",
    "baseline",
    "negative",
    "positive",
    "other",
)
GROUP_TITLES = {
    POSITIVE: "Positive controls (how well this can be measured)",
    MAIN: "The model",
    OTHER: "Your models (predictions made elsewhere)",
    ABLATION: "Ablations (the same pipeline with a part replaced)",
    BASELINE: "Simple baselines",
    NEGATIVE: "Negative controls (nothing is known of the gene, or no more than its name)",
}
# Made of genes that training perturbed, all or one of them; and of none.
SEEN_CATEGORIES = ("combo_seen2", "combo_seen1", "single_in_combo")
UNSEEN_CATEGORIES = ("single",)


@dataclass(frozen=True)
class MetricText:
    """How a metric is shown: its name, its best direction, how to read it and where it misleads.

    ``best`` is ``max``, ``min`` or the value that is right, such as 1 for a slope; ``null`` is the value
    of a model that knows nothing, or None where the definition fixes no such value.
    """

    name: str
    label: str
    best: str | float
    role: str
    read: str
    formula: str = ""
    null: float | None = None

    @property
    def arrow(self) -> str:
        """Return the sign that a table shows beside the name."""
        if isinstance(self.best, str):
            return {"max": "↑", "min": "↓"}[self.best]
        return f"→ {self.best:g}"

    @property
    def direction(self) -> str:
        """Say the best direction in words."""
        if isinstance(self.best, str):
            return {"max": "higher is better", "min": "lower is better"}[self.best]
        return f"nearest to {self.best:g} is best"

    def loss(self, value: float) -> float:
        """Return a sort key that is smaller for a better value; a missing value comes last."""
        if pd.isna(value):
            return math.inf
        if isinstance(self.best, str):
            return -value if self.best == "max" else value
        return abs(value - self.best)


# Label, how to read it, and the value of a model that knows nothing, in the order of the page.
_READ: dict[str, tuple[str, str, float | None]] = {
    "pearson_delta_perturbed_mean": (
        "Pearson Δ",
        "correlation over genes of predicted and observed change, both relative to the mean of the "
        "training perturbations, so that a constant guess scores 0",
        0.0,
    ),
    "weighted_r2_delta": (
        "Weighted R²",
        "share of the change explained, genes weighted by how clearly they respond; the training mean "
        "scores 0 and a misleading prediction is negative",
        0.0,
    ),
    "rank_l2": (
        "Rank, L2",
        "share of the other held-out truths that lie farther from the prediction than its own truth "
        "(1 best, 0.5 chance), Euclidean distance",
        0.5,
    ),
    "rank_cosine": ("Rank, cosine", "the rank with the cosine distance, which ignores effect size", 0.5),
    "effect_slope": (
        "Effect slope",
        "slope of predicted on observed effect size over perturbations; below 1 the model shrinks, and "
        "noise keeps even a perfect model below 1, so compare with the duplicate",
        None,
    ),
    "effect_cosine": (
        "Effect cosine", "cosine of predicted and observed change: direction without size", 0.0,
    ),
    "additive_l2_difference": (
        "L2 − additive L2",
        "distance to the truth minus the distance of the additive model; below 0 beats adding the two "
        "single effects",
        0.0,
    ),
    "interaction_tpr": (
        "Interaction TPR",
        "share of the genetic interactions (genes of a combination that are not the sum of its singles) that "
        "are found while at most one call in ten is false; the additive model finds none by definition",
        0.0,
    ),
    "direction_match": (
        "Direction match", "share of significant genes that are predicted to move the right way", 0.5,
    ),
    "spearman_lfc": ("Spearman LFC", "rank correlation of log fold changes over significant genes", 0.0),
    "pr_auc": ("PR-AUC", "how well the size of the predicted change ranks significant genes first", None),
    "overlap_at_n": (
        "Overlap at N", "share of the N significant genes among the N largest predicted changes", None,
    ),
    "pathway_correlation": (
        "Pathway correlation",
        "correlation over gene sets of predicted and observed enrichment scores (NES); the change that all "
        "perturbations share counts, so compare with the training mean",
        None,
    ),
    "spread_ratio": (
        "Spread ratio",
        "spread between predictions over spread between truths; near 0 the model says the same for "
        "every perturbation",
        None,
    ),
    "variance_ratio": (
        "Variance ratio",
        "predicted over observed variance between cells, the median gene; below 1 the predicted cells are "
        "too alike. Models without cells move control cells by the predicted change",
        None,
    ),
    "energy_distance": (
        "Energy distance",
        "distance of the clouds of predicted and observed cells, about 0 where they are the same; compare "
        "with no change, whose cells are the controls, and with the duplicate",
        None,
    ),
    "coverage_50": ("Coverage, 50 %", "share of genes whose truth lies in the model's 50 % interval", None),
    "coverage_80": ("Coverage, 80 %", "share of genes whose truth lies in the model's 80 % interval", None),
    "coverage_95": ("Coverage, 95 %", "share of genes whose truth lies in the model's 95 % interval", None),
    "crps": ("CRPS", "error of the predicted distribution, in units of log expression", None),
    "pearson_delta_control": (
        "Pearson Δ control",
        "correlation of changes relative to control; the change that all perturbations share is enough "
        "for a high value",
        None,
    ),
    "pearson_delta_control_top20": ("… top 20 genes", "the same over the 20 genes that change most", None),
    "l2_top1000": ("L2, top 1000", "distance over the 1,000 most expressed genes", None),
    "mse": ("MSE", "mean squared error over genes", None),
}  # fmt: skip
METRIC_ORDER = tuple(_READ)
PRIMARY_METRIC = METRIC_ORDER[0]


def metric_text(name: str) -> MetricText:
    """Return how a metric is shown; one that is not known here is shown under its own name.

    Direction, role and formula are those of the registry of the evaluation.
    """
    label, read, null = _READ.get(name, (name, "a metric added by the user", None))
    registered = all_metrics().get(name)
    if registered is None:
        return MetricText(name, label, "max", SECONDARY, read, "", null)
    if name not in _READ:
        label, read = name.replace("_", " "), registered.description
    return MetricText(name, label, registered.best, registered.role, read, registered.formula, null)


_MODELS = {
    "biojepa": ("BioJEPA", "the default configuration"),
    "no_change": ("No change", "control expression: the perturbation does nothing"),
    "mean": ("Training mean", "the mean of the training perturbations, whatever the perturbation"),
    "target_only": ("Target gene only", "control expression with the perturbed gene itself moved"),
    "additive": ("Additive", "sum of the single effects, where they were trained"),
    "matching_mean": ("Matching mean", "mean of the training perturbations that share a gene"),
    "linear": ("Linear (gene PCs)", "bilinear model on gene principal components, Ahlmann-Eltze et al. 2025"),
    "multihot": ("Multi-hot ridge", "ridge regression on which genes are perturbed"),
    "ridge": ("Prior ridge", "ridge regression on the prior codes of the perturbed genes"),
    "kernel_ridge": (
        "Kernel ridge",
        "additive kernel ridge on perturbed genes and prior codes, without any embedding",
    ),
    "knn": ("Nearest neighbours", "mean of the training perturbations nearest in the prior codes"),
    "mlp": ("Additive network", "small network on the prior codes, summed over the perturbed genes"),
    "other_screen": ("Other screen", "what the same genes changed in another screen, scaled to this one"),
    "biojepa_predictor": ("Predictor alone", "the latent predictor alone"),
    "biojepa_predictor_noprior": ("Predictor, no priors", "latent predictor without side information"),
    "biojepa_predictor_shuffled": (
        "Predictor, shuffled priors",
        "latent predictor, priors on the wrong genes",
    ),
    "pca": ("PCA + full model", "all of BioJEPA, on principal components in place of the encoder"),
    "untrained": ("Untrained + full model", "all of BioJEPA, on the encoder at its random start"),
    "pca_predictor": ("PCA + predictor", "principal components in place of the encoder"),
    "untrained_predictor": ("Untrained + predictor", "the encoder at its random start"),
    "biojepa_flat": ("BioJEPA, flat loss", "regularizer over flattened tokens"),
    "shuffled_labels": ("Shuffled labels", "trained on training labels in random order"),
    "shuffled_priors": ("Shuffled priors", "all of BioJEPA, prior codes dealt out to the wrong genes"),
    "random_codes": (
        "Random codes",
        "random numbers in place of the prior codes: which gene it is, not what it is like, so that it "
        "scores where training perturbed the gene",
    ),
    "duplicate": ("Technical duplicate", "half of the cells predicts the other half"),
    "interpolated_duplicate": ("Interpolated duplicate", "duplicate, shrunk to the mean where noise rules"),
    "oracle": ("Oracle embedding", "the true embedding through the readout: the ceiling of the readout"),
    "oracle_pca": ("Oracle PCA", "the true principal components through the same readout"),
}


EMBEDDING_LABELS = {"biojepa": "BioJEPA", "pca": "PCA", "untrained": "Untrained encoder"}
HEAD_LABELS = {
    "full": "Full model",
    "ridge": "Ridge",
    "knn": "Nearest neighbours",
    "predictor": "Latent predictor",
}
PRIOR_LABELS = {"given": "with priors", "none": "no priors", "shuffled": "shuffled priors"}


@dataclass(frozen=True)
class ModelText:
    """How a model is shown: name in the tables, label, group and one line of explanation."""

    name: str
    label: str
    group: str
    about: str


def model_text(name: str, main_model: str = "biojepa") -> ModelText:
    """Return how a model is shown; one whose predictions were made elsewhere keeps its name."""
    label, about = _MODELS.get(name) or _ablation_text(name)
    if name == main_model:
        group = MAIN
    elif name in contracts.POSITIVE_CONTROLS:
        group = POSITIVE
    elif name in contracts.NEGATIVE_CONTROLS:
        group = NEGATIVE
    elif name in contracts.SIMPLE_MODELS:
        group = BASELINE
    elif name in LATENT_MODELS or name in ABLATION_MODELS:
        group = ABLATION
    else:
        group = OTHER
    return ModelText(name, label, group, about)


def _ablation_text(name: str) -> tuple[str, str]:
    """Return label and explanation of a cell of the ablation; the bare name for a model made elsewhere."""
    model = ABLATION_MODELS.get(name)
    if model is None:
        return name, "predictions made elsewhere; what the model was fitted to is not known here"
    embedding, head = EMBEDDING_LABELS[model.embedding], HEAD_LABELS[model.head].lower()
    label = f"{embedding} + {head}"
    if model.priors != "given":
        label += f", {PRIOR_LABELS[model.priors]}"
    return label, f"ablation: {head} on the embedding {embedding}, {PRIOR_LABELS[model.priors]}"


CATEGORY_LABELS = {
    contracts.ALL_CATEGORIES: "all held-out perturbations",
    "combo_seen2": "combination, both genes trained as singles",
    "combo_seen1": "combination, one gene trained as a single",
    "combo_seen0": "combination, no gene trained as a single",
    "single_in_combo": "single, its gene trained in a combination",
    "single": "single, gene never perturbed in training",
    contracts.OTHER_CONTEXT: "the same perturbation trained in another context",
}
SCHEME_TEXTS = {
    "perturbation": "Folds over perturbations: each is tested once, and its genes may be trained elsewhere.",
    "gene": "Folds over genes: every perturbation that carries a held-out gene is tested, so that none is "
    "composed of trained genes alone. A combination may be tested in two folds, and is averaged.",
    "combination": "Combinations are held out by a published protocol. Folds are independent draws and no "
    "partition; a perturbation that several of them test is averaged.",
    "context": "The perturbed cells of one context are held out; the same perturbations may be trained in "
    "others. Control cells of every context are known, and predictions start from those of the held-out one. "
    "Training perturbations count as of that context: its control plus their change elsewhere. The unit is a "
    "perturbation; tested in two contexts, it is drawn as one.",
    "list": "The perturbations that the config names are held out.",
}


def category_label(name: str) -> str:
    """Return a category in words."""
    return CATEGORY_LABELS.get(name, name)
