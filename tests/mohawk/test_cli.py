"""The command line: what it passes on, what it prints, and its exit codes."""

import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from mohawk.cli import BARS, commands, main, parser
from mohawk.conversion.recipe import Recipe
from mohawk.core.extras import EXTRAS
from mohawk.core.folders import Interrupted
from mohawk.errors import UserError
from mohawk.models.call import CACHE
from mohawk.schema.files import shipped

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "teacher: some/model\ndata: {train: [a.txt]}\n"


def mohawk(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mohawk", *arguments]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def module(monkeypatch):
    """A function that puts `mohawk.NAME` in place for the command line to import, and records its calls."""

    def install(name: str, function: str, action=lambda: None) -> list:
        calls = []

        def record(*args, **kwargs):
            calls.append((args, kwargs))
            action()

        fake = types.ModuleType(f"mohawk.{name}")
        setattr(fake, function, record)
        monkeypatch.setitem(sys.modules, f"mohawk.{name}", fake)
        return calls

    return install


def raising(error: BaseException):
    def act():
        raise error

    return act


def test_convert_gets_the_checked_recipe(recipe, module):
    calls = module("conversion.run", "convert")
    assert main(["convert", str(recipe), "--dry-run", "--set", "seed=3", "--set", "phases.hidden=null"]) == 0
    ((checked,), options) = calls[0]
    assert isinstance(checked, Recipe) and options == {"dry_run": True, "hardware": None}
    assert checked.seed == 3 and checked.phases.hidden is None and checked.output == Path("runs/mine")
    # a folder's name is text, whatever YAML would make of it
    for name in ("runs/x", "2026", "null", "it's: here"):
        assert main(["convert", str(recipe), "--output", name]) == 0
        ((checked,), options) = calls[-1]
        assert checked.output == Path(name) and options == {"dry_run": False, "hardware": None}


def test_demo_gets_its_arguments(module):
    calls = module("demo.run", "demo")
    assert main(["demo"]) == 0
    assert main(["demo", "--teacher", "x", "--output", "y", "--set", "seed=1", "--set", "seed=2"]) == 0
    assert calls == [((None, Path("runs/demo"), []), {}), (("x", Path("y"), ["seed=1", "seed=2"]), {})]


def test_recipe_mistakes_are_lines_on_stderr(recipe, capsys):
    recipe.write_text(RECIPE + "sead: 1\nprecision: half\n")
    assert main(["convert", str(recipe), "--set", "seed=x"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"error: {recipe}:3: sead: unknown key; did you mean seed?",
        f"error: {recipe}:4: precision: got the text 'half'; allowed: auto, float32, bfloat16 "
        "(precision of training; auto: bfloat16 autocast where the device is fast at it)",
        "error: --set seed: got the text 'x'; allowed: a whole number, at least 0, below 4294967296 "
        "(seed of data order and random weights)",
    ]


def test_a_recipe_is_checked_before_anything_heavy_is_imported(recipe):
    recipe.write_text(RECIPE + "sead: 1\n")
    code = (
        f"import sys; from mohawk.cli import main; code = main(['convert', {str(recipe)!r}]);"
        "print(code, sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "2 []\n"


def test_user_errors_exit_with_2(recipe, module, capsys):
    module("conversion.run", "convert", raising(UserError("first line\nsecond line")))
    assert main(["convert", str(recipe)]) == 2
    assert capsys.readouterr().err == "error: first line\nerror: second line\n"


def test_stopped_by_a_signal_exits_with_130_and_says_how_to_go_on(recipe, module, capsys):
    module("conversion.run", "convert", raising(Interrupted(7, "runs/mine/phases/hidden/checkpoint-7")))
    assert main(["convert", str(recipe), "--output", "a b"]) == 130
    err = capsys.readouterr().err
    assert "step 7" in err and "checkpoint-7" in err
    assert f"mohawk convert {recipe} --output 'a b'" in err
    assert err.count("\n") == 1
    module("conversion.run", "convert", raising(KeyboardInterrupt()))
    assert main(["convert", str(recipe)]) == 130


# A meta path finder that hides packages, as a child process has it: what is not there fails in the midst of an import.
HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in HIDDEN else find_spec(name, *rest)
sys.meta_path.insert(0, Hidden())
from mohawk.cli import main
"""
CONVERT = sorted(EXTRAS["convert"])


def without(hidden: Sequence[str], code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    code = f"HIDDEN = {tuple(hidden)!r}\n{HIDE}{code}"
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def asks_for(what: str, missing: Sequence[str], extra: str) -> str:
    listed = ", ".join(missing)
    needs = f"{what} needs packages that are not installed ({listed})"
    return f"error: {needs}: run pip install {extra} in mohawk's checkout\n"


def test_every_command_of_a_bare_install_says_what_to_install(tmp_path):
    recipes = {name: shlex.quote(str(shipped(name))) for name in ("llama-hybrid", "distill-distilbert", "prune-depth")}
    lines = {
        "demo": "convert",
        f"convert {recipes['llama-hybrid']} --dry-run": "convert",
        f"distill {recipes['distill-distilbert']}": "convert",
        f"distill {recipes['distill-distilbert']} --set student.lora.rank=4": "lora",
        f"ablate {recipes['distill-distilbert']} --over temperature=1,2": "convert",
        f"prune {recipes['prune-depth']}": "convert",
        "select x": "convert",
        "compose x --budget 3": "convert",
        f"cache {recipes['distill-distilbert']} --output o": "convert",
        "evaluate x": "convert",
        "evaluate x --tasks mohawk": "eval",
        "generate x --prompt y": "convert",
        "generate-data p.txt --model x --output o": "convert",
        "purify a.jsonl --by vote --output o": "convert",
        "export x": "convert",
        "inspect x": "convert",
        "report x": "convert",
        "compare x y p.txt --output o": "convert",
        "watch l.jsonl": "convert",
        "quantize x --to int8": "quantize",
        "quantize x --to gguf-q8_0": "convert",
        "inspect x --matrices a": "convert",
    }
    words = {shlex.split(line)[0] for line in lines}
    known = next(action for action in parser()._actions if action.choices).choices
    assert words == set(known) - {"recipes", "verify", "doctor"}, "every command is tried; these need nothing"
    code = f"for line in {[shlex.split(line) for line in lines]!r}: print(main(line), file=sys.stderr, flush=True)"
    result = without([name for names in EXTRAS.values() for name in names], code, cwd=tmp_path)
    said = result.stderr.splitlines(keepends=True)
    assert len(said) == 2 * len(lines), result.stderr
    for (line, extra), words, code in zip(lines.items(), said[::2], said[1::2], strict=True):
        what = "`mohawk evaluate --tasks`" if "--tasks" in line else f"`mohawk {line.split()[0]}`"
        missing = sorted({*CONVERT, *EXTRAS[extra]})
        assert (words, code) == (asks_for(what, missing, f"'.[{extra}]'"), "2\n"), line
    assert list(tmp_path.iterdir()) == []


def test_a_bare_install_lists_recipes_and_checks_them_and_has_a_doctor(tmp_path):
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "print(main(['recipes']), main(['recipes', 'demo']), main(['convert', 'demo.yaml', '--set', 'seed=x']))\n"
        "print(main(['doctor']))"
    )
    result = without([name for names in EXTRAS.values() for name in names], code, cwd=tmp_path)
    assert "\n0 0 2\n" in result.stdout and result.stdout.endswith("\n0\n"), result.stdout
    assert result.stderr.startswith("error: --set seed: got the text 'x'") and result.stderr.count("\n") == 1


def test_a_package_that_another_one_imports_is_named_too(recipe):
    run = f"sys.exit(main(['convert', {str(recipe)!r}, '--dry-run']))"
    for hidden, listed in (("pyarrow", ["pyarrow"]), ("numpy", ["numpy"]), ("matplotlib", ["matplotlib"])):
        result = without([hidden], run)
        assert result.returncode == 2
        assert result.stderr == asks_for("`mohawk convert`", listed, "'.[convert]'")


def test_a_module_that_no_extra_brings_is_a_bug(recipe, module):
    nowhere = "a_package_that_nobody_has"
    module("conversion.run", "convert", raising(ModuleNotFoundError(f"no {nowhere}", name=nowhere)))
    with pytest.raises(ModuleNotFoundError):
        main(["convert", str(recipe)])
    # a package that is there, but not as we knew it: the installation lacks nothing
    module("conversion.run", "convert", raising(ModuleNotFoundError("no such part", name="transformers.nothing")))
    with pytest.raises(ModuleNotFoundError):
        main(["convert", str(recipe)])
    module("conversion.run", "convert", raising(ModuleNotFoundError("no such part", name="ruamel.nothing")))
    with pytest.raises(ModuleNotFoundError):
        main(["convert", str(recipe)])


def test_extras_are_those_of_the_installation():
    tables = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for extra, names in EXTRAS.items():
        asked = {
            re.match(r"[\w-]+", line)[0].replace("-", "_")
            for line in tables[extra]
            if not line.startswith("mohawk-distill[")
        }
        with_others = {"numpy", "huggingface_hub", "tokenizers"} if extra == "convert" else set()
        assert set(names) - with_others <= asked <= set(names), extra


def test_recipes_are_listed_and_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    rows = [line.split(None, 2) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _, _ in rows] == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    kinds = {name: kind for name, kind, _ in rows}
    assert (kinds["demo"], kinds["mohawk-lite"], kinds["prune-and-convert"]) == ("convert", "distill", "prune")
    for name, _, text in rows:
        assert text[0] != "#" and text.endswith(".") and len(text) <= 118, (
            f"{name}: its first comment line says what it is"
        )

    assert main(["recipes", "prune-depth"]) == 0
    copied = capsys.readouterr().out
    assert copied == "written to prune-depth.yaml; to see what it would do: mohawk prune prune-depth.yaml --dry-run\n"
    assert Path("prune-depth.yaml").read_bytes() == (ROOT / "recipes" / "prune-depth.yaml").read_bytes()
    assert main(["recipes", "phi-mamba", "--output", "a b.yaml"]) == 0
    assert "mohawk convert 'a b.yaml' --dry-run" in capsys.readouterr().out
    Path("a b.yaml").write_text("mine")
    for line, words in (
        (["recipes", "phi-mamba", "--output", "a b.yaml"], "a b.yaml exists and is left as it is"),
        (["recipes", "prune-depth"], "prune-depth.yaml exists and is left as it is"),
        (["recipes", "demo", "--output", "nowhere/x.yaml"], "nowhere/x.yaml cannot be written (No such file"),
        (["recipes", "nothing"], "no recipe named 'nothing' comes with mohawk; allowed: demo, "),
        (["recipes", "--output", "x"], "--output is of a NAME"),
    ):
        assert main(line) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert Path("a b.yaml").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_bars_are_drawn_in_a_terminal_alone(module, monkeypatch):
    seen = []
    module("inspection.doctor", "doctor", lambda: seen.append([os.environ.get(name) for name in BARS]))
    for name in BARS:
        monkeypatch.delenv(name, raising=False)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert main(["doctor"]) == 0
    monkeypatch.setenv(BARS[0], "0")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert main(["doctor"]) == 0
    assert seen == [["1"] * 3, [None] * 3, ["0", "1", "1"]]
    assert [os.environ.get(name) for name in BARS] == ["0", None, None]


def test_bugs_keep_their_traceback(recipe, module):
    module("conversion.run", "convert", raising(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        main(["convert", str(recipe)])
    module("conversion.run", "convert", raising(ModuleNotFoundError("no such thing", name="mohawk.nowhere")))
    with pytest.raises(ModuleNotFoundError):
        main(["convert", str(recipe)])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("conver r.yaml", "invalid choice: 'conver'"),
        ("convert", "required: RECIPE"),
        ("convert r.yaml --dry", "unrecognized arguments: --dry"),
        ("generate x", "required: --prompt"),
        ("generate x --prompt y --top-p 2", "--top-p: got '2'; allowed: a number from 0 to 1"),
        (
            "generate x --prompt y --temperature warm",
            "--temperature: got 'warm'; allowed: a number of at least 0",
        ),
        ("generate x --prompt y --max-new-tokens 0", "got '0'; allowed: a whole number of at least 1"),
        ("generate x --prompt y --max-new-tokens 1" + 30 * "0", "allowed: a whole number from 1 to 1000000000000000"),
        ("generate x --prompt y --seed 4294967296", "got '4294967296'; allowed: a whole number from 0 to 4294967295"),
        ("generate x --prompt y --max-new-tokens 1.5", "got '1.5'; allowed: a whole number of at least 1"),
        ("generate x --prompt y --temperature nan", "got 'nan'; allowed: a number of at least 0"),
        ("inspect x --contexts 0", "got '0'; allowed: a whole number of at least 1"),
    ],
)
def test_usage_mistakes_exit_with_2(line, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(line))
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_top_p_needs_a_temperature(capsys):
    assert main(["generate", "x", "--prompt", "y", "--top-p", "0.5"]) == 2
    assert "--top-p needs --temperature above 0" in capsys.readouterr().err


def test_help_is_quick_and_imports_nothing_heavy():
    times = []  # of the processor: other work on the machine does not lengthen them
    for _ in range(5):
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = mohawk("--help")
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
        assert result.returncode == 0
    for name in ("demo", "convert", "evaluate", "generate", "inspect", "doctor"):
        assert re.search(rf"^    {name} ", result.stdout, re.MULTILINE), name
    assert min(times) < 0.5
    code = (
        "import sys\n"
        "from mohawk.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'pydantic', 'rich'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_exit_codes_of_the_process(tmp_path):
    assert mohawk("convert", "nowhere.yaml", cwd=tmp_path).returncode == 2
    assert mohawk("nonsense", cwd=tmp_path).returncode == 2
    assert mohawk("--version", cwd=tmp_path).returncode == 0
    (tmp_path / "r.yaml").write_text(RECIPE)
    wrong = mohawk("convert", "r.yaml", "--set", "seed=x", cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_llama, tokenizer):
    """Folders of a tiny teacher and a hybrid made from it."""
    from mohawk.models.from_teacher import hybrid_from_teacher

    folder = tmp_path_factory.mktemp("models")
    teacher = make_llama(num_hidden_layers=4)
    teacher.save_pretrained(folder / "teacher")
    hybrid_from_teacher(teacher, ssm_layers=[1, 2]).save_pretrained(folder / "hybrid")
    for name in ("teacher", "hybrid"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", ["teacher", "hybrid"])
def test_generate_prints_what_the_model_generates(models, name, tokenizer, capsys):
    from transformers import AutoModelForCausalLM

    assert main(["generate", str(models / name), "--prompt", "Hello", "--max-new-tokens", "5"]) == 0
    printed = capsys.readouterr().out
    ids = tokenizer("Hello", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(models / name)
    expected = model.generate(**ids, max_new_tokens=5, do_sample=False, pad_token_id=257)
    assert printed == tokenizer.decode(expected[0], skip_special_tokens=True) + "\n"
    assert len(printed) > len("Hello\n")


def test_generate_samples_as_the_seed_says(models, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        line = ["generate", str(models / "hybrid"), "--prompt", "Hello", "--max-new-tokens", "20"]
        assert main([*line, "--temperature", "1.5", "--top-p", "0.9", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_generate_and_inspect_on_nothing(models, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for command in (["generate", "--prompt", "x"], ["inspect"]):
        for path in (tmp_path / "nowhere", tmp_path / "empty"):
            assert main([command[0], str(path), *command[1:]]) == 2
            err = capsys.readouterr().err
            assert err.startswith(f"error: {path}") and err.count("\n") == 1
    assert main(["generate", str(models / "teacher"), "--prompt", ""]) == 2
    assert "--prompt: got an empty text" in capsys.readouterr().err


def test_inspect_counts_what_the_model_has(models, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    from mohawk.loading.describe import describe
    from mohawk.measures.compare import cache_bytes

    model = AutoModelForCausalLM.from_pretrained(models / "hybrid")
    described = describe(models / "hybrid")
    assert described.parameters == sum(p.numel() for p in model.parameters())
    assert [layer.mixer for layer in described.layers] == [
        "full_attention",
        "mamba2",
        "mamba2",
        "full_attention",
    ]
    for context in (1, 40):
        cache = model(torch.zeros(1, context, dtype=torch.long), use_cache=True)[CACHE]
        assert sum(layer.state_bytes(context) for layer in described.layers) == cache_bytes(cache)
    assert main(["inspect", str(models / "hybrid"), "--contexts", "1", "1000000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "HybridForCausalLM" in lines[0] and f"{described.parameters:,} parameters" in lines[0]
    assert [line.split()[:2] for line in lines[2:5]] == [
        ["0", "full_attention"],
        ["1-2", "mamba2"],
        ["3", "full_attention"],
    ]
    states = {line.split()[0]: line.split()[-4:] for line in lines[2:5]}
    assert states["1-2"][:2] == states["1-2"][2:], "a constant state"
    assert states["0"][:2] != states["0"][2:]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inspect_knows_the_constant_state_of_a_stock_bamba(tmp_path, capsys, dtype):
    """What `mohawk export` writes."""
    import torch
    from transformers import BambaConfig, BambaForCausalLM

    from mohawk.loading.describe import describe
    from mohawk.measures.compare import cache_bytes

    config = BambaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=8, mamba_expand=2,
        attn_layer_indices=[1],
    )  # fmt: skip
    BambaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    model = BambaForCausalLM.from_pretrained(tmp_path, dtype="auto")
    described = describe(tmp_path)
    assert [layer.mixer for layer in described.layers] == ["mamba2", "full_attention", "mamba2"]
    assert described.layers[0].mixer_parameters == sum(p.numel() for p in model.model.layers[0].mamba.parameters())
    for context in (5, 40):
        cache = model(torch.zeros(1, context, dtype=torch.long), use_cache=True)[CACHE]
        assert sum(layer.state_bytes(context) for layer in described.layers) == cache_bytes(cache)
    assert described.layers[0].state_bytes(5) == described.layers[0].state_bytes(10**6)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "mamba2" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixer", ["mamba2", "gated_delta"])
def test_inspect_knows_the_constant_state_of_other_exports(tmp_path, dtype, mixer):
    """A Granite's, whose layers have a place for both kinds, and a Qwen3.5's."""
    import torch

    from mohawk.loading.describe import describe
    from mohawk.measures.compare import cache_bytes
    from mohawk.models.formats import granite
    from mohawk.models.formats.qwen3_5 import to_qwen3_5
    from mohawk.models.from_teacher import hybrid_from_teacher
    from tests.models.conftest import tiny_teacher

    if mixer == "mamba2" and not granite.norms_groups_apart():
        pytest.skip("this transformers norms Granite's groups together")
    whole = {"use_sliding_window": False, "sliding_window": None}
    teacher = tiny_teacher("qwen3", **whole) if mixer == "gated_delta" else tiny_teacher("llama")
    student = hybrid_from_teacher(teacher, [0, 2], mixer).to(getattr(torch, dtype))
    model = to_qwen3_5(student) if mixer == "gated_delta" else granite.to_granite(student)
    model.save_pretrained(tmp_path)
    described = describe(tmp_path)
    assert [layer.mixer for layer in described.layers] == [mixer, "full_attention"] * 2
    assert described.parameters == sum(p.numel() for p in model.parameters())
    for context in (5, 40):
        cache = model(torch.zeros(1, context, dtype=torch.long), use_cache=True)[CACHE]
        assert sum(layer.state_bytes(context) for layer in described.layers) == cache_bytes(cache)


def test_inspect_says_where_it_does_not_know_a_state(tmp_path, capsys):
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=0, layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--contexts", "8"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] in (["0"], ["1"], ["all"])]
    assert [line.endswith("not known") for line in map(str.rstrip, rows)] == [True, False, True]


def test_sliding_windows_bound_the_state(make_llama, tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    from mohawk.loading.describe import describe

    config = MistralConfig(**{**make_llama().config.to_dict(), "sliding_window": 16, "model_type": "mistral"})
    MistralForCausalLM(config).save_pretrained(tmp_path)
    layer = describe(tmp_path).layers[0]
    assert layer.state_bytes(8) * 2 == layer.state_bytes(16) == layer.state_bytes(1000)


def test_inspect_a_run(models, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "phases").mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE)
    assert main(["inspect", str(run)]) == 2
    out, err = capsys.readouterr()
    assert "mixing: not begun" in out and "is a run without a student yet" in err
    (run / "phases" / "mixing").mkdir()
    (run / "phases" / "mixing" / "student").symlink_to(models / "hybrid")
    assert main(["inspect", str(run)]) == 0
    out = capsys.readouterr().out
    assert "mixing: done" in out and "hidden: not begun" in out and "1-2" in out
    # a student that was deleted since, to save room, is not asked for
    (run / "phases" / "end_to_end").mkdir()
    (run / "phases" / "end_to_end" / "student").symlink_to(models / "hybrid")
    assert main(["inspect", str(run)]) == 0
    out = capsys.readouterr().out
    assert "hidden: done, but its student is missing\n" in out and out.count(": done\n") == 2
    shutil.rmtree(run / "phases" / "end_to_end")
    # what the recipe leaves out is not what is left to do
    (run / "recipe.yaml").write_text(RECIPE + "phases: {hidden: null, end_to_end: null}\n")
    assert main(["inspect", str(run)]) == 0
    out = capsys.readouterr().out
    assert "not begun" not in out and "mixing: done" in out
    assert "hidden: left out (null in the recipe)" in out and "end_to_end: left out (null in the recipe)" in out
    # a run can be generated from as well
    assert main(["generate", str(run), "--prompt", "Hello", "--max-new-tokens", "1"]) == 0


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("recipes >&-", 0),
        ("recipes 2>&-", 0),
        ("recipes <&- >&- 2>&-", 0),
        ("inspect /nowhere 2>&-", 2),
        ("inspect /nowhere 2>/dev/full", 2),
        ("recipes >/dev/full 2>/dev/full", 2),
    ],
)
def test_the_exit_code_is_right_where_nobody_can_be_told(ending, code):
    command = f"{shlex.quote(sys.executable)} -m mohawk {ending}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == code and "Traceback" not in result.stderr
    assert ("demo" in result.stdout) == (ending == "recipes 2>&-") and "error" not in result.stdout


def test_files_do_not_take_the_place_of_closed_streams(tmp_path):
    """What is opened next would have the number of stdout, and what is printed would go into it."""
    code = (
        "import os, sys; from mohawk.__main__ import _open_closed_streams as go; go(); "
        "os.write(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY), b'a'); print('b'); print('c', file=sys.stderr)"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {shlex.quote(str(tmp_path / 'file'))} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, timeout=300).returncode == 0
    assert (tmp_path / "file").read_bytes() == b"a"


def test_a_closed_pipe_is_no_error():
    code = (
        "import sys, types\n"
        "demo = sys.modules['mohawk.demo.run'] = types.ModuleType('mohawk.demo.run')\n"
        "demo.demo = lambda *_: print('x' * 1_000_000)\n"
        "from mohawk.cli import main\n"
        "sys.exit(main(['demo']))\n"
    )
    command = f"{shlex.join([sys.executable, '-c', code])} | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.stdout == "1\n" and result.stderr == ""


@pytest.mark.parametrize("name", ["demo", "distill-gkd", "mohawk-lite", "prune-depth", "prune-and-convert"])
def test_a_recipe_of_another_kind_is_one_line(name, tmp_path, capsys):
    path = shipped(name)
    kinds = {"prune": "prune", "distill": "distill", "mohawk": "distill", "demo": "convert"}
    own = kinds[name.partition("-")[0]]
    for command in {"convert", "distill", "prune"} - {own}:
        assert main([command, str(path)]) == 2
        said = capsys.readouterr().err
        assert said == f"error: {path}: this is a recipe for `mohawk {own}`; run that\n"


def test_a_conversion_without_phases_is_known_by_its_mixers(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text("teacher: x\nstudent:\n  ssm_layers: [0]\ndata:\n  train: [a.txt]\n")
    assert main(["distill", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}: this is a recipe for `mohawk convert`; run that\n"
    path.write_text("teacher: x\nstudent:\n  layers: every_second\ndata:\n  train: [a.txt]\n")
    assert main(["distill", str(path)]) == 2
    assert "stages: missing" in capsys.readouterr().err


def test_two_commands_of_one_name_are_an_error(monkeypatch):
    """One would silently take the other's place."""
    from mohawk.distillation import commands as distillation
    from mohawk.pruning import commands as pruning

    monkeypatch.setattr(pruning, "COMMANDS", [*pruning.COMMANDS, distillation.COMMANDS[0]])
    name = distillation.COMMANDS[0].name
    with pytest.raises(
        ValueError, match=rf"^mohawk/pruning/commands.py: a command '{name}' is in mohawk/distillation too"
    ):
        commands()
