"""Two processes, as torchrun starts them, train as one does."""

import json
import os
import signal

import pytest
import torch

from mohawk.core.folders import Interrupted
from mohawk.core.processes import joined, leave, wait_for_all
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
            wait_for_all()  # one that ends at once would end the other's connecting to it
            try:
                trainer = tiny_trainer(run_dir, objective, phase or eight_steps())
            except UserError:
                return 4
            if rank == 1 and signal_at is not None:
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
    kept = [run_dir.parent / f"{run_dir.name}-{rank}.pt" for rank in (0, 1)]
    return codes, [torch.load(path) for path in kept if path.exists()]


def eight_steps(**settings):
    """However many processes take them."""
    return tiny_phase(steps=STEPS, **settings)


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def objective_without_dropout(rank=0):
    objective = TinyObjective(dropout=0.0)
    if rank:  # whatever the other processes start from, rank 0's weights are broadcast
        with torch.no_grad():
            for parameter in objective.student.parameters():
                parameter.add_(1.0)
    return objective


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_two_processes_are_one(tmp_path, accumulation):
    one = objective_without_dropout()
    tiny_trainer(tmp_path / "one", one, eight_steps(gradient_accumulation=accumulation)).train_phase()
    codes, (first, second) = two_processes(
        tmp_path / "two", objective_without_dropout, phase=eight_steps(gradient_accumulation=accumulation)
    )
    assert codes == [0, 0]
    assert torch.equal(first, second)
    torch.testing.assert_close(first, weights(one), rtol=1e-4, atol=1e-5)
    mine, theirs = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    assert len(mine) == STEPS
    for key in ("step", "steps", "tokens", "learning_rate", "loss", "grad_norm"):
        assert [r[key] for r in mine] == pytest.approx([r[key] for r in theirs], rel=1e-4), key


def test_a_run_of_two_processes_goes_on_in_one_and_in_two_again(tmp_path):
    """Steps, tokens, schedule and rows stay, so that the weights do, to rounding."""
    phase = eight_steps(gradient_accumulation=2)
    whole = objective_without_dropout()
    tiny_trainer(tmp_path / "whole", whole, phase).train_phase()
    run = tmp_path / "run"
    codes, _ = two_processes(run, objective_without_dropout, signal_at=0, phase=phase)
    assert codes == [3, 3]

    class Stopped(TinyObjective):
        def begin_step(self, step, steps):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        tiny_trainer(run, Stopped(dropout=0.0), phase).train_phase()
    codes, (first, second) = two_processes(run, objective_without_dropout, phase=phase)
    assert codes == [0, 0] and torch.equal(first, second)
    torch.testing.assert_close(first, weights(whole), rtol=1e-4, atol=1e-5)
    for key in ("step", "steps", "tokens", "learning_rate", "loss"):
        mine, theirs = ([r[key] for r in metrics(of)] for of in (run, tmp_path / "whole"))
        assert mine == pytest.approx(theirs, rel=1e-4), key


def test_rows_that_two_processes_cannot_share_are_refused(tmp_path):
    codes, _ = two_processes(tmp_path / "run", phase=eight_steps(batch_size=3))
    assert codes == [4, 4]


def test_what_is_measured_is_the_mean_of_all(tmp_path):
    def measuring(rank):
        objective = objective_without_dropout()
        objective.measured = lambda: {"both": 1.0 + 2 * rank} | ({"one": 7.0} if rank else {})
        return objective

    codes, _ = two_processes(tmp_path / "run", measuring)
    assert codes == [0, 0]
    assert [record["measured"] for record in metrics(tmp_path / "run")] == [{"both": 2.0, "one": 7.0}] * STEPS


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
    assert [r["step"] for r in metrics(run)] == list(range(1, STEPS + 1))


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

    codes, (first, second) = two_processes(tmp_path / "run", Spoiled, phase=eight_steps())
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
