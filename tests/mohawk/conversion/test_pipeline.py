"""Phases 1 and 2 with layers dealt to processes: bit for bit what one process makes."""

import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from mohawk.cli import main
from mohawk.conversion.footprint import Hardware
from mohawk.conversion.objectives import HiddenObjective, MixingObjective
from mohawk.conversion.pipeline import dealt
from mohawk.conversion.plan import make_plan
from mohawk.conversion.recipe import Recipe
from mohawk.core.folders import Interrupted, newest_complete
from mohawk.errors import UserError
from mohawk.loading.configs import load_config
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.sharding import is_sharded, shard, whole
from mohawk.training.pipeline import REPLACED, deal, make_stage
from mohawk.training.trainer import PhaseTrainer
from tests.helpers.processes import in_processes
from tests.helpers.tiny_phase import cheap_training, collate, tiny_phase  # noqa: F401
from tests.models.conftest import FAMILIES, tiny_teacher
from tests.models.test_sharding import LENGTH
from tests.mohawk.runs.test_distributed import (
    LEARNING_RATE,
    place,  # noqa: F401
    same_run,
    two_processes,
    written,
)
from tests.mohawk.training.test_sharded_checkpoints import Rows

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]

STEPS = 6
OBJECTIVES = {
    "mixing": MixingObjective,
    "block_output": lambda student, teacher: HiddenObjective(student, teacher, train_mlp=True),
    "mixer_output": lambda student, teacher: HiddenObjective(student, teacher, match="mixer_output"),
}


@pytest.mark.parametrize("replaced", [[1], [0, 3, 5], [1, 3, 5, 7], [2, 3], [0, 1, 2, 3, 9], list(range(6))])
def test_layers_are_dealt_as_evenly_as_they_can_be(replaced):
    def cost(layers):
        return sum(REPLACED if i in replaced else 1 for i in layers)

    for stages in range(1, len(replaced) + 1):
        found = deal(replaced, stages)
        assert [i for layers in found for i in layers] == list(range(replaced[-1] + 1))
        assert len(found) == stages and all(set(layers) & set(replaced) for layers in found)
        ways = itertools.combinations(range(1, replaced[-1] + 1), stages - 1)
        cuts = [[0, *way, replaced[-1] + 1] for way in ways]
        ways = [[range(*pair) for pair in itertools.pairwise(cut)] for cut in cuts]
        allowed = [way for way in ways if all(set(layers) & set(replaced) for layers in way)]
        assert max(map(cost, found)) == min(max(map(cost, way)) for way in allowed)
    with pytest.raises(ValueError, match="too few for"):
        deal(replaced, len(replaced) + 1)


def run_phase(
    run: Path, kind: str, processes: int, stages: int, *, parts=False, stop=None, **phase
) -> dict[str, torch.Tensor]:
    """The student's weights after a phase; or, stopped by a signal to the first process in step `stop`, nothing."""
    mesh = init_device_mesh("cpu", (processes,)) if parts else None
    teacher = tiny_teacher()
    torch.manual_seed(0)
    spread = None
    if mesh is not None:
        shard(teacher, mesh, trains=False)
        spread = lambda model: shard(model, mesh)  # noqa: E731
    student = hybrid_from_teacher(teacher, [1, 2, 3], spread=spread)
    asked = dict(sequence_length=LENGTH, learning_rate=1e-3, gradient_accumulation=2, batch_size=2, max_grad_norm=1e-2)
    asked = tiny_phase(STEPS, **(asked | phase))

    def make():
        return OBJECTIVES[kind](student, teacher)

    def train(objective):
        trainer = PhaseTrainer(
            objective, name=kind, phase=asked, run_dir=run, train_dataset=Rows(), collate=collate,
            precision="float32", device="cpu", section=f"phases.{kind}",
        )  # fmt: skip
        if stop is not None and (processes == 1 or torch.distributed.get_rank() == 0):
            take = trainer._take_step

            def signalled(*given):
                take(*given)
                if trainer.step == stop:
                    os.kill(os.getpid(), signal.SIGTERM)

            trainer._take_step = signalled
        trainer.train_phase()

    try:
        if stages > 1:
            with dealt(student, teacher, make_stage(stages), make) as objective:
                assert not any(is_sharded(p) for i in objective.walk for p in student.model.layers[i].parameters())
                train(objective)
        else:
            train(make())
        assert stop is None
    except Interrupted:
        assert stop is not None
        return {}
    assert any(map(is_sharded, student.parameters())) == parts
    return {name: whole(p).clone() for name, p in student.named_parameters()}


def go(run: Path, kind: str, processes: int, stages: int, **options) -> dict[str, torch.Tensor]:
    if processes == 1:
        return run_phase(run, kind, 1, 1, **options)
    found = in_processes(run.parent, processes, lambda rank: run_phase(run, kind, processes, stages, **options))
    assert all(torch.equal(one[name], tensor) for one in found[1:] for name, tensor in found[0].items())
    return found[0]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in one.items() if key not in ("tokens_per_s", "crc32")} for one in found]


@pytest.mark.parametrize(("count", "parts"), [(2, False), (3, True)])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_stages_are_one_process_bit_for_bit(kind, count, parts, tmp_path):
    """Weights, losses and gradient norms, with gradients that are clipped."""
    one = go(tmp_path / "one/run", kind, 1, 1)
    many = go(tmp_path / "many/run", kind, count, count, parts=parts)
    assert same(one, many)
    assert lines(tmp_path / "many/run") == lines(tmp_path / "one/run")
    assert len(lines(tmp_path / "one/run")) == STEPS


def losses_of(family: str, stage=None, mesh=None) -> dict[str, float]:
    teacher = tiny_teacher(family)
    torch.manual_seed(0)
    if mesh is not None:
        shard(teacher, mesh, trains=False)
    student = hybrid_from_teacher(teacher, [1, 2], spread=mesh and (lambda model: shard(model, mesh)))
    given = collate(Rows().rows[:2])

    def values(objective):
        return {name: float(loss.detach()) for name, loss in objective.losses(**given)}

    if stage is None:
        return values(MixingObjective(student, teacher))
    with dealt(student, teacher, stage, lambda: MixingObjective(student, teacher)) as objective:
        return values(objective)


def test_every_family_runs_in_stages(tmp_path):
    """A later stage is given hidden states in place of tokens, by whatever a family makes of them."""

    def body(rank):
        mesh, stage = init_device_mesh("cpu", (2,)), make_stage(2)
        return {family: losses_of(family, stage, mesh) for family in FAMILIES}

    first, second = in_processes(tmp_path, 2, body)
    for family in FAMILIES:
        assert first[family] | second[family] == losses_of(family), family


@pytest.mark.parametrize("parts", [False, True])
def test_it_goes_on_in_any_number_of_processes(parts, tmp_path):
    one = go(tmp_path / "one/run", "mixing", 1, 1)
    stopped = tmp_path / "stopped/run"
    go(stopped, "mixing", 3, 3, parts=parts, stop=1)
    folder = stopped / "phases/mixing"
    saved = newest_complete(folder)
    assert saved.name in ("checkpoint-1", "checkpoint-2")  # a signal is heard of when the next step begins
    assert len(list(saved.glob("shard-*"))) == 3
    for name, processes, stages in (("same", 3, 3), ("alone", 1, 1)):
        shutil.copytree(stopped, tmp_path / name / "run")
        assert same(go(tmp_path / name / "run", "mixing", processes, stages), one), name
    go(stopped, "mixing", 2, 2, stop=3)
    go(stopped, "mixing", 1, 1, stop=5)
    assert same(go(stopped, "mixing", 3, 3, parts=parts), one)
    assert lines(stopped) == lines(tmp_path / "one/run")


def test_pipelines_deal_the_rows_of_a_step(tmp_path):
    """Two of two stages; the sums of gradients are rounded otherwise, as in data parallelism."""
    one = go(tmp_path / "one/run", "block_output", 1, 1)
    many = go(tmp_path / "many/run", "block_output", 4, 2)
    assert max(float((tensor - many[name]).abs().max()) for name, tensor in one.items()) < 2e-5  # of steps of 1e-3
    for first, second in zip(lines(tmp_path / "one/run"), lines(tmp_path / "many/run"), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)


def test_a_stage_does_not_wait_for_the_next_one(tmp_path):
    """The first has taken a step before the second one begins it; they meet at the end."""
    done = tmp_path / "first has taken a step"
    take = PhaseTrainer._take_step

    def watched(self, *given):
        if self.stage.index == 1 and self.step == 0:
            deadline = time.monotonic() + 30
            while not done.exists():
                assert time.monotonic() < deadline, "the first stage waits"
                time.sleep(0.01)
        take(self, *given)
        if self.stage.index == 0:
            done.touch()

    def body(rank):
        PhaseTrainer._take_step = watched
        run_phase(tmp_path / "run", "mixing", 2, 2, gradient_accumulation=1)

    in_processes(tmp_path, 2, body)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, STEPS + 1))


def spoiled(of: int, calls) -> None:
    """Makes the losses of a layer that is no longer the student's own first one infinite, in some of its calls."""
    loss, seen = MixingObjective.layer_loss, itertools.count()

    def layer_loss(self, layer, *given):
        found = loss(self, layer, *given)
        if layer is self.student.model.layers[of] and next(seen) in calls:
            found = found * float("inf")
        return found

    MixingObjective.layer_loss = layer_loss


def test_a_loss_that_is_not_finite_holds_up_its_own_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(MixingObjective, "layer_loss", MixingObjective.layer_loss)
    whole_run = go(tmp_path / "whole/run", "mixing", 1, 1)

    def body(rank):
        spoiled(2, [4])  # in its third step of two micro-batches
        return run_phase(tmp_path / "two/run", "mixing", 2, 2)

    two = in_processes(tmp_path / "two", 2, body)[0]
    spoiled(2, [4])
    one = go(tmp_path / "one/run", "mixing", 1, 1)
    assert same(one, two) and lines(tmp_path / "one/run") == lines(tmp_path / "two/run")
    assert [line.get("skipped_at") for line in lines(tmp_path / "two/run")] == [None, None, [3], None, None, None]
    changed = {name.split(".")[2] for name, tensor in one.items() if not torch.equal(tensor, whole_run[name])}
    assert changed == {"2"}


def test_losses_that_stay_infinite_end_all_stages(tmp_path):
    def body(rank):
        spoiled(3, range(1000))
        with pytest.raises(UserError) as caught:
            run_phase(tmp_path / "run", "mixing", 2, 2, gradient_accumulation=1)
        return str(caught.value)

    for said in in_processes(tmp_path, 2, body):
        assert "3 steps in a row, the last one step 3, had a loss or gradient that is not finite (layer_3" in said
    assert newest_complete(tmp_path / "run/phases/mixing") is None


# ---- the command ----


PHASES = {
    "mixing": {"metric": "frobenius", "save_every": 1},
    "hidden": {"solve_tokens": 256, "match": "mixer_output", "max_grad_norm": 1e-3},
    "end_to_end": {"gradient_accumulation": 1},
}


def asked(place, folder: Path, **sharding) -> Path:  # noqa: F811
    student = {"ssm_layers": [0, 1]}
    sharding = {"sharding": sharding} if sharding else {}
    return written(place, folder, student=student, phases=PHASES, **sharding)


def phase_students(run: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(run / f"phases/{name}/student/model.safetensors") for name in ("mixing", "hidden")]


@pytest.fixture(scope="module")
def one(place, tmp_path_factory):  # noqa: F811
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "here"
    assert main(["convert", str(asked(place, folder))]) == 0
    return folder / "run"


@pytest.mark.parametrize("kind", ["none", "full"])
def test_convert_in_stages_is_one(kind, place, one, tmp_path):  # noqa: F811
    recipe = asked(place, tmp_path / "two", kind=kind, stages=2)
    assert two_processes(tmp_path / "two", "convert", str(recipe)) == [0, 0], (tmp_path / "two/0.txt").read_text()
    own = ("rng_state", "shard-", "trainable.safetensors", "optimizer.pt")
    same_run(one, tmp_path / "two/run", 1e-5, 1e-3 * LEARNING_RATE, own)
    if kind == "none":  # in parts, the solution for output projections is summed otherwise
        assert all(same(*pair) for pair in zip(phase_students(one), phase_students(tmp_path / "two/run"), strict=True))
    assert same(phase_students(one)[0], phase_students(tmp_path / "two/run")[0])
    assert (tmp_path / "two/1.txt").read_text() == ""
    assert "layers are dealt to 2 stages, 1 processes each" in (tmp_path / "two/run/log.txt").read_text()


def killed(rank: int, of: int) -> None:
    if rank == of:
        take = PhaseTrainer._take_step

        def then_killed(self, *given):
            if self.name == "mixing" and self.step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return take(self, *given)

        PhaseTrainer._take_step = then_killed


@pytest.mark.parametrize("of", [0, 1])
def test_a_stage_that_is_killed_ends_all_and_the_run_goes_on_in_one(of, place, one, tmp_path):  # noqa: F811
    recipe = asked(place, tmp_path / "two", stages=2)
    begin = time.monotonic()
    codes = two_processes(tmp_path / "two", "convert", str(recipe), before=lambda rank: killed(rank, of))
    assert codes[of] == -signal.SIGKILL and codes[1 - of] == 2 and time.monotonic() - begin < 60
    said = (tmp_path / f"two/{1 - of}.txt").read_text()
    assert "another process of this run has ended" in said and "Traceback" not in said
    assert newest_complete(tmp_path / "two/run/phases/mixing").name == "checkpoint-2"
    assert main(["convert", str(recipe), "--set", "sharding.stages=null"]) == 0
    assert all(same(*pair) for pair in zip(phase_students(one), phase_students(tmp_path / "two/run"), strict=True))


@pytest.mark.parametrize(
    ("stages", "processes", "said"),
    [
        (3, 6, "sharding.stages: got 3, but 2 layers are converted, at least one of which each stage needs"),
        (2, 3, "sharding.stages: got 2, which does not divide the 3 processes; give a divisor"),
        (0, 2, "sharding.stages: got 0"),
        (2, 16, "a step's 4 rows cannot be dealt evenly to 8 pipelines of 2 stages"),
    ],
)
def test_what_does_not_go_together(stages, processes, said, place, tmp_path, capsys):  # noqa: F811
    recipe = asked(place, tmp_path / "run", kind="full")
    options = ["--dry-run", "--processes", str(processes), "--set", f"sharding.stages={stages}"]
    code = main(["convert", str(recipe), *options])
    caught = capsys.readouterr()
    assert said in " ".join((caught.out + caught.err).split())
    assert code == (0 if processes == 16 else 2)


@pytest.mark.parametrize("kind", ["none", "full"])
def test_the_plan_counts_a_stages_own_layers(kind, place, tmp_path):  # noqa: F811
    recipe = Recipe.load(asked(place, tmp_path / "run", kind=kind, stages=2))
    plan = make_plan(recipe, load_config(str(place / "teacher")), Hardware(4, 2**40))
    layer = sum(p.numel() for p in plan.student.model.layers[0].parameters())
    vectors = sum(p.numel() for p in plan.student.parameters() if p.dim() < 2 or p.shape[1] == 1)
    total = sum(p.numel() for p in plan.student.parameters())
    matrices = total - vectors
    mixing, _, last = plan.phases
    assert (mixing.strategy.stages, last.strategy.stages) == (2, 1)
    assert mixing.held["gradients"] == 4 * mixing.trained // 2 and mixing.held["optimizer"] == 8 * mixing.trained // 2
    whole_student = {"none": 4 * total, "full": 4 * (matrices // 4 + vectors) + 4 * layer}
    assert mixing.held["student"] == whole_student[kind]
    assert str(mixing.strategy) == {"none": "whole, in 2 stages", "full": "in 4 parts, in 2 stages"}[kind]
