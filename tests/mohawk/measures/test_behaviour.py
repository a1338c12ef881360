"""Retrieval, perplexity by position and continuations, each against its definition computed another way."""

import math
from types import SimpleNamespace

import pytest
import torch

from mohawk.losses.heads import Head
from mohawk.measures import retrieval as module
from mohawk.measures.behaviour import behaviour, prompts_of
from mohawk.measures.positions import by_position
from mohawk.measures.retrieval import found_by, haystacks, lengths_to, retrieval
from mohawk.measures.written import overlap_scores, perplexity_of, repeated, write, written


@pytest.fixture(scope="module")
def words():
    """A tokenizer with a token for each word of the texts, its space in front included."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from mohawk.measures.recall import WORDS

    plain = ["The", "code", "of", "is", "grass", "green", "sky", "blue", "sun", "yellow", "Here", "we", "go", "There"]
    known = dict.fromkeys([*WORDS, *plain, "and", "back", "again", ".", "\n", "<eos>"])
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="."))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" "), "removed"), pre_tokenizers.Split(Regex(r"[.\n]"), "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture
def looks_up(monkeypatch, words):
    """A function that makes a model, as far as `found_by` needs one, which says the word that stood after the same
    three in the last `window` tokens."""

    def hidden_states(model, batch, *, device, autocast=None):
        """One hot of the token that stood there, else of token 0."""
        ids = batch["input_ids"][0].tolist()
        states = torch.zeros(1, len(ids), len(words))
        for at in range(len(ids) - 1):
            seen = ids[max(0, at - model.window) : at + 1]
            key = ids[at - 2 : at + 1]  # "<word> <word> is"
            ends = [i for i in range(3, len(seen)) if seen[i - 3 : i] == key]
            states[0, at, seen[ends[0]] if ends else 0] = 1
        return states

    head = SimpleNamespace(frozen=lambda: SimpleNamespace(logits=lambda states: states))
    monkeypatch.setattr(module, "packed_hidden_states", hidden_states)
    monkeypatch.setattr(Head, "of", lambda model: head)
    return lambda window=10**6: SimpleNamespace(window=window, device=torch.device("cpu"))


@pytest.mark.parametrize("kind", module.KINDS)
def test_what_is_hidden_where(words, kind):
    (row, other) = haystacks(words, kind, 512, 2)
    assert row != other and haystacks(words, kind, 512, 2)[0] == row
    ids, answers = row
    assert 500 < len(ids) <= 512
    text, end = ids[: ids.index(words.convert_tokens_to_ids("\n"))], len(ids)
    asked = [(i, answers[i]) for i in range(end) if answers[i] >= 0]
    assert sorted(index for _, index in asked) == list(range(20)) and asked[0][0] > len(text)
    for at, index in asked:
        sentence = ids[at - 6 : at + 1]  # The code of <word> <word> is <word>
        (begin,) = [i for i in range(len(text)) if text[i : i + 7] == sentence]
        depth = begin / len(text)
        assert depth == pytest.approx(index // 4 / 4, abs=0.16 if index // 4 == 4 else 0.12), (index, depth)
    assert haystacks(words, kind, 100, 2) == []


def test_retrieval_counts_by_length_and_depth(words, looks_up):
    """A model that looks things up, and one that forgets what lies more than 300 tokens back."""
    model = looks_up()
    assert lengths_to(511) == [] and lengths_to(2047) == [512, 1024] and lengths_to(2048) == [512, 1024, 2048]
    models = {"teacher": model, "student": looks_up(window=300)}
    found = retrieval(models, dict.fromkeys(models, words), [512])["needle"]
    assert found["lengths"] == [512] and found["asked"] == [8] and found["teacher"] == [[1.0] * 5]
    (by_depth,) = found["student"]
    assert by_depth[0] == 0 and by_depth[4] == 1 and 0 < sum(by_depth) < 5
    right = round(8 * sum(by_depth))
    assert found["difference"] == pytest.approx(right / 40 - 1)
    share = right / 40
    assert found["difference_error"] == pytest.approx(math.sqrt(share * (1 - share) * 40 / 39 / 40))
    rows = haystacks(words, "pairs", 512, 1)
    assert found_by(model, rows) == [[True] * 20]


def test_perplexity_by_position_is_its_definition(make_llama):
    teacher, student = make_llama(0), make_llama(1)
    rows = torch.randint(0, 250, (2, 200), generator=torch.Generator().manual_seed(0))
    bins = by_position({"teacher": teacher, "student": student}, rows)
    assert [(b["first"], b["last"], b["tokens"]) for b in bins] == [(1, 127, 254), (128, 199, 144)]
    with torch.no_grad():
        for who, model in (("teacher", teacher), ("student", student)):
            logprobs = model(rows).logits.double().log_softmax(-1)
            nll = -logprobs[:, :-1].gather(2, rows[:, 1:, None])[..., 0]
            for b in bins:
                assert b[who] == pytest.approx(nll[:, b["first"] - 1 : b["last"]].mean().exp().item(), rel=1e-5)
    assert bins[1]["ratio"] == pytest.approx(bins[1]["student"] / bins[1]["teacher"])


def test_repetition_by_hand():
    assert repeated([1, 2, 3]) is None
    assert repeated([1, 2, 3, 4, 5]) == 0
    assert repeated([7] * 8) == pytest.approx(4 / 5)  # five runs of four, of which one is new
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_what_is_written_is_measured(make_llama, tokenizer):
    teacher, student = make_llama(0), make_llama(1)
    prompts = torch.randint(0, 250, (3, 8), generator=torch.Generator().manual_seed(0))
    eos = tokenizer.eos_token_id
    found = written({"teacher": teacher, "student": student}, tokenizer, prompts, 12)
    firsts, total, count = [], 0.0, 0
    for prompt in prompts:
        texts = []
        for model in (teacher, student):
            ids = prompt.tolist()
            while len(ids) < 20:
                with torch.no_grad():
                    best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                if best == eos:
                    break
                ids.append(best)
            texts.append(ids)
        with torch.no_grad():
            logprobs = teacher(torch.tensor([texts[1]])).logits[0].double().log_softmax(-1)
        total -= sum(float(logprobs[i - 1, texts[1][i]]) for i in range(8, len(texts[1])))
        count += len(texts[1]) - 8
        same = [a == b for a, b in zip(*(text[8:] for text in texts), strict=False)]
        firsts.append(same.index(False) if False in same else len(same))
    assert found["student"]["length"] == pytest.approx(count / 3)
    assert found["student"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["same"]["first"] == pytest.approx(sum(firsts) / 3)
    assert set(found["same"]["scores"]) == {"BLEU", "chrF", "ROUGE-L"}
    # a token that ends texts is not part of them
    first = write(teacher, prompts[:1], 12, [])[0]
    assert write(teacher, prompts[:1], 12, [first[3]])[0] == first[: first.index(first[3])]
    assert perplexity_of(teacher, prompts[:1], [[]]) is None


def test_overlap_scores_by_hand():
    same = overlap_scores(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert same == pytest.approx({"BLEU": 100, "chrF": 100, "ROUGE-L": 100})
    # the longest common subsequence of "a b c d" and "a c d e f g" is "a c d": F1 of 3/4 and 3/6
    assert overlap_scores(["a b c d"], ["a c d e f g"])["ROUGE-L"] == pytest.approx(60)


def test_behaviour_stays_within_the_models_positions(make_llama, tokenizer):
    models = {"teacher": make_llama(0), "student": make_llama(0)}
    rows = torch.randint(0, 250, (2, 400), generator=torch.Generator().manual_seed(0))
    both = dict.fromkeys(models, tokenizer)
    found = behaviour(models, both, {"held_out": rows}, longest=400, new_tokens=4)
    assert found["positions"]["held_out"][-1]["last"] == 255  # of 256 positions
    assert found["retrieval"] == {} and found["written"]["prompts"] == 8
    assert found["written"]["same"]["first"] == found["written"]["student"]["length"]  # the same model
    answers = found["written"]["answers"]
    logprob, tokens = (sum(answer[key] for answer in answers) for key in ("logprob", "tokens"))
    assert (len(answers), tokens / 8) == (8, found["written"]["student"]["length"])
    assert math.exp(-logprob / tokens) == pytest.approx(found["written"]["teacher"]["perplexity"])
    assert behaviour(models, both, {}, longest=400, new_tokens=4) == {"retrieval": {}, "positions": {}, "written": {}}
    assert prompts_of(torch.arange(70).view(2, 35)).tolist() == [list(range(32)), list(range(35, 67))]


def test_a_larger_student_writes_what_its_teacher_can_read(make_llama, tokenizer):
    """Each greedy choice is the most probable of the ids that both have."""
    teacher, student = make_llama(0), make_llama(1, vocab_size=320)
    with torch.no_grad():
        direction = torch.randn(32)
        student.lm_head.weight[300:302] = torch.stack([direction, -direction]) * 50  # one of both is always on top
    prompts = torch.randint(0, 250, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = student(prompts).logits[:, -1]
    assert bool((logits.argmax(-1) >= 258).all())
    texts = write(student, prompts, 1, [], 258)
    assert [text[0] for text in texts] == logits[:, :258].argmax(-1).tolist()
    found = written({"teacher": teacher, "student": student}, tokenizer, prompts, 6)
    assert math.isfinite(found["student"]["perplexity"])


def test_models_with_a_table_of_positions(tokenizer, caplog):
    """GPT-2, OPT and RoBERTa, whose tables begin at 2, read no token beyond their last position."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        OPTConfig,
        OPTForCausalLM,
        RobertaConfig,
        RobertaForCausalLM,
    )

    from mohawk.loading.causal import position_rows
    from mohawk.measures.compare import contexts_within, continuation, decode_speed

    ends = {"bos_token_id": 256, "eos_token_id": 257}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=40, n_embd=32, n_layer=1, n_head=2, **ends)).eval()
    opt = OPTConfig(
        vocab_size=258, max_position_embeddings=40, hidden_size=32, word_embed_proj_dim=32, ffn_dim=32,
        num_hidden_layers=1, num_attention_heads=2, **ends,
    )  # fmt: skip
    roberta = RobertaConfig(
        vocab_size=258, max_position_embeddings=42, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, is_decoder=True, pad_token_id=1, **ends,
    )  # fmt: skip
    for model in (gpt2, OPTForCausalLM(opt).eval(), RobertaForCausalLM(roberta).eval()):
        assert position_rows(model) == 40
        assert contexts_within([model], [37, 38, 512], 2) == [37] and "38, 512 not timed" in caplog.text
        assert decode_speed(model, [37], 2)[0].context == 37
        continuation(model, tokenizer, "word " * 7, 60), continuation(model, tokenizer, "word " * 20, 60)
        both, rows = {"teacher": model, "student": model}, torch.randint(0, 250, (2, 64))
        found = behaviour(both, dict.fromkeys(both, tokenizer), {"held_out": rows}, longest=64, new_tokens=60)
        assert found["written"]["tokens"] == 8 and found["positions"]["held_out"][-1]["last"] == 39
