"""From a Transformer to an untrained hybrid: everything is copied from the teacher but the replaced layers' mixers."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mohawk.models.casting import cast, exact_scales
from mohawk.models.delta_mixer import DeltaMixer
from mohawk.models.families import (
    attention_parts,
    check_causal_lm,
    check_supported,
    decoder_layers,
    decoder_shape,
    leaves_out_softcap,
)
from mohawk.models.generation_settings import saveable
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import SSM_LAYER, HybridConfig, attention_types, mixers_by_layer
from mohawk.models.initialisation import attention_input_size, copy_attention, copy_attention_to_delta, start_neutral
from mohawk.models.mixers import MIXERS, SSMMixer
from mohawk.models.sharding import fill, is_sharded, materialise, reshard, whole

log = logging.getLogger(__name__)

INITS = ("attention", "neutral", "random")
GATES = ("open", "output", "random")


def choose_layers(ssm_layers: str | Sequence[int], num_layers: int) -> list[int]:
    """Resolves "every_second" (1, 3, 5, ...), "all" or explicit indices to a sorted list of layer indices.

    Raises:
        ValueError: an unknown word, an index out of range or given twice, or no layer at all.
    """
    if isinstance(ssm_layers, str):
        words = {"every_second": range(1, num_layers, 2), "all": range(num_layers)}
        if ssm_layers not in words:
            raise ValueError(f"ssm_layers: got {ssm_layers!r}, allowed: every_second, all, or a list of layer indices")
        chosen = list(words[ssm_layers])
    else:
        chosen = sorted(int(i) for i in ssm_layers)
    if not chosen:
        raise ValueError(
            f"ssm_layers: no layer would be replaced in a model of {num_layers} layers; give all, or indices"
        )
    wrong = [i for i in chosen if not 0 <= i < num_layers]
    if wrong:
        raise ValueError(f"ssm_layers: got {wrong}, but the teacher's layers are numbered 0 to {num_layers - 1}")
    if len(set(chosen)) != len(chosen):
        raise ValueError("ssm_layers: a layer is named twice")
    return chosen


@torch.no_grad()
def hybrid_from_teacher(
    model: PreTrainedModel,
    ssm_layers: str | Sequence[int] = "every_second",
    mixer: str | Mapping[int, str] = "mamba2",
    init: str = "attention",
    *,
    gate: str | None = None,
    state_size: int | None = None,
    conv_kernel: int = 4,
    dtype: torch.dtype | None = None,
    spread: Callable[[HybridForCausalLM], None] | None = None,
) -> HybridForCausalLM:
    """A student: the teacher with the attention of some layers replaced by mixers with a state.

    Args:
        model: a causal LM of a supported family; left as it was.
        ssm_layers: layers to replace: "every_second", "all" or indices.
        mixer: "mamba2" (the stock Bamba mixer's mathematics), "discrete_mamba2" (the MOHAWK paper's), "gated_delta"
            (Qwen3.5's Gated DeltaNet) or "kimi_delta" (Kimi Linear's Kimi Delta Attention); or a mapping that names one
            of these for every layer that is replaced.
        init: "attention" copies q -> C, k -> B, v -> x, o -> out_proj (MambaInLlama, arXiv 2408.15237), for
            "gated_delta" and "kimi_delta" q, k, v and o as they are; needs state_size equal to the head dim. "random"
            leaves the mixer at its own initialisation; "neutral", of the two Mamba-2 mixers, does so with its
            projections, and starts with an identity convolution and a gate of 1, as Phi-Mamba did.
        gate: what z starts from under "attention": "open" (a constant; z rows 0), "output" (z from the output and
            value projections, as AWS hybrid-model-factory does) or "random". Default "open", and "output" in layers
            of "gated_delta", which has no constant gate.
        state_size: N; default the teacher's head dim.
        conv_kernel: taps of the causal convolution.
        dtype: of the student's weights; default the teacher's.
        spread: what is done to the student while it is on the meta device, `mohawk.models.sharding.shard` for one: of
            a sharded teacher and student no process ever holds more than a layer and the embedding whole.

    Returns:
        HybridForCausalLM with the teacher's weights elsewhere, on its device.

    Raises:
        ValueError: unsupported family, unknown option, a state size "attention" cannot fill, or a teacher whose
            attention implementation leaves out its softcap.
    """
    check_supported(model.config)
    check_causal_lm(model, "converted to a hybrid")
    shape = decoder_shape(model.config)
    state_size = shape.head_dim if state_size is None else state_size
    chosen = choose_layers(ssm_layers, shape.num_layers)
    mixers = mixers_by_layer(mixer, chosen)
    kinds = {name: MIXERS[name] for name in mixers.values()}
    if init not in INITS:
        raise ValueError(f"init: got {init!r}, allowed: {', '.join(INITS)}")
    never_open = [name for name, kind in kinds.items() if not kind.constant_gate]
    if gate not in (None, *GATES):
        raise ValueError(f"gate: got {gate!r}, allowed: {', '.join(GATES)}")
    if (init, gate) == ("attention", "open") and never_open:
        raise ValueError(
            f"gate: got 'open', a constant gate, which a {never_open[0]} mixer has no bias for; use gate 'output'"
        )
    deltas = [name for name, kind in kinds.items() if issubclass(kind, DeltaMixer)]
    if init == "neutral" and deltas:
        raise ValueError(
            f"init: got 'neutral', which starts from a gate of 1; a {deltas[0]} mixer cannot have that one, use init "
            "'attention' or 'random'"
        )
    if init == "attention" and state_size != shape.head_dim:
        raise ValueError(
            f"init 'attention' copies q and k into C and B, so state_size must be the head dim {shape.head_dim}, "
            f"got {state_size}; leave state_size out or use init 'random'"
        )
    if leaves_out_softcap(model.config):
        raise ValueError(
            f"the teacher bounds its attention's scores (softcap {model.config.attn_logit_softcapping}), which its "
            f"attention {model.config._attn_implementation!r} leaves out; load it with attn_implementation='eager'"
        )
    base_config = copy.deepcopy(model.config)
    if hasattr(base_config, "quantization_config"):
        delattr(base_config, "quantization_config")
    twin = model
    reshard(model)
    if is_sharded(model):  # for parts to be put together in, a layer at a time
        with torch.device("meta"):
            twin = type(model)(model.config)
    parts = attention_parts(decoder_layers(twin)[0].self_attn)
    constant = [name for name in kinds if init == "neutral" or (init, gate_of(name, gate)) == ("attention", "open")]
    config = HybridConfig(
        base_config=base_config,
        layer_types=[SSM_LAYER if i in mixers else kind for i, kind in enumerate(attention_types(base_config))],
        mixer=mixers,
        mixer_state_size=state_size,
        mixer_conv_kernel=conv_kernel,
        # one switch for both projections: an output bias must be kept, and a constant gate needs a bias on z
        mixer_bias=parts.o.bias is not None or any(kinds[name].gate_in_projection for name in constant),
    )
    config._attn_implementation = model.config._attn_implementation
    if init == "attention" and deltas and any(one.bias is not None for one in (parts.q, parts.k, parts.v)):
        words = " and ".join(deltas)
        log.warning(
            f"the teacher's biases of queries, keys and values are left out: {words} mixers have no place for them"
        )
    with torch.device("meta"):
        student = HybridForCausalLM(config)
    config.dtype = dtype or model.dtype  # which says what a state takes
    cast(student, config.dtype)
    if spread is not None:
        spread(student)
    seed = int(torch.randint(2**31, (), device="cpu"))
    if model.device.type != "meta":
        materialise(student, model.device)
        _copy_outside(model, student, chosen)
        for i in chosen:
            _fill_mixer(model, twin, student, i, seed + i, init, gate_of(mixers[i], gate))
    student.generation_config = saveable(model.generation_config)
    return student.train(model.training)


def gate_of(mixer: str, gate: str | None) -> str:
    """What one mixer's gate starts from where `gate` is asked for, or nothing."""
    return gate or ("open" if MIXERS[mixer].constant_gate else "output")


def _copy_outside(model: PreTrainedModel, student: HybridForCausalLM, replaced: Sequence[int]) -> None:
    """Everything but the mixers, a tensor at a time, so that of sharded models no more than that is ever whole."""
    own = dict(student.named_parameters(remove_duplicate=False)) | dict(student.named_buffers())
    left = set(own) - {name for name in own for i in replaced if f"layers.{i}.self_attn." in name}

    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        if name in left:
            fill(own[name], whole(tensor))
            left.discard(name)
    for name in list(left):  # transformers keeps some of a rotary embedding's by turns as buffers and beside them
        if isinstance(tensor := _at(model, name), Tensor) and not isinstance(own[name], nn.Parameter):
            fill(own[name], tensor)
            left.discard(name)
    exact_scales(student)
    if left and not (student.config.tie_word_embeddings and left == {"lm_head.weight"}):
        raise RuntimeError(f"weights without a source in the teacher: {sorted(left)}")


def _at(module: Any, name: str) -> Any:
    """What lies under a dotted name; None where nothing does."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def _fill_mixer(
    model: PreTrainedModel, twin: PreTrainedModel, student: HybridForCausalLM, i: int, seed: int, init: str, gate: str
) -> None:
    """The mixer of layer i, from attention or by itself; what is random in it is of the seed alone. twin: the model, or
    where that is sharded one of its class, on the meta device."""
    own = decoder_layers(student)[i].self_attn
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        mixer = student.config.make_mixer(i)
        for module in reversed(list(mixer.modules())):  # the parts first
            student._init_weights(module)
    cast(mixer, student.dtype)
    mixer.to(model.device)
    if init == "attention":
        size, heads = attention_input_size(model, i), decoder_shape(model.config).num_kv_heads
        attention = decoder_layers(twin)[i].self_attn
        if twin is not model:  # whole in its own dtype, which a forward pass's gathering would round
            theirs = decoder_layers(model)[i].self_attn
            attention.load_state_dict({name: whole(p) for name, p in theirs.named_parameters()}, assign=True)
        if isinstance(mixer, DeltaMixer):
            copy_attention_to_delta(attention, mixer, size, heads, gate)
        else:
            assert isinstance(mixer, SSMMixer)
            copy_attention(attention, mixer, size, heads, gate)
        if twin is not model:
            attention.to("meta")
    elif init == "neutral":
        assert isinstance(mixer, SSMMixer)  # or it was refused
        start_neutral(mixer)
    values = dict(mixer.named_parameters())
    for name, parameter in own.named_parameters():
        fill(parameter, values[name])
