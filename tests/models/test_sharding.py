"""Models in parts on two processes compute what one process does: losses, gradients, students, checkpoints."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from mohawk.conversion.objectives import EndToEndObjective, HiddenObjective, MixingObjective
from mohawk.core.collectives import sum_gradients, total
from mohawk.core.processes import count
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.sharding import is_sharded, reshard, shard, whole
from tests.helpers.processes import in_processes
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.models.conftest import FAMILIES, tiny_teacher

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]

ROWS, LENGTH = 4, 40
OBJECTIVES = {
    "mixing": MixingObjective,
    "block_output": HiddenObjective,
    "mixer_output": lambda student, teacher: HiddenObjective(student, teacher, match="mixer_output"),
    "end_to_end": lambda student, teacher: EndToEndObjective(student, teacher, ce_weight=0.3),
}


def batch(vocabulary: int = 97) -> dict[str, torch.Tensor]:
    """Packed rows of two documents each, as many real positions in every row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (ROWS, LENGTH), generator=generator)
    cut = 13
    positions = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)]).repeat(ROWS, 1)
    segments = (torch.arange(LENGTH) >= cut).long().repeat(ROWS, 1)
    labels = ids.clone()
    labels[:, [0, cut]] = -100
    return {"input_ids": ids, "position_ids": positions, "segment_ids": segments, "labels": labels}


def spread(mesh, trains=True):
    return lambda model: shard(model, mesh, trains=trains)


def found(family: str, mixer: str | dict[int, str], processes: int, kinds=tuple(OBJECTIVES), mesh=None) -> dict:
    """Every loss and gradient of a step by its objective, of a student that each process has its part of."""
    if processes > 1:
        mesh = init_device_mesh("cpu", (processes,)) if mesh is None else mesh()
    teacher = tiny_teacher(family)
    if mesh is not None:
        spread(mesh, trains=False)(teacher)
    torch.manual_seed(0)
    student = hybrid_from_teacher(teacher, [1, 2], mixer, spread=None if mesh is None else spread(mesh))
    made = {}
    rows = slice(torch.distributed.get_rank() * ROWS // processes, None) if processes > 1 else slice(None)
    mine = {name: column[rows][: ROWS // processes] for name, column in batch().items()}
    for kind in kinds:
        objective = OBJECTIVES[kind](student, teacher)
        value = torch.zeros(())
        for _, loss in objective.losses(**mine):
            (loss / processes).backward()
            value = value + loss.detach() / processes
        reshard(student)
        parameters = dict(student.named_parameters())
        sum_gradients([p for p in parameters.values() if p.requires_grad])
        made[kind] = total(value), {name: whole(p.grad).clone() for name, p in parameters.items() if p.grad is not None}
        student.zero_grad(set_to_none=True)
        student.requires_grad_(True)
    made["sharded"] = sum(is_sharded(p) for p in student.parameters()), count()
    made["weights"] = {name: whole(p) for name, p in student.named_parameters()}
    return made


def same(one: dict, many: dict) -> None:
    for name, weight in one["weights"].items():
        assert torch.equal(many["weights"][name], weight), name
    for kind in one.keys() - {"sharded", "weights"}:
        (loss, gradients), (loss_of_many, gradients_of_many) = one[kind], many[kind]
        assert loss_of_many == pytest.approx(float(loss), rel=1e-6), kind
        assert gradients.keys() == gradients_of_many.keys()
        for name, gradient in gradients.items():
            error = (gradients_of_many[name] - gradient).norm()
            assert error <= 1e-5 * gradient.norm() + 1e-9, (kind, name, float(error / gradient.norm()))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_compute_what_one_does(family, tmp_path):
    first, second = in_processes(tmp_path, 2, lambda rank: found(family, "mamba2", 2))
    assert first["sharded"][0] > 10 and first["sharded"][1] == 2
    same(found(family, "mamba2", 1), first)
    same(first, second)


@pytest.mark.parametrize(
    "mixer", ["discrete_mamba2", "gated_delta", "kimi_delta", {1: "kimi_delta", 2: "mamba2"}], ids=str
)
def test_every_mixer(mixer, tmp_path):
    first, _ = in_processes(tmp_path, 2, lambda rank: found("llama", mixer, 2))
    same(found("llama", mixer, 1), first)


def test_replicas_of_two_processes_each(tmp_path):
    """HSDP: parts on two processes, and two such pairs."""
    mesh = lambda: init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))  # noqa: E731
    made = in_processes(tmp_path, 4, lambda rank: found("llama_biased", "mamba2", 4, mesh=mesh))
    same(found("llama_biased", "mamba2", 1), made[3])


def in_bfloat16(sharded: bool) -> tuple[torch.Tensor, dict]:
    """Loss and gradients under autocast of a model with experts, the same rows on both processes."""
    mesh = init_device_mesh("cpu", (2,))
    teacher = tiny_teacher("mixtral")
    spread = None
    if sharded:
        spread = lambda model: shard(model, mesh, dtype=torch.bfloat16)  # noqa: E731
        shard(teacher, mesh, dtype=torch.bfloat16, trains=False)
    torch.manual_seed(0)
    student = hybrid_from_teacher(teacher, [1], spread=spread)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (_, loss), *more = EndToEndObjective(student, teacher, ce_weight=0.3).losses(**batch())
    assert not more
    loss.backward()
    reshard(student)
    named = dict(student.named_parameters())
    sum_gradients([p for p in named.values() if p.grad is not None])
    return loss.detach(), {name: whole(p.grad).clone() for name, p in named.items() if p.grad is not None}


def test_experts_under_autocast_are_what_they_are_whole(tmp_path):
    """Autocast does not round experts that are one tensor: gathered, they must not be rounded either."""

    def body(rank):
        return in_bfloat16(False), in_bfloat16(True)

    (loss, gradients), (loss_in_parts, gradients_in_parts) = in_processes(tmp_path, 2, body)[0]
    assert float(loss_in_parts) == pytest.approx(float(loss), rel=1e-6)
    for name, gradient in gradients.items():
        error = (gradients_in_parts[name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-9, (name, float(error / gradient.norm()))
