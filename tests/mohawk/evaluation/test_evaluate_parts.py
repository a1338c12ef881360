"""`mohawk evaluate` in two processes, models whole or in parts: what one process measures."""

import importlib.util
import json

import pytest
import torch

import mohawk.runs.steps as steps
from mohawk.cli import main
from tests.helpers.figures import level
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.mohawk.evaluation.test_evaluate_run import run  # noqa: F401
from tests.mohawk.runs.test_distributed import two_processes

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


def in_two(folder, *command, before=lambda rank: None) -> str:
    assert two_processes(folder, *command, before=before) == [0, 0], (folder / "0.txt").read_text()
    assert (folder / "1.txt").read_text() == ""
    return " ".join((folder / "0.txt").read_text().split())


def small_device(rank: int) -> None:
    steps.device_bytes = lambda device: 1


@pytest.mark.parametrize("kind", ["none", "full"])
def test_texts_are_measured_by_both(kind, run, tmp_path):  # noqa: F811
    assert main(["evaluate", str(run)]) == 0
    expected = json.loads((run / "evaluation/again.json").read_text())
    in_two(tmp_path, "evaluate", str(run), "--set", f"sharding.kind={kind}")
    found = json.loads((run / "evaluation/again.json").read_text())
    for text, figures in expected["texts"].items():
        assert level(found["texts"][text]) == pytest.approx(level(figures), rel=1e-5, abs=1e-6)
    states = [[s["state_bytes"] for s in result["decoding"]["student"]] for result in (expected, found)]
    assert states[0] == states[1]
    if kind == "full":
        said = in_two(tmp_path, "evaluate", str(run), "--set", "sharding.kind=full", before=small_device)
        assert "decoding is not timed: student and teacher together do not fit into one process" in said
        assert json.loads((run / "evaluation/again.json").read_text())["decoding"] == {}


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install '.[eval]'")
def test_tasks_are_answered_together(run, tmp_path):  # noqa: F811
    task = ["--tasks", "mohawk_recall_8,mohawk_facts", "--limit", "4"]
    assert main(["evaluate", str(run), *task]) == 0
    expected = json.loads((run / "evaluation/tasks.json").read_text())["tasks"]
    (run / "evaluation/tasks.json").unlink()
    in_two(tmp_path, "evaluate", str(run), *task, "--set", "sharding.kind=full")
    found = json.loads((run / "evaluation/tasks.json").read_text())["tasks"]
    assert found.keys() == expected.keys() and len(found) == 2
    for name, result in expected.items():
        for metric, figures in result["metrics"].items():
            assert found[name]["metrics"][metric] == pytest.approx(figures, rel=1e-5), (name, metric)
