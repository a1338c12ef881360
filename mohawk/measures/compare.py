"""How close a student is to its teacher, and what it costs to run: perplexity, KL, state size, speed.

The teacher runs once: its final hidden states are kept, and each later comparison only multiplies them by the
head again. Logits are float32 and never whole: a few hundred rows at a time go through both heads.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mohawk.core.processes import count, from_all, rank
from mohawk.data.next_tokens import IGNORED
from mohawk.data.packing import collate
from mohawk.errors import UserError
from mohawk.loading.causal import plain_model, position_rows
from mohawk.losses.heads import Head, final_hidden_states
from mohawk.losses.tasks import CAUSAL_LM, Task
from mohawk.measures.agreement import FIGURES, Tally, token_figures
from mohawk.measures.classes import f1, roc_auc
from mohawk.models.call import CACHE
from mohawk.models.sharding import reshard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mohawk.loading.causal import CausalLM

log = logging.getLogger(__name__)

WHO = ("teacher", "student")
ROWS = 256  # through the heads at once: 256 x 49152 float32 logits are 50 MB a side


@dataclass(frozen=True)
class TeacherStates:
    """A teacher's answers on an evaluation text, of which each process has its share of the batches.

    batches: packed batches as `collate` gives them, equally many on all processes. hidden: for each batch, the final
    hidden state (rows, hidden) of every position that predicts a token, in the teacher's dtype. head: the teacher's
    own, in parts where that is. tokens: how many are predicted, on all processes together. sources: names of the texts
    that the batches' column of this name counts.
    """

    batches: list[dict[str, Tensor]]
    hidden: list[Tensor]
    head: Head
    tokens: int
    task: Task = CAUSAL_LM
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Student against teacher on the same text: perplexities, mean KL(teacher || student) in nats per token,
    and the share of tokens whose most probable continuation is the same. tokens: how many were predicted.

    Attributes:
        kl_error, log_ratio_error: standard errors of `kl` and of the log of `perplexity_ratio`, by windows of text.
        worst_kl: the largest KL of a token, nats.
        top5_overlap: the share of the five most probable tokens that both have.
        acceptance: mean of 1 - TV: how often a token drawn from the student passes as a draft for the teacher.
        accepted: of 1, 2, ... tokens drafted in a row, how many are kept on average, along the text.
        teacher_accuracy, student_accuracy: the share of tokens that were the most probable.
        teacher_confidence, student_confidence: mean probability of the most probable token.
        teacher_calibration, student_calibration: expected calibration error, in bins of confidence.
        teacher_f1, student_f1, teacher_roc_auc, student_roc_auc: of classes (`mohawk.measures.classes`).
        sources: where the text is of several sources, those above up to `log_ratio_error`, and the accuracies, of each
            one's tokens, by its name.

    Of masked words, tokens are those; of classes, they are texts and perplexities are exp(cross entropy).
    """

    tokens: int
    teacher_perplexity: float
    student_perplexity: float
    perplexity_ratio: float
    kl: float
    top1_agreement: float
    kl_error: float | None = None
    log_ratio_error: float | None = None
    worst_kl: float | None = None
    top5_overlap: float | None = None
    acceptance: float | None = None
    accepted: tuple[float | None, ...] = ()
    teacher_accuracy: float | None = None
    student_accuracy: float | None = None
    teacher_confidence: float | None = None
    student_confidence: float | None = None
    teacher_calibration: float | None = None
    student_calibration: float | None = None
    teacher_f1: float | None = None
    student_f1: float | None = None
    teacher_roc_auc: float | None = None
    student_roc_auc: float | None = None
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class DecodeSpeed:
    """Greedy decoding of one sequence after `context` tokens: median tokens/s, and the cache's size."""

    context: int
    tokens_per_s: float
    state_bytes: int


@torch.no_grad()
def teacher_states(
    teacher: PreTrainedModel,
    dataset: Any,
    *,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    task: Task = CAUSAL_LM,
) -> TeacherStates:
    """Run the teacher over a packed dataset once and keep its final hidden states (on the CPU); all processes do so,
    each with its share.

    device: where the teacher is (default: where its parameters are). autocast: a dtype for its matrix
    products, or None for the parameters' own. task: what the teacher is for. Raises UserError when the dataset predicts
    no token.
    """
    device = torch.device(device) if device is not None else teacher.device
    batches = list(dealt_batches(dataset, batch_size))
    reshard(teacher)
    head = task.head(teacher).detached()  # a copy in float32 would be there for as long as the run
    hidden = []
    with evaluating(teacher):
        for batch in batches:
            states = _states(task, teacher, batch, device, autocast)
            hidden.append(states[_predicting(task, batch).to(device)].cpu())
    reshard(teacher)
    tokens = sum(from_all(sum(len(h) for h in hidden)))
    if not tokens:
        raise UserError("evaluation: the text predicts no token; give at least two tokens of it")
    return TeacherStates(batches, hidden, head, tokens, task, getattr(dataset, "sources", ()))


def dealt_batches(dataset: Any, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """This process's batches of a packed dataset, one after the other in turn. Who has one less than others has one
    more, of which every token is padding: a sharded model is run by all."""
    together = getattr(dataset, "collate", collate)
    starts = range(0, len(dataset), batch_size)
    own = [starts[i] for i in range(rank(), len(starts), count())]
    for start in own:
        yield together([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
    if len(own) < -(-len(starts) // count()):
        spare = together([dataset[0]])
        padding = {name: value for name, value in {"labels": IGNORED, "segment_ids": -1}.items() if name in spare}
        yield {**spare, **{name: torch.full_like(spare[name], value) for name, value in padding.items()}}


@torch.no_grad()
def compare(
    student: CausalLM,
    states: TeacherStates,
    *,
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
) -> Comparison:
    """How close a student is over every predicted token, by all processes together.

    Where the vocabularies differ in padding, the entries both have are compared.
    """
    device = torch.device(device) if device is not None else student.device
    reshard(student)
    task = states.task
    student_head, teacher_head = task.head(student).frozen(), states.head.frozen().to(device)
    vocab = min(len(student_head.weight), len(teacher_head.weight))
    sources = states.sources if len(states.sources) > 1 else ()
    tally, told, apart = Tally(), [], {name: Tally() for name in sources}
    with evaluating(student):
        for batch, teacher_hidden in zip(states.batches, states.hidden, strict=True):
            hidden = _states(task, student, batch, device, autocast)
            predicting = _predicting(task, batch)
            student_hidden = hidden[predicting.to(device)]
            targets = task.labels(batch)[predicting].to(device)
            if task.name == "classification":
                both = teacher_head.logits(teacher_hidden.to(device)), student_head.logits(student_hidden)
                told.append([targets.cpu(), *(logits.double().softmax(-1).cpu() for logits in both)])
            figures = [torch.empty(0, len(FIGURES), dtype=torch.float64, device=device)]
            for start in range(0, len(targets), ROWS):
                rows = slice(start, start + ROWS)
                figures.append(
                    token_figures(
                        teacher_head.logits(teacher_hidden[rows].to(device))[:, :vocab],
                        student_head.logits(student_hidden[rows])[:, :vocab],
                        targets[rows],
                    )
                )
            of_batch = torch.cat(figures)
            tally.add(of_batch, predicting)
            for i, one in enumerate(apart.values()):
                its = batch["sources"] == i
                one.add(of_batch[its[predicting].to(device)], predicting & its)
    reshard(student)
    every = tally.shared(device)
    shared = {name: one.shared(device) for name, one in apart.items()}
    return Comparison(
        tokens=states.tokens,
        **_means(every),
        sources={name: {"tokens": int(one.tokens), **_means(one)} for name, one in shared.items() if one.tokens},
        worst_kl=every.worst_kl,
        top5_overlap=every.mean("overlap"),
        # of what writes no text there are no drafts
        acceptance=every.mean("kept") if task is CAUSAL_LM else None,
        accepted=tuple(every.accepted) if task is CAUSAL_LM else (),
        **{f"{who}_confidence": every.mean(f"{who}_confidence") for who in WHO},
        **{f"{who}_calibration": every.calibration_error(who) for who in WHO},
        **_of_classes(told),
    )


def _of_classes(told: list[list[Tensor]]) -> dict[str, Any]:
    """F1 and areas under ROC curves, of what all processes were told: labels, and both models' probabilities."""
    everything = [part for one in from_all(told) for part in one]
    if not everything:
        return {}
    labels, *probabilities = (torch.cat(parts) for parts in zip(*everything, strict=True))
    found: dict[str, Any] = {}
    for who, p in zip(WHO, probabilities, strict=True):
        broken = not bool(p.isfinite().all())
        found[f"{who}_f1"] = math.nan if broken else f1(p.argmax(-1), labels, p.shape[1])
        found[f"{who}_roc_auc"] = math.nan if broken else roc_auc(p, labels)
    return found


def _means(tally: Tally) -> dict[str, Any]:
    """The first figures of a `Comparison`."""
    teacher_nll, student_nll = tally.mean("teacher_nll"), tally.mean("student_nll")
    return {
        "teacher_perplexity": exp(teacher_nll),
        "student_perplexity": exp(student_nll),
        "perplexity_ratio": exp(student_nll - teacher_nll),
        "kl": tally.mean("kl"),
        "top1_agreement": tally.mean("same"),
        "kl_error": tally.kl_error,
        "log_ratio_error": tally.log_ratio_error,
        **{f"{who}_accuracy": tally.mean(f"{who}_right") for who in WHO},
    }


def exp(nats: float) -> float:
    """e to that power; infinity where a float ends."""
    return math.inf if nats > 700 else math.exp(nats)  # NaN stays NaN


def _predicting(task: Task, batch: dict[str, Tensor]) -> Tensor:
    """Bool (batch, positions): those at which something is predicted, that is, which have a label."""
    return task.labels(batch) != IGNORED


def _states(
    task: Task, model: CausalLM, batch: dict[str, Tensor], device: torch.device, autocast: torch.dtype | None
) -> Tensor:
    """What goes into a model's head at each position of a batch."""
    if task is CAUSAL_LM:
        return packed_hidden_states(model, batch, device=device, autocast=autocast)
    inputs = {name: column.to(device) for name, column in task.inputs_of(model, batch).items()}
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        return task.states(model, inputs)


def packed_hidden_states(
    model: CausalLM,
    batch: dict[str, Tensor],
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """What the model gives its output embedding for a packed batch, (batch, sequence, hidden).

    The positions restart in every segment, by which transformers' models know that a row is packed. Raises UserError
    as `mohawk.losses.heads.final_hidden_states`.
    """
    inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        return final_hidden_states(model, inputs)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode; then it is as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def contexts_within(models: Sequence[CausalLM], contexts: Sequence[int], new_tokens: int) -> list[int]:
    """The contexts that `decode_speed` can measure with all of these models; those left out are logged."""
    fitting = [context for context in contexts if all(room_for(model, context) > new_tokens for model in models)]
    if beyond := [f"{context:,}" for context in contexts if context not in fitting]:
        log.warning(
            "evaluation.contexts: %s not timed, with %d tokens more they are beyond a model's last position",
            ", ".join(beyond), new_tokens,
        )  # fmt: skip
    return fitting


@torch.inference_mode()
def decode_speed(
    model: CausalLM,
    contexts: Sequence[int],
    new_tokens: int = 32,
    *,
    chunk: int = 512,
    seed: int = 0,
) -> list[DecodeSpeed]:
    """Median speed of greedy decoding after each context length, batch 1, and the cache's bytes by then.

    The context is random tokens, prefilled `chunk` at a time; its time is not counted, nor is one warm-up
    step. state_bytes are those of all the cache's tensors right after the context: keys and values, conv and
    recurrent states.
    """
    generator = torch.Generator().manual_seed(seed)
    speeds = []
    with evaluating(model):
        for context in contexts:
            ids = torch.randint(
                plain_model(model).config.get_text_config().vocab_size, (1, context), generator=generator
            )
            decoding = _Decoding(model, ids, chunk)
            size = cache_bytes(decoding.cache)
            times = [decoding.step() for _ in range(new_tokens + 1)]
            speeds.append(DecodeSpeed(context, 1 / statistics.median(times[1:]), size))
    return speeds


@torch.inference_mode()
def decode_ratio(
    model: CausalLM, beside: CausalLM, context: int, pairs: int = 48, *, chunk: int = 512, seed: int = 0
) -> float:
    """How long a step of greedy decoding takes, as a share of another model's on the same device: the median over pairs
    of steps, one right after the other and each first in every second pair, so that what else the machine does bears on
    both alike. Batch 1, after `context` random tokens; one pair comes first and does not count."""
    words = [plain_model(one).config.get_text_config().vocab_size for one in (model, beside)]
    ids = torch.randint(min(words), (1, context), generator=torch.Generator().manual_seed(seed))
    ratios = []
    with evaluating(model), evaluating(beside):
        mine, other = _Decoding(model, ids, chunk), _Decoding(beside, ids, chunk)
        for i in range(pairs + 1):
            if i % 2:
                took = mine.step()
                of = other.step()
            else:
                of = other.step()
                took = mine.step()
            ratios.append(took / of)
    return statistics.median(ratios[1:])


class _Decoding:
    """Greedy decoding after ids (1, n), which are prefilled `chunk` at a time."""

    def __init__(self, model: CausalLM, ids: Tensor, chunk: int):
        self.model, self.position = model, ids.shape[1]
        output, self.cache = None, None
        for start in range(0, self.position, chunk):
            output = _step(model, ids[:, start : start + chunk].to(model.device), start, self.cache)
            self.cache = output[CACHE]
        assert output is not None  # a context has a token
        self.token = output.logits[:, -1:].argmax(-1)

    def step(self) -> float:
        """Decode a token; the seconds that it took."""
        _synchronize(self.model.device)
        begin = time.perf_counter()
        output = _step(self.model, self.token, self.position, self.cache)
        self.token = output.logits[:, -1:].argmax(-1)
        _synchronize(self.model.device)
        took = time.perf_counter() - begin
        self.cache, self.position = output[CACHE], self.position + 1
        return took


def _step(model: CausalLM, ids: Tensor, start: int, cache: Any) -> Any:
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    return model(input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=1, **{CACHE: cache})


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def cache_bytes(cache: Any) -> int:
    """Bytes of all floating-point tensors in a cache, whatever its layers call them; shared storage once."""
    storages: dict[int, int] = {}
    todo, visited = [cache], set()
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            if item.is_floating_point() and item.numel():
                size = item.numel() * item.element_size()
                storages[item.data_ptr()] = max(storages.get(item.data_ptr(), 0), size)
        elif id(item) not in visited:
            visited.add(id(item))
            if isinstance(item, dict):
                todo += item.values()
            elif isinstance(item, (list, tuple)):
                todo += item
            elif hasattr(item, "__dict__") and not isinstance(item, (type, nn.Module)):
                todo += vars(item).values()
    return sum(storages.values())


def room_for(model: CausalLM, tokens: int) -> int:
    """How many tokens a model can write after so many; no bound where it computes positions."""
    rows = position_rows(model)
    return 2**31 if rows is None else max(0, rows - tokens)


@torch.inference_mode()
def continuation(model: CausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = 60) -> str:
    """The model's greedy continuation of `prompt`, without it, as far as its positions go.

    Raises UserError for an empty prompt.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise UserError("evaluation.prompt: this tokenizer makes no token of it; give some words")
    new_tokens = min(new_tokens, room_for(model, length))
    if new_tokens == 0:
        return ""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with evaluating(model):
        # pyrefly: ignore[not-callable]  # a method of the class that mixes it in
        ids = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
        )
    return cast(str, tokenizer.decode(ids[0, length:], skip_special_tokens=True))
