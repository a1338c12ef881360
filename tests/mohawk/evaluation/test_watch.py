"""`mohawk watch` on logs that are as they were, that drifted, and that are damaged."""

import json
import random

import pytest

from mohawk.cli import main
from mohawk.core.json_files import write_json
from mohawk.evaluation.watch import read_log
from mohawk.generation.decoding import sequence_logprob
from tests.mohawk.runs.test_page import made_results

WORDS = "a quick brown fox jumps over the lazy dog and sees no other fox".split()


def lines(count, seed, *, words=12, latency=0.2, **fields):
    draw = random.Random(seed)
    made = []
    for i in range(count):
        said = " ".join(draw.choices(WORDS, k=draw.randint(words - 4, words + 4)))
        row = {"prompt": f"Question {i}?", "response": said, "latency": draw.gauss(latency, 0.01)}
        made.append(row | {"logprob": -draw.uniform(5, 9), "tokens": 10} | fields)
    return made


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_log_as_it_was_and_one_that_drifted(tmp_path, capsys):
    then = written(tmp_path / "then.jsonl", lines(60, 0))
    same = written(tmp_path / "same.jsonl", lines(60, 1))
    target = tmp_path / "mohawk.prom"
    options = ["--baseline", then, "--prometheus", str(target), "--max-latency", "0.5", "--max-errors", "0.1"]
    assert main(["watch", same, *options]) == 0
    assert "words of answers" in capsys.readouterr().out
    told = dict(line.rsplit(" ", 1) for line in target.read_text().splitlines() if line[0] != "#")
    assert (told["mohawk_watch_answers"], told["mohawk_watch_alarm"]) == ("60", "0")
    assert float(told['mohawk_watch_chance{of="words of answers"}']) > 0.01
    assert 0.19 < float(told['mohawk_watch_latency_seconds{quantile="0.5"}']) < 0.21
    rows = lines(40, 2, words=30, latency=0.9, logprob=-30) + [{"error": "HTTP 500"}] * 10
    drifted = written(tmp_path / "drifted.jsonl", rows)
    assert main(["watch", drifted, *options]) == 3
    said = capsys.readouterr().err
    for alarm in ("words of answers: population stability", "confidence: pop", "latency: 0.", "errors: 20.0% of"):
        assert f"alarm: {drifted}: {alarm}" in said
    assert "which words" not in said  # the same words, only more of them
    assert "mohawk_watch_alarm 1\n" in target.read_text()
    assert main(["watch", drifted, "--baseline", then, "--last", "5"]) == 2  # failures alone
    assert "holds no answer, 5 failures" in capsys.readouterr().err


def test_the_answers_of_a_report_are_a_baseline(tmp_path, make_llama, tokenizer, capsys):
    run, model = tmp_path / "run", make_llama(0)
    model.save_pretrained(run / "student")
    tokenizer.save_pretrained(run / "student")
    (run / "recipe.yaml").write_text("teacher: there\n")
    answers = [{"prompt": "One", "response": " two three", "tokens": 10, "logprob": -3.0}] * 10
    write_json(run / "results.json", made_results() | {"behaviour": {"written": {"tokens": 10, "answers": answers}}})
    # as the report's, but that nobody cut them at 10 tokens, which are bytes here
    longer = [answer | {"response": " two three four"} for answer in answers]
    path = written(tmp_path / "log.jsonl", longer)
    assert main(["watch", path, "--baseline", str(run), "--teacher", str(run / "student")]) == 0
    said = capsys.readouterr().out
    assert "answers were cut at 10 tokens" in said and "perplexity to the teacher" in said
    ids = [tokenizer(text)["input_ids"] for text in ("One", " two three")]
    figure = f"{2.718281828459045 ** (-sequence_logprob(model, *ids) / 10):,.2f}"
    assert said.count(figure) == 2  # then and now
    path = written(tmp_path / "other.jsonl", [answer | {"response": "!!!!!"} for answer in answers])
    assert main(["watch", path, "--baseline", str(run)]) == 3
    said = capsys.readouterr().err
    assert "tokens of answers: population" in said and "which tokens: population" in said
    write_json(run / "results.json", made_results())
    assert main(["watch", path, "--baseline", str(run)]) == 2
    assert "report holds no answers" in capsys.readouterr().err


def test_what_is_no_log(tmp_path, capsys):
    good = json.dumps({"response": "yes", "latency": 1, "logprobs": [-1.0, -2.0]})
    path = tmp_path / "log.jsonl"
    path.write_text(f'{good}\n[1]\n{{"response": 1}}\n{{"response": "x", "latency": -1}}\n\n{good}\n{good[:20]}')
    found = read_log(path)
    assert (len(found.answers), found.unreadable) == (2, 3) and found.first.startswith(f"{path}:2: got a JSON list")
    assert found.answers[0].confidence == pytest.approx(0.22313016)  # exp(-3 / 2)
    assert main(["watch", str(path)]) == 0
    assert "3 lines are no answers" in capsys.readouterr().out
    path.write_text(f"{good}\n{good}")  # a log's last line may have no end; one that is cut is left out
    assert len(read_log(path).answers) == 2
    path.write_text(f"{good}\n{good[:-1]}")
    assert (len(read_log(path).answers), read_log(path).unreadable) == (1, 0)
    assert len(read_log(path, last=1).answers) == 1
    long = "1" + "0" * 400  # JSON's whole numbers have no end, and sums of finite ones may have none either
    path.write_text(
        f'{good}\n{{"response": "x", "latency": {long}}}\n{{"response": "x", "logprobs": [-1e308, -1e308]}}\n'
    )
    assert (read_log(path).unreadable, read_log(path).first) == (2, f"{path}:2: `latency` is no number of at least 0")
    path.write_text('{"response": 1}\n')
    for line, words in (
        ([], "no text in `response`, and no `error`"),
        (["--teacher", "x"], "--teacher needs --baseline"),
        (["--baseline", str(tmp_path)], "is not a run's folder"),
    ):
        path.write_text('{"response": 1}\n' if not line else good + "\n")
        assert main(["watch", str(path), *line]) == 2
        assert words in capsys.readouterr().err
    assert main(["watch", str(path), "--max-latency", "2"]) == 0
    assert main(["watch", str(path), "--max-latency", "0.5"]) == 3
    assert main(["watch", str(tmp_path / "none")]) == 2
