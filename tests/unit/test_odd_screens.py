"""The two real screens in shapes that files have in the wild, and damaged in ways that downloads are."""

import gzip
import io
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.io import mmread, mmwrite

from biojepa.errors import InputError
from biojepa.guides import GuideAssignment
from biojepa.preprocess import PreprocessSettings, preprocess_file
from biojepa.preprocess.annotate import label_cells, sum_cells
from biojepa.raw import ScreenSource, open_screen, read_screen

LABELS = ("control", "KLF1", "MAP2K6", "KLF1+MAP2K6", "MAP2K3", "MAP2K3+MAP2K6", "TGFBR2", "KLF1+TGFBR2")
SETTINGS = PreprocessSettings(permutations=1, effect_cells=20, min_cells_per_gene=0)
# Of every so many cells, one: the screen is read several times.
STRIDE = 8


@pytest.fixture(scope="module")
def published(real_data):
    """Return some perturbations of the CRISPRa screen, its symbols beside Ensembl-like identifiers."""
    screen = ad.read_h5ad(real_data / "norman2019_tiny.h5ad")
    screen = screen[screen.obs["perturbation"].isin(LABELS)].copy()
    screen.var["ensembl_id"] = [f"ENSG{number:011d}" for number in range(screen.n_vars)]
    return screen


@pytest.fixture
def norman(published, tmp_path):
    """Return a copy to change, the source that names where it will lie, and how it is written."""
    source = ScreenSource(
        "norman",
        str(tmp_path / "screen.h5ad"),
        perturbation_column="perturbation",
        batch_column="batch",
        library_size_column="total_counts_all",
    )
    return published.copy(), source


@pytest.fixture(scope="module")
def folder_of_10x(real_data):
    """Return the features, counts of one cell in a few ``(cells, features)``, and their table."""
    folder = real_data / "papalexi2021_10x"
    with gzip.open(folder / "matrix.mtx.gz") as file:
        counts = sparse.csr_matrix(sparse.csc_matrix(mmread(file))[:, ::STRIDE].T)
    features = gzip.decompress((folder / "features.tsv.gz").read_bytes())
    return features, counts, pd.read_csv(folder / "cells.csv").iloc[::STRIDE].reset_index(drop=True)


def preprocessed(source, folder):
    """Run the stage, and return its cells and qc.tsv by filter."""
    folder.mkdir(exist_ok=True)
    files = [folder / name for name in ("cells.h5ad", "qc.tsv", "perturbations.tsv", "guides.tsv")]
    preprocess_file(source, SETTINGS, *files)
    return ad.read_h5ad(files[0]), pd.read_csv(files[1], sep="\t", keep_default_na=False).set_index("filter")


def write_10x(folder, features, counts, barcodes):
    """Write the three files of version 3."""
    folder.mkdir(parents=True)
    text = io.BytesIO()
    mmwrite(text, sparse.coo_matrix(counts.T), field="integer")
    lines = "".join(f"{barcode}\n" for barcode in barcodes).encode()
    parts = {"matrix.mtx": text.getvalue(), "features.tsv": features, "barcodes.tsv": lines}
    for name, content in parts.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))


def labelled(source):
    """Return what is said of each cell of a screen whose guides are counted."""
    with open_screen(source) as opened:
        guides = sum_cells(opened, with_guides=True).guides
        return label_cells(opened, source, GuideAssignment(), guides).obs


def assert_one_message(source, folder, *parts):
    """Check that the stage stops with one message of one line, and leaves no file."""
    with pytest.raises(InputError) as caught:
        preprocessed(source, folder / "made")
    said = str(caught.value)
    assert "\n" not in said
    for part in parts:
        assert part in said, said
    assert not list((folder / "made").iterdir())


def test_columns_in_place_of_rows_and_ensembl_in_place_of_symbols_change_nothing(norman, tmp_path):
    screen, source = norman
    screen.write_h5ad(source.path)
    expected, funnel = preprocessed(source, tmp_path / "original")

    odd = screen.copy()
    odd.X = sparse.csc_matrix(odd.X)
    odd.var = pd.DataFrame(
        {"gene_name": screen.var_names.to_numpy()}, index=screen.var["ensembl_id"].tolist()
    )
    path = tmp_path / "odd.h5ad"
    odd.write_h5ad(path)
    found, its_funnel = preprocessed(replace(source, path=str(path)), tmp_path / "odd")

    pd.testing.assert_frame_equal(found.obs, expected.obs)
    pd.testing.assert_frame_equal(found.var, expected.var)
    assert found.var["gene_id"].tolist() == screen.var["ensembl_id"].tolist()
    for one, other in ((found.X, expected.X), (found.layers["counts"], expected.layers["counts"])):
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part))
    note = its_funnel.loc["min_cells_per_gene", "note"]
    assert (
        note
        == f"{funnel.loc['min_cells_per_gene', 'note']}; gene symbols taken from column 'gene_name' of var"
    )
    pd.testing.assert_frame_equal(its_funnel.drop(columns="note"), funnel.drop(columns="note"))
    # What was written is what was published.
    kept = screen[found.obs_names]
    np.testing.assert_array_equal(found.layers["counts"].toarray(), kept.X.toarray())
    assert set(found.obs["perturbation"]) == set(LABELS)


def test_a_screen_over_two_samples_has_the_labels_of_one(folder_of_10x, papalexi, tmp_path):
    features, counts, table = folder_of_10x
    half = counts.shape[0] // 2 + 7
    table.to_csv(tmp_path / "one.csv", index=False)
    write_10x(tmp_path / "one", features, counts, table["barcode"])
    one = replace(papalexi, path=str(tmp_path / "one"), cell_metadata=str(tmp_path / "one.csv"))

    # Both samples use the same barcodes, as two lanes do.
    barcodes = [f"BC{number}-1" for number in range(half)]
    again = barcodes[: counts.shape[0] - half]
    write_10x(tmp_path / "two/a/filtered_feature_bc_matrix", features, counts[:half], barcodes)
    write_10x(tmp_path / "two/b/filtered_feature_bc_matrix", features, counts[half:], again)
    samples = ["a"] * half + ["b"] * len(again)
    # Not in the order of the matrix.
    table.assign(barcode=barcodes + again, sample=samples)[::-1].to_csv(tmp_path / "two.csv", index=False)
    two = replace(
        papalexi, path=str(tmp_path / "two"), cell_metadata=str(tmp_path / "two.csv"), batch_column=""
    )

    expected, found = labelled(one), labelled(two)
    columns = ["perturbation", "guide_id", "status", "guide_umis", "guide_share"]
    pd.testing.assert_frame_equal(
        found[columns].reset_index(drop=True), expected[columns].reset_index(drop=True)
    )
    names = [f"{sample}_{barcode}" for sample, barcode in zip(samples, barcodes + again, strict=True)]
    assert found.index.tolist() == names
    # By dominance: at least 5 UMIs, at least 60 % of them of the top guide.
    guides = np.array(["CRISPR Guide Capture" in line for line in features.decode().splitlines()])
    umis = counts[:, np.flatnonzero(guides)].toarray()
    called = (umis.max(axis=1) >= 5) & (umis.max(axis=1) >= 0.6 * umis.sum(axis=1))
    assert (found["status"] == "assigned").tolist() == called.tolist()
    with open_screen(two, tables_only=True) as opened:
        assert opened.obs["replicate"].tolist() == table["replicate"].tolist()
        assert opened.obs["sample"].tolist() == samples


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_repeated_symbols_and_missing_labels_are_counted(norman, tmp_path):
    screen, source = norman
    symbols = screen.var_names.to_numpy().astype(object)
    symbols[[10, 20]] = symbols[[0, 1]]
    odd = ad.AnnData(X=screen.X, obs=screen.obs.copy(), var=pd.DataFrame(index=symbols))
    labels = odd.obs["perturbation"].astype(object)
    empty, blank = np.arange(0, 90, 3), np.arange(1, 60, 3)
    labels.iloc[empty], labels.iloc[blank] = np.nan, ""
    odd.obs["perturbation"] = pd.Categorical(labels)
    odd.write_h5ad(source.path)
    cells, funnel = preprocessed(source, tmp_path / "made")
    unlabelled = funnel.loc["unlabelled"]
    assert unlabelled["cells_removed"] == len(empty) + len(blank) == 50
    assert unlabelled["cells_after"] == screen.n_obs - 50
    assert unlabelled["note"] == "no perturbation in: no label (30 cells), '' (20 cells)"
    note = funnel.loc["min_cells_per_gene", "note"]
    assert note == "genes: 500 before, 0 removed, 500 after; 2 repeated gene symbols got a number"
    assert not cells.obs_names.isin(screen.obs_names[[*empty, *blank]]).any()
    assert cells.var_names[[10, 20]].tolist() == [f"{symbols[0]}-1", f"{symbols[1]}-1"]
    kept = screen[cells.obs_names]
    np.testing.assert_array_equal(cells.layers["counts"].toarray(), kept.X.toarray())
    assert cells.obs["perturbation"].astype(str).tolist() == [
        "+".join(sorted(label.split("+"))) for label in kept.obs["perturbation"]
    ]


@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_a_truncated_h5ad_is_one_message(norman, tmp_path, share):
    screen, source = norman
    screen.write_h5ad(source.path)
    path = tmp_path / "screen.h5ad"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert_one_message(
        source, tmp_path, "screen.h5ad: found a file that HDF5 cannot open", "download it again"
    )


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("matrix.mtx.gz", ("matrix.mtx.gz: found a file that cannot be read", "Fix: fetch it again")),
        ("barcodes.tsv.gz", ("barcodes.tsv.gz: found a gzip file that is damaged or cut off", "fetch it")),
        ("features.tsv.gz", ("features.tsv.gz: found a gzip file that is damaged or cut off", "fetch it")),
    ],
)
def test_a_gzip_cut_in_half_is_one_message(folder_of_10x, papalexi, tmp_path, name, parts):
    features, counts, table = folder_of_10x
    write_10x(tmp_path / "run", features, counts[:300], table["barcode"][:300])
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_one_message(replace(papalexi, path=str(tmp_path / "run")), tmp_path, *parts)


@pytest.mark.parametrize("layer", ["", "X"])
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (np.log1p, ("non-integer counts where raw counts are needed (X: fractions", "log-normalized")),
        (lambda values: values - 2, ("no raw counts (X: negative values, such as -1",)),
        (lambda values: np.where(values > 1, np.nan, values), ("values that are not finite, such as nan",)),
        (lambda values: np.where(values > 1, np.inf, values), ("values that are not finite, such as inf",)),
    ],
)
def test_values_that_are_no_counts_are_one_message(norman, tmp_path, change, parts, layer):
    screen, source = norman
    screen.X.data = change(screen.X.data)
    screen.write_h5ad(source.path)
    fix = "point `counts_layer` at the raw counts, or use the file with raw counts"
    assert_one_message(replace(source, counts_layer=layer), tmp_path, "screen.h5ad", *parts, fix)


def test_tables_that_do_not_go_with_the_matrix_are_one_message_each(folder_of_10x, papalexi, tmp_path):
    features, counts, table = folder_of_10x
    write_10x(tmp_path / "run", features, counts[:300], table["barcode"][:299])
    source = replace(papalexi, path=str(tmp_path / "run"), cell_metadata=str(tmp_path / "cells.csv"))
    n_features = counts.shape[1]
    sizes = (
        f"{n_features} × 300 in the matrix, {n_features} rows in features.tsv.gz and 299 in barcodes.tsv.gz"
    )
    assert_one_message(source, tmp_path, f"matrix.mtx.gz: found {sizes}", "use the files of the same run")

    lines = "".join(f"{barcode}\n" for barcode in table["barcode"][:300]).encode()
    (tmp_path / "run" / "barcodes.tsv.gz").write_bytes(gzip.compress(lines))
    windows = table.to_csv(index=False, sep=";", lineterminator="\r\n")
    (tmp_path / "cells.csv").write_bytes(windows.encode())
    assert_one_message(source, tmp_path, "cells.csv: found one column", "replace semicolons by commas")

    (tmp_path / "cells.csv").write_bytes(windows.replace(";", ",").encode())
    misnamed = replace(source, batch_column="Replicates", mito_column="percent_mt")
    assert_one_message(misnamed, tmp_path, "no column 'Replicates'", "did you mean 'replicate'?")
    # The line ends alone are read, to the same table.
    pd.testing.assert_frame_equal(
        read_screen(source).obs, table[:300].set_index("barcode"), check_names=False
    )
