"""A report shows the numbers of its tables, opens offline, and shows names as they are."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, unquote

import anndata
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from biojepa import contracts
from biojepa.errors import InputError
from biojepa.evaluation.metrics import all_metrics
from biojepa.evaluation.verdict import BETTER, CANNOT_TELL, NOT_EVALUATED, SAME, SUSPECTED, WORSE
from biojepa.models import ABLATION_MODELS
from biojepa.report import IndexEntry, Profile, ReportInputs, build_index, build_report, figures, read, tables
from biojepa.report.decision import decision_rows, verdict_view
from biojepa.report.explorer import explorer_data
from biojepa.report.figures_quality import on_target_points
from biojepa.report.figures_training import broken_at_restarts
from biojepa.report.glossary import METRIC_ORDER, metric_text, model_text
from biojepa.report.methods import file_groups, methods_text, run_times
from biojepa.report.page import LIMIT_BYTES, embedded_json
from biojepa.report.read import ReportFiles, Run, read_report
from biojepa.report.static import calibration_svg, scatter_svg
from report_case import HOSTILE, HOSTILE_GENE, make_inputs, make_umap


@pytest.fixture(scope="module")
def inputs() -> ReportInputs:
    return make_inputs()


@pytest.fixture(scope="module")
def page(inputs: ReportInputs) -> str:
    return build_report(inputs)


class Page(HTMLParser):
    """Collect what a browser would see: text of cells by row, addresses, captions, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.rows: dict[str, list[str]] = {}
        self._row: str | None = None
        self._in_value = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.addresses += [
            str(found[key]) for key in ("src", "href", "action", "data", "poster") if key in found
        ]
        if tag == "tr":
            self._row = found.get("data-model")
        if tag == "span" and found.get("class") == "v":
            self._in_value = True

    def handle_data(self, data: str) -> None:
        if self._in_value and self._row:
            self.rows.setdefault(self._row, []).append(data)
        self._in_value = False


def section(page: str, name: str) -> str:
    """Return the HTML of one section."""
    return page.split(f'<section id="{name}"', 1)[1].split("</section>", 1)[0]


def embedded(page: str) -> dict:
    """Return the data that the page's scripts read."""
    return json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.S).group(1))


def test_page_refers_to_nothing_outside_itself(page: str, inputs: ReportInputs) -> None:
    found = Page(page)
    assert [a for a in found.addresses if not a.startswith("#")] == [d["href"] for d in inputs.downloads]
    assert not {"link", "img", "iframe", "base", "object"} & set(found.tags)
    style = page.split("<style>", 1)[1].split("</style>", 1)[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page


def test_quality_control_is_linked_where_its_page_is(page: str, inputs: ReportInputs) -> None:
    found = Page(section(build_report(replace(inputs, qc_page="../../x/preprocess/qc.html")), "quality"))
    assert found.addresses == ["../../x/preprocess/qc.html"]
    assert Page(section(page, "quality")).addresses == []


def test_own_scripts_hold_no_address_and_offer_no_upload() -> None:
    folder = Path(figures.__file__).parent
    for name in ("plots.js", "explorer.js", "tables.js", "theme.js"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "http" not in text
        assert "innerHTML" not in text
    assert 'plotlyServerURL: ""' in (folder / "plots.js").read_text(encoding="utf-8")


def test_page_is_small_and_holds_plotly_once(page: str) -> None:
    assert len(page.encode()) < LIMIT_BYTES
    assert page.count("* plotly.js v") == 1


def test_names_that_look_like_markup_stay_text(page: str) -> None:
    outside = re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.S)
    assert HOSTILE not in outside
    assert "<i>B</i>" not in outside
    assert html.escape("demo <screen>") in outside
    data = embedded(page)
    assert HOSTILE in data["explorer"]["names"]
    assert HOSTILE_GENE in data["explorer"]["genes"]
    drawn = json.dumps(data["figures"], ensure_ascii=False)
    assert HOSTILE not in drawn
    assert "&lt;b&gt;x&lt;/b&gt;" in drawn


def test_embedded_json_cannot_end_its_element() -> None:
    content = {"</script><script>alert(1)</script>": "<!-- & \u2028"}
    text = str(embedded_json(content))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == content


def test_headline_table_shows_the_summary(page: str, inputs: ReportInputs) -> None:
    rows = Page(section(page, "summary")).rows
    pooled = inputs.pooled.set_index(["model", "metric"])["mean"]
    assert set(rows) == set(inputs.models)
    for model, shown in rows.items():
        expected = [f"{pooled[model, metric]:.3f}" for metric in inputs.headline_metrics]
        assert [value.replace("−", "-") for value in shown] == [
            v.replace("-0.000", "0.000") for v in expected
        ]


def test_first_screen_says_verdict_and_marks_best_baseline(page: str, inputs: ReportInputs) -> None:
    first = section(page, "summary")
    assert inputs.verdict["sentence"] in html.unescape(first)
    assert "Better than the best baseline" in first
    row = first.split('data-model="multihot"', 1)[1].split("</tr>", 1)[0]
    assert row.count("◆") == len(inputs.headline_metrics)
    assert "◆" not in first.split('data-model="additive"', 1)[1].split("</tr>", 1)[0]


def test_unusable_metric_is_marked_and_unknown_one_is_not(page: str, inputs: ReportInputs) -> None:
    calibration = section(page, "calibration")
    assert calibration.count("unusable here") == 1
    assert "<code>weighted_r2_delta</code>" in calibration
    assert inputs.usable("a metric nobody judged")


def test_missing_scores_are_dashes_and_never_nan() -> None:
    full = make_inputs()
    broken = full.summary.copy()
    hit = (broken["model"] == "biojepa") & (broken["metric"] == "rank_l2")
    broken.loc[hit, ["mean", "ci_low", "ci_high", "gap_closed"]] = np.nan
    inputs = ReportInputs(**{**full.__dict__, "summary": broken})
    page = build_report(inputs)
    assert Page(section(page, "summary")).rows["biojepa"][inputs.headline_metrics.index("rank_l2")] == "–"
    visible = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S)
    assert not re.search(r"\bnan\b", visible, re.I)
    assert "NaN" not in json.dumps(embedded(page))


def test_best_is_sought_without_positive_controls(inputs: ReportInputs) -> None:
    table = tables.score_table(inputs, ["pearson_delta_perturbed_mean", "mse"])
    marked = [[row.model.name for row in table.rows if row.cells[k].is_best] for k in (0, 1)]
    rows = inputs.pooled[~inputs.pooled["model"].isin(contracts.POSITIVE_CONTROLS)].set_index("model")
    highest = rows.loc[rows["metric"] == "pearson_delta_perturbed_mean", "mean"].idxmax()
    lowest = rows.loc[rows["metric"] == "mse", "mean"].idxmin()
    assert marked == [[highest], [lowest]]


@pytest.mark.parametrize(
    ("mean", "q", "mark"), [(0.9, 0.01, "better"), (0.1, 0.01, "worse"), (0.9, 0.2, ""), (0.9, np.nan, "")]
)
def test_marks_need_a_significant_difference_and_follow_its_sign(mean: float, q: float, mark: str) -> None:
    full = make_inputs()
    summary = full.summary.copy()
    hit = (summary["model"] == "biojepa") & (summary["metric"] == "rank_l2")
    summary.loc[hit, ["mean", "q_vs_best_baseline"]] = [mean, q]
    column = tables.MetricColumn.of(ReportInputs(**{**full.__dict__, "summary": summary}), "rank_l2", "all")
    assert column.mark(model_text("biojepa")) == mark


def test_a_model_scored_on_few_perturbations_is_not_best_and_says_its_n() -> None:
    full = make_inputs()
    summary = full.summary.copy()
    hit = (summary["model"] == "additive") & (summary["metric"] == "rank_l2") & (summary["category"] == "all")
    summary.loc[hit, ["mean", "n"]] = [0.99, 4]
    column = tables.MetricColumn.of(ReportInputs(**{**full.__dict__, "summary": summary}), "rank_l2", "all")
    assert column.best == "biojepa"
    assert column.cell(model_text("additive")).n == "4"
    assert column.cell(model_text("biojepa")).n == ""


def test_metric_near_a_target_is_best_nearest_to_it() -> None:
    slope, coverage = metric_text("effect_slope"), metric_text("coverage_80")
    assert min((0.2, 0.9, 1.3), key=slope.loss) == 0.9
    assert min((0.5, 0.78, 0.99), key=coverage.loss) == 0.78
    assert (metric_text("mse").arrow, metric_text("rank_l2").arrow, slope.arrow) == ("↓", "↑", "→ 1")


def test_every_registered_metric_has_its_own_words() -> None:
    assert set(all_metrics()) <= set(METRIC_ORDER)
    labels = [metric_text(name).label for name in all_metrics()]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.61249, "0.612"), (-0.0001, "0.000"), (-0.5, "−0.500"), (np.nan, "–"), (None, "–"),
     (1234.5, "1,234.5"),
     (np.inf, "∞")],
)  # fmt: skip
def test_numbers_are_printed_one_way(value: float | None, text: str) -> None:
    assert tables.format_number(value) == text


def test_small_columns_keep_three_digits() -> None:
    assert tables.decimals(pd.Series([0.0213, 0.004, np.nan])) == 4
    assert tables.decimals(pd.Series([0.8, 0.0001])) == 3
    assert (tables.format_percent(1.004), tables.format_percent(-0.002)) == ("100\u202f%", "0\u202f%")


def test_every_figure_is_valid_plotly_and_fully_captioned(page: str) -> None:
    data = embedded(page)["figures"]
    assert len(data) >= 15
    for key, figure in data.items():
        for _, spec in figure["options"]:
            # Tokens such as @main are colours only after the page has replaced them.
            go.Figure(json.loads(re.sub(r'"@\w+"', '"#000000"', json.dumps(spec))))
        block = page.split(f'id="fig-{key}"', 1)[1].split("</figure>", 1)[0]
        for part in ("shows", "how", "n", "thresholds"):
            assert re.search(rf'<span class="{part}">[^<]{{3,}}</span>', block), (key, part)
        if not key.startswith("calibration"):
            assert '<span class="misleads">' in block, key


def test_every_colour_token_is_defined_in_both_themes(page: str) -> None:
    used = set(re.findall(r'"@(\w+)"', json.dumps(embedded(page)["figures"])))
    style = (Path(figures.__file__).parent / "style.css").read_text(encoding="utf-8")
    light, dark = style.split(':root[data-theme="dark"]', 1)[0], style.split(':root[data-theme="dark"]', 1)[1]
    dark = dark.split("}", 1)[0]
    assert used
    assert not {name for name in used if f"--{name}:" not in light or f"--{name}:" not in dark}


def test_error_bars_reach_from_the_value_to_the_bounds_and_are_missing_where_these_are() -> None:
    table = pd.DataFrame({"at": [0.5, 0.25, 1.0], "low": [0.375, np.nan, -1.0], "high": [1.5, np.nan, 1.0]})
    bars = figures.error_bars(table["at"], table["low"], list(table["high"]), {"color": "@ink"})
    assert (bars["array"], bars["arrayminus"]) == ([1.0, None, 0.0], [0.125, None, 2.0])
    assert bars["symmetric"] is False and bars["color"] == "@ink"


def test_calibration_panel_draws_the_summary(inputs: ReportInputs) -> None:
    panel = figures.calibration_figures(inputs)[0].spec
    pooled = inputs.pooled[inputs.pooled["metric"] == inputs.headline_metrics[0]].set_index("model")
    drawn = {
        label: (x, x + up)
        for trace in panel["data"]
        for label, x, up in zip(trace["y"], trace["x"], trace["error_x"]["array"], strict=True)
    }
    row = pooled.loc["biojepa"]
    assert drawn["BioJEPA"] == pytest.approx((row["mean"], row["ci_high"]), abs=1e-4)
    band = next(shape for shape in panel["layout"]["shapes"] if shape["type"] == "rect")
    assert (band["x0"], band["x1"]) == pytest.approx(
        (pooled.loc["mean", "mean"], pooled.loc["duplicate", "mean"]), abs=1e-4
    )


def test_explorer_averages_folds_and_seeds(inputs: ReportInputs) -> None:
    twice = pd.concat([inputs.metrics, inputs.metrics.assign(seed=1, value=inputs.metrics["value"] + 0.2)])
    data = explorer_data(ReportInputs(**{**inputs.__dict__, "metrics": twice}))
    rows = inputs.metrics[(inputs.metrics["model"] == "knn") & (inputs.metrics["metric"] == "rank_l2")]
    expected = rows.set_index("perturbation")["value"].loc[data["names"]] + 0.1
    assert data["scores"]["rank_l2"]["knn"] == pytest.approx(expected.tolist(), abs=1e-3)


def test_explorer_of_a_large_screen_keeps_main_models_only(
    inputs: ReportInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("biojepa.report.explorer.MAX_SCORES", 1000)
    data = explorer_data(inputs)
    kept = {model["name"] for model in data["models"]}
    assert data["reduced"]
    assert {"biojepa", "multihot", "duplicate"} <= kept < set(inputs.models)


def test_on_target_table_splits_combinations() -> None:
    table = pd.DataFrame(
        {
            "perturbation": ["A+B", "C", "D"],
            "on_target_log2fc": ["-1.5;", -0.2, None],
            "on_target_p": ["0.01;", 0.5, None],
        }
    )
    points = on_target_points(table)
    assert points[["gene", "log2fc", "p"]].to_numpy().tolist() == [["A", -1.5, 0.01], ["C", -0.2, 0.5]]


def test_map_of_many_cells_is_thinned_evenly() -> None:
    table = pd.DataFrame({"x": np.arange(100_000)})
    kept = figures.evenly(table, 500)["x"].to_numpy()
    assert (len(kept), kept[0], kept[-1]) == (500, 0, 99_999)
    assert np.ptp(np.diff(kept)) <= 1


def test_failed_sentinel_is_shouted_and_none_is_said(page: str) -> None:
    assert section(page, "leakage").count("✗ FAILED") == 1
    quiet = build_report(ReportInputs(**{**make_inputs().__dict__, "sentinels": []}))
    assert "No sentinel was recorded" in section(quiet, "leakage")


def test_a_suspected_leak_stands_on_the_first_screen_and_checks_tell_their_kind() -> None:
    inputs = make_inputs()
    sign = {"check": "source <b>esm</b> looks like", "passed": False, "detail": "", "kind": "statistical"}
    silent = {"check": "not declared", "passed": None, "detail": "mine", "kind": "exact"}
    passed = {"check": "frozen", "passed": True, "detail": "ok", "kind": "exact"}
    verdict = {**inputs.verdict, "outcome": SUSPECTED}
    page = build_report(replace(inputs, verdict=verdict, sentinels=[sign, silent, passed]))
    first, checks = section(page, "summary"), section(page, "leakage")
    assert "A leak is suspected" in first
    assert "1 of 3 <a" in first
    assert "source &lt;b&gt;esm&lt;/b&gt; looks like" in first
    assert "Do not quote any score of this page" in first
    assert "1 passed, 1 failed, 1 could not be made" in checks
    assert (checks.count("✗ FAILED"), checks.count("✓ passed"), checks.count("– not told")) == (1, 1, 1)
    assert (checks.count("<td>statistical</td>"), checks.count("<td>exact</td>")) == (1, 2)
    clean = section(build_report(replace(inputs, sentinels=[silent, passed])), "summary")
    assert "leakage checks</a> failed" not in clean


def test_split_checksums_and_download_links_are_printed(page: str, inputs: ReportInputs) -> None:
    methods = section(page, "methods")
    assert all(item["sha256"] in methods for item in inputs.splits)
    assert 'href="evaluate/metrics.tsv"' in methods


def test_coverage_counts_genes_that_a_source_covers_in_every_fold(page: str, inputs: ReportInputs) -> None:
    sources, uncovered = tables.coverage_of_sources(inputs.coverage)
    assert sources == [("string", "2 of 4"), ("go", "1 of 4")]
    assert uncovered == sorted([HOSTILE_GENE, "C"])
    quality = section(page, "quality")
    assert "<td>string</td><td>2 of 4</td>" in quality
    assert f"Covered by no source: {', '.join(html.escape(gene) for gene in uncovered)}." in quality
    assert tables.coverage_of_sources(None) == ([], [])


def test_a_report_of_a_dataset_without_priors_says_so() -> None:
    bare = pd.DataFrame([("A", 0, "average")], columns=["gene", "n_sources", "consequence"])
    page = build_report(ReportInputs(**{**make_inputs().__dict__, "coverage": bare}))
    assert "names no prior source" in section(page, "quality")
    with pytest.raises(InputError, match=r"table coverage.*n_sources"):
        ReportInputs(**{**make_inputs().__dict__, "coverage": bare[["gene"]]})


def test_report_without_optional_parts_still_builds() -> None:
    full = make_inputs()
    bare = ReportInputs(
        dataset="d", split="gene", metrics=full.metrics, summary=full.summary,
        enrichment=full.enrichment.iloc[:0],
        verdict={}, splits=[], qc=full.qc, perturbations=full.perturbations.iloc[:0],
    )  # fmt: skip
    page = build_report(bare)
    assert "No verdict was recorded" in page
    assert "No gene sets were scored" in page
    assert "No trained embedding was measured" in page


def test_equal_inputs_give_equal_bytes(page: str) -> None:
    again = make_inputs()
    assert build_report(again) == page
    assert calibration_svg(again) == calibration_svg(make_inputs())


def test_still_figures_are_self_contained_and_plain(inputs: ReportInputs) -> None:
    for text in (calibration_svg(inputs), scatter_svg(inputs)):
        assert "<image" not in text
        assert 'href="http' not in text
        assert text.count("<svg") == 1


def test_missing_column_is_named(inputs: ReportInputs) -> None:
    with pytest.raises(InputError, match=r"table summary.*also gap_closed.*Fix: rerun"):
        ReportInputs(**{**inputs.__dict__, "summary": inputs.summary.drop(columns="gap_closed")})
    with pytest.raises(InputError, match=r"rows of the pooled category 'all'"):
        ReportInputs(**{**inputs.__dict__, "summary": inputs.summary.query("category != 'all'")})


def test_index_compares_datasets_and_links_to_reports(inputs: ReportInputs) -> None:
    other = inputs.summary.assign(mean=inputs.summary["mean"] / 2)
    entries = [
        IndexEntry(
            "norman",
            "perturbation",
            inputs.summary,
            inputs.verdict,
            "norman/perturbation/report.html",
            qc_href="norman/preprocess/qc.html",
        ),
        IndexEntry("<b>mine</b>", "gene", other, {}, "mine/gene/report.html"),
    ]
    page = build_index(entries)
    score = inputs.pooled.set_index(["model", "metric"])["mean"]["biojepa", "rank_l2"]
    assert f"{score:.3f}" in page
    assert f"{score / 2:.3f}" in page
    assert "<b>mine</b>" not in page
    linked = {e.href for e in entries} | {"norman/preprocess/qc.html"}
    assert {a for a in Page(page).addresses if not a.startswith("#")} == linked
    assert "http:" not in page
    assert "https" not in page
    with pytest.raises(InputError, match="no report"):
        build_index([])


# --- reading from files -------------------------------------------------------------------------


def write_files(folder: Path, inputs: ReportInputs) -> ReportFiles:
    """Write the files of a run of two folds with different genes: the truth is 1, 2, 3 … per gene."""
    rng = np.random.default_rng(1)
    genes = ["AA", "B", HOSTILE_GENE, "NOISE"]
    truth_rows = pd.DataFrame(
        {"perturbation": ["AA", "B+C"], "fold": [0, 1]}, index=["AA|fold0", "B+C|fold1"]
    )
    # Fold 1 does not use the last gene.
    values = np.array([[3.0, 1.0, 2.0, 5.0], [1.0, 4.0, 1.0, np.nan]], dtype=np.float32)
    reference = {"fold0": np.ones(4), "fold1": np.array([1.0, 1.0, 1.0, np.nan])}
    anndata.AnnData(
        X=values, obs=truth_rows, var=pd.DataFrame(index=genes),
        uns={"perturbed_mean": reference, "control_mean": {k: v * 0 for k, v in reference.items()}},
    ).write_h5ad(folder / "observed.h5ad")  # fmt: skip
    runs, files = [], []
    for model, shrink in (("biojepa", 0.5), ("mean", 0.0)):
        for fold, name in ((0, "AA"), (1, "B+C")):
            row = 1 + shrink * (values[fold] - 1)
            keep = np.isfinite(row)
            order = rng.permutation(int(keep.sum()))
            table = pd.DataFrame(
                {"perturbation": [name, "VAL"], "context": "all", "set": ["test", "val"], "n_cells": 40},
                index=["0", "1"],
            )
            predicted = np.vstack([row[keep], row[keep] * 9])[:, order]
            path = folder / f"{model}{fold}.h5ad"
            names = pd.DataFrame(index=np.array(genes)[keep][order])
            anndata.AnnData(X=predicted.astype(np.float32), obs=table, var=names).write_h5ad(path)
            runs.append(Run(model, fold, 0))
            files.append(path)
    inputs.metrics.to_csv(folder / "metrics.tsv", sep="\t", index=False)
    for name in ("summary", "enrichment", "qc", "perturbations"):
        getattr(inputs, name).to_csv(folder / f"{name}.tsv", sep="\t", index=False)
    (folder / "verdict.json").write_text(json.dumps(inputs.verdict))
    (folder / "split.json").write_text(json.dumps({"fold": 0, "sha256": "ab", "n_test": 2}))
    (folder / "train.json").write_text(json.dumps({"device": "cpu"}))
    inputs.histories["biojepa fold0 seed0"].to_csv(folder / "history.tsv", sep="\t", index=False)
    return ReportFiles(
        metrics=folder / "metrics.tsv", summary=folder / "summary.tsv", enrichment=folder / "enrichment.tsv",
        verdict=folder / "verdict.json", observed=folder / "observed.h5ad", splits=[folder / "split.json"],
        qc=folder / "qc.tsv", perturbations=folder / "perturbations.tsv", predictions=files,
        prediction_runs=runs, histories=[folder / "history.tsv"], train_metrics=[folder / "train.json"],
        history_runs=[Run("biojepa", 0, 0)],
    )  # fmt: skip


def test_profiles_and_effect_sizes_come_from_the_files(tmp_path: Path, inputs: ReportInputs) -> None:
    found = read_report(
        write_files(tmp_path, inputs), "d", "perturbation", page=tmp_path / "sub" / "report.html"
    )
    profile = found.profiles["AA"]
    assert profile.genes == ["NOISE", "AA", HOSTILE_GENE, "B"]
    assert profile.observed == pytest.approx([4, 2, 1, 0])
    assert profile.predicted["biojepa"] == pytest.approx([2, 1, 0.5, 0])
    assert "NOISE" not in found.profiles["B+C"].genes
    norms = found.norms.set_index(["model", "perturbation"])
    assert norms.loc[("biojepa", "AA"), "observed"] == pytest.approx(np.sqrt(4**2 + 2**2 + 1))
    assert norms.loc[("biojepa", "AA"), "predicted"] == pytest.approx(np.sqrt(4**2 + 2**2 + 1) / 2)
    assert norms.loc[("mean", "B+C"), "predicted"] == pytest.approx(0)
    assert {item["href"] for item in found.downloads} >= {"../metrics.tsv", "../observed.h5ad"}
    assert found.train_metrics == {"biojepa fold0 seed0": {"device": "cpu"}}
    build_report(found)


def test_report_notices_scores_of_perturbations_that_were_not_held_out(
    tmp_path: Path, inputs: ReportInputs
) -> None:
    found = read_report(write_files(tmp_path, inputs), "d", "perturbation")
    check = next(item for item in found.sentinels if item["check"].startswith("only perturbations held out"))
    assert not check["passed"]
    assert "not held out" in check["detail"]


def test_predictions_of_unknown_genes_are_refused(tmp_path: Path, inputs: ReportInputs) -> None:
    files = write_files(tmp_path, inputs)
    bad = anndata.read_h5ad(files.predictions[0])
    bad.var_names = ["AA", "B", "STRANGER", "NOISE"]
    bad.write_h5ad(files.predictions[0])
    with pytest.raises(InputError, match=r"biojepa0\.h5ad.*unknown to the truth.*STRANGER"):
        read_report(files, "d", "perturbation")


def test_large_screens_keep_few_profiles_and_few_genes(
    tmp_path: Path, inputs: ReportInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_files(tmp_path, inputs)
    # Room for one perturbation of two genes, under two models (biojepa and the best baseline that was run).
    monkeypatch.setattr("biojepa.report.read.MIN_PROFILE_GENES", 2)
    monkeypatch.setattr("biojepa.report.read.PROFILE_BUDGET", 2 * 5)
    found = read_report(files, "d", "perturbation").profiles
    assert {name: profile.genes for name, profile in found.items()} == {"AA": ["NOISE", "AA"]}


def test_files_and_runs_must_match(tmp_path: Path, inputs: ReportInputs) -> None:
    files = write_files(tmp_path, inputs)
    with pytest.raises(InputError, match="4 files and 1 runs"):
        ReportFiles(**{**files.__dict__, "prediction_runs": files.prediction_runs[:1]})


def test_a_shut_gate_is_said_beside_the_verdict(inputs: ReportInputs) -> None:
    def shown(*weights: float) -> str:
        runs = {
            f"{inputs.main_model} fold{fold} seed0": {
                "latent_weight": weight,
                "linear_weights": {"gene": 1.0},
            }
            for fold, weight in enumerate(weights)
        }
        other = {"pca_predictor fold0 seed0": {"latent_weight": 1.0, "linear_weights": {}}}
        return build_report(replace(inputs, train_metrics={**runs, **other}))

    assert "opened the gate of the latent predictor in 1 of 3 trainings. Where it is shut" in shown(0, 0.4, 0)
    assert "in 1 of 1 training." in shown(0.4)
    assert "Where it is shut" not in shown(0.4)
    assert "gate of the latent predictor" not in build_report(replace(inputs, train_metrics={}))


# --- first screen, methods, size ----------------------------------------------------------------


def test_the_model_stands_beside_the_best_baseline_and_both_ends_of_the_scale(inputs: ReportInputs) -> None:
    rows = {row.metric.name: row for row in decision_rows(inputs)}
    assert list(rows) == inputs.headline_metrics
    pooled = inputs.pooled.set_index(["model", "metric"])
    for name, row in rows.items():
        own, ends = pooled.loc[("biojepa", name)], pooled["mean"]
        best = own["best_baseline"]
        assert float(row.model.value.replace("−", "-")) == pytest.approx(own["mean"], abs=6e-4)
        assert row.baseline_model is not None
        assert row.baseline_model.name == best
        assert float(row.baseline.value.replace("−", "-")) == pytest.approx(ends[best, name], abs=6e-4)
        assert float(row.floor.replace("−", "-")) == pytest.approx(ends["mean", name], abs=6e-4)
        assert float(row.ceiling) == pytest.approx(ends["duplicate", name], abs=6e-4)
        assert row.gap_interval == " to ".join(
            tables.format_percent(own[end]) for end in ("gap_ci_low", "gap_ci_high")
        )
        assert (row.win, row.harm) == ("70\u202f%", "30\u202f%")
        assert row.usable is (name != "weighted_r2_delta")


@pytest.mark.parametrize(
    ("outcome", "words"),
    [(BETTER, "BioJEPA says more"), (SAME, "Nothing here speaks for BioJEPA over Prior ridge"),
     (WORSE, "Do not use BioJEPA"), (CANNOT_TELL, "Do not conclude"), (NOT_EVALUATED, "Nothing is known")],
)  # fmt: skip
def test_each_outcome_says_what_it_means_for_the_reader(
    inputs: ReportInputs, outcome: str, words: str
) -> None:
    first = {"best_baseline": "ridge", "score": 0.5, "baseline_score": 0.4, "gap_closed": None}
    detail = {"scope": "all", "text": "t", "n": 30, "outcome": outcome, "comparisons": [first]}
    verdict = {**inputs.verdict, "outcome": outcome, "details": [detail]}
    view = verdict_view(replace(inputs, verdict=verdict))
    assert words in view["advice"]
    assert view["details"] == []
    assert verdict_view(replace(inputs, verdict={}))["advice"] == ""


def test_a_group_of_perturbations_is_judged_in_half_a_line(inputs: ReportInputs) -> None:
    compared = {"best_baseline": "no_change", "score": 0.341, "baseline_score": 0.369, "gap_closed": 0.47}
    detail = {"scope": "unseen genes", "text": "a long sentence", "n": 12, "outcome": SAME,
              "comparisons": [compared]}  # fmt: skip
    view = verdict_view(replace(inputs, verdict={**inputs.verdict, "details": [detail]}))
    assert view["details"][0]["brief"] == (
        "indistinguishable from the best baseline (No change): 0.34 against 0.37, n = 12; "
        "47\u202f% of the gap closed"
    )
    without = {**detail, "comparisons": []}
    view = verdict_view(replace(inputs, verdict={**inputs.verdict, "details": [without]}))
    assert view["details"][0]["brief"] == "a long sentence"


def test_methods_for_a_paper_name_data_seeds_statistics_and_software(inputs: ReportInputs) -> None:
    settings = {"evaluate": {"confidence": 0.9, "draws": 750, "seed": 3, "baselines": ["mean", "multihot"]}}
    runs = {
        "biojepa fold0 seed0": {"seconds": 40.0, "device": "cpu (x86_64)", "torch_threads": 2},
        "biojepa fold1 seed0": {"seconds": 65.0, "device": "cpu (x86_64)", "torch_threads": 2},
        "pca_predictor fold0 seed0": {"seconds": 1e5, "device": "cuda"},
    }
    text = " ".join(methods_text(replace(inputs, settings=settings, train_metrics=runs)))
    for part in (
        "30 held-out perturbations of the dataset demo <screen>", "2 folds (seed 0)", "training seed 0",
        "Weighted R² (weighted_r2_delta) was not used", "90\u202f% intervals are percentiles of 750",
        "(seed 3)", "best of 2 simple baselines (Training mean, Multi-hot ridge)", "at commit 0123abc",
        "torch 2.13.0", "2 trainings of BioJEPA took 1.75 min in all on cpu (x86_64), 2 threads.",
    ):  # fmt: skip
        assert part in text, part
    page = build_report(replace(inputs, settings=settings, train_metrics=runs))
    shown = section(page, "methods").split('<p id="methods-text">', 1)[1].split("</p>", 1)[0]
    assert html.unescape(shown) == text
    assert "<screen>" not in shown


def test_run_times_are_those_that_the_trainings_wrote(inputs: ReportInputs) -> None:
    runs = {
        "pca fold0 seed0": {"seconds": 5.0, "peak_memory_mb": 300.0, "device": "cpu", "torch_threads": 1},
        "biojepa fold0 seed0": {"seconds": 7300.0, "peak_memory_mb": 512.4, "device": "cuda"},
        "biojepa fold1 seed0": {"seconds": 3500.0, "peak_memory_mb": None, "device": "cuda"},
        "old fold0 seed0": {"device": "cpu"},
    }
    first, second = run_times(replace(inputs, train_metrics=runs))
    assert first == {"model": "biojepa", "runs": 2, "device": "cuda", "total": "3 h", "longest": "2.03 h",
                     "memory": "512 MB"}  # fmt: skip
    assert (second["model"], second["total"], second["device"]) == ("pca", "5 s", "cpu, 1 thread")


def test_links_quote_names_and_hundreds_of_them_fold(tmp_path: Path, inputs: ReportInputs) -> None:
    folder = tmp_path / "50% of #2, à b"
    folder.mkdir()
    found = read_report(write_files(folder, inputs), "d", "s", page=tmp_path / "x" / "report.html")
    links = {item["label"]: unquote(item["href"]) for item in found.downloads}
    own = {label: path for label, path in links.items() if folder.name in path}
    assert len(own) >= 11
    assert all((tmp_path / "x" / path).resolve().is_file() for path in own.values())
    assert all(quote(unquote(item["href"])) == item["href"] for item in found.downloads)
    assert any("%23" in item["href"] for item in found.downloads)
    runs = [{"label": f"fold{k}/embed/predictions.h5ad", "href": "p"} for k in range(300)]
    groups = dict(file_groups([*found.downloads, *runs]))
    assert len(groups["Predictions of single runs"]) == 300
    assert "metrics.tsv" in {item["label"].rsplit("/", 1)[-1] for item in groups[""]}


def test_a_curve_that_starts_again_is_not_drawn_backwards() -> None:
    x, y = broken_at_restarts([10, 20, 10, 20], [1.0, 2.0, 3.0, None])
    assert x == [10, 20, None, 10, 20]
    assert y == [1.0, 2.0, None, 3.0, None]


def test_sections_are_numbered_as_they_stand(page: str, inputs: ReportInputs) -> None:
    numbers = [int(text) for text in re.findall(r'<h2><span class="no">(\d+)</span>', page)]
    assert numbers == list(range(2, 2 + len(numbers)))
    bar = page.split('aria-label="Sections"', 1)[1].split("</nav>", 1)[0]
    keys = re.findall(r'<section id="(\w+)"', page)
    assert re.findall(r'href="#(\w+)"', bar) == keys
    assert len(numbers) == len(keys) - 1


def test_many_ablations_are_left_out_of_the_panels_and_said(inputs: ReportInputs) -> None:
    few, note = figures.drawn_models(inputs, inputs.models)
    assert {model.name for model in few} == set(inputs.models)
    assert note == ""
    row = inputs.summary[inputs.summary["model"] == "pca_predictor"]
    names = [name for name in ABLATION_MODELS if name not in inputs.models][:9]
    more = pd.concat([inputs.summary, *(row.assign(model=name) for name in names)])
    crowded = replace(inputs, summary=more)
    kept, note = figures.drawn_models(crowded, crowded.models)
    ablations = [name for name in crowded.models if model_text(name).group == "ablation"]
    assert {model.name for model in kept} == set(crowded.models) - set(ablations)
    assert f"{len(ablations)} ablations" in note
    assert f"{len(ablations)} ablations" in figures.calibration_figures(crowded)[0].caption.n


def test_gene_sets_of_the_explorer_are_the_strongest_and_bounded(
    inputs: ReportInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = explorer_data(inputs)
    assert everything["nesModels"][:3] == ["duplicate", "biojepa", "multihot"]
    table = inputs.enrichment.set_index(["perturbation", "gene_set", "model"])
    for position, observed, _, said in everything["nes"][HOSTILE]:
        key = (HOSTILE, everything["sets"][position])
        assert observed == pytest.approx(table.loc[(*key, "biojepa"), "nes_true"], rel=5e-3)
        expected = [table.loc[(*key, model), "nes_pred"] for model in everything["nesModels"]]
        assert said == pytest.approx(expected, rel=5e-3)
    # Four models and three numbers of the truth: room for 10 perturbations of 5 sets.
    monkeypatch.setattr("biojepa.report.explorer.MAX_SET_SCORES", 10 * 5 * 7)
    bounded = explorer_data(inputs)["nes"]
    strength = inputs.enrichment.assign(size=inputs.enrichment["nes_true"].abs())
    strongest = strength.groupby("perturbation")["size"].max().nlargest(10).index
    assert set(bounded) == set(strongest)
    assert {len(rows) for rows in bounded.values()} == {5}


def test_a_page_of_two_thousand_perturbations_stays_small(inputs: ReportInputs) -> None:
    rng = np.random.default_rng(0)
    count, genes = 2000, [f"GENE{k}" for k in range(8000)]
    names = [f"GENE{k}+PARTNER{k + 3}" for k in range(count)]
    models = [name for name in inputs.models if name not in ("oracle", "my_model")]
    metrics = [name for name in all_metrics() if name not in ("effect_slope", "spread_ratio")]
    assert (len(models), len(metrics) >= 20) == (12, True)
    keys = pd.MultiIndex.from_product([models, metrics, names], names=["model", "metric", "perturbation"])
    scores = keys.to_frame(index=False).assign(
        fold=0, seed=0, category="single", value=rng.normal(size=len(keys))
    )[list(contracts.METRICS_COLUMNS)]
    single = inputs.perturbations.iloc[np.resize(np.arange(30), count)].assign(perturbation=names)
    keys = pd.MultiIndex.from_product([models, names], names=["model", "perturbation"])
    norms = keys.to_frame(index=False).assign(observed=rng.gamma(4, size=len(keys)), predicted=1.234567)
    scored = [models[models.index(name)] for name in ("biojepa", "multihot", "duplicate", "mean")]
    keys = pd.MultiIndex.from_product(
        [scored, names, [f"HALLMARK_PATHWAY_NUMBER_{k}" for k in range(50)]],
        names=["model", "perturbation", "gene_set"],
    )
    enrichment = keys.to_frame(index=False).assign(
        fold=0, seed=0, category="single", nes_pred=rng.normal(size=len(keys)),
        nes_true=np.tile(rng.normal(size=count * 50), 4), fdr_true=0.123456,
    )  # fmt: skip
    per_gene = 5  # position, observed, and three models
    limit = read.PROFILE_BUDGET // (count * per_gene)
    assert limit >= 12
    profiles = {
        name: Profile(0, rng.choice(genes, limit).tolist(), rng.laplace(size=limit).tolist(),
                      {model: rng.laplace(size=limit).tolist() for model in scored[:3]})
        for name in names
    }  # fmt: skip
    big = replace(
        inputs, metrics=scores, perturbations=single, norms=norms, enrichment=enrichment, profiles=profiles,
        summary=inputs.summary[inputs.summary["model"].isin(models)],
        umap=make_umap(rng, names, 50_000),
    )  # fmt: skip
    page = build_report(big)
    assert len(page.encode()) < 9_500_000 < LIMIT_BYTES
    data = embedded(page)["explorer"]
    assert len(data["names"]) == len(data["profiles"]) == count
    assert {model["name"] for model in data["models"]} >= {"biojepa", "multihot", "duplicate"}
    assert data["reduced"]
