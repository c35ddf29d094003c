"""Put together all that can be said before a run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from biojepa.catalogue import read_catalogue
from biojepa.check.plan import count_jobs, estimate, files_of, models_of, space_problem
from biojepa.check.problems import Problems
from biojepa.check.screen import Screen, look_at_folds, look_at_screen
from biojepa.check.sources import look_at_sources
from biojepa.config import Config, read_config

WORKFLOW = Path(__file__).resolve().parents[3]
SNAKEFILE = WORKFLOW / "Snakefile"
CATALOGUE = WORKFLOW.parent / "resources" / "catalogue.tsv"


def check_config(content: Mapping[str, Any], arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Check a config and its data without running anything; paths are relative to the working folder.

    Parameters
    ----------
    content
        The config, as read from YAML and the command line.
    arguments
        Options with which Snakemake reads the same config, to count jobs; None: jobs are not counted.

    Returns
    -------
    dict
        ``problems`` (sentences; empty when a run can start), ``notes``, ``compared``, ``datasets`` (name to
        facts), ``jobs`` (rule to number) and ``estimate``; of text, numbers, lists and dicts alone.
    """
    problems = Problems()
    report: dict[str, Any] = {"problems": problems.found, "notes": [], "datasets": {}, "jobs": {}}
    config, wrong = read_config(content, WORKFLOW / "schemas", CATALOGUE)
    for problem in wrong:
        problems.add(problem)
    if config is None:
        return report
    report["notes"] = list(config.notes)
    report["compared"] = models_of(config)
    if config.archived:
        report["notes"].append("archived: only reports are made again, from the results that are kept")
    if missing := config.missing_predictions():
        problems.add(missing)
        wrong.append(missing)
    # Where the config is at fault, Snakemake would only say the same once more.
    options = None if arguments is None else list(arguments)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(max_workers=1) as background:
        if options is not None and wrong:
            options = _with_mended_table(options, content, config, Path(scratch) / "datasets.tsv")
            if options is not None:
                report["notes"].append(
                    "jobs are those of a table whose unknown columns are spelt as proposed, or left out"
                )
        # Snakemake plans in a process of its own, while files are read here.
        counting = background.submit(count_jobs, options, SNAKEFILE) if options is not None else None
        screens = _look_at_data(config, report, problems)
        if counting is not None:
            report["jobs"], said = counting.result()
            if said:
                problems.add(f"Snakemake cannot plan the run: {said}")
        elif arguments is not None:
            report["notes"].append(
                "jobs are counted, and what else may be wrong is looked for, once "
                "the problems of the config are mended"
            )
    schema = yaml.safe_load((WORKFLOW / "schemas" / "config.schema.yaml").read_text(encoding="utf-8"))
    report["estimate"] = estimate(config, screens, report["jobs"], _defaults(schema["properties"]["train"]))
    return report


def _with_mended_table(
    arguments: Sequence[str], content: Mapping[str, Any], config: Config, path: Path
) -> list[str] | None:
    """Name a table with the rows as they were understood, where nothing but names of columns is wrong.

    Returns
    -------
    The options of Snakemake with that table, written to ``path``; None where more is wrong.
    """
    pd.DataFrame([dict(source.row) for source in config.sources.values()]).to_csv(path, sep="\t", index=False)
    mended = {**content, "datasets": str(path)}
    if config.missing_predictions() or read_config(mended, WORKFLOW / "schemas", CATALOGUE)[1]:
        return None
    table = f"datasets={path}"
    return [*arguments, table] if "--config" in arguments else [*arguments, "--config", table]


def _look_at_data(config: Config, report: dict[str, Any], problems: Problems) -> dict[str, Screen]:
    """Fill in what the report says of each dataset."""
    catalogue = read_catalogue(CATALOGUE)
    for dataset in config.all_datasets:
        problems.missing |= {path for _, path in config.source(dataset).missing_files()}
    screens: dict[str, Screen] = {
        dataset: look_at_screen(config, dataset, problems) for dataset in config.all_datasets
    }
    wanted = []
    for dataset, screen in screens.items():
        facts = report["datasets"][dataset] = screen.facts
        facts["only_responses"] = dataset not in config.datasets
        facts["files"] = files_of(config, dataset, catalogue)
        wanted += facts["files"]
        if "cells" not in facts and dataset in catalogue and catalogue[dataset].descriptions["cells"]:
            facts["cells_in_catalogue"] = int(catalogue[dataset].descriptions["cells"])
        if dataset in config.datasets:
            facts["coverage"] = look_at_sources(config, dataset, screens, problems)
            facts["folds"] = look_at_folds(config, dataset, screen, problems)
    if lack := space_problem(wanted, Path()):
        problems.add(lack)
    return screens


def _defaults(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of a section, at every depth."""
    keys = part.get("properties", {})
    return {key: _defaults(one) if "properties" in one else one.get("default") for key, one in keys.items()}
