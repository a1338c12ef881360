"""On-policy distillation (GKD, Agarwal et al. 2023, arXiv 2306.13649): the student learns on what it writes itself.

With probability `share` (the paper's lambda) a step's batches keep their prompts and the student writes the rest. The
teacher then judges the student's own tokens, so training sees the mistakes that generation will make.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mohawk.core.processes import several
from mohawk.data.next_tokens import IGNORED
from mohawk.errors import UserError
from mohawk.loading.causal import plain_model
from mohawk.loading.configs import check_decoder
from mohawk.losses.heads import readable_ids, vocabulary_rows
from mohawk.models.sharding import called_apart, is_sharded, whole_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mohawk.loading.causal import CausalLM

# Columns a batch of samples has as well: of each token, and of each row.
OF_TOKENS = ("input_ids", "position_ids", "segment_ids", "labels", "weights", "task")
OF_ROWS = ("source", "teacher", "row")
MASK = "attention_mask"  # of other collators' batches


@dataclass(frozen=True)
class PromptPlace:
    """Where a prompt lies, `batch[row, begin : begin + length]`, how many tokens may follow, their weight and task."""

    row: int
    begin: int
    length: int
    limit: int
    weight: float
    task: int


class OnPolicy:
    """Replaces batches by the student's own samples: `batch = on_policy(batch, step)`, before its tokens are counted.

    A prompt is what comes before a labelled part of a segment: before the response of a prompt/response pair, before
    each answer of a chat with all turns until then. Where the second token has a label already (plain text), it is the
    first `prompt_tokens` tokens. Where a row has no room for all of its prompts with `max_new_tokens` for each, as many
    are asked as fit, by a draw in each step that gives every one its chance; one at least, with less room if need be.
    Samples go into the rows their prompts come from: the rows' number and their columns stay, and the batch is cut to
    its longest row.

    Only ids that everybody knows are sampled: those below `vocab_size`, and of a tokenizer that is given its own. The
    teacher judges what it could not even read otherwise.

    What comes out depends on seed, step, process and the batch's own tokens alone, so a resumed run goes on as it
    would have; whether a step is on-policy depends on seed and step alone, so that all micro-batches and processes
    agree. No random state, module mode or configuration outside is changed.

    Args:
        student: any Hugging Face causal language model that can `generate`, one adapted by peft's LoRA included.
        tokenizer: gives the ids that are not given themselves.
        share: probability that a step is on-policy, 0 to 1. The attribute may be changed between steps.
        max_new_tokens: bound of a sample.
        temperature, top_p, top_k: of sampling; temperature 0 is greedy, top_k 0 takes the whole vocabulary.
        prompt_tokens: of plain text.
        eos_token_id: one id or several that end a sample; none: every sample has `max_new_tokens`.
        pad_token_id: default: the tokenizer's, else the first eos, else 0.
        vocab_size: of the teacher, where the student's is larger. `KnowledgeDistiller` sets it.
        gather: whether a student in parts (FSDP2) is whole on each process while it writes, which spares it to gather
            each layer again for every token, where there is the memory for it.

    Raises:
        UserError: a setting out of its range, or a batch with columns of a cached teacher, which has not seen them.
    """

    def __init__(
        self,
        student: CausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        share: float = 0.5,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        prompt_tokens: int = 32,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        vocab_size: int | None = None,
        gather: bool = False,
    ):
        for name, value, fine, allowed in (
            ("share", share, 0 <= share <= 1, "0 to 1"),
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
            ("temperature", temperature, temperature >= 0, "0 (greedy) or above"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0, up to 1"),
            ("top_k", top_k, top_k >= 0, "0 (the whole vocabulary) or more"),
            ("prompt_tokens", prompt_tokens, prompt_tokens >= 1, "1 or more"),
            ("vocab_size", vocab_size, vocab_size is None or vocab_size >= 1, "1 or more, or None"),
        ):
            if not fine:
                raise UserError(f"on_policy.{name}: got {value}; allowed: {allowed}")
        check_decoder(student, "on_policy: the student")
        if tokenizer is None and eos_token_id is None:
            raise UserError(
                "on_policy: no tokenizer and no eos_token_id; give one of them, or a sample would never end"
            )
        if eos_token_id is None:
            assert tokenizer is not None  # refused above
            eos_token_id = tokenizer.eos_token_id
        self.eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        if pad_token_id is None and tokenizer is not None:
            pad_token_id = tokenizer.pad_token_id
        self.pad = pad_token_id if pad_token_id is not None else (self.eos or [0])[0]
        # peft's generate reads and writes configurations of its own; the adapters are in the model it wraps
        self.student = plain_model(student)
        self.share, self.max_new_tokens, self.prompt_tokens, self.seed = share, max_new_tokens, prompt_tokens, seed
        self.gather = gather
        rows = vocabulary_rows(self.student)
        self.vocab_size = rows if tokenizer is None else min(rows, max(tokenizer.get_vocab().values()) + 1)
        self.limit_to(vocab_size or rows)
        self.sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            self.sampling |= {"temperature": float(temperature), "top_p": float(top_p), "top_k": top_k}

    @property
    def unbiased(self) -> bool:
        """Whether all steps are on-policy and samples are drawn from the student's own distribution."""
        neutral = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        return self.share == 1 and self.sampling == neutral

    def limit_to(self, vocab_size: int) -> None:
        """Samples no id from `vocab_size` on from here on; it only ever gets less."""
        self.vocab_size = min(self.vocab_size, vocab_size)
        if beyond := [token for token in self.eos if token >= self.vocab_size]:
            raise UserError(
                f"on_policy: a sample would never end: the eos {beyond[0]} is beyond the {self.vocab_size} tokens that "
                "teacher and student share; give an eos_token_id that both have"
            )

    def decides(self, step: int) -> bool:
        """Whether this step is on-policy; the same on every process and for every micro-batch."""
        return random.Random(f"{self.seed} {step}").random() < self.share

    def __call__(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The batch as it is, or of the student's samples, (b, at most n), with labels on sampled tokens alone: the
        eos that ends one has a label, and nothing comes after it. A batch without `segment_ids` has a document a row,
        padded where its `attention_mask` is 0, if it has one; samples are padded on the right.

        `row` is -1 in a batch of samples, which the dataset does not hold. A sample's `weights` and `task` are those of
        the first token that had a label behind its prompt. A batch that holds no prompt stays as it is. Sampling runs
        in the caller's autocast.
        """
        if not self.share:
            return batch
        if foreign := sorted(set(batch) - {*OF_TOKENS, *OF_ROWS, MASK}):
            raise UserError(
                f"on_policy: the batch has {', '.join(foreign)}, which say nothing about tokens the student writes; "
                "use an online teacher, or share: 0"
            )
        if not self.decides(step):
            return batch
        with self.apart():
            return self._replaced(batch, step)

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """What all processes enter in an on-policy step, which may have other numbers of prompts, or none."""
        if not is_sharded(self.student):
            return contextlib.nullcontext()
        return whole_model(self.student) if self.gather else called_apart(self.student, self._idle)

    @torch.no_grad()
    def _idle(self) -> None:
        """One pass, of which nothing is kept."""
        token = torch.full((1, 1), self.pad, device=self.student.device)
        self.student(input_ids=token, use_cache=False)

    def _replaced(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        prompts = self._prompts(batch, step)
        if not prompts:
            return batch
        ids, _ = readable_ids(self.student, batch["input_ids"].cpu(), "student")
        texts = [ids[p.row, p.begin : p.begin + p.length] for p in prompts]
        with self._sampling(step, ids):
            samples = self._samples(texts, [p.limit for p in prompts])
        made = self._packed(prompts, texts, samples, len(ids))
        if MASK in batch:
            made[MASK] = (made["segment_ids"] >= 0).to(batch[MASK].dtype)
        device = batch["input_ids"].device
        result = {name: made.get(name, value).to(device) for name, value in batch.items()}
        if "row" in batch:
            result["row"] = torch.full_like(batch["row"], -1)
        return result

    def _prompts(self, batch: dict[str, Tensor], step: int) -> list[PromptPlace]:
        segments = batch.get("segment_ids")
        if segments is None:
            segments = batch.get(MASK, torch.ones_like(batch["labels"])).long() - 1
        segments, labels = segments.cpu().numpy(), batch["labels"].cpu().numpy()
        weights = batch["weights"].cpu().numpy() if "weights" in batch else np.ones(labels.shape, np.float32)
        tasks = batch["task"].cpu().numpy() if "task" in batch else np.zeros(labels.shape, np.int64)
        n = segments.shape[1]
        prompts = []
        for row, (segment, label) in enumerate(zip(segments, labels, strict=True)):
            starts = np.flatnonzero(np.diff(segment, prepend=segment[0] - 1))
            found = []
            for begin, end in zip(starts, np.append(starts[1:], n), strict=True):
                learned = label[begin:end] != IGNORED
                # nothing to learn: padding, a lone token, or a prompt that the row's end has cut
                if segment[begin] < 0 or not learned.any():
                    continue
                begins = np.flatnonzero(learned & ~np.append(False, learned[:-1])).tolist()
                # answers with something before them; of a cut chat the rest of its first turn is none
                turns = [i for i in begins if i > 1]
                lengths = turns or [min(self.prompt_tokens, int(end - begin) - 1)]
                for length, i in zip(lengths, turns or begins, strict=False):
                    first, limit = (row, begin + i), min(self.max_new_tokens, n - length)
                    of_first = float(weights[first]), int(tasks[first])
                    if length > 0:
                        found.append(PromptPlace(row, int(begin), length, limit, *of_first))
            prompts += self._fitting(found, n, f"{step} {row}")
        return prompts

    def _fitting(self, prompts: list[PromptPlace], n: int, key: str) -> list[PromptPlace]:
        """A row's prompts that fit into its n tokens: all of them, in order, or as many as do, by a draw."""
        if sum(prompt.length + self.max_new_tokens for prompt in prompts) > n:
            prompts = random.Random(f"{self.seed} {key}").sample(prompts, len(prompts))
        room, fitting = n, []
        for prompt in prompts:
            if room == n or prompt.length + self.max_new_tokens <= room:
                room -= prompt.length + prompt.limit
                fitting.append(prompt)
        return sorted(fitting, key=lambda prompt: (prompt.begin, prompt.length))

    @contextlib.contextmanager
    def _sampling(self, step: int, ids: Tensor) -> Iterator[None]:
        """Evaluation mode, neutral generation settings and a random state of this call's own; all restored."""
        from transformers import GenerationConfig

        rank = dist.get_rank() if several() else 0
        key = hashlib.blake2b(f"{self.seed} {step} {rank} ".encode() + ids.numpy().tobytes(), digest_size=8).digest()
        device = self.student.device
        # generate() falls back to the checkpoint's own settings (a repetition penalty, say) wherever ours are silent
        own = self.student.generation_config
        training = [module for module in self.student.modules() if module.training]
        self.student.eval()
        self.student.generation_config = GenerationConfig()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
                torch.manual_seed(int.from_bytes(key, "little") >> 1)
                yield
        finally:
            self.student.generation_config = own
            for module in training:
                module.training = True
            if torch.is_autocast_enabled(device.type):
                # an older torch would hand the training forward weights that were cast here, without gradient
                torch.clear_autocast_cache()

    def _samples(self, texts: list[Tensor], limits: list[int]) -> list[Tensor]:
        """What the student writes after each text: ids up to and with the first eos, at most `limit` many."""
        from transformers import GenerationConfig

        rows = vocabulary_rows(self.student)
        unknown = list(range(self.vocab_size, rows)) or None
        samples: dict[int, Tensor] = {}
        for group in _groups([len(text) for text in texts], limits):
            longest, limit = max(len(texts[i]) for i in group), limits[group[0]]
            ids = torch.full((len(group), longest), self.pad)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(group):
                ids[row, longest - len(texts[i]) :] = texts[i]
                mask[row, longest - len(texts[i]) :] = 1
            written = self.student.generate(
                input_ids=ids.to(self.student.device),
                attention_mask=mask.to(self.student.device),
                synced_gpus=False,  # `apart` sees to that
                generation_config=GenerationConfig(
                    max_new_tokens=limit,
                    pad_token_id=self.pad,
                    eos_token_id=self.eos or None,
                    suppress_tokens=unknown,  # before top_p and top_k cut: what is left is a distribution
                    use_cache=True,  # training may have turned it off in the model's configuration
                    **self.sampling,
                ),
            )[:, longest:].cpu()
            ends = torch.isin(written, torch.tensor(self.eos, dtype=torch.long))
            for i, sample, end in zip(group, written, ends, strict=True):
                samples[i] = sample[: int(end.int().argmax()) + 1] if bool(end.any()) else sample
        return [samples[i] for i in range(len(texts))]

    def _packed(
        self, prompts: list[PromptPlace], texts: list[Tensor], samples: list[Tensor], rows: int
    ) -> dict[str, Tensor]:
        lengths = [0] * rows
        for prompt, sample in zip(prompts, samples, strict=True):
            lengths[prompt.row] += prompt.length + len(sample)
        n = max(lengths)
        ids = torch.full((rows, n), self.pad)
        positions, segments, labels = torch.zeros_like(ids), torch.full_like(ids, -1), torch.full_like(ids, IGNORED)
        weights, tasks = torch.zeros(rows, n), torch.zeros_like(ids)
        filled, count = [0] * rows, [0] * rows
        for prompt, text, sample in zip(prompts, texts, samples, strict=True):
            row, begin = prompt.row, filled[prompt.row]
            middle, end = begin + len(text), begin + len(text) + len(sample)
            ids[row, begin:middle], ids[row, middle:end] = text, sample
            labels[row, middle:end] = sample
            weights[row, middle:end], tasks[row, middle:end] = prompt.weight, prompt.task
            positions[row, begin:end] = torch.arange(end - begin)
            segments[row, begin:end] = count[row]
            filled[row], count[row] = end, count[row] + 1
        for row, end in enumerate(filled):  # padding counts from 0 too, as in packed rows of text
            positions[row, end:] = torch.arange(n - end)
        return dict(zip(OF_TOKENS, (ids, positions, segments, labels, weights, tasks), strict=True))


def replaced_rows(
    on_policy: Callable[[dict[str, Tensor], int], dict[str, Tensor]],
    batch: dict[str, Tensor],
    step: int,
    kept: Tensor | None = None,
) -> dict[str, Tensor]:
    """`on_policy(batch, step)` but for the rows `kept` (b) bool, which stay as they are; None: no row does.

    Samples beside kept rows are padded to their length, with documents of -1.
    """
    if kept is None or not bool(kept.any()):
        return on_policy(batch, step)
    if bool(kept.all()):
        if isinstance(on_policy, OnPolicy) and on_policy.share and on_policy.decides(step):
            with on_policy.apart():  # where others sample
                pass
        return batch
    asked = {name: column[~kept] for name, column in batch.items()}
    made = on_policy(asked, step)
    if made is asked:
        return batch
    fill, result = {"labels": IGNORED, "segment_ids": -1}, {}
    for name, column in batch.items():
        rows = made[name]
        if name in (*OF_TOKENS, MASK):
            missing = column.shape[1] - rows.shape[1]
            padding = rows.new_full((len(rows), missing), fill.get(name, 0))
            if name == "position_ids":
                padding = torch.arange(missing, device=rows.device).expand_as(padding)
            rows = torch.cat([rows, padding], 1)
        result[name] = column.masked_scatter(kept.logical_not().view(-1, *[1] * (column.dim() - 1)), rows.to(column))
    return result


def _groups(lengths: list[int], limits: list[int]) -> Iterator[list[int]]:
    """Indices of texts to sample together: of one limit and like lengths, so that left padding at most doubles them."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (limits[i], lengths[i])):
        if group and (limits[i] != limits[group[0]] or lengths[i] > 2 * lengths[group[0]] + limits[i]):
            yield group
            group = []
        group.append(i)
    if group:
        yield group
