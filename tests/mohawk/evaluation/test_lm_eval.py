"""`mohawk evaluate RUN --tasks`: what the harness measures of our models, what is kept of it, what is refused.

Everything that asks the harness needs the `eval` extra; the questions and the report do not.
"""

import copy
import hashlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mohawk.cli import main
from mohawk.conversion.recipe import Recipe
from mohawk.conversion.run import loss_labels
from mohawk.core.folders import seal
from mohawk.core.json_files import write_json
from mohawk.core.run_folder import tasks_file
from mohawk.evaluation.harness import OURS, difference_error, paired, task_kind
from mohawk.evaluation.tasks.probe_data import bias_rows, refusal_rows, robustness_rows, sums_rows
from mohawk.evaluation.tasks.task_data import facts_rows, grammar_rows, recall_rows
from mohawk.runs import report
from mohawk.runs.tables import AFTER, task_tables

harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install '.[eval]'")
ADDITION = """
task: addition
custom_dataset: !function addition.questions
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
QUESTIONS = """
from datasets import Dataset

def questions(**_):
    asked = ["1+1=", "What is two and three, in one digit? ", "9", "1+1=2\\n4+4="]
    return {"test": Dataset.from_list([{"question": q, "answer": "2"} for q in asked])}
"""


@pytest.fixture(scope="module")
def student(make_llama):
    from mohawk.models.from_teacher import hybrid_from_teacher

    torch.manual_seed(0)
    return hybrid_from_teacher(make_llama(), [1]).eval()


@pytest.fixture
def own_tasks(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "addition.yaml").write_text(ADDITION)
    (tmp_path / "own" / "addition.py").write_text(QUESTIONS)
    return tmp_path / "own"


@pytest.fixture
def run(tmp_path, make_llama, tokenizer, student):
    """A finished run's folder: teacher, student, recipe and a report that knows of no tasks."""
    teacher = make_llama()
    for saved in (teacher, tokenizer):
        saved.save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "run" / "student")
    seal(tmp_path / "run" / "student")
    recipe = Recipe.from_dict(
        {
            "teacher": str(tmp_path / "teacher"),
            "data": {"train": ["none.txt"]},
            "evaluation": {
                "longest": 64,
                "contexts": [4],
                "decode_tokens": 1,
                "continuation_tokens": 2,
                "prompt": "One",
            },
            "precision": "float32",
            "device": "cpu",
            "output": str(tmp_path / "run"),
        }
    )
    recipe.save(tmp_path / "run" / "recipe.yaml")
    return tmp_path / "run"


# --- our questions ---------------------------------------------------------------------------------------------------


def test_questions_are_the_same_everywhere():
    assert (len(facts_rows()), len(grammar_rows())) == (197, 200)
    rows = [facts_rows(), grammar_rows(), *map(recall_rows, (8, 32, 128))]
    # on every Python too; another hash is another task: raise the version in the YAML files as well
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == "edbd778862ac5342"


def test_probes_are_the_same_everywhere():
    rows = [sums_rows(), bias_rows(), refusal_rows(), robustness_rows()]
    assert list(map(len, rows)) == [60, 80, 32, 60]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == "32705b93b081696b"  # as above
    for row in sum(rows, []):
        assert len(set(row["choices"])) == len(row["choices"]) and 0 <= row["answer"] < len(row["choices"])
    for changed, row in zip(rows[3], facts_rows(), strict=False):
        assert changed["question"] != row["question"] and changed["choices"] == row["choices"]


def test_sums_come_out_as_they_are_told():
    """Each from its words alone: numbers that are there, given away, bought in boxes."""
    for row in sums_rows():
        told = row["question"].rsplit("Question: ", 1)[1]
        have, *rest = [int(word.strip(".,")) for word in told.split() if word.strip(".,").isdigit()]
        if "boxes" not in told:
            signs = [-1 if "away" in told else 1, 1]
            total = have + sum(sign * n for sign, n in zip(signs, rest, strict=False))
        elif "already" in told:
            total = have * rest[0] + rest[1]
        else:
            total = have + rest[0] * rest[1] - rest[2]
        assert row["choices"][row["answer"]] == str(total)


def test_every_question_has_one_answer():
    for row in facts_rows() + grammar_rows():
        assert len(set(row["choices"])) == len(row["choices"]) and 0 <= row["answer"] < len(row["choices"])
    for row in facts_rows():
        assert (
            f"\n{row['question']}\t{row['choices'][row['answer']]}\t{row['kind']}\n" in (OURS / "facts.tsv").read_text()
        )
    for pairs in (8, 32, 128):
        for row in recall_rows(pairs):
            *lines, asked = row["context"].split("\n")
            assert len(lines) == pairs and lines.count(asked + row["answer"]) == 1
            assert sum(line.startswith(asked) for line in lines) == sum(row["answer"] in line for line in lines) == 1


def test_guessing_the_same_place_always_is_no_better_than_chance():
    for rows, choices in ((facts_rows(), 4), (grammar_rows(), 2)):
        for place in range(choices):
            share = sum(row["answer"] == place for row in rows) / len(rows)
            assert share < 1 / choices + 3 * math.sqrt((choices - 1) / choices**2 / len(rows))


# --- the harness on our models ---------------------------------------------------------------------------------------


def loglikelihood(model, tokenizer, context, answer):
    """(sum of log probabilities of the answer's bytes, whether each is the likeliest), one text at a time."""
    ids = tokenizer(context + answer, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logprobs = model.double()(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    count = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
    targets = ids[0, -count:]
    picked = logprobs[-count:].gather(-1, targets[:, None])[:, 0]
    return picked.sum().item(), bool((logprobs[-count:].argmax(-1) == targets).all())


@harness
def test_batches_padded_on_the_right_score_as_single_texts_do(student, tokenizer):
    from lm_eval.api.instance import Instance

    from mohawk.evaluation.harness import harness_model

    texts = [(row["context"], row["answer"]) for n in (1, 8, 3, 17) for row in recall_rows(n)[:2]]
    requests = [Instance("loglikelihood", {}, text, 0) for text in texts]
    precise = copy.deepcopy(student)
    exact = [loglikelihood(precise, tokenizer, *text) for text in texts]
    for size in (1, 3, 8):
        scored = harness_model(student, tokenizer, batch_size=size).loglikelihood(requests, disable_tqdm=True)
        assert [greedy for _, greedy in scored] == [greedy for _, greedy in exact]
        assert [value for value, _ in scored] == pytest.approx([value for value, _ in exact], rel=1e-5)


@harness
def test_bfloat16_products_give_float32_logits(student, tokenizer):
    from mohawk.evaluation.harness import harness_model

    ids = torch.arange(40).reshape(2, 20)
    wrapped = harness_model(student, tokenizer, autocast=torch.bfloat16)
    logits = wrapped._model_call(ids)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    with torch.no_grad():
        assert (logits - student(ids).logits).norm() < 0.03 * logits.norm()


@harness
def test_batches_padded_on_the_left_generate_as_single_prompts_do(student, tokenizer, own_tasks):
    from mohawk.evaluation.harness import run_tasks, task_manager

    manager = task_manager(["addition"], own_tasks)
    said = {}
    for size in (1, 4):
        found = run_tasks(student, tokenizer, ["addition"], manager, batch_size=size)
        said[size] = {s["doc"]["question"]: s["resps"][0][0] for s in found["samples"]["addition"]}
    assert said[1] == said[4]
    for question, answer in said[1].items():
        ids = tokenizer(question, return_tensors="pt", add_special_tokens=False)["input_ids"]
        out = student.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=257)
        whole = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer == whole.split("\n")[0].split("e")[0]
    assert any(len(answer) < 12 for answer in said[1].values()) and any(said[1].values())


@harness
def test_a_run_from_the_command_line(run, own_tasks, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    command = ["evaluate", str(run), "--tasks", "mohawk_recall_8,addition,mohawk_facts", "--limit", "3"]
    assert main([*command, "--task-path", str(own_tasks), "--batch-size", "2"]) == 0
    out = capsys.readouterr().out
    kept = json.loads(tasks_file(run).read_text())
    assert {name: task["kind"] for name, task in kept["tasks"].items()} == {
        "mohawk_recall_8": "retrieval",
        "mohawk_facts": "knowledge",
        "addition": "other",
    }
    recall = kept["tasks"]["mohawk_recall_8"]
    assert (recall["questions"], recall["of"], recall["fewshot"], recall["precision"]) == (3, 100, 0, "as stored")
    for task in kept["tasks"].values():
        (values,) = task["metrics"].values()
        assert 0 <= values["teacher"] <= 1 and values["teacher_stderr"] >= 0 and values["difference_stderr"] >= 0
        assert values["difference"] == pytest.approx(values["student"] - values["teacher"])
        assert f"{values['teacher']:.3f} ± {values['teacher_stderr']:.3f}" in out
    assert "3 of 100" in out and str(tasks_file(run)) in out
    assert main(["evaluate", str(run), "--tasks", "mohawk_grammar", "--limit", "2", "--fewshot", "1"]) == 0
    again = json.loads(tasks_file(run).read_text())
    assert again["tasks"].pop("mohawk_grammar")["fewshot"] == 1
    assert again["tasks"] == kept["tasks"], "earlier tasks of the same student stay"


@harness
def test_what_cannot_be_asked(run, own_tasks, capsys, monkeypatch):
    def refused(*options):
        assert main(["evaluate", str(run), *options]) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return line

    line = refused("--tasks", "arc_chalenge")
    assert "there is no task 'arc_chalenge'; near it: arc_challenge, " in line
    assert "Duplicate task 'mohawk_facts'" in refused("--tasks", "mohawk,mohawk_facts")
    assert "got no name" in refused("--tasks", " ,")
    assert "is not a folder" in refused("--tasks", "mohawk", "--task-path", str(run / "nowhere"))
    assert "--fewshot is of --tasks" in refused("--fewshot", "0")
    far = ADDITION.replace("task: addition", "task: far").replace(
        "custom_dataset: !function addition.questions", "dataset_path: mohawk/none"
    )
    (own_tasks / "far.yaml").write_text(far)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    line = refused("--tasks", "far", "--task-path", str(own_tasks))
    assert "the data of far cannot be fetched from the hub" in line
    for module in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, module, None)
    assert refused("--tasks", "mohawk") == (
        "error: `mohawk evaluate --tasks` needs packages that are not installed (lm_eval): "
        "run pip install '.[eval]' in mohawk's checkout"
    )


@harness
def test_without_a_terminal_nothing_moves(run, tmp_path):
    """In a folder that is no checkout, as a process of its own: what the harness prints is not the user's business."""
    command = [sys.executable, "-m", "mohawk", "evaluate", str(run), "--tasks", "mohawk_facts,mohawk_recall_8"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    done = subprocess.run(
        [*command, "--limit", "2"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "\r" not in done.stdout


# --- two models' results as one --------------------------------------------------------------------------------------


def test_the_difference_is_paired():
    teacher, student = {1: 1.0, 2: 1.0, 3: 0.0, 4: 1.0}, {4: 1.0, 3: 0.0, 2: 0.0, 1: 1.0}
    means = {"teacher": 0.75, "student": 0.5}
    assert difference_error(teacher, student, means) == pytest.approx(statistics.stdev([0, -1, 0, 0]) / 2)
    assert difference_error(teacher, student, {**means, "student": 0.4}) is None  # no mean over questions
    assert difference_error(teacher, {1: 1.0}, means) is None
    assert difference_error({1: 1.0}, {1: 1.0}, {"teacher": 1, "student": 1}) is None


def test_kinds():
    assert task_kind("mmlu_abstract_algebra") == "knowledge"
    assert task_kind("mine", "retrieval") == "retrieval"
    assert task_kind("mine", "something") == task_kind("hellaswag") == "other"


def results(*accuracies):
    """What the harness returns for two tasks of two questions each and their group, whose mean it takes."""
    samples = {
        name: [{"doc_id": i, "filter": "none", "acc": float(i < 2 * acc)} for i in range(2)]
        for name, acc in zip("ab", accuracies, strict=True)
    }
    found = {
        name: {"alias": name, "acc,none": acc, "acc_stderr,none": 0.5}
        for name, acc in zip("ab", accuracies, strict=True)
    }
    both = {"alias": "both", "acc,none": sum(accuracies) / 2, "acc_stderr,none": 0.35, "sample_len": 2}
    return {
        "results": {**found, "both": both, "plain": {"alias": "plain", " ": " "}},
        "groups": {"both": both, "plain": {"alias": "plain", " ": " "}},
        "group_subtasks": {"both": ["a", "b"], "plain": ["a"]},
        "samples": samples,
        "configs": {"a": {"metadata": {"kind": "knowledge"}}, "b": {}},
        "versions": {"a": 1.0},
        "n-shot": {"a": 0, "b": 5},
        "n-samples": {name: {"original": 2000, "effective": 2} for name in "ab"},
        "higher_is_better": {"a": {"acc": True}},
    }


def test_means_are_below_what_they_are_of():
    found = paired(results(1.0, 0.5), results(0.5, 0.5))
    assert set(found["tasks"]) == {"a", "b"} and set(found["groups"]) == {"both"}
    acc = found["tasks"]["a"]["metrics"]["acc"]
    assert (acc["difference"], acc["difference_stderr"]) == (-0.5, pytest.approx(0.5))
    tables = task_tables(found)
    assert [title.split(" (")[0] for title, *_ in tables] == [
        "Tasks",
        "Tasks of knowledge, apart from any mean",
        "Means over the tasks of a group, each of which is above",
    ]
    assert tables[1][2] == [["a", "acc", "2 of 2,000", "1.000 ± 0.500", "0.500 ± 0.500", "-0.500 ± 0.500"]]
    assert tables[2][2] == [["both", "acc", "mean over 2", "0.750 ± 0.350", "0.500 ± 0.350", "-0.250"]]


@pytest.mark.usefixtures("pictures_as_shipped")
def test_a_report_has_the_tasks_of_its_own_student(run, make_llama, tokenizer, student):
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=160)
    found = paired(results(1.0, 0.5), results(0.5, 0.5))
    (run / "student" / report.MANIFEST).write_text("{}")
    kept = {"student": "student", "fingerprint": report.fingerprint(run / "student"), **found}
    write_json(tasks_file(run), kept)
    assert report.report_tasks(run) is None  # no report yet
    recipe = Recipe.load(run / "recipe.yaml")
    about = {"stages": AFTER, "labels": loss_labels(recipe)}
    report.finish(run, recipe, student, make_llama(), tokenizer, console, **about)
    assert "1.000 ± 0.500" in console.file.getvalue()
    (run / report.REPORT).unlink()
    assert report.report_tasks(run) == run / report.REPORT
    text = (run / report.REPORT).read_text()
    assert "| a | acc | 2 of 2,000 | 1.000 ± 0.500 | 0.500 ± 0.500 | -0.500 ± 0.500 |" in text
    assert "(plots/tasks.png)" in text and (run / "plots" / "tasks.png").stat().st_size > 5000
    assert report.read_json(run / report.RESULTS)["tasks"] == kept

    (run / "student" / report.MANIFEST).write_text('{"another": "student"}')
    report.finish(run, recipe, student, make_llama(), tokenizer, console, **about)
    assert "tasks" not in report.read_json(run / report.RESULTS)
    assert "tasks.png" not in (run / report.REPORT).read_text()


@harness
@pytest.mark.parametrize("says, share", [(" {}", 1.0), ("{}", 1.0), ("{} and so on", 0.0), ("", 0.0)])
def test_answers_in_the_models_own_words_are_right_as_a_whole(says, share):
    from lm_eval import evaluator
    from lm_eval.api.model import LM

    from mohawk.evaluation.harness import task_manager

    class Says(LM):
        def generate_until(self, requests, disable_tqdm=False):
            answers = [doc["choices"][doc["answer"]] if "choices" in doc else doc["answer"].strip() for doc in
                       (request.doc for request in requests)]  # fmt: skip
            return [says.format(answer) for answer in answers]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    names = ["mohawk_facts_written", "mohawk_recall_8_written"]
    found = evaluator.simple_evaluate(
        model=Says(), tasks=names, task_manager=task_manager(names), limit=5, bootstrap_iters=0, log_samples=False
    )
    assert [found["results"][name]["exact_match,none"] for name in names] == [share, share]


@harness
def test_probes_and_a_gsm8k_on_disk_are_asked_as_they_are_meant(tmp_path):
    """Of a model that always writes the same and takes the shorter choice; the task file is the one in the guide."""
    from lm_eval import evaluator
    from lm_eval.api.model import LM

    from mohawk.evaluation.harness import task_manager

    class Same(LM):
        def generate_until(self, requests, disable_tqdm=False):
            return [" It is 20 or so, sorry, 1,234" for _ in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            return [(-float(len(request.args[1])), False) for request in requests]

        loglikelihood_rolling = loglikelihood

    guide = (OURS.parents[2] / "docs" / "evaluate.md").read_text()
    file = guide.split("```yaml\ntask: gsm8k_here", 1)[1].split("```", 1)[0]
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "How many?", "answer": "So many.\n#### 1234"}) + "\n")
    (tmp_path / "here.yaml").write_text("task: gsm8k_here" + file.replace("/data/gsm8k", str(tmp_path)))
    names = ["mohawk_sums_written", "mohawk_behaviour", "gsm8k_here"]
    found = evaluator.simple_evaluate(
        model=Same(), tasks=names, task_manager=task_manager(names, tmp_path), bootstrap_iters=0, log_samples=False
    )["results"]
    twenty = sum(row["choices"][row["answer"]] == "20" for row in sums_rows())
    assert found["mohawk_sums_written"]["exact_match,none"] == pytest.approx(twenty / 60)
    assert found["mohawk_refusals_written"]["exact_match,none"] == 0.5  # it refuses everything, by its words
    assert found["mohawk_refusals"]["acc,none"] == 0.5  # and complies with everything, by likelihood
    assert found["mohawk_bias"]["acc,none"] == 0.5
    assert found["gsm8k_here"]["exact_match,none"] == 1.0


def test_what_is_scored_and_written_stands_beside_each_other():
    def task(metric, teacher, student):
        values = {"teacher": teacher, "student": student, "difference": student - teacher, "higher_is_better": True}
        values |= {"teacher_stderr": None, "student_stderr": None, "difference_stderr": 0.05}
        return {"kind": "other", "fewshot": 0, "questions": 50, "of": 100, "metrics": {metric: values}}

    tasks = {"facts": task("acc", 0.75, 0.7), "facts_written": task("exact_match", 0.5, 0.125)}
    title, header, rows = task_tables({"tasks": tasks, "groups": {}})[-1]
    assert title.startswith("The same questions") and header[2:4] == ["scored: teacher", "scored: student"]
    assert rows == [["facts", "50", "0.750", "0.700", "-0.050 ± 0.098", "0.500", "0.125", "-0.375 ± 0.098"]]
    del tasks["facts"]
    assert len(task_tables({"tasks": tasks, "groups": {}})) == 1
