"""`mohawk compare`: two models, two addresses, and one of which fails."""

import json

import pytest

from mohawk.cli import main
from mohawk.core.json_files import read_json
from mohawk.evaluation.ab_test import summary
from mohawk.generation import endpoint as client
from tests.helpers.tiny_endpoint import Server, error


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\nfour\n")
    (tmp_path / "scoring_by_length.py").write_text("def score(prompt, response):\n    return len(response)\n")
    monkeypatch.chdir(tmp_path)
    return "prompts.txt"


def test_two_models(prompts, make_llama, tokenizer, tmp_path, capsys):
    for seed, name in enumerate("xy"):
        make_llama(seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    line = ["compare", "x", "y", prompts, "--max-new-tokens", "6", "--scorer", "scoring_by_length:score"]
    assert main([*line, "--output", "xy"]) == 0
    told = read_json(tmp_path / "xy" / "summary.json")
    assert told["agreement"]["equal"] == 0 and told["preference"]["wins"] + told["preference"]["losses"] > 0
    assert "A's win rate, ties half" in capsys.readouterr().out
    before = (tmp_path / "xy" / "pairs.jsonl").read_bytes()
    assert main([*line, "--output", "xy"]) == 0  # all is there
    assert (tmp_path / "xy" / "pairs.jsonl").read_bytes() == before
    assert main([*line[:2], "x", *line[3:], "--output", "xx"]) == 0
    told = read_json(tmp_path / "xx" / "summary.json")
    assert told["agreement"]["equal"] == 1 and told["preference"]["ties"] == 4
    assert (told["preference"]["rate"], told["preference"]["chance"]) == (0.5, 1)


def test_two_addresses_one_of_which_refuses_some(prompts, tmp_path, capsys):
    good, bad = Server(), Server()
    bad.script = lambda body, times: (400, {}, error("no")) if body["prompt"] == "two" else Server.answer(body)
    try:
        line = ["compare", good.url, bad.url, prompts, "--output", "o", "--scorer", "scoring_by_length:score"]
        assert main(line) == 2
        assert f"{good.url} is an address: --model-a NAME" in capsys.readouterr().err
        assert main([*line, "--model-a", "big", "--model-b", "small"]) == 0
        assert {body["model"] for _, _, body in good.seen} == {"big"}
        assert {body["model"] for _, _, body in bad.seen} == {"small"}
    finally:
        good.close()
        bad.close()
    told = read_json(tmp_path / "o" / "summary.json")
    assert (told["both"], told["side_b"]["failed"], told["agreement"]["equal"]) == (3, 1, 1)
    # what failed is lost to the other side, and in no mean
    assert (told["preference"]["wins"], told["preference"]["ties"], told["preference"]["difference"]) == (1, 3, 0)
    pairs = [json.loads(line) for line in (tmp_path / "o" / "pairs.jsonl").read_text().splitlines()]
    assert pairs[1]["b"] is None and "refused by the endpoint" in pairs[1]["error_b"]
    assert summary([{"prompt": "x", "a": None, "b": "y"}])["agreement"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["x", "y", "--model-a", "z"], "--model-a is of an address"),
        (["x", "y", "--timeout", "3"], "--timeout is of addresses"),
        (["http://a", "http://b", "--dtype", "float32"], "--dtype is of local models"),
        (["x", "y", "--scorer", "nowhere:score"], "scorer: cannot import nowhere"),
        (["x", "y", "--top-p", "0.5"], "--top-p needs --temperature"),
    ],
)
def test_mistakes_are_lines(prompts, options, words, capsys):
    assert main(["compare", *options[:2], prompts, *options[2:], "--output", "o"]) == 2
    assert words in capsys.readouterr().err
