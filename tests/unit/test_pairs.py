"""Claims about what training gets to see: cells, genes, controls, codes, and nothing held out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from training_case import KnownEffects, pairs_of

from biojepa import pairing
from biojepa import pairs as pairs_module
from biojepa.contracts import SET, TEST, TRAIN, VAL
from biojepa.errors import InputError
from biojepa.files import sha256_of
from biojepa.pairing import PairSettings, build_pairs, freeze_split
from biojepa.pairs import (
    CONTROL_CODE,
    Pairs,
    counts_of,
    gene_moments,
    match_controls,
    multi_hot,
    read_pairs,
    rows_of_matrix,
    select_genes,
    select_genes_by_batch,
    trainable_labels,
    validation_labels,
)
from biojepa.preprocess import PreprocessSettings, preprocess_file
from biojepa.priors import GeneCodes, gene_table_source, network_source, read_gene_table, read_network
from biojepa.raw import ScreenSource
from biojepa.responses import response_source
from biojepa.splits import LeakageError, labels_in, read_split

GENES = [f"G{i}" for i in range(40)]
SINGLES = [f"G{i}" for i in range(9)]
LABELS = [*SINGLES, "G0+G1", "G2+G3", "OUTSIDE"]
SETTINGS = PairSettings(n_folds=3, n_genes=20, prior_dim=6)


class Screen:
    """Cells on disk with a frozen split, whose expression a test may change."""

    genes = (*GENES, *(f"H{i}" for i in range(200)))

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        labels = np.array(["control"] * 60 + [label for label in LABELS for _ in range(12)], dtype=object)
        self.labels = rng.permutation(labels)
        # Batch 2 holds no control, so its cells must borrow.
        batch = np.where(self.labels == "control", rng.integers(2, size=204), rng.integers(3, size=204))
        self.batch = np.array(["b0", "b1", "b2"])[batch]
        self.X = rng.gamma(1.0, rng.uniform(0.3, 2.0, 40), (204, 40)) * (rng.random((204, 40)) < 0.6)
        self.X = self.X.astype(np.float32)
        self.library = rng.uniform(2000, 9000, 204).astype(np.float32)
        self.names = np.array([f"cell{i}" for i in range(204)])
        self.folder, self.cells, self.split = folder, folder / "cells.h5ad", folder / "split.tsv"
        self.network = folder / "net.tsv"
        pd.DataFrame({"gene_a": SINGLES, "gene_b": [*SINGLES[1:], "G0"]}).to_csv(
            self.network, sep="\t", index=False
        )
        self.write()
        self.table = freeze_split(self.cells, self.split, "made", "perturbation", 1, SETTINGS)

    def write(self, **columns) -> None:
        obs = pd.DataFrame(
            {"perturbation": self.labels, "batch": self.batch, "library_size": self.library, **columns},
            index=self.names,
        )
        obs = obs.astype({"perturbation": "category", "batch": "category"})
        genes = pd.DataFrame(index=self.genes[: self.X.shape[1]])
        ad.AnnData(sparse.csr_matrix(self.X), obs, genes).write_h5ad(self.cells)

    def build(self, name: str = "pairs.h5", more=MappingProxyType({}), **changes) -> Pairs:
        settings = PairSettings(**{**SETTINGS.__dict__, **changes})
        path = self.folder / name
        tables = build_pairs(
            self.cells,
            self.split,
            path,
            [self.network],
            [],
            settings,
            {"dataset": "made", "fold": 1},
            **more,
        )
        self.coverage, self.training_cells = tables.coverage, tables.training_cells
        return read_pairs(path)

    def cells_in(self, *sets: str) -> np.ndarray:
        return np.isin(self.labels, labels_in(self.table, *sets))


@pytest.fixture
def screen(tmp_path) -> Screen:
    return Screen(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Screen, Pairs]:
    screen = Screen(tmp_path_factory.mktemp("pairs"))
    return screen, screen.build()


def same(one: Pairs, other: Pairs) -> bool:
    """Whether two folds hold the same values."""
    for key, value in one.__dict__.items():
        twin = getattr(other, key)
        if isinstance(value, np.ndarray):
            equal = np.array_equal(value, twin)
        elif key == "codes":
            equal = value.keys() == twin.keys() and all(np.array_equal(value[k], twin[k]) for k in value)
        else:
            equal = value == twin
        if not equal:
            return False
    return True


def test_pairs_hold_the_kept_cells_and_genes_by_value(built):
    screen, pairs = built
    keep = screen.cells_in(TRAIN, VAL) | (screen.labels == "control")
    columns = [GENES.index(gene) for gene in pairs.genes]
    assert pairs.cell_names == tuple(screen.names[keep])
    np.testing.assert_array_equal(pairs.dense(np.arange(keep.sum())), screen.X[keep][:, columns])
    np.testing.assert_array_equal(np.array(pairs.batches)[pairs.batch], screen.batch[keep])
    np.testing.assert_allclose(pairs.log_library_size, np.log(screen.library[keep]), rtol=1e-6)
    names = np.array([*pairs.labels, "control"])  # control is -1, the last
    np.testing.assert_array_equal(names[pairs.perturbation], screen.labels[keep])
    origins = '{"net": {"file": "net.tsv", "kind": "network"}}'
    made = {"format_version": 2, "sources": origins, "strategy": "population"}
    assert dict(pairs.facts) == {"dataset": "made", "fold": 1, **made}


def test_labels_sets_and_categories_are_those_of_the_split(built):
    screen, pairs = built
    assert pairs.labels == tuple(screen.table["perturbation"])
    assert pairs.sets == tuple(screen.table[SET])
    assert pairs.categories == tuple(screen.table["category"])
    assert pairs.perturbed_genes == tuple(sorted([*SINGLES, "OUTSIDE"]))


def test_held_out_perturbations_never_reach_training(built):
    screen, pairs = built
    assert not set(pairs.cell_names) & set(screen.names[screen.cells_in(TEST)])
    counts = dict(zip(pairs.labels, pairs.n_cells, strict=True))
    for label, group in zip(pairs.labels, pairs.sets, strict=True):
        assert counts[label] == (0 if group == TEST else 12)
    np.testing.assert_array_equal(trainable_labels(pairs), np.flatnonzero(np.array(pairs.sets) == TRAIN))
    np.testing.assert_array_equal(validation_labels(pairs), np.flatnonzero(np.array(pairs.sets) == VAL))


def test_expression_of_test_cells_changes_nothing_in_the_file(screen):
    before = screen.build()
    screen.X[screen.cells_in(TEST)] = 7.5
    screen.write()
    assert same(before, screen.build("again.h5"))


def test_expression_of_validation_cells_does_not_choose_genes_but_that_of_training_cells_does(screen):
    before = screen.build()
    original = screen.X.copy()
    chosen = [GENES.index(gene) for gene in before.genes]
    dropped = np.setdiff1d(np.arange(40), chosen)
    screen.X[np.ix_(screen.cells_in(VAL), dropped)] *= 50
    screen.write()
    assert screen.build("validation.h5").genes == before.genes
    screen.X = original
    training = np.flatnonzero(screen.cells_in(TRAIN))
    screen.X[np.ix_(training[::2], dropped)] *= 50
    screen.write()
    assert screen.build("training.h5").genes != before.genes


def test_perturbed_genes_are_kept_whatever_their_rank(screen):
    screen.X[:, :9] = 0  # SINGLES: never expressed, so of no rank at all
    screen.write()
    pairs = screen.build(n_genes=12)
    assert len(pairs.genes) == 12 and set(SINGLES) <= set(pairs.genes)


def test_building_twice_gives_the_same_bytes(built):
    screen, _ = built
    screen.build("one.h5"), screen.build("two.h5")
    assert sha256_of(screen.folder / "one.h5") == sha256_of(screen.folder / "two.h5")


def test_codes_compare_genes_as_the_network_does_and_are_zero_where_it_does_not_reach(built):
    screen, pairs = built
    source = network_source("net", read_network(screen.network)).codes(SINGLES, 6)
    raw = source.values - source.values.mean(axis=0)
    raw /= np.linalg.norm(raw, axis=1, keepdims=True)
    codes = pairs.codes["net"]
    np.testing.assert_allclose(codes[:9] @ codes[:9].T, raw @ raw.T, atol=1e-4)
    assert pairs.perturbed_genes[9] == "OUTSIDE" and not codes[9].any()


def test_genes_that_a_source_cannot_tell_apart_have_no_code():
    rng = np.random.default_rng(0)
    genes = tuple(f"G{i:03d}" for i in range(300))
    values = np.repeat(rng.standard_normal((1, 7)), 300, axis=0).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    assert not pairing._rows(GeneCodes("sets", genes, values), [*genes, "OUTSIDE"]).any()
    values[5] *= -1
    codes = pairing._rows(GeneCodes("sets", genes, values), [*genes, "OUTSIDE"])
    np.testing.assert_allclose(codes[5], values[5], atol=1e-5)
    np.testing.assert_allclose(codes[6], -values[5], atol=1e-3)
    assert not codes[-1].any()


def test_a_projected_gene_has_the_code_of_its_direction_times_its_captured_share():
    rng = np.random.default_rng(1)
    values = rng.standard_normal((4, 3)).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    others = np.stack([0.4 * values[1], np.array([0, 0, 0.1], dtype=np.float32)])
    source = GeneCodes("net", ("A", "B", "C", "D", "LIKE_B", "NEW"), np.vstack([values, others]))
    genes, asked = ["A", "B", "C", "D", "NOBODY"], ["LIKE_B", "NEW", "STRANGER"]
    codes = pairing._rows(source, genes, asked)
    np.testing.assert_array_equal(codes[:5], pairing._rows(source, genes))
    np.testing.assert_allclose(np.linalg.norm(codes, axis=1), [1, 1, 1, 1, 0, 0.4, 0.1, 0], atol=1e-6)
    np.testing.assert_allclose(codes[5], 0.4 * codes[1], atol=1e-6)
    direction = np.array([0, 0, 1]) - values.mean(axis=0)
    np.testing.assert_allclose(codes[6], 0.1 * direction / np.linalg.norm(direction), atol=1e-6)


def test_every_partner_is_a_control_of_the_same_batch(built):
    _screen, pairs = built
    assert (pairs.perturbation[pairs.partner] == CONTROL_CODE).all()
    has_control = pairs.batch != pairs.batches.index("b2")
    np.testing.assert_array_equal(pairs.batch[pairs.partner][has_control], pairs.batch[has_control])
    controls = np.flatnonzero(pairs.perturbation == CONTROL_CODE)
    assert (pairs.partner[controls] != controls).all()


def test_cells_of_a_batch_without_controls_borrow_from_all_batches():
    perturbation = np.array([-1, -1, -1, 0, 0, 1] * 50)
    batch = np.array([0, 0, 1, 0, 2, 2] * 50)
    partner, orphans = match_controls(perturbation, batch, np.random.default_rng(0))
    assert orphans == [2]
    assert set(batch[partner[batch == 2]]) == {0, 1}
    assert set(batch[partner[batch == 0]]) == {0}


def test_the_only_control_of_a_batch_is_its_own_partner():
    partner, _ = match_controls(np.array([-1, 0, -1]), np.array([0, 0, 1]), np.random.default_rng(0))
    assert partner.tolist() == [0, 0, 2]


def test_all_controls_of_a_batch_serve_about_equally():
    perturbation = np.r_[np.full(10, -1), np.zeros(5000, dtype=int)]
    partner, _ = match_controls(perturbation, np.zeros(5010, dtype=int), np.random.default_rng(1))
    uses = np.bincount(partner[10:], minlength=10)
    assert uses.sum() == 5000 and uses.min() > 400 and uses.max() < 600


def test_dense_rows_and_pseudobulk_agree_with_scipy_and_pandas():
    pairs = KnownEffects(seed=3, cells_per_label=7, n_controls=20).pairs
    shape = (len(pairs.perturbation), len(pairs.genes))
    matrix = sparse.csr_matrix((pairs.data, pairs.indices, pairs.indptr), shape=shape).toarray()
    wanted = np.array([5, 0, 5, 17])
    np.testing.assert_array_equal(pairs.dense(wanted), matrix[wanted])
    table = pd.DataFrame(matrix.astype(float)).groupby(pairs.perturbation).mean()
    means, control = pairs.pseudobulk()
    np.testing.assert_allclose(control, table.loc[-1], rtol=1e-12)
    for row, label_set in enumerate(pairs.sets):
        if label_set == TEST:
            assert np.isnan(means[row]).all()
        else:
            np.testing.assert_allclose(means[row], table.loc[row], rtol=1e-12)


@pytest.mark.parametrize("entries", [1, 7, 64])
def test_pseudobulks_do_not_depend_on_the_size_of_the_blocks(built, monkeypatch, entries):
    pairs = built[1]
    whole = pairs.pseudobulk()
    monkeypatch.setattr(pairs_module, "SUMMED_ENTRIES", entries)
    for ours, theirs in zip(pairs.pseudobulk(), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_expression_may_be_mapped_and_is_the_same(built, monkeypatch, caplog):
    screen, whole = built
    monkeypatch.setattr(pairs_module, "BLOCK_ENTRIES", 100)
    before = sorted(screen.folder.iterdir())
    with caplog.at_level("INFO"):
        mapped = read_pairs(screen.folder / "pairs.h5", in_memory=False)
    assert "of expression in" in caplog.text and "are mapped, not held in memory" in caplog.text
    assert sorted(screen.folder.iterdir()) == before
    for key in ("data", "indices"):
        ours, theirs = getattr(mapped, key), getattr(whole, key)
        assert isinstance(ours.base, np.memmap) and not isinstance(theirs.base, np.memmap)
        assert len(ours) > 300 and ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(mapped.pseudobulk(), whole.pseudobulk(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def is_mapped(built) -> bool:
    return isinstance(read_pairs(built[0].folder / "pairs.h5").data.base, np.memmap)


def test_expression_is_mapped_where_it_would_take_a_quarter_of_the_memory_left(built, monkeypatch):
    size = built[1].data.nbytes + built[1].indices.nbytes
    for processes in (1, 3):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        for left, mapped in ((None, False), (4 * processes * size, False), (4 * processes * size - 1, True)):
            monkeypatch.setattr(pairs_module, "available_memory", lambda left=left: left)
            assert is_mapped(built) is mapped


def test_expression_without_a_place_to_map_it_is_held_in_memory_or_refused(
    built, monkeypatch, caplog, tmp_path
):
    size = built[1].data.nbytes + built[1].indices.nbytes
    monkeypatch.setattr(pairs_module.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(pairs_module, "available_memory", lambda: size)
    room = {built[0].folder: 0, tmp_path: size}
    monkeypatch.setattr(pairs_module, "free_bytes", lambda folder: room[folder])
    assert is_mapped(built) and not caplog.text
    room[tmp_path] = size - 1
    assert not is_mapped(built) and "no room to map them in" in caplog.text
    monkeypatch.setattr(pairs_module, "available_memory", lambda: size - 1)
    with pytest.raises(
        InputError, match=r"pairs\.h5: found .* of expression, .* of memory left, and no room in"
    ):
        is_mapped(built)


def test_multi_hot_codes_by_hand():
    code = multi_hot(["A", "A+C", "control", "B+Z"], ["A", "B", "C"])
    assert code.tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_cells_of_a_set_come_with_the_controls_if_asked():
    pairs = pairs_of(
        np.ones((5, 2)), ["A", "control", "B", "A", "control"], {"A": TRAIN, "B": VAL, "C": TEST}
    )
    assert pairs.cells_of(TRAIN).tolist() == [0, 1, 3, 4]
    assert pairs.cells_of(TRAIN, controls=False).tolist() == [0, 3]
    assert pairs.cells_of(VAL, TEST, controls=False).tolist() == [2]
    assert pairs.labels_of(VAL, TEST).tolist() == [1, 2]
    assert pairs.n_cells.tolist() == [2, 1, 0]
    assert pairs.membership.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_reading_in_blocks_covers_every_row_once(built):
    screen, _ = built
    with h5py.File(screen.cells) as file:
        blocks = list(rows_of_matrix(file["X"], block=50))
        parts = [
            sparse.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, 40))
            for _, data, indices, indptr in blocks
        ]
        assert [first for first, *_ in blocks] == [0, 50, 100, 150, 200]
        np.testing.assert_array_equal(sparse.vstack(parts).toarray(), screen.X)
        few = list(rows_of_matrix(file["X"], block=50, entries=200))
        assert max(len(data) for _, data, _, _ in few) <= 200 < len(blocks[0][1])
        np.testing.assert_array_equal(np.concatenate([data for _, data, _, _ in few]), file["X/data"][:])
        single = list(rows_of_matrix(file["X"], entries=1))
        assert [first for first, *_ in single] == list(range(204))
        keep = screen.labels == "G4"
        mean, variance = gene_moments(file["X"], keep, 40)
    np.testing.assert_allclose(mean, screen.X[keep].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(variance, screen.X[keep].astype(float).var(axis=0), rtol=1e-5, atol=1e-9)


def test_nothing_in_the_file_depends_on_the_size_of_the_blocks(screen, monkeypatch):
    whole = screen.build()
    original = pairs_module.rows_of_matrix
    cut = []

    def in_tiny_blocks(matrix, *_, **__):
        for block in original(matrix, block=7, entries=100):
            cut.append(block[0])
            yield block

    monkeypatch.setattr(pairs_module, "rows_of_matrix", in_tiny_blocks)
    assert same(whole, screen.build("again.h5"))
    assert len(set(cut)) > 204 / 7
    keep = screen.labels != "G4"
    with h5py.File(screen.cells) as file:
        tiny = gene_moments(file["X"], keep, 40)
        monkeypatch.undo()
        for one, other in zip(tiny, gene_moments(file["X"], keep, 40), strict=True):
            np.testing.assert_array_equal(one, other)


def test_gene_selection_agrees_with_a_second_formula():
    rng = np.random.default_rng(2)
    mean, variance = rng.gamma(1, 1, 300), rng.gamma(1, 1, 300)
    mean[:30], variance[:30] = 0, 0
    always = np.zeros(300, dtype=bool)
    always[[3, 250]] = True
    table = pd.DataFrame({"dispersion": np.log(variance[30:] / mean[30:])}, index=np.arange(30, 300))
    rank = pd.Series(mean[30:], index=table.index).rank(method="first").astype(int) - 1
    grouped = table["dispersion"].groupby(rank * 20 // 270)
    score = (table["dispersion"] - grouped.transform("mean")) / grouped.transform("std", ddof=0)
    best = score.drop(250).nlargest(48).index
    chosen = select_genes(mean, variance, 50, always)
    assert chosen.tolist() == sorted([3, 250, *best])
    assert select_genes(mean, variance, 300, always).tolist() == list(range(300))
    assert select_genes(mean, variance, 1, always).tolist() == [3, 250]


def test_genes_by_batch_agree_with_a_second_formula():
    """Number of batches, then median rank among the genes that a batch has, as scanpy's seurat_v3_paper."""
    rng = np.random.default_rng(3)
    mean, variance = rng.gamma(1, 1, (5, 300)), rng.gamma(1, 1, (5, 300))
    mean[:, :20], variance[:, :20] = 0, 0
    mean[2:, 20:60], variance[2:, 20:60] = 0, 0
    always = np.zeros(300, dtype=bool)
    always[[3, 250]] = True
    nobody = np.zeros(300, dtype=bool)
    ranks = []
    for own, spread in zip(mean, variance, strict=True):
        # One batch alone: a gene's rank is how many fit in before it does.
        chosen = [set(select_genes(own, spread, n, nobody).tolist()) for n in range(51)]
        ranks.append([next((n for n in range(51) if gene in chosen[n]), 99) - 1 for gene in range(300)])
    ranks = np.ma.masked_greater_equal(np.array(ranks, dtype=float), 50)
    table = pd.DataFrame(
        {"batches": (~ranks.mask).sum(axis=0), "rank": np.ma.median(ranks, axis=0).filled(np.nan)}
    )
    order = table.sort_values(["batches", "rank"], ascending=[False, True], kind="stable", na_position="last")
    best = [gene for gene in order.index if not always[gene]][:48]
    chosen = select_genes_by_batch(mean, variance, 50, always)
    assert chosen.tolist() == sorted([3, 250, *best])
    assert table.loc[best, "batches"].between(2, 4).any()
    assert select_genes_by_batch(mean, variance, 1, always).tolist() == [3, 250]
    assert select_genes_by_batch(mean, variance, 300, always).tolist() == list(range(300))


@pytest.mark.parametrize("n_genes", [2, 50, 290])
def test_genes_of_one_batch_are_those_of_all_cells(n_genes):
    rng = np.random.default_rng(4)
    mean, variance = rng.gamma(1, 1, 300), rng.gamma(1, 1, 300)
    mean[:30], variance[:30] = 0, 0
    always = np.zeros(300, dtype=bool)
    always[[3, 250]] = True
    one = select_genes_by_batch(mean[None], variance[None], n_genes, always)
    np.testing.assert_array_equal(one, select_genes(mean, variance, n_genes, always))


class BatchScreen(Screen):
    """Three batches of 214 cells; of 240 genes some differ between batches, others between their cells."""

    within, between = range(220, 226), range(226, 232)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        labels = ["control"] * 70 + [label for label in LABELS for _ in range(12)]
        self.labels = np.array(labels * 3, dtype=object)
        self.batch = np.repeat(["b0", "b1", "b2"], len(labels))
        rng, n = np.random.default_rng(5), len(self.labels)
        counts = rng.poisson(rng.uniform(0.5, 3.0, 240), (n, 240))
        counts[:, list(self.within)] = rng.poisson(rng.gamma(0.3, np.linspace(2, 10, 6), (n, 6)))
        low = np.linspace(0.4, 1.4, 6)[:, None] * rng.permuted(np.tile([0.1, 1.0, 5.0], (6, 1)), axis=1)
        counts[:, list(self.between)] = rng.poisson(low[:, np.repeat(np.arange(3), len(labels))].T)
        self.X = np.log1p(counts).astype(np.float32)
        self.library = np.full(n, 3000.0, dtype=np.float32)
        self.names = np.array([f"cell{i}" for i in range(n)])
        self.write()
        self.table = freeze_split(self.cells, self.split, "made", "perturbation", 1, SETTINGS)


def test_genes_that_differ_between_batches_alone_are_not_chosen_as_by_scanpy(tmp_path):
    from scanpy.preprocessing import highly_variable_genes  # here, since it takes seconds to import

    screen = BatchScreen(tmp_path)
    always = {gene for label in LABELS for gene in label.split("+")} & set(GENES)
    n = len(always) + 12
    within, between = ({screen.genes[i] for i in genes} for genes in (screen.within, screen.between))
    by_batch = screen.build(n_genes=n)
    assert within < set(by_batch.genes) and not between & set(by_batch.genes)
    assert by_batch.facts["genes_by_batch"] is True
    together = screen.build("together.h5", n_genes=n, genes_by_batch=False)
    assert len(between & set(together.genes)) >= 3 and "genes_by_batch" not in together.facts
    training = ad.read_h5ad(screen.cells)[screen.cells_in(TRAIN) | (screen.labels == "control")].copy()
    others = training[:, [gene not in always for gene in training.var_names]].copy()
    found = {}
    for key in ("batch", None):
        table = highly_variable_genes(others, n_top_genes=12, batch_key=key, inplace=False)
        chosen = set(table.index[table["highly_variable"]])
        assert within < chosen
        found[key] = len(chosen & between)
    assert found["batch"] <= 1 and found[None] >= 3


def test_test_cells_and_batches_with_few_training_cells_rank_no_genes(tmp_path):
    screen = BatchScreen(tmp_path)
    before = screen.build(n_genes=60)
    screen.X[screen.cells_in(TEST)] = np.random.default_rng(1).gamma(1, 5, 240)
    screen.write()
    assert same(before, screen.build("again.h5", n_genes=60))
    # Most cells of two batches move to the third: one batch is left, so all cells rank at once.
    place = pd.Series(screen.batch).groupby(screen.batch).cumcount().to_numpy()
    screen.batch[place >= 90] = "b0"
    screen.write()
    few = screen.build("few.h5", n_genes=60)
    together = screen.build("together.h5", n_genes=60, genes_by_batch=False)
    assert few.genes == together.genes != before.genes and "genes_by_batch" not in few.facts


def test_counts_are_got_back_by_value_from_a_real_screen(real_data, tmp_path):
    raw = ad.read_h5ad(real_data / "norman2019_tiny.h5ad")
    source = ScreenSource(
        dataset="norman",
        path=str(real_data / "norman2019_tiny.h5ad"),
        perturbation_column="perturbation",
        library_size_column="total_counts_all",
    )
    cells, split = tmp_path / "cells.h5ad", tmp_path / "split.tsv"
    preprocess_file(
        source,
        PreprocessSettings(permutations=1, effect_cells=2, target_sum=8000.0),
        cells,
        tmp_path / "qc.tsv",
        tmp_path / "perturbations.tsv",
        tmp_path / "guides.tsv",
    )
    settings = PairSettings(n_genes=100, genes_by_batch=False)
    freeze_split(cells, split, "norman", "perturbation", 0, settings)
    build_pairs(cells, split, tmp_path / "pairs.h5", [], [], settings, {})
    pairs = read_pairs(tmp_path / "pairs.h5")
    assert pairs.facts["target_sum"] == 8000
    found = counts_of(pairs)
    assert found.dtype == np.int32 and found.max() > 100
    counts = sparse.csr_matrix((found, pairs.indices, pairs.indptr))
    expected = sparse.csr_matrix(raw[list(pairs.cell_names), list(pairs.genes)].X)
    assert counts.shape == (len(pairs.cell_names), 100) and (counts != expected).nnz == 0


def test_counts_of_a_file_that_does_not_say_its_target_sum_or_holds_none_are_refused():
    counts = np.random.default_rng(0).poisson(3, (6, 4))
    library = np.full(6, np.log(5000.0))
    pairs = pairs_of(
        np.log1p(counts * 100 / 5000), ["control"] * 3 + ["A"] * 3, {"A": TRAIN}, library=library
    )
    with pytest.raises(InputError, match=r"pairs\.h5: found no attribute target_sum.*rerun the preprocess"):
        counts_of(pairs)
    known = replace(pairs, facts={"target_sum": 100.0})
    np.testing.assert_array_equal(replace(known, data=counts_of(known)).dense(np.arange(6)), counts)
    with pytest.raises(InputError, match=r"found expression that is [\d.]+ counts of a gene in a cell"):
        counts_of(replace(pairs, facts={"target_sum": 130.0}))


def test_a_planted_leak_stops_the_build_and_leaves_no_file(screen, monkeypatch):
    # A mistake in choosing the sets, as it could happen: test labels pass for training ones.
    monkeypatch.setattr(pairing, "labels_in", lambda table, *sets: labels_in(table, *sets, TEST))
    held_out = labels_in(screen.table, TEST)
    with pytest.raises(LeakageError) as caught:
        screen.build()
    assert all(label in str(caught.value) for label in held_out)
    assert not [path for path in screen.folder.iterdir() if "pairs" in path.name]


def test_an_edited_split_stops_the_build(screen):
    screen.split.write_text(screen.split.read_text().replace("\ttest\t", "\ttrain\t", 1))
    with pytest.raises(InputError, match="must not be edited"):
        screen.build()


def test_a_screen_without_controls_is_refused(screen):
    screen.labels[screen.labels == "control"] = "G0"
    screen.write()
    with pytest.raises(InputError, match=r"cells\.h5ad: found no control cell"):
        screen.build()


def test_a_prior_of_other_genes_is_refused(screen):
    screen.network.write_text("gene_a\tgene_b\nmouse1\tmouse2\n")
    with pytest.raises(InputError, match=r"net\.tsv.*none of the 10 perturbed genes.*G0, G1, G2"):
        screen.build()


def test_too_few_perturbations_are_refused_with_the_settings_to_change(screen):
    screen.labels[np.isin(screen.labels, LABELS[5:])] = "control"
    screen.write()
    with pytest.raises(InputError) as caught:
        freeze_split(screen.cells, screen.folder / "few.tsv", "made", "perturbation", 0, SETTINGS)
    for part in (
        "cells.h5ad",
        "5 perturbation(s)",
        "at least 6",
        "min_cells_per_perturbation",
        "pair.n_folds",
    ):
        assert part in str(caught.value)
    assert not (screen.folder / "few.tsv").exists()


def write_table(folder: Path) -> Path:
    """Features of the perturbed genes G0 to G5, and of two genes that the screen does not perturb."""
    rng = np.random.default_rng(7)
    table = pd.DataFrame(rng.standard_normal((8, 5)), index=[*SINGLES[:6], "NEW1", "NEW2"])
    table.to_csv(folder / "features.tsv", sep="\t", index_label="gene")
    return folder / "features.tsv"


def write_other_screen(folder: Path) -> Path:
    """Another screen of G2 to G7 and NEW3, with genes of its own."""
    rng = np.random.default_rng(8)
    labels = np.repeat(["control", *SINGLES[2:8], "NEW3", "G2+G3"], 6)
    obs = pd.DataFrame({"perturbation": pd.Categorical(labels)}, index=[f"o{i}" for i in range(len(labels))])
    X = sparse.csr_matrix(rng.gamma(1.0, 1.0, (len(labels), 15)).astype(np.float32))
    ad.AnnData(X, obs, pd.DataFrame(index=[f"X{i}" for i in range(15)])).write_h5ad(folder / "other.h5ad")
    return folder / "other.h5ad"


def more_sources(folder: Path) -> dict:
    return {"gene_tables": [write_table(folder)], "responses": {"k562": write_other_screen(folder)}}


def centred_unit(values: np.ndarray) -> np.ndarray:
    values = values - values.mean(axis=0)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_every_kind_of_source_becomes_codes_centred_over_the_genes_it_covers(screen):
    pairs = screen.build(more=more_sources(screen.folder), coexpression=True)
    assert list(pairs.codes) == ["coexpression", "features", "net", "responses_k562"]
    covers = {
        "net": SINGLES,
        "features": SINGLES[:6],
        "responses_k562": SINGLES[2:8],
        "coexpression": SINGLES,
    }
    for name, genes in covers.items():
        rows = np.isin(pairs.perturbed_genes, genes)
        assert not pairs.codes[name][~rows].any()
        np.testing.assert_allclose(np.linalg.norm(pairs.codes[name][rows], axis=1), 1, atol=1e-5)
        assert pairs.codes[name].shape[1] <= 6
    sources = {
        "features": gene_table_source("features", read_gene_table(screen.folder / "features.tsv")),
        "responses_k562": response_source("k562", screen.folder / "other.h5ad"),
    }
    for name, source in sources.items():
        expected = centred_unit(source.codes(covers[name], 6).values)
        rows = np.isin(pairs.perturbed_genes, covers[name])
        np.testing.assert_allclose(pairs.codes[name][rows], expected, atol=1e-5)


def test_a_table_that_is_the_same_for_all_perturbed_genes_is_refused(screen):
    table = pd.DataFrame({"a": [1.0] * 9 + [2.0], "b": [3.0] * 9 + [0.0]}, index=[*SINGLES, "NEW1"])
    table.to_csv(screen.folder / "features.tsv", sep="\t", index_label="gene")
    with pytest.raises(
        InputError, match=r"features\.tsv: found the same for all .* it knows, 9; expected diff"
    ):
        screen.build(more={"gene_tables": [screen.folder / "features.tsv"]})


def test_the_coverage_names_sources_and_consequences(screen):
    screen.build(more=more_sources(screen.folder))
    table = screen.coverage.set_index("gene")
    assert list(table.columns) == ["n_sources", "net", "features", "responses_k562", "consequence"]
    assert table.loc["G0"].tolist() == [2, 1, 1, 0, "coded by prior sources"]
    assert table.loc["G8"].tolist() == [1, 1, 0, 0, "coded by prior sources"]
    trained = "OUTSIDE" in labels_in(screen.table, TRAIN)
    words = "known from its own training cells alone" if trained else (
        "predicted as an average unseen gene, never as control"
    )  # fmt: skip
    assert table.loc["OUTSIDE"].tolist() == [0, 0, 0, 0, words]


def test_coexpression_sees_training_cells_alone(screen):
    before = screen.build(coexpression=True).codes["coexpression"]
    original = screen.X.copy()
    screen.X[screen.cells_in(VAL, TEST)] = 7.5
    screen.write()
    np.testing.assert_array_equal(
        screen.build("held_out.h5", coexpression=True).codes["coexpression"], before
    )
    screen.X = original
    screen.X[np.flatnonzero(screen.cells_in(TRAIN))[::2], :4] += 5
    screen.write()
    after = screen.build("training.h5", coexpression=True).codes["coexpression"]
    assert np.abs(after @ after.T - before @ before.T).max() > 0.1


def test_a_screen_cannot_inform_itself(screen):
    with pytest.raises(InputError, match=r"the screen itself.*must not predict itself"):
        screen.build(more={"responses": {"twin": screen.folder / "." / "cells.h5ad"}})


def other_cells(screen: Screen, rows: np.ndarray, factor=1.0, genes=GENES, names=None) -> dict:
    """Write some cells of the screen as another screen, with counts scaled and genes in another order."""
    X = np.log1p(factor * np.expm1(screen.X[rows]))[:, [GENES.index(gene) for gene in genes]]
    obs = pd.DataFrame(
        {"perturbation": pd.Categorical(screen.labels[rows])},
        index=screen.names[rows] if names is None else names,
    )
    path = screen.folder / "copy.h5ad"
    ad.AnnData(sparse.csr_matrix(X.astype(np.float32)), obs, pd.DataFrame(index=genes)).write_h5ad(path)
    return {"responses": {"copy": path}}


@pytest.mark.parametrize("kind", ["copy", "link", "part", "renormalized"])
def test_a_screen_cannot_be_informed_by_its_own_cells_under_another_name(screen, kind):
    perturbed = np.flatnonzero(screen.labels != "control")
    everything = np.arange(len(screen.labels))
    rows = np.r_[np.flatnonzero(screen.labels == "control"), perturbed[:20]] if kind == "part" else everything
    changes = {"factor": 0.3, "genes": GENES[:4:-1]} if kind == "renormalized" else {}
    more = other_cells(screen, rows, **changes)
    if kind == "link":
        # A hard link has another path and is the same file.
        more["responses"]["copy"].unlink()
        more["responses"]["copy"].hardlink_to(screen.cells)
    n = 20 if kind == "part" else len(perturbed)
    with pytest.raises(
        LeakageError, match=f"copy.h5ad holds about {n / len(perturbed):.0%} .*{n} of {n} compared"
    ):
        screen.build(more=more)
    assert not (screen.folder / "pairs.h5").exists()


def test_barcodes_that_coincide_and_shared_controls_are_no_leak(screen):
    rng = np.random.default_rng(3)
    everything = np.arange(len(screen.labels))
    original = screen.X
    screen.X = np.where(
        (screen.labels == "control")[:, None], original, rng.permuted(original, axis=1)
    ).astype(np.float32)
    more = other_cells(screen, everything)
    screen.X = original
    assert "responses_copy" in screen.build(more=more).codes


@pytest.mark.parametrize(
    ("requests", "others"),
    [
        (["NEW1", "G0+NEW3", "NOBODY", "G4"], ["NEW1", "NEW3"]),
        ("all", ["NEW1", "NEW2", "NEW3"]),
        ((), []),
    ],
)
def test_genes_asked_for_get_codes_and_change_none_of_the_screen(screen, requests, others):
    more = more_sources(screen.folder)
    before = screen.build(more=more)
    after = screen.build("asked.h5", more={**more, "requests": requests})
    n = len(before.perturbed_genes)
    assert after.perturbed_genes == (*before.perturbed_genes, *others)
    assert after.labels == before.labels
    np.testing.assert_array_equal(after.membership[:, :n], before.membership)
    assert not after.membership[:, n:].any()
    for name, values in before.codes.items():
        np.testing.assert_array_equal(after.codes[name][:n], values)
    covers = {"features": {"NEW1", "NEW2"}, "responses_k562": {"NEW3"}, "net": set()}
    for name, genes in covers.items():
        coded = [gene for gene, row in zip(others, after.codes[name][n:], strict=True) if row.any()]
        assert coded == [gene for gene in others if gene in genes]
    # Coverage is about the genes that the screen perturbs.
    assert screen.coverage["gene"].tolist() == list(before.perturbed_genes)


def test_type_and_dose_of_a_label_come_from_the_design_of_the_screen(screen):
    kinds = np.where(screen.labels == "G1", "CRISPRa", "CRISPRi").astype(object)
    g2 = np.flatnonzero(screen.labels == "G2")
    kinds[g2[:5]], kinds[g2[5:]] = "CRISPRa", "CRISPRko"
    dose = np.where(screen.labels == "G3", 0.25, np.nan)
    dose[g2] = np.arange(12) ** 2
    screen.write(perturbation_type=kinds, dose=dose)
    pairs = screen.build()
    kind = {label: pairs.types[code] for label, code in zip(pairs.labels, pairs.type_code, strict=True)}
    assert pairs.types == ("CRISPRa", "CRISPRi", "CRISPRko")
    assert kind == dict.fromkeys(LABELS, "CRISPRi") | {"G1": "CRISPRa", "G2": "CRISPRko"}
    assert pairs.type_code.dtype == np.int32 and pairs.dose.dtype == np.float32
    doses = dict(zip(pairs.labels, pairs.dose.tolist(), strict=True))
    assert doses == dict.fromkeys(LABELS, 1.0) | {"G2": 30.5, "G3": 0.25}
    assert any(group == TEST for group in pairs.sets)


def test_a_screen_without_type_and_dose_has_one_unknown_type_and_dose_1(built):
    _, pairs = built
    assert pairs.types == ("unknown",) and not pairs.type_code.any()
    assert (pairs.dose == 1).all() and len(pairs.dose) == len(pairs.labels)


def test_pairs_of_another_format_are_refused(built, tmp_path):
    screen, _ = built
    shutil.copy(screen.folder / "pairs.h5", tmp_path / "old.h5")
    with h5py.File(tmp_path / "old.h5", "r+") as file:
        file.attrs["format_version"] = 1
    with pytest.raises(
        InputError, match=r"old\.h5: found format version 1; expected 2.*rerun the pair stage"
    ):
        read_pairs(tmp_path / "old.h5")


def test_without_a_split_all_cells_are_training(screen):
    screen.split = screen.folder / "none.tsv"
    table = freeze_split(screen.cells, screen.split, "made", "none", 0, SETTINGS)
    assert set(table[SET]) == {TRAIN} and table["perturbation"].tolist() == sorted(LABELS)
    pairs = screen.build()
    assert pairs.cell_names == tuple(screen.names)
    assert pairs.n_cells.tolist() == [12] * len(LABELS)
    assert len(trainable_labels(pairs)) == len(LABELS) and not len(validation_labels(pairs))
    info = json.loads(screen.split.with_suffix(".json").read_text(encoding="utf-8"))
    assert {key: info[key] for key in ("scheme", "n_folds", "n_train", "n_val", "n_test")} == {
        "scheme": "none",
        "n_folds": 1,
        "n_train": len(LABELS),
        "n_val": 0,
        "n_test": 0,
    }


def test_the_frozen_folds_of_a_screen_test_every_perturbation_once(screen):
    tested = []
    for fold in range(3):
        path = screen.folder / f"fold{fold}.tsv"
        freeze_split(screen.cells, path, "made", "perturbation", fold, SETTINGS)
        tested += labels_in(read_split(path), TEST)
    assert sorted(tested) == sorted(LABELS)
