"""Small folds made in memory, whose effects are known, for the tests of models and training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import sparse

from biojepa.contracts import CONTROL
from biojepa.pairs import CONTROL_CODE, Pairs, match_controls
from biojepa.training import TrainSettings

N_GENES = 30
SINGLES = [f"P{i:02d}" for i in range(24)]
COMBINATIONS = ["P00+P01", "P02+P03", "P04+P20", "P05+P06"]
TEST_LABELS = ("P20", "P21", "P22", "P23", "P04+P20", "P05+P06")
VALIDATION_LABELS = ("P16", "P17", "P18", "P19")
CODE_DIM = 4


def pairs_of(
    expression: np.ndarray,
    label_of_cell: Sequence[str],
    sets: Mapping[str, str],
    codes: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    batch_of_cell: Sequence[int] | None = None,
    genes: Sequence[str] | None = None,
    library: np.ndarray | None = None,
    seed: int = 0,
) -> Pairs:
    """Lay out a fold.

    ``expression`` is (cells, genes); ``sets`` gives train, val or test to every label that is not
    control; ``codes`` gives a vector per source and gene, missing where the source knows nothing.
    """
    matrix = sparse.csr_matrix(np.asarray(expression, dtype=np.float32))
    labels = sorted(sets)
    perturbed = sorted({gene for label in labels for gene in label.split("+")})
    position = {label: i for i, label in enumerate(labels)}
    perturbation = np.array([position.get(label, CONTROL_CODE) for label in label_of_cell], dtype=np.int32)
    batch = np.zeros(len(perturbation)) if batch_of_cell is None else np.asarray(batch_of_cell)
    batch = batch.astype(np.int32)
    dense_codes = {}
    for source, known in (codes or {}).items():
        width = len(next(iter(known.values())))
        rows = [np.asarray(known.get(gene, np.zeros(width)), dtype=np.float32) for gene in perturbed]
        dense_codes[source] = np.stack(rows)
    if library is None:
        library = np.log(5000.0) + 0.2 * np.random.default_rng(seed).standard_normal(len(perturbation))
    return Pairs(
        genes=tuple(genes or [f"X{i}" for i in range(matrix.shape[1])]),
        data=matrix.data,
        indices=matrix.indices.astype(np.int32),
        indptr=matrix.indptr.astype(np.int64),
        cell_names=tuple(f"cell{i}" for i in range(len(perturbation))),
        perturbation=perturbation,
        batch=batch,
        batches=tuple(f"b{i}" for i in range(int(batch.max()) + 1)),
        log_library_size=np.asarray(library, dtype=np.float32),
        partner=match_controls(perturbation, batch, np.random.default_rng(seed))[0],
        labels=tuple(labels),
        sets=tuple(sets[label] for label in labels),
        categories=tuple("" if sets[label] == "train" else "single" for label in labels),
        types=("CRISPRi",),
        type_code=np.zeros(len(labels), dtype=np.int32),
        dose=np.ones(len(labels), dtype=np.float32),
        perturbed_genes=tuple(perturbed),
        codes=dense_codes,
        facts={"dataset": "made", "scheme": "perturbation", "fold": 0, "seed": seed, "split_sha256": "0" * 8},
    )


class KnownEffects:
    """Cells whose effects are a linear function of the genes' codes, in batches that differ.

    The effect of a gene is its code times a fixed matrix, that of a combination the sum; a code
    therefore says all about a gene that no training cell carries.
    """

    def __init__(self, seed: int = 0, cells_per_label: int = 30, n_controls: int = 240) -> None:
        rng = np.random.default_rng(seed)
        self.code = {gene: rng.standard_normal(CODE_DIM) for gene in SINGLES}
        loading = 0.35 * rng.standard_normal((CODE_DIM, N_GENES))
        self.effect = {gene: vector @ loading for gene, vector in self.code.items()}
        for label in COMBINATIONS:
            self.effect[label] = sum(self.effect[gene] for gene in label.split("+"))
        base = rng.uniform(1.5, 3.0, N_GENES)
        batch_shift = 0.3 * rng.standard_normal((2, N_GENES))
        sets = dict.fromkeys(self.effect, "train")
        sets |= dict.fromkeys(TEST_LABELS, "test") | dict.fromkeys(VALIDATION_LABELS, "val")
        carried = [label for label in sets if sets[label] != "test"]
        labels = np.array(
            [CONTROL] * n_controls + [label for label in carried for _ in range(cells_per_label)]
        )
        labels = rng.permutation(labels)
        batch = rng.integers(2, size=len(labels))
        shift = np.stack([self.effect.get(label, np.zeros(N_GENES)) for label in labels])
        noise = 0.4 * rng.standard_normal(shift.shape)
        expression = np.maximum(base + batch_shift[batch] + shift + noise, 0)
        self.pairs = pairs_of(expression, labels, sets, {"network": self.code}, batch, seed=seed)
        self.test = self.pairs.labels_of("test")
        self.test_effect = np.stack([self.effect[self.pairs.labels[row]] for row in self.test])


def tiny_settings(**changes) -> TrainSettings:
    """Settings that train in a second or two; ``encoder`` and ``predictor`` are merged key by key."""
    encoder = {
        "hidden": (32,),
        "num_tokens": 4,
        "embed_dim": 16,
        "depth": 1,
        "heads": 2,
        "predictor_width": 16,
        "predictor_depth": 1,
        "steps": 30,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "action_weight": 0.1,
        "monitor_every": 10,
        "checkpoint_every": 10,
    }
    predictor = {
        "width": 16,
        "depth": 1,
        "heads": 2,
        "condition_dim": 16,
        "steps": 30,
        "batch_size": 16,
        "learning_rate": 5e-4,
        "population": 16,
        "evaluate_every": 10,
    }
    encoder |= changes.pop("encoder", {})
    predictor |= changes.pop("predictor", {})
    defaults = {"device": "cpu", "torch_threads": 1}
    return TrainSettings.from_config({**defaults, **changes, "encoder": encoder, "predictor": predictor})
