import math

import numpy as np
import pytest
import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh

from mohawk.data.packing import BySource, PackedDataset, split_documents
from mohawk.data.text import TokenizedText
from mohawk.errors import UserError
from mohawk.losses.heads import Head
from mohawk.measures import compare as evaluate
from mohawk.measures.agreement import FIGURES, Tally
from mohawk.measures.compare import (
    Comparison,
    cache_bytes,
    compare,
    continuation,
    decode_speed,
    teacher_states,
)
from mohawk.models.sharding import shard
from mohawk.runs.tables import agreement_tables, kl_interval, ratio_interval
from tests.helpers.processes import in_processes

LENGTHS = [13, 40, 2, 1, 27, 9]  # one document has nothing to predict


@pytest.fixture
def dataset(tmp_path):
    """Six documents of random bytes in rows of 24, the last one padded."""
    tokens = np.random.default_rng(0).integers(0, 250, sum(LENGTHS))
    tokens.astype("<u2").tofile(tmp_path / "tokens.bin")
    np.save(tmp_path / "offsets.npy", np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64))
    np.save(tmp_path / "digests.npy", np.arange(len(LENGTHS), dtype="<u8"))
    (tmp_path / "meta.json").write_text('{"source": "made", "dtype": "<u2"}')
    return PackedDataset(split_documents([TokenizedText(tmp_path)])[0], 24)


def segments(dataset):
    for row in dataset:
        for segment in range(int(row["segment_ids"].max()) + 1):
            yield row["input_ids"][row["segment_ids"] == segment][None]


def by_definition(student, teacher, dataset, vocab=258) -> Comparison:
    """Each document piece alone, whole logits, float64; then plain Python over tokens and windows."""
    tokens, windows, runs = [], [], []
    for row in dataset:
        window = []
        for segment in range(int(row["segment_ids"].max()) + 1):
            ids = row["input_ids"][row["segment_ids"] == segment][None]
            with torch.no_grad():
                p, q = (m(ids).logits[0, :-1, :vocab].double().log_softmax(-1) for m in (teacher, student))
            runs.append([])
            for logp, logq, target in zip(p, q, ids[0, 1:], strict=True):
                both = zip(logp.exp().tolist(), logq.exp().tolist(), strict=True)
                tops = [set(log.sort(descending=True).indices[:5].tolist()) for log in (logp, logq)]
                window.append(
                    {
                        "kl": float((logp.exp() * (logp - logq)).sum()),
                        "nll": [-float(log[target]) for log in (logp, logq)],
                        "first": [int(log.argmax()) for log in (logp, logq)],
                        "confidence": [float(log.exp().max()) for log in (logp, logq)],
                        "target": int(target),
                        "overlap": len(tops[0] & tops[1]) / 5,
                    }
                )
                runs[-1].append(sum(min(a, b) for a, b in both))
        tokens += window
        windows.append(window)

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    def error(of):
        """Of a mean over tokens, from what windows leave of it."""
        whole = mean(map(of, tokens))
        left = [sum(of(token) - whole for token in window) for window in windows if window]
        return math.sqrt(sum(x**2 for x in left) * len(left) / (len(left) - 1)) / len(tokens) if left[1:] else None

    def calibration(who):
        bins = {}
        for token in tokens:
            bins.setdefault(math.ceil(token["confidence"][who] * 15), []).append(token)
        return sum(
            len(b) / len(tokens) * abs(mean(t["confidence"][who] - (t["first"][who] == t["target"]) for t in b))
            for b in bins.values()
        )

    def kept(k):
        """By what may happen: the first i of k tokens pass, and the next one does not."""
        found = []
        for run in runs:
            for start in range(len(run) - k + 1):
                pass_ = run[start : start + k]
                chances = [math.prod(pass_[:i]) * (1 - pass_[i]) for i in range(k)] + [math.prod(pass_)]
                found.append(sum(i * chance for i, chance in enumerate(chances)))
        return mean(found) if found else None

    t, s = (mean(token["nll"][who] for token in tokens) for who in (0, 1))
    right = [mean(token["first"][who] == token["target"] for token in tokens) for who in (0, 1)]
    return Comparison(
        len(tokens), math.exp(t), math.exp(s), math.exp(s - t), mean(token["kl"] for token in tokens),
        mean(token["first"][0] == token["first"][1] for token in tokens), error(lambda token: token["kl"]),
        error(lambda token: token["nll"][1] - token["nll"][0]), max(token["kl"] for token in tokens),
        mean(token["overlap"] for token in tokens), mean(chance for run in runs for chance in run),
        tuple(kept(k) for k in range(1, 9)), *right,
        *(mean(token["confidence"][who] for token in tokens) for who in (0, 1)), calibration(0), calibration(1),
    )  # fmt: skip


def close(ours: Comparison, truth: Comparison, rel=1e-4, least=1e-6) -> bool:
    def numbers(of: Comparison) -> dict[str, float]:
        found = {f"accepted {k}": value for k, value in enumerate(of.accepted, 1)} | vars(of)
        return {
            name: -1.0 if value is None else value
            for name, value in found.items()
            if name not in ("accepted", "sources")
        }

    return ours.tokens == truth.tokens and numbers(ours) == pytest.approx(numbers(truth), rel=rel, abs=least)


@pytest.mark.parametrize("rows", [1, 7, 256])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_comparison_is_its_definition(dataset, make_llama, monkeypatch, rows, batch_size):
    monkeypatch.setattr(evaluate, "ROWS", rows)
    teacher, student = make_llama(0), make_llama(1)
    ours = compare(student, teacher_states(teacher, dataset, batch_size=batch_size))
    truth = by_definition(student, teacher, dataset)
    assert close(ours, truth)
    assert truth.kl > 0.1 and truth.tokens == sum(len(s[0]) - 1 for s in segments(dataset))


def test_each_source_by_itself_is_its_definition(tmp_path, make_llama):
    """Two texts whose documents share rows, the second one named as a third: one source of two texts."""
    texts = []
    for i, name in enumerate(["prose", "code", "prose"]):
        folder, lengths = tmp_path / str(i), LENGTHS[2 * i : 2 * i + 2]
        folder.mkdir()
        np.random.default_rng(i).integers(0, 250, sum(lengths)).astype("<u2").tofile(folder / "tokens.bin")
        np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        np.save(folder / "digests.npy", np.arange(len(lengths), dtype="<u8") + 10 * i)
        (folder / "meta.json").write_text(f'{{"source": "{name}", "dtype": "<u2"}}')
        texts.append(TokenizedText(folder))
    rows = BySource(split_documents(texts)[0], 24)
    plain = PackedDataset(rows.documents, 24)
    for row, same in zip(rows, plain, strict=True):
        assert all(torch.equal(row[name], same[name]) for name in same)
        assert torch.equal(row["sources"] == -1, row["segment_ids"] == -1)
    assert len(rows.sources) == 2
    teacher, student = make_llama(), make_llama(hidden_size=32)
    figures = {name: [] for name in rows.sources}
    for row in rows:
        for segment in range(int(row["segment_ids"].max()) + 1):
            here = row["segment_ids"] == segment
            (source,) = set(row["sources"][here].tolist())
            with torch.no_grad():
                ids = row["input_ids"][here][None]
                p, q = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (teacher, student))
            target = ids[0, 1:, None]
            kl, nll = (p.exp() * (p - q)).sum(-1), [-x.gather(1, target)[:, 0] for x in (p, q)]
            same = (p.argmax(-1) == q.argmax(-1)).double()
            figures[rows.sources[source]].append(torch.stack([kl, *nll, same], 1))
    found = compare(student, teacher_states(teacher, rows, batch_size=2))
    assert sum(its["tokens"] for its in found.sources.values()) == found.tokens
    for name, parts in figures.items():
        kl, teachers, students, same = torch.cat(parts).mean(0).tolist()
        its = found.sources[name]
        assert its["tokens"] == len(torch.cat(parts))
        assert its["kl"] == pytest.approx(kl, rel=1e-4)
        assert its["teacher_perplexity"] == pytest.approx(math.exp(teachers), rel=1e-4)
        assert its["student_perplexity"] == pytest.approx(math.exp(students), rel=1e-4)
        assert its["perplexity_ratio"] == pytest.approx(math.exp(students - teachers), rel=1e-4)
        assert its["top1_agreement"] == pytest.approx(same)
    title, header, cells = agreement_tables({"evaluation": vars(found)})[0]
    assert title == "By source: text of another source" and [row[0] for row in cells] == list(rows.sources)
    assert " to " in cells[0][4] and " to " in cells[0][5]
    assert compare(student, teacher_states(teacher, plain)).sources == {}


def test_a_model_equals_itself(dataset, make_llama):
    model = make_llama().train()
    same = compare(model, teacher_states(model, dataset))
    assert (same.perplexity_ratio, same.kl, same.top1_agreement) == (1.0, 0.0, 1.0)
    assert model.training  # left as it was


def test_a_hybrid_keeps_documents_apart(dataset, make_llama):
    from mohawk.models.from_teacher import hybrid_from_teacher

    teacher = make_llama()
    student = hybrid_from_teacher(teacher, [1]).eval()
    ours = compare(student, teacher_states(teacher, dataset))
    assert close(ours, by_definition(student, teacher, dataset))


FAMILIES = {
    "Gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "Phi": {},  # a bias in the head
    "Qwen2": {"tie_word_embeddings": True},
    "Bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "attn_layer_indices": [0]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_familys_logits(dataset, make_llama, family):
    shape = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**shape, **FAMILIES[family])
    ).eval()
    if family == "Phi":
        torch.nn.init.normal_(model.lm_head.bias)
    if family == "Bamba":  # recurrent without segments: only unpacked rows are its own
        dataset.documents = type(dataset.documents)(dataset.documents.texts, dataset.documents.spans[1:2])
        dataset.__init__(dataset.documents, 40)
    teacher = make_llama()
    assert close(compare(model, teacher_states(teacher, dataset)), by_definition(model, teacher, dataset))
    assert close(compare(teacher, teacher_states(model, dataset)), by_definition(teacher, model, dataset))


def test_a_head_with_another_formula_is_refused(dataset, make_llama):
    model = make_llama()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(UserError, match="does more to its logits"):
        teacher_states(model, dataset)


def test_padded_vocabularies_compare_what_both_have(dataset, make_llama):
    teacher, student = make_llama(0), make_llama(1, vocab_size=320)
    ours = compare(student, teacher_states(teacher, dataset))
    assert close(ours, by_definition(student, teacher, dataset, vocab=258))


def test_half_precision_states_and_autocast_stay_near(dataset, make_llama):
    teacher, student = make_llama(0), make_llama(1)
    truth = by_definition(student, teacher, dataset)
    states = teacher_states(teacher, dataset, autocast=torch.bfloat16)
    assert close(compare(student, states, autocast=torch.bfloat16), truth, rel=0.1, least=0.005)
    states = teacher_states(make_llama(0).bfloat16(), dataset)
    assert states.hidden[0].dtype == torch.bfloat16
    assert close(compare(make_llama(1).bfloat16(), states), truth, rel=0.1, least=0.005)


def test_a_broken_student_is_reported_not_hidden(dataset, make_llama):
    student = make_llama()
    with torch.no_grad():
        student.model.layers[0].mlp.down_proj.weight.fill_(math.nan)
    assert math.isnan(compare(student, teacher_states(make_llama(), dataset)).student_perplexity)
    far = make_llama()
    far.lm_head.weight.data.mul_(1e5)
    assert compare(far, teacher_states(make_llama(), dataset)).student_perplexity == math.inf


def test_logits_are_never_whole(dataset, make_llama, monkeypatch):
    largest = 0
    linear = torch.nn.functional.linear

    def watch(x, weight, *args):
        nonlocal largest
        if len(weight) == 258:
            largest = max(largest, x.numel() // x.shape[-1])
        return linear(x, weight, *args)

    monkeypatch.setattr(evaluate, "ROWS", 5)
    monkeypatch.setattr(torch.nn.functional, "linear", watch)
    compare(make_llama(1), teacher_states(make_llama(0), dataset, batch_size=4))
    assert 0 < largest <= 5


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_a_teachers_head_is_not_kept_whole(dataset, make_llama, tmp_path):
    """It would be there in float32 for as long as a run, beside every text and on every process."""
    teacher = make_llama().bfloat16()
    assert teacher_states(teacher, dataset).head.weight.data_ptr() == teacher.lm_head.weight.data_ptr()

    def in_parts(rank):
        teacher = make_llama(0)
        shard(teacher, init_device_mesh("cpu", (2,)), trains=False)
        states = teacher_states(teacher, dataset, batch_size=3)
        assert len(states.head.weight.to_local()) == 258 // 2
        return compare(make_llama(1), states)

    truth = by_definition(make_llama(1), make_llama(0), dataset)
    assert all(close(ours, truth) for ours in in_processes(tmp_path, 2, in_parts))


def test_a_text_that_predicts_nothing(dataset, make_llama):
    dataset.documents.spans[:, 2] = dataset.documents.spans[:, 1] + 1
    with pytest.raises(UserError, match="predicts no token"):
        teacher_states(make_llama(), PackedDataset(dataset.documents, 8))


def test_head_of_a_model_without_one(make_llama):
    with pytest.raises(UserError, match="has no output embedding"):
        Head.of(make_llama().model)


@pytest.mark.parametrize("chunk", [3, 16])
def test_state_bytes_count_keys_values_and_states(make_llama, chunk):
    from mohawk.models.from_teacher import hybrid_from_teacher

    teacher = make_llama()
    kv = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8, float32: bytes a token and layer
    speeds = decode_speed(teacher, [8, 20], new_tokens=2, chunk=chunk)
    assert [s.state_bytes for s in speeds] == [8 * kv * 2, 20 * kv * 2]
    assert all(s.tokens_per_s > 0 for s in speeds) and [s.context for s in speeds] == [8, 20]
    pure = decode_speed(hybrid_from_teacher(teacher, [0, 1]), [8, 20], new_tokens=2, chunk=chunk)
    assert pure[0].state_bytes == pure[1].state_bytes > 0
    half = decode_speed(hybrid_from_teacher(teacher, [0]), [8, 20], new_tokens=2, chunk=chunk)
    assert [s.state_bytes for s in half] == [
        8 * kv + pure[0].state_bytes // 2,
        20 * kv + pure[0].state_bytes // 2,
    ]


@pytest.mark.parametrize("family", ["Qwen2", "Bamba", "Gemma2"])
def test_any_family_decodes(family):
    shape = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**shape, **FAMILIES[family])
    speeds = decode_speed(getattr(transformers, f"{family}ForCausalLM")(config), [8, 24], 2, chunk=8)
    # from 8 to 24 tokens only keys and values of attention layers grow
    attention = 1 if family == "Bamba" else 2
    assert speeds[1].state_bytes - speeds[0].state_bytes == 16 * attention * 2 * 2 * 8 * 4


def test_what_is_timed_is_decoding_without_gradients(make_llama):
    """With them steps are slower, other kernels run, and the cache keeps a graph of all before it."""
    model = make_llama()
    recorded = []
    model.register_forward_hook(lambda module, given, output: recorded.append(output.logits.requires_grad))
    evaluate.decode_speed(model, [5], 2)
    assert len(recorded) == 4 and not any(recorded)


def test_shared_storage_counts_once():
    a = torch.zeros(10)
    holder = type("Layer", (), {})()
    holder.keys, holder.other, holder.flag, holder.empty = (
        a,
        [a, {"b": torch.zeros(3, dtype=torch.bfloat16)}],
        1,
        None,
    )
    holder.count, holder.self = torch.zeros(4, dtype=torch.int64), holder
    assert cache_bytes(holder) == 40 + 6


def test_continuation_is_greedy_and_without_the_prompt(make_llama, tokenizer):
    model = make_llama()
    ids = tokenizer("Once upon", return_tensors="pt").input_ids
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(ids[0, 9:], skip_special_tokens=True)
    model.generation_config.temperature, model.generation_config.do_sample = (
        0.7,
        True,
    )  # as instruct models have
    assert continuation(model, tokenizer, "Once upon", 5) == expected
    with pytest.raises(UserError, match="evaluation.prompt"):
        continuation(model, tokenizer, "", 5)


def test_what_a_draft_keeps_by_hand():
    """Two pieces of text in a row, of 3 and 2 tokens to predict, and one more row of 1."""
    from mohawk.measures.agreement import drafted

    predicting = torch.tensor([[1, 1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0]]).bool()
    kept = torch.tensor([0.5, 0.8, 0.25, 1.0, 0.5, 0.1], dtype=torch.float64)
    found = drafted(kept, predicting)
    one = [0.5, 0.8, 0.25, 1.0, 0.5, 0.1]
    two = [0.5 + 0.4, 0.8 + 0.2, 1.0 + 0.5]
    three = [0.5 + 0.4 + 0.1]
    assert found[0].tolist() == pytest.approx([sum(one), sum(two), sum(three), 0, 0, 0, 0, 0])
    assert found[1].tolist() == [6, 3, 1, 0, 0, 0, 0, 0]


def test_calibration_by_hand():
    """Four tokens at 90 % of which three are right, one at 20 % that is not: (4/5) |0.75 - 0.9| + (1/5) 0.2."""
    figures = torch.zeros(5, len(FIGURES), dtype=torch.float64)
    for column, values in {"student_confidence": [0.9] * 4 + [0.2], "student_right": [1, 1, 1, 0, 0]}.items():
        figures[:, FIGURES.index(column)] = torch.tensor(values, dtype=torch.float64)
    tally = Tally()
    tally.add(figures, torch.ones(1, 5).bool())
    assert tally.shared(torch.device("cpu")).calibration_error("student") == pytest.approx(0.16)


def test_errors_of_what_is_not_finite_are_not_zero():
    """A NaN among windows: its error is not known, and the tables say so."""
    tally, figures = Tally(), torch.rand(6, len(FIGURES), dtype=torch.float64)
    figures[4, FIGURES.index("kl")] = math.nan
    tally.add(figures, torch.ones(3, 2, dtype=torch.bool))
    assert math.isnan(tally.kl_error) and tally.log_ratio_error > 0
    found = {"kl": math.nan, "kl_error": tally.kl_error, "perplexity_ratio": 1.0, "log_ratio_error": None}
    assert kl_interval(found) == "not finite" and ratio_interval(found) == "-"
