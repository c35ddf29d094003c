# Reads and checks the config and the table of datasets; getters named after what they answer.

import sys
from pathlib import Path

LIBRARY = Path(workflow.current_basedir).parent / "lib"
sys.path.insert(0, str(LIBRARY))

from biojepa.config import ConfigError, load_config
from biojepa.contracts import NO_SPLIT, OTHER_SCREEN
from biojepa.hardware import machine_has_gpu
from biojepa.imports import code_digest
from biojepa.models import (
    ORACLES,
    REFERENCES,
    encoder_source,
    is_baseline,
    is_head,
    resolve_settings,
)
from biojepa.prediction_requests import request_file

try:
    CONFIG = load_config(
        config,
        schemas=Path(workflow.current_basedir).parent / "schemas",
        catalogue=LIBRARY.parents[1] / "resources" / "catalogue.tsv",
    )
except ConfigError as error:
    raise WorkflowError(str(error)) from None

if CONFIG.archived and getattr(workflow.modifier.path_modifier, "prefix", None):
    # What an archive still holds is looked for where the rules say, to which Snakemake adds the prefix later.
    raise WorkflowError(
        "config, key archived: found it in a module with a prefix; expected the workflow itself. Fix: run the "
        "Snakefile of the clone in the folder of the prefix, which holds results/"
    )

if workflow.is_main_process:
    for note in CONFIG.notes:
        logger.info(note)

DATASETS = CONFIG.datasets
# Those that hold something out; the scheme none has models and a page, but no scores.
SCHEMES = CONFIG.evaluated_schemes


wildcard_constraints:
    dataset="|".join(CONFIG.all_datasets),
    split="|".join([*SCHEMES, NO_SPLIT]),
    fold=r"\d+",
    seed=r"\d+",
    model="|".join([*CONFIG.models, *REFERENCES, *ORACLES.values()]),


def library(script):
    """Digest of the library code behind a script, so that a changed module reruns its rules."""
    return code_digest(LIBRARY.parent / "scripts" / f"{script}.py")


def settings_of(stage):
    """Getter of a stage's settings for the dataset of a job."""
    return lambda wildcards: CONFIG.settings(wildcards.dataset, stage)


def get_raw(wildcards):
    """Files that the preprocess stage reads, from the download stage or the user's own."""
    return CONFIG.source(wildcards.dataset).raw_files


def get_local(wildcards):
    """The user's own file that a job links to; nothing where it is fetched."""
    file = CONFIG.source(wildcards.dataset).file(wildcards.file)
    return [] if file.is_remote else [file.address]


def get_table(column):
    """Getter of a table beside the raw files, which a dataset may do without."""
    return lambda wildcards: CONFIG.source(wildcards.dataset).table(column)


def raw_files_of_all():
    return sorted(
        {
            path
            for dataset in CONFIG.all_datasets
            for path in CONFIG.source(dataset).downloads
        }
    )


def get_networks(wildcards):
    return CONFIG.source(wildcards.dataset).networks


def get_gene_sets(wildcards):
    return CONFIG.source(wildcards.dataset).gene_sets


def get_gene_tables(wildcards):
    return CONFIG.source(wildcards.dataset).gene_tables


def get_responses(wildcards):
    """Cells of the other screens whose responses are prior knowledge."""
    others = CONFIG.source(wildcards.dataset).responses
    return [f"results/{other}/preprocess/cells.h5ad" for other in others]


def kept(files):
    """All of them; of an archive, those that it still holds."""
    return [f for f in files if not CONFIG.archived or Path(f).exists()]


def all_kept(files):
    """Whether none of them is missing from an archive."""
    files = list(files)
    return kept(files) == files


def get_pathways(wildcards):
    return kept(CONFIG.source(wildcards.dataset).pathways)


def get_folds(dataset, scheme):
    return CONFIG.folds(dataset, scheme)


def get_split_list(wildcards):
    """The table that names the held-out perturbations of the scheme list, if a file does."""
    path = CONFIG.settings(wildcards.dataset, "pair")["list"]
    return [path] if wildcards.split == "list" and isinstance(path, str) else []


def fold_folder(dataset, split, fold):
    return f"results/{dataset}/{split}/fold{fold}"


def folds_of_all(tail):
    return [
        f"{fold_folder(dataset, split, fold)}/{tail}"
        for dataset in DATASETS
        for split in CONFIG.schemes
        for fold in get_folds(dataset, split)
    ]


def trainable_models():
    others = user_models()
    return [
        m
        for m in CONFIG.models
        if not is_baseline(m) and not is_head(m) and m not in others
    ]


def user_models():
    """Models whose predictions were made elsewhere."""
    return list(CONFIG.user_models)


def get_user_file(wildcards):
    """The file that the config names for a model whose predictions were made elsewhere.

    Asked for only where it is needed: the splits, to which its maker fits a model, are made without it.
    """
    model = CONFIG.user_models[wildcards.model]
    path = model.path(
        wildcards.dataset, wildcards.split, wildcards.fold, wildcards.seed
    )
    if not Path(path).is_file() and (missing := CONFIG.missing_predictions()):
        raise WorkflowError(missing)
    return path


def baseline_models():
    """Simple models that every dataset can have, fitted in one job."""
    return [m for m in CONFIG.models if is_baseline(m) and m != OTHER_SCREEN]


def simple_models(dataset):
    """The same, and what needs another screen where the dataset names one."""
    return CONFIG.simple_models(dataset)


def head_models():
    """Ridge and nearest neighbours on the embedding of a trained model."""
    return [model for model in CONFIG.models if is_head(model)]


def head_sources():
    """Trained models whose embeddings the heads use."""
    return list(dict.fromkeys(encoder_source(model) for model in head_models()))


def trained_models():
    return [
        path
        for model in trainable_models()
        for seed in CONFIG.seeds
        for path in folds_of_all(f"{model}/seed{seed}/train/model.pt")
    ]


def get_encoder(wildcards):
    """The model whose encoder this one reuses, if any."""
    source = encoder_source(wildcards.model)
    if source is None:
        return []
    folder = fold_folder(wildcards.dataset, wildcards.split, wildcards.fold)
    return f"{folder}/{source}/seed{wildcards.seed}/train/model.pt"


def get_train_settings(wildcards):
    return resolve_settings(
        wildcards.model, CONFIG.settings(wildcards.dataset, "train")
    )


def oracle_models():
    """Trained models whose embedding is judged by its own readout."""
    return [model for model in ORACLES if model in trainable_models()]


def files_of_models(wildcards, models, tail):
    folder = fold_folder(wildcards.dataset, wildcards.split, wildcards.fold)
    return [f"{folder}/{model}/seed{wildcards.seed}/{tail}" for model in models]


def train_threads(wildcards):
    """Threads of all processes of a training."""
    train = CONFIG.settings(wildcards.dataset, "train")
    return train["torch_threads"] * train["processes"]


def one_gpu(wildcards):
    """One GPU where the device is cuda, or auto on a machine that has one; else jobs would wait."""
    device = CONFIG.settings(wildcards.dataset, "train")["device"]
    return int(device == "cuda" or (device == "auto" and machine_has_gpu()))


def train_gpus(wildcards):
    """The same for each process of a training."""
    return one_gpu(wildcards) * CONFIG.settings(wildcards.dataset, "train")["processes"]


def prediction_runs(dataset, split):
    """Model, fold and seed of every predictions file of a dataset and scheme."""
    runs = []
    for fold in get_folds(dataset, split):
        runs += [
            {"model": m, "fold": fold, "seed": 0}
            for m in (*simple_models(dataset), *REFERENCES)
        ]
        for model in CONFIG.user_models.values():
            runs += [
                {"model": model.name, "fold": fold, "seed": seed}
                for seed in model.seeds(CONFIG.seeds)
            ]
        for seed in CONFIG.seeds:
            for model in trainable_models():
                runs.append({"model": model, "fold": fold, "seed": seed})
                if model in ORACLES:
                    runs.append({"model": ORACLES[model], "fold": fold, "seed": seed})
            runs += [{"model": m, "fold": fold, "seed": seed} for m in head_models()]
    return runs


def training_runs(dataset, split):
    """Model, fold and seed of every training of a dataset and scheme."""
    return [
        {"model": model, "fold": fold, "seed": seed}
        for fold in get_folds(dataset, split)
        for seed in CONFIG.seeds
        for model in trainable_models()
    ]


def shown_trainings(dataset, split):
    """Trainings that the report shows: all, of an archive those whose curves and figures it still holds."""

    def is_held(run):
        return all_kept(
            path
            for tail in ("train/history.tsv", "train/metrics.json")
            for path in files_of_runs(dataset, split, [run], tail)
        )

    return [run for run in training_runs(dataset, split) if is_held(run)]


def files_of_runs(dataset, split, runs, tail):
    return [
        f"{fold_folder(dataset, split, run['fold'])}/{run['model']}/seed{run['seed']}/{tail}"
        for run in runs
    ]


def get_predictions(wildcards):
    runs = prediction_runs(wildcards.dataset, wildcards.split)
    return files_of_runs(
        wildcards.dataset, wildcards.split, runs, "embed/predictions.h5ad"
    )


def get_training(tail):
    return lambda wildcards: files_of_runs(
        wildcards.dataset,
        wildcards.split,
        shown_trainings(wildcards.dataset, wildcards.split),
        f"train/{tail}",
    )


def get_fold_files(tail):
    return lambda wildcards: [
        f"{fold_folder(wildcards.dataset, wildcards.split, fold)}/{tail}"
        for fold in get_folds(wildcards.dataset, wildcards.split)
    ]


def get_pairs(wildcards):
    """What training read, of every fold; nothing where an archive lacks one."""
    files = get_fold_files("pair/pairs.h5")(wildcards)
    return files if all_kept(files) else []


def get_coverage(wildcards):
    return kept(get_fold_files("pair/coverage.tsv")(wildcards))


def get_maps(wildcards):
    """Maps of the first fold and seed, of the model under test; none when it is not trained."""
    model = CONFIG.settings(wildcards.dataset, "evaluate")["model"]
    if model not in trainable_models():
        return []
    fold = get_folds(wildcards.dataset, wildcards.split)[0]
    folder = fold_folder(wildcards.dataset, wildcards.split, fold)
    return kept([f"{folder}/{model}/seed{CONFIG.seeds[0]}/embed/umap.tsv"])


def get_representation(wildcards):
    """Measurements of the embedding of the model under test; none when it is not trained."""
    model = CONFIG.settings(wildcards.dataset, "evaluate")["model"]
    if model not in trainable_models():
        return []
    runs = training_runs(wildcards.dataset, wildcards.split)
    own = [run for run in runs if run["model"] == model]
    return kept(
        files_of_runs(
            wildcards.dataset, wildcards.split, own, "embed/representation.tsv"
        )
    )


def predictions_of_all():
    return [
        path
        for dataset in DATASETS
        for split in SCHEMES
        for path in files_of_runs(
            dataset, split, prediction_runs(dataset, split), "embed/predictions.h5ad"
        )
    ]


def of_all_splits(tail):
    return [
        f"results/{dataset}/{split}/{tail}" for dataset in DATASETS for split in SCHEMES
    ]


def get_evaluated_folds(name):
    """Files of the splits that the model under test was evaluated on."""
    return lambda wildcards: [
        f"{fold_folder(wildcards.dataset, 'perturbation', fold)}/pair/{name}"
        for fold in get_folds(wildcards.dataset, "perturbation")
    ]


def qc_pages(datasets):
    """Pages of quality control; of an archive, those that it still holds."""
    return kept([f"results/{dataset}/preprocess/qc.html" for dataset in datasets])


def qc_page(dataset, folder):
    """Address of that page from a folder of results; empty where an archive lacks it."""
    return f"{folder}{dataset}/preprocess/qc.html" if qc_pages([dataset]) else ""


def evaluations():
    return of_all_splits("evaluate/summary.tsv")


def unevaluated():
    """Datasets whose models are trained on everything, for a page that says so."""
    return DATASETS if NO_SPLIT in CONFIG.schemes else []


def reports():
    pages = [f"results/{dataset}/{NO_SPLIT}/report.html" for dataset in unevaluated()]
    return [*of_all_splits("report.html"), *pages]


def requests_of(split):
    """What is predicted by models of a scheme: nothing but by those trained on everything."""
    return CONFIG.predict if split == NO_SPLIT else None


def get_request_file(wildcards):
    """The text file that the key predict names, if it names one."""
    path = request_file(requests_of(wildcards.get("split", NO_SPLIT)))
    return [] if path is None else [path]


def predicting_model(dataset):
    """The model under test, which predicts what the config asks for."""
    return CONFIG.settings(dataset, "evaluate")["model"]


def get_predicting_model(wildcards):
    """The model under test of the first seed, trained on everything."""
    folder = fold_folder(wildcards.dataset, NO_SPLIT, 0)
    return f"{folder}/{predicting_model(wildcards.dataset)}/seed{CONFIG.seeds[0]}/train/model.pt"


def predictions_asked():
    """Tables of predictions, where the config asks for any."""
    asked = DATASETS if CONFIG.predict is not None else []
    return kept([f"results/{dataset}/predict/predictions.tsv" for dataset in asked])


def require_predictions(wildcards):
    """The same for the target that makes nothing else, which needs something to be asked for."""
    if CONFIG.predict is None:
        raise WorkflowError(
            "config, key predict: found nothing to predict; expected a list of perturbations, the path of a "
            "text file, or all. See config/README.md"
        )
    return predictions_asked()
