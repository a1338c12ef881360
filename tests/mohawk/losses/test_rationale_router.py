"""The bandit's choices against its formulas, and what it is told while training and before."""

import json
import math

import pytest
import torch

from mohawk.errors import UserError
from mohawk.losses.rationale_router import RationaleRouter, RoutedRationales, label_loss, measure_gains, read_gains
from mohawk.losses.rationales import RationaleDistiller


def test_ucb1_by_hand():
    router = RationaleRouter(["a", "b", "c"])
    for name, gain in (("a", 0.1), ("b", 0.3), ("c", -0.1)):
        assert router.choose() == router.choose() == name  # each once, in order
        router.update(name, gain)
    counts, sums = {"a": 1, "b": 1, "c": 1}, {"a": 0.1, "b": 0.3, "c": -0.1}
    rewards = {"a": 0.1, "b": 0.28, "c": -0.12}
    low, high = -0.1, 0.3
    for t in range(3, 40):
        bound = {n: (sums[n] / counts[n] - low) / (high - low) + math.sqrt(2 * math.log(t) / counts[n]) for n in counts}
        best = max(bound, key=bound.get)
        assert router.choose() == best
        router.update(best, rewards[best])
        counts[best] += 1
        sums[best] += rewards[best]
        low, high = min(low, rewards[best]), max(high, rewards[best])
    assert router.gains() == pytest.approx({n: sums[n] / counts[n] for n in counts})
    assert counts["b"] > counts["a"] > counts["c"]


def test_exp3_by_hand():
    router = RationaleRouter(["a", "b"], algorithm="exp3", gamma=0.2, seed=3)
    weights, history = {"a": 1.0, "b": 1.0}, []
    for turn in range(30):
        p = {n: 0.8 * w / sum(weights.values()) + 0.1 for n, w in weights.items()}
        assert router.probabilities() == pytest.approx(p)
        name = router.choose()
        assert router.choose() == name
        gain = {"a": 0.01, "b": 0.03}[name] * (1 + turn % 3)
        history.append(gain)
        low, high = min(history), max(history)
        reward = (gain - low) / (high - low) if high > low else 0.5
        weights[name] *= math.exp(0.2 * reward / p[name] / 2)
        router.update(name, gain)
    assert {name for name, _ in router.history} == {"a", "b"}


@pytest.mark.parametrize("algorithm", ["ucb1", "exp3"])
def test_the_better_teacher_is_found(algorithm):
    noise = torch.Generator().manual_seed(0)
    router = RationaleRouter(["worse", "better"], algorithm=algorithm)
    for _ in range(300):
        name = router.choose()
        router.update(name, {"worse": 0.001, "better": 0.002}[name] + 2e-4 * torch.randn((), generator=noise).item())
    assert sum(name == "better" for name, _ in router.history) > 200
    gains = router.gains()
    assert gains["better"] > gains["worse"] > 0


@pytest.mark.parametrize("algorithm", ["ucb1", "exp3"])
def test_a_state_goes_on_as_it_would_have(algorithm):
    def go_on(router, rounds):
        for turn in range(rounds):
            router.update(name := router.choose(), len(name) * 0.1 + turn % 2)
        return router.history

    whole = go_on(RationaleRouter(["a", "bb", "ccc"], algorithm=algorithm, seed=1), 20)
    half = RationaleRouter(["a", "bb", "ccc"], algorithm=algorithm, seed=1)
    go_on(half, 10)
    other = RationaleRouter(["a", "bb", "ccc"], algorithm=algorithm, seed=1)
    other.load(json.loads(json.dumps(half.state())))
    assert go_on(other, 10) == whole
    with pytest.raises(UserError, match=r"^router: the state is of another one \(seed: 1 then, 2 now\)$"):
        RationaleRouter(["a", "bb", "ccc"], algorithm=algorithm, seed=2).load(half.state())


def test_broken_training_is_the_worst_gain():
    router = RationaleRouter(["a", "b"])
    router.update("a", math.nan)
    router.update("b", 0.5)
    router.update("a", -0.25)
    router.update("b", -math.inf)
    assert router.history == [("a", 0.0), ("b", 0.5), ("a", -0.25), ("b", -0.25)]


class Rows(torch.utils.data.Dataset):
    def __init__(self, first, count=7):
        self.first, self.count = first, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        ids = torch.full((4,), self.first + range(self.count)[index])
        return {"input_ids": ids, "labels": ids}


def test_rows_of_the_chosen_teacher_while_training():
    """Rounds of three steps of two micro-batches; a run that stops inside a round goes on as it would have."""

    def make():
        losses = iter([5.0, 4.9, 4.0, 3.9, 3.0, 2.9, 2.0])  # a falls by 0.1, b by 0.9 ...
        return RoutedRationales(
            {"a": Rows(0), "b": Rows(100)}, RationaleRouter(["a", "b"]), validate=lambda: next(losses), every=3, seed=2
        )

    def run(routed, steps):
        seen = []
        for step in steps:
            for _ in range(2):
                batch = routed({"input_ids": torch.zeros(2, 4, dtype=torch.long)}, step)
                assert batch["input_ids"].shape == (2, 4) and batch.keys() == {"input_ids", "labels"}
                seen.append(batch["input_ids"][:, 0].tolist())
            routed.end_step(step)
        return seen

    routed = make()
    whole = run(routed, range(12))
    assert [name for name, _ in routed.router.history] == ["a", "b", "b", "b"]
    arms = ["b" if min(ids) >= 100 else "a" for ids in whole]
    expected = [name for name, _ in routed.router.history for _ in range(6)]
    assert arms == expected and set(arms) == {"a", "b"}
    assert [gain for _, gain in routed.router.history] == pytest.approx([0.1, 0.9, 0.1, 0.9])
    assert len({tuple(ids) for ids in whole}) > 12  # drawn anew

    first = make()
    begun = run(first, range(4))
    state = json.loads(json.dumps(first.state()))
    again = make()
    again.load(state)
    losses = iter([4.0, 3.9, 3.0])  # what it has not measured yet
    again.validate = lambda: next(losses)
    assert begun + run(again, range(4, 12)) == whole


@pytest.fixture
def trial(make_llama, tokenizer):
    """A teacher whose labels are those of the validation data, and one whose labels are anything."""
    prompts = [f"{i} {i}" for i in range(6)]
    right = [{"prompt": p, "label": "even" if i % 2 == 0 else "odd", "rationale": p} for i, p in enumerate(prompts)]
    wrong = [{"prompt": p, "label": "zzzz", "rationale": None} for p in prompts]
    student = make_llama(seed=3).train()
    return student, tokenizer, {"wrong": wrong, "right": right}, right[:4]


def test_measured_gains_prefer_the_better_teacher_and_leave_the_student(trial, tmp_path):
    student, tokenizer, records, validation = trial
    before = {name: value.clone() for name, value in student.state_dict().items()}
    settings = dict(steps=4, batch_size=3, learning_rate=5e-3)
    keep = tmp_path / "gains.json"
    router = measure_gains(
        student, tokenizer, records, validation, RationaleRouter(["wrong", "right"]), rounds=5, keep=keep, **settings
    )
    assert router.gains()["right"] > 0.2 > router.gains()["wrong"]
    assert student.training and all(torch.equal(before[n], v) for n, v in student.state_dict().items())
    assert read_gains(keep)["gains"] == router.gains()

    # stopped after two rounds, it goes on with the third
    part = tmp_path / "part.json"
    for rounds in (2, 5):
        again = measure_gains(
            *(student, tokenizer, records, validation, RationaleRouter(["wrong", "right"])),
            rounds=rounds,
            keep=part,
            **settings,
        )
    assert again.history == router.history
    with pytest.raises(UserError, match=r"^[^\n]+part.json: was measured with other settings or data; [^\n]+$"):
        measure_gains(
            student, tokenizer, records, validation, RationaleRouter(["wrong", "right"]), rounds=5, keep=part, steps=3
        )


def test_the_first_gain_by_hand(trial):
    """One step on all of a teacher's records at once is one step of AdamW on the distiller's loss."""
    student, tokenizer, records, validation = trial
    one = {"right": records["right"][:1]}
    router = measure_gains(
        student,
        tokenizer,
        one,
        validation,
        RationaleRouter(["right"]),
        rounds=1,
        steps=2,
        batch_size=2,
        learning_rate=1e-3,
    )
    distiller = RationaleDistiller(student, tokenizer)
    before = label_loss(distiller, validation)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    record = one["right"][0]
    for _ in range(2):
        distiller.compute_loss(*([record[key]] * 2 for key in ("prompt", "label", "rationale"))).backward()
        optimizer.step()
        optimizer.zero_grad()
    losses = [distiller.compute_loss([r["prompt"]], [r["label"]], [None]).item() for r in validation]
    counts = [len(r["label"]) + 1 for r in validation]
    after = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    assert router.history == [("right", pytest.approx(before - after, rel=1e-4))]


def test_wrong_input_is_one_line(trial, tmp_path):
    student, tokenizer, records, validation = trial
    for options, said in (
        ({"teachers": []}, "router: got teachers []"),
        ({"teachers": ["a", "a"]}, "router: got teachers ['a', 'a']"),
        ({"teachers": ["a"], "algorithm": "x"}, "router.algorithm: got 'x'; allowed: ucb1, exp3"),
        ({"teachers": ["a"], "gamma": 0}, "router.gamma: got 0; allowed:"),
    ):
        with pytest.raises(UserError) as error:
            RationaleRouter(**options)
        assert str(error.value).startswith(said) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="^router: got teacher 'x'; allowed: a$"):
        RationaleRouter(["a"]).update("x", 1.0)
    with pytest.raises(UserError, match="^router: no rationales of more$"):
        measure_gains(student, tokenizer, records, validation, RationaleRouter(["wrong", "more"]), rounds=1)
    with pytest.raises(UserError, match="^router: the validation data are empty; "):
        measure_gains(student, tokenizer, records, [], RationaleRouter(["wrong"]), rounds=1)
    with pytest.raises(UserError, match="^router: has a, the datasets are of b$"):
        RoutedRationales({"b": []}, RationaleRouter(["a"]), validate=float, every=1)
    with pytest.raises(UserError, match="^router.every: got 0; "):
        RoutedRationales({"a": []}, RationaleRouter(["a"]), validate=float, every=0)
    path = tmp_path / "gains.json"
    for text, said in (
        ("{", "not JSON"),
        ("[]", "needs {"),
        ('{"gains": {}}', "needs {"),
        ('{"gains": {"a": "x"}}', "needs {"),
        ('{"gains": {"a": NaN}}', "needs {"),
        ('{"gains": {"a": -Infinity}}', "needs {"),
        ('{"gains": {"a": 1' + "0" * 400 + "}}", "needs {"),
    ):
        path.write_text(text)
        with pytest.raises(UserError) as error:
            read_gains(path)
        assert str(error.value).startswith(f"{path}: {said}") and "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_gains(tmp_path / "none.json")
