"""Write a check as plain text for a terminal."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from biojepa.check.screen import CALLS, COUNTS, EARLIER, LABELS, LISTED, UNKNOWN
from biojepa.disk import size_text
from biojepa.preprocess.annotate import MIN_MITO_GENES, PANEL_GENES

WIDTH = 100
# Rules of the target at which a new screen is looked at first.
TO_PREPROCESSED = frozenset(("download", "unpack", "unpack_file", "simulate", "preprocess", "qc_report"))
MARK = " (of an earlier run)"


def as_text(report: Mapping[str, Any]) -> str:
    """Return the report of :func:`~biojepa.check.report.check_config` as lines of text, problems last."""
    lines = []
    for dataset, facts in report["datasets"].items():
        lines += [dataset + (" (for its responses alone)" if facts["only_responses"] else "")]
        lines += [f"  {line}" for part in _parts(facts) for line in _wrapped(part)]
        lines.append("")
    lines = lines if report["jobs"] or report["notes"] else lines[:-1]
    lines += [line for note in report["notes"] for line in _wrapped(f"Note: {note}")]
    if report["jobs"]:
        total = sum(report["jobs"].values())
        first = sum(n for rule, n in report["jobs"].items() if rule in TO_PREPROCESSED)
        early = f", {first} of them for `preprocessed`" if 0 < first < total else ""
        lines += [
            "Jobs",
            *_wrapped(f"  {total} to run{early}: {_counts(report['jobs'], len(report['jobs']))}"),
        ]
    if any(report["jobs"].values()) and "estimate" in report:
        lines += _estimate(report["estimate"])
    problems = report["problems"]
    lines += ["", f"{len(problems)} problem(s)" if problems else "No problem found."]
    for problem in problems:
        first, *rest = problem.splitlines() or [""]
        lines += _wrapped(f"- {first}") + [part for line in rest for part in _wrapped(f"  {line}")]
    return "\n".join(lines).strip() + "\n"


def _wrapped(text: str) -> list[str]:
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [""]


def _parts(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is known of a screen, a line each."""
    for file in facts["files"]:
        size = size_text(file["bytes"]) if file["bytes"] is not None else "size not known"
        about = size if file["state"] == "there" else f"about {size}" if file["bytes"] else size
        sure = ", no checksum known" if file["state"] == "to fetch" and not file["checksum"] else ""
        yield f"file: {file['address']} ({file['state']}, {about}{sure})"
    if "simulated" in facts:
        asked = ", ".join(f"{name.removeprefix('n_')} {n:,}" for name, n in facts["simulated"].items())
        yield f"{facts['state']}: {asked}"
    elif facts["state"] != "read":
        about = f"; about {facts['cells_in_catalogue']:,} cells" if "cells_in_catalogue" in facts else ""
        yield f"screen: {facts['state']}{about}"
    if "cells" in facts:
        guides = f", {facts['guides']:,} guides" if facts.get("guides") else ""
        yield f"cells: {facts['cells']:,}, genes: {facts['genes']:,}{guides}{_mark(facts, 'cells')}"
    yield from (f"left out: {n:,} {why}" for why, n in facts.get("left_out", {}).items())
    yield from (f"note: {note}" for note in facts.get("notes", ()))
    if "depth_from" in facts:
        yield from _depth(facts)
    yield from _labels(facts)
    yield from _perturbations(facts)
    if "batches" in facts:
        by = facts.get("batches_by")
        if by == "":
            yield "batches: no `batch_column` and one sample, so one batch"
        else:
            named = f" by {by}" if by else ""
            marked = _mark(facts, "batches")
            yield f"batches{named}{marked}: {len(facts['batches'])}: {_counts(facts['batches'])}"
    if alone := facts.get("batches_without_control"):
        yield f"batches without a control cell: {_names(alone)}; paired with controls of all batches"
    if set(facts.get("cell_types", {})) - {"unknown"}:
        marked = _mark(facts, "cell_types")
        yield f"cell types{marked}: {len(facts['cell_types'])}: {_counts(facts['cell_types'])}"
    if "coverage" in facts:
        yield from _coverage(facts["coverage"], _mark(facts, "perturbations"))
    yield from _folds(facts)


def _mark(facts: Mapping[str, Any], fact: str) -> str:
    """Return what marks a fact that an earlier run knew, whose settings may have been others."""
    return MARK if fact in facts.get("of_earlier_run", ()) else ""


def _depth(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield where depth and mitochondrial share of cells come from, and whether a panel can tell them."""
    genes = f"{facts['genes']:,} genes"
    if facts["depth_from"]:
        yield f"depth: column {facts['depth_from']}"
    else:
        panel = "; a panel? then name `library_size_column`" if facts["genes"] < PANEL_GENES else ""
        yield f"depth: sum over {genes}{panel}"
    found = facts["mito_genes"]
    if facts["mito_from"]:
        yield f"mitochondria: column {facts['mito_from']}"
    elif not found:
        yield f"mitochondria: no MT- gene of {genes}, so no share; name `mito_column` if there is one"
    else:
        few = len(found) < MIN_MITO_GENES
        fix = f" ({_names(found)}): too few for a share; name `mito_column`" if few else ""
        yield f"mitochondria: {len(found)} MT- gene{'s' if len(found) > 1 else ''} of {genes}{fix}"


def _labels(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield how labels are understood."""
    origin = facts.get("labels_from")
    # Not known where the table of guides cannot be read.
    targets = f"; guides of each target: {_counts(facts['targets'])}" if facts.get("targets") else ""
    if origin == UNKNOWN:
        yield "labels: known once the screen is there"
    elif origin == COUNTS:
        yield f"labels: called from guide counts by preprocess ({facts['method']}){targets}"
    elif origin == CALLS:
        yield f"labels: from {facts['calls']}{targets}"
    elif origin == EARLIER:
        yield f"labels: of an earlier run, {facts['earlier']}; its settings may have been others"
    labels = facts.get("labels")
    if labels is None:
        return
    what = "labels" if origin == LABELS else "guides"
    known = labels["distinct"] - len(labels["no_label"])
    yield f"{what}: {known:,} in the file, understood as {labels['understood']:,}"
    yield "  controls: " + (_mapped(labels["controls"]) or "none")
    yield "  most cells: " + (_mapped(labels["top"]) or "none")
    if labels["changed_top"] and origin == LABELS:
        yield f"  rewritten: {labels['changed']:,}, such as {_mapped(labels['changed_top'])}"
    if labels["no_label"]:
        counts = {one["raw"]: one["cells"] for one in labels["no_label"]}
        yield f"  no perturbation, cells left out: {sum(counts.values()):,}: {_counts(counts)}"
    if labels["other_controls"]:
        yield (
            "  called like controls but not named in control_label, left out: "
            f"{_counts(labels['other_controls'])}"
        )
    if facts.get("unsplit"):
        yield (
            f"  taken as single genes: {len(facts['unsplit'])}: {_counts(facts['unsplit'])}; if they are "
            f"combinations, set `separator` to {facts['join']}"
        )
    if labels["unparseable"]:
        counts = {one["raw"]: one["cells"] for one in labels["unparseable"]}
        yield f"  not understood: {len(counts)}: {_counts(counts)}"


def _perturbations(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield numbers of perturbations, and which have too few cells."""
    if "perturbations" not in facts:
        return
    marked = _mark(facts, "perturbations")
    yield f"control cells: {facts['control_cells']:,}{marked}"
    yield (
        f"perturbations: {facts['perturbations']:,} ({facts['singles']:,} single, {facts['combinations']:,} "
        f"combinations) of {facts['perturbed_genes']:,} genes{marked}"
    )
    if few := facts.get("too_few_cells"):
        fewest = facts["min_cells_per_perturbation"]
        yield f"  fewer than {fewest} cells, left out: {len(few)}: {_counts(few)}"
    if facts.get("near_the_limit"):
        yield (
            f"  near that limit: {facts['near_the_limit']}, which filters of cells (depth, genes, "
            "mitochondria, doublets) may take below it; these need the counts and are not applied here"
        )


def _coverage(coverage: Mapping[str, Any], marked: str) -> Iterator[str]:
    """Yield which sources know the perturbed genes; ``marked`` follows the number of these."""
    genes = coverage["genes"]
    if "measured" in coverage and genes:
        hint = f"; {coverage['measured_hint']}" if coverage["measured_hint"] else ""
        yield f"perturbed genes that the screen measures: {coverage['measured']:,} of {genes:,}{marked}{hint}"
    for source in coverage["sources"]:
        hint = f"; {source['hint']}" if source["hint"] else ""
        known = f"{source['covers']:,} of {genes:,} perturbed genes{marked}" if genes else "read"
        yield f"prior source {source['name']} ({source['kind']}): {known}{hint}"
    unread = [*coverage["pending"], *coverage["missing"]]
    if "asked" in coverage and not unread:
        unknown = _names(coverage["asked_unknown"]) or "none"
        yield f"predict: {coverage['asked']:,} asked for; genes that no source knows: {unknown}"
    if coverage["pending"]:
        yield f"prior sources that are not there yet: {', '.join(coverage['pending'])}"
    if coverage["missing"]:
        yield f"prior sources that are missing: {', '.join(coverage['missing'])}"
    if genes and coverage["uncovered"] and not unread:
        first = coverage["uncovered_first"]
        listed = _names(first) + (", …" if coverage["uncovered"] > len(first) else "")
        yield f"genes that no source knows: {coverage['uncovered']:,}: {listed}"


def _folds(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sizes of all folds."""
    for scheme, folds in facts.get("folds", {}).items():
        sizes = [(fold["fold"], f"{fold['train']}/{fold['val']}/{fold['test']}") for fold in folds]
        dealt = []
        for size, alike in itertools.groupby(sizes, key=lambda pair: pair[1]):
            names = [str(name) for name, _ in alike]
            dealt.append(f"fold{'s' if len(names) > 1 else ''} {', '.join(names)}: {size}")
        marked = _mark(facts, "perturbations")
        sets = f"perturbations for training/validation/test{marked}"
        yield f"scheme {scheme}, {sets}: {'; '.join(dealt) or 'none'}"
    if "folds" in facts and not facts["folds"]:
        first = "preprocess has called the guides" if facts.get("labels_from") == COUNTS else "labels are"
        yield f"folds: known once {first}"


def _estimate(estimate: Mapping[str, Any]) -> list[str]:
    """Return time and memory, with what they rest on."""
    lines = ["Estimate, from the figures of docs/performance.md (another machine, 5,000 genes, one thread)"]
    for rule, cost in estimate["rules"].items():
        lines.append(
            f"  {rule}: {cost['jobs']} job(s), {_time(cost['seconds'])} of processor time, "
            f"up to {cost['gib']:.1f} GiB each"
        )
    if len(estimate["rules"]) > 1:
        total = sum(cost["seconds"] for cost in estimate["rules"].values())
        most = max(cost["gib"] for cost in estimate["rules"].values())
        lines.append(f"  together: {_time(total)} of processor time, {most:.1f} GiB at most")
    if estimate["not_measured"]:
        lines += _wrapped(f"  not measured, so not in it: {', '.join(estimate['not_measured'])}")
    if estimate["missing"]:
        lines += _wrapped(f"  cells not known of: {', '.join(estimate['missing'])}")
    return lines


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"


def _counts(counts: Mapping[str, int], most: int = LISTED) -> str:
    """Write names with numbers, the first ``most`` of them."""
    shown = ", ".join(f"{name or '(empty)'} {n:,}" for name, n in list(counts.items())[:most])
    return shown + (f", and {len(counts) - most} more" if len(counts) > most else "")


def _names(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _mapped(rows: list[dict[str, Any]]) -> str:
    """Write raw labels with what they become, where that differs."""
    return ", ".join(
        f"{row['raw']} → {row['label']} {row['cells']:,}"
        if row["raw"] != row["label"]
        else f"{row['raw']} {row['cells']:,}"
        for row in rows
    )
