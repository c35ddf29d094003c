"""The ablation compares embeddings pairwise, over the same perturbations and the same draws."""

from __future__ import annotations

import html
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_report import make_inputs

from biojepa.contracts import METRICS_COLUMNS
from biojepa.evaluation.metrics import METRICS
from biojepa.evaluation.resampling import WholeModelScores, make_scopes
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.statistics import metric_tables, summarize
from biojepa.models import ABLATION_MODELS
from biojepa.report import build_report
from biojepa.report.ablation import ablation_sentence, ablation_view, compare_embeddings, signed
from biojepa.report.glossary import model_text
from workflow_case import REPO

PEARSON = "pearson_delta_perturbed_mean"
SETTINGS = EvaluationSettings(draws=200, seed=7, confidence=0.9)
LABELS = [f"P{i:02d}" for i in range(12)]
# Mean score of each embedding under a head; the noise below is shared, so that the differences are known.
LEVELS = {
    "pca_ridge": 0.40, "untrained_ridge": 0.30, "biojepa_ridge": 0.45,
    "pca_knn_noprior": 0.40, "untrained_knn_noprior": 0.20, "biojepa_knn_noprior": 0.25,
    "pca_predictor_shuffled": 0.1, "biojepa_predictor_shuffled": 0.1,
    "pca_predictor": 0.5, "mean": 0.0,
}  # fmt: skip


def table_of(levels, metrics=(PEARSON, "rank_l2"), labels=LABELS):
    """Scores that are a level, plus what the perturbation adds for all, plus a little of the model's own."""
    shared = np.random.default_rng(0).normal(0, 0.2, len(labels))
    rows = []
    for place, (model, level) in enumerate(levels.items()):
        own = np.random.default_rng(place + 1).normal(0, 0.01, len(labels))
        own -= own.mean()
        for metric in metrics:
            rows += [
                (model, i % 2, 0, label, "single", metric, level + shared[i] + own[i])
                for i, label in enumerate(labels)
            ]
    return pd.DataFrame(rows, columns=list(METRICS_COLUMNS))


def rows_of(table):
    return {(row.head, row.priors): row for row in table.rows}


def test_rows_are_the_comparisons_that_were_run_and_means_are_those_of_the_scores():
    metrics = table_of(LEVELS)
    rows = rows_of(compare_embeddings(metrics, PEARSON, SETTINGS))
    # The predictor with priors was run on one embedding alone, which compares nothing.
    assert list(rows) == [("ridge", "given"), ("knn", "none"), ("predictor", "shuffled")]
    assert set(rows["predictor", "shuffled"].scores) == {"biojepa", "pca"}
    for row in rows.values():
        for embedding, score in row.scores.items():
            suffix = {"given": "", "none": "_noprior", "shuffled": "_shuffled"}[row.priors]
            mine = metrics[metrics["model"] == f"{embedding}_{row.head}{suffix}"]
            assert score.mean == pytest.approx(mine.loc[mine["metric"] == PEARSON, "value"].mean())
            assert score.n == len(LABELS)
    assert rows["ridge", "given"].gains["pca"].mean == pytest.approx(0.05)
    assert rows["knn", "none"].gains["pca"].mean == pytest.approx(-0.15)
    assert rows["knn", "none"].gains["untrained"].mean == pytest.approx(0.05)


def test_intervals_are_paired_bootstrap_percentiles_over_perturbations():
    metrics = table_of(LEVELS)
    row = rows_of(compare_embeddings(metrics, PEARSON, SETTINGS))["ridge", "given"]
    wide = metrics[metrics["metric"] == PEARSON].pivot(index="perturbation", columns="model", values="value")
    # The first group of the evaluation is that of all perturbations, hence the 0.
    counts = np.random.default_rng([7, 0]).multinomial(12, np.full(12, 1 / 12), size=200)
    for estimate, values in (
        (row.scores["biojepa"], wide["biojepa_ridge"]),
        (row.gains["pca"], wide["biojepa_ridge"] - wide["pca_ridge"]),
        (row.gains["untrained"], wide["biojepa_ridge"] - wide["untrained_ridge"]),
    ):
        draws = counts @ values.to_numpy() / 12
        assert (estimate.low, estimate.high) == pytest.approx(tuple(np.percentile(draws, [5, 95])))
    # What the perturbations share cancels in the difference: that is what pairing is for.
    gain, score = row.gains["pca"], row.scores["pca"]
    assert gain.high - gain.low < 0.2 * (score.high - score.low)


def test_scores_and_intervals_are_those_of_the_summary():
    metrics = table_of(LEVELS)
    scopes = make_scopes(metrics[["perturbation", "category"]], SETTINGS.draws, SETTINGS.seed)
    tables = metric_tables(metrics, WholeModelScores(scopes), {PEARSON: METRICS[PEARSON]}, scopes)
    summary = summarize(tables, ["mean"], SETTINGS.confidence).query("category == 'all'").set_index("model")
    for row in compare_embeddings(metrics, PEARSON, SETTINGS).rows:
        for embedding, score in row.scores.items():
            name = next(
                name
                for name, model in ABLATION_MODELS.items()
                if (model.embedding, model.head, model.priors) == (embedding, row.head, row.priors)
            )
            expected = summary.loc[name, ["mean", "ci_low", "ci_high", "n"]].tolist()
            assert [score.mean, score.low, score.high, score.n] == pytest.approx(expected)


def test_a_perturbation_counts_once_however_often_it_was_scored():
    metrics = table_of(LEVELS)
    again = metrics[metrics["perturbation"] == "P03"].assign(seed=1, value=lambda t: t["value"] + 0.6)
    row = rows_of(compare_embeddings(pd.concat([metrics, again]), PEARSON, SETTINGS))["ridge", "given"]
    assert row.scores["pca"].n == 12
    before = metrics.query("model == 'pca_ridge' and metric == @PEARSON")["value"].mean()
    assert row.scores["pca"].mean == pytest.approx(before + 0.3 / 12)


def test_one_perturbation_has_no_interval():
    metrics = table_of(LEVELS, labels=LABELS[:1])
    gain = rows_of(compare_embeddings(metrics, PEARSON, SETTINGS))["ridge", "given"].gains["pca"]
    assert gain.n == 1
    assert np.isnan([gain.low, gain.high]).all()
    assert gain.outcome == "indistinguishable from"


def test_without_a_head_on_all_three_embeddings_nothing_is_complete():
    two = {name: level for name, level in LEVELS.items() if not name.startswith("untrained")}
    assert compare_embeddings(table_of(LEVELS), PEARSON, SETTINGS).complete
    assert not compare_embeddings(table_of(two), PEARSON, SETTINGS).complete
    assert compare_embeddings(table_of({"mean": 0.0}), PEARSON, SETTINGS).rows == ()
    assert compare_embeddings(table_of(LEVELS), "rank_cosine", SETTINGS).rows == ()


def test_the_sentence_counts_what_the_intervals_say():
    sentence = ablation_sentence(compare_embeddings(table_of(LEVELS), PEARSON, SETTINGS))
    # Against PCA: ridge +0.05, neighbours -0.15, predictor 0. Against untrained: +0.15 and +0.05.
    assert sentence == (
        "Under the same head and priors, by Pearson Δ, the embedding of BioJEPA is better than PCA in 1 of 3 "
        "comparisons and worse in 1 (mean paired differences −0.150 to +0.050), and better than the "
        "untrained encoder in 2 of 2 comparisons and worse in 0 (mean paired differences +0.050 to +0.150); "
        "the other intervals do not exclude 0."
    )
    decided = {name: level for name, level in LEVELS.items() if "predictor" not in name}
    assert ablation_sentence(compare_embeddings(table_of(decided), PEARSON, SETTINGS)).endswith("+0.150).")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0512, "+0.051"), (-0.2, "−0.200"), (0.0, "0.000"), (0.0001, "0.000"), (np.nan, "–")],
)
def test_differences_carry_their_sign(value, text):
    assert signed(value) == text


@pytest.fixture(scope="module")
def inputs():
    full = make_inputs()
    return replace(full, metrics=pd.concat([full.metrics, table_of(LEVELS)], ignore_index=True))


@pytest.fixture(scope="module")
def page(inputs):
    return build_report(inputs)


def test_the_page_shows_the_numbers_of_the_table(inputs, page):
    text = page.split('<section id="ablation"', 1)[1].split("</section>", 1)[0]
    visible = html.unescape(re.sub(r"<[^>]+>", " ", text))
    assert "Ablation: does the JEPA add anything?" in visible
    table = compare_embeddings(inputs.metrics, PEARSON)
    assert ablation_sentence(table) in visible
    first = text.split("<tbody>", 1)[1].split("</tbody>", 1)[0]
    for row in table.rows:
        cells = first.split(f">{row.label}</th>", 1)[1].split("</tr>", 1)[0]
        shown = re.findall(r'class="v">([^<]+)<', cells)
        scores = [row.scores.get(name) for name in ("biojepa", "pca", "untrained")]
        gains = [row.gains.get(name) for name in ("pca", "untrained")]
        expected = ["–" if e is None else f"{e.mean:.3f}" for e in scores]
        expected += ["–" if e is None else signed(e.mean) for e in gains]
        assert [value.replace("−", "-") for value in shown] == [e.replace("−", "-") for e in expected]
    assert (first.count("▲"), first.count("▼")) == (3, 1)
    assert not re.search(r"\bnan\b", visible, re.I)


def test_the_figure_draws_the_table(inputs, page):
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.S).group(1))
    panel = data["figures"]["ablation"]["options"][0][1]
    table = compare_embeddings(inputs.metrics, PEARSON)
    named = dict(zip(panel["layout"]["yaxis"]["ticktext"], panel["layout"]["yaxis"]["tickvals"], strict=True))
    assert [*named] == [row.label for row in table.rows]
    drawn = {}
    for trace in panel["data"]:
        for x, y, up, (label, _) in zip(
            trace["x"], trace["y"], trace["error_x"]["array"], trace["customdata"], strict=True
        ):
            assert abs(y - named[label]) < 0.5, "a dot lies in its own row"
            drawn[label, trace["name"]] = (x, x + up)
    for row in table.rows:
        for embedding, name in (("biojepa", "BioJEPA"), ("pca", "PCA"), ("untrained", "Untrained encoder")):
            if embedding in row.scores:
                score = row.scores[embedding]
                assert drawn.pop((row.label, name)) == pytest.approx((score.mean, score.high), abs=1e-4)
    assert not drawn


def test_sections_are_numbered_without_a_gap(page):
    for text in (page, build_report(make_inputs())):
        found = [int(n) for n in re.findall(r'<span class="no">(\d+)</span>', text)]
        assert found == list(range(2, 2 + len(found)))


def test_a_report_without_the_ablation_has_no_such_section():
    full = make_inputs()
    assert ablation_view(full) is None
    page = build_report(full)
    assert 'id="ablation"' not in page
    assert 'href="#ablation"' not in page


def test_where_no_metric_can_tell_the_sentence_says_so(inputs):
    usable = {**inputs.verdict["usable"], PEARSON: False}
    one = ablation_view(replace(inputs, verdict={**inputs.verdict, "usable": usable}))
    assert "by Rank, L2," in one["sentence"]
    none = ablation_view(replace(inputs, verdict={**inputs.verdict, "usable": {**usable, "rank_l2": False}}))
    assert none["sentence"].startswith("No metric of this table can tell")


def test_every_name_of_the_ablation_has_a_label_of_its_own():
    texts = [model_text(name) for name in ABLATION_MODELS]
    assert len({text.label for text in texts}) == 30
    assert {text.group for text in texts if text.name != "biojepa"} == {"ablation"}
    assert all(text.about for text in texts)
    assert model_text("untrained_knn_noprior").label == "Untrained encoder + nearest neighbours, no priors"


def test_the_markdown_of_the_results_has_the_same_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    monkeypatch.delitem(sys.modules, "ablation_table", raising=False)
    from ablation_table import ablation_lines

    lines = list(ablation_lines(table_of(LEVELS)))
    table = compare_embeddings(table_of(LEVELS), PEARSON)
    assert lines[0] == "Ablation, Pearson Δ:"
    line = next(line for line in lines if line.startswith("| Ridge, with priors |"))
    fields = [field.strip() for field in line.strip("|").split("|")]
    row = rows_of(table)["ridge", "given"]
    score, gain = row.scores["biojepa"], row.gains["untrained"]
    assert fields[1] == f"{score.mean:.2f} ({score.low:.2f} to {score.high:.2f})"
    assert fields[5] == f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
    assert ablation_sentence(table) in lines
    shuffled = next(line for line in lines if "shuffled priors" in line)
    assert shuffled.count("–") == 2, "the untrained encoder was not run there"
    assert list(ablation_lines(table_of({"mean": 0.0}))) == []


def test_the_markdown_has_the_intervals_of_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    monkeypatch.delitem(sys.modules, "ablation_table", raising=False)
    from ablation_table import main, settings_of

    (tmp_path / "screen/perturbation/evaluate").mkdir(parents=True)
    table_of(LEVELS).to_csv(tmp_path / "screen/perturbation/evaluate/metrics.tsv", sep="\t", index=False)
    assert settings_of(tmp_path, "screen") == EvaluationSettings()
    recorded = {"draws": 200, "seed": 7, "confidence": 0.9, "enrichment": {"permutations": 50}}
    content = {"config": {"screen": {"evaluate": recorded}}}
    (tmp_path / "provenance.json").write_text(json.dumps(content), encoding="utf-8")
    assert settings_of(tmp_path, "screen").draws == 200 and settings_of(tmp_path, "other").draws == 1000
    monkeypatch.setattr(sys, "argv", ["ablation_table.py", str(tmp_path)])
    main()
    row = rows_of(compare_embeddings(table_of(LEVELS), PEARSON, SETTINGS))["ridge", "given"]
    gain = row.gains["untrained"]
    assert f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})" in capsys.readouterr().out
    default = rows_of(compare_embeddings(table_of(LEVELS), PEARSON))["ridge", "given"].gains["untrained"]
    assert (default.low, default.high) != (gain.low, gain.high)
