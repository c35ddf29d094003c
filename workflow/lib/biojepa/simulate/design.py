"""Everything drawn about a simulated screen before its counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from biojepa.simulate.cells import CellPlan, Guides, draw_cells, draw_counts, draw_guides
from biojepa.simulate.network import GeneNetwork, draw_network
from biojepa.simulate.responses import (
    Genes,
    Responses,
    draw_genes,
    draw_responses,
    without_biological_variance,
)
from biojepa.simulate.settings import N_MITOCHONDRIAL, ScreenParameters, SimulatorSettings

# Counts are drawn for this many barcodes from one stream: whatever the block, the same numbers.
_CELLS_PER_STREAM = 500
# One random stream per part: a setting of one part leaves the draws of the others alone.
_GENES, _NETWORK, _RESPONSES, _GUIDES, _CELLS, _BARCODES, _COUNTS, _OBSERVED_NETWORK = range(8)


@dataclass(frozen=True)
class Screen:
    """A simulated screen: its truth and the plan of its cells, but no counts yet.

    Parameters
    ----------
    settings, parameters
        What was asked for, and what real screens are like.
    genes, network, responses, guides, plan
        What was drawn.
    barcodes
        Distinct names of the droplets, shape ``(barcodes,)``.
    """

    settings: SimulatorSettings
    parameters: ScreenParameters
    genes: Genes
    network: GeneNetwork
    responses: Responses
    guides: Guides
    plan: CellPlan
    barcodes: np.ndarray

    def blocks(self) -> Iterator[sparse.csr_matrix]:
        """Draw the counts of about ``block_size`` barcodes at a time, genes then guides."""
        n, size = self.settings.n_cells, _CELLS_PER_STREAM
        runs = [slice(start, min(start + size, n)) for start in range(0, n, size)]
        per_block = max(1, self.settings.block_size // size)
        for first in range(0, len(runs), per_block):
            parts = [self._counts(run) for run in runs[first : first + per_block]]
            yield sparse.vstack(parts, format="csr")

    def observed_network_stream(self) -> np.random.Generator:
        """Return the stream that decides which edges the network file lists."""
        return np.random.default_rng([self.settings.seed, _OBSERVED_NETWORK])

    def _counts(self, run: slice) -> sparse.csr_matrix:
        rng = np.random.default_rng([self.settings.seed, _COUNTS, run.start])
        return draw_counts(self.parameters, self.genes, self.responses, self.guides, self.plan, run, rng)


def draw_screen(settings: SimulatorSettings, parameters: ScreenParameters) -> Screen:
    """Draw genes, network, responses, guides and the plan of all cells."""
    streams = [np.random.default_rng([settings.seed, part]) for part in range(_COUNTS)]
    genes = draw_genes(settings, parameters, streams[_GENES])
    n_nuclear = settings.n_genes - N_MITOCHONDRIAL
    network = draw_network(n_nuclear, settings.n_modules, settings.network_degree, streams[_NETWORK])
    responses = draw_responses(settings, genes, network, streams[_RESPONSES])
    guides = draw_guides(settings, genes.names[responses.targets], streams[_GUIDES])
    plan = draw_cells(settings, parameters, guides, responses, streams[_CELLS])
    return Screen(
        settings=settings,
        parameters=parameters,
        genes=without_biological_variance(genes, responses),
        network=network,
        responses=responses,
        guides=guides,
        plan=plan,
        barcodes=_draw_barcodes(plan.batch[: plan.n_barcodes], streams[_BARCODES]),
    )


def _draw_barcodes(batch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return distinct 16-letter barcodes with the number of their batch, as 10x writes them."""
    # An odd multiplier maps 0 .. 2^32 - 1 onto itself, so that no barcode is drawn twice.
    multiplier, offset = (np.uint64(value) for value in rng.integers(1 << 31, 1 << 32, size=2))
    code = np.arange(len(batch), dtype=np.uint64) * (multiplier | np.uint64(1)) + offset
    base = (code[:, None] >> np.arange(0, 32, 2, dtype=np.uint64)) & np.uint64(3)
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)[base.astype(np.intp)]
    text = letters.view("S16").ravel().astype(str)
    return np.char.add(np.char.add(text, "-"), (batch + 1).astype(str))
