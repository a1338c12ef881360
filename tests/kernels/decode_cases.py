"""Problems for decoding steps, and what they have to be: the whole sequence in float64, by torch's convolution and the
recurrences' definitions."""

import torch
import torch.nn.functional as F

from mohawk import gated_delta_rule, ssd
from mohawk.kernels.decode import delta_decode_step, ssd_decode_step
from mohawk.kernels.decode.in_place import by_tap

KERNEL = 4


def ssd_problem(form, batch, heads, head_dim, state, groups, tokens=4):
    """(what moves, (batch, tokens, ...)), (what stays), by the names of `ssd_decode_step`."""
    g = torch.Generator().manual_seed(heads + state)
    channels, inner = heads * head_dim + 2 * groups * state, heads * head_dim

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    moving = {"inputs": draw(batch, tokens, channels), "gate": draw(batch, tokens, inner),
              "decay": draw(batch, tokens, heads)}  # fmt: skip
    fixed = {"weight": draw(channels, KERNEL), "bias": draw(channels), "D": draw(heads)}
    if form == "mamba2":
        fixed |= {"A_log": draw(heads), "dt_bias": draw(heads), "norm_weight": draw(inner)}
    else:
        fixed |= {"gate_bias": draw(inner), "activation": None}
    return moving, fixed, draw(batch, heads, head_dim, state)


def delta_problem(form, batch, heads, head_dim, state, groups, tokens=4):
    """As `ssd_problem`, by the names of `delta_decode_step`."""
    g = torch.Generator().manual_seed(heads + state)
    channels, inner = heads * head_dim + 2 * groups * state, heads * head_dim

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    moving = {"inputs": draw(batch, tokens, channels), "gate": draw(batch, tokens, inner),
              "beta": draw(batch, tokens, heads), "decay": draw(batch, tokens, heads)}  # fmt: skip
    fixed = {"weight": draw(channels, KERNEL), "norm_weight": draw(head_dim)}
    if form == "gated_delta":
        fixed |= {"A_log": draw(heads), "dt_bias": draw(heads)}
    else:
        moving["decay"] = -draw(batch, tokens, heads, state).abs()
        fixed |= {"gate_activation": "sigmoid"}
    return moving, fixed, draw(batch, heads, state, head_dim)


PROBLEMS = {"mamba2": ssd_problem, "discrete_mamba2": ssd_problem, "gated_delta": delta_problem,
            "kimi_delta": delta_problem}  # fmt: skip


def convolved(moving, fixed):
    """(batch, tokens, channels), from nothing before the first token."""
    inputs, weight = moving["inputs"], fixed["weight"]
    padded = F.pad(inputs.mT, (KERNEL - 1, 0))
    y = F.conv1d(padded, weight.unsqueeze(1), fixed.get("bias"), groups=weight.shape[0]).mT
    return y if fixed.get("activation", "silu") is None else F.silu(y)


def whole(form, moving, fixed, state):
    """(batch, tokens, heads * head_dim) and the state afterwards, over the whole sequence."""
    y, (heads, rows, columns) = convolved(moving, fixed), state.shape[1:]
    if PROBLEMS[form] is ssd_problem:
        groups = (y.shape[-1] - heads * rows) // (2 * columns)
        x, B, C = y.split([heads * rows, groups * columns, groups * columns], -1)
        B, C = (value.unflatten(-1, (groups, columns)) for value in (B, C))
        if form == "mamba2":
            dt = F.softplus(moving["decay"] + fixed["dt_bias"])
            log_decay = -dt * fixed["A_log"].exp()
        else:
            dt, log_decay = None, -F.softplus(moving["decay"])
        y, after = ssd(
            x.unflatten(-1, (heads, rows)), log_decay, B, C, input_scale=dt, D=fixed["D"], initial_state=state,
            return_final_state=True, backend="reference",
        )  # fmt: skip
        y = y.flatten(2) * F.silu(moving["gate"] + fixed.get("gate_bias", 0))
        if form == "mamba2":
            normed = F.rms_norm(y.unflatten(-1, (groups, -1)), (heads * rows // groups,), eps=1e-5)
            y = normed.flatten(2) * fixed["norm_weight"]
        return y, after
    groups = (y.shape[-1] - heads * columns) // (2 * rows)
    q, k, v = y.split([groups * rows, groups * rows, heads * columns], -1)
    q, k = (value.unflatten(-1, (groups, rows)).repeat_interleave(heads // groups, 2) for value in (q, k))
    q, k = (value / (value.square().sum(-1, keepdim=True) + 1e-6).sqrt() for value in (q, k))
    log_decay = moving["decay"]
    if form == "gated_delta":
        log_decay = -fixed["A_log"].exp() * F.softplus(log_decay + fixed["dt_bias"])
    y, after = gated_delta_rule(
        q / rows**0.5, k, v.unflatten(-1, (heads, columns)), beta=moving["beta"].sigmoid(), log_decay=log_decay,
        initial_state=state, return_final_state=True, backend="reference",
    )  # fmt: skip
    z = moving["gate"].unflatten(-1, (heads, columns))
    y = F.rms_norm(y, (columns,), fixed["norm_weight"], 1e-6) * (F.silu(z) if form == "gated_delta" else z.sigmoid())
    return y.flatten(2), after


def steps(form, moving, fixed, state, backend, dtype, wide=None, real=None):
    """The same token by token, and the window and state afterwards. dtype: of the inputs, gate and window; wide: of
    everything else; real: (batch, tokens)."""
    wide = wide or dtype

    def cast(name, x):
        return x if not isinstance(x, torch.Tensor) else x.to(dtype if name in ("inputs", "gate") else wide)

    step = ssd_decode_step if PROBLEMS[form] is ssd_problem else delta_decode_step
    fixed = {name: cast(name, x) for name, x in fixed.items()}
    moving = {name: cast(name, x) for name, x in moving.items()}
    batch, tokens, channels = moving["inputs"].shape
    window, state = by_tap(torch.zeros(batch, channels, KERNEL, dtype=dtype)), state.to(wide, copy=True)
    at = window.data_ptr(), state.data_ptr()
    made = [
        step(
            window, state, **{name: x[:, t] for name, x in moving.items()}, **fixed, backend=backend,
            real=None if real is None else real[:, t],
        )
        for t in range(tokens)
    ]  # fmt: skip
    assert at == (window.data_ptr(), state.data_ptr())
    return torch.stack(made, 1), window, state
