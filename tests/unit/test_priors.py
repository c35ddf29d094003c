"""Claims about gene codes: what they compare, and that they refuse what they cannot use."""

from __future__ import annotations

import gzip

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from biojepa.errors import InputError
from biojepa.gene_sets import read_gene_sets
from biojepa.priors import (
    GeneCodes,
    coverage,
    gene_set_codes,
    network_codes,
    read_network,
    read_priors,
    require_coverage,
)

RESTART = 0.2
# A ring of ten genes with chords, weights that differ, and a pair apart from the rest.
EDGES = pd.DataFrame(
    [(f"N{i}", f"N{(i + 1) % 10}", 1.0 + 0.3 * i) for i in range(10)]
    + [("N0", "N5", 2.0), ("N2", "N7", 0.5), ("Q0", "Q1", 1.0)],
    columns=["gene_a", "gene_b", "weight"],
)
NODES = sorted({*EDGES.gene_a, *EDGES.gene_b})


def walk_profiles(edges: pd.DataFrame, restart: float) -> np.ndarray:
    """Stationary distributions by a dense inverse, (nodes, nodes), one row per start."""
    position = {node: i for i, node in enumerate(NODES)}
    A = np.zeros((len(NODES), len(NODES)))
    for a, b, weight in edges.itertuples(index=False):
        A[position[a], position[b]] = A[position[b], position[a]] = weight
    W = A / A.sum(axis=0)
    return (restart * np.linalg.inv(np.eye(len(A)) - (1 - restart) * W)).T


def bhattacharyya(profiles: np.ndarray) -> np.ndarray:
    return np.array([[np.sqrt(p * q).sum() for q in profiles] for p in profiles])


@pytest.mark.parametrize("restart", [0.2, 0.6])
def test_products_of_network_codes_are_bhattacharyya_affinities_of_random_walks(restart):
    codes = network_codes("net", EDGES, NODES, dim=64, restart=restart)
    assert codes.genes == tuple(NODES)
    expected = bhattacharyya(walk_profiles(EDGES, restart))
    np.testing.assert_allclose(codes.values @ codes.values.T, expected, atol=2e-3)


def test_unconnected_genes_have_orthogonal_codes():
    codes = network_codes("net", EDGES, ["N0", "N1", "Q0"])
    product = codes.values @ codes.values.T
    assert abs(product[0, 2]) < 1e-5 and product[0, 1] > 0.5


def test_few_dimensions_keep_the_leading_directions_of_the_affinities():
    affinity = bhattacharyya(walk_profiles(EDGES, RESTART))
    values, vectors = np.linalg.eigh(affinity)
    kept = vectors[:, -3:] * np.sqrt(values[-3:])
    kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    codes = network_codes("net", EDGES, NODES, dim=3)
    assert codes.values.shape == (len(NODES), 3)
    np.testing.assert_allclose(codes.values @ codes.values.T, kept @ kept.T, atol=5e-3)


def test_codes_have_unit_length_and_are_repeated_bit_for_bit():
    codes = network_codes("net", EDGES, NODES, dim=4)
    assert codes.values.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(codes.values, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(codes.values, network_codes("net", EDGES, NODES, dim=4).values)


def test_neither_the_order_of_edges_nor_their_direction_nor_repetition_changes_the_codes():
    shuffled = EDGES.sample(frac=1, random_state=3)
    turned = shuffled.rename(columns={"gene_a": "gene_b", "gene_b": "gene_a"})[list(EDGES.columns)]
    mixed = pd.concat([shuffled.iloc[:6], turned.iloc[6:]])
    repeated = pd.concat([mixed, shuffled, shuffled.iloc[:5], turned])
    expected = network_codes("net", EDGES, NODES).values
    for edges in (shuffled, turned, mixed, repeated):
        np.testing.assert_allclose(network_codes("net", edges, NODES).values, expected, atol=1e-6)


def test_the_order_of_wanted_genes_changes_nothing_and_strangers_get_no_code():
    codes = network_codes("net", EDGES, ["N3", "STRANGER", "N1", "N3"])
    assert codes.genes == ("N1", "N3")
    np.testing.assert_array_equal(codes.values, network_codes("net", EDGES, ["N1", "N3"]).values)
    assert codes.covered(["N3", "STRANGER", "N1"]) == ["N3", "N1"]


def test_a_network_that_knows_no_wanted_gene_gives_no_code():
    codes = network_codes("net", EDGES, ["STRANGER"])
    assert codes.genes == () and len(codes.values) == 0


def test_gene_set_codes_are_cosines_of_memberships_weighted_by_rarity():
    sets = {"S": ["A", "B"], "L": ["A", "B", "C", "D", "E"], "T": ["C", "D", "X"]}
    codes = gene_set_codes("sets", sets, ["E", "A", "B", "C", "D", "STRANGER"])
    assert codes.genes == ("A", "B", "C", "D", "E")
    weight = {name: 1 + np.log(6 / len(members)) for name, members in sets.items()}  # 6 genes in all
    table = [[weight[name] * (gene in sets[name]) for name in sets] for gene in codes.genes]
    np.testing.assert_allclose(codes.values @ codes.values.T, cosine_similarity(table), atol=1e-6)


def test_genes_of_the_same_sets_have_equal_codes_and_of_disjoint_sets_orthogonal_ones():
    codes = gene_set_codes("sets", {"S": ["A", "B"], "T": ["C"]}, ["A", "B", "C"])
    np.testing.assert_allclose(codes.values @ codes.values.T, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-6)


def test_gene_sets_that_know_no_wanted_gene_give_no_code():
    assert gene_set_codes("sets", {"S": ["A"]}, ["Z"]).genes == ()


@pytest.mark.parametrize(
    ("name", "content", "weights"),
    [
        ("net.tsv", "gene_a\tgene_b\tweight\nNA\tB\t-2\nB\tC\t0.5\n", [2.0, 0.5]),
        ("net.csv", "tf,target,score\nNA,B,2\nB,C,0.5\n", [2.0, 0.5]),
        ("net.tsv", "source\ttarget\nNA\tB\nB\tC\n", [1.0, 1.0]),
    ],
)
def test_networks_are_read_by_value_with_a_gene_called_na(tmp_path, name, content, weights):
    (tmp_path / name).write_text(content)
    edges = read_network(tmp_path / name)
    assert edges.gene_a.tolist() == ["NA", "B"] and edges.gene_b.tolist() == ["B", "C"]
    assert edges.weight.tolist() == weights
    with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
        file.write(content)
    pd.testing.assert_frame_equal(read_network(tmp_path / f"{name}.gz"), edges)


def test_self_loops_and_empty_ends_are_no_edges(tmp_path):
    (tmp_path / "net.tsv").write_text("gene_a\tgene_b\nA\tA\n\tB\nB\t\nA\tB\n")
    edges = read_network(tmp_path / "net.tsv")
    assert edges[["gene_a", "gene_b"]].to_numpy().tolist() == [["A", "B"]]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("from\tto\nA\tB\n", ["columns ['from', 'to']", "gene_a/gene_b", "name the two gene columns"]),
        ("gene_a\tgene_b\nA\tA\n", ["no edge between two different genes", "check the two gene columns"]),
        ("gene_a\tgene_b\tweight\nA\tB\t1\nB\tC\thigh\n", ["line 3", "'high'", "a number"]),
        ("gene_a\tgene_b\tweight\nA\tB\t\n", ["line 2", "''", "a number"]),
    ],
)
def test_a_bad_network_is_refused_with_file_finding_and_fix(tmp_path, content, parts):
    path = tmp_path / "net.tsv"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_network(path)
    for part in [str(path), *parts]:
        assert part in str(caught.value)


def test_gene_sets_are_read_by_value(tmp_path):
    content = "S\tsource\tA\tB\tA\t\r\n\r\nT\t\tC\r\n"
    (tmp_path / "sets.gmt").write_bytes(content.encode())
    with gzip.open(tmp_path / "sets.gmt.gz", "wb") as file:
        file.write(content.encode())
    for name in ("sets.gmt", "sets.gmt.gz"):
        assert read_gene_sets(tmp_path / name) == {"S": ["A", "B"], "T": ["C"]}


def test_bad_gene_sets_are_refused_with_the_line(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text("S\tsource\tA\nT,source,B\n")
    with pytest.raises(
        InputError, match=r"sets\.gmt line 2: found 1 tab-separated.*save the gene sets as GMT"
    ):
        read_gene_sets(path)
    path.write_text("S\tsource\tA\nS\tsource\tB\n")
    with pytest.raises(InputError, match=r"sets\.gmt line 2: found gene set 'S' a second time.*rename"):
        read_gene_sets(path)
    path.write_text("\n")
    with pytest.raises(InputError, match=r"sets\.gmt: found no gene set.*give a GMT file"):
        read_gene_sets(path)


def test_coverage_counts_by_hand():
    sources = [
        GeneCodes("net", ("A", "B"), np.eye(2, dtype=np.float32)),
        GeneCodes("sets", ("C",), np.ones((1, 1), dtype=np.float32)),
    ]
    table = coverage(sources, ["A", "B", "C", "D"])
    assert table.to_numpy().tolist() == [["net", 4, 2, 0.5, "C;D"], ["sets", 4, 1, 0.25, "A;B;D"]]


def test_a_source_that_covers_no_perturbed_gene_is_refused_and_named():
    good = GeneCodes("good", ("A",), np.ones((1, 1), dtype=np.float32))
    empty = network_codes(
        "mouse", pd.DataFrame({"gene_a": ["Klf1"], "gene_b": ["Gata1"], "weight": [1.0]}), ["KLF1"]
    )
    require_coverage([good], ["A", "B"], ["good.tsv"])
    expected = r"mouse\.tsv.*none of the 2 perturbed genes.*KLF1, MYC.*same gene symbols"
    with pytest.raises(InputError, match=expected):
        require_coverage([empty], ["KLF1", "MYC"], ["mouse.tsv"])


def write_sources(folder):
    EDGES.to_csv(folder / "string.v12.tsv", sep="\t", index=False)
    (folder / "hallmark.gmt").write_text("S\tx\tN0\tN1\nT\tx\tN2\n")
    return folder / "string.v12.tsv", folder / "hallmark.gmt"


def test_sources_are_called_after_their_files(tmp_path):
    network, sets = write_sources(tmp_path)
    sources = read_priors([network], [sets], NODES, dim=5)
    assert [source.name for source in sources] == ["string", "hallmark"]
    np.testing.assert_array_equal(sources[0].values, network_codes("", EDGES, NODES, dim=5).values)


def test_two_files_that_would_share_a_name_are_refused(tmp_path):
    network, _ = write_sources(tmp_path)
    other = tmp_path / "string.physical.tsv"
    other.write_bytes(network.read_bytes())
    with pytest.raises(InputError, match=r"string\.physical\.tsv.*'string'.*rename"):
        read_priors([network, other], [], NODES)
