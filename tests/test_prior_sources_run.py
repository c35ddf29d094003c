"""Every kind of prior source by the command line: tables, another screen, co-expression."""

import anndata as ad
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
# The same network and other cells, so that what is perturbed in both screens responds alike.
CONFIG = {
    "models": ["mean", "biojepa", "other_screen"],
    "pair": {"coexpression": True, "prior_dim": 8},
    "overrides": {"other": {"download": {"simulator": {"n_singles": 30, "n_combinations": 0}}}},
}
TARGET = "results/tiny/perturbation/fold0/pair/pairs.h5"
PREDICTED = "results/tiny/perturbation/fold0/other_screen/seed0/embed/predictions.h5ad"


@pytest.fixture(scope="module")
def run(checkout, tmp_path_factory) -> Pipeline:
    """Make one fold with all sources and predict it from the other screen, which is preprocessed only."""
    pipeline = Pipeline(checkout, tmp_path_factory.mktemp("sources"))
    pd.DataFrame(ROWS, columns=COLUMNS).to_csv(pipeline.folder / "config/datasets.tsv", sep="\t", index=False)
    genes = [f"GENE{number:03d}" for number in range(1, 108)]
    features = np.random.default_rng(0).standard_normal((len(genes), 12))
    pd.DataFrame(features, index=genes).to_csv(pipeline.folder / "esm.csv", index_label="gene")
    jobs = {"simulate": 2, "preprocess": 2, "freeze_split": 1, "pair": 1, "other_screen": 1}
    assert pipeline.planned(TARGET, PREDICTED, config=CONFIG) == jobs
    answer = pipeline.run(TARGET, PREDICTED, config=CONFIG)
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


def test_the_other_screen_predicts_what_its_cells_changed_scaled_to_this_one(run):
    pairs, predicted = read_pairs(run.folder / TARGET), ad.read_h5ad(run.folder / PREDICTED)
    cells = ad.read_h5ad(run.folder / "results/other/preprocess/cells.h5ad")
    label = cells.obs["perturbation"].astype(str).to_numpy()
    means = cells.to_df().groupby(label).mean().astype(float)
    there = (means - means.loc["control"]).reindex(columns=pairs.genes)
    means, control = pairs.pseudobulk()
    here = pd.DataFrame(means - control, index=pairs.labels, columns=pairs.genes)
    here = here[np.equal(pairs.sets, "train")]
    sums = {
        name: there.reindex(name.split("+")).fillna(0).sum(axis=0)
        for name in pairs.labels
        if set(name.split("+")) & set(there.index)
    }
    both = there.columns[there.notna().all()]
    fitted = [name for name in here.index if name in sums]
    x, y = (np.concatenate([table[name][both] for name in fitted]) for table in (sums, here.T))
    scale = x @ y / (x @ x)
    assert scale > 0 and 0 < len(fitted) < len(here) and set(both) <= set(cells.var_names)
    expected = pd.DataFrame(here.mean(axis=0).to_numpy(), index=pairs.genes, columns=["mean"])
    known = [name for name in predicted.obs["perturbation"] if name in sums]
    assert 0 < len(known) < predicted.n_obs, "one that the other screen knows, and one that it does not"
    for row, name in enumerate(predicted.obs["perturbation"]):
        delta = expected["mean"].copy()
        if name in sums:
            delta[both] = scale * sums[name][both]
        np.testing.assert_allclose(predicted.X[row], (control + delta).clip(lower=0), atol=1e-5, err_msg=name)
