"""A local teacher's answers: greedy, beams, or sampled from a random stream that belongs to each answer alone.

Sampling goes by the inverse of the distribution function, with one uniform number per token from a stream seeded by
(seed, prompt, sample). So an answer depends neither on the batch it was made in (but for what another width of padding
rounds otherwise), nor on how many answers came before it.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mohawk.core.precision import MOST, device_bytes
from mohawk.core.processes import count, from_first, several, wish
from mohawk.data.chat import chat_template, ends_of_turn
from mohawk.data.messages import Messages, as_messages
from mohawk.data.records import Prompt
from mohawk.data.text import tokenizer_key
from mohawk.errors import UserError
from mohawk.generation.conversations import TURNS, conversation
from mohawk.loading.causal import context_length, plain_model
from mohawk.loading.configs import check_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mohawk.loading.causal import PlainCausalLM

METHODS = ("greedy", "beam", "sample")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a teacher answers.

    method: greedy, beam (the `samples` best of `beams`) or sample (at `temperature`, from the smallest set of tokens
    with `top_p` of the mass). samples: answers per prompt. max_new_tokens: of an answer, its end included.
    """

    method: str = "greedy"
    samples: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    beams: int = 4
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"method: got {self.method!r}; allowed: {', '.join(METHODS)}")
        for name, low in (("samples", 1), ("max_new_tokens", 1), ("beams", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise UserError(f"{name}: got {getattr(self, name)}; allowed: at least {low}")
        if not 0.001 <= self.temperature < math.inf:
            raise UserError(f"temperature: got {self.temperature}; allowed: at least 0.001 (greedy has none)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: got {self.top_p}; allowed: above 0, up to 1")
        if self.method == "greedy" and self.samples > 1:
            raise UserError(f"samples: got {self.samples}, but greedy decoding has one answer; set a temperature")
        if self.method == "beam" and self.samples > self.beams:
            raise UserError(f"samples: got {self.samples} of {self.beams} beams; ask for no more than there are beams")

    def settings(self) -> dict[str, Any]:
        """What decides the answers, without what the method does not use."""
        used = {"greedy": (), "beam": ("beams",), "sample": ("temperature", "top_p")}[self.method]
        return {k: v for k, v in asdict(self).items() if k in ("method", "samples", "max_new_tokens", *used)}

    def seed_of(self, prompt: Prompt, sample: int) -> int:
        """The seed of one answer, below 2^31 (some endpoints take no larger one)."""
        digest = hashlib.sha256(f"{self.seed} {prompt.id} {prompt.sha256} {sample}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class Response:
    """One answer of a teacher.

    text: without special tokens. tokens: how many were generated, the end of text included; None where an endpoint
    does not say. finish_reason: stop, length, or an endpoint's own word. logprob: the sum of the teacher's own
    log-probabilities (temperature 1, the whole vocabulary) of those tokens. sampling_logprob: the same of the
    distribution that was sampled from. Either is None where it is not known. error: why there is no answer, or None.
    messages: of a whole conversation, what was said before its last answer, of whose answers these numbers are sums.
    """

    text: str
    tokens: int | None = None
    finish_reason: str | None = None
    logprob: float | None = None
    sampling_logprob: float | None = None
    error: str | None = None
    messages: Messages | None = None


class LocalTeacher:
    """A causal language model on this machine.

    model, tokenizer: as `mohawk.loading.models` loads them; model may be any with transformers' `generate`, in eval
    mode.
    batch_size: sequences at once (beams count). chat: texts are a user's message, put through the chat template.
    turns: what of a chat is answered, its end ("last") or each user's turn in sequence ("all"; not with beams).
    name, revision: what the answers say that they are from. Raises UserError for a model that is no decoder, and for a
    chat without a template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        *,
        batch_size: int = 8,
        chat: bool = False,
        turns: str = "last",
        name: str | None = None,
        revision: str | None = None,
    ):
        check_decoder(model, "teacher")
        check_turns(turns, decoding)
        self.name, self.revision = name or model.name_or_path or type(model).__name__, revision
        self.model, self.tokenizer, self.decoding = plain_model(model), tokenizer, decoding
        self.batch_size, self.chat, self.turns = batch_size, chat, turns
        if chat and not tokenizer.chat_template:
            raise UserError(
                "chat: this tokenizer has no chat template; leave chat out, or take an instruction-tuned model"
            )
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        ends = [*ends, tokenizer.eos_token_id, *(ends_of_turn(tokenizer) if chat else ())]
        self.ends = sorted({e for e in ends if e is not None})
        self.limit = context_length(model)

    def identity(self) -> dict[str, Any]:
        """What tells this teacher from others; all of it decides its answers."""
        from mohawk.loading.model_hash import teacher_hash

        what = {"name": self.name, "revision": self.revision, "hash": teacher_hash(self.model)[:16]}
        what |= {
            "tokenizer_hash": tokenizer_key(self.tokenizer)[:16],
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }
        if self.chat:
            what["chat_template_hash"] = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()[:16]
        return {**what, "chat": self.chat, **({"turns": self.turns} if self.turns != "last" else {})}

    def prompts_apart(self) -> int:
        """How many prompts, counted from the list's beginning, have batches of their own."""
        if self.decoding.method == "beam":
            return max(1, self.batch_size // self.decoding.beams)
        return self.batch_size // math.gcd(self.batch_size, self.decoding.samples)

    def responses(
        self, prompts: Sequence[Prompt], first: int = 0, stop: int | None = None
    ) -> Generator[tuple[int, list[Response]], None, None]:
        """(i, answers) of prompts[i] for i = first, first + 1, ... before `stop`, `samples` answers each.

        The batches are cut from the whole list, wherever it starts and stops: a batch that was answered in part is made
        anew as it was.
        """
        n = self.decoding.samples
        stop = len(prompts) if stop is None else stop
        if self.decoding.method == "beam":
            per_batch = max(1, self.batch_size // self.decoding.beams)
            for begin in range(first - first % per_batch, stop, per_batch):
                batch = range(begin, min(begin + per_batch, len(prompts)))
                answers = self._answer([(prompts[i], 0) for i in batch])
                for k, i in enumerate(batch):
                    if first <= i < stop:
                        yield i, answers[k * n : (k + 1) * n]
            return
        row = first * n
        done: list[Response] = []  # answers of the prompt that is under way
        prompt = first
        for begin in range(row - row % self.batch_size, stop * n, self.batch_size):
            rows = range(begin, min(begin + self.batch_size, len(prompts) * n))
            answers = self._answer([(prompts[r // n], r % n) for r in rows])
            for r, answer in zip(rows, answers, strict=True):
                if not row <= r < stop * n:
                    continue
                done.append(answer)
                if len(done) == n:
                    yield prompt, done
                    prompt, done = prompt + 1, []

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids that the model sees before its answer."""
        if isinstance(prompt.content, str) and not self.chat:
            ids = self.tokenizer(prompt.content)["input_ids"]
            # some tokenizers end every text, and nothing is left to say after the end
            while len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
                ids.pop()
        else:
            template, messages = chat_template(self.tokenizer, prompt.where), as_messages(prompt.content)
            text = template.prompt(messages, prompt.where, prompt.tools)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"{prompt.where}: has no tokens, and this tokenizer adds no first one; give some words")
        return ids

    def _answer(self, asked: list[tuple[Prompt, int]]) -> list[Response]:
        """Answers of one batch: one per (prompt, sample), or `samples` per prompt with beams."""
        if self.turns == "last":
            return self._answer_once(asked)
        talks = [conversation(prompt) for prompt, _ in asked]
        waiting = {k: next(talk) for k, talk in enumerate(talks)}  # what each asks next
        done: dict[int, Response] = {}
        while waiting:
            answers = self._answer_once([(prompt, asked[k][1]) for k, prompt in waiting.items()])
            for k, answer in zip(list(waiting), answers, strict=True):
                try:
                    waiting[k] = talks[k].send(answer)
                except StopIteration as end:
                    done[k] = end.value
                    del waiting[k]
        return [done[k] for k in range(len(asked))]

    @torch.no_grad()
    def _answer_once(self, asked: list[tuple[Prompt, int]]) -> list[Response]:
        encoded = [self.encode(prompt) for prompt, _ in asked]
        room = [self.limit is None or len(ids) + self.decoding.max_new_tokens <= self.limit for ids in encoded]
        fitting = [k for k, fits in enumerate(room) if fits]
        per = self.decoding.samples if self.decoding.method == "beam" else 1
        made = iter(self._generate([asked[k] for k in fitting], [encoded[k] for k in fitting]) if fitting else ())
        answers = []
        for ids, fits in zip(encoded, room, strict=True):
            error = f"too long for the model: {len(ids)} + {self.decoding.max_new_tokens} new tokens, of {self.limit}"
            answers += [next(made) if fits else Response("", 0, "error", error=error) for _ in range(per)]
        return answers

    def _generate(self, asked: list[tuple[Prompt, int]], encoded: list[list[int]]) -> list[Response]:
        decoding = self.decoding
        longest, device = max(map(len, encoded)), self.model.device
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else (self.ends[0] if self.ends else 0)
        input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in encoded], device=device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded], device=device)
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": decoding.max_new_tokens}
        chooser = None
        if decoding.method == "beam":
            options |= {"num_beams": decoding.beams, "num_return_sequences": decoding.samples}
        else:
            uniforms = None
            if decoding.method == "sample":
                streams = [np.random.default_rng(decoding.seed_of(*one)) for one in asked]
                uniforms = np.stack([stream.random(decoding.max_new_tokens) for stream in streams])
                uniforms = torch.from_numpy(uniforms).to(device)
            chooser = Chooser(uniforms, decoding.temperature, decoding.top_p)
            options["logits_processor"] = [chooser]
        with _plain_generation(self.model, self.ends, pad):
            # of several processes with parts of a model, whoever deals batches to them sees to who calls it when
            out = self.model.generate(input_ids, attention_mask=mask, synced_gpus=False, **options)
        made = out[:, longest:].tolist()
        answers = []
        for k, row in enumerate(made):
            which = k * len(asked) // len(made)
            end = next((i for i, token in enumerate(row) if token in self.ends), None)
            row = row if end is None else row[: end + 1]
            if chooser is None:
                logprob, sampling = sequence_logprob(self.model, encoded[which], row), None
            else:
                logprob, sampling = chooser.sums(k, len(row))
            if not math.isfinite(logprob):
                raise UserError(f"{asked[which][0].where}: the teacher's logits are not finite; try another dtype")
            text = response_text(self.tokenizer, encoded[which], row)
            answers.append(Response(text, len(row), "length" if end is None else "stop", logprob, sampling))
        return answers


def local_teacher(
    model: str,
    decoding: Decoding,
    *,
    dtype: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    batch_size: int = 8,
    chat: bool = False,
    turns: str = "last",
) -> LocalTeacher:
    """A LocalTeacher from a folder, run, .gguf file or hub id. dtype None: float32 on a CPU, else the checkpoint's.

    Raises UserError as `mohawk.loading.models.load_teacher` does.
    """
    import mohawk.models.hybrid  # noqa: F401  makes the Auto classes know hybrids
    from mohawk.data.tokenizers.same_tokenizer import teacher_tokenizer
    from mohawk.loading.describe import student_folder
    from mohawk.loading.models import load_teacher

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use cpu, or see `mohawk doctor`")
    name = student_folder(model)
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, "who": ""}
    reader = teacher_tokenizer(name, tokenizer=tokenizer, option="--tokenizer", **where)
    # bfloat16 is what checkpoints are saved in and what few CPUs are fast at
    dtype = dtype or ("float32" if device == "cpu" else "auto")
    spread = _spread(name, dtype, torch.device(device), where) if several() else None
    loaded = load_teacher(name, dtype=dtype, device=device, spread=spread, **where)
    return LocalTeacher(
        loaded, reader, decoding, batch_size=batch_size, chat=chat, turns=turns, name=str(model), revision=revision
    )


def check_turns(turns: str, decoding: Decoding) -> None:
    """UserError where so many turns of a chat cannot be answered."""
    if turns not in TURNS:
        raise UserError(f"turns: got {turns!r}; allowed: {', '.join(TURNS)}")
    if turns == "all" and decoding.method == "beam":
        raise UserError(
            "turns: all with beams: each answer goes on from one before it; use greedy decoding or sampling"
        )


def _spread(name: str, dtype: str, device: torch.device, where: dict[str, Any]) -> Callable[[Any], None] | None:
    """What brings a model into parts on all processes, where it does not fit into one of them; None where it does."""
    from torch.distributed.device_mesh import init_device_mesh

    from mohawk.loading.configs import load_config
    from mohawk.loading.models import model_shape, parameter_count
    from mohawk.models.sharding import shard

    shape = model_shape(load_config(name, **where), where["trust_remote_code"])
    needed = parameter_count(shape) * (4 if dtype == "float32" else 2)
    if not from_first(lambda: wish() is not None or needed > MOST * device_bytes(device)):
        return None
    mesh = init_device_mesh(device.type, (count(),))
    return lambda model: shard(model, mesh, trains=False)


class Chooser:
    """A logits processor that chooses each next token, and leaves generate's argmax no other.

    uniforms: (rows, steps) float64 in [0, 1), or None to take the likeliest. Keeps its choices' log-probabilities.
    """

    def __init__(self, uniforms: Tensor | None, temperature: float, top_p: float):
        self.uniforms, self.temperature, self.top_p = uniforms, temperature, top_p
        self.logprobs: list[Tensor] = []
        self.sampling: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = scores.float().log_softmax(-1)
        if self.uniforms is None:
            chosen = logprobs.argmax(-1, keepdim=True)
        else:
            chosen, sampling = choose_tokens(
                logprobs, self.uniforms[:, len(self.logprobs)], self.temperature, self.top_p
            )
            self.sampling.append(sampling.squeeze(-1))
        self.logprobs.append(logprobs.gather(-1, chosen).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)

    def sums(self, row: int, steps: int) -> tuple[float, float | None]:
        """The first `steps` choices' log-probability of one row: the model's, and the one sampled from."""
        own, sampled = (
            float(torch.stack(kept[:steps])[:, row].double().sum()) if kept else None
            for kept in (self.logprobs, self.sampling)
        )
        assert own is not None  # at least one step was made
        return own, sampled


def choose_tokens(logprobs: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Tokens at the place `uniform` of the tempered nucleus's distribution function, and their log-probabilities.

    logprobs: (b, V). uniform: (b,) in [0, 1). Returns ids (b, 1) int64 and log-probabilities (b, 1) float64. The
    nucleus is the smallest set of likeliest tokens with at least `top_p` of the tempered mass (Holtzman et al. 2020).
    """
    probs = (logprobs.double() / temperature).softmax(-1)
    order = None
    if top_p < 1:
        probs, order = _likeliest(probs, top_p)
    below = probs.cumsum(-1)
    # the first token is kept whatever top_p is
    kept = (below < top_p).sum(-1, keepdim=True).clamp(max=probs.shape[-1] - 1) if order is not None else None
    mass = below[:, -1:] if kept is None else below.gather(-1, kept)
    place = torch.searchsorted(below, uniform[:, None].to(below) * mass, right=True)
    # rounding may lead past the last token that has any mass
    last = (probs > 0).cumsum(-1).argmax(-1, keepdim=True) if kept is None else kept
    place = torch.minimum(place, last)
    chosen = place if order is None else order.gather(-1, place)
    return chosen, (probs.gather(-1, place) / mass).log()


def _likeliest(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, at least `top_p` of the mass, in falling order and equal ones by their ids: (b, k) twice.

    Sorting a whole vocabulary costs a small model as much as its forward; a nucleus is nearly always far smaller.
    """
    for k in (256, 4096):
        if k >= probs.shape[-1]:
            break
        top, ids = probs.topk(k)
        # which of those equal to the last one are among the k is chance
        if (top.masked_fill(top <= top[:, -1:], 0).sum(-1) >= top_p + 1e-9).all():
            ids, by_id = ids.sort(dim=-1)
            top, order = top.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
            return top, ids.gather(-1, order)
    return probs.sort(dim=-1, descending=True, stable=True)


@torch.no_grad()
def sequence_logprob(model: PreTrainedModel, prompt_ids: list[int], response_ids: list[int]) -> float:
    """log p(response | prompt) of the model itself, summed over the response's tokens in float64."""
    ids = torch.tensor([prompt_ids + response_ids], device=model.device)
    n = len(response_ids)
    few = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits = model(ids, **({"logits_to_keep": n + 1} if few else {})).logits[0, -n - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, ids[0, -n:, None]).double().sum().item()


def response_text(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], response_ids: list[int]) -> str:
    """The response's text as it continues the prompt's: decoded alone, some tokenizers drop its first space."""

    def text_of(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # of one sequence
        return text

    before, whole = text_of(prompt_ids), text_of(prompt_ids + response_ids)
    return whole[len(before) :] if whole.startswith(before) else text_of(response_ids)


@contextmanager
def _plain_generation(model: PlainCausalLM, ends: list[int], pad: int) -> Iterator[None]:
    """Within the block the checkpoint's own generation settings (a temperature, a penalty) are not in force."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=pad)
    try:
        yield
    finally:
        model.generation_config = own
