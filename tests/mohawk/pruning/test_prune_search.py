"""Candidates for a budget, recounted on the models they make; the ways to choose what goes, each in a whole run."""

import copy
import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from mohawk import MinitronPruner
from mohawk.cli import main
from mohawk.core.json_files import read_json, write_json
from mohawk.errors import UserError
from mohawk.measures import compare
from mohawk.measures.compare import DecodeSpeed, decode_speed
from mohawk.models.cutting.cuts import cut
from mohawk.models.cutting.sizes import sized_config, sizes_of
from mohawk.models.decoders import decoder
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.pruning import baselines as importance_baselines
from mohawk.pruning import rounds as prune_module
from mohawk.pruning import search as prune_search
from mohawk.pruning.baselines import random_importance
from mohawk.pruning.importance import choose
from mohawk.pruning.layers import chosen_with_mix
from mohawk.pruning.plan import Round
from mohawk.pruning.recipe import Prune
from mohawk.pruning.rounds import Rounds
from mohawk.pruning.run import prune
from mohawk.pruning.search import Budget, Costs, candidates, search, search_table, within
from mohawk.pruning.sizes import WIDTHS, between, narrower, spread, unit
from tests.helpers.parameters import config_parameters
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.models.conftest import CUTTABLE, tiny_teacher
from tests.mohawk.pruning.test_prune import checkpoint, made, read, stage, texts, wide_screen  # noqa: F401

pytestmark = pytest.mark.usefixtures("cheap_training")


def model_of(name):
    family, _, mixer = name.partition("+")
    return hybrid_from_teacher(tiny_teacher(family), [1, 2], mixer) if mixer else tiny_teacher(family)


def built(config, sizes, layers, dtype=torch.float32):
    return AutoModelForCausalLM.from_config(sized_config(config, sizes, layers)).to(dtype).eval()


@pytest.mark.parametrize("name", ["gemma2", "phi_normed", "phi3", "qwen2+discrete_mamba2"])
def test_candidates_use_up_a_budget_of_parameters(name):
    config = model_of(name).config
    own, inside = sizes_of(config), config_parameters(config)[1]
    budget = Budget("nonembedding", 0.5 * inside, 0.1)
    found = candidates(Costs(config, "nonembedding"), budget, widths=WIDTHS)
    assert len(found) == len(set(found)) >= 2 and min(s.layers for s in found) < own.layers
    # of Phi's two heads with a norm one goes with half of the width, and then too much is gone
    assert max(s.layers for s in found) == own.layers - (name == "phi_normed")
    for sizes in found:
        layers = spread(own.layers, sizes.layers)
        less = config_parameters(sized_config(config, sizes, layers))[1]
        assert 0.45 * inside <= less <= 0.5 * inside, sizes
        assert (
            sum(p.numel() for p in built(config, sizes, layers).parameters())
            == config_parameters(sized_config(config, sizes, layers))[0]
        )


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [(None, "float32"), ({"ssm_layers": "every_second", "mixer": "mamba2"}, "bfloat16")],
    ids=["plain", "converted"],
)
def test_memory_is_what_weights_and_state_take(convert, dtype):
    config, context = tiny_teacher().config, 40
    costs = Costs(config, "memory", context=context, dtype=dtype, convert=convert)
    whole = costs(sizes_of(config), range(4))
    found = candidates(costs, Budget("memory", 0.7 * whole, 0.1), steps=2)
    assert found
    for sizes in found:
        layers = spread(4, sizes.layers)
        model = built(config, sizes, layers)
        model = (model if convert is None else hybrid_from_teacher(model, **convert)).to(getattr(torch, dtype))
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        state = decode_speed(model, [context], 1)[0].state_bytes
        assert costs(sizes, layers) == weights + state and 0.63 * whole <= weights + state <= 0.7 * whole


def test_latency_is_measured_on_random_weights_of_the_shape(monkeypatch):
    config = tiny_teacher().config
    assert 0.01 < Costs(config, "latency", context=8)(sizes_of(config), range(4)) < 1000
    seen, whole = [], []

    def timed(model, contexts, tokens):  # a machine that takes a microsecond a parameter
        whole.append(sum(p.numel() for p in model.parameters()))
        return [DecodeSpeed(contexts[0], 1e6 / whole[-1], 0)]

    def beside(model, other, context, pairs):
        assert sum(p.numel() for p in other.parameters()) == whole[0]
        seen.append(sum(p.numel() for p in model.parameters()))
        return seen[-1] / whole[0]

    monkeypatch.setattr(prune_search, "decode_speed", timed)
    monkeypatch.setattr(prune_search, "decode_ratio", beside)
    costs = Costs(config, "latency", context=8)
    before = torch.get_rng_state()
    found = candidates(costs, Budget("latency", 0.6 * config_parameters(config)[0] / 1000, 0.1), steps=2)
    assert torch.equal(torch.get_rng_state(), before) and len(seen) == len(set(costs._known))  # each timed once
    assert len(whole) == 1
    for sizes in found:
        ms = config_parameters(sized_config(config, sizes, spread(4, sizes.layers)))[0] / 1000
        assert abs(ms / (0.6 * config_parameters(config)[0] / 1000) - 1) <= 0.1
    assert len(found) >= 2


def test_other_work_on_the_machine_does_not_change_a_ratio(monkeypatch):
    """The machine gets four times slower amid the pairs, and stands still now and then; the clock is made up."""
    now, steps = [0.0], [0]
    small, large = (torch.nn.Linear(1, 1) for _ in range(2))

    class Output(dict):
        logits = torch.zeros(1, 1, 4)

    def step(model, ids, start, cache):
        steps[0] += 1
        load = 4.0 if steps[0] > 40 else 1.0
        now[0] += (3.0 if model is large else 1.0) * load + (50.0 if steps[0] % 13 == 0 else 0.0)
        return Output({compare.CACHE: None})

    for model in (small, large):
        model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=4))
        model.device = torch.device("cpu")
    monkeypatch.setattr(compare, "_step", step)
    monkeypatch.setattr(compare, "plain_model", lambda model: model)
    monkeypatch.setattr(compare.time, "perf_counter", lambda: now[0])
    assert compare.decode_ratio(small, large, 3) == pytest.approx(1 / 3)
    assert compare.decode_ratio(large, small, 3) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("tightest", "convert"),
    [("parameters", None), ("flops", None), ("memory", {"ssm_layers": "every_second", "mixer": "mamba2"})],
)
def test_budgets_are_met_together(tightest, convert):
    """Within each of them, as counted from models that are there; the tightest is used up."""
    config, context = tiny_teacher().config, 40
    options = {"context": context, "dtype": "bfloat16", "convert": convert}
    own = sizes_of(config)
    whole = {kind: Costs(config, kind, **options)(own, range(4)) for kind in ("parameters", "memory", "flops")}
    budgets = [Budget(kind, (0.6 if kind == tightest else 0.8) * cost, 0.1) for kind, cost in whole.items()]
    budget = Budget.together(budgets, 0.1)
    (sizes,) = candidates(Costs(config, budget, **options), budget, depths=[3], widths=["all"])
    model = built(config, sizes, spread(4, 3))
    model = (model if convert is None else hybrid_from_teacher(model, **convert)).to(torch.bfloat16)
    total = sum(p.numel() for p in model.parameters())
    state = decode_speed(model, [context], 1)[0].state_bytes
    costs = {"parameters": total, "memory": 2 * total + state, "flops": flops_by_hand(model, context)}
    shares = {one.kind: costs[one.kind] / one.value for one in budgets}
    assert max(shares, key=shares.get) == tightest and 0.9 <= shares[tightest] <= 1 + 1e-9, shares
    assert Budget.of(asdict(budget)) == budget and budget.number(0.95) == "95.0%"
    assert budget.told(1.0).count(" and ") == 2 and "95.0% of" in budget.told(0.95)
    with pytest.raises(ValueError, match="latency beside other budgets: it is timed"):
        Budget.together([Budget("latency", 1.0), Budget("memory", 1.0)], 0.1)
    tighter = Budget.together([replace(part, value=part.value / 2) for part in budget.parts], 0.1)
    assert budget.covers(tighter) and not tighter.covers(budget) and budget.parts[0].covers(tighter)


def flops_by_hand(model, context):
    """Each weight matrix once, attention over the context, and mixers' states."""
    found = 2 * model.get_output_embeddings().weight.numel()
    for layer in decoder(model)[1]:
        found += 2 * sum(p.numel() for p in layer.parameters())
        mixer = layer.self_attn
        if hasattr(mixer, "state_size"):
            found += 6 * mixer.num_heads * mixer.head_dim * mixer.state_size
        else:
            found += 4 * context * mixer.q_proj.out_features
    return found


def test_a_latency_is_not_timed_where_no_process_holds_the_model(monkeypatch):
    config = tiny_teacher().config
    needed = 4 * config_parameters(config)[0]
    monkeypatch.setattr(prune_search, "device_bytes", lambda device: needed)
    with pytest.raises(ValueError, match="timed beside the whole model's in one process.* give a budget of parameters"):
        Costs(config, "latency", context=8)(sizes_of(config), range(4))


def test_depths_given_and_mistakes():
    config = tiny_teacher().config
    costs, total = Costs(config, "parameters"), config_parameters(config)[0]
    found = candidates(costs, Budget("parameters", 0.6 * total, 0.1), depths=[2, 3])
    assert {s.layers for s in found} == {2, 3}
    with pytest.raises(UserError, match=r"depths \[9\]: the model has 4 layers; allowed: 1 to 4"):
        candidates(costs, Budget("parameters", 0.6 * total), depths=[9])
    with pytest.raises(
        UserError, match="with .1. layers: at full width they leave 10,880 .*too little: allow more layers"
    ):
        candidates(costs, Budget("parameters", 0.9 * total), depths=[1])
    with pytest.raises(UserError, match="above it or below all of its tolerance: raise the tolerance"):
        candidates(costs, Budget("parameters", 0.6 * total + 0.5, 1e-7))
    with pytest.raises(UserError, match="cannot be reached to within 3% with .*the smallest such model has"):
        candidates(costs, Budget("parameters", 100))


def test_rounds_on_the_way_are_sizes_a_model_can_have():
    for name in [*CUTTABLE, "llama+mamba2"]:
        config = model_of(name).config
        own = sizes_of(config)
        final = replace(narrower(config, own, "all", 8)[-1], layers=1)
        way = [between(config, final, i / 3) for i in (1, 2, 3)]
        assert way[-1] == final
        for before, after in zip([own, *way], way, strict=False):
            sized_config(config, after, spread(4, after.layers))
            assert all(
                b is None or a <= b for a, b in zip(after.__dict__.values(), before.__dict__.values(), strict=True)
            )
    assert [unit(n) for n in (32, 576, 1536, 4096, 14336, 7)] == [1, 16, 32, 128, 256, 1]


def test_a_search_takes_the_least_kl_and_goes_on_from_its_table(tmp_path):
    from rich.console import Console

    from mohawk.measures.compare import Comparison

    config = tiny_teacher().config
    total = config_parameters(config)[0]
    costs, budget = Costs(config, "parameters"), Budget("parameters", 0.6 * total, 0.1)
    found = candidates(costs, budget)
    measured, healed = iter([9.0, 5.0, 8.0, float("nan"), 7.0, 3.0] + [6.0] * 20), []

    def measure(sizes):
        if len(healed) == 1 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        kl = next(measured)
        return Comparison(10, 1.0, 2.0, 2.0, kl, 0.5)

    stopped: list[bool] = []
    asked = dict(
        kept=lambda n: spread(4, n), make=lambda sizes: sizes, heal=lambda i, sizes: healed.append(i), measure=measure,
        folder=tmp_path, console=Console(quiet=True),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        search(found, costs, budget, **asked)
    # the first candidate was not written: 9.0 is what it has as cut, measured again as 5.0
    picked = search(found, costs, budget, **asked)
    state = read_json(tmp_path / "search.json")
    kls = [float(row["kl"]) for row in state["candidates"]]
    assert kls[0] == 8.0 and kls[1] == 7.0 and picked == found[kls.index(min(kls))]
    assert search(found, costs, budget, **asked) == picked and healed == [0, *range(len(found))]
    title, header, rows = search_table(state)
    assert "(picked)" in rows[0][0] and len(header) == len(rows[0]) and len(rows) == len(found)


@pytest.mark.parametrize(
    ("target", "layers"),
    [
        ({"layers": 2, "layers_by": "contiguous"}, None),
        ({"layers": 3, "layers_by": "perplexity", "ffn": 40}, None),
        ({"layers": "without:1-2", "strategy": "random", "heads": 2}, [0, 3]),
        ({"layers": [3, 0, 1], "strategy": "magnitude", "hidden": 28}, [0, 1, 3]),
        ({"targets": [{"layers": "first:3"}, {"parameters": 0.6}]}, None),
    ],
    ids=["contiguous", "perplexity", "random", "magnitude", "targets"],
)
def test_ways_to_cut(target, layers, checkpoint, texts, tmp_path, capsys):  # noqa: F811
    run = tmp_path / "run"
    heal = stage(1) if "targets" in target else None
    search = {"tokens": 0, "steps": 2, "tolerance": 0.1}
    prune(made(checkpoint, texts, run, prune=target, heal=heal, search=search))
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    if "targets" in target:
        inside = config_parameters(AutoModelForCausalLM.from_pretrained(checkpoint).config)[1]
        assert [read(run / "rounds" / n / "cut.json")["after"]["layers"] for n in "12"][0] == 3
        assert 0.54 * inside <= config_parameters(student.config)[1] <= 0.6 * inside
        return
    found = read(run / "rounds" / "1" / "cut.json")
    assert found["after"] == sizes_of(student.config).__dict__
    for name, value in target.items():
        if isinstance(value, int):
            assert found["after"][name] == value
    assert layers is None or found["layers"] == layers
    if target.get("layers_by") == "contiguous":
        gone = sorted(set(range(4)) - set(found["layers"]))
        assert gone == list(range(gone[0], gone[0] + 2))
    if target.get("layers_by") == "perplexity":
        rises = read(run / "rounds" / "1" / "layers.json")["perplexity"]
        assert sorted(set(range(4)) - set(found["layers"])) == [min(range(4), key=rises.__getitem__)]


def test_a_hybrid_searched_for_memory_evaluated_and_inspected(checkpoint, texts, tmp_path, capsys):  # noqa: F811
    whole = hybrid_from_teacher(AutoModelForCausalLM.from_pretrained(checkpoint), [0, 2])
    whole.save_pretrained(tmp_path / "hybrid")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hybrid" / name).write_bytes((checkpoint / name).read_bytes())
    memory = Costs(whole.config, "memory", context=64)(sizes_of(whole.config), range(4))
    run = tmp_path / "run"
    prune(
        made(
            tmp_path / "hybrid", texts, run, prune={"memory": 0.6 * memory, "context": 64}, heal=stage(2),
            search={"tokens": 0, "steps": 3, "widths": ["ffn", "all"], "tolerance": 0.2},
        )
    )  # fmt: skip
    student = AutoModelForCausalLM.from_pretrained(run / "student").eval()
    assert type(student) is HybridForCausalLM
    weights = sum(p.numel() * 4 for p in student.parameters())
    state = decode_speed(student, [64], 1)[0].state_bytes
    assert 0.48 * memory <= weights + state <= 0.6 * memory
    rows = read(run / "rounds" / "1" / "search.json")["candidates"]
    assert any(row["cost"] == weights + state for row in rows)
    assert main(["evaluate", str(run)]) == 0 and main(["inspect", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "prune_1: done" in printed and "heal_1: done" in printed
    again = read(run / "evaluation" / "again.json")["texts"]["held_out"]
    assert again["kl"] == pytest.approx(read(run / "evaluation" / "heal_1.json")["held_out"]["kl"], rel=1e-4)


def hybrid_of(checkpoint, folder, ssm):  # noqa: F811
    """A hybrid of the checkpoint with 6 layers, and its tokenizer."""
    config = AutoModelForCausalLM.from_pretrained(checkpoint).config
    teacher = tiny_teacher(vocab_size=258, num_hidden_layers=6, bos_token_id=256, eos_token_id=config.eos_token_id)
    hybrid_from_teacher(teacher, ssm).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    return teacher


@pytest.mark.parametrize(("seed", "layers_by"), [(1, "block_importance")])
def test_rounds_of_a_hybrid_end_within_the_budget(layers_by, seed, checkpoint, texts, tmp_path):  # noqa: F811
    hybrid_of(checkpoint, tmp_path / "hybrid", [1, 3, 5])
    run = tmp_path / "run"
    prune(
        made(
            tmp_path / "hybrid", texts, run, heal=stage(1), seed=seed,
            prune={"parameters": 0.5, "rounds": 2, "strategy": "random", "layers_by": layers_by},
            search={"tokens": 0, "depths": [4], "widths": ["ffn"], "tolerance": 0.1},
        )
    )  # fmt: skip
    state = read(run / "rounds" / "1" / "search.json")
    found = read(run / "rounds" / "2" / "cut.json")
    assert 0.9 * state["budget"]["value"] <= found["outside_embedding_and_head"] <= state["budget"]["value"]
    config = AutoModelForCausalLM.from_pretrained(run / "student").config
    assert len(config.ssm_layers) == sum(i % 2 for i in state["candidates"][0]["layers"])


@pytest.mark.parametrize(
    "target",
    [
        {"layers": 2, "state_heads": 2, "rounds": 2},
        {"targets": [{"layers": [0, 2, 3, 4]}, {"ffn": 20}]},
        {"targets": [{"layers": [0, 2, 3, 4]}, {"parameters": 0.4}]},
    ],
    ids=["one target", "as planned", "then a budget"],
)
def test_a_hybrid_that_loses_its_mixers_on_the_way(target, checkpoint, texts, tmp_path, monkeypatch):  # noqa: F811
    hybrid_of(checkpoint, tmp_path / "hybrid", [1, 5])
    scores = torch.tensor([9.0, 1, 8, 7, 6, 2])
    chosen = importance_baselines.random_importance
    monkeypatch.setattr(prune_module, "random_importance", lambda config, seed: replace(
        chosen(config, seed), layers=scores[:config.num_hidden_layers]))  # fmt: skip
    run = tmp_path / "run"
    prune(made(tmp_path / "hybrid", texts, run, prune=target | {"strategy": "random"}, heal=stage(1),
               search={"tokens": 0, "steps": 2, "widths": ["ffn"], "tolerance": 0.2}))  # fmt: skip
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert read(run / "rounds" / "2" / "cut.json")["after"] == sizes_of(student.config).__dict__
    assert student.config.ssm_layers == []
    table = [line.split("|") for line in (run / "report.md").read_text().splitlines() if "| after cut 2 |" in line]
    assert [cell.strip() for cell in table[0][7:10]] == ["-"] * 3


def test_sizes_after_a_budget_are_of_what_it_picked(checkpoint, texts, tmp_path, capsys):  # noqa: F811
    run = tmp_path / "run"

    def asked(last):
        prune = {"targets": [{"parameters": 0.5}, last], "strategy": "random"}
        search = {"tokens": 0, "depths": [3], "widths": ["all"], "tolerance": 0.1}
        return made(checkpoint, texts, run, prune=prune, heal=stage(1), search=search)

    prune(asked({"ffn": 8}), dry_run=True)
    assert "Round 2: ffn 8 of what was picked before it." in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"prune.targets.1: ffn: got 48, .*one of the models that the search .* may pick$"
    ):
        prune(asked({"ffn": 48}), dry_run=True)
    with pytest.raises(
        UserError, match=r"prune.targets.1: layers: .*one of the models that the search before it may pick$"
    ):
        prune(asked({"layers": [0, 3]}), dry_run=True)
    prune(asked({"ffn": 8}))
    first, last = (read(run / "rounds" / n / "cut.json") for n in "12")
    assert first["after"]["layers"] == 3 and first["after"]["hidden"] < 32
    assert last["after"] == first["after"] | {"ffn": 8}


@pytest.mark.parametrize("target", [{"heads": 2}, {"kv_heads": 1}])
def test_heads_that_no_layer_has_are_no_target(target, tmp_path, texts):  # noqa: F811
    hybrid = hybrid_from_teacher(tiny_teacher(), "all")
    hybrid.config.save_pretrained(tmp_path / "hybrid")
    with pytest.raises(UserError, match="prune: heads: got 2, but the model has no attention layer"):
        prune(made(tmp_path / "hybrid", texts, tmp_path / "run", prune=target))
    sizes = replace(sizes_of(hybrid.config), heads=2, kv_heads=1)
    importance = random_importance(hybrid.config, 0)
    with pytest.raises(ValueError, match="no attention layer"):
        cut(hybrid, choose(importance, sizes))
    with pytest.raises(ValueError, match="heads: got 2, but the model has no attention layer"):
        MinitronPruner(hybrid, sizes=sizes, strategy="random")


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            [{"parameters": 0.5}, {"parameters": 0.6}],
            "at most 15,504 parameters outside .* by prune.targets.0; allowed",
        ),
        ([{"layers": 2}, {"parameters": 0.6}], "targets.1.parameters: the model already has 15,520 parameters outside"),
    ],
    ids=["after a budget", "after sizes"],
)
def test_a_budget_that_rises_is_found_in_the_plan(targets, said, checkpoint, texts, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=said):
        prune(made(checkpoint, texts, tmp_path / "run", prune={"targets": targets},
                   search={"steps": 2, "tolerance": 0.1}))  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_bfloat16_teacher_is_cut_in_float32():
    teacher = tiny_teacher().bfloat16()
    wide = copy.deepcopy(teacher).float()
    sizes = replace(sizes_of(teacher.config), hidden=24)
    what = choose(random_importance(teacher.config, 0), sizes)
    made_of, expected = cut(teacher, what, dtype=torch.float32).state_dict(), cut(wide, what).state_dict()
    assert teacher.dtype == torch.bfloat16
    assert all(torch.equal(made_of[name], tensor) for name, tensor in expected.items())
    rounded = cut(teacher, what).float().state_dict()  # the norms' weights are scaled
    assert any(not torch.equal(rounded[name], tensor) for name, tensor in expected.items())
    assert all(p.requires_grad for p in cut(teacher, what, dtype=torch.float32).parameters())


def test_candidates_without_a_mixer_are_narrower_too():
    config = model_of("llama+mamba2").config
    total = config_parameters(config)[0]
    for sizes in candidates(
        costs := Costs(config, "parameters"), Budget("parameters", 0.4 * total, 0.1), depths=[2], kept=lambda n: [0, 3]
    ):
        assert 0.36 * total <= costs(sizes, [0, 3]) <= 0.4 * total


@pytest.mark.parametrize("same", [True, False])
def test_a_saved_search_counts_for_its_own_recipe_alone(same, checkpoint, texts, tmp_path, capsys):  # noqa: F811
    hybrid_of(checkpoint, tmp_path / "hybrid", [1, 3])
    run, search = tmp_path / "run", {"tokens": 0, "steps": 2, "tolerance": 0.1}
    mine = made(tmp_path / "hybrid", texts, run, prune={"parameters": 0.5}, search=search)
    other = made(checkpoint, texts, run, prune={"parameters": 0.6}, search=search)
    found = {"layers": 3, "hidden": 32, "ffn": 7, "heads": 4, "kv_heads": 2, "vocabulary": 258}
    if same:
        found |= {"state_heads": 4, "state_groups": 4, "state_size": 8}
    (run / "rounds" / "1").mkdir(parents=True)
    (run / "rounds" / "1" / "search.json").write_text(json.dumps({"budget": {}, "candidates": [{"sizes": found}]}))
    (mine if same else other).save(run / "recipe.yaml")
    with nullcontext() if same else pytest.raises(UserError, match="another prune.parameters, teacher.model"):
        prune(mine, dry_run=True)
    assert (" 7 " in capsys.readouterr().out) == same


@pytest.mark.parametrize("left", [None, {"candidates": [{"sizes": {}}], "budget": {}}])
def test_later_rounds_need_what_the_first_ones_search_picked(left, tmp_path):
    model = tiny_teacher()
    own, target = sizes_of(model.config), Prune(parameters=0.5, rounds=2)
    budget = Budget("nonembedding", 1e4)
    rounds = [Round(target, "prune", 0.5, budget=budget, candidates=[own]), Round(target, "prune", 1.0)]
    if left is not None:  # stopped within the search
        (tmp_path / "rounds/1").mkdir(parents=True)
        write_json(tmp_path / "rounds/1/search.json", left)
    made = Rounds(SimpleNamespace(folder=tmp_path), SimpleNamespace(rounds=rounds, config=model.config))
    with pytest.raises(UserError, match="search.json is missing or damaged, and every round cuts towards what round 1"):
        made._sizes(2, model, random_importance(model.config, 0), "score")


def test_layers_are_chosen_with_a_mix():
    importance = random_importance(tiny_teacher(num_hidden_layers=6).config, 0)
    importance = replace(importance, layers=torch.tensor([6.0, 1, 5, 2, 4, 3]))
    kinds = ["a", "m"] * 3
    assert chosen_with_mix(importance, 3, "score", kinds, {"a": 1, "m": 0}) == [0, 2, 4]
    assert chosen_with_mix(importance, 3, "score", kinds, {"a": 1, "m": 2}) == [0, 3, 5]
    assert chosen_with_mix(importance, 4, "score", kinds, {"a": 1, "m": 2}) == [0, 2, 3, 5]
    assert chosen_with_mix(importance, 4, "block", kinds, {"m": 3}) == [0, 1, 3, 5]  # any block takes one of each
    assert chosen_with_mix(importance, 5, "block", kinds, {"m": 3}) == [0, 1, 2, 3, 5]
    assert chosen_with_mix(importance, 3, -importance.layers, kinds, {"a": 2}) == [1, 2, 4]
    with pytest.raises(ValueError, match="cannot be at least"):
        chosen_with_mix(importance, 3, "score", kinds, {"a": 4})


def test_less_of_the_mlps_where_other_layers_stayed():
    config = model_of("llama+mamba2").config
    costs, own = Costs(config, "parameters"), sizes_of(config)
    cheap, dear = sorted(([0, 3], [1, 2]), key=lambda layers: costs(replace(own, layers=2), layers))
    budget = Budget("parameters", costs(replace(own, layers=2, ffn=40), cheap), 0.01)
    sizes = within(costs, budget, replace(own, layers=2, ffn=40), dear)
    assert sizes.ffn < 40 and not budget.exceeded(costs(sizes, dear))
    assert budget.exceeded(costs(replace(sizes, ffn=sizes.ffn + 1), dear))
    assert within(costs, budget, replace(own, layers=2, ffn=40), cheap).ffn == 40


def test_only_a_smaller_vocabulary(
    checkpoint,  # noqa: F811
    texts,  # noqa: F811
    tmp_path,
    capsys,
):
    run = tmp_path / "run"
    prune(made(checkpoint, texts, run, prune={"vocabulary": 40}, save_dtype="float16", heal=None))
    student = AutoModelForCausalLM.from_pretrained(run / "student", dtype="auto")
    assert student.dtype == torch.float16 and student.config.num_hidden_layers == 4
    found = json.loads((run / "vocabulary.json").read_text())
    assert found["after"] == student.config.vocab_size and 0 < found["held_out"] <= 1
    assert main(["evaluate", str(run)]) == 2 and "numbers tokens anew" in capsys.readouterr().err
