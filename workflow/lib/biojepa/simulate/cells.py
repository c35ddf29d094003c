"""Which barcode holds what, and its UMI counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from biojepa.simulate.responses import Genes, Responses
from biojepa.simulate.settings import N_MITOCHONDRIAL, ScreenParameters, SimulatorSettings

STATUSES = ("singlet", "no_guide", "two_guides", "doublet", "dying")
SINGLET, NO_GUIDE, TWO_GUIDES, DOUBLET, DYING = range(5)
NON_TARGETING = "non-targeting"
# A dying cell keeps 40 % of its UMIs and has six times the mitochondrial share.
_DYING_DEPTH, _DYING_MITO = 0.4, 6.0
_ABUNDANCE_LOG_SD = 0.35
# Guides of one cell share most of the spread of their UMIs: it comes from the cell's capture.
_GUIDE_SHARED_VARIANCE = 0.85


@dataclass(frozen=True)
class Guides:
    """The guide library: targeting guides by target, then non-targeting ones.

    Parameters
    ----------
    names, target
        Name, and position in the perturbed genes (-1: non-targeting), shape ``(guides,)``.
    efficacy
        Share of the full effect, 0 to 1, shape ``(guides,)``.
    is_weak
        Whether a targeting guide is weak, shape ``(guides,)``.
    abundance
        Share in the ambient guide UMIs, shape ``(guides,)``.
    """

    names: np.ndarray
    target: np.ndarray
    efficacy: np.ndarray
    is_weak: np.ndarray
    abundance: np.ndarray


@dataclass(frozen=True)
class CellPlan:
    """Everything drawn about cells before their counts.

    The first ``n_barcodes`` cells own a barcode; the rest are the second cells of doublets.

    Parameters
    ----------
    n_barcodes
        Barcodes in the matrix.
    condition
        0 control, then singles, then combinations, shape ``(cells,)``.
    guide
        Indices of the guides that a cell carries, -1 for none, shape ``(cells, 2)``.
    factor
        Interaction factor of the two guides, shape ``(cells,)``.
    status
        Index into ``STATUSES``, shape ``(cells,)``.
    partner
        Cell that shares the barcode of a doublet, -1 for none, shape ``(cells,)``.
    batch
        Shape ``(cells,)``.
    depth
        Expected UMIs over the whole transcriptome, shape ``(cells,)``.
    mito
        Mitochondrial share of the UMIs, shape ``(cells,)``.
    phase
        Angle in the cell cycle, shape ``(cells,)``.
    """

    n_barcodes: int
    condition: np.ndarray
    guide: np.ndarray
    factor: np.ndarray
    status: np.ndarray
    partner: np.ndarray
    batch: np.ndarray
    depth: np.ndarray
    mito: np.ndarray
    phase: np.ndarray


def draw_guides(settings: SimulatorSettings, target_names: np.ndarray, rng: np.random.Generator) -> Guides:
    """Draw the library; at least three guides are non-targeting."""
    per_gene = settings.guides_per_gene
    n_targeting = settings.n_singles * per_gene
    n_control = max(3, round(settings.share_control * n_targeting))
    names = [f"{name}_g{index + 1}" for name in target_names for index in range(per_gene)]
    names += [f"{NON_TARGETING}_g{index + 1}" for index in range(n_control)]
    weak = np.zeros(n_targeting + n_control, dtype=bool)
    weak[rng.permutation(n_targeting)[: round(settings.share_weak_guides * n_targeting)]] = True
    efficacy = np.where(weak, rng.uniform(0.05, 0.3, len(weak)), rng.uniform(0.85, 1.0, len(weak)))
    efficacy[n_targeting:] = 0
    abundance = np.exp(rng.normal(0, 0.5, len(weak)))
    target = np.concatenate([np.repeat(np.arange(settings.n_singles), per_gene), np.full(n_control, -1)])
    return Guides(np.array(names), target, efficacy, weak, abundance / abundance.sum())


def draw_cells(
    settings: SimulatorSettings,
    parameters: ScreenParameters,
    guides: Guides,
    responses: Responses,
    rng: np.random.Generator,
) -> CellPlan:
    """Draw perturbation, guides, fate, batch, depth and state of every cell.

    Shares of fates are exact up to rounding; perturbations differ in abundance (log sd 0.35).
    """
    n = settings.n_cells
    n_doublets = round(settings.share_doublets * n)
    n_all = n + n_doublets
    condition = _draw_conditions(settings, n_all, rng)
    status = _draw_status(settings, condition[:n], rng)
    status = np.concatenate([status, np.full(n_doublets, DOUBLET)])
    partner = np.full(n_all, -1)
    partner[np.flatnonzero(status[:n] == DOUBLET)] = np.arange(n, n_all)
    guide = _draw_carried_guides(settings, guides, responses, condition, status, rng)

    factor = np.ones(n_all)
    is_pair = condition > settings.n_singles
    factor[is_pair] = responses.interaction[condition[is_pair] - 1 - settings.n_singles]
    batch = rng.integers(settings.n_batches, size=n_all)
    batch[partner[partner >= 0]] = batch[np.flatnonzero(partner >= 0)]
    batch_depth = rng.normal(0, parameters.batch_depth_log_sd, settings.n_batches)
    log_depth = rng.normal(parameters.library_log_mean, parameters.library_log_sd, n_all)
    mito = np.exp(rng.normal(parameters.mito_log_mean, parameters.mito_log_sd, n_all))
    dying = status == DYING
    return CellPlan(
        n_barcodes=n,
        condition=condition,
        guide=guide,
        factor=factor,
        status=status,
        partner=partner,
        batch=batch,
        depth=np.exp(log_depth + batch_depth[batch]) * np.where(dying, _DYING_DEPTH, 1),
        mito=np.minimum(mito * np.where(dying, _DYING_MITO, 1), 0.9),
        phase=rng.uniform(0, 2 * np.pi, n_all),
    )


def draw_counts(
    parameters: ScreenParameters,
    genes: Genes,
    responses: Responses,
    guides: Guides,
    plan: CellPlan,
    barcodes: slice,
    rng: np.random.Generator,
) -> sparse.csr_matrix:
    """Draw the UMIs of a run of barcodes: genes, then guides, shape ``(barcodes, genes + guides)``."""
    own = np.arange(barcodes.start, barcodes.stop)
    doublets = np.flatnonzero(plan.partner[own] >= 0)
    cells = np.concatenate([own, plan.partner[own[doublets]]])
    of_genes = _draw_gene_counts(genes, responses, guides, plan, cells, rng)
    of_guides = _draw_guide_counts(parameters, guides, plan, cells, rng)
    both = np.hstack([of_genes, of_guides])
    both[doublets] += both[len(own) :]
    return sparse.csr_matrix(both[: len(own)])


def _draw_conditions(settings: SimulatorSettings, n: int, rng: np.random.Generator) -> np.ndarray:
    n_perturbed = settings.n_singles + settings.n_combinations
    weight = np.exp(rng.normal(0, _ABUNDANCE_LOG_SD, n_perturbed))
    weight *= (1 - settings.share_control) / weight.sum()
    return rng.choice(n_perturbed + 1, n, p=np.concatenate([[settings.share_control], weight]))


def _draw_status(settings: SimulatorSettings, condition: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give exact numbers of barcodes each fate; a second guide only to cells of single perturbations."""
    n = len(condition)
    status = np.full(n, SINGLET)
    single = np.flatnonzero((condition >= 1) & (condition <= settings.n_singles))
    second = rng.permutation(single)[: round(settings.share_two_guides * n)]
    status[second] = TWO_GUIDES
    rest = rng.permutation(np.flatnonzero(status == SINGLET))
    start = 0
    shares = ((DOUBLET, settings.share_doublets), (DYING, settings.share_dying))
    for fate, share in (*shares, (NO_GUIDE, settings.share_no_guide)):
        number = round(share * n)
        status[rest[start : start + number]] = fate
        start += number
    return status


def _draw_carried_guides(
    settings: SimulatorSettings,
    guides: Guides,
    responses: Responses,
    condition: np.ndarray,
    status: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw guides at random among those of the target; an accidental second one among all others."""
    n, per_gene = len(condition), settings.guides_per_gene
    n_targeting = settings.n_singles * per_gene
    first, second = np.full(n, -1), np.full(n, -1)
    single = (condition >= 1) & (condition <= settings.n_singles)
    pair = condition > settings.n_singles
    first[single] = condition[single] - 1
    first[pair], second[pair] = responses.pairs[condition[pair] - 1 - settings.n_singles].T
    which = rng.integers(per_gene, size=(n, 2))
    guide = np.where(np.stack([first, second], 1) >= 0, np.stack([first, second], 1) * per_gene + which, -1)
    control = condition == 0
    guide[control, 0] = rng.integers(n_targeting, len(guides.names), size=int(control.sum()))
    accident = np.flatnonzero(status == TWO_GUIDES)
    # A step of 1 to (all - guides of the own target) past the own target's guides never meets them.
    step = rng.integers(len(guides.names) - per_gene, size=len(accident))
    guide[accident, 1] = (first[accident] * per_gene + per_gene + step) % len(guides.names)
    return guide


def _draw_gene_counts(
    genes: Genes,
    responses: Responses,
    guides: Guides,
    plan: CellPlan,
    cells: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw negative binomial counts (gamma-Poisson), shape ``(cells, genes)``."""
    carried = plan.guide[cells]
    target = np.where(carried >= 0, guides.target[carried], -1)
    efficacy = np.where(carried >= 0, guides.efficacy[carried], 0.0)
    log_mean = responses.log_fold_change(target[:, 0], target[:, 1], efficacy, plan.factor[cells])
    phase = plan.phase[cells]
    axes = np.stack([np.cos(phase), np.sin(phase)], 1).astype(np.float32)
    log_mean += axes @ genes.cycle.astype(np.float32)
    log_mean += genes.batch.astype(np.float32)[plan.batch[cells]]
    mean = np.exp(log_mean, out=log_mean)

    depth, mito = plan.depth[cells], plan.mito[cells]
    nuclear = genes.share[: genes.n_nuclear].sum()
    scale = np.repeat(depth[:, None], 2, 1).astype(np.float32)
    scale[:, 1] *= nuclear * mito / (1 - mito)
    mean *= genes.share.astype(np.float32)
    mean[:, :-N_MITOCHONDRIAL] *= scale[:, :1]
    mean[:, -N_MITOCHONDRIAL:] *= scale[:, 1:]
    shape = (1 / genes.dispersion).astype(np.float32)
    mean *= rng.standard_gamma(np.broadcast_to(shape, mean.shape), dtype=np.float32) / shape
    return rng.poisson(mean).astype(np.int32)


def _draw_guide_counts(
    parameters: ScreenParameters, guides: Guides, plan: CellPlan, cells: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draw log-normal signal for carried guides on an ambient background, shape ``(cells, guides)``."""
    n = len(cells)
    shape = 1 / parameters.guide_background_dispersion
    ambient = rng.poisson(parameters.guide_background_mean * rng.standard_gamma(shape, n) / shape)
    counts = np.zeros((n, len(guides.names)), dtype=np.int32)
    rows = np.repeat(np.arange(n), ambient)
    np.add.at(counts, (rows, rng.choice(len(guides.names), len(rows), p=guides.abundance)), 1)
    shared = np.sqrt(_GUIDE_SHARED_VARIANCE) * rng.standard_normal((n, 1))
    spread = shared + np.sqrt(1 - _GUIDE_SHARED_VARIANCE) * rng.standard_normal((n, 2))
    signal = np.exp(parameters.guide_signal_log_mean + parameters.guide_signal_log_sd * spread)
    captured = (plan.guide[cells] >= 0) & (plan.status[cells] != NO_GUIDE)[:, None]
    for slot in range(2):
        kept = np.flatnonzero(captured[:, slot])
        counts[kept, plan.guide[cells[kept], slot]] += np.rint(signal[kept, slot]).astype(np.int32)
    return counts
