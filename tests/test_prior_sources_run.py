"""Every kind of prior source by the command line: tables, another screen, co-expression."""

import numpy as np
import pandas as pd
import pytest

from biojepa.files import read_tsv
from biojepa.pairs import read_pairs
from biojepa.responses import mean_responses
from workflow_case import Pipeline

COLUMNS = ["dataset", "source", "batch_column", "guide_table", "networks", "gene_tables", "responses"]
ROWS = [
    ["tiny", "simulator", "batch", "{download}/guides.csv", "{download}/network.tsv.gz", "esm.csv", "other"],
    ["other", "simulator", "batch", "{download}/guides.csv", "", "", ""],
]
CONFIG = {
    "pair": {"coexpression": True, "prior_dim": 8},
    "overrides": {"other": {"download": {"simulator": {"n_singles": 50, "n_combinations": 0, "seed": 1}}}},
}
TARGET = "results/tiny/perturbation/fold0/pair/pairs.h5"


@pytest.fixture(scope="module")
def run(checkout, tmp_path_factory) -> Pipeline:
    """Make the pairs of one fold with all sources; the other screen is preprocessed and not run."""
    pipeline = Pipeline(checkout, tmp_path_factory.mktemp("sources"))
    pd.DataFrame(ROWS, columns=COLUMNS).to_csv(pipeline.folder / "config/datasets.tsv", sep="\t", index=False)
    genes = [f"GENE{number:03d}" for number in range(1, 108)]
    features = np.random.default_rng(0).standard_normal((len(genes), 12))
    pd.DataFrame(features, index=genes).to_csv(pipeline.folder / "esm.csv", index_label="gene")
    jobs = {"simulate": 2, "preprocess": 2, "freeze_split": 1, "pair": 1}
    assert pipeline.planned(TARGET, config=CONFIG) == jobs
    answer = pipeline.run(TARGET, config=CONFIG)
    assert answer.returncode == 0, answer.stdout
    return pipeline


def test_every_source_has_codes_and_the_coverage_counts_them(run):
    pairs = read_pairs(run.folder / TARGET)
    table = read_tsv(run.fold(0, "pair", "coverage.tsv"))
    assert sorted(pairs.codes) == ["coexpression", "esm", "network", "responses_other"]
    assert table["gene"].tolist() == list(pairs.perturbed_genes)
    for name, values in pairs.codes.items():
        np.testing.assert_array_equal(table[name], values.any(axis=1), err_msg=name)
    assert (
        table["n_sources"].tolist() == np.sum([v.any(axis=1) for v in pairs.codes.values()], axis=0).tolist()
    )
    assert set(pairs.types) == {"unknown"} and (pairs.dose == 1).all()


def test_responses_cover_the_genes_that_both_screens_perturb(run):
    pairs = read_pairs(run.folder / TARGET)
    genes, _ = mean_responses(run.folder / "results/other/preprocess/cells.h5ad")
    both = set(genes) & set(pairs.perturbed_genes)
    coded = pairs.codes["responses_other"].any(axis=1)
    assert {gene for gene, found in zip(pairs.perturbed_genes, coded, strict=True) if found} == both
    assert 0 < len(both) < len(pairs.perturbed_genes)
