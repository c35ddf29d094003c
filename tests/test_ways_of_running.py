"""Two more ways of running the workflow, executed, with the same numbers: conda, and as a module.

``snakemake --use-conda`` runs every rule in an environment of what its file declares. As a module of another
workflow, from a local clone, it has that one's config and a prefix.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from local_conda.channel import build_channel, conda_name, conda_specifier
from local_conda.command import create, install_command
from workflow_case import CONFIGS, TINY, Pipeline, call, serve

# One fold and few models: what each rule imports does not depend on how many.
FEW = {"folds": [0], "models": ["mean", "no_change", "kernel_ridge", "biojepa", "biojepa_ridge"]}
ENVIRONMENTS = ("download", "preprocess", "train", "embed", "umap", "evaluate", "report", "qc_report")
# Rules that the few models and the simulated screen have no work for. They share the environment and the
# library with rules that are run.
NOT_RUN = {"other_screen", "user_predictions", "unevaluated", "predict"}

SNAKEFILE = """
configfile: "config/theirs.yaml"


module perturbations:
    snakefile:
        "{checkout}/workflow/Snakefile"
    config:
        config["perturbations"]
    prefix:
        "screen"


use rule * from perturbations as perturbations_*


rule best:
    default_target: True
    input:
        summary="screen/results/tiny/perturbation/evaluate/summary.tsv",
        page="screen/results/tiny/perturbation/report.html",
        made="screen/results/provenance.json",
    output:
        "best.txt",
    shell:
        "wc -l < {{input.summary}} > {{output}}"
"""


@dataclass
class CondaPipeline:
    """A pipeline that is run by a Snakemake which has nothing else beside it."""

    pipeline: Pipeline
    python: Path
    binaries: Path
    environments_folder: Path
    said: str = ""

    def run(self, *arguments, cores=8, config=FEW):
        extra = self.pipeline.folder / "config" / "few.yaml"
        extra.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [self.python, "-m", "snakemake", "--use-conda", "--cores", str(cores), *arguments]
        command += ["--conda-prefix", self.environments_folder]
        command += ["--snakefile", self.pipeline.checkout / "Snakefile", "--configfile", TINY, extra]
        path = f"{self.binaries}{os.pathsep}{os.defpath}"
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))
        } | {"PATH": path, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return call(command, self.pipeline.folder, environment)

    def environments(self):
        """Name of each environment file to the environment that was made of it."""
        made = {}
        for path in self.environments_folder.glob("*.yaml"):
            for name in ENVIRONMENTS:
                declared = (self.pipeline.checkout / "envs" / f"{name}.yaml").read_text(encoding="utf-8")
                if path.read_text(encoding="utf-8") == declared:
                    made[name] = path.with_suffix("")
        return made


@pytest.fixture(scope="module")
def channel(tmp_path_factory):
    return build_channel(tmp_path_factory.mktemp("channel"))


@pytest.fixture(scope="module")
def by_conda(channel, tmp_path_factory):
    """Run the tiny workflow with --use-conda, from an environment that holds Snakemake alone."""
    root = tmp_path_factory.mktemp("conda")
    create(root / "snakemake", ["python", "snakemake"], channel, root / "cache")
    checkout = Pipeline.copy_workflow(tmp_path_factory.mktemp("checkout"))
    made = CondaPipeline(
        Pipeline(checkout, tmp_path_factory.mktemp("by_conda")),
        root / "snakemake" / "bin" / "python",
        install_command(root / "conda", channel),
        root / "environments",
    )
    answer = made.run()
    assert answer.returncode == 0, answer.stdout
    made.said = answer.stdout
    return made


def imported(python, *modules):
    """Which of some modules a Python finds."""
    code = "import importlib.util, sys; print(*(m for m in sys.argv[1:] if importlib.util.find_spec(m)))"
    answer = subprocess.run(
        [python, "-c", code, *modules], capture_output=True, text=True, check=True, env={"PATH": os.defpath}
    )
    return set(answer.stdout.split())


@pytest.fixture(scope="module")
def downloaded(by_conda, tmp_path_factory):
    """Fetch and unpack an archive from a server on this machine, in the environment of the downloads."""
    served = tmp_path_factory.mktemp("served")
    content = b"any content: the rule after these reads it"
    with zipfile.ZipFile(served / "screen.zip", "w") as archive:
        archive.writestr("screen.h5ad", content)
    found = []
    with serve(served) as address:
        # With and without a format that is one file: the only one of the archive, or a folder.
        for form, path in (("h5ad", "unpacked/screen.h5ad"), ("10x_mtx", "unpacked")):
            folder = tmp_path_factory.mktemp("downloaded")
            table = f"dataset\tsource\tformat\ntiny\t{address}/screen.zip\t{form}\n"
            pipeline = Pipeline(by_conda.pipeline.checkout, folder)
            (folder / "config" / "datasets.tsv").write_text(table, encoding="utf-8")
            answer = replace(by_conda, pipeline=pipeline).run(f"resources/datasets/tiny/{path}")
            assert answer.returncode == 0, answer.stdout
            found.append((folder / "resources/datasets/tiny/unpacked/screen.h5ad").read_bytes())
    return [content] * 2, found


@pytest.mark.slow
def test_files_are_fetched_and_unpacked_in_the_environment_of_the_downloads(downloaded):
    sent, fetched = downloaded
    assert fetched == sent


@pytest.mark.slow
def test_every_rule_was_run_in_an_environment(by_conda, downloaded):
    rules = set()
    for path in (by_conda.pipeline.checkout / "workflow" / "rules").glob("*.smk"):
        rules |= set(re.findall(r"^(?:use )?rule (?:\w+ as )?(\w+)", path.read_text("utf-8"), re.MULTILINE))
    ran = set(re.findall(r"^(?:local)?rule (\w+):$", by_conda.said, re.MULTILINE)) | {
        "download",
        "unpack",
        "unpack_file",
    }
    assert len(rules) > 15 and rules - ran == NOT_RUN


@pytest.mark.slow
def test_snakemake_alone_is_enough_to_start(by_conda):
    heavy = ("pandas", "numpy", "anndata", "torch", "scanpy")
    assert imported(by_conda.python, "snakemake", *heavy) == {"snakemake"}
    assert by_conda.pipeline.path("perturbation", "report.html").is_file()


@pytest.mark.slow
def test_every_environment_was_made_and_holds_what_its_file_asks_for_alone(by_conda, downloaded):
    made = by_conda.environments()
    assert set(made) == set(ENVIRONMENTS)
    modules = (
        "requests",
        "torch",
        "h5py",
        "numpy",
        "pandas",
        "anndata",
        "scanpy",
        "gseapy",
        "umap",
        "jinja2",
        "snakemake",
    )
    found = {name: imported(prefix / "bin" / "python", *modules) for name, prefix in made.items()}
    assert found["train"] == {"torch", "h5py", "numpy", "pandas", "jinja2"}  # torch needs jinja2
    assert found["embed"] == found["train"] | {"anndata"}
    assert found["download"] == {"requests", "numpy", "pandas"}
    assert {"scanpy", "anndata"} <= found["preprocess"] and "torch" not in found["preprocess"]
    assert "gseapy" in found["evaluate"] and not found["evaluate"] & {"torch", "scanpy"}
    assert "umap" in found["umap"] and not found["umap"] & {"torch", "scanpy"}
    assert not found["report"] & {"torch", "scanpy", "gseapy", "umap"}
    assert "umap" in found["qc_report"] and not found["qc_report"] & {"torch", "scanpy", "gseapy"}
    assert not any(imported(prefix / "bin" / "python", "snakemake") for prefix in made.values())


def run_module(folder, config, *arguments):
    """Run another workflow's Snakefile, which has the tiny config under a key of its own."""
    settings = yaml.safe_load(TINY.read_text(encoding="utf-8")) | FEW | config
    settings["datasets"] = str(CONFIGS / "datasets.tsv")
    theirs = {"perturbations": settings, "of_the_other": 1}
    (folder / "config" / "theirs.yaml").write_text(yaml.safe_dump(theirs), encoding="utf-8")
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *arguments]
    return call(command, folder, os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def as_module(checkout, tmp_path_factory):
    """Run the same by another workflow that uses the rules, without conda and on one core."""
    folder = tmp_path_factory.mktemp("module")
    (folder / "config").mkdir()
    (folder / "Snakefile").write_text(SNAKEFILE.format(checkout=checkout), encoding="utf-8")
    answer = run_module(folder, {})
    assert answer.returncode == 0, answer.stdout
    return folder


@pytest.mark.slow
def test_another_workflow_uses_the_rules_with_its_own_config_and_prefix(as_module):
    results = as_module / "screen" / "results"
    summary = (results / "tiny/perturbation/evaluate/summary.tsv").read_text(encoding="utf-8")
    assert int((as_module / "best.txt").read_text()) == len(summary.splitlines())
    # Nothing lies outside the prefix, and the record of the run has found its jobs.
    assert not (as_module / "results").exists() and not (as_module / "resources").exists()
    made = json.loads((results / "provenance.json").read_text(encoding="utf-8"))
    jobs = {"tiny/perturbations_simulate", "tiny/perturbation/perturbations_evaluate"}
    assert jobs <= made["jobs"].keys()
    outside = [path for path in made["sha256"] if not path.startswith("screen/")]
    assert {path.rsplit("/", 1)[-1] for path in outside} == {"cell_cycle_genes.tsv", "simulator.json"}


@pytest.mark.slow
def test_an_archive_below_a_prefix_is_refused_with_the_way_to_rebuild_it(as_module):
    answer = run_module(as_module, {"archived": True}, "--dry-run")
    assert answer.returncode != 0
    assert "key archived: found it in a module with a prefix" in answer.stdout


def tables_below(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.tsv")}


@pytest.mark.slow
def test_a_prefix_and_a_single_core_change_no_number(by_conda, as_module):
    """Eight cores with conda, one core as a module."""
    by_conda = tables_below(by_conda.pipeline.folder / "results")
    assert len(by_conda) > 10
    assert by_conda == tables_below(as_module / "screen" / "results")


@pytest.mark.slow
def test_conda_and_the_number_of_cores_change_no_number(by_conda, finished):
    """Eight cores with conda, two cores plainly."""
    by_conda, plain = (
        tables_below(folder / "results") for folder in (by_conda.pipeline.folder, finished.folder)
    )
    # The plain run has more models and folds: its scores are in other files, what they come from in the same.
    shared = {
        name for name in plain if name in by_conda and "/evaluate/" not in name and "report" not in name
    }
    assert {name.rsplit("/", 1)[1] for name in shared} == {
        *("qc.tsv", "perturbations.tsv", "guides.tsv", "split.tsv", "coverage.tsv"),
        *("guide_calls.tsv", "guides_per_cell.tsv", "guide_umis.tsv", "batches.tsv", "distributions.tsv"),
        *("training_cells.tsv", "balance.tsv"),
        *("history.tsv", "representation.tsv", "umap.tsv"),
    }
    assert {name: by_conda[name] for name in shared} == {name: plain[name] for name in shared}


@pytest.mark.slow
def test_a_plain_run_on_two_cores_gives_every_table_too(by_conda, checkout, tmp_path):
    plain = Pipeline(checkout, tmp_path)
    answer = plain.run(config=FEW, cores=2)
    assert answer.returncode == 0, answer.stdout
    assert tables_below(tmp_path / "results") == tables_below(by_conda.pipeline.folder / "results")


@pytest.mark.slow
def test_the_profile_for_slurm_asks_for_a_gpu_for_training_and_for_no_limit_on_their_number(
    by_conda, channel, tmp_path
):
    specs = ["python", "snakemake", "snakemake-executor-plugin-slurm"]
    create(tmp_path / "snakemake", specs, channel, tmp_path / "cache")
    checkout = by_conda.pipeline.checkout
    cluster = replace(
        by_conda,
        pipeline=Pipeline(checkout, tmp_path / "work"),
        python=tmp_path / "snakemake" / "bin" / "python",
    )
    profile = yaml.safe_load((checkout / "profiles" / "slurm" / "config.yaml").read_text(encoding="utf-8"))
    assert "resources" not in profile
    config = FEW | {"train": {"device": "cuda", "processes": 2}}
    answer = cluster.run("--workflow-profile", checkout / "profiles" / "slurm", "--dry-run", config=config)
    assert answer.returncode == 0, answer.stdout
    jobs = dict(re.findall(r"^rule (\w+):\n(?:    .*\n)*?    resources: (.*)$", answer.stdout, re.MULTILINE))
    for rule, gpus in {
        "train": 2,
        "embed": 1,
        "heads": 1,
        "representation": 1,
        "evaluate": 0,
        "preprocess": 0,
        "pair": 0,
    }.items():
        asked = dict(part.split("=") for part in jobs[rule].split(", "))
        assert asked.get("gpu", "0") == str(gpus), rule
        assert int(asked["mem_mb"]) == profile["set-resources"][rule]["mem_mb"], rule


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "package", "output"),
    [("evaluate", "gseapy", "evaluate/summary.tsv"), ("report", "plotly", "report.html")],
)
def test_a_package_that_an_environment_file_lacks_is_named(by_conda, tmp_path, environment, package, output):
    folder = tmp_path / "copy"
    shutil.copytree(by_conda.pipeline.folder, folder, symlinks=True)
    lacking = replace(by_conda, pipeline=Pipeline(by_conda.pipeline.checkout, folder))
    file = by_conda.pipeline.checkout / "envs" / f"{environment}.yaml"
    text = file.read_text(encoding="utf-8")
    # Written in place: another checkout would make all jobs run again, not only those of this environment.
    file.write_text(re.sub(rf"  - {package} .*\n", "", text), encoding="utf-8")
    try:
        assert file.read_text(encoding="utf-8") != text
        answer = lacking.run(f"results/tiny/perturbation/{output}")
    finally:
        file.write_text(text, encoding="utf-8")
    assert answer.returncode != 0
    assert f"No module named '{package}'" in answer.stdout


def test_a_version_that_the_channel_lacks_stops_with_the_name_of_the_package(channel, tmp_path):
    with pytest.raises(Exception, match="pandas"):
        create(tmp_path / "env", ["python", "pandas >=99"], channel, tmp_path / "cache")


def test_names_and_versions_are_translated():
    assert conda_name("Torch") == "pytorch"
    assert conda_name("scikit_learn") == "scikit-learn"
    assert conda_specifier(">=1.2, <2,!=1.5") == ">=1.2,<2,!=1.5"
    assert conda_specifier("==1.4.*") == "1.4.*"
    assert conda_specifier("===1.0") == "==1.0"


def test_the_channel_knows_every_package_of_the_environment_files(channel):
    known = set()
    for index in channel.glob("*/repodata.json"):
        content = json.loads(index.read_text(encoding="utf-8"))
        known |= {record["name"] for record in content["packages"].values()}
    assert "python" in known
    for path in sorted((Path(__file__).parents[1] / "envs").glob("*.yaml")):
        for line in yaml.safe_load(path.read_text(encoding="utf-8"))["dependencies"]:
            assert line.split(" ")[0] in known, f"{path.name}: {line}"
