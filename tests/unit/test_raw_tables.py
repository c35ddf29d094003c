"""What can be wrong with a table or a matrix: one message each, which names the file and what to do."""

import gzip
from dataclasses import replace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from biojepa.errors import InputError
from biojepa.raw import ScreenSource, open_screen, read_screen, require_column
from biojepa.raw.counts import what_is_wrong
from biojepa.raw.guide_files import read_guide_counts
from biojepa.raw.matrix import CompressedRows, SelectedRows, StackedRows, take_rows
from biojepa.raw.tables import match_barcodes, read_cell_metadata, read_guide_table, read_table

BARCODES = pd.Index(["AAA-1", "CCC-1", "GGG-1"])
TABLE = "barcode,batch\nAAA-1,1\nCCC-1,2\nGGG-1,3\n"


def table_at(path, content):
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_any_line_end_and_a_byte_order_mark_are_read(tmp_path):
    for number, content in enumerate(
        (TABLE.encode(), TABLE.replace("\n", "\r\n").encode(), TABLE.encode("utf-8-sig"))
    ):
        table, found, notes = read_cell_metadata(table_at(tmp_path / f"{number}.csv", content), BARCODES)
        assert found.all()
        assert table["batch"].tolist() == [1, 2, 3]
        assert notes == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"a\.csv: found an empty file"),
        ("a.csv.gz", b"", r"a\.csv\.gz: found an empty file"),
        ("a.csv", "barcode,batch\n", r"a\.csv: found no rows; expected one row per cell"),
        ("a.csv", TABLE.replace(",", "\t"), r"which holds tabs; expected columns separated by commas.*\.tsv"),
        ("a.csv", TABLE.replace(",", ";"), r"which holds semicolons; .*replace semicolons by commas"),
        ("a.tsv", TABLE, r"'barcode,batch', which holds commas; expected .* tabs.*end in \.csv"),
        ("a.csv", "barcode,née\nAAA-1,1\n".encode("latin-1"), r"not UTF-8 \(byte 0xe9 in line 1\).*iconv"),
        ("a.csv", TABLE.encode("utf-16"), r"not UTF-8 \(byte 0xff in line 1\)"),
        ("a.csv.gz", b"x,y\n" * 9 + b"\xe9,1\n", r"not UTF-8 \(byte 0xe9 in line 10\)"),
        ("a.csv", TABLE + "TTT-1,1,2,3\n", r"lines of different lengths .*line 5"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_message(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        read_cell_metadata(table_at(tmp_path / name, content), BARCODES)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz"])
def test_row_names_of_r_are_barcodes_or_guides(tmp_path, name):
    """R leaves out the name of the column of row names; pandas alone would hide the column."""

    def written(text):
        return table_at(tmp_path / name, text if "csv" in name else text.replace(",", "\t"))

    table, found, _ = read_cell_metadata(written('"batch"\n"CCC-1",2\n"AAA-1",1\n'), BARCODES)
    assert found.tolist() == [True, True, False]
    assert table["batch"].tolist() == [1, 2]
    assert table.columns.tolist() == ["batch"]
    # Names of rows beside a column of barcodes are no barcodes.
    table, found, _ = read_cell_metadata(written("cell,batch\n1,GGG-1,3\n2,AAA-1,1\n"), BARCODES)
    assert found.tolist() == [True, False, True]
    assert table["batch"].tolist() == [1, 3]
    assert read_guide_table(written("target\nA_g1,A\nNT_g1,NT\n")).to_dict() == {"A_g1": "A", "NT_g1": "NT"}
    assert read_guide_table(written("guide,target\n1,A_g1,A\n")).to_dict() == {"A_g1": "A"}
    guides, counts, _ = read_guide_counts(
        written("A_g1,B_g1\nGGG-1,1,2\nAAA-1,3,4\nTTT-1,5,6\n"), BARCODES, lambda _: None
    )
    assert guides.tolist() == ["A_g1", "B_g1"]
    np.testing.assert_array_equal(counts.toarray(), [[3, 4], [0, 0], [1, 2]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "barcode,batch\nAAA-1,1,\n",
            r"2 fields in the header, and 3 in the first row, which ends with a del",
        ),
        ("batch\nx,AAA-1,1\n", r"a\.csv: found 1 fields in the header, and 3 in the first row; expected"),
    ],
)
def test_rows_longer_than_the_header_are_one_message(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_table(table_at(tmp_path / "a.csv", content), "cell_metadata")


def test_a_gzipped_table_cut_in_half_is_one_message(tmp_path):
    rng = np.random.default_rng(0)
    path = table_at(tmp_path / "a.csv.gz", "barcode,x\n" + "".join(f"{x},1\n" for x in rng.random(5000)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.csv\.gz: found a gzip file that is damaged or cut off"):
        read_table(path, "cell_metadata")
    path.write_bytes(b"not gzip at all")
    with pytest.raises(InputError, match=r"a\.csv\.gz: found a gzip file that is damaged or cut off"):
        read_table(path, "cell_metadata")


def test_barcodes_are_matched_as_they_are_before_anything_is_cut_off():
    names = pd.Index(["GGG-2", "GGG-1", "AAA-1"])
    places, note = match_barcodes(BARCODES, names)
    assert places.tolist() == [2, -1, 1]
    assert note == ""
    places, note = match_barcodes(BARCODES, pd.Index(["GGG", "AAA", "TTT"]))
    assert places.tolist() == [1, -1, 0]
    assert note == "barcodes compared without the number at their end"
    # Two wells share the sequence, so that it names no cell.
    places, _ = match_barcodes(pd.Index(["AAA-1", "AAA-2"]), pd.Index(["AAA"]))
    assert places.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("columns", "asked", "setting", "suggested"),
    [
        (["perturbation", "batch"], "pertubation", "perturbation_column", "perturbation"),
        (["Perturbation", "batch"], "perturbation", "perturbation_column", "Perturbation"),
        (["gem_group", "guide_identity"], "label", "perturbation_column", "guide_identity"),
        (["gemgroup", "n"], "lane", "batch_column", "gemgroup"),
        (["nCount_RNA", "n"], "size_of_library", "library_size_column", "nCount_RNA"),
    ],
)
def test_a_column_under_another_name_is_suggested(columns, asked, setting, suggested):
    with pytest.raises(InputError, match=rf"did you mean '{suggested}'\?"):
        require_column(pd.DataFrame(columns=columns), asked, "f.h5ad", setting)
    with pytest.raises(InputError) as caught:
        require_column(pd.DataFrame(columns=["x9"]), asked, "f.h5ad", setting)
    assert "did you mean" not in str(caught.value)


def test_a_guide_table_without_its_columns_is_one_message(tmp_path):
    path = table_at(tmp_path / "g.csv", "guide,gene\nx,KLF1\n")
    with pytest.raises(InputError, match=r"no column 'target' .*rename 'gene' to 'target'"):
        read_guide_table(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0, -2.0]], "negative values, such as -2"),
        ([[1.0, np.nan]], "1 values that are not finite, such as nan"),
        ([[np.inf, 1.0]], "1 values that are not finite, such as inf"),
        ([[0.0, np.log1p(3)]], "fractions, such as 1.38629, and nothing above 1.39: log-normalized"),
        ([[0.5, 800.0]], "fractions, such as 0.5: normalized"),
        ([[0.0, 0.0]], "nothing but zeros"),
        ([[True, False]], "truth values"),
    ],
)
def test_what_is_wrong_with_counts_is_said(tmp_path, values, message):
    array = np.array(values)
    assert message in what_is_wrong(array)
    assert message in what_is_wrong(sparse.csr_matrix(array)) or not array.any()
    if array.dtype == bool:
        return
    path = tmp_path / "x.h5ad"
    ad.AnnData(
        array.astype(np.float32), obs=pd.DataFrame(index=["c"]), var=pd.DataFrame(index=["A", "B"])
    ).write_h5ad(path)
    with pytest.raises(
        InputError, match=r"x\.h5ad: found (no raw counts|non-integer counts).*\(X: "
    ) as caught:
        read_screen(ScreenSource("toy", str(path)))
    assert message in str(caught.value)


def test_logarithms_declared_as_counts_are_refused_though_counts_are_elsewhere(tmp_path):
    counts = np.array([[0, 3], [2, 0]], dtype=np.float32)
    screen = ad.AnnData(
        np.log1p(counts), obs=pd.DataFrame(index=["a", "b"]), var=pd.DataFrame(index=["A", "B"])
    )
    screen.layers["counts"] = counts
    path = tmp_path / "x.h5ad"
    screen.write_h5ad(path)
    source = ScreenSource("toy", str(path))
    np.testing.assert_array_equal(read_screen(source).X.toarray(), counts)
    with pytest.raises(InputError, match=r"non-integer counts.*X: fractions.*log-normalized.*`counts_layer`"):
        read_screen(replace(source, counts_layer="X"))


def write_run(
    folder, matrix=None, features="E0\tA\tGene Expression\nE1\tB\tGene Expression\n", barcodes="a\nb\nc\n"
):
    folder.mkdir(exist_ok=True)
    head = "%%MatrixMarket matrix coordinate integer general\n"
    (folder / "matrix.mtx").write_text(head + "2 3 2\n1 1 4\n2 3 5\n" if matrix is None else matrix)
    (folder / "features.tsv").write_bytes(features if isinstance(features, bytes) else features.encode())
    (folder / "barcodes.tsv").write_text(barcodes)
    return ScreenSource("toy", str(folder))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"matrix": ""}, r"matrix\.mtx: found a file that cannot be read"),
        ({"barcodes": ""}, r"barcodes\.tsv: found an empty file"),
        (
            {"features": b"E0\tA\nE1\t\xb5\n"},
            r"features\.tsv: found text that is not UTF-8 \(byte 0xb5 in line 2",
        ),
        (
            {"features": "E0,A\nE1,B\n"},
            r"features\.tsv: found one column, such as 'E0,A', which holds commas",
        ),
        ({"barcodes": "a\nb\n"}, r"2 × 3 in the matrix, 2 rows in features\.tsv and 2 in barcodes\.tsv"),
        (
            {"matrix": "%%MatrixMarket matrix coordinate integer general\n3 2 1\n1 1 4\n"},
            r"transpose the matrix, which has cells in rows",
        ),
        (
            {"matrix": "%%MatrixMarket matrix coordinate integer general\n2 3 1\n1 1 -4\n"},
            r"no raw counts \(negative values, such as -4\)",
        ),
        (
            {"matrix": "%%MatrixMarket matrix coordinate integer general\n2 3 2\n1 1 4\n2 3"},
            r"matrix\.mtx: found line 4 incomplete: fewer than three numbers; .*cut off: fetch it again",
        ),
        (
            {"matrix": "%%MatrixMarket matrix coordinate real general\n2 3 1\n1 1 nan\n"},
            r"no raw counts \(1 values that are not finite, such as nan\)",
        ),
    ],
)
def test_a_damaged_10x_folder_is_one_message(tmp_path, parts, message):
    with pytest.raises(InputError, match=message):
        read_screen(write_run(tmp_path / "run", **parts))


def test_windows_line_ends_change_nothing_in_a_10x_folder(tmp_path):
    source = write_run(tmp_path / "run")
    for file in (tmp_path / "run").iterdir():
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    read = read_screen(source)
    np.testing.assert_array_equal(read.X.toarray(), [[4, 0], [0, 0], [0, 5]])
    assert read.obs_names.tolist() == ["a", "b", "c"]
    assert read.var_names.tolist() == ["A", "B"]


def test_a_truncated_h5ad_is_one_message_wherever_it_ends(tmp_path):
    path = tmp_path / "x.h5ad"
    counts = np.random.default_rng(0).poisson(2.0, (300, 40)).astype(np.float32)
    obs = pd.DataFrame(index=[f"c{i}" for i in range(300)])
    ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(40)])).write_h5ad(path)
    whole = path.read_bytes()
    for share in (0, 0.01, 0.3, 0.6, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match=r"x\.h5ad: found (an empty file|a file that HDF5 cannot open)"):
            read_screen(ScreenSource("toy", str(path)))


@pytest.mark.parametrize(
    "part", ["X/indices", "X/indptr", "X:shape", "obs/_index", "obs:column-order", "var/_index"]
)
@pytest.mark.filterwarnings("ignore:Element")
@pytest.mark.parametrize("damage", ["lost", "group", "text"])
def test_an_h5ad_with_a_damaged_part_is_one_message_with_its_name(tmp_path, part, damage):
    path = tmp_path / "x.h5ad"
    counts = sparse.csr_matrix(np.array([[1, 0], [2, 3]], dtype=np.float32))
    ad.AnnData(counts, pd.DataFrame(index=["a", "b"]), pd.DataFrame(index=["A", "B"])).write_h5ad(path)
    name, _, attribute = part.partition(":")
    with h5py.File(path, "a") as file:
        if attribute:
            del file[name].attrs[attribute]
            if damage != "lost":
                file[name].attrs[attribute] = "broken"
        else:
            del file[name]
            if damage == "group":
                file.create_group(name)
            elif damage == "text":
                file[name] = "broken"
    with pytest.raises(InputError, match=r"x\.h5ad: found "):
        read_screen(ScreenSource("toy", str(path)))


@pytest.mark.parametrize("entries", [1, 4, None])
def test_rows_that_are_stacked_and_selected_are_those_of_the_whole(entries):
    rng = np.random.default_rng(1)
    counts = rng.poisson(0.7, (23, 5)).astype(np.float32)
    parts = [
        CompressedRows.of(sparse.csr_matrix(part), entries)
        for part in (counts[:9], counts[9:10], counts[10:])
    ]
    keep = rng.random(23) < 0.4
    selected = SelectedRows(StackedRows(parts), keep)
    expected = counts[keep]
    assert selected.shape == expected.shape
    found = np.zeros_like(expected)
    for first, block in selected.blocks():
        found[first : first + block.shape[0]] += block.toarray()
    np.testing.assert_array_equal(found, expected)
    rows = np.array([1, 4, len(expected) - 1])
    np.testing.assert_array_equal(take_rows(selected, rows).toarray(), expected[rows])
    n_read = sum(block.shape[0] for _, block in selected.blocks(np.arange(len(expected)) == 2))
    assert n_read == 1 if entries == 1 else n_read >= 1


def test_a_folder_of_h5ad_files_says_what_to_name(tmp_path):
    (tmp_path / "one.h5ad").write_bytes(b"x")
    with (
        pytest.raises(InputError, match=r"a folder with one\.h5ad.*set `source` to the file"),
        open_screen(ScreenSource("toy", str(tmp_path))),
    ):
        pass
