"""What is said before a run, against what the functions of the run then make of the same files."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import sparse
from scipy.io import mmwrite

from biojepa.check import as_text, check_config
from biojepa.check.__main__ import main
from biojepa.check.plan import MEASURED, STEP_MS, estimate, measured_cost
from biojepa.config import load_config
from biojepa.gene_naming import naming_mismatch
from biojepa.pairing import PairSettings, build_pairs, freeze_split
from biojepa.preprocess import PreprocessSettings, preprocess_file
from biojepa.raw import ScreenSource, open_screen
from workflow_case import REPO

SCHEMES = ["perturbation", "gene", "combination", "context"]
# Raw label to cells. "_" joins combinations, g1 and g2 are guides.
CELLS = {
    "ctrl": 60,
    **{f"{gene}g1": 12 for gene in ("TP53", "MYC", "KLF1", "GATA1", "CEBPA", "JAK2", "SGK1")},
    "STAT1g1": 8,
    "STAT1g2": 7,
    **{f"{pair}": 12 for pair in ("MYC_KLF1", "TP53_MYC", "GATA1_CEBPA", "JAK2_KLF1", "SGK1_TP53")},
    "CD86_ctrl": 11,
    "RAREg1": 3,
    "unassigned": 5,
}
GENES = ["TP53", "MYC", "KLF1", "GATA1", "CEBPA", "JAK2", "SGK1", "STAT1", *(f"GENE{n}" for n in range(30))]
KNOWN = ("TP53", "MYC", "KLF1", "GATA1", "CEBPA")


def labels():
    return np.repeat(list(CELLS), list(CELLS.values())).astype(object)


def write_screen(path, label, **columns):
    """Write a screen of Poisson counts with a label of each cell."""
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(3, (len(label), len(GENES))).astype(np.float32))
    names = [f"cell{n}" for n in range(len(label))]
    obs = pd.DataFrame({"guide": label, **columns}, index=names)
    ad.AnnData(X=counts, obs=obs, var=pd.DataFrame(index=GENES)).write_h5ad(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make a folder with a screen, its network, a table and a config."""
    monkeypatch.chdir(tmp_path)
    label = labels()
    n = len(label)
    lines = np.array(["K562", "RPE1"])[np.arange(n) % 2]
    write_screen("screen.h5ad", label, lane=np.array(["a", "b", "c"])[np.arange(n) % 3], line=lines)
    edges = [(one, other) for one in KNOWN for other in (*KNOWN, "OTHER") if one != other]
    pd.DataFrame(edges, columns=["gene_a", "gene_b"]).to_csv("net.tsv", sep="\t", index=False)
    write_table(networks="net.tsv")
    return tmp_path


def write_table(**changed):
    row = {
        "dataset": "mine",
        "source": "screen.h5ad",
        "perturbation_column": "guide",
        "separator": "_",
        "batch_column": "lane",
        "cell_type_column": "line",
        "label_pattern": "g[0-9]+$",
    }
    pd.DataFrame([row | changed]).to_csv("table.tsv", sep="\t", index=False)


def config(**changed):
    return {
        "datasets": "table.tsv",
        "run": ["mine"],
        "schemes": SCHEMES,
        "preprocess": {
            "min_cells_per_perturbation": 10,
            "min_cells_per_gene": 0,
            "permutations": 5,
            "mad_threshold": None,
        },
        "pair": {"n_folds": 3, "contexts": ["K562", "RPE1"], "min_cells_in_context": 5, "prior_dim": 4},
    } | changed


def test_what_is_said_is_what_the_run_then_makes(folder):
    report = check_config(config())
    assert report["problems"] == []
    said = report["datasets"]["mine"]

    resolved = load_config(config(), REPO / "workflow" / "schemas")
    source = ScreenSource.from_mapping(resolved.source("mine").screen)
    settings = PreprocessSettings.from_mapping(resolved.settings("mine", "preprocess"))
    preprocess_file(source, settings, "cells.h5ad", "qc.tsv", "perturbations.tsv", "guides.tsv")
    obs = ad.read_h5ad("cells.h5ad").obs
    assert said["control_cells"] == (obs.perturbation == "control").sum() == 60
    assert said["labelled_cells"] == len(obs) + 3, "but for the perturbation with too few cells"
    assert said["perturbations"] == obs.perturbation.nunique() - 1
    assert said["batches"] == labels_counted(["a", "b", "c"])
    assert said["cell_types"] == labels_counted(["K562", "RPE1"])
    removed = pd.read_csv("qc.tsv", sep="\t").set_index("filter")["cells_removed"]
    assert sum(one["cells"] for one in said["labels"]["no_label"]) == removed["unlabelled"] == 5
    assert sum(said["too_few_cells"].values()) == removed["min_cells_per_perturbation"] == 3

    pair = PairSettings(**resolved.settings("mine", "pair"))
    for scheme in SCHEMES:
        folds = said["folds"][scheme]
        assert [fold["fold"] for fold in folds] == list(range(2 if scheme == "context" else 3))
        for fold in folds:
            freeze_split("cells.h5ad", "split.tsv", "mine", scheme, fold["fold"], pair)
            frozen = json.loads((folder / "split.json").read_text())
            assert {name: frozen[f"n_{name}"] for name in ("train", "val", "test")} == {
                name: fold[name] for name in ("train", "val", "test")
            }
    freeze_split("cells.h5ad", "split.tsv", "mine", "perturbation", 0, pair)
    facts = {"dataset": "mine", "scheme": "perturbation", "fold": 0, "seed": 0, "split_sha256": ""}
    tables = build_pairs("cells.h5ad", "split.tsv", "pairs.h5", ["net.tsv"], [], pair, facts)
    coverage = tables.coverage
    assert said["coverage"]["genes"] == len(coverage)
    (net,) = said["coverage"]["sources"]
    assert net == {"name": "net", "kind": "network", "covers": coverage.net.sum(), "hint": ""}
    assert said["coverage"]["uncovered_first"] == coverage.gene[coverage.n_sources == 0].tolist()


def labels_counted(names):
    n = sum(CELLS.values())
    return {name: len(range(first, n, len(names))) for first, name in enumerate(names)}


def test_labels_are_shown_as_they_are_understood(folder):
    said = check_config(config())["datasets"]["mine"]
    assert said["labels"]["controls"] == [{"raw": "ctrl", "label": "control", "cells": 60}]
    assert said["labels"]["no_label"] == [{"raw": "unassigned", "cells": 5}]
    # 7 genes with one guide, one with two, CD86, 5 combinations; RARE has too few cells.
    assert (said["singles"], said["combinations"], said["perturbed_genes"]) == (9, 5, 9)
    assert said["too_few_cells"] == {"RARE": 3}
    assert said["labels"]["understood"] == 1 + 9 + 5 + 1
    rewritten = {one["raw"]: one["label"] for one in said["labels"]["changed_top"]}
    assert rewritten["MYC_KLF1"] == "KLF1+MYC"
    assert said["coverage"]["sources"][0]["covers"] == len(KNOWN)
    assert said["coverage"]["measured"] == 8
    text = as_text(check_config(config()))
    for part in (
        "controls: ctrl → control 60",
        "no perturbation, cells left out: 5: unassigned 5",
        "fewer than 10 cells, left out: 1: RARE 3",
        "perturbations: 14 (9 single, 5 combinations) of 9 genes",
        "prior source net (network): 5 of 9 perturbed genes",
        "genes that no source knows: 4: CD86, JAK2, SGK1, STAT1",
        "No problem found.",
    ):
        assert part in text


def test_no_value_of_the_matrix_is_read(folder):
    before = check_config(config())["datasets"]["mine"]
    with h5py.File("screen.h5ad", "r+") as file:
        entries = len(file["X/data"])
        del file["X/data"]
        # Values in a file that is not there: its type and length are known, and reading it fails.
        file["X"].create_dataset("data", (entries,), np.float32, external=[("gone.bin", 0, 4 * entries)])
    with h5py.File("screen.h5ad") as file, pytest.raises(OSError):
        file["X/data"][:1]
    report = check_config(config())
    after = report["datasets"]["mine"]
    assert report["problems"] == []
    files = [after.pop("files"), before.pop("files")]
    assert after == before
    assert [one["state"] for (one,) in files] == ["there", "there"]


def write_10x(path, screen):
    """Write a 10x folder as Cell Ranger 3 does, not compressed."""
    path.mkdir()
    mmwrite(path / "matrix.mtx", sparse.coo_matrix(screen.X.T).astype(int))
    features = pd.DataFrame({"id": screen.var_names, "name": screen.var_names, "type": "Gene Expression"})
    features.to_csv(path / "features.tsv", sep="\t", header=False, index=False)
    pd.Series(screen.obs_names).to_csv(path / "barcodes.tsv", header=False, index=False)


@pytest.mark.parametrize("shape", ["csr", "csc", "dense", "raw", "old", "10x"])
@pytest.mark.filterwarnings("ignore:Element")
def test_tables_are_those_of_the_whole_screen(folder, shape):
    screen = ad.read_h5ad("screen.h5ad")
    path = "shaped" if shape == "10x" else "shaped.h5ad"
    if shape == "10x":
        write_10x(folder / path, screen)
    else:
        change = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda x: x.toarray()}
        screen.X = change.get(shape, lambda x: x)(screen.X)
        if shape == "raw":
            screen.raw = screen.copy()
            del screen.X
        screen.write_h5ad(path)
    if shape == "old":  # as anndata wrote sparse matrices before version 0.7
        with h5py.File(path, "a") as file:
            attributes = file["X"].attrs
            del attributes["encoding-type"], attributes["encoding-version"]
            attributes["h5sparse_format"], attributes["h5sparse_shape"] = "csr", screen.shape
    source = ScreenSource("mine", path)
    with open_screen(source, tables_only=True) as tables, open_screen(source) as whole:
        pd.testing.assert_frame_equal(tables.obs, whole.obs)
        pd.testing.assert_frame_equal(tables.var, whole.var)
        assert tables.counts.shape == whole.counts.shape == (len(labels()), len(GENES))
        assert tables.notes == whole.notes
        with pytest.raises(ValueError, match="counts of this screen were not opened"):
            next(tables.blocks())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_truncated_file_is_one_problem(folder, share):
    path = folder / "screen.h5ad"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    (problem,) = check_config(config())["problems"]
    assert "screen.h5ad" in problem
    assert "HDF5 cannot open" in problem


def test_counts_that_may_lie_elsewhere_are_noted(folder):
    screen = ad.read_h5ad("screen.h5ad")
    screen.layers["counts"] = screen.X.copy()
    screen.write_h5ad("screen.h5ad")
    notes = check_config(config())["datasets"]["mine"]["notes"]
    assert notes[0] == "raw counts are looked for in X first, then in counts, when values are read"


def test_all_problems_are_told_at_once(folder, capsys):
    label = labels()
    label[label == "GATA1g1"] = "GATA1+odd"
    write_screen("screen.h5ad", label, lane="a")
    pd.DataFrame({"gene_a": ["Trp53", "Myc"], "gene_b": ["Klf1", "Gata1"]}).to_csv(
        "mouse.tsv", sep="\t", index=False
    )
    write_table(batch_column="lanes", library_size_column="depth", networks="mouse.tsv;gone.tsv")
    (folder / "my.yaml").write_text(yaml.safe_dump(config(trian={"device": "cpu"})))
    assert main(["--configfile", "my.yaml", "--no-jobs", "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    expected = (
        "unknown key trian. Did you mean train?",
        "column networks: no file gone.tsv",
        "no column 'lanes'",
        "mouse.tsv: found genes such as Gata1",
        "no column 'line'",
        "no column 'depth'",
        "'+' inside the gene name 'GATA1+odd' (separator is '_')",
    )
    for part in expected:
        assert sum(part in problem for problem in problems) == 1, (part, problems)
    assert len(problems) == len(expected)


def test_labels_that_the_separator_does_not_split_are_named(folder):
    write_table(separator="", networks="net.tsv")
    report = check_config(config())
    said = report["datasets"]["mine"]
    assert said["combinations"] == 0
    assert said["join"] == "_"
    assert said["unsplit"] == dict.fromkeys(
        ("GATA1_CEBPA", "JAK2_KLF1", "MYC_KLF1", "SGK1_TP53", "TP53_MYC"), 12
    )
    text = " ".join(as_text(report).split())
    assert "taken as single genes: 5: GATA1_CEBPA 12" in text
    assert "if they are combinations, set `separator` to _" in text


def test_labels_that_cannot_be_read_are_one_problem(folder):
    label = labels()
    label[label == "GATA1g1"], label[label == "JAK2g1"] = "GATA1+odd", "JAK2+odd"
    write_screen("screen.h5ad", label, lane="a", line="K562")
    (problem,) = check_config(config(schemes=["perturbation"]))["problems"]
    assert "found 2 that cannot be read: GATA1+odd (12 cells), JAK2+odd (12 cells)" in problem


def test_guides_that_were_called_elsewhere_are_understood_before_the_run(folder):
    screen = ad.read_h5ad("screen.h5ad")
    write_10x(folder / "run", screen)
    label = labels()
    guides = pd.Series(label, index=screen.obs_names)[: -CELLS["unassigned"]].str.replace("_", "g1|")
    calls = pd.DataFrame({"cell_barcode": guides.index, "feature_call": guides.to_numpy()})
    calls.to_csv("calls.csv", index=False)
    known = sorted({guide for call in guides for guide in call.split("|")})
    targets = ["control" if guide == "ctrl" else guide.split("g")[0] for guide in known]
    pd.DataFrame({"guide": known, "target": targets}).to_csv("guides.csv", index=False)
    write_table(source="run", perturbation_column="", guide_calls="calls.csv", guide_table="guides.csv",
                batch_column="", cell_type_column="", networks="net.tsv")  # fmt: skip
    settings = config()["preprocess"] | {"guide_assignment": {"method": "threshold"}}
    report = check_config(config(preprocess=settings, schemes=["perturbation"]))
    said = report["datasets"]["mine"]
    assert report["problems"] == []
    assert said["labels_from"] == "guide calls"
    assert (said["control_cells"], said["too_few_cells"]) == (60, {"RARE": 3})
    # As with labels of cells, but CD86 with a control guide is CD86, here as there.
    assert (said["singles"], said["combinations"]) == (9, 5)
    assert said["labels"]["no_label"] == [{"raw": "no_guide", "cells": 5}]
    assert len(said["folds"]["perturbation"]) == 3
    text = as_text(report)
    assert said["targets"]["STAT1"] == 2
    assert "labels: from calls.csv; guides of each target: " in text
    assert "batches: no `batch_column` and one sample, so one batch" in text


def test_mouse_symbols_with_a_human_screen_are_named(folder):
    pd.DataFrame({"gene_a": ["Trp53", "Myc"], "gene_b": ["Klf1", "Gata1"]}).to_csv(
        "net.tsv", sep="\t", index=False
    )
    (problem,) = check_config(config())["problems"]
    assert problem.startswith("mine: net.tsv: found genes such as Gata1, Klf1, Myc, none of the 9 perturbed")
    assert "(human symbols (GATA1) against mouse symbols (Gata1))" in problem


def test_exit_status_and_text(folder, capsys):
    (folder / "my.yaml").write_text(yaml.safe_dump(config()))
    assert main(["--configfile", "my.yaml", "--no-jobs"]) == 0
    assert capsys.readouterr().out.endswith("No problem found.\n")
    # Values of the command line win, as in a run.
    assert main(["--configfile", "my.yaml", "--no-jobs", "--config", "run=[other]"]) == 1
    assert "other is in 0 rows of table.tsv" in capsys.readouterr().out.replace("\n  ", " ")
    assert main(["--configfile", "absent.yaml", "--no-jobs"]) == 1
    assert "1 problem(s)" in capsys.readouterr().out


def test_a_fold_that_cannot_be_dealt_is_a_problem_of_its_own(folder):
    report = check_config(config(pair={"n_folds": 3, "contexts": ["K562", "HeLa"]}))
    assert [problem for problem in report["problems"] if "HeLa" in problem]
    assert len(report["datasets"]["mine"]["folds"]["perturbation"]) == 3


def test_genes_that_cannot_be_predicted_are_named(folder):
    asked = config(predict=["OTHER", "TP53+JAK2", "NOBODY+MYC", "NOWHERE"])
    said = check_config(asked)["datasets"]["mine"]["coverage"]
    assert said["asked"] == 4
    assert said["asked_unknown"] == ["NOBODY", "NOWHERE"]
    assert "predict: 4 asked for; genes that no source knows: NOBODY, NOWHERE" in as_text(check_config(asked))


def test_public_screen_that_is_still_to_be_fetched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = check_config({"run": ["norman2019"]})
    said = report["datasets"]["norman2019"]
    assert report["problems"] == []
    assert said["files"][0]["state"] == "to fetch"
    assert said["files"][0]["bytes"] == 700_000_000
    assert said["cells_in_catalogue"] == 111_445
    assert "folds: known once labels are" in as_text(report)


@pytest.mark.parametrize(
    ("genes", "known", "said"),
    [
        (["TP53", "MYC"], ["Trp53", "Myc", "Klf1"], "human symbols (MYC) against mouse symbols (Myc)"),
        (["Trp53", "Myc"], ["TP53", "MYC"], "mouse symbols (Myc) against human symbols (MYC)"),
        (["TP53"], ["ENSG00000141510"], "human symbols (TP53) against Ensembl ids (ENSG00000141510)"),
        (["TP53", "MYC"], ["TP53"], ""),
        (["TP53", "MYC", "C1orf43"], ["GATA1"], ""),
        (
            ["TP53", "MYC"],
            ["myc", "tp53"],
            "differs only in upper and lower case: MYC against myc; of another species?",
        ),
        (["TP53", "MYC", "JAK2"], ["myc", "TP53"], ""),
        ([], ["GATA1"], ""),
    ],
)
def test_why_gene_names_do_not_meet(genes, known, said):
    assert naming_mismatch(genes, known) == said


def test_estimates_are_what_was_measured():
    results = REPO / "benchmarks" / "results"
    rows = json.loads((results / "scaling.json").read_text())["table"]
    figures = {
        (row["stage"], row["cells"], row["perturbations"]): (row["processor_seconds"], row["peak_gib"])
        for row in rows
    }
    assert len(figures) == sum(map(len, MEASURED.values()))
    for stage, points in MEASURED.items():
        for cells, perturbations, *expected in points:
            assert figures[stage, cells, perturbations] == pytest.approx(expected, abs=0.06)
            assert measured_cost(stage, cells, perturbations) == pytest.approx(expected)
    steps = json.loads((results / "training_step_cpu.json").read_text())["table"]
    for part, milliseconds in STEP_MS.items():
        ours = [row for row in steps if row["contender"] == "BioJEPA" and row["stage"] == part]
        assert milliseconds == math.floor(max(row["processor_ms_per_step"] for row in ours))


def test_a_training_is_estimated_by_its_steps_and_by_its_cells(folder):
    """By hand: 50 steps of each stage are in what was measured of 100,000 cells."""
    train = {"encoder": {"steps": 250}, "predictor": {"steps": 100}}
    models = ["mean", "biojepa", "biojepa_predictor_noprior"]  # the last takes over the encoder of the second
    resolved = load_config(
        config(train=train, models=models, schemes=["perturbation"]), REPO / "workflow/schemas"
    )
    defaults = {name: _plain(part) for name, part in resolved.settings("mine", "train").items()}
    screens = {"mine": SimpleNamespace(facts={"cells": 100_000, "perturbations": 1_000}, targets=())}
    seconds, gib = next(row[2:] for row in MEASURED["train"] if row[:2] == (100_000, 1_000))
    with_encoder = seconds + (200 * 101 + 50 * 60) / 1000
    without = seconds + 50 * 60 / 1000
    cost = estimate(resolved, screens, {"train": 6}, defaults)["rules"]["train"]
    assert cost == {"jobs": 6, "seconds": pytest.approx(6 * (with_encoder + without) / 2), "gib": gib}
    other = {**defaults, "encoder": {**defaults["encoder"], "embed_dim": 8}}
    assert "train" in estimate(resolved, screens, {"train": 6}, other)["not_measured"]


def _plain(part):
    return dict(part) if isinstance(part, dict) else part


def test_estimates_between_and_beyond_the_measured_sizes():
    # Half way between two screens on a logarithm is their geometric mean.
    half = measured_cost("preprocess", round(math.sqrt(1e5 * 1e6)), 1_000)[0]
    assert half == pytest.approx(math.sqrt(37.6 * 124.6), rel=1e-4)
    assert measured_cost("preprocess", 500, 1_000)[0] == pytest.approx(17.3)
    # Beyond the largest, ten times the cells take ten times as long at least.
    assert measured_cost("pair", 10_000_000, 1_000)[0] == pytest.approx(413, rel=1e-2)


def test_wrong_rows_do_not_hide_each_other_nor_the_right_one(folder):
    write_table(networks="net.tsv")
    table = pd.read_csv("table.tsv", sep="\t", dtype=str)
    wrong = table.assign(dataset="wrong", format="loom", perturbation_type="drug")
    pd.concat([table, wrong]).to_csv("table.tsv", sep="\t", index=False)
    report = check_config(config(run=["mine", "wrong", "absent"]))
    assert len(report["problems"]) == 3
    for part in ("row wrong, key format", "row wrong, key perturbation_type", "absent is in 0 rows"):
        assert sum(part in problem for problem in report["problems"]) == 1
    assert list(report["datasets"]) == ["mine"]
    assert report["datasets"]["mine"]["perturbations"] == 14


def test_where_depth_and_mitochondrial_share_come_from(folder):
    text = " ".join(as_text(check_config(config())).split())
    assert "depth: sum over 38 genes; a panel? then name `library_size_column`" in text
    assert "mitochondria: no MT- gene of 38 genes, so no share; name `mito_column` if there is one" in text
    label = labels()
    write_screen("screen.h5ad", label, lane="a", line="K562", depth=500.0, mito=0.02)
    screen = ad.read_h5ad("screen.h5ad")
    screen.var_names = ["MT-CO1", *GENES[1:]]
    screen.write_h5ad("screen.h5ad")
    text = " ".join(as_text(check_config(config())).split())
    assert "mitochondria: 1 MT- gene of 38 genes (MT-CO1): too few for a share; name `mito_column`" in text
    write_table(library_size_column="depth", mito_column="mito")
    text = as_text(check_config(config()))
    assert "\n  depth: column depth\n  mitochondria: column mito\n" in text


def write_earlier_run():
    """Write the cells of an earlier run: 4 controls and 2 perturbations in the batch x."""
    made = Path("results/mine/preprocess")
    made.mkdir(parents=True)
    label = np.repeat(["control", "TP53", "MYC"], [4, 3, 3])
    obs = pd.DataFrame({"perturbation": label, "batch": "x", "cell_type": "K562"}, index=list("abcdefghij"))
    var = pd.DataFrame(index=["TP53", "MYC"])
    ad.AnnData(sparse.csr_matrix((10, 2), dtype=np.float32), obs, var).write_h5ad(made / "cells.h5ad")


def test_what_an_earlier_run_knew_is_marked(folder):
    write_earlier_run()
    write_table(source="gone.h5ad", networks="net.tsv")
    text = as_text(check_config(config(schemes=["perturbation"])))
    for part in (
        "cells: 10, genes: 2 (of an earlier run)",
        "batches (of an earlier run): 1: x 10",
        "control cells: 4 (of an earlier run)",
        "perturbations: 2 (2 single, 0 combinations) of 2 genes (of an earlier run)",
        "prior source net (network): 2 of 2 perturbed genes (of an earlier run)",
    ):
        assert part in text
    # The screen is there: a wrong column says nothing of batches, and the cells are those of the file.
    write_table(perturbation_column="gone", batch_column="gone")
    said = check_config(config(schemes=["perturbation"]))["datasets"]["mine"]
    assert said["cells"] == sum(CELLS.values())
    assert "batches" not in said


def test_missing_files_are_told_once_with_the_nearest_name(folder):
    screen = ad.read_h5ad("screen.h5ad")
    write_10x(folder / "run", screen)
    (folder / "guides.csv").write_text("guide,target\nctrl,control\n")
    calls = "cell_barcode,feature_call\n" + "".join(f"{name},ctrl\n" for name in screen.obs_names)
    (folder / "calls.csv").write_text(calls)
    write_table(source="run", perturbation_column="", guide_calls="calls.csv", guide_table="guide.csv",
                batch_column="", cell_type_column="", networks="{data_dir}/nets.tsv")  # fmt: skip
    report = check_config(config(data_dir=str(folder), schemes=["perturbation"]))
    guides, networks = report["problems"]
    assert guides == (
        "table.tsv, row mine, column guide_table: no file guide.csv. Did you mean guides.csv? "
        "Fix: correct the path"
    )
    assert networks == (
        f"table.tsv, row mine, column networks: no file {folder}/nets.tsv. Did you mean {folder}/net.tsv? "
        f"Fix: correct the path, or data_dir of the config, which is {folder}"
    )
    assert report["datasets"]["mine"]["coverage"]["missing"][0] == f"{folder}/nets.tsv"
    assert "labels: from calls.csv\n" in as_text(report)
    assert f"prior sources that are missing: {folder}/nets.tsv" in " ".join(as_text(report).split())
    write_table(source="{data_dir}/screen.h5ad", networks="net.tsv")
    report = check_config(config(data_dir="dta"))
    (folder / "data").mkdir()
    assert check_config(config(data_dir="dta"))["problems"] == [
        "table.tsv, row mine, column source: no file dta/screen.h5ad, since there is no folder dta. "
        "Did you mean data? Fix: correct data_dir of the config, which is dta"
    ]
    assert report["datasets"]["mine"]["state"] == "missing"
    assert "screen: missing\n" in as_text(report)


def test_a_row_with_a_misspelt_column_is_read_as_if_it_were_right(folder):
    right = check_config(config())["datasets"]
    table = pd.read_csv("table.tsv", sep="\t", dtype=str)
    table.rename(columns={"separator": "seperator"}).assign(zzz="x").to_csv(
        "table.tsv", sep="\t", index=False
    )
    report = check_config(config())
    first, second = report["problems"]
    assert first == "table.tsv, row mine: unknown key seperator. Did you mean separator?"
    assert second.startswith("table.tsv, row mine: unknown key zzz. Known keys: dataset, ")
    assert report["datasets"] == right
