"""Read and check the config and the table of datasets before the first job."""

from __future__ import annotations

import copy
import csv
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from biojepa.catalogue import Entry, read_catalogue
from biojepa.contracts import NO_SPLIT, OTHER_SCREEN
from biojepa.errors import InputError
from biojepa.labels import spell_label
from biojepa.models import (
    ORACLES,
    REFERENCES,
    encoder_source,
    is_baseline,
    is_head,
    known_models,
    resolve_settings,
)
from biojepa.prediction_requests import ALL, read_requests
from biojepa.prior_names import require_file_names
from biojepa.raw_files import (
    IN_SEVERAL_FILES,
    SEPARATOR,
    SINGLE_FILE_FORMATS,
    RawFile,
    is_own_note,
    listed_files,
    unusable_file_names,
)
from biojepa.sample_files import find_samples
from biojepa.sizes import with_named_sizes
from biojepa.user_models import UserModel, unusable_names

SIMULATOR = "simulator"
DOWNLOADS = "resources/datasets"
DEFAULT_TABLE = "config/datasets.tsv"
SECTIONS = ("download", "preprocess", "pair", "train", "embed", "evaluate")
FILE_COLUMNS = (
    "source",
    "cell_metadata",
    "guide_table",
    "guide_counts",
    "guide_calls",
    "networks",
    "gene_sets",
    "gene_tables",
    "pathways",
)
SIMULATED_FILES = ("raw.h5ad", "guides.csv", "network.tsv.gz", "gene_sets.gmt")


class ConfigError(ValueError):
    """The config or the table of datasets cannot be used; the message names the key or the row.

    Attributes
    ----------
    problems
        What the message is made of, one sentence for each problem.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__(_listing(list(problems)))


@dataclass(frozen=True)
class Source:
    """One row of the table of datasets, its placeholders filled in.

    Attributes
    ----------
    row
        Column to value.
    where
        Table and row that it stands in, for messages.
    """

    row: Mapping[str, str]
    where: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """Name of the dataset."""
        return self.row["dataset"]

    @property
    def is_simulated(self) -> bool:
        """Whether the simulator makes it."""
        return self.row["source"] == SIMULATOR

    @property
    def files(self) -> tuple[RawFile, ...]:
        """Files that the row names, none where it is simulated."""
        return () if self.is_simulated else listed_files(self.row["source"], self.row["checksum"])

    @property
    def is_staged(self) -> bool:
        """Whether the download stage fetches, verifies, gathers or opens its files.

        One local file or folder without a checksum is read where it is.
        """
        files = self.files
        return len(files) > 1 or any(one.is_remote or one.checksum or one.is_opened for one in files)

    @property
    def folder(self) -> str:
        """Where the download stage puts its files."""
        return f"{DOWNLOADS}/{self.name}"

    @property
    def screen_files(self) -> tuple[RawFile, ...]:
        """Files that hold the counts: all but those that other columns name as ``{download}/…``."""
        named = {path for column in FILE_COLUMNS if column != "source" for path in _listed(self.row[column])}
        return tuple(one for one in self.files if f"{self.folder}/{one.name}" not in named)

    @property
    def archives(self) -> list[str]:
        """Paths of the archives that are unpacked into one folder."""
        opened = [one for one in self.screen_files if one.is_archive]
        return [f"{self.folder}/{one.name}" for one in opened] if self.is_unpacked_folder else []

    @property
    def is_unpacked_folder(self) -> bool:
        """Whether it is a folder that comes out of one or more archives."""
        return any(one.is_archive for one in self.screen_files) and not self.is_unpacked_file

    @property
    def is_unpacked_file(self) -> bool:
        """Whether it is one file that comes out of a ``.gz`` or out of an archive."""
        files = self.screen_files
        wanted = self.row["format"] in SINGLE_FILE_FORMATS
        return len(files) == 1 and (files[0].is_compressed or (files[0].is_archive and wanted))

    @property
    def packed(self) -> str:
        """Path of what the one file comes out of."""
        return f"{self.folder}/{self.screen_files[0].name}"

    @property
    def path(self) -> str:
        """File or folder of the raw screen, as its reader finds it."""
        if self.is_simulated:
            return f"{self.folder}/raw.h5ad"
        files = self.screen_files
        if not files:
            return self.folder
        if not self.is_staged:
            return files[0].address
        if self.is_unpacked_file:
            suffix = SINGLE_FILE_FORMATS[self.row["format"]] if files[0].is_archive else ""
            return f"{self.unpacked}/{files[0].stem.removesuffix(suffix)}{suffix}"
        if self.is_unpacked_folder:
            return self.unpacked
        return f"{self.folder}/{files[0].name}" if len(files) == 1 else self.folder

    @property
    def unpacked(self) -> str:
        """Folder of what comes out of archives."""
        return f"{self.folder}/unpacked"

    @property
    def downloads(self) -> list[str]:
        """Files that the download stage makes."""
        if self.is_simulated:
            return [f"{self.folder}/{name}" for name in SIMULATED_FILES]
        if not self.is_staged:
            return []
        opened = [self.path] if self.is_unpacked_file or self.is_unpacked_folder else []
        return [*(f"{self.folder}/{one.name}" for one in self.files), *opened]

    def file(self, name: str) -> RawFile:
        """Return the file that has a name in the folder of the dataset."""
        return next(one for one in self.files if one.name == name)

    @property
    def raw_files(self) -> list[str]:
        """Files that hold the screen: one, or those of a folder; a folder that is still to be unpacked."""
        path = Path(self.path)
        if not self.is_simulated and not self.is_staged and path.is_dir():
            samples, _ = find_samples(path, without=_listed(self.row["guide_counts"]))
            files = [file for sample in samples for file in sample.files]
            # What no reader knows is an input too, but for what Snakemake and downloads leave beside files.
            others = (file for file in path.iterdir() if not is_own_note(file.name))
            return sorted({file.as_posix() for file in files or others if file.is_file()})
        if self.path == self.folder:
            return [f"{self.folder}/{one.name}" for one in self.screen_files]
        return [self.path]

    def table(self, column: str) -> list[str]:
        """Path of a table beside the raw files, such as ``cell_metadata``; empty for none."""
        return [self.row[column]] if self.row[column] else []

    @property
    def screen(self) -> dict[str, str]:
        """What the reader of raw screens is told."""
        others = ("source", "checksum", "networks", "gene_sets", "gene_tables", "responses", "pathways")
        return {key: value for key, value in self.row.items() if key not in others} | {"path": self.path}

    @property
    def networks(self) -> list[str]:
        """Edge tables of prior knowledge."""
        return _listed(self.row["networks"])

    @property
    def gene_sets(self) -> list[str]:
        """Gene sets of prior knowledge."""
        return _listed(self.row["gene_sets"])

    @property
    def gene_tables(self) -> list[str]:
        """Tables of gene features that are prior knowledge."""
        return _listed(self.row["gene_tables"])

    @property
    def responses(self) -> list[str]:
        """Other datasets whose responses are prior knowledge."""
        return _listed(self.row["responses"])

    @property
    def pathways(self) -> list[str]:
        """Gene sets of the enrichment, one file or none."""
        return _listed(self.row["pathways"])

    def missing_files(self) -> list[tuple[str, str]]:
        """Columns and local files that should exist now and do not."""
        columns = [column for column in FILE_COLUMNS if column != "source"]
        named = [(column, path) for column in columns for path in _listed(self.row[column])]
        named[:0] = [("source", one.address) for one in self.files if not one.is_remote]
        made = f"{self.folder}/"
        return [
            (column, path) for column, path in named if not path.startswith(made) and not Path(path).exists()
        ]

    def unmade_files(self) -> list[tuple[str, str]]:
        """Columns and files of the own folder that nothing puts there."""
        columns = [column for column in FILE_COLUMNS if column != "source"]
        return [
            (column, path)
            for column in columns
            for path in _listed(self.row[column])
            if path.startswith(f"{self.folder}/")
            and path not in self.downloads
            and not (self.is_unpacked_folder and path.startswith(f"{self.unpacked}/"))
        ]


def _listed(text: str) -> list[str]:
    return [path.strip() for path in text.split(SEPARATOR) if path.strip()]


@dataclass(frozen=True)
class Config:
    """The checked config.

    Attributes
    ----------
    content
        Config with all defaults filled in.
    sources
        Dataset name to its row, for the datasets to run and those whose responses they use.
    notes
        What a user should know though it is no mistake, such as a row that hides one of the catalogue.
    """

    content: Mapping[str, Any]
    sources: Mapping[str, Source]
    notes: tuple[str, ...] = ()

    @property
    def datasets(self) -> list[str]:
        """Datasets to run."""
        return list(self.content["run"])

    @property
    def all_datasets(self) -> list[str]:
        """Datasets to run, and those that are preprocessed because their responses are used."""
        return list(self.sources)

    @property
    def predict(self) -> list[str] | str | None:
        """What to predict with a model trained on everything, as the config has it."""
        return self.content["predict"]

    @property
    def archived(self) -> bool:
        """Whether results are an archive, from which reports are made again and nothing before them."""
        return bool(self.content["archived"])

    @property
    def schemes(self) -> list[str]:
        """Schemes, ``none`` among them where models are to be trained on everything."""
        return list(self.content["schemes"])

    @property
    def evaluated_schemes(self) -> list[str]:
        """Schemes that hold something out, so that there is something to evaluate."""
        return [scheme for scheme in self.schemes if scheme != NO_SPLIT]

    @property
    def seeds(self) -> list[int]:
        """Seeds of trained models."""
        return list(self.content["seeds"])

    @property
    def models(self) -> list[str]:
        """Names of the models to compare, those made elsewhere included."""
        return [entry if isinstance(entry, str) else entry["name"] for entry in self.content["models"]]

    @cached_property
    def user_models(self) -> dict[str, UserModel]:
        """Models whose predictions were made elsewhere, by name."""
        entries = [entry for entry in self.content["models"] if not isinstance(entry, str)]
        return {entry["name"]: UserModel(entry["name"], entry["predictions"]) for entry in entries}

    def user_files(self, model: str, dataset: str) -> list[str]:
        """Files of predictions made elsewhere, of every scheme, fold and seed of a dataset."""
        user = self.user_models[model]
        return list(
            dict.fromkeys(
                user.path(dataset, scheme, fold, seed)
                for scheme in self.evaluated_schemes
                for fold in self.folds(dataset, scheme)
                for seed in user.seeds(self.seeds)
            )
        )

    def missing_predictions(self) -> str:
        """Say which files of predictions made elsewhere are not there; nothing where all are."""
        missing = [
            f"config, models, {model}: no file " + _some(absent)
            for model in self.user_models
            if (absent := [path for path in self._files_of_user(model) if not Path(path).is_file()])
        ]
        if not missing:
            return ""
        fix = (
            "Fix: make the splits first, with the target paired (snakemake paired --cores 4), and write the "
            "predictions of every fold there; or correct the path, in which {dataset}, {split}, {fold} and "
            "{seed} are filled in"
        )
        return "\n".join([*missing, fix])

    def _files_of_user(self, model: str) -> list[str]:
        files = (path for dataset in self.datasets for path in self.user_files(model, dataset))
        return list(dict.fromkeys(files))

    def simple_models(self, dataset: str) -> list[str]:
        """List the simple models of a dataset; ``other_screen`` where its row names another screen."""
        known = self.source(dataset).responses
        return [m for m in self.models if is_baseline(m) and (known or m != OTHER_SCREEN)]

    def source(self, dataset: str) -> Source:
        """Row of a dataset."""
        return self.sources[dataset]

    def settings(self, dataset: str, section: str) -> dict[str, Any]:
        """Return the settings of one stage for one dataset, overrides applied."""
        return self._resolved[dataset][section]

    def resolved(self, dataset: str) -> dict[str, Any]:
        """All that determines the results of a dataset, for the record."""
        general = {key: self.content[key] for key in ("schemes", "predict", "folds", "seeds")}
        known = self.source(dataset).responses
        general["models"] = [entry for entry in self.content["models"] if known or entry != OTHER_SCREEN]
        return {**general, "source": dict(self.source(dataset).row), **self._resolved[dataset]}

    def n_folds(self, dataset: str, scheme: str) -> int:
        """Folds that a scheme has: one for each held-out context, one of a list and of ``none``."""
        pair = self.settings(dataset, "pair")
        if scheme == "context":
            return len(pair["contexts"] or ())
        return 1 if scheme in ("list", NO_SPLIT) else pair["n_folds"]

    def folds(self, dataset: str, scheme: str) -> list[int]:
        """Folds of a scheme to run: those of the key ``folds`` that it has, or all; ``none`` has one."""
        if scheme == NO_SPLIT:
            return [0]
        n_folds, chosen = self.n_folds(dataset, scheme), self.content["folds"]
        return [fold for fold in (range(n_folds) if chosen is None else chosen) if fold < n_folds]

    def pattern(self, kind: str) -> str:
        """Regular expression of the datasets of a kind; matches nothing where there is none.

        Kinds are ``simulated``, ``downloaded`` (the download stage makes their files, local ones with a
        checksum among them), ``unpacked_folder`` and ``unpacked_file``.
        """
        wanted = f"is_{'staged' if kind == 'downloaded' else kind}"
        return "|".join(name for name, source in self.sources.items() if getattr(source, wanted)) or "(?!)"

    def file_pattern(self) -> str:
        """Regular expression of the names of files that are fetched or linked; matches none if none is."""
        sources = (source for source in self.sources.values() if source.is_staged)
        names = {re.escape(file.name) for source in sources for file in source.files}
        return "|".join(sorted(names)) or "(?!)"

    @cached_property
    def _resolved(self) -> dict[str, dict[str, Any]]:
        overrides = self.content["overrides"]
        return {
            name: {key: _merge(self.content[key], overrides.get(name, {}).get(key, {})) for key in SECTIONS}
            for name in self.sources
        }


def load_config(
    config: Mapping[str, Any], schemas: str | Path, catalogue: str | Path | None = None
) -> Config:
    """Check a config and the table it names, and fill in the defaults.

    Parameters
    ----------
    config
        As read from YAML and the command line.
    schemas
        Folder with ``config.schema.yaml`` and ``datasets.schema.yaml``.
    catalogue
        Table of public screens, which need no row of the user's; None for none.

    Raises
    ------
    ConfigError
        With every problem found, each naming file and key or row, what was found and what to write.
    """
    resolved, problems = read_config(config, schemas, catalogue)
    if resolved is None or problems:
        raise ConfigError(*problems)
    return resolved


def read_config(
    config: Mapping[str, Any], schemas: str | Path, catalogue: str | Path | None = None
) -> tuple[Config | None, list[str]]:
    """Do as :func:`load_config` does, but hand on what can be told of a config in spite of its problems.

    Parameters
    ----------
    config, schemas, catalogue
        As there.

    Returns
    -------
    config
        None where no dataset can be told; else what is right of it.
    problems
        Every problem found, none where :func:`load_config` would take the config.
    """
    schema = _read_schema(Path(schemas) / "config.schema.yaml")
    content = _with_booleans(copy.deepcopy(dict(config)), schema)
    problems = list(_problems(content, schema, "config"))
    for name, override in (content.get("overrides") or {}).items():
        if isinstance(override, Mapping):
            sections = {key: schema["properties"][key] for key in SECTIONS}
            partial = {**schema, "properties": sections, "required": []}
            problems += _problems(override, partial, f"config, overrides.{name}")
    invalid = bool(problems)
    if invalid:
        content = _without_invalid(content, schema)
        if not _is_valid(content, schema):
            return None, problems
    content = _with_defaults(_with_sizes(content), schema)
    known = read_catalogue(catalogue) if catalogue is not None else {}
    try:
        sources, notes, of_rows = _read_sources(
            content, _read_schema(Path(schemas) / "datasets.schema.yaml"), known
        )
    except ConfigError as error:
        return None, [*problems, *error.problems]
    problems += of_rows
    # What is wrong with one row says nothing of the others, which are looked at without it.
    usable = [name for name in content["run"] if name in sources]
    if not usable:
        return None, problems
    resolved = Config({**content, "run": usable}, sources, tuple(notes))
    # Of a config without its invalid parts, only what other files say is told: the rest may follow from them.
    others = (
        (problem for dataset in resolved.datasets for problem in _unusable_files(resolved, dataset))
        if invalid
        else _contradictions(resolved)
    )
    # What is wrong for every dataset is told once.
    return resolved, list(dict.fromkeys([*problems, *others]))


def _is_valid(content: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(content)


def _without_invalid(content: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a config what the schema refuses, and overrides where anything is refused."""
    kept = {key: value for key, value in copy.deepcopy(dict(content)).items() if key != "overrides"}
    # The deepest first, so that the paths of the others stay.
    errors = sorted(
        jsonschema.Draft202012Validator(schema).iter_errors(kept), key=lambda error: -len(error.absolute_path)
    )
    for error in errors:
        path = [*error.absolute_path]
        if error.validator == "additionalProperties":
            allowed = error.schema.get("properties", {})
            paths = [[*path, name] for name in error.instance if name not in allowed]
        else:
            # A list with a wrong item says nothing as a whole.
            paths = [path[: next((n for n, part in enumerate(path) if isinstance(part, int)), len(path))]]
        for place in paths:
            holder: Any = kept
            for part in place[:-1]:
                holder = holder.get(part, {}) if isinstance(holder, dict) else {}
            if place and isinstance(holder, dict):
                holder.pop(place[-1], None)
    return kept


def _with_booleans(content: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Read true and false, which Snakemake hands on as text when they follow ``--config``."""
    words = {"true": True, "false": False}
    for key, value in content.items():
        if schema["properties"].get(key, {}).get("type") == "boolean" and isinstance(value, str):
            content[key] = words.get(value.lower(), value)
    return content


def _contradictions(config: Config) -> Iterator[str]:
    """Yield what a schema cannot see."""
    yield from unusable_names(config.models, config.user_models)
    for model in config.models:
        needed = None if is_baseline(model) or model in config.user_models else encoder_source(model)
        if needed and needed not in config.models:
            yield f"config, models: {model} reuses the encoder of {needed}; add {needed} to the list"
    for dataset in config.datasets:
        tested = config.settings(dataset, "evaluate")["model"]
        if tested not in config.models:
            listed = ", ".join(config.models)
            yield f"config, evaluate.model: found {tested}; expected one of models: {listed}"
        elif tested == OTHER_SCREEN and not config.source(dataset).responses:
            yield (
                f"{config.content['datasets']}, row {dataset}, column responses: found no other screen, "
                f"though evaluate.model is {OTHER_SCREEN}. Fix: fill in the column, or test another model"
            )
        yield from _unknown_models(config, dataset)
        yield from _unusable_schemes(config, dataset)
        yield from _impossible_sizes(config.settings(dataset, "train"))
        yield from _unusable_files(config, dataset)
        if len(config.source(dataset).pathways) > 1:
            yield f"{config.content['datasets']}, row {dataset}, column pathways: expected one GMT file"
        yield from _same_screens(config, dataset)
        untrained = is_baseline(tested) or is_head(tested) or tested in config.user_models
        if config.predict is not None and tested in config.models and untrained:
            yield (
                f"config, predict: the model under test, evaluate.model, is {tested}; expected a trained "
                "model such as biojepa"
            )
        elif config.predict is not None and tested in config.models:
            train = resolve_settings(tested, config.settings(dataset, "train"))
            yield from _unpredictable(config, dataset, train)
        try:
            source = config.source(dataset)
            require_file_names([*source.networks, *source.gene_sets, *source.gene_tables])
        except InputError as error:
            yield f"{config.content['datasets']}, row {dataset}: {error}"
    for dataset in set(config.all_datasets) - set(config.datasets):
        yield from _unusable_source(config.source(dataset))
        for column, path in () if config.archived else config.source(dataset).missing_files():
            yield f"{config.source(dataset).where}, column {column}: {_no_file(path, config)}"
    if config.predict is not None and "perturbation" not in config.schemes:
        yield (
            f"config, predict: found schemes {config.schemes}; expected the scheme perturbation among them, "
            "whose held-out perturbations say how far to trust a prediction"
        )
    try:
        read_requests(config.predict)
    except InputError as error:
        yield str(error)


def _unusable_files(config: Config, dataset: str) -> Iterator[str]:
    """Yield what is wrong with the files that the row of a dataset names."""
    yield from _unusable_source(config.source(dataset))
    for column, path in () if config.archived else config.source(dataset).missing_files():
        yield f"{config.source(dataset).where}, column {column}: {_no_file(path, config)}"


def _no_file(path: str, config: Config) -> str:
    """Say that a file is missing, how far its path is right, and what to change."""
    near = nearest_path(Path(path))
    hint = f" Did you mean {near}?" if near else ""
    folder = Path(config.content["data_dir"])
    if folder not in Path(path).parents:
        return f"no file {path}.{hint} Fix: correct the path"
    named = f"data_dir of the config, which is {folder}"
    if not folder.is_dir():
        return f"no file {path}, since there is no folder {folder}.{hint} Fix: correct {named}"
    return f"no file {path}.{hint} Fix: correct the path, or {named}"


def nearest_path(path: Path) -> str:
    """Return what is there under the name most like the first part of a path that is not; empty for none."""
    parts = [path, *path.parents]
    first = next((n for n, part in enumerate(parts) if part.exists()), None)
    if not first or not parts[first].is_dir():
        return ""
    try:
        names = [one.name for one in parts[first].iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(parts[first - 1].name, sorted(names), n=1)
    if not close:
        return ""
    near = parts[first] / close[0]
    whole = near / path.relative_to(parts[first - 1])
    return str(whole if whole.exists() else near)


def _unknown_models(config: Config, dataset: str) -> Iterator[str]:
    """Yield names of models in the settings of the evaluation that nothing can ever have."""
    known = [*known_models(), *REFERENCES, *ORACLES.values(), *config.user_models]
    evaluate = config.settings(dataset, "evaluate")
    lists = {
        "baselines": evaluate["baselines"],
        "enrichment.models": evaluate["enrichment"]["models"],
        "distribution.models": evaluate["distribution"]["models"],
    }
    for key, names in lists.items():
        for name in (name for name in names if name not in known):
            hint = _nearest(name, known) or f"Models of this config: {', '.join(config.models)}."
            yield f"config, evaluate.{key}: found {name}; expected names of models. {hint}"


def _unusable_schemes(config: Config, dataset: str) -> Iterator[str]:
    """Yield schemes that lack what defines them, and folds that no scheme has."""
    pair, chosen = config.settings(dataset, "pair"), config.content["folds"]
    schemes = [scheme for scheme in config.schemes if scheme != "context" or pair["contexts"]]
    if len(schemes) < len(config.schemes):
        yield (
            f"config, pair.contexts: found nothing, though the scheme context is asked of {dataset}; "
            f"expected the contexts to hold out in turn, values of obs[{pair['context_column']!r}] in its "
            "cells.h5ad, such as pair: {contexts: [K562, RPE1]}"
        )
    if "list" in config.schemes:
        if pair["list"] is None:
            yield (
                f"config, pair.list: found nothing, though the scheme list is asked of {dataset}; expected "
                "what to hold out, such as pair: {list: {test: [KLF1, GATA1+KLF1]}}, or a TSV with the "
                "columns perturbation and set"
            )
        elif isinstance(pair["list"], str) and not Path(pair["list"]).is_file() and not config.archived:
            yield f"config, pair.list: no file {pair['list']}. Fix: correct the path"
        elif isinstance(pair["list"], Mapping):
            yield from _listed_twice(pair["list"])
    column = f"{pair['context_column']}_column"
    if "context" in schemes and not config.source(dataset).row[column]:
        yield (
            f"{config.content['datasets']}, row {dataset}, column {column}: found nothing, though the scheme "
            f"context takes its contexts from there (pair.context_column is {pair['context_column']}). Fix: "
            "name the column of the screen that holds them, or set pair.context_column to the other of "
            "cell_type and batch"
        )
    sizes = {scheme: config.n_folds(dataset, scheme) for scheme in schemes if scheme != NO_SPLIT}
    high = [fold for fold in chosen or () if sizes and fold >= max(sizes.values())]
    if high:
        most = max(sizes, key=lambda scheme: sizes[scheme])
        own = most in ("context", "list")
        why = f"the folds of the scheme {most} are" if own else "pair.n_folds is"
        yield f"config, folds: found {high}; expected 0 to {sizes[most] - 1}, since {why} {sizes[most]}"
        return
    for scheme, n_folds in sizes.items():
        if not config.folds(dataset, scheme):
            yield (
                f"config, folds: found {list(chosen)}; expected a fold of the scheme {scheme} among them, "
                f"0 to {n_folds - 1} of {dataset}"
            )


def _listed_twice(listed: Mapping[str, list[str]]) -> Iterator[str]:
    """Yield perturbations that are to be both test and validation, in whatever order their genes come."""
    sets = {name: {spell_label(label) for label in labels} for name, labels in listed.items()}
    if both := sorted(sets["test"] & sets.get("validation", set())):
        yield (
            f"config, pair.list: found {_some(both)} under test and under validation; expected each "
            "perturbation in one of them"
        )


def _same_screens(config: Config, dataset: str) -> Iterator[str]:
    """Yield datasets among ``responses`` that are this very screen under another name: a leak."""
    own = config.source(dataset)
    for name in own.responses:
        other = config.source(name)
        same = _holds_files_of(own, other) or _holds_files_of(other, own)
        same = same or Path(own.path).resolve() == Path(other.path).resolve()
        if own.is_simulated and other.is_simulated:
            settings = [config.settings(one, "download")["simulator"] for one in (dataset, name)]
            same = settings[0] == settings[1]
        if same:
            yield (
                f"{config.content['datasets']}, row {dataset}, column responses: {name} is the same screen, "
                "so that held-out perturbations would be given away; expected another screen"
            )


def _holds_files_of(one: Source, other: Source) -> bool:
    """Whether a screen holds all files of another, known by where they come from or by their checksum.

    A single file of several may well be that of two screens, such as the list of genes.
    """
    known = {identity for file in one.screen_files for identity in (file.identity, file.checksum)} - {""}
    files = other.screen_files
    return bool(files) and all(file.identity in known or file.checksum in known for file in files)


def _unpredictable(config: Config, dataset: str, train: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a dataset or its model cannot answer what the key ``predict`` asks for."""
    source, tested = config.source(dataset), config.settings(dataset, "evaluate")["model"]
    if not train["linear_branch"] or train["stages"] == "joint":
        # The weight of their latent prediction comes from held-out perturbations, and here are none.
        yield (
            f"config, predict: the model under test, evaluate.model, is {tested}, whose size of effects only "
            "held-out perturbations can set; expected a model with linear_branch: true and stages: two, such "
            "as biojepa"
        )
    if train["priors"] == "none":
        yield (
            f"config, predict: the model under test, evaluate.model, is {tested}, which uses no prior source "
            "and knows no unseen gene; expected a model with priors such as biojepa"
        )
    named = source.networks or source.gene_sets or source.gene_tables or source.responses
    if config.predict == ALL and not named and not config.settings(dataset, "pair")["coexpression"]:
        yield (
            f"{config.content['datasets']}, row {dataset}: no prior source, though predict is {ALL}: every "
            "gene that a source covers. Fix: fill in networks, gene_sets, gene_tables or responses, set "
            "pair.coexpression, or list perturbations of genes that the screen perturbs"
        )


def _impossible_sizes(train: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings of the networks that would only fail once training starts."""
    encoder, predictor = train["encoder"], train["predictor"]
    widths = (
        ("encoder.embed_dim", encoder["embed_dim"], encoder["heads"]),
        ("encoder.predictor_width", encoder["predictor_width"], encoder["heads"]),
        ("predictor.width", predictor["width"], predictor["heads"]),
    )
    for key, width, heads in widths:
        if width % heads:
            yield f"config, train.{key}: found {width}; expected a multiple of the {heads} heads"
    processes, batch = train["processes"], encoder["batch_size"]
    shares = encoder["accumulate"] * processes
    if batch % shares or batch < 2 * encoder["accumulate"]:
        yield (
            f"config, train.encoder.batch_size: found {batch}; expected a multiple of {shares}, "
            "accumulate times processes, with at least 2 cells in a micro-batch"
        )
    if train["stages"] == "joint" and predictor["batch_size"] % processes:
        yield (
            f"config, train.predictor.batch_size: found {predictor['batch_size']}; expected a multiple "
            f"of the {processes} processes, which share it in joint training"
        )
    if encoder["mask_low"] > encoder["mask_high"]:
        yield (
            f"config, train.encoder.mask_low: found {encoder['mask_low']}; expected at most mask_high, "
            f"{encoder['mask_high']}"
        )


def _unusable_source(source: Source) -> Iterator[str]:
    """Yield what is wrong with the files that a row names, before any is fetched."""
    where = f"{source.where}, column source"
    files, screen = source.files, source.screen_files
    for one in files:
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+(?=://)", one.address)
        if scheme and not one.is_remote:
            yield f"{where}: {one.address} starts with {scheme[0]}://; expected https://, http:// or a path"
    if not (files or source.is_simulated):
        yield f"{where}: found {source.row['source']!r}; expected a file, folder or address"
        return
    n_sums = len(source.row["checksum"].split(SEPARATOR)) if source.row["checksum"] else 0
    if n_sums not in (0, len(files)):
        yield (
            f"{source.where}, column checksum: found {n_sums} for {len(files)} files; expected one for each "
            "in their order, joined by ; (nothing between two ; where one is not known)"
        )
    for column, path in source.unmade_files():
        made = ", ".join(Path(one).name for one in source.downloads) or "none: it is read where it is"
        yield (
            f"{source.where}, column {column}: found {path}, which is not among the files of this dataset "
            f"({made}). Fix: add its address to source, or correct the name"
        )
    if not source.is_staged:
        return
    yield from (f"{where}: {problem}" for problem in unusable_file_names(files))
    for one in files:
        if not one.is_remote and Path(one.address).is_dir():
            yield (
                f"{where}: {one.address} is a folder, which has no checksum and goes with no other file. "
                "Fix: leave the checksum empty, since the SHA-256 of every file read is recorded in "
                "cells.h5ad, or list the files of the folder, joined by ;"
            )
    if not screen:
        yield f"{where}: found tables alone; expected the counts of the screen among the files"
    elif source.is_unpacked_folder and not all(one.is_archive for one in screen):
        rest = next(one.name for one in screen if not one.is_archive)
        yield (
            f"{where}: found {rest} beside an archive; expected archives alone, or other files that a column "
            f"such as cell_metadata names as {{download}}/{rest}"
        )
    elif len(screen) > 1 and any(one.is_compressed for one in screen):
        packed = next(one.name for one in screen if one.is_compressed)
        yield f"{where}: found {packed} beside other files; expected it alone, or decompressed"
    elif len(screen) == 1 and not screen[0].is_opened:
        yield from (f"{where}: {problem}" for problem in _unreadable(screen[0], source.row["format"]))


def _unreadable(file: RawFile, form: str) -> Iterator[str]:
    """Yield why a screen that is one file cannot be read."""
    name = file.name.lower().removesuffix(".gz")
    if name.endswith(IN_SEVERAL_FILES):
        yield (
            f"{file.name} alone is no screen. Fix: list all its files, joined by ; (matrix, features or "
            "genes, barcodes), or give an archive that holds them"
        )
    elif form == "10x_mtx":
        yield f"{file.name} is one file, and the format 10x_mtx is three. Fix: list them, joined by ;"
    elif not name.endswith(tuple(SINGLE_FILE_FORMATS.values())):
        yield (
            f"{file.name} is of no kind that can be read; expected .h5ad, .h5, either with .gz, or .tar, "
            ".tar.gz, .tgz or .zip. Fix: convert it, and give the local path"
        )


def _without_surplus(row: dict[Any, Any], path: Path) -> dict[str, str]:
    """Drop empty fields beyond the last column, which a tab at the end of a line makes; refuse full ones."""
    surplus = [field for field in row.pop(None, []) if field.strip()]
    if surplus:
        raise ConfigError(
            f"{path}, row {row.get('dataset')}: found {surplus} beyond the last column; expected {len(row)} "
            "fields. Fix: name the column in the first line, or remove the field"
        )
    return row


def _read_table(path: Path, *, may_be_missing: bool) -> list[dict[str, str]]:
    """Read the rows of the user's table of datasets."""
    if may_be_missing and not path.is_file():
        return []
    if not path.is_file():
        raise ConfigError(f"config, datasets: no file {path}. Fix: name the table of datasets")
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = [line for line in file if not line.startswith("#") and line.strip()]
    reader = csv.DictReader(lines, delimiter="\t", restval="")
    if "dataset" not in (reader.fieldnames or ()):
        raise ConfigError(
            f"{path}: found columns {reader.fieldnames}; expected a column dataset. "
            "Fix: separate columns by tabs"
        )
    return [_without_surplus(row, path) for row in reader]


def _read_sources(
    content: Mapping[str, Any], schema: Mapping[str, Any], catalogue: Mapping[str, Entry]
) -> tuple[dict[str, Source], list[str], list[str]]:
    """Read the rows to run, and those whose responses they use.

    Returns
    -------
    Name to row of those that can be used, what should be said about them, and what is wrong with others.
    A row that uses one that cannot be used, cannot be used either.
    """
    path = Path(content["datasets"])
    # The catalogue alone is enough where no table was named.
    alone = path == Path(DEFAULT_TABLE) and all(name in catalogue for name in content["run"])
    table = _read_table(path, may_be_missing=alone)
    sources: dict[str, Source] = {}
    notes: list[str] = []
    problems: list[str] = []
    known = list(dict.fromkeys([*(row["dataset"] for row in table), *catalogue]))
    problems += [
        f"config, overrides.{name}: expected a dataset of {path}: {', '.join(known)}"
        for name in content["overrides"]
        if name not in known
    ]
    wanted = [(name, "config, run") for name in content["run"]]
    looked_at: set[str] = set()
    for name, where in wanted:
        if name in looked_at:
            continue
        looked_at.add(name)
        try:
            source, note, unknown = _read_source(name, where, content, table, schema, catalogue)
        except ConfigError as error:
            problems += error.problems
            continue
        sources[name] = source
        problems += unknown
        notes += [note] if note else []
        if name in content["run"]:
            wanted += [(other, f"{path}, row {name}, column responses") for other in source.responses]
    while lacking := [
        name
        for name, source in sources.items()
        if name in content["run"] and not set(source.responses) <= set(sources)
    ]:
        for name in lacking:
            del sources[name]
    return sources, notes, problems


def _read_source(
    name: str,
    where: str,
    content: Mapping[str, Any],
    table: list[dict[str, str]],
    schema: Mapping[str, Any],
    catalogue: Mapping[str, Entry],
) -> tuple[Source, str, list[str]]:
    """Read one row, which ``where`` asks for.

    Returns
    -------
    The row, what should be said about it, and what is wrong with the names of its columns: it is read as if
    they were spelt like the nearest ones.

    Raises
    ------
    ConfigError
        When the row is not there or cannot be used.
    """
    path = Path(content["datasets"])
    known = list(dict.fromkeys([*(row["dataset"] for row in table), *catalogue]))
    rows = [row for row in table if row["dataset"] == name]
    if len(rows) != 1 and (rows or name not in catalogue):
        hint = _nearest(name, known)
        listed = ", ".join(row["dataset"] for row in table)
        public = f", or of the catalogue: {', '.join(catalogue)}" if catalogue else ""
        raise ConfigError(
            f"{where}: {name} is in {len(rows)} rows of {path}; expected one of {listed}{public}. "
            f"{hint}".rstrip()
        )
    place, note = f"{path}, row {name}", ""
    row = {key: value for key, value in rows[0].items() if value != ""} if rows else {}
    row, unknown = _with_known_columns(row, schema, place)
    if name in catalogue:
        row, note = catalogue[name].merged(row, place)
        place = place if rows else f"catalogue, {name}"
    if "source" not in row:
        hint = _nearest(name, catalogue)
        raise ConfigError(
            *unknown,
            f"{place}: 'source' is a required property of all but the public screens of the catalogue: "
            f"{', '.join(catalogue) or 'none here'}. {hint}".rstrip(),
        )
    problems = list(_problems(row, schema, place))
    if problems:
        raise ConfigError(*unknown, *problems)
    if missing := catalogue[name].unknown_in(row) if name in catalogue else []:
        raise ConfigError(
            f"{place}: found no {' and no '.join(missing)}, which the catalogue does not know for this "
            f"screen ({catalogue[name].notes}). Fix: add a row {name} to {path} with the columns "
            f"{', '.join(['dataset', *missing])}; all else is taken from the catalogue"
        )
    row = _with_defaults(row, schema)
    places = {"{data_dir}": content["data_dir"], "{download}": f"{DOWNLOADS}/{name}"}
    for key, value in row.items():
        if key in FILE_COLUMNS:
            for placeholder, folder in places.items():
                value = value.replace(placeholder, folder)
            row[key] = value
    source = Source(row, place)
    others = source.responses
    if repeated := [other for place, other in enumerate(others) if other in others[:place]]:
        raise ConfigError(
            f"{path}, row {name}, column responses: found {repeated[0]} twice; expected each dataset once"
        )
    if name in others:
        raise ConfigError(
            f"{path}, row {name}, column responses: found the dataset itself; expected other screens, "
            "since a screen must not predict itself"
        )
    return source, note, unknown


def _with_known_columns(
    row: Mapping[str, str], schema: Mapping[str, Any], place: str
) -> tuple[dict[str, str], list[str]]:
    """Give columns that do not exist the nearest name, or leave them out; also say that they do not."""
    allowed = schema["properties"]
    known = {key: value for key, value in row.items() if key in allowed}
    strange = {key: value for key, value in row.items() if key not in allowed}
    for key, value in strange.items():
        for near in difflib.get_close_matches(key, allowed, n=1):
            known.setdefault(near, value)
    return known, list(_problems(strange, {**schema, "required": []}, place))


def _read_schema(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _problems(content: Any, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield one sentence per violation of the schema."""
    validator = jsonschema.Draft202012Validator(schema)
    for error in sorted(
        validator.iter_errors(content), key=lambda error: list(map(str, error.absolute_path))
    ):
        yield from _described(error, where)


def _described(error: jsonschema.ValidationError, where: str) -> Iterator[str]:
    """Yield what a violation is in words, with the nearest name for a name that does not exist."""
    key = ".".join(str(part) for part in error.absolute_path)
    place = f"{where}, key {key}" if key else where
    schema = error.schema if isinstance(error.schema, Mapping) else {}
    described = schema.get("description", "")
    if error.validator == "additionalProperties" and isinstance(error.instance, Mapping):
        allowed = list(schema.get("properties", {}))
        for name in (name for name in error.instance if name not in allowed):
            hint = _nearest(name, allowed) or f"Known keys: {', '.join(allowed)}."
            if name == "dataset" and "run" in allowed:
                hint = f"Did you mean run: [{error.instance[name]}]?"
            yield f"{place}: unknown key {f'{key}.{name}' if key else name}. {hint}"
    elif error.validator == "enum":
        hint = _nearest(error.instance, error.validator_value)
        yield " ".join(filter(None, [f"{place}: {error.message}.", described, hint]))
    elif error.validator == "contains" and "const" in error.validator_value:
        wanted = error.validator_value["const"]
        yield f"{place}: found no {wanted}; expected it in the list. {described}".strip()
    elif error.validator == "anyOf":
        forms: dict[int, list[jsonschema.ValidationError]] = {}
        for part in error.context:
            forms.setdefault(part.relative_schema_path[0], []).append(part)
        # The form that was meant is the one of this type; the others say nothing of use.
        meant = [
            parts for parts in forms.values() if all(part.validator != "type" or part.path for part in parts)
        ]
        if len(meant) == 1:
            for part in meant[0]:
                yield from _described(part, where)
        else:
            yield f"{place}: found {error.instance!r}. Expected: {described}"
    else:
        yield f"{place}: {error.message}. {described}".strip()


def _nearest(name: object, known: Iterable[Any]) -> str:
    """Ask whether the nearest of the known names was meant; nothing where none is near."""
    near = difflib.get_close_matches(str(name), [str(one) for one in known], n=1)
    return f"Did you mean {near[0]}?" if near else ""


def _some(names: list[str]) -> str:
    """Join the first ten names, and count the others."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")


def _with_sizes(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the sizes that ``train.model`` names, of the config and of each override; written keys win."""
    train = content.get("train", {})
    overrides = {
        name: {**part, "train": with_named_sizes(_merge(train, part["train"]))} if "train" in part else part
        for name, part in content.get("overrides", {}).items()
    }
    return {**content, "train": with_named_sizes(train), "overrides": overrides}


def _with_defaults(content: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of absent keys, at every depth."""
    filled = dict(content)
    for key, part in schema.get("properties", {}).items():
        if key not in filled and "default" in part:
            filled[key] = copy.deepcopy(part["default"])
        if isinstance(filled.get(key), Mapping) and "properties" in part:
            filled[key] = _with_defaults(filled[key], part)
    return filled


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _listing(problems: list[str]) -> str:
    return (
        problems[0] if len(problems) == 1 else "\n".join(["several problems:", *(f"- {p}" for p in problems)])
    )
