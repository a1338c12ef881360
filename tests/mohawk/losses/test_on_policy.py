"""On-policy batches: whose tokens they are, what they are labelled with, and that nothing outside them changes."""

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel

from mohawk.data.packing import collate
from mohawk.errors import UserError
from mohawk.losses.distiller import KnowledgeDistiller
from mohawk.losses.on_policy import OnPolicy
from mohawk.models.decoders import decoder
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.sharding import shard
from tests.helpers.processes import in_processes
from tests.helpers.tiny_phase import (
    cheap_training,  # noqa: F401
    fork,
    tiny_phase,
    tiny_trainer,
    wait,
    weights,
)

IGNORED, PAD = -100, 0
KINDS = ["gpt2", "llama", "hybrid", "pure_ssm"]


@pytest.fixture
def make_student(make_llama):
    def make(kind: str):
        torch.manual_seed(5)
        if kind == "gpt2":
            # 24 positions and no more: a sample that ran on behind its row's end would be an error
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "vocab_size": 258}
            return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.4, bos_token_id=256, eos_token_id=257))
        if kind == "llama":
            return make_llama(initializer_range=0.4)
        return hybrid_from_teacher(make_llama(initializer_range=0.4), [0] if kind == "hybrid" else [0, 1])

    return make


def row_of(*segments: tuple[int, int], n: int, seed: int, weights=None):
    """A row of (tokens, tokens without label) segments; one without label is plain text."""
    generator = torch.Generator().manual_seed(seed)
    row = {name: torch.full((n,), fill) for name, fill in (("input_ids", PAD), ("labels", IGNORED))}
    row |= {"segment_ids": torch.full((n,), -1), "position_ids": torch.arange(n)}
    if weights is not None:
        row["weights"] = torch.zeros(n)
    begin = 0
    for index, (length, prompt) in enumerate(segments):
        here = slice(begin, begin + length)
        row["input_ids"][here] = torch.randint(3, 250, (length,), generator=generator)
        row["labels"][begin + prompt : begin + length] = row["input_ids"][begin + prompt : begin + length]
        row["segment_ids"][here], row["position_ids"][here] = index, torch.arange(length)
        if weights is not None:
            row["weights"][here] = weights[index]
        begin += length
    row["position_ids"][begin:] = torch.arange(n - begin)
    return row


@torch.no_grad()
def greedy(student, prompt: torch.Tensor, count: int, eos: int = -1) -> list[int]:
    """One whole forward a token: no cache, no padding."""
    ids = prompt[None]
    for _ in range(count):
        logits = student(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == eos:
            break
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_a_batch(kind, make_student):
    """Two pairs; plain text, a lone token and padding; a prompt that leaves less than max_new_tokens; a cut prompt."""
    student = make_student(kind).eval()
    batch = collate(
        [
            row_of((7, 4), (9, 2), (8, 3), n=24, seed=1, weights=[1.0, 0.5, 2.0]),
            row_of((10, 1), (1, 1), (3, 1), n=24, seed=2, weights=[1.0, 3.0, 1.5]),
            row_of((24, 21), n=24, seed=3, weights=[1.0]),
            row_of((6, 6), (6, 4), n=24, seed=4, weights=[7.0, 4.0]),
        ]
    )
    batch |= {"source": torch.tensor([0, 1, 0, 2]), "row": torch.tensor([9, 8, 7, 6])}
    ids = batch["input_ids"]
    texts = {  # by row: prompt, most new tokens, weight
        0: [(ids[0, :4], 5, 1.0), (ids[0, 7:9], 5, 0.5), (ids[0, 16:19], 5, 2.0)],
        1: [(ids[1, :6], 5, 1.0), (ids[1, 11:13], 5, 1.5)],
        2: [(ids[2, :21], 3, 1.0)],
        3: [(ids[3, 6:10], 5, 4.0)],
    }
    eos = greedy(student, ids[0, 7:9], 3)[2]  # so that one sample ends early
    on_policy = OnPolicy(
        student, share=1, max_new_tokens=5, temperature=0, prompt_tokens=6, eos_token_id=eos, pad_token_id=PAD
    )
    made = on_policy(batch, 3)

    assert made.keys() == batch.keys()
    rows, ended = [], 0
    for row in range(4):
        columns = {name: [] for name in ("input_ids", "labels", "segment_ids", "position_ids", "weights")}
        for segment, (prompt, limit, weight) in enumerate(texts[row]):
            sample = greedy(student, prompt, limit, eos)
            ended += sample[-1] == eos
            assert len(sample) <= limit
            columns["input_ids"] += prompt.tolist() + sample
            columns["labels"] += [IGNORED] * len(prompt) + sample
            columns["segment_ids"] += [segment] * (len(prompt) + len(sample))
            columns["position_ids"] += range(len(prompt) + len(sample))
            columns["weights"] += [0.0] * len(prompt) + [weight] * len(sample)
        rows.append(columns)
    assert ended >= 1
    n = max(len(columns["labels"]) for columns in rows)
    for row, columns in enumerate(rows):
        short = n - len(columns["labels"])
        fill = {"input_ids": [PAD], "labels": [IGNORED], "segment_ids": [-1], "weights": [0.0]}
        for name, values in columns.items():
            values += list(range(short)) if name == "position_ids" else fill[name] * short
            assert made[name][row].tolist() == values, (row, name)
            assert made[name].dtype == batch[name].dtype
    assert made["source"].tolist() == [0, 1, 0, 2] and made["row"].tolist() == [-1] * 4


@pytest.mark.parametrize("left", [False, True])
def test_batches_of_other_collators(left, make_student):
    """A document a row, with an attention mask or without one: the same samples as from a packed row of one."""
    student = make_student("gpt2")
    packed = collate([row_of(one, n=16, seed=one[0]) for one in ((9, 4), (16, 6), (5, 3))])
    mask = (packed["segment_ids"] >= 0).long()
    plain = {"input_ids": packed["input_ids"], "labels": packed["labels"], "attention_mask": mask}
    if left:
        shifts = (16 - mask.sum(1)).tolist()
        plain = {
            name: torch.stack([row.roll(k) for row, k in zip(t, shifts, strict=True)]) for name, t in plain.items()
        }
    settings = {"share": 1, "max_new_tokens": 5, "temperature": 0, "eos_token_id": 257, "pad_token_id": PAD}
    on_policy = OnPolicy(student, **settings)
    expected, made = on_policy(packed, 0), on_policy(plain, 0)
    assert made.keys() == plain.keys() and made["attention_mask"].dtype == mask.dtype
    assert torch.equal(made["input_ids"], expected["input_ids"]) and torch.equal(made["labels"], expected["labels"])
    assert torch.equal(made["attention_mask"] == 1, expected["segment_ids"] >= 0)
    assert 0 < (made["labels"] != IGNORED).sum(1).min() and not made["attention_mask"].all()
    whole = {name: plain[name][1:2] for name in ("input_ids", "labels")}
    bare = on_policy(whole, 0)
    assert bare.keys() == whole.keys() and torch.equal(
        bare["labels"], expected["labels"][1:2, : bare["labels"].shape[1]]
    )


def many(n=24, rows=16):
    """Rows of the same segment, eight times: prompt of two, one label."""
    one = row_of((3, 2), n=n, seed=1)
    for name in ("input_ids", "labels"):
        one[name] = one[name][:3].repeat(n // 3)
    one["segment_ids"] = torch.arange(n // 3).repeat_interleave(3)
    one["position_ids"] = torch.arange(3).repeat(n // 3)
    return collate([one] * rows)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 4}, {"top_p": 0.6}])
def test_samples_follow_the_students_distribution(sampling, make_student):
    """Whatever the checkpoint's own generation settings are: they are not the student's distribution."""
    student = make_student("gpt2").eval()
    student.generation_config.update(repetition_penalty=9.0, top_k=2, suppress_tokens=[5], temperature=3.0, min_p=0.9)
    batch = many()
    with torch.no_grad():
        logits = student(batch["input_ids"][:1, :2]).logits[0, -1].double()
    p = (logits / sampling.get("temperature", 1.0)).softmax(0)
    order = p.argsort(descending=True)
    if "top_k" in sampling:
        p[order[sampling["top_k"] :]] = 0
    if "top_p" in sampling:
        p[order[p[order].cumsum(0) - p[order] >= sampling["top_p"]]] = 0
    p /= p.sum()

    on_policy = OnPolicy(student, share=1, max_new_tokens=1, eos_token_id=257, seed=2, **sampling)
    counts, steps = torch.zeros(258, dtype=torch.float64), 24
    for step in range(steps):
        made = on_policy(batch, step)
        counts += torch.bincount(made["labels"][made["labels"] != IGNORED], minlength=258)
    total = counts.sum()
    assert total == 16 * 8 * steps
    assert counts[p == 0].sum() == 0
    assert ((counts / total - p).abs() <= 5 * (p * (1 - p) / total).sqrt() + 1 / total).all()


def test_seed_and_step_decide_everything_and_nothing_else_changes(make_student):
    student = make_student("hybrid").train()
    student.config.use_cache = False
    student.model.layers[1].eval()  # frozen, say
    modes = {name: module.training for name, module in student.named_modules()}
    config, generation = copy.deepcopy(student.config.to_dict()), student.generation_config
    batch = collate([row_of((9, 4), (9, 1), n=24, seed=s) for s in range(3)])
    before = {name: value.clone() for name, value in batch.items()}

    def make(step, seed=0):
        return OnPolicy(student, share=1, max_new_tokens=6, prompt_tokens=4, eos_token_id=257, seed=seed)(batch, step)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = make(4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = make(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(make(5)["labels"], first["labels"]) and not torch.equal(
        make(4, seed=1)["labels"], first["labels"]
    )
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert student.config.to_dict() == config and student.generation_config is generation
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    assert all(p.grad is None and p.requires_grad for p in student.parameters())


def test_an_error_while_sampling_restores_the_student(make_student):
    student = make_student("gpt2").train()
    generation = student.generation_config
    batch = collate([row_of((9, 4), n=24, seed=1)])
    on_policy = OnPolicy(student, share=1, eos_token_id=257)

    def broken(*_):
        assert not student.training and student.generation_config is not generation
        raise RuntimeError("no memory left")

    student.transformer.ln_f.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="no memory left"):
        on_policy(batch, 0)
    assert student.training and student.generation_config is generation


def test_decisions_depend_on_seed_and_step_alone(make_student):
    student = make_student("gpt2")
    batches = [collate([row_of((9, 4), n=24, seed=s)]) for s in range(2)]
    on_policy = OnPolicy(student, share=0.3, max_new_tokens=1, eos_token_id=257, seed=7)
    decisions = [on_policy.decides(step) for step in range(2000)]
    assert abs(sum(decisions) / 2000 - 0.3) < 0.05
    other = OnPolicy(student, share=0.3, max_new_tokens=9, eos_token_id=257, seed=7)
    assert decisions == [other.decides(step) for step in range(2000)]
    for step in range(12):
        assert [(on_policy(batch, step) is not batch) for batch in batches] == [decisions[step]] * 2
    on_policy.share = 0
    assert all(on_policy(batches[0], step) is batches[0] for step in range(12))
    on_policy.share = 1
    nothing = collate([row_of((5, 5), n=24, seed=1)])  # a prompt without response: nothing to sample from
    assert on_policy(nothing, 0) is nothing


def test_gkd_by_hand(make_student, make_llama):
    """JSD(beta) over the sampled tokens, each segment alone, all logits in float64."""
    student, teacher = make_student("hybrid").double().eval(), make_llama(seed=8, initializer_range=0.4).double()
    on_policy = OnPolicy(student, share=1, max_new_tokens=6, prompt_tokens=3, eos_token_id=257, seed=1)
    distiller = KnowledgeDistiller(teacher, student, divergence="jsd", beta=0.3, on_policy=on_policy)
    batch = collate([row_of((9, 4), (5, 3), n=24, seed=1), row_of((11, 1), n=24, seed=2)])
    made = distiller.prepare(batch, 0)
    ((_, loss),) = distiller.losses(**made)

    terms = []
    for row in range(2):
        for segment in range(int(made["segment_ids"][row].max()) + 1):
            here = made["segment_ids"][row] == segment
            ids, labels = made["input_ids"][row, here][None], made["labels"][row, here]
            with torch.no_grad():
                p, q = (m(input_ids=ids, use_cache=False).logits[0].softmax(-1) for m in (teacher, student))
            m = 0.3 * p + 0.7 * q
            jsd = (0.3 * p * (p / m).log() + 0.7 * q * (q / m).log()).sum(-1)
            terms += [jsd[i - 1] for i in range(1, len(labels)) if labels[i] != IGNORED]
    assert len(terms) == int((made["labels"] != IGNORED).sum()) > 8
    torch.testing.assert_close(loss.detach(), torch.stack(terms).mean(), rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("cheap_training")
def test_a_run_that_stopped_samples_as_it_would_have(make_student, make_llama, tmp_path):
    """Half the steps are on-policy, two micro-batches each; the second run is stopped in step 5, after a checkpoint."""
    rows = [row_of((9, 4), (7, 1), n=24, seed=s) for s in range(8)]
    phase = tiny_phase(steps=6, batch_size=2, sequence_length=24, gradient_accumulation=2, save_every=3)
    seen = []

    def train(folder, stop_at=None):
        student = make_student("llama")
        student.config.attention_dropout = 0.2  # takes from the random state that sampling leaves alone
        for layer in student.model.layers:
            layer.self_attn.attention_dropout = 0.2
        on_policy = OnPolicy(student, max_new_tokens=6, prompt_tokens=3, eos_token_id=257, seed=1)

        def watched(batch, step):
            if step == stop_at:
                raise RuntimeError("stopped")
            made = on_policy(batch, step)
            seen.append((step, made is not batch))
            return made

        objective = KnowledgeDistiller(make_llama(seed=8), student, on_policy=watched)
        trainer = tiny_trainer(folder, objective, phase, rows=rows)
        trainer.train_phase()
        return weights(objective)

    whole = train(tmp_path / "whole")
    assert {sampled for _, sampled in seen} == {True, False}
    with pytest.raises(RuntimeError, match="stopped"):
        train(tmp_path / "part", stop_at=4)
    seen.clear()
    assert torch.equal(train(tmp_path / "part"), whole)
    assert [step for step, _ in seen] == [3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("kind", ["gpt2", "hybrid"])
def test_autocast_around_sampling_and_training(kind, make_student):
    """Autocast keeps weights that it cast without gradient; training in the same block must not be given them."""
    student = make_student(kind).train()
    batch = collate([row_of((9, 4), (9, 3), n=24, seed=s) for s in range(2)])
    on_policy = OnPolicy(student, share=1, max_new_tokens=6, eos_token_id=257)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = on_policy(batch, 0)
        student(
            input_ids=made["input_ids"], position_ids=made["position_ids"]
        ).logits.float().square().mean().backward()
    assert (made["labels"] != IGNORED).sum() > 0
    missing = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_the_tokenizer_gives_the_ids(make_student, tokenizer):
    on_policy = OnPolicy(make_student("gpt2"), tokenizer)
    assert on_policy.eos == [257] and on_policy.pad == 257
    on_policy = OnPolicy(make_student("gpt2"), tokenizer, eos_token_id=[4, 5], pad_token_id=7)
    assert on_policy.eos == [4, 5] and on_policy.pad == 7


def test_wrong_input_is_one_line(make_student):
    student = make_student("gpt2")
    wrong = {"share": 1.5, "max_new_tokens": 0, "temperature": -1, "top_p": 0, "top_k": -1, "prompt_tokens": 0}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=rf"^on_policy\.{name}: got {value}; allowed: [^\n]+$"):
            OnPolicy(student, eos_token_id=1, **{name: value})
    with pytest.raises(UserError, match=r"^on_policy: no tokenizer and no eos_token_id[^\n]+$"):
        OnPolicy(student)
    batch = collate([row_of((9, 4), n=24, seed=1)]) | {"teacher_ids": torch.zeros(1, 24, 2, dtype=torch.long)}
    with pytest.raises(UserError, match=r"^on_policy: the batch has teacher_ids, [^\n]+ online teacher[^\n]+$"):
        OnPolicy(student, eos_token_id=1, share=0.01)(batch, 0)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_processes_agree_on_the_steps_and_sample_each_for_itself(make_student, tmp_path):
    student = make_student("gpt2")
    batch = collate([row_of((12, 5), n=24, seed=1)])

    def body(rank):
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path / 'store'}", rank=rank, world_size=2
        )
        on_policy = OnPolicy(student, share=0.5, max_new_tokens=12, eos_token_id=257, seed=3)
        made = [on_policy(batch, step) for step in range(6)]
        torch.save([None if m is batch else m["labels"] for m in made], tmp_path / f"{rank}.pt")
        torch.distributed.destroy_process_group()
        return 0

    assert [wait(pid) for pid in [fork(lambda rank=rank: body(rank)) for rank in (0, 1)]] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    sampled = [labels is not None for labels in first]
    assert sampled == [labels is not None for labels in second] and 0 < sum(sampled) < 6
    for a, b in zip(first, second, strict=True):
        assert a is None or not torch.equal(a, b)


def sampled_apart(student) -> list:
    """What this process samples with all of a student and with its part of it, and how many layers were whole at a
    time; the second of three processes has no prompt, the third more than the others."""
    rank = torch.distributed.get_rank()
    segments = [((7, 4),), (), ((7, 4), (3, 2), (9, 2))][rank]
    batch = collate([row_of(*segments, n=24, seed=rank), row_of((5, 5), n=24, seed=7)])
    asked = {"share": 1.0, "max_new_tokens": 6, "eos_token_id": 257}
    policies = [OnPolicy(student, temperature=heat, **asked) for heat in (0.0, 1.0)]
    expected = [policy(batch, 3)["input_ids"] for policy in policies]
    shard(student, init_device_mesh("cpu", (3,)))
    layers, most = decoder(student)[1], [0]

    def look(*_):
        most[0] = max(most[0], sum(not isinstance(module.weight, DTensor) for module in of_matrices))

    in_layers = [[m for m in layer.modules() if getattr(m, "weight", torch.ones(1)).dim() == 2] for layer in layers]
    of_matrices = [module for modules in in_layers for module in modules]
    for layer in layers:
        layer.register_forward_pre_hook(look)
    found = []
    for gather in (False, True):
        for policy in policies:
            policy.gather = gather
            found.append(policy(batch, 3)["input_ids"])
        if not gather:
            apart = most[0]
    parts = all(isinstance(module.weight, DTensor) for module in of_matrices)
    return [expected, found, apart, max(map(len, in_layers)), parts]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("kind", ["gpt2", "hybrid"])
def test_a_student_in_parts_samples_as_a_whole_one(kind, make_student, tmp_path):
    found = in_processes(tmp_path, 3, lambda rank: sampled_apart(make_student(kind).eval()))
    for rank, (expected, samples, apart, in_a_layer, parts) in enumerate(found):
        for one, other in zip([*expected, *expected], samples, strict=True):
            assert torch.equal(one, other), rank
        assert 0 < apart <= in_a_layer and parts  # of the whole layer that calls


@pytest.mark.parametrize("kind", ["gpt2", "hybrid"])
def test_only_ids_that_the_teacher_has_are_sampled(kind, make_student, make_llama):
    """Of a student with the larger vocabulary: its distribution over the shared ids, of which top_p takes its share."""
    student, vocab = make_student(kind).eval(), 40
    teacher = make_llama(seed=8, vocab_size=vocab, bos_token_id=1, eos_token_id=2)
    on_policy = OnPolicy(student, share=1, max_new_tokens=1, eos_token_id=2, seed=2, top_p=0.7)
    distiller = KnowledgeDistiller(teacher, student, on_policy=on_policy)
    batch = many()
    batch["input_ids"] %= vocab
    with torch.no_grad():
        p = student(batch["input_ids"][:1, :2]).logits[0, -1, :vocab].double().softmax(0)
    order = p.argsort(descending=True)
    p[order[p[order].cumsum(0) - p[order] >= 0.7]] = 0
    p /= p.sum()
    counts, steps = torch.zeros(vocab, dtype=torch.float64), 12
    for step in range(steps):
        made = distiller.prepare(batch, step)
        assert torch.isfinite(distiller.loss(made))  # an id beyond the teacher's embedding would be an IndexError
        counts += torch.bincount(made["labels"][made["labels"] != IGNORED], minlength=vocab)
    total = counts.sum()
    assert total == 16 * 8 * steps and counts[p == 0].sum() == 0
    assert ((counts / total - p).abs() <= 5 * (p * (1 - p) / total).sqrt() + 1 / total).all()


def test_a_prompt_that_the_student_cannot_read_is_said(make_student):
    student = make_student("llama")
    on_policy = OnPolicy(student, share=1, max_new_tokens=1, eos_token_id=2)
    batch = many()
    batch["input_ids"][0, 1] = 258
    with pytest.raises(UserError, match="^student: input_ids: got 258; .* 258 rows, for ids from 0 to 257"):
        on_policy(batch, 0)


def test_only_ids_that_the_tokenizer_has_are_sampled(make_student, make_llama, tokenizer):
    student = make_llama(vocab_size=300, initializer_range=0.4)
    with torch.no_grad():
        student.lm_head.weight[258:] *= 8  # rows that fill up the embedding, which training would have made unlikely
    sampled = {}
    for name, given in {"eos alone": {"eos_token_id": 257}, "tokenizer": {"tokenizer": tokenizer}}.items():
        made = OnPolicy(student, share=1, max_new_tokens=8, seed=1, **given)(many(), 0)
        sampled[name] = made["labels"].max().item()
    assert sampled["eos alone"] >= 258 > sampled["tokenizer"]


def test_an_end_that_the_teacher_does_not_have_is_refused(make_student, make_llama):
    on_policy = OnPolicy(make_student("gpt2"), eos_token_id=257)
    with pytest.raises(UserError, match=r"^on_policy: a sample would never end: the eos 257 is beyond the 40 tokens"):
        KnowledgeDistiller(make_llama(vocab_size=40, bos_token_id=1, eos_token_id=2), make_student("gpt2"),
                           on_policy=on_policy)  # fmt: skip


def chat_of(turns, n, seed, weight=1.0):
    """A row of one chat: (tokens of a question, tokens of its answer), ..."""
    row = row_of((sum(map(sum, turns)), 1), n=n, seed=seed, weights=[weight])
    begin = 0
    for question, answer in turns:
        row["labels"][begin : begin + question] = IGNORED
        begin += question + answer
    return row


def prompts_of(made, row):
    """(prompt, first sampled token's place) of each segment of a row of samples."""
    found = []
    for segment in range(int(made["segment_ids"][row].max()) + 1):
        here = made["segment_ids"][row] == segment
        first = int((made["labels"][row, here] != IGNORED).int().argmax())
        found.append(made["input_ids"][row, here][:first].tolist())
    return found


def test_every_turn_of_a_chat_is_asked_with_what_came_before_it(make_student):
    student = make_student("llama")
    row = chat_of([(3, 2), (2, 4), (4, 1)], n=64, seed=1, weight=0.5)
    batch = collate([row])
    made = OnPolicy(student, share=1, max_new_tokens=4, eos_token_id=257, pad_token_id=PAD)(batch, 0)
    ids = row["input_ids"].tolist()
    assert prompts_of(made, 0) == [ids[:3], ids[:7], ids[:15]]
    learned = made["labels"] != IGNORED
    assert (made["weights"][learned] == 0.5).all() and learned.sum() <= 3 * 4
    # greedily, each sample is what the student writes after the chat so far
    made = OnPolicy(student, share=1, max_new_tokens=4, temperature=0, eos_token_id=257, pad_token_id=PAD)(batch, 0)
    for segment, length in enumerate((3, 7, 15)):
        here = made["segment_ids"][0] == segment
        assert made["labels"][0, here][length:].tolist() == greedy(student, row["input_ids"][:length], 4, 257)


def test_turns_that_do_not_fit_have_their_chance(make_student):
    """A chat as long as its row, and another behind the first of two: each turn is asked at some step, none for two."""
    student = make_student("gpt2")
    batch = collate([chat_of([(3, 2), (2, 4), (4, 9)], n=24, seed=1)])
    on_policy = OnPolicy(student, share=1, max_new_tokens=6, eos_token_id=257, pad_token_id=PAD)
    ids, asked = batch["input_ids"][0].tolist(), []
    for step in range(40):
        made = on_policy(batch, step)
        assert made["input_ids"].shape[1] <= 24
        asked += [len(prompt) for prompt in prompts_of(made, 0)]
        assert all(prompt == ids[: len(prompt)] for prompt in prompts_of(made, 0))
    assert set(asked) == {3, 7, 15} and min(asked.count(k) for k in (3, 7, 15)) >= 8


def test_whatever_lies_behind_others_in_a_row_has_its_chance(make_student):
    """Packing puts the shorter ones behind the longer, again and again: of each row all prompts are drawn from."""
    on_policy = OnPolicy(make_student("gpt2"), share=1, max_new_tokens=6, eos_token_id=257, pad_token_id=PAD)
    first, second = chat_of([(3, 2), (2, 4)], n=11, seed=1), chat_of([(4, 3), (3, 3)], n=13, seed=2)
    chats = {name: torch.cat([first[name], second[name]]) for name in first}
    chats["segment_ids"][11:] = 1
    pairs = row_of((6, 3), (5, 3), (5, 2), (4, 2), (4, 2), n=24, seed=3)
    expected = {0: [(0, 3), (0, 7), (1, 4), (1, 10)], 1: [(0, 3), (1, 3), (2, 2), (3, 2), (4, 2)]}
    for which, row in enumerate((chats, pairs)):
        batch = collate([row])
        begins = [int((row["segment_ids"] == segment).int().argmax()) for segment in range(5)]
        texts = [row["input_ids"][begins[s] : begins[s] + length].tolist() for s, length in expected[which]]
        asked, steps = [0] * len(texts), 60
        for step in range(steps):
            made = on_policy(batch, step)
            assert made["input_ids"].shape[1] <= 24
            places = [texts.index(prompt) for prompt in prompts_of(made, 0)]
            assert places == sorted(set(places)) and 1 <= len(places) < len(texts)
            for place in places:
                asked[place] += 1
        assert min(asked) >= steps // 8, asked


def test_of_a_chat_whose_left_was_cut_within_an_answer_the_others_are_asked(make_student):
    row = chat_of([(3, 2), (2, 4)], n=40, seed=1)
    row["labels"][1:3] = row["input_ids"][1:3]  # an answer from the first token on, as truncation leaves it
    row["labels"][3] = IGNORED
    made = OnPolicy(make_student("llama"), share=1, max_new_tokens=4, eos_token_id=257)(collate([row]), 0)
    ids = row["input_ids"].tolist()
    assert prompts_of(made, 0) == [ids[:4], ids[:7]]
