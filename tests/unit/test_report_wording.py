"""A report says of its numbers what they are: levels, thresholds, counts, controls, machines."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
from jinja2 import Environment, StrictUndefined
from test_report import section, write_files

from biojepa import contracts
from biojepa.evaluation.verdict import SUSPECTED
from biojepa.report import IndexEntry, ReportInputs, build_index, build_report, tables
from biojepa.report.decision import OUTCOMES, checks_told, decision_rows
from biojepa.report.figures import calibration_figures, category_figure
from biojepa.report.glossary import ABLATION, NEGATIVE, model_text
from biojepa.report.index import _SHORT
from biojepa.report.methods import methods_text
from biojepa.report.read import read_report
from report_case import make_inputs

CAPTIONS = sorted((Path(__file__).parents[2] / "workflow" / "report").glob("*.rst"))


@pytest.fixture(scope="module")
def inputs() -> ReportInputs:
    return make_inputs()


def with_evaluate(inputs: ReportInputs, **evaluate: float) -> ReportInputs:
    return replace(inputs, settings={"evaluate": evaluate})


def entry(
    inputs: ReportInputs, name: str = "d", outcome: str = "better than", **changes: float
) -> IndexEntry:
    return IndexEntry(
        name, "gene", inputs.summary, {**inputs.verdict, "outcome": outcome}, f"{name}.html", **changes
    )


def test_the_index_knows_every_outcome_of_a_report(inputs: ReportInputs) -> None:
    assert set(_SHORT) == set(OUTCOMES)
    page = build_index([entry(inputs, outcome=SUSPECTED)])
    assert re.search(r'<span class="tag bad" title="[^"]*">leak suspected</span>', page)


def test_a_model_with_shuffled_priors_is_an_ablation_and_random_codes_say_what_they_know() -> None:
    # Both know which gene is perturbed; the first is all of the model under test.
    assert model_text("shuffled_priors").group == ABLATION
    assert {name for name in contracts.NEGATIVE_CONTROLS if model_text(name).group == NEGATIVE} == {
        "no_change", "mean", "shuffled_labels", "random_codes",
    }  # fmt: skip
    assert "which gene it is, not what it is like" in model_text("random_codes").about


@pytest.mark.parametrize(("fdr", "mark"), [(0.05, ""), (0.2, "better"), (0.1, "")])
def test_a_mark_means_a_q_below_the_level_of_the_config(inputs: ReportInputs, fdr: float, mark: str) -> None:
    summary = inputs.summary.copy()
    hit = (summary["model"] == "biojepa") & (summary["metric"] == "rank_l2")
    summary.loc[hit, ["mean", "q_vs_best_baseline"]] = [0.99, 0.1]
    given = replace(with_evaluate(inputs, fdr=fdr), summary=summary)
    assert tables.MetricColumn.of(given, "rank_l2", "all").mark(model_text("biojepa")) == mark
    assert f"(q &lt; {fdr})" in section(build_report(given), "summary")


def test_intervals_carry_the_level_of_the_config(inputs: ReportInputs) -> None:
    page = build_report(with_evaluate(inputs, confidence=0.975))
    # The metric coverage_95 is about an interval of the model, whatever the level of the report.
    said = re.sub(
        r"the model's 95 % interval|the model&#39;s 95 % interval", "", page.split("plotly.js v")[0]
    )
    assert not re.search(r"95[ \u202f]%\)? (bootstrap )?interval", said)
    for name in ("summary", "categories", "calibration"):
        assert "97.5\u202f% interval" in section(page, name), name
    assert "95\u202f% interval" in section(build_report(inputs), "calibration")


def test_the_index_names_all_levels_and_leaves_capitals_alone(inputs: ReportInputs) -> None:
    page = build_index([entry(inputs, "a", confidence=0.9), entry(inputs, "b")])
    assert "90\u202f% or 95\u202f% interval" in page
    assert "chance), Euclidean distance. Mean over" in page


def test_a_rank_says_among_how_many_truths_it_is(inputs: ReportInputs) -> None:
    # Fold 0 tests 15 of the 30 perturbations, fold 1 the others, less the one that is taken out.
    single = inputs.metrics["perturbation"] != contracts.WHOLE_MODEL
    last = inputs.metrics.loc[single, "perturbation"].iloc[-1]
    fewer = replace(inputs, metrics=inputs.metrics[inputs.metrics["perturbation"] != last])
    for given, words in ((inputs, "among 15 of a fold"), (fewer, "among 14 to 15 of a fold")):
        captions = {figure.key: figure.caption.n for figure in calibration_figures(given)}
        assert captions["calibration-rank_l2"].endswith(f"held-out perturbations, each {words}")
        assert "among" not in captions["calibration-weighted_r2_delta"]
        rows = {row.metric.name: row for row in decision_rows(given)}
        assert (rows["rank_cosine"].among, rows["weighted_r2_delta"].among) == (words, "")


def test_the_first_table_says_on_how_many_perturbations_each_score_rests(inputs: ReportInputs) -> None:
    summary = inputs.summary.copy()
    hit = (summary["model"] == "biojepa") & (summary["metric"] == "rank_l2") & (summary["category"] == "all")
    summary.loc[hit, "n"] = 27
    given = replace(inputs, summary=summary)
    assert {row.metric.name: row.n for row in decision_rows(given)}["rank_l2"] == "27"
    first = section(build_report(given), "summary")
    row = first.split('data-metric="rank_l2"', 1)[1].split("</tr>", 1)[0]
    assert '<td class="score">27<span class="ci">among 15 of a fold</span></td>' in row


def test_categories_are_explained_as_far_as_they_are_there(inputs: ReportInputs) -> None:
    def explained(*categories: str) -> str:
        kept = inputs.summary[inputs.summary["category"].isin(["all", "single"])]
        parts = [kept[kept["category"] == "all"]]
        parts += [kept[kept["category"] == "single"].assign(category=name) for name in categories]
        figure = category_figure(replace(inputs, summary=type(kept)(np.vstack(parts), columns=kept.columns)))
        assert figure is not None
        return figure.caption.read

    seen, other = "What is composed of seen genes", "trained in another context"
    assert seen in explained("combo_seen2", "single") and other not in explained("combo_seen2", "single")
    assert other in explained("other_context") and "seen genes" not in explained("other_context")
    assert seen not in explained("single") and seen not in explained("combo_seen0", "single")
    assert "a mean with the other rows" in explained("single", "other_context")
    assert "a mean with the other rows" not in explained("other_context")


def test_what_is_only_stated_does_not_count_as_a_passed_check(inputs: ReportInputs) -> None:
    def row(passed: bool | None, kind: str) -> dict:
        return {"check": f"{passed} {kind}", "passed": passed, "detail": "", "kind": kind}

    rows = [row(True, "exact"), row(True, "stated"), row(True, "stated"), row(None, "stated")]
    rows += [row(False, "statistical"), {"check": "old", "passed": True, "detail": ""}]
    assert checks_told(rows) == {"passed": 2, "failed": 1, "untold": 1, "stated": 2}
    text = section(build_report(replace(inputs, sentinels=rows)), "leakage")
    assert "2 passed, 1 failed, 1 could not be made, 2 stated" in text
    assert text.count("✓ passed") == 2 and text.count("“ stated") == 2


def record(path: Path, content: dict) -> None:
    """Write a provenance into a file of predictions."""
    table = anndata.read_h5ad(path)
    table.uns["provenance"] = json.dumps(content)
    table.write_h5ad(path)


def test_machines_and_measured_targets_come_from_the_predictions(
    tmp_path: Path, inputs: ReportInputs
) -> None:
    files = write_files(tmp_path, inputs)
    for run, path in zip(files.prediction_runs, files.predictions, strict=True):
        content = {"machine": f"node {run.fold}" if run.model == "mean" else "node 0"}
        if run.model == "biojepa":
            content["made_elsewhere"] = True
        else:
            # VAL is in the file, but no held-out perturbation of the report.
            content[contracts.WITHOUT_TARGET] = ["B+C", "VAL", "OTHER"]
        record(path, content)
    found = read_report(files, "d", "perturbation", page=tmp_path / "sub" / "report.html")
    assert found.machines == {"mean": ["node 0", "node 1"]}
    assert found.linear_targets == (1, 2)
    text = " ".join(methods_text(found))
    assert (
        "predicts from the target genes that are measured, of which 1 of 2 held-out perturbations has" in text
    )
    assert "were fitted on node 0 or node 1." in text
    bare = tmp_path / "bare"
    bare.mkdir()
    plain = read_report(write_files(bare, inputs), "d", "perturbation")
    assert (plain.machines, plain.linear_targets) == ({}, None)
    assert "were fitted on" not in " ".join(methods_text(plain))


def test_methods_name_the_machine_of_simple_models_and_the_gpu_of_trained_ones(inputs: ReportInputs) -> None:
    here = {name: ["Linux, 2 cores"] for name in ("mean", "ridge", "biojepa")}
    on_cpu = {"biojepa fold0 seed0": {"machine": "Linux, 2 cores", "device": "cpu (x86_64)"}}
    text = " ".join(methods_text(replace(inputs, machines=here, train_metrics=on_cpu)))
    assert "simple ones and controls included, were fitted on Linux, 2 cores." in text
    on_gpu = {"biojepa fold0 seed0": {"machine": "Linux, 64 cores", "device": "NVIDIA H200"}}
    text = " ".join(methods_text(replace(inputs, machines=here, train_metrics=on_gpu)))
    assert "were fitted on Linux, 2 cores; but biojepa on Linux, 64 cores, NVIDIA H200." in text


def test_methods_tell_labels_with_few_cells_from_those_that_are_validation_elsewhere(
    inputs: ReportInputs,
) -> None:
    fold = {"fold": 0, contracts.CONTEXT: "K562", contracts.CONTEXT_COLUMN: "cell_type"}
    few, elsewhere = {"A @ K562": 3, "B": 2, "C @ K562": 1}, {"D @ K562": 40}
    facts = fold | {contracts.LEFT_OUT: few | elsewhere, contracts.VALIDATION_ELSEWHERE: [*elsewhere]}
    text = " ".join(methods_text(replace(inputs, split="context", splits=[facts])))
    assert "3 labels with too few cells in a context took no part. 1 label took no part because" in text
    text = " ".join(methods_text(replace(inputs, split="context", splits=[fold])))
    assert "took no part" not in text


@pytest.mark.parametrize("caption", CAPTIONS, ids=lambda path: path.stem)
def test_captions_print_the_levels_that_were_used(caption: Path) -> None:
    evaluate = {"confidence": 0.975, "fdr": 0.07}
    # The rule report hands on all settings, the rule evaluate its own.
    settings = evaluate if caption.stem in ("summary", "strata", "trust") else {"evaluate": evaluate}
    job = SimpleNamespace(
        params=SimpleNamespace(settings=settings), wildcards=SimpleNamespace(dataset="d", split="gene")
    )
    template = Environment(undefined=StrictUndefined).from_string(caption.read_text(encoding="utf-8"))
    text = " ".join(template.render(snakemake=job).split())
    assert not re.search(r"95 ?%|0\.05", text)
    assert ("97.5 % bootstrap interval" in text) == (
        caption.stem in ("summary", "strata", "headline", "calibration")
    )
    assert ("< 0.07" in text) == (caption.stem in ("summary", "headline"))


def test_every_caption_is_used_by_a_rule() -> None:
    rules = "".join(path.read_text(encoding="utf-8") for path in CAPTIONS[0].parents[1].rglob("*.smk"))
    rules += (CAPTIONS[0].parents[1] / "Snakefile").read_text(encoding="utf-8")
    assert [path.name for path in CAPTIONS if f"report/{path.name}" not in rules] == []
