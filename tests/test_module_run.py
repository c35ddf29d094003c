"""The workflow as a module of another one, from a local clone, with the other's config and a prefix."""

import os
import subprocess
import sys

import yaml

from workflow_case import CONFIGS, REPO, TINY

SNAKEFILE = """
configfile: "config/theirs.yaml"


module perturbations:
    snakefile:
        "{repo}/workflow/Snakefile"
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


def test_another_workflow_uses_the_rules_with_its_own_config_and_prefix(tmp_path):
    settings = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    settings |= {
        "folds": [0],
        "models": ["mean", "no_change", "kernel_ridge"],
        "datasets": str(CONFIGS / "datasets.tsv"),
    }
    settings["evaluate"]["model"] = "kernel_ridge"
    (tmp_path / "config").mkdir()
    theirs = {"perturbations": settings, "of_the_other": 1}
    (tmp_path / "config" / "theirs.yaml").write_text(yaml.safe_dump(theirs), encoding="utf-8")
    (tmp_path / "Snakefile").write_text(SNAKEFILE.format(repo=REPO), encoding="utf-8")
    answer = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=600,
    )
    assert answer.returncode == 0, answer.stdout
    summary = (tmp_path / "screen/results/tiny/perturbation/evaluate/summary.tsv").read_text(encoding="utf-8")
    assert int((tmp_path / "best.txt").read_text()) == len(summary.splitlines())
    # Nothing lies outside the prefix, and the record of the run has found the times of its jobs.
    assert not (tmp_path / "results").exists() and not (tmp_path / "resources").exists()
    made = yaml.safe_load((tmp_path / "screen/results/provenance.json").read_text(encoding="utf-8"))
    assert "tiny/preprocess/preprocess" in made["jobs"]
    assert all(path.startswith("screen/") for path in made["sha256"])
