"""Claims about predictions outside a screen: what is predicted, in which order, and what is said of trust."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from training_case import pairs_of

from biojepa import neighbours, prediction
from biojepa.contracts import (
    METRICS_COLUMNS,
    PREDICTED_COLUMNS,
    SPLIT_COLUMNS,
    SUMMARY_COLUMNS,
    TRUST_COLUMNS,
)
from biojepa.errors import InputError
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.trust import Expectation, cross_fit
from biojepa.files import read_tsv, write_tsv
from biojepa.neighbours import nearest_training_genes
from biojepa.pairs import Pairs
from biojepa.prediction import (
    METRIC,
    HeldOut,
    held_out_accuracy,
    predict_perturbations,
)
from biojepa.prediction_requests import ALL
from biojepa.predictions import write_requested
from biojepa.splits import write_split
from workflow_case import REPO

GENES = [f"X{i:02d}" for i in range(14)]
SETTINGS = EvaluationSettings(draws=400, seed=3)
BETTER = HeldOut(20, 0.6, "ridge", 0.5, (0.1, 0.02, 0.2), "no_change", (0.4, 0.3, 0.5))


def made_pairs() -> Pairs:
    """A fold of everything: A, B, A+B and C+D trained; NEW and LIKE_B known to sources; C and D to none."""
    labels = ["A", "B", "A+B", "C+D"]
    cells = [*labels, *["control"] * 4]
    codes = {
        "net": {"A": [1.0, 0.0], "B": [0.0, 1.0]},
        "sets": {"A": [1.0, 0.0, 0.0], "B": [0.0, 1.0, 0.0]},
    }
    pairs = pairs_of(np.ones((8, 14)), cells, dict.fromkeys(labels, "train"), codes, genes=GENES)
    more = {"net": [[0.6, 0.8], [0.8, -0.6], [0, 0]], "sets": [[0.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0, 0, 0]]}
    extended = {
        name: np.vstack([values, np.array(more[name], dtype=np.float32)])
        for name, values in pairs.codes.items()
    }
    genes = (*pairs.perturbed_genes, "LIKE_B", "NEW", "SILENT")
    return replace(pairs, perturbed_genes=genes, codes=extended)


@dataclass
class FakeModel:
    """Adds a fixed change per gene, so that every number of the table can be worked out."""

    pairs: Pairs
    with_sd: bool = True
    blocks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.genes, self.perturbed_genes = self.pairs.genes, self.pairs.perturbed_genes
        self.facts = dict(self.pairs.facts)
        self.codes = {name: torch.from_numpy(values) for name, values in self.pairs.codes.items()}
        self.control_expression = torch.full((len(self.genes),), 2.0)
        rng = np.random.default_rng(0)
        strength = np.arange(1, len(self.perturbed_genes) + 1)
        self.effect = 0.1 * strength[:, None] * rng.standard_normal((len(strength), len(self.genes)))

    def predict_membership(self, membership):
        assert membership.shape[1] == len(self.perturbed_genes)
        self.blocks.append(len(membership))
        sd = 0.01 * (1 + membership.sum(axis=1, keepdims=True)) * np.ones(len(self.genes))
        tokens = np.zeros((len(membership), 2, 3))
        return 2.0 + membership @ self.effect, sd if self.with_sd else None, tokens


def ask(requests, held_out=None, model=None, pairs=None, **more):
    pairs = pairs or made_pairs()
    return predict_perturbations(model or FakeModel(pairs), pairs, requests, held_out or {}, **more)


def effect_of(label: str) -> np.ndarray:
    model = FakeModel(made_pairs())
    return sum(model.effect[model.perturbed_genes.index(gene)] for gene in label.split("+"))


def test_predictions_are_ranked_by_the_length_of_the_change():
    asked = ["A", "NEW", "A+NEW", "LIKE_B"]
    answer = ask(asked)
    sizes = {label: np.linalg.norm(effect_of(label)) for label in asked}
    table = answer.table
    assert list(table.columns) == list(PREDICTED_COLUMNS)
    assert table["perturbation"].tolist() == sorted(asked, key=lambda label: -sizes[label])
    assert table["rank"].tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(
        table["effect_size"], [sizes[name] for name in table["perturbation"]], rtol=1e-5
    )
    expected = np.stack([2.0 + effect_of(name) for name in table["perturbation"]])
    np.testing.assert_allclose(answer.expression, expected, rtol=1e-5)
    genes = [label.count("+") + 1 for label in table["perturbation"]]
    np.testing.assert_allclose(answer.sd[:, 0], [0.01 * (1 + n) for n in genes], rtol=1e-5)


def test_the_uncertainty_of_an_effect_size_is_that_of_simulated_genes():
    table = ask(["NEW"]).table
    rng = np.random.default_rng(1)
    drawn = effect_of("NEW") + 0.02 * rng.standard_normal((40_000, len(GENES)))
    assert table["effect_size_sd"].item() == pytest.approx(np.linalg.norm(drawn, axis=1).std(), rel=0.02)
    without = ask(["NEW"], model=FakeModel(made_pairs(), with_sd=False))
    assert without.sd is None and without.table["effect_size_sd"].isna().all()


def test_top_genes_are_the_largest_changes_of_either_sign():
    row = ask(["NEW"]).table.iloc[0]
    change = pd.Series(effect_of("NEW"), index=GENES)
    up = change[change > 0].nlargest(10)
    down = change[change < 0].nsmallest(10)
    assert row["top_up"] == ";".join(f"{gene}:+{value:.3g}" for gene, value in up.items())
    assert row["top_down"] == ";".join(f"{gene}:{value:.3g}" for gene, value in down.items())
    assert row["top_up"].count(":") + row["top_down"].count(":") == 14  # ten at most of each, none is 0


def test_every_perturbation_gets_the_category_that_training_leaves_it():
    table = ask(["A", "C", "NEW", "A+NEW", "A+C", "LIKE_B+NEW", "A+B"]).table.set_index("perturbation")
    assert table["category"].to_dict() == {
        "A": "measured",
        "A+B": "measured",
        "C": "single_in_combo",
        "NEW": "single",
        "A+NEW": "combo_seen1",
        "A+C": "combo_seen1",
        "LIKE_B+NEW": "combo_seen0",
    }


def test_a_gene_that_nothing_knows_is_listed_last_and_not_predicted():
    answer = ask(["LIKEB", "A", "SILENT+UNHEARD", "X03", "A+ZZZZZ"])
    table = answer.table.set_index("perturbation")
    assert table.index.tolist() == ["A", "LIKEB", "SILENT+UNHEARD", "X03", "A+ZZZZZ"]
    assert table["rank"].notna().tolist() == [True, False, False, False, False]
    assert len(answer.expression) == 1
    trust = "not predicted: no prior source knows "
    assert table.loc["LIKEB", "trust"] == trust + "LIKEB (did you mean LIKE_B?)"
    assert table.loc["SILENT+UNHEARD", "trust"] == trust + "SILENT and UNHEARD"
    # X03 is measured: its symbol is right, but no source knows it.
    assert table.loc["X03", "trust"] == trust + "X03"
    assert table.loc["A+ZZZZZ", "trust"] == trust + "ZZZZZ"
    missing = table.iloc[1:]
    assert missing["abstain"].all()
    empty = ["effect_size", "top_up", "nearest_similarity", "heldout_accuracy", "heldout_n", "gain"]
    assert missing[empty].isna().all().all()


def test_a_trained_gene_without_any_source_is_predicted():
    row = ask(["C"]).table.iloc[0]
    assert row["rank"] == 1 and row["prior_coverage"] == "0/2" and row["prior_sources"] == ""
    assert (row["nearest_training_gene"], row["nearest_similarity"]) == ("C", 1.0)


def test_a_model_trained_without_priors_predicts_no_unseen_gene():
    model = FakeModel(made_pairs())
    model.codes = {}
    table = ask(["NEW", "A"], model=model).table
    assert table["perturbation"].tolist() == ["A", "NEW"] and table["rank"].isna().tolist() == [False, True]
    assert table["prior_coverage"].tolist() == ["0/0", "0/0"]


def test_a_model_with_shuffled_codes_is_asked_for_its_own_neighbours():
    model = FakeModel(made_pairs())
    # Codes of A and B are swapped, and those of LIKE_B are on SILENT.
    order = [model.perturbed_genes.index(gene) for gene in ("B", "A", "C", "D", "SILENT", "NEW", "LIKE_B")]
    model.codes = {name: values[order] for name, values in model.codes.items()}
    table = ask(["SILENT", "NEW", "LIKE_B"], model=model).table.set_index("perturbation")
    assert table.loc["SILENT", ["nearest_training_gene", "prior_coverage"]].tolist() == ["A", "1/2"]
    assert table.loc["NEW", "nearest_training_gene"] == "B"
    assert table.loc["LIKE_B", "trust"].startswith("not predicted: no prior source knows LIKE_B")


def test_similarity_is_no_larger_than_the_captured_share():
    pairs = made_pairs()
    codes = {name: values.copy() for name, values in pairs.codes.items()}
    codes["net"][pairs.perturbed_genes.index("LIKE_B")] *= 0.2
    row = ask(["LIKE_B"], pairs=replace(pairs, codes=codes), model=FakeModel(replace(pairs, codes=codes)))
    row = row.table.iloc[0]
    assert row["nearest_training_gene"] == "B" and row["nearest_similarity"] == pytest.approx(0.2 * 0.8)
    assert row["prior_coverage"] == "1/2"


def test_nothing_that_can_be_predicted_is_no_empty_table():
    with pytest.raises(InputError, match=r"key predict: found nothing that can be predicted: SILENT, ZZ"):
        ask(["SILENT", "ZZ"])
    model = FakeModel(made_pairs())
    model.codes = {}
    with pytest.raises(InputError, match="found nothing that can be predicted: no gene with a code"):
        ask(ALL, model=model)


def test_all_means_every_gene_with_a_code():
    assert sorted(ask(ALL).table["perturbation"]) == ["A", "B", "LIKE_B", "NEW"]


def test_predicting_in_blocks_changes_nothing(monkeypatch):
    asked = ["A", "NEW", "A+NEW", "LIKE_B", "B", "B+NEW", "C"]
    whole = ask(asked)
    monkeypatch.setattr(prediction, "PREDICTED_AT_A_TIME", 3)
    monkeypatch.setattr(neighbours, "GENES_COMPARED_AT_A_TIME", 1)
    model = FakeModel(made_pairs())
    parts = ask(asked, model=model)
    assert model.blocks == [3, 3, 1]
    pd.testing.assert_frame_equal(parts.table, whole.table)
    np.testing.assert_array_equal(parts.expression, whole.expression)


def test_nearest_training_genes_average_cosines_over_the_sources_that_know_both():
    nearest = nearest_training_genes(
        made_pairs(), {"LIKE_B", "NEW", "A", "C", "SILENT"}, {"A", "B", "C", "D"}
    )
    # LIKE_B: in net alone, cosines 0.6 with A and 0.8 with B. NEW: net 0.8 and -0.6, sets 0.8 and 0.6.
    assert nearest["LIKE_B"] == ("B", pytest.approx(0.8))
    assert nearest["NEW"] == ("A", pytest.approx((0.8 + 0.8) / 2))
    assert nearest["A"] == ("A", 1.0) and nearest["C"] == ("C", 1.0)
    assert "SILENT" not in nearest


def test_a_combination_is_as_far_from_training_as_its_least_known_gene():
    row = ask(["LIKE_B+NEW"]).table.iloc[0]
    assert row["nearest_training_gene"] == "B;A"
    assert row["nearest_similarity"] == pytest.approx(0.8)
    assert row["nearest_distance"] == pytest.approx(0.2)
    assert (row["prior_coverage"], row["prior_sources"]) == ("1/2", "net")


def scores(values: dict[str, list[float]], category="single", start=0) -> pd.DataFrame:
    """Scores of models on perturbations, two folds and seeds where a value is a pair."""
    rows = []
    for model, numbers in values.items():
        for index, value in enumerate(numbers, start):
            rows.append((model, index % 2, 0, f"P{index}", category, METRIC, value))
    return pd.DataFrame(rows, columns=list(METRICS_COLUMNS))


def summary_of(model: str, best: dict[str, str]) -> pd.DataFrame:
    rows = [
        {"model": model, "category": c, "metric": METRIC, "best_baseline": name} for c, name in best.items()
    ]
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))


def splits_of(metrics: pd.DataFrame, n_seen=None) -> dict[int, pd.DataFrame]:
    """Splits of the folds of scores; genes seen as the category has them unless given for a perturbation."""
    usual = {"single": 0, "single_in_combo": 1, "combo_seen0": 0, "combo_seen1": 1, "combo_seen2": 2}
    rows = metrics[["fold", "perturbation", "category"]].drop_duplicates()
    seen = [
        (n_seen or {}).get(name, usual[kind])
        for name, kind in zip(rows["perturbation"], rows["category"], strict=True)
    ]
    tables = rows.assign(set="test", n_genes_seen=seen)
    return {fold: part[list(SPLIT_COLUMNS)] for fold, part in tables.groupby("fold")}


def test_held_out_accuracy_is_paired_by_perturbation_and_category():
    rng = np.random.default_rng(0)
    base = rng.normal(0.3, 0.2, 30)
    table = scores({
        "biojepa": base + 0.1 + rng.normal(0, 0.05, 30), "ridge": base, "mean": np.zeros(30),
        "no_change": np.full(30, 0.2), "knn": np.full(30, -1.0),
    })  # fmt: skip
    other = scores({"biojepa": [0.5], "mean": [0.0], "ridge": [0.1]}, "combo_seen2", 100)
    noise = table.assign(metric="mse", value=99.0)
    reached = held_out_accuracy(
        pd.concat([noise, table, other]),
        summary_of("biojepa", {"single": "ridge", "combo_seen2": "ridge"}),
        "biojepa",
        SETTINGS,
        splits_of(pd.concat([table, other])),
    )
    assert list(reached) == [("combo_seen2", 2), ("single", 0)]
    single = reached["single", 0]
    wide = table.pivot_table(index="perturbation", columns="model", values="value")
    difference = (wide["biojepa"] - wide["ridge"]).to_numpy()
    assert (single.n, single.baseline, single.uninformed) == (30, "ridge", "no_change")
    assert single.accuracy == pytest.approx(wide["biojepa"].mean())
    assert single.baseline_accuracy == pytest.approx(base.mean())
    assert single.gain[0] == pytest.approx(difference.mean())
    # A percentile interval of a mean is close to the normal one.
    half_width = 1.96 * difference.std() / np.sqrt(30)
    np.testing.assert_allclose(
        single.gain[1:], [difference.mean() - half_width, difference.mean() + half_width], atol=half_width / 3
    )
    assert single.uninformed_gain[0] == pytest.approx(wide["biojepa"].mean() - 0.2)
    one = reached["combo_seen2", 2]
    assert (one.n, one.uninformed, one.gain[0]) == (1, "mean", pytest.approx(0.4))
    # A single perturbation says nothing of how far the next may differ.
    assert np.isnan([*one.gain[1:], *one.uninformed_gain[1:]]).all()


def test_seeds_and_folds_of_a_perturbation_are_averaged_first():
    table = scores({"biojepa": [0.2, 0.4], "mean": [0.0, 0.0]})
    again = table[table["perturbation"] == "P0"].assign(seed=1, value=0.8)
    reached = held_out_accuracy(pd.concat([table, again.query("model == 'biojepa'")]),
                                summary_of("biojepa", {"single": "mean"}), "biojepa", SETTINGS,
                                splits_of(table))  # fmt: skip
    assert reached["single", 0].accuracy == pytest.approx((0.5 + 0.4) / 2)


def test_a_model_that_was_not_evaluated_is_refused():
    with pytest.raises(InputError, match=r"metrics\.tsv: found .*of mean; expected that of biojepa"):
        held_out_accuracy(scores({"mean": [0.0]}), summary_of("mean", {}), "biojepa", SETTINGS, {})


def test_the_script_joins_the_folds_and_uses_the_threads_of_the_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "workflow" / "scripts"))
    monkeypatch.delitem(sys.modules, "predict", raising=False)
    import predict as script

    metrics = scores({"biojepa": [0.5] * 10, "mean": [0.0] * 10})
    write_tsv(metrics, tmp_path / "metrics.tsv")
    write_tsv(summary_of("biojepa", {"single": "mean"}), tmp_path / "summary.tsv")
    folds = {fold: tmp_path / f"fold{fold}" / "split.tsv" for fold in (0, 1)}
    for fold, table in splits_of(metrics).items():
        write_split(table, folds[fold])
    (tmp_path / "model.pt").write_bytes(b"weights")
    model = FakeModel(made_pairs())
    model.settings = SimpleNamespace(torch_threads=torch.get_num_threads() + 1)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(script, "load_model", lambda path, device: model)
    monkeypatch.setattr(script, "read_pairs", lambda path: made_pairs())
    write_tsv(pd.DataFrame(columns=list(TRUST_COLUMNS)), tmp_path / "trust.tsv")
    names = {"metrics": "metrics.tsv", "summary": "summary.tsv", "model": "model.pt", "pairs": "pairs.h5"}
    names["trust"] = "trust.tsv"
    source = {name: str(tmp_path / file) for name, file in names.items()} | {"requests": []}
    params = {"settings": {}, "device": "cpu", "model": "biojepa", "seed": 0, "predict": ["NEW"]}
    output = {"predictions": tmp_path / "predictions.h5ad", "table": tmp_path / "predictions.tsv"}
    script.main(
        SimpleNamespace(
            input=SimpleNamespace(**source, splits=[str(path) for path in folds.values()]),
            params=SimpleNamespace(**params, folds=list(folds)),
            output=SimpleNamespace(**output),
        )
    )
    assert threads == [model.settings.torch_threads]
    row = read_tsv(output["table"]).iloc[0]
    assert (row["perturbation"], row["heldout_n"], row["heldout_accuracy"]) == ("NEW", 10, 0.5)


def test_a_perturbation_that_its_fold_does_not_hold_is_refused():
    table = scores({"biojepa": [0.2, 0.4], "mean": [0.0, 0.0]})
    splits = splits_of(table)
    with pytest.raises(InputError, match=r"metrics\.tsv: found P1 of fold 1; expected .*split\.tsv"):
        held_out_accuracy(table, summary_of("biojepa", {}), "biojepa", SETTINGS, {0: splits[0]})


def test_combinations_of_new_genes_are_not_trusted_for_those_of_seen_ones():
    n = 20
    table = scores({"biojepa": [0.8] * n + [0.1] * 9, "mean": [0.0] * (n + 9)}, "combo_seen0")
    # No partner was a training single in any of them; in the first 20 all occurred in combinations.
    n_seen = {f"P{i}": 2 if i < n else 0 for i in range(n + 9)}
    summary = summary_of("biojepa", {"combo_seen0": "mean"})
    reached = held_out_accuracy(table, summary, "biojepa", SETTINGS, splits_of(table, n_seen))
    assert {kind: (used.n, round(used.accuracy, 6)) for kind, used in reached.items()} == {
        ("combo_seen0", 0): (9, 0.1),
        ("combo_seen0", 2): (20, 0.8),
    }
    asked = ["LIKE_B+NEW", "C+D+NEW"]
    rows = ask(asked, reached).table.set_index("perturbation")
    assert rows["category"].tolist() == ["combo_seen0"] * 2
    assert rows.loc[asked, "heldout_accuracy"].tolist() == pytest.approx([0.1, 0.8])
    # Too few of the very same kind, however many there are of the category.
    few = ask(["LIKE_B+NEW"], reached, min_perturbations=10).table.iloc[0]
    assert (few["abstain"], few["trust"]) == (True, "only 9 held-out perturbation(s) of this kind: untested")
    none = ask(["LIKE_B+NEW"], {("combo_seen0", 2): reached["combo_seen0", 2]}).table.iloc[0]
    assert (none["abstain"], none["trust"]) == (True, "no held-out perturbation of this kind: untested")
    assert pd.isna(none["heldout_accuracy"])


LIKE_THE_BEST = (
    "no better than the best simple model, ridge, on held-out perturbations of this kind, but better "
    "than no_change, which knows nothing of the perturbation"
)


@pytest.mark.parametrize(
    ("change", "abstain", "trust"),
    [
        ({}, False, "better than the best simple model on held-out perturbations of this kind"),
        (
            {"gain": (0.1, -0.01, 0.2)},
            False,
            LIKE_THE_BEST,
        ),
        (
            {"uninformed_gain": (0.1, 0.0, 0.2)},
            True,
            "no better than no_change, which knows nothing of the perturbation, on held-out perturbations of "
            "this kind: abstain",
        ),
        (
            {"gain": (-0.1, -0.2, -0.01)},
            True,
            "worse than ridge on held-out perturbations of this kind: use that instead",
        ),
        ({"gain": (-0.1, -0.2, 0.0)}, False, LIKE_THE_BEST),
        ({"n": 7}, True, "only 7 held-out perturbation(s) of this kind: untested"),
        (None, True, "no held-out perturbation of this kind: untested"),
    ],
    ids=["better", "like the best", "like nothing", "worse", "just not worse", "few", "none"],
)
def test_trust_follows_from_what_held_out_perturbations_of_the_kind_reached(change, abstain, trust):
    held_out = {} if change is None else {("single", 0): replace(BETTER, **change)}
    row = ask(["NEW"], held_out).table.iloc[0]
    assert (row["abstain"], row["trust"]) == (abstain, trust)
    if change is None:
        assert row[["heldout_accuracy", "heldout_n", "baseline", "gain"]].isna().all()
    else:
        used = held_out["single", 0]
        assert (row["heldout_accuracy"], row["heldout_n"], row["baseline"]) == (0.6, used.n, "ridge")
        assert tuple(row[["gain", "gain_ci_low", "gain_ci_high"]]) == used.gain
        assert row["baseline_accuracy"] == 0.5 and row["uninformed_baseline"] == "no_change"
        bounds = ["uninformed_gain", "uninformed_gain_ci_low", "uninformed_gain_ci_high"]
        assert tuple(row[bounds]) == used.uninformed_gain


def test_what_the_screen_measured_is_called_so_whatever_its_kind_reached():
    row = ask(["A"], {("single", 0): BETTER, ("measured", 0): BETTER}).table.iloc[0]
    assert row["trust"].startswith("measured in this screen") and not row["abstain"]
    assert pd.isna(row["heldout_accuracy"])


def expectation_of(relation: float) -> Expectation:
    """What was learned from 40 held-out perturbations whose accuracy follows from similarity, or not."""
    rng = np.random.default_rng(0)
    similarity, seen = rng.uniform(0, 1, 40), rng.integers(0, 2, 40)
    table = pd.DataFrame(
        {
            "perturbation": [f"P{place}" for place in range(40)],
            "category": np.where(seen, "combo_seen1", "single"), "n_genes_seen": seen,
            "nearest_similarity": similarity, "prior_coverage": 1.0, "predicted_effect": 1.0,
            "observed": 0.3 + relation * (similarity - 0.5) + rng.normal(0, 0.1, 40),
        }
    )  # fmt: skip
    expectation = Expectation.of(cross_fit(table.reindex(columns=list(TRUST_COLUMNS))), SETTINGS)
    assert expectation is not None and expectation.source == ("features" if relation else "kind")
    return expectation


def test_expected_accuracy_is_that_of_the_features_of_each_perturbation():
    expectation = expectation_of(0.6)
    asked = ["NEW", "A+NEW", "LIKE_B", "LIKE_B+NEW", "A", "UNHEARD"]
    rows = ask(asked, {("single", 0): BETTER}, expectation=expectation).table.set_index("perturbation")
    plain = ask(asked, {("single", 0): BETTER}).table.set_index("perturbation")
    # Similarities as in the tests of neighbours above; kinds as training leaves them.
    known = pd.DataFrame(
        {
            "category": ["single", "combo_seen1", "single"], "n_genes_seen": [0, 1, 0],
            "nearest_similarity": [0.8, 0.8, 0.8], "prior_coverage": [1.0, 1.0, 0.5],
            "predicted_effect": rows.loc[asked[:3], "effect_size"],
            "predicted_effect_sd": rows.loc[asked[:3], "effect_size_sd"],
        }
    )  # fmt: skip
    expected = expectation.model.expected(known)
    assert rows.loc[asked[:3], "expected_accuracy"].tolist() == pytest.approx(expected.tolist())
    width = expectation.model.half_width
    assert rows.loc["NEW", ["expected_low", "expected_high"]].tolist() == pytest.approx(
        [expected[0] - width, expected[0] + width]
    )
    # Of a kind that was never held out, of what was measured, and of what is not predicted: nothing.
    columns = ["expected_accuracy", "expected_low", "expected_high", "expected_from"]
    assert rows.loc[["LIKE_B+NEW", "A", "UNHEARD"], columns].isna().all().all()
    assert set(rows.loc[asked[:3], "expected_from"]) == {"features"}
    words = "; its expected accuracy follows from its kind, neighbours and predicted effect"
    assert rows.loc["NEW", "trust"] == plain.loc["NEW", "trust"] + words
    # A prediction that is abstained from is not made more trustworthy by a number.
    assert rows.loc["A+NEW", "trust"] == "no held-out perturbation of this kind: untested"
    assert rows["abstain"].equals(plain["abstain"])


def test_without_skill_the_expected_accuracy_is_the_mean_of_the_kind_and_the_words_say_so():
    expectation = expectation_of(0.0)
    rows = ask(["NEW", "LIKE_B", "A+NEW"], {("single", 0): BETTER}, expectation=expectation).table
    rows = rows.set_index("perturbation")
    assert rows.loc["NEW", "expected_accuracy"] == rows.loc["LIKE_B", "expected_accuracy"]
    assert rows.loc["NEW", "expected_accuracy"] == pytest.approx(expectation.means["single", 0])
    assert rows.loc["A+NEW", "expected_accuracy"] == pytest.approx(expectation.means["combo_seen1", 1])
    assert set(rows["expected_from"]) == {"kind"}
    assert rows.loc["NEW", "trust"].endswith(
        "; its expected accuracy is the mean of the kind, since nothing else told good from bad held-out "
        "predictions"
    )


def test_neighbours_of_the_expectation_are_those_of_the_file_that_it_was_learned_with():
    expectation, model = expectation_of(0.6), FakeModel(made_pairs())
    plain = ask(["LIKE_B"], expectation=expectation).table.iloc[0]
    assert (plain["nearest_training_gene"], plain["nearest_similarity"]) == ("B", pytest.approx(0.8))
    # The model knows nothing of B, so that it calls A the nearest gene.
    model.codes["net"] = model.codes["net"].clone()
    model.codes["net"][model.perturbed_genes.index("B")] = 0
    own = ask(["LIKE_B"], model=model, expectation=expectation).table.iloc[0]
    assert (own["nearest_training_gene"], own["nearest_similarity"]) == ("A", pytest.approx(0.6))
    assert own["expected_accuracy"] == plain["expected_accuracy"]


@pytest.mark.parametrize("part", ["split", "genes"])
def test_a_model_of_another_file_is_refused(part):
    pairs = made_pairs()
    model = FakeModel(pairs)
    if part == "split":
        model.facts["split_sha256"] = "other"
    else:
        model.perturbed_genes = model.perturbed_genes[:-1]
    with pytest.raises(InputError, match=r"model\.pt: found a model of .*rerun the train stage"):
        predict_perturbations(model, pairs, ["A"], {})


def test_the_file_holds_the_ranked_rows_and_their_expression(tmp_path):
    answer = ask(["A", "UNHEARD", "NEW"], {("single", 0): BETTER})
    path = tmp_path / "predictions.h5ad"
    write_requested(path, answer.table, answer.genes, answer.expression, answer.sd, {"model": "biojepa"})
    with h5py.File(path) as file:
        assert {file["X"].compression, file["layers/sd"].compression} == {"gzip"}
    content = ad.read_h5ad(path)
    ranked = answer.table.iloc[:2]
    assert content.obs_names.tolist() == ranked["perturbation"].tolist()
    assert content.var_names.tolist() == GENES
    np.testing.assert_array_equal(content.X, answer.expression)
    np.testing.assert_array_equal(content.layers["sd"], answer.sd)
    assert list(content.obs.columns) == list(PREDICTED_COLUMNS)
    for column in ("rank", "effect_size", "abstain", "trust", "category"):
        assert content.obs[column].tolist() == ranked[column].tolist()
    assert json.loads(content.uns["provenance"]) == {"model": "biojepa"}
    with pytest.raises(ValueError, match=r"shape \(1, 14\); expected \(2, 14\)"):
        write_requested(path, answer.table, answer.genes, answer.expression[:1], None, {})
