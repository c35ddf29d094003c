"""Matrices of Cell Ranger in both versions, several samples, and guides that lie apart from the counts."""

import gzip
import io
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.io import mmwrite

from biojepa.errors import InputError
from biojepa.guides import GuideAssignment
from biojepa.preprocess.annotate import annotate_cells, label_cells, needs_guide_counts
from biojepa.preprocess.cell_tables import ranked_umis
from biojepa.preprocess.quality import Funnel
from biojepa.raw import RawScreen, ScreenSource, guide_files, open_screen, read_screen
from biojepa.sample_files import find_samples

GENES = ["KLF1", "SET", "STAT1"]
GUIDES = ["KLF1_g1", "SET_g1", "NT_g1"]
CELLS = ["AAA-1", "CCC-1", "GGG-1", "TTT-1"]
GENE_COUNTS = np.array([[0, 3, 1], [2, 0, 0], [0, 0, 7], [4, 1, 0]])
GUIDE_COUNTS = np.array([[9, 0, 0], [0, 8, 1], [0, 0, 6], [7, 7, 0]])
COUNTS = np.hstack([GENE_COUNTS, GUIDE_COUNTS])
TYPES = ["Gene Expression"] * 3 + ["CRISPR Guide Capture"] * 3
NAMES = GENES + GUIDES
IDS = ["ENSG0", "ENSG1", "ENSG2", *GUIDES]


def write_mtx(folder, counts=COUNTS, cells=CELLS, prefix="", version=3, line_end="\n"):
    """Write the three files as Cell Ranger does, independently of what reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.BytesIO()
    mmwrite(text, sparse.coo_matrix(counts.T), field="integer")
    n = counts.shape[1]
    if version == 3:
        rows = ["\t".join(row) for row in zip(IDS[:n], NAMES[:n], TYPES[:n], strict=True)]
    else:
        rows = ["\t".join(row) for row in zip(IDS[:n], NAMES[:n], strict=True)]
    files = {
        "matrix.mtx": text.getvalue().decode(),
        "features.tsv" if version == 3 else "genes.tsv": "\n".join(rows) + "\n",
        "barcodes.tsv": "\n".join(cells) + "\n",
    }
    for name, content in files.items():
        data = content.replace("\n", line_end).encode()
        zipped = version == 3
        (folder / f"{prefix}{name}{'.gz' if zipped else ''}").write_bytes(
            gzip.compress(data) if zipped else data
        )
    return ScreenSource("toy", str(folder))


def write_h5(path, counts=COUNTS, cells=CELLS, version=3):
    """Write a matrix of barcodes in columns, as the documentation of Cell Ranger describes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = sparse.csc_matrix(counts.T.astype(np.int32))
    n = counts.shape[1]
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        group["data"], group["indices"] = columns.data, columns.indices.astype(np.int64)
        group["indptr"] = columns.indptr.astype(np.int64)
        group["shape"] = np.array(columns.shape, dtype=np.int32)
        group["barcodes"] = np.array(cells, dtype="S18")
        if version == 3:
            group["features/id"] = np.array(IDS[:n], dtype="S")
            group["features/name"] = np.array(NAMES[:n], dtype="S")
            group["features/feature_type"] = np.array(TYPES[:n], dtype="S")
            group["features/genome"] = np.array(["GRCh38"] * n, dtype="S")
            group["features/_all_tag_keys"] = np.array(["genome"], dtype="S")
        else:
            group["genes"], group["gene_names"] = (np.array(x[:n], dtype="S") for x in (IDS, NAMES))
    return ScreenSource("toy", str(path))


@pytest.mark.parametrize("entries", [1, 5, None])
def test_hdf5_of_version_3_gives_genes_and_guides_apart(tmp_path, entries):
    source = write_h5(tmp_path / "filtered_feature_bc_matrix.h5")
    with open_screen(source, tmp_path, entries) as opened:
        blocks = list(opened.blocks())
        np.testing.assert_array_equal(opened.take(np.array([1, 3])).toarray(), GENE_COUNTS[[1, 3]])
    assert opened.var.index.tolist() == GENES
    assert opened.var["gene_id"].tolist() == IDS[:3]
    assert opened.obs.index.tolist() == CELLS
    assert opened.guide_names.tolist() == GUIDES
    np.testing.assert_array_equal(np.vstack([genes.toarray() for _, genes, _ in blocks]), GENE_COUNTS)
    np.testing.assert_array_equal(np.vstack([guides.toarray() for _, _, guides in blocks]), GUIDE_COUNTS)
    assert len(blocks) == {1: 4, 5: 3, None: 1}[entries]


def test_version_2_is_read_as_hdf5_and_as_a_folder_with_any_line_end(tmp_path):
    for source in (
        write_h5(tmp_path / "v2.h5", GENE_COUNTS, version=2),
        write_mtx(tmp_path / "v2", GENE_COUNTS, version=2, line_end="\r\n"),
    ):
        read = read_screen(source)
        np.testing.assert_array_equal(read.X.toarray(), GENE_COUNTS)
        assert read.var_names.tolist() == GENES
        assert read.var["gene_id"].tolist() == IDS[:3]
        assert read.obs_names.tolist() == CELLS


def test_the_format_is_told_by_content_and_the_log_says_why(tmp_path, caplog):
    caplog.set_level("INFO", logger="biojepa")
    path = tmp_path / "matrix_without_a_suffix"
    write_h5(tmp_path / "a.h5")
    shutil.move(tmp_path / "a.h5", path)
    read_screen(ScreenSource("toy", str(path)))
    assert f"{path} is read as 10x_h5: it has barcodes and a matrix of features" in caplog.text
    caplog.clear()
    read_screen(replace(ScreenSource("toy", str(path)), format="10x_h5"))
    assert "is read as 10x_h5: the dataset table says so" in caplog.text
    with pytest.raises(InputError, match=r"without obs and var, so not an AnnData"):
        read_screen(replace(ScreenSource("toy", str(path)), format="h5ad"))


def test_files_of_other_programs_are_named(tmp_path):
    path = tmp_path / "x.h5"
    for key, name in (("mod/rna", "a MuData file"), ("row_attrs/Gene", "a loom file"), ("z", "an HDF5 file")):
        with h5py.File(path, "w") as file:
            file.create_group(key)
        with pytest.raises(InputError, match=rf"{name} with .*not an AnnData and not a 10x matrix"):
            read_screen(ScreenSource("toy", str(path)))
    with h5py.File(path, "w") as file:
        for genome in ("GRCh38", "mm10"):
            for part in ("barcodes", "genes", "data", "indices", "indptr"):
                file[f"{genome}/{part}"] = [0]
    with pytest.raises(InputError, match=r"2 genomes: .*; expected the matrix of one genome"):
        read_screen(ScreenSource("toy", str(path)))


def test_a_damaged_hdf5_matrix_is_refused(tmp_path):
    source = write_h5(tmp_path / "a.h5")
    with h5py.File(source.path, "a") as file:
        file["matrix/data"][2] = -4
    with pytest.raises(InputError, match=r"a\.h5: found no raw counts \(negative values, such as -4\)"):
        read_screen(source)
    write_h5(tmp_path / "a.h5", cells=CELLS)
    with h5py.File(source.path, "a") as file:
        del file["matrix/barcodes"]
        file["matrix/barcodes"] = np.array(CELLS[:3], dtype="S")
    with pytest.raises(InputError, match=r"6 × 4 in the matrix, 6 features and 3 barcodes"):
        read_screen(source)
    whole = write_h5(tmp_path / "b.h5").path
    data = (tmp_path / "b.h5").read_bytes()
    (tmp_path / "b.h5").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"b\.h5: found a file that HDF5 cannot open"):
        read_screen(ScreenSource("toy", whole))
    (tmp_path / "b.h5").write_bytes(b"")
    with pytest.raises(InputError, match=r"b\.h5: found an empty file"):
        read_screen(ScreenSource("toy", whole))


def test_a_chunk_that_cannot_be_unpacked_is_one_message(tmp_path):
    path = tmp_path / "a.h5"
    counts = np.random.default_rng(0).poisson(3.0, (400, 6))
    write_h5(path, counts, [f"c{i}" for i in range(400)])
    with h5py.File(path, "a") as file:
        values = file["matrix/indices"][:]
        del file["matrix/indices"]
        packed = file.create_dataset("matrix/indices", data=values, compression="gzip", chunks=(500,))
        offset, size = (packed.id.get_chunk_info(1).byte_offset, packed.id.get_chunk_info(1).size)
    data = bytearray(path.read_bytes())
    data[offset : offset + size] = b"\xff" * size
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.h5: found a part that HDF5 cannot read"):
        read_screen(ScreenSource("toy", str(path)))


def two_samples(tmp_path, layout):
    folder = tmp_path / layout
    for name, rows in (("s1", slice(0, 3)), ("s2", slice(1, 4))):
        counts, cells = COUNTS[rows], CELLS[:3]  # both have the same barcodes
        if layout == "folders":
            write_mtx(folder / name / "outs" / "filtered_feature_bc_matrix", counts, cells)
            write_mtx(folder / name / "outs" / "raw_feature_bc_matrix", counts, cells)
        elif layout == "prefixes":
            write_mtx(folder, counts, cells, prefix=f"{name}_")
        elif layout == "shared_features":
            write_mtx(folder, counts, cells, prefix=f"{name}_")
            (folder / f"{name}_features.tsv.gz").rename(folder / "features.tsv.gz")
        elif layout == "hdf5":
            write_h5(folder / f"{name}_filtered_feature_bc_matrix.h5", counts, cells)
        else:
            write_h5(folder / "outs/per_sample_outs" / name / "count/sample_filtered_feature_bc_matrix.h5",
                     counts, cells)  # fmt: skip
            write_mtx(folder / "outs/per_sample_outs" / name / "count/sample_filtered_feature_bc_matrix",
                      counts, cells)  # fmt: skip
    return ScreenSource("toy", str(folder), guide_table=str(guide_table(tmp_path)))


def guide_table(folder):
    path = folder / "guides.csv"
    path.write_text("guide,target\nKLF1_g1,KLF1\nSET_g1,SET\nNT_g1,non-targeting\n")
    return path


@pytest.mark.parametrize("entries", [3, None])
@pytest.mark.parametrize("layout", ["folders", "prefixes", "shared_features", "hdf5", "per_sample_outs"])
def test_samples_in_a_folder_become_batches(tmp_path, layout, entries):
    source = two_samples(tmp_path, layout)
    with open_screen(source, tmp_path, entries, most=entries) as opened:
        parts = [(genes.toarray(), guides.toarray()) for _, genes, guides in opened.blocks()]
        np.testing.assert_array_equal(opened.take(np.array([2, 3])).toarray(), GENE_COUNTS[[2, 1]])
        table = annotate_cells(opened, source, GuideAssignment()).obs
    np.testing.assert_array_equal(np.vstack([genes for genes, _ in parts]), GENE_COUNTS[[0, 1, 2, 1, 2, 3]])
    np.testing.assert_array_equal(
        np.vstack([guides for _, guides in parts]), GUIDE_COUNTS[[0, 1, 2, 1, 2, 3]]
    )
    assert opened.obs.index.tolist() == [f"{name}_{cell}" for name in ("s1", "s2") for cell in CELLS[:3]]
    assert table["batch"].tolist() == ["s1"] * 3 + ["s2"] * 3
    assert "2 samples: s1, s2" in opened.notes
    if layout == "folders":
        assert sum("raw_feature_bc_matrix" in note for note in opened.notes) == 2


def test_a_table_with_samples_is_joined_by_sample_and_barcode(tmp_path):
    table = tmp_path / "cells.csv"
    rows = [f"{cell},{name},{name}{cell[0]}" for name in ("s2", "s1") for cell in CELLS[:3]]
    table.write_text("barcode,sample,label\n" + "\n".join(rows[:-1]) + "\n")
    read = read_screen(replace(two_samples(tmp_path, "prefixes"), cell_metadata=str(table)))
    assert read.obs["label"].to_dict() == {
        "s1_AAA-1": "s1A", "s1_CCC-1": "s1C", "s2_AAA-1": "s2A", "s2_CCC-1": "s2C", "s2_GGG-1": "s2G",
    }  # fmt: skip
    np.testing.assert_array_equal(read.X.toarray(), GENE_COUNTS[[0, 1, 1, 2, 3]])
    assert RawScreen.of(read).left_out["not_in_cell_metadata"][0] == 1


def test_samples_may_be_called_by_numbers_and_barcodes_begin_with_them(tmp_path):
    for name in ("1", "2"):
        write_h5(tmp_path / "run" / f"{name}.h5", COUNTS[:3], CELLS[:3])
    table = tmp_path / "cells.csv"
    rows = [f"{cell},{name},{name}{cell[0]}" for name in "12" for cell in CELLS[:3]]
    table.write_text("barcode,sample,label\n" + "\n".join(rows) + "\n")
    source = ScreenSource("toy", str(tmp_path / "run"), cell_metadata=str(table))
    assert read_screen(source).obs["label"].tolist() == ["1A", "1C", "1G", "2A", "2C", "2G"]
    table.write_text("barcode,sample,label\n" + "".join(f"{row[6]}_{row}\n" for row in rows))
    assert read_screen(source).obs["label"].tolist() == ["1A", "1C", "1G", "2A", "2C", "2G"]


def test_a_long_table_of_guide_counts_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(guide_files, "BLOCK_ENTRIES", 6)
    for form in ("cells", "guides", "long"):
        path = tmp_path / f"{form}.csv"
        table = pd.DataFrame(GUIDE_COUNTS, index=pd.Index(CELLS, name="cell"), columns=GUIDES)
        long = table.stack().reset_index().set_axis(["cell_barcode", "sgRNA", "UMI_count"], axis=1)
        {"cells": table, "guides": table.T, "long": long}[form].to_csv(path, index=form != "long")
        read = read_screen(replace(write_mtx(tmp_path / "run", GENE_COUNTS), guide_counts=str(path)))
        assert read.uns["guide_names"].tolist() == GUIDES
        np.testing.assert_array_equal(read.obsm["guide_counts"].toarray(), GUIDE_COUNTS)
    path.write_text("barcode,guide,count\n")
    with pytest.raises(InputError, match=r"long\.csv: found no rows"):
        read_screen(replace(write_mtx(tmp_path / "run", GENE_COUNTS), guide_counts=str(path)))


def test_samples_with_other_features_are_refused(tmp_path):
    write_mtx(tmp_path / "run" / "a")
    write_mtx(tmp_path / "run" / "b", COUNTS[:, :5])
    with pytest.raises(InputError, match=r"b/matrix\.mtx\.gz: found 5 features.*1 are in one of the two"):
        read_screen(ScreenSource("toy", str(tmp_path / "run")))


def test_files_that_no_sample_needs_are_not_read(tmp_path):
    folder = tmp_path / "outs"
    write_h5(folder / "filtered_feature_bc_matrix.h5")
    write_mtx(folder / "filtered_feature_bc_matrix")
    write_h5(folder / "raw_feature_bc_matrix.h5")
    (folder / "molecule_info.h5").write_bytes(b"x")
    (folder / "model_weights.h5").write_bytes(b"x")
    write_mtx(folder / "analysis" / "matrix")
    samples, notes = find_samples(folder)
    assert [sample.matrix.name for sample in samples] == ["filtered_feature_bc_matrix.h5"]
    assert samples[0].name == ""
    assert len(notes) == 2
    mtx, _ = find_samples(folder, "mtx")
    assert [sample.matrix.parent.name for sample in mtx] == ["filtered_feature_bc_matrix"]
    assert [file.name for file in mtx[0].files] == ["matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz"]
    read = read_screen(ScreenSource("toy", str(folder), format="10x_mtx"))
    np.testing.assert_array_equal(read.X.toarray(), GENE_COUNTS)


CALLS = "cell_barcode,num_features,feature_call,num_umis\n"


def test_calls_of_cell_ranger_stand(tmp_path):
    calls = tmp_path / "protospacer_calls_per_cell.csv"
    calls.write_text(
        CALLS + "AAA-1,1,KLF1_g1,3\nGGG-1,1,NT_g1,2\nTTT-1,2,KLF1_g1|SET_g1,6|2\nACG-1,1,NT_g1,9\n"
    )
    source = write_h5(tmp_path / "a.h5")
    source = replace(source, guide_table=str(guide_table(tmp_path)), guide_calls=str(calls))
    with open_screen(source) as opened:
        several = annotate_cells(opened, source, GuideAssignment(method="threshold"))
        single = annotate_cells(opened, source, GuideAssignment())
    obs = several.obs
    assert obs["perturbation"].tolist() == ["KLF1", None, "control", "KLF1+SET"]
    assert obs["guide_id"].tolist() == ["KLF1_g1", "", "NT_g1", "KLF1_g1;SET_g1"]
    assert obs["status"].tolist() == ["assigned", "no_guide", "assigned", "assigned"]
    assert obs["guide_umis"].tolist() == [3, 0, 2, 8]
    assert obs["guide_share"].tolist() == [1, 0, 1, 0.75]
    assert single.obs["status"].tolist() == ["assigned", "no_guide", "assigned", "too_many_guides"]
    assert single.rules["too_many_guides"] == "≤ 1 guide"
    assert "1 of 4 barcodes of protospacer_calls_per_cell.csv are no cell of the screen" in opened.notes
    in_memory = annotate_cells(RawScreen.of(read_screen(source)), source, GuideAssignment(method="threshold"))
    pd.testing.assert_frame_equal(in_memory.obs, obs)


def test_calls_without_umis_stand_and_no_umis_are_invented(tmp_path):
    calls = tmp_path / "calls.csv"
    rows = (("AAA-1", "KLF1_g1", 3), ("GGG-1", "NT_g1", 2), ("TTT-1", "KLF1_g1|SET_g1", "6|2"))
    source = replace(write_h5(tmp_path / "a.h5"), guide_table=str(guide_table(tmp_path)))
    source = replace(source, guide_calls=str(calls))
    tables, notes = {}, {}
    for umis in (True, False):
        header = "cell_barcode,feature_call" + ",num_umis" * umis
        calls.write_text("\n".join([header, *(",".join(map(str, row[: 2 + umis])) for row in rows)]) + "\n")
        with open_screen(source) as opened:
            tables[umis] = annotate_cells(opened, source, GuideAssignment(method="threshold"))
            notes[umis] = " ".join(opened.notes)
    columns = ["guide_umis", "guide_share"]
    pd.testing.assert_frame_equal(tables[False].obs, tables[True].obs.drop(columns=columns))
    assert tables[True].guide_calls["umis"].tolist() == [9, 2, 2]
    assert tables[False].guide_calls["umis"].isna().all()
    same = tables[False].guide_calls.drop(columns="umis")
    pd.testing.assert_frame_equal(same, tables[True].guide_calls.drop(columns="umis"))
    assert ranked_umis(tables[False].obs.get("guide_umis")).empty
    assert "no column num_umis in calls.csv" in notes[False] and "num_umis" not in notes[True]


@pytest.mark.parametrize("empty", ["CCC-1,0,,\n", "CCC-1,0,NA,NA\n", "CCC-1,0,None,\n"])
def test_a_cell_without_a_call_leaves_the_others_as_they_are(tmp_path, empty):
    calls = tmp_path / "calls.csv"
    calls.write_text(CALLS + "AAA-1,1,KLF1_g1,3\n" + empty + "GGG-1,1,NT_g1,2\n")
    read = read_screen(replace(write_h5(tmp_path / "a.h5"), guide_calls=str(calls)))
    assert read.uns["called_guide_names"].tolist() == ["KLF1_g1", "NT_g1"]
    np.testing.assert_array_equal(read.obsm["called_guides"].toarray(), [[3, 0], [0, 0], [0, 2], [0, 0]])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("AAA-1,2,KLF1_g1|SET_g1,6\n", r"cell 'AAA-1': found 2 guides and num_umis '6'"),
        ("AAA-1,1,KLF1_g1,6\nAAA-1,1,NT_g1,6\n", r"1 more than once, such as 'AAA-1'"),
        ("ZZZ-1,1,KLF1_g1,6\n", r"none of the 4 barcodes of the matrix"),
    ],
)
def test_calls_that_cannot_be_used_are_refused(tmp_path, rows, message):
    calls = tmp_path / "calls.csv"
    calls.write_text(CALLS + rows)
    with pytest.raises(InputError, match=message):
        read_screen(replace(write_h5(tmp_path / "a.h5"), guide_calls=str(calls)))


@pytest.mark.parametrize("form", ["cells", "guides", "long", "mtx", "h5", "without_suffix"])
def test_guide_counts_of_their_own_are_joined_by_barcode(tmp_path, form):
    # In another order, without the second cell, and with one that is not in the screen.
    order = [3, 0, 2]
    cells = [CELLS[i] for i in order] + ["ACG-1"]
    counts = np.vstack([GUIDE_COUNTS[order], [[5, 5, 5]]])
    table = pd.DataFrame(counts, index=pd.Index(cells, name="cell"), columns=GUIDES)
    path = tmp_path / "guide_counts.csv"
    if form == "cells":
        table.to_csv(path)
    elif form == "guides":
        table.T.to_csv(path)
    elif form == "long":
        long = table.stack().reset_index().set_axis(["barcode", "guide", "count"], axis=1)
        long[long["count"] > 0].to_csv(path, index=False)
    elif form == "without_suffix":
        table.index = [cell.removesuffix("-1") for cell in cells]
        table.to_csv(path)
    elif form == "mtx":
        path = tmp_path / "guide_matrix"
        write_mtx(path, np.hstack([np.ones((4, 3), dtype=int), counts]), cells)
    else:
        path = tmp_path / "guides.h5"
        write_h5(path, np.hstack([np.ones((4, 3), dtype=int), counts]), cells)
    source = write_mtx(tmp_path / "run", GENE_COUNTS)
    read = read_screen(replace(source, guide_counts=str(path)))
    names = read.uns["guide_names"].tolist()
    found = pd.DataFrame(read.obsm["guide_counts"].toarray(), index=read.obs_names, columns=names)[GUIDES]
    expected = GUIDE_COUNTS.copy()
    expected[1] = 0
    np.testing.assert_array_equal(found.to_numpy(), expected)
    np.testing.assert_array_equal(read.X.toarray(), GENE_COUNTS)
    notes = " / ".join(read.uns["notes"])
    assert "1 of 4 cells have no guide counts" in notes
    assert "1 of 4 barcodes" in notes
    assert ("without the number at their end" in notes) == (form == "without_suffix")


def test_guide_counts_of_their_own_replace_those_in_the_matrix(tmp_path):
    path = tmp_path / "guide_counts.tsv"
    pd.DataFrame(GUIDE_COUNTS * 2, index=CELLS, columns=GUIDES).to_csv(path, sep="\t")
    read = read_screen(replace(write_h5(tmp_path / "a.h5"), guide_counts=str(path)))
    np.testing.assert_array_equal(read.obsm["guide_counts"].toarray(), GUIDE_COUNTS * 2)
    np.testing.assert_array_equal(read.X.toarray(), GENE_COUNTS)
    path.write_text("cell\tKLF1_g1\nAAA-1\t0.5\n")
    with pytest.raises(InputError, match=r"guide_counts\.tsv: found fractions, such as 0\.5"):
        read_screen(replace(write_h5(tmp_path / "a.h5"), guide_counts=str(path)))
    path.write_text("cell\tKLF1_g1\nAAA-1\tmany\n")
    with pytest.raises(InputError, match=r"column 'KLF1_g1': found 'many'; expected a count"):
        read_screen(replace(write_h5(tmp_path / "a.h5"), guide_counts=str(path)))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("form", ["folder", "prefix", "h5"])
def test_a_matrix_of_guides_beside_that_of_genes_is_no_sample(tmp_path, form, named):
    run = tmp_path / "run"
    write_mtx(run, GENE_COUNTS, prefix="GSM1_")
    guides = np.hstack([np.zeros((4, 3), dtype=int), GUIDE_COUNTS])
    path = run / {"folder": "guides", "prefix": "GSM2_matrix.mtx.gz", "h5": "guides_matrix.h5"}[form]
    if form == "h5":
        write_h5(path, guides)
        with h5py.File(path, "r+") as file:
            file["matrix/features/feature_type"][:] = b"CRISPR Guide Capture"
    else:
        prefix = "GSM2_" if form == "prefix" else ""
        write_mtx(run if prefix else path, guides, prefix=prefix)
        features = run / f"{prefix}features.tsv.gz" if prefix else path / "features.tsv.gz"
        text = gzip.decompress(features.read_bytes()).replace(b"Gene Expression", b"CRISPR Guide Capture")
        features.write_bytes(gzip.compress(text))
    read = read_screen(ScreenSource("toy", str(run), guide_counts=str(path) if named else ""))
    np.testing.assert_array_equal(read.X.toarray(), GENE_COUNTS)
    assert read.obs_names.tolist() == CELLS
    notes = " / ".join(read.uns["notes"])
    if named:
        assert read.uns["guide_names"].tolist() == GENES + GUIDES
        np.testing.assert_array_equal(read.obsm["guide_counts"].toarray(), guides)
        assert "left aside" not in notes
    else:
        assert "guide_counts" not in read.obsm
        assert "left aside: it counts no genes; if it counts guides, give it as `guide_counts`" in notes


def test_a_matrix_without_types_that_is_not_named_is_told_from_samples(tmp_path):
    write_mtx(tmp_path / "run", GENE_COUNTS, prefix="GSM1_")
    write_mtx(tmp_path / "run", GENE_COUNTS[:, :2], prefix="GSM2_", version=2)
    with pytest.raises(
        InputError, match=r"of one reference, .* or give a matrix of guides as `guide_counts`"
    ):
        read_screen(ScreenSource("toy", str(tmp_path / "run")))


def test_of_two_genomes_both_are_named_and_how_to_take_one(tmp_path):
    path = tmp_path / "a.h5"
    source = write_h5(path, GENE_COUNTS, version=2)
    with h5py.File(path, "r+") as file:
        file.copy("GRCh38", "mm10")
    with pytest.raises(InputError, match=r"2 genomes: GRCh38 \(4 barcodes\), mm10 \(4") as caught:
        read_screen(source)
    code = re.search(r'python -c "(.*)", and', str(caught.value))[1]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    read = read_screen(ScreenSource("toy", str(tmp_path / "a_GRCh38.h5")))
    np.testing.assert_array_equal(read.X.toarray(), GENE_COUNTS)


def test_the_feature_reference_of_cell_ranger_is_a_guide_table(tmp_path):
    reference = tmp_path / "feature_reference.csv"
    reference.write_text(
        "id,name,read,pattern,sequence,feature_type,target_gene_id,target_gene_name\n"
        + "".join(
            f"{guide},{guide},R2,(BC),ACGT,CRISPR Guide Capture,x,{target}\n"
            for guide, target in zip(GUIDES, ["KLF1", "SET", "Non-Targeting"], strict=True)
        )
    )
    source = replace(write_h5(tmp_path / "a.h5"), guide_table=str(reference))
    with open_screen(source) as opened:
        table = annotate_cells(opened, source, GuideAssignment())
    assert table.obs["perturbation"].tolist() == ["KLF1", "SET", "control", None]
    reference.write_text("sgRNA,gene\nKLF1_g1,KLF1\n")
    with (
        pytest.raises(InputError, match=r"no column 'guide' .*rename 'sgRNA' to 'guide'"),
        open_screen(source) as opened,
    ):
        annotate_cells(opened, source, GuideAssignment())


def test_barcodes_that_are_no_cells_are_the_first_line_of_the_funnel():
    funnel = Funnel(10, {"not_in_cell_metadata": (5, "why")})
    funnel.drop("min_counts", "≥ 1", np.arange(10) < 3)
    table = funnel.table()
    assert table["cells_before"].tolist() == [15, 10]
    assert table["cells_removed"].tolist() == [5, 3]
    assert table["cells_after"].tolist() == [10, 7]
    assert table["note"].tolist()[0] == "why"


def without_counts(folder):
    """Spoil every count of a folder, so that whoever reads one fails."""
    for path in folder.rglob("*matrix.mtx.gz"):
        lines = gzip.decompress(path.read_bytes()).splitlines()
        path.write_bytes(gzip.compress(b"\n".join(lines[:3]) + b"\n"))
    for path in folder.rglob("*.h5"):
        with h5py.File(path, "r+") as file:
            data = file["matrix/data"]
            shape, dtype, size = data.shape, data.dtype, data.nbytes
            del file["matrix/data"]
            # In a file that is not there: the type is known, and reading it fails.
            file["matrix"].create_dataset("data", shape, dtype, external=[("gone.bin", 0, size)])


@pytest.mark.parametrize("layout", ["folders", "prefixes", "hdf5"])
def test_tables_of_samples_are_read_without_any_count(tmp_path, layout):
    source = two_samples(tmp_path, layout)
    with open_screen(source) as whole:
        pass
    without_counts(tmp_path / layout)
    with open_screen(source, tables_only=True) as tables:
        pd.testing.assert_frame_equal(tables.obs, whole.obs)
        pd.testing.assert_frame_equal(tables.var, whole.var)
        assert tables.counts.shape == (6, 6)
        assert tables.sample_column == "sample"
        assert tables.guide_names.tolist() == GUIDES
        assert tables.notes == whole.notes
        with pytest.raises(ValueError, match="counts of this screen were not opened"):
            next(tables.blocks())
    with pytest.raises(InputError), open_screen(source) as spoiled:
        list(spoiled.blocks())


@pytest.mark.parametrize("form", ["cells", "guides", "long", "mtx", "h5"])
def test_names_of_guides_are_read_without_their_counts(tmp_path, form):
    table = pd.DataFrame(GUIDE_COUNTS, index=pd.Index(CELLS, name="cell"), columns=GUIDES).astype(object)
    path = tmp_path / "guides" / "table.csv"
    path.parent.mkdir()
    if form in ("mtx", "h5"):
        path = path.parent / ("matrix" if form == "mtx" else "guides.h5")
        (write_mtx if form == "mtx" else write_h5)(path, COUNTS)
        without_counts(path.parent)
    elif form == "long":
        long = table.stack().reset_index().set_axis(["barcode", "guide", "count"], axis=1)
        long.assign(count="spoiled").to_csv(path, index=False)
    else:
        table[:] = "spoiled"
        (table if form == "cells" else table.T).to_csv(path)
    source = replace(write_mtx(tmp_path / "run", GENE_COUNTS[:3], CELLS[:3]), guide_counts=str(path))
    with open_screen(source, tables_only=True) as tables:
        assert tables.guide_names.tolist() == GUIDES
        assert tables.guide_counts is None
        assert any("1 of 4 barcodes" in note for note in tables.notes)
        assert needs_guide_counts(tables, source)
    with pytest.raises(InputError), open_screen(source) as spoiled:
        list(spoiled.blocks())


def test_guides_that_were_called_elsewhere_are_labels_without_any_count(tmp_path):
    calls = tmp_path / "calls.csv"
    calls.write_text(CALLS + "AAA-1,1,KLF1_g1,3\nGGG-1,1,NT_g1,2\nTTT-1,2,KLF1_g1|SET_g1,6|2\n")
    write_h5(tmp_path / "run" / "filtered_feature_bc_matrix.h5")
    source = ScreenSource("toy", str(tmp_path / "run"), guide_calls=str(calls))
    source = replace(source, guide_table=str(guide_table(tmp_path)))
    without_counts(tmp_path / "run")
    with open_screen(source, tables_only=True) as tables:
        assert not needs_guide_counts(tables, source)
        labels = label_cells(tables, source, GuideAssignment(method="threshold")).obs["perturbation"]
    assert labels.tolist() == ["KLF1", None, "control", "KLF1+SET"]
