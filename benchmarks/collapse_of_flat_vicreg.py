"""Show what VICReg charges an encoder that gives every cell the same distinct tokens.

    python benchmarks/collapse_of_flat_vicreg.py

Prints the loss without its prediction error, which is 0 for such an encoder: weights 25 (variance) and
1 (covariance), two branches, 256 cells, standard normal tokens, median of five draws.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow" / "lib"))

import torch

from biojepa.model import VICRegLoss

CELLS, DRAWS = 256, 5


def regularizer(tokens: torch.Tensor, flatten: bool) -> float:
    """Return the weighted variance and covariance terms of both branches, each these tokens (cells, T, D)."""
    total, _ = VICRegLoss(flatten=flatten)(tokens, tokens)
    return float(total)


def main() -> None:
    """Print the table."""
    print("tokens x dimension | form | every cell alike | cells independent")
    for tokens, dim in ((8, 64), (64, 256)):
        for form, flatten in (("flattened", True), ("per token", False)):
            alike, independent = [], []
            for draw in range(DRAWS):
                torch.manual_seed(draw)
                alike.append(regularizer(torch.randn(1, tokens, dim).repeat(CELLS, 1, 1), flatten))
                independent.append(regularizer(torch.randn(CELLS, tokens, dim), flatten))
            medians = statistics.median(alike), statistics.median(independent)
            print(f"{tokens} x {dim} | {form} | {medians[0]:.1f} | {medians[1]:.1f}")


if __name__ == "__main__":
    main()
