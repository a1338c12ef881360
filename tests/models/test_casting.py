"""Models in bfloat16: positions are turned as in float32."""

import pytest
import torch

from mohawk import hybrid_from_teacher
from mohawk.models.casting import cast
from mohawk.models.formats.bamba import from_bamba, norms_groups_apart, to_bamba
from tests.models.conftest import tiny_teacher


def test_parameters_are_cast_and_frequencies_kept():
    model = tiny_teacher("llama")
    cast(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    size, config = model.config.head_dim, model.config
    theta = config.rope_parameters["rope_theta"]
    expected = theta ** -(torch.arange(0, size, 2) / size)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected, rtol=1e-6, atol=0)


def test_tied_parameters_stay_tied():
    model = tiny_teacher("qwen2", tie_word_embeddings=True)
    cast(model, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_student_of_a_bfloat16_teacher_has_its_positions(teacher):
    cast(teacher, torch.bfloat16)
    student = hybrid_from_teacher(teacher, [1])
    assert student.dtype == torch.bfloat16
    kept = dict(teacher.named_buffers())
    assert kept
    for name, buffer in student.float().named_buffers():
        assert torch.equal(buffer, kept[name]), name


@pytest.mark.skipif(not norms_groups_apart(), reason="this transformers norms Bamba's groups together")
@pytest.mark.parametrize("turn", ["to_bamba", "from_bamba"])
def test_a_bamba_in_bfloat16_has_the_positions_of_float32(turn):
    student = hybrid_from_teacher(tiny_teacher("llama"), [1], gate="output")
    cast(student, torch.bfloat16)
    made = to_bamba(student)
    made = from_bamba(made) if turn == "from_bamba" else made
    assert made.dtype == torch.bfloat16
    assert torch.equal(made.model.rotary_emb.inv_freq, student.model.rotary_emb.inv_freq)
