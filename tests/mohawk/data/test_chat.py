"""What is learned of chats: compared with strings that are written out here, for templates as models have them."""

import json

import numpy as np
import pytest

from mohawk.data.aligned_rows import Examples, TokenAligner
from mohawk.data.chat import ends_of_turn, render
from mohawk.data.messages import canonical, chat_of
from mohawk.data.packing import collate
from mohawk.data.pair_tokens import read_pairs
from mohawk.data.pairs import PairsDataset, split_pairs
from mohawk.errors import UserError
from mohawk.losses.on_policy import OnPolicy
from tests.helpers.chat_templates import TEMPLATES, tokenizer_with
from tests.models.conftest import tiny_teacher

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Hi: <|im_end|>?"},
    {"role": "assistant", "content": "Hello,\n you."},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "Ünicode no more."},
]
# what stands behind the answers as they were written, of all templates but those that write past answers otherwise
ENDS = {
    "qwen": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "mistral_tools": "</s>", "zephyr": "</s>",
    "gemma": "<end_of_turn>", "phi3": "<|end|>", "deepseek": "<｜end▁of▁sentence｜>", "no_prompt": "<|im_end|>",
    "marked": "<|im_end|>", "qwen3": "<|im_end|>",
}  # fmt: skip
TOOL = {"name": "weather", "description": "of a city", "input_schema": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: tokenizer_with(name) for name in TEMPLATES}


@pytest.fixture
def read(tmp_path, tokenizers):
    def read(name, *rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_pairs([path], tokenizers[name], cache=tmp_path / "cache", **options)

    return read


def runs(tokenizer, tokens, learn) -> list[str]:
    """The texts of the stretches of tokens that are learned."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], learn, [False]]).astype(int)))
    return [tokenizer.decode(tokens[a:b].astype(int)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def learned(pairs, tokenizer) -> list[list[str]]:
    """Of each example, the texts that are learned."""
    return [runs(tokenizer, pairs.tokens[a:b], pairs.learn[a:b]) for a, b in pairs.spans]


def texts(pairs, tokenizer) -> list[str]:
    return [tokenizer.decode(pairs.tokens[a:b].astype(int)) for a, b in pairs.spans]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_ends_alone(name, read, tokenizers):
    """A user's own <|im_end|> ends nothing, and no header is learned."""
    tokenizer, end = tokenizers[name], ENDS[name]
    space = " " if name == "mistral_tools" else ""  # a part of the answer: [/INST] has none behind it
    answers = [space + turn["content"] + end for turn in TALK[1::2]]
    pairs = read(name, {"messages": [SYSTEM, *TALK]})
    found = learned(pairs, tokenizer)
    # Qwen3 asks for an answer without thoughts with empty ones, which it does not keep
    assert found == ([[one] for one in answers] if name == "qwen3" else [answers])
    assert all("Be brief." in text for text in texts(pairs, tokenizer))  # also where templates know no system prompt
    assert learned(read(name, {"messages": TALK}, turns="last"), tokenizer) == [answers[1:]]
    ended = read(name, {"messages": [*TALK, {"role": "user", "content": "And?"}]})
    assert [text for one in learned(ended, tokenizer) for text in one] == answers
    assert not any("And?" in text for text in texts(ended, tokenizer))
    # the whole text is what transformers makes of the chat, to the last answer's end
    folded = [{**TALK[0], "content": f"Be brief.\n\n{TALK[0]['content']}"}, *TALK[1:]]
    chat = folded if name in ("mistral", "mistral_tools", "gemma") else [SYSTEM, *TALK]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    text = texts(pairs, tokenizer)[-1]
    assert whole.startswith(text) or name == "qwen3" and text.endswith(answers[-1])


@pytest.mark.parametrize("name", TEMPLATES)
def test_thoughts_are_kept_and_learned(name, read, tokenizers):
    """In a field or in the text; behind the history as the model sees it then."""
    tokenizer, end = tokenizers[name], ENDS[name]
    thoughtful = [
        TALK[0],
        {"role": "assistant", "content": "Hello.", "reasoning_content": "He greets."},
        TALK[2],
        {"role": "assistant", "content": "<think>\nNothing.\n</think>\n\nNo."},
    ]
    pairs = read(name, {"messages": thoughtful})
    opens = "" if name == "deepseek" else " <think>\n" if name == "mistral_tools" else "<think>\n"
    answers = [f"{opens}He greets.\n</think>\n\nHello.{end}", f"{opens}Nothing.\n</think>\n\nNo.{end}"]
    assert learned(pairs, tokenizer) == [[one] for one in answers]
    first, second = texts(pairs, tokenizer)
    assert "He greets." in first and "He greets." not in second and "Hello." in second
    if name == "deepseek":
        assert second.endswith("<｜User｜>More?<｜Assistant｜><think>\n" + answers[1])
    assert pairs.chats[0] == pairs.chats[1]
    train, held = split_pairs(read(name, {"messages": thoughtful}, *({"messages": TALK[:2]},)), 0.5)
    assert not set(train.chats) & set(held.chats)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_thought_that_its_answer_repeats(name, read, tokenizers):
    row = {"messages": [TALK[0], {"role": "assistant", "content": "It is 4.", "reasoning": "4", "thinking": ""}]}
    opens = "" if name == "deepseek" else " <think>\n" if name == "mistral_tools" else "<think>\n"
    assert learned(read(name, row), tokenizers[name]) == [[f"{opens}4\n</think>\n\nIt is 4.{ENDS[name]}"]]


CALL = {"type": "tool_use", "id": "toolu_01A", "name": "weather", "input": {"city": "Bonn"}}
CLAUDE = {
    "system": [{"type": "text", "text": "Be brief."}],
    "tools": [TOOL],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "in Bonn?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, CALL]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_01A", "content": [{"type": "text", "text": "12 degrees"}]}
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Mild."}]},
        {"role": "user", "content": "Thanks."},
    ],
}


def openai(arguments):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {
        "tools": [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}],
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Weather in Bonn?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"},
            {"role": "assistant", "content": "Mild."},
        ],
    }


SHAREGPT = {
    "system": "Be brief.",
    "tools": json.dumps([TOOL]),
    "conversations": [
        {"from": "human", "value": "Weather in Bonn?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
        {"from": "observation", "value": "12 degrees"},
        {"from": "gpt", "value": "Mild."},
    ],
}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (CLAUDE, "I look.\n"),
        (openai('{"city": "Bonn"}'), ""),
        (openai({"city": "Bonn"}), ""),
        (SHAREGPT, ""),
    ],
)
def test_calls_of_tools_in_every_form(row, said, read, tokenizers):
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call><|im_end|>'
    pairs = read("qwen", row)
    assert learned(pairs, tokenizers["qwen"]) == [[said + call, "Mild.<|im_end|>"]]
    (text,) = texts(pairs, tokenizers["qwen"])
    assert "<|im_start|>system\nBe brief.\n\n# Tools" in text
    assert '{"type": "function", "function": {"name": "weather", "description": "of a city"' in text
    assert "<|im_start|>user\nWeather in Bonn?<|im_end|>" in text
    assert "<tool_response>\n12 degrees\n</tool_response>" in text and "Thanks" not in text


def test_calls_of_other_templates(read, tokenizers):
    """Mistral's wants short ids of calls and writes no text beside one; others have no place for calls at all."""
    (found,) = learned(read("mistral_tools", openai("{}")), tokenizers["mistral_tools"])
    assert found[0].startswith('[TOOL_CALLS] [{"name": "weather", "arguments": {}, "id": "') and found[0].endswith(
        '"}]</s>'
    )
    assert found[1] == " Mild.</s>"
    with pytest.raises(
        UserError, match="rows.jsonl:1: the chat template leaves out or changes the answer in message 1"
    ):
        read("mistral_tools", CLAUDE)
    for name in ("llama3", "zephyr", "marked"):
        with pytest.raises(UserError, match=r"rows.jsonl:1: the chat template leaves out the call of 'weather' in"):
            read(name, openai("{}"))
    with pytest.raises(UserError, match="rows.jsonl:1: the chat template leaves out the tool 'weather'; give one"):
        read("llama3", {"messages": TALK, "tools": [TOOL]})


@pytest.mark.parametrize("written", ["+ ARGUMENTS +", "}}{{ ARGUMENTS }}{{"])
def test_templates_that_want_arguments_as_text(written, tmp_path):
    """DeepSeek-V3's joins them with other text; a mapping that is only put in would be written as Python does."""
    tokenizer = tokenizer_with("qwen")
    written = written.replace("ARGUMENTS", "c.function.arguments")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + ' ' " + written + " '' }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    row = {"messages": openai({"city": "Bonn"})["messages"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    found = learned(read_pairs([tmp_path / "a.jsonl"], tokenizer, cache=tmp_path / "cache"), tokenizer)
    assert found == [['weather {"city": "Bonn"}<|im_end|>', "Mild.<|im_end|>"]]
    tokenizer.chat_template = tokenizer.chat_template.replace("c.function.arguments", "''")
    with pytest.raises(UserError, match="leaves out the argument 'city' of the call of 'weather' in message 2"):
        read_pairs([tmp_path / "a.jsonl"], tokenizer, cache=tmp_path / "cache")


def test_thoughts_in_the_field_that_a_template_knows(tmp_path):
    """As gpt-oss has them."""
    tokenizer = tokenizer_with("qwen")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.thinking %}[{{ m.thinking }}]{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {"messages": [TALK[0], {"role": "assistant", "content": "It is 4.", "reasoning_content": "4"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    found = learned(read_pairs([tmp_path / "a.jsonl"], tokenizer, cache=tmp_path / "cache"), tokenizer)
    assert found == [["[4]It is 4.<|im_end|>"]]


@pytest.mark.parametrize(
    ("student", "teacher"), [("qwen", "qwen3"), ("qwen3", "qwen"), ("deepseek", "qwen3"), ("qwen3", "deepseek")]
)
@pytest.mark.parametrize("turns", ["all", "last"])
def test_answers_of_two_templates_meet(student, teacher, turns, read, tokenizers):
    """Though one makes several texts of a chat of which the other makes one: each answer whole, beside its own."""
    thoughtful = [TALK[0], {"role": "assistant", "content": "Hello.", "reasoning_content": "He greets."}, *TALK[2:]]
    rows = [{"messages": talk} for talk in (TALK, thoughtful, [*TALK, *thoughtful])]
    ours, theirs = (read(name, *rows, turns=turns) for name in (student, teacher))
    cut = [tokenizers[name] for name in (student, teacher)]
    aligner = TokenAligner(*cut, examples=[Examples(ours, theirs, 400)])
    dataset = PairsDataset(ours, 400)
    asked = met = 0
    for row in (dataset[i] for i in range(len(dataset))):
        ids, texts, spans = aligner.row(*(row[name].numpy() for name in ("input_ids", "labels", "segment_ids")))
        asked += int((row["labels"] != -100).sum())
        met += sum(b - a for a, b, _, _ in spans)
        for a, b, c, d in spans:
            here, there = cut[0].decode(row["input_ids"][a:b]), cut[1].decode(ids[c:d])
            assert here == there or here in ENDS.values() and there in ENDS.values()
            assert len(set(texts[c:d])) == 1
    opened = 8 * (student == "qwen3" and teacher == "deepseek" and turns == "all")  # "<think>\n", which is asked for
    assert met == asked - 2 * opened


def test_packed_rows_hold_the_same(read, tokenizers):
    """Of several chats in one row, of one that is cut on the left, and with answers that do not count."""
    tokenizer = tokenizers["qwen"]
    unlearned = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in TALK[:2]]
    pairs = read(
        "qwen", {"messages": [*unlearned, *TALK[2:]]}, CLAUDE, {"conversations": SHAREGPT["conversations"][:1]}
    )
    assert len(pairs) == 2  # the last has no answer
    expected = sorted(text for one in learned(pairs, tokenizer) for text in one)
    assert len(expected) == 3 and not any("Hello" in text for text in expected)
    row = PairsDataset(pairs, 2048)[0]
    labels = row["labels"].numpy()
    assert (labels[labels != -100] == row["input_ids"].numpy()[labels != -100]).all()
    assert sorted(runs(tokenizer, row["input_ids"].numpy(), labels != -100)) == expected
    assert int(row["segment_ids"].max()) == 1
    short = PairsDataset(read("qwen", {"messages": TALK}), 43)
    ids, labels = short[0]["input_ids"].numpy(), short[0]["labels"].numpy()
    assert short.truncated == 1 and runs(tokenizer, ids, labels != -100) == ["Ünicode no more.<|im_end|>"]


def test_parquet_is_read_where_it_lies(tmp_path, tokenizers, monkeypatch):
    """A column of messages, in which Arrow puts None where one has not what another has; no copy is made of it."""
    import pyarrow
    import pyarrow.parquet

    called = openai('{"city": "Bonn"}')["messages"]
    table = pyarrow.table({"messages": [TALK, called, TALK[:1]], "image": [b"\xff", None, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    monkeypatch.setattr("mohawk.data.source_files.load_rows", None)
    monkeypatch.setattr("mohawk.data.records.load_rows", None)
    pairs = read_pairs([tmp_path / "a.parquet"], tokenizers["qwen"], cache=tmp_path / "cache")
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call><|im_end|>'
    answers = [turn["content"] + "<|im_end|>" for turn in TALK[1::2]]
    assert learned(pairs, tokenizers["qwen"]) == [answers, [call, "Mild.<|im_end|>"]]


def test_samples_begin_where_each_answer_does(read, tokenizers):
    """On-policy: behind the header of every answer of a chat, with all that was said before; ended as a turn is."""
    tokenizer = tokenizers["qwen"]
    assert ends_of_turn(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert ends_of_turn(tokenizers["phi3"]) == tokenizers["phi3"].convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    batch = collate([PairsDataset(read("qwen", {"messages": TALK}, CLAUDE), 1400)[0]])
    student = tiny_teacher(vocab_size=len(tokenizer), num_hidden_layers=2).eval()
    on_policy = OnPolicy(student, tokenizer, share=1, max_new_tokens=3, eos_token_id=ends_of_turn(tokenizer))
    made = on_policy(batch, 0)
    segments, labels = made["segment_ids"][0].numpy(), made["labels"][0].numpy()
    starts = []
    for segment in range(segments.max() + 1):
        here = np.flatnonzero(segments == segment)
        first = here[np.flatnonzero(labels[here] != -100)[0]]
        starts.append(tokenizer.decode(made["input_ids"][0, here[0] : first]))
        assert (labels[first : here[-1] + 1] != -100).all() and here[-1] - first < 3
    assert len(starts) >= 2 and all(text.endswith("<|im_start|>assistant\n") for text in starts)
    (whole,) = (text for text in texts(read("qwen", {"messages": TALK}), tokenizer))
    assert sum(whole.startswith(text) for text in starts) <= 2


def test_templates_that_cannot_be_told(tokenizers, tmp_path):
    tokenizer = tokenizer_with("qwen")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n")

    def refused(template):
        tokenizer.chat_template = template
        with pytest.raises(UserError) as error:
            read_pairs([path], tokenizer, cache=tmp_path / "cache")
        return str(error.value)

    header = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    ask = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    assert "does not write question and answer once each" in refused(header + "{% endfor %}" + ask)
    other = ask.replace("assistant\n", "assistant says: ")
    assert "asks for an answer with ' says: '" in refused(header + "{{ m.content }}<|im_end|>\n{% endfor %}" + other)
    said = refused(header + "{{ m.content[:13] }}<|im_end|>\n{% endfor %}" + ask)
    assert said == f"{path}:1: the chat template leaves out or changes the answer in message 3"
    said = refused(header + "{{ m.content if m.content != 'More?' else '' }}<|im_end|>\n{% endfor %}" + ask)
    assert said.startswith(f"{path}:1: the chat template leaves out message 2 (user: 'More?')")


def test_messages_of_one_form():
    assert canonical([{"role": "user", "content": "x", "name": "Ann"}]) == [
        {"role": "user", "content": "x", "name": "Ann"}
    ]
    assert canonical([{"sender": "human", "text": "x", "uuid": 3}]) == [{"role": "user", "content": "x"}]
    roles = {"User": "user", "Assistant": "assistant", "AI": "assistant", "critic": "critic"}
    assert [canonical([{"role": one, "content": "x"}])[0]["role"] for one in roles] == list(roles.values())
    thought = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "redacted_thinking", "data": "z"}]
    assert canonical(
        [{"role": "assistant", "content": [*thought, {"type": "text", "text": "x"}], "tool_calls": None}]
    ) == [{"role": "assistant", "content": "x", "reasoning_content": "hm"}]
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    assert canonical([old])[0]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert chat_of({"prompt": "x", "messages": None}) is None
    numbered = [{"role": "tool", "content": "x", "tool_call_id": 1}]
    assert canonical(numbered) == numbered


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": {}}, "field 'messages' is no chat: got dict"),
        ({"messages": [{"role": "user"}]}, "message 0 (user) has no text in `content`"),
        ({"messages": [{"role": " ", "content": "x"}]}, "message 0 is no object with a role"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "message 0 is from 'narrator'; allowed: system, dev"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "part 0 is of type 'image'; allowed: text",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "part 0 (text) has no text"),
        (
            {"messages": [{"role": "assistant", "content": [CALL, {"type": "text", "text": "x"}]}]},
            "part 1 is a text behind a call",
        ),
        ({"messages": [{"role": "user", "content": [{"type": ["x"]}]}]}, "part 0 has list for its type, not text"),
        ({"messages": openai("{")["messages"]}, "message 2 (assistant) calls weather with arguments that are no JSON"),
        ({"messages": openai("[1]")["messages"]}, "calls weather with [1], not an object of arguments"),
        ({"messages": TALK, "tools": "{"}, "field 'tools' is no JSON"),
        ({"messages": TALK, "tools": [{"type": "function"}]}, "field 'tools': tool 0 has no name"),
        (
            {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "a"}]}]},
            "message 0 (user): part 0 has list for its type, not text",
        ),
        (
            {"messages": [{"role": "tool", "content": "4", "tool_call_id": [1]}]},
            "message 0 (tool) has list for its tool_call_id, not text or a number",
        ),
        ({"messages": [SYSTEM, *TALK], "system": "Other."}, "a system prompt in field 'system' and another one in"),
    ],
)
def test_what_is_no_chat(row, message):
    with pytest.raises(ValueError) as error:
        chat_of(row)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["qwen", "qwen3", "llama3", "deepseek"])
def test_a_call_that_is_left_out_is_missed_though_the_answer_has_its_name(name, read, tokenizers):
    called = {"role": "assistant", "content": "I ask weather.", "tool_calls": [{"name": "weather", "arguments": {}}]}
    row = {"messages": [TALK[0], called]}
    if name == "qwen":
        assert '{"name": "weather", "arguments": {}}' in learned(read(name, row), tokenizers[name])[0][0]
        return
    with pytest.raises(UserError, match="leaves out the call of 'weather' in message 1"):
        read(name, row)


def test_a_template_that_fails_without_a_word():
    tokenizer = tokenizer_with("qwen")
    for template, said in (("{{ raise_exception('') }}", "TemplateError"), ("{{ 1 / 0 }}", "division by zero")):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=f"row 3: the chat template refuses these messages: {said}"):
            render(tokenizer, TALK, "row 3")
