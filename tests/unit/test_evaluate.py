"""The whole evaluation on a small screen: what it reads, refuses and writes."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from evaluation_case import GENES, LABELS, Screen
from scipy import stats

from biojepa.contracts import METRICS_COLUMNS, SUMMARY_COLUMNS, TRUST_COLUMNS
from biojepa.errors import InputError
from biojepa.evaluation.evaluate import evaluate
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.splits import read_split
from biojepa.files import read_tsv, sha256_of, write_json, write_tsv

MODELS = ("mean", "duplicate", "no_change", "ridge", "biojepa")
SETTINGS = EvaluationSettings(draws=200)
SCRIPT = Path(__file__).parents[2] / "workflow" / "scripts" / "evaluate.py"


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return Screen(tmp_path_factory.mktemp("screen"))


@pytest.fixture(scope="module")
def files(screen):
    return [screen.write_prediction(model, fold) for fold in range(2) for model in MODELS]


@pytest.fixture(scope="module")
def result(screen, files):
    return evaluate(screen.cells, screen.splits, files, SETTINGS)


def refused(screen, files, match, splits=None, **settings):
    with pytest.raises(InputError, match=match):
        evaluate(screen.cells, splits or screen.splits, files, EvaluationSettings(draws=100, **settings))


def altered(screen, edit, model="ridge"):
    """The file of one model in fold 0 after an edit, among sound ones of other models."""
    return [screen.write_prediction("no_change", 0), screen.write_prediction(model, 0, 7, edit)]


def one_fold(screen):
    return screen.splits[:1]


def test_every_test_perturbation_is_scored_once_and_no_other(screen, result):
    scored = result.metrics.query("metric == 'mse' and model == 'biojepa'")
    assert sorted(scored["perturbation"]) == LABELS
    for fold in (0, 1):
        expected = set(screen.table(fold).query("set == 'test'")["perturbation"])
        assert set(scored.loc[scored["fold"] == fold, "perturbation"]) == expected


def test_scores_equal_a_computation_from_the_cells(screen, files, result):
    per_perturbation = result.metrics[result.metrics["perturbation"] != "*"]
    values = per_perturbation.set_index(["model", "metric", "perturbation"])["value"].sort_index()
    for file in files:
        content = ad.read_h5ad(file.path)
        mean = screen.perturbed_mean(file.fold)
        for label in content.obs_names[content.obs["set"] == "test"]:
            x = screen.mean_of(label, "b")
            guess = content[label].X[0].astype(float)
            expected = stats.pearsonr(guess - mean, x - mean).statistic if file.model != "mean" else 0.0
            found = values.loc[(file.model, "pearson_delta_perturbed_mean", label)]
            assert found == pytest.approx(expected, abs=1e-9)
            error = values.loc[(file.model, "mse", label)]
            assert error == pytest.approx(((guess - screen.mean_of(label)) ** 2).mean())


def test_references_are_made_from_the_cells_when_no_file_gives_them(screen, files, result):
    without = [file for file in files if file.model not in ("mean", "duplicate")]
    again = evaluate(screen.cells, screen.splits, without, SETTINGS)
    key = ["model", "fold", "perturbation", "metric"]
    ours, theirs = (r.metrics.set_index(key)["value"].sort_index() for r in (again, result))
    assert ours.index.equals(theirs.index)
    # The file holds float32, the reference made here float64.
    assert np.allclose(ours, theirs, atol=2e-5, equal_nan=True)


def test_order_of_files_rows_and_genes_does_not_matter(screen, files, result):
    def shuffle(content):
        rng = np.random.default_rng(3)
        return content[rng.permutation(content.n_obs), rng.permutation(content.n_vars)].copy()

    mixed = [screen.write_prediction(file.model, file.fold, file.seed, shuffle) for file in files]
    again = evaluate(screen.cells, screen.splits[::-1], mixed[::-1], SETTINGS)
    for file in files:
        screen.write_prediction(file.model, file.fold, file.seed)
    key = ["model", "category", "metric"]
    first, second = (r.summary.set_index(key).sort_index() for r in (result, again))
    pd.testing.assert_frame_equal(first, second, rtol=1e-8, check_dtype=False)


def test_tables_keep_their_contract(result):
    assert tuple(result.metrics.columns) == METRICS_COLUMNS
    assert tuple(result.summary.columns) == SUMMARY_COLUMNS
    assert set(result.summary["category"]) == {"all", "single", "combo_seen1"}
    assert set(result.metrics.loc[result.metrics["perturbation"] == "*", "metric"]) == {
        "effect_slope",
        "spread_ratio",
    }
    assert not result.metrics["metric"].isin(["coverage_50", "crps"]).any()
    assert result.enrichment.empty


def test_known_models_get_their_known_scores(result):
    summary = result.summary.set_index(["category", "metric", "model"])
    assert summary.loc[("all", "pearson_delta_perturbed_mean", "mean"), "mean"] == 0
    assert summary.loc[("all", "rank_l2", "duplicate"), "mean"] > 0.95
    assert summary.loc[("all", "pearson_delta_perturbed_mean", "biojepa"), "gap_closed"] > 0.9
    assert summary.loc[("all", "spread_ratio", "no_change"), "mean"] == pytest.approx(0, abs=1e-6)
    assert result.verdict["outcome"] == "better than"
    assert all(entry["passed"] is not False for entry in result.verdict["sentinels"])


def test_seeds_are_averaged_within_a_perturbation(screen, files):
    more = [*files, *(screen.write_prediction("biojepa", fold, 1) for fold in (0, 1))]
    result = evaluate(screen.cells, screen.splits, more, SETTINGS)
    row = result.summary.query("model == 'biojepa' and metric == 'mse' and category == 'all'").iloc[0]
    values = result.metrics.query("model == 'biojepa' and metric == 'mse'")
    assert len(values) == 2 * len(LABELS)
    assert row["n"] == len(LABELS)
    assert row["mean"] == pytest.approx(values["value"].mean())


def test_uncertainty_is_scored_where_a_model_gives_it(screen):
    def with_sd(content):
        content.layers["sd"] = np.full(content.shape, 0.2, dtype=np.float32)
        return content

    result = evaluate(screen.cells, one_fold(screen), altered(screen, with_sd), SETTINGS)
    scored = result.metrics[result.metrics["metric"] == "coverage_80"]
    assert set(scored["model"]) == {"ridge"}
    assert scored["value"].between(0, 1).all()


def test_observed_means_are_handed_on_for_the_report(screen, result):
    observed = result.observed
    assert observed.obs_names.tolist()[0] == f"{observed.obs['perturbation'].iloc[0]}|fold0"
    for name, half in ((None, "b"), ("half_a", "a"), ("all", None)):
        values = observed.X if name is None else observed.layers[name]
        expected = np.stack([screen.mean_of(label, half) for label in observed.obs["perturbation"]])
        assert values == pytest.approx(
            expected[:, [GENES.index(gene) for gene in observed.var_names]], rel=1e-5
        )
    order = [GENES.index(gene) for gene in observed.var_names]
    assert observed.uns["perturbed_mean"]["fold1"] == pytest.approx(screen.perturbed_mean(1)[order])
    assert observed.uns["control_mean"]["fold0"] == pytest.approx(screen.mean_of("control")[order])


def test_folds_may_use_different_genes(screen):
    def fewer(content):
        return content[:, GENES[:25]].copy()

    files = [screen.write_prediction("no_change", 0, 3, fewer), screen.write_prediction("no_change", 1, 3)]
    result = evaluate(screen.cells, screen.splits, files, SETTINGS)
    missing = (
        np.isnan(result.observed.to_df()).groupby(result.observed.obs["fold"].to_numpy()).all().sum(axis=1)
    )
    assert missing.to_dict() == {0: 15, 1: 0}
    assert np.isnan(result.observed.uns["perturbed_mean"]["fold0"]).sum() == 15


def test_enrichment_covers_references_best_baseline_and_model(screen, files):
    settings = EvaluationSettings.from_mapping(
        {"draws": 100, "enrichment": {"permutations": 20, "max_perturbations": 3}}
    )
    result = evaluate(screen.cells, screen.splits, files, settings, screen.write_gene_sets())
    # Training mean and technical duplicate, without which the score could not be read, and the model.
    assert {"mean", "duplicate", "biojepa"} <= set(result.enrichment["model"])
    assert result.enrichment["perturbation"].nunique() == 3
    scored = result.metrics[result.metrics["metric"] == "pathway_correlation"]
    assert len(scored) == 3 * result.enrichment["model"].nunique()
    assert "pathway_correlation" in set(result.summary["metric"])


# --- what is refused ---------------------------------------------------------------------------


def test_a_split_changed_after_it_was_frozen_is_refused(tmp_path):
    screen = Screen(tmp_path, cells_per_label=4)
    table = screen.folder / "fold0" / "split.tsv"
    table.write_text(table.read_text().replace("\ttest\t", "\ttrain\t", 1))
    with pytest.raises(
        InputError, match=r"split\.tsv: found SHA-256 .*frozen in .*split\.json.*remake the split"
    ):
        read_split(table, table.with_suffix(".json"), 0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.drop(columns="n_genes_seen"), "also \\['n_genes_seen'\\]"),
        (lambda t: pd.concat([t, t[:1]]), "perturbation 'G0' twice"),
        (lambda t: t.assign(set=t["set"].replace("val", "dev")), "column set: found 'dev'"),
        (lambda t: t.assign(category="double"), "column category: found 'double'"),
        (lambda t: t.assign(set=t["set"].replace("test", "val")), "no perturbation in set 'test'"),
        (lambda t: t.replace({"perturbation": {"G0": "control"}}), "a row for 'control'"),
    ],
)
def test_a_malformed_split_is_refused(tmp_path, screen, change, match):
    write_tsv(change(screen.table(0)), tmp_path / "split.tsv")
    write_json({"fold": 0, "sha256": sha256_of(tmp_path / "split.tsv")}, tmp_path / "split.json")
    with pytest.raises(InputError, match=match):
        read_split(tmp_path / "split.tsv", tmp_path / "split.json", 0)


def test_a_split_of_another_fold_or_of_other_cells_is_refused(tmp_path, screen, files):
    table = screen.folder / "fold0" / "split.tsv"
    with pytest.raises(InputError, match="fold 0; expected fold 1"):
        read_split(table, table.with_suffix(".json"), 1)
    other = Screen(tmp_path, cells_per_label=4)
    other.labels[other.labels == "G5"] = "G99"
    other.write_cells(other.cells)
    refused(other, files, "1 perturbations that .* lacks, e.g. .*'G5'.*rerun the pair stage")


def test_a_leak_declared_in_the_predictions_is_refused(screen):
    """A model that calls a test perturbation part of its training set was made for another split."""
    test_label = screen.table(0).query("set == 'test'")["perturbation"].iloc[0]

    def leak(content):
        content.obs["set"] = (
            content.obs["set"].astype(str).where(content.obs["perturbation"] != test_label, "train")
        )
        return content

    refused(
        screen,
        altered(screen, leak),
        f"perturbation '{test_label}', obs column 'set': found 'train'",
        one_fold(screen),
    )


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda c: c[:, GENES[1:]].copy(), r"1 genes missing \['G0'\] and 0 extra"),
        (lambda c: c[c.obs["set"] != "test"].copy(), "no row for 9 test perturbations"),
        (lambda c: ad.concat([c, c[:1]]), "'G0' twice.*one row per perturbation"),
        (lambda c: ad.AnnData(c.X, c.obs.drop(columns="context"), c.var), "also \\['context'\\]"),
        (
            lambda c: ad.AnnData(np.where(c.X > 2, np.nan, c.X), c.obs, c.var),
            "gene 'G.*nan; expected a finite",
        ),
        (
            lambda c: ad.AnnData(np.expm1(3 * c.X), c.obs, c.var),
            "times that of the control cells.*neither counts",
        ),
        (lambda c: ad.AnnData(c.X - 1.0, c.obs, c.var), "mean log-expression, at least -0.5"),
        (lambda c: ad.AnnData(0.01 * c.X, c.obs, c.var), "expected 0.5 to 2.0 times"),
        (
            lambda c: ad.AnnData(c.X, c.obs, c.var, layers={"sd": -c.X}),
            "layers\\['sd'\\].*standard deviations",
        ),
    ],
    ids=["genes", "rows", "repeated", "columns", "nan", "counts", "changes", "scaled", "sd"],
)
def test_predictions_that_are_not_what_they_should_be_are_refused(screen, edit, match):
    refused(screen, altered(screen, edit), match, one_fold(screen))


def test_slightly_negative_means_of_linear_models_are_accepted(screen):
    def dip(content):
        content.X[0, 0] = -0.05
        return content

    evaluate(screen.cells, one_fold(screen), altered(screen, dip), SETTINGS)


def test_a_duplicate_made_with_other_halves_is_refused(screen, files):
    refused(screen, files, "a duplicate that differs from the mean of half A.*half_seed", half_seed=1)


def test_a_mean_baseline_of_other_perturbations_is_refused(screen):
    def shifted(content):
        content.X = content.X * np.float32(1.1)
        return content

    with pytest.raises(InputError, match=r"a mean baseline that differs from the mean over training"):
        evaluate(screen.cells, one_fold(screen), altered(screen, shifted, "mean"), SETTINGS)


def test_a_simple_model_under_test_is_compared_with_the_others(screen, files, result):
    alone = evaluate(screen.cells, screen.splits, files, replace(SETTINGS, model="ridge"))
    named = alone.summary[alone.summary["metric"] == "pearson_delta_perturbed_mean"]
    assert set(result.summary["best_baseline"]) >= {"ridge"} and "ridge" not in set(named["best_baseline"])


def test_strata_and_expected_accuracy_describe_the_test_perturbations(screen, files, result):
    cells = result.strata.query("property == 'category' and metric == 'rank_l2'")
    summary = result.summary.query("metric == 'rank_l2' and category != 'all'").set_index(
        ["model", "category"]
    )
    for row in cells.to_dict("records"):
        assert row["mean"] == pytest.approx(summary.loc[(row["model"], row["stratum"]), "mean"])
    table = result.trust.set_index("perturbation")
    assert sorted(table.index) == LABELS
    for file in (file for file in files if file.model == "biojepa"):
        content = ad.read_h5ad(file.path)
        for label in content.obs_names[content.obs["set"] == "test"]:
            change = content[label].X[0] - screen.mean_of("control")
            assert table.loc[label, "predicted_effect"] == pytest.approx(np.linalg.norm(change), rel=1e-5)
            trained = set(
                "+".join(screen.table(file.fold).query("set == 'train'")["perturbation"]).split("+")
            )
            seen = [1.0 if gene in trained else np.nan for gene in label.split("+")]
            assert table.loc[label, "nearest_similarity"] == pytest.approx(np.mean(seen), nan_ok=True)
    own = result.metrics.query("model == 'biojepa' and metric == 'pearson_delta_perturbed_mean'")
    assert table["observed"].to_dict() == pytest.approx(own.set_index("perturbation")["value"].to_dict())
    judged = result.verdict["trust"]
    assert judged["n"] == len(LABELS) and judged["mae"] == pytest.approx(
        (table["expected"] - table["observed"]).abs().mean()
    )


def test_without_the_model_under_test_nothing_is_expected(screen, files):
    others = [file for file in files if file.model != "biojepa"]
    result = evaluate(screen.cells, screen.splits, others, SETTINGS)
    assert result.trust.empty and tuple(result.trust.columns) == TRUST_COLUMNS
    assert result.verdict["trust"]["sentence"].startswith("No held-out perturbation of biojepa was scored")
    assert set(result.strata["model"]) == {"mean", "duplicate", "no_change", "ridge"}


def test_files_given_twice_or_of_an_unknown_fold_are_refused(screen, files):
    refused(screen, [*files, files[0]], "a second file of mean, fold 0, seed 0")
    refused(screen, files, "fold 1; expected one of the folds \\[0\\]", one_fold(screen))
    refused(screen, files, "folds \\[0, 0\\]", [screen.splits[0], screen.splits[0]])
    refused(screen, files[:5], "no file; expected at least one")


# --- the script ---------------------------------------------------------------------------------


def run_script(screen, files, folder):
    spec = importlib.util.spec_from_file_location("evaluate_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    names = dict.fromkeys(("metrics", "summary", "enrichment", "strata", "trust"), "tsv")
    names |= {"verdict": "json", "truth": "h5ad"}
    output = SimpleNamespace(**{name: str(folder / f"{name}.{suffix}") for name, suffix in names.items()})
    splits = [(str(s.path), str(s.path.with_suffix(".json")), s.fold) for s in screen.splits]
    entries = [({"model": f.model, "fold": f.fold, "seed": f.seed}, str(f.path)) for f in files]
    settings = {"draws": 100, "enrichment": {"permutations": 20, "max_perturbations": 2}}
    script.write(
        script.run(str(screen.cells), splits, entries, settings, str(screen.write_gene_sets())), output
    )
    return output


def test_script_writes_the_same_bytes_twice(screen, files, tmp_path):
    first, second = (run_script(screen, files, tmp_path / name) for name in ("a", "b"))
    for name, path in vars(first).items():
        assert Path(path).read_bytes() == Path(vars(second)[name]).read_bytes(), name
    assert not list((tmp_path / "a").glob(".*"))
    assert tuple(read_tsv(first.metrics).columns) == METRICS_COLUMNS
    assert json.loads(Path(first.verdict).read_text())["outcome"] == "better than"
    assert ad.read_h5ad(first.truth).n_obs == len(LABELS)
