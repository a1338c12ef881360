"""The commands with models in parts: two processes that have a half each make what one process makes."""

from pathlib import Path

import pytest
import torch

from mohawk.cli import main
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.mohawk.runs.test_distributed import LEARNING_RATE, place, same_run, two_processes, written  # noqa: F401

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]

PARTS = {"sharding": {"kind": "full"}}
OWN = ("rng_state", "shard-", "trainable.safetensors", "optimizer.pt")  # of checkpoints: each process's part, or whole


def in_parts(folder: Path, command: str, recipe: Path) -> str:
    """What two processes said; both have to end well."""
    assert two_processes(folder, command, str(recipe)) == [0, 0], (folder / "0.txt").read_text()
    assert (folder / "1.txt").read_text() == ""
    return (folder / "0.txt").read_text()


def test_convert_in_parts_is_one(place, tmp_path):  # noqa: F811
    phases = {
        "mixing": {"metric": "frobenius"},
        "hidden": {"solve_tokens": 256, "match": "mixer_output"},
        "end_to_end": {"gradient_accumulation": 1},
    }
    parts = {"student": {"ssm_layers": [1]}, "phases": phases}
    assert main(["convert", str(written(place, tmp_path / "one", **parts))]) == 0
    recipe = written(place, tmp_path / "two", **parts, **PARTS)
    in_parts(tmp_path / "two", "convert", recipe)
    same_run(tmp_path / "one/run", tmp_path / "two/run", 1e-5, 1e-3 * LEARNING_RATE, OWN)
