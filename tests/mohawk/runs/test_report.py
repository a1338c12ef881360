import io
import json
import math
from types import SimpleNamespace

import pytest
from rich.console import Console

from mohawk.conversion.recipe import Recipe
from mohawk.conversion.run import loss_labels
from mohawk.errors import UserError
from mohawk.loading.describe import size_text
from mohawk.loading.models import parameter_count
from mohawk.runs import report
from mohawk.runs.tables import AFTER, tables


def found(student, teacher=20.0, kl=0.5):
    ratio = student / teacher
    return dict(
        tokens=1234, teacher_perplexity=teacher, student_perplexity=student, perplexity_ratio=ratio, kl=kl,
        top1_agreement=0.625,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run's folder as it is when the phases are done, with a student that was hopeless at first."""
    folder = tmp_path / "my-run"
    report.write_json(folder / "evaluation/before.json", {"held_out": found(math.inf, kl=math.nan)})
    both = {"held_out": found(25.0), "evaluation": found(44.0, 40.0)}
    report.write_json(folder / "evaluation/end_to_end.json", both)
    records = [
        {"phase": "mixing", "step": 1, "tokens": 100, "tokens_per_s": 10.0, "loss": 60.0, "skipped_steps": 0},
        {"phase": "mixing", "step": 2, "tokens": 200, "tokens_per_s": 20.0, "loss": 9.5, "skipped_steps": 0},
        {"phase": "mixing", "evaluated": True},
        {
            "phase": "end_to_end",
            "step": 5,
            "tokens": 36000,
            "tokens_per_s": 10.0,
            "loss": None,
            "skipped_steps": 1,
        },
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.fixture
def recipe():
    return Recipe.from_dict(
        {
            "teacher": "models/tiny",
            "data": {"train": ["text.txt"]},
            "phases": {"mixing": {"tokens": 40000}, "hidden": None, "end_to_end": {"tokens": 6e5}},
            "evaluation": {
                "contexts": [8, 20], "decode_tokens": 2, "prompt": "One [bold]two|", "continuation_tokens": 6,
            },
            "output": "runs/my-run",
        }
    )  # fmt: skip


@pytest.fixture
def finish(run, recipe, make_llama, tokenizer):
    from mohawk.models.from_teacher import hybrid_from_teacher

    teacher = make_llama()
    student = hybrid_from_teacher(teacher, [1]).eval()

    def finish():
        console = Console(file=io.StringIO(), width=160)
        results = report.finish(
            run, recipe, student, teacher, tokenizer, console,
            stages=AFTER, labels=loss_labels(recipe),
        )  # fmt: skip
        return results, console.file.getvalue()

    return finish


def test_a_finished_run_is_reported_everywhere(run, finish):
    results, screen = finish()
    written = json.loads((run / "results.json").read_text(), parse_constant=pytest.fail)
    assert written["evaluation"]["before"]["held_out"]["student_perplexity"] == "inf"
    assert report.read_json(run / "results.json")["evaluation"]["end_to_end"] == results["evaluation"]["end_to_end"]
    assert results["parameters"]["teacher"] > 0 and results["parameters"]["student"] > 0
    assert [s["context"] for s in results["decoding"]["student"]] == [8, 20]
    assert results["plots"] == ["plots/evaluation.png", "plots/losses.png"]
    assert results["machine"]["versions"]["torch"] and results["machine"]["device"] == "cpu"
    text = (run / "report.md").read_text()
    assert text.startswith("# my-run\n\nLlamaForCausalLM with 2 attention layers -> HybridForCausalLM with 1 mamba2")
    for shown in (screen, text):
        for part in (
            "44.00",
            "1.100",
            "62.5%",
            "∞",
            "not finite",
            "1 h 0 min",
            "15 s",
            "60.00 → 9.500",
            "1,234",
        ):
            assert part in shown, part
        assert "One [bold]two|" in shown
        assert results["continuations"]["student"].strip()[:3] in shown
    assert "| after phase 3, end to end | 25.00 | 20.00 | 1.250 |" in text
    assert "|  | teacher (float32) | student (float32) |" in text
    assert "(plots/losses.png)" in text and "tokens: 40000" in text
    assert not [p for p in run.rglob("*.tmp")]


def test_a_second_time_nothing_is_measured_again(run, finish, monkeypatch):
    first, _ = finish()
    monkeypatch.setattr("mohawk.measures.compare.decode_speed", None)
    monkeypatch.setattr("mohawk.measures.compare.continuation", None)
    second, _ = finish()
    assert second["decoding"] == first["decoding"] and second["continuations"] == first["continuations"]


def test_a_student_with_broken_decoding_is_unfit_and_measured_again_once_it_is_whole(run, finish, monkeypatch):
    from mohawk.models.mixers import SSMMixer

    # each piece of several tokens begins with an empty state, which no full forward shows
    monkeypatch.setattr(SSMMixer, "_read_cache", lambda *_: (None, None))
    with pytest.raises(UserError, match="does not answer as its own full forward does: prefill in chunks"):
        finish()
    broken = report.read_json(run / "results.json")
    assert broken["evaluation"]["end_to_end"]["held_out"]["perplexity_ratio"] == 1.25  # its likelihood is what it was
    page, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    assert '<td class="bad">NO: decoding is broken (prefill in chunks' in page
    assert "- **fit to use**: NO: decoding is broken (prefill in chunks" in text
    monkeypatch.undo()
    report.write_json(run / "results.json", broken | {"continuations": dict.fromkeys(broken["continuations"], "old")})
    results, screen = finish()
    assert results["broken"] is None and results["continuations"]["student"] != "old"
    assert "fit to use: it generates by the function that was measured" in screen
    assert 'class="bad"' not in (run / "report.html").read_text()


def test_a_run_that_was_never_evaluated_still_ends(run, finish):
    for path in (run / "evaluation").iterdir():
        path.unlink()
    (run / "metrics.jsonl").unlink()
    results, screen = finish()
    assert results["evaluation"] == {} and results["phases"] == {} and results["plots"] == []
    assert "parameters" in screen


def test_times_add_up_over_records(run):
    times = report.phase_times(run / "metrics.jsonl")
    assert list(times) == ["mixing", "end_to_end"]
    assert times["mixing"] == dict(tokens=200, seconds=15.0, first_tenth=60.0, steps=2, last_tenth=9.5, skipped_steps=0)
    assert times["end_to_end"]["seconds"] == 3600 and times["end_to_end"]["skipped_steps"] == 1
    assert times["end_to_end"]["first_tenth"] is times["end_to_end"]["last_tenth"] is None  # none was finite


def test_losses_are_means_over_the_first_and_last_tenth(tmp_path):
    losses = [9.0, 7.0, *[100.0] * 16, None, 3.0]  # of 20 records a tenth is two
    records = [
        {"phase": "hidden", "step": i + 1, "tokens": 10 * (i + 1), "tokens_per_s": 10.0, "loss": loss}
        for i, loss in enumerate(losses)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (phase,) = report.phase_times(tmp_path / "metrics.jsonl").values()
    assert (phase["first_tenth"], phase["last_tenth"]) == (8.0, 3.0)


def test_losses_of_single_steps_as_0_1_0_wrote_them_are_told_as_such(finish):
    results, _ = finish()
    (new,) = [table for table in tables(results) if table[0] == "Training"]
    assert new[1][4] == "loss, first → last tenth" and new[2][0][4] == "60.00 → 9.500"
    for phase in results["phases"].values():
        phase |= {"first_loss": 5.0, "last_loss": 4.0}
        del phase["first_tenth"], phase["last_tenth"]
    (old,) = [table for table in tables(results) if table[0] == "Training"]
    assert old[1][4] == "loss, first → last step" and old[2][0][4] == "5.000 → 4.000"


def test_json_keeps_what_json_has_no_number_for(tmp_path):
    value = {"a": [math.inf, -math.inf, 1.5], "b": {"c": None, "d": "text"}}
    report.write_json(tmp_path / "deep" / "x.json", value)
    assert report.read_json(tmp_path / "deep" / "x.json") == value
    report.write_json(tmp_path / "n.json", {"n": math.nan})
    assert math.isnan(report.read_json(tmp_path / "n.json")["n"])
    assert report.read_json(tmp_path / "missing.json") is None


def test_a_failed_write_leaves_the_old_file(tmp_path):
    report.write_json(tmp_path / "x.json", {"old": 1})
    with pytest.raises(TypeError):
        report.write_json(tmp_path / "x.json", {"new": object()})
    assert report.read_json(tmp_path / "x.json") == {"old": 1}


def test_tied_parameters_count_once(make_llama):
    untied, tied = make_llama(), make_llama(tie_word_embeddings=True)
    assert parameter_count(untied) - parameter_count(tied) == 258 * 32


def test_continuations_cannot_break_the_report(run, finish):
    results, _ = finish()
    results["continuations"] = {"prompt": "a", "teacher": "```\n# title\n| x |", "student": "\n\n"}
    text = report.to_markdown(results, "x: 1", "name")
    assert "    ```\n    # title\n    | x |\n" in text


def test_loss_labels_follow_the_recipe(recipe):
    assert loss_labels(recipe) == {
        "mixing": "‖S − A‖ per head, mean",
        "end_to_end": "forward KL, nats per token",
    }
    phase = SimpleNamespace
    phases = phase(
        mixing=phase(metric="relative"),
        hidden=phase(match="mixer_output"),
        end_to_end=phase(divergence="jsd", kd_weight=0.5, ce_weight=0.5, temperature=2.0),
    )
    assert loss_labels(phase(phases=phases)) == {
        "mixing": "relative distance of the matrices",
        "hidden": "L2 distance per token, mixer outputs",
        "end_to_end": "distillation loss per token",
    }


@pytest.mark.parametrize(
    "count, text", [(12, "12 bytes"), (23_592_960, "23.6 MB"), (4_000, "4.0 kB"), (7.7e9, "7.7 GB")]
)
def test_bytes(count, text):
    assert size_text(count) == text
