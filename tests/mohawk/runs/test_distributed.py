"""`mohawk distill` and `mohawk convert` as torchrun starts them: two processes do what one does with twice the rows."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mohawk.cli import main
from mohawk.core.folders import is_complete
from mohawk.training.trainer import PhaseTrainer
from tests.helpers.figures import level
from tests.helpers.tiny_phase import cheap_training, fork, free_port, wait  # noqa: F401
from tests.models.conftest import tiny_teacher

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]

STEPS = 3
LEARNING_RATE = 1e-3


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):
    """A folder with a teacher and text."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "texts").mkdir()
    for i in range(20):
        line = f"Document {i} counts {', '.join(str(i * k) for k in range(1, 12))}.\n"
        (folder / "texts" / f"{i}.txt").write_text(line * (1 + i % 3))
    tiny_teacher(vocab_size=258, num_hidden_layers=2, bos_token_id=256, eos_token_id=257).save_pretrained(
        folder / "teacher"
    )
    tokenizer.save_pretrained(folder / "teacher")
    return folder


def written(place: Path, folder: Path, **parts) -> Path:
    """A recipe's file, of STEPS steps of 4 rows for a run in `folder`."""
    phase = {
        "tokens": STEPS * 4 * 32, "batch_size": 4, "sequence_length": 32, "learning_rate": LEARNING_RATE,
        "warmup": 0.0,
    }  # fmt: skip
    recipe = {
        "teacher": str(place / "teacher"),
        "data": {
            "train": [str(place / "texts" / "*.txt")], "validation_share": 0.1, "cache": str(folder / "cache"),
        },
        "evaluation": {
            "sequence_length": 32, "batch_size": 4, "tokens": 64, "longest": 64, "contexts": [4], "decode_tokens": 2,
            "prompt": "A cat", "continuation_tokens": 2,
        },
        "precision": "float32", "device": "cpu", "output": str(folder / "run"),
    }  # fmt: skip
    for name, part in parts.items():
        recipe[name] = [phase | stage for stage in part] if name == "stages" else part
    if "phases" in parts:
        recipe["phases"] = {name: given and phase | given for name, given in parts["phases"].items()}
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def two_processes(folder: Path, *command: str, before=lambda rank: None) -> list[int]:
    """The command line in two processes, whose output goes to FOLDER/0.txt and 1.txt; gives the exit codes.

    before: done in each of them first.
    """
    port = str(free_port())

    def body(rank: int) -> int:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        logging.getLogger("mohawk").handlers.clear()  # of the parent
        sys.stdout = sys.stderr = open(folder / f"{rank}.txt", "w")
        before(rank)
        return main(command)

    pids = [fork(lambda rank=rank: body(rank)) for rank in (0, 1)]
    return [wait(pid) for pid in pids]


def students(*runs: Path) -> list[torch.Tensor]:
    return [
        torch.cat([tensor.flatten() for _, tensor in sorted(load_file(run / "student/model.safetensors").items())])
        for run in runs
    ]


def same_run(one: Path, two: Path, loss: float, weight: float, own: tuple[str, ...] = ("rng_state",)) -> None:
    """That two processes made all of a run, whole, and what one makes up to so much: loss relative, weight absolute.

    own: how the names of files begin that are a process's own.
    """
    parts = [[p.relative_to(run) for p in run.rglob("*") if not p.name.startswith(own)] for run in (one, two)]
    assert sorted(parts[0]) == sorted(parts[1])  # the same files, but for each process's random state
    for student in two.rglob("student"):
        assert is_complete(student), student
    first, second = students(one, two)
    assert (first - second).abs().mean() < weight
    mine, theirs = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (two, one)
    )
    for key in ("phase", "step", "steps", "tokens"):
        assert [record[key] for record in mine] == [record[key] for record in theirs], key
    assert [r["loss"] for r in mine] == pytest.approx([r["loss"] for r in theirs], rel=loss)
    mine, theirs = (json.loads((run / "results.json").read_text())["evaluation"] for run in (two, one))
    for stage in theirs:
        assert level(mine[stage]["held_out"]) == pytest.approx(level(theirs[stage]["held_out"]), rel=10 * loss), stage


def test_distill_in_two_processes_is_one(place, tmp_path):
    stage = {"name": "logits", "ce_weight": 0.3, "advance": {"every": 2, "patience": 9}, "save_every": 2}
    parts = {"student": {"layers": "first:1"}, "stages": [stage]}
    assert main(["distill", str(written(place, tmp_path / "one", **parts))]) == 0
    recipe = written(place, tmp_path / "two", **parts)
    assert two_processes(tmp_path / "two", "distill", str(recipe)) == [0, 0], (tmp_path / "two/0.txt").read_text()
    same_run(tmp_path / "one/run", tmp_path / "two/run", 1e-5, 1e-3 * LEARNING_RATE)
    assert (tmp_path / "two/1.txt").read_text() == ""
    log = (tmp_path / "two/run/log.txt").read_text()
    assert log.count("run finished") == log.count("done after") == 1
    assert two_processes(tmp_path / "two", "distill", str(recipe)) == [0, 0]  # a finished run is left as it is
    assert (tmp_path / "two/run/log.txt").read_text().count("done after") == 1


def test_convert_in_two_processes_is_one(place, tmp_path):
    phases = {
        "mixing": {"metric": "frobenius"},
        "hidden": {"solve_tokens": 256, "match": "mixer_output"},
        "end_to_end": None,
    }
    parts = {"student": {"ssm_layers": [1]}, "phases": phases}
    assert main(["convert", str(written(place, tmp_path / "one", **parts))]) == 0
    recipe = written(place, tmp_path / "two", **parts)
    assert two_processes(tmp_path / "two", "convert", str(recipe)) == [0, 0], (tmp_path / "two/0.txt").read_text()
    # micro-batches count by the rows and the positions that these losses are means over
    same_run(tmp_path / "one/run", tmp_path / "two/run", 1e-5, 1e-3 * LEARNING_RATE)
    assert (tmp_path / "two/1.txt").read_text() == ""


@pytest.mark.parametrize("mistake", ["of all", "of the folder", "of the data", "of the recipe", "of the command"])
def test_a_mistake_ends_both_and_is_printed_once(place, tmp_path, mistake):
    folder = tmp_path / "run"
    parts = {"student": {"layers": "first:1"}, "stages": [{"name": "logits"}]}
    recipe = written(place, folder, **parts)
    command = ["distill", str(recipe)]
    if mistake == "of all":
        command += ["--set", "student.layers=first:7"]
    elif mistake == "of the folder":
        (folder / "run").mkdir()
        (folder / "run" / "mine.txt").write_text("not a run")
    elif mistake == "of the data":
        (folder / "empty.txt").write_text("")
        command += ["--set", f"data.train=[{folder}/empty.txt]"]
    elif mistake == "of the recipe":
        command += ["--set", "colour=red"]
    else:
        command = ["inspect", str(place / "teacher")]
    assert two_processes(folder, *command) == [2, 2]
    said = (folder / "0.txt").read_text()
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert (folder / "1.txt").read_text() == ""


def test_a_signal_to_one_process_saves_ends_both_and_the_run_goes_on(place, tmp_path):
    """As to the process of the second GPU alone; then the same command makes what an unbroken run makes."""
    phases = {"mixing": {"save_every": 1000}, "hidden": None, "end_to_end": None}
    paths = [
        written(place, tmp_path / name, student={"ssm_layers": [1]}, phases=phases) for name in ("whole", "broken")
    ]
    assert two_processes(paths[0].parent, "convert", str(paths[0])) == [0, 0]

    def second_step_of_the_second(rank):
        step, seen = PhaseTrainer._take_step, []

        def _take_step(*args, **options):
            seen.append(1)
            if rank == 1 and len(seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args, **options)

        PhaseTrainer._take_step = _take_step  # in this process, which ends with the run

    folder = paths[1].parent
    assert two_processes(folder, "convert", str(paths[1]), before=second_step_of_the_second) == [130, 130]
    said = (folder / "0.txt").read_text()
    assert said.count("stopped by a signal at step 2; ") == 1 and "Traceback" not in said
    assert (folder / "1.txt").read_text() == ""
    assert is_complete(folder / "run" / "phases" / "mixing" / "checkpoint-2")
    assert two_processes(folder, "convert", str(paths[1])) == [0, 0]
    whole, broken = students(*(path.parent / "run" for path in paths))
    assert torch.equal(whole, broken)


def node(number: int, port: int, recipe: Path) -> subprocess.Popen:
    """torchrun as it is started on each of two machines, with a process on each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number)]
    command += ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    out = open(recipe.parent / f"node{number}.txt", "w")
    command += ["-m", "mohawk", "convert", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.Popen(command, stdout=out, stderr=out, env=environment)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds torchrun's process there")
def test_a_machine_that_is_gone_ends_the_run_which_goes_on_in_one(place, tmp_path):
    """torchrun and its process are killed together."""
    phases = {"mixing": {"save_every": 20, "tokens": 300 * 4 * 32}, "hidden": None, "end_to_end": None}
    recipe = written(place, tmp_path / "two", student={"ssm_layers": [0, 1]}, phases=phases, sharding={"stages": 2})
    port = free_port()
    first, second = (node(number, port, recipe) for number in (0, 1))
    try:
        begin = time.monotonic()
        while not list((tmp_path / "two/run").glob("phases/mixing/checkpoint-*")):
            assert first.poll() is second.poll() is None and time.monotonic() - begin < 300
            time.sleep(0.05)
        workers = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
        for pid in (second.pid, *map(int, workers)):
            os.kill(pid, signal.SIGKILL)
        begin = time.monotonic()
        assert first.wait(timeout=60) == 1 and time.monotonic() - begin < 60
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    said = [line for line in (tmp_path / "two/node0.txt").read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "another process of this run has ended or answers no more" in said[0]
    assert main(["convert", str(recipe)]) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "two/run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 301))
    assert "mixing: from checkpoint-" in (tmp_path / "two/run/log.txt").read_text()
