"""What is kept of a teacher's answer, made from a batch: hidden states, or the top k or random samples of their logits.

Logits are float32 and never of more than a few hundred positions, made as `linear_kd_loss` makes them. Every row is
answered by itself and its random numbers come from (seed, row), so nothing depends on how rows are batched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mohawk.errors import UserError
from mohawk.heads import Head
from mohawk.kernels.kd_chunked import finish_logits
from mohawk.kernels.kd_products import logits_product
from mohawk.teacher_records import DTYPES, KINDS, Layout, encode_logprobs, pack_ascending, pack_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TILE_BYTES = 96 << 20  # of float32 logits at once
# Of a configuration: where a model came from and how it is run, not what it is.
UNRELATED = ("_name_or_path", "transformers_version", "_attn_implementation", "use_cache", "dtype", "torch_dtype")


def teacher_hash(teacher: PreTrainedModel) -> str:
    """sha256 of a model's configuration and weights; those that accelerate keeps elsewhere count by name and shape."""
    digest = hashlib.sha256()
    config = {key: value for key, value in teacher.config.to_dict().items() if key not in UNRELATED}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in teacher.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":
            digest.update(parameter.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class Answers:
    """What is kept of a teacher: its records' layout, and how hidden states become their columns."""

    teacher: PreTrainedModel
    head: Head
    layout: Layout
    temperature: float
    seed: int
    autocast: torch.dtype | None

    def columns(self, batch: Mapping[str, Tensor], indices: range) -> Iterator[dict[str, np.ndarray]]:
        """The columns of each row of a batch with `input_ids` and `position_ids` (b, n), rows `indices` of the data."""
        hidden = self._hidden(batch)
        for index, states in zip(indices, hidden, strict=True):
            if self.layout.kind == "hidden":
                if not bool(torch.isfinite(states).all()):
                    raise _not_finite(index)
                states = states.cpu()
                raw = states.view(torch.uint16) if states.dtype == torch.bfloat16 else states
                yield {"hidden": raw.numpy()}
                continue
            uniform = np.random.default_rng([self.seed, index]).random((len(states), self.layout.k))
            step = max(1, TILE_BYTES // (4 * len(self.head.weight)))
            parts = []
            for start in range(0, len(states), step):
                logits = self._logits(states[start : start + step])
                norm = torch.logsumexp(logits, -1, keepdim=True)
                if not bool(torch.isfinite(norm).all()):
                    raise _not_finite(index)
                if self.layout.kind == "top-k":
                    parts.append(self._top_k(logits, norm))
                else:
                    parts.append(self._samples(logits, uniform[start : start + step]))
            yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def _hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the teacher gives its head, (b, n, hidden_size), without computing all logits."""
        seen: list[Tensor] = []

        def keep(_module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            seen.append(args[0])
            return (args[0][:, -1:],)

        embedding = self.teacher.get_input_embeddings().weight
        ids, positions = (batch[name].to(embedding.device) for name in ("input_ids", "position_ids"))
        if (largest := int(batch["input_ids"].max())) >= len(embedding):
            raise UserError(
                f"data: holds token {largest}, but the teacher has only {len(embedding)}; use the teacher's tokenizer"
            )
        hook = self.teacher.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            with torch.autocast(ids.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                last = self.teacher(input_ids=ids, position_ids=positions, use_cache=False).logits[:, -1].float()
        finally:
            hook.remove()
        hidden = seen[0].to(device=self.head.weight.device, dtype=self.head.weight.dtype)
        ours = self._logits(hidden[:, -1], whole=True).to(last.device)
        # Half-precision rounding stays far below 5 %, a missing scale or softcap that matters far above.
        if (ours - last).norm() > 0.05 * last.norm():
            raise UserError(
                f"teacher: {type(self.teacher).__name__} does more to its logits than scale and softcap them, which is "
                "not supported"
            )
        return hidden

    def _logits(self, hidden: Tensor, whole: bool = False) -> Tensor:
        """Tempered float32 logits (rows, V) of hidden states (rows, hidden_size); whole: as the model gives them."""
        vocab = len(self.head.weight) if whole else self.layout.vocab_size
        logits = hidden.new_empty((len(hidden), vocab), dtype=torch.float32)
        logits_product(hidden, self.head.weight[:vocab], logits)
        finish_logits(logits, self.head.bias, self.head.scale, self.head.softcap)
        return logits if whole or self.temperature == 1.0 else logits.div_(self.temperature)

    def _top_k(self, logits: Tensor, norm: Tensor) -> dict[str, np.ndarray]:
        values, ids = torch.topk(logits, self.layout.k, dim=-1)
        # The rest is added up by itself: 1 - sum would be noise where the k hold nearly all.
        rest = torch.logsumexp(logits.scatter_(-1, ids, float("-inf")), -1)
        return {
            **pack_ascending(encode_logprobs(values - norm).cpu().numpy(), self.layout.low_bits),
            "tail": encode_logprobs(rest - norm[:, 0]).to(torch.uint16).cpu().numpy(),
            "ids": pack_ids(ids.cpu().numpy(), self.layout.id_bits),
        }

    def _samples(self, logits: Tensor, uniform: np.ndarray) -> dict[str, np.ndarray]:
        """Ids by inversion of the cumulative distribution: one uniform number a draw."""
        cumulative = torch.softmax(logits.double(), -1).cumsum_(-1)
        u = torch.from_numpy(uniform).to(cumulative.device).clamp_(max=1 - 2.0**-40) * cumulative[:, -1:]
        ids = torch.searchsorted(cumulative, u, right=True)
        return {"ids": pack_ids(np.sort(ids.cpu().numpy(), -1), self.layout.id_bits)}


def make_answers(
    teacher: PreTrainedModel,
    dataset: Any,
    *,
    kind: str,
    k: int,
    draws: int,
    temperature: float,
    seed: int,
    vocab_size: int | None,
    autocast: torch.dtype | None,
) -> Answers:
    """The arguments of `write_cache`, checked. Raises UserError."""
    if kind not in KINDS:
        raise UserError(f"kind: got {kind!r}; allowed: {', '.join(KINDS)}")
    if not len(dataset):
        raise UserError("data: has no rows to cache; give text")
    head = Head.of(teacher).detached()
    dtype = autocast or head.weight.dtype
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES or not head.weight.dtype.is_floating_point:
        raise UserError(f"teacher: its head is {head.weight.dtype}; allowed: {', '.join(DTYPES)}")
    vocab = len(head.weight) if vocab_size is None else vocab_size
    within("vocab_size", vocab, 1, len(head.weight))
    if not 1e-3 <= temperature <= 1e3:
        raise UserError(f"temperature: got {temperature}; allowed: 0.001 to 1000")
    within("seed", seed, 0)
    numbers = {"top-k": k, "samples": draws, "hidden": 0}[kind]
    if kind == "top-k":
        within("k", k, 1, vocab)
    elif kind == "samples":
        within("draws", draws, 1)
    size = {"hidden_size": head.weight.shape[1], "dtype": name} if kind == "hidden" else {}
    if kind == "hidden":
        vocab = len(head.weight)  # the head is kept whole; the loss takes its vocab_size
    layout = Layout(kind, len(dataset[0]["input_ids"]), vocab, numbers, **size)
    head = Head(head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype), head.scale, head.softcap)
    return Answers(teacher, head, layout, temperature, seed, autocast)


def within(name: str, value: int, low: int, high: int | None = None) -> None:
    if type(value) is not int or value < low or high is not None and value > high:
        allowed = f"a whole number from {low} to {high}" if high is not None else f"a whole number of at least {low}"
        raise UserError(f"{name}: got {value!r}; allowed: {allowed}")


def _not_finite(row: int) -> UserError:
    return UserError(
        f"teacher: gives NaN or infinity in row {row} of the data; use another dtype (float16 overflows in some "
        "models), or another teacher"
    )
