"""What docs/mixers.md says of all four mixers, counted."""

import pytest

from mohawk.models.mixers import MIXERS

D, HEADS, TAPS = 256, 8, 4
WIDTH = D // HEADS


@pytest.mark.parametrize(
    "name, expected",
    [
        ("mamba2", 5 * D**2),
        ("discrete_mamba2", 5 * D**2),
        ("gated_delta", 5 * D**2),
        ("kimi_delta", 4 * D * (D + WIDTH)),
    ],
)
def test_weights_of_a_layer(name, expected):
    mixer = MIXERS[name](D, HEADS, WIDTH, WIDTH)
    matrices = {key: p for key, p in mixer.named_parameters() if p.dim() == 2}
    of_decays = 2 * HEADS * D if name == "gated_delta" else HEADS * D  # and of beta
    assert sum(p.numel() for p in matrices.values()) - of_decays == expected


@pytest.mark.parametrize("name", MIXERS)
def test_all_keep_as_much_of_a_sequence(name):
    mixer = MIXERS[name](D, HEADS, WIDTH, WIDTH, conv_kernel=TAPS)
    assert mixer.conv_size * mixer.conv_kernel == (HEADS * WIDTH + 2 * HEADS * WIDTH) * TAPS
    assert mixer.num_heads * mixer.head_dim * mixer.state_size == HEADS * WIDTH * WIDTH
