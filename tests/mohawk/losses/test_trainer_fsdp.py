"""DistillationTrainer under accelerate's own FSDP2, on processes that accelerate takes for those of GPUs."""

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from mohawk import DistillationTrainer, KnowledgeDistiller, hybrid_from_teacher
from mohawk.core.collectives import sum_gradients
from mohawk.losses.heads import Head, final_hidden_states
from mohawk.losses.layers.attention_match import AttentionMatch
from mohawk.losses.layers.hidden_match import HiddenMatch
from mohawk.losses.layers.matching import match_attention, match_hidden
from mohawk.losses.teachers import AverageTeacher
from mohawk.models.sharding import reshard, shard, whole
from tests.helpers.processes import in_processes
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.models.conftest import tiny_teacher

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]

STEPS, RATE = 3, 1e-3


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(3, 97, (16, 24), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def as_of_gpus() -> None:
    """accelerate takes this process for one of those of GPUs, which it shards for."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def projected() -> dict:
    """Hidden states, matched through projections that are learned."""
    return {"hidden": match_hidden(HiddenMatch([(1, 1), (3, 3)], 32, 32, project=True), 0.1)}


def trained(folder, family: str, how: str, processes: int, resume=None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Logged losses and the weights in the end, those of matchings and of an average among them."""
    options = {}
    if processes > 1:
        as_of_gpus()
        options = {
            "fsdp": True,
            "fsdp_config": {
                "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": False,
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "FULL_STATE_DICT",
            },
        }  # fmt: skip
    teacher = tiny_teacher(family)
    torch.manual_seed(0)
    student = hybrid_from_teacher(teacher, [1, 3]).train()
    given: dict = {"ce_weight": 0.3}
    if how == "matched":
        given["matchings"] = projected()
    if how == "average":
        teacher = AverageTeacher(student, 0.5)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4 // processes, learning_rate=RATE,
        lr_scheduler_type="linear", logging_steps=1, report_to="none", use_cpu=processes == 1, disable_tqdm=True,
        save_strategy="steps" if how == "matched" else "no", save_steps=2, seed=0,
        optim="rmsprop" if how == "matched" else "adamw_torch", **options,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=student, args=arguments, train_dataset=Rows(), teacher=teacher, distillation=given
    )
    assert trainer.is_fsdp_enabled == (processes > 1)
    trainer.train(resume_from_checkpoint=resume)
    named = [*trainer.model.named_parameters(), *trainer.distiller.matched.named_parameters()]
    named += teacher.state().items() if how == "average" else []
    weights = {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for name, p in named}
    assert processes == 1 or sum(hasattr(p, "full_tensor") for _, p in named) > 10
    return [record["loss"] for record in trainer.state.log_history if "loss" in record], weights


@pytest.mark.parametrize(
    ("family", "how"),
    [("llama", "plain"), ("llama", "average"), ("llama_biased", "plain"), ("llama_biased", "matched")],
)
def test_it_trains_as_one_process_does(family, how, tmp_path):
    losses, weights = trained(tmp_path / "one", family, how, 1)

    def body(rank):
        found = trained(tmp_path / "two", family, how, 2)
        if how == "matched":  # with projections that the second step has left
            again = trained(tmp_path / "two", family, how, 2, str(tmp_path / "two/checkpoint-2"))
            assert all(torch.equal(again[1][name], weight) for name, weight in found[1].items())
        return found

    (first, of_first), (second, of_second) = in_processes(tmp_path, 2, body)
    assert first == pytest.approx(losses, rel=1e-4) and second == pytest.approx(losses, rel=1e-4)
    for name, weight in weights.items():
        assert torch.equal(of_first[name], of_second[name])
        assert (of_first[name] - weight).abs().mean() < 0.02 * RATE, name


def prepared(family: str, what: str, processes: int, rank: int = 0) -> tuple[list[float], dict[str, torch.Tensor]]:
    """As `trained`, of a loop of one's own: what accelerate is given to prepare is the student, or the distiller with
    its projections, which DDP may wrap as well."""
    teacher = tiny_teacher(family)
    torch.manual_seed(0)
    student = hybrid_from_teacher(teacher, [1, 3]).train()
    distiller = KnowledgeDistiller(
        teacher, student, ce_weight=0.3, matchings=projected() if what != "student" else None
    )
    model = student if what == "student" else distiller
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    backward = torch.Tensor.backward
    if processes > 1 and what == "under DDP":
        model = DistributedDataParallel(distiller)
    elif processes > 1:
        as_of_gpus()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=what != "student"
        )
        accelerator = Accelerator(fsdp_plugin=plugin)
        model, optimizer = accelerator.prepare(model, optimizer)
        backward = accelerator.backward
    losses = []
    for step in range(STEPS):
        ids = Rows().ids[4 * step : 4 * step + 4].view(processes, -1, 24)[rank]
        loss = distiller.compute_loss(ids) if what == "student" else model({"input_ids": ids, "labels": ids})
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if processes > 1 and what != "under DDP":
        assert {type(module).__name__ for module in model.modules()} >= {"FSDPLlamaDecoderLayer"}
    reshard(model)
    return losses, {name: whole(p).clone() for name, p in distiller.named_parameters()}


@pytest.mark.parametrize(
    ("family", "what"),
    [("llama", "student"), ("llama", "distiller"), ("llama_biased", "distiller"), ("llama_biased", "under DDP")],
)
def test_what_accelerate_prepares_trains_as_in_one_process(family, what, tmp_path):
    losses, weights = prepared(family, what, 1)
    (first, of_first), (second, of_second) = in_processes(tmp_path, 2, lambda rank: prepared(family, what, 2, rank))
    assert [sum(pair) / 2 for pair in zip(first, second, strict=True)] == pytest.approx(losses, rel=1e-5)
    assert of_first.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(of_first[name], of_second[name])
        assert (of_first[name] - weight).abs().mean() < 0.02 * RATE, name


def gradients(mesh) -> dict[str, torch.Tensor]:
    """Of a loss on final hidden states and head, the same rows on every process."""
    model = tiny_teacher()
    if mesh is not None:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
    hidden = final_hidden_states(model, {"input_ids": Rows().ids[:2]})
    Head.of(model).logits(hidden).square().mean().backward()
    return {name: whole(p.grad) for name, p in model.named_parameters()}


def test_a_model_that_gathers_its_head_again_for_its_backward_pass(tmp_path):
    """As accelerate's FSDP2 did up to 1.10: the head and the embedding are in parts while the loss is made."""
    one = gradients(None)
    for many in in_processes(tmp_path, 2, lambda rank: gradients(init_device_mesh("cpu", (2,)))):
        assert many.keys() == one.keys()
        for name, gradient in one.items():
            torch.testing.assert_close(many[name], gradient, rtol=1e-4, atol=1e-7)


def whole_after(mesh) -> tuple[int, int]:
    """How many of a root's own matrices are whole after a pass without gradients, and after one with them."""
    model = tiny_teacher("llama_biased")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    ids, found = {"input_ids": Rows().ids[:2]}, []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            hidden = final_hidden_states(model, ids)
        own = [model.model.embed_tokens.weight, model.lm_head.weight]
        found.append(sum(not hasattr(weight, "full_tensor") for weight in own))
        assert Head.of(model).logits(hidden).isfinite().all()
    return tuple(found)


def test_a_pass_without_gradients_leaves_the_roots_matrices_in_parts(tmp_path):
    for found in in_processes(tmp_path, 2, lambda rank: whole_after(init_device_mesh("cpu", (2,)))):
        assert found == (0, 2)


def matched(how: str, mesh) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of two steps' worth of a hybrid whose mixers' matrices are matched, the same rows on every
    process."""
    teacher = tiny_teacher()
    torch.manual_seed(0)
    student = hybrid_from_teacher(teacher, mixer={1: "mamba2", 3: "gated_delta"}).requires_grad_(True).train()
    if mesh is not None and how == "ours":
        shard(student, mesh)
    elif mesh is not None:
        for layer in student.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(student, mesh=mesh)
    of_matrices = match_attention(AttentionMatch([(0, 0), (1, 1), (3, 3)], loss="frobenius"))
    distiller = KnowledgeDistiller(teacher, student, matchings={"attention": of_matrices})
    for _ in range(2):
        loss = distiller.compute_loss(Rows().ids[:2])
        loss.backward()
    share = 1 if mesh is None or how == "accelerate" else mesh.size()  # ours sums
    reshard(student)
    parameters = [p for p in student.parameters() if p.grad is not None]
    sum_gradients(parameters) if how == "ours" else None
    return loss.detach(), {n: whole(p.grad) / share for n, p in student.named_parameters() if p.grad is not None}


def test_mixers_matrices_that_are_matched_behind_the_layers_forward_pass(tmp_path):
    one = {how: matched(how, None) for how in ("ours", "accelerate")}
    many, _ = in_processes(tmp_path, 2, lambda rank: {how: matched(how, init_device_mesh("cpu", (2,))) for how in one})
    for how, (loss, gradients) in one.items():
        torch.testing.assert_close(many[how][0], loss, rtol=1e-6, atol=0)
        assert many[how][1].keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (many[how][1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, (how, name)
