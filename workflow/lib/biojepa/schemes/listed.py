"""Hold out the perturbations that the user names."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from biojepa.contracts import CONTROL, GENE_SEPARATOR, PERTURBATION, SET, TEST, TRAIN, VAL
from biojepa.errors import InputError
from biojepa.files import read_tsv
from biojepa.labels import normalize_label
from biojepa.schemes.fold import MIN_TRAINING, HeldOut, draw_validation, require_sets
from biojepa.splits import split_table

VALIDATION = "validation"


def split_listed(
    labels: Iterable[str],
    listed: Mapping[str, Sequence[str]] | str,
    validation_share: float = 0.1,
    seed: int = 0,
    where: str | Path = "the screen",
) -> HeldOut:
    """Hold out what the user names.

    Parameters
    ----------
    labels
        Perturbations of the screen; control is ignored.
    listed
        ``test`` and, optionally, ``validation`` perturbations, or the path of a TSV with the columns
        ``perturbation`` and ``set`` (``test``, ``val`` or ``validation``, ``train``). Genes of a
        combination may come in any order. What is not named is trained. Without validation
        perturbations these are drawn from the rest, singles and combinations in proportion.
    validation_share
        Share of all labels to draw for validation.
    seed, where
        As in :func:`split_genes`.

    Returns
    -------
    The fold; facts ``listed_in`` and ``validation_drawn``.

    Raises
    ------
    InputError
        Naming every perturbation that the screen lacks, with similar ones, and those in two sets.
    """
    names = sorted(set(labels) - {CONTROL})
    source = listed if isinstance(listed, str) else "config, pair.list"
    wanted = read_listed(listed) if isinstance(listed, str) else dict(listed)
    sets = {group: _known(wanted.get(group, ()), names, source, where) for group in (TEST, VALIDATION, TRAIN)}
    named = Counter(name for group in sets.values() for name in group)
    twice = sorted(name for name, n in named.items() if n > 1)
    if twice:
        raise InputError(source, f"{', '.join(twice[:10])} in two sets", "one set each", "name each once")
    test = sets[TEST]
    rest = [name for name in names if name not in test]
    drawn, validation = not sets[VALIDATION], sets[VALIDATION]
    if drawn:
        free = [name for name in rest if name not in sets[TRAIN]]
        # What is listed as trained need not be left over.
        left, rng = max(0, MIN_TRAINING - len(sets[TRAIN])), np.random.default_rng(seed)
        validation = draw_validation(free, round(validation_share * len(names)), rng, left)
    training = [name for name in rest if name not in validation]
    require_sets(
        f"{source}, on {where}",
        len(training),
        len(validation),
        len(test),
        "name some test perturbations, leave some for training and one for validation",
    )
    return HeldOut(
        split_table(names, validation, test, training), {"listed_in": source, "validation_drawn": drawn}
    )


def read_listed(path: str | Path) -> dict[str, list[str]]:
    """Read a TSV with the columns ``perturbation`` and ``set`` into the perturbations of each set.

    Raises
    ------
    InputError
        When the file or a column is missing, or a set is unknown.
    """
    if not Path(path).is_file():
        raise InputError("config, pair.list", f"no file {path}", "a TSV", "correct the path")
    table = read_tsv(path, dtype=str)
    if not {PERTURBATION, SET} <= set(table.columns):
        raise InputError(
            path,
            f"columns {list(table.columns)}",
            f"{PERTURBATION} and {SET}",
            "separate columns by tabs, and name them in the first line",
        )
    group_of = {TEST: TEST, VAL: VALIDATION, VALIDATION: VALIDATION, TRAIN: TRAIN}
    wrong = table[~table[SET].isin(group_of) | table[PERTURBATION].isna()]
    if len(wrong):
        raise InputError(
            f"{path}, line {int(wrong.index[0]) + 2}",
            f"perturbation {wrong.iloc[0][PERTURBATION]!r} in set {wrong.iloc[0][SET]!r}",
            f"a perturbation, and one of {', '.join(group_of)}",
            "correct the line",
        )
    groups = table[SET].map(group_of)
    return {group: table.loc[groups == group, PERTURBATION].tolist() for group in set(groups)}


def _known(wanted: Iterable[str], names: Sequence[str], source: str, where: str | Path) -> set[str]:
    """Bring named perturbations into the spelling of the screen; refuse those that it lacks."""
    found, problems = set(), []
    for entry in wanted:
        label = normalize_label(entry)
        if label in names:
            found.add(str(label))
            continue
        near = difflib.get_close_matches(str(label), names, n=3)
        problems.append(f"{entry!r}" + (f" (similar: {', '.join(near)})" if near else ""))
    if problems:
        raise InputError(
            source,
            f"{len(problems)} that {where} lacks after quality control: {'; '.join(problems[:10])}",
            f"perturbations of this screen, GENE or genes joined by {GENE_SEPARATOR!r}",
            "correct or remove them; perturbations.tsv lists all, qc.tsv what was removed",
        )
    return found
