"""Claims about perturbation codes and about what BioJEPA predicts from them, before and after training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from biojepa.model import BioJEPA, BioJEPAConfig, PerturbationEncoder

GENES, T, D = 6, 3, 8
# Gene 4 is unseen and covered by both sources, gene 5 is unseen and known to no source;
# gene 3 is seen and known to no source.
SEEN = torch.tensor([True, True, True, True, False, False])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def codes() -> dict[str, torch.Tensor]:
    net, sets = torch.randn(GENES, 5), torch.randn(GENES, 4)
    net[[3, 5]], sets[[3, 5]] = 0, 0
    sets[1] = 0
    return {"net": net, "sets": sets}


def make(opened: bool = True, **changes) -> BioJEPA:
    """BioJEPA in evaluation mode; ``opened`` gives the output layer of single effects weights.

    Without it, all changes are zero at initialization, and claims about sums would be 0 = 0.
    """
    config = BioJEPAConfig(**{"width": 16, "depth": 2, "heads": 2, "condition_dim": 8, **changes})
    model = BioJEPA(T, D, codes(), SEEN, config).eval()
    if opened:
        nn.init.normal_(model.single.leave.weight, std=0.3)
        nn.init.normal_(model.single.leave.bias, std=0.3)
    return model


def perturbing(*genes: int) -> torch.Tensor:
    return torch.zeros(1, GENES).index_fill(1, torch.tensor(genes, dtype=torch.long), 1.0)


def context(n: int = 1) -> torch.Tensor:
    return torch.randn(n, T, D)


def train(model: BioJEPA, steps: int = 8) -> None:
    """Train on random targets, singles, combinations and controls mixed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    labels = torch.cat([perturbing(), perturbing(0), perturbing(0, 1), perturbing(2), perturbing(1, 2, 3)])
    model.train()
    for _ in range(steps):
        loss = (model(context(5), labels) - context(5)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_an_untrained_model_predicts_no_change():
    model, z = make(opened=False), context(4)
    labels = torch.cat([perturbing(), perturbing(0), perturbing(4, 5), perturbing(0, 1, 2)])
    assert torch.equal(model(z, labels), z)


def test_control_is_exactly_no_change_before_and_after_training():
    model, z = make(), context(3)
    labels = torch.cat([perturbing(0), perturbing(), perturbing(1, 2)])
    assert torch.equal(model(z, labels)[1], z[1])
    train(model)
    for mode in (True, False):
        predicted = model.train(mode)(z, labels)
        assert torch.equal(predicted[1], z[1])
        assert not torch.equal(predicted[0], z[0])
        assert torch.equal(model(z[1:2], perturbing()), z[1:2])


def test_at_initialization_effects_add_up():
    model, z = make(), context()
    for genes in ((0, 1), (0, 4), (1, 2, 5)):
        together = model.change(z, perturbing(*genes))
        alone = sum(model.change(z, perturbing(gene)) for gene in genes)
        assert together.abs().max() > 0.05
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_training_gives_combinations_an_interaction_and_singles_none():
    model, z = make(), context()
    train(model)
    model.eval()
    gap = model.change(z, perturbing(0, 1)) - model.change(z, perturbing(0)) - model.change(z, perturbing(1))
    assert gap.abs().max() > 1e-2
    before = model.change(z, perturbing(2))
    nn.init.normal_(model.pair.leave.weight, std=5.0)
    assert torch.equal(model.change(z, perturbing(2)), before)


def test_without_the_interaction_effects_add_up_for_good():
    model, z = make(interaction=False), context()
    train(model)
    model.eval()
    alone = model.change(z, perturbing(0)) + model.change(z, perturbing(1))
    torch.testing.assert_close(model.change(z, perturbing(0, 1)), alone, atol=1e-5, rtol=1e-5)


def test_the_interaction_is_told_the_sum_and_the_products_of_the_pooled_codes():
    model = make()
    with torch.no_grad():
        tokens, absent = model.perturbation(torch.arange(GENES))
    pooled = [token[~gone].mean(dim=0) for token, gone in zip(tokens, absent, strict=True)]
    told = []
    model.pair.register_forward_pre_hook(lambda _, inputs: told.append(inputs[1]))
    model.change(context(3), torch.cat([perturbing(0, 4), perturbing(1), perturbing(0, 1, 5)]))
    a, b, c, d = (pooled[gene] for gene in (0, 4, 1, 5))
    expected = torch.stack([torch.stack([a + b, a * b]), torch.stack([a + c + d, a * c + a * d + c * d])])
    torch.testing.assert_close(told[0], expected, atol=1e-5, rtol=1e-4)


def renumbered(model: BioJEPA, order: torch.Tensor) -> BioJEPA:
    """The same model with its genes listed in another order."""
    encoder = model.perturbation
    new = {name: getattr(encoder, f"codes_{name}")[order] for name in encoder.sources}
    other = BioJEPA(T, D, new, SEEN[order], model.config).eval()
    state = model.state_dict() | {f"perturbation.codes_{name}": values for name, values in new.items()}
    state |= {"perturbation.seen": SEEN[order], "perturbation.gene.weight": encoder.gene.weight[order]}
    other.load_state_dict(state)
    return other


def test_combinations_are_symmetric_in_their_genes_after_training_too():
    model, z = make(), context()
    train(model)
    model.eval()
    order = torch.tensor([1, 0, 3, 2, 5, 4])  # swaps the partners of each pair below
    other = renumbered(model, order)
    for pair in ((0, 1), (2, 3), (4, 5)):
        torch.testing.assert_close(other.change(z, perturbing(*pair)), model.change(z, perturbing(*pair)))
    torch.testing.assert_close(other.change(z, perturbing(0)), model.change(z, perturbing(1)))


def test_other_populations_of_the_batch_and_control_rows_change_nothing():
    model, z = make(), context(5)
    train(model)
    model.eval()
    labels = torch.cat([perturbing(0, 1), perturbing(), perturbing(4), perturbing(), perturbing(1, 2, 3)])
    together = model.change(z, labels)
    apart = torch.cat([model.change(z[i : i + 1], labels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_the_code_of_an_unseen_gene_comes_from_the_sources_alone():
    model, z = make(), context()
    unseen, seen = model.change(z, perturbing(4)), model.change(z, perturbing(0))
    nn.init.normal_(model.perturbation.gene.weight)  # every learned token
    assert torch.equal(model.change(z, perturbing(4)), unseen)
    assert not torch.allclose(model.change(z, perturbing(0)), seen, atol=1e-3)
    model.perturbation.codes_net[4] += 1
    assert not torch.allclose(model.change(z, perturbing(4)), unseen, atol=1e-3)


def test_unseen_genes_of_equal_codes_have_equal_effects_and_of_other_codes_other_effects():
    encoder_codes = codes()
    encoder_codes["net"][5], encoder_codes["sets"][5] = encoder_codes["net"][4], encoder_codes["sets"][4]
    model = BioJEPA(T, D, encoder_codes, SEEN, BioJEPAConfig(width=16, heads=2, condition_dim=8)).eval()
    nn.init.normal_(model.single.leave.weight)
    z = context()
    torch.testing.assert_close(model.change(z, perturbing(4)), model.change(z, perturbing(5)))
    assert not torch.allclose(model.change(z, perturbing(4)), model.change(z, perturbing(0)), atol=1e-2)


def test_which_tokens_are_present_by_hand():
    encoder = PerturbationEncoder(codes(), SEEN, dim=8).eval()
    tokens, absent = encoder(torch.arange(GENES))
    assert tokens.shape == (GENES, 4, 8)
    assert (~absent).int().tolist() == [
        [1, 1, 1, 0],  # net, sets, learned, unknown
        [1, 0, 1, 0],
        [1, 1, 1, 0],
        [0, 0, 1, 0],
        [1, 1, 0, 0],
        [0, 0, 0, 1],
    ]


def test_without_learned_tokens_a_seen_gene_has_its_sources_alone():
    encoder = PerturbationEncoder(codes(), SEEN, dim=8, learned=False).eval()
    _, absent = encoder(torch.arange(GENES))
    assert (~absent).int().tolist()[0] == [1, 1, 0, 0] and (~absent).int().tolist()[3] == [0, 0, 0, 1]


def test_without_sources_unseen_genes_are_all_the_same_unknown():
    model = BioJEPA(T, D, {}, SEEN, BioJEPAConfig(width=16, heads=2, condition_dim=8)).eval()
    nn.init.normal_(model.single.leave.weight)
    z = context()
    assert torch.equal(model.change(z, perturbing(4)), model.change(z, perturbing(5)))
    assert not torch.allclose(model.change(z, perturbing(0)), model.change(z, perturbing(1)), atol=1e-3)


def test_a_gene_that_nothing_covers_has_the_unknown_effect_and_not_that_of_control():
    model, z = make(), context()
    effect = model.change(z, perturbing(5))
    assert effect.abs().max() > 0.05
    model.perturbation.codes_net[0] += 1  # of another gene
    nn.init.normal_(model.perturbation.gene.weight)
    assert torch.equal(model.change(z, perturbing(5)), effect)


def test_dropping_sources_trains_the_unknown_token_and_never_leaves_a_gene_without_any():
    encoder = PerturbationEncoder(codes(), SEEN, dim=8, source_dropout=0.5).train()
    _, absent = encoder(torch.zeros(4000, dtype=torch.long))
    assert (~absent).any(dim=1).all()
    present = (~absent).double().mean(dim=0)
    torch.testing.assert_close(present, torch.tensor([0.5, 0.5, 0.5, 0.125]).double(), atol=0.03, rtol=0)
    assert torch.equal(absent[:, 3], (~absent[:, :3]).any(dim=1))
    _, evaluated = encoder.eval()(torch.zeros(10, dtype=torch.long))
    assert not evaluated[:, :3].any()


def test_predicting_uses_no_dropout_and_no_gradient_and_leaves_the_mode_alone():
    model, z = make(dropout=0.5, source_dropout=0.5), context()
    model.train()
    predicted = model.predict_perturbation(z, perturbing(0))
    assert torch.equal(predicted, model.predict_perturbation(z, perturbing(0)))
    assert not predicted.requires_grad and model.training
    torch.testing.assert_close(predicted, model.eval()(z, perturbing(0)))


def test_shapes_that_do_not_fit_are_refused_with_both():
    model = make()
    with pytest.raises(ValueError, match=r"context has shape \(1, 2, 8\); expected \('any', 3, 8\)"):
        model.change(context()[:, :2], perturbing(0))
    with pytest.raises(ValueError, match=r"membership has shape \(1, 6\); expected \(2, 6\)"):
        model.change(context(2), perturbing(0))
    with pytest.raises(ValueError, match=r"codes\['net'\] has shape \(5, 3\); expected \(6, 'any'\)"):
        PerturbationEncoder({"net": torch.zeros(5, 3)}, SEEN)


def typed() -> BioJEPA:
    model = BioJEPA(T, D, codes(), SEEN, BioJEPAConfig(width=16, heads=2, condition_dim=8), 3, True).eval()
    nn.init.normal_(model.single.leave.weight, std=0.3)
    return model


def test_type_and_dose_say_nothing_at_initialization_and_something_once_learned():
    model, z, asked = typed(), context(2), perturbing(0).expand(2, -1)
    types, doses = torch.tensor([0, 2]), torch.tensor([1.0, 8.0])
    start = model.change(z, asked)
    torch.testing.assert_close(model.change(z, asked, types, doses), start, atol=0, rtol=0)
    with torch.no_grad():
        model.perturbation.type_offset[2] = 1.0
    other_type = model.change(z, asked, types)
    torch.testing.assert_close(other_type[0], start[0], atol=0, rtol=0)
    assert not torch.allclose(other_type[1], start[1], atol=1e-3)
    with torch.no_grad():
        model.perturbation.type_offset.zero_()
        model.perturbation.dose_offset.fill_(1.0)
    other_dose = model.change(z, asked, None, doses)
    torch.testing.assert_close(other_dose[0], start[0], atol=0, rtol=0)  # log of dose 1
    assert not torch.allclose(other_dose[1], start[1], atol=1e-3)


def test_a_dose_shifts_every_token_by_its_logarithm():
    encoder = typed().perturbation
    with torch.no_grad():
        encoder.dose_offset.copy_(torch.arange(8.0))
    gene = torch.tensor([1, 1])
    tokens, _ = encoder(gene, None, torch.tensor([1.0, torch.e]))
    moved = (tokens[1] - tokens[0]).expand(len(encoder.sources) + 2, -1)
    torch.testing.assert_close(moved, torch.arange(8.0).expand_as(moved), atol=1e-6, rtol=0)


def test_wrong_types_and_doses_are_refused_with_both_shapes():
    model, z, asked = typed(), context(2), perturbing(0).expand(2, -1)
    with pytest.raises(ValueError, match=r"type_code has shape \(9,\); expected \(2,\)"):
        model.change(z, asked, torch.zeros(9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"dose has values down to 0\.0; expected positive ones"):
        model.change(z, asked, None, torch.tensor([1.0, 0.0]))


def test_a_source_may_have_a_dot_in_its_name_and_keeps_its_own_copy():
    values = torch.randn(GENES, 5)
    encoder = PerturbationEncoder({"c2.cp": values}, SEEN, 8)
    assert (
        torch.equal(encoder.codes("c2.cp"), values) and encoder.codes("c2.cp").data_ptr() != values.data_ptr()
    )


def test_control_does_not_change_whatever_its_type_and_dose():
    model = typed()
    nn.init.normal_(model.perturbation.type_offset)
    nn.init.normal_(model.perturbation.dose_offset)
    assert not model.change(context(), perturbing(), torch.tensor([1]), torch.tensor([5.0])).any()
