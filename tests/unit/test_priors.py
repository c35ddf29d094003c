"""Claims about gene codes: what they compare, and that they refuse what they cannot use."""

from __future__ import annotations

import gzip
import re

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import StandardScaler

from biojepa import priors
from biojepa.errors import InputError
from biojepa.gene_sets import read_gene_sets
from biojepa.prior_names import require_file_names, source_name
from biojepa.priors import (
    coverage,
    gene_set_source,
    gene_table_source,
    network_source,
    read_gene_table,
    read_network,
    read_priors,
    read_sources,
    require_coverage,
    require_differences,
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
    codes = network_source("net", EDGES, restart).codes(NODES, 64)
    assert codes.genes == tuple(NODES)
    expected = bhattacharyya(walk_profiles(EDGES, restart))
    np.testing.assert_allclose(codes.values @ codes.values.T, expected, atol=2e-3)


def test_unconnected_genes_have_orthogonal_codes():
    codes = network_source("net", EDGES).codes(["N0", "N1", "Q0"])
    product = codes.values @ codes.values.T
    assert abs(product[0, 2]) < 1e-5 and product[0, 1] > 0.5


def test_few_dimensions_keep_the_leading_directions_of_the_affinities():
    affinity = bhattacharyya(walk_profiles(EDGES, RESTART))
    values, vectors = np.linalg.eigh(affinity)
    kept = vectors[:, -3:] * np.sqrt(values[-3:])
    kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    codes = network_source("net", EDGES).codes(NODES, 3)
    assert codes.values.shape == (len(NODES), 3)
    np.testing.assert_allclose(codes.values @ codes.values.T, kept @ kept.T, atol=5e-3)


def test_codes_have_unit_length_and_are_repeated_bit_for_bit():
    codes = network_source("net", EDGES).codes(NODES, 4)
    assert codes.values.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(codes.values, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(codes.values, network_source("net", EDGES).codes(NODES, 4).values)


def test_neither_the_order_of_edges_nor_their_direction_nor_repetition_changes_the_codes():
    shuffled = EDGES.sample(frac=1, random_state=3)
    turned = shuffled.rename(columns={"gene_a": "gene_b", "gene_b": "gene_a"})[list(EDGES.columns)]
    mixed = pd.concat([shuffled.iloc[:6], turned.iloc[6:]])
    repeated = pd.concat([mixed, shuffled, shuffled.iloc[:5], turned])
    expected = network_source("net", EDGES).codes(NODES).values
    for edges in (shuffled, turned, mixed, repeated):
        np.testing.assert_allclose(network_source("net", edges).codes(NODES).values, expected, atol=1e-6)


def test_the_order_of_wanted_genes_changes_nothing_and_strangers_get_no_code():
    codes = network_source("net", EDGES).codes(["N3", "STRANGER", "N1", "N3"])
    assert codes.genes == ("N1", "N3")
    np.testing.assert_array_equal(codes.values, network_source("net", EDGES).codes(["N1", "N3"]).values)


def test_a_network_that_knows_no_wanted_gene_gives_no_code():
    codes = network_source("net", EDGES).codes(["STRANGER"])
    assert codes.genes == () and len(codes.values) == 0


def test_codes_of_gene_sets_are_cosines_of_memberships_weighted_by_rarity():
    sets = {"S": ["A", "B"], "L": ["A", "B", "C", "D", "E"], "T": ["C", "D", "X"]}
    codes = gene_set_source("sets", sets).codes(["E", "A", "B", "C", "D", "STRANGER"])
    assert codes.genes == ("A", "B", "C", "D", "E")
    weight = {name: 1 + np.log(6 / len(members)) for name, members in sets.items()}  # 6 genes in all
    table = [[weight[name] * (gene in sets[name]) for name in sets] for gene in codes.genes]
    np.testing.assert_allclose(codes.values @ codes.values.T, cosine_similarity(table), atol=1e-6)


def test_genes_of_the_same_sets_have_equal_codes_and_of_disjoint_sets_orthogonal_ones():
    codes = gene_set_source("sets", {"S": ["A", "B"], "T": ["C"]}).codes(["A", "B", "C"])
    np.testing.assert_allclose(codes.values @ codes.values.T, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-6)


def test_gene_sets_that_know_no_wanted_gene_give_no_code():
    assert gene_set_source("sets", {"S": ["A"]}).codes(["Z"]).genes == ()


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
        ("gene_a\tgene_b\tweight\n\n\nA\tB\tx\n", ["line 4", "'x'", "a number"]),
        ("gene_a\tgene_b\n1\tA\tB\n", ["more fields than the 2 of the header"]),
        ("", ["an empty file", "write the table again"]),
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
    assert [source.name for source in sources] == ["string.v12", "hallmark"]
    np.testing.assert_array_equal(sources[0].values, network_source("", EDGES).codes(NODES, 5).values)


def test_two_files_that_would_share_a_name_are_refused(tmp_path):
    network, _ = write_sources(tmp_path)
    other = tmp_path / "string.v12.txt"
    other.write_bytes(network.read_bytes())
    with pytest.raises(InputError, match=r"string\.v12\.txt.*'string\.v12', after .*v12\.tsv.*rename"):
        read_sources([network, other])


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("data/string.tsv.gz", "string"),
        ("c2.cp.reactome.gmt", "c2.cp.reactome"),
        ("c2.cp.kegg.gmt.gz", "c2.cp.kegg"),
        ("esm.csv", "esm"),
        ("a.b/terms.txt", "terms"),
        ("network.v2", "network.v2"),
    ],
)
def test_a_source_has_the_name_of_its_file_without_the_suffixes_of_its_format(file, name):
    assert source_name(file) == name


@pytest.mark.parametrize(
    "name",
    ["gene.tsv", "n_sources.gmt", "consequence.csv.gz", "coexpression.tsv", "responses_k562.tsv", ".tsv.gz"],
)
def test_names_that_something_else_has_are_refused(name):
    require_file_names(["genes.tsv", "responses.tsv"])
    with pytest.raises(InputError, match=f"{re.escape(name)}: found .*rename the file"):
        require_file_names(["genes.tsv", f"data/{name}"])


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
    # Genes outside the screen take part in neither centre, scale nor directions, and keep their length.
    expected = pca.transform(scaler.transform(varying))
    whole = np.linalg.norm(scaler.transform(varying), axis=1, keepdims=True)
    expected = np.vstack([unit(expected[:20]), (expected / whole)[20:]])
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
    np.testing.assert_allclose(np.linalg.norm(alone.values, axis=1), 1, atol=1e-6)
    # What is projected is the part of the features that lies in the directions of the screen's genes.
    features = source.features(screen)
    centre = features.mean(axis=0) if source.centred else 0.0
    scale = features.std(axis=0) if source.standardized else 1.0
    *_, right = np.linalg.svd((features - centre) / scale, full_matrices=False)
    expected = unit((source.features(found) - centre) / scale) @ right[:4].T
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


def test_a_projected_gene_keeps_the_share_of_it_that_the_screen_speaks_for():
    # Z shares one set with A, or B, and is in many others. Weights are equal where sets are of one size.
    def sets(n_others):
        shared = {"WITH_A": ["A", "Z"], "OF_B": ["B", "FILLER"]}
        return shared | {f"S{i}": ["Z", f"FILLER{i}"] for i in range(n_others)}

    for n_others, has_code in ((3, True), (98, True), (100, False), (200, False)):
        codes = gene_set_source("sets", sets(n_others)).codes(["A", "B"], 8, ["Z"])
        assert codes.genes == (("A", "B", "Z") if has_code else ("A", "B"))
        if has_code:
            cosine = 1 / np.sqrt(1 + n_others)  # one set of n + 1 is the only one of A
            np.testing.assert_allclose(codes.values[2] @ codes.values[:2].T, [cosine, 0], atol=1e-6)
            assert np.linalg.norm(codes.values[2]) == pytest.approx(cosine)


def test_a_source_that_covers_one_gene_of_the_screen_does_not_make_all_others_equal_to_it():
    table = {"X": ["A", "TWIN"], "Y": ["B", "TWIN"], "Z": ["A", "FAR"], "W": ["FAR", "C"], "V": ["C", "B"]}
    codes = gene_set_source("sets", table).codes(["A"], 8, ["TWIN", "FAR", "B", "C"])
    # Sets of two, each of A and each of the others in two of them: TWIN and FAR share one of two with A.
    assert codes.genes == ("A", "FAR", "TWIN")
    np.testing.assert_allclose(codes.values, [[1.0], [0.5], [0.5]], atol=1e-6)


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
        ("gene\ta\n\nA\t1\n  \nB\thigh\n", ["line 5 (gene B), column a", "'high'"]),
        ("\ngene\ta\nA\t1\n\nA\t3\n", ["line 5, column gene", "gene A a second time"]),
        ("a\tb\nA\t1\t2\nB\t3\t4\n", ["more fields than the 2 of the header", "col.names = NA"]),
        ("gene\ta\nA\t1\nB\t2\t3\n", ["no table", "line 3", "as many fields in each row"]),
        ("", ["an empty file", "a header and at least one row"]),
        ("\n\n", ["an empty file"]),
        ("gene\ta\tb\nA\t1\t0\nB\t1\t0\n", ["the same features for all 2 gene(s)", "take the file out"]),
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


def test_a_table_in_another_encoding_is_refused_and_a_byte_order_mark_is_not(tmp_path):
    path = tmp_path / "features.tsv"
    path.write_text("gene\ta\nA\t1\nB\t2\n", encoding="utf-16")
    with pytest.raises(InputError, match=r"features\.tsv: found no table.*UTF-8"):
        read_gene_table(path)
    path.write_text("gene_a\tgene_b\nA\tB\n", encoding="utf-8-sig")
    assert read_network(path).gene_a.tolist() == ["A"]


def test_a_source_that_tells_no_perturbed_genes_apart_is_refused():
    source = gene_set_source("sets", {"S": ["A", "B"]}, where="sets.gmt")
    require_differences([source], {"sets": np.array([[0.6], [-0.6], [0.0]])}, ["A", "B"])
    with pytest.raises(InputError, match=r"sets\.gmt: found the same for .* it knows, 2; expected diff"):
        require_differences([source], {"sets": np.array([[0.0], [0.0], [0.5]])}, ["A", "B"])
