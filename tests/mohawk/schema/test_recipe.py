"""Recipes: what is accepted, and one line for each thing that is not."""

import ast
import copy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mohawk.conversion.recipe import Recipe
from mohawk.distillation.recipe import DistillRecipe
from mohawk.errors import UserError
from mohawk.pruning.recipe import PruneRecipe
from mohawk.schema import yaml_text
from mohawk.schema.files import shipped
from mohawk.schema.kinds import kind_of
from mohawk.schema.yaml_text import RecipeText

ROOT = Path(__file__).resolve().parents[3]
MINIMAL = {"teacher": "some/model", "data": {"train": ["a.txt"]}}


def with_values(**changes):
    """MINIMAL with `a__b=value` set at a.b."""
    data = copy.deepcopy({**MINIMAL, "teacher": {"model": "some/model"}})
    for path, value in changes.items():
        *parents, last = path.split("__")
        at = data
        for key in parents:
            at = at.setdefault(key, {})
        at[last] = value
    return data


def mistakes(data, overrides=()) -> list[str]:
    with pytest.raises(UserError) as caught:
        Recipe.from_dict(data, overrides)
    return str(caught.value).splitlines()


def test_defaults_are_the_papers_budgets():
    recipe = Recipe.from_dict(MINIMAL)
    assert recipe.teacher.model == "some/model"
    assert recipe.data.train[0].source == "a.txt"
    phases = dict(recipe.phases.active())
    assert {name: phase.tokens for name, phase in phases.items()} == {
        "mixing": 80_000_000,
        "hidden": 160_000_000,
        "end_to_end": 2_760_000_000,
    }
    assert [phase.tokens_per_step for phase in phases.values()] == [2**15, 2**15, 2**19]
    assert [phase.learning_rate for phase in phases.values()] == [1e-4, 1e-4, 1e-5]


def test_numbers_and_words_are_read_as_meant(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "teacher: {model: no, revision: 'on'}\n"
        "data: {train: [{source: a.txt, split: yes}]}\n"
        "phases:\n"
        "  mixing: &usual {tokens: 2e6, learning_rate: 1e-4}\n"
        "  hidden: {<<: *usual, learning_rate: 1.e-3}\n"
        "  end_to_end: null\n"
    )
    recipe = Recipe.load(path)
    assert recipe.teacher.model == "no" and recipe.teacher.revision == "on"
    assert recipe.data.train[0].split == "yes"
    mixing, hidden = recipe.phases.mixing, recipe.phases.hidden
    assert type(mixing.tokens) is int and mixing.tokens == hidden.tokens == 2_000_000
    assert mixing.learning_rate == 1e-4 and hidden.learning_rate == 1e-3
    assert [name for name, _ in recipe.phases.active()] == ["mixing", "hidden"]
    assert recipe.output == Path("runs/mine")


def test_steps_round_up():
    phase = Recipe.from_dict(
        with_values(phases__mixing={"tokens": 1001, "batch_size": 2, "sequence_length": 50})
    ).phases.mixing
    assert phase.tokens_per_step == 100 and phase.steps() == 11


ONE_MISTAKE = [
    # (what is set, what the one line must say)
    (dict(teacher__modle="x"), "teacher.modle: unknown key; did you mean model?"),
    (dict(teacher__xyzzy="x"), "teacher.xyzzy: unknown key; known keys: model, gguf_file, revision"),
    (dict(seeed=3), "seeed: unknown key; did you mean seed?"),
    (dict(phases__hiden={}), "phases.hiden: unknown key; did you mean hidden?"),
    (dict(teacher={}), "teacher.model: missing; give folder, .gguf file or hub id"),
    (dict(teacher__revision=1234567), "got 1234567; allowed: text, not empty or null; put it in quotes"),
    (dict(teacher__trust_remote_code="yes"), "got the text 'yes'; allowed: true or false"),
    (dict(student__mixer="mamba3"), "got the text 'mamba3'; allowed: mamba2, discrete_mamba2"),
    (dict(student__ssm_layers="every_third"), "allowed: every_second, all, or a list of layer indices"),
    (dict(student__ssm_layers=[1, 1]), "allowed: a list that names each layer once"),
    (dict(student__ssm_layers=[-1]), "student.ssm_layers: got the list [-1]"),
    (dict(student__ssm_layers=[True]), "student.ssm_layers: got the list [True]"),
    (dict(student__state_size=0), "got 0; allowed: a whole number, at least 1, at most 1024"),
    (dict(student__conv_kernel=2.5), "student.conv_kernel: got 2.5; allowed: a whole number"),
    (dict(data__train=[]), "data.train: got the list []; allowed: a list"),
    (dict(data__train=[{"field": "x"}]), "data.train.0.source: missing"),
    (dict(data__train=["a", 7]), "data.train.1: got 7; allowed: a mapping with source, split"),
    (dict(data__validation_share=0.9), "got 0.9; allowed: a number, at least 0, at most 0.5"),
    (
        dict(phases__mixing__tokens="many"),
        "phases.mixing.tokens: got the text 'many'; allowed: a whole number",
    ),
    (dict(phases__mixing__tokens=True), "phases.mixing.tokens: got true; allowed: a whole number"),
    (dict(phases__mixing__tokens=2.5e-3), "phases.mixing.tokens: got 0.0025; allowed: a whole number"),
    (dict(phases__mixing__metric="kl"), "allowed: frobenius, squared, mse, relative"),
    (
        dict(phases__hidden__betas=[0.9, 1.0]),
        "phases.hidden.betas.1: got 1.0; allowed: a number, at least 0, below 1",
    ),
    (dict(phases__hidden__betas=[0.9]), "phases.hidden.betas"),
    (dict(phases__hidden__learning_rate=0), "got 0; allowed: a number, above 0, at most 1"),
    (dict(phases__hidden__learning_rate=float("nan")), "phases.hidden.learning_rate: got nan"),
    (dict(phases__hidden__learning_rate=float("inf")), "phases.hidden.learning_rate: got inf"),
    (dict(phases__end_to_end__temperature="hot"), "got the text 'hot'; allowed: a number, at least 0.001, at most 100"),
    (
        dict(evaluation__contexts=[512, 0]),
        "evaluation.contexts.1: got 0; allowed: a whole number, at least 1",
    ),
    (dict(evaluation__prompt=""), "evaluation.prompt: got the text ''; allowed: text, not empty"),
    (dict(precision="float16"), "got the text 'float16'; allowed: auto, float32, bfloat16"),
    (dict(seed=-1), "seed: got -1; allowed: a whole number, at least 0"),
    (dict(output=3), "output: got 3; allowed: a path"),
    # pairs that contradict each other
    (dict(teacher={"model": "x.gguf", "gguf_file": "y.gguf"}), "remove gguf_file"),
    (dict(student={"gate": "output", "init": "random"}), "use gate: open or init: attention"),
    (dict(data__validation_share=0), "there is no text to evaluate on"),
    (dict(phases__mixing={"warmup": 0.6, "decay": 0.5}), "together exceed 1"),
    (dict(phases__mixing__tokens=100), "100 tokens do not fill one step"),
    (dict(phases__hidden={"train_mlp": True, "match": "mixer_output"}), "gives an MLP no gradient"),
    (dict(phases__end_to_end={"kd_weight": 0, "ce_weight": 0}), "kd_weight and ce_weight are both 0"),
    (dict(evaluation={"tokens": 10}), "10 tokens do not fill one window of 512"),
]


@pytest.mark.parametrize(("changes", "words"), ONE_MISTAKE, ids=[str(c) for c, _ in ONE_MISTAKE])
def test_one_mistake_is_one_line(changes, words):
    lines = mistakes(with_values(**changes))
    assert len(lines) == 1
    assert words in lines[0]


def test_all_mistakes_are_reported_at_once_with_their_lines(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "teacher:\n"
        "  model: x.gguf\n"
        "  gguf_file: y.gguf\n"
        "  dtipe: float32\n"
        "student: {mixer: mamba3, ssm_layers: [1, 1]}\n"
        "seed: 1\n"
        "data:\n"
        "  train: [a.txt, {sorce: x}]\n"
        "phases:\n"
        "  mixing: {warmup: 0.8, decay: 0.5, tokens: many}\n"
        "  end_to_end:\n"
        "    kd_weight: 0\n"
        "seed: 2\n"
    )
    with pytest.raises(UserError) as caught:
        Recipe.load(path, ["phases.mixng.tokens=3", "phases.hidden.match=both"])
    lines = str(caught.value).splitlines()
    expected = [
        (3, "teacher.gguf_file and a teacher.model"),
        (4, "teacher.dtipe: unknown key; did you mean dtype?"),
        (5, "student.mixer"),
        (5, "student.ssm_layers"),
        (8, "data.train.1.source: missing"),
        (8, "data.train.1.sorce: unknown key; did you mean source?"),
        (10, "phases.mixing.tokens"),
        (10, "together exceed 1"),
        (12, "kd_weight and ce_weight are both 0"),
        (13, "seed: given twice, first in line 6"),
    ]
    for (number, words), line in zip(expected, lines, strict=False):
        assert line.startswith(f"{path}:{number}: ") and words in line
    assert sorted(lines[len(expected) :]) == [
        "--set phases.hidden.match: got the text 'both'; allowed: block_output, mixer_output "
        "(which output is compared with the teacher's: the whole layer's or the mixer's)",
        "--set phases.mixng.tokens: phases.mixng: unknown key; did you mean mixing?",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "r.yaml:1: the recipe is a list; it must be a mapping"),
        ("just words\n", "r.yaml:1: the recipe is a single value"),
        ("teacher: x\n data: y\n", "r.yaml:2: not readable as YAML"),
        ("teacher: [x\n", "not readable as YAML"),
        ("\tteacher: x\n", "r.yaml:1: not readable as YAML"),
        ("teacher: *nobody\n", "r.yaml:1: not readable as YAML"),
        ("teacher: x\n---\nteacher: y\n", "not readable as YAML"),
        ("", "r.yaml: teacher: missing; give the Transformer to convert\nr.yaml: data: missing"),
        ("teacher: !!python/object:os.system x\ndata: {train: [a]}", "r.yaml:1: teacher: cannot read 'x' as"),
        ("teacher: x\ndata: &d {train: [a], evaluation: *d}\n", "an alias refers to what it stands in"),
        (
            "teacher: x\ndata: {train: [a]}\n? [1, 2]\n: 3\n",
            "r.yaml:3: the recipe: a key must be a word, not a list",
        ),
    ],
)
def test_text_that_is_no_recipe(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        Recipe.load("r.yaml")
    assert words in str(caught.value)


def test_a_recipe_that_cannot_be_read(tmp_path):
    for read in (Recipe.load, kind_of):
        with pytest.raises(UserError, match=r"there is no recipe .*nowhere\.yaml; `mohawk recipes` lists those that"):
            read(tmp_path / "nowhere.yaml")
        with pytest.raises(
            UserError, match=r"there is no recipe .*phi-mamba; `mohawk recipes phi-mamba` copies the one"
        ):
            read(tmp_path / "phi-mamba")
    with pytest.raises(UserError, match="Is a directory"):
        Recipe.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"teacher: \xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        Recipe.load(tmp_path / "latin.yaml")


def test_a_file_that_is_far_too_large_for_a_recipe_is_not_read_whole(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(1 << 33)  # 8 GiB of nothing
    with pytest.raises(UserError, match="model.safetensors: has more than 1,048,576 characters, which no recipe has"):
        Recipe.load(tmp_path / "model.safetensors")


def test_overrides():
    data = {**with_values(phases__mixing=None), "teacher": "short"}
    recipe = Recipe.from_dict(
        data,
        [
            "phases.hidden.tokens=2e6",
            "phases.hidden.betas=[0.8, 0.9]",
            "teacher.revision='1234'",
            "data.train.0.field=body",
            "student.ssm_layers=[0, 2]",
            "phases.end_to_end=null",
            "evaluation.prompt=a=b: c",
            "seed=1",
            "seed=2",
            "phases.mixing.tokens=1e6",
        ],
    )
    assert recipe.phases.hidden.tokens == 2_000_000
    assert recipe.phases.hidden.betas == (0.8, 0.9)
    assert recipe.teacher.model == "short" and recipe.teacher.revision == "1234"
    assert recipe.data.train[0].source == "a.txt" and recipe.data.train[0].field == "body"
    assert recipe.student.ssm_layers == [0, 2]
    assert recipe.phases.end_to_end is None
    assert recipe.seed == 2, "the last one counts"
    assert recipe.phases.mixing.tokens == 1_000_000, "a skipped phase comes back"
    assert data["teacher"] == "short" and data["phases"] == {"mixing": None}, "the caller's data are untouched"


PRUNED = {**MINIMAL, "prune": {"ffn": 64}}
DISTILLED = {**MINIMAL, "student": "small/model", "stages": [{"name": "a"}, {"name": "b"}]}


@pytest.mark.parametrize(
    ("schema", "data", "bare", "written_out"),
    [
        (Recipe, MINIMAL, {"teacher": "x"}, {"teacher": {"model": "x"}}),
        (PruneRecipe, PRUNED, {"heal": {"data": {"train": ["x"]}}}, {"heal": {"data": {"train": [{"source": "x"}]}}}),
        (
            PruneRecipe,
            PRUNED,
            {"correct": {"data": {"train": ["x", {"source": "y", "kind": "pairs"}], "evaluation": ["z"]}}},
            {
                "correct": {
                    "data": {
                        "train": [{"source": "x"}, {"source": "y", "kind": "pairs"}], "evaluation": [{"source": "z"}],
                    }
                }
            },
        ),
        (
            DistillRecipe,
            DISTILLED,
            {"stages": [{"name": "a"}, {"name": "b", "student": "x", "data": {"train": ["y"]}}]},
            {"stages": [{"name": "a"}, {"name": "b", "student": {"model": "x"}, "data": {"train": [{"source": "y"}]}}]},
        ),
        (DistillRecipe, DISTILLED, {"teachers": ["x", "y"]}, {"teachers": [{"model": "x"}, {"model": "y"}]}),
    ],
    ids=["teacher", "heal.data", "correct.data", "stages", "teachers"],
)  # fmt: skip
def test_a_bare_text_is_a_section_written_short(schema, data, bare, written_out):
    """A checkpoint is its `model` and text its `source`, wherever in a recipe they stand."""
    recipe = schema.from_dict({**data, **bare})
    assert recipe == schema.from_dict({**data, **written_out})
    assert recipe != schema.from_dict(data)


def test_an_override_reaches_into_a_bare_text():
    data = {**PRUNED, "heal": {"data": {"train": ["a", "b"]}}}
    recipe = PruneRecipe.from_dict(
        data, ["heal.data.train.1.field=body", "correct={data: {train: [c]}}", "correct.data.train.0.split=test"]
    )
    assert recipe.heal is not None and recipe.heal.data is not None
    assert [(source.source, source.field) for source in recipe.heal.data.train] == [("a", "text"), ("b", "body")]
    assert recipe.correct is not None and recipe.correct.data is not None
    assert [(source.source, source.split) for source in recipe.correct.data.train] == [("c", "test")]
    with pytest.raises(UserError) as caught:
        PruneRecipe.from_dict({**PRUNED, "heal": {"data": {"train": "a"}}, "correct": {"data": {"train": [3]}}})
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and "heal.data.train: got the text 'a'; allowed: a list" in lines[0] + lines[1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "--set seed: not of the form key.key=value"),
        ("=3", "not of the form"),
        ("a..b=3", "not of the form"),
        ("phases.hidden.tokns=3", "--set phases.hidden.tokns: unknown key; did you mean tokens?"),
        ("phases.hidden.tokens=x", "--set phases.hidden.tokens: got the text 'x'; allowed: a whole number"),
        ("seed=[1", "--set seed: cannot read the value '[1' as YAML"),
        ("seed=!!foo 1", "--set seed: cannot read '1' as"),
        ("seed.more=1", "--set seed.more: seed: got a mapping; allowed: a whole number"),
        ("precision.more=1", "--set precision.more: precision is the text 'auto', which has no keys"),
        ("data.train.5=x", "--set data.train.5: got '5', but data.train is a list; its entries: 0 to 0"),
        ("data.train.first=x", "got 'first', but data.train is a list"),
        ("seed=", "--set seed: got null; allowed: a whole number"),
    ],
)
def test_wrong_overrides(override, words):
    lines = mistakes(with_values(precision="auto"), [override])
    assert len(lines) == 1 and words in lines[0]


def test_saved_recipe_is_read_back_equal(tmp_path):
    recipe = Recipe.from_dict(
        with_values(
            teacher__revision="1e10",
            teacher__tokenizer="no",
            data__evaluation=[{"source": "b: c # d", "format": "jsonl"}],
            data__cache="~/a b",
            student__ssm_layers=[3, 1],
            phases__hidden=None,
            phases__mixing__learning_rate=1 / 3,
            phases__end_to_end__learning_rate=1e-5,
            evaluation__prompt="one \"two\" 'three'\n\tfour \u00e9 \U0001f600 \u0085",
            output="runs/x",
        )
    )
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    assert Recipe.load(tmp_path / "recipe.yaml").to_yaml() == recipe.to_yaml()
    assert "\n  hidden: null\n" in recipe.to_yaml()


signs = st.text("?:-#&*!|>'\"%@`,[]{}=<~ \t\n\x8501.eax", max_size=5)  # of which YAML makes something else than text
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | signs,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abcdefgh_", min_size=1).filter(lambda key: key.isidentifier()), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text() | signs, plain, min_size=1).filter(lambda data: "<<" not in data))
@example({"a": ["?0", "?", ":a", "-", "- a"], "?b": {"\x85": None, "-": "?"}})
def test_any_plain_data_survives_yaml(data):
    read = RecipeText.read(yaml_text.write(data), "r.yaml")
    assert read.data == data and not read.mistakes


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["teacher", "data", "phases", "student", "seed", "x"]), plain))
def test_any_plain_data_is_a_recipe_or_a_user_error(data):
    try:
        Recipe.from_dict(data)
    except UserError as error:
        assert str(error)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
def test_shipped_recipes_are_valid(name):
    recipe = kind_of(shipped(name)).load(shipped(name))
    assert recipe.output == Path("runs") / name
    phases = [phase for _, phase in recipe.phases.active()] if isinstance(recipe, Recipe) else recipe.stages
    for phase in phases:
        assert getattr(phase, "epochs", None) or phase.steps() >= 10, "a shipped recipe trains"


def test_unknown_shipped_recipe():
    for name in ("nothing", "../recipes/demo", ""):
        with pytest.raises(UserError, match=f"no recipe named '{name}' comes with mohawk; allowed: demo, distill-bert"):
            shipped(name)


def test_validating_imports_nothing_heavy():
    code = (
        "import sys; from mohawk.conversion.recipe import Recipe; from mohawk.schema.files import shipped;"
        "Recipe.load(shipped('demo'));"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'triton'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("temperature", "line"),
    [
        ({"start": 5}, "temperature.end: missing; give value at the end of the ramp, and from there on"),
        ({"start": 5, "end": "x"}, "temperature.end: got the text 'x'; allowed: a number, at least 0, at most 1000000"),
        ({"start": 5, "end": 1, "ende": 2}, "temperature.ende: unknown key; did you mean end?"),
        (0, "temperature: got 0; allowed: auto or a number, "),
    ],
)
def test_a_mistake_in_one_of_several_forms_is_one_line(temperature, line):
    from mohawk.distillation.recipe import DistillRecipe
    from mohawk.pruning.recipe import PruneRecipe

    given = {"teacher": "x", "data": {"train": ["a.txt"]}}
    distilled = {**given, "student": {"layers": "every_second"}, "stages": [{"temperature": temperature}]}
    pruned = {**given, "prune": {"ffn": 8}, "heal": {"temperature": temperature}}
    for kind, data, at in ((DistillRecipe, distilled, "stages.0"), (PruneRecipe, pruned, "heal")):
        with pytest.raises(UserError) as error:
            kind.from_dict(data)
        assert "\n" not in str(error.value) and str(error.value).startswith(f"recipe: {at}.{line}"), str(error.value)
    pruned["prune"] = {"ffn": 8, "memory": 1e9}  # what is wrong elsewhere is said too
    with pytest.raises(UserError, match="ffn and memory"):
        PruneRecipe.from_dict(pruned)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(phases__mixing__tokens=1e30), "got 1e+30; allowed: a whole number, at least 1, at most 1000000000000000"),
        (dict(phases__end_to_end__temperature=0.0005), "got 0.0005; allowed: a number, at least 0.001, at most 100"),
        (
            dict(evaluation__contexts=[1e12]),
            "got 1000000000000.0; allowed: a whole number, at least 1, at most 16777216",
        ),
        (dict(evaluation__decode_tokens=1e12), "at most 1048576"),
        (dict(phases__hidden__batch_size=1e12), "at most 1048576"),
        (dict(phases__hidden__sequence_length=1e12), "at most 16777216"),
        (dict(phases__end_to_end__ce_weight=1e39), "at most 1000000.0"),
        (dict(phases__mixing__save_minutes=0), "got 0; allowed: a number, above 0, at most 1000000.0 or null"),
        (dict(teacher__model="a\0b"), "holds a NUL character, which no name has; leave it out"),
        (dict(output="a\0b"), "holds a NUL character, which no name has; leave it out"),
    ],
    ids=str,
)
def test_what_nobody_can_run_is_refused_before_training(changes, words):
    (line,) = mistakes(with_values(**changes))
    assert words in line


NINE = ",".join(["*a{0}"] * 9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{NINE.format(i - 1)}]\n" for i in range(1, 10)),
            "recipe.yaml: has 4,412,961,516 values, what aliases stand for written out; allowed: 100,000",
        ),
        (
            "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{NINE.format(i - 1)}]}}\n" for i in range(1, 10)),
            "what aliases stand for written out; allowed: 100,000",
        ),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 400)), "nested more than 50 deep"),
        ("a: " + "[" * 100_000, "nested more than 50 deep"),
        ("a: " + "[" * 51 + "]" * 51, "nested more than 50 deep"),
        ("a: " + "{a: " * 2000, "nested more than 50 deep"),
        ("- " * 20_000 + "a", "nested more than 50 deep"),
        ("".join(" " * i + "a:\n" for i in range(500)), "nested more than 50 deep"),
        ("# " + "x" * 300_000, "has 300,002 characters; allowed: 262,144"),
    ],
    ids=["aliases", "merged", "chain", "open", "lists", "mappings", "dashes", "blocks", "long"],
)
def test_yaml_that_would_take_for_ever(text, words):
    begin = time.process_time()
    with pytest.raises(UserError) as caught:
        RecipeText.read(text, "recipe.yaml")
    assert words in str(caught.value) and "\n" not in str(caught.value) and time.process_time() - begin < 5.0


def test_aliases_within_reason_are_read():
    read = RecipeText.read("a: &a {x: [1, 2]}\nb: [*a, *a]\nc: {<<: *a, y: 3}\n", "recipe.yaml")
    assert read.data == {"a": {"x": [1, 2]}, "b": [{"x": [1, 2]}] * 2, "c": {"x": [1, 2], "y": 3}}
    assert not read.mistakes


@pytest.mark.parametrize("name", ["before", "tasks", "again"])
def test_a_stage_is_not_called_as_other_results_are(name):
    data = {**MINIMAL, "student": {"layers": "every_second"}, "stages": [{"name": name}]}
    with pytest.raises(UserError, match=rf"stages.0 \({name}\): results have that name for something else"):
        DistillRecipe.from_dict(data)
    prune = {**MINIMAL, "prune": {"ffn": 1}, "correct": {"name": name}}
    with pytest.raises(UserError, match=f"correct.name: {name} is the name of another stage"):
        PruneRecipe.from_dict(prune)


@pytest.mark.parametrize("name", ["schema/base", "conversion/recipe", "distillation/recipe", "pruning/recipe"])
def test_type_checkers_know_of_defaults(name):
    """mypy and pyright take a field whose default is given by place for one that has to be given."""
    code = ast.parse((ROOT / "mohawk" / f"{name}.py").read_text())
    calls = [node for node in ast.walk(code) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Field"]
    assert calls
    assert [f"line {call.lineno}" for call in calls if call.args] == []
