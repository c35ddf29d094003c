"""Which files of a folder hold the counts of which sample, told by their names alone.

Snakemake has to know them before the first job, so nothing is opened here, and only the standard library is
imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MATRIX, BARCODES, FEATURES = "matrix.mtx", "barcodes.tsv", ("features.tsv", "genes.tsv")
MTX, HDF5 = "mtx", "h5"
# Deep enough for <run>/outs/per_sample_outs/<sample>/count/<matrix>/.
MAX_DEPTH = 6
# Folders of Cell Ranger in which other matrices lie, and our own.
SKIPPED = ("analysis", "crispr_analysis", "provenance")
# What Cell Ranger calls folders and files whatever the sample.
COMMON_PARTS = ("outs", "count", "multi", "per_sample_outs")
COMMON_END = r"[_.-]*(sample_)?(filtered_|raw_)?(feature|gene)_bc_matri(x|ces)(_h5)?$"


@dataclass(frozen=True)
class SampleFiles:
    """The count matrix of one sample.

    Attributes
    ----------
    name
        What tells it from the other samples of the folder; empty where it is the only one.
    matrix
        The ``matrix.mtx`` or the 10x HDF5 file.
    features, barcodes
        Files that may go with a ``matrix.mtx``: one of each where the folder is in order.
    """

    name: str
    matrix: Path
    features: tuple[Path, ...] = ()
    barcodes: tuple[Path, ...] = ()

    @property
    def kind(self) -> str:
        """``mtx`` or ``h5``."""
        return HDF5 if self.matrix.suffix == ".h5" else MTX

    @property
    def files(self) -> tuple[Path, ...]:
        """All its files."""
        return (self.matrix, *self.features, *self.barcodes)


def find_samples(
    folder: str | Path, kind: str = "", without: Iterable[str | Path] = ()
) -> tuple[list[SampleFiles], list[str]]:
    """Find the 10x matrices in a folder and the folders in it.

    Where Cell Ranger left a filtered and a raw matrix, the filtered one is taken; where it left the same
    matrix as HDF5 and as a folder, the HDF5 file.

    Parameters
    ----------
    folder
        ``filtered_feature_bc_matrix``, ``outs``, a folder with a folder for each sample, or one with the
        files of several samples under prefixes, as on GEO.
    kind
        ``mtx`` or ``h5``: look for these alone.
    without
        Files and folders in it that are something else, such as counts of guides.

    Returns
    -------
    Samples in the order of their names, and what was left aside and why.
    """
    folder = Path(folder)
    found: dict[tuple[str, str], SampleFiles] = {}
    others = {Path(path).absolute() for path in without} - {folder.absolute(), *folder.absolute().parents}
    for label, sample in _matrices(folder):
        matrix = sample.matrix.absolute()
        if (not kind or sample.kind == kind) and not others.intersection((matrix, *matrix.parents)):
            found[label, sample.kind] = sample
    if any(not _is_odd(sample) for sample in found.values()):
        # Something else that is stored as HDF5 often lies beside a matrix.
        found = {key: sample for key, sample in found.items() if not _is_odd(sample)}
    notes = []
    labels = {label for label, _ in found}
    for label, form in sorted(found):
        filtered = re.sub(r"raw(?=_(feature|gene)_bc_matri)", "filtered", label)
        if filtered != label and filtered in labels:
            notes.append(f"{_shown(found.pop((label, form)), folder)} left aside: {filtered} is beside it")
        elif form == MTX and (label, HDF5) in found:
            notes.append(f"{_shown(found.pop((label, form)), folder)} left aside: the same as .h5 is there")
    if len(found) < 2:
        return list(found.values()), notes
    names = [_name_of(label) for label, _ in found]
    if len(set(names)) < len(names) or "" in names:
        names = [label.replace("/", "_") for label, _ in found]
    named = [
        SampleFiles(name, one.matrix, one.features, one.barcodes)
        for name, one in zip(names, found.values(), strict=True)
    ]
    return sorted(named, key=lambda sample: sample.name), notes


def _matrices(folder: Path) -> Iterator[tuple[str, SampleFiles]]:
    """Yield every matrix and its path without what all such paths end in."""
    for place, folders, names in os.walk(folder):
        here = Path(place)
        depth = len(here.relative_to(folder).parts)
        folders[:] = sorted(
            name for name in folders if depth < MAX_DEPTH and name not in SKIPPED and name[0] not in "._"
        )
        plain = {name: name.removesuffix(".gz") for name in sorted(names) if not name.startswith(".")}
        matrices = [name for name, end in plain.items() if end.endswith(MATRIX)]
        for name in matrices:
            prefix = plain[name].removesuffix(MATRIX)
            features = _members(here, plain, prefix, FEATURES, len(matrices) == 1)
            barcodes = _members(here, plain, prefix, (BARCODES,), len(matrices) == 1)
            label = (here / prefix).relative_to(folder).as_posix() if prefix else _relative(here, folder)
            yield label.rstrip("_.-"), SampleFiles("", here / name, features, barcodes)
        for name in plain:
            if name.endswith(".h5") and not name.endswith("molecule_info.h5"):
                yield _relative(here / name.removesuffix(".h5"), folder), SampleFiles("", here / name)


def _members(
    folder: Path, plain: dict[str, str], prefix: str, ends: tuple[str, ...], alone: bool
) -> tuple[Path, ...]:
    """Return the files of a sample that end so; of several samples, its own or the shared ones."""
    every = [name for name, end in plain.items() if end.endswith(ends)]
    own = [name for name in every if plain[name] in {f"{prefix}{end}" for end in ends}]
    return tuple(folder / name for name in (every if alone else own or every))


def _relative(path: Path, folder: Path) -> str:
    name = path.relative_to(folder).as_posix()
    return "" if name == "." else name


def _name_of(label: str) -> str:
    """Return what of a path is the name of the sample."""
    parts = (re.sub(COMMON_END, "", part) for part in label.split("/"))
    return "_".join(part for part in parts if part and part not in COMMON_PARTS)


def _is_odd(sample: SampleFiles) -> bool:
    """Tell whether a file is HDF5 and not called a matrix."""
    return sample.kind == HDF5 and "matri" not in sample.matrix.name


def _shown(sample: SampleFiles, folder: Path) -> str:
    return sample.matrix.relative_to(folder).as_posix()
