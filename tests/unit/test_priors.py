"""Claims about gene codes: what they compare, and that they refuse what they cannot use."""

from __future__ import annotations

import gzip

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import StandardScaler

from biojepa import priors
from biojepa.errors import InputError
from biojepa.gene_sets import read_gene_sets
from biojepa.priors import (
    coverage,
    gene_set_codes,
    gene_set_source,
    gene_table_source,
    network_codes,
    network_source,
    read_gene_table,
    read_network,
    read_priors,
    read_sources,
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


def test_coverage_says_which_source_covers_a_gene_and_what_follows():
    codes = {
        "net": np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]),
        "sets": np.array([[-1.0], [0.0], [0.0], [0.0]]),
    }
    table = coverage(codes, ["A", "B", "C", "D"], trained={"A", "C"})
    assert list(table.columns) == ["gene", "n_sources", "net", "sets", "consequence"]
    assert table.to_numpy().tolist() == [
        ["A", 2, 1, 1, "coded by prior sources"],
        ["B", 1, 1, 0, "coded by prior sources"],
        ["C", 0, 0, 0, "known from its own training cells alone"],
        ["D", 0, 0, 0, "predicted as an average unseen gene, never as control"],
    ]
    none = coverage({}, ["A"], trained=set())
    assert none.to_numpy().tolist() == [["A", 0, "predicted as an average unseen gene, never as control"]]


def test_a_source_that_covers_no_perturbed_gene_is_refused_and_named():
    edges = pd.DataFrame({"gene_a": ["Klf1"], "gene_b": ["Gata1"], "weight": [1.0]})
    mouse = network_source("mouse", edges, where="mouse.tsv")
    require_coverage([gene_set_source("good", {"S": ["KLF1"]})], ["KLF1", "MYC"])
    expected = (
        r"mouse\.tsv: found genes such as Gata1, Klf1, none of the 2 perturbed genes.*KLF1, MYC"
        r".*same gene symbols and species, or take it out of the dataset's row"
    )
    with pytest.raises(InputError, match=expected):
        require_coverage([mouse], ["KLF1", "MYC"])


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
        read_sources([network, other])


TABLE_GENES = [f"G{i:02d}" for i in range(30)]


def feature_table() -> pd.DataFrame:
    """30 genes, 12 correlated features whose units differ, one constant."""
    rng = np.random.default_rng(4)
    values = rng.standard_normal((30, 5)) @ rng.standard_normal((5, 12)) + 0.1 * rng.standard_normal((30, 12))
    values = values * rng.uniform(0.01, 1000, 12) + rng.uniform(-50, 50, 12)
    table = pd.DataFrame(values, index=TABLE_GENES, columns=[f"f{i}" for i in range(12)])
    return table.assign(f3=7.0)


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize("dim", [3, 64])
def test_codes_of_a_gene_table_are_principal_components_of_its_standardized_columns(dim):
    table, screen, others = feature_table(), TABLE_GENES[:20], TABLE_GENES[20:]
    codes = gene_table_source("esm", table).codes([*screen, "STRANGER"], dim, others)
    assert codes.genes == tuple(TABLE_GENES)
    varying = table.drop(columns="f3")
    scaler = StandardScaler().fit(varying.loc[screen])
    pca = PCA(min(dim, 11), svd_solver="full").fit(scaler.transform(varying.loc[screen]))
    # Genes outside the screen take part in neither centre, scale nor directions.
    expected = unit(pca.transform(scaler.transform(varying)))
    assert codes.values.shape == expected.shape
    signs = np.sign((codes.values * expected).sum(axis=0))
    np.testing.assert_allclose(codes.values, expected * signs, atol=1e-5)


def sources_of_all_kinds():
    sets = {f"S{i}": [f"N{i}", f"N{(i + 3) % 10}", "Q0"] for i in range(10)}
    rng = np.random.default_rng(1)
    table = pd.DataFrame(rng.standard_normal((len(NODES), 6)), index=NODES)
    return [network_source("net", EDGES), gene_set_source("sets", sets), gene_table_source("table", table)]


@pytest.mark.parametrize("source", sources_of_all_kinds(), ids=lambda source: source.name)
def test_other_genes_are_projected_and_change_no_code_of_the_screen(source, monkeypatch):
    screen, others = ["N0", "N1", "N2", "N3", "N4"], ["N7", "N9", "N3", "Q0", "STRANGER"]
    alone = source.codes(screen, 4)
    together = source.codes(screen, 4, others)
    # Q0 is in another component of the network than any gene of the screen, which says nothing of it.
    found = ["N7", "N9"] if source.name == "net" else ["N7", "N9", "Q0"]
    assert together.genes == (*screen, *found)
    np.testing.assert_array_equal(together.values[:5], alone.values)
    np.testing.assert_allclose(np.linalg.norm(together.values, axis=1), 1, atol=1e-6)
    # What is projected is the part of the features that lies in the directions of the screen's genes.
    features = source.features(screen)
    centre = features.mean(axis=0) if source.centred else 0.0
    scale = features.std(axis=0) if source.standardized else 1.0
    *_, right = np.linalg.svd((features - centre) / scale, full_matrices=False)
    expected = unit((source.features(found) - centre) / scale @ right[:4].T)
    both = unit((features - centre) / scale @ right[:4].T)
    np.testing.assert_allclose(together.values[5:] @ alone.values.T, expected @ both.T, atol=1e-5)
    monkeypatch.setattr(priors, "PROJECTED_AT_A_TIME", 1)
    np.testing.assert_allclose(source.codes(screen, 4, others).values, together.values, atol=1e-6)


def test_a_gene_of_the_screen_gets_the_same_code_when_it_is_projected():
    # With all directions kept, projecting a gene gives what fitting with it gives.
    source = network_source("net", EDGES)
    fitted = source.codes(NODES, 64)
    projected = source.codes(NODES, 64, NODES)
    np.testing.assert_array_equal(projected.values, fitted.values)
    direct = unit(
        source.features(["N6"]) @ np.linalg.svd(source.features(NODES))[2][: fitted.values.shape[1]].T
    )
    row = fitted.values[NODES.index("N6")]
    np.testing.assert_allclose(np.abs(row), np.abs(direct[0]), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.tsv", "gene\ta\tb\nNA\t1\t2.5\n1e5\t-3\t4\n"), ("t.csv", "gene,a,b\nNA,1,2.5\n1e5,-3,4\n")],
)
def test_gene_tables_are_read_by_value_with_symbols_that_look_like_other_things(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
        file.write(content)
    for path in (tmp_path / name, tmp_path / f"{name}.gz"):
        table = read_gene_table(path)
        assert table.index.tolist() == ["NA", "1e5"] and table.columns.tolist() == ["a", "b"]
        assert table.to_numpy().tolist() == [[1.0, 2.5], [-3.0, 4.0]]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("gene\ta\nA\t1\nB\thigh\n", ["line 3 (gene B), column a", "'high'", "a finite number"]),
        ("gene\ta\tb\nA\t1\t2\nB\t3\t\n", ["line 3 (gene B), column b", "''", "leave out genes"]),
        ("gene\ta\nA\tNaN\n", ["line 2 (gene A), column a", "a finite number"]),
        ("gene\ta\nA\tinf\n", ["line 2 (gene A), column a", "a finite number"]),
        ("gene\ta\nA\t1\nB\t2\nA\t3\n", ["line 4, column gene", "gene A a second time", "one row per gene"]),
        ("gene\ta\n\t1\n", ["line 2", "an empty gene"]),
        ("gene,a\nA,1\n", ["1 column(s) and 1 row(s)", "separate columns by tabs"]),
    ],
)
def test_a_bad_gene_table_is_refused_with_row_and_column(tmp_path, content, parts):
    path = tmp_path / "features.tsv"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_gene_table(path)
    for part in [str(path), *parts]:
        assert part in str(caught.value)
