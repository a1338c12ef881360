"""The three phases against the same losses written out naively, and what each of them trains."""

import pytest
import torch

from mohawk.conversion.objectives import EndToEndObjective, HiddenObjective, MixingObjective
from mohawk.kernels.mixing.interface import mixing_matrix
from mohawk.models.families import mixer_input_norm
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.packed import positions_of
from tests.models.conftest import FAMILIES, tiny_teacher

LAYERS = [0, 2]


def batch_of(n=13, b=3):
    ids = torch.randint(3, 97, (b, n), generator=torch.Generator().manual_seed(3))
    segments = torch.zeros(b, n, dtype=torch.long)
    segments[0, 5:], segments[1, 2:9], segments[1, 9:] = 1, 1, -1  # packed, padded, plain
    labels = ids.clone()
    starts = segments.diff(dim=1, prepend=torch.full((b, 1), 99)) != 0
    labels[starts | (segments < 0)] = -100
    return {
        "input_ids": ids,
        "position_ids": positions_of(segments),
        "segment_ids": segments,
        "labels": labels,
    }


def models(family="llama", mixer="mamba2"):
    teacher = tiny_teacher(family)
    torch.manual_seed(1)
    student = hybrid_from_teacher(teacher, LAYERS, mixer)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "self_attn" in name or name == "lm_head.bias":
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return student, teacher


def documents(batch):
    """Each document of each row as (row, slice), padding left out."""
    for row, segments in enumerate(batch["segment_ids"]):
        for value in segments.unique().tolist():
            if value >= 0:
                where = (segments == value).nonzero()[:, 0]
                yield row, slice(int(where[0]), int(where[-1]) + 1)


def total(objective, batch):
    return sum(loss for _, loss in objective.losses(**batch))


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_phase_1_is_the_mean_distance_of_materialised_matrices(family, mixer):
    """Eager attention weights of each document alone against the mixer's matrix, as the method's authors do it."""
    student, teacher = models(family, mixer)
    batch = batch_of()
    loss = total(MixingObjective(student, teacher), batch)
    teacher.set_attn_implementation("eager")
    squared = torch.zeros(len(LAYERS), 3, teacher.config.num_attention_heads, dtype=torch.float64)
    with torch.no_grad():
        for row, where in documents(batch):
            out = teacher.model(
                batch["input_ids"][row : row + 1, where], output_attentions=True, output_hidden_states=True
            )
            for k, i in enumerate(LAYERS):
                layer = student.model.layers[i]
                own = mixing_matrix(layer.self_attn.mixing(mixer_input_norm(layer)(out.hidden_states[i])))
                difference = own.double() - out.attentions[i].double()
                squared[k, row] += difference.square().sum((-1, -2))[0]
    torch.testing.assert_close(loss.double(), squared.sqrt().mean(), rtol=1e-4, atol=1e-5)


def attention_outputs(model, inputs):
    """What each layer's attention adds to the residual stream."""
    found = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, out: found.append(out[0]))
        for layer in model.model.layers
    ]
    model.model(inputs)
    for hook in hooks:
        hook.remove()
    return found


def block_output(kind, layer, hidden, mixed):
    """A decoder layer's output, given its input and what its mixer made of it."""
    if kind in ("phi", "cohere", "cohere2"):
        return hidden + mixed + layer.mlp(layer.input_layernorm(hidden))
    if kind in ("gemma2", "gemma3_text"):
        hidden = hidden + layer.post_attention_layernorm(mixed)
        return hidden + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(hidden)))
    if kind in ("olmo2", "olmo3"):
        hidden = hidden + layer.post_attention_layernorm(mixed)
        return hidden + layer.post_feedforward_layernorm(layer.mlp(hidden))
    factor = 0.3 if kind in ("granite", "granitemoe") else 1.0  # its residual_multiplier
    hidden = hidden + factor * mixed
    mlp = layer.block_sparse_moe if kind == "granitemoe" else layer.mlp
    return hidden + factor * mlp(layer.post_attention_layernorm(hidden))


@pytest.mark.parametrize("match", ["block_output", "mixer_output"])
@pytest.mark.parametrize("family", FAMILIES)
def test_phase_2_is_the_mean_token_distance_given_the_teachers_input(family, match):
    student, teacher = models(family)
    batch = batch_of()
    loss = total(HiddenObjective(student, teacher, match=match), batch)
    norms = []
    with torch.no_grad():
        for row, where in documents(batch):
            inputs = batch["input_ids"][row : row + 1, where]
            hidden = teacher.model(inputs, output_hidden_states=True).hidden_states
            attention = attention_outputs(teacher, inputs)
            for i in LAYERS:
                layer = student.model.layers[i]
                out = layer.self_attn(mixer_input_norm(layer)(hidden[i]))[0]
                if match == "block_output":
                    out = block_output(teacher.config.model_type, layer, hidden[i], out)
                    assert i + 1 < teacher.config.num_hidden_layers  # the last one would come normed
                    norms.append((out - hidden[i + 1]).norm(dim=-1).flatten())
                else:
                    norms.append((out - attention[i]).norm(dim=-1).flatten())
    torch.testing.assert_close(loss, torch.cat(norms).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_phase_3_is_the_mean_kl_of_next_tokens(family):
    student, teacher = models(family)
    batch = batch_of()
    loss = total(EndToEndObjective(student, teacher), batch)
    rows = []
    with torch.no_grad():
        for row, where in documents(batch):
            inputs = batch["input_ids"][row : row + 1, where]
            p = teacher(inputs).logits[0, :-1].log_softmax(-1)
            q = student(inputs, use_cache=False).logits[0, :-1].log_softmax(-1)
            rows.append((p.exp() * (p - q)).sum(-1))
    torch.testing.assert_close(loss, torch.cat(rows).mean(), rtol=1e-4, atol=1e-5)


def test_a_student_equal_to_its_teacher_costs_nothing_in_phase_3():
    teacher = tiny_teacher()
    student = hybrid_from_teacher(teacher, LAYERS)
    objective = EndToEndObjective(student, student)
    assert abs(total(objective, batch_of()).item()) < 1e-6


def trained_names(objective):
    return {name for name, parameter in objective.student.named_parameters() if parameter.requires_grad}


def test_what_each_phase_trains():
    student, teacher = models()
    everything = {name for name, _ in student.named_parameters()}
    in_layers = {name for name in everything if any(f"layers.{i}." in name for i in LAYERS)}
    mixers = {name for name in in_layers if "self_attn" in name or "input_layernorm" in name}
    mlps = {name for name in everything if ".mlp." in name}
    assert trained_names(HiddenObjective(student, teacher)) == mixers
    assert trained_names(HiddenObjective(student, teacher, train_mlp=True)) == in_layers
    assert trained_names(EndToEndObjective(student, teacher, train="mixers")) == mixers
    assert trained_names(EndToEndObjective(student, teacher, train="all_but_mlp")) == everything - mlps
    assert trained_names(EndToEndObjective(student, teacher, train="all")) == everything
    outside = ("out_proj.weight", "out_proj.bias", "self_attn.norm.weight")
    assert trained_names(MixingObjective(student, teacher)) == {n for n in mixers if not n.endswith(outside)}


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])
def test_phase_1_leaves_the_rows_of_x_and_z_exactly_alone(mixer):
    """They share in_proj and conv1d with B and C: no gradient reaches them, and no weight decay either."""
    student, teacher = models(mixer=mixer)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    objective = MixingObjective(student, teacher)
    optimizer = torch.optim.AdamW(objective.parameter_groups(1e-2, 0.1))
    for _ in range(2):
        optimizer.zero_grad()
        for _, loss in objective.losses(**batch_of()):
            loss.backward()
        optimizer.step()
    ssm = student.model.layers[0].self_attn
    name = "model.layers.0.self_attn."
    for part in ("x", "z"):
        rows = ssm.slices()[part]
        assert torch.equal(ssm.in_proj.weight[rows], before[name + "in_proj.weight"][rows])
    channels = slice(0, ssm.inner_size)
    assert torch.equal(ssm.conv1d.weight[channels], before[name + "conv1d.weight"][channels])
    assert not torch.equal(ssm.in_proj.weight[ssm.slices()["B"]], before[name + "in_proj.weight"][ssm.slices()["B"]])


@pytest.mark.parametrize("objective_class", [MixingObjective, HiddenObjective, EndToEndObjective])
def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none(objective_class):
    student, teacher = models()
    objective = objective_class(student, teacher)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    for _, loss in objective.losses(**batch_of()):
        loss.backward()
    for name, parameter in student.named_parameters():
        got = parameter.grad is not None and bool(parameter.grad.any())
        assert got == parameter.requires_grad, name
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert teacher.config._attn_implementation == "sdpa"


def test_only_one_layers_graph_is_alive():
    """When a layer's loss is asked for, nothing holds the graph of the one before."""
    import gc
    import weakref

    student, teacher = models()
    graphs = []
    for _, loss in HiddenObjective(student, teacher).losses(**batch_of()):
        gc.collect()
        assert all(graph() is None for graph in graphs)
        graphs.append(weakref.ref(loss))
        loss.backward()
        del loss
    assert len(graphs) == len(LAYERS)
