"""Read and check the config and the table of datasets before the first job."""

from __future__ import annotations

import copy
import csv
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import jsonschema
import yaml

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
from biojepa.sizes import with_named_sizes
from biojepa.user_models import UserModel, unusable_names

SIMULATOR = "simulator"
DOWNLOADS = "resources/datasets"
SECTIONS = ("download", "preprocess", "pair", "train", "embed", "evaluate")
FILE_COLUMNS = (
    "source",
    "cell_metadata",
    "guide_table",
    "networks",
    "gene_sets",
    "gene_tables",
    "pathways",
)
SIMULATED_FILES = ("raw.h5ad", "guides.csv", "network.tsv.gz", "gene_sets.gmt")


class ConfigError(ValueError):
    """The config or the table of datasets cannot be used; the message names the key or the row."""


@dataclass(frozen=True)
class Source:
    """One row of the table of datasets, its placeholders filled in.

    Attributes
    ----------
    row
        Column to value.
    """

    row: Mapping[str, str]

    @property
    def name(self) -> str:
        """Name of the dataset."""
        return self.row["dataset"]

    @property
    def is_simulated(self) -> bool:
        """Whether the simulator makes it."""
        return self.row["source"] == SIMULATOR

    @property
    def is_remote(self) -> bool:
        """Whether it is fetched from an address."""
        return self.row["source"].startswith(("http://", "https://"))

    @property
    def address(self) -> str:
        """Where to fetch it from."""
        return self.row["source"]

    @property
    def checksum(self) -> str | None:
        """Expected digest, ``sha256:…`` or ``md5:…``."""
        return self.row["checksum"] or None

    @property
    def folder(self) -> str:
        """Where the download stage puts its files."""
        return f"{DOWNLOADS}/{self.name}"

    @property
    def path(self) -> str:
        """Local file or folder of the raw screen."""
        if self.is_simulated:
            return f"{self.folder}/raw.h5ad"
        if self.is_remote:
            return f"{self.folder}/{Path(unquote(urlsplit(self.address).path)).name}"
        return self.row["source"]

    @property
    def downloads(self) -> list[str]:
        """Files that the download stage makes."""
        if self.is_simulated:
            return [f"{self.folder}/{name}" for name in SIMULATED_FILES]
        return [self.path] if self.is_remote else []

    @property
    def raw_files(self) -> list[str]:
        """Files that hold the screen: one, or those of a folder."""
        path = Path(self.path)
        if not self.is_simulated and not self.is_remote and path.is_dir():
            return sorted(file.as_posix() for file in path.iterdir() if file.is_file())
        return [self.path]

    def table(self, column: str) -> list[str]:
        """Path of a table beside the raw files, ``cell_metadata`` or ``guide_table``; empty for none."""
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
        columns = ("cell_metadata", "guide_table", "networks", "gene_sets", "gene_tables", "pathways")
        named = [(column, path) for column in columns for path in _listed(self.row[column])]
        if not self.is_simulated and not self.is_remote:
            named.insert(0, ("source", self.path))
        made = f"{self.folder}/"
        return [
            (column, path) for column, path in named if not path.startswith(made) and not Path(path).exists()
        ]


def _listed(field: str) -> list[str]:
    return [path.strip() for path in field.split(";") if path.strip()]


@dataclass(frozen=True)
class Config:
    """The checked config.

    Attributes
    ----------
    content
        Config with all defaults filled in.
    sources
        Dataset name to its row, for the datasets to run and those whose responses they use.
    """

    content: Mapping[str, Any]
    sources: Mapping[str, Source]

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
        """Regular expression of the datasets that are ``simulated`` or ``downloaded``; matches none if so."""
        wanted = {"simulated": "is_simulated", "downloaded": "is_remote"}[kind]
        return "|".join(name for name, source in self.sources.items() if getattr(source, wanted)) or "(?!)"

    @cached_property
    def _resolved(self) -> dict[str, dict[str, Any]]:
        overrides = self.content["overrides"]
        return {
            name: {key: _merge(self.content[key], overrides.get(name, {}).get(key, {})) for key in SECTIONS}
            for name in self.sources
        }


def load_config(config: Mapping[str, Any], schemas: str | Path) -> Config:
    """Check a config and the table it names, and fill in the defaults.

    Parameters
    ----------
    config
        As read from YAML and the command line.
    schemas
        Folder with ``config.schema.yaml`` and ``datasets.schema.yaml``.

    Raises
    ------
    ConfigError
        With every problem found, each naming file and key or row, what was found and what to write.
    """
    schema = _read_schema(Path(schemas) / "config.schema.yaml")
    content = _with_booleans(copy.deepcopy(dict(config)), schema)
    problems = list(_problems(content, schema, "config"))
    for name, override in (content.get("overrides") or {}).items():
        if isinstance(override, Mapping):
            sections = {key: schema["properties"][key] for key in SECTIONS}
            partial = {**schema, "properties": sections, "required": []}
            problems += _problems(override, partial, f"config, overrides.{name}")
    if problems:
        raise ConfigError(_listing(problems))
    content = _with_defaults(_with_sizes(content), schema)
    sources = _read_sources(content, _read_schema(Path(schemas) / "datasets.schema.yaml"))
    resolved = Config(content, sources)
    # What is wrong for every dataset is told once.
    problems = list(dict.fromkeys(_contradictions(resolved)))
    if problems:
        raise ConfigError(_listing(problems))
    return resolved


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
        yield from _unusable_address(config.source(dataset), config.content["datasets"])
        for column, path in () if config.archived else config.source(dataset).missing_files():
            yield (
                f"{config.content['datasets']}, row {dataset}, column {column}: no file {path}. "
                "Fix: correct the path, or set data_dir (snakemake --config data_dir=FOLDER)"
            )
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
        yield from _unusable_address(config.source(dataset), config.content["datasets"])
        for column, path in () if config.archived else config.source(dataset).missing_files():
            yield f"{config.content['datasets']}, row {dataset}, column {column}: no file {path}"
    if config.predict is not None and "perturbation" not in config.schemes:
        yield (
            f"config, predict: found schemes {config.schemes}; expected the scheme perturbation among them, "
            "whose held-out perturbations say how far to trust a prediction"
        )
    try:
        read_requests(config.predict)
    except InputError as error:
        yield str(error)


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
        same = Path(other.path).resolve() == Path(own.path).resolve()
        if own.is_remote and other.is_remote:
            same = _same_address(own.address, other.address)
        same = same or (own.checksum is not None and own.checksum == other.checksum)
        if own.is_simulated and other.is_simulated:
            settings = [config.settings(one, "download")["simulator"] for one in (dataset, name)]
            same = settings[0] == settings[1]
        if same:
            yield (
                f"{config.content['datasets']}, row {dataset}, column responses: {name} is the same screen, "
                "so that held-out perturbations would be given away; expected another screen"
            )


def _same_address(one: str, other: str) -> bool:
    """Whether two addresses lead to the same file, by whatever protocol and spelling of the host."""
    parts = [urlsplit(address) for address in (one, other)]
    same = {(part.netloc.lower(), unquote(part.path), part.query) for part in parts}
    return len(same) == 1


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


def _unusable_address(source: Source, table: str) -> Iterator[str]:
    """Yield what is wrong with the address of a file to fetch, or with a checksum that nothing checks."""
    where = f"{table}, row {source.name}"
    if source.is_remote:
        name = Path(source.path).name
        # An address without a file name leaves the folder itself, whose parent is another.
        in_folder = Path(source.path).parent == Path(source.folder)
        if not in_folder or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            yield f"{where}, column source: {source.address} does not end in a plain file name"
        elif source.row["format"] == "10x_mtx" or not name.endswith(".h5ad"):
            yield (
                f"{where}, column source: {name} is not an .h5ad, the format that can be fetched. "
                "Fix: fetch and unpack it yourself, and give the local path"
            )
    elif source.checksum:
        yield (
            f"{where}, column checksum: {source.row['source']} is not fetched, so nothing checks its sum. "
            "Fix: leave the field empty; the SHA-256 of every file read is recorded in cells.h5ad"
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


def _read_sources(content: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Source]:
    path = Path(content["datasets"])
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
    table = [_without_surplus(row, path) for row in reader]
    sources: dict[str, Source] = {}
    known = [row["dataset"] for row in table]
    for name in content["overrides"]:
        if name not in known:
            raise ConfigError(f"config, overrides.{name}: expected a dataset of {path}: {', '.join(known)}")
    wanted = [(name, "config, run") for name in content["run"]]
    for name, where in wanted:
        if name in sources:
            continue
        rows = [row for row in table if row["dataset"] == name]
        if len(rows) != 1:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{where}: {name} is in {len(rows)} rows of {path}; expected one of {', '.join(known)}.{hint}"
            )
        row = {key: value for key, value in rows[0].items() if value != ""}
        problems = list(_problems(row, schema, f"{path}, row {name}"))
        if problems:
            raise ConfigError(_listing(problems))
        row = _with_defaults(row, schema)
        places = {"{data_dir}": content["data_dir"], "{download}": f"{DOWNLOADS}/{name}"}
        for key, value in row.items():
            if key in FILE_COLUMNS:
                for placeholder, folder in places.items():
                    value = value.replace(placeholder, folder)
                row[key] = value.removeprefix("file://") if key == "source" else value
        sources[name] = Source(row)
        others = sources[name].responses
        if repeated := [other for place, other in enumerate(others) if other in others[:place]]:
            raise ConfigError(
                f"{path}, row {name}, column responses: found {repeated[0]} twice; expected each dataset once"
            )
        if name in sources[name].responses:
            raise ConfigError(
                f"{path}, row {name}, column responses: found the dataset itself; expected other screens, "
                "since a screen must not predict itself"
            )
        if name in content["run"]:
            wanted += [(other, f"{path}, row {name}, column responses") for other in sources[name].responses]
    return sources


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
