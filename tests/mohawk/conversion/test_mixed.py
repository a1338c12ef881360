"""`mohawk compose` of several runs: layers of runs whose mixers differ, in one student."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from mohawk.cli import main
from mohawk.conversion.compose import compose
from mohawk.conversion.mixed import TrainedRun, mixers_from, starting_gate
from mohawk.conversion.probe import short_fingerprint
from mohawk.conversion.recipe import Recipe
from mohawk.core.folders import write_whole
from mohawk.core.json_files import write_json
from mohawk.core.run_folder import phase_student
from mohawk.errors import UserError
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import HybridConfig
from mohawk.runs.claim import claimed
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.models.test_mixers_by_layer import ids
from tests.mohawk.conversion.test_mixers_by_layer import recipe_of  # noqa: F401

pytestmark = pytest.mark.usefixtures("cheap_training")
PHASES = ("phases.mixing=null", "phases.end_to_end=null")
LAST = ("tokens=128", "batch_size=4", "sequence_length=32", "gradient_accumulation=1")
SETS = [word for one in LAST for word in ("--set", f"phases.end_to_end.{one}")]


@pytest.fixture
def runs(recipe_of, tmp_path):  # noqa: F811
    """A function that makes a run as phase 2 leaves it, without training; a name, overrides, fields of the student."""

    def make(name, *overrides, **student):
        recipe = recipe_of(*PHASES, f"output={tmp_path / name}", *overrides, **student)
        about, teacher = recipe.student, AutoModelForCausalLM.from_pretrained(recipe.teacher.model)
        gate = about.gate if about.init == "attention" else None
        made = hybrid_from_teacher(
            teacher, about.ssm_layers, about.mixer, about.init, gate=gate, conv_kernel=about.conv_kernel
        )
        with torch.no_grad():
            for i in made.config.ssm_layers:
                for value in made.model.layers[i].parameters():
                    value += 0.02 * torch.randn_like(value)
        with claimed(recipe.output, recipe), write_whole(phase_student(recipe.output, "hidden")) as folder:
            made.save_pretrained(folder)
        return recipe.output

    return make


def trained(run):
    return HybridForCausalLM.from_pretrained(run / "phases" / "hidden" / "student").eval()


def test_layers_of_two_runs(runs, tmp_path, capsys):
    """Each layer is its run's, the function that of these layers in a row; it is selected from, trained and reported
    as any run."""
    mamba, delta = runs("mamba", mixer="mamba2"), runs("delta", mixer="gated_delta")
    line = ["compose", str(mamba), "--mixers-of", str(delta), "1", "3", "--attention"]
    twice = [*line[:5], "--mixers-of", str(delta), "3", "--attention"]  # the same run
    assert main([*twice, "--output", str(tmp_path / "both"), *SETS]) == 0
    both = trained(tmp_path / "both")
    assert both.config.mixer == {0: "mamba2", 1: "gated_delta", 2: "mamba2", 3: "gated_delta"}
    recipe = Recipe.load(tmp_path / "both" / "recipe.yaml")
    assert recipe.student.mixer == both.config.mixer and recipe.student.gate is None
    ours, theirs = trained(mamba), trained(delta)
    for i in (1, 3):
        ours.model.layers[i] = theirs.model.layers[i]
        assert not both.model.layers[i].self_attn.out_proj.bias.any()  # Mamba-2 has biases here, Gated DeltaNet none
        for name, value in theirs.model.layers[i].state_dict().items():
            assert torch.equal(both.model.layers[i].state_dict()[name], value)
    x = ids(2, 11)
    assert torch.equal(both(x).logits, ours(x).logits)

    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "both")]) == 0
    said = capsys.readouterr().out
    assert f"composed of the mixers of {mamba}; attention layers: none" in said
    assert f"layers 1, 3: of {delta}" in said
    assert main(["select", str(tmp_path / "both"), "--tokens", "128"]) == 0
    order = json.loads((tmp_path / "both" / "selection.json").read_text())["rankings"]["kl"]["order"]
    assert main(["compose", str(tmp_path / "both"), "--budget", "1", "--output", str(tmp_path / "some")]) == 0
    some = trained(tmp_path / "some").config
    assert some.ssm_layers == sorted(order[:3])
    assert [some.mixer_of(i) for i in some.ssm_layers] == [both.config.mixer[i] for i in some.ssm_layers]

    made = (tmp_path / "both" / "phases" / "hidden" / "student" / "MANIFEST.json").read_bytes()
    assert main([*line, "--output", str(tmp_path / "both"), *SETS]) == 0  # nothing is left to do
    assert (tmp_path / "both" / "phases" / "hidden" / "student" / "MANIFEST.json").read_bytes() == made
    torch.nn.init.constant_(theirs.model.layers[1].self_attn.dt_bias, 5.0)
    with write_whole(delta / "phases" / "hidden" / "student", replace=True) as folder:
        theirs.save_pretrained(folder)
    capsys.readouterr()
    assert main([*line, "--output", str(tmp_path / "both"), *SETS]) == 0
    assert f"{delta} has trained its mixers again since; its student is made anew" in capsys.readouterr().out
    assert (trained(tmp_path / "both").model.layers[1].self_attn.dt_bias == 5).all()
    assert main([*line[:3], str(delta), "1", "--attention", "--output", str(tmp_path / "both"), *SETS]) == 2
    assert "was started with another student.mixer" in capsys.readouterr().err

    assert main(["convert", str(tmp_path / "both" / "recipe.yaml")]) == 0
    assert HybridForCausalLM.from_pretrained(tmp_path / "both" / "student").config.mixer == both.config.mixer
    assert "mamba2 and gated_delta" in (tmp_path / "both" / "report.md").read_text()
    assert main(["verify", str(tmp_path / "both")]) == 0


def test_the_better_mixer_of_each_layer(runs, tmp_path, capsys):
    mamba, delta = runs("mamba", mixer="mamba2", gate="output"), runs("delta", mixer="gated_delta")
    line = ["compose", str(mamba), "--mixers-of", str(delta), "--interval", "4", "--output", str(tmp_path / "both")]
    assert main(line) == 2
    assert f"mohawk select {mamba} --by alone" in capsys.readouterr().err
    costs = [{0: 0.1, 1: 0.3, 2: math.nan, 3: 0.2}, {0: 0.2, 1: 0.1, 2: 0.3, 3: 0.3}]  # as `select` writes them

    def measured(run, cost, tokens=128):
        student = short_fingerprint(run / "phases" / "hidden" / "student")
        rows = [{"layer": i, "kl": kl} for i, kl in cost.items()]
        settings = {"student": student, "tokens": tokens}
        write_json(run / "selection.json", {"settings": settings, "layers": rows, "rankings": {}})

    measured(mamba, costs[0])
    measured(delta, costs[1])
    assert main(line) == 0
    config = HybridConfig.from_pretrained(tmp_path / "both" / "phases" / "hidden" / "student")
    assert config.ssm_layers == [0, 1, 2]
    assert config.mixer == {0: "mamba2", 1: "gated_delta", 2: "gated_delta"}
    assert Recipe.load(tmp_path / "both" / "recipe.yaml").student.gate == "output"
    assert not config.mixer_bias  # neither has any

    measured(delta, costs[1], tokens=96)
    capsys.readouterr()
    assert main([*line[:-1], str(tmp_path / "new")]) == 2
    assert "was measured otherwise" in capsys.readouterr().err
    measured(delta, dict.fromkeys(range(4), 9.0))
    first, other = TrainedRun.open(mamba), TrainedRun.open(delta)
    assert [run.folder for run in mixers_from(first, [(other, ())]).values()] == [mamba, mamba, delta, mamba]


def test_what_does_not_fit_together(runs, tmp_path, capsys):
    mamba, delta = runs("mamba", mixer="mamba2"), runs("delta", mixer="gated_delta")
    kimi = runs("kimi", mixer="kimi_delta", ssm_layers=[0, 2], gate="output")
    wide = runs("wide", mixer="gated_delta", conv_kernel=3)
    shutil.copytree(tmp_path / "teacher", tmp_path / "other")
    stranger = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    torch.nn.init.constant_(stranger.model.norm.weight, 2.0)
    stranger.save_pretrained(tmp_path / "other")
    foreign = runs("foreign", f"teacher.model={tmp_path / 'other'}", mixer="gated_delta")

    def refused(*given, **options):
        with pytest.raises(UserError) as caught:
            compose(mamba, mixers_of=given, output=tmp_path / "new", **options)
        assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "new").exists()
        return str(caught.value)

    assert "has no mixer in layers [1], only in [0, 2]" in refused((kimi, [0, 1]))
    assert "layers [2] are asked of two runs" in refused((kimi, [0, 2]), (kimi, [2]))
    assert "another conv_kernel of mixers than" in (said := refused((wide, [0]))) and "(3, not 4)" in said
    assert "layer 0 (kimi_delta) output, layer 1 (mamba2) open" in refused((kimi, [0]))
    assert "mixers of several runs have none together" in refused((kimi, [0]), budget="1")
    assert "has another teacher than" in refused((foreign, [0]))
    assert "is not a run's folder" in refused((tmp_path / "nothing", [0]))
    with pytest.raises(UserError, match="is the run itself"):
        compose(mamba, mixers_of=[(delta, [0])], output=delta)
    assert main(["compose", str(mamba), "--mixers-of", str(kimi), "x", "--attention"]) == 2
    assert "--mixers-of: got 'x'; allowed: a whole number" in capsys.readouterr().err
    assert starting_gate({0: TrainedRun.open(kimi), 2: TrainedRun.open(kimi)}) == "output"
