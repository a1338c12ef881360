"""Cases for test_causal_conv1d_triton.py; run with TRITON_INTERPRET=1. torch's convolution in float64, document by
document, is the truth. Memory that nobody wrote is filled with NaN, so it would show."""

import sys

import torch
from ssd_triton_cases import documents, error  # and numbers rounded to bfloat16 as GPUs do it

from mohawk.kernels.causal_conv1d import triton_backend
from mohawk.kernels.causal_conv1d.reference import causal_conv1d_reference

NAMES = ("x", "weight", "bias", "initial_state")


def problem(batch, seq, channels, kernel, without=(), dtype=torch.float32):
    g = torch.Generator().manual_seed(seq + channels)
    shapes = ((batch, seq, channels), (channels, kernel), (channels,), (batch, channels, kernel - 1))
    made = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in zip(NAMES, shapes, strict=True)}
    return {name: value for name, value in made.items() if name not in without}


def by_document(x, weight, bias=None, initial_state=None, *, ids, activation):
    """Each document as a row of its own; the first of a row goes on from the state."""
    rows = []
    for row in range(x.shape[0]):
        cuts = [x.shape[1]] if ids is None else torch.unique_consecutive(ids[row], return_counts=True)[1].tolist()
        state, pieces = None if initial_state is None else initial_state[row : row + 1], []
        for piece in x[row : row + 1].split(cuts, 1):
            pieces.append(causal_conv1d_reference(piece, weight, bias, state, activation))
            state = None
        rows.append(torch.cat(pieces, 1))
    return torch.cat(rows)


def ours(x, weight, bias=None, initial_state=None, *, ids, activation):
    return triton_backend.causal_conv1d_triton(x, weight, bias, initial_state, ids, activation)


def run(function, given, dtype=None, **options):
    """y and all gradients, with some weights of y; operands keep their layout."""
    leaves = {name: (v if dtype is None else v.to(dtype)).detach().requires_grad_() for name, v in given.items()}
    y = function(**leaves, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16).to(y.dtype)
    found = torch.autograd.grad(y, list(leaves.values()), weights, allow_unused=True, materialize_grads=True)
    return dict(zip(("y", *(f"d{name}" for name in given)), (y, *found), strict=True))


def compare(label, given, ids=None, activation="silu"):
    """At most twice the error of torch in the same dtype; three roundings to float32 are always allowed."""
    options = {"ids": ids, "activation": activation}
    exact = run(by_document, given, torch.float64, **options)
    plain, mine = run(by_document, given, **options), run(ours, given, **options)
    for name, truth in exact.items():
        assert mine[name].dtype == plain[name].dtype and mine[name].shape == truth.shape, (label, name)
        limit = max(2 * error(plain[name], truth), 3.6e-7)
        assert error(mine[name], truth) <= limit, (label, name, error(mine[name], truth), limit)
    return 1


def shapes():
    for seq, channels, kernel, activation in (
        (37, 20, 4, "silu"),
        (1, 5, 4, None),
        (2, 17, 3, "silu"),
        (16, 16, 2, None),
    ):
        yield compare(f"{seq}", problem(2, seq, channels, kernel), None, activation)
    yield compare("one tap", problem(1, 17, 3, 1), documents(1, 17, 5))
    yield compare("documents", problem(2, 37, 20, 4), documents(2, 37, 5))
    yield compare("documents, no silu", problem(2, 37, 20, 4), documents(2, 37, 5), None)
    yield compare("documents of one token", problem(1, 20, 3, 4), torch.arange(20).expand(1, 20))
    yield compare("weight and x alone", problem(2, 20, 3, 4, without=("bias", "initial_state")), documents(2, 20, 6))
    yield compare("bfloat16", problem(2, 37, 20, 4, dtype=torch.bfloat16), documents(2, 37))
    yield compare("float16", problem(1, 20, 5, 4, dtype=torch.float16))
    given = problem(1, 20, 5, 4)
    given["x"][0, 7] = float("nan")
    y = ours(**given, ids=torch.arange(20).div(9, rounding_mode="floor").expand(1, 20), activation=None)
    assert y[0, 7:9].isnan().all() and y[0, 9:].isfinite().all()  # not across the border
    yield 1


def layouts():
    given, ids = problem(2, 20, 6, 4), documents(2, 20, 6)

    def reversed_(x):
        order = tuple(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)

    for lay in (
        reversed_,
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
        lambda x: x[:1].expand_as(x),
    ):
        odd = {name: lay(value) for name, value in given.items()}
        yield compare("layout", odd, lay(ids))


if __name__ == "__main__":
    triton_backend.TOKENS, triton_backend.CHANNELS = 16, 16  # several tiles at small sizes
    triton_backend.LAUNCH |= {"TOKENS": 16, "CHANNELS": 16}
    print(sum({"shapes": shapes, "layouts": layouts}[sys.argv[1]]()), "cases right")
