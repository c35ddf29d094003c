"""The sections on strata and on expected accuracy show the numbers of their tables, and names as they are."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from test_report import HOSTILE, embedded, make_inputs, section, write_files

from biojepa.contracts import STRATA_COLUMNS, TRUST_COLUMNS
from biojepa.errors import InputError
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.evaluation.trust import cross_fit, judge_trust
from biojepa.report import ReportInputs, build_report
from biojepa.report.read import read_report
from biojepa.report.strata import strata_view
from biojepa.report.trust import quantile_bins, trust_view

METRICS = ("pearson_delta_perturbed_mean", "rank_l2")


def made_strata() -> pd.DataFrame:
    """Two properties in two and three strata, and categories, which the section leaves to another one."""
    rows = []
    parts = [("category", "single", np.nan, np.nan, 16)]
    parts += [("n_cells", "low", 20, 60, 8), ("n_cells", "high", 61, 200, 8)]
    parts += [("baseline_gap", "low", -0.5, 0.1, 7), ("baseline_gap", "high", 0.2, 1.4, 7),
              ("baseline_gap", "missing", np.nan, np.nan, 2)]  # fmt: skip
    for metric in METRICS:
        for place, (prop, stratum, low, high, n) in enumerate(parts):
            for model, mean in (("biojepa", 0.5), ("multihot", 0.3), ("knn", 0.2), ("duplicate", 0.8)):
                mean += 0.01 * place
                gain = (np.nan, np.nan, np.nan) if model == "multihot" else (0.2, 0.05 * (3 - place), 0.4)
                gain = (-0.2, -0.3, -0.1) if stratum == "missing" and model == "biojepa" else gain
                row = (
                    prop,
                    stratum,
                    low,
                    high,
                    model,
                    metric,
                    n,
                    mean,
                    mean - 0.1,
                    mean + 0.2,
                    0.6,
                    0.5,
                    0.7,
                )
                rows.append((*row, "multihot", *gain))
    return pd.DataFrame(rows, columns=list(STRATA_COLUMNS))


def made_trust(n=24, relation=0.6) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    similarity = rng.uniform(0, 1, n)
    table = pd.DataFrame(
        {
            "perturbation": [HOSTILE, *[f"P{place}" for place in range(n - 1)]],
            "category": np.where(np.arange(n) % 2, "combo_seen1", "single"), "n_genes_seen": np.arange(n) % 2,
            "nearest_training_gene": "<i>A</i>", "nearest_similarity": similarity, "prior_coverage": 1.0,
            "predicted_effect": rng.gamma(2, 1, n),
            "observed": 0.3 + relation * (similarity - 0.5) + rng.normal(0, 0.1, n),
        }
    )  # fmt: skip
    return cross_fit(table.reindex(columns=list(TRUST_COLUMNS)))


def with_sections(table: pd.DataFrame | None = None) -> ReportInputs:
    base = make_inputs()
    table = made_trust() if table is None else table
    judged = judge_trust(table, EvaluationSettings(draws=300))
    return replace(base, strata=made_strata(), trust=table, verdict={**base.verdict, "trust": judged})


@pytest.fixture(scope="module")
def inputs() -> ReportInputs:
    return with_sections()


@pytest.fixture(scope="module")
def page(inputs: ReportInputs) -> str:
    return build_report(inputs)


def test_a_folder_without_the_tables_has_no_such_sections() -> None:
    page = build_report(make_inputs())
    assert 'id="strata"' not in page and 'id="trust"' not in page
    with pytest.raises(InputError, match=r"table strata.*also gap_closed"):
        replace(make_inputs(), strata=made_strata().drop(columns="gap_closed"))


def test_strata_are_drawn_and_listed_with_the_numbers_of_the_table(inputs: ReportInputs, page: str) -> None:
    options = dict(embedded(page)["figures"]["strata"]["options"])
    assert list(options) == [
        "Cells: Pearson Δ ↑", "Gap closed by the best baseline: Pearson Δ ↑",
        "Cells: Rank, L2 ↑", "Gap closed by the best baseline: Rank, L2 ↑",
    ]  # fmt: skip
    drawn = options["Gap closed by the best baseline: Pearson Δ ↑"]
    assert drawn["layout"]["xaxis"]["ticktext"] == [
        "low<br>−0.5 to 0.1<br>n = 7", "high<br>0.2 to 1.4<br>n = 7", "missing<br>not known<br>n = 2",
    ]  # fmt: skip
    model, baseline, duplicate = drawn["data"]
    assert model["y"] == pytest.approx([0.53, 0.54, 0.55])
    assert model["error_y"]["array"] == pytest.approx([0.2] * 3)
    assert model["error_y"]["arrayminus"] == pytest.approx([0.1] * 3)
    assert baseline["name"] == "Multi-hot ridge (best baseline)" and duplicate["y"][0] == pytest.approx(0.83)
    assert [round(x) for x in model["x"]] == [0, 1, 2] and model["x"][0] < baseline["x"][0] < duplicate["x"][
        0
    ]
    text = section(page, "strata")
    assert "<td>20 to 60</td><td>8</td>" in text
    assert '<span class="v">0.510</span><span class="ci">0.410 to 0.710</span>' in text
    rows = [row for _, _, part in strata_view(inputs)["tables"][0]["groups"] for row in part]
    assert [row.outcome for row in rows] == ["better than", "better than", "", "", "worse than"]
    assert "number of cells" not in text and "share of prior sources that cover it" in text
    assert "single, gene never perturbed" not in text


def test_the_calibration_figure_draws_the_table(inputs: ReportInputs, page: str) -> None:
    table = inputs.trust
    spec = embedded(page)["figures"]["trust"]["options"][0][1]
    go.Figure(json.loads(re.sub(r'"@\w+"', '"#000000"', json.dumps(spec))))
    seen, unseen = (
        next(t for t in spec["data"] if t.get("name", "").startswith(name)) for name in ("a gene", "no")
    )
    for trace, rows in (
        (seen, table[table["n_genes_seen"] > 0]),
        (unseen, table[table["n_genes_seen"] == 0]),
    ):
        assert trace["x"] == pytest.approx(rows["expected"].tolist(), abs=1e-3)
        assert trace["y"] == pytest.approx(rows["observed"].tolist(), abs=1e-3)
    names = [data[0] for data in unseen["customdata"]]
    assert names[0] == html.escape(HOSTILE) and "<i>" not in json.dumps(spec["data"])
    bars = spec["data"][1]["error_y"]
    assert bars["array"] == pytest.approx((table["high"] - table["expected"]).tolist(), abs=1e-3)
    means = spec["data"][-1]
    assert len(means["x"]) == 3 and means["customdata"] == ["8", "8", "8"]
    text = section(page, "trust")
    assert html.escape(inputs.verdict["trust"]["sentence"], quote=False) in text
    assert f"{inputs.verdict['trust']['mae']:.3f}" in text
    assert "carry the accuracy that this fit expects of them" in text


def test_bins_hold_equal_shares_by_expected_accuracy() -> None:
    table = pd.DataFrame(
        {"perturbation": [f"P{i:02d}" for i in range(20)], "expected": np.arange(20)[::-1] / 20}
    )
    table["observed"] = table["expected"] ** 2
    bins = quantile_bins(table, 0.95)
    low, high = np.arange(10) / 20, np.arange(10, 20) / 20
    assert bins["n"].tolist() == [10, 10]
    assert bins["expected"].tolist() == pytest.approx([low.mean(), high.mean()])
    assert bins["observed"].tolist() == pytest.approx([(low**2).mean(), (high**2).mean()])
    spread = 1.96 * (high**2).std() / np.sqrt(10)
    assert bins["high"][1] - bins["observed"][1] == pytest.approx(spread, rel=0.3)
    narrow = quantile_bins(table, 0.5)
    # A normal interval of 50 % is 0.674 standard errors, one of 95 % 1.96.
    assert (narrow["high"] - narrow["low"]).tolist() == pytest.approx(
        (0.344 * (bins["high"] - bins["low"])).tolist(), rel=0.25
    )
    assert quantile_bins(table.head(15), 0.95).empty


def test_without_skill_the_page_says_what_predict_does() -> None:
    table = made_trust(relation=0.0)
    text = section(build_report(with_sections(table)), "trust")
    assert "does not tell good from bad predictions" in text
    assert "carry no more than the mean of their kind" in text


def test_too_few_perturbations_leave_a_sentence_and_no_figure() -> None:
    table = made_trust().head(5).assign(expected=np.nan, low=np.nan, high=np.nan, guess=np.nan)
    view = trust_view(with_sections(table))
    assert view["figures"] == [] and view["facts"] == []
    assert "5 held-out perturbations are too few" in view["sentence"]
    build_report(with_sections(table))


def test_the_tables_are_read_and_linked(tmp_path: Path, inputs: ReportInputs) -> None:
    files = write_files(tmp_path, inputs)
    for name in ("strata", "trust"):
        getattr(inputs, name).to_csv(tmp_path / f"{name}.tsv", sep="\t", index=False)
    files = replace(files, strata=tmp_path / "strata.tsv", trust=tmp_path / "trust.tsv")
    found = read_report(files, "d", "perturbation", page=tmp_path / "sub" / "report.html")
    assert len(found.strata) == len(inputs.strata) and len(found.trust) == len(inputs.trust)
    assert {item["href"] for item in found.downloads} >= {"../strata.tsv", "../trust.tsv"}
