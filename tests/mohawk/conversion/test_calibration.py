"""Mixers fitted to attention's outputs: what is left of an error, against the same numbers taken by hand."""

import pytest
import torch

from mohawk.conversion import calibration
from mohawk.conversion.calibration import calibrate
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.mixers import MIXERS
from mohawk.models.packed import positions_of
from tests.models.conftest import tiny_teacher

LAYERS = [0, 2]


def student_of(teacher, mixer: str = "mamba2"):
    torch.manual_seed(0)  # of what is random in it
    return hybrid_from_teacher(teacher, LAYERS, mixer)


def rows(seed: int, count: int = 4, n: int = 48) -> list[dict[str, torch.Tensor]]:
    """Rows of two documents, the first with padding behind them."""
    ids = torch.randint(3, 97, (count, n), generator=torch.Generator().manual_seed(seed))
    segments = (torch.arange(n) >= n // 3).long().expand(count, n).clone()
    segments[0, -5:] = -1
    batches = zip(ids, segments, strict=True)
    return [{"input_ids": i[None], "segment_ids": s[None], "position_ids": positions_of(s[None])} for i, s in batches]


@torch.no_grad()
def left(student, teacher, batches) -> dict[int, float]:
    """By layer, the mixers' squared error on the teacher's own inputs over the square of attention's outputs."""
    seen: dict[int, tuple] = {}

    def keep(i):
        return lambda module, args, given, out: seen.__setitem__(i, (given["hidden_states"], out[0]))

    hooks = [teacher.model.layers[i].self_attn.register_forward_hook(keep(i), with_kwargs=True) for i in LAYERS]
    sums = {i: [0.0, 0.0] for i in LAYERS}
    for batch in batches:
        teacher.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        real = batch["segment_ids"] >= 0
        for i, (given, wanted) in seen.items():
            found, _ = student.model.layers[i].self_attn(given, segment_ids=batch["segment_ids"])
            sums[i][0] += float((found - wanted)[real].double().square().sum())
            sums[i][1] += float(wanted[real].double().square().sum())
    for hook in hooks:
        hook.remove()
    return {i: error / square for i, (error, square) in sums.items()}


@pytest.mark.parametrize("mixer", MIXERS)
def test_steps_leave_less_than_least_squares_alone(mixer):
    teacher, batches = tiny_teacher(), rows(1)
    alone, fitted = (student_of(teacher, mixer) for _ in range(2))
    start = left(alone, teacher, batches)
    said = calibrate(alone, teacher, batches, steps=0)
    after = left(alone, teacher, batches)
    assert all(after[i] < 0.95 * start[i] for i in LAYERS)
    assert {i: error for i, (_, error) in said.items()} == pytest.approx(after, rel=1e-3)
    said = calibrate(fitted, teacher, batches, steps=12)
    ends = left(fitted, teacher, batches)
    assert said[0] == pytest.approx((after[0], ends[0]), rel=1e-3)
    assert all(ends[i] < 0.9 * after[i] for i in LAYERS), (after, ends)
    copied = student_of(teacher, mixer).state_dict()
    changed = {name for name, value in fitted.state_dict().items() if not torch.equal(value, copied[name])}
    assert {name.split(".")[2] for name in changed} == {"0", "2"} and all(".self_attn." in name for name in changed)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in fitted.parameters())


@pytest.mark.parametrize("rate", [1e4, 1e30])
def test_steps_that_lead_astray_are_taken_back(rate, monkeypatch):
    teacher, batches = tiny_teacher(), rows(2)
    alone, astray = (student_of(teacher) for _ in range(2))
    calibrate(alone, teacher, batches, steps=0)
    monkeypatch.setattr(calibration, "LEARNING_RATE", rate)
    errors = calibrate(astray, teacher, batches, steps=4)
    assert all(first == last for first, last in errors.values())
    for name, value in alone.state_dict().items():
        assert torch.equal(value, astray.state_dict()[name]), name


def test_padding_and_other_documents_have_no_part():
    """What stands at padding, and the documents' order, change nothing that is fitted to least squares."""
    teacher, batches = tiny_teacher(), rows(3)
    first, second = (student_of(teacher) for _ in range(2))
    calibrate(first, teacher, batches, steps=0)
    batches[0]["input_ids"][0, -5:] = 7
    halves = [
        {name: value[:, part] for name, value in batch.items()}
        for batch in batches
        for part in (slice(16, None), slice(0, 16))
    ]
    calibrate(second, teacher, halves, steps=0)
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=1e-3, atol=1e-5)
