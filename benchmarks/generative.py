"""Two generative models of perturbed cells, to measure what a joint embedding saves and what it costs.

Both are kept to the standard formulation, see :class:`CountVAE` and :class:`ExpressionDiffusion`. Both are
conditioned alike: a perturbation is the sum over its genes of a small network of the genes' prior codes, so
that a gene which no training cell carries has a condition too, and control is zero. Their training loop is
as fast as the pipeline's: cells stay on the device, dense, and batches are drawn there.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biojepa.model.encoder import GeneExpressionEncoder
from biojepa.model.targets import frozen_copy, move_average, while_young
from biojepa.pairs import CONTROL_CODE, Pairs, counts_of, target_sum_of, trainable_labels
from biojepa.training.encoder_stage import EncoderSettings
from biojepa.training.optimization import apply_gradients, make_optimizer

CONDITION = 64
LEARNING_RATE = 1e-3
WARM_UP = 50


@dataclass(frozen=True)
class Cells:
    """Training cells of a fold on a device, dense.

    Attributes
    ----------
    expression
        (N, genes) log1p of counts per target sum.
    x
        (N, genes) standardized over these cells, clipped at 10 deviations.
    counts
        (N, genes) counts, as :func:`~biojepa.pairs.counts_of` gets them back from ``expression``.
    library
        (N,) standardized log library size of the whole transcriptome.
    per_target
        (N,) target sum over library size: what a count is multiplied with before log1p.
    label
        (N,) position of the label plus 1; 0 for control.
    mean, scale
        (genes,) of ``expression``.
    membership
        (labels + 1, perturbed genes) multi-hot code; row 0 is control.
    codes
        (perturbed genes, dimensions) prior codes of all sources side by side.
    """

    expression: Tensor
    x: Tensor
    counts: Tensor
    library: Tensor
    per_target: Tensor
    label: Tensor
    mean: Tensor
    scale: Tensor
    membership: Tensor
    codes: Tensor

    @classmethod
    def of(cls, pairs: Pairs, device: torch.device) -> Cells:
        """Take controls and cells of training perturbations, and nothing else."""
        allowed = np.append(trainable_labels(pairs), CONTROL_CODE)
        chosen = np.flatnonzero(np.isin(pairs.perturbation, allowed))
        expression = torch.from_numpy(pairs.dense(chosen))
        mean, scale = expression.mean(dim=0), expression.std(dim=0).clamp(min=0.1)
        log_library = torch.from_numpy(pairs.log_library_size[chosen].astype(np.float32))
        per_target = target_sum_of(pairs) / log_library.exp()
        member = np.vstack([np.zeros((1, len(pairs.perturbed_genes))), pairs.membership])
        codes = [np.eye(len(pairs.perturbed_genes))] if not pairs.codes else list(pairs.codes.values())
        parts = (
            expression,
            ((expression - mean) / scale).clamp(-10, 10),
            torch.from_numpy(replace(pairs, data=counts_of(pairs)).dense(chosen)),
            (log_library - log_library.mean()) / log_library.std(),
            per_target,
            torch.from_numpy(pairs.perturbation[chosen].astype(np.int64)) + 1,
            mean,
            scale,
            torch.from_numpy(member).float(),
            torch.from_numpy(np.concatenate(codes, axis=1)).float(),
        )
        return cls(*(part.to(device) for part in parts))

    def __len__(self) -> int:
        return len(self.x)

    @property
    def controls(self) -> Tensor:
        """Positions of control cells."""
        return (self.label == 0).nonzero()[:, 0]


class Condition(nn.Module):
    """Additive condition of a perturbation: the sum of a network of its genes' codes; zero for control."""

    codes: Tensor

    def __init__(self, codes: Tensor, dim: int = CONDITION) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.network = nn.Sequential(nn.Linear(codes.shape[1], dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, membership: Tensor) -> Tensor:
        """Code (B, genes) multi-hot as (B, dim)."""
        return membership @ self.network(self.codes)


class CountVAE(nn.Module):
    """Conditional variational autoencoder of counts with a negative-binomial decoder.

    The likelihood and the observed library size are scVI's (Lopez et al., Nat Methods 2018), the condition
    in the decoder is that of conditional VAEs (Sohn et al., NeurIPS 2015), and a perturbation is predicted
    by decoding control cells with its condition, as trVAE and CPA do (Lotfollahi et al., Bioinformatics
    2020; Mol Syst Biol 2023). The encoder is the pipeline's own, all its tokens flattened.

    Parameters
    ----------
    settings
        Size of the encoder.
    cells
        Whose genes and codes it is made for.
    latent, hidden
        Dimensions of z, and width of the decoder.
    """

    def __init__(self, settings: EncoderSettings, cells: Cells, latent: int = 32, hidden: int = 512) -> None:
        super().__init__()
        n_genes = cells.x.shape[1]
        self.encoder: GeneExpressionEncoder = settings.build(n_genes)
        self.posterior = nn.Linear(settings.num_tokens * settings.embed_dim, 2 * latent)
        self.condition = Condition(cells.codes)
        self.decoder = nn.Sequential(
            nn.Linear(latent + CONDITION, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Dropout(settings.dropout),
            nn.Linear(hidden, n_genes),
        )
        self.log_dispersion = nn.Parameter(torch.zeros(n_genes))

    def encode(self, x: Tensor, library: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (B, latent) of the posterior."""
        mean, log_variance = self.posterior(self.encoder(x, library).flatten(1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-10, 10)

    def rates(self, z: Tensor, condition: Tensor, total: Tensor) -> Tensor:
        """Mean counts (B, genes) of cells with ``total`` (B,) counts."""
        return torch.softmax(self.decoder(torch.cat([z, condition], dim=1)), dim=1) * total[:, None]

    def loss(self, cells: Cells, chosen: Tensor, kl_weight: float) -> Tensor:
        """Negative evidence lower bound per gene."""
        mean, log_variance = self.encode(cells.x[chosen], cells.library[chosen])
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        counts = cells.counts[chosen]
        condition = self.condition(cells.membership[cells.label[chosen]])
        rates = self.rates(z, condition, counts.sum(dim=1))
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1) / 2
        likelihood = negative_binomial(counts, rates, self.log_dispersion.exp()).sum(dim=1)
        return (kl_weight * kl - likelihood).mean() / counts.shape[1]

    @torch.no_grad()
    def predict(self, cells: Cells, membership: Tensor, controls: int = 512, draws: int = 8) -> Tensor:
        """Mean log-expression (P, genes) of control cells decoded as perturbed by ``membership`` (P, genes).

        Counts are drawn from the decoder and transformed as the data are. All perturbations use the same
        control cells and the same z.
        """
        self.eval()
        chosen = cells.controls[torch.linspace(0, len(cells.controls) - 1, controls).long()]
        z, _ = self.encode(cells.x[chosen], cells.library[chosen])
        total, inverse = cells.counts[chosen].sum(dim=1), self.log_dispersion.exp()
        means = []
        for condition in self.condition(membership):
            rates = self.rates(z, condition.expand(len(z), -1), total)
            gamma = torch.distributions.Gamma(inverse.expand_as(rates), inverse / rates.clamp(min=1e-8))
            found = [
                torch.log1p(torch.poisson(gamma.sample()) * cells.per_target[chosen][:, None]).mean(dim=0)
                for _ in range(draws)
            ]
            means.append(torch.stack(found).mean(dim=0))
        self.train()
        return torch.stack(means)


def negative_binomial(counts: Tensor, mean: Tensor, inverse_dispersion: Tensor) -> Tensor:
    """Log-likelihood of counts with variance mean + mean² / inverse dispersion."""
    r, mean = inverse_dispersion, mean.clamp(min=1e-8)
    log_total = torch.log(r + mean)
    return (
        torch.lgamma(counts + r)
        - torch.lgamma(r)
        - torch.lgamma(counts + 1)
        + r * (torch.log(r) - log_total)
        + counts * (torch.log(mean) - log_total)
    )


class ExpressionDiffusion(nn.Module):
    """Conditional denoising diffusion of standardized log-expression.

    Noise prediction with a mean squared error over 1,000 steps (DDPM; Ho et al., NeurIPS 2020), the cosine
    schedule (Nichol & Dhariwal, ICML 2021), deterministic sampling in 50 steps (DDIM; Song et al., ICLR
    2021), a running average of the weights for sampling. The network is a residual MLP over all genes, as
    in scDiffusion (Luo et al., Bioinformatics 2024), whose blocks are shifted and scaled by time and
    condition.

    Parameters
    ----------
    cells
        Whose genes and codes it is made for.
    width, depth
        Of the network.
    """

    noise_share: Tensor
    STEPS = 1000

    def __init__(self, cells: Cells, width: int = 512, depth: int = 4) -> None:
        super().__init__()
        n_genes = cells.x.shape[1]
        self.condition = Condition(cells.codes)
        self.time = nn.Sequential(nn.Linear(CONDITION, CONDITION), nn.GELU(), nn.Linear(CONDITION, CONDITION))
        self.enter, self.leave = nn.Linear(n_genes, width), nn.Linear(width, n_genes)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(depth))
        self.modulate = nn.ModuleList(nn.Linear(CONDITION, 2 * width) for _ in range(depth))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(depth)
        )
        t = torch.arange(self.STEPS + 1) / self.STEPS
        kept = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
        self.register_buffer("kept", (kept / kept[0]).clamp(1e-5, 1.0))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Predict the noise in ``x`` (B, genes) at times ``t`` (B,), 1 to 1,000."""
        frequency = torch.exp(
            torch.arange(CONDITION // 2, device=x.device) * (-math.log(1e4) * 2 / CONDITION)
        )
        angle = t[:, None] * frequency
        told = self.time(torch.cat([angle.sin(), angle.cos()], dim=1)) + condition
        h = self.enter(x)
        for norm, modulate, block in zip(self.norms, self.modulate, self.blocks, strict=True):
            scale, shift = modulate(told).chunk(2, dim=1)
            h = h + block(norm(h) * (1 + scale) + shift)
        return self.leave(h)

    def loss(self, cells: Cells, chosen: Tensor) -> Tensor:
        """Mean squared error of the predicted noise."""
        x = cells.x[chosen]
        t = torch.randint(1, self.STEPS + 1, (len(x),), device=x.device)
        noise, kept = torch.randn_like(x), self.kept[t][:, None]
        condition = self.condition(cells.membership[cells.label[chosen]])
        noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
        return F.mse_loss(self(noisy, t, condition), noise)

    @torch.no_grad()
    def predict(self, cells: Cells, membership: Tensor, samples: int = 256, steps: int = 50) -> Tensor:
        """Mean log-expression (P, genes) of cells sampled for ``membership`` (P, genes).

        All perturbations start from the same noise, so that differences between them are less noisy.
        """
        start = torch.randn(samples, cells.x.shape[1], device=cells.x.device)
        times = torch.linspace(self.STEPS, 0, steps + 1).round().long().tolist()
        means = []
        for condition in self.condition(membership):
            x, told = start, condition.expand(samples, -1)
            for t, after in itertools.pairwise(times):
                noise = self(x, torch.full((samples,), t, device=x.device), told)
                kept, later = self.kept[t], self.kept[after]
                clean = ((x - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-10, 10)
                x = later.sqrt() * clean + (1 - later).sqrt() * noise
            means.append(x.mean(dim=0) * cells.scale + cells.mean)
        return torch.stack(means)


class Trainer:
    """Train one of the two models step by step.

    Parameters
    ----------
    model
        :class:`CountVAE` or :class:`ExpressionDiffusion`, on the device of ``cells``.
    cells
        To train on.
    batch_size
        Cells of a step.
    kl_steps
        Steps over which the weight of the VAE's KL term rises from 0 to 1.
    """

    def __init__(
        self, model: CountVAE | ExpressionDiffusion, cells: Cells, batch_size: int = 128, kl_steps: int = 400
    ) -> None:
        self.model, self.cells, self.batch_size, self.kl_steps = model, cells, batch_size, kl_steps
        self.optimizer = make_optimizer((model,), 0.01)
        self.average = frozen_copy(model) if isinstance(model, ExpressionDiffusion) else None

    def step(self, step: int) -> Tensor:
        """Take a step; return its loss, which nobody needs to wait for."""
        chosen = torch.randint(len(self.cells), (self.batch_size,), device=self.cells.x.device)
        if isinstance(self.model, CountVAE):
            loss = self.model.loss(self.cells, chosen, min(1.0, (step + 1) / self.kl_steps))
        else:
            loss = self.model.loss(self.cells, chosen)
        apply_gradients(self.optimizer, loss, LEARNING_RATE * min(1.0, (step + 1) / WARM_UP))
        if self.average is not None:
            move_average(self.average, self.model, while_young(step, 0.999))
        return loss.detach()

    def change(self, membership: Tensor) -> np.ndarray:
        """Predict changes of log-expression (P, genes) against control, made by the same model."""
        asked = torch.cat([torch.zeros_like(membership[:1]), membership])
        means = (self.average or self.model).predict(self.cells, asked)
        return (means[1:] - means[0]).cpu().numpy()
