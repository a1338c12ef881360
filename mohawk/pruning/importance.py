"""How much each layer, neuron, head and channel of a model matters: activations on a calibration text, forward only.

Minitron's scores (arXiv 2407.14679, section 3): a unit's activation, the mean of absolute values over a row's tokens,
then the L2 norm over all calibration rows. One pass over the text gives them for all axes. Rows are added up one by one
in float64, so how they are batched does not matter, nor how many there are in memory: that is one batch's activations
of one module, and a number a unit.

    importance = measure_importance(model, batches)
    what = choose(importance, Sizes(...))      -> a Cut for mohawk.models.cutting.cuts.cut
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mohawk.core.folders import why_altered, write_file
from mohawk.core.processes import from_all
from mohawk.models.cutting.cuts import Cut, resolve_layers
from mohawk.models.cutting.sizes import Sizes, attention_layers, base_config, check_sizes_within, sizes_of, ssm_layers
from mohawk.models.delta_mixer import DeltaMixer
from mohawk.models.families import decoder_layers, family_of
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.mixers import SSMMixer
from mohawk.models.packed import positions_of
from mohawk.models.sharding import reshard, run_in
from mohawk.models.state_mixer import StateMixer
from mohawk.pruning.state_use import delta_state_use, state_use

FORMAT = "mohawk importance 1"


@dataclass(frozen=True)
class Importance:
    """Scores of a model's units, float64 on the CPU; of two units of a row the one with more matters more.

    Scores compare within a row (a layer's neurons, a group's heads), not between axes.

    Args:
        layers: (layers,), block importance 1 - E[cos(layer's input, layer's output)] over tokens.
        hidden: (channels,), of the residual stream: summed over the outputs of every norm that reads or writes it.
        ffn: (layers, neurons), the down projection's input.
        heads: (attention layers, query heads), L2 norm over head_dim of the output projection's input.
        kv_heads: (attention layers, kv heads), the same over all query heads of the group.
        state_heads, state_groups: (layers with mixers, heads or groups), the same for these.
        state_dims: (layers with mixers, groups, N), what each state dimension adds to what is read out of the state
            (`state_use`).
        attention_layers, ssm_layers: which layers the rows of these are.
        rows, tokens: of the text the scores are from; 0 where they are from no text.
        method: "activation", or what else they are.
    """

    layers: Tensor
    hidden: Tensor
    ffn: Tensor
    heads: Tensor
    kv_heads: Tensor
    state_heads: Tensor
    state_groups: Tensor
    state_dims: Tensor
    attention_layers: tuple[int, ...]
    ssm_layers: tuple[int, ...]
    rows: int = 0
    tokens: int = 0
    method: str = "activation"

    def save(self, path: str | Path) -> None:
        """One safetensors file; what is not a tensor is JSON in its header."""
        tensors, other = {}, {}
        for field in fields(self):
            value = getattr(self, field.name)
            (tensors if isinstance(value, Tensor) else other)[field.name] = value
        header = {"format": FORMAT, "importance": json.dumps(other, sort_keys=True)}
        with write_file(path) as beside:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """What `save` wrote. ValueError: another kind of file, or a damaged one."""
        if (problem := why_altered(path)) is not None:
            raise ValueError(f"{path} {problem}")
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"{path} holds no importance scores; `measure_importance(...).save(path)` writes them")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        other = json.loads(header["importance"])
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in other.items()}
        return cls(**tensors | values)


@torch.no_grad()
def measure_importance(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], *, dealt: bool = False
) -> Importance:
    """All scores in one pass.

    Args:
        model: a causal LM of a supported family or a hybrid; run in eval mode and left as it was. Of one in parts all
            processes ask, with equally many batches.
        batches: packed batches (see `mohawk.data.packing`): input_ids (b, n), and segment_ids and position_ids where
            rows hold several documents or padding (-1), which is left out; or a document a row, with an attention_mask
            (b, n) of 0 at padding.
        dealt: each of several processes gives batches of its own, whose scores are added up; all of them must ask.

    Raises:
        ValueError: an unsupported model, or no token at all.
    """
    sizes_of(model.config)
    training = model.training
    model.eval()
    meter = _Meter(model)
    try:
        with meter.hooks:
            for batch in batches:
                meter.run(batch)
    finally:
        model.train(training)
        reshard(model)
    if dealt:
        meter.add_up()
    return meter.result()


class _Meter:
    """Hooks on a model's modules and what they have added up."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.hooks = model, ExitStack()
        self.squares: dict[tuple[str, int], Tensor] = {}  # (axis, layer or number of the norm) -> sum over rows
        self.cosines = [torch.zeros((), dtype=torch.float64)] * base_config(model.config).num_hidden_layers
        self.rows, self.tokens = 0, 0
        # of the batch that is run: documents (b, n), which tokens are real, and how many in each row
        self.segments = self.real = torch.empty(0)
        self.counts: list[int] = []
        family, base = family_of(model.config), base_config(model.config)
        norm_names = [family.input_norm, family.output_norm, *family.mlp_norms]
        norms = []
        for i, layer in enumerate(decoder_layers(model)):
            norms += [getattr(layer, name) for name in norm_names if name is not None]
            self._before(getattr(layer.mlp, family.mlp_output), lambda x, i=i: self._add("ffn", i, x))
            if isinstance(layer.self_attn, StateMixer):
                self._watch_mixer(layer.self_attn, i)
            else:
                heads, groups = base.num_attention_heads, sizes_of(model.config).kv_heads
                output = getattr(layer.self_attn, family.output)
                self._before(output, lambda x, i=i, h=heads, g=groups: self._heads(("heads", "kv_heads"), i, x, h, g))
            hook = layer.register_forward_hook(lambda _, args, kwargs, out, i=i: self._layer(i, args, kwargs, out),
                                               with_kwargs=True)  # fmt: skip
            self.hooks.callback(hook.remove)
        norms.append(getattr(model.model, family.final_norm))
        for number, norm in enumerate(norms):
            self._after(norm, lambda out, number=number: self._add("hidden", number, out))

    def run(self, batch: Mapping[str, Tensor]) -> None:
        self.segments = segments_in(batch, self.model.device)
        self.real = self.segments >= 0
        self.counts = self.real.sum(1).tolist()
        run_decoder(self.model, batch)
        self.rows += sum(count > 0 for count in self.counts)
        self.tokens += sum(self.counts)

    def add_up(self) -> None:
        """Adds what the other processes measured. One whose batches had no token has nothing to add."""
        own = {key: square.cpu() for key, square in self.squares.items()}
        found = from_all((own, [cosine.cpu() for cosine in self.cosines], self.rows, self.tokens))
        keys = dict.fromkeys(key for squares, *_ in found for key in squares)
        self.squares = {key: _sum([squares[key] for squares, *_ in found if key in squares]) for key in keys}
        self.cosines = [_sum(list(one)) for one in zip(*(cosines for _, cosines, *_ in found), strict=True)]
        self.rows, self.tokens = sum(rows for *_, rows, _ in found), sum(tokens for *_, tokens in found)

    def result(self) -> Importance:
        if self.tokens == 0:
            raise ValueError("the calibration text has no token; give batches whose segment_ids are not all -1")
        config = self.model.config
        own = sizes_of(config)
        attention, ssm = attention_layers(config), ssm_layers(config)

        def table(axis: str, layers: Sequence[int], *size: int) -> Tensor:
            rows = [self.squares[axis, i].sqrt().cpu() for i in layers]
            return torch.stack(rows) if rows else torch.zeros(0, *size, dtype=torch.float64)

        norms = [square.sqrt().cpu() for (axis, _), square in self.squares.items() if axis == "hidden"]
        return Importance(
            layers=1 - torch.stack([cosine.cpu() for cosine in self.cosines]) / self.tokens,
            hidden=torch.stack(norms).sum(0),
            ffn=table("ffn", range(own.layers)),
            heads=table("heads", attention, own.heads),
            kv_heads=table("kv_heads", attention, own.kv_heads),
            state_heads=table("state_heads", ssm, own.state_heads or 0),
            state_groups=table("state_groups", ssm, own.state_groups or 0),
            state_dims=table("state_dims", ssm, own.state_groups or 0, own.state_size or 0),
            attention_layers=tuple(attention),
            ssm_layers=tuple(ssm),
            rows=self.rows,
            tokens=self.tokens,
        )

    def _watch_mixer(self, mixer: StateMixer, i: int) -> None:
        self._before(
            mixer.output,
            lambda x: self._heads(("state_heads", "state_groups"), i, x, mixer.num_heads, mixer.num_groups),
        )
        if isinstance(mixer, SSMMixer):
            self._after(
                mixer.in_proj, lambda projected: self._add("state_dims", i, state_use(mixer, projected, self.segments))
            )
        else:
            assert isinstance(mixer, DeltaMixer)
            hook = mixer.register_forward_pre_hook(
                lambda _, args, kwargs: self._add(
                    "state_dims", i, delta_state_use(mixer, (*args, *kwargs.values())[0], self.segments)
                ),
                with_kwargs=True,
            )
            self.hooks.callback(hook.remove)

    def _before(self, module: nn.Module, use) -> None:
        self.hooks.callback(module.register_forward_pre_hook(lambda _, args: use(args[0])).remove)

    def _after(self, module: nn.Module, use) -> None:
        self.hooks.callback(module.register_forward_hook(lambda _, args, out: use(out)).remove)

    def _heads(self, names: tuple[str, str], i: int, x: Tensor, heads: int, groups: int) -> None:
        """(b, n, heads * size): the size of each head's output, and of all of a group's together."""
        squares = reduce(x.float().square(), "b n (h p) -> b n h", "sum", h=heads)
        self._add(names[0], i, squares.sqrt())
        self._add(names[1], i, reduce(squares, "b n (g h) -> b n g", "sum", g=groups).sqrt())

    def _layer(self, i: int, args: tuple, kwargs: dict, out) -> None:
        before, after = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
        cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
        for row in self._real_rows(cosine):
            self.cosines[i] = _wide_sum(row) + self.cosines[i]

    def _add(self, axis: str, number: int, x: Tensor) -> None:
        """x: (b, n, ...) activations of units; row by row, so that only one is held in float64."""
        key = axis, number
        for row in self._real_rows(x):
            self.squares[key] = (_wide_sum(row.abs()) / len(row)).square() + self.squares.get(key, 0.0)

    def _real_rows(self, x: Tensor) -> Iterator[Tensor]:
        """(b, n, ...) -> the real tokens of each row that has any."""
        for row, real, count in zip(x, self.real, self.counts, strict=True):
            if count:
                yield row if count == len(row) else row[real]


def _wide_sum(x: Tensor) -> Tensor:
    """Sum over the first dimension in float64, which one device does not have."""
    return x.sum(0).cpu().double() if x.device.type == "mps" else x.sum(0, dtype=torch.float64)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def segments_in(batch: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """(b, n) documents of a batch's rows, -1 at padding; one document a row, but for what an attention mask hides,
    where the batch does not say."""
    segments = batch.get("segment_ids")
    if segments is None:
        mask = batch.get("attention_mask")
        segments = torch.zeros_like(batch["input_ids"]) if mask is None else (mask != 0).long() - 1
    return segments.to(device)


def run_decoder(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """(b, n, hidden), a supported model's or hybrid's output behind its final norm, for a packed batch."""
    ids, segments = batch["input_ids"].to(model.device), segments_in(batch, model.device)
    positions = batch.get("position_ids")
    positions = positions_of(segments) if positions is None else positions.to(model.device)
    if isinstance(model, HybridForCausalLM):
        more, body = {"segment_ids": segments}, model.body
    else:
        more, body = {}, model.model
    return run_in(model, body, input_ids=ids, position_ids=positions, use_cache=False, **more).last_hidden_state


def choose(importance: Importance, sizes: Sizes, *, layers: str | Sequence[int] | Tensor = "score") -> Cut:
    """The most important units of each axis that a smaller size is asked of; of equal ones the first.

    Args:
        importance: of the model that is cut.
        sizes: the sizes wanted; the vocabulary must be the model's (it is no matter of scores).
        layers: which layers stay: "score" (the highest block importances), "block" (all but the contiguous block with
            the least sum of them), a word or indices as in `resolve_layers`, or a tensor of other scores (layers,),
            for instance `LayerDrops.kl`.

    Returns:
        A Cut; query heads are chosen within the kept kv heads, state heads and dimensions within the kept groups.

    Raises:
        ValueError: sizes that the model does not have.
    """
    own = importance_sizes(importance, sizes.vocabulary)
    check_sizes_within(own, sizes)
    kept = chosen_layers(importance, sizes.layers, layers)
    attention = [(row, i) for row, i in enumerate(importance.attention_layers) if i in kept]
    ssm = [(row, i) for row, i in enumerate(importance.ssm_layers) if i in kept]
    what: dict = {"layers": kept} if sizes.layers != own.layers else {}
    if sizes.hidden != own.hidden:
        what["hidden"] = top(importance.hidden, sizes.hidden)
    if sizes.ffn != own.ffn:
        what["ffn"] = {i: top(importance.ffn[i], sizes.ffn) for i in kept}
    if (sizes.heads, sizes.kv_heads) != (own.heads, own.kv_heads):
        if not importance.attention_layers:
            raise ValueError(f"heads: got {sizes.heads}, but the model has no attention layer")
        what["heads"] = {
            i: _in_groups(importance.heads[row], importance.kv_heads[row], sizes.heads, sizes.kv_heads)
            for row, i in attention
        }
    if (sizes.state_heads, sizes.state_groups) != (own.state_heads, own.state_groups):
        assert sizes.state_heads is not None and sizes.state_groups is not None  # as in the model
        what["state_heads"] = {
            i: _in_groups(
                importance.state_heads[row], importance.state_groups[row], sizes.state_heads, sizes.state_groups
            )
            for row, i in ssm
        }
    if sizes.state_size != own.state_size:
        assert sizes.state_size is not None
        what["state_dims"] = {
            i: [top(group, sizes.state_size) for group in importance.state_dims[row]] for row, i in ssm
        }
    return Cut(**what)


def chosen_layers(importance: Importance, count: int, layers: str | Sequence[int] | Tensor = "score") -> list[int]:
    """So many layers, ascending: see `choose`."""
    scores = importance.layers
    if isinstance(layers, Tensor):
        scores, layers = layers.double(), "score"
    if layers == "score":
        return top(scores, count)
    if layers == "block":
        gone = len(scores) - count
        sums = [float(scores[start : start + gone].sum()) for start in range(count + 1)]
        start = min(range(count + 1), key=lambda i: sums[i])
        return [i for i in range(len(scores)) if not start <= i < start + gone]
    found = resolve_layers(layers, len(scores))
    if len(found) != count:
        raise ValueError(f"layers: {layers!r} keeps {len(found)}, but sizes say {count}")
    return found


def top(scores: Tensor, count: int) -> list[int]:
    """Indices of the highest scores, ascending; of equal ones the first."""
    return sorted(torch.sort(scores, descending=True, stable=True).indices[:count].tolist())


def importance_sizes(importance: Importance, vocabulary: int) -> Sizes:
    """The sizes of the model that scores are of; they do not know its vocabulary."""
    mixer = {}
    if importance.ssm_layers:
        _, groups, size = importance.state_dims.shape
        mixer = {"state_heads": importance.state_heads.shape[1], "state_groups": groups, "state_size": size}
    return Sizes(
        layers=len(importance.layers),
        hidden=len(importance.hidden),
        ffn=importance.ffn.shape[1],
        heads=importance.heads.shape[1],
        kv_heads=importance.kv_heads.shape[1],
        vocabulary=vocabulary,
        **mixer,
    )


def check_scores(importance: Importance, config: Any) -> None:
    """ValueError where scores are of a model of other sizes, or with attention elsewhere, than a configuration's."""
    own, scored = sizes_of(config), importance_sizes(importance, sizes_of(config).vocabulary)
    if not importance.attention_layers:  # whose heads no scores tell
        scored = replace(scored, heads=own.heads, kv_heads=own.kv_heads)
    layers = tuple(attention_layers(config)), tuple(ssm_layers(config))
    if scored != own or (importance.attention_layers, importance.ssm_layers) != layers:
        wrong = [name for name in asdict(own) if getattr(own, name) != getattr(scored, name)]
        told = [f"{name} {getattr(scored, name)} for {getattr(own, name)}" for name in wrong] or ["attention elsewhere"]
        raise ValueError(f"importance: scores of another model ({', '.join(told)}); measure them of this one")


def _in_groups(heads: Tensor, groups: Tensor, num_heads: int, num_groups: int) -> list[int]:
    """The best heads of the best groups, equally many of each."""
    size = len(heads) // len(groups)
    return [
        group * size + head
        for group in top(groups, num_groups)
        for head in top(heads[group * size : (group + 1) * size], num_heads // num_groups)
    ]
