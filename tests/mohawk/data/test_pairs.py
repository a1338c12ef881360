import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mohawk.data.packing import collate
from mohawk.data.pair_tokens import check_pair
from mohawk.data.pairs import Pairs, PairsDataset, read_pairs, response_weights, split_pairs
from mohawk.errors import UserError

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# drops what earlier answers thought, as Qwen3's does
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'].split('#')[-1] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# lets the answer begin inside what it will not repeat, as R1's does
OPENING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


@pytest.fixture
def read(tmp_path, tokenizer):
    def read(*rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_pairs([path], tokenizer, cache=tmp_path / "cache", **options)

    return read


def made(sizes, prompts=None, answers=None, teachers=None, prompt_share=0.5, **known) -> Pairs:
    """Pairs of given token counts whose tokens are all different: 0, 1, 2, ..."""
    sizes = np.array(sizes, dtype=np.int64)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    responses = starts + np.minimum((sizes * prompt_share).astype(np.int64), sizes - 1)
    learn = np.zeros(int(ends[-1]), dtype=bool)
    for a, b in zip(responses, ends, strict=True):
        learn[a:b] = True
    n = len(sizes)
    return Pairs(
        tokens=np.arange(ends[-1], dtype=np.uint32), learn=learn,
        spans=np.stack([starts, ends], 1), responses=responses,
        prompts=np.array(range(n) if prompts is None else prompts, dtype=np.uint64),
        answers=np.array(range(n) if answers is None else answers, dtype=np.uint64),
        logprobs=np.array(known.get("logprobs", [np.nan] * n), dtype=float),
        sampling_logprobs=np.array(known.get("sampling", [np.nan] * n), dtype=float),
        lengths=np.array(known.get("lengths", ends - responses), dtype=np.int64),
        teachers=None if teachers is None else np.array(teachers, dtype=np.int64),
        unknown=known.get("unknown", {}), bos_token_id=None,
    )  # fmt: skip


def text_and_learned(pairs, tokenizer, i=0):
    first, last = pairs.spans[i]
    ids = pairs.tokens[first:last].astype(int)
    return tokenizer.decode(ids), tokenizer.decode(ids[pairs.learn[first:last]])


def test_prompt_response_and_end(read, tokenizer):
    pairs = read(
        {"prompt": "Say it:", "response": " yes", "finish_reason": "stop"},
        {"prompt": "Say it:", "response": " and so on", "finish_reason": "length"},
        {"prompt": "", "response": "alone"},
    )
    assert text_and_learned(pairs, tokenizer, 0) == ("Say it: yes<eos>", " yes<eos>")
    assert text_and_learned(pairs, tokenizer, 1) == ("Say it: and so on", " and so on")
    assert text_and_learned(pairs, tokenizer, 2) == ("alone<eos>", "alone<eos>")
    assert pairs.prompts[0] == pairs.prompts[1] != pairs.prompts[2]
    named = read({"q": "a", "a": "b"}, prompt_field="q", response_field="a")
    assert text_and_learned(named, tokenizer) == ("ab<eos>", "b<eos>")


def test_the_prompts_tokens_are_those_it_is_answered_with(tmp_path):
    """ "ab" + "c" would be one token together: the model that answers "ab" has not seen that one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "</s>": 5}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "ab", "response": "c"}\n{"prompt": "ab", "response": "ab"}\n')
    pairs = read_pairs([path], tokenizer, cache=tmp_path / "cache")
    assert [pairs.tokens[a:b].tolist() for a, b in pairs.spans] == [[3, 2, 5], [3, 3, 5]]
    assert (pairs.responses - pairs.spans[:, 0]).tolist() == [1, 1]


def test_tokenizers_that_add_bos_and_eos(tmp_path, read):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, "</s>": 1, "x": 2, "y": 3}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="x"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x x x", "response": " y"}\n')
    pairs = read_pairs([path], tokenizer, cache=tmp_path / "cache")
    assert pairs.tokens.tolist() == [0, 2, 2, 2, 3, 1] and pairs.learn.tolist() == [False] * 4 + [True] * 2
    row = PairsDataset(pairs, 4)[0]
    assert row["input_ids"].tolist() == [0, 2, 3, 1]  # the BOS stays when the prompt's left is cut


def test_chats_learn_each_answer(read, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    user = [{"role": "user", "content": "hi"}]
    talk = [*user, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "more"}]
    pairs = read(
        {"messages": [*talk, {"role": "assistant", "content": "no"}]},
        {"messages": user, "response": "hey"},
        {"messages": user, "response": "he", "finish_reason": "length"},
        {"prompt": "hi", "response": "hey"},
        chat=True,
    )
    assert text_and_learned(pairs, tokenizer, 0) == (
        "<|user|>hi<end>\n<|assistant|>yo<end>\n<|user|>more<end>\n<|assistant|>no<end>\n",
        "yo<end>\nno<end>\n",
    )
    answered = ("<|user|>hi<end>\n<|assistant|>hey<end>\n", "hey<end>\n")
    assert text_and_learned(pairs, tokenizer, 1) == text_and_learned(pairs, tokenizer, 3) == answered
    assert text_and_learned(pairs, tokenizer, 2) == ("<|user|>hi<end>\n<|assistant|>he", "he")
    assert pairs.prompts[1] == pairs.prompts[2] == pairs.prompts[3] != pairs.prompts[0]


def test_templates_that_write_turns_otherwise(read, tokenizer, monkeypatch):
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hm#yo"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "hm#no"},
    ]
    monkeypatch.setattr(tokenizer, "chat_template", FORGETFUL)
    pairs = read({"messages": talk})  # each answer behind what the model sees then
    assert text_and_learned(pairs, tokenizer, 0) == ("<|user|>hi<end>\n<|assistant|>hm#yo<end>\n", "hm#yo<end>\n")
    assert text_and_learned(pairs, tokenizer, 1) == (
        "<|user|>hi<end>\n<|assistant|>yo<end>\n<|user|>more<end>\n<|assistant|>hm#no<end>\n",
        "hm#no<end>\n",
    )
    assert pairs.chats[0] == pairs.chats[1] == pairs.prompts[1] != pairs.prompts[0]
    monkeypatch.setattr(tokenizer, "chat_template", OPENING)
    generated = {"messages": talk[:1], "response": "hm</think>yo", "finish_reason": "stop"}
    pairs = read({"messages": talk[:2]}, generated)
    assert text_and_learned(pairs, tokenizer, 0) == ("<|user|>hi<end>\n<|assistant|>hm#yo<end>\n", "hm#yo<end>\n")
    assert text_and_learned(pairs, tokenizer, 1) == (
        "<|user|>hi<end>\n<|assistant|><think>hm</think>yo<end>\n",
        "hm</think>yo<end>\n",
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response": "x"}, "has no text in 'prompt' and no chat in 'messages'; its fields: response"),
        ({"prompt": "x"}, "has no text in 'response' and no chat in 'messages'; its fields: prompt"),
        ({"prompt": "x", "response": 3}, "field 'response' holds int, not text"),
        ({"messages": [{"role": "user"}]}, "field 'messages' is no chat: message 0 (user) has no text in `content`"),
        (
            {"messages": [{"role": "user", "content": "x"}], "response": "y"},
            "a chat, but this tokenizer has no chat template; use one of an instruction-tuned model",
        ),
    ],
)
def test_a_bad_line_is_named(read, tmp_path, row, message):
    with pytest.raises(UserError) as error:
        read({"prompt": "a", "response": "b"}, row)
    assert str(error.value) == f"{tmp_path}/rows.jsonl:2: {message}"


def test_chats_without_an_answer_are_left_out(read, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    unasked = {"messages": [{"role": "assistant", "content": "x"}]}
    unanswered = {"messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(UserError, match="data: 1 of 1 chats in .* have no answer to learn, the first: .*jsonl:1; "):
        read(unasked)
    with caplog.at_level("WARNING", "mohawk.data.pair_tokens"):
        assert len(read(unanswered, {**unanswered, "response": "y"}, unasked)) == 1
    assert "2 of 3 chats in" in caplog.text and "rows.jsonl:1; they are left out" in caplog.text


def test_teachers(read, tmp_path):
    rows = [{"prompt": "a", "response": "b", "teacher": t} for t in ("small", "big", 1)]
    assert read(*rows, teacher_field="teacher", teachers=["small", "big"]).teachers.tolist() == [0, 1, 1]
    for wrong in ("huge", 2, None, True):
        with pytest.raises(UserError) as error:
            read({**rows[0], "teacher": wrong}, teacher_field="teacher", teachers=["small", "big"])
        expected = f"{tmp_path}/rows.jsonl:1: field 'teacher' is {wrong!r}; allowed: small, big, or 0 to 1"
        assert str(error.value) == expected


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 20), min_size=1, max_size=30),
    n=st.integers(4, 24),
    seed=st.integers(0, 3),
    teachers=st.integers(0, 3),
    too_long=st.sampled_from(["truncate", "drop"]),
)
def test_every_example_is_whole_in_one_row_of_each_epoch(sizes, n, seed, teachers, too_long):
    who = [i % teachers for i in range(len(sizes))] if teachers else None
    pairs = made(sizes, teachers=who)
    kept = [i for i, size in enumerate(sizes) if size <= n or (too_long == "truncate" and size - size // 2 < n)]
    if not kept:
        with pytest.raises(UserError, match="examples fits into"):
            PairsDataset(pairs, n, too_long=too_long)
        return
    dataset = PairsDataset(pairs, n, too_long=too_long, seed=seed)
    assert dataset.dropped == len(sizes) - len(kept)
    assert dataset.truncated == sum(sizes[i] > n for i in kept)
    dataset = PairsDataset(pairs, n, too_long=too_long, seed=seed, tokens=2 * n * dataset.rows_per_epoch)
    for epoch in range(2):
        seen = []
        for r in range(dataset.rows_per_epoch):
            row = dataset[epoch * dataset.rows_per_epoch + r]
            segments = row["segment_ids"]
            assert set(row) == {"input_ids", "position_ids", "segment_ids", "labels", "weights"} | (
                {"teacher"} if teachers else set()
            )
            for segment in range(int(segments.max()) + 1):
                here = segments == segment
                ids = row["input_ids"][here].tolist()
                example = int(np.searchsorted(pairs.spans[:, 1], ids[0], side="right"))
                first, last = pairs.spans[example].tolist()
                assert ids == list(range(max(first, last - n), last))
                expected = [t if pairs.learn[t] and t != ids[0] else -100 for t in ids]
                assert row["labels"][here].tolist() == expected
                assert row["position_ids"][here].tolist() == list(range(len(ids)))
                assert row["weights"][here].tolist() == [1.0] * len(ids)
                assert not teachers or row["teacher"] == who[example]
                seen.append(example)
            padding = segments == -1
            assert not row["weights"][padding].any() and (row["labels"][padding] == -100).all()
            assert padding.tolist() == sorted(padding.tolist())
        assert sorted(seen) == kept


def test_rows_are_filled_and_the_seed_decides(tmp_path):
    rng = np.random.default_rng(0)
    pairs = made(rng.integers(5, 60, 400))
    dataset = PairsDataset(pairs, 128, seed=1)
    filled = sum((row["segment_ids"] >= 0).sum().item() for row in dataset)
    assert filled / (len(dataset) * 128) > 0.99

    def rows(seed, **options):
        return [row["input_ids"].tolist() for row in PairsDataset(pairs, 128, seed=seed, **options)]

    assert rows(1) == rows(1) != rows(2)
    twice = rows(1, tokens=2 * 128 * len(dataset))
    assert twice[: len(dataset)] == rows(1) != twice[len(dataset) :]
    assert len(rows(1, tokens=300)) == 3
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[3]["input_ids"], dataset[3]["input_ids"])
    batch = collate([dataset[i] for i in range(4)])
    assert batch["weights"].dtype == torch.float32 and batch["labels"].shape == (4, 128)


def test_weights_by_hand():
    pairs = made(
        [4] * 6, prompts=[7, 7, 7, 7, 9, 9], answers=[1, 2, 1, 3, 1, 2],
        logprobs=np.log([0.5, 0.2, 0.5, 0.1, 0.3, 0.1]), sampling=np.log([0.8, 0.1, 0.8, 0.1, 0.5, 0.5]),
        lengths=[2, 1, 2, 1, 2, 1],
    )  # fmt: skip
    assert response_weights(pairs, None).tolist() == [1] * 6
    assert response_weights(pairs, "uniform").tolist() == [0.25] * 4 + [0.5] * 2
    assert response_weights(pairs, "counts").tolist() == [0.5, 0.25, 0, 0.25, 0.5, 0.5]
    assert response_weights(pairs, "probability") == pytest.approx([0.5 / 0.8, 0.2 / 0.8, 0, 0.1 / 0.8, 0.75, 0.25])
    root = np.sqrt([0.5, 0.04, 0.01, 0.3, 0.01])
    expected = [*(root[:2] / root[:3].sum()), 0, root[2] / root[:3].sum(), *(root[3:] / root[3:].sum())]
    assert response_weights(pairs, "probability", length_normalized=True) == pytest.approx(expected)
    ratio = np.array([0.5 / 0.8, 2, 0.5 / 0.8, 1, 0.6, 0.2])
    expected = np.concatenate([ratio[:4] / ratio[:4].sum(), ratio[4:] / ratio[4:].sum()])
    assert response_weights(pairs, "importance") == pytest.approx(expected)
    # log-probabilities of long texts are far below what exp can hold
    far = made([4, 4], prompts=[1, 1], logprobs=[-5000.0, -5001.0])
    assert response_weights(far, "probability") == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.e)])


@pytest.mark.parametrize(
    ("weighting", "temperature", "close"),
    [
        ("uniform", 1.0, True),
        ("counts", 1.0, True),
        ("probability", 1.0, False),
        ("uniform", 2.0, False),
        ("importance", 2.0, True),
    ],
)
def test_which_weights_give_the_teachers_expectation(weighting, temperature, close):
    """The weighted mean over samples of some function of a response, against its mean under the teacher."""
    rng = np.random.default_rng(0)
    p = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    values = np.array([0.0, 1.0, 5.0, -3.0, 8.0, 20.0])
    s = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    n, groups = 64, 400
    drawn = rng.choice(6, size=n * groups, p=s)
    pairs = made(
        [3] * (n * groups), prompts=np.repeat(np.arange(groups), n), answers=drawn, logprobs=np.log(p)[drawn],
        sampling=np.log(s)[drawn],
    )  # fmt: skip
    weights = response_weights(pairs, weighting)
    assert np.bincount(pairs.prompts.astype(int), weights=weights) == pytest.approx(np.ones(groups))
    each = np.bincount(pairs.prompts.astype(int), weights=weights * values[drawn])
    error = abs(each.mean() - p @ values) / (each.std() / np.sqrt(groups) + 1e-12)
    if weighting == "probability":
        # every response turned up among 64: the list is whole, and its weights are the teacher's
        full = np.array([len(set(drawn[g * n : (g + 1) * n])) == 6 for g in range(groups)])
        assert each[full] == pytest.approx(np.full(full.sum(), p @ values))
        few = np.array([len(set(drawn[g * n : (g + 1) * n])) < 6 for g in range(groups)])
        assert few.any() and abs(each[few].mean() - p @ values) > 0.1
    else:
        assert (error < 4) == close


def test_prompts_count_once_and_the_mean_is_one(read):
    rows = [{"prompt": "one", "response": "aa"}, {"prompt": "two", "response": "bb"}]
    rows += [{"prompt": "two", "response": r} for r in ("bb", "cc", "dd")]
    dataset = PairsDataset(read(*rows), 32, weighting="uniform")
    batch = collate(list(dataset))
    learned = batch["labels"] != -100
    weights = batch["weights"][learned]
    assert weights.mean().item() == pytest.approx(1.0)
    # each prompt has 2 + 1 tokens a response: one of weight 4w, four of weight w
    assert sorted({round(w, 5) for w in weights.tolist()}) == pytest.approx([0.625, 2.5])
    counted = collate(list(PairsDataset(read(*rows), 32, weighting="counts")))
    learned = counted["labels"] != -100
    assert learned.sum() == 4 * 3 and counted["weights"][learned].mean().item() == pytest.approx(1.0)
    assert len({round(w, 5) for w in counted["weights"][learned].tolist()}) == 3


def test_unknown_logprobs_are_named(read, tmp_path):
    pairs = read({"prompt": "a", "response": "b", "logprob": -1.0}, {"prompt": "a", "response": "c"})
    for weighting, name, line in (("probability", "logprob", 2), ("importance", "logprob", 2)):
        with pytest.raises(UserError) as error:
            PairsDataset(pairs, 16, weighting=weighting)
        assert str(error.value).startswith(
            f"{tmp_path}/rows.jsonl:{line}: has no {name}, which weighting {weighting!r} needs"
        )
    pairs = read({"prompt": "a", "response": "b", "logprob": -1.0})
    with pytest.raises(UserError, match="rows.jsonl:1: has no sampling_logprob"):
        PairsDataset(pairs, 16, weighting="importance")
    assert len(PairsDataset(pairs, 16, weighting="probability")) == 1


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 10**400, True, "1"])
def test_what_is_no_finite_number_is_named_by_its_line(odd, read, tokenizer):
    """Python writes NaN and infinity into JSON, and reads whole numbers of any size."""
    fields = {"prompt_field": "prompt", "response_field": "response", "messages_field": "messages", "chat": False}
    fields["turns"] = "all"
    fields |= {"teacher_field": None, "teachers": (), "weight_field": None, "weighting": "importance"}
    first, second = ({"prompt": "a", "response": r, "logprob": -1.0, "sampling_logprob": -1.0} for r in "bc")
    for name in ("logprob", "sampling_logprob"):
        said = f":2: has no {name}, which weighting 'importance' needs as a finite number; use uniform or counts$"
        with pytest.raises(UserError, match=said):
            PairsDataset(read(first, {**second, name: odd}), 16, weighting="importance")
        with pytest.raises(UserError, match=said):
            check_pair(tokenizer, "rows:2", {**second, name: odd}, **fields)
    with pytest.raises(UserError, match=r"rows.jsonl:2: field 'w' is .{1,70}; allowed: a number from 0 to 1e\+30$"):
        read(first, {**second, "w": odd}, weight_field="w")
    # how long an answer is shows in its tokens too
    assert read({**first, "tokens": odd}, second).lengths.tolist() == [2, 2]


def test_what_is_too_long_is_counted(read, caplog):
    rows = [
        {"prompt": "p" * 30, "response": "short"},
        {"prompt": "p", "response": "r" * 30},
        {"prompt": "p", "response": "r"},
    ]
    with caplog.at_level("WARNING", "mohawk.data.pairs"):
        dataset = PairsDataset(read(*rows), 12, seed=0)
    assert (dataset.truncated, dataset.dropped) == (1, 1)
    assert [r.message for r in caplog.records] == [
        "2 of 3 examples are longer than 12 tokens: 1 lost the left of their prompt, 1 were left out"
    ]
    strict = PairsDataset(read(*rows), 12, too_long="drop")
    assert (strict.truncated, strict.dropped) == (0, 2)


def test_held_out_prompts_take_all_their_responses(read):
    rows = [{"prompt": f"p{i % 20}", "response": f"r{i}"} for i in range(60)]
    train, held = split_pairs(read(*rows), 0.25)
    assert (len(train), len(held)) == (45, 15) and not set(train.prompts) & set(held.prompts)
    again, _ = split_pairs(read(*rows[::-1]), 0.25)
    assert set(again.prompts) == set(train.prompts)
    everything, nothing = split_pairs(read(*rows), 0)
    assert (len(everything), len(nothing)) == (60, 0)
    for share in (1.0, -0.1, 0.001):
        with pytest.raises(UserError, match="data.validation_share"):
            split_pairs(read(*rows), share)


def test_tokens_are_kept_on_disk(read, tmp_path, tokenizer, monkeypatch):
    rows = [{"prompt": f"p{i}", "response": f"r{i}", "logprob": -1.0, "teacher": i % 2} for i in range(5)]
    first = read(*rows, teacher_field="teacher")
    with monkeypatch.context() as patch:
        patch.setattr("mohawk.data.pair_tokens._encode", None)  # nothing is tokenised
        again = read(*rows, teacher_field="teacher")
    for field in dataclasses.fields(Pairs):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
    assert isinstance(again.tokens, np.memmap) and again.unknown == {"sampling_logprob": f"{tmp_path}/rows.jsonl:1"}
    assert read(*rows).teachers is None  # other fields, another folder
    assert len(read(*rows[:4])) == 4
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    chat = read(*rows, chat=True)
    monkeypatch.setattr(tokenizer, "chat_template", CHATML.replace("<end>", "<stop>"))
    assert len(read(*rows, chat=True).tokens) > len(chat.tokens)
    with pytest.raises(UserError, match="rows.jsonl:1"):
        read({"prompt": "a"})
    assert not list((tmp_path / "cache" / "pairs").glob(".*"))


def test_a_cut_answer_is_not_the_one_that_ended_there(read):
    rows = [{"prompt": "p", "response": "so", "finish_reason": reason} for reason in ("stop", "length", "stop", "stop")]
    assert response_weights(read(*rows), "counts").tolist() == [0.75, 0.25, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, "sequence_length: got 1; predicting a token needs at least 2"),
        ({"too_long": "cut"}, "too_long: got 'cut'; allowed: truncate, drop"),
        (
            {"weighting": "best"},
            "weighting: got 'best'; allowed: uniform, counts, probability, importance, or none at all",
        ),
        (
            {"sequence_length": 2},
            "data: none of 2 examples fits into 2 tokens with something to learn; raise sequence_length",
        ),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError) as error:
        PairsDataset(made([9, 9]), **{"sequence_length": 16, **options})
    assert str(error.value) == message


def test_generated_answers_can_be_trained_on(tmp_path, tokenizer, make_llama):
    """From prompts to a step: the loss of the rows is the weighted sum over the responses, recomputed by hand."""
    from mohawk.data.records import read_prompts
    from mohawk.generation.decoding import Decoding, LocalTeacher
    from mohawk.generation.generate_data import generate_data

    (tmp_path / "p.txt").write_text("first\nsecond one\n")
    teacher = LocalTeacher(make_llama(), tokenizer, Decoding(method="sample", samples=3, max_new_tokens=5, top_p=0.9))
    generate_data(read_prompts([tmp_path / "p.txt"]), teacher, tmp_path / "out")
    path = tmp_path / "out" / "responses.jsonl"
    pairs = read_pairs([path], tokenizer, cache=tmp_path / "cache")
    dataset = PairsDataset(pairs, 64, weighting="importance")
    model = make_llama(seed=5)
    total, count = 0.0, 0
    for row in dataset:
        inside = row["segment_ids"][:, None] == row["segment_ids"][None]
        mask = (inside & torch.ones(64, 64).tril().bool())[None, None]
        logits = model(row["input_ids"][None], position_ids=row["position_ids"][None], attention_mask=mask).logits[0]
        each = torch.nn.functional.cross_entropy(logits[:-1], row["labels"][1:], ignore_index=-100, reduction="none")
        total += (each * row["weights"][1:]).sum().item()
        count += (row["labels"] != -100).sum().item()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    expected, prompts = 0.0, {}
    for line in lines:
        prompts.setdefault(line["prompt"], []).append(line)
    weighted = []
    for group in prompts.values():
        scores = np.exp([line["logprob"] - line["sampling_logprob"] for line in group])
        for line, weight in zip(group, scores / scores.sum(), strict=True):
            prompt, response = tokenizer(line["prompt"])["input_ids"], tokenizer(line["response"])["input_ids"]
            response += [257] * (line["finish_reason"] == "stop")
            ids = torch.tensor([prompt + response])
            labels = ids.clone()
            labels[0, : len(prompt)] = -100
            weighted.append((weight, len(response), model(ids, labels=labels).loss.item() * len(response)))
    scale = sum(n for _, n, _ in weighted) / sum(w * n for w, n, _ in weighted)
    expected = scale * sum(w * loss for w, _, loss in weighted)
    assert count == sum(n for _, n, _ in weighted) and total == pytest.approx(expected, rel=1e-4)
