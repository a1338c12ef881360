"""Starting values of mixers: from the attention that they replace, or neutral ones."""

import math
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from mohawk.models.delta_mixer import DeltaMixer, GatedDeltaMixer, KimiDeltaMixer
from mohawk.models.families import Family, Projection, attention_parts, decoder_layers, family_of
from mohawk.models.mixers import OPEN_GATE, Mamba2Mixer, SSMMixer
from mohawk.models.sharding import whole

# See copy_attention
X_SIZE = 0.1  # rms of x before its SiLU, where SiLU is nearly x / 2
CONTENT = 0.25  # how much of q.k / sqrt(d) enters the first mixing matrix
AVERAGED = 0.2  # rms of attention's output over that of its values
RESTING = 0.2  # attention rests mostly on its first token, whose value is near 0: this much of an average is left
NORM_INPUT = 0.1  # rms of the output norm's input over sqrt(eps): below 1 the norm is nearly linear
SILU_SIZE = 0.6  # rms of silu(z) for z of rms 1
SIGMOID_SIZE = 0.54  # rms of sigmoid(z) for z of rms 1
OPEN_SIGMOID = 0.5  # sigmoid(0)
SMALLEST = 1e-4  # of the largest head's values: below it they are scaled no further, which would overflow
SLOWEST, FASTEST = 3e-2, 2.0  # decay per token of the first and the last head: averages over 33 and 1/2 tokens


@torch.no_grad()
def copy_attention(
    attention: nn.Module, mixer: SSMMixer, input_size: Tensor, num_kv_heads: int, gate: str = "open"
) -> None:
    """Fills a mixer from an attention layer: q -> C, k -> B, v -> x, o -> out_proj, kv rows repeated per query head.

    The conv starts as the identity up to a scale (only its last tap is not 0), and those scales and the conv's biases
    make the mixing matrix start near a linearised softmax, exp(scale q.k) ~ 1 + scale q.k, averaged over a
    time that differs from head to head: a constant part in C and B gives the 1, dt (or the decay) the averaging. The
    scale of attention is the matrix's from the start, as phase 1 wants it: rows sum to RESTING, what attention leaves
    to tokens other than the one it rests on.

    Rotary embeddings have no counterpart in a mixer and are left out. A norm of q and k divides each token by its own
    size, which no linear map does: the rows are divided by the size that is expected, and the norm's weight and bias
    are kept. A softcap on the scores is left out, since it is nearly the identity at the sizes linearised here.

    Args:
        attention: a supported family's attention module.
        mixer: of as many heads, head_dim = state_size = the attention's head dim.
        input_size: (D,) root mean square of each channel of the layer's input, as `attention_input_size` estimates it;
            with it the sizes of v, and of q and k before their norms, are estimated without data.
        num_kv_heads: of the attention.
        gate: as in `hybrid_from_teacher`.
    """
    shared_by, p = mixer.num_heads // num_kv_heads, mixer.head_dim
    parts = attention_parts(attention)

    def per_head(weight: Tensor, copies: int) -> Tensor:
        return repeat(weight, "(h p) ... -> (h copies p) ...", p=p, copies=copies)

    rows = mixer.slices()
    mixer.conv1d.weight.zero_()
    mixer.conv_bias.zero_()
    # rms of each head's values
    square = (per_head(parts.v.weight, shared_by).float() * input_size.float()).square().sum(1)
    size = reduce(square, "(h p) -> h", "mean", p=p).sqrt()
    # a head without values, as pruning leaves some, puts out nothing whatever its size is taken for
    least = torch.where(size.max() > 0, size.max() * SMALLEST, 1.0)
    size = repeat(torch.maximum(size, least), "h -> (h p)", p=p)
    silu = mixer.activation == "silu"
    slope, offset = (0.5, 0.0) if silu else (1.0, 0.0)
    # x: in SiLU's nearly linear range; the output norm's weight takes the scale out again
    taps = {"x": X_SIZE / size if silu else torch.ones_like(size)}
    # B, C: (constant + scaled k).(constant + scaled q) = RESTING * (1 + CONTENT * scale * k.q)
    constant = (RESTING / p) ** 0.5
    if silu:
        offset, slope = _silu_inverse(constant)
    tap = (RESTING * CONTENT * parts.scale) ** 0.5 / slope
    taps["B"] = taps["C"] = torch.full((mixer.group_size,), tap)
    offsets = {"x": 0.0, "B": offset if silu else constant, "C": offset if silu else constant}
    start = 0
    for name, projection, copies in (
        ("x", parts.v, shared_by),
        ("B", _normed(parts.k, parts.key_norm, parts.norm_offset, input_size, p), shared_by),
        ("C", _normed(parts.q, parts.query_norm, parts.norm_offset, input_size, p), 1),
    ):
        weight = per_head(projection.weight, copies)
        channels = slice(start, start + len(weight))
        start += len(weight)
        mixer.in_proj.weight[rows[name]] = weight
        mixer.conv1d.weight[channels, 0, -1] = taps[name].to(mixer.conv1d.weight)
        mixer.conv_bias[channels] = offsets[name]
        if projection.bias is not None:
            mixer.conv_bias[channels] += per_head(projection.bias[:, None], copies)[:, 0] * taps[name].to(
                mixer.conv_bias
            )
    mixer.D.zero_()
    mixer.output.weight.copy_(parts.o.weight)
    if mixer.in_proj.bias is not None:
        mixer.in_proj.bias.zero_()
        mixer.output.bias.zero_()
        if parts.o.bias is not None:
            mixer.output.bias.copy_(parts.o.bias)
    # the decay rows start small: decays are then set by their biases alone, spread over the heads
    mixer.in_proj.weight[rows["decay"]] *= 0.1
    if isinstance(mixer, Mamba2Mixer):
        # an average over the past: sum_j dt exp(-rate (i - j)) = dt / (1 - exp(-rate)) = 1
        rate = torch.exp(torch.linspace(math.log(SLOWEST), math.log(FASTEST), mixer.num_heads))
        dt = -torch.expm1(-rate)
        mixer.A_log.copy_(torch.log(rate / dt))
        mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
    if gate == "open":
        mixer.in_proj.weight[rows["z"]] = 0.0
        if isinstance(mixer, Mamba2Mixer):
            _open_gate(mixer, size)
    elif gate == "output":
        values = per_head(parts.v.weight, shared_by)
        mixer.in_proj.weight[rows["z"]] = 0.5 * (parts.o.weight.T + values)


@torch.no_grad()
def copy_attention_to_delta(
    attention: nn.Module, mixer: DeltaMixer, input_size: Tensor, num_kv_heads: int, gate: str = "output"
) -> None:
    """Fills a gated delta rule from an attention layer: q, k, v and o as they are, kv rows repeated per query head.

    The conv starts as the identity up to a scale at which its SiLU is nearly linear; the norms of queries and keys take
    that scale out again, and the output's projection that of the values, which the output norm loses. Half of what
    stands under a key is replaced, and decays differ from head to head as in `copy_attention`, not from channel to
    channel. Biases of q, k and v have no place, rotary embeddings and softcaps no counterpart. Arguments as in
    `copy_attention`; an "open" gate, which Gated DeltaNet cannot have, is Kimi Delta Attention's sigmoid(0) = 1/2, and
    of an "output" gate that has p channels of the best rank.
    """
    shared_by, p = mixer.num_heads // num_kv_heads, mixer.head_dim
    parts, rows, weights = attention_parts(attention), mixer.slices(), mixer.input_weights()

    def per_head(weight: Tensor, copies: int) -> Tensor:
        return repeat(weight, "(h p) ... -> (h copies p) ...", p=p, copies=copies)

    def head_sizes(weight: Tensor) -> Tensor:
        """(h*p) rms of each head's rows, for every one of its channels."""
        square = (weight.float() * input_size.float()).square().sum(1)
        size = reduce(square, "(h p) -> h", "mean", p=p).sqrt()
        least = torch.where(size.max() > 0, size.max() * SMALLEST, 1.0)
        return repeat(torch.maximum(size, least), "h -> (h p)", p=p)

    mixer.conv1d.weight.zero_()
    for name, projection, copies in (
        ("q", _normed(parts.q, parts.query_norm, parts.norm_offset, input_size, p), 1),
        ("k", _normed(parts.k, parts.key_norm, parts.norm_offset, input_size, p), shared_by),
        ("v", parts.v, shared_by),
    ):
        weight = per_head(projection.weight, copies)
        weights[name].copy_(weight)
        mixer.conv1d.weight[rows[name], 0, -1] = (X_SIZE / head_sizes(weight)).to(mixer.conv1d.weight)
    values = per_head(parts.v.weight, shared_by)
    scale = AVERAGED * head_sizes(values)
    if gate == "output":
        z = 0.5 * (parts.o.weight.T + values)
        scale = scale / _make_gate(mixer, z / head_sizes(z)[:, None])
    elif gate == "open":
        assert isinstance(mixer, KimiDeltaMixer)  # or it was refused
        mixer.g_b_proj.weight.zero_()
        scale = scale / OPEN_SIGMOID
    mixer.output.weight.copy_(parts.o.weight * scale)
    if parts.o.bias is not None:
        mixer.output.bias.copy_(parts.o.bias)
    # the gates' rows start small: they are then set by their constants alone
    if isinstance(mixer, KimiDeltaMixer):
        decays, small = mixer.forget_gate, (mixer.b_proj, mixer.forget_gate.f_b_proj)
    else:
        assert isinstance(mixer, GatedDeltaMixer)
        decays, small = mixer, (mixer.in_proj_b, mixer.in_proj_a)
    for projection in small:
        projection.weight *= 0.1
    rate = torch.exp(torch.linspace(math.log(SLOWEST), math.log(FASTEST), mixer.num_heads))
    decays.A_log.copy_(torch.log(rate).view_as(decays.A_log))
    decays.dt_bias.fill_(math.log(math.e - 1))  # softplus of it is 1


def _make_gate(mixer: DeltaMixer, z: Tensor) -> float:
    """Sets what projects the gate to z (h*p, D), or as near as its rank allows; the size of the gate for z of rms 1."""
    if isinstance(mixer, GatedDeltaMixer):
        mixer.in_proj_z.weight.copy_(z)
        return SILU_SIZE
    assert isinstance(mixer, KimiDeltaMixer)
    left, sizes, right = torch.linalg.svd(z.float(), full_matrices=False)
    root = sizes[: mixer.head_dim].sqrt()
    mixer.g_b_proj.weight.zero_()[:, : len(root)] = left[:, : len(root)] * root
    mixer.g_a_proj.weight.zero_()[: len(root)] = root[:, None] * right[: len(root)]
    return SIGMOID_SIZE


@torch.no_grad()
def start_neutral(mixer: SSMMixer) -> None:
    """Random projections between an identity convolution and a gate of 1: what Phi-Mamba was trained from."""
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, 0, -1] = 1.0
    mixer.conv_bias.zero_()
    mixer.in_proj.weight[mixer.slices()["z"]] = 0.0
    if mixer.in_proj.bias is not None:
        mixer.in_proj.bias.zero_()
        mixer.output.bias.zero_()
    mixer.gate_bias().fill_(OPEN_GATE)


@torch.no_grad()
def attention_input_size(model: Any, index: int) -> Tensor:
    """(D,) float32 root mean square of each channel of what a layer's attention reads, estimated without data.

    Behind a norm: the norm's weight, and its bias if it has one. In a family whose attention reads the residual stream
    itself (OLMo 2), that stream is the embedding plus what the norms behind earlier attentions and MLPs let through;
    taken as uncorrelated, their squares add up.
    """
    family, layers = family_of(model.config), decoder_layers(model)
    if family.input_norm is not None:
        return _norm_square(getattr(layers[index], family.input_norm), family).sqrt()
    embedding = whole(model.model.embed_tokens.weight)
    square = torch.linalg.vector_norm(embedding, dim=0, dtype=torch.float32).square() / len(embedding)
    for layer in layers[:index]:
        square = square + sum(
            _norm_square(getattr(layer, name), family) for name in (str(family.output_norm), family.mlp_norms[-1])
        )
    return square.sqrt()


def _norm_square(norm: Any, family: Family) -> Tensor:
    square = (whole(norm.weight).float() + family.norm_offset).square()
    bias = getattr(norm, "bias", None)
    return square if bias is None else square + whole(bias).float().square()


def _normed(projection: Projection, norm: Any, offset: float, input_size: Tensor, head_dim: int) -> Projection:
    """The projection that comes closest to projection and norm, given the size of its input's channels (D,).

    A norm's weight, to which `offset` is added, has head_dim entries (Qwen3's RMSNorm, Phi's LayerNorm), as many for
    each head (Cohere's), or one a row (OLMo 2 norms all heads together).
    """
    if norm is None:
        return projection
    weight, bias = projection.weight.float(), projection.bias
    bias = weight.new_zeros(len(weight)) if bias is None else bias.float()
    size = head_dim if norm.weight.shape[-1] == head_dim else len(weight)  # rows that are normalised together
    weight, bias = rearrange(weight, "(g r) D -> g r D", r=size), rearrange(bias, "(g r) -> g r", r=size)
    if type(norm).__name__.endswith("LayerNorm"):  # transformers has classes of its own besides torch's
        weight, bias = weight - weight.mean(1, keepdim=True), bias - bias.mean(1, keepdim=True)
    square = (weight * input_size.float()).square().sum(-1) + bias.square()
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps  # all there is in a head of zeros
    scale = (norm.weight.float() + offset) / (square.mean(1, keepdim=True) + eps).sqrt()  # (groups, rows of a group)
    weight, bias = weight * scale[..., None], bias * scale
    if getattr(norm, "bias", None) is not None:
        bias = bias + norm.bias.float()
    dtype = projection.weight.dtype
    return Projection(rearrange(weight, "g r D -> (g r) D").to(dtype), bias.flatten().to(dtype))


def _open_gate(mixer: Mamba2Mixer, size: Tensor) -> None:
    """A constant gate under which the output norm passes sizes on, so that out_proj sees what o_proj saw.

    RMSNorm per head gives every token's head the same size, but an attention head that rests on a sink puts out next
    to nothing. With an input well below sqrt(eps) the norm only multiplies. SiLU's negative tail makes it so small:
    there silu(z) ~ z exp(z), and a change of z multiplies the gate, whatever its size.
    """
    root = mixer.norm.eps**0.5
    gate = NORM_INPUT * root / (RESTING * AVERAGED * X_SIZE / 2)
    z, step = -1.2784645, 4.0  # the minimum of silu, -0.278; left of it silu rises to 0
    while step > 1e-6:
        if -(z - step) / (1 + math.exp(step - z)) > gate:
            z -= step
        step /= 2
    mixer.in_proj.bias[mixer.slices()["z"]] = z
    mixer.norm.weight.copy_(size * (2 / X_SIZE) * root * (1 + math.exp(-z)) / z)


def _silu_inverse(value: float) -> tuple[float, float]:
    """(x, slope there) with silu(x) = value > 0, by Newton's method."""
    x = 2 * value
    for _ in range(30):
        s = 1 / (1 + math.exp(-x))
        slope = s * (1 + x * (1 - s))
        x -= (x * s - value) / slope
    return x, slope
