"""`mohawk select` and `mohawk compose`: from a tiny run with mixers everywhere to a student with some, and phase 3."""

import itertools
import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from mohawk.cli import main
from mohawk.conversion.compose import AttentionBudget, compose, state_bytes
from mohawk.conversion.patterns import regular_layers
from mohawk.conversion.probe import Probe
from mohawk.conversion.recipe import Recipe
from mohawk.conversion.run import convert
from mohawk.conversion.select import greedy, select
from mohawk.conversion.swap import keep_attention
from mohawk.core.folders import is_complete, sum_file, write_whole
from mohawk.errors import UserError
from mohawk.loading.describe import describe
from mohawk.measures.compare import compare, decode_speed
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import HybridConfig
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.models.conftest import tiny_teacher

pytestmark = pytest.mark.usefixtures("cheap_training")
TOKENS = 256


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """A finished run of phases 1 and 2 over all four layers."""
    folder = tmp_path_factory.mktemp("all")
    teacher = tiny_teacher(vocab_size=258, bos_token_id=256, eos_token_id=257)
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    for i in range(40):
        text = f"Document {i} counts {', '.join(str(i * k) for k in range(1, 12))}.\n"
        (folder / f"train_{i}.txt").write_text(text * (1 + i % 4))
    phase = {"tokens": 256, "batch_size": 4, "sequence_length": 32, "learning_rate": 3e-3}
    recipe = Recipe.from_dict(
        {
            "teacher": str(folder / "teacher"),
            "student": {"ssm_layers": "all"},
            "data": {
                "train": [str(folder / "train_*.txt")], "validation_share": 0.1, "cache": str(folder / "cache"),
            },
            "phases": {"mixing": phase, "hidden": {**phase, "train_mlp": True}, "end_to_end": None},
            "evaluation": {
                "sequence_length": 32, "batch_size": 4, "tokens": TOKENS,
                "longest": 64, "contexts": [8], "decode_tokens": 2,
                "prompt": "A cat", "continuation_tokens": 2,
            },
            "precision": "float32", "device": "cpu", "output": str(folder / "run"),
        }
    )  # fmt: skip
    convert(recipe)
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy to work in."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def selected(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("selected") / "run"
    shutil.copytree(trained, folder)
    for by in ("kl", "alone"):
        select(folder, by=by, tokens=TOKENS)
    return folder


def supermodular(chosen):
    """Every rise grows with what is already replaced."""
    return sum((i + 2) ** 1.5 for i in chosen) * (1 + len(chosen))


def either_or(chosen):
    """Two layers that stand in for each other: cheap until both are gone."""
    return sum(0.1 * i for i in chosen) + 10 * ({2, 3} <= chosen)


@pytest.mark.parametrize("cost", [supermodular, either_or])
def test_greedy_takes_the_best_next(cost):
    order = greedy(range(5), cost)
    for i, layer in enumerate(order):
        taken = frozenset(order[:i])
        assert cost(taken | {layer}) == min(cost(taken | {other}) for other in set(range(5)) - taken)
    assert sorted(order) == list(range(5))


def test_lazy_greedy_measures_less():
    measured = []

    def counted(chosen):
        measured.append(chosen)
        return supermodular(chosen)

    full = greedy(range(12), counted)
    most = len(measured)
    assert most == 1 + 12 * 13 // 2
    measured.clear()
    assert greedy(range(12), counted, lazy=True) == full
    assert len(measured) < 0.7 * most
    assert greedy(range(5), either_or, lazy=True) == greedy(range(5), either_or)


def test_a_layer_that_breaks_the_model_comes_last():
    def broken(chosen):
        return math.nan if 0 in chosen else math.inf if 1 in chosen else sum(chosen)

    for lazy in (False, True):
        order = greedy(range(4), broken, lazy=lazy)
        assert order[:2] == [2, 3] and sorted(order) == [0, 1, 2, 3]


def test_what_select_finds(selected, trained, capsys):
    """The greedy order and its costs are those of composed students, each evaluated as a whole model."""
    found = json.loads((selected / "selection.json").read_text())
    recipe = Recipe.load(trained / "recipe.yaml")
    from rich.console import Console

    from mohawk.conversion.run import opened

    conversion = opened(recipe, selected, Console())
    states = conversion.texts["held_out"]

    def kl(layers):
        student = HybridForCausalLM.from_pretrained(selected / "phases" / "hidden" / "student")
        return compare(keep_attention(student, conversion.teacher, layers), states).kl

    ranking = found["rankings"]["kl"]
    order = ranking["order"]
    assert sorted(order) == [0, 1, 2, 3]
    for i in range(5):
        assert ranking["path"][i]["kl"] == pytest.approx(kl(order[:i]), rel=1e-3, abs=1e-5)
    for i, layer in enumerate(order[:-1]):
        others = {other: kl([*order[:i], other]) for other in order[i:]}
        assert others[layer] == min(others.values())
    alone = {row["layer"]: row["kl"] for row in found["layers"]}
    assert alone == pytest.approx({i: kl([i]) for i in range(4)}, rel=1e-3, abs=1e-5)
    assert found["rankings"]["alone"]["order"] == sorted(alone, key=alone.get)
    assert ranking["path"][0]["kl"] == pytest.approx(0, abs=1e-5)
    assert all(0 <= row["recall"]["accuracy"] <= 1 and row["recall"]["loss"] > 0 for row in found["layers"])
    assert (selected / "plots" / "selection.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_stopped_selection_goes_on(run, selected, monkeypatch, capsys):
    """Nothing is measured twice, and the end is the same."""
    measured, real = [], Probe._kl

    def stopping(self, chosen):
        measured.append(tuple(sorted(chosen)))
        if len(measured) == 6:  # and never again
            raise KeyboardInterrupt
        return real(self, chosen)

    monkeypatch.setattr(Probe, "_kl", stopping)
    assert main(["select", str(run), "--tokens", str(TOKENS)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    with (run / "selection" / "measured.jsonl").open("a") as file:
        file.write('["kl", [0, 1, 2')  # cut short by a kill
    assert main(["select", str(run), "--tokens", str(TOKENS)]) == 0
    said = capsys.readouterr().out
    assert f"written to {run / 'selection.json'}" in said and "recalled" in said
    assert len(measured) == len(set(measured)) + 1  # the one that was cut short
    once = json.loads((run / "selection.json").read_text())
    assert once["rankings"]["kl"] == json.loads((selected / "selection.json").read_text())["rankings"]["kl"]

    select(run, tokens=TOKENS, by="recall")
    assert len(measured) == len(set(measured)) + 1
    assert set(json.loads((run / "selection.json").read_text())["rankings"]) == {"kl", "recall"}
    select(run, tokens=TOKENS - 32)  # other settings: nothing of the old ones is kept
    found = json.loads((run / "selection.json").read_text())
    assert set(found["rankings"]) == {"kl"} and found["settings"]["tokens"] == TOKENS - 32


def copy_selection(selected, run):
    for path in (selected / "selection.json", sum_file(selected / "selection.json")):
        shutil.copy(path, run)


def test_composed_runs_go_on_with_phase_3(run, selected, capsys):
    copy_selection(selected, run)
    order = json.loads((run / "selection.json").read_text())["rankings"]["kl"]["order"]
    setting = [f"phases.end_to_end.{key}" for key in ("tokens=128", "batch_size=2", "sequence_length=32")]
    setting.append("phases.end_to_end.gradient_accumulation=1")
    assert main(["compose", str(run), "--budget", "1", *itertools.chain(*(("--set", s) for s in setting))]) == 0
    composed = run.with_name("run-1-attention")
    said = capsys.readouterr().out
    size = sum(state_bytes(HybridConfig.from_pretrained(run / "student"), order[:-1], 4096))
    assert f"1 attention layers ({order[-1]}), {size / 1e3:.1f} kB of state after 4,096 tokens" in said
    assert f"mohawk convert {composed / 'recipe.yaml'}" in said
    recipe = Recipe.load(composed / "recipe.yaml")
    assert recipe.student.ssm_layers == sorted(order[:-1]) and recipe.phases.end_to_end.tokens == 128
    assert is_complete(composed / "phases" / "hidden" / "student")

    assert main(["convert", str(composed / "recipe.yaml")]) == 0
    printed = capsys.readouterr()
    assert "missing or damaged" not in printed.err
    metrics = [json.loads(line) for line in (composed / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if m["phase"] == "end_to_end"] == [1, 2]
    assert [m for m in metrics if m["phase"] == "hidden"]  # of the run it came from
    stages = {path.stem: json.loads(path.read_text()) for path in (composed / "evaluation").glob("*.json")}
    assert set(stages) == {"before", "hidden", "end_to_end"}
    path = json.loads((run / "selection.json").read_text())["rankings"]["kl"]["path"]
    assert stages["hidden"]["held_out"]["kl"] == pytest.approx(path[3]["kl"], rel=1e-3)
    student = AutoModelForCausalLM.from_pretrained(composed / "student")
    assert student.config.ssm_layers == sorted(order[:-1])

    assert main(["compose", str(run), "--budget", "50%", "--by", "alone", "--output", str(composed)]) == 2
    assert "holds a run that was started with another" in capsys.readouterr().err
    assert compose(run, attention=[0, 2], output=run.parent / "mine") == run.parent / "mine"
    assert HybridConfig.from_pretrained(run.parent / "mine/phases/hidden/student").ssm_layers == [1, 3]
    (run.parent / "mine/phases/hidden/student/MANIFEST.json").unlink()
    with pytest.raises(UserError, match="run mohawk compose again"):
        convert(Recipe.load(run.parent / "mine/recipe.yaml"))
    compose(run, attention=[0, 2], output=run.parent / "mine")
    assert is_complete(run.parent / "mine/phases/hidden/student")


@pytest.mark.parametrize("by", ["recall", "both"])
def test_choosing_by_recall_from_the_command_line(run, tmp_path, by, capsys, monkeypatch):
    """Each step replaces the layer that leaves the least of what the README says is ranked by; tables and compose show
    the recall that it says to mind."""
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["select", str(run), "--by", by, "--tokens", str(TOKENS)]) == 0
    said = capsys.readouterr().out
    found = json.loads((run / "selection.json").read_text())
    order, path = found["rankings"][by]["order"], found["rankings"][by]["path"]
    measured = {"kl": {}, "recall": {}}
    for line in (run / "selection" / "measured.jsonl").read_text().splitlines()[1:]:
        kind, chosen, value = json.loads(line)
        measured[kind][frozenset(chosen)] = value

    def cost(chosen):
        loss = measured["recall"][frozenset(chosen)]["loss"]
        return loss if by == "recall" else measured["kl"][frozenset(chosen)] + 0.1 * loss

    assert sorted(order) == [0, 1, 2, 3]
    for i, layer in enumerate(order):
        rest = set(range(4)) - set(order[:i])
        assert cost([*order[:i], layer]) == min(cost([*order[:i], other]) for other in rest)
    # of every set on the way, not only of the chosen ones
    assert len(measured["recall"]) == 1 + 4 * 5 // 2
    values = path[0]["recall"]["values"]
    assert f"recall of {values} values, of which the teacher recalls {path[0]['recall']['accuracy']:.1%}" in said
    assert path[0]["recall"]["accuracy"] < 0.1 and "the teacher itself recalls next to nothing" in said
    assert "recalled so far" in said and "KL so far" in said
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.endswith("% │")]
    for row, layer, point in zip(rows, ["", *order], path, strict=True):
        assert row[0] == str(layer)
        assert row[-2:] == [f"{point['kl']:.4f}", f"{point['recall']['accuracy']:.1%}"]

    output = tmp_path / "chosen"
    assert main(["compose", str(run), "--budget", "50%", "--by", by, "--output", str(output)]) == 0
    assert f"{path[2]['recall']['accuracy']:.1%} of values recalled" in capsys.readouterr().out
    assert HybridConfig.from_pretrained(output / "phases/hidden/student").ssm_layers == sorted(order[:2])


def test_composing_again_after_the_run_was_trained_again(run, tmp_path, capsys):
    """An earlier call's student is made anew of the new mixers, unless phase 3 has gone on from the old ones."""
    line = ["compose", str(run), "--attention", "0", "2", "--output", str(tmp_path / "mine")]
    composed = tmp_path / "mine" / "phases" / "hidden" / "student"

    def train_again(seed):
        student = HybridForCausalLM.from_pretrained(run / "phases" / "hidden" / "student")
        torch.nn.init.constant_(student.model.layers[1].self_attn.D, seed)
        with write_whole(run / "phases" / "hidden" / "student", replace=True) as folder:
            student.save_pretrained(folder)
        capsys.readouterr()

    assert main(line) == 0
    before = (composed / "MANIFEST.json").read_bytes()
    assert main(line) == 0 and (composed / "MANIFEST.json").read_bytes() == before
    assert "made anew" not in capsys.readouterr().out
    (tmp_path / "mine" / "evaluation").mkdir()
    (tmp_path / "mine" / "evaluation" / "hidden.json").write_text("{}")
    train_again(5.0)
    assert main(line) == 0
    assert f"{run} has trained its mixers again since; its student is made anew of them" in capsys.readouterr().out
    assert (HybridForCausalLM.from_pretrained(composed).model.layers[1].self_attn.D == 5).all()
    assert not (tmp_path / "mine" / "evaluation" / "hidden.json").exists()
    capsys.readouterr()
    assert main(line) == 0 and "made anew" not in capsys.readouterr().out

    (tmp_path / "mine" / "phases" / "end_to_end" / "checkpoint-1").mkdir(parents=True)
    assert main(line) == 0
    train_again(6.0)
    assert main(line) == 2
    said = capsys.readouterr().err
    assert f"has begun phase 3 with mixers that {run} has trained again since" in said and said.count("\n") == 1
    assert (HybridForCausalLM.from_pretrained(composed).model.layers[1].self_attn.D == 5).all()

    (tmp_path / "mine" / "composed.json").unlink()  # as of a run of its own with this recipe
    assert main(line) == 2 and "trains mixers of its own" in capsys.readouterr().err


def test_inspect_says_what_a_composed_run_is(run, selected, tmp_path, capsys):
    copy_selection(selected, run)
    order = json.loads((run / "selection.json").read_text())["rankings"]["kl"]["order"]
    composed = compose(run, budget="1", output=tmp_path / "mine")
    capsys.readouterr()
    assert main(["inspect", str(composed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"composed of the mixers of {run}; attention layers: {order[-1]}, chosen for a budget of 1 by kl",
        f"mixing: done in {run}", f"hidden: done in {run}", "end_to_end: not begun",
    ]  # fmt: skip


def test_attention_at_every_nth_layer(run, selected, tmp_path, capsys, monkeypatch):
    """Each interval's cost is that of the whole choice, measured by itself or on a ranking's way; compose keeps the
    layers that a runtime computes from the interval."""
    monkeypatch.setenv("COLUMNS", "120")
    copy_selection(selected, run)
    ranked = json.loads((run / "selection.json").read_text())
    assert main(["select", str(run), "--interval", "2", "3", "--tokens", str(TOKENS)]) == 0
    said = capsys.readouterr().out
    assert "mohawk compose" in said and "--interval N" in said
    found = json.loads((run / "selection.json").read_text())
    assert found["rankings"] == ranked["rankings"]
    assert {n: pattern["attention"] for n, pattern in found["patterns"].items()} == {"2": [1, 3], "3": [2]}
    student = HybridForCausalLM.from_pretrained(run / "phases" / "hidden" / "student")
    from rich.console import Console

    from mohawk.conversion.run import opened

    conversion = opened(Recipe.load(run / "recipe.yaml"), run, Console(), trains=False)
    made = keep_attention(student, conversion.teacher, [0, 1, 3])
    cost = found["patterns"]["3"]["cost"]
    assert cost["kl"] == pytest.approx(compare(made, conversion.texts["held_out"]).kl, rel=1e-3, abs=1e-5)
    row = next(line for line in said.splitlines() if line.startswith("│ 3 │"))
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "3", "2", f"{cost['kl']:.4f}", f"{cost['recall']['accuracy']:.1%}",
        f"{ranked['rankings']['kl']['path'][3]['kl']:.4f}",
    ]  # fmt: skip

    assert main(["compose", str(run), "--interval", "2", "--output", str(tmp_path / "mine")]) == 0
    said = capsys.readouterr().out
    assert f"measured with these: KL {found['patterns']['2']['cost']['kl']:.4f}, " in said
    composed = HybridConfig.from_pretrained(tmp_path / "mine" / "phases" / "hidden" / "student")
    attends = [kind != "linear_attention" for kind in composed.layer_types]
    assert attends == [(i + 1) % 2 == 0 for i in range(4)]
    assert main(["inspect", str(tmp_path / "mine")]) == 0
    assert "attention layers: 1, 3, at an interval of 2" in capsys.readouterr().out
    select(run, tokens=TOKENS, by="alone")  # other measurements stay
    assert json.loads((run / "selection.json").read_text())["patterns"] == found["patterns"]


def test_an_interval_needs_no_ranking(run, tmp_path, capsys):
    """Neither before measuring intervals nor before composing; a student trained again was not measured."""
    assert main(["compose", str(run), "--interval", "4", "--output", str(tmp_path / "mine")]) == 0
    assert "1 attention layers (3)" in (said := capsys.readouterr().out) and "measured with these" not in said
    assert main(["select", str(run), "--interval", "4", "--tokens", str(TOKENS)]) == 0
    assert "KL if ranked" not in capsys.readouterr().out
    manifest = run / "phases" / "hidden" / "student" / "MANIFEST.json"
    manifest.write_text(manifest.read_text() + "\n")  # another student
    assert main(["compose", str(run), "--interval", "4", "--output", str(tmp_path / "other")]) == 0
    assert "measured with these" not in capsys.readouterr().out


def test_intervals_that_are_refused(run, trained, capsys):
    def error(*arguments):
        capsys.readouterr()
        assert main([*arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    for command in ("select", "compose"):
        assert "--interval: got 5; allowed: from 2 to 4" in error(command, str(run), "--interval", "5")
    assert "--interval measures whole patterns" in error("select", str(run), "--interval", "2", "--lazy")
    assert "--interval measures whole patterns" in error("select", str(run), "--interval", "2", "--by", "recall")
    with pytest.raises(SystemExit):
        main(["compose", str(run), "--interval", "2", "--budget", "2"])
    config = HybridConfig.from_pretrained(trained / "phases" / "hidden" / "student")
    config.layer_types[2] = "full_attention"
    with pytest.raises(UserError, match=r"would replace layers \[2\] too, which have no mixer in this run"):
        regular_layers(2, config)
    assert regular_layers(3, config) == [0, 1, 3]


def test_what_compose_refuses(run, capsys):
    def error(*arguments):
        capsys.readouterr()
        assert main(["compose", str(run), *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    assert f"run: mohawk select {run}\n" in error("--budget", "2")
    assert f"run: mohawk select {run} --by recall\n" in error("--budget", "2", "--by", "recall")
    select(run, tokens=TOKENS, by="alone")
    assert "nothing would be converted" in error("--budget", "4", "--by", "alone")
    assert "the model has 4 layers" in error("--budget", "5", "--by", "alone")
    assert "the model's layers are numbered 0 to 3" in error("--attention", "4")
    assert "only phases.end_to_end" in error("--attention", "1", "--set", "student.mixer=discrete_mamba2")
    assert "is the run itself" in error("--attention", "1", "--output", str(run))
    manifest = run / "phases" / "hidden" / "student" / "MANIFEST.json"
    manifest.write_text(manifest.read_text() + "\n")  # another student
    assert "was trained again since" in error("--budget", "2", "--by", "alone")
    manifest.unlink()
    assert f"to finish the phase: mohawk convert {run / 'recipe.yaml'}" in error("--budget", "2")
    (run / "recipe.yaml").unlink()
    assert "is not a run's folder" in error("--budget", "2")


@pytest.mark.parametrize(
    "text", ["", "eight", "-1", "2.5", "101%", "40MB", "40@4096", "40XB@4096", "40kiB@10", "40MB@0", "40 MB @ 4096"]
)
def test_budgets_that_are_none(text):
    with pytest.raises(UserError, match=r"--budget: got .*(allowed: a number of attention layers|at most 100%)"):
        AttentionBudget.parse(text)


def test_budgets(trained):
    student = trained / "phases" / "hidden" / "student"
    config = HybridConfig.from_pretrained(student)
    order = [3, 1, 0, 2]

    def chosen(text):
        return AttentionBudget.parse(text).choose(order, config)

    assert chosen("4") == chosen("100%") == []
    assert chosen("3") == chosen("99%") == chosen("75%") == [3]
    assert chosen("1") == chosen("49.9%") == [0, 1, 3]
    assert chosen("0") == chosen("0%") == [0, 1, 2, 3]
    # 4 heads of 8: a mixer's state is 4 x 8 x 8 float32 and its conv 96 channels x 4; attention has 2 kv heads of 8
    mixer, attention = 4 * (4 * 8 * 8 + 96 * 4), 4 * 2 * 2 * 8
    for kept in range(5):
        layers = order[: 4 - kept]
        for context in (15, 400):
            size = kept * attention * context + (4 - kept) * mixer
            assert sum(state_bytes(config, layers, context)) == size
            fewer = [k for k in range(5) if k * attention * context + (4 - k) * mixer <= size]
            assert chosen(f"{size}B@{context}") == sorted(order[: 4 - max(fewer)])
    assert attention * 15 < mixer  # at a short context the attention layers are the smaller ones
    with pytest.raises(UserError, match=r"1kB@400 is too little: .* 10.2 kB \(10,240 bytes\) after 400 tokens"):
        chosen("1kB@400")
    with pytest.raises(UserError, match="mixers for 2 of 4 layers only; allow at least 2"):
        AttentionBudget.parse("1").choose([3, 1], config)
    assert chosen("0.1MiB@400") == chosen(f"{0.1 * 2**20:.0f}B@400")


def test_state_bytes_are_those_of_a_cache(trained):
    student = HybridForCausalLM.from_pretrained(trained / "phases" / "hidden" / "student")
    teacher = AutoModelForCausalLM.from_pretrained(trained.parent / "teacher")
    for layers in ([0, 1, 2, 3], [1, 2], []):
        expected = sum(state_bytes(student.config, layers, 40))
        keep_attention(student, teacher, layers)
        assert decode_speed(student, [40], 1)[0].state_bytes == expected
    described = describe(trained / "student").layers
    assert [layer.state_bytes(40) for layer in described] == state_bytes(
        HybridConfig.from_pretrained(trained / "student"), [0, 1, 2, 3], 40
    )


def test_what_select_refuses(run, capsys):
    def error(*arguments):
        assert main(["select", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    assert "is not a run's folder" in error(run.parent)
    assert "16 tokens do not fill one window of 32" in error(run, "--tokens", 16)
    weights = run / "phases" / "hidden" / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "to finish the phase: mohawk convert" in error(run)
    data = Recipe.load(run / "recipe.yaml").model_dump(mode="json")
    data["phases"]["mixing"] = data["phases"]["hidden"] = None
    Recipe.from_dict(data).save(run / "recipe.yaml")
    assert "neither phase 1 nor phase 2" in error(run)
    assert torch.is_grad_enabled()
