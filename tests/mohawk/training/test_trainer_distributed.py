"""Two processes, as torchrun starts them, train as one process with twice the batch."""

import json
import os
import signal

import pytest
import torch

from mohawk.core.folders import Interrupted
from mohawk.core.processes import joined, leave
from mohawk.errors import UserError
from tests.helpers.tiny_phase import (
    TinyObjective,
    cheap_training,  # noqa: F401
    fork,
    free_port,
    tiny_phase,
    tiny_trainer,
    wait,
    weights,
)

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]

STEPS = 8


def two_processes(run_dir, make_objective=TinyObjective, *, signal_at=None, phase=None):
    """Train in two forked processes; gives their exit codes and, where they ended, their weights."""
    port = str(free_port())

    def body(rank):
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        torch.manual_seed(rank)
        objective = make_objective(rank)
        with joined("cpu"):
            trainer = tiny_trainer(run_dir, objective, phase or tiny_phase(batch_size=2, steps=STEPS))
            if rank == 1 and signal_at:
                losses = objective.losses

                def signalled(**batch):
                    if trainer.step == signal_at:
                        os.kill(os.getpid(), signal.SIGTERM)
                    yield from losses(**batch)

                objective.losses = signalled
            try:
                trainer.train_phase()
            except Interrupted as stopped:
                return 3 if stopped.step == signal_at + 1 else 71
            except UserError:
                return 4
            finally:
                torch.save(weights(objective), run_dir.parent / f"{run_dir.name}-{rank}.pt")
                leave()

    pids = [fork(lambda rank=rank: body(rank)) for rank in (0, 1)]
    codes = [wait(pid) for pid in pids]
    return codes, [torch.load(run_dir.parent / f"{run_dir.name}-{rank}.pt") for rank in (0, 1)]


def phase_of_one(**settings):
    """The same tokens a step in one process: twice the batch."""
    return tiny_phase(steps=STEPS, batch_size=4, **settings)


def phase_of_two(**settings):
    # tokens for STEPS steps of two processes
    return tiny_phase(steps=2 * STEPS, batch_size=2, **settings)


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def objective_without_dropout(rank=0):
    objective = TinyObjective(dropout=0.0)
    if rank:  # whatever the other processes start from, rank 0's weights are broadcast
        with torch.no_grad():
            for parameter in objective.student.parameters():
                parameter.add_(1.0)
    return objective


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_are_one_with_twice_the_batch(tmp_path, accumulation):
    one = objective_without_dropout()
    tiny_trainer(tmp_path / "one", one, phase_of_one(gradient_accumulation=accumulation)).train_phase()
    codes, (first, second) = two_processes(
        tmp_path / "two", objective_without_dropout, phase=phase_of_two(gradient_accumulation=accumulation)
    )
    assert codes == [0, 0]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, weights(one), rtol=1e-4, atol=1e-5)
    mine, theirs = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert len(mine) == STEPS
    for key in ("step", "steps", "tokens", "learning_rate", "loss", "grad_norm"):
        assert [r[key] for r in mine] == pytest.approx([r[key] for r in theirs], rel=1e-4), key


def test_what_is_measured_is_the_mean_of_all(tmp_path):
    def measuring(rank):
        objective = objective_without_dropout()
        objective.measured = lambda: {"both": 1.0 + 2 * rank} | ({"one": 7.0} if rank else {})
        return objective

    codes, _ = two_processes(tmp_path / "run", measuring)
    assert codes == [0, 0]
    assert [record["measured"] for record in metrics(tmp_path / "run")] == [{"both": 2.0, "one": 7.0}] * (STEPS // 2)


def test_signal_to_one_process_stops_both_at_the_same_step_and_they_resume(tmp_path):
    codes, uninterrupted = two_processes(tmp_path / "uninterrupted", lambda rank: TinyObjective())
    assert codes == [0, 0]
    run = tmp_path / "run"
    codes, _ = two_processes(run, lambda rank: TinyObjective(), signal_at=2)
    assert codes == [3, 3]
    assert [path.name for path in (run / "phases/mixing").glob("checkpoint-*")] == ["checkpoint-3"]
    codes, resumed = two_processes(run, lambda rank: TinyObjective())
    assert codes == [0, 0]
    assert torch.equal(resumed[0], uninterrupted[0]) and torch.equal(resumed[1], uninterrupted[0])
    assert [r["step"] for r in metrics(run)] == list(range(1, STEPS // 2 + 1))


def test_trouble_in_one_process_skips_the_step_in_both(tmp_path):
    class Spoiled(TinyObjective):
        def __init__(self, rank):
            super().__init__(dropout=0.0)
            self.rank, self.calls = rank, 0

        def losses(self, **batch):
            self.calls += 1
            for name, loss in super().losses(**batch):
                if name == "layer_2" and self.rank == 1 and self.calls in (2, 6, 7, 8):
                    loss.register_hook(lambda grad: grad * float("inf"))
                yield name, loss

    codes, (first, second) = two_processes(tmp_path / "run", Spoiled, phase=phase_of_two())
    assert codes == [4, 4]  # the third in a row ends both
    assert torch.equal(first, second) and first.isfinite().all()
    assert metrics(tmp_path / "run")[1]["skipped_at"] == [2]
    assert metrics(tmp_path / "run")[-1]["skipped_steps"] == 4


def test_parameter_that_one_process_does_not_reach(tmp_path):
    class Partly(TinyObjective):
        def __init__(self, rank):
            super().__init__(dropout=0.0)
            self.rank = rank

        def losses(self, **batch):
            for name, loss in super().losses(**batch):
                if name == "layer_1" or (name == "layer_2" and self.rank == 1):
                    loss = loss.detach().requires_grad_()
                yield name, loss

    codes, (first, second) = two_processes(tmp_path / "run", Partly)
    assert codes == [0, 0] and torch.equal(first, second)
    layers, before = first.chunk(3), weights(TinyObjective()).chunk(3)
    assert [torch.equal(*pair) for pair in zip(layers, before, strict=True)] == [False, True, False]
