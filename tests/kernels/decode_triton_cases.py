"""Cases for test_decode.py; run with TRITON_INTERPRET=1. The whole sequence in float64 is the truth."""

import torch

from mohawk.kernels.decode import ssd_decode_step
from tests.kernels.decode_cases import KERNEL, PROBLEMS, steps, whole

# batch, heads, head_dim, state, groups
SHAPES = [(2, 4, 5, 7, 4), (1, 6, 33, 17, 3), (2, 1, 1, 1, 1)]


def close(made, true, size=1e-4):
    scale = true.abs().max()
    assert (made.double() - true).abs().max() <= size * scale, ((made.double() - true).abs().max(), scale)
    return 1


def compare(form, shape, dtype=torch.float32, size=1e-4):
    problem = PROBLEMS[form](form, *shape)
    y, after = whole(form, *problem)
    made, window, state = steps(form, *problem, "triton", dtype, torch.float32)
    assert torch.equal(window, problem[0]["inputs"].to(dtype).mT[..., -KERNEL:])
    return close(made, y, size) + close(state, after, size)


def padded(form):
    moving, fixed, state = PROBLEMS[form](form, 2, 4, 5, 7, 2)
    real = torch.tensor([[True, True, False, True], [True, False, False, True]])
    made, window, after = steps(form, moving, fixed, state, "triton", torch.float32, real=real)
    assert not made[~real].any()
    for row in (0, 1):
        alone = {name: x[row : row + 1, real[row]] for name, x in moving.items()}
        y, expected = whole(form, alone, fixed, state[row : row + 1])
        kept = real[row].sum()
        assert torch.equal(window[row, :, KERNEL - kept :].double(), alone["inputs"][0].T.float().double())
        yield close(made[row, real[row]], y[0]) + close(after[row], expected[0])


def layouts():
    """Windows channel by channel, states that are not contiguous, inputs that are columns of something wider."""
    moving, fixed, start = PROBLEMS["mamba2"]("mamba2", 2, 4, 5, 7, 2, tokens=1)
    y, after = whole("mamba2", moving, fixed, start)
    wide = torch.cat([x[:, 0] for x in moving.values()], -1).float()
    parts = wide.split([x.shape[-1] for x in moving.values()], -1)
    window = torch.zeros(2, moving["inputs"].shape[2], KERNEL)
    state = start.float().mT.contiguous().mT
    made = ssd_decode_step(window, state, *parts, **{n: x.float() for n, x in fixed.items()}, backend="triton")
    assert torch.equal(window[..., -1], parts[0])
    return close(made, y[:, 0]) + close(state, after)


def right():
    for form in PROBLEMS:
        for shape in SHAPES:
            yield compare(form, shape)
        yield compare(form, (2, 4, 16, 8, 2), torch.bfloat16, 2e-2)
        yield from padded(form)
    yield layouts()
    moving, fixed, state = PROBLEMS["mamba2"]("mamba2", 2, 4, 5, 7, 4)
    moving["inputs"][1, 1, 0] = float("nan")
    moving["decay"][0] = -40.0  # dt as small as exp(-40)
    fixed["dt_bias"][:] = 0.0
    made, _, after = steps("mamba2", moving, fixed, state, "triton", torch.float32)
    assert made[1, 1:].isnan().any() and made[0].isfinite().all()
    yield close(after[0], whole("mamba2", moving, fixed, state)[1][0])


if __name__ == "__main__":
    print(sum(right()), "cases right")
