"""The pipeline stops where an encoder collapsed, and says so in one message."""

from __future__ import annotations

import re

import pytest
import yaml

from workflow_case import REPO, Pipeline

EXAMPLE = REPO / "config" / "examples" / "collapse.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "demo"])
def test_the_textbook_objective_stops_the_train_job_with_the_message_of_a_collapse(checkout, tmp_path, size):
    pipeline = Pipeline(checkout, tmp_path / "run")
    example = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    if size == "tiny":
        # The objective of the example on the smallest screen, long enough to converge there.
        encoder = {**example["train"]["encoder"], "steps": 100, "monitor_every": 50, "learning_rate": 5e-3}
        models = {"folds": [0], "models": example["models"]}
        answer = pipeline.run(config={**models, "train": {"encoder": encoder}})
    else:
        (pipeline.folder / "config" / "datasets.tsv").write_text(
            (REPO / "config" / "datasets.tsv").read_text(encoding="utf-8"), encoding="utf-8"
        )
        answer = pipeline.run(base=EXAMPLE)
    assert answer.returncode != 0
    # Preprocess warns that depth may be that of a panel of genes; the rest is what stopped the run.
    lines = re.findall(r"^biojepa: (.*)$", answer.stdout, flags=re.MULTILINE)
    said = [line for line in lines if "depth is the sum over" not in line]
    assert len(said) == 1, answer.stdout
    assert re.search(
        r"The embedding collapsed by step \d+: the standard deviation over cells fell from .* below 50%; .*"
        r"Use train\.encoder\.regularizer: per_token",
        said[0],
    )
    assert not list(pipeline.folder.glob("results/**/model.pt"))
    assert not list(pipeline.folder.glob("results/**/report.html"))
    [log] = pipeline.folder.glob("logs/**/train.log")
    assert said[0] in log.read_text(encoding="utf-8")
    assert "Traceback" not in log.read_text(encoding="utf-8")
