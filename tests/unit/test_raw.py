"""Reading screens in the shapes they have in the wild."""

import gzip
import io
from dataclasses import replace
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.io import mmwrite

from biojepa.errors import InputError
from biojepa.logs import log_to
from biojepa.raw import RawScreen, ScreenSource, open_screen, read_screen, require_column
from biojepa.raw.counts import holds_counts, to_counts
from biojepa.raw.matrix import CompressedRows, spans, take_rows
from biojepa.raw.parts import damage_told
from biojepa.raw.read import gene_names
from biojepa.raw.tables import suggested_column

COUNTS = np.array([[0, 3, 1, 0], [2, 0, 0, 5], [0, 0, 7, 1]])
GENES = ["KLF1", "SET", "STAT1", "MT-CO1"]
CELLS = ["AAA-1", "CCC-1", "GGG-1"]

pytestmark = pytest.mark.filterwarnings("ignore:Observation names are not unique")


def screen(x=COUNTS, **parts):
    obs = pd.DataFrame({"perturbation": ["KLF1", "control", "SET"]}, index=CELLS)
    return ad.AnnData(X=np.asarray(x, dtype=np.float32), obs=obs, var=pd.DataFrame(index=GENES), **parts)


def write(adata, folder):
    path = folder / "screen.h5ad"
    adata.write_h5ad(path)
    return ScreenSource("toy", str(path), perturbation_column="perturbation")


def write_10x(folder, counts, features, barcodes, zipped=True, prefix="", features_name="features.tsv"):
    folder.mkdir(exist_ok=True)
    text = io.BytesIO()
    mmwrite(text, sparse.coo_matrix(counts.T), field="integer")
    parts = {
        "matrix.mtx": text.getvalue(),
        features_name: "".join("\t".join(row) + "\n" for row in features).encode(),
        "barcodes.tsv": "".join(f"{barcode}\n" for barcode in barcodes).encode(),
    }
    for name, content in parts.items():
        path = folder / f"{prefix}{name}{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    return ScreenSource("toy", str(folder))


def features():
    guides = [[name, name, "CRISPR Guide Capture"] for name in ("KLF1", "NTg1")]
    return [[f"ENSG{i}", gene, "Gene Expression"] for i, gene in enumerate(GENES)] + guides


def with_guides():
    return np.hstack([COUNTS, [[9, 0], [0, 8], [1, 1]]])


@pytest.mark.parametrize("layout", ["dense", "csr", "csc", "int64", "float64"])
def test_counts_are_the_same_in_every_layout(tmp_path, layout):
    adata = screen()
    adata.X = {
        "dense": COUNTS.astype(np.float32),
        "csr": sparse.csr_matrix(COUNTS, dtype=np.float32),
        "csc": sparse.csc_matrix(COUNTS, dtype=np.float32),
        "int64": sparse.csr_matrix(COUNTS, dtype=np.int64),
        "float64": COUNTS.astype(np.float64),
    }[layout]
    read = read_screen(write(adata, tmp_path))
    assert sparse.isspmatrix_csr(read.X)
    assert read.X.dtype == np.float32
    assert read.X.has_canonical_format
    np.testing.assert_array_equal(read.X.toarray(), COUNTS)
    assert read.obs["perturbation"].tolist() == ["KLF1", "control", "SET"]
    assert read.var["gene_id"].tolist() == GENES


def random_counts(n_cells=37, n_genes=11, seed=0):
    """Return counts with empty cells, one of them the last, and an unexpressed gene."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.6, (n_cells, n_genes))
    counts[[5, n_cells - 1]], counts[:, 3] = 0, 0
    return counts


@pytest.mark.parametrize("entries", [1, 7, 50, None])
@pytest.mark.parametrize("layout", ["dense", "csr", "csc", "mtx"])
def test_blocks_of_any_size_hold_the_same_counts(tmp_path, layout, entries):
    counts = random_counts()
    cells = [f"c{i}" for i in range(len(counts))]
    genes = [f"G{i}" for i in range(counts.shape[1])]
    if layout == "mtx":
        source = write_10x(tmp_path / "run", counts, [[name, name] for name in genes], cells)
    else:
        kinds = {"dense": np.asarray, "csr": sparse.csr_matrix, "csc": sparse.csc_matrix}
        adata = ad.AnnData(
            X=kinds[layout](counts.astype(np.float64)),
            obs=pd.DataFrame(index=cells),
            var=pd.DataFrame(index=genes),
        )
        source = write(adata, tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with open_screen(source, scratch, entries, most=None if entries is None else 2 * entries) as opened:
        blocks = list(opened.blocks())
        in_files = list(scratch.iterdir())
        assert opened.n_cells == 37
        np.testing.assert_array_equal(opened.take(np.array([2, 5, 36])).toarray(), counts[[2, 5, 36]])
    assert [first for first, _, _ in blocks] == list(
        np.cumsum([0] + [len(g.indptr) - 1 for _, g, _ in blocks])[:-1]
    )
    assert all(block.has_canonical_format and block.dtype == np.float32 for _, block, _ in blocks)
    np.testing.assert_array_equal(np.vstack([block.toarray() for _, block, _ in blocks]), counts)
    assert len(blocks) == 1 if entries is None else len(blocks) > 3
    # What is put in order goes through files where it is more than `most`, and nothing of it is left.
    assert bool(in_files) == (layout in ("csc", "mtx") and entries is not None)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("entries", [1, 9, None])
def test_guides_are_told_from_genes_in_every_block(tmp_path, entries):
    source = write_10x(tmp_path / "run", with_guides(), features(), CELLS)
    with open_screen(source, tmp_path, entries) as opened:
        blocks = list(opened.blocks())
    in_memory = list(RawScreen.of(read_screen(source), entries).blocks())
    for found in (blocks, in_memory):
        np.testing.assert_array_equal(np.vstack([genes.toarray() for _, genes, _ in found]), COUNTS)
        guides = np.vstack([guides.toarray() for _, _, guides in found])
        np.testing.assert_array_equal(guides, with_guides()[:, 4:])


def test_spans_cut_no_row_and_lose_none():
    indptr = np.array([0, 3, 3, 10, 11, 12, 12])
    assert list(spans(indptr, 3)) == [(0, 2), (2, 3), (3, 6)]
    assert list(spans(indptr, 100)) == [(0, 6)]
    assert [end - first for first, end in spans(indptr, 1)] == [1] * 6


def test_rows_are_taken_and_blocks_without_them_are_not_read():
    counts = sparse.csr_matrix(random_counts(), dtype=np.float32)
    matrix = CompressedRows.of(counts, entries=10)
    wanted = np.zeros(37, dtype=bool)
    wanted[20] = True
    assert len(list(matrix.blocks(wanted))) == 1
    np.testing.assert_array_equal(take_rows(matrix, np.array([4, 20])).toarray(), counts[[4, 20]].toarray())
    assert take_rows(matrix, np.array([], dtype=int)).shape == (0, 11)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("indptr", [0, 2, 4, 9], r"6 values, 6 indices and row pointers to 9 for 3 cells"),
        ("indptr", [0, 2, 6], r"6 values, 6 indices and row pointers to 6 for 3 cells"),
        ("indices", [1, 2, 0, 9, 2, 3], r"an index of 9 among cells 0 to 2; expected 0 to 3"),
        ("indices", [1, 2, 0, -1, 2, 3], r"an index of -1 among cells 0 to 2; expected 0 to 3"),
    ],
)
def test_a_matrix_whose_parts_disagree_is_refused(tmp_path, part, values, message):
    with pytest.raises(InputError, match=message):
        read_screen(write_with_part(tmp_path, sparse.csr_matrix(COUNTS, dtype=np.float32), part, values))


def test_a_matrix_whose_shape_disagrees_with_its_tables_is_refused(tmp_path):
    source = write(screen(), tmp_path)
    with h5py.File(source.path, "a") as file:
        del file["X"]
        file["X"] = COUNTS[:2].astype(np.float32)
    message = r"a matrix of 2 cells × 4 features, and tables of 3 cells and 4 features"
    with pytest.raises(InputError, match=message):
        read_screen(source)


def test_a_column_matrix_with_an_entry_outside_is_refused(tmp_path):
    adata = screen()
    adata.X = sparse.csc_matrix(COUNTS, dtype=np.float32)
    source = write(adata, tmp_path)
    with h5py.File(source.path, "a") as file:
        file["X/indices"][0] = 3
    with pytest.raises(InputError, match=r"an entry of cell 3 \(counted from 0\); expected 0 to 2"):
        read_screen(source)


def test_where_a_part_could_not_be_read_is_in_the_log_of_the_job(tmp_path, capsys):
    """A mistake of the reader looks like damage; its place must not be lost, nor fill the terminal."""
    log = tmp_path / "job.log"
    with pytest.raises(SystemExit), log_to(log), damage_told(Path("a.h5ad")):
        {}["indptr"]
    assert "Traceback" in log.read_text() and "KeyError: 'indptr'" in log.read_text()
    terminal = capsys.readouterr().err
    assert "a.h5ad: found a part that cannot be read (KeyError: 'indptr')" in terminal
    assert "Traceback" not in terminal


def write_with_part(folder, matrix, part, values):
    """Write the screen with a matrix of which one part, such as ``indptr``, is exchanged."""
    adata = screen()
    adata.X = matrix
    source = write(adata, folder)
    with h5py.File(source.path, "a") as file:
        del file[f"X/{part}"]
        file[f"X/{part}"] = np.array(values, dtype=np.int32)
    return source


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        # The last gene without a pointer, entries behind the last pointer: both were left out silently.
        ("indptr", [0, 1, 2, 4], r"6 values, 6 indices and column pointers to 4 for 4 genes"),
        ("indptr", [0, 1, 2, 4, 5], r"6 values, 6 indices and column pointers to 5 for 4 genes"),
        ("indptr", [0, 4, 2, 4, 6], r"pointers of genes that do not rise from 0 to 6"),
        ("data", [2, 3, 1, 7, 5, 1, 4], r"7 values, 6 indices and column pointers to 6 for 4 genes"),
    ],
)
def test_a_column_matrix_whose_parts_disagree_is_refused(tmp_path, part, values, message):
    with pytest.raises(InputError, match=message):
        read_screen(write_with_part(tmp_path, sparse.csc_matrix(COUNTS, dtype=np.float32), part, values))


@pytest.mark.filterwarnings("ignore:Element")
def test_a_file_in_an_old_layout_is_read(tmp_path):
    adata = screen()
    adata.X = sparse.csr_matrix(COUNTS, dtype=np.float32)
    source = write(adata, tmp_path)
    with h5py.File(source.path, "a") as file:
        for name in ("encoding-type", "encoding-version"):
            del file["X"].attrs[name]
        file["X"].attrs["h5sparse_format"], file["X"].attrs["h5sparse_shape"] = "csr", COUNTS.shape
    np.testing.assert_array_equal(read_screen(source).X.toarray(), COUNTS)


def test_a_matrix_with_fewer_entries_than_its_header_says_is_refused(tmp_path):
    source = write_10x(tmp_path / "run", COUNTS, features()[:4], CELLS, zipped=False)
    matrix = tmp_path / "run" / "matrix.mtx"
    matrix.write_text("\n".join(matrix.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(InputError, match=r"cannot be read \(5 entries in matrix\.mtx, whose header says 6\)"):
        read_screen(source)
    lines = matrix.read_text().splitlines()
    for last, message in (
        ("1 1 0.5", "non-integer counts"),
        ("9 1 1", r"an entry of gene 8"),
        ("1 x 1", "cannot be"),
    ):
        matrix.write_text("\n".join([*lines, last]) + "\n")
        with pytest.raises(InputError, match=message):
            read_screen(source)


def test_a_symmetric_matrix_market_file_is_read_whole(tmp_path):
    source = write_10x(tmp_path / "run", COUNTS[:, :3], features()[:3], CELLS, zipped=False)
    text = "%%MatrixMarket matrix coordinate integer symmetric\n3 3 2\n1 1 4\n3 1 2\n"
    (tmp_path / "run" / "matrix.mtx").write_text(text)
    np.testing.assert_array_equal(read_screen(source).X.toarray(), [[4, 0, 2], [0, 0, 0], [2, 0, 0]])


@pytest.mark.parametrize("place", ["counts", "umis", "raw"])
def test_counts_are_found_beside_a_normalized_matrix(tmp_path, place):
    adata = screen(np.log1p(COUNTS))
    if place == "raw":
        adata.raw = screen()
        adata = adata[:, :2].copy()  # raw keeps all genes
    else:
        adata.layers[place] = COUNTS
    read = read_screen(write(adata, tmp_path))
    np.testing.assert_array_equal(read.X.toarray(), COUNTS)
    assert read.var_names.tolist() == GENES
    assert read.uns["notes"] == [f"raw counts taken from {place}"]


def test_named_layer_wins_over_a_whole_number_matrix(tmp_path):
    adata = screen(COUNTS * 2)
    adata.layers["umis"] = COUNTS
    source = write(adata, tmp_path)
    np.testing.assert_array_equal(read_screen(source).X.toarray(), COUNTS * 2)
    np.testing.assert_array_equal(read_screen(replace(source, counts_layer="umis")).X.toarray(), COUNTS)


def test_non_integer_counts_are_refused(tmp_path):
    source = write(screen(np.log1p(COUNTS)), tmp_path)
    with pytest.raises(
        InputError, match=r"screen\.h5ad.*non-integer counts where raw counts are needed.*counts_layer"
    ):
        read_screen(source)


def test_missing_layer_lists_those_there_are(tmp_path):
    adata = screen()
    adata.layers["umis"] = COUNTS
    source = replace(write(adata, tmp_path), counts_layer="count")
    with pytest.raises(InputError, match=r"no 'count' \(there are: 'X', 'umis'\).*counts_layer"):
        read_screen(source)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[1.0, 0.0]], True),
        ([[0.5, 1.0]], False),
        ([[-1.0, 2.0]], False),
        ([[np.nan, 1.0]], False),
        ([[np.inf, 1.0]], False),
        ([[0.0, 0.0]], False),
    ],
)
def test_what_counts_are(values, expected):
    assert holds_counts(np.array(values)) is expected
    assert holds_counts(sparse.csr_matrix(np.array(values))) is expected


def test_indices_of_two_widths_are_read(tmp_path):
    source = write(screen(sparse.csr_matrix(COUNTS).toarray()), tmp_path)
    with h5py.File(source.path, "a") as file:
        del file["X"]
        group = file.create_group("X")
        matrix = sparse.csr_matrix(COUNTS, dtype=np.float32)
        group.attrs.update(
            {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": COUNTS.shape}
        )
        group["data"], group["indices"] = matrix.data, matrix.indices.astype(np.int32)
        group["indptr"] = matrix.indptr.astype(np.int64)
    np.testing.assert_array_equal(read_screen(source).X.toarray(), COUNTS)


def test_repeated_entries_are_added_and_zeros_dropped():
    matrix = sparse.csr_matrix((np.array([1, 2, 0]), np.array([1, 1, 0]), np.array([0, 3])), shape=(1, 2))
    counts = to_counts(matrix)
    assert counts.nnz == 1
    assert counts.toarray().tolist() == [[0, 3]]


def test_ensembl_index_gives_way_to_symbols_and_repeats_get_a_number(tmp_path):
    adata = screen()
    adata.var_names = [f"ENSG0000{i}.1" for i in range(4)]
    adata.var["gene_name"] = ["KLF1", "SET", "KLF1", ""]
    read = read_screen(write(adata, tmp_path))
    assert read.var_names.tolist() == ["KLF1", "SET", "KLF1-1", "ENSG00003.1"]
    assert read.var["gene_id"].tolist() == [f"ENSG0000{i}.1" for i in range(4)]
    assert read.uns["notes"] == [
        "gene symbols taken from column 'gene_name' of var",
        "1 repeated gene symbols got a number",
    ]


ENSEMBL_IDS = [f"ENSG0000000000{i}" for i in range(4)]


@pytest.mark.parametrize("index", [ENSEMBL_IDS, list("0123")])
@pytest.mark.parametrize("column", ["gene_short_name", "Symbol", "name", "GENE_SYMBOL", "feature_name"])
def test_symbols_are_found_under_usual_names(index, column):
    # A column that is called like symbols and holds ids is none of them.
    columns = {"gene_name": ENSEMBL_IDS, column: ["KLF1", "SET", None, "SPI1"]}
    var = pd.DataFrame({**columns, "Gene_IDs": ENSEMBL_IDS}, index=index)
    notes = []
    found = gene_names(var, notes)
    assert found.index.tolist() == ["KLF1", "SET", ENSEMBL_IDS[2], "SPI1"]
    assert found["gene_id"].tolist() == ENSEMBL_IDS
    assert notes == [f"gene symbols taken from column {column!r} of var"]


def test_ids_that_stay_are_noted_and_gene_column_says_where_symbols_are(tmp_path):
    said = "genes are named by Ensembl ids: if var has a column of symbols, name it in `gene_column`"
    adata = screen()
    adata.var["hugo"] = GENES
    adata.var["ensembl_id"] = ENSEMBL_IDS
    for index in (ENSEMBL_IDS, list("0123")):
        adata.var_names = index
        source = write(adata, tmp_path)
        read = read_screen(source)
        assert read.var_names.tolist() == ENSEMBL_IDS
        assert read.uns["notes"][-1] == said
        read = read_screen(replace(source, gene_column="hugo"))
        assert read.var_names.tolist() == GENES
        assert read.var["gene_id"].tolist() == ENSEMBL_IDS
    with pytest.raises(
        InputError, match=r"screen\.h5ad: found no column 'Hugo'.*did you mean 'hugo'.*`gene_c"
    ):
        read_screen(replace(source, gene_column="Hugo"))
    # An index of symbols gives way to the column that is named, too.
    adata.var_names = ["a", "b", "c", "d"]
    assert read_screen(replace(write(adata, tmp_path), gene_column="hugo")).var_names.tolist() == GENES


def test_symbol_index_keeps_its_ensembl_column(tmp_path):
    adata = screen()
    adata.var["ensemble_id"] = ["E0", "E1", "E2", "E3"]
    read = read_screen(write(adata, tmp_path))
    assert read.var_names.tolist() == GENES
    assert read.var["gene_id"].tolist() == ["E0", "E1", "E2", "E3"]


@pytest.mark.parametrize("zipped", [True, False])
def test_10x_folder_gives_genes_and_guides_apart(tmp_path, zipped):
    read = read_screen(write_10x(tmp_path / "run", with_guides(), features(), CELLS, zipped))
    np.testing.assert_array_equal(read.X.toarray(), COUNTS)
    assert read.var_names.tolist() == GENES  # the guide that is called like a gene does not rename it
    assert read.obs_names.tolist() == CELLS
    assert read.uns["guide_names"].tolist() == ["KLF1", "NTg1"]
    np.testing.assert_array_equal(read.obsm["guide_counts"].toarray(), [[9, 0], [0, 8], [1, 1]])


def test_prefixed_version_2_folder_is_read(tmp_path):
    names = [[f"ENSG{i}", gene] for i, gene in enumerate(GENES)]
    source = write_10x(tmp_path / "geo", COUNTS, names, CELLS, prefix="GSE1_raw_", features_name="genes.tsv")
    read = read_screen(source)
    np.testing.assert_array_equal(read.X.toarray(), COUNTS)
    assert read.var["gene_id"].tolist() == ["ENSG0", "ENSG1", "ENSG2", "ENSG3"]


def test_other_feature_types_are_left_out_with_a_note(tmp_path):
    rows = features()
    rows[4][2] = rows[5][2] = "Antibody Capture"
    read = read_screen(write_10x(tmp_path / "run", with_guides(), rows, CELLS))
    assert read.n_vars == 4
    assert "guide_counts" not in read.obsm
    assert read.uns["notes"] == ["2 features of type 'Antibody Capture' left out"]


def test_matrix_that_disagrees_with_its_barcodes_is_refused(tmp_path):
    source = write_10x(tmp_path / "run", COUNTS, features()[:4], [*CELLS, "TTT-1"])
    with pytest.raises(
        InputError, match=r"matrix\.mtx\.gz: found 4 × 3 in the matrix, 4 rows in .* and 4 in barcodes"
    ):
        read_screen(source)


def test_incomplete_and_damaged_folders_are_refused(tmp_path):
    source = write_10x(tmp_path / "run", COUNTS, features()[:4], CELLS)
    matrix = tmp_path / "run" / "matrix.mtx.gz"
    whole = matrix.read_bytes()
    matrix.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"matrix\.mtx\.gz: found a file that cannot be read"):
        read_screen(source)
    matrix.unlink()
    with pytest.raises(InputError, match=r"0 files that end in matrix\.mtx"):
        read_screen(source)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.h5ad: found nothing there.*`source`"):
        read_screen(ScreenSource("toy", str(tmp_path / "nowhere.h5ad")))
    text = tmp_path / "screen.h5ad"
    text.write_text("not HDF5")
    with pytest.raises(InputError, match=r"screen\.h5ad.*HDF5 cannot open.*download it again"):
        read_screen(ScreenSource("toy", str(text)))
    with h5py.File(text, "w") as file:
        file["matrix/data"] = [1, 2]
    with pytest.raises(InputError, match=r"screen\.h5ad.*not an AnnData"):
        read_screen(ScreenSource("toy", str(text)))
    table = tmp_path / "screen.txt"
    table.write_text("x")
    with pytest.raises(InputError, match="`format`"):
        read_screen(ScreenSource("toy", str(table)))


def test_cell_metadata_is_joined_by_barcode_and_not_by_order(tmp_path):
    table = tmp_path / "cells.csv"
    table.write_text("barcode,batch,gene\nGGG-1,3,NA\nAAA-1,1,x\nTTT-1,9,z\nCCC-1,2,y\n")
    source = replace(write(screen(), tmp_path), cell_metadata=str(table))
    obs = read_screen(source).obs
    assert obs["batch"].tolist() == [1, 2, 3]
    assert obs["gene"].tolist() == ["x", "y", "NA"]  # as spelled; as a label or a guide it is missing
    assert obs["perturbation"].tolist() == ["KLF1", "control", "SET"]


@pytest.mark.parametrize("entries", [1, None])
@pytest.mark.parametrize("layout", ["dense", "csr", "csc"])
def test_barcodes_without_a_row_in_cell_metadata_are_left_out_and_counted(tmp_path, layout, entries):
    table = tmp_path / "cells.csv"
    table.write_text("cell_barcode,batch\nTTT-1,9\nGGG-1,2\nAAA-1,1\n")
    adata = screen()
    kinds = {"dense": np.asarray, "csr": sparse.csr_matrix, "csc": sparse.csc_matrix}
    adata.X = kinds[layout](COUNTS.astype(np.float32))
    source = replace(write(adata, tmp_path), cell_metadata=str(table))
    with open_screen(source, tmp_path, entries) as opened:
        blocks = list(opened.blocks())
        np.testing.assert_array_equal(opened.take(np.array([1])).toarray(), COUNTS[[2]])
        last = list(opened.blocks(np.array([False, True])))
    assert [first for first, _, _ in blocks] == ([0] if entries is None else [0, 1])
    assert last[-1][0] == blocks[-1][0]
    np.testing.assert_array_equal(np.vstack([genes.toarray() for _, genes, _ in blocks]), COUNTS[[0, 2]])
    assert opened.obs["batch"].tolist() == [1, 2]
    assert opened.obs.index.tolist() == ["AAA-1", "GGG-1"]
    assert opened.left_out == {"not_in_cell_metadata": (1, "barcodes without a row in cells.csv: no cells")}
    assert "1 of 3 rows of cells.csv are no barcode of the matrix" in opened.notes


def test_a_table_of_other_cells_is_refused(tmp_path):
    table = tmp_path / "cells.csv"
    source = replace(write(screen(), tmp_path), cell_metadata=str(table))
    table.write_text("barcode,batch\nAAA-1-b2,1\n")
    with pytest.raises(
        InputError, match=r"none of the 3 barcodes of the matrix, such as 'AAA-1' .*has 1, such as 'AAA-1-b2'"
    ):
        read_screen(source)
    table.write_text("barcode,batch\nAAA-1,1\nAAA-1,2\n")
    with pytest.raises(InputError, match=r"1 barcodes more than once, such as 'AAA-1'"):
        read_screen(source)


def test_repeated_barcodes_get_a_number_unless_a_table_is_joined(tmp_path, caplog):
    adata = screen()
    adata.obs_names = ["AAA-1", "AAA-1", "CCC-1"]
    source = write(adata, tmp_path)
    read = read_screen(source)
    assert read.obs_names.tolist() == ["AAA-1", "AAA-1-1", "CCC-1"]
    assert read.uns["notes"] == ["1 repeated barcodes got a number"]
    assert "screen.h5ad: 1 repeated barcodes, such as 'AAA-1', got a number" in caplog.text
    table = tmp_path / "cells.csv"
    table.write_text("barcode,batch\nAAA-1,1\nCCC-1,2\n")
    with pytest.raises(InputError, match=r"1 repeated barcodes, such as 'AAA-1'"):
        read_screen(replace(source, cell_metadata=str(table)))


def test_missing_column_is_answered_with_the_closest_name():
    table = pd.DataFrame(columns=["perturbation", "batch"])
    with pytest.raises(
        InputError,
        match=r"f\.h5ad: found no column 'pertubation' \(columns: 'perturbation', 'batch'\).*"
        "mean 'perturbation'",
    ):
        require_column(table, "pertubation", "f.h5ad", "perturbation_column")
    with pytest.raises(InputError, match=r"\(columns: none\).* Fix: name a table .* in `cell_metadata`"):
        require_column(pd.DataFrame(index=["c0"]), "batch", "10x", "batch_column")


@pytest.mark.parametrize(
    ("asked", "setting", "meant"),
    [
        ("nUMI", "library_size_column", "n_umis_all_genes"),
        ("percent.mito", "mito_column", "p_mito"),
        ("Replicates", "batch_column", "replicate"),
        ("zzz", "cell_type_column", ""),
    ],
)
def test_columns_are_suggested_whatever_joins_their_words(asked, setting, meant):
    names = ["replicate", "n_umis_all_genes", "n_genes_all_genes", "p_mito"]
    assert suggested_column(names, asked, setting) == meant


@pytest.mark.parametrize(
    ("path", "metadata", "place"),
    [
        ("a.h5ad", "", "a.h5ad"),
        ("a.h5ad", "cells.csv", "a.h5ad and cells.csv"),
        ("outs", "cells.csv", "cells.csv"),
    ],
)
def test_messages_name_the_files_where_columns_were_looked_for(path, metadata, place):
    assert ScreenSource("toy", path, cell_metadata=metadata).columns_in == place


def test_source_takes_empty_fields_and_refuses_unknown_kinds():
    source = ScreenSource("toy", "x.h5ad", separator=None, format=float("nan"), perturbation_type="")
    assert (source.separator, source.format, source.perturbation_type) == ("+", "auto", "unknown")
    with pytest.raises(InputError, match=r"row 'toy', column perturbation_type.*'crispr'.*CRISPRi"):
        ScreenSource("toy", "x.h5ad", perturbation_type="crispr")
    with pytest.raises(InputError, match=r"row 'toy', column format.*'loom'.*h5ad"):
        ScreenSource("toy", "x.h5ad", format="loom")
    with pytest.raises(InputError, match=r"row 'toy', column label_pattern.*'g\['.*regular expression"):
        ScreenSource("toy", "x.h5ad", label_pattern="g[")
    row = {"dataset": "toy", "path": "x.h5ad", "url": "https://example.org/x", "batch_column": None}
    assert ScreenSource.from_mapping(row) == ScreenSource("toy", "x.h5ad")
