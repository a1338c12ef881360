"""Students whose layers have different mixers: each layer is what it is in a student with that mixer alone."""

import json

import pytest
import torch

from mohawk.loading.describe import describe_layers
from mohawk.measures.consistency import broken_paths, inconsistencies, some_tokens
from mohawk.models.cutting.cuts import Cut, cut
from mohawk.models.formats.released import to_released
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import HybridConfig
from mohawk.models.mixers import MIXERS
from tests.models.conftest import tiny_teacher

MIXED = {0: "kimi_delta", 1: "mamba2", 3: "gated_delta"}


def student_of(mixer=MIXED, teacher="llama", **options):
    torch.manual_seed(0)
    model = tiny_teacher(teacher)
    torch.manual_seed(0)
    return hybrid_from_teacher(model, list(mixer), mixer, **options).eval()


def ids(*shape):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("teacher", ["llama", "gemma3", "phi"])
@pytest.mark.parametrize("init", ["attention", "random"])
def test_each_layer_starts_as_in_a_student_of_its_mixer_alone(teacher, init):
    mixed = student_of(teacher=teacher, init=init, gate="output")
    for i, name in MIXED.items():
        alone = student_of(dict.fromkeys(MIXED, name), teacher=teacher, init=init, gate="output")
        mine, theirs = (model.model.layers[i].self_attn for model in (mixed, alone))
        assert type(mine) is MIXERS[name] is type(theirs)
        assert mine.state_dict().keys() == theirs.state_dict().keys()
        for key, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key]), key


def test_each_layer_has_its_own_default_gate():
    """One gated_delta layer, which cannot have a constant, leaves the others theirs."""
    mixed, without = student_of(), student_of({**MIXED, 3: "kimi_delta"})
    for i in (0, 1):
        mine, theirs = (model.model.layers[i].self_attn.state_dict() for model in (mixed, without))
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), key
    mamba = mixed.model.layers[1].self_attn
    assert not mamba.in_proj.weight[mamba.slices()["z"]].any() and mamba.in_proj.bias[mamba.slices()["z"]].all()
    assert not mixed.model.layers[0].self_attn.g_b_proj.weight.any()
    delta = mixed.model.layers[3].self_attn.state_dict()
    alone = student_of(dict.fromkeys(MIXED, "gated_delta"), gate="output").model.layers[3].self_attn.state_dict()
    for key in ("in_proj_z.weight", "in_proj_qkv.weight", "out_proj.weight", "conv1d.weight"):
        assert delta[key].any() and torch.equal(delta[key], alone[key]), key
    # one switch for the biases of all mixers, which Mamba-2's constant gate needs
    assert delta.keys() - alone.keys() == {"out_proj.bias"} and not delta["out_proj.bias"].any()


@pytest.mark.parametrize("layers", [[0, 1, 3], [0, 1, 2, 3]])
def test_every_way_of_answering_gives_what_one_forward_gives(layers):
    student = student_of({i: MIXED.get(i, "discrete_mamba2") for i in layers})
    assert broken_paths(student, inconsistencies(student, some_tokens(student))) is None


def test_saved_and_loaded(tmp_path):
    student = student_of()
    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mixer"] == {str(i): name for i, name in MIXED.items()}
    again = HybridForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.mixer == MIXED and again.config.mixer_kinds == ["kimi_delta", "mamba2", "gated_delta"]
    assert again.config.mixer_words == "kimi_delta, mamba2 and gated_delta"
    assert torch.equal(again(ids(2, 12)).logits, student(ids(2, 12)).logits)
    assert [layer.mixer for layer in describe_layers(again)] == [
        "kimi_delta",
        "mamba2",
        "full_attention",
        "gated_delta",
    ]


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.bfloat16, torch.float32])
def test_states_of_a_student_that_is_in_another_dtype(saved, asked):
    teacher = tiny_teacher(dtype=saved).to(saved)
    student = hybrid_from_teacher(teacher, [1], dtype=asked)
    size = (asked or saved).itemsize
    assert student.config.dtype == student.dtype == (asked or saved)
    # 2 key-value heads of 8, keys and values; 4 heads of 8 x 8 in float32 and 4 x (3 x 32) inputs of the convolution
    assert [layer.state_bytes(10) for layer in describe_layers(student)] == [
        (4 * 4 * 8 * 8 + 4 * 3 * 32 * size) if i == 1 else 10 * 2 * 2 * 8 * size for i in range(4)
    ]


def test_one_mixer_for_all_is_its_name(tmp_path):
    student = student_of({1: "gated_delta", 3: "gated_delta"})
    assert student.config.mixer == "gated_delta" == student.config.mixer_words
    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mixer"] == "gated_delta"


@pytest.mark.parametrize(
    "mixer, message",
    [
        ({0: "mamba2", 1: "mamba2"}, r"mixer: says nothing of layers \[3\], which are replaced"),
        ({0: "mamba2"}, r"mixer: says nothing of layers \[1, 3\], which are"),
        ({**MIXED, 2: "mamba2"}, r"mixer: names layers \[2\], which are not replaced; leave them"),
        ({**MIXED, 2: "mamba2", 9: "mamba2"}, r"mixer: names layers \[2, 9\], which"),
        ({**MIXED, 3: "mamba3"}, "mixer: got 'mamba3', allowed: mamba2, discrete_mamba2, gated_delta, kimi_delta"),
        ({**MIXED, 3: ["mamba2"]}, r"mixer: got \['mamba2'\], allowed: mamba2"),
        ({"first": "mamba2"}, "mixer: got the key 'first', allowed: layer indices counted from 0"),
        ({**MIXED, "01": "mamba2"}, "mixer: got the key '01', allowed: layer indices counted from 0"),
        ({**MIXED, str(min(MIXED)): "mamba2"}, "mixer: a layer is named twice"),
        (["mamba2"] * 3, "mixer: got .*allowed: a name, or a mapping"),
        ("mamba3", "mixer: got 'mamba3', allowed: mamba2"),
    ],
)
def test_what_is_refused(mixer, message):
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match=message):
        hybrid_from_teacher(teacher, [0, 1, 3], mixer)
    kinds = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=message):
        HybridConfig(base_config=teacher.config, layer_types=kinds, mixer=mixer)


def test_a_gate_that_one_of_them_cannot_have():
    with pytest.raises(ValueError, match="gate: got 'open', a constant gate, which a gated_delta mixer"):
        student_of(gate="open")
    with pytest.raises(ValueError, match="a kimi_delta mixer cannot have that one"):
        student_of({0: "mamba2", 1: "kimi_delta"}, init="neutral")
    student = student_of({0: "mamba2", 1: "kimi_delta"})  # both have an open one, Mamba-2's is a bias
    assert student.model.layers[0].self_attn.in_proj.bias.any()
    assert not student.model.layers[1].self_attn.o_proj.bias.any()


def test_cut_layers_take_their_mixers_along():
    student = student_of({0: "discrete_mamba2", 1: "mamba2", 3: "mamba2"})
    smaller = cut(student, Cut(layers=[0, 2, 3]))
    assert smaller.config.mixer == {0: "discrete_mamba2", 2: "mamba2"}
    assert cut(student, Cut(layers=[1, 2, 3])).config.mixer == "mamba2"
    hidden = student.model.embed_tokens(ids(1, 9))
    for old, new in ((0, 0), (3, 2)):
        expected = student.model.layers[old].self_attn(hidden)[0]
        assert torch.equal(smaller.model.layers[new].self_attn(hidden)[0], expected)
    assert cut(student_of(), Cut(layers=[0, 2, 3])).config.mixer == {0: "kimi_delta", 2: "gated_delta"}
    assert cut(student_of(), Cut(layers=[2])).config.ssm_layers == []


def test_released_layouts_hold_one_mixer():
    for mixer in (MIXED, dict.fromkeys(MIXED, "gated_delta")):
        with pytest.raises(ValueError, match="gated_delta mixers are in no released layout"):
            to_released(student_of(mixer))
