"""Raw files in the shapes that people publish them in, fetched, verified and opened by real runs."""

import gzip
import hashlib
import io
import json
import re
import shutil
import tarfile
import threading

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.io import mmwrite

from broken_server import CONTENT, running
from workflow_case import Pipeline, files_below, serve

GENES = [f"G{i:02d}" for i in range(40)]
N_CELLS = 252
FETCHED = "resources/datasets"


def cells_of(config):
    """Name the cells of every screen of a run; their pages would be drawn for nothing, and take long."""
    return [f"results/{name}/preprocess/cells.h5ad" for name in config["run"]]


def screen():
    """Return counts, labels and barcodes of 24 cells of eight perturbations and 60 controls."""
    rng = np.random.default_rng(0)
    labels = np.repeat([*GENES[:8], "ctrl"], [24] * 8 + [60])
    return rng.poisson(3.0, (N_CELLS, len(GENES))), labels, [f"cell{i}" for i in range(N_CELLS)]


def published():
    """Return the screen as files of several shapes: name to bytes."""
    counts, labels, barcodes = screen()
    obs = pd.DataFrame({"perturbation": labels}, index=barcodes)
    matrix = io.BytesIO()
    mmwrite(matrix, sparse.coo_matrix(counts.T))
    files = {
        "x_matrix.mtx.gz": gzip.compress(matrix.getvalue()),
        "x_features.tsv.gz": gzip.compress("".join(f"E{g}\t{g}\n" for g in GENES).encode()),
        "x_barcodes.tsv.gz": gzip.compress("\n".join(barcodes).encode()),
        "x_cells.csv.gz": gzip.compress(obs.to_csv(index_label="barcode").encode()),
    }
    return files, ad.AnnData(counts.astype(np.float32), obs, pd.DataFrame(index=GENES))


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def md5(content):
    return f"md5:{hashlib.md5(content).hexdigest()}"


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """Serve the files; yields the folder and its address."""
    folder = tmp_path_factory.mktemp("web")
    files, cells = published()
    cells.write_h5ad(folder / "screen.h5ad")
    plain = (folder / "screen.h5ad").read_bytes()
    (folder / "packed.h5ad.gz").write_bytes(gzip.compress(plain))
    (folder / "12345").write_bytes(plain)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    matrix = {f"x/{name}": content for name, content in files.items() if "cells" not in name}
    (folder / "matrix.tar.gz").write_bytes(tar_of(matrix))
    (folder / "inner.tar.gz").write_bytes(tar_of({"x/README": b"read", "x/inner.h5ad": plain}))
    (folder / "evil.tar.gz").write_bytes(tar_of({"x/matrix.mtx": b"1", "../../../../evil": b"2"}))
    with serve(folder) as address:
        yield folder, address


@pytest.fixture(scope="module")
def run(checkout, web, tmp_path_factory):
    """Preprocess the screen in every shape, and stop at archives that must not be unpacked."""
    folder, address = web
    pipeline = Pipeline(checkout, tmp_path_factory.mktemp("fetched"))
    local = pipeline.folder / "data"
    local.mkdir()
    for name in ("screen.h5ad", "packed.h5ad.gz", "matrix.tar.gz"):
        shutil.copy(folder / name, local / name)

    def row(name, *files, checksums=True, place=address, **fields):
        read = [(folder / file.partition("#")[0]).read_bytes() for file in files]
        sums = ";".join(md5(content) for content in read) if checksums else ""
        source = ";".join(f"{place}/{file}" for file in files)
        return {
            "dataset": name,
            "source": source,
            "checksum": sums,
            "perturbation_column": "perturbation",
            **fields,
        }

    matrix = ("x_matrix.mtx.gz", "x_features.tsv.gz", "x_barcodes.tsv.gz")
    cells = {"cell_metadata": "{download}/x_cells.csv.gz"}
    rows = [
        row("whole", "screen.h5ad"),
        row("named", "12345#screen.h5ad"),
        row("packed", "packed.h5ad.gz"),
        row("inner", "inner.tar.gz", format="h5ad"),
        row("several", *matrix, "x_cells.csv.gz", **cells),
        row("archive", "matrix.tar.gz", "x_cells.csv.gz", checksums=False, **cells),
        row("checked", "screen.h5ad", place="data"),
        row("local_packed", "packed.h5ad.gz", place="data", checksums=False),
        row("altered", "screen.h5ad", place="data") | {"checksum": "md5:" + "0" * 32},
        row("evil", "evil.tar.gz", checksums=False),
    ]
    pd.DataFrame(rows).fillna("").to_csv(pipeline.folder / "config" / "datasets.tsv", sep="\t", index=False)
    pipeline.names = [row["dataset"] for row in rows]
    pipeline.config = {
        "run": pipeline.names,
        "preprocess": {"min_cells_per_perturbation": 10, "permutations": 20},
    }
    pipeline.answer = pipeline.run(
        *cells_of(pipeline.config), "--keep-going", config=pipeline.config, base=None
    )
    return pipeline


SOUND = ["whole", "named", "packed", "inner", "several", "archive", "checked", "local_packed"]
MADE = {
    "whole": {"screen.h5ad"},
    "named": {"screen.h5ad"},
    "packed": {"packed.h5ad.gz", "unpacked/packed.h5ad"},
    "inner": {"inner.tar.gz", "unpacked/inner.h5ad"},
    "several": {"x_matrix.mtx.gz", "x_features.tsv.gz", "x_barcodes.tsv.gz", "x_cells.csv.gz"},
    "archive": {
        *("matrix.tar.gz", "matrix.tar.gz.sha256", "x_cells.csv.gz", "x_cells.csv.gz.sha256"),
        *("unpacked/x_matrix.mtx.gz", "unpacked/x_features.tsv.gz", "unpacked/x_barcodes.tsv.gz"),
        "unpacked/.snakemake_timestamp",
    },
    "checked": {"screen.h5ad"},
    "local_packed": {"packed.h5ad.gz", "unpacked/packed.h5ad"},
    "altered": set(),
    "evil": {"evil.tar.gz", "evil.tar.gz.sha256"},
}


@pytest.mark.parametrize("dataset", SOUND)
def test_the_same_screen_is_read_from_every_shape(run, dataset):
    cells = ad.read_h5ad(run.folder / f"results/{dataset}/preprocess/cells.h5ad")
    counts, labels, barcodes = screen()
    rows = [barcodes.index(name) for name in cells.obs_names]
    columns = [GENES.index(name) for name in cells.var_names]
    assert len(rows) > 200
    np.testing.assert_array_equal(cells.layers["counts"].toarray(), counts[np.ix_(rows, columns)])
    expected = ["control" if label == "ctrl" else label for label in labels[rows]]
    assert cells.obs["perturbation"].tolist() == expected


@pytest.mark.parametrize("dataset", MADE)
def test_files_are_where_the_manual_says_and_no_others(run, dataset):
    found = files_below(run.folder / FETCHED / dataset)
    assert {name for name in found if "provenance/" not in name} == MADE[dataset]


def test_a_local_file_is_linked_and_not_copied(run):
    for dataset, name in (("checked", "screen.h5ad"), ("local_packed", "packed.h5ad.gz")):
        assert (run.folder / FETCHED / dataset / name).readlink() == run.folder / "data" / name


@pytest.mark.parametrize(
    ("dataset", "parts"),
    [
        (
            "altered",
            ["data/screen.h5ad: found checksum md5:", f"expected md5:{'0' * 32} (the dataset table)"],
        ),
        ("evil", [f"{FETCHED}/evil/evil.tar.gz, member '../../../../evil': found one that leads out"]),
    ],
)
def test_what_is_refused_is_refused_by_one_message(run, dataset, parts):
    assert run.answer.returncode != 0
    logs = "".join(log.read_text(encoding="utf-8") for log in (run.folder / "logs" / dataset).rglob("*.log"))
    said = [line for line in logs.splitlines() if " ERROR " in line]
    assert len(said) == 1
    assert all(part in said[0] and part in run.answer.stdout for part in [*parts, "Fix:"])
    assert "Traceback" not in run.answer.stdout
    assert not (run.folder / "results" / dataset / "preprocess").exists()
    assert not [path for path in run.folder.parent.rglob("evil") if path.is_file()]


def test_records_follow_an_unpacked_file_to_its_address(run):
    folder = run.folder / FETCHED / "archive"
    unpack = json.loads((folder / "provenance/unpack.json").read_text())
    names = {
        f"{FETCHED}/archive/{name}" for name in MADE["archive"] if name.endswith(".tsv.gz") or "mtx" in name
    }
    assert set(unpack["outputs"]) == names
    archive = f"{FETCHED}/archive/matrix.tar.gz"
    download = json.loads((folder / "provenance/matrix.tar.gz.json").read_text())
    assert unpack["inputs"] == {archive: download["outputs"][archive]["sha256"]}
    assert download["settings"]["url"].endswith("/matrix.tar.gz")
    preprocess = json.loads(
        (run.folder / "results/archive/preprocess/provenance/preprocess.json").read_text()
    )
    assert {path: preprocess["inputs"][path] for path in names} == {
        path: record["sha256"] for path, record in unpack["outputs"].items()
    }


def test_nothing_is_done_again_when_nothing_changed(run):
    sound = run.config | {"run": SOUND}
    answer = run.run(*cells_of(sound), "--dry-run", config=sound, base=None)
    assert "Nothing to be done" in answer.stdout


def test_a_changed_local_file_is_verified_again(run):
    only = run.config | {"run": ["checked"]}
    path = run.folder / "data/screen.h5ad"
    before = path.read_bytes()
    path.write_bytes(before + b"more")
    try:
        answer = run.run(*cells_of(only), config=only, base=None)
    finally:
        path.write_bytes(before)
    assert answer.returncode != 0
    assert re.search(r"data/screen\.h5ad: found checksum md5:\w+ .*put the right file there", answer.stdout)


@pytest.fixture
def pipeline(checkout, tmp_path):
    return Pipeline(checkout, tmp_path)


def test_the_name_of_a_public_screen_is_enough(pipeline):
    (pipeline.folder / "config/datasets.tsv").unlink()
    answer = pipeline.run(
        "downloaded", "--dry-run", config={"run": ["norman2019", "norman2019_geo"]}, base=None
    )
    assert "catalogue, norman2019_geo: found no perturbation_column" in answer.stdout
    answer = pipeline.run("downloaded", "--dry-run", config={"run": ["norman2019"]}, base=None)
    assert answer.returncode == 0, answer.stdout
    assert "resources/datasets/norman2019/NormanWeissman2019_filtered.h5ad" in answer.stdout


def test_a_row_that_hides_or_completes_a_public_screen_is_said_once(pipeline):
    (pipeline.folder / "data").mkdir()
    (pipeline.folder / "data/net.tsv").touch()
    table = "dataset\tsource\tnetworks\nnorman2019\t\tdata/net.tsv\npapalexi2021\tsimulator\t\n"
    (pipeline.folder / "config/datasets.tsv").write_text(table, encoding="utf-8")
    answer = pipeline.run(
        "downloaded", "--dry-run", config={"run": ["norman2019", "papalexi2021"]}, base=None
    )
    assert answer.returncode == 0, answer.stdout
    for said in (
        "config/datasets.tsv, row norman2019: has no source, so it is norman2019 of the catalogue",
        "config/datasets.tsv, row papalexi2021: has a source, so it is used and papalexi2021 of the",
    ):
        assert answer.stdout.count(said) == 1


@pytest.mark.slow
def test_the_same_command_continues_an_interrupted_download(pipeline):
    with running() as server:
        digest = hashlib.sha256(CONTENT).hexdigest()
        table = f"dataset\tsource\tchecksum\nweb\t{server.url}\tsha256:{digest}\n"
        (pipeline.folder / "config/datasets.tsv").write_text(table, encoding="utf-8")
        server.break_after, server.statuses_after_break = [500_000], [404]
        broken = pipeline.run("downloaded", config={"run": ["web"]}, base=None)
        assert broken.returncode != 0 and "HTTP 404" in broken.stdout
        folder = pipeline.folder / FETCHED / "web"
        assert files_below(folder) == {"screen.h5ad.part", "screen.h5ad.part.etag"}
        kept = (folder / "screen.h5ad.part").stat().st_size
        assert 0 < kept <= 500_000
        done = pipeline.run("downloaded", config={"run": ["web"]}, base=None)
        assert done.returncode == 0, done.stdout
        assert server.asked("Range") == [None, f"bytes={kept}-", f"bytes={kept}-"]
    assert (folder / "screen.h5ad").read_bytes() == CONTENT
    assert files_below(folder) == {"screen.h5ad", "provenance/screen.h5ad.json"}


@pytest.mark.slow
def test_screens_are_fetched_side_by_side(pipeline):
    with running() as server:
        server.wait_for = threading.Barrier(2, timeout=60)
        rows = "".join(f"{name}\t{server.url}\n" for name in ("one", "two"))
        (pipeline.folder / "config/datasets.tsv").write_text(f"dataset\tsource\n{rows}", encoding="utf-8")
        done = pipeline.run("downloaded", config={"run": ["one", "two"]}, base=None, cores=2)
        # Each answer waited until the other file was asked for.
        assert done.returncode == 0 and not server.wait_for.broken, done.stdout
    assert all((pipeline.folder / FETCHED / name / "screen.h5ad").is_file() for name in ("one", "two"))
