"""Ask which cells of a screen can be trusted, and what each perturbation did to them.

Reads a screen in the format it was published in, gives every cell one label (from a column or from
its guide counts), drops cells of low quality with one line of qc.tsv per filter, and normalizes to
log1p of counts per ``target_sum`` of the library size. Per perturbation it describes the on-target
log2 fold change (means per 10,000, Mann-Whitney), the effect size (unbiased squared-Euclidean energy
distance to control in principal components, permutation test) and the number of changed genes
(Welch t, Benjamini-Hochberg). Per guide it says whether the guide agrees with the others of its perturbation
(permutation of cells among guides), and per cell its phase of the cell cycle (Tirosh et al. 2016) and, where
that can be told, the probability that it responds (as mixscape does, Papalexi et al. 2021). Guides as called,
batches and the distributions of cells before and after the filters are described beside it. All of this
describes all cells; nothing is trained with it.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from biojepa.jobs import listed, recorded_job
from biojepa.preprocess import PreprocessSettings, Tables, preprocess_file
from biojepa.raw import ScreenSource

WRITTEN = tuple(field.name for field in fields(Tables))
TABLES = ("cell_metadata", "guide_table", "guide_counts", "guide_calls")


def preprocess(
    checksums: Mapping[str, str],
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
    cells: str,
    tables: Mapping[str, str],
    cell_cycle_genes: str,
) -> None:
    """Preprocess one screen and write its cells and tables."""
    screen_source = ScreenSource.from_mapping(source)
    screen_settings = PreprocessSettings.from_mapping(settings)
    preprocess_file(
        screen_source,
        screen_settings,
        cells,
        inputs=checksums,
        cell_cycle_genes=cell_cycle_genes,
        **tables,
    )


def found_at(
    source: Mapping[str, Any], raw: Sequence[str], tables: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Return the row of the dataset table with its files where the rule's input has them.

    In a workflow that uses this one as a module with a prefix, they are elsewhere than the table says.
    """
    tables_found = {name: files[0] for name, files in tables.items() if files}
    if not raw:  # a folder without files, of which the reader says what it misses
        return {**source, **tables_found}
    # The files of several samples lie in folders of their own, so the end of the path is looked for upwards.
    first, named = Path(raw[0]), Path(source["path"])
    places = [first, *first.parents]
    ends = (place for place in places if place.parts[-len(named.parts) :] == named.parts)
    path = named if named in places else next(ends, first.parent)
    return {**source, "path": str(path), **tables_found}


if __name__ == "__main__":
    with recorded_job(snakemake) as record:
        raw = listed(snakemake.input.raw)
        tables = {name: listed(getattr(snakemake.input, name)) for name in TABLES}
        preprocess(
            checksums={Path(path).name: digest for path, digest in record["inputs"].items()},
            source=found_at(snakemake.params.source, raw, tables),
            settings=snakemake.params.settings,
            cells=snakemake.output.cells,
            tables={name: getattr(snakemake.output, name) for name in WRITTEN},
            cell_cycle_genes=snakemake.input.cell_cycle_genes,
        )
