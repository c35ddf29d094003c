"""``snakemake --use-conda``, executed: every rule in an environment of what its file declares."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from local_conda.channel import build_channel, conda_name, conda_specifier
from local_conda.command import create, install_command
from workflow_case import TINY, Pipeline

# One fold and few models: what each rule imports does not depend on how many.
FEW = {"folds": [0], "models": ["mean", "no_change", "kernel_ridge", "biojepa", "pca_ridge", "pca_predictor"]}
ENVIRONMENTS = ("preprocess", "train", "embed", "umap", "evaluate", "report")


@dataclass
class CondaPipeline:
    """A pipeline that is run by a Snakemake which has nothing else beside it."""

    pipeline: Pipeline
    python: Path
    binaries: Path
    environments_folder: Path

    def run(self, *arguments, cores=2):
        extra = self.pipeline.folder / "config" / "few.yaml"
        extra.write_text(yaml.safe_dump(FEW), encoding="utf-8")
        command = [self.python, "-m", "snakemake", "--use-conda", "--cores", str(cores), *arguments]
        command += ["--conda-prefix", self.environments_folder]
        command += ["--snakefile", self.pipeline.checkout / "Snakefile", "--configfile", TINY, extra]
        path = f"{self.binaries}{os.pathsep}{os.defpath}"
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))
        } | {"PATH": path, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            list(map(str, command)),
            cwd=self.pipeline.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=600,
        )

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
    pytest.importorskip("rattler", reason="no py-rattler; it comes with the test tools: ./run.sh test")
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
    return made


def imported(python, *modules):
    """Which of some modules a Python finds."""
    code = "import importlib.util, sys; print(*(m for m in sys.argv[1:] if importlib.util.find_spec(m)))"
    answer = subprocess.run(
        [python, "-c", code, *modules], capture_output=True, text=True, check=True, env={"PATH": os.defpath}
    )
    return set(answer.stdout.split())


def test_snakemake_alone_is_enough_to_start(by_conda):
    heavy = ("pandas", "numpy", "anndata", "torch", "scanpy")
    assert imported(by_conda.python, "snakemake", *heavy) == {"snakemake"}
    assert by_conda.pipeline.path("perturbation", "report.html").is_file()


def test_every_environment_was_made_and_holds_what_its_file_asks_for_alone(by_conda):
    made = by_conda.environments()
    assert set(made) == set(ENVIRONMENTS)
    modules = (
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
    assert {"scanpy", "anndata"} <= found["preprocess"] and "torch" not in found["preprocess"]
    assert "gseapy" in found["evaluate"] and not found["evaluate"] & {"torch", "scanpy"}
    assert "umap" in found["umap"] and not found["umap"] & {"torch", "scanpy"}
    assert not found["report"] & {"torch", "scanpy", "gseapy"}
    assert not any(imported(prefix / "bin" / "python", "snakemake") for prefix in made.values())


def test_conda_and_the_number_of_cores_change_no_number(by_conda, tmp_path):
    plain = Pipeline(by_conda.pipeline.checkout, tmp_path)
    answer = plain.run(config=FEW, cores=8)
    assert answer.returncode == 0, answer.stdout
    tables = sorted(path.relative_to(tmp_path) for path in (tmp_path / "results").rglob("*.tsv"))
    assert len(tables) > 10
    for table in tables:
        assert (by_conda.pipeline.folder / table).read_bytes() == (tmp_path / table).read_bytes(), table


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
    assert f"python{sys.version_info.major}"[:6] in known
    for path in sorted((Path(__file__).parents[1] / "envs").glob("*.yaml")):
        for line in yaml.safe_load(path.read_text(encoding="utf-8"))["dependencies"]:
            assert line.split(" ")[0] in known, f"{path.name}: {line}"
