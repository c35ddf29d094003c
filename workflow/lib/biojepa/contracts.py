"""Names that the stages share: columns, slots, labels, models, metrics.

Every file that passes between stages is described here by its constants, so that a column is
spelled once. The prose description of each file is in ``docs/files.md``.
"""

from __future__ import annotations

CONTROL = "control"
GENE_SEPARATOR = "+"
ALL_CONTEXTS = "all"

# --- cells.h5ad, obs -------------------------------------------------------------------------
PERTURBATION = "perturbation"
IS_CONTROL = "is_control"
N_PERTURBED_GENES = "n_perturbed_genes"
GUIDE_ID = "guide_id"
PERTURBATION_TYPE = "perturbation_type"
DOSE = "dose"
BATCH = "batch"
CELL_TYPE = "cell_type"
LIBRARY_SIZE = "library_size"
CELLS_OBS = (
    PERTURBATION,
    IS_CONTROL,
    N_PERTURBED_GENES,
    GUIDE_ID,
    PERTURBATION_TYPE,
    DOSE,
    BATCH,
    CELL_TYPE,
    LIBRARY_SIZE,
)
COUNTS_LAYER = "counts"
GENE_ID = "gene_id"
PERTURBATION_TYPES = ("CRISPRi", "CRISPRa", "CRISPRko", "unknown")

# --- preprocess/qc.tsv, preprocess/perturbations.tsv ------------------------------------------
QC_COLUMNS = ("filter", "threshold", "cells_before", "cells_removed", "cells_after", "note")
PERTURBATION_TABLE_COLUMNS = (
    "perturbation",
    "n_perturbed_genes",
    "n_cells",
    "n_guides",
    "guides",
    "target_measured",
    "on_target_log2fc",
    "on_target_p",
    "effect_size",
    "effect_p",
    "effect_q",
    "n_deg",
    "flag",
)

# --- pair/split.tsv ---------------------------------------------------------------------------
SET = "set"
TRAIN, VAL, TEST = "train", "val", "test"
SETS = (TRAIN, VAL, TEST)
CATEGORY = "category"
SPLIT_COLUMNS = (PERTURBATION, SET, CATEGORY, "n_genes_seen")
# The scheme that holds nothing out, for a model that is applied to new perturbations.
NO_SPLIT = "none"
CATEGORIES = ("combo_seen2", "combo_seen1", "combo_seen0", "single_in_combo", "single")

# --- embed/embeddings.h5ad, embed/predictions.h5ad ----------------------------------------------
EMBEDDING = "X_biojepa"
CONTEXT = "context"
N_CELLS = "n_cells"
PREDICTIONS_OBS = (PERTURBATION, CONTEXT, SET, N_CELLS)
SD_LAYER = "sd"
Z_PRED, Z_TRUE = "z_pred", "z_true"

# --- predict/predictions.tsv --------------------------------------------------------------------
PREDICTED_COLUMNS = (
    "rank",
    PERTURBATION,
    CATEGORY,
    "effect_size",
    "effect_size_sd",
    "top_up",
    "top_down",
    "nearest_training_gene",
    "nearest_similarity",
    "nearest_distance",
    "prior_coverage",
    "prior_sources",
    "heldout_accuracy",
    "heldout_n",
    "baseline",
    "baseline_accuracy",
    "gain",
    "gain_ci_low",
    "gain_ci_high",
    "uninformed_baseline",
    "uninformed_gain",
    "uninformed_gain_ci_low",
    "uninformed_gain_ci_high",
    "abstain",
    "trust",
)

# --- evaluate/*.tsv -----------------------------------------------------------------------------
WHOLE_MODEL = "*"
ALL_CATEGORIES = "all"
METRICS_COLUMNS = ("model", "fold", "seed", "perturbation", "category", "metric", "value")
SUMMARY_COLUMNS = (
    "model",
    "category",
    "metric",
    "n",
    "mean",
    "ci_low",
    "ci_high",
    "gap_closed",
    "gap_ci_low",
    "gap_ci_high",
    "best_baseline",
    "p_vs_best_baseline",
    "q_vs_best_baseline",
    "win_rate",
    "harm_rate",
)
ENRICHMENT_COLUMNS = (
    "model",
    "fold",
    "seed",
    "perturbation",
    "category",
    "gene_set",
    "nes_pred",
    "nes_true",
    "fdr_true",
)

# --- values of the wildcard {model} ---------------------------------------------------------------
LINEAR_BASELINES = (
    "no_change",
    "mean",
    "target_only",
    "additive",
    "matching_mean",
    "linear",
    "multihot",
    "ridge",
    "kernel_ridge",
    "knn",
    "shuffled_labels",
    "random_codes",
)
POSITIVE_CONTROLS = ("duplicate", "interpolated_duplicate", "oracle", "oracle_pca")
NEGATIVE_CONTROLS = ("no_change", "mean", "shuffled_labels", "random_codes", "shuffled_priors")
