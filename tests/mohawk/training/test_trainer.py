import json
import logging
import math
import os
import resource
import signal
import threading
import types

import pytest
import torch
from torch import nn

from mohawk.core.folders import Interrupted, is_complete, locked
from mohawk.core.stopping import STOPPING
from mohawk.errors import UserError
from mohawk.training.batches import NOTHING, Batches, WithNothing, steps_of
from mohawk.training.checkpoint import WEIGHTS
from tests.helpers.tiny_phase import (
    LENGTH,
    Rows,
    TinyObjective,
    cheap_training,  # noqa: F401
    collate,
    tiny_phase,
    tiny_trainer,
    weights,
)

pytestmark = pytest.mark.usefixtures("cheap_training")


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def wsd(step, steps, warmup, decay):
    """The learning rate's factor at 0-based `step`: linear up, flat, linear to zero after the last step."""
    if step < warmup:
        return step / warmup
    return min(1.0, (steps - step) / decay) if decay else 1.0


# ---- What a phase computes ----


class ApartObjective(TinyObjective):
    def apart(self):
        return {f"layer_{i}": list(student.parameters()) for i, student in enumerate(self.student)}


@pytest.mark.parametrize("kind", [TinyObjective, ApartObjective])
def test_weights_are_those_of_a_plain_loop(kind, tmp_path):
    """AdamW, clipping, schedule, order of the data and sum of the losses, against a plain loop; losses that train
    parameters of their own may have a third of the square of the norm each."""
    phase = tiny_phase(steps=20, max_grad_norm=0.05)
    trained = kind(dropout=0.0)
    tiny_trainer(tmp_path, trained, phase).train_phase()

    objective, rows = TinyObjective(dropout=0.0), Rows()
    optimizer = torch.optim.AdamW(
        objective.parameter_groups(phase.learning_rate, phase.weight_decay), betas=(0.9, 0.95), fused=True
    )
    seed = tiny_trainer(tmp_path / "other").order_seed
    for step, indices in enumerate(Batches(len(rows), rows=4, batch_size=4, steps=20, seed=seed)):
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * wsd(step, 20, warmup=2, decay=4)
        sum(loss for _, loss in objective.losses(**collate([rows[i] for i in indices]))).backward()
        if kind is ApartObjective:
            norms = [nn.utils.clip_grad_norm_(part.parameters(), 0.05 / 3**0.5) for part in objective.student]
            assert step == 19 or min(norms) > 0.03  # or clipping would not be tested
        else:
            nn.utils.clip_grad_norm_(objective.student.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    assert step == 19
    torch.testing.assert_close(weights(trained), weights(objective), rtol=1e-5, atol=1e-6)
    assert (weights(trained) - weights(TinyObjective())).abs().max() > 0.01


def test_metrics_and_schedule(tmp_path):
    phase = tiny_phase(steps=20, learning_rate=2e-2, warmup=0.25, decay=0.5)
    tiny_trainer(tmp_path, phase=phase).train_phase()
    records = metrics(tmp_path)
    assert [r["step"] for r in records] == list(range(1, 21))
    assert [r["tokens"] for r in records] == [4 * LENGTH * step for step in range(1, 21)]
    for r in records:
        assert r["phase"] == "mixing" and r["steps"] == 20 and r["skipped_steps"] == 0
        assert set(r["parts"]) == {"layer_0", "layer_1", "layer_2"}
        assert r["loss"] == pytest.approx(sum(r["parts"].values()))
        assert r["grad_norm"] > 0 and r["tokens_per_s"] > 0
    rates = [r["learning_rate"] for r in records]
    assert rates == pytest.approx([2e-2 * wsd(step, 20, 5, 10) for step in range(20)])
    assert records[-1]["loss"] < records[0]["loss"] / 2


def test_log_every_averages_over_the_steps_between(tmp_path):
    tiny_trainer(tmp_path / "each").train_phase()
    tiny_trainer(tmp_path / "fifth", phase=tiny_phase(log_every=5)).train_phase()
    each, fifth = metrics(tmp_path / "each"), metrics(tmp_path / "fifth")
    assert [r["step"] for r in fifth] == [5, 10, 15, 20]
    assert fifth[1]["loss"] == pytest.approx(sum(r["loss"] for r in each[5:10]) / 5)


@pytest.mark.parametrize("tokens, steps", [(1, 1), (48, 1), (49, 2), (480.0, 10)])
def test_steps_cover_the_token_budget(tmp_path, tokens, steps):
    assert tiny_trainer(tmp_path, phase=tiny_phase(tokens=tokens)).steps == steps


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup, decay", [(0.0, 0.0), (0.5, 0.5), (0.0, 1.0)])
def test_very_short_phase_trains(tmp_path, steps, warmup, decay):
    objective = TinyObjective()
    tiny_trainer(tmp_path, objective, tiny_phase(steps, warmup=warmup, decay=decay)).train_phase()
    rates = [r["learning_rate"] for r in metrics(tmp_path)]
    assert len(rates) == steps and all(0 <= rate <= 1e-2 for rate in rates) and max(rates) > 0
    assert not torch.equal(weights(objective), weights(TinyObjective()))


def test_accumulation_averages_over_real_tokens(tmp_path):
    """Rows hold 4 to 12 real labels; micro-batch means, averaged or summed, would not give the same."""
    one, two, four = (TinyObjective(dropout=0.0) for _ in range(3))
    tiny_trainer(tmp_path / "1", one, tiny_phase()).train_phase()
    tiny_trainer(tmp_path / "2", two, tiny_phase(batch_size=2, gradient_accumulation=2)).train_phase()
    tiny_trainer(tmp_path / "4", four, tiny_phase(batch_size=1, gradient_accumulation=4)).train_phase()
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(four), weights(one), rtol=1e-4, atol=1e-5)
    losses = [[r["loss"] for r in metrics(tmp_path / run)] for run in "124"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_micro_batch_without_real_labels_counts_for_nothing(tmp_path):
    """Its mean over no tokens is NaN; its share is zero."""
    rows = Rows()
    for row in rows.rows[::5]:
        row["labels"] = torch.full_like(row["labels"], -100)
    objective = TinyObjective()
    phase = tiny_phase(batch_size=1, gradient_accumulation=4)
    tiny_trainer(tmp_path, objective, phase, rows).train_phase()
    assert metrics(tmp_path)[-1]["skipped_steps"] == 0
    assert weights(objective).isfinite().all()


def test_each_loss_is_back_propagated_before_the_next_is_made(tmp_path):
    class Watched(TinyObjective):
        def losses(self, **batch):
            for i, (name, loss) in enumerate(super().losses(**batch)):
                yield name, loss
                assert self.student[i][0].weight.grad is not None
                with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                    loss.backward()

    objective = Watched()
    tiny_trainer(tmp_path, objective, tiny_phase(steps=2)).train_phase()


def test_student_trains_and_the_rest_is_in_eval_mode(tmp_path):
    seen = []

    class Watched(TinyObjective):
        def losses(self, **batch):
            seen.append((self.student[0][1].training, self.teacher[0].training))
            yield from super().losses(**batch)

    tiny_trainer(tmp_path, Watched().train(), tiny_phase(steps=1)).train_phase()
    assert seen == [(True, False)]


def test_parameter_that_no_loss_reaches_is_left_alone(tmp_path):
    class Partly(TinyObjective):
        def losses(self, **batch):
            yield from list(super().losses(**batch))[:2]

    objective = Partly(dropout=0.0)
    tiny_trainer(tmp_path, objective).train_phase()
    assert torch.equal(objective.student[2][0].weight, TinyObjective().student[2][0].weight)
    assert not torch.equal(objective.student[1][0].weight, TinyObjective().student[1][0].weight)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_autocast_is_around_the_losses_only(tmp_path, precision):
    inside, backward = [], []

    class Watched(TinyObjective):
        def losses(self, **batch):
            for name, loss in super().losses(**batch):
                hidden = self.student[0][0](torch.ones(1, 8))
                inside.append((torch.is_autocast_enabled("cpu"), hidden.dtype))
                loss.register_hook(lambda grad: backward.append(torch.is_autocast_enabled("cpu")))
                yield name, loss

    objective = Watched()
    tiny_trainer(tmp_path, objective, tiny_phase(steps=2), precision=precision).train_phase()
    mixed = precision == "bfloat16"
    assert set(inside) == {(mixed, torch.bfloat16 if mixed else torch.float32)}
    assert backward == [False] * 6
    assert all(p.dtype == torch.float32 for p in objective.student.parameters())


# ---- Losses and gradients that are not finite ----


class Spoiled(TinyObjective):
    """Gives a `kind` of trouble in layer 1 at the `at`-th calls (from 1)."""

    def __init__(self, kind, at):
        super().__init__()
        self.kind, self.at, self.calls = kind, at, 0

    def losses(self, **batch):
        self.calls += 1
        for name, loss in super().losses(**batch):
            if name == "layer_1" and self.calls in self.at:
                if self.kind == "nan loss":
                    loss = loss * float("nan")
                elif self.kind == "infinite loss":
                    loss = loss * float("inf")
                elif self.kind == "nan gradient":
                    loss.register_hook(lambda grad: grad * float("nan"))
                else:  # finite gradients, the norm of which is not
                    loss.register_hook(lambda grad: grad * 1e30)
            yield name, loss


@pytest.mark.parametrize("kind", ["nan loss", "infinite loss", "nan gradient", "overflowing norm"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_that_is_not_finite_changes_nothing(tmp_path, caplog, kind, accumulation):
    """With a constant rate, a run whose 3rd step is spoiled ends before the 4th as the run of 2 steps."""
    settings = dict(warmup=0.0, decay=0.0, gradient_accumulation=accumulation)
    spoiled = Spoiled(kind, at=[3 * accumulation])
    short = TinyObjective()
    trainer = tiny_trainer(tmp_path / "spoiled", spoiled, tiny_phase(3, **settings))
    with caplog.at_level(logging.WARNING, "mohawk"):
        trainer.train_phase()
    short_trainer = tiny_trainer(tmp_path / "short", short, tiny_phase(2, **settings))
    short_trainer.train_phase()
    assert torch.equal(weights(spoiled), weights(short))
    mine, theirs = trainer.optimizer.state_dict()["state"], short_trainer.optimizer.state_dict()["state"]
    for index, state in theirs.items():
        for key, value in state.items():
            assert torch.equal(mine[index][key], value), key
    last = metrics(tmp_path / "spoiled")[-1]
    assert last["step"] == 3 and last["skipped_steps"] == 1 and last["skipped_at"] == [3]
    assert (last["loss"] is None) == ("loss" in kind)
    assert (last["parts"]["layer_1"] is None) == ("loss" in kind)
    assert "step 3 changed nothing: not finite: " in caplog.text


def test_training_goes_on_after_a_skipped_step(tmp_path):
    objective = Spoiled("nan loss", at=[4, 5, 9])
    tiny_trainer(tmp_path, objective).train_phase()
    records = metrics(tmp_path)
    assert records[-1]["skipped_steps"] == 3
    assert [r["step"] for r in records if r["loss"] is None] == [4, 5, 9]
    assert records[-1]["loss"] < records[0]["loss"] / 2


def test_skipped_steps_do_not_hide_the_loss_of_the_others(tmp_path):
    tiny_trainer(tmp_path, Spoiled("nan loss", at=[4]), tiny_phase(log_every=5)).train_phase()
    first = metrics(tmp_path)[0]
    assert math.isfinite(first["loss"]) and first["skipped_at"] == [4] and first["skipped_steps"] == 1


def test_run_stops_after_three_in_a_row(tmp_path):
    objective = Spoiled("nan gradient", at=range(7, 100))
    with pytest.raises(UserError) as caught:
        tiny_trainer(tmp_path, objective, tiny_phase(save_every=3)).train_phase()
    message = str(caught.value)
    assert "\n" not in message and "phases.mixing: 3 steps in a row, the last one step 9" in message
    assert "Lower phases.mixing.learning_rate (now 0.01)" in message
    assert metrics(tmp_path)[-1]["step"] == 9
    assert weights(objective).isfinite().all()
    # The same command with a lower rate goes on from before the trouble, with that rate.
    assert [p.name for p in (tmp_path / "phases/mixing").iterdir() if p.is_dir()] == ["checkpoint-6"]
    again = TinyObjective()
    tiny_trainer(tmp_path, again, tiny_phase(save_every=3, learning_rate=1e-3)).train_phase()
    records = metrics(tmp_path)
    assert [r["step"] for r in records] == list(range(1, 21))
    assert records[5]["learning_rate"] == pytest.approx(1e-2)
    assert records[6]["learning_rate"] == pytest.approx(1e-3)
    assert records[19]["learning_rate"] == pytest.approx(1e-3 / 4)


def test_run_stops_after_ten_in_all(tmp_path):
    with pytest.raises(UserError, match="phases.mixing: 10 steps, the last one step 19"):
        tiny_trainer(tmp_path, Spoiled("nan loss", at=range(1, 100, 2)), tiny_phase(steps=40)).train_phase()


# ---- Going on ----


def test_finished_phase_is_restored_without_reading_data(tmp_path):
    first, second, rows = TinyObjective(), TinyObjective(), Rows()
    tiny_trainer(tmp_path, first).train_phase()
    tiny_trainer(tmp_path, second, rows=rows).train_phase()
    assert torch.equal(weights(first), weights(second))
    assert rows.reads == 0
    assert [r["step"] for r in metrics(tmp_path)] == list(range(1, 21))


def test_resuming_does_not_read_the_batches_before(tmp_path):
    tiny_trainer(tmp_path, phase=tiny_phase(steps=20)).train_phase()
    rows = Rows()
    tiny_trainer(tmp_path, rows=rows, phase=tiny_phase(steps=22)).train_phase()
    assert rows.reads == 2 * 4


def test_checkpoint_holds_what_trains_and_no_frozen_weight(tmp_path):
    from safetensors.torch import load_file

    tiny_trainer(tmp_path).train_phase()
    saved = load_file(tmp_path / "phases/mixing/checkpoint-20" / WEIGHTS)
    assert set(saved) == {f"student.{name}" for name, _ in TinyObjective().student.named_parameters()}
    files = {path.name for path in (tmp_path / "phases/mixing/checkpoint-20").iterdir()}
    assert files == {WEIGHTS, "optimizer.pt", "rng_state.pth", "phase_state.json", "MANIFEST.json"}


def test_checkpoint_of_another_model_is_refused(tmp_path):
    class Wider(TinyObjective):
        def __init__(self):
            super().__init__()
            self.student[1] = nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 8))

    tiny_trainer(tmp_path).train_phase()
    with pytest.raises(UserError, match="holds other parameters than this recipe trains .*student.1"):
        tiny_trainer(tmp_path, Wider()).train_phase()


def test_another_batch_size_is_noticed(tmp_path, caplog):
    tiny_trainer(tmp_path, phase=tiny_phase(steps=5)).train_phase()
    with caplog.at_level(logging.WARNING, "mohawk"):
        tiny_trainer(tmp_path, phase=tiny_phase(steps=10, batch_size=2)).train_phase()
    assert "rows a step 4 -> 2; the data go on in another order" in caplog.text


def test_phases_have_their_own_folders_orders_and_lines(tmp_path):
    orders = {}
    for name in ("mixing", "hidden"):
        trainer = tiny_trainer(tmp_path, name=name, phase=tiny_phase(steps=3))
        orders[name] = [batch["input_ids"].tolist() for batch in trainer._batches(trainer._sampler())]
        trainer.train_phase()
        assert is_complete(tmp_path / "phases" / name / "checkpoint-3")
    assert orders["mixing"] != orders["hidden"]
    assert [(r["phase"], r["step"]) for r in metrics(tmp_path)] == [
        (name, step) for name in ("mixing", "hidden") for step in (1, 2, 3)
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_raises(tmp_path, number):
    class Signalled(TinyObjective):
        def losses(self, **batch):
            if trainer.step == 7:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # `timeout` and torchrun deliver a signal twice
            yield from super().losses(**batch)

    before = signal.getsignal(number)
    trainer = tiny_trainer(tmp_path, Signalled())
    with pytest.raises(Interrupted) as caught:
        trainer.train_phase()
    assert signal.getsignal(number) is before
    assert caught.value.step == 8
    assert caught.value.path == tmp_path / "phases/mixing/checkpoint-8" and is_complete(caught.value.path)

    resumed, uninterrupted = TinyObjective(), TinyObjective()
    tiny_trainer(tmp_path, resumed).train_phase()
    tiny_trainer(tmp_path / "uninterrupted", uninterrupted).train_phase()
    assert torch.equal(weights(resumed), weights(uninterrupted))
    assert [r["step"] for r in metrics(tmp_path)] == list(range(1, 21))
    drop = ("tokens_per_s",)
    for mine, theirs in zip(metrics(tmp_path), metrics(tmp_path / "uninterrupted"), strict=True):
        assert {k: v for k, v in mine.items() if k not in drop} == {k: v for k, v in theirs.items() if k not in drop}


def test_signal_after_the_last_step_stops_the_run_too(tmp_path):
    class Signalled(Rows):
        def __getitem__(self, index):
            raise AssertionError("a finished phase reads no data")

    tiny_trainer(tmp_path).train_phase()
    trainer = tiny_trainer(tmp_path, rows=Signalled())
    trainer.checkpoints.load_moments = lambda checkpoint: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        trainer.train_phase()
    assert caught.value.step == 20 and is_complete(caught.value.path)


@pytest.fixture
def interruptible():
    """Python's own SIGINT handler, also where a shell started the tests in the background, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_second_interrupt_stops_at_once(tmp_path, interruptible):
    class Signalled(TinyObjective):
        def losses(self, **batch):
            if trainer.step == 7:
                signal.raise_signal(signal.SIGINT)  # os.kill may reach another thread first, and this one late
                threading.Event().wait(0.02)
                signal.raise_signal(signal.SIGINT)
            yield from super().losses(**batch)

    trainer = tiny_trainer(tmp_path, Signalled(), tiny_phase(save_every=5))
    trainer._request.same_signal = 0.01
    with pytest.raises(KeyboardInterrupt):
        trainer.train_phase()
    assert [p.name for p in (tmp_path / "phases/mixing").glob("*checkpoint*")] == ["checkpoint-5"]


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_every_stopping_signal_saves(tmp_path, interruptible, number):
    class Signalled(TinyObjective):
        def losses(self, **batch):
            if trainer.step == 6:
                signal.raise_signal(number)
            yield from super().losses(**batch)

    trainer = tiny_trainer(tmp_path, Signalled(), tiny_phase(save_every=1000))
    with pytest.raises(Interrupted) as stopped:
        trainer.train_phase()
    assert stopped.value.step == 7 and is_complete(tmp_path / "phases/mixing/checkpoint-7")


def test_saves_by_the_clock_beside_the_steps(tmp_path, monkeypatch):
    """A step takes a minute here; what the clock asks for is written when the step that it falls into is over."""
    now = types.SimpleNamespace(monotonic=lambda: 60.0 * trainer.step)
    for minutes, saved in ((3, [4, 8, 12, 16, 20]), (None, [9, 18, 20]), (5, [6, 9, 15, 18, 20])):
        run = tmp_path / str(minutes)
        phase = tiny_phase(save_every=9 if minutes != 3 else 1000, save_minutes=minutes, keep_checkpoints=100)
        trainer = tiny_trainer(run, phase=phase)
        with monkeypatch.context() as patched:
            patched.setattr("mohawk.training.trainer.time", now)
            trainer.train_phase()
        found = sorted(int(path.name.split("-")[1]) for path in (run / "phases/mixing").glob("checkpoint-*"))
        assert found == saved


def test_works_outside_the_main_thread(tmp_path):
    objective = TinyObjective()
    thread = threading.Thread(target=tiny_trainer(tmp_path, objective).train_phase)
    thread.start()
    thread.join()
    assert metrics(tmp_path)[-1]["step"] == 20


# ---- Mistakes and trouble ----


@pytest.mark.parametrize("limit", [200, 2000, 6000])
def test_full_disk_leaves_the_earlier_checkpoint(tmp_path, limit):
    """A limit on file size acts as a full disk."""
    # the metrics file would hit the limit before
    trainer = tiny_trainer(tmp_path, phase=tiny_phase(log_every=1000, save_every=5))
    write = trainer.checkpoints._write

    def write_to_full_disk(folder):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            if trainer.step == 10:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            write(folder)
        finally:
            # for nothing but the checkpoint: torch's products may make code of their own in memory files
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    trainer.checkpoints._write = write_to_full_disk
    with pytest.raises(UserError, match="checkpoint-10: the .* could not be written.*checkpoint-5 is"):
        trainer.train_phase()
    assert [p.name for p in (tmp_path / "phases/mixing").glob("*checkpoint*")] == ["checkpoint-5"]
    resumed, uninterrupted = TinyObjective(), TinyObjective()
    tiny_trainer(tmp_path, resumed).train_phase()
    tiny_trainer(tmp_path / "uninterrupted", uninterrupted).train_phase()
    assert torch.equal(weights(resumed), weights(uninterrupted))


def test_permission_error_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    real = os.rename

    def refuse(source, target):
        if str(target).endswith("checkpoint-10"):
            raise PermissionError(13, "Permission denied")
        return real(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="written .Permission denied; .* there.; checkpoint-5 is complete"):
        tiny_trainer(tmp_path, phase=tiny_phase(save_every=5)).train_phase()
    assert [p.name for p in (tmp_path / "phases/mixing").glob("*checkpoint*")] == ["checkpoint-5"]


def test_phase_that_another_process_trains_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.folder.mkdir(parents=True)
    with locked(trainer.folder):
        with pytest.raises(UserError, match="another process"):
            trainer.train_phase()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"precision": "float16"}, "precision: got float16; allowed are auto, float32, bfloat16"),
        pytest.param(
            {"device": "cuda"},
            "device: got cuda, but torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device"),
        ),
    ],
)
def test_user_mistakes_are_named(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        tiny_trainer(tmp_path, **settings)


def test_empty_data_are_named(tmp_path):
    rows = Rows()
    rows.rows = []
    with pytest.raises(UserError, match="phases.mixing: the training data hold no example"):
        tiny_trainer(tmp_path, rows=rows)


def test_groups_must_be_of_the_objective(tmp_path):
    class Foreign(TinyObjective):
        def parameter_groups(self, learning_rate, weight_decay):
            return [{"params": [nn.Parameter(torch.zeros(2))]}]

    with pytest.raises(ValueError, match="parameter_groups: 1 parameters, 0 of them in the objective"):
        tiny_trainer(tmp_path, Foreign())


# ---- The order of the data ----


def batches(**settings):
    return list(Batches(**{"examples": 10, "rows": 3, "batch_size": 3, "steps": 20, "seed": 5, **settings}))


def test_every_example_comes_once_a_pass():
    indices = [i for batch in batches() for i in batch]
    assert len(indices) == 60
    passes = [indices[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(turn) == list(range(10)) for turn in passes)
    assert len({tuple(turn) for turn in passes}) == 6


def test_order_depends_on_the_seed_alone():
    assert batches() == batches() != batches(seed=6)
    assert batches(steps=30)[:20] == batches()
    assert batches(steps=30, done=20) == batches(steps=30)[20:]


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 12), (1, 5), (2, 6), (2, 4), (3, 4), (4, 2), (12, 3)])
def test_a_step_has_the_same_rows_whoever_reads_them(processes, batch_size):
    """In their order; micro-batches are of batch_size, and a process's last one has what is left."""
    one = batches(rows=12, batch_size=12)
    read = [batches(rows=12, batch_size=batch_size, rank=rank, processes=processes) for rank in range(processes)]
    per_step = len(read[0]) // 20
    assert per_step == math.ceil(12 / processes / batch_size)
    for step in range(20):
        parts = [batch for own in read for batch in own[step * per_step : (step + 1) * per_step]]
        assert [i for batch in parts for i in batch] == one[step]
        assert max(map(len, parts)) <= batch_size


def test_rows_that_cannot_be_dealt_evenly():
    with pytest.raises(ValueError, match="5 rows a step cannot be dealt evenly to 2 processes"):
        batches(rows=5, processes=2)


def test_batch_larger_than_the_data():
    assert [sorted(batch) for batch in batches(examples=2, rows=4, batch_size=4, steps=2)] == [[0, 0, 1, 1]] * 2


def test_trackers_get_every_number_of_a_record(tmp_path, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Tracker)
    tiny_trainer(tmp_path, report_to=["mlflow"]).train_phase()
    assert seen and all({"loss", "grad_norm", "tokens_per_s"} <= logs.keys() for logs in seen)
    assert any(name.startswith("parts/") for name in seen[0])
    with pytest.raises(UserError, match="report_to: .*nonsense"):
        tiny_trainer(tmp_path / "other", report_to=["nonsense"])


@pytest.mark.parametrize(("examples", "epochs", "rows", "size", "processes"), [
    (10, 1, 4, 4, 1), (10, 2, 4, 2, 1), (7, 3, 6, 2, 2), (5, 1, 4, 4, 2), (5, 1, 4, 1, 4), (8, 1, 4, 3, 2),
    (3, 1, 8, 2, 4),
])  # fmt: skip
def test_epochs_read_every_row_as_often_and_the_last_step_has_what_is_left(examples, epochs, rows, size, processes):
    phase = types.SimpleNamespace(
        epochs=epochs, batch_size=rows, gradient_accumulation=1, sequence_length=9, tokens=None
    )
    steps = steps_of(phase, examples)
    assert steps == math.ceil(epochs * examples / rows)
    settings = dict(rows=rows, batch_size=size, steps=steps, seed=3, processes=processes, in_all=epochs * examples)
    dealt = [Batches(examples, rank=rank, **settings) for rank in range(processes)]
    read = [list(one) for one in dealt]
    assert [len(one) for one in dealt] == [len(one) for one in read]
    last = len(read[0]) - (steps - 1) * dealt[0].per_step
    assert all(len(one) == len(read[0]) for one in read) and 0 < last <= dealt[0].per_step
    every = [i for one in read for batch in one for i in batch if i != NOTHING]
    assert sorted(every) == sorted(list(range(examples)) * epochs)
    assert all(0 < len(batch) <= size for one in read for batch in one)
    whole = (steps - 1) * dealt[0].per_step
    counts = [sum(i != NOTHING for batch in one[whole:] for i in batch) for one in read]
    assert sum(counts) == epochs * examples - (steps - 1) * rows and max(counts) - min(counts) <= 1
    for done in range(steps):
        rest = [list(Batches(examples, rank=rank, done=done, **settings)) for rank in range(processes)]
        assert rest == [one[done * dealt[0].per_step :] for one in read]


def test_a_row_that_teaches_nothing():
    rows = [{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}]
    padded = WithNothing(rows)
    assert len(padded) == 1 and padded[0] is rows[0] and padded[NOTHING]["labels"].tolist() == [-100, -100]
