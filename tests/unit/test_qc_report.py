"""The page of quality control shows its tables, names what to look at, and shows names as they are."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from scipy import sparse
from sklearn.decomposition import PCA

from biojepa.contracts import (
    GUIDE_CALLS_COLUMNS,
    GUIDE_TABLE_COLUMNS,
    GUIDE_UMIS_COLUMNS,
    GUIDES_PER_CELL_COLUMNS,
)
from biojepa.errors import InputError
from biojepa.qc_report import QcInputs, build_qc_report, figures_cells, figures_perturbations, read, summary
from biojepa.qc_report.page import MAX_ROWS, perturbation_rows, settings_used
from biojepa.report.page import asset
from qc_case import make_perturbations, make_qc_inputs
from report_case import HOSTILE, NASTY


@pytest.fixture(scope="module")
def inputs() -> QcInputs:
    return make_qc_inputs()


@pytest.fixture(scope="module")
def page(inputs: QcInputs) -> str:
    return build_qc_report(inputs)


def embedded(page: str) -> dict:
    """Return the data that the page's scripts read."""
    return json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.S).group(1))


def without_guides(inputs: QcInputs) -> QcInputs:
    """Return the inputs of a screen that came with labels."""
    return replace(
        inputs,
        guide_calls=pd.DataFrame(columns=list(GUIDE_CALLS_COLUMNS)),
        guides_per_cell=pd.DataFrame(columns=list(GUIDES_PER_CELL_COLUMNS)),
        guide_umis=pd.DataFrame(columns=list(GUIDE_UMIS_COLUMNS)),
    )


def figure(figures: list, key: str):
    return next(found for found in figures if found.key == key)


def trace(spec: dict, name: str) -> dict:
    return next(found for found in spec["data"] if found["name"] == name)


def test_page_refers_to_its_tables_and_reports_alone(page: str, inputs: QcInputs) -> None:
    body = re.sub(r"<script.*?</script>|<style>.*?</style>", "", page, flags=re.S)
    addresses = re.findall(r'(?:href|src)="([^#"][^"]*)"', body)
    assert sorted(set(addresses)) == sorted({*inputs.files, *inputs.reports.values()})
    assert page.count(str(asset("plotly.js"))) == 1


def test_every_figure_is_valid_plotly_and_fully_captioned(page: str) -> None:
    figures = embedded(page)["figures"]
    for key, content in figures.items():
        for _, spec in content["options"]:
            painted = json.loads(re.sub(r'"@\w+"', '"#000000"', json.dumps(spec)))
            go.Figure(painted)  # raises for a key that plotly does not know
            assert spec["data"], key
    for name in ("shows", "how", "n", "thresholds"):
        texts = re.findall(rf'<span class="{name}">(.+?)</span>', page)
        assert len(texts) == len(figures) >= 13


def test_every_colour_token_is_defined(page: str) -> None:
    used = set(re.findall(r'"@(\w+)"', json.dumps(embedded(page))))
    assert used <= set(re.findall(r"--(\w+):", str(asset("style.css"))))


def test_names_that_look_like_markup_stay_text(page: str) -> None:
    plain = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    for name in [*NASTY, "screen <i>one</i>"]:
        assert name not in plain or html.escape(name) == name
    assert "screen &lt;i&gt;one&lt;/i&gt;" in plain
    data = embedded(page)
    assert data["rows"]["columns"][0]["values"][: len(NASTY)] == list(NASTY)  # shown by textContent
    ranked = data["figures"]["effect-ranking"]["options"][0][1]
    assert ranked["data"][0]["customdata"][0][0] == html.escape(HOSTILE, quote=False)
    assert ranked["data"][0]["x"][0] == html.escape(HOSTILE, quote=False)
    many = figures_perturbations.effect_ranking(make_perturbations(60)).spec
    assert all("<b>" not in note["text"] for note in many["layout"]["annotations"])


def test_filters_carry_their_thresholds(page: str) -> None:
    spec = embedded(page)["figures"]["funnel"]["options"][0][1]
    assert spec["data"][0]["x"] == [3000, 2700, 2500, 2400, 2260, 2260]
    assert spec["data"][1]["x"] == [0, 300, 200, 100, 140, 0]
    labels = [re.sub("<.*?>", "|", label) for label in spec["data"][0]["y"]]
    assert labels[3] == "min counts||≥ 500 UMIs|"
    assert labels[1] == "no guide||mixture, posterior ≥ 0.5, ≥ 5 UMIs|"


def test_distributions_are_the_bins_of_the_table_with_the_limits_of_each_batch(inputs: QcInputs) -> None:
    found = figure(figures_cells.distribution_figures(inputs), "distribution-n_genes")
    bins = inputs.distributions[inputs.distributions["metric"] == "n_genes"]
    limits = inputs.batches[inputs.batches["metric"] == "n_genes"]
    spec = found.options["all cells"]
    kept = trace(spec, "kept")
    assert kept["y"][:-1] == bins["cells_kept"].tolist()
    assert kept["x"] == pytest.approx([*bins["bin_low"], bins["bin_high"].iloc[-1]])
    poor = trace(spec, "poor quality")
    assert poor["customdata"][:-1] == bins["cells_low_quality"].tolist()
    # An area begins where the one under it ends, so that what is seen of it is its own part.
    assert np.subtract(poor["y"], kept["y"]).tolist() == poor["customdata"]
    assert trace(spec, "unassigned")["y"][:-1] == bins["cells"].tolist()
    drawn = sorted(shape["x0"] for shape in spec["layout"]["shapes"])
    assert drawn == pytest.approx(sorted([*limits["limit_low"], *limits["limit_high"]]))
    boxes = found.options["batch by batch"]["data"]
    assert boxes[0]["median"] == pytest.approx(limits["median"].tolist())
    assert boxes[1]["x"] == pytest.approx(limits["limit_low"].tolist())
    mito = figure(figures_cells.distribution_figures(inputs), "distribution-pct_mito")
    assert mito.caption.thresholds == "at most 12.0 to 13.2 % of UMIs, by batch"


def test_guides_are_those_of_the_tables(inputs: QcInputs) -> None:
    figures = figures_cells.guide_figures(inputs)
    knee = figure(figures, "knee").spec
    seen = inputs.guide_umis[inputs.guide_umis["guide_umis"] > 0]
    assert (knee["data"][0]["x"], knee["data"][0]["y"]) == (
        seen["rank"].tolist(),
        seen["guide_umis"].tolist(),
    )
    assert knee["layout"]["shapes"][0]["y0"] == 6
    bars = {bar["name"]: (bar["x"], bar["y"]) for bar in figure(figures, "guides-per-cell").spec["data"]}
    assert bars["assigned"] == (["1"], [2500]) and bars["more than accepted"] == (["2"], [200])
    spec = figure(figures, "guide-cells").spec
    assert trace(spec, "control")["y"] == [400]
    assert trace(spec, "threshold borrowed from other guides")["y"] == [380]
    assert len(trace(spec, "targeting")["y"]) == 38


def test_few_perturbations_are_bars_with_their_names(inputs: QcInputs) -> None:
    table = inputs.perturbations.assign(
        responding_share=np.where(np.arange(30) < 4, [0.9, 0.8, 0.7, 0.6] + [0] * 26, np.nan)
    )
    inputs = replace(inputs, perturbations=table)
    drawn = [
        *figures_perturbations.perturbation_figures(inputs), *figures_perturbations.effect_figures(inputs)
    ]  # fmt: skip
    for key, column in (
        ("cells", "n_cells"), ("effect-ranking", "effect_size"), ("changed-genes", "n_deg"),
        ("responding", "responding_share"),
    ):  # fmt: skip
        spec = figure(drawn, key).spec
        assert {found["type"] for found in spec["data"]} == {"bar"}
        bars = {x: y for found in spec["data"] for x, y in zip(found["x"], found["y"], strict=True)}
        known = table.dropna(subset=[column]).set_index("perturbation")[column]
        assert bars == pytest.approx({html.escape(n, quote=False): v for n, v in known.items()}, rel=1e-3)
        order = spec["layout"]["xaxis"]["categoryarray"]
        assert [bars[name] for name in order] == sorted(bars.values(), reverse=True)
    assert figure(drawn, "responding").caption.n == "4 of 30 perturbations, median 75\u202f%"
    assert 25 in [shape["y0"] for shape in figure(drawn, "cells").spec["layout"]["shapes"]]


def test_many_perturbations_are_ranked_with_the_minimum_drawn(inputs: QcInputs) -> None:
    inputs = replace(inputs, perturbations=make_perturbations(60).assign(n_deg=[0, *range(59)]))
    cells = figure(figures_perturbations.perturbation_figures(inputs), "cells").spec
    points = sorted((x, y) for found in cells["data"] for x, y in zip(found["x"], found["y"], strict=True))
    assert [y for _, y in points] == sorted(inputs.perturbations["n_cells"], reverse=True)
    assert 25 in [shape["y0"] for shape in cells["layout"]["shapes"]]
    ranking = figures_perturbations.effect_ranking(inputs.perturbations).spec
    clear = inputs.perturbations.query("effect_q < 0.05")
    assert trace(ranking, "q < 0.05")["y"] == pytest.approx(clear["effect_size"].tolist(), rel=1e-3)
    notes = ranking["layout"]["annotations"]
    assert [note["text"] for note in notes] == [
        html.escape(name, quote=False) for name in clear["perturbation"][:5]
    ]
    # A name points at its own point, however close the points are.
    assert [note["x"] for note in notes] == [1, 2, 3, 4, 5]
    assert [note["y"] for note in notes] == pytest.approx(clear["effect_size"][:5].tolist(), rel=1e-3)
    genes = figures_perturbations.changed_genes(inputs.perturbations).spec
    assert sum(map(len, (found["x"] for found in genes["data"]))) == len(inputs.perturbations)
    # No point is cut: not that of nothing changed, nor the first or the last.
    low, high = genes["layout"]["yaxis"]["range"]
    assert low < 0 and high > 58
    first, last = genes["layout"]["xaxis"]["range"]
    assert first < 1 and last > 60 and genes["layout"]["xaxis"]["tickvals"][0] == 1


def test_names_of_strong_perturbations_lie_a_line_apart() -> None:
    table = make_perturbations(60).assign(
        effect_size=[10.0, 9.99, 9.98, *np.linspace(5, 0, 57)], effect_q=0.01
    )
    notes = figures_perturbations.effect_ranking(table).spec["layout"]["annotations"]
    px = figures_perturbations.PLOT_HEIGHT / 10
    height = [-note["y"] * px + note["ay"] for note in notes]
    assert np.diff(height).min() >= figures_perturbations.LINE_OF_TEXT - 1.5  # whole pixels
    assert [note["x"] for note in notes] == [1, 2, 3, 4, 5]
    assert [note["y"] for note in notes] == [10.0, 9.99, 9.98, 5.0, pytest.approx(5 - 5 / 56, rel=1e-3)]


def test_the_floor_of_permutations_is_told(inputs: QcInputs) -> None:
    table = inputs.perturbations.assign(
        effect_p=[1 / 1001] * 7 + [0.3] * 23, effect_q=[0.004] * 7 + [0.4] * 23
    )
    told = figures_perturbations.effect_ranking(table, 1000).caption.thresholds.replace("\u202f", " ")
    assert "1 000 permutations give no p below 0.001, so that 7 share q 0.004" in told
    above = table.assign(effect_p=0.3)
    assert "permutations give" not in figures_perturbations.effect_ranking(above, 1000).caption.thresholds


def test_targets_are_named_and_told_by_the_type_of_perturbation(inputs: QcInputs) -> None:
    table = inputs.perturbations.assign(
        on_target_log2fc=["3.1", "0.1", "-0.2", *[""] * 27], on_target_p=["1e-180", "0.5", "0.01", *[""] * 27]
    )
    activated = replace(inputs, perturbations=table, cells=replace(inputs.cells, types=("CRISPRa",)))
    found = figure(figures_perturbations.effect_figures(activated), "on-target")
    assert found.caption.n == "3 measured targets, 1 down and 2 up"
    assert found.caption.read.startswith("Targets should lie to the right")
    assert "1 with p below 10⁻⁵⁰ drawn at 50" in found.caption.thresholds
    layout = found.spec["layout"]
    assert [note["text"] for note in layout["annotations"]] == [html.escape(NASTY[0], quote=False)]
    assert (layout["annotations"][0]["x"], layout["annotations"][0]["y"]) == (3.1, 50)
    assert {-0.25, 0.25} <= {shape.get("x0") for shape in layout["shapes"]}
    low, high = layout["yaxis"]["range"]
    assert low < 0 and high > 50


def test_names_of_targets_do_not_lie_upon_each_other(inputs: QcInputs) -> None:
    table = inputs.perturbations.assign(
        on_target_log2fc=["-2.0", "-1.99", "-1.5", *["-0.5"] * 27], on_target_p="1e-60"
    )
    found = figures_perturbations.on_target_figure(table)
    assert [note["x"] for note in found.spec["layout"]["annotations"]] == [-2.0, -1.5, -0.5]


def test_settings_and_captions_are_those_of_the_rule_of_guides(inputs: QcInputs) -> None:
    section = {"method": "dominance", "min_umis": 5, "min_share": None, "max_guides": 2, "min_posterior": 0.5}
    table = pd.DataFrame(
        {
            "status": ["assigned", "too_many_guides"],
            "n_guides": [1, None],
            "cells": [90, 10],
            "share": [0.9, 0.1],
        }
    )
    calls = inputs.guide_calls.assign(fallback="")
    single = replace(inputs, settings={"guide_assignment": section}, guides_per_cell=table, guide_calls=calls)
    assert settings_used(single) == {
        "guide_assignment": {"method": "dominance", "min_umis": 5, "min_share": 0.6}
    }
    assert settings_used(without_guides(single)) == {}
    figures = figures_cells.guide_figures(single)
    classes = figure(figures, "guides-per-cell")
    assert trace(classes.spec, "more than accepted")["x"] == ["top guide below 60\u202f%"]
    assert "top guide below 60" in classes.caption.misleads
    told = " ".join(text for found in figures for text in vars(found.caption).values())
    assert "orange" not in told and "mixture" not in told and "sum over all guides of a cell" in told
    mixture = replace(single, settings={"guide_assignment": {**section, "method": "mixture"}})
    assert settings_used(mixture)["guide_assignment"] == {**section, "method": "mixture", "min_share": 0.6}


def test_the_most_changed_gene_is_shown_with_its_share(inputs: QcInputs) -> None:
    table = inputs.perturbations.assign(
        top_gene=["AVP", *[None] * 29], top_gene_share=[0.914, *[np.nan] * 29]
    )
    columns = {column["key"]: column for column in perturbation_rows(table)["columns"]}
    assert columns["top_gene_share"]["shown"] == ["AVP 91\u202f%", *["–"] * 29]
    assert columns["top_gene_share"]["values"] == [0.914, *[None] * 29]


def test_guides_that_are_not_known_are_missing(inputs: QcInputs) -> None:
    columns = perturbation_rows(inputs.perturbations.assign(n_guides=[0] * 29 + [3]))["columns"]
    guides = next(column for column in columns if column["key"] == "n_guides")
    assert guides["values"].count(None) == 29 and 3 in guides["values"]


def test_the_map_colours_the_strongest_perturbations_and_each_batch(inputs: QcInputs) -> None:
    found = figures_perturbations.map_figure(inputs)
    assert list(found.options) == ["perturbation", "batch", "UMIs"]
    by_name = found.options["perturbation"]["data"]
    assert [len(part["x"]) for part in by_name if part["name"] == "control"] == [
        (inputs.cell_map["perturbation"] == "control").sum()
    ]
    top = [part["name"] for part in by_name[2:]]
    assert top == [
        html.escape(name, quote=False) for name in inputs.perturbations["perturbation"][: len(top)]
    ]
    assert sum(len(part["x"]) for part in by_name) == len(inputs.cell_map)
    umis = found.options["UMIs"]["data"][0]
    assert umis["marker"]["color"] == pytest.approx(np.log10(inputs.cell_map["library_size"]), rel=1e-3)
    phases = replace(inputs, cell_map=inputs.cell_map.assign(phase="G1", responding_posterior=0.5))
    assert list(figures_perturbations.map_figure(phases).options)[-2:] == [
        "posterior of responding",
        "phase of the cell cycle",
    ]


def test_the_table_holds_every_perturbation_strongest_first(inputs: QcInputs) -> None:
    rows = perturbation_rows(inputs.perturbations)
    columns = {column["key"]: column for column in rows["columns"]}
    assert columns["effect_size"]["values"] == pytest.approx(inputs.perturbations["effect_size"], rel=1e-3)
    at = columns["perturbation"]["values"].index("GENE1+GENE2")
    assert columns["on_target_log2fc"]["shown"][at] == "−1.25; –"
    assert columns["on_target_log2fc"]["values"][at] == -1.25
    assert rows["flags"] == ["weak"]
    assert "responding_share" not in columns
    more = perturbation_rows(inputs.perturbations.assign(responding_share=0.5))
    assert more["columns"][-2]["values"] == [0.5] * 30
    many = perturbation_rows(make_perturbations(MAX_ROWS + 7))
    assert (len(many["columns"][0]["values"]), many["total"]) == (MAX_ROWS, MAX_ROWS + 7)


def test_the_summary_says_what_the_tables_hold(inputs: QcInputs, page: str) -> None:
    text = " ".join(summary.sentences(inputs)).replace("\u202f", " ")
    clear = int((inputs.perturbations["effect_q"] < 0.05).sum())
    assert "Of 3 000 cells, 2 260 (75 %) were kept." in text
    assert "lost to no guide (300), too many guides (200), max pct mito (140)" in text
    assert "30 perturbations, 1 of them combinations, and 240 control cells in 3 batches" in text
    assert "9 123 UMIs and 2 500 of 8 000 genes; 4.2 % of its UMIs" in text
    assert f"{clear} of 30 perturbations" in text
    assert "Of 30 measured targets, 30 fell and 0 rose" in text
    assert "Guides were called in 83 % of the cells; 10 % have none" in text
    # The only guide of one target was called nowhere, and that is all there is to look at.
    assert [item.found for item in summary.warnings(inputs)] == ["GENE38 has no cell: 38 of 39 targets left."]
    assert "genes, " not in text.split("UMIs and")[0]  # none was lost
    assert page.index("1 thing to look at") < page.index("Of 3\u202f000 cells")


def warned(inputs: QcInputs) -> str:
    return " ".join(item.found for item in summary.warnings(inputs)).replace("\u202f", " ")


def test_the_share_of_responding_cells_says_of_how_many_perturbations_it_is(inputs: QcInputs) -> None:
    clear = int((inputs.perturbations["effect_q"] < 0.05).sum())
    known = np.where(np.arange(30) < 3, 0.7, np.nan)  # the strongest three
    table = inputs.perturbations.assign(responding_share=known)
    text = " ".join(summary.sentences(replace(inputs, perturbations=table))).replace("\u202f", " ")
    assert clear > 3 and "Of their cells, 70 % respond at the median in the 3 where it can be told." in text
    table = table.assign(responding_share=0.5)
    text = " ".join(summary.sentences(replace(inputs, perturbations=table))).replace("\u202f", " ")
    assert "50 % respond at the median." in text


def test_lost_genes_are_told_and_warned_of_where_they_are_most(inputs: QcInputs) -> None:
    def noted(removed: int) -> QcInputs:
        row = {"filter": "min_cells_per_gene", "threshold": "≥ 10 cells", "cells_before": 2260,
               "cells_removed": 0, "cells_after": 2260,
               "note": f"genes: 500 before, {removed} removed, {500 - removed} after"}  # fmt: skip
        return replace(inputs, qc=pd.concat([inputs.qc, pd.DataFrame([row])], ignore_index=True))

    assert "Of 500 genes, 120 were kept; 380 are seen in too few cells." in summary.sentences(noted(380))
    assert "380 of 500 genes were removed: too few cells show them." in warned(noted(380))
    assert "Of 500 genes, 400 were kept" in " ".join(summary.sentences(noted(100)))
    assert "genes were removed" not in warned(noted(100))


def test_lost_targets_are_told_from_lost_guides(inputs: QcInputs) -> None:
    calls = inputs.guide_calls.copy()
    # g37 has the target of g36, which was found: a guide is lost, no target.
    calls.loc[calls["guide"] == "g37", ["target", "cells_called", "cells_assigned"]] = ["GENE36", 0, 0]
    text = warned(replace(inputs, guide_calls=calls))
    assert "GENE38 has no cell: 37 of 38 targets left." in text
    assert "1 of 40 guides were called in no cell: g37 (GENE36)." in text


def test_each_problem_is_named(inputs: QcInputs) -> None:
    cells, table = inputs.cells, inputs.perturbations
    few = cells.batches.assign(controls=[240, 3, 9])
    assert "2 of 3 batches have fewer than 10 control cells: lane1, lane2." in warned(
        replace(inputs, cells=replace(cells, batches=few))
    )
    assert "Only 99 control cells." in warned(replace(inputs, cells=replace(cells, n_controls=99)))
    assert "2 of 30 perturbations lie in a single batch each: A, B." in warned(
        replace(inputs, cells=replace(cells, in_one_batch=("A", "B")))
    )
    lost = inputs.qc.assign(cells_removed=[300, 200, 100, 700, 0])
    assert "The filter max pct mito (≤ 20 %) removed 29 % of the cells" in warned(replace(inputs, qc=lost))
    shares = inputs.guides_per_cell.assign(share=[0.5, 0.15, 0.35])
    assert "No guide was called in 50 % of the cells. 35 % of the cells carry more" in warned(
        replace(inputs, guides_per_cell=shares)
    )
    shallow = replace(cells, medians={**cells.medians, "library_size": 800.0})
    assert "The median cell has only 800 UMIs." in warned(replace(inputs, cells=shallow))
    assert "only 800" not in warned(replace(inputs, cells=replace(shallow, n_genes=300)))  # a panel of genes
    uneven = inputs.batches.copy()
    uneven.loc[0, "median"] = 3_000.0
    assert "9 900 UMIs in lane2, 3 000 in lane0" in warned(replace(inputs, batches=uneven))
    still = table.assign(on_target_p="0.5")
    assert "Only 0 % of 30 measured targets went down clearly" in warned(replace(inputs, perturbations=still))
    assert "went" not in warned(  # the transcript of a knock-out may stay as it is
        replace(inputs, perturbations=still, cells=replace(cells, types=("CRISPRko",)))
    )
    weak = table.assign(effect_q=0.5, flag="weak;one_guide;guides_disagree")
    text = warned(replace(inputs, perturbations=weak))
    assert "None of 30 perturbations changes cells detectably. 30 of 30 perturbations rest on one" in text
    few = replace(inputs, perturbations=weak.assign(effect_p=1 / 21), settings={"permutations": 20})
    assert "raise preprocess.permutations" not in "".join(item.advice for item in summary.warnings(few))
    few = replace(few, perturbations=weak.assign(effect_p=[1 / 21] * 15 + [0.5] * 15))
    assert "raise preprocess.permutations" in "".join(item.advice for item in summary.warnings(few))
    assert (
        f"Guides of 30 perturbations disagree: {', '.join(NASTY)}, GENE0, GENE1, GENE2 and 22 more." in text
    )
    guides = pd.DataFrame(index=range(7), columns=list(GUIDE_TABLE_COLUMNS)).assign(
        guide_id=list("abcdefg"),
        q=[0.5, 0.01, 0.04, 0.03, 0.02, 0.015, 0.012],
        flag=["", *["discordant"] * 6],
    )
    text = warned(replace(inputs, perturbations=weak, guides=guides))
    assert "and 22 more. Unlike their siblings: b, g, f, e, d and 1 more." in text
    wrong = table.assign(flag=["target_wrong_direction", *[""] * 29])
    assert f"1 perturbation moved the target the wrong way: {HOSTILE}." in warned(
        replace(inputs, perturbations=wrong)
    )


def test_a_screen_that_comes_with_labels_has_no_guides_on_its_page(inputs: QcInputs) -> None:
    plain = without_guides(inputs)
    plain = replace(plain, perturbations=plain.perturbations.assign(n_guides=0), cell_map=None)
    text = build_qc_report(plain)
    assert not {"knee", "guides-per-cell", "guide-cells", "guides-per-perturbation", "map"} & set(
        embedded(text)["figures"]
    )
    assert 'href="#guides"' not in text and 'href="#map"' not in text
    assert "Perturbations came with the cells; no guides were counted." in text
    assert "Nothing stands out" in text and "to look at" not in text


def test_agreement_of_guides_is_shown_where_it_was_measured(inputs: QcInputs) -> None:
    guides = pd.DataFrame(
        {"guide_id": ["a", "b", "c"], "perturbation": "GENE1", "n_cells": 40, "on_target_log2fc": -1.0,
         "effect_size": [1.0, 2.0, 0.1], "agreement": [0.9, 0.8, np.nan], "p": 0.1, "q": [0.5, 0.01, np.nan],
         "flag": ["weak", "discordant;weak", ""]}
    )  # fmt: skip
    found = figures_perturbations.effect_figures(
        replace(inputs, guides=guides, perturbations=inputs.perturbations.assign(responding_share=0.25))
    )
    spec = figure(found, "guide-agreement").spec
    assert trace(spec, "disagrees with its siblings")["x"] == [0.8]
    assert trace(spec, "agrees")["y"] == [1.0]
    assert figure(found, "responding").spec["data"][0]["y"] == [0.25] * 30
    with pytest.raises(InputError, match=r"QC page of .*, guides: found columns guide_id; expected also"):
        replace(inputs, guides=guides[["guide_id"]])


def test_the_page_of_a_large_screen_stays_small() -> None:
    large = make_qc_inputs(n=10_000, batches=270, cells=3_000, n_guides=30_000)
    page = build_qc_report(large)
    assert len(page.encode()) - len(str(asset("plotly.js")).encode()) < 1_200_000
    assert "of 270 batches, those that differ most" in page


def test_equal_inputs_give_equal_bytes(page: str) -> None:
    assert build_qc_report(make_qc_inputs()) == page


@pytest.fixture
def cells(tmp_path):
    """Write 600 cells of two batches; all cells of LONELY are in the second."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["control", "A", "LONELY"], [200, 300, 100])
    batch = np.where(np.arange(600) % 2, "x", "y")
    batch[500:] = "y"
    X = sparse.csr_matrix(rng.poisson(1.0, (600, 40)) * rng.uniform(0.5, 2, 40)).astype(np.float32)
    obs = pd.DataFrame(
        {"perturbation": pd.Categorical(labels), "batch": pd.Categorical(batch),
         "perturbation_type": "CRISPRi", "library_size": rng.uniform(500, 900, 600),
         "n_genes": np.diff(X.indptr), "pct_mito": np.nan,
         "flag_weak_guide": np.arange(600) < 17,
         "phase": pd.Categorical(np.where(np.arange(600) < 50, "S", "G1"))},
        index=[f"c{i}" for i in range(600)],
    )  # fmt: skip
    made = ad.AnnData(X=X, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(40)]))
    made.write_h5ad(tmp_path / "cells.h5ad")
    return made, tmp_path / "cells.h5ad"


def test_facts_are_those_of_the_cells(cells) -> None:
    made, path = cells
    facts = read.read_cell_facts(path)
    assert (facts.n_cells, facts.n_controls, facts.n_genes) == (600, 200, 40)
    assert facts.medians["library_size"] == np.median(made.obs["library_size"])
    assert np.isnan(facts.medians["pct_mito"])
    assert facts.batches.loc["x"].tolist() == [250, 100]
    assert facts.batches.loc["y"].tolist() == [350, 100]
    assert facts.in_one_batch == ("LONELY",)
    assert (facts.flags, facts.phases) == ({"flag_weak_guide": 17}, {"G1": 550, "S": 50})
    assert facts.types == ("CRISPRi",)


def test_a_perturbation_is_alone_only_where_chance_would_have_spread_it() -> None:
    labels, batches = pd.Series(["A"] * 3 + ["B"] * 30), pd.Series(["x"] * 3 + ["x", "y"] * 15)
    assert read.in_one_batch(labels, batches) == ()
    assert read.in_one_batch(labels, pd.Series("x", index=range(33))) == ()
    apart = pd.Series(["x"] * 3 + ["y"] * 30)
    assert read.in_one_batch(labels, apart) == ("A",)  # 1 in 1,331


def test_the_map_is_of_a_sample_in_its_principal_components(cells, monkeypatch) -> None:
    made, path = cells
    seen = []
    monkeypatch.setattr(read, "layout", lambda points, seed: seen.append(points) or points[:, :2])
    table = read.read_cell_map(path, seed=5, max_cells=90)
    rows = np.sort(np.random.default_rng(5).choice(600, size=90, replace=False))
    part = made.X[rows].toarray().astype(float)
    expected = PCA(n_components=3, svd_solver="full").fit_transform(part)
    np.testing.assert_allclose(np.abs(seen[0][:, :3]), np.abs(expected), atol=1e-6)
    assert table["perturbation"].tolist() == made.obs["perturbation"].iloc[rows].tolist()
    assert table["library_size"].tolist() == made.obs["library_size"].iloc[rows].tolist()
    assert table["umap_1"].tolist() == seen[0][:, 0].tolist()
    assert "phase" in table and "doublet_score" not in table
    assert read.read_cell_map(path, seed=5, max_cells=9) is None
