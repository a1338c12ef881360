"""`mohawk prune` with models in parts: two processes that have a half each score, cut and heal as one process does."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.device_mesh import init_device_mesh

from mohawk.cli import main
from mohawk.core.processes import count, rank
from mohawk.models.cutting.cuts import Cut, cut
from mohawk.models.cutting.sizes import sizes_of
from mohawk.models.sharding import is_sharded, shard, whole
from mohawk.pruning.baselines import magnitude_importance, random_importance
from mohawk.pruning.importance import choose, measure_importance
from mohawk.pruning.layer_drops import measure_layer_drops
from tests.helpers.processes import in_processes
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.models.test_cuts import model_of
from tests.mohawk.pruning.test_importance import batched, rows, scores
from tests.mohawk.pruning.test_prune import checkpoint, merging, recipe_data, stage, texts  # noqa: F401
from tests.mohawk.runs.test_distributed import same_run, students, two_processes

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]

OWN = ("rng_state", "shard-", "trainable.safetensors", "optimizer.pt")  # of checkpoints: each process's part, or whole
LEARNING_RATE = 3e-3
MODELS = ["llama", "phi", "phi3", "gemma2", "llama+mamba2", "phi+discrete_mamba2", "llama+gated_delta"]


def measured(name: str) -> dict[str, torch.Tensor]:
    """All scores of a model, in parts where there are several processes, which have batches of their own."""
    model = model_of(name)
    if count() > 1:
        shard(model, init_device_mesh("cpu", (count(),)), trains=False)
    mine = batched(rows(8), 2)[rank() :: count()]
    drops = measure_layer_drops(model, mine, dealt=True)
    found = {"kl": drops.kl, "perplexity": drops.perplexity}
    found |= scores(measure_importance(model, mine, dealt=True))
    found |= {f"magnitude {axis}": score for axis, score in scores(magnitude_importance(model)).items()}
    assert all(p.is_floating_point() for p in model.parameters())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_scores_in_parts_are_those_of_one_process(name, tmp_path):
    expected = measured(name)
    for found in in_processes(tmp_path, 2, lambda rank: measured(name)):
        assert found.keys() == expected.keys()
        for axis, score in expected.items():
            torch.testing.assert_close(found[axis], score, rtol=1e-5, atol=1e-7, msg=axis)


def smaller(name: str) -> dict[str, torch.Tensor]:
    """What two cuts leave of a model in bfloat16: of layers, channels and neurons, and of its vocabulary."""
    model = model_of(name).bfloat16()
    own = sizes_of(model.config)
    mixers = {} if own.state_heads is None else {"state_size": own.state_size}
    sizes = type(own)(
        **(vars(own) | {"layers": own.layers - 1, "hidden": own.hidden // 2, "ffn": own.ffn // 2} | mixers)
    )
    what, spread = choose(random_importance(model.config, 0), sizes), None
    if count() > 1:
        mesh = init_device_mesh("cpu", (count(),))
        shard(model, mesh, trains=False)
        spread = lambda one: shard(one, mesh)  # noqa: E731
    made = cut(model, what, dtype=torch.float32, spread=spread)
    assert is_sharded(made) == (count() > 1) and made.dtype == torch.float32
    trimmed = cut(made, Cut(tokens=[0, 1, 2, *range(3, own.vocabulary, 2)]), dtype=torch.bfloat16, spread=spread)
    named = [*made.named_parameters(), *((f"trimmed {name}", p) for name, p in trimmed.named_parameters())]
    buffers = {name: buffer for name, buffer in made.named_buffers()}
    return {name: whole(p) for name, p in named} | buffers


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_in_parts_is_that_of_one_process(name, tmp_path):
    expected = smaller(name)
    for found in in_processes(tmp_path, 2, lambda rank: smaller(name)):
        assert found.keys() == expected.keys()
        for parameter, value in expected.items():
            assert found[parameter].dtype == value.dtype and torch.equal(found[parameter], value), parameter


KINDS = {
    "rounds": {
        "heal": stage(3, hidden={"weight": 0.1}),
        "prune": {
            "layers": 2, "hidden": 16, "ffn": 12, "kv_heads": 1, "rounds": 2, "vocabulary": "corpus", "layers_by": "kl",
        },
    },
    "search": {
        "prune": {"parameters": 0.5}, "correct": stage(2), "heal": stage(2),
        "search": {"steps": 2, "widths": ["all"], "tokens": 128, "tolerance": 0.1},
    },
    "convert": {
        "prune": {"layers": "every_second", "ffn": 32}, "heal": stage(2),
        "convert": {"ssm_layers": [1], "mixing": stage(2), "hidden": {**stage(2), "solve_tokens": 256}},
    },
    "magnitude": {"prune": {"ffn": 24, "strategy": "magnitude"}, "heal": None, "save_dtype": "bfloat16"},
    "conversion alone": {
        "prune": {"vocabulary": "corpus"}, "convert": {"ssm_layers": [1]}, "heal": stage(2, learn_from="start"),
    },
}  # fmt: skip


def written(folder: Path, teacher: Path, texts: Path, **given) -> Path:  # noqa: F811
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_data(teacher, texts, folder / "run", **given)))
    return folder / "recipe.yaml"


def in_parts(folder: Path, recipe: Path, before=lambda rank: None) -> str:
    """What two processes said; both have to end well."""
    codes = two_processes(folder, "prune", str(recipe), "--set", "sharding.kind=full", before=before)
    assert codes == [0, 0], (folder / "0.txt").read_text() + (folder / "1.txt").read_text()
    assert (folder / "1.txt").read_text() == ""
    return (folder / "0.txt").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_prune_in_parts_is_one(kind, checkpoint, merging, texts, tmp_path):  # noqa: F811
    teacher = merging if "vocabulary" in KINDS[kind]["prune"] else checkpoint
    assert main(["prune", str(written(tmp_path / "one", teacher, texts, **KINDS[kind]))]) == 0
    recipe = written(tmp_path / "two", teacher, texts, **KINDS[kind])
    said = in_parts(tmp_path / "two", recipe, before=never_whole)
    assert "not measured: student and teacher together do not fit into one process" in " ".join(said.split())
    one, two = tmp_path / "one/run", tmp_path / "two/run"
    if KINDS[kind]["heal"] is None:
        assert all(torch.equal(*pair) for pair in [students(one, two)])
    else:
        measured_whole = ("positions.png", ".positions.png")
        same_run(one, two, 1e-5, 3e-3 * LEARNING_RATE, (*OWN, "objective.safetensors", *measured_whole))


def never_whole(rank: int) -> None:
    """A device that whole models do not fit into, so that none is read for the report."""
    import mohawk.runs.steps as steps

    steps.device_bytes = lambda device: 1


def test_it_goes_on_in_one_process_and_back(checkpoint, texts, tmp_path):  # noqa: F811
    """Stopped after the first round's cut in parts, in the middle of healing in one process, and finished in parts."""
    given = KINDS["rounds"] | {"prune": {"layers": 2, "ffn": 24, "rounds": 2}}
    in_parts(tmp_path / "unbroken", written(tmp_path / "unbroken", checkpoint, texts, **given))
    recipe = written(tmp_path / "broken", checkpoint, texts, **given)
    run = tmp_path / "broken/run"
    codes = two_processes(
        tmp_path / "broken", "prune", str(recipe), "--set", "sharding.kind=full", before=stopped_in("heal_1", 1)
    )
    assert codes == [130, 130], (tmp_path / "broken/0.txt").read_text()
    assert main(["prune", str(recipe)]) == 0
    shutil.rmtree(run / "student")  # what is left of the last step makes it again
    shutil.rmtree(run / "phases/heal_2/student")
    in_parts(tmp_path / "broken", recipe)
    unbroken, broken = students(tmp_path / "unbroken/run", run)
    assert (unbroken - broken).abs().mean() < 1e-3 * LEARNING_RATE


def stopped_in(name: str, step: int):
    import os
    import signal

    from mohawk.training.trainer import PhaseTrainer

    def before(rank: int) -> None:
        take = PhaseTrainer._take_step

        def then_stopped(self, *given):
            if self.name == name and self.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return take(self, *given)

        PhaseTrainer._take_step = then_stopped

    return before
