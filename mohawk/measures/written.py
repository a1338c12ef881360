"""What a model writes: how long, how often it repeats itself, what its teacher thinks of it, how near it is to what the
teacher writes after the same prompts.

Likelihood of given text hides this: every mistake of a text that a model writes itself is in what comes after it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mohawk.loading.causal import embedding_rows
from mohawk.losses.heads import Head, vocabulary_rows
from mohawk.measures.compare import exp, packed_hidden_states, room_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawk.loading.causal import CausalLM

GRAM = 4  # tokens in a row that count as a repetition when they come again


def write(
    model: CausalLM, prompts: Tensor, new_tokens: int, eos: Sequence[int], vocab_size: int | None = None
) -> list[list[int]]:
    """A model's greedy continuations of prompts of the same length, (prompts, n) token ids, each up to the first of the
    tokens that end a text, which is not in it. vocab_size: no id from it on is written."""
    known = vocabulary_rows(model)
    beyond = None if vocab_size is None else list(range(vocab_size, known)) or None
    with torch.inference_mode():
        # pyrefly: ignore[not-callable]  # a method of the class that mixes it in
        ids = model.generate(
            prompts.to(model.device), attention_mask=torch.ones_like(prompts).to(model.device),
            max_new_tokens=new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
            eos_token_id=list(eos) or None, pad_token_id=eos[0] if eos else 0, suppress_tokens=beyond,
        )  # fmt: skip
    made = []
    for row in ids[:, prompts.shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in eos), len(row))
        made.append(row[:end])
    return made


def repeated(tokens: Sequence[int]) -> float | None:
    """The share of a text's runs of GRAM tokens that stood in it before; None of a shorter one."""
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


@torch.no_grad()
def logprobs_of(model: CausalLM, prompts: Tensor, texts: Sequence[Sequence[int]]) -> list[float]:
    """log p of each continuation given its prompt, under a model, nats; 0 of an empty one."""
    head, sums = Head.of(model).frozen(), []
    for prompt, text in zip(prompts, texts, strict=True):
        if not text:
            sums.append(0.0)
            continue
        row = torch.cat([prompt, torch.tensor(text, dtype=prompt.dtype)])[None]
        batch = {"input_ids": row, "position_ids": torch.arange(row.shape[1])[None]}
        hidden = packed_hidden_states(model, batch, device=model.device)[0, len(prompt) - 1 : -1]
        logprobs = head.logits(hidden).log_softmax(-1)
        targets = torch.tensor(text, device=logprobs.device)
        sums.append(float(logprobs.gather(1, targets[:, None]).double().sum()))
    return sums


def perplexity_of(model: CausalLM, prompts: Tensor, texts: Sequence[Sequence[int]]) -> float | None:
    """A model's perplexity of continuations, given their prompts; None where all are empty."""
    count = sum(map(len, texts))
    return exp(-sum(logprobs_of(model, prompts, texts)) / count) if count else None


def overlap_scores(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU and chrF (sacrebleu) and mean ROUGE-L F1 (rouge-score), 0 to 100; of those that are installed."""
    scores: dict[str, float] = {}
    if find_spec("sacrebleu") is not None:
        import sacrebleu

        scores["BLEU"] = sacrebleu.corpus_bleu(list(hypotheses), [list(references)]).score
        scores["chrF"] = sacrebleu.corpus_chrf(list(hypotheses), [list(references)]).score
    if find_spec("rouge_score") is not None:
        from rouge_score.rouge_scorer import RougeScorer

        scorer, pairs = RougeScorer(["rougeL"]), zip(references, hypotheses, strict=True)
        scores["ROUGE-L"] = 100 * statistics.fmean(scorer.score(*pair)["rougeL"].fmeasure for pair in pairs)
    return scores


def written(
    models: Mapping[str, CausalLM], tokenizer: PreTrainedTokenizerBase, prompts: Tensor, new_tokens: int
) -> dict[str, Any]:
    """Greedy continuations of (prompts, n) token ids by teacher and student, with the same tokenizer.

    Only ids that both models can read are written, and no more than both have positions for.

    Returns {"prompts", "tokens" (the most that were asked for), "teacher", "student", "same", "answers"}. Of each:
    mean `length` and share `ended` (by a token that ends texts), `repeated` and the teacher's `perplexity`. same:
    `first`, how many tokens agree before the first that differs, mean; `scores` of `overlap_scores`, the student's text
    against the teacher's. answers: what the student wrote, as `mohawk watch` reads it: `prompt`, `response`, `tokens`
    and `logprob`, the sum of the student's own of these tokens.
    """
    eos = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    new_tokens = min(new_tokens, *(room_for(model, prompts.shape[1]) for model in models.values()))
    if new_tokens == 0:
        return {}
    shared = min(map(embedding_rows, models.values()))
    texts = {who: write(model, prompts, new_tokens, eos, shared) for who, model in models.items()}
    told: dict[str, Any] = {"prompts": len(prompts), "tokens": new_tokens}
    for who, found in texts.items():
        shares = [share for text in found if (share := repeated(text)) is not None]
        told[who] = {
            "length": statistics.fmean(map(len, found)),
            "ended": statistics.fmean(len(text) < new_tokens for text in found),
            "repeated": statistics.fmean(shares) if shares else None,
            "perplexity": perplexity_of(models["teacher"], prompts, found),
        }
    first = [_agree(a, b) for a, b in zip(texts["teacher"], texts["student"], strict=True)]
    plain = {
        who: [str(tokenizer.decode(text, skip_special_tokens=True)) for text in found] for who, found in texts.items()
    }
    told["same"] = {"first": statistics.fmean(first), "scores": overlap_scores(plain["student"], plain["teacher"])}
    own = logprobs_of(models["student"], prompts, texts["student"])
    asked = [str(tokenizer.decode(prompt, skip_special_tokens=True)) for prompt in prompts.tolist()]
    told["answers"] = [
        {"prompt": prompt, "response": response, "tokens": len(text), "logprob": logprob}
        for prompt, response, text, logprob in zip(asked, plain["student"], texts["student"], own, strict=True)
    ]
    return told


def _agree(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
