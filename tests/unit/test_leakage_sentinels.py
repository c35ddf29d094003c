"""The exact checks of every run: each planted leak is caught, and an honest fold passes."""

import json
import re
import shutil

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from biojepa import pairing
from biojepa import pairs as pairs_module
from biojepa.contracts import EXACT, STATED
from biojepa.errors import InputError
from biojepa.evaluation import leakage
from biojepa.evaluation.leakage import (
    check_all,
    check_declared,
    check_gene_selection,
    check_origins,
    check_sets,
)
from biojepa.evaluation.predictions import FROM_CELLS, PredictionFile
from biojepa.evaluation.splits import read_split
from biojepa.files import sha256_of
from biojepa.pairing import PairSettings, build_pairs, freeze_split
from biojepa.pairs import declare_use, read_pairs
from biojepa.splits import LeakageError

SINGLES = [f"G{i}" for i in range(9)]
LABELS = sorted([*SINGLES, "G0+G1", "G2+G3", "G4+G5"])
GENES = [f"G{i}" for i in range(60)]
SETTINGS = PairSettings(n_folds=3, n_genes=25, prior_dim=6)


class Fold:
    """A fold of a small screen, in which some genes vary among the test cells alone."""

    def __init__(self, folder, fold=0):
        self.folder, self.number = folder, fold
        self.cells, self.path = folder / "cells.h5ad", folder / f"split{fold}.tsv"
        self.pairs, self.network = folder / f"pairs{fold}.h5", folder / "net.tsv"
        rng = np.random.default_rng(0)
        self.labels = np.array(["control"] * 60 + [label for label in LABELS for _ in range(12)])
        self.batch: str | np.ndarray = "b"
        self.X = rng.gamma(1.0, rng.uniform(0.3, 2.0, 60), (len(self.labels), 60)).astype(np.float32)
        self.write()
        freeze_split(self.cells, self.path, "made", "perturbation", fold, SETTINGS)
        self.split = read_split(self.path, self.path.with_suffix(".json"), fold)
        self.tested = self.split.labels("test")
        # Genes 50 to 59 are steady but in test cells: chosen on all cells, they would be among the first.
        self.X[:, 50:] = 1.0 + 0.01 * rng.random((len(self.labels), 10))
        self.X[np.isin(self.labels, self.tested), 50:] *= rng.gamma(0.5, 4.0, (12 * len(self.tested), 10))
        self.write()
        genes = {"gene_a": SINGLES, "gene_b": [*SINGLES[1:], "G0"]}
        pd.DataFrame(genes).to_csv(self.network, sep="\t", index=False)
        self.build()

    def write(self, **columns):
        obs = pd.DataFrame(
            {"perturbation": self.labels, "batch": self.batch, "library_size": 1000.0, **columns},
            index=[f"cell{i}" for i in range(len(self.labels))],
        )
        obs = obs.astype({"perturbation": "category", "batch": "category"})
        ad.AnnData(sparse.csr_matrix(self.X), obs, pd.DataFrame(index=GENES)).write_h5ad(self.cells)

    def build(self, **changes):
        settings = PairSettings(**{**SETTINGS.__dict__, **changes})
        facts = {"split_sha256": sha256_of(self.path)}
        build_pairs(self.cells, self.path, self.pairs, [self.network], [], settings, facts)

    def prediction(self, model="mine", seed=0, **provenance):
        path = self.folder / f"{model}{seed}.h5ad"
        content = ad.AnnData(np.zeros((1, 1), dtype=np.float32))
        if provenance:
            content.uns["provenance"] = json.dumps(provenance)
        content.write_h5ad(path)
        return PredictionFile(model, self.number, seed, path)


@pytest.fixture
def fold(tmp_path):
    return Fold(tmp_path)


@pytest.fixture
def all_cells_choose(monkeypatch):
    """Return a switch that lets test cells take part in gene selection."""

    def switch():
        honest = pairing.gene_moments
        monkeypatch.setattr(
            pairing, "gene_moments", lambda matrix, keep, n: honest(matrix, np.ones_like(keep), n)
        )

    return switch


def test_an_honest_fold_passes_every_check(fold):
    rows = check_all([fold.pairs], fold.cells, [fold.split])
    assert [row["passed"] for row in rows] == [True] * 5
    stated = [row["check"].split(" ")[:2] for row in rows if row["kind"] == STATED]
    assert stated == [["prior", "codes:"], ["encoder,", "predictor,"]]
    assert {row["kind"] for row in rows} == {EXACT, STATED}
    (compared,) = [row["detail"] for row in rows if "no cell that training read" in row["check"]]
    assert "encoder" not in compared
    details = {row["check"]: row["detail"] for row in rows}
    assert any("fold 0: 25, of 60" in text for text in details.values())
    counts = fold.split.table["set"].value_counts()
    sets = ", ".join(f"{counts[name]} {name}" for name in ("train", "val", "test"))
    assert sets in details.values()


def test_a_test_perturbation_in_gene_selection_is_caught(fold, all_cells_choose):
    honest = set(read_pairs(fold.pairs).genes)
    all_cells_choose()
    fold.build()
    extra = set(read_pairs(fold.pairs).genes) - honest
    assert extra & set(GENES[50:])
    with pytest.raises(LeakageError, match=r"genes are not those that the training cells") as caught:
        check_all([fold.pairs], fold.cells, [fold.split])
    assert f"{len(extra)} in excess ({', '.join(sorted(extra)[:5])})" in str(caught.value)


def test_one_exchanged_gene_is_caught(fold):
    spare = next(gene for gene in GENES[50:] if gene not in read_pairs(fold.pairs).genes)
    with h5py.File(fold.pairs, "r+") as file:
        lost = file["names/genes"].asstr()[-1]
        file["names/genes"][-1] = spare
    with pytest.raises(LeakageError, match=rf"1 in excess \({spare}\), 1 missing \({lost}\)"):
        check_gene_selection([fold.pairs], fold.cells, [fold.split])


def test_where_every_gene_is_kept_nothing_was_chosen(fold, all_cells_choose):
    all_cells_choose()
    fold.build(n_genes=60)
    (row,) = check_gene_selection([fold.pairs], fold.cells, [fold.split])
    assert row["passed"]
    assert "1 of 1 folds keep every gene" in row["detail"]


def test_genes_of_every_fold_are_chosen_again(fold, tmp_path, all_cells_choose):
    (tmp_path / "second").mkdir()
    other = Fold(tmp_path / "second", 1)
    shutil.copy(fold.cells, other.cells)  # both folds are of one screen
    other.build()
    splits, pairs = [fold.split, other.split], [fold.pairs, other.pairs]
    assert check_gene_selection(pairs, fold.cells, splits)[0]["passed"]
    all_cells_choose()
    other.build()
    with pytest.raises(LeakageError, match=r"pairs1\.h5: its 25 genes"):
        check_gene_selection(pairs, fold.cells, splits)


def test_genes_ranked_within_batches_and_without_flagged_cells_are_chosen_again(fold, monkeypatch):
    """Neither the batches nor the flags of a fold look like another choice of genes; another choice does."""
    monkeypatch.setattr(pairs_module, "MIN_BATCH_CELLS", 40)
    rng = np.random.default_rng(1)
    fold.batch = np.where(rng.random(len(fold.labels)) < 0.5, "b", "c")
    fold.X[fold.batch == "c", 40:50] *= 6
    flag = (np.arange(len(fold.labels)) % 12 == 0) & (fold.labels != "control")
    fold.X[flag, 30:40] *= rng.gamma(0.3, 9.0, (flag.sum(), 10)).astype(np.float32)
    fold.write(flag_weak_guide=flag)
    chosen = {}
    for by_batch in (True, False):
        for flags in ((), ("flag_weak_guide",)):
            fold.build(genes_by_batch=by_batch, drop_flags=flags)
            chosen[by_batch, flags] = read_pairs(fold.pairs).genes
            assert check_gene_selection([fold.pairs], fold.cells, [fold.split])[0]["passed"]
    assert len(set(chosen.values())) == 4
    fold.build(genes_by_batch=True)
    with h5py.File(fold.pairs, "r+") as file:
        del file.attrs["genes_by_batch"]
    with pytest.raises(LeakageError, match="are not those that the training cells"):
        check_gene_selection([fold.pairs], fold.cells, [fold.split])


def test_the_cells_of_all_folds_are_read_once(fold, tmp_path, monkeypatch):
    (tmp_path / "second").mkdir()
    other = Fold(tmp_path / "second", 1)
    shutil.copy(fold.cells, other.cells)
    other.build()
    read, honest = [], leakage.read_obs
    monkeypatch.setattr(leakage, "read_obs", lambda path: read.append(path) or honest(path))
    rows = check_all([fold.pairs, other.pairs], fold.cells, [fold.split, other.split])
    assert read == [fold.cells]
    assert sum("no cell that training read" in row["check"] for row in rows) == 2


@pytest.mark.parametrize("hidden_as", ["val", "train"])
def test_a_test_perturbation_in_early_stopping_or_training_is_caught(fold, hidden_as):
    """The set in ``pairs.h5`` decides what stops a training; the checksum alone would not notice."""
    label = fold.tested[0]
    with h5py.File(fold.pairs, "r+") as file:
        file["names/sets"][list(file["names/labels"].asstr()[:]).index(label)] = hidden_as
    with pytest.raises(LeakageError, match=f"{label.replace('+', '.')}: {hidden_as}, not test; early stop"):
        check_all([fold.pairs], fold.cells, [fold.split])


def test_a_cell_that_the_screen_does_not_have_is_caught(fold):
    with h5py.File(fold.pairs, "r+") as file:
        file["names/cell_names"][-1] = "stranger"
    with pytest.raises(
        LeakageError,
        match=r"1 cell\(s\) carry another label than in .*such as stranger: .*, not in it at all",
    ):
        check_all([fold.pairs], fold.cells, [fold.split])


def test_a_perturbation_that_only_one_of_the_files_knows_is_caught(fold):
    with h5py.File(fold.pairs, "r+") as file:
        file["names/labels"][0] = "STRANGER"
    with pytest.raises(LeakageError, match=r"2 perturbation\(s\) are in another set"):
        check_sets(fold.pairs, fold.split)


def test_the_origin_of_every_prior_source_is_told(fold):
    (row,) = check_origins([fold.pairs])
    assert (row["passed"], row["detail"]) == (True, "net: network")
    with h5py.File(fold.pairs, "r+") as file:
        del file.attrs["sources"]
    (row,) = check_origins([fold.pairs])
    assert (row["passed"], row["detail"]) == (None, "net: not recorded")


def test_a_model_that_trained_on_a_test_perturbation_is_caught(fold):
    honest = fold.prediction("good", trained_on=fold.split.labels("train"), selected_on=["G99"])
    (row,) = check_declared([honest], fold.split)
    n = len(fold.split.labels("train"))
    assert (row["passed"], row["kind"]) == (True, STATED)
    assert f"trained on at most {n} perturbations and selected by at most 1" in row["detail"]
    leaky = fold.prediction("bad", trained_on=[*fold.split.labels("train"), fold.tested[0]])
    with pytest.raises(LeakageError, match=r"bad0\.h5ad: bad was trained on 1 test perturbation") as caught:
        check_declared([honest, leaky], fold.split)
    assert fold.tested[0] in str(caught.value)


def test_a_model_that_was_stopped_by_a_test_perturbation_is_caught(fold):
    leaky = fold.prediction(trained_on=fold.split.labels("train"), selected_on=[fold.tested[-1]])
    with pytest.raises(LeakageError, match=r"mine was selected or stopped by 1 test perturbation"):
        check_declared([leaky], fold.split)


@pytest.mark.parametrize(("declared", "tested"), [("G1+G0", "G0+G1"), ("ctrl+G2", "G2")])
def test_a_declared_test_perturbation_is_caught_however_it_is_spelled(fold, declared, tested):
    table = fold.split.table.copy()
    table.loc[tested, "set"] = "test"
    split = type(fold.split)(0, table, fold.path, fold.split.info)
    with pytest.raises(LeakageError, match=rf"1 test perturbation.*: {re.escape(tested)}\. Fix"):
        check_declared([fold.prediction(trained_on=[declared])], split)


def test_models_that_declare_nothing_are_named_and_controls_are_left_out(fold):
    files = [
        fold.prediction("silent"),
        fold.prediction("vague", split_sha256="0"),
        fold.prediction("duplicate", trained_on=fold.tested),
        PredictionFile("mean", 0, 0, FROM_CELLS),
    ]
    (row,) = check_declared(files, fold.split)
    assert row["passed"] is None
    assert row["detail"].startswith("silent, vague;")


def test_a_declaration_that_is_no_list_is_refused(fold):
    with pytest.raises(InputError, match=r"trained_on.*'G1'.*a list of perturbations"):
        check_declared([fold.prediction(trained_on="G1")], fold.split)


def test_what_a_model_declares_is_what_it_used(fold):
    pairs = read_pairs(fold.pairs)
    own = declare_use(pairs, pairs.labels_of("train"), pairs.labels_of("val"))
    assert own["trained_on"] == fold.split.labels("train")
    assert own["selected_on"] == fold.split.labels("val")
    encoder = {"trained_on": ["Z", own["trained_on"][0]], "selected_on": [], "fold": 0}
    both = declare_use(pairs, pairs.labels_of("train"), [], encoder, {})
    assert both == {"trained_on": [*own["trained_on"], "Z"], "selected_on": []}
