"""The config is checked before the first job: defaults, refusals, overrides, and what the manual says."""

import re
from copy import deepcopy
from dataclasses import MISSING, asdict, fields

import pytest
import yaml

from biojepa.config import FILE_COLUMNS, ConfigError, Source, load_config
from biojepa.contracts import NO_SPLIT, SCHEMES, STRATEGIES
from biojepa.evaluation.settings import DistributionSettings, EnrichmentSettings, EvaluationSettings
from biojepa.guides import GuideAssignment
from biojepa.models import ABLATION_MODELS, known_models
from biojepa.pairing import PairSettings
from biojepa.preprocess import PreprocessSettings
from biojepa.raw import ScreenSource
from biojepa.schemes import COMBINATION_PROTOCOLS
from biojepa.simulate import SimulatorSettings
from biojepa.training import TrainSettings
from biojepa.training.encoder_stage import EncoderSettings
from biojepa.training.predictor_stage import PredictorSettings
from workflow_case import REPO

SCHEMAS = REPO / "workflow" / "schemas"
MANUAL = REPO / "config" / "README.md"
SECTION_OF = {
    "download.simulator": SimulatorSettings,
    "preprocess": PreprocessSettings,
    "preprocess.guide_assignment": GuideAssignment,
    "pair": PairSettings,
    "train": TrainSettings,
    "train.encoder": EncoderSettings,
    "train.predictor": PredictorSettings,
    "evaluate": EvaluationSettings,
    "evaluate.enrichment": EnrichmentSettings,
    "evaluate.distribution": DistributionSettings,
}
# Keys of a section that its settings class does not have, with where they are used.
ELSEWHERE = {"train": {"baselines"}}
TABLE = (
    "dataset\tsource\tnetworks\tpathways\tcell_type_column\tbatch_column\n"
    "demo\tsimulator\t{download}/network.tsv.gz\t\tcell_line\tbatch\n"
    "mine\t{data_dir}/mine.h5ad\t\t\t\t\n"
    "web\thttps://example.org/a/web_screen.h5ad?x=1\t\t\t\t\n"
)


def schema_of(name="config"):
    return yaml.safe_load((SCHEMAS / f"{name}.schema.yaml").read_text(encoding="utf-8"))


def leaves(schema, prefix=""):
    """Yield every key that holds a value, with its part of the schema."""
    for key, part in schema["properties"].items():
        if "properties" in part:
            yield from leaves(part, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", part


def section(schema, path):
    for key in path.split("."):
        schema = schema["properties"][key]
    return schema


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a table of datasets."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "datasets.tsv").write_text(TABLE, encoding="utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.h5ad").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(**config):
    return load_config({"run": ["demo"], **config}, SCHEMAS)


@pytest.mark.parametrize("path", SECTION_OF)
def test_defaults_of_the_schema_are_those_of_the_code(path):
    part, cls = section(schema_of(), path), SECTION_OF[path]
    defaults = {}
    for entry in fields(cls):
        default = entry.default_factory() if entry.default is MISSING else entry.default
        if not hasattr(default, "__dataclass_fields__"):
            defaults[entry.name] = list(default) if isinstance(default, tuple) else default
    nested = {key for key, sub in part["properties"].items() if "properties" in sub}
    written = {key: sub["default"] for key, sub in part["properties"].items() if key not in nested}
    for key in ELSEWHERE.get(path, ()):
        written.pop(key, None)
    assert written == defaults


def test_columns_of_the_table_are_the_fields_of_a_screen_and_where_it_comes_from():
    columns = set(schema_of("datasets")["properties"])
    others = {"source", "checksum", "networks", "gene_sets", "gene_tables", "responses", "pathways"}
    assert columns - others == {entry.name for entry in fields(ScreenSource)} - {"path"}
    assert others < columns


def test_every_key_says_what_it_is():
    for name in ("config", "datasets"):
        missing = [key for key, part in leaves(schema_of(name)) if len(part.get("description", "")) < 8]
        assert missing == []


def test_every_key_but_run_has_a_default_and_it_is_valid(folder):
    without = [key for key, part in leaves(schema_of()) if "default" not in part]
    assert without == ["run"]
    # A default that its own schema refuses would surprise who writes it down.
    full = load().content
    assert load_config(deepcopy(full), SCHEMAS).content == full


def test_the_manual_has_every_key_and_no_other():
    if not MANUAL.is_file():
        pytest.fail(f"{MANUAL} is missing")
    listed = re.findall(r"^\| `([a-z0-9_.]+)` \|", MANUAL.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(key for key, _ in leaves(schema_of()))


def test_the_manual_gives_the_defaults_of_the_schema():
    rows = re.findall(
        r"^\| `([a-z0-9_.]+)` \| `([^`]*)` \|", MANUAL.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    defaults = {key: part.get("default") for key, part in leaves(schema_of())}
    assert len(rows) > 90
    assert {key: yaml.safe_load(value) for key, value in rows} == {key: defaults[key] for key, _ in rows}


def test_the_manual_names_every_column_and_every_model():
    text = MANUAL.read_text(encoding="utf-8")
    assert re.findall(r"^\| \*\*([a-z_]+)\*\* \|", text, flags=re.MULTILINE) == list(
        schema_of("datasets")["properties"]
    )
    named = set(re.findall(r"\*\*([a-z_]+)\*\*", text.split("## Models", 1)[1]))
    assert set(known_models()) <= named


def test_models_of_the_schema_are_those_of_the_code():
    part = schema_of()["properties"]["models"]
    assert part["items"]["else"]["enum"] == known_models()


def test_the_ablation_config_is_valid_and_complete_and_like_the_configs_of_its_datasets(monkeypatch):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr("biojepa.config.Source.missing_files", lambda source: [])

    def read(name):
        content = yaml.safe_load((REPO / "config" / name).read_text(encoding="utf-8"))
        return load_config(content, SCHEMAS)

    ablation = read("examples/ablation.yaml")
    assert set(ABLATION_MODELS) < set(ablation.models)
    assert ablation.seeds == [0]
    singly = {"demo": "config.yaml", "norman_tiny": "examples/norman_tiny.yaml"}
    singly["papalexi"] = "examples/papalexi.yaml"
    assert ablation.datasets == list(singly)
    for dataset, name in singly.items():
        assert ablation.folds(dataset, "perturbation") == [0, 1, 2, 3, 4]
        alone = read(name)
        assert ablation.source(dataset) == alone.source(dataset)
        # The demo is quick: a shorter training, fewer perturbations whose gene sets are compared.
        quick = {
            "train": {"encoder": {"steps": 300}, "predictor": {"steps": 200}},
            "evaluate": {"enrichment": {"max_perturbations": 12}},
        }
        for part in ("download", "preprocess", "pair", "train", "evaluate"):
            expected = ablation.settings(dataset, part)
            for section, keys in quick.get(part, {}).items() if dataset == "demo" else ():
                expected = {**expected, section: {**expected[section], **keys}}
            assert expected == alone.settings(dataset, part), (dataset, part)


def test_the_demo_config_is_valid(monkeypatch):
    monkeypatch.chdir(REPO)
    content = yaml.safe_load((REPO / "config/config.yaml").read_text(encoding="utf-8"))
    config = load_config(content, SCHEMAS)
    assert config.datasets == ["demo"]
    assert config.source("demo").is_simulated


def test_an_override_changes_one_dataset_and_one_key(folder):
    config = load(
        run=["demo", "mine"],
        preprocess={"target_sum": 500},
        overrides={"mine": {"preprocess": {"guide_assignment": {"min_umis": 9}}}},
    )
    changed, other = (config.settings(name, "preprocess") for name in ("mine", "demo"))
    assert changed["guide_assignment"] == {**asdict(GuideAssignment()), "min_umis": 9}
    assert other["guide_assignment"] == asdict(GuideAssignment())
    assert changed["target_sum"] == other["target_sum"] == 500


def test_folds_are_all_unless_chosen(folder):
    assert load().folds("demo", "perturbation") == [0, 1, 2, 3, 4]
    assert load(folds=[3]).folds("demo", "perturbation") == [3]
    assert load(overrides={"demo": {"pair": {"n_folds": 3}}}).folds("demo", "perturbation") == [0, 1, 2]


def test_every_scheme_has_its_own_folds(folder):
    schemes = ["perturbation", "gene", "combination", "context", "list"]
    pair = {"contexts": ["K562", "RPE1", "HEK"], "list": {"test": ["A"]}, "n_folds": 4}
    config = load(schemes=schemes, pair=pair)
    assert {scheme: config.n_folds("demo", scheme) for scheme in [*schemes, "none"]} == {
        "perturbation": 4, "gene": 4, "combination": 4, "context": 3, "list": 1, "none": 1
    }  # fmt: skip
    some = load(schemes=schemes, pair=pair, folds=[0, 2])
    assert {scheme: some.folds("demo", scheme) for scheme in schemes} == {
        "perturbation": [0, 2], "gene": [0, 2], "combination": [0, 2], "context": [0, 2], "list": [0]
    }  # fmt: skip
    (folder / "held_out.tsv").touch()
    assert load(schemes=["list"], pair={"list": "held_out.tsv"}).folds("demo", "list") == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schemes": ["genes"]},
            r"key schemes\.0: 'genes' is not one of \['perturbation', 'gene'.* Did you mean gene\?$",
        ),
        (
            {"schemes": ["context"]},
            r"pair\.contexts: found nothing, though the scheme context is asked of demo; "
            r"expected .*obs\['cell_type'\].*contexts: \[K562, RPE1\]",
        ),
        ({"schemes": ["list"]}, r"pair\.list: found nothing, though the scheme list is asked of demo.*test:"),
        ({"schemes": ["list"], "pair": {"list": "lost.tsv"}}, r"pair\.list: no file lost\.tsv"),
        (
            {"schemes": ["list"], "pair": {"list": {"validation": ["A"]}}},
            r"key pair\.list: 'test' is a required property",
        ),
        (
            {"pair": {"list": {"tset": ["A"]}}},
            r"key pair\.list: unknown key pair\.list\.tset\. Did you mean test\?",
        ),
        ({"pair": {"list": {"test": []}}}, r"key pair\.list\.test: \[\] should be non-empty"),
        (
            {"pair": {"list": 5}},
            r"key pair\.list: found 5\. Expected: What the scheme list holds out: \{test",
        ),
        (
            {"schemes": ["list"], "pair": {"list": {"test": ["A+B", "C"], "validation": ["D", "B + A"]}}},
            r"^config, pair\.list: found A\+B under test and under validation; expected each",
        ),
        (
            {"schemes": ["context"], "pair": {"contexts": ["K562"]}, "run": ["mine"]},
            r"^config/datasets\.tsv, row mine, column cell_type_column: found nothing, though the scheme .*"
            r"pair\.context_column is cell_type\)",
        ),
        (
            {
                "schemes": ["context"],
                "pair": {"contexts": ["b1"], "context_column": "batch"},
                "run": ["demo", "mine"],
            },
            r"^config/datasets\.tsv, row mine, column batch_column: found nothing",
        ),
        (
            {"schemes": ["perturbation", "list"], "pair": {"list": {"test": ["A"]}}, "folds": [1]},
            r"folds: found \[1\]; expected a fold of the scheme list among them, 0 to 0 of demo",
        ),
        (
            {"schemes": ["list"], "pair": {"list": {"test": ["A"]}}, "folds": [0, 1]},
            r"folds: found \[1\]; expected 0 to 0, since the folds of the scheme list are 1",
        ),
        (
            {"schemes": ["gene"], "predict": ["KLF1"]},
            r"predict: found schemes \['gene'\]; expected .*perturb",
        ),
        ({"pair": {"combination_protocol": "halves"}}, r"combination_protocol: 'halves' is not one of"),
        ({"pair": {"min_cells_in_context": 1}}, r"min_cells_in_context: 1 is less than the minimum of 2"),
    ],
)
def test_schemes_without_what_defines_them_are_refused_before_the_first_job(folder, change, message):
    with pytest.raises(ConfigError, match=message):
        load(**change)


def test_protocols_of_the_schema_are_those_of_the_code():
    part = schema_of()["properties"]
    assert part["pair"]["properties"]["combination_protocol"]["enum"] == list(COMBINATION_PROTOCOLS)
    assert part["schemes"]["items"]["enum"] == [*SCHEMES, NO_SPLIT]


def test_an_unknown_pairing_strategy_is_refused_with_the_nearest_one(folder):
    assert schema_of()["properties"]["pair"]["properties"]["strategy"]["enum"] == list(STRATEGIES)
    with pytest.raises(ConfigError, match=r"pair\.strategy: 'mached' is not one of.* Did you mean matched\?"):
        load(pair={"strategy": "mached"})


def test_the_config_of_all_schemes_is_valid(monkeypatch):
    monkeypatch.chdir(REPO)
    content = yaml.safe_load((REPO / "config/examples/schemes.yaml").read_text(encoding="utf-8"))
    config = load_config(content, SCHEMAS)
    assert config.schemes == list(SCHEMES) and config.datasets == ["demo"]


def test_true_and_false_from_the_command_line_are_read(folder):
    assert load(archived="true").archived is True
    assert load(archived="False").archived is False
    with pytest.raises(ConfigError, match=r"key archived: 'perhaps' is not of type 'boolean'"):
        load(archived="perhaps")


def test_sources_know_where_their_files_are(folder):
    config = load(run=["demo", "mine", "web"])
    demo, mine, web = (config.source(name) for name in config.datasets)
    assert demo.path == "resources/datasets/demo/raw.h5ad"
    assert demo.raw_files == [demo.path]
    assert demo.networks == ["resources/datasets/demo/network.tsv.gz"]
    assert (mine.path, mine.downloads) == ("data/mine.h5ad", [])
    assert web.downloads == [web.path] == ["resources/datasets/web/web_screen.h5ad"]
    assert config.pattern("simulated") == "demo"
    assert config.pattern("downloaded") == "web"
    assert load().pattern("downloaded") == "(?!)"


A, B = "md5:" + "a" * 32, "sha256:" + "b" * 64
HERE = "resources/datasets/x"
MTX = ("m_matrix.mtx.gz", "m_genes.tsv.gz", "m_barcodes.tsv.gz")
CELLS = {"cell_metadata": "{download}/c.csv"}
GEO = "https://a.org/get/?acc=GSE1&file=m%5F{0}#{0}"


@pytest.mark.parametrize(
    ("fields", "path", "raw", "fetched", "kinds"),
    [
        ({"source": "{data_dir}/mine.h5ad"}, "data/mine.h5ad", None, [], ""),
        ({"source": "file://data/mine.h5ad"}, "data/mine.h5ad", None, [], ""),
        (
            {"source": "data/mine.h5ad", "checksum": A},
            f"{HERE}/mine.h5ad",
            None,
            [("mine.h5ad", "data/mine.h5ad", A)],
            "downloaded",
        ),
        (
            {"source": "https://a.org/files/77#a.h5", "checksum": B},
            f"{HERE}/a.h5",
            None,
            [("a.h5", "https://a.org/files/77#a.h5", B)],
            "downloaded",
        ),
        (
            {"source": "https://a.org/a.h5ad.gz"},
            f"{HERE}/unpacked/a.h5ad",
            None,
            [("a.h5ad.gz", "https://a.org/a.h5ad.gz", "")],
            "downloaded unpacked_file",
        ),
        (
            {"source": "https://a.org/a.tar.gz", "format": "h5ad"},
            f"{HERE}/unpacked/a.h5ad",
            None,
            [("a.tar.gz", "https://a.org/a.tar.gz", "")],
            "downloaded unpacked_file",
        ),
        (
            {"source": "https://a.org/a.h5ad.zip", "format": "h5ad"},
            f"{HERE}/unpacked/a.h5ad",
            None,
            [("a.h5ad.zip", "https://a.org/a.h5ad.zip", "")],
            "downloaded unpacked_file",
        ),
        (
            {"source": "https://a.org/a.zip; data/c.csv", "checksum": f";{A}", **CELLS},
            f"{HERE}/unpacked",
            None,
            [("a.zip", "https://a.org/a.zip", ""), ("c.csv", "data/c.csv", A)],
            "downloaded unpacked_folder",
        ),
        (
            {"source": "https://a.org/a.tar;https://a.org/b.tgz", "checksum": f"{A};"},
            f"{HERE}/unpacked",
            None,
            [("a.tar", "https://a.org/a.tar", A), ("b.tgz", "https://a.org/b.tgz", "")],
            "downloaded unpacked_folder",
        ),
        (
            {"source": ";".join(GEO.format(name) for name in MTX)},
            HERE,
            [f"{HERE}/{name}" for name in MTX],
            [(name, GEO.format(name), "") for name in MTX],
            "downloaded",
        ),
        (
            {"source": "https://a.org/a.h5ad;https://a.org/g.csv", "guide_table": "{download}/g.csv"},
            f"{HERE}/a.h5ad",
            None,
            [("a.h5ad", "https://a.org/a.h5ad", ""), ("g.csv", "https://a.org/g.csv", "")],
            "downloaded",
        ),
    ],
)  # fmt: skip
def test_files_of_a_row_and_what_is_read_of_them(folder, fields, path, raw, fetched, kinds):
    (folder / "data/c.csv").touch()
    lines = ["\t".join(["dataset", *fields]), "\t".join(["x", *fields.values()])]
    (folder / "config/datasets.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = load(run=["x"])
    source = config.source("x")
    assert source.path == source.screen["path"] == path
    assert source.raw_files == (raw or [path])
    files = {name: source.file(name) for name, *_ in fetched}
    assert [(name, file.address, file.checksum) for name, file in files.items()] == fetched
    made = [f"{HERE}/{name}" for name, *_ in fetched]
    assert source.downloads == made + ([path] if "unpacked" in path else [])
    found = [
        k for k in ("simulated", "downloaded", "unpacked_file", "unpacked_folder") if config.pattern(k) == "x"
    ]
    assert found == kinds.split()
    names = [name for name in (*MTX, "mine.h5ad", "unpacked") if re.fullmatch(config.file_pattern(), name)]
    assert names == [name for name, *_ in fetched if name in (*MTX, "mine.h5ad")]


def test_a_list_of_genes_that_two_screens_share_makes_them_not_the_same(folder):
    genes, one, two = (f"https://a.org/{name}" for name in ("genes.tsv", "one.mtx", "two.mtx"))
    rows = {"demo": f"{one};{genes}", "other": f"{genes};{two}"}
    with_responses(folder, ("demo", rows["demo"], "other"), ("other", rows["other"], ""))
    assert load().source("demo").responses == ["other"]
    with_responses(folder, ("demo", rows["demo"], "other"), ("other", f"{rows['other']};{one}", ""))
    with pytest.raises(ConfigError, match="other is the same screen"):
        load()


def with_responses(folder, *rows):
    """Write a table whose rows are dataset, source and responses."""
    lines = ["dataset\tsource\tresponses", *("\t".join(row) for row in rows)]
    (folder / "config/datasets.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_screens_whose_responses_are_used_are_known_but_not_run(folder):
    with_responses(folder, ("demo", "simulator", "mine;third"), ("mine", "{data_dir}/mine.h5ad", "third"),
                   ("third", "https://example.org/third.h5ad", ""), ("idle", "simulator", ""))  # fmt: skip
    config = load(preprocess={"target_sum": 500}, overrides={"mine": {"preprocess": {"target_sum": 9}}})
    assert (config.datasets, config.all_datasets) == (["demo"], ["demo", "mine", "third"])
    assert config.source("demo").responses == ["mine", "third"]
    assert [config.settings(name, "preprocess")["target_sum"] for name in ("demo", "mine")] == [500, 9]
    assert config.pattern("downloaded") == "third"
    # Of a screen that is not run, nothing but its cells is needed.
    assert load(run=["mine"]).all_datasets == ["mine", "third"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("demo", "simulator", "demo")], r"row demo, column responses: found the dataset itself"),
        (
            [("demo", "simulator", "mine"), ("mima", "data/mine.h5ad", "")],
            r"row demo, column responses: mine is in 0 rows of .*expected one of demo, mima\.",
        ),
        (
            [("demo", "data/mine.h5ad", "twin"), ("twin", "{data_dir}/mine.h5ad", "")],
            r"row demo, column responses: twin is the same screen.*given away",
        ),
        (
            [("demo", "data/mine.h5ad", "twin"), ("twin", "./data/../data/mine.h5ad", "")],
            r"row demo, column responses: twin is the same screen",
        ),
        (
            [("demo", "data/link.h5ad", "twin"), ("twin", "data/mine.h5ad", "")],
            r"row demo, column responses: twin is the same screen",
        ),
        (
            [("demo", "https://a.org/x.h5ad", "twin"), ("twin", "http://A.org/x.h5ad", "")],
            r"row demo, column responses: twin is the same screen",
        ),
        (
            [("demo", "https://a.org/x.h5ad", "twin"), ("twin", "resources/datasets/demo/x.h5ad", "")],
            r"row demo, column responses: twin is the same screen",
        ),
        (
            [("demo", "simulator", "twin"), ("twin", "simulator", "")],
            r"row demo, column responses: twin is the same screen",
        ),
        (
            [("demo", "simulator", "twin;other;twin"), ("twin", "data/mine.h5ad", "")],
            r"row demo, column responses: found twin twice; expected each dataset once",
        ),
        (
            [("demo", "simulator", "lost"), ("lost", "data/lost.h5ad", "")],
            r"row lost, column source: no file data/lost\.h5ad",
        ),
    ],
    ids=[
        "itself",
        "unknown",
        "same file",
        "same path spelled otherwise",
        "link",
        "same address",
        "its own download",
        "same simulation",
        "named twice",
        "missing file",
    ],
)
def test_responses_of_the_screen_itself_or_of_an_unknown_one_are_refused(folder, rows, message):
    with_responses(folder, *rows)
    (folder / "data/link.h5ad").symlink_to("mine.h5ad")
    with pytest.raises(ConfigError, match=message):
        load()


MD5 = "md5:" + "a" * 32


@pytest.mark.parametrize(
    ("sums", "refused"),
    [(("md5:" + "a" * 32,) * 2, True), (("md5:" + "a" * 32, ""), False), (("", ""), False)],
)
def test_files_of_one_checksum_are_one_screen_wherever_they_lie(folder, sums, refused):
    rows = [("demo", "https://a.org/x.h5ad", sums[0], "twin"), ("twin", "https://b.org/y.h5ad", sums[1], "")]
    lines = ["dataset\tsource\tchecksum\tresponses", *("\t".join(row) for row in rows)]
    (folder / "config/datasets.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if refused:
        with pytest.raises(ConfigError, match="twin is the same screen"):
            load()
    else:
        assert load().source("demo").responses == ["twin"]


@pytest.mark.parametrize(
    ("networks", "gene_sets", "tables", "message"),
    [
        (
            "{data_dir}/p.tsv",
            "{data_dir}/p.gmt",
            "",
            r"row demo: data/p\.gmt: found a second .*'p'",
        ),
        (
            "{data_dir}/p.tsv",
            "",
            "{data_dir}/p.csv",
            r"row demo: data/p\.csv: found a second .*'p'",
        ),
        ("{data_dir}/p.tsv;{data_dir}/p.tsv", "", "", "a second source called 'p', after data/p.tsv"),
        ("", "{data_dir}/gene.gmt", "", r"row demo: data/gene\.gmt: found a source called 'gene', a name"),
        ("{data_dir}/p.tsv", "{data_dir}/p.q.gmt", "{data_dir}/q.csv", None),
    ],
)
def test_sources_that_would_share_a_name_are_refused_before_the_first_job(
    folder, networks, gene_sets, tables, message
):
    text = "dataset\tsource\tnetworks\tgene_sets\tgene_tables\n"
    text += f"demo\tsimulator\t{networks}\t{gene_sets}\t{tables}\n"
    (folder / "config/datasets.tsv").write_text(text, encoding="utf-8")
    for name in ("p.tsv", "p.gmt", "p.csv", "p.q.gmt", "q.csv", "gene.gmt"):
        (folder / "data" / name).touch()
    if message is None:
        assert load().datasets == ["demo"]
    else:
        with pytest.raises(ConfigError, match=message):
            load()


def test_two_simulations_that_differ_may_inform_each_other(folder):
    with_responses(folder, ("demo", "simulator", "twin"), ("twin", "simulator", "demo"))
    other = {"twin": {"download": {"simulator": {"seed": 1}}}}
    assert load(run=["demo", "twin"], overrides=other).all_datasets == ["demo", "twin"]


def test_another_screen_is_a_model_of_the_datasets_that_name_one(folder):
    with_responses(folder, ("demo", "simulator", "mine"), ("mine", "{data_dir}/mine.h5ad", ""))
    assert "other_screen" in load().models and "other_screen" in load().simple_models("demo")
    models = ["mean", "other_screen", "biojepa", "knn"]
    both = load(run=["demo", "mine"], models=models)
    assert both.simple_models("demo") == ["mean", "other_screen", "knn"]
    assert both.simple_models("mine") == ["mean", "knn"]
    assert load(run=["mine"], models=models).simple_models("mine") == ["mean", "knn"]
    # The record of a dataset names the models that it has.
    named = {name: "other_screen" in both.resolved(name)["models"] for name in both.datasets}
    assert named == {"demo": True, "mine": False}
    tested = {"overrides": {"demo": {"evaluate": {"model": "other_screen"}}}}
    assert load(models=models, **tested).settings("demo", "evaluate")["model"] == "other_screen"
    message = r"row mine, column responses: found no other screen, though evaluate\.model is other_screen"
    with pytest.raises(ConfigError, match=message):
        load(run=["demo", "mine"], models=models, evaluate={"model": "other_screen"})


def test_an_archive_needs_none_of_the_files_that_led_to_it(folder):
    text = "dataset\tsource\tnetworks\nlost\tdata/lost.h5ad\tdata/lost.tsv\n"
    (folder / "config/datasets.tsv").write_text(text, encoding="utf-8")
    models = ["mean", "biojepa", {"name": "theirs", "predictions": "lost/{fold}.h5ad"}]
    with pytest.raises(ConfigError, match=r"no file data/lost\.h5ad"):
        load(run=["lost"], models=models)
    assert load(run=["lost"], models=models, archived=True).archived
    with pytest.raises(ConfigError, match=r"key archived: 'yes' is not of type 'boolean'"):
        load(run=["lost"], archived="yes")


def test_gene_tables_must_exist_and_may_hold_placeholders(folder):
    text = "dataset\tsource\tgene_tables\ndemo\tsimulator\t{data_dir}/esm.tsv; {data_dir}/text.csv\n"
    (folder / "config/datasets.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"column gene_tables: no file data/esm\.tsv"):
        load()
    for name in ("esm.tsv", "text.csv"):
        (folder / "data" / name).touch()
    assert load().source("demo").gene_tables == ["data/esm.tsv", "data/text.csv"]


@pytest.mark.parametrize("predict", [None, "all", ["KLF1", "B+A"], "data/genes.txt"])
def test_what_to_predict_is_nothing_a_list_a_file_or_all(folder, predict):
    (folder / "data/genes.txt").write_text("KLF1\n", encoding="utf-8")
    assert load(predict=predict).predict == predict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predict": []}, r"key predict: \[\] should be non-empty"),
        ({"predict": [7]}, r"key predict\.0: 7 is not of type 'string'"),
        ({"predict": ["A++B", "KLF1", "C+C"]}, r"'A\+\+B' lacks a gene; 'C\+C' names a gene twice"),
        ({"predict": "KLF1"}, r"key predict: found no file KLF1; expected a list.*predict: \[KLF1\]"),
        (
            {"predict": "all", "evaluate": {"model": "ridge"}},
            r"predict: the model under test, evaluate\.model, is ridge; expected a trained model",
        ),
        (
            {
                "predict": ["KLF1"],
                "evaluate": {"model": "pca_predictor_noprior"},
                "models": ["mean", "pca_predictor", "pca_predictor_noprior"],
            },
            r"is pca_predictor_noprior, which uses no prior source.*expected a model with priors",
        ),
        (
            {"predict": ["KLF1"], "train": {"stages": "joint"}},
            r"is biojepa, whose size of effects only held-out perturbations can set; expected .*stages: two",
        ),
        (
            {
                "predict": ["KLF1"],
                "evaluate": {"model": "pca_predictor"},
                "models": ["mean", "pca_predictor"],
            },
            r"is pca_predictor, whose size of effects only held-out perturbations can set",
        ),
        ({"predict": "all", "run": ["mine"]}, r"row mine: no prior source, though predict is all"),
        ({"predict": ["all"]}, r"'all' is no gene .*write predict: all"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_the_first_job(folder, change, message):
    with pytest.raises(ConfigError, match=message):
        load(**change)


def test_a_screen_without_prior_files_can_be_asked_for_what_it_perturbs_or_by_coexpression(folder):
    assert load(run=["mine"], predict=["A+B"]).predict == ["A+B"]
    assert load(run=["mine"], predict="all", pair={"coexpression": True}).predict == "all"


def test_the_record_of_a_run_says_what_was_asked(folder):
    assert load(predict=["KLF1", "B+A"]).resolved("demo")["predict"] == ["KLF1", "B+A"]
    assert load().resolved("demo")["predict"] is None


def test_a_folder_is_read_file_by_file(folder):
    screen = folder / "data" / "screen"
    screen.mkdir()
    for name in ("matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz"):
        (screen / name).touch()
    (folder / "config/datasets.tsv").write_text(
        "dataset\tsource\tguide_table\nten\t{data_dir}/screen\t{data_dir}/mine.h5ad\n", encoding="utf-8"
    )
    source = load(run=["ten"]).source("ten")
    assert source.raw_files == [
        "data/screen/barcodes.tsv.gz",
        "data/screen/features.tsv.gz",
        "data/screen/matrix.mtx.gz",
    ]
    assert source.table("guide_table") == ["data/mine.h5ad"]
    assert source.table("cell_metadata") == []


def test_notes_of_snakemake_and_of_downloads_in_a_folder_are_no_inputs(folder):
    raw = folder / "raw_folder"
    raw.mkdir()
    for name in ("screen.loom", ".snakemake_timestamp", "a.part", "a.part.etag", "a.sha256", ".x.9.partial"):
        (raw / name).touch()
    assert Source(row_of(raw)).raw_files == [f"{raw}/screen.loom"]


def test_a_matrix_of_guides_in_the_folder_is_an_input_of_its_own(folder):
    raw = folder / "raw_folder"
    for place in (raw, raw / "guides"):
        place.mkdir()
        for name in ("matrix.mtx", "features.tsv", "barcodes.tsv"):
            (place / name).touch()
    names = [f"{raw}/{name}" for name in ("barcodes.tsv", "features.tsv", "matrix.mtx")]
    assert Source(row_of(raw, guide_counts=f"{raw}/guides")).raw_files == names
    assert len(Source(row_of(raw)).raw_files) == 6


def row_of(source, **fields):
    """Return a row of the table of datasets with empty fields."""
    columns = ("checksum", "format", "guide_counts")
    return dict.fromkeys((*columns, *FILE_COLUMNS), "") | {"dataset": "mine", "source": str(source)} | fields


def test_of_the_output_of_cell_ranger_only_what_is_read_is_an_input(folder):
    outs = folder / "data" / "outs"
    names = ("matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz")
    for place in ("filtered_feature_bc_matrix", "raw_feature_bc_matrix", "analysis"):
        (outs / place).mkdir(parents=True)
        for name in names:
            (outs / place / name).touch()
    (outs / "crispr_analysis").mkdir()
    for name in ("possorted_genome_bam.bam", "molecule_info.h5", "crispr_analysis/calls.csv"):
        (outs / name).touch()
    (folder / "config/datasets.tsv").write_text(
        "dataset\tsource\tguide_table\tguide_calls\n"
        "ten\t{data_dir}/outs\t{data_dir}/mine.h5ad\t{data_dir}/outs/crispr_analysis/calls.csv\n",
        encoding="utf-8",
    )
    source = load(run=["ten"]).source("ten")
    wanted = sorted(f"data/outs/filtered_feature_bc_matrix/{name}" for name in names)
    assert source.raw_files == wanted
    assert source.path == "data/outs"
    assert source.table("guide_calls") == ["data/outs/crispr_analysis/calls.csv"]
    (outs / "crispr_analysis/calls.csv").unlink()
    with pytest.raises(
        ConfigError, match=r"column guide_calls: no file data/outs/crispr_analysis/calls\.csv"
    ):
        load(run=["ten"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian": {}}, r"^config: unknown key trian\. Did you mean train\?$"),
        ({"dataset": "norman2019"}, r"unknown key dataset\. Did you mean run: \[norman2019\]\?$"),
        ({"pair": {"nfolds": 3}}, r"^config, key pair: unknown key pair\.nfolds\. Did you mean n_folds\?$"),
        ({"embed": {"zzz": 1}}, r"unknown key embed\.zzz\. Known keys: umap_seed\."),
        (
            {"pair": {"n_folds": "three"}},
            r"^config, key pair\.n_folds: 'three' is not of type 'integer'\. Folds",
        ),
        ({"pair": {"n_folds": 1}}, r"key pair\.n_folds: 1 is less than the minimum of 2"),
        ({"pair": {"restart": 1.0}}, r"key pair\.restart: 1\.0 is greater than or equal to"),
        ({"evaluate": {"draws": 5}}, r"key evaluate\.draws: 5 is less than the minimum of 100"),
        ({"train": {"device": "gpu"}}, r"key train\.device: 'gpu' is not one of \['auto', 'cpu', 'cuda'\]"),
        ({"preprocess": None}, r"key preprocess: None is not of type 'object'"),
        ({"run": []}, r"key run: \[\] should be non-empty"),
        ({"run": "demo"}, r"key run: 'demo' is not of type 'array'"),
        ({"run": ["demo", "demo"]}, r"key run: \['demo', 'demo'\] has non-unique elements"),
        ({"run": ["demmo"]}, r"run: demmo is in 0 rows of config/datasets\.tsv.*Did you mean demo\?"),
        ({"models": ["mean", "gears"]}, r"key models\.1: 'gears' is not one of"),
        (
            {"models": ["ridge"]},
            r"^config, key models: found no mean; expected it in the list\. .*training mean is always needed",
        ),
        ({"models": ["mean", "rigde"]}, r"key models\.1: 'rigde' is not one of .*\. Did you mean ridge\?$"),
        ({"train": {"device": "gpus"}}, r"'gpus' is not one of \['auto', 'cpu', 'cuda'\]\. auto, .*cuda\.$"),
        ({"train": {"device": "cud"}}, r"key train\.device: 'cud' is .* Did you mean cuda\?$"),
        ({"evaluate": {"baselines": ["rigde"]}}, r"baselines: found rigde; .*\. Did you mean ridge\?$"),
        (
            {"evaluate": {"enrichment": {"models": ["kernel_rige"]}}},
            r"^config, evaluate\.enrichment\.models: found kernel_rige; .*Did you mean kernel_ridge\?$",
        ),
        (
            {"evaluate": {"distribution": {"models": ["biojepa", "zzz"]}}, "models": ["mean", "biojepa"]},
            r"^config, evaluate\.distribution\.models: found zzz; .* Models of this config: mean, biojepa\.$",
        ),
        (
            {"overrides": {"demo": {"evaluate": {"baselines": ["addtive"]}}}},
            r"evaluate\.baselines: found addtive; .*Did you mean additive\?",
        ),
        (
            {"models": ["mean", "shuffled_priors", "pca_predictor"], "evaluate": {"model": "pca_predictor"}},
            "shuffled_priors reuses the encoder of biojepa; add biojepa to the list",
        ),
        (
            {"models": ["mean", "biojepa", "biojepa_knn", "untrained_ridge_noprior"]},
            "models: untrained_ridge_noprior reuses the encoder of untrained_predictor; "
            "add untrained_predictor to the list",
        ),
        (
            {"train": {"encoder": {"embed_dim": 65}}},
            r"train\.encoder\.embed_dim: found 65; expected a multiple of the 4 heads",
        ),
        (
            {"train": {"encoder": {"mask_low": 0.9, "mask_high": 0.5}}},
            r"train\.encoder\.mask_low: found 0\.9; expected at most mask_high, 0\.5",
        ),
        ({"evaluate": {"model": "gears"}}, r"evaluate\.model: found gears; expected one of models"),
        ({"folds": [0, 7]}, r"^config, folds: found \[7\]; expected 0 to 4, since pair\.n_folds is 5$"),
        ({"folds": [-1]}, "key folds.0: -1 is less than the minimum of 0"),
        ({"datasets": "nowhere.tsv"}, r"^config, datasets: no file nowhere\.tsv\. Fix: name the table"),
        ({"overrides": {"dmeo": {}}}, r"overrides\.dmeo: expected a dataset of config/datasets\.tsv: demo"),
        ({"overrides": {"demo": {"folds": [1]}}}, r"config, overrides\.demo: unknown key folds"),
        (
            {"overrides": {"demo": {"pair": {"seeds": 1}}}},
            r"overrides\.demo, key pair: unknown key pair\.seeds",
        ),
        (
            {"data_dir": "lost", "run": ["mine"]},
            r"datasets\.tsv, row mine, column source: no file lost/mine\.h5ad",
        ),
    ],
)
def test_a_bad_config_is_refused_by_a_message_that_names_the_key(folder, change, message):
    with pytest.raises(ConfigError, match=message):
        load(**change)


MINE = {"name": "mine", "predictions": "mine/{dataset}_{split}_{fold}_{seed}.h5ad"}


def test_predictions_made_elsewhere_are_a_model_under_their_name(folder):
    (folder / "mine").mkdir()
    for fold, seed in ((0, 1), (0, 4), (2, 1), (2, 4)):
        (folder / f"mine/demo_perturbation_{fold}_{seed}.h5ad").touch()
    (folder / "mine/one.h5ad").touch()
    config = load(
        models=["mean", MINE, {"name": "one", "predictions": "mine/one.h5ad"}],
        folds=[0, 2],
        seeds=[1, 4],
        evaluate={"model": "mine"},
    )
    assert config.models == ["mean", "mine", "one"]
    assert list(config.user_models) == ["mine", "one"]
    mine, one = config.user_models.values()
    assert (mine.seeds([1, 4]), one.seeds([1, 4])) == ([1, 4], [0])
    assert mine.path("demo", "perturbation", 2, 4) == "mine/demo_perturbation_2_4.h5ad"
    assert config.user_files("one", "demo") == ["mine/one.h5ad"]
    assert len(config.user_files("mine", "demo")) == 4


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{**MINE, "name": "my model"}], r"key models\.1\.name: 'my model' does not match"),
        ([{**MINE, "name": "<b>"}], r"key models\.1\.name: '<b>' does not match"),
        ([{"name": "mine"}], r"key models\.1: 'predictions' is a required property"),
        ([{**MINE, "seed": 1}], r"key models\.1: unknown key models\.1\.seed"),
        ([{**MINE, "predictions": "mine.csv"}], r"key models\.1\.predictions: 'mine\.csv' does not match"),
        ([{**MINE, "name": "ridge"}], r"found ridge as the name of predictions made elsewhere"),
        ([{**MINE, "name": "duplicate"}], r"found duplicate as the name of predictions made elsewhere"),
        ([{**MINE, "name": "oracle"}], r"found oracle as the name"),
        ([{**MINE, "name": "pair"}], r"found pair as the name"),
        ([MINE, {**MINE, "predictions": "b.h5ad"}], r"found mine twice; expected each name once"),
        (["ridge", {**MINE, "name": "ridge"}], r"found ridge twice"),
        (
            [{**MINE, "predictions": "{data}/{fold}.h5ad"}],
            r"models, mine: found the placeholder \{data\}; expected any of \{dataset\}, \{split\}",
        ),
    ],
)
def test_unusable_predictions_made_elsewhere_are_refused_before_any_job(folder, entries, message):
    with pytest.raises(ConfigError, match=message):
        load(models=["mean", *entries], evaluate={"model": "mean"})


def test_files_of_predictions_made_elsewhere_may_be_missing_until_they_are_needed(folder):
    (folder / "there.h5ad").touch()
    (folder / "mine").mkdir()
    (folder / "mine/demo_gene_0_0.h5ad").touch()
    there = {"name": "there", "predictions": "there.h5ad"}
    many = {"name": "many", "predictions": "{split}/{fold}/{seed}.h5ad"}
    settings = {"evaluate": {"model": "mine"}, "schemes": ["gene", "none"]}
    config = load(models=["mean", MINE, there, many], folds=[0, 2], seeds=list(range(6)), **settings)
    # MINE names seeds; what it has for the first fold and seed is there.
    first, second, fix = config.missing_predictions().split("\n")
    wanted = [f"mine/demo_gene_{fold}_{seed}.h5ad" for fold in (0, 2) for seed in range(6)][1:]
    assert first == f"config, models, mine: no file {', '.join(wanted[:10])} and 1 more"
    wanted = [f"gene/{fold}/{seed}.h5ad" for fold in (0, 2) for seed in range(6)]
    assert second == f"config, models, many: no file {', '.join(wanted[:10])} and 2 more"
    assert "target paired" in fix and "{fold}" in fix
    assert load(models=["mean", there], evaluate={"model": "there"}).missing_predictions() == ""


def test_nothing_held_out_is_a_scheme_without_evaluation(folder):
    assert load().evaluated_schemes == load().schemes == ["perturbation"]
    config = load(schemes=["gene", "none"], folds=[2])
    assert config.evaluated_schemes == ["gene"]
    assert (config.folds("demo", "gene"), config.folds("demo", "none")) == ([2], [0])
    assert load(schemes=["none"], folds=[2]).evaluated_schemes == []
    with pytest.raises(
        ConfigError, match=r"^config, folds: found \[7\]; expected 0 to 4, since pair\.n_folds"
    ):
        load(schemes=["none", "gene"], folds=[7])


def test_models_of_the_evaluation_may_be_references_or_made_elsewhere(folder):
    names = ["duplicate", "oracle", "mine", "multihot"]
    settings = {"baselines": names, "enrichment": {"models": names}, "distribution": {"models": names}}
    config = load(models=["mean", "biojepa", MINE], evaluate=settings)
    assert config.settings("demo", "evaluate")["baselines"] == names


def test_a_problem_of_every_dataset_is_told_once(folder):
    with pytest.raises(ConfigError) as caught:
        load(run=["demo", "mine"], evaluate={"baselines": ["rigde"]})
    assert str(caught.value).count("rigde") == 1


def test_contexts_may_come_from_either_column(folder):
    for column in ("cell_type", "batch"):
        pair = {"contexts": ["a"], "context_column": column}
        assert load(schemes=["context"], pair=pair).folds("demo", "context") == [0]
    pair = {"list": {"test": ["A+B"], "validation": ["A", "B"]}}
    assert load(schemes=["list"], pair=pair).folds("demo", "list") == [0]


def test_a_model_made_elsewhere_cannot_predict_what_the_config_asks_for(folder):
    (folder / "mine.h5ad").touch()
    entry = {"name": "mine", "predictions": "mine.h5ad"}
    with pytest.raises(ConfigError, match=r"config, predict: .*is mine; expected a trained"):
        load(models=["mean", entry], evaluate={"model": "mine"}, predict=["G1"])


def test_all_problems_are_told_at_once(folder):
    with pytest.raises(ConfigError) as caught:
        load(trian={}, pair={"n_folds": 0}, train={"device": "gpu"})
    text = str(caught.value)
    assert text.startswith("several problems:\n- ")
    assert all(part in text for part in ("trian", "pair.n_folds", "train.device"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "dataset\tsource\ndemo\tsimulator\t\tmore\n",
            r"row demo: found \['more'\] beyond the last column; expected 2 fields. Fix: name the column",
        ),
        (
            "dataset,source\ndemo,simulator\n",
            "found columns.*expected a column dataset. Fix: separate columns by tabs",
        ),
        (
            "dataset\tsource\tsorce\ndemo\tsimulator\tx\n",
            r"row demo: unknown key sorce\. Did you mean source\?",
        ),
        ("dataset\tsource\ndemo\t\n", "row demo: 'source' is a required property"),
        ("dataset\tsource\ndemo\tsimulator\ndemo\tsimulator\n", "demo is in 2 rows of"),
        (
            "dataset\tsource\tchecksum\ndemo\thttps://a.org/b\t123\n",
            "row demo, key checksum: '123' does not match",
        ),
        (
            "dataset\tsource\tperturbation_type\ndemo\tsimulator\tCRISPR\n",
            "perturbation_type: 'CRISPR' is not one of",
        ),
        (
            "dataset\tsource\ndemo\thttps://a.org/..\n",
            r"row demo, column source: https://a\.org/\.\. does not end in a plain file name",
        ),
        (
            "dataset\tsource\ndemo\thttps://a.org/\n",
            r"row demo, column source: https://a\.org/ does not end in a plain file name",
        ),
        (
            "dataset\tsource\ndemo\thttps://a.org/matrix.mtx.gz\n",
            r"row demo, column source: matrix\.mtx\.gz alone is no screen\. Fix: list all its files, joined",
        ),
        (
            "dataset\tsource\ndemo\thttps://a.org/screen.rds\n",
            r"screen\.rds is of no kind that can be read; expected \.h5ad, \.h5, either with \.gz, or \.tar",
        ),
        (
            "dataset\tsource\tformat\ndemo\thttps://a.org/screen.h5ad\t10x_mtx\n",
            r"screen\.h5ad is one file, and the format 10x_mtx is three",
        ),
        (
            "dataset\tsource\ndemo\tftp://a.org/screen.h5ad\n",
            r"column source: ftp://a\.org/screen\.h5ad starts with ftp://; expected https://, http:// or",
        ),
        (
            "dataset\tsource\ndemo\thttps://a.org/%2e%2e%2fevil.h5ad\n",
            r"https://a\.org/%2e%2e%2fevil\.h5ad does not end in a plain file name",
        ),
        (
            "dataset\tsource\ndemo\thttps://a.org/123#../evil.h5ad\n",
            r"123#\.\./evil\.h5ad does not end in a plain file name .*one after #, such as https://a\.org/123#",
        ),
        (
            "dataset\tsource\ndemo\thttps://a.org/.hidden.h5ad\n",
            r"https://a\.org/\.hidden\.h5ad does not end in a plain file name",
        ),
        (
            "dataset\tsource\ndemo\thttps://a.org/x.h5ad.part\n",
            r"x\.h5ad\.part is the name of a file of our own",
        ),
        (
            "dataset\tsource\ndemo\thttps://a.org/Unpack\n",
            r"column source: Unpack is the name of a file of our own",
        ),
        (
            "dataset\tsource\ndemo\thttps://a.org/1#a.mtx;https://a.org/2#A.mtx\n",
            r"column source: A\.mtx is there twice; expected files of different names",
        ),
        (
            f"dataset\tsource\tchecksum\ndemo\thttps://a.org/x.h5ad\tmd5:{'0' * 32};md5:{'0' * 32}\n",
            r"column checksum: found 2 for 1 files; expected one for each in their order, joined by ;",
        ),
        (
            f"dataset\tsource\tchecksum\ndemo\tdata\tmd5:{'0' * 32}\n",
            r"column source: data is a folder, which has no checksum and goes with no other file",
        ),
        (
            "dataset\tsource\ndemo\tdata/lost.tar.gz\n",
            r"row demo, column source: no file data/lost\.tar\.gz",
        ),
        (
            "dataset\tsource\tguide_table\ndemo\thttps://a.org/g.csv\t{download}/g.csv\n",
            r"column source: found tables alone; expected the counts of the screen",
        ),
        (
            "dataset\tsource\tguide_table\ndemo\thttps://a.org/x.h5ad\t{download}/g.csv\n",
            r"column guide_table: found resources/datasets/demo/g\.csv, which is not among .* \(x\.h5ad\)",
        ),
        (
            "dataset\tsource\ndemo\thttps://a.org/x.tar;https://a.org/g.csv\n",
            r"found g\.csv beside an archive; expected archives alone, or other files .*\{download\}/g\.csv",
        ),
        (
            "dataset\tsource\ndemo\thttps://a.org/x.h5ad.gz;https://a.org/y.h5ad\n",
            r"found x\.h5ad\.gz beside other files; expected it alone, or decompressed",
        ),
        ("dataset\tsource\ndemo\t;\n", r"column source: found ';'; expected a file, folder or address"),
        (
            "dataset\tsource\tpathways\ndemo\tsimulator\tdata/mine.h5ad;data/mine.h5ad\n",
            "pathways: expected one GMT",
        ),
    ],
)
def test_a_bad_table_is_refused_by_a_message_that_names_the_row(folder, table, message):
    (folder / "config/datasets.tsv").write_text(table, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load()
