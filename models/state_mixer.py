"""What every mixer with a state shares: padding, packed rows, the cache, and the short convolution in front.

Shapes: b batch, n sequence, D hidden size, h heads, p head dim, N state size, k conv kernel.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mohawk.kernels.causal_conv1d.interface import causal_conv1d, causal_conv1d_step
from mohawk.kernels.decode.in_place import by_tap
from mohawk.kernels.mixing.operands import DeltaMixing, SSDMixing
from mohawk.models.call import documents_in, one_cache, refuse_unknown


class CausalConv1d(nn.Conv1d):
    """The depthwise Conv1d of transformers' recurrent layers, weights under its names, applied by our own kernel.

    A module that is called, so that hooks run (those that bring offloaded weights, for one).
    """

    def __init__(self, channels: int, kernel_size: int, activation: str | None, bias: bool = True):
        super().__init__(channels, channels, kernel_size, groups=channels, bias=bias)
        self.activation = activation

    # pyrefly: ignore[bad-override-param-name]  # x, as in causal_conv1d
    def forward(
        self,
        x: Tensor,
        *,
        channels: slice = slice(None),
        initial_state: Tensor | None = None,
        segment_ids: Tensor | None = None,
        step: bool = False,
    ) -> Tensor:
        """(b, n, channels) -> the same; or, for a `step`, the last inputs (b, channels, k) -> (b, channels).

        channels: which of the convolution's x holds. initial_state, segment_ids: as in `causal_conv1d`.
        """
        weight, bias = self.weight[channels, 0], None if self.bias is None else self.bias[channels]
        if step:
            return causal_conv1d_step(x, weight, bias, activation=self.activation)
        return causal_conv1d(
            x, weight, bias, activation=self.activation, initial_state=initial_state, segment_ids=segment_ids
        )


@functools.cache
def _says_how_it_decodes(kind: type) -> bool:
    """Whether `decode_options` of a class of mixers is of the class that says what a step is, or of one below: a class
    that changes a part of the step, and not them, decodes by its parts."""
    owners = {name: i for i, owner in reversed(list(enumerate(kind.__mro__))) for name in vars(owner)}
    parts = ("decay", "gates", "gate", "normed", "recur", "recur_step", "_step", "_cut", "_heads", "_normalised")
    return owners["decode_options"] <= min(owners[name] for name in parts if name in owners)


class StateMixer(nn.Module):
    """A mixer that goes through a row token by token with a state: projections -> causal conv -> recurrence -> gate ->
    output. Subclasses say what is projected and how the state goes on.

    Args:
        hidden_size: D, width of the residual stream.
        num_heads, head_dim: h and p, of the values that go in and out of the state; h * p need not equal D.
        state_size: N, the other side of a head's state.
        num_groups: g, how many heads there are of what writes the state and of what reads it (B and C, k and q);
            default one per head. h must be a multiple of g.
        conv_kernel: k, taps of the depthwise causal convolution.
        bias: a bias on the output's projection.
        norm_eps: epsilon of the output norm, where there is one.
        layer_idx: index of the layer in the model, for the cache.

    Attributes:
        inner_size: h * p.
        group_size: g * N.
        conv_size: channels of the convolution.
        outside_matrix: names of parameters that the mixing matrix does not depend on.
        label: the method's name, for people.
        kept_bytes: what a layer with this mixer keeps for the backward pass, in bytes a token for each channel of
            (residual stream, MLP, mixer), by the bytes of what matrices are multiplied in: 4, or 2 under autocast. A
            plan reads it, and is near enough with another mixer's.

    Raises:
        ValueError: if num_heads is not a multiple of num_groups.
    """

    label: str
    kept_bytes: dict[int, tuple[float, float, float]] = {4: (20.0, 16.0, 52.4), 2: (18.0, 8.0, 40.4)}
    activation: str | None = None  # after the conv
    conv_has_bias: bool = True
    constant_gate: bool = True  # whether the gate can be the same for all tokens
    gate_in_projection: bool = True  # whether a bias on the gate's projection is the constant part of the gate
    outside_matrix: tuple[str, ...] = ("out_proj.weight", "out_proj.bias", "norm.weight")
    output_name: str = "out_proj"  # of the output's projection, which is released under two names

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        state_size: int,
        num_groups: int | None = None,
        conv_kernel: int = 4,
        *,
        bias: bool = False,
        norm_eps: float = 1e-5,
        layer_idx: int = 0,
    ):
        super().__init__()
        num_groups = num_heads if num_groups is None else num_groups
        if num_heads % num_groups:
            raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_groups ({num_groups})")
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, head_dim
        self.state_size, self.num_groups, self.conv_kernel = state_size, num_groups, conv_kernel
        self.norm_eps, self.layer_idx = norm_eps, layer_idx
        self.inner_size = num_heads * head_dim
        self.group_size = num_groups * state_size
        self.conv_size = self.inner_size + 2 * self.group_size
        self.conv1d = CausalConv1d(self.conv_size, conv_kernel, self.activation, self.conv_has_bias)
        self.add_module(self.output_name, nn.Linear(self.inner_size, hidden_size, bias=bias))

    @property
    def output(self) -> nn.Linear:
        """The output's projection (h*p -> D)."""
        return getattr(self, self.output_name)

    def fresh(self) -> "StateMixer":
        """A new mixer of the same sizes on a model of width 1: cheap, and its vectors are those of any new mixer."""
        sizes = self.num_heads, self.head_dim, self.state_size, self.num_groups, self.conv_kernel
        return type(self)(1, *sizes, bias=self.output.bias is not None)

    # --- what a subclass defines ---------------------------------------------------------------------------------

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, n, D) -> inputs of the convolution (b, n, channels), the output's gate (b, n, h*p), and what decides how
        the state goes on (b, n, ...), before any activation."""
        raise NotImplementedError

    def recur(
        self,
        convolved: Tensor,
        raw: Tensor,
        padded: Tensor | None,
        segment_ids: Tensor | None,
        state: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """(b, n, channels), (b, n, ...) -> outputs (b, n, h, p) and, to `keep`, the state after the last token.

        padded: (b, n, 1), true where nothing may change the state; `convolved` is 0 there.
        """
        raise NotImplementedError

    def recur_step(self, convolved: Tensor, raw: Tensor, padded: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """`recur` of one token: its arguments without the sequence dimension."""
        raise NotImplementedError

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        """(b, n, h*p) outputs of the recurrence and gate -> input of the output's projection."""
        raise NotImplementedError

    def decode(
        self, window: Tensor, state: Tensor, inputs: Tensor, z: Tensor, raw: Tensor, real: Tensor | None
    ) -> Tensor:
        """A token's step from what is projected to the input of the output's projection (b, h*p), with the
        convolution's window (b, channels, k) and the state changed in place.

        inputs, z, raw: as `project` has them, without the sequence dimension. real: (b,), False at padding.
        """
        raise NotImplementedError

    def mixing(
        self, hidden_states: Tensor, segment_ids: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> SSDMixing | DeltaMixing:
        """The layer's mixing matrix, unmaterialised: only the projections it depends on are computed.

        Args:
            hidden_states: (b, n, D), the layer's normalised input.
            segment_ids: (b, n) integers, documents of a packed row; -1 is padding.
            padding_mask: (b, n), 0 at padding before or after a row's tokens; made into segment ids if none are given.

        Raises:
            ValueError: padding between a row's tokens, which a matrix over all positions has no place for.
        """
        raise NotImplementedError

    # --- shared --------------------------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache=None,
        past_key_values=None,
        segment_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """Stands in for a decoder layer's `self_attn`.

        Args:
            hidden_states: (b, n, D).
            attention_mask: the attention layers' mask. The scan is causal by construction, so only a (b, n) one is
                read: as padding_mask, where none is given.
            cache: a transformers cache whose layer `layer_idx` is a `LinearAttentionLayer`; read and updated.
            past_key_values: the cache by its name before transformers 5.24.
            segment_ids: (b, n) documents of a packed row: neither conv nor state crosses them.
            padding_mask: (b, n), 0 at padded positions, which may lie anywhere: the tokens of a row are treated as if
                they stood next to each other. Of a longer mask the last n columns count.
            kwargs: what else decoder layers hand to attention: seq_idx is segment_ids by another name, other known
                names are passed over (`call.HARMLESS`).

        Returns:
            (output (b, n, D), None), as attention returns (output, weights); the output is 0 at padded positions.

        Raises:
            TypeError: a keyword that is not known.
            ValueError: both names of the cache; a cache that records its past; documents named by cu_seq_lens alone.
        """
        where = f"{type(self).__name__}.forward"
        refuse_unknown(where, kwargs)
        cache = one_cache(where, cache, past_key_values)
        segment_ids = documents_in(where, segment_ids, kwargs)
        if cache is not None:
            layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
            if layer is None or not hasattr(layer, "conv_states"):
                raise ValueError(f"{where}: the cache has no state for this layer; take new_cache() of the student")
            if layer.record_past:
                raise ValueError(
                    f"{where}: the cache keeps its past so that it can be cut back, as speculative decoding does, but "
                    "a state cannot be; a hybrid student is neither drafted for nor a draft"
                )
        n = hidden_states.shape[1]
        if padding_mask is None and attention_mask is not None and attention_mask.dim() == 2:
            padding_mask = attention_mask
        real = None if padding_mask is None else padding_mask[:, padding_mask.shape[1] - n :].bool()
        inputs, z, raw = self.project(hidden_states)
        steps = n == 1 and cache is not None and cache.has_previous_state(self.layer_idx)
        if steps and self._decodes(layer := cache.layers[self.layer_idx]):
            states = layer.conv_states[0], layer.recurrent_states[0]
            at = None if real is None else real[:, 0]
            gated = self.decode(*states, inputs.squeeze(1), z.squeeze(1), raw.squeeze(1), at).unsqueeze(1)
        else:
            y = self._step(inputs, raw, cache, real) if steps else self._scan(inputs, raw, cache, real, segment_ids)
            gated = self.gate(y.reshape(z.shape), z).to(inputs.dtype)
        output = self.output(gated)
        # nothing is learnt at padding either: a norm of zeros has a huge gradient
        return output if real is None else output.masked_fill(~real[..., None], 0), None

    def _decodes(self, layer) -> bool:
        """Whether a step on this layer's states is `decode`'s: in inference, outside of a graph that is being compiled,
        where the modules whose weights it reads are as they were made (not offloaded, hooked or replaced).

        On a CPU the window is laid out for it.
        """
        window = layer.conv_states[0]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or window.shape[-1] != self.conv_kernel:
            return False
        if not _says_how_it_decodes(type(self)):
            return False
        for module, kind in self.read_by_decode():
            own = vars(module)
            if not isinstance(module, kind) or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
                return False
            if module.weight.is_meta:
                return False
        if window.is_cpu and window.stride(1) != 1:
            layer.conv_states[0] = by_tap(window)
        return True

    def read_by_decode(self) -> tuple[tuple[Any, type[nn.Module]], ...]:
        """Modules whose weights `decode` reads, without calling them, and their classes: an adapter around one
        has its weight too, and computes something else."""
        return ((self.conv1d, CausalConv1d),)

    def _scan(self, inputs: Tensor, raw: Tensor, cache, real: Tensor | None, segment_ids: Tensor | None) -> Tensor:
        """Any number of tokens, with or without a cache, which is updated: inputs of the convolution (b, n, channels)
        and raw gates (b, n, ...) -> (b, n, h, p).

        real: (b, n), False at padding. Such rows are scanned with their tokens in front and the padding behind, where
        it neither separates tokens nor, as its input and log decay are 0, changes the state.
        """
        back = padded = None
        if real is not None:
            back = torch.where(real, real.cumsum(1), real.sum(1, keepdim=True) + (~real).cumsum(1)) - 1
            order = torch.arange(real.shape[1], device=real.device).expand_as(back)
            order = torch.zeros_like(back).scatter(1, back, order)
            padded = ~real.gather(1, order)[..., None]
            inputs = _reordered(inputs, order).masked_fill(padded, 0)
            raw = _reordered(raw, order).masked_fill(padded, 0)
            segment_ids = None if segment_ids is None else segment_ids.gather(1, order)
        window, state = self._read_cache(cache)
        conv_state = None if window is None else window[..., 1:].to(inputs.dtype)
        convolved = self.conv1d(inputs, initial_state=conv_state, segment_ids=segment_ids)
        if padded is not None:
            convolved = convolved.masked_fill(padded, 0)
        y, state = self.recur(convolved, raw, padded, segment_ids, state, cache is not None)
        if cache is not None:
            self._write_window(cache, self._next_window(window, inputs, real))
            cache.update_recurrent_state(state, self.layer_idx)
        return y if back is None else _reordered(y, back)

    def _step(self, inputs: Tensor, raw: Tensor, cache, real: Tensor | None) -> Tensor:
        """`_scan` of one token on top of a cache, by operations that have gradients and modules that are called."""
        window = self._next_window(cache.layers[self.layer_idx].conv_states[0], inputs, real)
        self._write_window(cache, window)
        convolved = self.conv1d(window.to(inputs.dtype), step=True)
        if real is not None:
            convolved = convolved.masked_fill(~real, 0)
        state = cache.layers[self.layer_idx].recurrent_states[0]
        y, state = self.recur_step(convolved, raw[:, 0], None if real is None else ~real, state)
        cache.update_recurrent_state(state, self.layer_idx)
        return y[:, None]

    def _next_window(self, window: Tensor | None, inputs: Tensor, real: Tensor | None) -> Tensor:
        """The convolution's last k inputs (b, channels, k) after new ones (b, n, channels), the real ones in front."""
        b, n, channels = inputs.shape
        k = self.conv_kernel
        if window is None:
            window = inputs.new_zeros(b, channels, k)
        seen = torch.cat([window[..., -k:], inputs.transpose(1, 2).to(window.dtype)], -1)
        if real is None:
            return seen[..., n:]
        last = real.sum(1)[:, None] + torch.arange(k, device=inputs.device)
        return seen.gather(2, last[:, None].expand(-1, channels, -1))

    def _write_window(self, cache, window: Tensor) -> None:
        # the cache keeps the last k of all it is given
        cache.update_conv_state(window, self.layer_idx, conv_kernel_size=self.conv_kernel)

    def _read_cache(self, cache) -> tuple[Tensor | None, Tensor | None]:
        """The conv's last k inputs (b, channels, k) and the state, or None before any token."""
        if cache is None or not cache.has_previous_state(self.layer_idx):
            return None, None
        layer = cache.layers[self.layer_idx]
        # a copy, since the cache is overwritten in place
        return layer.conv_states[0][..., -self.conv_kernel :].clone(), layer.recurrent_states[0]


def _reordered(value: Tensor, order: Tensor) -> Tensor:
    """(b, n, ...) with the tokens of each row in another order, (b, n)."""
    index = order.view(*order.shape, *[1] * (value.dim() - 2))
    # as take_along_dim, which would fix the sizes of a graph that is traced for any
    return value.gather(1, index.expand(-1, -1, *value.shape[2:]))


def segments_of_padding(padding_mask: Tensor) -> Tensor:
    """(b, n) segment ids that say for a mixing matrix where a row's padding is. Raises ValueError where that lies
    between its tokens."""
    segment_ids = padding_mask.long() - 1
    if bool((F.pad(segment_ids, (1, 1), value=-1).diff(dim=-1).clamp_min(0).sum(-1) > 1).any()):
        raise ValueError("mixing: padding_mask has padding between a row's tokens; move it to one end")
    return segment_ids


def wide(x: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
