"""The tables beside a count matrix, and columns that a screen must have."""

from __future__ import annotations

import difflib
import gzip
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from biojepa.errors import InputError

log = logging.getLogger(__name__)

BARCODE, GUIDE, TARGET, SAMPLE = "barcode", "guide", "target", "sample"
ROW_NAME = "row_name"
BARCODE_COLUMNS = (BARCODE, "cell_barcode", "barcodes", "cell", "cell_id", "CB")
# Names that published files give to what a setting asks for; what is suggested when no spelling is close.
COMMON_NAMES = {
    "perturbation_column": (
        "perturbation", "gene", "guide_identity", "condition", "target", "target_gene", "gene_target",
        "perturbation_name", "guide_target",
    ),
    "guide_column": ("guide_id", "guide_identity", "guide", "sgRNA", "sgRNA_group", "feature_call"),
    "batch_column": ("batch", "gem_group", "gemgroup", "replicate", "lane", "donor", "sample", "hto"),
    "cell_type_column": ("cell_type", "celltype", "cell_line", "cell_line_name"),
    "library_size_column": ("ncounts", "total_counts", "n_counts", "nCount_RNA", "UMI_count", "n_umis"),
    "mito_column": ("percent_mito", "pct_counts_mt", "mitopercent", "percent.mt", "pct_mito", "p_mito"),
    "gene_column": ("gene_symbol", "gene_name", "gene_short_name", "symbol", "feature_name", "gene", "name"),
    "guide_table, column guide": ("guide", "guide_id", "sgRNA", "id", "name"),
    "guide_table, column target": ("target", "gene", "target_gene", "target_gene_name", "gene_symbol"),
}  # fmt: skip
# Cell Ranger's feature reference is a guide table under other names.
FEATURE_REFERENCE = {"id": GUIDE, "target_gene_name": TARGET}
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def require_column(table: pd.DataFrame, column: str, where: str | Path, setting: str) -> pd.Series:
    """Return a column, or say which ones there are.

    Parameters
    ----------
    table
        Table that should have the column.
    column
        Its name.
    where
        File the table came from.
    setting
        Key of the dataset table that named the column.

    Raises
    ------
    InputError
        When the column is missing; suggests the closest name, or else one that often means the same.
    """
    if column in table.columns:
        return table[column]
    names = [str(name) for name in table.columns]
    close = suggested_column(names, column, setting)
    hint = f"did you mean {close!r}? " if close else ""
    fix = f"{hint}Set `{setting}` in the dataset table to a column of this file"
    raise InputError(
        where,
        f"no column {column!r} (columns: {_listed(names)})",
        f"the column named by `{setting}`",
        fix if names else "name a table of cells that has it in `cell_metadata`",
    )


def suggested_column(names: Sequence[str], column: str, setting: str) -> str:
    """Return the column that was probably meant: of close spelling, or a usual name; empty for none."""
    folded = {_squeezed(name): name for name in reversed(names)}
    asked = _squeezed(column)
    near, far = (difflib.get_close_matches(asked, folded, n=1, cutoff=cutoff) for cutoff in (0.75, 0.5))
    within = [name for name in folded if asked and (name.startswith(asked) or asked.startswith(name))]
    usual = [name for name in map(_squeezed, COMMON_NAMES.get(setting, ())) if name in folded]
    return next((folded[name] for name in (*near, *within, *usual, *far)), "")


def _squeezed(name: str) -> str:
    """Spell a name so that nUMI and n_umi are the same; one of signs alone stays."""
    folded = name.casefold()
    return re.sub(r"[\W_]", "", folded) or folded


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turn what pandas and gzip say of a table that cannot be read into a message for its user.

    Raises
    ------
    InputError
        When the file is empty, cut off, not UTF-8, or has lines of different lengths.
    """
    try:
        yield
    except pd.errors.EmptyDataError as error:
        raise InputError(path, "an empty file", "a table", "fetch it again, or name another file") from error
    except UnicodeDecodeError as error:
        raise InputError(
            path,
            f"text that is not UTF-8 ({_first_line_not_utf8(Path(path))})",
            "UTF-8",
            f"save it as UTF-8, for example: iconv -f LATIN1 -t UTF-8 {Path(path).name}",
        ) from error
    except pd.errors.ParserError as error:
        raise InputError(
            path,
            f"lines of different lengths ({str(error).strip()})",
            "as many fields in every line",
            "correct the line, or quote fields that hold the delimiter",
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            path, f"a gzip file that is damaged or cut off ({error})", "a complete file", "fetch it again"
        ) from error


def _first_line_not_utf8(path: Path) -> str:
    """Say where a file stops being UTF-8."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    return f"byte 0x{line[error.start]:02x} in line {number}"
    except (EOFError, OSError, zlib.error):
        pass
    return "somewhere in it"


def delimiter_of(path: str | Path) -> str:
    """Return what separates the columns of a table, by its name: tabs, or commas."""
    suffixes = Path(path).suffixes
    return "\t" if ".tsv" in suffixes or ".txt" in suffixes else ","


def read_table(path: str | Path, setting: str, text: Sequence[str] = ()) -> pd.DataFrame:
    """Read a CSV or TSV (by its name, ``.gz`` allowed); only an empty field is missing.

    Parameters
    ----------
    path
        The table.
    setting
        Key of the dataset table that names it.
    text
        Columns that are read as text, where they are there.

    Raises
    ------
    InputError
        When there is no such file, when it cannot be read, or when something else separates its columns.
    """
    path = Path(path)
    require_file(path, setting)
    names = column_names(path, setting)
    with readable(path):
        return pd.read_csv(
            path,
            sep=delimiter_of(path),
            encoding="utf-8-sig",
            header=0,
            names=names,
            index_col=False,
            dtype={name: str for name in text if name in names},
            keep_default_na=False,
            na_values=[""],
            low_memory=False,
        )


def column_names(path: Path, setting: str) -> list[str]:
    """Return the names of the columns of a table, also where the first one has none.

    R writes row names without a name for their column, so that the header is one field shorter than the rows.
    Pandas takes such a column as index, without a word. Here it is ``guide`` in a ``guide_table`` and
    ``barcode`` in others, or ``row_name`` where another column is called so.

    Raises
    ------
    InputError
        When the file cannot be read, something else separates its columns, or its first row has more fields
        than the header in another way.
    """
    delimiter = delimiter_of(path)
    with readable(path):
        header = pd.read_csv(path, nrows=0, sep=delimiter, encoding="utf-8-sig", index_col=False)
        names = [str(name) for name in header.columns]
        require_delimiter(names, path)
        row = _first_row(path, delimiter)
    more = len(row) - len(names)
    if more <= 0:
        return names
    if more > 1 or not row[-1].strip():
        raise InputError(
            path,
            f"{len(names)} fields in the header, and {len(row)} in the first row"
            + ("" if row[-1].strip() else ", which ends with a delimiter"),
            "as many fields in every line, or one more than in the header where rows have names",
            "name every column, and remove delimiters at the ends of lines",
        )
    of_guides = setting == "guide_table"
    taken = COMMON_NAMES["guide_table, column guide"] if of_guides else BARCODE_COLUMNS
    first = ROW_NAME if set(taken) & set(names) else GUIDE if of_guides else BARCODE
    log.info("%s: the first column has no name, and is taken as %r", path, first)
    return [first, *names]


def _first_row(path: Path, delimiter: str) -> list[str]:
    """Return the fields of the first row below the header; none where there is no row."""
    try:
        row = pd.read_csv(
            path,
            sep=delimiter,
            encoding="utf-8-sig",
            header=None,
            skiprows=1,
            nrows=1,
            dtype=str,
            keep_default_na=False,
        )
    except pd.errors.EmptyDataError:
        return []
    return row.iloc[0].tolist() if len(row) else []


def require_file(path: str | Path, setting: str) -> None:
    """Stop where the file that a setting names is not there."""
    if not Path(path).is_file():
        raise InputError(
            path,
            "no such file",
            f"the table named by `{setting}`",
            f"correct `{setting}` in the dataset table",
        )


def require_delimiter(columns: Sequence[object], path: Path) -> None:
    """Stop where the first line is one field and holds another delimiter than the name of the file says."""
    name, expected = str(columns[0]) if len(columns) else "", delimiter_of(path)
    other = next((char for char in DELIMITERS if char != expected and char in name), "")
    if len(columns) == 1 and other:
        ending = {",": ".csv", "\t": ".tsv"}.get(other)
        raise InputError(
            path,
            f"one column, {name[:60]!r}, which holds {DELIMITERS[other]}",
            f"columns separated by {DELIMITERS[expected]}, as the name of the file says",
            f"rename the file to end in {ending}"
            if ending
            else f"replace {DELIMITERS[other]} by {DELIMITERS[expected]}",
        )


def read_plain_columns(path: Path) -> pd.DataFrame:
    """Read a file of columns without a header, separated by tabs, as text.

    Raises
    ------
    InputError
        When it cannot be read, or its lines are separated by commas.
    """
    with readable(path):
        table = pd.read_csv(
            path, sep="\t", header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig"
        )
    # One column is right for barcodes, and then a comma in it is none that separates.
    if table.shape[1] == 1 and table[0].str.contains(",").mean() > 0.5:
        raise InputError(
            path,
            f"one column, such as {table[0].iloc[0]!r}, which holds commas",
            "columns separated by tabs",
            "replace commas by tabs",
        )
    return table


def match_barcodes(barcodes: pd.Index, names: pd.Index) -> tuple[np.ndarray, str]:
    """Find barcodes in another file.

    Where none is found, both are compared without the number of the GEM well at their end (``-1``), which
    some programs leave out, as long as they stay unique.

    Parameters
    ----------
    barcodes
        Of the matrix.
    names
        Of the other file, unique.

    Returns
    -------
    Places of the barcodes among the names ``(len(barcodes),)``, -1 where missing; and a note, or nothing.
    """
    places = names.get_indexer(barcodes)
    if (places >= 0).any():
        return places, ""
    bare, others = (index.str.replace(r"-\d+$", "", regex=True) for index in (barcodes, names))
    if bare.is_unique and others.is_unique:
        places = others.get_indexer(bare)
        if (places >= 0).any():
            return places, "barcodes compared without the number at their end"
    return np.full(len(barcodes), -1), ""


def key_column(table: pd.DataFrame) -> str:
    """Return the column with barcodes: one of the usual names, or the first."""
    return next((name for name in BARCODE_COLUMNS if name in table.columns), str(table.columns[0]))


def sample_barcodes(table: pd.DataFrame, key: str, with_samples: bool) -> pd.Index:
    """Return the barcodes of a table, after the name of the sample where matrix and table have samples."""
    index = pd.Index(table[key].astype(str))
    if with_samples and SAMPLE in table.columns and key != SAMPLE:
        samples = table[SAMPLE].astype(str)
        prefixes = tuple(f"{name}_" for name in samples.unique())
        # Another program may have put the sample before the barcode already.
        return index if index.str.startswith(prefixes).all() else pd.Index(samples + "_" + index.to_numpy())
    return index


def no_match(path: str | Path, key: str, barcodes: pd.Index, names: pd.Index) -> InputError:
    """Build the error for a table none of whose rows is a cell of the matrix."""
    return InputError(
        f"{path}, column {key!r}",
        f"none of the {len(barcodes)} barcodes of the matrix, such as {barcodes[0]!r} "
        f"(the table has {len(names)}, such as {_listed(list(names[:2]))})",
        "rows for barcodes of the matrix",
        "make the two spellings of the barcodes agree, or name the column with barcodes 'barcode'",
    )


def read_cell_metadata(
    path: str | Path, barcodes: pd.Index, with_samples: bool = False
) -> tuple[pd.DataFrame, np.ndarray, list[str]]:
    """Read the table of cells in the order of ``barcodes``.

    Parameters
    ----------
    path
        CSV or TSV.
    barcodes
        Of the matrix, unique.
    with_samples
        Whether they start with the name of a sample.

    Returns
    -------
    The rows of the table that are in the matrix, index their barcodes, without the column of barcodes; which
    barcodes have a row ``(len(barcodes),)``; notes.

    Raises
    ------
    InputError
        When no barcode is in the table, or one occurs twice in it.
    """
    table = read_table(path, "cell_metadata")
    if not len(table):
        raise InputError(path, "no rows", "one row per cell", "name another file in `cell_metadata`")
    key = key_column(table)
    index = sample_barcodes(table, key, with_samples)
    twice = index[index.duplicated()]
    if len(twice):
        raise InputError(
            f"{path}, column {key!r}",
            f"{twice.nunique()} barcodes more than once, such as {twice[0]!r}",
            "one row per barcode",
            "remove the repeated rows, or add the column 'sample' where samples share barcodes",
        )
    places, note = match_barcodes(barcodes, index)
    found = places >= 0
    if not found.any():
        raise no_match(path, key, barcodes, index)
    notes = [f"{note} with those of {Path(path).name}"] if note else []
    if surplus := len(index) - int(found.sum()):
        notes.append(f"{surplus} of {len(index)} rows of {Path(path).name} are no barcode of the matrix")
    return table.drop(columns=key).iloc[places[found]].set_axis(barcodes[found], axis=0), found, notes


def read_guide_table(path: str | Path, every_target: bool = True) -> pd.Series:
    """Read which target each guide has; index guide, values target as the file spells it.

    Parameters
    ----------
    path
        CSV or TSV.
    every_target
        Whether every guide must have a target; otherwise that of a guide without one is empty.

    Raises
    ------
    InputError
        When a column is missing, a guide is there twice, or has no target.
    """
    table = read_table(path, "guide_table")
    if set(FEATURE_REFERENCE) <= set(table.columns) and not {GUIDE, TARGET} & set(table.columns):
        table = table.rename(columns=FEATURE_REFERENCE)
    for column in (GUIDE, TARGET):
        if column not in table.columns:
            names = [str(name) for name in table.columns]
            close = suggested_column(names, column, f"guide_table, column {column}")
            raise InputError(
                path,
                f"no column {column!r} (columns: {_listed(names)})",
                "the columns guide and target, or those of Cell Ranger's feature reference",
                f"rename {close!r} to {column!r}" if close else f"add the column {column!r}",
            )
    guides, targets = table[GUIDE].astype(str), table[TARGET]
    if guides.duplicated().any():
        name = guides[guides.duplicated()].iloc[0]
        raise InputError(
            f"{path}, column guide",
            f"guide {name!r} more than once",
            "one row per guide",
            "remove the repeated rows",
        )
    if every_target and targets.isna().any():
        name = guides[targets.isna()].iloc[0]
        raise InputError(
            f"{path}, column target",
            f"no target for guide {name!r}",
            "a gene, or the control label",
            "fill it in",
        )
    return pd.Series(
        targets.astype(object).fillna("").astype(str).to_numpy(), index=guides.to_numpy(), name=TARGET
    )


def _listed(names: Sequence[str], most: int = 20) -> str:
    """Return names for a message, the first ``most`` of them."""
    shown = ", ".join(repr(str(name)) for name in names[:most])
    return f"{shown}, … ({len(names)} in all)" if len(names) > most else shown or "none"
