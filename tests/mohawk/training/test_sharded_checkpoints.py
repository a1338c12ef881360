"""A phase over models in parts stops and goes on, in as many processes or in others."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from mohawk.conversion.objectives import EndToEndObjective, HiddenObjective, MixingObjective
from mohawk.core.folders import Interrupted, is_complete, newest_complete, why_incomplete
from mohawk.errors import UserError
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.sharding import is_sharded, reshard, shard, whole
from mohawk.training.trainer import PhaseTrainer
from tests.helpers.processes import in_processes
from tests.helpers.tiny_phase import cheap_training, collate, tiny_phase  # noqa: F401
from tests.models.conftest import tiny_teacher
from tests.models.test_sharding import LENGTH, batch

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]

STEPS = 6
OBJECTIVES = {"mixing": MixingObjective, "hidden": HiddenObjective, "end_to_end": EndToEndObjective}


class Rows:
    """20 packed rows."""

    def __init__(self):
        of = [batch(vocabulary=90 - i) for i in range(5)]
        self.rows = [{name: column[i] for name, column in one.items()} for one in of for i in range(4)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def trainer_of(run: Path, kind: str, processes: int) -> PhaseTrainer:
    mesh = init_device_mesh("cpu", (processes,)) if processes > 1 else None
    teacher = tiny_teacher("llama_biased")
    torch.manual_seed(0)
    if mesh is None:
        student = hybrid_from_teacher(teacher, [1, 3])
    else:
        shard(teacher, mesh, trains=False)
        student = hybrid_from_teacher(teacher, [1, 3], spread=lambda model: shard(model, mesh))
    phase = tiny_phase(STEPS, sequence_length=LENGTH, learning_rate=1e-3, gradient_accumulation=2, batch_size=2)
    return PhaseTrainer(
        OBJECTIVES[kind](student, teacher), name=kind, phase=phase, run_dir=run, train_dataset=Rows(), collate=collate,
        precision="float32", device="cpu", section=f"phases.{kind}",
    )  # fmt: skip


def run_phase(run: Path, kind: str, processes: int, stop: int | None = None) -> dict[str, torch.Tensor]:
    """The phase's weights at its end; or, stopped by the last process's signal in step `stop`, then."""
    trainer = trainer_of(run, kind, processes)
    assert trainer.sharded == (processes > 1)
    last = processes == 1 or torch.distributed.get_rank() == processes - 1
    if stop is not None and last:
        losses = trainer.objective.losses

        def signalled(**given):
            if trainer.step == stop - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield from losses(**given)

        trainer.objective.losses = signalled
    try:
        trainer.train_phase()
        assert stop is None
    except Interrupted as stopped:
        assert stopped.step == stop
    reshard(trainer.objective)
    return {name: whole(p) for name, p in trainer.objective.student.named_parameters()}


def go(run: Path, kind: str, processes: int, stop: int | None = None) -> dict[str, torch.Tensor]:
    if processes == 1:
        return run_phase(run, kind, 1, stop)
    return in_processes(run.parent, processes, lambda rank: run_phase(run, kind, processes, stop))[0]


def far(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_it_goes_on_in_any_number_of_processes(kind, tmp_path):
    one = go(tmp_path / "one", kind, 1)
    two = go(tmp_path / "two", kind, 2)
    assert far(one, two) < 2e-5  # of steps of 1e-3
    stopped = tmp_path / "stopped"
    go(stopped, kind, 2, stop=2)
    checkpoint = newest_complete(stopped / "phases" / kind)
    assert checkpoint.name == "checkpoint-2" and is_complete(checkpoint)
    listed = json.loads((checkpoint / "MANIFEST.json").read_text())["files"]
    assert len([name for name in listed if name.startswith("shard-")]) == 2
    again = tmp_path / "again"
    shutil.copytree(stopped, again)
    assert all(torch.equal(tensor, two[name]) for name, tensor in go(again, kind, 2).items())  # bit for bit
    go(stopped, kind, 1, stop=4)
    assert far(go(stopped, kind, 4), one) < 2e-5
    steps = [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def test_a_damaged_part_is_found(tmp_path):
    run = tmp_path / "run"
    go(run, "mixing", 2, stop=2)
    checkpoint = newest_complete(run / "phases/mixing")
    part = sorted(checkpoint.glob("shard-*"))[1]
    content = bytearray(part.read_bytes())
    content[-3] ^= 1
    part.write_bytes(content)
    assert why_incomplete(checkpoint) == f"{part.name} is damaged"
    assert newest_complete(run / "phases/mixing") is None


def full_disk_on_the_second(run: Path, rank: int) -> str:
    trainer = trainer_of(run, "mixing", 2)
    if rank == 1:
        import mohawk.training.saving as module

        def full(*_):
            raise OSError(28, "No space left on device")

        module.write_random_states = full
        module.shutil.disk_usage = lambda folder: SimpleNamespace(free=1)  # a moment later
    try:
        trainer.train_phase()
    except UserError as error:
        return str(error)
    return ""


def test_a_full_disk_on_one_process_ends_all(tmp_path):
    said = in_processes(tmp_path, 2, lambda rank: full_disk_on_the_second(tmp_path / "run", rank))
    assert all("the checkpoint could not be written (No space left on device;" in one for one in said)
    assert said[0] == said[1]  # or it is told twice
    assert not list((tmp_path / "run/phases/mixing").glob("checkpoint*"))
    assert not list((tmp_path / "run/phases/mixing").glob(".partial*"))


def test_weights_that_are_not_finite_are_not_written_and_counted_over_all_parts(tmp_path):
    def body(rank):
        trainer = trainer_of(tmp_path / "run", "mixing", 2)
        parameter = next(p for p in trainer.trainable.values() if is_sharded(p))
        step = trainer.optimizer.step

        def broken():
            step()
            parameter.data.to_local()[0, : 1 + rank] = float("nan")

        trainer.optimizer.step = broken
        trainer.steps = 1
        with pytest.raises(UserError) as caught:
            trainer.train_phase()
        return str(caught.value), parameter.numel()

    for said, size in in_processes(tmp_path, 2, body):
        assert f"(3 of {size:,} values) is not finite, so no checkpoint is written; there is no earlier one" in said


class HalfLabelled(Rows):
    """Rows of which every second has no label: those of one process, in steps of two."""

    def __init__(self):
        super().__init__()
        for row in self.rows[1::2]:
            row["labels"] = torch.full_like(row["labels"], -100)


@pytest.mark.parametrize("shards", [True, False])
def test_a_process_whose_rows_have_no_label(shards, tmp_path):
    def body(rank):
        mesh = init_device_mesh("cpu", (2,))
        teacher = tiny_teacher("llama")
        if shards:
            shard(teacher, mesh, trains=False)
        torch.manual_seed(0)
        student = hybrid_from_teacher(teacher, [1], spread=(lambda model: shard(model, mesh)) if shards else None)
        trainer = PhaseTrainer(
            EndToEndObjective(student, teacher), name="end_to_end", run_dir=tmp_path / "run",
            phase=tiny_phase(STEPS, sequence_length=LENGTH, batch_size=2), train_dataset=HalfLabelled(),
            collate=collate, precision="float32", device="cpu",
        )  # fmt: skip
        trainer.train_phase()
        return trainer.skipped_steps

    assert in_processes(tmp_path, 2, body) == [0, 0]
