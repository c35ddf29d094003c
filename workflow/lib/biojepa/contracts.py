"""Names that the stages share: columns, slots, labels, models, metrics.

Every file that passes between stages is described here by its constants, so that a column is
spelled once. The prose description of each file is in ``docs/files.md``.
"""

from __future__ import annotations

CONTROL = "control"
GENE_SEPARATOR = "+"
# Joins a perturbation and the held-out context that its cells are in: ``KLF1+GATA1 @ K562``.
CONTEXT_SEPARATOR = " @ "
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
# Columns of bool that tell of a cell or its perturbation what may be wrong with it.
FLAG_PREFIX = "flag_"
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
FLAG_WEAK, FLAG_WEAK_GUIDE = "flag_weak_perturbation", "flag_weak_guide"
FLAG_FEW_GUIDES = "flag_few_guides"
# What preprocess adds where it can: place in the cell cycle, and whether a cell responds to its perturbation.
S_SCORE, G2M_SCORE, PHASE = "s_score", "g2m_score", "phase"
RESPONDING_POSTERIOR = "responding_posterior"
FLAG_DISCORDANT_GUIDE, FLAG_NON_RESPONDING = "flag_discordant_guide", "flag_non_responding"
COUNTS_LAYER = "counts"
GENE_ID = "gene_id"
PERTURBATION_TYPES = ("CRISPRi", "CRISPRa", "CRISPRko", "unknown")

# --- preprocess/qc.tsv, perturbations.tsv, guides.tsv --------------------------------------------
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
    "top_gene",
    "top_gene_share",
    "responding_share",
    "flag",
)
# Flag of a guide that does something else than the others of its perturbation; flags are joined by ";".
DISCORDANT = "discordant"
GUIDE_TABLE_COLUMNS = (
    GUIDE_ID,
    PERTURBATION,
    "n_cells",
    "on_target_log2fc",
    "effect_size",
    "agreement",
    "p",
    "q",
    "flag",
)

# --- preprocess/guide_calls.tsv, guides_per_cell.tsv, guide_umis.tsv: header alone without guide counts -----
GUIDE_CALLS_COLUMNS = (
    "guide",
    "target",
    "cells_counted",
    "umis",
    "threshold",
    "cells_called",
    "cells_assigned",
    "cells_alone",
    "signal_weight",
    "signal_log2_mean",
    "signal_log2_sd",
    "background_mean",
    "background_dispersion",
    "positive_cells",
    "expected_false",
    "expected_missed",
    "converged",
    "fallback",
)
GUIDES_PER_CELL_COLUMNS = ("status", "n_guides", "cells", "share")
GUIDE_UMIS_COLUMNS = ("rank", "guide_umis")

# --- preprocess/batches.tsv, distributions.tsv -------------------------------------------------
BATCHES_COLUMNS = (
    "metric",
    "batch",
    "cells",
    "cells_kept",
    "p5",
    "p25",
    "median",
    "p75",
    "p95",
    "limit_low",
    "limit_high",
)
DISTRIBUTIONS_COLUMNS = ("metric", "bin_low", "bin_high", "cells", "cells_low_quality", "cells_kept")

# --- pair/split.tsv ---------------------------------------------------------------------------
SET = "set"
TRAIN, VAL, TEST = "train", "val", "test"
SETS = (TRAIN, VAL, TEST)
CATEGORY = "category"
SPLIT_COLUMNS = (PERTURBATION, SET, CATEGORY, "n_genes_seen")
# The scheme that holds nothing out, for a model that is applied to new perturbations.
NO_SPLIT = "none"
# The schemes that hold something out.
SCHEMES = ("perturbation", "gene", "combination", "context", "list")
OTHER_CONTEXT = "other_context"
CATEGORIES = ("combo_seen2", "combo_seen1", "combo_seen0", "single_in_combo", "single", OTHER_CONTEXT)
# Keys of split.json of the scheme context, beside CONTEXT itself: where contexts are found; labels of the
# held-out context whose perturbation is validation in the others; and all labels that are not used, these and
# those with too few cells, with their number of cells.
CONTEXT_COLUMN = "context_column"
VALIDATION_ELSEWHERE = "validation_elsewhere"
LEFT_OUT = "left_out"

# Attribute of pairs.h5: JSON text, source to its kind and where it comes from.
SOURCES = "sources"
# Attribute of pairs.h5: how a control is found for a cell. Files without it hold populations.
STRATEGY = "strategy"
POPULATION, RANDOM, MATCHED = "population", "random", "matched"
NEAREST, OPTIMAL_TRANSPORT = "nearest", "optimal_transport"
STRATEGIES = (POPULATION, RANDOM, MATCHED, NEAREST, OPTIMAL_TRANSPORT)

# Attributes of pairs.h5: counts per cell that expression was scaled to; that genes were ranked by batch,
# where they were; where flags were asked for, JSON text, how many cells each of them left out of training.
TARGET_SUM = "target_sum"
GENES_BY_BATCH = "genes_by_batch"
LEFT_OUT_BY_FLAG = "left_out_by_flag"

# --- pair/training_cells.tsv ------------------------------------------------------------------
# The flags that were asked for stand after the second.
TRAINING_CELLS_COLUMNS = (PERTURBATION, "n_cells", "n_left_out", "n_training_cells", "consequence")

# --- pair/balance.tsv -------------------------------------------------------------------------
BALANCE_COLUMNS = (
    STRATEGY,
    "covariate",
    "level",
    "n_cells",
    "n_controls",
    "n_paired_controls",
    "perturbed_mean",
    "control_mean",
    "paired_mean",
    "smd_before",
    "smd_after",
    "abs_smd_before",
    "abs_smd_after",
)

# --- embed/embeddings.h5ad, embed/predictions.h5ad ----------------------------------------------
# Keys of the provenance of a model: labels that anything of it was fitted to, and labels by which it was
# chosen or stopped.
TRAINED_ON, SELECTED_ON = "trained_on", "selected_on"
# Of `linear`: labels none of whose target genes was measured, which get the training mean.
WITHOUT_TARGET = "without_measured_target"
EMBEDDING = "X_biojepa"
CONTEXT = "context"
N_CELLS = "n_cells"
PREDICTIONS_OBS = (PERTURBATION, CONTEXT, SET, N_CELLS)
SD_LAYER = "sd"
# uns: predicted single cells, X (cells, genes) CSR, and the row of the file that each belongs to.
PREDICTED_CELLS = "predicted_cells"
Z_PRED, Z_TRUE = "z_pred", "z_true"

# --- embed/representation.tsv --------------------------------------------------------------------
REPRESENTATION_COLUMNS = (
    "model",
    "fold",
    "seed",
    "embedding",
    "metric",
    "cells",
    "n_cells",
    "perturbation",
    "value",
    "chance",
)

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
    "expected_accuracy",
    "expected_low",
    "expected_high",
    "expected_from",
    "abstain",
    "trust",
)

# --- evaluate/*.tsv -----------------------------------------------------------------------------
WHOLE_MODEL = "*"
# Kinds of checks for leakage: comparisons of files, exact as far as the names of cells, labels and genes go;
# signs of a leak; and what holds by the word of a file or by how the workflow is made, which nothing here
# checks.
EXACT, STATISTICAL, STATED = "exact", "statistical", "stated"
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
# Scores by strata of the test perturbations.
STRATA_COLUMNS = (
    "property",
    "stratum",
    "lower",
    "upper",
    "model",
    "metric",
    "n",
    "mean",
    "ci_low",
    "ci_high",
    "gap_closed",
    "gap_ci_low",
    "gap_ci_high",
    "best_baseline",
    "difference",
    "difference_ci_low",
    "difference_ci_high",
)
# What was to be expected of the model under test before a perturbation was measured, and what it reached.
TRUST_COLUMNS = (
    PERTURBATION,
    CATEGORY,
    "n_genes_seen",
    "nearest_training_gene",
    "nearest_similarity",
    "prior_coverage",
    "predicted_effect",
    "predicted_effect_sd",
    "expected",
    "low",
    "high",
    "guess",
    "observed",
)

# --- values of the wildcard {model} ---------------------------------------------------------------
# Needs another screen, which not every dataset names.
OTHER_SCREEN = "other_screen"
# Fitted without a learned embedding, in one job.
SIMPLE_MODELS = (
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
    "mlp",
    OTHER_SCREEN,
    "shuffled_labels",
    "random_codes",
)
POSITIVE_CONTROLS = ("duplicate", "interpolated_duplicate", "oracle", "oracle_pca")
# They know nothing of what the perturbed gene does; `random_codes` knows which gene it is.
NEGATIVE_CONTROLS = ("no_change", "mean", "shuffled_labels", "random_codes")
