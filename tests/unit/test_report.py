"""A report shows the numbers of its tables, opens offline, and shows names as they are."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from biojepa import contracts
from biojepa.errors import InputError
from biojepa.evaluation.metrics import all_metrics
from biojepa.report import IndexEntry, Profile, ReportInputs, build_index, build_report, figures, tables
from biojepa.report.explorer import explorer_data
from biojepa.report.figures_quality import on_target_points
from biojepa.report.figures_training import thin_cells
from biojepa.report.glossary import METRIC_ORDER, metric_text, model_text
from biojepa.report.page import LIMIT_BYTES, embedded_json
from biojepa.report.read import ReportFiles, Run, read_report
from biojepa.report.static import calibration_svg, scatter_svg

HOSTILE = "<b>x</b>"
HOSTILE_GENE = "</script>"
QUALITY = {
    "duplicate": 0.82, "interpolated_duplicate": 0.84, "oracle": 0.78, "biojepa": 0.63,
    "untrained_predictor": 0.41, "pca_predictor": 0.52,
    "multihot": 0.58, "additive": 0.35, "linear": 0.31, "knn": 0.22, "no_change": 0.17,
    "mean": 0.0, "shuffled_labels": 0.02, "my_model": 0.28,
}  # fmt: skip
WHOLE_MODEL_METRICS = ("effect_slope", "spread_ratio")
CATEGORIES = ("combo_seen2", "combo_seen1", "combo_seen0", "single_in_combo", "single")


def _score(metric: str, quality: np.ndarray | float) -> np.ndarray | float:
    """Turn a quality between 0 and 1 into a plausible value of a metric."""
    return {
        "rank_l2": 0.5 + 0.5 * quality,
        "rank_cosine": 0.5 + 0.45 * quality,
        "additive_l2_difference": 1.2 - 2 * quality,
        "l2_top1000": 5 - 3 * quality,
        "mse": 0.05 - 0.03 * quality,
        "pearson_delta_control": 0.6 + 0.3 * quality,
        "crps": 0.2 - 0.1 * quality,
    }.get(metric, quality)


def make_metrics(rng: np.random.Generator, names: list[str], categories: list[str]) -> pd.DataFrame:
    """Return a metrics table of all models and registered metrics, two folds."""
    hardness = rng.normal(0, 0.14, len(names)) - 0.12 * np.array([c == "single" for c in categories])
    rows = []
    for model, quality in QUALITY.items():
        for metric in all_metrics():
            if metric in WHOLE_MODEL_METRICS:
                rows += [(model, fold, 0, "*", "all", metric, quality) for fold in (0, 1)]
                continue
            noise = 0.0 if model == "mean" and "delta" in metric else 1.0
            values = _score(
                metric, np.clip(quality + noise * (hardness + rng.normal(0, 0.07, len(names))), -1, 1)
            )
            rows += [
                (model, i % 2, 0, name, category, metric, value)
                for i, (name, category, value) in enumerate(zip(names, categories, values, strict=True))
            ]
    return pd.DataFrame(rows, columns=list(contracts.METRICS_COLUMNS))


def make_summary(metrics: pd.DataFrame) -> pd.DataFrame:
    """Pool the metrics with a normal interval: close enough to a bootstrap for a picture."""
    rows = []
    categories = ["all", *sorted(set(metrics["category"]) - {"all"})]
    for category in categories:
        inside = metrics if category == "all" else metrics[metrics["category"] == category]
        for metric, block in inside.groupby("metric", sort=False):
            by_model = block.groupby("model", sort=False)["value"]
            mean, n = by_model.mean(), by_model.size()
            half = 1.96 * by_model.std().fillna(0) / np.sqrt(n)
            simple = [
                name
                for name in ("multihot", "additive", "linear", "knn", "no_change", "mean")
                if name in mean
            ]
            best = min(simple, key=lambda name: metric_text(metric).loss(mean[name]))
            gap = (mean - mean["mean"]) / (mean["duplicate"] - mean["mean"])
            for model in mean.index:
                p = np.nan if model == best else 0.001 if abs(mean[model] - mean[best]) > 0.04 else 0.4
                rows.append(
                    (model, category, metric, n[model], mean[model], mean[model] - half[model],
                     mean[model] + half[model], gap[model], gap[model] - 0.1, gap[model] + 0.1, best,
                     p, np.nan if model in contracts.POSITIVE_CONTROLS else p, 0.7, 0.3)
                )  # fmt: skip
    return pd.DataFrame(rows, columns=list(contracts.SUMMARY_COLUMNS))


def make_enrichment(rng: np.random.Generator, names: list[str], categories: list[str]) -> pd.DataFrame:
    """Return enrichment scores of twelve gene sets for three models."""
    rows = []
    for name, category in zip(names, categories, strict=True):
        truth = rng.choice([-1, 1], 12) * rng.uniform(0.8, 2.6, 12)
        for model in ("biojepa", "multihot", "duplicate", "mean"):
            said = QUALITY[model] * truth + rng.normal(0, 0.5, 12)
            rows += [
                (model, 0, 0, name, category, f"SET_{k} interferon & response <{k}>", said[k], truth[k],
                 0.01 if abs(truth[k]) > 1.7 else 0.4)
                for k in range(12)
            ]  # fmt: skip
    columns = (
        "model",
        "fold",
        "seed",
        "perturbation",
        "category",
        "gene_set",
        "nes_pred",
        "nes_true",
        "fdr_true",
    )
    return pd.DataFrame(rows, columns=list(columns))


def make_perturbations(rng: np.random.Generator, names: list[str]) -> pd.DataFrame:
    """Return the table of perturbations, with combinations whose targets are joined by a semicolon."""
    n = len(names)
    double = ["+" in name for name in names]
    return pd.DataFrame(
        {
            "perturbation": names,
            "n_perturbed_genes": [2 if d else 1 for d in double],
            "n_cells": rng.integers(28, 220, n),
            "n_guides": 3,
            "guides": "g1;g2;g3",
            "target_measured": ["yes;no" if d else "yes" for d in double],
            "on_target_log2fc": [
                f"{rng.normal(-1.5, 0.7):.3f}" + (f";{rng.normal(-1, 0.5):.3f}" if d else "") for d in double
            ],
            "on_target_p": ["1e-6;0.02" if d else "1e-9" for d in double],
            "effect_size": rng.gamma(2, 0.4, n),
            "effect_p": 0.01,
            "effect_q": np.where(rng.uniform(size=n) < 0.7, 0.01, 0.4),
            "n_deg": rng.integers(0, 160, n),
            "flag": ["weak;one_guide" if k % 5 == 0 else None for k in range(n)],
        }
    )[list(contracts.PERTURBATION_TABLE_COLUMNS)]


def make_umap(rng: np.random.Generator, names: list[str], n: int = 2400) -> pd.DataFrame:
    """Return a map in which perturbations are overlapping clouds."""
    labels = rng.choice([contracts.CONTROL, *names], n)
    centre = {name: rng.normal(0, 2.2, 2) for name in [contracts.CONTROL, *names]}
    points = np.array([centre[label] for label in labels]) + rng.normal(0, 0.9, (n, 2))
    sets = {
        name: ("test" if k % 4 == 0 else "val" if k % 7 == 0 else "train") for k, name in enumerate(names)
    }
    return pd.DataFrame(
        {
            "cell": [f"cell{k}" for k in range(n)],
            "umap_1": points[:, 0],
            "umap_2": points[:, 1],
            "perturbation": labels,
            "set": [sets.get(label, "train") for label in labels],
            "batch": rng.choice(["b1", "b2", "b3"], n),
        }
    )


def make_history(rng: np.random.Generator) -> pd.DataFrame:
    """Return curves of two stages; the predictor has no collapse statistics."""
    step = np.arange(20, 620, 20)
    encoder = pd.DataFrame({
        "stage": "encoder", "step": step, "loss": 30 * np.exp(-step / 200) + rng.normal(0, 0.4, len(step)),
        "std_cells": 0.9 - 0.4 * np.exp(-step / 150), "rankme": 60 * (1 - np.exp(-step / 180)),
        "lidar": 12 * (1 - np.exp(-step / 250)), "val_loss": np.nan,
    })  # fmt: skip
    loss = 1.2 * np.exp(-step / 150) + 0.3
    predictor = pd.DataFrame({"stage": "predictor", "step": step, "loss": loss, "val_loss": loss + 0.1})
    return pd.concat([encoder, predictor], ignore_index=True)


def make_profiles(rng: np.random.Generator, names: list[str]) -> dict[str, Profile]:
    """Return predicted and observed changes over sixty genes, one of them with a hostile name."""
    genes = [HOSTILE_GENE, *[f"GENE{k}" for k in range(59)]]
    found = {}
    for k, name in enumerate(names):
        observed = np.sort(rng.laplace(0, 0.4, 60))[::-1]
        predicted = {
            model: (QUALITY[model] * observed + rng.normal(0, 0.12, 60)).tolist()
            for model in ("biojepa", "multihot", "duplicate")
        }
        found[name] = Profile(k % 2, genes, observed.tolist(), predicted)
    return found


def make_inputs(seed: int = 0) -> ReportInputs:
    """Return the inputs of a report on 30 perturbations, 14 models and two folds."""
    rng = np.random.default_rng(seed)
    singles = [HOSTILE, *[f"GENE{k}" for k in range(17)]]
    names = singles + [f"GENE{k}+GENE{k + 3}" for k in range(12)]
    categories = ["single" if k % 3 else "single_in_combo" for k in range(18)]
    categories += [CATEGORIES[k % 3] for k in range(12)]
    metrics = make_metrics(rng, names, categories)
    summary = make_summary(metrics)
    norms = pd.DataFrame(
        [(model, name, o, QUALITY[model] * o + rng.normal(0, 0.1)) for name, o in
         zip(names, rng.gamma(4, 0.6, len(names)), strict=True) for model in QUALITY],
        columns=["model", "perturbation", "observed", "predicted"],
    )  # fmt: skip
    usable = {name: name not in ("weighted_r2_delta", "mse") for name in all_metrics()}
    history = make_history(rng)
    return ReportInputs(
        dataset="demo <screen>",
        split="perturbation",
        metrics=metrics,
        summary=summary,
        enrichment=make_enrichment(rng, names, categories),
        verdict={
            "model": "biojepa",
            "outcome": "better than",
            "sentence": "On 30 held-out perturbations, biojepa is better than the best simple baseline "
            "(multihot): correlation of the change against the training perturbed mean 0.60 against 0.55, "
            "difference +0.05 (95% CI +0.01 to +0.09).",
            "details": [
                {"scope": "seen genes", "text": "On 18 of seen genes, biojepa is better …"},
                {"scope": "unseen genes", "text": "On 12 of unseen genes, this dataset cannot tell."},
            ],
            "usable": usable,
            "dynamic_range": {name: {"low": 0.6, "high": 0.9, "mean": 0.75} for name in usable},
            "rule": "interval of the paired difference",
        },
        splits=[
            {"fold": f, "scheme": "perturbation", "seed": 0, "sha256": f"{f}" * 64, "n_train": 18, "n_val": 4,
             "n_test": 15}
            for f in (0, 1)
        ],
        qc=pd.DataFrame(
            [("no_guide", "dominance, ≥ 5 UMIs", 10_000, 512, 9_488, ""),
             ("min_counts", "≥ 500 UMIs", 9_488, 40, 9_448, ""),
             ("max_pct_mito", "5 MADs", 9_448, 420, 9_028, "per batch"),
             ("doublets", "off", 9_028, 0, 9_028, "not run"),
             ("min_cells", "≥ 25 cells", 9_028, 128, 8_900, "2 perturbations: A, <i>B</i>")],
            columns=list(contracts.QC_COLUMNS),
        ),
        perturbations=make_perturbations(rng, names),
        umap=make_umap(rng, names),
        coverage=pd.DataFrame(
            [("A", 2, 1, 1, "coded"), (HOSTILE_GENE, 0, 0, 0, "average"), ("B", 1, 1, 0, "coded")] * 2
            + [("C", 1, 1, 0, "coded"), ("C", 0, 0, 0, "average")],
            columns=["gene", "n_sources", "string", "go", "consequence"],
        ),
        histories={f"biojepa fold{f} seed0": history.assign(loss=history["loss"] + f) for f in (0, 1)},
        train_metrics={
            f"biojepa fold{f} seed0": {"device": "cpu", "seconds": 41.2, "embedding": {"rankme": 55.1}}
            for f in (0, 1)
        },
        profiles=make_profiles(rng, names),
        norms=norms,
        provenance={"commit": "0123abc", "versions": {"torch": "2.13.0"}, "hardware": "2 CPU cores"},
        settings={"model": {"depth": 2}, "seed": 0},
        sentinels=[{"check": "split.tsv is the one that was frozen", "passed": True, "detail": "ok"},
                   {"check": "every prediction declares its set", "passed": False, "detail": "1 of 12"}],
        downloads=[{"label": "evaluate/metrics.tsv", "href": "evaluate/metrics.tsv"}],
    )  # fmt: skip


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


def test_own_scripts_hold_no_address_and_offer_no_upload() -> None:
    folder = Path(figures.__file__).parent
    for name in ("plots.js", "explorer.js", "theme.js"):
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
    kept = thin_cells(table, 500)["x"].to_numpy()
    assert (len(kept), kept[0], kept[-1]) == (500, 0, 99_999)
    assert np.ptp(np.diff(kept)) <= 1


def test_failed_sentinel_is_shouted_and_none_is_said(page: str) -> None:
    assert section(page, "leakage").count("✗ FAILED") == 1
    quiet = build_report(ReportInputs(**{**make_inputs().__dict__, "sentinels": []}))
    assert "No sentinel was recorded" in section(quiet, "leakage")


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
            "norman", "perturbation", inputs.summary, inputs.verdict, "norman/perturbation/report.html"
        ),
        IndexEntry("<b>mine</b>", "gene", other, {}, "mine/gene/report.html"),
    ]
    page = build_index(entries)
    score = inputs.pooled.set_index(["model", "metric"])["mean"]["biojepa", "rank_l2"]
    assert f"{score:.3f}" in page
    assert f"{score / 2:.3f}" in page
    assert "<b>mine</b>" not in page
    assert {a for a in Page(page).addresses if not a.startswith("#")} == {e.href for e in entries}
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
