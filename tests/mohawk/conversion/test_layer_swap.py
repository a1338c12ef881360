"""Layers taken from the teacher or from the student: the same model whichever way it is put together."""

import copy

import pytest
import torch

from mohawk.conversion.swap import LayerSwap, keep_attention
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from tests.models.conftest import teacher  # noqa: F401


@pytest.fixture
def student(teacher):  # noqa: F811
    """Mixers in all layers, with trained input norms and MLPs of their own."""
    student = hybrid_from_teacher(teacher, "all")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".layers." in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return student.eval()


@pytest.fixture
def batch():
    """Two packed rows, the second one padded."""
    generator = torch.Generator().manual_seed(0)
    segments = torch.tensor([[0] * 9 + [1] * 11, [0] * 14 + [-1] * 6])
    positions = torch.cat([torch.arange(n) for n in (9, 11, 14, 6)]).view(2, 20)
    ids = torch.randint(3, 97, (2, 20), generator=generator)
    return {"input_ids": ids, "position_ids": positions, "segment_ids": segments}


def logits(model, batch, **more):
    with torch.no_grad():
        return model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **more).logits


@pytest.mark.parametrize("layers", [[], [2], [0, 3], [0, 1, 2, 3]])
def test_composed_and_saved(teacher, student, batch, layers, tmp_path):  # noqa: F811
    """All attention is the teacher, all mixers the student, and in between each layer is one's whole."""
    mixers = [copy.deepcopy(layer.state_dict()) for layer in student.model.layers]
    expected = {0: logits(teacher, batch), 4: logits(student, batch, segment_ids=batch["segment_ids"])}
    composed = keep_attention(student, teacher, layers)
    composed.save_pretrained(tmp_path)
    loaded = HybridForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.ssm_layers == layers
    for i, layer in enumerate(loaded.model.layers):
        source = mixers[i] if i in layers else teacher.model.layers[i].state_dict()
        assert layer.state_dict().keys() == source.keys()
        assert all(torch.equal(value, source[name]) for name, value in layer.state_dict().items())
    found = logits(loaded, batch, segment_ids=batch["segment_ids"])
    real = batch["segment_ids"] >= 0
    torch.testing.assert_close(found, logits(composed, batch, segment_ids=batch["segment_ids"]), rtol=0, atol=0)
    if len(layers) in expected:
        torch.testing.assert_close(found[real], expected[len(layers)][real], rtol=0, atol=0)


def test_from_stored_states_as_whole_models(teacher, student, batch):  # noqa: F811
    """Whatever the base, a choice gives what the student composed of these layers gives."""
    swap = LayerSwap(teacher, student, [batch, {name: value[:1] for name, value in batch.items()}])
    real = batch["segment_ids"] >= 0
    for base in ((), (1,), (1, 3), (0, 1, 2, 3), (2,)):
        swap.rebase(base)
        for layers in ((), (1,), (2,), (1, 3), (0, 2), (0, 1, 2, 3)):
            composed = keep_attention(copy.deepcopy(student), teacher, layers)
            with torch.no_grad():
                body = composed.body(
                    batch["input_ids"], position_ids=batch["position_ids"], segment_ids=batch["segment_ids"]
                )
            both, first = swap.final_hidden(layers)
            torch.testing.assert_close(both[real], body.last_hidden_state[real], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(first[0], both[0], rtol=1e-5, atol=1e-5)
    assert len(teacher.model.layers) == len(student.model.layers) == 4


def test_refusals(teacher, batch):  # noqa: F811
    student = hybrid_from_teacher(teacher, [1, 2])
    with pytest.raises(ValueError, match=r"no mixer in \[0, 3\], only in \[1, 2\]"):
        keep_attention(student, teacher, [0, 1, 3])
    teacher.bfloat16()
    with pytest.raises(ValueError, match="torch.float32 and the teacher torch.bfloat16"):
        keep_attention(student, teacher, [1])
    with pytest.raises(ValueError, match="torch.float32 and the teacher torch.bfloat16"):
        LayerSwap(teacher, student, [batch])
