"""A student as ONNX graphs, which onnxruntime and others run without torch.

`model.onnx` reads any number of tokens on top of a cache, and `step.onnx`, of a student with mixers, one token, for
less; both name their inputs and outputs alike and read their weights from one file. The cache is theirs to hand on:
keys and values of attention layers, which may be of no token yet, and a window and a state of each mixer, which start
as zeros. Names are those that runtimes know: past_key_values.I.key, past_conv.I, past_recurrent.I, and `present` for
`past` in what comes out. Everything is float32.

Attention, MLPs, norms and rotary positions are the family's own code, traced by torch.export; recurrences are
`onnx_scans`.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mohawk.models.call import CACHE
from mohawk.models.families import check_supported, decoder_shape, family_of, logit_factors
from mohawk.models.formats.onnx_scans import causal_conv, delta_scan, ssd_scan
from mohawk.models.hybrid_config import SSM_LAYER, HybridConfig, attention_types
from mohawk.models.mixers import SSMMixer
from mohawk.models.packed import positions_in
from mohawk.models.state_mixer import StateMixer

GRAPH, STEP, WEIGHTS = "model.onnx", "step.onnx", "model.onnx.data"
OPSET = 18  # the first whose operators hold all of this; every onnxruntime since 1.14 has it
ROPES = ("default", "linear", "llama3", "yarn", "proportional")  # the same for every length of a text
SEVERAL = 131  # tokens a graph is traced with: of more than one chunk, since 1 would be taken for always 1
INPUTS = ("input_ids", "attention_mask", "num_logits_to_keep")


def why_not_onnx(config: Any) -> str | None:
    """Why a student of this configuration cannot be ONNX graphs, in one line, or None when it can."""
    base = getattr(config, "base_config", None) or config
    try:
        check_supported(base, "written as ONNX")
    except ValueError as error:
        return str(error)
    if family_of(base).experts:
        return "which experts a token goes to is known only from its values, and a graph has no place for that"
    if getattr(base, "quantization_config", None) is not None:
        return "its weights are packed; write the student that they were made of"
    rope = (getattr(base, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPES:
        return f"its rotary positions are scaled by {rope}, which turns positions otherwise once a text is long"
    return None


def write_onnx(model: PreTrainedModel, folder: Path) -> None:
    """Writes the graphs and their weights.

    Args:
        model: a hybrid or a decoder of a supported family, on a CPU, in eval mode; its weights are float32 afterwards.
        folder: where they go, which is there.

    Raises:
        ValueError: the model cannot be written so (`why_not_onnx`).
    """
    if reason := why_not_onnx(model.config):
        raise ValueError(f"cannot be ONNX graphs: {reason}")
    names = cache_names(model.config)
    with _traceable(model.float()):
        decoder = Decoder(model).eval()
        _exported(decoder, names, tokens=SEVERAL).save(str(folder / GRAPH), external_data=True)
        if any(name.startswith("past_conv") for name in names):
            _save_sharing(_exported(decoder, names, tokens=1), folder)


def cache_names(config: Any) -> list[str]:
    """Names of the graphs' cache inputs, in their order."""
    names = []
    for i, kind in enumerate(_kinds(config)):
        names += [f"past_conv.{i}", f"past_recurrent.{i}"] if kind == SSM_LAYER else [
            f"past_key_values.{i}.key", f"past_key_values.{i}.value"
        ]  # fmt: skip
    return names


def present(name: str) -> str:
    """The output that is the next call's input of this name."""
    return name.replace("past_key_values", "present").replace("past_", "present_")


def empty_cache(config: Any, batch: int, tokens: int = 0) -> dict[str, Tensor]:
    """The cache in front of a text; of `tokens` keys and values, to trace a graph with."""
    shape, made = decoder_shape(_base(config)), {}
    for name in cache_names(config):
        if name.startswith("past_key_values"):
            made[name] = torch.zeros(batch, shape.num_kv_heads, tokens, shape.head_dim)
            continue
        heads, width, size = config.mixer_num_heads, config.mixer_head_dim, config.mixer_state_size
        mixer = config.mixer_of(int(name.rpartition(".")[2]))
        if name.startswith("past_conv"):
            channels = heads * width + 2 * config.mixer_num_groups * size
            made[name] = torch.zeros(batch, channels, config.mixer_conv_kernel)
        else:
            made[name] = torch.zeros(batch, heads, *((size, width) if "delta" in mixer else (width, size)))
    return made


class Decoder(nn.Module):
    """What a graph computes: (ids (b, n), mask (b, past + n), a number, cache) -> (logits (b, kept, V), *cache).

    The mask is 0 at padding, wherever that lies; the number says of how many last tokens logits are wanted, 0 of all.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.body, self.head, self.config = model.model, model.lm_head, model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, num_logits_to_keep: Tensor, *past: Tensor):
        n, kinds = input_ids.shape[1], _kinds(self.config)
        past_tokens = attention_mask.shape[1] - n
        cache = _Cache(list(past))
        masks = {kind: _mask(attention_mask, n, self._window(kind)) for kind in set(kinds) - {SSM_LAYER}}
        of_base = getattr(_base(self.config), "layer_types", None)
        if of_base is not None:  # the decoder looks for all of its kinds, also those no layer is left of
            mask = {kind: masks.get(kind) for kind in set(of_base)}
            mask = mask if len(masks) > 1 or set(of_base) - {"full_attention"} else masks.get("full_attention")
        else:
            mask = next(iter(masks.values()), None)
        if mask is None:
            mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)  # nothing reads it, and none is made instead
        given = {"padding_mask": attention_mask.narrow(1, past_tokens, n)} if SSM_LAYER in kinds else {}
        hidden = self.body(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions_in(attention_mask).narrow(1, past_tokens, n),
            use_cache=True,
            **{CACHE: cache},
            **given,
        ).last_hidden_state
        logits = self.head(_last(hidden, num_logits_to_keep))
        multiplied, divided = logit_factors(self.config)
        if multiplied != 1 or divided != 1:
            logits = logits * multiplied / divided
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits, *cache.tensors()

    def _window(self, kind: str) -> int | None:
        return _base(self.config).sliding_window if kind == "sliding_attention" else None


class _Layer:
    """One layer's two tensors, under the names that mixers look for."""

    record_past = False

    def __init__(self, first: Tensor, second: Tensor):
        self.conv_states, self.recurrent_states = {0: first}, {0: second}


class _Cache:
    """As much of transformers' cache as a decoder and its mixers ask for; nothing is changed in place."""

    is_compileable = False

    def __init__(self, past: list[Tensor]):
        self.layers = [_Layer(*past[i : i + 2]) for i in range(0, len(past), 2)]

    def tensors(self) -> list[Tensor]:
        return [value for layer in self.layers for value in (layer.conv_states[0], layer.recurrent_states[0])]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        layer.conv_states[0] = torch.cat([layer.conv_states[0], keys], -2)
        layer.recurrent_states[0] = torch.cat([layer.recurrent_states[0], values], -2)
        return layer.conv_states[0], layer.recurrent_states[0]

    def has_previous_state(self, layer_idx: int) -> bool:
        return True

    def update_conv_state(self, window: Tensor, layer_idx: int, **kwargs) -> None:
        self.layers[layer_idx].conv_states[0] = window

    def update_recurrent_state(self, state: Tensor, layer_idx: int) -> None:
        self.layers[layer_idx].recurrent_states[0] = state


def _base(config: Any) -> Any:
    return config.base_config if isinstance(config, HybridConfig) else config


def _kinds(config: Any) -> list[str]:
    return list(config.layer_types) if isinstance(config, HybridConfig) else attention_types(config)


@contextlib.contextmanager
def _traceable(model: Any) -> Iterator[None]:
    """Within the block mixers compute by what ONNX has, and attention by its definition: with the mask that it is
    given, its softcap and a softmax in float32."""
    mixers = [module for module in model.modules() if isinstance(module, StateMixer)]
    attention = model.model.config._attn_implementation
    model.model.config._attn_implementation = "eager"
    for mixer in mixers:
        mixer.recur = MethodType(_ssd if isinstance(mixer, SSMMixer) else _delta, mixer)
        mixer.conv1d.forward = MethodType(_convolve, mixer.conv1d)
    try:
        yield
    finally:
        model.model.config._attn_implementation = attention
        for mixer in mixers:
            del mixer.recur, mixer.conv1d.forward


def _mask(attention_mask: Tensor, n: int, window: int | None) -> Tensor:
    """(b, past + n) of zeros and ones -> (b, 1, n, past + n), what attention adds to its scores."""
    length = attention_mask.shape[1]
    key = torch.arange(length)
    query = torch.arange(length - n, length)[:, None]
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    seen = seen & attention_mask[:, None, None, :].bool()
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def _last(hidden: Tensor, count: Tensor) -> Tensor:
    """(b, n, D) -> (b, kept, D)."""
    n = hidden.shape[1]
    all_of_them = torch.scalar_tensor(n, dtype=torch.int64)
    kept = torch.where(count > 0, count.minimum(all_of_them), all_of_them).item()
    torch._check(kept >= 0)
    torch._check(kept <= n)
    return hidden[:, n - kept :]


def _ssd(self: SSMMixer, convolved, raw, padded, segment_ids, state, keep) -> tuple[Tensor, Tensor]:
    log_decay, input_scale = self.decay(raw)
    x, B, C = self._cut(convolved)
    log_decay = log_decay.masked_fill(padded, 0)
    return ssd_scan(x, log_decay, B, C, input_scale=input_scale, D=self.D, initial_state=state)


def _delta(self, convolved, raw, padded, segment_ids, state, keep) -> tuple[Tensor, Tensor]:
    q, k, v = self._cut(convolved)
    beta, log_decay = self.gates(raw, padded)
    return delta_scan(q, k, v, beta=beta, log_decay=log_decay, initial_state=state)


def _convolve(self, x: Tensor, *, initial_state: Tensor | None = None, segment_ids=None, step: bool = False) -> Tensor:
    if step:  # x: the window
        before, x = x[..., :-1], x[..., -1:].transpose(1, 2)
        return causal_conv(x, self.weight[:, 0], self.bias, self.activation, before).squeeze(1)
    assert initial_state is not None  # the cache always holds one
    return causal_conv(x, self.weight[:, 0], self.bias, self.activation, initial_state)


def _exported(decoder: Decoder, names: list[str], tokens: int) -> torch.onnx.ONNXProgram:
    """A graph. tokens: how many it reads at once: 1 for that alone, or any number."""
    free, batch, seen = torch.export.Dim.DYNAMIC, 3, 5
    past = empty_cache(decoder.config, batch, seen)
    inputs = torch.ones(batch, tokens, dtype=torch.long), torch.ones(batch, seen + tokens, dtype=torch.long)
    shapes = {0: free} if tokens == 1 else {0: free, 1: free}, {0: free, 1: free}, {}
    of_past = tuple({0: free, 2: free} if name.startswith("past_key_values") else {0: free} for name in names)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            decoder,
            (*inputs, torch.tensor(1), *past.values()),
            input_names=[*INPUTS, *names],
            output_names=["logits", *map(present, names)],
            dynamic_shapes=(*shapes, of_past),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    _tidy(program.model, names, tokens)
    return program


def _tidy(model: Any, names: list[str], tokens: int) -> None:
    """Dimensions by their names, and nothing of where the graph was traced: its notes hold paths of this machine."""
    from onnxscript import ir

    read = 1 if tokens == 1 else "tokens"
    sizes: dict[str, list[Any]] = {"input_ids": ["batch", read], "attention_mask": ["batch", f"past + {read}"]}
    sizes |= {"logits": ["batch", "kept", None]}
    for name in names:
        keys = name.startswith("past_key_values")
        sizes[name] = ["batch", None, "past"] if keys else ["batch"]
        sizes[present(name)] = ["batch", None, f"past + {read}"] if keys else ["batch"]
    for value in [*model.graph.inputs, *model.graph.outputs]:
        given = sizes.get(value.name, [])
        sides = [*given, *[None] * (len(value.shape) - len(given))]
        value.shape = ir.Shape([old if new is None else new for new, old in zip(sides, value.shape, strict=True)])
    kept = {*model.graph.inputs, *model.graph.outputs}
    for part in [model, model.graph, *model.functions.values()]:
        part.metadata_props.clear()
    for graph in [model.graph, *model.functions.values()]:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                if value not in kept:  # those that were traced call these dimensions otherwise
                    value.shape = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that it would know too."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _save_sharing(program: Any, folder: Path) -> None:
    """Writes STEP, with the weights that GRAPH has too as those. By their values: what the exporter turns round to
    multiply with has a name of its own in each graph."""
    from onnxscript import ir

    def content(tensor: Any) -> tuple[str, str, bytes]:
        return str(tensor.dtype), str(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()

    there: dict[tuple[str, str, bytes], Any] = {}
    for value in ir.load(folder / GRAPH).graph.initializers.values():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            there[content(tensor)] = tensor
    for name, value in program.model.graph.initializers.items():
        if value.const_value is not None and (same := there.get(content(value.const_value))) is not None:
            value.const_value = ir.ExternalTensor(
                same.location, same.offset, same.length, same.dtype, shape=same.shape, name=name, base_dir=folder,
            )  # fmt: skip
    ir.save(program.model, folder / STEP)
