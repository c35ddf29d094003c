"""What each perturbation does to each gene: the truth of a simulated screen.

The response of gene ``g``'s perturbation lives in a space of a few programmes. Module and hub have
their own coordinates in it; a gene's coordinates are those of its neighbourhood (personalised
PageRank over the network), so that neighbours have similar responses and the network, and nothing
else in the files, tells how a gene never perturbed will act. Expression means, dispersions and the
cell cycle are drawn without regard to the programmes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from biojepa.contracts import GENE_SEPARATOR
from biojepa.simulate.network import GeneNetwork, smooth_over_network
from biojepa.simulate.settings import N_MITOCHONDRIAL, ScreenParameters, SimulatorSettings

MITOCHONDRIAL = tuple(
    f"MT-{name}"
    for name in (
        "ND1", "ND2", "CO1", "CO2", "ATP8", "ATP6", "CO3", "ND3", "ND4L", "ND4", "ND5", "ND6", "CYB",
    )
)  # fmt: skip
# Standard deviation (natural log) of a gene's response to a strong perturbation, before saturation.
_RESPONSE_SD = 0.50
_SHARE_RESPONDING = 0.25
_SHARE_OWN_GENES = 0.03
_NODE_VARIANCE = 1.5
_STRENGTHS = {"clear": 1.0, "between": 0.45, "weak": 0.12}


@dataclass(frozen=True)
class Genes:
    """Measured genes; the last 13 are mitochondrial.

    Parameters
    ----------
    names
        Symbols, shape ``(genes,)``.
    share
        Expected share of a cell's whole-transcriptome UMIs, shape ``(genes,)``; for a
        mitochondrial gene its share of the mitochondrial UMIs.
    dispersion
        Negative binomial dispersion, shape ``(genes,)``.
    cycle
        Log expression (natural) on the two axes of the cell cycle, shape ``(2, genes)``.
    batch
        Log factor of each batch, shape ``(batches, genes)``.
    """

    names: np.ndarray
    share: np.ndarray
    dispersion: np.ndarray
    cycle: np.ndarray
    batch: np.ndarray

    @property
    def n_nuclear(self) -> int:
        """Number of genes that are not mitochondrial."""
        return len(self.names) - N_MITOCHONDRIAL


@dataclass(frozen=True)
class Responses:
    """Effects of the perturbed genes and of their designed combinations.

    Parameters
    ----------
    targets
        Indices of the perturbed genes, shape ``(singles,)``.
    strength, strength_class
        Size of a target's response and its class, shape ``(singles,)``.
    programme
        Coordinates of each target's response, unit length, shape ``(singles, programmes)``.
    loadings
        Genes of each programme, shape ``(programmes, genes)``.
    change
        Change of log expression (natural) by a target before saturation and without the knock-down
        of the target itself, shape ``(singles, genes)``.
    pairs
        Designed combinations, positions in ``targets``, shape ``(combinations, 2)``.
    interaction
        Factor on the summed change of a combination; 1 is additive, shape ``(combinations,)``.
    knock_down, saturation
        As in the settings; the knock-down in natural log.
    """

    targets: np.ndarray
    strength: np.ndarray
    strength_class: np.ndarray
    programme: np.ndarray
    loadings: np.ndarray
    change: np.ndarray
    pairs: np.ndarray
    interaction: np.ndarray
    knock_down: float
    saturation: float

    def log_fold_change(
        self, first: np.ndarray, second: np.ndarray, efficacy: np.ndarray, factor: np.ndarray
    ) -> np.ndarray:
        """Return the log fold changes (natural) of cells that carry up to two guides.

        ``limit * tanh(factor * (e1 * change1 + e2 * change2) / limit)``, plus efficacy times the
        knock-down at the perturbed genes.

        Parameters
        ----------
        first, second
            Positions in ``targets``; -1 for a non-targeting or absent guide. Shape ``(cells,)``.
        efficacy
            Of either guide, 0 to 1, shape ``(cells, 2)``.
        factor
            Interaction, shape ``(cells,)``.

        Returns
        -------
        numpy.ndarray
            Shape ``(cells, genes)``, float32.
        """
        total = np.zeros((len(first), self.change.shape[1]), dtype=np.float32)
        slots = ((first, efficacy[:, 0]), (second, efficacy[:, 1]))
        for target, strength in slots:
            rows = np.flatnonzero(target >= 0)
            scale = (strength[rows] * factor[rows] / self.saturation).astype(np.float32)
            total[rows] += scale[:, None] * self.change[target[rows]]
        np.tanh(total, out=total)
        total *= np.float32(self.saturation)
        for target, strength in slots:
            rows = np.flatnonzero(target >= 0)
            total[rows, self.targets[target[rows]]] += (strength[rows] * self.knock_down).astype(np.float32)
        return total


def draw_genes(settings: SimulatorSettings, parameters: ScreenParameters, rng: np.random.Generator) -> Genes:
    """Draw means from the fitted quantile function, dispersions from the fitted trend, cycle and batches."""
    n_nuclear = settings.n_genes - N_MITOCHONDRIAL
    # One draw in each of n equal slices: a small panel has the fitted distribution, not a lucky one.
    level = (rng.permutation(n_nuclear) + rng.random(n_nuclear)) / n_nuclear
    cp10k = np.exp(np.interp(level, parameters.quantile_levels, parameters.log_cp10k_quantiles))
    share = cp10k / max(cp10k.sum(), 1e4)
    mitochondrial = rng.dirichlet(np.full(N_MITOCHONDRIAL, 4.0))
    share_of_all = np.concatenate([share, mitochondrial * share.sum() * np.exp(parameters.mito_log_mean)])
    trend = parameters.dispersion(share_of_all * parameters.mean_library)
    dispersion = trend * np.exp(rng.normal(0, parameters.dispersion_log_scatter, settings.n_genes))
    cycling = rng.random((2, n_nuclear)) < 0.1
    cycle = np.where(cycling, rng.normal(0, settings.cycle_strength * np.sqrt(2), (2, n_nuclear)), 0)
    batch = rng.normal(0, parameters.batch_gene_log_sd, (settings.n_batches, n_nuclear))
    no_effect = np.zeros((2, N_MITOCHONDRIAL))
    width = len(str(n_nuclear))
    return Genes(
        names=np.array([f"GENE{index + 1:0{width}d}" for index in range(n_nuclear)] + list(MITOCHONDRIAL)),
        share=np.concatenate([share, mitochondrial]),
        dispersion=np.clip(dispersion, 0.01, 20.0),
        cycle=np.hstack([cycle, no_effect]),
        batch=np.hstack([batch, np.zeros((settings.n_batches, N_MITOCHONDRIAL))]),
    )


def without_biological_variance(genes: Genes, responses: Responses) -> Genes:
    """Take off the dispersions what cycle, batches and perturbations will add.

    The fitted dispersion is that of a whole screen. To first order a log mean that varies with
    variance ``v`` adds ``v`` to it. At least a quarter of the fitted value is left.
    """
    varying = (genes.cycle**2).sum(0) / 2 + genes.batch.var(0) + (responses.change.astype(float) ** 2).mean(0)
    return replace(genes, dispersion=np.maximum(genes.dispersion - varying, genes.dispersion / 4))


def draw_responses(
    settings: SimulatorSettings, genes: Genes, network: GeneNetwork, rng: np.random.Generator
) -> Responses:
    """Draw which genes are perturbed, what each does, and which combinations interact."""
    coordinates = draw_programmes(settings, network, rng)
    loadings = _draw_loadings(settings, network.n_genes, rng)
    # A screen perturbs genes that are expressed: the lower half of the means is left out.
    expressed = np.argsort(-genes.share[: genes.n_nuclear], kind="stable")[: (genes.n_nuclear + 1) // 2]
    targets = np.sort(rng.choice(expressed, settings.n_singles, replace=False))
    classes = _draw_strength_classes(settings, rng)
    strength = np.array([_STRENGTHS[name] for name in classes]) * np.exp(rng.normal(0, 0.2, len(targets)))
    programme = coordinates[targets]
    change = _combine(settings, programme, loadings, rng) * (strength * settings.effect_strength)[:, None]
    change[np.arange(len(targets)), targets] = 0
    change = np.hstack([change, np.zeros((len(targets), N_MITOCHONDRIAL))])
    pairs = _draw_pairs(settings, network.module[targets], rng)
    return Responses(
        targets=targets,
        strength=strength,
        strength_class=classes,
        programme=programme,
        loadings=np.hstack([loadings, np.zeros((len(loadings), N_MITOCHONDRIAL))]),
        change=change.astype(np.float32),
        pairs=pairs,
        interaction=_draw_interactions(settings, network.module[targets], pairs, rng),
        knock_down=settings.knock_down_log2 * float(np.log(2)),
        saturation=settings.saturation,
    )


def draw_programmes(
    settings: SimulatorSettings, network: GeneNetwork, rng: np.random.Generator
) -> np.ndarray:
    """Return each gene's response coordinates, unit length, shape ``(genes, programmes)``.

    Module vectors plus own vectors of the hubs plus a little of each node, averaged over the
    network, plus the direction that all perturbations share.
    """
    K = settings.n_programmes
    of_module = rng.standard_normal((settings.n_modules, K))
    of_hub = rng.standard_normal((network.n_genes, K)) * network.is_hub[:, None]
    of_node = rng.standard_normal((network.n_genes, K)) * np.sqrt(_NODE_VARIANCE)
    smooth = smooth_over_network(network, of_module[network.module] + of_hub + of_node)
    common = _unit(rng.standard_normal((1, K)))
    own_share, common_share = np.sqrt(1 - settings.share_common), np.sqrt(settings.share_common)
    return _unit(own_share * _unit(smooth - smooth.mean(0)) + common_share * common)


def perturbation_labels(genes: Genes, responses: Responses) -> list[str]:
    """Name the singles, then the combinations (genes in sorted order joined by ``+``)."""
    names = genes.names[responses.targets]
    pairs = [GENE_SEPARATOR.join(sorted(names[pair])) for pair in responses.pairs]
    return [*names.tolist(), *pairs]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _draw_loadings(settings: SimulatorSettings, n_genes: int, rng: np.random.Generator) -> np.ndarray:
    """Each programme moves a quarter of the genes, up or down, mean square over all genes 1."""
    shape = (settings.n_programmes, n_genes)
    loadings = np.where(rng.random(shape) < _SHARE_RESPONDING, rng.standard_normal(shape), 0)
    return loadings / np.sqrt(_SHARE_RESPONDING)


def _combine(
    settings: SimulatorSettings, programme: np.ndarray, loadings: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Programme part and own part, together with the standard deviation ``_RESPONSE_SD`` over genes."""
    shape = (len(programme), loadings.shape[1])
    own = np.where(rng.random(shape) < _SHARE_OWN_GENES, rng.standard_normal(shape), 0)
    own /= np.sqrt(_SHARE_OWN_GENES)
    shared = np.sqrt(1 - settings.share_own) * (programme @ loadings)
    return _RESPONSE_SD * (shared + np.sqrt(settings.share_own) * own)


def _draw_strength_classes(settings: SimulatorSettings, rng: np.random.Generator) -> np.ndarray:
    n_clear = round(settings.share_clear * settings.n_singles)
    n_weak = min(round(settings.share_weak * settings.n_singles), settings.n_singles - n_clear)
    n_between = settings.n_singles - n_clear - n_weak
    return rng.permutation(np.repeat(["clear", "weak", "between"], [n_clear, n_weak, n_between]))


def _draw_pairs(settings: SimulatorSettings, module: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of the pairs within a module where there are enough, the rest between modules."""
    every = np.array(list(combinations(range(len(module)), 2)), dtype=int).reshape(-1, 2)
    every = rng.permutation(every)
    same = module[every[:, 0]] == module[every[:, 1]]
    n = settings.n_combinations
    n_same = min(n // 2, int(same.sum()))
    n_same = max(n_same, n - int((~same).sum()))
    chosen = np.concatenate([every[same][:n_same], every[~same][: n - n_same]])
    return chosen[np.lexsort(chosen.T[::-1])]


def _draw_interactions(
    settings: SimulatorSettings, module: np.ndarray, pairs: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Factors: exactly the stated share of pairs interacts, in a direction that the modules decide."""
    factor = np.ones(len(pairs))
    interacting = rng.permutation(len(pairs))[: round(settings.share_interactions * len(pairs))]
    size = rng.uniform(0.3, 0.7, len(interacting))
    same = module[pairs[interacting, 0]] == module[pairs[interacting, 1]]
    factor[interacting] = np.where(same, 1 - size, 1 + size)
    return factor
