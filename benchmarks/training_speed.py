"""Measure what a training step costs, what it computes, and what a second of training buys.

Question: how much faster is the pipeline's training than the loop one would write first, and than
generative models of the same cells, per step, per epoch and for the same quality? How much of the device
does it use? Three parts, each with a result of its own:

``step``
    Seconds per step, contenders in turns, medians over turns and ratios. The encoder stage and the predictor
    stage against the same networks in the plain loop of ``plain_loop.py``; the encoder stage against the
    generative models of ``generative.py`` on the same cells with the same batch, and against scvi-tools'
    SCVI where it is installed.
``arithmetic``
    The reference model at 2,000, 5,000 and 20,000 genes: operations of a step of the encoder stage, TFLOP/s,
    share of what a large matrix product reaches on the device in the same precision, cells per second, and
    peak memory with model and data. On a CPU seconds are those of its processors, divided by the threads.
``quality``
    Correlation of predicted and observed change of test perturbations against seconds of training. All
    contenders are conditioned on the same prior codes. When to stop is read off the *validation*
    perturbations; the test perturbations are scored at that point and decide nothing. Seconds are those of
    training, without the looks at the score; those of BioJEPA hold everything from ``pairs.h5`` in memory
    to the model that predicts. On a CPU they are those of its processors, divided by the threads; the median
    over the folds. Kernel ridge stands for what needs no network at all.

Usage::

    snakemake results/demo/perturbation/fold0/pair/pairs.h5 --cores 2
    python benchmarks/training_speed.py step results/demo
    python benchmarks/training_speed.py arithmetic
    python benchmarks/training_speed.py quality results/norman_tiny --folds 0 1 2 3 4 --threads 1

Writes ``benchmarks/results/training_<part>_<device>.json``. On a GPU where there is one, else on the CPU;
``--device cpu`` asks for the latter.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow" / "lib"))

from compare_training import Fold  # noqa: E402
from generative import Cells, CountVAE, ExpressionDiffusion, Trainer  # noqa: E402
from measure import (  # noqa: E402
    count_flops,
    device_name,
    device_seconds,
    matmul_ceiling,
    peak_memory,
    side_by_side,
    simulated_pairs,
)
from plain_loop import (  # noqa: E402
    CellPopulations,
    EncoderNetworks,
    MaskedCells,
    adamw,
    batches,
    encoder_step,
    predictor_step,
    teacher_of,
)
from record import provenance, write_result  # noqa: E402

from biojepa.baselines import fit_baselines  # noqa: E402
from biojepa.contracts import TEST, TRAIN, VAL  # noqa: E402
from biojepa.evaluation.registry import pearson_rows  # noqa: E402
from biojepa.model.embedding import CellEmbedding  # noqa: E402
from biojepa.model.targets import frozen_copy, move_average, while_young  # noqa: E402
from biojepa.pairs import Pairs, read_pairs, trainable_labels  # noqa: E402
from biojepa.training import TrainSettings, train_model  # noqa: E402
from biojepa.training.cells import CellStore, Populations  # noqa: E402
from biojepa.training.encoder_stage import EncoderObjective, embed_with  # noqa: E402
from biojepa.training.optimization import (  # noqa: E402
    Execution,
    apply_gradients,
    choose_device,
    learning_rate,
    make_optimizer,
)
from biojepa.training.predictor_stage import LatentCells, predictor_loss  # noqa: E402
from biojepa.training.trained import make_predictor  # noqa: E402

OURS = "BioJEPA"
ZERO_NORM = 1e-6
GENERATIVE = {"count VAE": CountVAE, "diffusion": ExpressionDiffusion}
# Stage, contender, and what it is compared with.
Steps = dict[tuple[str, str], Callable[[int], object]]


class Setting:
    """A fold on a device, and the parts that both loops train, made anew for each loop.

    Parameters
    ----------
    pairs, settings, device
        The fold, the section ``train``, where to train.
    """

    def __init__(self, pairs: Pairs, settings: TrainSettings, device: torch.device) -> None:
        self.pairs, self.settings, self.device = pairs, settings, device
        self.train = trainable_labels(pairs)
        number = np.full(len(pairs.labels) + 1, -1)
        number[self.train] = np.arange(len(self.train))
        self.classes = number[pairs.perturbation]
        self.cells = pairs.cells_of(TRAIN)
        self.store = CellStore(pairs, device)
        self.execution = Execution.of(settings, device, None)

    def embedding(self) -> CellEmbedding:
        """Make the untrained embedding, the same in each call."""
        torch.manual_seed(0)
        embedding = CellEmbedding(self.settings.encoder.build(self.store.n_genes)).to(self.device)
        chosen = torch.from_numpy(self.cells).to(self.device)
        embedding.fit_inputs(*self.store.moments(chosen), self.store.log_library[chosen])
        return embedding

    def objective(self, execution: Execution | None = None) -> EncoderObjective:
        """Make the networks of the encoder stage, the same in each call."""
        return EncoderObjective(
            self.store,
            self.embedding(),
            torch.from_numpy(self.cells).to(self.device),
            torch.from_numpy(self.classes).to(self.device),
            self.settings.encoder,
            0,
            execution or self.execution,
        )

    def our_encoder_step(self) -> Callable[[int], object]:
        """One step of the pipeline's encoder stage."""
        objective, settings = self.objective(), self.settings.encoder
        optimizer = make_optimizer(objective.networks.values(), settings.weight_decay)

        def step(number: int) -> None:
            rate = learning_rate(number, settings.steps, settings.learning_rate)
            apply_gradients(optimizer, objective.losses(number), rate)
            objective.target.update(number, settings.steps)

        return step

    def plain_encoder_step(self, workers: int) -> Callable[[int], object]:
        """One step of the plain loop on the same networks."""
        objective, settings = self.objective(Execution()), self.settings.encoder
        networks = EncoderNetworks(
            objective.student,
            objective.target.encoder,
            objective.predictor,
            objective.action,
            objective.criterion,
        )
        optimizer = adamw(networks.trained(), settings.weight_decay)
        data = MaskedCells(self.pairs, objective.embedding, self.cells, self.classes, settings)
        drawn = batches(data, settings.batch_size, workers)
        return lambda number: encoder_step(networks, optimizer, next(drawn), number, settings)

    def latent(self) -> LatentCells:
        """Tokens of all cells by the untrained encoder: what they hold does not change the time."""
        embedding = self.embedding()
        every = torch.arange(len(self.store), device=self.device)
        tokens = embed_with(embedding.body, embedding, self.store, every)
        return LatentCells(
            tokens,
            torch.from_numpy(self.pairs.membership).float(),
            torch.from_numpy(self.pairs.type_code.astype(np.int64)),
            torch.from_numpy(self.pairs.dose),
            torch.zeros(len(self.pairs.labels), *tokens.shape[1:], device=self.device),
        )

    def predictor(self) -> torch.nn.Module:
        """Make the latent predictor, the same in each call."""
        codes = {name: torch.from_numpy(values).float() for name, values in self.pairs.codes.items()}
        seen = torch.from_numpy(self.pairs.membership[self.train].any(axis=0))
        torch.manual_seed(0)
        return make_predictor(self.settings, self.embedding(), codes, seen).to(self.device).train()

    def our_predictor_step(self, latent: LatentCells) -> Callable[[int], object]:
        """One step of the pipeline's predictor stage."""
        model, settings = self.predictor(), self.settings.predictor
        teacher, optimizer = frozen_copy(model), make_optimizer((model,), settings.weight_decay)
        populations, train = Populations(self.pairs, self.device), torch.from_numpy(self.train)

        def step(number: int) -> None:
            loss = predictor_loss(model, populations, latent, train, settings, self.execution)
            apply_gradients(optimizer, loss, learning_rate(number, settings.steps, settings.learning_rate))
            move_average(teacher, model, while_young(number, settings.ema))

        return step

    def plain_predictor_step(self, latent: LatentCells, workers: int) -> Callable[[int], object]:
        """One step of the plain loop on the same predictor."""
        model, settings = self.predictor(), self.settings.predictor
        teacher, optimizer = teacher_of(model), adamw(model.parameters(), settings.weight_decay)
        data = CellPopulations(self.pairs, latent.tokens, self.train, settings)
        drawn = batches(data, settings.batch_size, workers)
        membership = latent.membership.to(self.device)
        return lambda number: predictor_step(
            model, teacher, optimizer, next(drawn), membership, latent.baseline, number, settings
        )


def scvi_step(pairs: Pairs, batch: int, device: torch.device) -> Callable[[int], object] | None:
    """One epoch of SCVI, divided by its steps; ``None`` where scvi-tools is not installed."""
    try:
        import scvi
    except ImportError:
        return None
    cells = Cells.of(pairs, torch.device("cpu"))
    adata = ad.AnnData(cells.counts.numpy())
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata)
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    arguments = {"train_size": 1.0, "batch_size": batch, "accelerator": accelerator}
    began = time.perf_counter()
    model.train(max_epochs=1, enable_progress_bar=False, logger=False, **arguments)
    first = time.perf_counter() - began
    began = time.perf_counter()
    model.train(max_epochs=4, enable_progress_bar=False, logger=False, **arguments)
    # Start and end of a training are in both.
    seconds = max(time.perf_counter() - began - first, 1e-9) / 3 / -(-len(cells) // batch)
    return lambda _: time.sleep(seconds)


def rows_of_steps(
    screen: str,
    stage: str,
    contenders: dict[str, Callable[[int], object]],
    batch: int,
    cells: int | None,
    arguments: argparse.Namespace,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Time contenders of one stage side by side; ratios are to the first."""
    seconds = side_by_side(contenders, arguments.steps, arguments.repeats, device)
    reference = seconds[next(iter(contenders))]
    rows = []
    for name, turns in seconds.items():
        # Turn by turn, so that what slows the machine for a while slows both sides of a ratio.
        ratios = [own / ours for own, ours in zip(turns.wall, reference.wall, strict=True)]
        rows.append(
            {
                "screen": screen,
                "stage": stage,
                "contender": name,
                "batch": batch,
                "ms_per_step": 1e3 * median(turns.wall),
                "ratio_to_ours": median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "processor_ms_per_step": 1e3 * median(turns.processor),
                "processor_ratio": median(turns.processor) / median(reference.processor),
                "seconds_per_epoch": None if cells is None else median(turns.wall) * cells / batch,
                "status": "measured",
            }
        )
    return rows


def measure_steps(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Time steps on screens, with the default settings, and on simulated cells."""
    rows = []
    folds = [(screen.name, read_pairs(pairs_of(screen, 0))) for screen in arguments.screens]
    folds += [(f"{g} genes, 10 % expressed", simulated_pairs(4000, g)) for g in arguments.genes]
    for name, pairs in folds:
        setting = Setting(pairs, settings_of(arguments), device)
        encoder, latent = setting.settings.encoder, setting.latent()
        contenders = {OURS: setting.our_encoder_step()}
        for workers in arguments.workers:
            contenders[f"plain loop, {workers} workers"] = setting.plain_encoder_step(workers)
        cells = Cells.of(pairs, device)
        for model, kind in GENERATIVE.items():
            torch.manual_seed(0)
            network = kind(encoder, cells) if kind is CountVAE else kind(cells)
            contenders[model] = Trainer(network.to(device), cells, encoder.batch_size).step
        scvi = scvi_step(pairs, encoder.batch_size, device)
        if scvi is not None:
            contenders["SCVI"] = scvi
        rows += rows_of_steps(
            name, "encoder", contenders, encoder.batch_size, len(setting.cells), arguments, device
        )
        if scvi is None:
            rows.append(
                {
                    "screen": name,
                    "stage": "encoder",
                    "contender": "SCVI",
                    "status": "scvi-tools not installed",
                }
            )
        contenders = {OURS: setting.our_predictor_step(latent)}
        for workers in arguments.workers:
            contenders[f"plain loop, {workers} workers"] = setting.plain_predictor_step(latent, workers)
        size = setting.settings.predictor.batch_size
        rows += rows_of_steps(name, "predictor", contenders, size, None, arguments, device)
    return rows


def settings_of(arguments: argparse.Namespace, **changes: Any) -> TrainSettings:
    """Make the settings of a contender."""
    return TrainSettings.from_config(
        {
            "device": arguments.device,
            "torch_threads": arguments.threads,
            "compile": arguments.compile,
            **changes,
        }
    )


def pairs_of(screen: Path, fold: int) -> Path:
    """Find ``pairs.h5`` of a fold."""
    return screen / "perturbation" / f"fold{fold}" / "pair" / "pairs.h5"


def measure_arithmetic(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Count and time steps of the encoder stage of the reference model."""
    rows = []
    precisions = dict.fromkeys(
        ["float32", Execution.of(settings_of(arguments, model="reference"), device, None).precision]
    )
    ceilings = {p: matmul_ceiling(device, getattr(torch, p)) for p in precisions}
    batch = arguments.batch or (1024 if device.type == "cuda" else 64)
    for genes in arguments.genes:
        pairs = simulated_pairs(2 * batch, genes)
        for precision, ceiling in ceilings.items():
            settings = settings_of(
                arguments, model="reference", precision=precision, encoder={"batch_size": batch}
            )
            setting = Setting(pairs, settings, device)
            # Counted on a few cells and not timed: products grow with the cells.
            few = settings_of(arguments, model="reference", compile=False, encoder={"batch_size": 4})
            counted = Setting(pairs, few, device).our_encoder_step()
            flops = count_flops(lambda step=counted: step(0)) / 4 * batch
            step = setting.our_encoder_step()
            memory = peak_memory(device, lambda step=step: step(0))
            turns = side_by_side({OURS: step}, arguments.steps, arguments.repeats, device, 1)[OURS]
            seconds = device_seconds(turns, device)
            rows.append(
                {
                    "genes": genes,
                    "precision": precision,
                    "batch": batch,
                    "gflop_per_step": flops / 1e9,
                    "seconds_per_step": seconds,
                    "tflops": flops / seconds / 1e12,
                    "ceiling_tflops": ceiling,
                    "share_of_ceiling": flops / seconds / 1e12 / ceiling,
                    "cells_per_second": batch / seconds,
                    "peak_gib": memory,
                }
            )
    return rows


class Judge:
    """Scores predicted changes of validation and test perturbations of a fold."""

    def __init__(self, screen: Path, fold: int) -> None:
        self.folds = {group: Fold.read(screen, fold, group) for group in (VAL, TEST)}
        self.pairs = self.folds[VAL].pairs

    @property
    def labels(self) -> np.ndarray:
        """Positions of the labels that are asked for: validation, then test."""
        return np.concatenate([fold.labels for fold in self.folds.values()])

    def score(self, change: np.ndarray) -> dict[str, list[float]]:
        """Correlations over genes of changes (labels, genes), group by group, a number for each label.

        ``…_r`` of changes against control, which a mean of the training perturbations gets right in part;
        ``…_r_specific`` of what differs from that mean.
        """
        found: dict[str, list[float]] = {}
        parts = np.split(change, [len(self.folds[VAL].labels)])
        for (group, fold), part in zip(self.folds.items(), parts, strict=True):
            found[f"{group}_r"] = pearson_rows(part, fold.observed, ZERO_NORM).tolist()
            found[f"{group}_r_specific"] = fold.score(part)[0].tolist()
        return found

    def training_mean(self) -> np.ndarray:
        """Mean change of the training perturbations, for every asked label."""
        means, control = self.pairs.pseudobulk()
        mean = means[trainable_labels(self.pairs)].mean(axis=0) - control
        return np.repeat(mean[None], len(self.labels), axis=0)


def kernel_ridge_point(judge: Judge, device: torch.device) -> Iterator[dict[str, Any]]:
    """Fit the baseline without a network."""
    began = clock(device)
    delta = fit_baselines(judge.pairs, ["kernel_ridge"])["kernel_ridge"].delta
    seconds = clock(device) - began
    yield {"point": "", "seconds": seconds, **judge.score(delta[judge.labels])}


def clock(device: torch.device) -> float:
    """Read seconds: by the clock on a GPU; on a CPU of its processors, divided by the threads."""
    return time.perf_counter() if device.type == "cuda" else time.process_time() / torch.get_num_threads()


def our_curve(
    judge: Judge, arguments: argparse.Namespace, linear: bool, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Train with shares of the default steps, each from the start: the schedule belongs to the steps."""
    for share in arguments.shares:
        default = TrainSettings()
        settings = settings_of(
            arguments,
            linear_branch=linear,
            encoder={"steps": max(2, round(default.encoder.steps * share))},
            predictor={"steps": max(2, round(default.predictor.steps * share))},
        )
        began = clock(device)
        model, _, _ = train_model(judge.pairs, settings, 0)
        seconds = clock(device) - began
        yield {
            "point": f"{share:g} of the steps",
            "seconds": seconds,
            **judge.score(model.change(*model.asked(judge.labels))),
        }


def generative_curve(
    judge: Judge, name: str, arguments: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Train epoch by epoch; the time of the looks does not count."""
    torch.manual_seed(0)
    began = clock(device)
    cells = Cells.of(judge.pairs, device)
    kind = GENERATIVE[name]
    network = kind(TrainSettings().encoder, cells) if kind is CountVAE else kind(cells)
    trainer = Trainer(network.to(device), cells)
    per_epoch = -(-len(cells) // trainer.batch_size)
    membership = torch.from_numpy(judge.pairs.membership[judge.labels]).float().to(device)
    seconds, step = clock(device) - began, 0
    for before, epochs in itertools.pairwise([0, *arguments.epochs]):
        began = clock(device)
        loss: Tensor | None = None
        for _ in range((epochs - before) * per_epoch):
            loss, step = trainer.step(step), step + 1
        float(loss)  # waits for the device
        seconds += clock(device) - began
        state = torch.get_rng_state()
        torch.manual_seed(1)
        yield {"point": f"{epochs} epochs", "seconds": seconds, **judge.score(trainer.change(membership))}
        torch.set_rng_state(state)


def measure_quality(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Train all contenders on all folds; average the curves over perturbations; mark the plateaus."""
    found: list[dict[str, Any]] = []
    for screen in arguments.screens:
        for fold in arguments.folds:
            judge = Judge(screen, fold)
            curves = {
                f"{OURS}, latent predictor alone": our_curve(judge, arguments, False, device),
                f"{OURS}, as shipped": our_curve(judge, arguments, True, device),
                **{n: generative_curve(judge, n, arguments, device) for n in GENERATIVE},
                "kernel ridge": kernel_ridge_point(judge, device),
                "training mean": iter([{"point": "", "seconds": 0.0, **judge.score(judge.training_mean())}]),
            }
            for name, curve in curves.items():
                for point in curve:
                    print(f"{screen.name}/fold{fold} {name} {point['point']}", file=sys.stderr, flush=True)
                    found.append({"screen": screen.name, "contender": name, **point})
    return summarize(pd.DataFrame(found))


def summarize(points: pd.DataFrame, tolerance: float = 0.02) -> list[dict[str, Any]]:
    """Average scores over folds and labels, take the median of seconds, and find the plateaus.

    A plateau is the first point near the best validation score.

    Parameters
    ----------
    points
        One row per screen, contender, fold and point; scores are lists, one number for each label.
    tolerance
        How far below the best mean ``val_r_specific`` the plateau begins.
    """
    scores = [name for name in points if "_r" in name]
    rows = []
    for (screen, contender), part in points.groupby(["screen", "contender"], sort=False):
        curve = []
        for point, group in part.groupby("point", sort=False):
            means = {name: float(np.mean(np.concatenate(group[name].tolist()))) for name in scores}
            curve.append({"point": point, "seconds_per_fold": group["seconds"].median(), **means})
        best = max(row["val_r_specific"] for row in curve)
        plateau = next(i for i, row in enumerate(curve) if row["val_r_specific"] >= best - tolerance)
        rows += [
            {"screen": screen, "contender": contender, **row, "plateau": i == plateau}
            for i, row in enumerate(curve)
        ]
    return rows


MEASURES = {"step": measure_steps, "arithmetic": measure_arithmetic, "quality": measure_quality}


def main() -> None:
    """Measure one part and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=MEASURES)
    parser.add_argument("screens", nargs="*", type=Path, help="results folders of screens, after `paired`")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=2, help="of both loops")
    parser.add_argument("--compile", action="store_true", help="compile the pipeline's encoder")
    parser.add_argument("--genes", nargs="*", type=int, help="of the simulated cells")
    parser.add_argument("--batch", type=int, help="of the reference model: 1024 on a GPU, else 64")
    parser.add_argument("--steps", type=int, help="of a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2], help="of the plain loop's loader")
    parser.add_argument("--folds", nargs="+", type=int, default=[0])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.25, 0.5, 1.0])
    parser.add_argument("--epochs", nargs="+", type=int, default=[5, 10, 20, 40, 80, 160])
    parser.add_argument("--name")
    arguments = parser.parse_args()
    if arguments.part == "quality" and not arguments.screens:
        parser.error("quality needs screens")
    if arguments.genes is None:
        arguments.genes = [2000, 5000, 20000] if arguments.part == "arithmetic" else [5000]
    arguments.steps = arguments.steps or (20 if arguments.part == "step" else 3)
    wanted = range(1) if arguments.part == "step" else arguments.folds
    arguments.inputs = [pairs_of(screen, fold) for screen in arguments.screens for fold in wanted]
    missing = [str(path) for path in arguments.inputs if not path.is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    warnings.filterwarnings("ignore", message="the covariance of")
    made_by = provenance(__file__, arguments_without_folders(arguments))
    torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    rows = MEASURES[arguments.part](arguments, device)
    name = arguments.name or f"training_{arguments.part}_{device.type}"
    write_result(name, made_by, pd.DataFrame(rows), device=device_name(device))


def arguments_without_folders(arguments: argparse.Namespace) -> argparse.Namespace:
    """Name screens by their names, since only files have a checksum."""
    return argparse.Namespace(**{**vars(arguments), "screens": [path.name for path in arguments.screens]})


if __name__ == "__main__":
    main()
