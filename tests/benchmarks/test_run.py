"""What times the kernels: every benchmark can be listed, a stopped run goes on, a reader's own kernel has its line, and
what is checked at full size is checked against the definition."""

import argparse
import csv
import importlib.metadata
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import liger_csv, own, pages, run, unfinished
from benchmarks.harness import Case, Step, measure
from benchmarks.kernels import kd_loss, mixing_distance

ROOT = Path(__file__).resolve().parents[2]


def test_no_script_hides_a_package():
    """Where Python looks first is the folder of the script it runs: what lies beside it may be no package's name."""
    scripts = {path.stem for path in ROOT.glob("benchmarks/**/*.py")}
    assert "another_tokenizer" in scripts
    assert not scripts & {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", run.NAMES)
def test_every_benchmark_lists_its_cases(name, device):
    def mine(*given):
        raise AssertionError("only listed")

    functions = [(f"mine, {kind}", kind, mine) for kind in own.KINDS.get(name, ())]
    for quick in (True, False):
        options = argparse.Namespace(device=device, quick=quick, own={name: functions})
        cases = run.find(name, options)
        keys = [case.key for case in cases]
        assert len(set(keys)) == len(keys) and any(case.name.startswith("mohawk") for case in cases)
        floors = {(case.table, case.name) for case in cases}
        assert all(case.floor is None or (case.table, case.floor) in floors for case in cases)
        assert all(case.against is None or (case.table, case.against) in floors for case in cases)
        assert any(case.name.startswith("mine") for case in cases) == bool(functions)


def slept(forward: float, backward: float) -> Step:
    """Takes so much CPU time."""

    def busy(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return Step(lambda: busy(forward), lambda found: busy(backward))


def test_a_step_is_timed_in_its_parts():
    found = measure(Case("t", "n", lambda: (lambda whole: 0.0, slept(0.002, 0.006))), "cpu", 2)
    assert found["error"] == 0.0 and len(found["wall"]) == 2
    for forward, backward, both in zip(*(found["times"][x] for x in ("forward", "backward", "both")), strict=True):
        assert 0.002 <= forward < backward and backward >= 0.006 and both == pytest.approx(forward + backward)
    whole = measure(Case("t", "n", lambda: (lambda whole: 0.0, lambda: None)), "cpu", 1)
    assert list(whole["times"]) == ["both"]
    asked = []
    wrong = Case("t", "n", lambda: (lambda whole: asked.append(whole) or 0.2, lambda: None))
    assert measure(wrong, "cpu", 1, True) == {"wrong": 0.2} and asked == [True]


def options(**changed) -> argparse.Namespace:
    given = dict(
        device="cpu", quick=False, only="", rounds=2, repeats=2, seconds=None, peers=None, module=[], csv=None,
        no_write=False, own={},
    )  # fmt: skip
    return argparse.Namespace(**{**given, **changed})


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Three cases that nothing measures: run_one is told what to give. The calls that were made of it."""
    calls = []

    def run_one(name, case, whole, python, options, left):
        if len(calls) == stopped_after[0]:
            raise KeyboardInterrupt
        calls.append((case.name, whole))
        times = {part: [x, 2 * x] for part, x in (("both", 3.0), ("forward", 1.0), ("backward", 2.0))}
        return {"error": 1e-7, "mib": 5.0, "times": times, "wall": [3.0, 6.0]}

    stopped_after = [None]
    cases = [
        Case("t", name, lambda: None, floor="floor", formula="F.", flops=6e9, at=n, axis="tokens")
        for name, n in (("floor", 8), ("mohawk, n 8", 8), ("mohawk, n 16", 16))
    ]
    monkeypatch.setattr(run, "run_one", run_one)
    monkeypatch.setattr(run, "find", lambda name, options: cases)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "put_in_docs", lambda mark, lines: (tmp_path / f"{mark}.md").write_text("\n".join(lines)))
    monkeypatch.setattr(unfinished, "signature", lambda *given: "this")
    return calls, stopped_after


def test_a_run_that_was_stopped_goes_on(measured, tmp_path):
    calls, stopped_after = measured
    stopped_after[0] = 4
    with pytest.raises(KeyboardInterrupt):
        run.run_benchmark("kd_loss", options())
    assert [name for name, _ in calls] == ["floor", "mohawk, n 8", "mohawk, n 16", "floor"]
    assert [whole for _, whole in calls] == [True, True, True, False], "checked at full size in the first round"
    path = tmp_path / ".kd_loss-cpu.unfinished.jsonl"
    with path.open("a") as file:
        file.write('{"cut')
    calls.clear()
    stopped_after[0] = None
    assert run.run_benchmark("kd_loss", options())
    assert [name for name, _ in calls] == ["mohawk, n 8", "mohawk, n 16"]
    assert not path.exists()
    rows = json.loads((tmp_path / "kd_loss-cpu.json").read_text())["rows"]
    assert [row["seconds"] for row in rows] == [4.5] * 3 and rows[0]["quantiles"]["forward"] == [1.0, 1.5, 2.0]
    text = (tmp_path / "kd_loss-cpu.md").read_text()
    assert "| | CPU seconds | spread | forward | backward | of the floor | floor's work | peak MiB | error |" in text
    assert "| mohawk, n 16 | 4.5 | 3-6 | 1.5 | 3 | 1.00 | 1.33 GFLOP/s | 5 | 1.0e-07 |" in text


def test_what_other_code_measured_is_not_taken(tmp_path):
    path = tmp_path / "kept.jsonl"
    unfinished.Unfinished(path, "old").keep("a", 0, {"error": 0.0})
    unfinished.Unfinished(path, "old").keep("b", 0, {"skipped": "out of time"})
    assert list(unfinished.Unfinished(path, "old").found) == [("a", 0)]
    assert unfinished.Unfinished(path, "new").found == {} and not path.exists()


@pytest.mark.parametrize("asked", [{"only": "n 8"}, {"quick": True}, {"module": ["mine.py"]}, {"no_write": True}])
def test_a_part_of_a_run_is_only_printed(asked, measured, tmp_path, capsys):
    (tmp_path / "kd_loss-cpu.json").write_text("whole")
    assert run.run_benchmark("kd_loss", options(**asked))
    assert "mohawk, n 8" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["kd_loss-cpu.json"]
    assert (tmp_path / "kd_loss-cpu.json").read_text() == "whole"


def test_ligers_columns(measured, tmp_path):
    assert run.run_benchmark("kd_loss", options(csv=tmp_path / "x.csv", no_write=True))
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == liger_csv.COLUMNS and len(rows) == 3 * 4
    mine = [row for row in rows if row["kernel_provider"] == "mohawk" and row["kernel_operation_mode"] == "backward"]
    assert [(row["x_label"], row["x_value"], row["y_value_50"]) for row in mine] == [
        ("tokens", "8", "3000.0"),
        ("tokens", "16", "3000.0"),
    ]
    assert {(row["metric_name"], row["metric_unit"]) for row in rows} == {("speed", "ms"), ("memory", "MB")}


def test_a_readers_own_kernels(tmp_path):
    file = tmp_path / "my_own_kernels.py"
    file.write_text(
        "def forward_kl(*given):\n    return 1\n\ndef ssd(*given):\n    return 2\n\ndef helper():\n    pass\n"
    )
    found = own.load([str(file)])
    assert {name: [(line, kind) for line, kind, _ in lines] for name, lines in found.items()} == {
        "kd_loss": [("my_own_kernels, forward kl", "forward_kl")],
        "kd_sweeps": [("my_own_kernels, forward kl", "forward_kl")],
        "ssd": [("my_own_kernels, ssd", "ssd")],
    }
    assert found["ssd"][0][2]() == 2
    empty = tmp_path / "none_of_these.py"
    empty.write_text("def klein(): pass\n")
    with pytest.raises(ValueError, match=r"none_of_these.py: defines none of forward_kl, reverse_kl, "):
        own.load([str(empty)])
    with pytest.raises(ValueError, match=r"--module nowhere.py: there is no such file"):
        own.load(["nowhere.py"])
    taken = tmp_path / "json.py"
    taken.write_text("")
    with pytest.raises(ValueError, match="json is the name of another module"):
        own.load([str(taken)])


def test_a_check_in_rows_is_the_check_of_the_whole(monkeypatch):
    monkeypatch.setattr(kd_loss, "CHECKED_ROWS", 5)
    given = kd_loss.problem((13, 8, 50), torch.float64, "cpu")
    given[4][3:6] = -100
    truth = kd_loss.truth_of(ce_weight=0.5)
    for part, whole in zip(
        kd_loss.gradients_by_rows(truth, given), kd_loss.gradients(truth, given, torch.float64), strict=True
    ):
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-14)
    monkeypatch.setattr(mixing_distance, "ROWS", 7)
    given = tuple(x.double() for x in mixing_distance.problem(17, 2, 3, torch.float64, "cpu"))
    for part, whole in zip(
        mixing_distance.value_and_gradients_by_rows(given),
        mixing_distance.value_and_gradients(mixing_distance.reference, given),
        strict=True,
    ):
        torch.testing.assert_close(part, whole, rtol=1e-11, atol=1e-13)


def test_rates():
    row = {"seconds": 0.5, "flops": 3e12, "bytes": 2e9}
    assert pages.rate(row, "cuda") == "6 TFLOP/s, 4 GB/s" and pages.rate(row, "cpu") == "6e+03 GFLOP/s, 4 GB/s"
