"""The page of models that were trained on everything, and its line in the index."""

import importlib.util
import json
import re
from types import SimpleNamespace

import pytest

from biojepa.errors import InputError
from biojepa.report import UnevaluatedEntry, build_index
from biojepa.report.unevaluated import UnevaluatedInputs, build_unevaluated
from workflow_case import REPO

SPLIT = {"dataset": "demo", "scheme": "none", "fold": 0, "n_train": 1234, "n_val": 0, "n_test": 0}
SPLIT |= {"sha256": "ab" * 32}
METRICS = {
    "seconds": 90.0,
    "device": "cpu (x86_64)",
    "n_training_perturbations": 1234,
    "n_training_cells": 56789,
}


def page_of(**changes):
    trainings = [
        {"model": name, "seed": seed, "metrics": METRICS} for name in ("biojepa", "pca") for seed in (0, 3)
    ]
    content = {"dataset": "demo", "split": SPLIT, "trainings": trainings, "provenance": {"commit": "c0ffee"}}
    return build_unevaluated(UnevaluatedInputs(**(content | changes)))


def cells_of(page):
    """Cells of the table of trainings, row by row."""
    table = re.search(r'aria-label="Trainings".*?<tbody>(.*?)</tbody>', page, flags=re.DOTALL)[1]
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>.*?</tr>", table)]


def links_of(page):
    return re.findall(r'<a href="([^#"]+)"', page)


def test_the_page_says_that_nothing_is_evaluated_and_what_was_trained_on_what():
    page = page_of()
    assert (
        "Nothing was held out, so nothing is evaluated: biojepa, pca were trained on all 1\u202f234 perturb"
        in page
    )
    said = [["1\u202f234", "56\u202f789", "90 s", "cpu (x86_64)"]] * 4
    runs = [["biojepa", "0"], ["biojepa", "3"], ["pca", "0"], ["pca", "3"]]
    assert cells_of(page) == [run + rest for run, rest in zip(runs, said, strict=True)]
    assert "ab" * 32 in page and "c0ffee" in page
    assert links_of(page) == [] and "http:" not in page and "https" not in page
    assert page == page_of(), "equal inputs give equal bytes"


def test_the_page_leads_to_what_is_evaluated_and_predicted():
    qc = "../../demo/preprocess/qc.html"
    page = page_of(
        reports={"gene": "../gene/report.html"}, predictions="../predict/predictions.tsv", qc_page=qc
    )
    assert links_of(page) == ["../gene/report.html", "../predict/predictions.tsv", qc]
    assert "is not known" not in page and "nothing is asked for" not in page
    alone = page_of()
    assert "is not known. Add the scheme perturbation" in alone and "nothing is asked for here" in alone


def test_without_a_trained_model_the_page_says_so():
    page = page_of(trainings=[])
    assert "no model of the config is trained" in page and 'aria-label="Trainings"' not in page


def test_names_are_shown_as_they_are():
    nasty = "<script>alert(1)</script>"
    trainings = [{"model": nasty, "seed": 0, "metrics": {"device": nasty}}]
    page = page_of(
        dataset=nasty,
        trainings=trainings,
        settings={"run": nasty},
        provenance={nasty: nasty},
        reports={nasty: nasty},
    )
    assert nasty not in page
    assert cells_of(page) == [["&lt;script&gt;alert(1)&lt;/script&gt;", "0", "–", "–", "–",
                               "&lt;script&gt;alert(1)&lt;/script&gt;"]]  # fmt: skip


@pytest.mark.parametrize("change", [{"n_test": 1}, {"n_val": 2}, {"scheme": "gene"}])
def test_a_split_that_holds_something_out_is_refused(change):
    with pytest.raises(
        InputError, match=r"split\.json of demo.*expected scheme none with n_val and n_test 0"
    ):
        page_of(split=SPLIT | change)


def test_the_index_lists_it_as_not_evaluated():
    page = build_index([], unevaluated=[UnevaluatedEntry("<i>demo</i>", "none", "demo/none/report.html")])
    (row,) = re.findall(r"<tr><th scope=\"row\">.*?</tr>", page)
    assert "not evaluated</span>" in row and '<a href="demo/none/report.html">&lt;i&gt;demo' in row
    heads = re.search(r'<table id="overview".*?<thead>(.*?)</thead>', page, flags=re.DOTALL)[1]
    assert row.count("<td") + 1 == heads.count("<th ")


def test_the_script_writes_the_page_of_the_trainings_it_is_given(tmp_path):
    path = REPO / "workflow" / "scripts" / "unevaluated.py"
    spec = importlib.util.spec_from_file_location("unevaluated", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, content in (("split", SPLIT), ("one", METRICS), ("two", METRICS | {"seconds": 200})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    script.main(
        SimpleNamespace(
            input=SimpleNamespace(
                splits_info=[tmp_path / "split.json"],
                train_metrics=[tmp_path / "one.json", tmp_path / "two.json"],
            ),
            params=SimpleNamespace(
                dataset="demo",
                trainings=[{"model": "biojepa", "fold": 0, "seed": seed} for seed in (5, 6)],
                schemes=["gene"],
                predicts=True,
                qc_page="../../demo/preprocess/qc.html",
                settings={"seeds": [5, 6]},
            ),
            output=SimpleNamespace(html=tmp_path / "report.html"),
        )
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [row[:2] + row[4:5] for row in cells_of(page)] == [
        ["biojepa", "5", "90 s"],
        ["biojepa", "6", "3.33 min"],
    ]
    qc = "../../demo/preprocess/qc.html"
    assert links_of(page) == ["../gene/report.html", "../predict/predictions.tsv", qc]
