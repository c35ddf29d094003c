"""Optimizers without torch's compiler take the steps of those of torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from biojepa import optimizers

LIBRARY = Path(optimizers.__file__).parents[1]


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def minimized(kind):
    x = torch.tensor([1.2, 0.8, 1.3, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer = kind([x], max_iter=200, line_search_fn="strong_wolfe")
    values = []

    def closure():
        optimizer.zero_grad()
        loss = rosenbrock(x)
        loss.backward()
        values.append(loss.item())
        return loss

    optimizer.step(closure)
    return x.detach(), values


def test_lbfgs_goes_the_way_of_torchs_to_the_last_bit():
    (ours, our_values), (theirs, their_values) = minimized(optimizers.LBFGS), minimized(torch.optim.LBFGS)
    assert our_values == their_values and len(our_values) > 10
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours, torch.ones(4, dtype=torch.float64), atol=1e-4, rtol=0)


def test_without_decay_adamw_is_adam():
    start = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    found = []
    for make in (
        lambda x: optimizers.FusedAdamW(
            [{"params": [x], "lr": 0.05, "weight_decay": 0.0}], betas=(0.9, 0.999)
        ),
        lambda x: torch.optim.Adam([x], lr=0.05),
    ):
        x = start.clone().requires_grad_()
        optimizer = make(x)
        for _ in range(200):
            optimizer.zero_grad()
            rosenbrock(x).backward()
            optimizer.step()
        found.append(x.detach())
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found[0], start)


@pytest.mark.parametrize(
    "code",
    [
        "from biojepa.linear import AdditiveKernelRidge, Components;"
        "components = Components.of(np.eye(4), {});"
        "deltas = np.random.default_rng(0).normal(size=(4, 3));"
        "AdditiveKernelRidge(components).fit(np.arange(4), deltas, np.full(4, 9))",
        "from biojepa.training.optimization import make_optimizer, apply_gradients;"
        "m = torch.nn.Linear(2, 2); loss = m(torch.ones(1, 2)).sum();"
        "apply_gradients(make_optimizer((m,), 0.1), loss, 0.1)",
    ],
    ids=["linear", "training"],
)
def test_the_compiler_is_not_imported(code):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys, numpy as np, torch; {code}; print('torch._dynamo' in sys.modules)",
        ],
        env={**os.environ, "PYTHONPATH": str(LIBRARY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
