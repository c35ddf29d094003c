"""Train as one of several processes and save what came out: python distributed_run.py FILE."""

import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "workflow" / "lib"), str(Path(__file__).parent)]

import torch  # noqa: E402
from encoder_case import EncoderCase, encoder_settings  # noqa: E402
from joint_case import run_joint  # noqa: E402
from training_case import tiny_settings  # noqa: E402

from biojepa.training.distributed import average_gradients, process_group, rank  # noqa: E402

STEPS = {"steps": 10, "monitor_every": 5, "dropout": 0.0, "batch_size": 64}
OPTIONS = {
    "default": {},
    "sigreg": {"regularizer": "sigreg", "accumulate": 2},
    "shared": {"target": "shared", "masking": "modules", "modules": 5},
}


def first_gradients(case: EncoderCase, changes: dict) -> dict[str, torch.Tensor]:
    """Gradients of the first step as the optimizer gets them; Adam would hide a wrong scale."""
    objective = case.objective(encoder_settings(**STEPS, **changes))
    for loss in objective.losses(0):
        loss.backward()
    networks = objective.networks.items()
    named = {f"{part}.{name}": p for part, net in networks for name, p in net.named_parameters()}
    average_gradients(list(named.values()))
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def train_all() -> dict:
    """Train with each option; the history and the weights of each."""
    torch.set_num_threads(1)
    case, found = EncoderCase(), {}
    for name, changes in OPTIONS.items():
        rows, weights = case.run(encoder_settings(**STEPS, **changes))
        found[name] = {"rows": rows, "weights": weights}
        found[name]["gradients"] = first_gradients(case, changes)
    quiet = {"dropout": 0.0, "source_dropout": 0.0}
    settings = tiny_settings(encoder=asdict(encoder_settings(**STEPS)), predictor=quiet)
    rows, weights = run_joint(case, settings)
    return found | {"joint": {"rows": rows, "weights": weights}}


if __name__ == "__main__":
    with process_group("cpu"):
        found = train_all()
        if rank() == 0:
            torch.save(found, sys.argv[1])
        else:
            torch.save({k: v["weights"] for k, v in found.items()}, sys.argv[1] + ".other")
