"""Gene-set enrichment: the sets that are tested, and agreement with gseapy called by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from evaluation_case import random_truth
from scipy import stats

from biojepa.contracts import ENRICHMENT_COLUMNS
from biojepa.errors import InputError
from biojepa.evaluation.enrichment import (
    choose_gene_sets,
    choose_perturbations,
    enrichment_scores,
    enrichment_table,
    pathway_correlation,
)
from biojepa.evaluation.settings import EnrichmentSettings

SETTINGS = EnrichmentSettings(permutations=50)


@pytest.fixture(scope="module")
def truth():
    return random_truth(n=4, genes=120)


@pytest.fixture(scope="module")
def gene_sets(truth):
    rng = np.random.default_rng(0)
    return {f"SET{k}": sorted(rng.choice(truth.genes, 10, replace=False)) for k in range(8)}


def table_of(predicted, truth, gene_sets, rows=(0, 1, 2, 3)):
    rows = list(rows)
    observed = enrichment_scores(truth.delta_control[rows], truth.genes, gene_sets, SETTINGS)
    return enrichment_table("ridge", 0, predicted, observed, truth, rows, gene_sets, SETTINGS)


def write_gmt(path, sets):
    path.write_text("".join(f"{name}\tx\t" + "\t".join(genes) + "\n" for name, genes in sets.items()))
    return path


def test_scores_equal_gseapy_called_by_hand(truth, gene_sets):
    import gseapy

    nes, fdr = enrichment_scores(truth.delta_control[1:2], truth.genes, gene_sets, SETTINGS)
    ranking = pd.Series(truth.delta_control[1], index=truth.genes).sort_values(ascending=False)
    expected = gseapy.prerank(
        ranking, gene_sets, outdir=None, min_size=5, max_size=500, permutation_num=50, seed=0, threads=1
    ).res2d.set_index("Term")
    assert nes[0] == pytest.approx(expected.loc[list(gene_sets), "NES"].astype(float).to_numpy())
    assert fdr[0] == pytest.approx(expected.loc[list(gene_sets), "FDR q-val"].astype(float).to_numpy())


def test_a_set_of_the_most_increased_genes_is_enriched_upwards(truth):
    order = np.argsort(-truth.delta_control[0])
    sets = {"UP": list(truth.genes[order[:10]]), "DOWN": list(truth.genes[order[-10:]])}
    (up, down), _ = (
        values[0] for values in enrichment_scores(truth.delta_control[:1], truth.genes, sets, SETTINGS)
    )
    assert up > 1.5
    assert down < -1.5


def test_perfect_prediction_correlates_1_and_no_change_0(truth, gene_sets):
    perfect = pathway_correlation(table_of(truth.half_b, truth, gene_sets))
    assert perfect["value"].to_numpy() == pytest.approx(np.ones(4))
    unchanged = np.tile(truth.control_mean.astype(np.float32), (4, 1)).astype(float)
    nothing = pathway_correlation(table_of(unchanged, truth, gene_sets))
    assert nothing["value"].tolist() == [0.0] * 4
    assert set(nothing["metric"]) == {"pathway_correlation"}


def test_pathway_correlation_is_spearman_over_shared_sets(truth, gene_sets):
    guess = truth.half_b + np.random.default_rng(1).normal(0, 0.2, truth.half_b.shape)
    table = table_of(guess, truth, gene_sets)
    assert tuple(table.columns) == ENRICHMENT_COLUMNS
    assert len(table) == 4 * len(gene_sets)
    for _, row in pathway_correlation(table).iterrows():
        part = table[table["perturbation"] == row["perturbation"]]
        assert row["value"] == pytest.approx(stats.spearmanr(part["nes_pred"], part["nes_true"]).statistic)
    few = {name: gene_sets[name] for name in list(gene_sets)[:4]}
    assert pathway_correlation(table_of(guess, truth, few))["value"].isna().all()


def test_same_seed_gives_the_same_scores_and_says_nothing(truth, gene_sets, capfd):
    tied = np.where(np.arange(120) < 40, truth.delta_control[:1], 0.0)
    first = enrichment_scores(tied, truth.genes, gene_sets, SETTINGS)
    second = enrichment_scores(tied, truth.genes, gene_sets, SETTINGS)
    assert (first[0] == second[0]).all()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_perturbations_are_chosen_by_half_a_which_the_score_never_sees(truth):
    low = replace(truth, fold=1, perturbations=["Q0", "Q1", "Q2", "Q3"])
    vars(truth)["n_significant_half_a"] = np.array([3, 9, 1, 7])
    vars(low)["n_significant_half_a"] = np.array([8, 0, 0, 7])
    assert choose_perturbations([truth, low], 4) == {0: [1, 3], 1: [0, 3]}
    assert choose_perturbations([truth, low], 3) == {0: [1, 3], 1: [0]}
    assert choose_perturbations([truth, low], 99) == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}


def test_gene_sets_are_restricted_to_measured_genes_and_bounded(tmp_path, truth):
    sets = {
        "big": [f"G{i}" for i in range(20)],
        "middle": [f"G{i}" for i in range(8)] + ["UNMEASURED"],
        "also_middle": [f"G{i}" for i in range(10, 18)],
        "small": ["G1", "G2", "UNMEASURED", "ALSO", "NOT"],
    }
    path = write_gmt(tmp_path / "sets.gmt", sets)
    kept = choose_gene_sets(path, truth.genes, SETTINGS)
    assert list(kept) == ["also_middle", "big", "middle"]
    assert kept["middle"] == sorted(sets["middle"][:8])
    assert list(choose_gene_sets(path, truth.genes, replace(SETTINGS, max_sets=2))) == ["also_middle", "big"]
    assert list(choose_gene_sets(path, truth.genes, replace(SETTINGS, max_size=10, max_sets=1))) == [
        "also_middle"
    ]


def test_gene_sets_that_cannot_be_used_are_refused(tmp_path, truth):
    path = tmp_path / "sets.gmt"
    write_gmt(path, {"mouse": ["Trp53", "Myc", "Kras", "Egfr", "Brca1"]})
    with pytest.raises(InputError, match=r"sets\.gmt.*no gene in common with the 120 measured.*organism"):
        choose_gene_sets(path, truth.genes, SETTINGS)
    write_gmt(path, {"small": ["G1", "G2"]})
    with pytest.raises(InputError, match=r"no gene set with 5 to 500 measured genes.*min_size"):
        choose_gene_sets(path, truth.genes, SETTINGS)
    path.write_text("ok\tx\tG1\tG2\nbroken line\n")
    with pytest.raises(InputError, match=r"line 2.*1 tab-separated field.*GMT"):
        choose_gene_sets(path, truth.genes, SETTINGS)
    path.write_text("a\tx\tG1\na\tx\tG2\n")
    with pytest.raises(InputError, match=r"line 2.*gene set 'a' a second time"):
        choose_gene_sets(path, truth.genes, SETTINGS)
