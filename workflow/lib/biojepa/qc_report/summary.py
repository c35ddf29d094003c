"""The first screen in sentences: what to look at, then what the screen is. Rules and limits stand here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from biojepa import contracts
from biojepa.guides.assign import ASSIGNED, NO_GUIDE, TOO_MANY_GUIDES
from biojepa.qc_report.inputs import RESPONDING_SHARE, QcInputs
from biojepa.report.figures_quality import on_target_points
from biojepa.report.tables import format_count, format_number, format_percent

SIGNIFICANT = 0.05
# A filter that takes more of the cells it sees than this is worth a look at its threshold.
LARGE_LOSS = 0.25
MANY_GENES_LOST = 0.5
FEW_CONTROLS, FEW_CONTROLS_IN_BATCH = 100, 10
# Whole transcriptomes shallower than this hardly show a single target.
SHALLOW, WHOLE_TRANSCRIPTOME = 1_000, 2_000
UNEVEN_DEPTH = 2.0
MANY_WITHOUT_GUIDE, MANY_WITH_SEVERAL = 0.4, 0.3
FEW_EFFECTS, FEW_TARGETS_MOVED = 0.2, 0.7
MANY_BY_ONE_GUIDE = 0.2
SHOWN_NAMES, SHOWN_GUIDES = 8, 5
# What the transcript of the target should do; a knock-out need not change it.
EXPECTED = {"CRISPRi": "down", "CRISPRa": "up"}


@dataclass(frozen=True)
class Warned:
    """Something to look at: what was found, and what it means or what to do."""

    found: str
    advice: str


def names_of(names: Iterable[object], most: int = SHOWN_NAMES) -> str:
    """List at most so many names, and say how many more there are."""
    every = [str(name) for name in names]
    more = len(every) - most
    return ", ".join(every[:most]) + (f" and {format_count(more)} more" if more > 0 else "")


def plural(n: int, noun: str, of_many: str = "") -> str:
    """Return a number with its noun."""
    return f"{format_count(n)} {noun if n == 1 else of_many or noun + 's'}"


def has_flag(table: pd.DataFrame, flag: str) -> pd.Series:
    """Tell which rows carry a flag among those joined by ``;``."""
    return table["flag"].fillna("").astype(str).str.split(";").map(lambda flags: flag in flags).astype(bool)


def class_shares(inputs: QcInputs) -> dict[str, float]:
    """Return the share of cells by outcome of guide assignment; empty where no guides were counted."""
    table = inputs.guides_per_cell
    if table.empty:
        return {}
    shares = table.groupby("status")["share"].sum()
    return {status: float(shares.get(status, 0.0)) for status in (ASSIGNED, NO_GUIDE, TOO_MANY_GUIDES)}


def genes_lost(inputs: QcInputs) -> tuple[int, int]:
    """Return genes read and genes removed, by the notes of the filters; 0 and 0 where none says so."""
    for note in inputs.qc["note"].fillna("").astype(str):
        if found := re.search(r"genes: (\d+) before, (\d+) removed", note):
            return int(found[1]), int(found[2])
    return 0, 0


def expected_change(inputs: QcInputs) -> str:
    """Return what the transcripts of targets should do: ``down``, ``up``, or nothing that can be said."""
    kinds = {EXPECTED.get(kind, "") for kind in inputs.cells.types}
    return kinds.pop() if len(kinds) == 1 else ""


def warnings(inputs: QcInputs) -> list[Warned]:
    """Return what a reader should look at, the most consequential first."""
    found: list[Warned] = []
    for rule in (_controls, _batches, _losses, _guides, _depth, _targets, _effects, _disagreement):
        found += rule(inputs)
    return found


def _controls(inputs: QcInputs) -> list[Warned]:
    cells, table = inputs.cells, inputs.cells.batches
    found = []
    if cells.n_controls < FEW_CONTROLS:
        found.append(
            Warned(
                f"Only {plural(cells.n_controls, 'control cell')}.",
                "Every effect is measured against them. Were other control labels left out? See the table of "
                "filters.",
            )
        )
    without = table.index[table["controls"] < FEW_CONTROLS_IN_BATCH]
    if len(table) > 1 and len(without):
        share = table.loc[without, "cells"].sum() / max(cells.n_cells, 1)
        found.append(
            Warned(
                f"{len(without)} of {plural(len(table), 'batch', 'batches')} have fewer than "
                f"{FEW_CONTROLS_IN_BATCH} control cells: {names_of(without)}.",
                f"{format_percent(share)} of the cells are there, with few controls of their batch or none.",
            )
        )
    return found


def _batches(inputs: QcInputs) -> list[Warned]:
    alone, n = inputs.cells.in_one_batch, len(inputs.perturbations)
    if not alone:
        return []
    return [
        Warned(
            f"{format_count(len(alone))} of {plural(n, 'perturbation')} lie in a single batch each: "
            f"{names_of(alone)}.",
            "Their effect cannot be told from that of the batch, unless controls are compared by batch.",
        )
    ]


def _losses(inputs: QcInputs) -> list[Warned]:
    found = []
    for row in inputs.qc.to_dict("records"):
        if row["filter"] in (NO_GUIDE, TOO_MANY_GUIDES) or not row["cells_before"]:
            continue
        share = row["cells_removed"] / row["cells_before"]
        if share > LARGE_LOSS:
            found.append(
                Warned(
                    f"The filter {str(row['filter']).replace('_', ' ')} ({row['threshold']}) removed "
                    f"{format_percent(share)} of the cells that it saw.",
                    "Look where its limit lies in the distributions, or at its note in the table of filters.",
                )
            )
    genes, removed = genes_lost(inputs)
    if removed > MANY_GENES_LOST * genes:
        found.append(
            Warned(
                f"{format_count(removed)} of {plural(genes, 'gene')} were removed: too few cells show them.",
                f"Effects are seen in the other {format_count(genes - removed)} alone. Lower "
                "preprocess.min_cells_per_gene for a small screen, or one of chosen genes.",
            )
        )
    return found


def _guides(inputs: QcInputs) -> list[Warned]:
    found, shares, calls = [], class_shares(inputs), inputs.guide_calls
    if shares.get(NO_GUIDE, 0) > MANY_WITHOUT_GUIDE:
        found.append(
            Warned(
                f"No guide was called in {format_percent(shares[NO_GUIDE])} of the cells.",
                "Look for the knee of guide UMIs: a shallow guide library, or a threshold above it.",
            )
        )
    if shares.get(TOO_MANY_GUIDES, 0) > MANY_WITH_SEVERAL:
        found.append(
            Warned(
                f"{format_percent(shares[TOO_MANY_GUIDES])} of the cells carry more guides than accepted.",
                "Many doublets, guides in the ambient RNA, or several guides in a cell by design: then "
                "preprocess.guide_assignment takes method threshold or mixture and max_guides.",
            )
        )
    return found + _absent_guides(calls)


def _absent_guides(calls: pd.DataFrame) -> list[Warned]:
    """Name targets without a cell; of the others, guides that were called nowhere."""
    found = []
    cells = calls[calls["target"] != contracts.CONTROL].groupby("target", sort=False)["cells_assigned"].sum()
    lost = cells.index[cells == 0]
    if len(lost):
        left = f"{format_count(len(cells) - len(lost))} of {plural(len(cells), 'target')} left"
        found.append(
            Warned(
                f"{names_of(lost)} {'has' if len(lost) == 1 else 'have'} no cell: {left}.",
                "No guide of such a target was given to a cell: missing from the library, or spelt otherwise "
                "in the reference.",
            )
        )
    never = calls[(calls["cells_called"] == 0) & ~calls["target"].isin(lost)]
    if len(never):
        named = [f"{guide} ({target})" for guide, target in zip(never["guide"], never["target"], strict=True)]
        found.append(
            Warned(
                f"{format_count(len(never))} of {plural(len(calls), 'guide')} were called in no cell: "
                f"{names_of(named, SHOWN_GUIDES)}.",
                "They may be missing from the library, or be spelt differently in the reference; other "
                "guides of their targets were found.",
            )
        )
    return found


def _depth(inputs: QcInputs) -> list[Warned]:
    found, cells = [], inputs.cells
    umis = cells.medians[contracts.LIBRARY_SIZE]
    if umis < SHALLOW and cells.n_genes >= WHOLE_TRANSCRIPTOME:
        found.append(
            Warned(
                f"The median cell has only {format_count(round(umis))} UMIs.",
                "Most targets are then seen in few cells; look at effects of many genes, not of single ones.",
            )
        )
    rows = inputs.batches
    rows = rows[(rows["metric"] == contracts.LIBRARY_SIZE) & (rows["cells"] > 0)].dropna(subset=["median"])
    if len(rows) > 1 and rows["median"].max() > UNEVEN_DEPTH * rows["median"].min() > 0:
        ordered = rows.sort_values("median", kind="stable")
        low, high = ordered.iloc[0], ordered.iloc[-1]
        found.append(
            Warned(
                f"Depth differs between batches: a median of {format_count(round(high['median']))} UMIs in "
                f"{high['batch']}, {format_count(round(low['median']))} in {low['batch']}.",
                "Compare perturbed cells with controls of their own batch (pair.strategy matched).",
            )
        )
    return found


def _targets(inputs: QcInputs) -> list[Warned]:
    found, table = [], inputs.perturbations
    points = on_target_points(table)
    if len(points) and (expected := expected_change(inputs)):
        sign = -1 if expected == "down" else 1
        moved = ((points["p"] < SIGNIFICANT) & (sign * points["log2fc"] > 0)).mean()
        if moved < FEW_TARGETS_MOVED:
            found.append(
                Warned(
                    f"Only {format_percent(moved)} of {plural(len(points), 'measured target')} went "
                    f"{expected} clearly (p < {SIGNIFICANT:g}).",
                    "Weak guides, too few cells, or labels that do not belong to these cells.",
                )
            )
    wrong = table.loc[has_flag(table, "target_wrong_direction"), "perturbation"]
    if len(wrong):
        found.append(
            Warned(
                f"{plural(len(wrong), 'perturbation')} moved the target the wrong way: {names_of(wrong)}.",
                "Look at their guides before anything is concluded from them.",
            )
        )
    return found


def _effects(inputs: QcInputs) -> list[Warned]:
    found, table = [], inputs.perturbations
    q = table["effect_q"].dropna()
    share = float((q < SIGNIFICANT).mean()) if len(q) else np.nan
    if share < FEW_EFFECTS:
        n = plural(len(q), "perturbation")
        some = f"Only {format_percent(share)} of {n} change cells detectably."
        advice = "No model can be asked to predict the others: their truth is noise."
        found.append(
            Warned(
                some if share else f"None of {n} changes cells detectably.",
                advice + _too_few_permutations(inputs),
            )
        )
    by_one = has_flag(table, "one_guide")
    if len(table) and by_one.mean() > MANY_BY_ONE_GUIDE:
        found.append(
            Warned(
                f"{format_count(by_one.sum())} of {plural(len(table), 'perturbation')} rest on one guide.",
                "What a guide does elsewhere in the genome cannot be told from the effect of its target.",
            )
        )
    return found


def _too_few_permutations(inputs: QcInputs) -> str:
    """Say so where not even perturbations with the smallest possible p could have been significant."""
    permutations, p = inputs.settings.get("permutations"), inputs.perturbations["effect_p"].dropna()
    if permutations is None or p.empty:
        return ""
    smallest = 1 / (int(permutations) + 1)
    reached = int((p <= smallest * (1 + 1e-6)).sum())
    if smallest * len(p) / max(reached, 1) < SIGNIFICANT:
        return ""
    return (
        f" But with {plural(int(permutations), 'permutation')} none could have passed: raise "
        "preprocess.permutations."
    )


def _disagreement(inputs: QcInputs) -> list[Warned]:
    table = inputs.perturbations
    names = table.loc[has_flag(table, "guides_disagree"), "perturbation"]
    if not len(names):
        return []
    text = f"Guides of {plural(len(names), 'perturbation')} disagree: {names_of(names)}."
    odd = inputs.guides[has_flag(inputs.guides, contracts.DISCORDANT)]
    if len(odd):
        named = odd.sort_values(["q", "guide_id"], kind="stable")["guide_id"]
        text += f" Unlike their siblings: {names_of(named, SHOWN_GUIDES)}."
    return [Warned(text, "They may hit something else, or not work.")]


def sentences(inputs: QcInputs) -> list[str]:
    """Return what the screen is, in plain sentences."""
    texts = (_kept, _genes, _called, _perturbed, _quality, _responses, _moved, _not_done)
    return [text for part in texts if (text := part(inputs))]


def _kept(inputs: QcInputs) -> str:
    read, kept = int(inputs.qc["cells_before"].iloc[0]), inputs.cells.n_cells
    share = kept / max(read, 1)
    told = "all but a few" if 0.995 <= share < 1 else format_percent(share)
    text = f"Of {plural(read, 'cell')}, {format_count(kept)} ({told}) were kept."
    lost = inputs.qc[inputs.qc["cells_removed"] > 0].sort_values(
        "cells_removed", ascending=False, kind="stable"
    )
    if len(lost):
        most = [f"{str(n).replace('_', ' ')} ({format_count(k)})" for n, k in
                zip(lost["filter"][:3], lost["cells_removed"][:3], strict=True)]  # fmt: skip
        text += f" Most of the others were lost to {', '.join(most)}."
    return text


def _genes(inputs: QcInputs) -> str:
    genes, removed = genes_lost(inputs)
    if not removed:
        return ""
    return (
        f"Of {plural(genes, 'gene')}, {format_count(genes - removed)} were kept; "
        f"{format_count(removed)} are seen in too few cells."
    )


def _called(inputs: QcInputs) -> str:
    shares = class_shares(inputs)
    if not shares:
        return "Perturbations came with the cells; no guides were counted."
    return (
        f"Guides were called in {format_percent(shares[ASSIGNED])} of the cells; "
        f"{format_percent(shares[NO_GUIDE])} have none that stands out, "
        f"{format_percent(shares[TOO_MANY_GUIDES])} more than are accepted."
    )


def _perturbed(inputs: QcInputs) -> str:
    table, cells = inputs.perturbations, inputs.cells
    text = plural(len(table), "perturbation")
    combined = int((table["n_perturbed_genes"] > 1).sum())
    text += f", {format_count(combined)} of them combinations," if combined else ""
    batches = plural(len(cells.batches), "batch", "batches")
    text += f" and {plural(cells.n_controls, 'control cell')} in {batches}."
    if len(table):
        least = table.sort_values("n_cells", kind="stable").iloc[0]
        text += (
            f" A perturbation has {format_count(table['n_cells'].median())} cells at the median, "
            f"{least['perturbation']} the fewest ({format_count(least['n_cells'])})."
        )
    return text


def _quality(inputs: QcInputs) -> str:
    medians = inputs.cells.medians
    text = f"The median kept cell has {format_count(round(medians[contracts.LIBRARY_SIZE]))} UMIs"
    if np.isfinite(medians["n_genes"]):
        text += (
            f" and {format_count(round(medians['n_genes']))} of {format_count(inputs.cells.n_genes)} genes"
        )
    if np.isfinite(medians["pct_mito"]):
        return text + f"; {format_number(medians['pct_mito'], 1)}\u202f% of its UMIs are mitochondrial."
    return text + "; its mitochondrial share is not known."


def _responses(inputs: QcInputs) -> str:
    table = inputs.perturbations.dropna(subset=["effect_q"])
    if table.empty:
        return ""
    clear = table[table["effect_q"] < SIGNIFICANT]
    text = (
        f"{format_count(len(clear))} of {plural(len(table), 'perturbation')} "
        f"({format_percent(len(clear) / len(table))}) change the cells detectably (q < {SIGNIFICANT:g})"
    )
    if len(clear):
        strongest = clear.sort_values(["effect_size", "perturbation"], ascending=[False, True])[
            "perturbation"
        ]
        text += f"; the strongest are {', '.join(map(str, strongest[:3]))}"
    text += "."
    if (shares := clear[RESPONDING_SHARE].dropna()).size:
        where = (
            "" if len(shares) == len(clear) else f" in the {format_count(len(shares))} where it can be told"
        )
        text += f" Of their cells, {format_percent(shares.median())} respond at the median{where}."
    return text


def _moved(inputs: QcInputs) -> str:
    points = on_target_points(inputs.perturbations)
    if points.empty:
        return "No perturbed gene is measured, so that nothing can be said of targets."
    clear = points["p"] < SIGNIFICANT
    fell, rose = int((clear & (points["log2fc"] < 0)).sum()), int((clear & (points["log2fc"] > 0)).sum())
    return (
        f"Of {plural(len(points), 'measured target')}, {format_count(fell)} fell and {format_count(rose)} "
        f"rose (p < {SIGNIFICANT:g})."
    )


def _not_done(inputs: QcInputs) -> str:
    if inputs.settings.get("doublets", "none") == "none":
        return "Doublets were not looked for (preprocess.doublets)."
    return ""


def facts(inputs: QcInputs) -> Sequence[tuple[str, str]]:
    """Return name and value of the numbers under the title."""
    table, cells = inputs.perturbations, inputs.cells
    return [
        ("cells read", format_count(inputs.qc["cells_before"].iloc[0])),
        ("kept", format_count(cells.n_cells)),
        ("controls", format_count(cells.n_controls)),
        ("perturbations", format_count(len(table))),
        ("with a detectable effect", format_count((table["effect_q"] < SIGNIFICANT).sum())),
        ("batches" if len(cells.batches) != 1 else "batch", format_count(len(cells.batches))),
        ("median UMIs", format_count(round(cells.medians[contracts.LIBRARY_SIZE]))),
    ]
