"""Which code a rule runs: what its digest covers, and which packages its environment needs."""

import re
import sys
import tomllib

import pytest
import yaml

from biojepa import imports
from biojepa.imports import code_digest, reachable_files, third_party_imports
from workflow_case import REPO

SCRIPTS = REPO / "workflow" / "scripts"
# Import name to package name on conda-forge, and on PyPI, where they differ.
CONDA = {
    "torch": "pytorch",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "umap": "umap-learn",
    "matplotlib": "matplotlib-base",
    "yaml": "pyyaml",
    "ot": "pot",
}
PYPI = {**CONDA, "torch": "torch", "matplotlib": "matplotlib"}
# Comes with jinja2, whose own type it is.
BROUGHT_ALONG = {"markupsafe"}
# Imported by scanpy's Scrublet, not by us.
INDIRECT = {"preprocess": {"scikit-image"}}


def rules():
    """Yield rule, script and environment of every rule, as the rule files have them."""
    for path in sorted((REPO / "workflow" / "rules").glob("*.smk")):
        for block in re.split(r"^rule ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            name = block.split(":", 1)[0]
            environment = re.search(r"envs/(\w+)\.yaml", block)
            script = re.search(r"scripts/(\w+)\.py", block)
            digest = re.search(r"library=library\(\"(\w+)\"\)", block)
            yield name, script and script[1], environment and environment[1], digest and digest[1]


RULES = list(rules())
ENVIRONMENTS = sorted({environment for _, _, environment, _ in RULES})


def packages_of(environment):
    """Return the dependencies of an environment: name to version."""
    content = yaml.safe_load((REPO / "envs" / f"{environment}.yaml").read_text(encoding="utf-8"))
    assert content["channels"] == ["conda-forge", "bioconda"]
    return dict((*entry.split(" ", 1), "")[:2] for entry in content["dependencies"])


def needed(script):
    return third_party_imports(SCRIPTS / f"{script}.py") - sys.stdlib_module_names - BROUGHT_ALONG


def test_every_rule_has_a_script_an_environment_and_the_digest_of_its_script():
    assert len(RULES) == 22
    for name, script, environment, digest in RULES:
        assert script is not None, name
        assert environment is not None, name
        # A verified file need not be fetched again because code changed.
        assert digest == (None if name == "download" else script), f"{name} passes the digest of {digest}"
    assert sorted(script for _, script, _, _ in RULES) == sorted(path.stem for path in SCRIPTS.glob("*.py"))
    assert sorted(path.stem for path in (REPO / "envs").glob("*.yaml")) == ENVIRONMENTS


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_an_environment_holds_what_its_rules_import_and_no_more(environment):
    wanted = {
        CONDA.get(name, name)
        for _, script, used, _ in RULES
        if used == environment
        for name in needed(script)
    }
    assert set(packages_of(environment)) - {"python"} == wanted | INDIRECT.get(environment, set())


def requirements(*extras):
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for name in extras for line in project["optional-dependencies"][name]),
    ]
    return dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in lines)


def test_pip_installs_what_the_scripts_import():
    installed = set(requirements("pipeline"))
    for script in SCRIPTS.glob("*.py"):
        assert {PYPI.get(name, name) for name in needed(script.stem)} <= installed, script.name


def test_training_needs_the_core_dependencies_alone():
    assert {PYPI.get(name, name) for name in needed("train")} <= set(requirements())


def test_conda_and_pip_ask_for_the_same_versions():
    by_pip = requirements("pipeline")
    for environment in ENVIRONMENTS:
        for package, version in packages_of(environment).items():
            name = {conda: PYPI[name] for name, conda in CONDA.items()}.get(package, package)
            if name != "python":
                assert version == by_pip[name], f"{environment}: {package}"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small library and a script that imports half of it."""
    files = {
        "__init__.py": "",
        "first.py": "import numpy\nfrom biojepa.second import f\n",
        "second.py": "def f():\n    from biojepa.page.draw import g\n    import torch.nn as nn\n",
        "unused.py": "import pandas\n",
        "page/__init__.py": "import scipy.sparse\n",
        "page/draw.py": "g = 1\n",
        "page/style.css": "a {}\n",
        "page/notes.txt": "not shipped\n",
    }
    for name, text in files.items():
        path = tmp_path / "biojepa" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "run.py").write_text("import sys\nfrom biojepa import first\n", encoding="utf-8")
    monkeypatch.setattr(imports, "LIBRARY", tmp_path / "biojepa")
    imports._imported_names.cache_clear()
    imports._imported_modules.cache_clear()
    yield tmp_path
    imports._imported_names.cache_clear()
    imports._imported_modules.cache_clear()


def test_imports_are_followed_wherever_they_stand(library):
    reached = {
        path.relative_to(library / "biojepa").as_posix() for path in reachable_files(library / "run.py")
    }
    assert reached == {
        "__init__.py",
        "first.py",
        "second.py",
        "page/__init__.py",
        "page/draw.py",
        "page/style.css",
    }
    assert third_party_imports(library / "run.py") == {"sys", "numpy", "torch", "scipy"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [("second.py", True), ("page/style.css", True), ("page/draw.py", True), ("unused.py", False)],
)
def test_the_digest_changes_with_the_code_that_is_reached(library, name, changes):
    before = code_digest(library / "run.py")
    path = library / "biojepa" / name
    path.write_text(path.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    imports._imported_names.cache_clear()
    imports._imported_modules.cache_clear()
    assert (code_digest(library / "run.py") != before) is changes


def test_the_digest_does_not_depend_on_where_the_library_is(library, tmp_path_factory, monkeypatch):
    before = code_digest(library / "run.py")
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
    library.joinpath("biojepa").rename(library / "moved")
    elsewhere.mkdir()
    (library / "moved").rename(elsewhere / "biojepa")
    (elsewhere / "run.py").write_text((library / "run.py").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(imports, "LIBRARY", elsewhere / "biojepa")
    imports._imported_names.cache_clear()
    imports._imported_modules.cache_clear()
    assert code_digest(elsewhere / "run.py") == before
