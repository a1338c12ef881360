"""`mohawk prune` as its user meets it: a tiny checkpoint, cut, healed, resumed, exported; messages before it loads."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from mohawk.cli import main
from mohawk.core.folders import Interrupted, is_complete
from mohawk.core.json_files import write_json, write_text
from mohawk.errors import UserError
from mohawk.models.cutting.sizes import sized_config, sizes_of
from mohawk.models.formats.bamba import norms_groups_apart
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.pruning.recipe import PruneRecipe
from mohawk.pruning.run import prune
from mohawk.runs.claim import check_folder
from mohawk.schema.files import shipped
from mohawk.training import saving
from tests.helpers.parameters import config_parameters
from tests.helpers.tiny_phase import cheap_training, fork, wait  # noqa: F401
from tests.models.conftest import tiny_teacher

pytestmark = pytest.mark.usefixtures("cheap_training")

STEPS = 6
INTERRUPTED = 3


@pytest.fixture(autouse=True)
def wide_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(30):
        line = f"Document {i} counts {', '.join(str(i * k) for k in range(1, 12))}.\n"
        (folder / f"train_{i}.txt").write_text(line * (1 + i % 4))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    teacher = tiny_teacher(vocab_size=258, num_hidden_layers=4, bos_token_id=256, eos_token_id=257)
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merging(texts, tmp_path_factory):
    """A checkpoint whose tokenizer has merges, some of them for words that the text lacks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    lines = ["Document counts"] * 9 + ["never heard of elsewhere"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=["<bos>", "<eos>"], show_progress=False))  # fmt: skip
    folder = tmp_path_factory.mktemp("merging")
    tiny_teacher(vocab_size=290, bos_token_id=0, eos_token_id=1).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    return folder


def stage(steps=STEPS, **given):
    phase = {"tokens": steps * 4 * 32, "batch_size": 4, "sequence_length": 32, "learning_rate": 3e-3, "save_every": 2}
    return phase | given


def recipe_data(checkpoint: Path, texts: Path, output: Path, **given):
    return {
        "teacher": str(checkpoint),
        "data": {"train": [str(texts / "train_*.txt")], "validation_share": 0.1, "cache": str(texts / "cache")},
        "prune": {"ffn": 24},
        "calibration": {"tokens": 512, "sequence_length": 32, "batch_size": 4, "layer_tokens": 128},
        "heal": stage(),
        "evaluation": {
            "sequence_length": 32, "batch_size": 4, "tokens": 128, "longest": 64, "contexts": [8], "decode_tokens": 2,
            "prompt": "A cat", "continuation_tokens": 4,
        },
        "precision": "float32", "device": "cpu", "output": str(output), **given,
    }  # fmt: skip


def made(checkpoint, texts, output, **given) -> PruneRecipe:
    return PruneRecipe.from_dict(recipe_data(checkpoint, texts, output, **given))


def read(path: Path):
    return json.loads(path.read_text())


def test_two_rounds_of_width_depth_and_a_smaller_vocabulary(merging, texts, tmp_path, capsys):
    run = tmp_path / "run"
    recipe = made(
        merging, texts, run, heal=stage(hidden={"weight": 0.1}), save_dtype="bfloat16",
        prune={"layers": 2, "hidden": 16, "ffn": 12, "kv_heads": 1, "rounds": 2, "vocabulary": "corpus",
               "layers_by": "kl"},
    )  # fmt: skip
    prune(recipe)
    printed = capsys.readouterr().out
    assert "after round 2" in printed and "Vocabulary kept" in printed
    teacher = AutoModelForCausalLM.from_pretrained(merging)
    cuts = [read(run / "rounds" / n / "cut.json") for n in "12"]
    assert [c["after"]["layers"] for c in cuts] == [3, 2] and cuts[1]["before"] == cuts[0]["after"]
    assert (cuts[1]["after"]["heads"], cuts[1]["after"]["kv_heads"], cuts[1]["after"]["hidden"]) == (2, 1, 16)
    for number, found in zip("12", cuts, strict=True):
        weights = load_file(run / "phases" / f"prune_{number}" / "student" / "model.safetensors")
        assert sum(w.numel() for w in weights.values()) == found["parameters"]
    # of a cut whose figures are lost the report has the same from what it left
    table = (run / "report.md").read_text().partition("## Sizes")[2].partition("##")[0]
    assert table.count("after cut") == 2
    (run / "rounds" / "1" / "cut.json").unlink()
    (run / "rounds" / "2" / "cut.json").write_text("{}")
    prune(recipe)
    assert (run / "report.md").read_text().partition("## Sizes")[2].partition("##")[0] == table
    found = {name: read(run / "evaluation" / f"{name}.json")["held_out"]["kl"] for name in
             ("prune_1", "heal_1", "prune_2", "heal_2")}  # fmt: skip
    assert found["heal_1"] < found["prune_1"] and found["heal_2"] < found["prune_2"]

    student = AutoModelForCausalLM.from_pretrained(run / "student", dtype="auto")
    assert type(student) is LlamaForCausalLM and student.dtype == torch.bfloat16
    kept = student.config.vocab_size
    assert kept < teacher.config.vocab_size
    results = read(run / "results.json")
    own = sizes_of(teacher.config).__dict__ | {"layers": 2, "hidden": 16, "ffn": 12, "heads": 2, "kv_heads": 1}
    config = sized_config(teacher.config, type(sizes_of(teacher.config))(**own | {"vocabulary": kept}))
    assert (
        results["parameters"]["student"] == config_parameters(config)[0] == sum(p.numel() for p in student.parameters())
    )
    assert set(results["phases"]) == {"heal_1", "heal_2"} and "Sizes" in (run / "report.md").read_text()
    # text of the corpus is cut into the same tokens, with other numbers
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (merging, run / "student"))
    assert after.convert_ids_to_tokens(after("Document 7")["input_ids"]) == before.convert_ids_to_tokens(
        before("Document 7")["input_ids"]
    )
    weights = (run / "student" / "model.safetensors").read_bytes()
    prune(recipe)  # once more: nothing is left to do
    assert (run / "student" / "model.safetensors").read_bytes() == weights


def test_a_budget_is_searched_and_a_corrected_teacher_heals(checkpoint, texts, tmp_path, capsys):
    run = tmp_path / "run"
    prune(
        made(
            checkpoint, texts, run, prune={"parameters": 0.5}, correct=stage(),
            search={"steps": 2, "widths": ["all", "ffn"], "tokens": 2 * 128, "tolerance": 0.1}, heal=stage(2),
        )
    )  # fmt: skip
    teacher = AutoModelForCausalLM.from_pretrained(checkpoint)
    inside = config_parameters(teacher.config)[1]
    state = read(run / "rounds" / "1" / "search.json")
    assert len(state["candidates"]) >= 2
    for row in state["candidates"]:
        total, less = config_parameters(sized_config(teacher.config, type(sizes_of(teacher.config))(**row["sizes"])))
        assert row["parameters"] == total and row["cost"] == less and 0.45 * inside <= less <= 0.5 * inside
    best = min(range(len(state["candidates"])), key=lambda i: state["candidates"][i]["kl"])
    assert state["picked"] == best
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert sizes_of(student.config).__dict__ == state["candidates"][best]["sizes"]
    assert (run / "plots" / "search_1.png").read_bytes()[:4] == b"\x89PNG"
    assert (
        "(picked)" in (run / "report.md").read_text() and not (run / "rounds" / "1" / "phases" / "candidate_1").exists()
    )
    found = {name: read(run / "evaluation" / f"{name}.json")["held_out"] for name in ("correct", "heal_1")}
    assert found["correct"]["student_perplexity"] < found["correct"]["teacher_perplexity"]
    # what follows is compared with the teacher as corrected
    assert found["heal_1"]["teacher_perplexity"] == pytest.approx(found["correct"]["student_perplexity"], rel=1e-5)
    assert "picked" in capsys.readouterr().out


def test_cut_converted_and_healed_once(checkpoint, texts, tmp_path):
    run = tmp_path / "run"
    prune(
        made(
            checkpoint, texts, run, prune={"layers": "every_second", "ffn": 32},
            convert={"ssm_layers": [1], "mixing": stage(2), "hidden": {**stage(2), "solve_tokens": 256}},
        )
    )  # fmt: skip
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert type(student) is HybridForCausalLM and student.config.ssm_layers == [1]
    assert read(run / "rounds" / "1" / "cut.json")["layers"] == [0, 2]
    order = ["prune_1", "convert", "mixing", "hidden", "heal_1"]
    found = read(run / "results.json")
    assert list(found["stages"]) == order and set(found["phases"]) == {"mixing", "hidden", "heal_1"}
    assert found["evaluation"]["heal_1"]["held_out"]["kl"] < found["evaluation"]["convert"]["held_out"]["kl"]


@pytest.mark.parametrize("mixer", ["mamba2", {1: "gated_delta", 2: "kimi_delta"}], ids=str)
def test_a_hybrid_is_pruned_healed_and_exported(mixer, tokenizer, checkpoint, texts, tmp_path, capsys):
    from mohawk.models.from_teacher import hybrid_from_teacher

    whole = hybrid_from_teacher(AutoModelForCausalLM.from_pretrained(checkpoint), [1, 2], mixer)
    whole.save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    run = tmp_path / "run"
    recipe = made(
        tmp_path / "hybrid", texts, run, heal=stage(3),
        prune={"layers": 3, "ffn": 24, "hidden": 16, "state_heads": 2, "state_size": 4},
    )  # fmt: skip
    prune(recipe)
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    config = student.config
    assert type(student) is HybridForCausalLM and config.num_hidden_layers == 3
    assert (config.mixer_num_heads, config.mixer_num_groups, config.mixer_state_size) == (2, 2, 4)
    stock = mixer == "mamba2" and norms_groups_apart()
    to, name = ("bamba", "BambaForCausalLM") if stock else ("hybrid", "HybridForCausalLM")
    assert main(["export", str(run), "--to", to]) == 0
    exported = AutoModelForCausalLM.from_pretrained(run / "export" / to, trust_remote_code=False).eval()
    assert type(exported).__name__ == name
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        ours, theirs = student.eval()(ids).logits, exported(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def two_rounds(checkpoint, texts, tmp_path_factory):
    """A recipe of two searched rounds, and the student of a run of it that nothing interrupts."""

    def recipe(output):
        return made(
            checkpoint, texts, output, prune={"parameters": 0.5, "rounds": 2},
            search={"steps": 2, "widths": ["ffn"], "tokens": 3 * 128, "tolerance": 0.1}, heal=stage(4),
        )  # fmt: skip

    run = tmp_path_factory.mktemp("whole") / "run"
    assert wait(fork(lambda: prune(recipe(run))), 120) == 0
    return recipe, (run / "student" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("place", "number"),
    [("rounds/1/metrics.jsonl", signal.SIGKILL), ("heal_2", signal.SIGTERM)],
    ids=["killed in the search", "stopped in round 2"],
)
def test_stopped_anywhere_the_same_command_gives_the_same_student(place, number, two_rounds, tmp_path):
    recipe, expected = two_rounds
    run = tmp_path / "run"
    file = run / (place if "/" in place else "metrics.jsonl")

    def stop():
        while True:
            lines = file.read_text().splitlines() if file.exists() else []
            if any(('"candidate_2"' if "/" in place else f'"{place}"') in x and '"step": 2' in x for x in lines):
                os.kill(os.getpid(), number)
                return
            time.sleep(0.002)

    def stopped():
        threading.Thread(target=stop, daemon=True).start()
        try:
            prune(recipe(run))
        except Interrupted:
            return INTERRUPTED

    assert wait(fork(stopped), 120) == (INTERRUPTED if number == signal.SIGTERM else -signal.SIGKILL)
    assert not is_complete(run / "student")
    assert wait(fork(lambda: prune(recipe(run))), 120) == 0
    assert (run / "student" / "model.safetensors").read_bytes() == expected


def test_a_dry_run_shows_sizes_and_reads_no_weights(checkpoint, texts, tmp_path, capsys):
    bare = tmp_path / "teacher"
    bare.mkdir()
    (bare / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    recipe = tmp_path / "recipe.yaml"
    made(bare, texts, tmp_path / "run", prune={"ffn": 24, "layers": 2}, convert={"ssm_layers": [1]}).save(recipe)
    assert main(["prune", str(recipe), "--dry-run", "--set", "convert.ssm_layers=[7]"]) == 2
    assert "error: --set convert.ssm_layers: got [7], but the teacher's layers are numbered 0 to" in (
        capsys.readouterr().err
    )
    assert main(["prune", str(recipe), "--dry-run", "--set", "prune.rounds=2"]) == 0
    printed = capsys.readouterr().out
    config = AutoModelForCausalLM.from_pretrained(checkpoint).config
    sizes = [sizes_of(config)]
    sizes += [type(sizes[0])(**sizes[0].__dict__ | {"layers": n, "ffn": f}) for n, f in ((3, 34), (2, 24))]
    for one in sizes:
        assert f"{config_parameters(sized_config(config, one))[0]:,}" in printed, one
    assert "after round 1" in printed and "converted" in printed and "mixers" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml", "teacher"]


def test_a_dry_run_promises_what_the_run_does(checkpoint, texts, tmp_path, capsys, caplog):
    def planned(**given):
        prune(made(checkpoint, texts, tmp_path / "run", **given), dry_run=True)
        return capsys.readouterr().out

    printed = planned(prune={"vocabulary": 40, "parameters": 3e4})
    assert "with the whole vocabulary" in " ".join(printed.split())
    printed = planned(prune={"vocabulary": 40})
    assert "must stay" in " ".join(printed.split()) and "heal" not in printed
    assert "known after calibration" not in planned(prune={"layers": [0, 2]})
    assert "known after calibration" in planned(prune={"layers": 2}) and not caplog.records
    planned(prune={"layers": 3, "rounds": 3})
    assert "nothing is cut in round 1, 3;" in caplog.text
    ranked = {"prune": {"parameters": 0.5}, "search": {"tokens": 0, "steps": 2, "tolerance": 0.1}}
    assert "of least KL on held-out text as cut, within" in " ".join(planned(**ranked).split())
    data = recipe_data(checkpoint, texts, tmp_path)["data"] | {"train": [str(tmp_path / "nothing.txt")]}
    with pytest.raises(UserError, match=r"data: .*nothing.txt does not exist"):
        planned(data=data)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"output: .*run exists and is not a run of mohawk"):
        planned()
    (tmp_path / "run" / "recipe.yaml").write_text(made(checkpoint, texts, tmp_path / "run").to_yaml())
    planned()
    (tmp_path / "run" / "student").mkdir()
    with pytest.raises(
        UserError, match=r"output: .*run holds a run that was started with another prune.ffn, prune.lay"
    ):
        planned(prune={"layers": 2})


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"heads": 3}, r"prune: heads: got 3 for kv_heads 2; allowed: multiples of 2"),
        ({"heads": 1}, r"prune: heads: got 1 for kv_heads 2, which leaves groups without a head"),
        ({"ffn": 49}, r"prune: ffn: got 49, allowed: 1 to 48, the model's own"),
        ({"layers": "without:2-7"}, r"prune: layers: got 'without:2-7'; allowed: a block within layers 0 to 3"),
        ({"hidden": 30}, r"prune: hidden 30 with 4 heads of 8: LlamaConfig does not allow it: .*multiple"),
        ({"state_size": 4}, r"prune: state_size: got 4, but the model has no mixer"),
        (
            {"parameters": 1e9},
            r"prune.parameters: the model already has 39,264 parameters; allowed: a budget below that",
        ),
        ({"parameters": 300}, r"prune.parameters: got 300; allowed: a number of all parameters .60e6., at least 1000"),
        ({"parameters": "100%"}, r"prune.parameters: got the text '100%'; allowed: .* a share below 1"),
        ({"kv_heads": 3}, r"prune: kv_heads: got 3, allowed: 1 to 2, the model's own"),
        ({"ffn": 48, "layers": 4}, r"prune: the model has these sizes already"),
        ({"memory": 100}, r"prune.memory: 100 bytes cannot be reached"),
        ({"vocabulary": 300}, r"prune.vocabulary: got 300; allowed: corpus, or up to 258"),
    ],
    ids=str,
)
def test_targets_that_cannot_be_get_one_line_before_weights_load(target, said, checkpoint, texts, tmp_path):
    bare = tmp_path / "teacher"
    bare.mkdir()
    (bare / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(UserError, match=said) as raised:
        prune(made(bare, texts, tmp_path / "run", prune=target))
    assert len(str(raised.value).splitlines()) == 1 and not (tmp_path / "run").exists()


def test_all_mistakes_of_a_recipe_at_once(checkpoint, texts, tmp_path):
    data = recipe_data(checkpoint, texts, tmp_path / "run")
    data["teacher"] = {"model": str(checkpoint), "quantize": "int8"}
    data["prune"] = {"ffn": 24, "parameters": 0.5, "memory": 1e9, "targets": [{"layers": 2}, {}], "rounds": 3}
    data["calibration"]["tokens"] = 4
    data["heal"] |= {"learn_from": "previous", "tokens": 1, "nam": "x"}
    data["convert"] = {"init": "random", "gate": "output"}
    with pytest.raises(UserError) as raised:
        PruneRecipe.from_dict(data)
    for said in (
        "quantize", "beside targets", "rounds 3 beside targets", "targets.1: nothing to cut to", "fill one row",
        "nam: unknown key; did you mean name?", "convert.gate",
    ):  # fmt: skip
        assert said in str(raised.value), said
    data = recipe_data(checkpoint, texts, tmp_path / "run", heal=None)
    data["prune"] = {"layers": [0, 1], "rounds": 2}
    with pytest.raises(UserError, match=r"prune.layers: \[0, 1\] names layers") as raised:
        PruneRecipe.from_dict(data)
    assert "heal: null" in str(raised.value)
    data["prune"] = {"layers": "every_third", "parameters": 1.5, "vocabulary": "some"}
    with pytest.raises(UserError) as raised:
        PruneRecipe.from_dict(data)
    for said in (
        "'every_third'; allowed: a number of layers",
        "1.5; allowed: a number of all",
        "'some'; allowed: corpus",
    ):
        assert said in str(raised.value), said
    data["prune"], data["heal"] = {"parameters": 0.5, "latency": 9, "ffn": 3}, stage(tokens=1, learn_from="previous")
    with pytest.raises(UserError) as raised:
        PruneRecipe.from_dict(data)
    for said in (
        "ffn and parameters",
        "parameters and latency: a latency is timed",
        "do not fill one step",
        "previous; allowed",
    ):
        assert said in str(raised.value), said


@pytest.mark.parametrize("name", ["prune-width", "prune-depth", "prune-and-convert", "prune-hybrid"])
def test_shipped_recipes_are_read(name):
    recipe = PruneRecipe.load(shipped(name))
    assert PruneRecipe.from_dict(recipe.model_dump(mode="json")) == recipe and recipe.output == Path(f"runs/{name}")


def test_a_finished_run_keeps_its_learning_rate(checkpoint, texts, tmp_path):
    run = tmp_path / "run"
    prune(made(checkpoint, texts, run, heal=stage(1)))
    with pytest.raises(UserError, match="another heal.learning_rate"):
        prune(made(checkpoint, texts, run, heal=stage(1, learning_rate=1e-5)))


@pytest.mark.parametrize(
    ("which", "where", "more"),
    [
        ("heal", r"heal \(heal_2\)", {"prune": {"ffn": 24, "rounds": 2}}),
        ("correct", r"correct", {"correct": stage(), "prune": {"ffn": 24}}),
        ("convert.hidden", r"convert\.hidden", {"convert": {"ssm_layers": [0], "mixing": None, "hidden": stage()}}),
    ],
)
def test_a_stage_that_breaks_down_names_its_own_field_and_goes_on_with_another_rate(
    which, where, more, checkpoint, texts, tmp_path, monkeypatch
):
    """The field is one that a prune recipe has, and the advice is one that the run then takes."""
    run, real = tmp_path / "run", saving.first_nonfinite_of_all

    def first_nonfinite(tensors):
        name = "heal_2" if which == "heal" else which.split(".")[-1]
        return "lm_head.weight" if (run / "phases" / name).exists() else real(tensors)

    monkeypatch.setattr(saving, "first_nonfinite_of_all", first_nonfinite)
    data = recipe_data(checkpoint, texts, run, **more)
    lower = rf"Lower {re.escape(which)}\.learning_rate \(now 0\.003\)"
    with pytest.raises(UserError, match=rf"{where}: after step 2 lm_head.weight is not finite.* {lower}"):
        prune(PruneRecipe.from_dict(data))
    monkeypatch.undo()
    prune(PruneRecipe.from_dict(data, [f"{which}.learning_rate=1e-3"]))
    assert (run / "student" / "model.safetensors").exists()
    with pytest.raises(UserError, match=f"another {which}.learning_rate"):
        prune(PruneRecipe.from_dict(data, [f"{which}.learning_rate=1e-5"]))


def test_candidates_that_are_compared_are_healed_alike(checkpoint, texts, tmp_path):
    """While a search goes on, its healing keeps its rate; once a size is picked, that may change."""
    data = recipe_data(checkpoint, texts, tmp_path / "run")
    run, recipe = tmp_path / "run", PruneRecipe.from_dict(data)
    slower = PruneRecipe.from_dict(data, ["heal.learning_rate=1e-5"])
    run.mkdir()
    write_text(run / "recipe.yaml", recipe.to_yaml())
    write_json(run / "rounds" / "1" / "search.json", {"candidates": []})
    with pytest.raises(UserError, match="another heal.learning_rate"):
        check_folder(run, slower)
    write_json(run / "rounds" / "1" / "search.json", {"candidates": [], "picked": 0})
    check_folder(run, slower)


def test_a_recipe_is_checked_without_torch():
    code = (
        "import sys; from mohawk.pruning.recipe import PruneRecipe; from mohawk.schema.files import shipped; "
        "PruneRecipe.load(shipped('prune-width')); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_vocabulary_of_prompts_and_responses(merging, texts, tmp_path):
    """Their tokens count like text's: all that a healing reads stays."""
    lines = [{"prompt": f"Say {i}:", "response": "never heard of elsewhere"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = {"source": str(tmp_path / "pairs.jsonl"), "kind": "pairs"}
    data = {"train": [pairs], "validation_share": 0.2, "cache": str(tmp_path / "cache")}
    run = tmp_path / "run"
    prune(made(merging, texts, run, data=data, prune={"ffn": 24, "vocabulary": "corpus"}, heal=stage(1)))
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    assert "heard" in " ".join(tokenizer.get_vocab()) and "Document" not in " ".join(tokenizer.get_vocab())
    assert read(run / "vocabulary.json")["held_out"] > 0.9


def test_healing_reads_the_text_of_its_own(checkpoint, texts, tmp_path, monkeypatch):
    """In every round, whose stages are called heal_1 and heal_2."""
    from mohawk.distillation import sources as distill_module

    read_by, training_rows = [], distill_module.training_rows

    def watched(data, sources, *given):
        read_by.append([source.source for source in data.train] + [text.name for text in sources.text.train.texts])
        return training_rows(data, sources, *given)

    monkeypatch.setattr(distill_module, "training_rows", watched)
    own = str(texts / "train_0.txt")
    heal = stage(1) | {"data": {"train": [{"source": own}], "cache": str(tmp_path / "cache")}}
    prune(made(checkpoint, texts, tmp_path / "run", heal=heal, prune={"ffn": 24, "rounds": 2}))
    assert read_by == [[own, own]] * 2


def test_a_vocabulary_that_cannot_be_trimmed_is_said_first(merging, texts, tmp_path):
    """Without weights: the first has more ids than the embedding, the second is not made of merges."""
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(merging, teacher)
    (teacher / "model.safetensors").unlink()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens([f"<{i}>" for i in range(291 - len(tokenizer))])  # the embedding has no row for the last
    tokenizer.save_pretrained(teacher)
    for dry_run in (True, False):
        with pytest.raises(UserError, match="teacher: .*its tokenizer has ids up to 290 .*embedding only 290 rows"):
            prune(made(teacher, texts, run, prune={"ffn": 24, "vocabulary": "corpus"}), dry_run=dry_run)
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<bos>": 1, "a": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", bos_token="<bos>").save_pretrained(teacher)
    for dry_run in (True, False):
        with pytest.raises(UserError, match="prune.vocabulary: .*got a tokenizer with a WordLevel model"):
            prune(made(teacher, texts, run, prune={"ffn": 24, "vocabulary": "corpus"}), dry_run=dry_run)
    assert not run.exists()


def test_a_dry_run_looks_for_scores_and_text_whether_the_teacher_has_a_tokenizer_or_not(checkpoint, texts, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, teacher)
    for given, message in (
        (
            {"calibration": {"scores": str(tmp_path / "none.safetensors")}},
            "calibration.scores: .*none.safetensors cannot",
        ),
        ({"data": {"train": [str(tmp_path / "none.txt")]}}, "none.txt"),
    ):
        for path in (checkpoint, teacher):
            with pytest.raises(UserError, match=message):
                prune(made(path, texts, tmp_path / "run", prune={"ffn": 24}, **given), dry_run=True)


def test_why_more_tokens_are_kept_than_asked_for(merging, texts, tmp_path, capsys):
    """Every id is counted once, in the line before training, in vocabulary.json and in the report."""
    run, asked = tmp_path / "run", 20
    prune(made(merging, texts, run, prune={"vocabulary": asked}, heal=None))
    why = read(run / "vocabulary.json")["why"]
    kept = AutoTokenizer.from_pretrained(run / "student")
    assert why["asked for"] == asked and sum(why.values()) == len(kept) == read(run / "vocabulary.json")["after"]
    # the alphabet of bytes is 256, of which some were asked for
    assert 256 - asked <= why["bytes or characters"] < 256 and why["special or added"] <= 2
    assert why["parts that longer ones are merged from"] == len(kept) - asked - sum(
        why[name] for name in ("bytes or characters", "special or added")
    )
    parts = ", ".join(f"{count} {reason}" for reason, count in why.items() if count)
    assert f"vocabulary: kept in the end are, of 290, {len(kept)} tokens: {parts}" in capsys.readouterr().out
    assert "bytes or characters" in (run / "report.md").read_text()
    # version 0.1.0 did not write the reasons
    found = read(run / "vocabulary.json")
    del found["why"]
    write_json(run / "vocabulary.json", found)
    prune(made(merging, texts, run, prune={"vocabulary": asked}, heal=None))
    report = (run / "report.md").read_text()
    assert f"{len(kept)} of 290" in report and "bytes or characters" not in report


def test_scores_of_an_earlier_run(checkpoint, texts, tmp_path, capsys):
    prune(made(checkpoint, texts, tmp_path / "first", heal=None))
    path = tmp_path / "first" / "rounds" / "1" / "importance.safetensors"
    again = made(checkpoint, texts, tmp_path / "again", heal=None, calibration={"scores": str(path)})
    capsys.readouterr()
    prune(again)
    assert "round 1: importance as in" in capsys.readouterr().out
    assert read(tmp_path / "again/results.json")["evaluation"] == read(tmp_path / "first/results.json")["evaluation"]
    other = made(checkpoint, texts, tmp_path / "c", calibration={"scores": str(texts / "train_0.txt")})
    with pytest.raises(UserError, match="calibration.scores: .*train_0.txt cannot be read"):
        prune(other, dry_run=True)
    tiny_teacher(vocab_size=258, num_hidden_layers=3, bos_token_id=256, eos_token_id=257).save_pretrained(
        tmp_path / "t"
    )
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "t")
    with pytest.raises(UserError, match=r"calibration.scores: importance: scores of another model \(layers 4 for 3\)"):
        prune(made(tmp_path / "t", texts, tmp_path / "d", calibration={"scores": str(path)}))
    with pytest.raises(UserError, match="calibration.scores beside prune.strategy random"):
        made(checkpoint, texts, tmp_path / "e", prune={"ffn": 8, "strategy": "random"}, calibration={"scores": "x"})
