"""The catalogue of public screens is complete and usable, and works together with a user's own table."""

import csv
import re

import pytest
import yaml

from biojepa.catalogue import DESCRIPTIONS, read_catalogue
from biojepa.config import ConfigError, load_config
from biojepa.labels import control_names, normalize_label
from biojepa.raw_files import listed_files, unusable_file_names
from workflow_case import REPO

PATH = REPO / "resources" / "catalogue.tsv"
SCHEMAS = REPO / "workflow" / "schemas"
CATALOGUE = read_catalogue(PATH)
ZENODO = "https://zenodo.org/records/13350497/files/"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(*run, **config):
    return load_config({"run": list(run), **config}, SCHEMAS, PATH)


def write_table(folder, text):
    (folder / "config/datasets.tsv").write_text(text, encoding="utf-8")


def test_every_row_has_the_columns_of_the_header_and_a_name_of_its_own():
    with PATH.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    allowed = yaml.safe_load((SCHEMAS / "datasets.schema.yaml").read_text(encoding="utf-8"))["properties"]
    assert set(rows[0]) <= {*allowed, *DESCRIPTIONS}
    assert set(rows[0]) >= {"dataset", "source", "checksum", *DESCRIPTIONS}
    assert {len(row) for row in rows} == {len(rows[0])}
    assert len(rows) - 1 == len(CATALOGUE) == len({row[0].casefold() for row in rows[1:]})


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_screen_can_be_run_by_its_name_alone_or_the_error_says_what_to_add(folder, name):
    entry = CATALOGUE[name]
    unknown = entry.descriptions["unknown"]
    if unknown:
        with pytest.raises(ConfigError) as caught:
            load(name)
        message = str(caught.value)
        assert f"catalogue, {name}: found no {unknown}, which the catalogue does not know" in message
        assert f"Fix: add a row {name} to config/datasets.tsv with the columns dataset, {unknown};" in message
        write_table(folder, f"dataset\t{unknown}\n{name}\tsomething\n")
    config = load(name)
    source = config.source(name)
    assert source.is_staged and source.folder == f"resources/datasets/{name}"
    assert {key: source.row[key] for key in entry.row if "{" not in entry.row[key]} == {
        key: value for key, value in entry.row.items() if "{" not in value
    }
    assert source.row["perturbation_column"]
    assert entry.descriptions["reference"] and entry.notes


@pytest.mark.parametrize("name", CATALOGUE)
def test_addresses_are_encrypted_and_checksums_whole_or_said_to_be_unknown(name):
    entry = CATALOGUE[name]
    files = listed_files(entry.row["source"], entry.row.get("checksum", ""))
    assert list(unusable_file_names(files)) == []
    for file in files:
        assert file.address.startswith("https://")
        assert re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", file.checksum) or (
            not file.checksum and "no checksum is known" in entry.notes
        )
        # This host answers scripts with 202 and an empty body.
        assert "//figshare.com" not in file.address


def test_no_file_and_no_checksum_is_there_twice():
    rows = [entry.row for entry in CATALOGUE.values()]
    files = [file for row in rows for file in listed_files(row["source"], row.get("checksum", ""))]
    sums = [file.checksum for file in files if file.checksum]
    assert len({file.identity for file in files}) == len(files)
    assert len(set(sums)) == len(sums)


def test_what_the_publishers_say_of_their_files_is_what_is_written():
    norman = CATALOGUE["norman2019"]
    assert norman.row == {
        "dataset": "norman2019",
        "source": f"{ZENODO}NormanWeissman2019_filtered.h5ad",
        "checksum": "md5:c870e6967d91c017d9da827bab183cd6",
        "format": "h5ad",
        "perturbation_column": "perturbation",
        "separator": "_",
        "perturbation_type": "CRISPRa",
    }
    assert (norman.descriptions["cells"], norman.descriptions["gigabytes"]) == ("111445", "0.70")
    geo = listed_files(CATALOGUE["norman2019_geo"].row["source"], CATALOGUE["norman2019_geo"].row["checksum"])
    assert [file.name.removeprefix("GSE133344_raw_") for file in geo] == [
        "barcodes.tsv.gz",
        "genes.tsv.gz",
        "matrix.mtx.gz",
        "cell_identities.csv.gz",
    ]
    assert [file.checksum[:9] for file in geo] == ["md5:f0e6a", "md5:e2882", "md5:a56e8", "md5:baf12"]
    original = CATALOGUE["replogle2022_k562_essential_original"]
    assert original.row["source"].startswith("https://ndownloader.figshare.com/files/35773219#K562_essential")
    assert CATALOGUE["papalexi2021"].row.get("checksum", "") == ""


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("norman2019", {"KLF1_CEBPA": "CEBPA+KLF1", "KLF1": "KLF1", "control": "control"}),
        ("papalexi2021", {"STAT1g2": "STAT1", "IFNGR1g4": "IFNGR1", "NTg1": "control"}),
        ("adamson2016_pilot", {"SPI1_pDS255": "SPI1", "62(mod)_pBA581": "control"}),
        (
            "replogle2022_k562_essential_original",
            {"non-targeting": "control", "HSPA5": "HSPA5"},
        ),
    ],
)
def test_labels_as_the_publishers_spell_them_are_understood(name, labels):
    row = CATALOGUE[name].row
    controls = control_names(row.get("control_label", ""))
    found = {
        label: normalize_label(label, row.get("separator", "+"), controls, row.get("label_pattern", ""))
        for label in labels
    }
    assert found == labels


def test_a_matrix_with_a_table_beside_it_is_a_folder_and_a_table(folder):
    write_table(folder, "dataset\tperturbation_column\nnorman2019_geo\tguides\n")
    source = load("norman2019_geo").source("norman2019_geo")
    assert source.path == "resources/datasets/norman2019_geo"
    assert [path.rpartition("_")[2] for path in source.raw_files] == [
        "barcodes.tsv.gz",
        "genes.tsv.gz",
        "matrix.mtx.gz",
    ]
    assert source.table("cell_metadata") == [
        "resources/datasets/norman2019_geo/GSE133344_raw_cell_identities.csv.gz"
    ]


def test_a_row_without_source_completes_a_public_screen_and_its_fields_win(folder):
    write_table(folder, "dataset\tbatch_column\tlabel_pattern\npapalexi2021\tlane\t\n")
    config = load("papalexi2021")
    row = config.source("papalexi2021").row
    assert (row["batch_column"], row["label_pattern"]) == ("lane", "g[0-9]+$")
    assert row["source"] == CATALOGUE["papalexi2021"].row["source"]
    assert config.notes == (
        "config/datasets.tsv, row papalexi2021: has no source, so it is papalexi2021 of the catalogue, and "
        "batch_column instead of the catalogue's",
    )


def test_a_row_with_a_source_hides_the_public_screen_of_that_name(folder):
    (folder / "mine.h5ad").touch()
    write_table(folder, "dataset\tsource\nnorman2019\tmine.h5ad\nnorman2019_geo\tmine.h5ad\n")
    config = load("norman2019", "norman2019_geo")
    assert config.source("norman2019").path == "mine.h5ad"
    assert config.source("norman2019").row["perturbation_column"] == ""
    assert [note.split(":")[1] for note in config.notes] == [
        f" has a source, so it is used and {name} of the catalogue is not" for name in config.datasets
    ]


def test_no_note_is_made_of_what_is_not_run_or_does_not_clash(folder):
    write_table(folder, "dataset\tsource\ndemo\tsimulator\nnorman2019\tsimulator\n")
    assert load("demo", "papalexi2021").notes == ()


def test_public_screens_can_be_overridden_and_their_responses_used(folder):
    write_table(folder, "dataset\tresponses\nnorman2019\treplogle2022_k562_essential\n")
    config = load("norman2019", overrides={"norman2019": {"pair": {"n_folds": 3}}})
    assert config.all_datasets == ["norman2019", "replogle2022_k562_essential"]
    assert config.settings("norman2019", "pair")["n_folds"] == 3


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("norman2018", "dataset\tsource\ndemo\tsimulator\n", r"of demo, or of the catalogue: .*Did you"),
        ("norman2018", "dataset\tnetworks\nnorman2018\tx\n", r"'source' is a .*Did you mean norman2019\?"),
        ("norman2019", "dataset\tsorce\nnorman2019\tx\n", r"row norman2019: unknown key sorce"),
        ("norman2019", "dataset\nnorman2019\nnorman2019\n", r"norman2019 is in 2 rows of config/datasets"),
    ],
)  # fmt: skip
def test_mistakes_beside_the_catalogue_are_named(folder, name, table, message):
    write_table(folder, table)
    with pytest.raises(ConfigError, match=message):
        load(name)


def test_without_a_table_of_the_user_the_catalogue_is_enough_and_no_more(folder):
    assert load("norman2019").datasets == ["norman2019"]
    with pytest.raises(ConfigError, match=r"datasets: no file config/datasets\.tsv"):
        load("norman2019", "demo")
    with pytest.raises(ConfigError, match=r"datasets: no file mine\.tsv"):
        load("norman2019", datasets="mine.tsv")


def test_the_manual_lists_every_public_screen_with_its_size_and_how_it_is_told():
    text = (REPO / "config" / "README.md").read_text(encoding="utf-8")
    part = text.split("### Public screens", 1)[1].split("###", 1)[0]
    rows = dict(re.findall(r"^\| ([a-z0-9_]+) \| (.*) \|$", part, re.MULTILINE))
    assert list(rows) == ["name", *CATALOGUE]
    for name, entry in CATALOGUE.items():
        cells = entry.descriptions["cells"]
        assert not cells or f"{int(cells):,}" in rows[name]
        assert (entry.descriptions["gigabytes"] or "–") in rows[name]


def test_papalexi_labels_of_every_guide_of_the_screen_become_its_target(real_data):
    """Control guides go up to g10, and a gene may end in a number before the g."""
    with (real_data / "papalexi2021_10x" / "guides.csv").open(encoding="utf-8", newline="") as file:
        target = {row["guide"]: row["target"] for row in csv.DictReader(file)}
    row = CATALOGUE["papalexi2021"].row
    controls = control_names(row.get("control_label", ""))
    found = {
        guide: normalize_label(guide, row.get("separator", ""), controls, row["label_pattern"])
        for guide in target
    }
    assert len(found) == 110
    assert found["NTg10"] == "control"
    # A label without a table of guides is what the guide is called, not the symbol of the gene.
    called = {"non-targeting": "control", "CD274": "PDL1"}
    assert found == {guide: called.get(name, name) for guide, name in target.items()}
