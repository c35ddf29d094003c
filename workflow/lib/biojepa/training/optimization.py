"""Schedule, optimizer and random state as functions of the step, so that a run can be resumed exactly."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from biojepa.errors import InputError
from biojepa.hardware import machine_has_gpu
from biojepa.optimizers import FusedAdamW
from biojepa.training.distributed import average_gradients, is_main, local_device_index, world_size
from biojepa.training.tracking import Tracker

if TYPE_CHECKING:
    from biojepa.training.settings import TrainSettings

log = logging.getLogger(__name__)

_CUDA_BUILD = (
    "For a CUDA build of torch: by pip, the plain wheel of PyPI; by conda, remove the environment below "
    ".snakemake/conda and make it again where the GPU is, or with CONDA_OVERRIDE_CUDA set to the CUDA "
    "version of its driver, such as CONDA_OVERRIDE_CUDA=12.8"
)
_DRIVER = "nvidia-smi says whether the driver works, and up to which CUDA version"
PRECISIONS = ("auto", "float32", "bfloat16")
MIN_BFLOAT16_WIDTH = 128

M = TypeVar("M", bound=nn.Module)


def learning_rate(step: int, steps: int, peak: float, warmup_share: float = 0.1) -> float:
    """Linear warm-up over the first share of the steps, then a cosine to zero."""
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(modules: Iterable[nn.Module], weight_decay: float) -> FusedAdamW:
    """AdamW that decays matrices alone: no norms, biases, position embeddings or convolutions."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                is_matrix = sum(size > 1 for size in parameter.shape) >= 2 and parameter.ndim == 2
                (decayed if is_matrix else spared).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return FusedAdamW(groups)


def apply_gradients(
    optimizer: FusedAdamW | torch.optim.Optimizer,
    losses: Tensor | Iterable[Tensor],
    rate: float,
    clip: float = 1.0,
) -> None:
    """Backward, average over processes, clip the norm of the gradient, step.

    Parameters
    ----------
    losses
        One loss, or those of the micro-batches of the step, whose gradients add up. An iterator that
        computes them one by one holds the graph of one micro-batch at a time.
    """
    optimizer.zero_grad()
    for loss in (losses,) if isinstance(losses, Tensor) else losses:
        loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average_gradients(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def step_seed(seed: int, stage: int, step: int) -> int:
    """Seed of one step of a stage."""
    return (seed * 8 + stage) * 100_000_007 + step


def seed_step(seed: int, stage: int, step: int) -> None:
    """Seed torch for one step with :func:`step_seed`.

    All randomness of a step (batch, mask, dropout) follows from seed, stage and step, so that a resumed
    run draws what an uninterrupted one would have drawn, without saving generator states.
    """
    torch.manual_seed(step_seed(seed, stage, step))


def progress_bar(stage: str, start: int, steps: int) -> tqdm:
    """Count the steps of a stage from ``start``, on standard error, at most every two seconds."""
    return tqdm(
        range(start, steps),
        stage,
        initial=start,
        total=steps,
        mininterval=2,
        file=sys.stderr,
        disable=not is_main(),
    )


@dataclass(frozen=True)
class Execution:
    """How a stage computes, beside what it computes.

    Attributes
    ----------
    precision
        ``float32`` or ``bfloat16``: what matrices are multiplied in. Weights, losses and statistics stay
        float32.
    compile
        Whether the encoder is compiled by ``torch.compile``.
    tracker
        Where curves go besides the history.
    compile_seconds
        What compiling took, part by part; empty where nothing was compiled.
    """

    precision: str = "float32"
    compile: bool = False
    tracker: Tracker = field(default_factory=Tracker)
    compile_seconds: list[float] = field(default_factory=list)

    @classmethod
    def of(
        cls, settings: TrainSettings, device: torch.device, checkpoint_folder: str | Path | None
    ) -> Execution:
        """Read the settings of a run; curves go beside the folder of its checkpoints."""
        curves = None
        if settings.tensorboard and checkpoint_folder is not None:
            curves = Path(checkpoint_folder).parent / "tensorboard"
        precision = choose_precision(settings.precision, device, settings.encoder.embed_dim)
        return cls(precision, settings.compile, Tracker(curves))

    def autocast(self, device: torch.device) -> torch.autocast:
        """Context in which networks run forward."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")

    def compiled(self, module: M, *example: Tensor) -> M:
        """Return the module, compiled if asked for; both share their parameters.

        It is compiled here and now, forward and backward, on an ``example`` of its inputs, so that a
        machine on which that fails, for want of a C++ compiler for instance, trains uncompiled.
        """
        if not self.compile:
            return module
        began = time.perf_counter()
        try:
            fast = torch.compile(module)
            with self.autocast(example[0].device):
                found = fast(*example)
            if found.requires_grad:
                found.float().sum().backward()
        except Exception as error:  # of whatever kind the compiler and its tools raise
            log.warning(
                "torch.compile failed (%s: %s): training goes on uncompiled. Fix: install a C++ compiler, or "
                "set train.compile to false",
                type(error).__name__,
                str(error).strip().splitlines()[0] if str(error).strip() else "no message",
            )
            return module
        finally:
            module.zero_grad()
        self.compile_seconds.append(time.perf_counter() - began)
        log.info("torch.compile took %.1f s", self.compile_seconds[-1])
        return fast  # type: ignore[return-value]


def choose_precision(wanted: str, device: torch.device, width: int = 0) -> str:
    """Resolve ``auto``: what is faster on the device.

    That is bfloat16 on a GPU, and on a CPU with matrix units for it (Intel AMX) where tokens have a
    ``width`` of at least 128; narrower models are held up by everything but matrix products, and other
    CPUs convert. It depends on the processor and on the settings, and on no clock, so that a rerun computes
    the same.
    """
    if wanted not in PRECISIONS:
        raise ValueError(f"precision is {wanted!r}; expected one of {PRECISIONS}")
    if wanted == "auto":
        wide_on_amx = width >= MIN_BFLOAT16_WIDTH and _has_amx()
        return "bfloat16" if device.type == "cuda" or wide_on_amx else "float32"
    return wanted


def _has_amx() -> bool:
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(asked()) if asked else False


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms only, and put the old setting back.

    On a CPU results repeat without it, for a given number of threads. On a GPU some sums run in an
    order that differs from run to run; their deterministic forms are slower, and an operation that has
    none raises an error.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    # cuBLAS reads it when it starts; without it, torch refuses its matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def choose_device(wanted: str) -> torch.device:
    """Resolve ``auto``, ``cpu`` or ``cuda``; of several processes each takes the GPU of its number.

    On a machine with a GPU that torch cannot use, ``auto`` warns: the job would take hours longer unseen.

    Raises
    ------
    InputError
        When cuda is asked for and absent.
    """
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
        if wanted == "cpu" and machine_has_gpu():
            log.warning(
                "this machine has an NVIDIA GPU, but torch %s (%s) cannot use it: training on the CPU. %s",
                torch.__version__,
                built,
                _DRIVER if torch.version.cuda else _CUDA_BUILD,
            )
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "config key train.device",
            f"cuda, but torch {torch.__version__} ({built}) sees no GPU",
            "a visible GPU and a CUDA build of torch",
            f"run on a machine with a GPU, or set train.device to auto or cpu. "
            f"{_DRIVER if torch.version.cuda else _CUDA_BUILD}",
        )
    if wanted == "cuda" and world_size() > 1:
        device = torch.device("cuda", local_device_index())
        torch.cuda.set_device(device)
        return device
    return torch.device(wanted)
