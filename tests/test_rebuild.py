"""Reports and tables are made again from an archive of results, without training, byte by byte."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from workflow_case import Pipeline, files_below, jobs_of

ARCHIVED = {"archived": True}
MADE = ("evaluate/", "report.html", "report/")


@pytest.fixture
def archive(finished, checkout, tmp_path):
    """Return a copy of the results alone: no raw data, no network, no model, no logs."""
    shutil.copytree(finished.folder / "results", tmp_path / "results", copy_function=shutil.copy2)
    for path in tmp_path.rglob("*"):
        if path.name in ("model.pt", "embeddings.h5ad"):
            path.unlink()
    return Pipeline(checkout, tmp_path)


def remove(archive, *names):
    """Delete files, and folders with all that is in them, below the results."""
    for name in names:
        for path in sorted((archive.folder / "results").glob(name)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def differing(archive, finished, names):
    """Files that are missing in the archive or differ from those of the finished run."""
    folders = [Path(pipeline.folder) / "results" for pipeline in (archive, finished)]
    paths = [[folder / name for folder in folders] for name in sorted(names)]
    assert paths
    return [one.name for one, other in paths if not one.exists() or one.read_bytes() != other.read_bytes()]


def give_gene_sets(archive, finished):
    """Of the raw data, copy the gene sets of the enrichment."""
    sets = "resources/datasets/tiny/gene_sets.gmt"
    (archive.folder / sets).parent.mkdir(parents=True)
    shutil.copy2(finished.folder / sets, archive.folder / sets)


def test_tables_and_report_are_rebuilt_from_cells_splits_and_predictions(archive, finished):
    give_gene_sets(archive, finished)
    remove(
        archive, "tiny/perturbation/evaluate", "tiny/perturbation/report*", "index.html", "provenance.json"
    )
    answer = archive.run(config=ARCHIVED)
    assert answer.returncode == 0, answer.stdout
    assert jobs_of(answer.stdout) == {"evaluate": 1, "report": 1, "index": 1, "provenance": 1}
    made = {
        f"tiny/perturbation/{name}"
        for name in files_below(finished.path("perturbation"))
        if name.startswith(MADE) and "/provenance/" not in name  # a record holds the time of its job
    }
    assert {name.rsplit(".", 1)[1] for name in made} >= {"tsv", "json", "html", "svg", "h5ad"}
    assert differing(archive, finished, made | {"index.html"}) == []

    # How the rest was made is still known, and the checksums of the raw data, which are gone.
    before, after = (
        json.loads((run.folder / "results" / "provenance.json").read_text(encoding="utf-8"))
        for run in (finished, archive)
    )
    assert before["jobs"].keys() - after["jobs"].keys() == {"tiny/simulate"}
    assert {path: before["sha256"][path] for path in after["sha256"]} == after["sha256"]
    assert "resources/datasets/tiny/raw.h5ad" in after["sha256"]


def test_scores_are_rebuilt_from_cells_splits_and_predictions_alone(archive, finished):
    """Without ``pairs.h5`` every score is the same; what speaks of prior codes is empty, not guessed."""
    give_gene_sets(archive, finished)
    remove(archive, "**/pairs.h5", "tiny/perturbation/evaluate")
    answer = archive.run("evaluated", config=ARCHIVED)
    assert answer.returncode == 0, answer.stdout
    assert jobs_of(answer.stdout) == {"evaluate": 1, "evaluated": 1}
    scores = ("metrics.tsv", "summary.tsv", "enrichment.tsv", "observed.h5ad")
    assert differing(archive, finished, {f"tiny/perturbation/evaluate/{name}" for name in scores}) == []

    verdicts = [
        json.loads(run.path("perturbation", "evaluate", "verdict.json").read_text(encoding="utf-8"))
        for run in (archive, finished)
    ]
    changed = {key for key in verdicts[1] if verdicts[0][key] != verdicts[1][key]}
    assert changed <= {"sentinels", "trust"}
    unchecked = [row["check"] for row in verdicts[0]["sentinels"] if row["passed"] is None]
    assert "what training read: cells, genes, sets and prior codes" in unchecked
    trust = [
        pd.read_csv(run.path("perturbation", "evaluate", "trust.tsv"), sep="\t")
        for run in (archive, finished)
    ]
    alike = ["perturbation", "category", "predicted_effect", "predicted_effect_sd", "guess", "observed"]
    pd.testing.assert_frame_equal(trust[0][alike], trust[1][alike], check_exact=True)
    assert trust[0]["prior_coverage"].isna().all() and trust[1]["prior_coverage"].notna().all()
    # A gene that training perturbed is its own nearest, by the split alone.
    unseen = trust[0]["category"] == "single"
    assert unseen.any() and trust[0].loc[unseen, "nearest_training_gene"].isna().all()
    assert trust[1].loc[unseen, "nearest_training_gene"].notna().any()


def test_a_report_is_rebuilt_from_scores_and_predictions_alone(archive, finished):
    """Neither cells nor anything of the training is left: what they would show is left out in words."""
    lost = ("cells.h5ad", "pairs.h5", "split.tsv", "coverage.tsv", "history.tsv", "metrics.json", "umap.tsv")
    remove(archive, *(f"**/{name}" for name in (*lost, "representation.tsv")))
    remove(archive, "tiny/perturbation/report*", "provenance.json")
    answer = archive.run(config=ARCHIVED)
    assert answer.returncode == 0, answer.stdout
    assert jobs_of(answer.stdout) == {"report": 1, "provenance": 1}
    shown = [
        f"tiny/perturbation/report/{name}" for name in ("headline.tsv", "calibration.svg", "scatter.svg")
    ]
    assert differing(archive, finished, shown) == []
    page = archive.path("perturbation", "report.html").read_text(encoding="utf-8")
    for words in ("No embedding was drawn for this split", "No model of this split was trained step by step"):
        assert words in page
        assert words not in finished.path("perturbation", "report.html").read_text(encoding="utf-8")


def test_without_the_key_the_chain_would_be_run_again(archive):
    remove(
        archive, "tiny/perturbation/evaluate", "tiny/perturbation/report*", "index.html", "provenance.json"
    )
    assert archive.planned(config=ARCHIVED) == {"evaluate": 1, "report": 1, "index": 1, "provenance": 1}
    assert archive.planned().keys() >= {"simulate", "train", "evaluate"}
