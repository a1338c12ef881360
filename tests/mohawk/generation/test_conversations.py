"""A teacher goes through conversations: each user's turn in sequence, locally and behind an endpoint; stopped and gone
on with."""

import json

import pytest

from mohawk.cli import main
from mohawk.data.generated import RESPONSES
from mohawk.data.pair_tokens import read_pairs
from mohawk.data.records import read_prompts
from mohawk.data.source_files import Source
from mohawk.errors import UserError
from mohawk.generation.decoding import Decoding, LocalTeacher, Response
from mohawk.generation.endpoint import EndpointTeacher
from mohawk.generation.generate_data import generate_data
from tests.helpers.chat_templates import tokenizer_with
from tests.helpers.tiny_endpoint import Server, error
from tests.models.conftest import tiny_teacher

TALKS = [
    {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "a"},
                  {"role": "assistant", "content": "theirs"}, {"role": "user", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "c"}]},
    {"messages": [{"role": "user", "content": x} for x in ("d", "e", "f")]},
]  # fmt: skip


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    return read_prompts([Source(str(path), field="messages")])


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def rows(folder):
    return [json.loads(line) for line in (folder / RESPONSES).read_text().splitlines()]


def contents(row):
    return [message["content"] for message in row["messages"]]


@pytest.fixture(scope="module")
def local():
    tokenizer = tokenizer_with("qwen")
    model = tiny_teacher(vocab_size=len(tokenizer), num_hidden_layers=2).eval()
    model.generation_config.eos_token_id = list(range(0, 256, 3))

    def made(**options):
        decoding = Decoding(method="sample", samples=2, max_new_tokens=4)
        return LocalTeacher(model, tokenizer, decoding, chat=True, turns="all", name="tiny", **options)

    return made


def test_a_local_teacher_answers_each_turn_with_its_own_answers_before(local, prompts, tmp_path):
    teacher = local(batch_size=4)
    generate_data(prompts, teacher, tmp_path / "out")
    found = rows(tmp_path / "out")
    assert [row["prompt_id"] for row in found] == [p.id for p in prompts for _ in range(2)]
    for row, prompt in zip(found, [p for p in prompts for _ in range(2)], strict=True):
        said = [m["content"] for m in prompt.content if m["role"] != "assistant"]
        here = [m["content"] for m in row["messages"] if m["role"] != "assistant"]
        assert here == said[: len(here)]
        assert row["messages"][-1]["role"] == "user" and "theirs" not in contents(row)
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"] + [row["response"]]
        assert row["logprob"] < 0 and row["tokens"] >= len(answers)
        assert row["finish_reason"] == "length" or len(answers) == sum(m["role"] == "user" for m in prompt.content)
    # other batches change nothing; a run that was stopped amid a line goes on to the same files
    generate_data(prompts, local(batch_size=1), tmp_path / "alone")
    alone = rows(tmp_path / "alone")
    assert [(r["messages"], r["response"]) for r in alone] == [(r["messages"], r["response"]) for r in found]
    whole = (tmp_path / "out" / RESPONSES).read_bytes()
    (tmp_path / "out" / RESPONSES).write_bytes(whole[: len(whole) // 2])
    generate_data(prompts, local(batch_size=4), tmp_path / "out")
    assert (tmp_path / "out" / RESPONSES).read_bytes() == whole
    with pytest.raises(UserError, match="made with other settings .*turns: 'all' then, None now"):
        teacher.turns = "last"
        generate_data(prompts, teacher, tmp_path / "out")


def test_what_an_endpoint_says_is_trained_on(server, tmp_path, capsys, prompts):
    """All its answers, those in the middle too; a cut one ends a conversation, one that never came is left out."""
    server.script = lambda body, times: (
        (400, {}, error("too long")) if body["messages"][-1]["content"] == "f" else answer(body)
    )

    def answer(body):
        said = f"<{body['messages'][-1]['content']}|{len(body['messages'])}>"
        reason = "length" if "e" in said else "stop"
        return {"choices": [{"message": {"content": said}, "finish_reason": reason}], "usage": {"completion_tokens": 3}}

    command = ["generate-data", str(tmp_path / "talks.jsonl"), "--field", "messages", "--model", "big", "--chat"]
    command += ["--endpoint", server.url, "--output", str(tmp_path / "out"), "--turns", "all"]
    assert main(command) == 0
    first, second, third = rows(tmp_path / "out")
    assert contents(first) == ["S", "a", "<a|2>", "b"] and first["response"] == "<b|4>" and first["tokens"] == 6
    assert contents(second) == ["c"] and second["response"] == "<c|1>"
    assert contents(third) == ["d", "<d|1>", "e"] and third["finish_reason"] == "length"
    tokenizer = tokenizer_with("qwen")
    pairs = read_pairs([tmp_path / "out" / RESPONSES], tokenizer, cache=tmp_path / "cache")
    taught = [tokenizer.decode(pairs.tokens[a:b][pairs.learn[a:b]].astype(int)) for a, b in pairs.spans]
    assert taught == ["<a|2><|im_end|><b|4><|im_end|>", "<c|1><|im_end|>", "<d|1><|im_end|><e|3>"]
    asked = len(server.seen)
    assert main(command) == 0 and len(server.seen) == asked  # nothing is asked again
    server.script = lambda body, times: (
        (400, {}, error("too long")) if len(body["messages"]) > 1 else Server.answer(body)
    )
    teacher = EndpointTeacher(server.url, "big", Decoding(), chat=True, turns="all")
    found = dict(teacher.responses(prompts))
    assert found[0][0].error and found[1][0].error is None  # not even its first turn; its only one
    assert found[2][0] == Response("d 0", 2, "stop", -0.75, messages=[{"role": "user", "content": "d"}])


def test_mistakes_are_one_line(tmp_path, capsys):
    tool = {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}
    for row, said in ((tool, "results of tools"), ({"messages": [{"role": "system", "content": "a"}]}, "no turn is a")):
        (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
        command = ["generate-data", str(tmp_path / "x.jsonl"), "--model", "m", "--endpoint", "http://localhost:1"]
        command += ["--output", str(tmp_path / "out"), "--turns", "all", "--field", "messages"]
        assert main(command) == 2 and "--turns all needs --chat" in capsys.readouterr().err
        assert main([*command, "--chat"]) == 2 and f"x.jsonl:1: {said}" in capsys.readouterr().err
    with pytest.raises(UserError, match="turns: all with beams"):
        LocalTeacher(tiny_teacher(), tokenizer_with("qwen"), Decoding(method="beam"), chat=True, turns="all")
