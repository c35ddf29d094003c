"""Hold out the perturbed cells of a context: a cell line, donor or batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from biojepa.contracts import CONTEXT, CONTEXT_COLUMN, CONTROL, LEFT_OUT, VALIDATION_ELSEWHERE
from biojepa.errors import InputError
from biojepa.labels import in_context
from biojepa.schemes.fold import HeldOut, draw_validation, require_sets
from biojepa.splits import split_table


def split_context(
    label: np.ndarray,
    context: np.ndarray,
    contexts: Sequence[str],
    fold: int,
    column: str,
    min_cells: int = 10,
    validation_share: float = 0.1,
    seed: int = 0,
    where: str | Path = "the screen",
) -> HeldOut:
    """Hold out the perturbed cells of one context; the same perturbations may be trained in others.

    A perturbation of the held-out context is a label of its own, ``A+B @ K562``. Control cells of every
    context stay in training: what unperturbed cells of a new context look like is known before any of them
    is perturbed. Validation are perturbations of the other contexts; their counterparts in the held-out
    one are left out, because what early stopping and the gate have seen of them is not unseen.

    Parameters
    ----------
    label, context
        (cells,) perturbation and context of each cell of the screen.
    contexts
        Contexts to hold out in turn; ``fold`` is the place of this one.
    column
        Where the contexts come from, for messages and the record.
    min_cells
        Fewest cells of a perturbation in the held-out context to be tested, and in the others together to
        be trained; the labels left out are listed in the facts.
    validation_share
        Share of the perturbations of the other contexts.
    seed, where
        As in :func:`split_genes`.

    Returns
    -------
    The fold; facts ``context_column``, ``context``, ``min_cells_in_context``, ``validation_elsewhere`` and
    ``left_out``: labels with too few cells or used for validation elsewhere, and how many they have.

    Raises
    ------
    InputError
        When a context is not in the screen, has no control cells, or leaves too few perturbations.
    """
    found = Counter(str(name) for name in context)
    unknown = [name for name in contexts if name not in found]
    if unknown:
        listed = ", ".join(f"{name} ({n})" for name, n in sorted(found.items())[:20])
        raise InputError(
            f"{where}, scheme context",
            f"no cell whose {column} is {' or '.join(map(repr, unknown))}; cells of each: {listed}",
            "contexts of this screen",
            "correct pair.contexts or pair.context_column",
        )
    held_out = contexts[fold]
    inside, control = context == held_out, label == CONTROL
    if (inside & control).sum() < min_cells or not (~inside & control).any():
        raise InputError(
            f"{where}, scheme context, held-out context {held_out!r}",
            f"{(inside & control).sum()} control cell(s) in it and {(~inside & control).sum()} in the others",
            f"at least {min_cells} in it, since predictions start from them, and some in the others",
            "choose other contexts, or lower pair.min_cells_in_context",
        )
    tested, trained = (Counter(label[part & ~control].tolist()) for part in (inside, ~inside))
    test = [name for name, n in tested.items() if n >= min_cells]
    rest = sorted(name for name, n in trained.items() if n >= min_cells)
    too_few = {in_context(name, held_out): n for name, n in tested.items() if n < min_cells}
    too_few |= {name: n for name, n in trained.items() if n < min_cells}
    rng = np.random.default_rng([seed, fold])
    validation = draw_validation(rest, round(validation_share * len(rest)), rng)
    training = [name for name in rest if name not in validation]
    stopped_by = {in_context(name, held_out): tested[name] for name in test if name in validation}
    placed = {in_context(name, held_out) for name in test} - set(stopped_by)
    require_sets(
        f"{where}, scheme context, held-out context {held_out!r}",
        len(training),
        len(validation),
        len(placed),
        "choose other contexts, or lower pair.min_cells_in_context, which leaves out "
        f"{len(too_few)} labels here; {len(stopped_by)} more are validation in the other contexts",
    )
    left_out = too_few | stopped_by
    return HeldOut(
        split_table(sorted([*rest, *placed]), validation, placed, training),
        {
            CONTEXT_COLUMN: column,
            CONTEXT: held_out,
            "min_cells_in_context": min_cells,
            VALIDATION_ELSEWHERE: sorted(stopped_by),
            LEFT_OUT: {name: int(n) for name, n in sorted(left_out.items())},
        },
    )
