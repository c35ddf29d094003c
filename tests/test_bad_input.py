"""What a user can get wrong: every mistake stops with one message that says what to change."""

import hashlib
from dataclasses import fields

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from biojepa.errors import InputError
from biojepa.preprocess import Tables
from biojepa.training.optimization import choose_device
from workflow_case import Pipeline, files_below, serve

GENES = [f"G{i:02d}" for i in range(40)]
PERTURBED = GENES[:8]


def write_screen(path, perturbed=PERTURBED, control="ctrl", column="guide_identity", scale=1.0):
    """Write 24 cells of every perturbation and 60 controls; ``scale`` makes counts fractional."""
    rng = np.random.default_rng(0)
    labels = np.repeat([*perturbed, control], [24] * len(perturbed) + [60])
    counts = rng.poisson(3.0, (len(labels), len(GENES))).astype(np.float32) * scale
    names = pd.Index([f"cell{i}" for i in range(len(labels))])
    ad.AnnData(counts, pd.DataFrame({column: labels}, index=names), pd.DataFrame(index=GENES)).write_h5ad(
        path
    )


def write_edges(path, genes):
    table = pd.DataFrame({"gene_a": genes[:-1], "gene_b": genes[1:]})
    table.to_csv(path, sep="\t", index=False)


# Dataset: what is wrong with it, as changes of its row, and what the message must say.
ROWS = {
    "sound": {},
    "no_control": {"source": "data/no_control.h5ad", "control_label": ""},
    "wrong_label": {"control_label": "scramble"},
    "no_column": {"perturbation_column": "guide_target"},
    "fractions": {"source": "data/fractions.h5ad"},
    "torn": {"source": "data/torn.h5ad"},
    "few_cells": {},
    "few_labels": {"source": "data/few_labels.h5ad"},
    "mouse_prior": {"networks": "data/mouse.tsv"},
    "no_edges": {"networks": "data/no_edges.tsv"},
    "altered": {"source": "ADDRESS/sound.h5ad", "checksum": f"sha256:{'0' * 64}"},
    "absent": {"source": "ADDRESS/nothing.h5ad"},
    "fetched": {"source": "ADDRESS/sound.h5ad"},
}
MESSAGES = {
    "no_control": ["data/no_control.h5ad, column 'guide_identity'", "'G00' (24)", "`control_label`"],
    "wrong_label": ["data/sound.h5ad", "control label 'scramble'", "'ctrl' (60)", "`control_label`"],
    "no_column": ["data/sound.h5ad", "guide_target", "perturbation_column", "guide_identity"],
    "fractions": ["data/fractions.h5ad", "non-integer counts", "`counts_layer`"],
    "torn": ["data/torn.h5ad", "a file that HDF5 cannot open", "download it again"],
    "few_cells": ["data/sound.h5ad", "at least 50", "preprocess.min_cells_per_perturbation"],
    "few_labels": ["results/few_labels/preprocess/cells.h5ad", "4 perturbation(s)", "pair.n_folds"],
    "mouse_prior": ["data/mouse.tsv", "none of the 8 perturbed genes", "symbols such as G00", "species"],
    "no_edges": ["data/no_edges.tsv", "columns ['first', 'second']", "gene_a and gene_b"],
    "altered": [
        "resources/datasets/altered/sound.h5ad",
        "checksum sha256:",
        f"sha256:{'0' * 64}",
        "correct the table",
    ],
    "absent": ["/nothing.h5ad", "HTTP 404", "check the address in the dataset table"],
}
STAGE_OF = {"few_labels": "freeze_split", "mouse_prior": "pair", "no_edges": "pair"}
STAGE_OF |= {"altered": "download", "absent": "download"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Serve a folder on this machine; yields the folder and its address."""
    folder = tmp_path_factory.mktemp("served")
    with serve(folder) as address:
        yield folder, address


@pytest.fixture(scope="module")
def broken(checkout, served, tmp_path_factory):
    """Run the stages up to pairing on a sound screen and on screens with one mistake each."""
    pipeline = Pipeline(checkout, tmp_path_factory.mktemp("broken"))
    folder, address = served
    data = pipeline.folder / "data"
    data.mkdir()
    write_screen(data / "sound.h5ad")
    write_screen(folder / "sound.h5ad")
    write_screen(data / "no_control.h5ad", control="G30")
    write_screen(data / "few_labels.h5ad", perturbed=GENES[:4])
    write_screen(data / "fractions.h5ad", scale=0.3)
    (data / "torn.h5ad").write_bytes((data / "sound.h5ad").read_bytes()[:5000])
    write_edges(data / "network.tsv", GENES)
    write_edges(data / "mouse.tsv", [f"g{i}" for i in range(20)])
    pd.DataFrame({"first": GENES[:2], "second": GENES[2:4]}).to_csv(
        data / "no_edges.tsv", sep="\t", index=False
    )
    rows = [
        {
            "dataset": name,
            "source": "data/sound.h5ad",
            "checksum": "",
            "perturbation_column": "guide_identity",
            "control_label": "ctrl",
            "networks": "data/network.tsv",
            **{key: value.replace("ADDRESS", address) for key, value in change.items()},
        }
        for name, change in ROWS.items()
    ]
    pd.DataFrame(rows).to_csv(pipeline.folder / "config" / "datasets.tsv", sep="\t", index=False)
    config = {
        "run": list(ROWS),
        "folds": [0],
        "preprocess": {"min_cells_per_perturbation": 10, "permutations": 20},
        "pair": {"n_folds": 3, "prior_dim": 4},
        "overrides": {"few_cells": {"preprocess": {"min_cells_per_perturbation": 50}}},
    }
    pipeline.answer = pipeline.run("paired", "--keep-going", config=config, base=None)
    return pipeline


@pytest.mark.parametrize("dataset", ["sound", "fetched"])
def test_a_sound_screen_beside_broken_ones_is_paired(broken, dataset):
    assert (broken.folder / f"results/{dataset}/perturbation/fold0/pair/pairs.h5").is_file()


def test_a_checksum_nobody_gave_is_recorded(broken):
    folder = broken.folder / "resources/datasets/fetched"
    digest = hashlib.sha256((folder / "sound.h5ad").read_bytes()).hexdigest()
    assert (folder / "sound.h5ad.sha256").read_text(encoding="utf-8").split() == [digest, "sound.h5ad"]


@pytest.mark.parametrize("dataset", MESSAGES)
def test_broken_data_stop_with_one_message_that_names_file_and_fix(broken, dataset):
    assert broken.answer.returncode != 0
    logs = list((broken.folder / "logs" / dataset).rglob("*.log"))
    said = [
        line for log in logs for line in log.read_text(encoding="utf-8").splitlines() if " ERROR " in line
    ]
    assert len(said) == 1, said
    for part in [*MESSAGES[dataset], "expected", "Fix:"]:
        assert part in said[0], said[0]
    assert not any("Traceback" in log.read_text(encoding="utf-8") for log in logs)
    # The message reaches the terminal too, where the user looks first.
    assert f"biojepa: {said[0].split('biojepa: ', 1)[1]}" in broken.answer.stdout


@pytest.mark.parametrize("dataset", MESSAGES)
def test_broken_data_leave_nothing_half_written(broken, dataset):
    stage = STAGE_OF.get(dataset, "preprocess")
    tables = [f"{field.name}.tsv" for field in fields(Tables)]
    made = ("cells.h5ad", *tables, "provenance/preprocess.json")
    preprocess = {f"preprocess/{name}" for name in made}
    frozen = ("split.tsv", "split.json", "provenance/freeze_split.json")
    split = {f"perturbation/fold0/pair/{name}" for name in frozen}
    expected = {"freeze_split": preprocess, "pair": preprocess | split}.get(stage, set())
    assert files_below(broken.folder / "results" / dataset) == expected
    assert files_below(broken.folder / "resources" / "datasets" / dataset) == set()


def test_errors_of_users_show_no_traceback_on_the_terminal(broken):
    assert "Traceback" not in broken.answer.stdout


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            {"train": {"predictor": {"step": 5}}},
            ["key train.predictor", "unknown key train.predictor.step", "Did you mean steps?"],
        ),
        ({"run": ["tinny"]}, ["config, run: tinny", "config/datasets.tsv", "Did you mean tiny?"]),
        ({"folds": [5]}, ["config, folds: found [5]", "expected 0 to 2", "pair.n_folds is 3"]),
    ],
    ids=["key", "dataset", "fold"],
)
def test_a_bad_config_stops_before_the_first_job(checkout, tmp_path, change, parts):
    pipeline = Pipeline(checkout, tmp_path)
    answer = pipeline.run(config=change)
    assert answer.returncode != 0
    for part in parts:
        assert part in answer.stdout
    assert "Traceback" not in answer.stdout
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "resources").exists()


def test_a_missing_file_stops_before_the_first_job(checkout, tmp_path):
    pipeline = Pipeline(checkout, tmp_path)
    table = "dataset\tsource\tnetworks\nlost\t{data_dir}/lost.h5ad\t{data_dir}/string.tsv.gz\n"
    (tmp_path / "config" / "datasets.tsv").write_text(table, encoding="utf-8")
    answer = pipeline.run("--config", "data_dir=elsewhere", config={"run": ["lost"]}, base=None)
    assert answer.returncode != 0
    for column, path in (("source", "elsewhere/lost.h5ad"), ("networks", "elsewhere/string.tsv.gz")):
        assert f"config/datasets.tsv, row lost, column {column}: no file {path}" in answer.stdout
    assert not (tmp_path / "results").exists()


def test_a_gpu_that_is_asked_for_and_absent_is_an_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(
        InputError, match=r"train\.device: found cuda.*sees no GPU.*set train\.device to auto or cpu"
    ):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"
