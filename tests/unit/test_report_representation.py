"""Claims about what the report says of embeddings: planted numbers give the right table and sentence."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from plotly import graph_objects as go
from test_report import embedded, section

from biojepa.contracts import REPRESENTATION_COLUMNS
from biojepa.errors import InputError
from biojepa.evaluation.settings import EvaluationSettings
from biojepa.report import build_report
from biojepa.report.representation import (
    CHANCE,
    compare,
    representation_sentence,
    representation_view,
)
from report_case import HOSTILE, make_inputs

BASE = {"trained": 0.4, "trained_pooled": 0.35, "untrained": 0.2, "untrained_pooled": 0.15, "pca50": 0.3}
SETTINGS = EvaluationSettings(draws=300)


def planted(gain_over_pca=0.1, gain_over_untrained=0.2, noise=0.01, n=20, folds=2, seeds=1) -> pd.DataFrame:
    """Return measurements in which perturbations differ much, and embeddings by what is planted."""
    rng = np.random.default_rng(0)
    names = [HOSTILE, *[f"P{i}" for i in range(n - 1)]]
    level = {**BASE, "pca50": 0.4 - gain_over_pca, "untrained": 0.4 - gain_over_untrained}
    hard = rng.uniform(-0.3, 0.3, n)
    rows = []
    for seed in range(seeds):
        for place, name in enumerate(names):
            fold = place % folds
            for embedding, value in level.items():
                for kind, cells, chance in (
                    ("activity", "test and control", 0.1),
                    ("distinctiveness", "test", 0.05),
                ):
                    score = value + hard[place] + noise * rng.standard_normal()
                    metric = f"knn_map_{kind}"
                    rows.append(("biojepa", fold, seed, embedding, metric, cells, 900, name, score, chance))
        for fold in range(folds):
            for embedding, value in level.items():
                for metric, cells, chance in (
                    ("rankme", "test", np.nan),
                    ("probe_batch", "test and control", 0.5),
                    ("probe_depth", "test and control", 0.0),
                ):
                    whole = value + fold
                    rows.append(("biojepa", fold, seed, embedding, metric, cells, 900, "*", whole, chance))
    return pd.DataFrame(rows, columns=list(REPRESENTATION_COLUMNS))


def comparison(metric: str, table: pd.DataFrame):
    return {found.measure.name: found for found in compare(table, SETTINGS)}[metric]


def test_scores_are_means_over_perturbations_seeds_averaged_first():
    table = planted(seeds=2)
    found = comparison("knn_map_activity", table)
    rows = table[table["metric"] == "knn_map_activity"]
    means = rows.groupby(["embedding", "perturbation"])["value"].mean().groupby("embedding").mean()
    for embedding in BASE:
        assert found.scores[embedding].mean == pytest.approx(means[embedding])
        assert found.scores[embedding].low < means[embedding] < found.scores[embedding].high
    assert found.scores[CHANCE].mean == pytest.approx(0.1)
    assert found.n == 20
    gain = found.gains["pca50"]
    assert gain.mean == pytest.approx(means["trained"] - means["pca50"])
    # Paired: the perturbations differ by 0.6, the embeddings of one by next to nothing.
    assert gain.high - gain.low < 0.03 < found.scores["trained"].high - found.scores["trained"].low


def test_whole_embeddings_have_the_range_of_their_folds():
    found = comparison("rankme", planted(folds=3))
    score = found.scores["trained"]
    assert (score.mean, score.low, score.high, score.n) == pytest.approx((1.4, 0.4, 2.4, 3))
    assert CHANCE not in found.scores
    assert comparison("probe_batch", planted()).scores[CHANCE].mean == pytest.approx(0.5)
    single = comparison("rankme", planted(folds=1)).scores["trained"]
    assert single.mean == pytest.approx(0.4)
    assert np.isnan(single.low)


@pytest.mark.parametrize(
    ("over_pca", "over_untrained", "said"),
    [
        (0.1, 0.2, ("better than PCA-50", "better than the untrained encoder")),
        (-0.1, 0.0, ("worse than PCA-50", "indistinguishable from the untrained encoder")),
        (0.0, -0.05, ("indistinguishable from PCA-50", "worse than the untrained encoder")),
    ],
)
def test_the_sentence_says_what_was_planted(over_pca, over_untrained, said):
    found = comparison("knn_map_distinctiveness", planted(over_pca, over_untrained, noise=0.02))
    text = representation_sentence(found, "BioJEPA", 8, 0.95)
    for part in said:
        assert part in text
    assert "over 20 perturbations" in text
    assert "0.050 for a random order" in text
    assert "not clearly better than a random order" not in text


def test_the_sentence_names_what_is_no_better_than_a_random_order():
    table = planted()
    scored = table["metric"].str.startswith("knn_map")
    table.loc[scored, "chance"] = table.loc[scored, "value"].mean() + 0.2
    found = comparison("knn_map_distinctiveness", table)
    assert "not clearly better than a random order" in representation_sentence(found, "BioJEPA", 8, 0.95)


def test_of_few_perturbations_nothing_is_said():
    found = comparison("knn_map_distinctiveness", planted(n=7))
    text = representation_sentence(found, "BioJEPA", 8, 0.95)
    assert text.startswith("Only 7 held-out perturbations")
    assert "better" not in text


def test_the_deciding_metric_is_the_one_of_held_out_cells_alone():
    # Controls were seen in training: an encoder that knows them by heart would win against them.
    table = planted(gain_over_pca=-0.1)
    against_control = table["metric"].eq("knn_map_activity") & table["embedding"].eq("trained")
    table.loc[against_control, "value"] += 0.3
    view = representation_view(replace(make_inputs(), representation=table))
    assert view is not None
    assert "worse than PCA-50" in view["sentence"]


@pytest.fixture(scope="module")
def page() -> str:
    return build_report(replace(make_inputs(), representation=planted()))


def test_the_page_shows_table_sentence_and_figures(page):
    shown = section(page, "representation")
    assert "better than PCA-50" in shown
    for name in ("BioJEPA<br>tokens", "PCA-50", "Untrained<br>pooled", "Guess"):
        assert f'<th scope="col">{name}</th>' in shown
    row = next(part for part in shown.split("<tr") if 'data-metric="probe_batch"' in part)
    # Means of the folds, which differ by 1; the guess is right half of the time.
    assert re.findall(r'class="v">([^<]*)<', row) == [
        *("0.900", "0.850", "0.800", "0.700", "0.650", "0.500"), *("–", "–"),
    ]  # fmt: skip
    assert "0.400 to 1.400" in row
    # Direction arrows: what tells batch or depth is in the way.
    assert "Batch probe ↓" in shown
    assert "Depth probe R² ↓" in shown
    assert "RankMe ↑" in shown
    assert "20 perturbations" in shown
    assert "2 folds" in shown
    assert "900 held-out cells, 900 with control cells" in shown
    assert shown.count('class="up"') == 1 + 2 * 2  # the legend, and two metrics against two embeddings
    drawn = embedded(page)["figures"]
    for key, options in (("embedding-metrics", 5), ("embedding-pairs", 4)):
        assert len(drawn[key]["options"]) == options
        for _, spec in drawn[key]["options"]:
            go.Figure(json.loads(re.sub(r'"@\w+"', '"#000000"', json.dumps(spec))))
        caption = shown.split(f'id="fig-{key}"', 1)[1].split("</figure>", 1)[0]
        for part in ("shows", "how", "n", "thresholds", "misleads"):
            assert re.search(rf'<span class="{part}">[^<]{{3,}}</span>', caption), (key, part)


def test_hostile_names_are_escaped_in_table_and_hover(page):
    assert HOSTILE not in section(page, "representation")
    points = embedded(page)["figures"]["embedding-pairs"]["options"][0][1]["data"][1]
    assert html.escape(HOSTILE, quote=False) in points["customdata"]


def test_points_of_the_pairs_are_the_scores():
    table = planted(seeds=2)
    view = representation_view(replace(make_inputs(), representation=table))
    assert view is not None
    figure = view["figures"][1]
    rows = table[table["metric"] == "knn_map_distinctiveness"]
    means = rows.groupby(["embedding", "perturbation"])["value"].mean()
    points = figure.options["kNN-mAP, others, against PCA-50"]["data"][1]
    drawn = dict(zip(points["customdata"], zip(points["x"], points["y"], strict=True), strict=True))
    for name in ("P0", "P7"):
        assert drawn[name] == pytest.approx((means["pca50", name], means["trained", name]), abs=6e-4)
    for spec in figure.options.values():
        assert len(spec["data"][1]["x"]) == 20
    bars = view["figures"][0].options["Batch probe ↓"]
    assert bars["layout"]["shapes"][0]["x0"] == 0.5


def test_nothing_is_shown_without_measurements_and_a_broken_table_is_named():
    assert representation_view(make_inputs()) is None
    empty = planted().iloc[:0]
    assert representation_view(replace(make_inputs(), representation=empty)) is None
    with pytest.raises(InputError, match=r"table representation.*chance"):
        replace(make_inputs(), representation=planted().drop(columns="chance"))
