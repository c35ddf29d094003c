"""Read the feature-barcode matrices of Cell Ranger: HDF5 or three files, versions 2 and 3, several samples.

Layouts: https://www.10xgenomics.com/support/software/cell-ranger/latest/analysis/outputs/cr-outputs-h5-matrices
and …/cr-outputs-mex-matrices.
"""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.io import mminfo, mmread

from biojepa.contracts import GENE_ID
from biojepa.errors import InputError
from biojepa.raw.counts import are_counts, describe, to_counts, what_is_wrong, wrong_type
from biojepa.raw.matrix import BLOCK_ENTRIES, CompressedRows, Entries, RowBlocks, StackedRows, UnreadRows
from biojepa.raw.parts import Parts, Reading, open_hdf5
from biojepa.raw.tables import read_plain_columns
from biojepa.sample_files import HDF5, MATRIX, SampleFiles, find_samples

log = logging.getLogger(__name__)

FEATURE_TYPES, SAMPLE = "feature_types", "sample"
GENE_TYPE, GUIDE_TYPE = "Gene Expression", "CRISPR Guide Capture"
MATRIX_FILES = (MATRIX, f"{MATRIX}.gz")


def open_10x(path: Path, how: Reading, kind: str = "", without: Sequence[str] = ()) -> Parts:
    """Open a 10x HDF5 file, one ``matrix.mtx`` with the files beside it, or all samples in a folder.

    Of several samples, barcodes start with the name of the sample and ``_``, and ``obs`` has the column
    ``sample``.

    Parameters
    ----------
    path
        File or folder.
    how
        Block sizes, and where temporary files go.
    kind
        ``mtx`` or ``h5``: of a folder, take these alone.
    without
        Files and folders in it that are no samples.

    Raises
    ------
    InputError
        When files are missing or damaged, hold no counts, disagree with each other, or samples have other
        features.
    """
    if path.is_file():
        if kind and kind != HDF5:
            raise InputError(
                path,
                "a file",
                "a folder with matrix.mtx, features.tsv and barcodes.tsv",
                "set `source` to the folder",
            )
        if path.name.endswith(MATRIX_FILES):
            found, _ = find_samples(path.parent)
            own = [sample for sample in found if sample.matrix == path]
            if not own:
                raise InputError(
                    path,
                    "a matrix that is left aside for another one in its folder",
                    "the only one of its name",
                    "put its three files into a folder of their own, and name the folder",
                )
            return _open_sample(own[0], path.parent, how)
        return _open_hdf5_matrix(path, how)
    samples, notes = find_samples(path, kind, without)
    if not samples:
        raise InputError(
            path,
            f"0 files that end in {'.h5' if kind == HDF5 else 'matrix.mtx (or .gz)'}",
            "a 10x HDF5 file, or a folder with matrix.mtx, features.tsv and barcodes.tsv",
            "set `source` to the folder that has them",
        )
    parts = [_open_sample(sample, path, how) for sample in samples]
    for sample, part in zip(samples, parts, strict=True):
        shown = sample.matrix.relative_to(path).as_posix()
        log.info("%s: %d barcodes, %d features", shown, len(part.obs), len(part.var))
    if any(_has_genes(part) for part in parts):
        # Other programs count guides apart, and their matrices may lie in the same folder.
        aside = [sample for sample, part in zip(samples, parts, strict=True) if not _has_genes(part)]
        for sample in aside:
            shown = sample.matrix.relative_to(path).as_posix()
            notes.append(
                f"{shown} left aside: it counts no genes; if it counts guides, give it as `guide_counts`"
            )
        parts = [part for part in parts if _has_genes(part)]
        samples = [sample for sample in samples if sample not in aside]
    if len(parts) == 1:
        return Parts(parts[0].counts, parts[0].obs, parts[0].var, notes)
    return _joined(samples, parts, notes)


def _has_genes(part: Parts) -> bool:
    """Tell whether some features are genes; where they have no type, all are."""
    return FEATURE_TYPES not in part.var or bool((part.var[FEATURE_TYPES] == GENE_TYPE).any())


def _open_sample(sample: SampleFiles, folder: Path, how: Reading) -> Parts:
    if sample.kind == HDF5:
        return _open_hdf5_matrix(sample.matrix, how)
    for what, files in (("features.tsv or genes.tsv", sample.features), ("barcodes.tsv", sample.barcodes)):
        if len(files) != 1:
            raise InputError(
                folder,
                f"{len(files)} files that end in {what} (or .gz) for {sample.matrix.relative_to(folder)}"
                + (f": {', '.join(file.name for file in files)}" if files else ""),
                "exactly one",
                "give the three files of each run a common prefix, or a folder of their own",
            )
    return _open_mtx(sample.matrix, sample.features[0], sample.barcodes[0], how)


def _joined(samples: list[SampleFiles], parts: list[Parts], notes: list[str]) -> Parts:
    """Put samples below each other."""
    first = parts[0].var
    for sample, part in zip(samples, parts, strict=True):
        if not part.var.equals(first):
            n_other = len(set(part.var[GENE_ID]) ^ set(first[GENE_ID]))
            raise InputError(
                sample.matrix,
                f"{len(part.var)} features, of which or of the {len(first)} of sample {samples[0].name!r} "
                f"{n_other} are in one of the two alone",
                "the same features in the same order in every sample",
                "use matrices of one reference, make each sample a dataset of its own, or give a matrix "
                "of guides as `guide_counts`",
            )
    obs = []
    for sample, part in zip(samples, parts, strict=True):
        names = [f"{sample.name}_{barcode}" for barcode in part.obs.index]
        obs.append(pd.DataFrame({SAMPLE: sample.name}, index=names))
    notes = [*notes, f"{len(parts)} samples: {', '.join(sample.name for sample in samples)}"]
    return Parts(StackedRows([part.counts for part in parts]), pd.concat(obs), first, notes)


def _open_mtx(matrix_path: Path, features_path: Path, barcodes_path: Path, how: Reading) -> Parts:
    """Open the three files of one run, of version 3, or 2 with genes.tsv."""
    features = read_plain_columns(features_path)
    barcodes = read_plain_columns(barcodes_path)[0]
    try:
        n_features, n_barcodes, n_entries, *kind = mminfo(matrix_path)
        if (n_features, n_barcodes) != (len(features), len(barcodes)):
            turned = (n_barcodes, n_features) == (len(features), len(barcodes))
            raise InputError(
                matrix_path,
                f"{n_features} × {n_barcodes} in the matrix, {len(features)} rows in "
                f"{features_path.name} and {len(barcodes)} in {barcodes_path.name}",
                "one row per feature and one column per barcode",
                "transpose the matrix, which has cells in rows"
                if turned
                else "use the files of the same run",
            )
        counts: RowBlocks
        if how.tables_only:
            counts = UnreadRows((n_barcodes, n_features))
        elif kind[0] == "coordinate" and kind[1] in ("integer", "real") and kind[2] == "general":
            entries = _mtx_entries(matrix_path, n_entries, how.entries)
            counts = how.in_rows(entries, n_entries, (n_barcodes, n_features), matrix_path)
        else:
            matrix = sparse.csr_matrix(sparse.coo_matrix(mmread(matrix_path)).T)
            if wrong := what_is_wrong(matrix):
                raise _no_counts(matrix_path, wrong)
            counts = CompressedRows.of(to_counts(matrix), how.entries)
    except InputError:
        raise
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise InputError(
            matrix_path,
            f"a file that cannot be read ({error})",
            "a complete matrix.mtx",
            "fetch it again",
        ) from error
    var = pd.DataFrame(
        {GENE_ID: features[0].to_numpy()}, index=features[min(1, features.shape[1] - 1)].to_numpy()
    )
    if features.shape[1] > 2:
        var[FEATURE_TYPES] = features[2].to_numpy()
    return Parts(counts, pd.DataFrame(index=pd.Index(barcodes.to_numpy())), var)


def _mtx_entries(path: Path, n_entries: int, entries: int | None) -> Iterator[Entries]:
    """Yield barcode, feature and count of the entries of a coordinate matrix, block by block.

    Raises
    ------
    InputError
        When a line is incomplete, a count is no count, or none is positive.
    ValueError
        When the file has another number of entries than its header says.
    """
    found, some = 0, False
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for line in file:
            if not line.startswith(b"%") and line.strip():
                break
        blocks = pd.read_csv(
            file,
            sep=r"\s+",
            header=None,
            names=["feature", "barcode", "count"],
            dtype={"feature": np.int64, "barcode": np.int64, "count": np.float64},
            chunksize=entries or BLOCK_ENTRIES,
        )
        for block in blocks:
            values = block["count"].to_numpy()
            if not are_counts(values):
                if np.isnan(values).any() and (short := _short_line(path)):
                    raise InputError(
                        path,
                        f"line {short} incomplete: fewer than three numbers",
                        "feature, barcode and count in every line of a complete matrix.mtx",
                        "the file was cut off: fetch it again",
                    )
                raise _no_counts(path, describe(values))
            some, found = some or bool(values.any()), found + len(block)
            yield block["barcode"].to_numpy() - 1, block["feature"].to_numpy() - 1, values
    if found != n_entries:
        raise ValueError(f"{found} entries in {path.name}, whose header says {n_entries}")
    if not some:
        raise _no_counts(path, "nothing but zeros")


def _short_line(path: Path) -> int:
    """Return the number of the first entry of a coordinate matrix without its three numbers; 0 for none."""
    found_sizes = False
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.startswith(b"%") or not line.strip():
                continue
            if found_sizes and len(line.split()) < 3:
                return number
            found_sizes = True
    return 0


def is_10x_hdf5(file: h5py.File) -> bool:
    """Tell whether an open HDF5 file is a 10x matrix of version 3 or 2."""
    return _is_version_3(file) or bool(_genomes(file))


def _is_version_3(file: h5py.File) -> bool:
    matrix = file.get("matrix")
    return isinstance(matrix, h5py.Group) and {"barcodes", "data", "indices", "indptr"} <= set(matrix)


def _genomes(file: h5py.File) -> list[str]:
    """Return the groups of a file of version 2, each named after its genome."""
    parts = {"barcodes", "genes", "data", "indices", "indptr"}
    return [name for name, group in file.items() if isinstance(group, h5py.Group) and parts <= set(group)]


def _open_hdf5_matrix(path: Path, how: Reading) -> Parts:
    """Open a 10x HDF5 matrix: its columns are barcodes, so it is read as rows of cells where it lies."""
    file = open_hdf5(path, how)
    if _is_version_3(file):
        group = file["matrix"]
        missing = [name for name in ("features", "shape") if name not in group]
    else:
        genomes = _genomes(file)
        if not genomes:
            raise InputError(
                path,
                f"an HDF5 file with {', '.join(file) or 'nothing'}",
                "a 10x feature-barcode matrix",
                "use filtered_feature_bc_matrix.h5",
            )
        if len(genomes) > 1:
            sizes = ", ".join(f"{name} ({len(file[name]['barcodes'])} barcodes)" for name in genomes)
            name, alone = genomes[0], f"{path.stem}_{genomes[0]}.h5"
            copy = f"h5py.File({path.name!r}).copy({name!r}, h5py.File({alone!r}, 'w'))"
            raise InputError(
                path,
                f"{len(genomes)} genomes: {sizes}",
                "the matrix of one genome; cells of two species are two screens",
                f'write the one you want to a file of its own, such as python -c "import h5py; {copy}", '
                f"and set `source` to it",
            )
        group = file[genomes[0]]
        missing = [name for name in ("gene_names", "shape") if name not in group]
    if missing:
        raise InputError(
            f"{path}, {group.name}",
            f"no {' and no '.join(missing)}",
            "a complete 10x matrix",
            "fetch it again",
        )
    if "features" in group:
        features = group["features"]
        var = pd.DataFrame({GENE_ID: _text(features["id"])}, index=_text(features["name"]))
        if "feature_type" in features:
            var[FEATURE_TYPES] = _text(features["feature_type"])
    else:
        var = pd.DataFrame({GENE_ID: _text(group["genes"])}, index=_text(group["gene_names"]))
    if wrong := (wrong_type if how.tables_only else what_is_wrong)(group):
        raise _no_counts(path, wrong)
    n_features, n_barcodes = (int(size) for size in group["shape"][:])
    obs = pd.DataFrame(index=pd.Index(_text(group["barcodes"])))
    if (n_features, n_barcodes) != (len(var), len(obs)):
        raise InputError(
            path,
            f"{n_features} × {n_barcodes} in the matrix, {len(var)} features and {len(obs)} barcodes",
            "one row per feature and one column per barcode",
            "the file is damaged: fetch it again",
        )
    shape = (n_barcodes, n_features)
    if how.tables_only:
        return Parts(UnreadRows(shape), obs, var)
    indptr = group["indptr"][:].astype(np.int64)
    return Parts(CompressedRows(group["data"], group["indices"], indptr, shape, path, how.entries), obs, var)


def _text(values: h5py.Dataset) -> np.ndarray:
    """Return a dataset of text ``(n,)``, which 10x keeps as bytes of fixed length."""
    return np.array(
        [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values[:]],
        dtype=object,
    )


def _no_counts(path: Path, wrong: str) -> InputError:
    """Build the error for a 10x matrix that holds no counts."""
    lead = "non-integer counts where raw counts are needed" if "fractions" in wrong else "no raw counts"
    return InputError(
        path,
        f"{lead} ({wrong})",
        "whole numbers of 0 or more",
        "use the raw or filtered feature-barcode matrix, not a normalized one",
    )
