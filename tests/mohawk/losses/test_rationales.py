"""Distilling step by step: what is taken from a teacher's text, and the loss, written out by hand."""

import json
import logging

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mohawk.data.mixture import Mixture
from mohawk.data.packing import collate
from mohawk.data.pairs import PairsDataset, read_pairs, split_pairs
from mohawk.errors import UserError
from mohawk.losses.distiller import KnowledgeDistiller
from mohawk.losses.rationales import (
    TEMPLATES,
    RationaleDistiller,
    check_record,
    extract_rationale,
    pair_ids,
    rationale_pairs,
    read_rationale_pairs,
    read_rationales,
    task_prompt,
)
from mohawk.models.from_teacher import hybrid_from_teacher

SO = "{rationale} So the answer is {label}."


@pytest.mark.parametrize(
    ("text", "template", "expected"),
    [
        ("Two and two make four. So the answer is 4.", SO, ("Two and two make four.", "4")),
        ("  Two\nand two.\n\nso  the\nANSWER is\t4 ", SO, ("Two\nand two.", "4")),
        # the last match, for a teacher that corrects itself; the text behind the label is not part of it
        ("a. So the answer is 4. No: b. So the answer is 5. Done.", SO, ("a. So the answer is 4. No: b.", "5")),
        ("a. So the answer is 4.\nb. So the answer is 3.5\nbye", SO, ("a. So the answer is 4.\nb.", "3.5")),
        ("pi. So the answer is 3.14. And so on.", SO, ("pi.", "3.14")),
        ("why. So the answer is New York City.", SO, ("why.", "New York City")),
        # words are whole
        ("why. So the answer island.", SO, None),
        ("Also the answer is 4.", SO, None),
        # nothing on either side is no match
        ("So the answer is 4.", SO, None),
        ("why. So the answer is .", SO, None),
        ("why. The answer is 4.", SO, None),
        (
            "Label: yes\nRationale: because\nit is.\n",
            "Label: {label} Rationale: {rationale}",
            ("because\nit is.", "yes"),
        ),
        ("hm Rationale: x Rationale: y\nLabel: no.", "Rationale: {rationale} Label: {label}", ("y", "no.")),
        ("1 + 1 = 2\n#### 2", "{rationale} #### {label}", ("1 + 1 = 2", "2")),
        ("(why?) [a+b] => x*", "{rationale} => {label}*", ("(why?) [a+b]", "x")),
        ("<r>one\ntwo</r><l>3</l>", "<r>{rationale}</r><l>{label}</l>", ("one\ntwo", "3")),
    ],
)
def test_extraction(text, template, expected):
    assert extract_rationale(text, template) == expected


@pytest.mark.parametrize(
    "template", ["{rationale}", "{rationale} {label}", "{label} {label}: {rationale}", "{a} {label}"]
)
def test_a_template_has_both_fields_once(template):
    with pytest.raises(UserError, match=r"^template '[^\n]+': needs [^\n]+$"):
        extract_rationale("x", template)


def test_the_default_templates():
    found = {
        "why. So the answer is 7.": ("why.", "7"),
        "why. Therefore, the answer is 7.": ("why.", "7"),
        "why. The answer is 7": ("why.", "7"),
        "why\n#### 7": ("why", "7"),
        "why\nFinal answer: 7": ("why", "7"),
        "why\nAnswer: 7": ("why", "7"),
        "Answer: 7\nExplanation: why\nnot": ("why\nnot", "7"),
        "Rationale: why\nLabel: 7": ("why", "7"),
        "Label: 7\nRationale: why": ("why", "7"),
    }
    for text, expected in found.items():
        assert next(e for t in TEMPLATES if (e := extract_rationale(text, t))) == expected, text


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_records_of_files(tmp_path, caplog):
    first = lines(
        tmp_path / "big.jsonl",
        {"prompt": "1+1?", "response": "count. So the answer is 2."},
        "",
        {"prompt": "2+2?", "response": "no idea"},
        {"messages": [{"role": "user", "content": "3+3?"}], "response": "add. The answer is 6", "teacher": "other"},
    )
    second = lines(
        tmp_path / "small.jsonl",
        {"prompt": "1+1?", "label": 2, "rationale": "sum"},
        {"prompt": "4+4?", "label": "8", "response": "never looked at"},
    )
    with caplog.at_level(logging.WARNING):
        records = read_rationales([first, second])
    assert records == [
        {"prompt": "1+1?", "teacher": "big", "rationale": "count.", "label": "2", "where": f"{first}:1"},
        {"prompt": "3+3?", "teacher": "other", "rationale": "add.", "label": "6", "where": f"{first}:4"},
        {"prompt": "1+1?", "teacher": "small", "label": "2", "rationale": "sum", "where": f"{second}:1"},
        {"prompt": "4+4?", "teacher": "small", "label": "8", "rationale": None, "where": f"{second}:2"},
    ]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("1 of 3 responses match none of the 10 templates") and said.endswith(f"{first}:3")


def test_teachers_are_told_apart_by_their_files(tmp_path):
    row = {"prompt": "a", "label": "b"}
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        lines(tmp_path / folder / "responses.jsonl", row)
    files = [tmp_path / "x" / "responses.jsonl", tmp_path / "y" / "responses.jsonl", lines(tmp_path / "z.jsonl", row)]
    assert [record["teacher"] for record in read_rationales(files)] == [str(files[0]), str(files[1]), "z"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "a"', "not JSON"),
        ([1], "a JSON list, not an object"),
        ({"label": "x"}, "prompt: got no such field; needs a text"),
        ({"prompt": " ", "label": "x"}, "prompt: got an empty text; needs a text"),
        ({"prompt": "a", "label": ["x"]}, "label: got list; needs a text"),
        ({"prompt": "a", "label": True}, "label: got bool; needs a text"),
        ({"prompt": "a", "label": "x", "rationale": ""}, "rationale: got an empty text; needs a text"),
        ({"prompt": "a"}, "has neither label nor response; its fields: prompt"),
        ({"messages": [], "label": "x"}, "messages: got an empty list"),
        (
            {"messages": [{"role": r, "content": "c"} for r in ("system", "user")], "label": "x"},
            "messages of system, user",
        ),
    ],
)
def test_a_bad_line_is_named(row, said, tmp_path):
    path = lines(tmp_path / "bad.jsonl", {"prompt": "a", "label": "b"}, row)
    with pytest.raises(UserError) as error:
        read_rationales([path])
    assert str(error.value).startswith(f"{path}:2: {said}") and "\n" not in str(error.value)


def test_nothing_left_is_said(tmp_path):
    path = lines(tmp_path / "none.jsonl", {"prompt": "a", "response": "b"})
    with pytest.raises(UserError, match="^rationales: nothing in .*: none of 1 responses matches a template$"):
        read_rationales([path])


EXAMPLES = (
    ["is 7 prime?", "is 9 prime?", "ab"],
    ["yes", "no", "perhaps"],
    ["nothing divides it but one and itself", None, "c"],
)


def make(kind, make_llama):
    torch.manual_seed(5)
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=96, vocab_size=258, initializer_range=0.3)
        model = GPT2LMHeadModel(config)
    elif kind == "llama":
        model = make_llama(seed=5)
    else:
        model = hybrid_from_teacher(make_llama(seed=5), [0])
    return model.double().eval()


def by_hand(model, tokenizer, prefix, prompts, answers, teacher=None, temperature=1.0, vocab=258):
    """Mean cross-entropy and mean T^2 KL over the answers' tokens: each example alone, all logits in float64."""
    ce, kl = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer is None:
            continue
        before = tokenizer(f"{prefix} {prompt}\n")["input_ids"]
        after = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([before + after])
        z = model(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1, :vocab]
        ce += [-z[i].log_softmax(-1)[token] for i, token in enumerate(after)]
        if teacher is not None:
            t = teacher(input_ids=ids, use_cache=False).logits[0, len(before) - 1 : -1, :vocab] / temperature
            q = (z / temperature).log_softmax(-1)
            kl += list(temperature**2 * (t.softmax(-1) * (t.log_softmax(-1) - q)).sum(-1))
    return torch.stack(ce).mean(), (torch.stack(kl).mean() if kl else None)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "hybrid"])
def test_the_loss_by_hand(kind, make_llama, tokenizer):
    student = make(kind, make_llama)
    prompts, labels, rationales = EXAMPLES
    distiller = RationaleDistiller(student, tokenizer, rationale_weight=0.3)
    loss, parts = distiller.compute_loss(prompts, labels, rationales, return_parts=True)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    label, _ = by_hand(student, tokenizer, "[label]", prompts, labels)
    rationale, _ = by_hand(student, tokenizer, "[rationale]", prompts, rationales)
    (label + 0.3 * rationale).backward()
    torch.testing.assert_close(parts["label"], label.detach())
    torch.testing.assert_close(parts["rationale"], rationale.detach())
    torch.testing.assert_close(loss.detach(), (label + 0.3 * rationale).detach())
    for name, p in student.named_parameters():
        # norms are in float32, whose rounding depends on the padding
        torch.testing.assert_close(
            gradients[name], p.grad, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("wider", [258, 264])
def test_a_teacher_for_the_labels_by_hand(wider, make_llama, tokenizer):
    """A family's heads may be padded to different widths: only the tokenizer's rows count."""
    student = make("llama", make_llama)
    teacher = make_llama(seed=9, hidden_size=64, vocab_size=wider).double().train()
    prompts, labels, rationales = EXAMPLES
    distiller = RationaleDistiller(
        student,
        tokenizer,
        label_prefix="L:",
        rationale_prefix="R:",
        rationale_weight=2.0,
        teacher=teacher,
        ce_weight=0.5,
        kd_weight=0.7,
        temperature=3.0,
    )
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    loss = distiller.compute_loss(prompts, labels, rationales)
    ce, kl = by_hand(student, tokenizer, "L:", prompts, labels, teacher, 3.0)
    rationale, _ = by_hand(student, tokenizer, "R:", prompts, rationales)
    torch.testing.assert_close(loss, 0.5 * ce + 0.7 * kl + 2.0 * rationale)


def test_labels_of_every_token(make_llama, tokenizer):
    distiller = RationaleDistiller(make_llama(), tokenizer)
    batch = distiller.encode(["[label] ab\n", "[label] c\n"], ["yes", "n"])
    rows = [("[label] ab\n", "yes"), ("[label] c\n", "n")]
    for i, (prompt, answer) in enumerate(rows):
        before, after = tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], 257]
        pad = batch["input_ids"].shape[1] - len(before) - len(after)
        assert batch["input_ids"][i].tolist() == before + after + [0] * pad
        assert batch["labels"][i].tolist() == [-100] * len(before) + after + [-100] * pad
        assert batch["attention_mask"][i].tolist() == [1] * len(before + after) + [0] * pad


def test_the_pairs_of_both_tasks():
    records = [dict(zip(("prompt", "label", "rationale"), row, strict=True)) for row in zip(*EXAMPLES, strict=True)]
    pairs = list(rationale_pairs(records, rationale_weight=0.3))
    assert [(pair["task"], pair["prompt"], pair["response"], pair["weight"]) for pair in pairs] == [
        ("label", "[label] is 7 prime?\n", "yes", 1.0),
        ("rationale", "[rationale] is 7 prime?\n", EXAMPLES[2][0], 0.3),
        ("label", "[label] is 9 prime?\n", "no", 1.0),
        ("label", "[label] ab\n", "perhaps", 1.0),
        ("rationale", "[rationale] ab\n", "c", 0.3),
    ]
    alone = list(rationale_pairs(records, rationale_weight=0))
    assert [(pair["task"], pair["weight"]) for pair in alone] == [("label", 1.0)] * 3


@pytest.mark.parametrize("beside", [False, True])
def test_each_step_has_the_distillers_loss(beside, make_llama, tokenizer, tmp_path):
    """Files -> pairs -> packed rows -> the trainer's objective: in whatever rows and micro-batches the tasks of a step
    are, label loss + weight * rationale loss + that of plain text, each over its own tokens of the step."""
    rows = [dict(zip(("prompt", "label", "rationale"), row, strict=True)) for row in zip(*EXAMPLES, strict=True)]
    rows += [{"prompt": f"why {i}?", "label": "x" * (1 + i), "rationale": "because " * (5 - i)} for i in range(4)]
    pairs = read_rationale_pairs([lines(tmp_path / "x.jsonl", *rows)], tokenizer, rationale_weight=0.3)
    dataset = PairsDataset(pairs, 60)
    assert len(dataset) >= 5
    student = make("llama", make_llama)
    if beside:  # a mixture with plain text, which has no tasks
        text = [{name: dataset[0][name] for name in ("input_ids", "position_ids", "segment_ids")}]
        text[0]["labels"] = text[0]["input_ids"].clone()
        dataset = Mixture([dataset, text], [1.0, 0.2], seed=1)
    distiller = KnowledgeDistiller(None, student, kd_weight=0.0, ce_weight=1.0)
    seen = set()
    for step in range(3):
        batches = [collate([dataset[(4 * step + 2 * k + i) % len(dataset)] for i in range(2)]) for k in range(2)]
        prepared = [distiller.prepare(batch, step) for batch in batches]
        distiller.begin_step(step, 3)
        loss = sum(loss for batch in prepared for _, loss in distiller.losses(**batch))
        # by hand, document by document
        nll = {0: [], 1: [], 2: []}
        for batch in batches:
            tasks = batch.get("task", torch.zeros_like(batch["labels"]))
            for row, segments in enumerate(batch["segment_ids"]):
                for segment in range(int(segments.max()) + 1):
                    here = segments == segment
                    ids, labels = batch["input_ids"][row, here], batch["labels"][row, here]
                    log_q = student(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
                    for t in range(1, len(ids)):
                        if labels[t] != -100:
                            nll[int(tasks[row, here][t])].append(-log_q[t - 1, labels[t]])
        # a task that a step has nothing of adds nothing
        plain, label, rationale = (torch.stack(nll[k]).mean() if nll[k] else 0.0 for k in range(3))
        torch.testing.assert_close(loss, plain + label + 0.3 * rationale)
        seen |= {k for k, values in nll.items() if values}
        every = torch.stack([value for values in nll.values() for value in values])
        assert distiller.measured()["ce"] == pytest.approx(every.detach().mean().item())
    assert seen == ({0, 1, 2} if beside else {1, 2})


def test_micro_batches_of_a_plain_loop_add_up(make_llama, tokenizer):
    distiller = RationaleDistiller(make("llama", make_llama), tokenizer, rationale_weight=0.3)
    counts = distiller.count_tokens(*EXAMPLES)
    labels, rationales = ([len(tokenizer(x)["input_ids"]) + 1 for x in texts if x] for texts in EXAMPLES[1:])
    assert counts == (sum(labels), sum(rationales))
    parts = [[text[i : i + 1] for text in EXAMPLES] for i in range(3)]
    split = sum(distiller.compute_loss(*part, normalizers=counts) for part in parts)
    torch.testing.assert_close(split, distiller.compute_loss(*EXAMPLES))


def test_both_tasks_of_a_prompt_are_held_out_together(tokenizer, tmp_path):
    path = lines(tmp_path / "x.jsonl", *({"prompt": f"{i}?", "label": "a", "rationale": "b"} for i in range(10)))
    train, held_out = split_pairs(read_rationale_pairs([path], tokenizer), 0.3)
    assert (len(train), len(held_out)) == (14, 6)
    assert not set(train.prompts.tolist()) & set(held_out.prompts.tolist())


def test_weights_of_pairs_given_in_a_file(tokenizer, tmp_path):
    path = lines(
        tmp_path / "x.jsonl",
        {"prompt": "ab", "response": "c", "weight": 2},
        {"prompt": "ab", "response": "de"},
        {"prompt": "ab", "response": "f", "weight": 0.0},
    )
    dataset = PairsDataset(read_pairs([path], tokenizer, weight_field="weight", cache=tmp_path / "cache"), 12)
    weights = dataset[0]["weights"][dataset[0]["labels"] != -100]
    assert len(dataset) == 1 and sorted(weights.tolist()) == [1.0] * 3 + [2.0] * 2
    # beside a weighting by prompt they multiply it
    uniform = PairsDataset(
        read_pairs([path], tokenizer, weight_field="weight", cache=tmp_path / "cache"), 12, weighting="uniform"
    )
    assert uniform.weights == pytest.approx(np.array([2.0, 1.0, 0.0]))
    for value in (-1, "2", True, float("inf")):
        bad = lines(tmp_path / "bad.jsonl", {"prompt": "ab", "response": "c", "weight": value})
        with pytest.raises(UserError, match=rf"^{bad}:1: field 'weight' is [^\n]+; allowed: a number from 0 to 1e.30$"):
            read_pairs([bad], tokenizer, weight_field="weight", cache=tmp_path / "cache")
    with pytest.raises(UserError, match=rf"^{path}:1: weight_field: .*'wight'; its fields: prompt, response, weight$"):
        read_pairs([path], tokenizer, weight_field="wight", cache=tmp_path / "cache")
    zero = lines(tmp_path / "zero.jsonl", {"prompt": "ab", "response": "c", "weight": 0})
    with pytest.raises(UserError, match="^data: none of 1 examples has a weight above 0$"):
        PairsDataset(read_pairs([zero], tokenizer, weight_field="weight", cache=tmp_path / "cache"), 12)


def test_a_plain_loop_learns(make_llama, tokenizer):
    student = make_llama(seed=1).train()
    distiller = RationaleDistiller(student, tokenizer)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = distiller.compute_loss(*EXAMPLES)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_weights_of_tasks_and_rationales_as_ids(make_llama, tokenizer):
    student, (prompts, labels, rationales) = make_llama(), EXAMPLES
    plain = RationaleDistiller(student, tokenizer)
    _, parts = plain.compute_loss(prompts, labels, rationales, return_parts=True)
    weighted = RationaleDistiller(student, tokenizer, task_weight={"label": 0.5, "rationale": 0.3})
    expected = 0.5 * parts["label"] + 0.3 * parts["rationale"]
    torch.testing.assert_close(weighted.compute_loss(prompts, labels, teacher_rationale=rationales).detach(), expected)
    # the ids that the texts have behind their prompts, padded by one and by the other convention, and as lists
    ids = [
        [] if text is None else pair_ids(tokenizer, task_prompt("[rationale]", prompt), text)[1]
        for prompt, text in zip(prompts, rationales, strict=True)
    ]
    assert any(ids) and [] in ids
    n = max(map(len, ids)) + 1
    padded = torch.tensor([one + [-100] * (n - len(one)) for one in ids])
    for given in (ids, padded, [torch.tensor(one[:-1]) for one in ids]):
        got = weighted.compute_loss(prompts, labels, teacher_rationale=given)
        torch.testing.assert_close(got.detach(), expected)
        assert weighted.count_tokens(prompts, labels, given) == weighted.count_tokens(*EXAMPLES)
    for arguments, words in (
        ({"rationales": ids, "teacher_rationale": ids}, "got both of rationales and teacher_rationale"),
        ({}, "got neither of rationales and teacher_rationale"),
        ({"teacher_rationale": padded.float()}, "a tensor .* of torch.float32; give a list of texts, or ids"),
        ({"teacher_rationale": padded + 10**6}, "got the id 1[0-9]+; the student has 0 to"),
        ({"teacher_rationale": "why"}, "got one text; give a list"),
    ):
        with pytest.raises(UserError, match=rf"^compute_loss: [^\n]*{words}[^\n]*$"):
            plain.compute_loss(prompts, labels, **arguments)
    with pytest.raises(UserError, match=r"^compute_loss: prompts: got no list of texts; [^\n]+$"):
        plain.compute_loss(padded, labels, teacher_rationale=padded)
    for options, words in (
        ({"task_weight": {"kd": 1}}, "got 'kd'; allowed: text, label, rationale; the divergence and .* kd_weight"),
        ({"task_weight": {"text": 1}}, "got 'text'; allowed: label, rationale"),
        ({"task_weight": 0.5}, "got 0.5; give a dict .*alpha="),
        ({"task_weight": {"label": -1}}, "got -1; allowed: a finite number"),
        ({"task_weight": {"label": 1}, "rationale_weight": 0.5}, "got 0.5 beside task_weight"),
    ):
        with pytest.raises(UserError, match=rf"^(task|rationale)_weight[^\n]*: {words}[^\n]*$"):
            RationaleDistiller(student, tokenizer, **options)


def test_no_rationale_in_a_batch(make_llama, tokenizer):
    distiller = RationaleDistiller(make_llama(), tokenizer)
    loss, parts = distiller.compute_loss(["a"], ["b"], [None], return_parts=True)
    assert parts["rationale"] == 0 and loss == parts["label"] > 0


def test_wrong_input_is_one_line(make_llama, tokenizer):
    student = make_llama()
    with pytest.raises(UserError, match=r"^rationale_weight: got -1; allowed: [^\n]+$"):
        RationaleDistiller(student, tokenizer, rationale_weight=-1)
    with pytest.raises(UserError, match=r"^rationale_weight: got -1; allowed: [^\n]+$"):
        list(rationale_pairs([], rationale_weight=-1))
    with pytest.raises(UserError, match=r"^kd_weight: got 1.0 and no teacher; [^\n]+$"):
        RationaleDistiller(student, tokenizer, kd_weight=1.0)
    with pytest.raises(UserError, match=r"^kd_weight: got 0.0 and a teacher; [^\n]+$"):
        RationaleDistiller(student, tokenizer, teacher=make_llama())
    with pytest.raises(UserError, match=r"^compute_loss: got 2 prompts, 1 labels and 2 rationales; [^\n]+$"):
        RationaleDistiller(student, tokenizer).compute_loss(["a", "b"], ["c"], [None, None])


def test_thoughts_of_chats_are_rationales(tmp_path):
    asked = {"role": "user", "content": "2+2?"}
    said = "<think>\nTwo and\ntwo.\n</think>\n\n4"
    rows = [
        {"messages": [asked, {"role": "assistant", "content": "4", "reasoning_content": "Two and two."}]},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": said}]},
        {"messages": [asked], "response": "<think>So.</think>4", "teacher": "r1"},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_rationales([tmp_path / "a.jsonl"])
    assert [(r["prompt"], r["label"], r["rationale"]) for r in found] == [
        ("2+2?", "4", "Two and two."), ("2+2?", "4", "Two and\ntwo."), ("2+2?", "4", "So."),
    ]  # fmt: skip
    assert [r["teacher"] for r in found] == ["a", "a", "r1"]
    assert check_record(rows[1], "a:2")
