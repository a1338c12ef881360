"""A local teacher's answers against generate itself and against probabilities computed by hand."""

import numpy as np
import pytest
import torch

from mohawk.data.records import Prompt
from mohawk.errors import UserError
from mohawk.generation.decoding import Decoding, LocalTeacher, choose_tokens, response_text, sequence_logprob

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def prompts(*texts) -> list[Prompt]:
    return [Prompt(f"{i:x}", f"{i:064x}", text, f"p:{i + 1}") for i, text in enumerate(texts)]


TEXTS = ("a", "the second prompt", "three", "and the fourth one, longer", "x y")


@pytest.fixture(scope="module")
def model(make_llama):
    return make_llama()


def answers(model, tokenizer, decoding, batch_size=4, first=0, texts=TEXTS, **options):
    return dict(
        LocalTeacher(model, tokenizer, decoding, batch_size=batch_size, **options).responses(prompts(*texts), first)
    )


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        x.text == y.text
        and x.tokens == y.tokens
        and x.finish_reason == y.finish_reason
        and abs(x.logprob - y.logprob) < 1e-3
        for i in a
        for x, y in zip(a[i], b[i], strict=True)
    )


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(max_new_tokens=12),
        Decoding(method="sample", samples=3, max_new_tokens=12, temperature=0.7, top_p=0.9),
        Decoding(method="beam", samples=2, beams=3, max_new_tokens=12),
    ],
    ids=lambda d: d.method,
)
def test_answers_do_not_depend_on_the_batch_or_on_where_it_starts(model, tokenizer, decoding):
    whole = answers(model, tokenizer, decoding)
    assert list(whole) == list(range(5)) and {len(a) for a in whole.values()} == {decoding.samples}
    assert same(whole, answers(model, tokenizer, decoding, batch_size=1))
    for first in (1, 2, 4):  # bit for bit: the batches are the same ones
        later = answers(model, tokenizer, decoding, first=first)
        assert later == {i: a for i, a in whole.items() if i >= first}


@pytest.mark.parametrize("kind", ["gpt2", "hybrid"])
def test_other_models_answer_padded_prompts_as_alone(kind, make_llama, tokenizer):
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(1)
        config = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
        model = GPT2LMHeadModel(config).eval()
    else:
        from mohawk.models.from_teacher import hybrid_from_teacher

        model = hybrid_from_teacher(make_llama(), ssm_layers=[1], mixer="mamba2").eval()
    for decoding in (Decoding(max_new_tokens=8), Decoding(method="sample", samples=2, max_new_tokens=8, top_p=0.95)):
        together = answers(model, tokenizer, decoding, batch_size=8)
        assert same(together, answers(model, tokenizer, decoding, batch_size=1))


def test_greedy_and_beams_are_generates_own(model, tokenizer):
    """With the checkpoint's own generation settings in the way, which must not count and must still be there after."""
    ids = torch.tensor([tokenizer(TEXTS[1])["input_ids"]])
    greedy = model.generate(ids, do_sample=False, max_new_tokens=10, pad_token_id=257)[0, ids.shape[1] :]
    beams = model.generate(ids, num_beams=4, num_return_sequences=3, max_new_tokens=10, pad_token_id=257)[
        :, ids.shape[1] :
    ]
    own = model.generation_config
    try:
        model.generation_config = type(own)(repetition_penalty=5.0, do_sample=True, top_k=3, eos_token_id=257)
        found = answers(model, tokenizer, Decoding(max_new_tokens=10))[1][0]
        searched = answers(model, tokenizer, Decoding(method="beam", samples=3, max_new_tokens=10))[1]
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config = own
    assert found.text == tokenizer.decode(greedy, skip_special_tokens=True)
    assert [r.text for r in searched] == [tokenizer.decode(b, skip_special_tokens=True) for b in beams]


def test_logprobs_are_the_models_in_float64(make_llama, tokenizer):
    model = make_llama(initializer_range=0.5)
    double = make_llama(initializer_range=0.5).double()
    for decoding in (
        Decoding(max_new_tokens=9),
        Decoding(method="sample", samples=2, max_new_tokens=9, temperature=2.0, top_p=0.8),
        Decoding(method="beam", samples=2, beams=2, max_new_tokens=9),
    ):
        teacher = LocalTeacher(model, tokenizer, decoding, batch_size=4)
        kept = {}
        real, teacher.model = model.generate, model
        model.generate = lambda *a, real=real, kept=kept, **k: kept.setdefault("ids", real(*a, **k))
        try:
            ((_, found),) = teacher.responses(prompts(TEXTS[1]))
        finally:
            del model.generate
        n = len(tokenizer(TEXTS[1])["input_ids"])
        for row, response in zip(kept["ids"], found, strict=True):
            row = row[: n + response.tokens]
            logits = double(row[None]).logits[0, n - 1 : -1]
            each = logits.log_softmax(-1).gather(-1, row[n:, None])
            assert response.logprob == pytest.approx(each.sum().item(), abs=1e-4)
            if decoding.method == "sample":
                tempered, order = (logits / 2.0).softmax(-1).sort(dim=-1, descending=True)
                total = 0.0
                for t in range(response.tokens):
                    size = int((tempered[t].cumsum(0) < 0.8).sum()) + 1
                    inside = order[t, :size].tolist()
                    assert row[n + t] in inside
                    total += (tempered[t, inside.index(row[n + t])] / tempered[t, :size].sum()).log().item()
                assert response.sampling_logprob == pytest.approx(total, abs=1e-4)
            else:
                assert response.sampling_logprob is None


def test_the_end_is_counted_but_not_said(make_llama, tokenizer):
    model = make_llama()
    first = answers(model, tokenizer, Decoding(max_new_tokens=6))[0][0]
    assert (first.finish_reason, first.tokens) == ("length", 6)
    # whatever it says third is now an end
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    said = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=257)[0, ids.shape[1] :].tolist()
    stop = next(i for i in range(1, 6) if said[i] not in said[:i])
    model.generation_config.eos_token_id = [said[stop], 257]
    cut = answers(model, tokenizer, Decoding(max_new_tokens=6))[0][0]
    assert (cut.finish_reason, cut.tokens) == ("stop", stop + 1)
    assert cut.logprob == pytest.approx(sequence_logprob(model, ids[0].tolist(), said[: stop + 1]), abs=1e-4)


def test_choose_is_the_inverse_distribution_function():
    probs = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2])
    logprobs = probs.log().expand(5, -1)
    u = torch.tensor([0.0, 0.09, 0.11, 0.79, 0.9999999])
    chosen, logp = choose_tokens(logprobs, u, 1.0, 1.0)
    assert chosen.squeeze(-1).tolist() == [0, 0, 1, 3, 4]
    assert logp.squeeze(-1).exp().tolist() == pytest.approx([0.1, 0.1, 0.4, 0.3, 0.2])
    # the nucleus of 0.6 is 0.4 + 0.3
    chosen, logp = choose_tokens(logprobs, u, 1.0, 0.6)
    assert chosen.squeeze(-1).tolist() == [1, 1, 1, 3, 3]
    assert logp[0].exp().item() == pytest.approx(4 / 7)
    # a top-p below the likeliest token's mass leaves that token; one just below a sum takes no more than the sum
    assert choose_tokens(logprobs, u, 1.0, 1e-9)[0].squeeze(-1).tolist() == [1] * 5
    grid = (torch.arange(4000) + 0.5) / 4000
    chosen, _ = choose_tokens(probs.log().expand(4000, -1), grid, 0.5, 1.0)
    share = torch.bincount(chosen.squeeze(-1), minlength=5) / 4000
    assert torch.allclose(share, probs**2 / (probs**2).sum(), atol=1e-3)


def test_a_nucleus_is_the_same_without_sorting_the_vocabulary(monkeypatch):
    """Also with the many equal logits of bfloat16, and whatever the other rows of the batch need."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 3.0, 4.0, 6.0, 9.0])[:, None]  # from flat to peaked: all three ways are taken
    logprobs = (torch.randn(6, 9000, generator=generator) * scale).bfloat16().float().log_softmax(-1)
    uniform = torch.rand(6, generator=generator, dtype=torch.float64)
    for top_p in (0.05, 0.5, 0.9, 0.999):
        alone = [choose_tokens(logprobs[i : i + 1], uniform[i : i + 1], 0.8, top_p) for i in range(6)]
        together = choose_tokens(logprobs, uniform, 0.8, top_p)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "topk", lambda probs, k: (probs[:, :k] * 0, probs[:, :k]))  # never enough
            sorted_all = choose_tokens(logprobs, uniform, 0.8, top_p)
        for chosen in (together, tuple(torch.cat(parts) for parts in zip(*alone, strict=True))):
            assert torch.equal(chosen[0], sorted_all[0])
            assert torch.allclose(chosen[1], sorted_all[1], atol=1e-12, rtol=0)


def test_samples_come_in_the_models_proportions(make_llama, tokenizer):
    model = make_llama(initializer_range=0.5)
    n = 2000
    found = answers(
        model, tokenizer, Decoding(method="sample", samples=n, max_new_tokens=1), batch_size=1000, texts=["ab"]
    )[0]
    ids = torch.tensor([tokenizer("ab")["input_ids"]])
    probs = model(ids).logits[0, -1].double().softmax(-1)
    expected = {tokenizer.decode([i], skip_special_tokens=True): 0.0 for i in range(258)}
    for i, p in enumerate(probs.tolist()):
        expected[tokenizer.decode([i], skip_special_tokens=True)] += p
    for text, p in expected.items():
        seen = sum(r.text == text for r in found) / n
        assert abs(seen - p) < 5 * np.sqrt(p * (1 - p) / n) + 1e-3, text


def test_seeds_differ_by_prompt_sample_and_seed():
    one, two = prompts("a", "b")
    seeds = {Decoding(seed=s).seed_of(p, i) for s in (0, 1) for p in (one, two) for i in range(50)}
    assert len(seeds) == 200 and max(seeds) < 2**31


def test_a_chat_goes_through_the_template(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    teacher = LocalTeacher(model, tokenizer, Decoding(), chat=True)
    plain = LocalTeacher(model, tokenizer, Decoding())
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    (text,) = prompts("hi")
    assert tokenizer.decode(teacher.encode(text)) == "<user>hi\n<assistant>"
    assert tokenizer.decode(plain.encode(text)) == "hi"
    assert tokenizer.decode(plain.encode(Prompt("0", "0", messages, "p:1"))) == "<system>s\n<user>hi\n<assistant>"
    assert teacher.identity() != plain.identity()
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('only user turns') }}")
    with pytest.raises(UserError, match="p:1: the chat template refuses these messages: only user turns"):
        plain.encode(Prompt("0", "0", messages, "p:1"))
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        LocalTeacher(model, tokenizer, Decoding(), chat=True)
    with pytest.raises(UserError, match="p:1: a chat, but this tokenizer has no chat template"):
        plain.encode(Prompt("0", "0", messages, "p:1"))


def test_a_prompt_too_long_for_the_model_is_an_error_of_its_own(model, tokenizer):
    found = answers(model, tokenizer, Decoding(max_new_tokens=10), texts=["short", "x" * 250, "y" * 246])
    assert [a[0].error for a in found.values()] == [None, "too long for the model: 250 + 10 new tokens, of 256", None]
    alone = answers(model, tokenizer, Decoding(max_new_tokens=10), texts=["short", "y" * 246])
    assert [found[0][0].text, found[2][0].text] == [alone[0][0].text, alone[1][0].text]


def test_broken_logits_are_an_error(make_llama, tokenizer):
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match="p:1: the teacher's logits are not finite"):
        answers(model, tokenizer, Decoding(max_new_tokens=3))


def test_continuation_keeps_the_first_space():
    class Dropping:
        """Decodes as sentencepiece does: the first piece's space is dropped."""

        def decode(self, ids, **_):
            return "".join({1: " the", 2: " cat", 3: " sat"}[i] for i in ids).removeprefix(" ")

    assert response_text(Dropping(), [1, 2], [3]) == " sat"


def test_identities_tell_teachers_apart(make_llama, tokenizer):
    def identity(model, **options):
        return LocalTeacher(model, tokenizer, Decoding(), **options).identity()

    model = make_llama()
    assert identity(model) == identity(make_llama()) == identity(model, batch_size=3)
    others = [identity(make_llama(seed=1)), identity(make_llama().bfloat16()), identity(model, name="x")]
    assert all(other != identity(model) for other in others)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "best"}, "method: got 'best'; allowed: greedy, beam, sample"),
        ({"samples": 0}, "samples: got 0; allowed: at least 1"),
        ({"samples": 2}, "samples: got 2, but greedy decoding has one answer; set a temperature"),
        ({"method": "beam", "samples": 5}, "samples: got 5 of 4 beams; ask for no more than there are beams"),
        ({"temperature": 0.0}, "temperature: got 0.0; allowed: at least 0.001 (greedy has none)"),
        ({"top_p": 1.5}, "top_p: got 1.5; allowed: above 0, up to 1"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(UserError) as error:
        Decoding(**settings)
    assert str(error.value) == message
