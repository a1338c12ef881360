"""`mohawk export`: what is written loads without mohawk and is compared there, or nothing is left.

Every fresh process imports transformers anew, some ten seconds: few tests start one.
"""

import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BambaForCausalLM
from transformers.dynamic_module_utils import check_imports

from mohawk.cli import main
from mohawk.conversion.recipe import Recipe
from mohawk.core.json_files import write_json
from mohawk.errors import UserError, line_for
from mohawk.export import run as export_module
from mohawk.export.model_card import licence_of
from mohawk.export.parity import CHECKS, check_export, compare_answers, in_fresh_process, inputs_for
from mohawk.export.run import export
from mohawk.export.runtimes import bamba_notes, own_notes
from mohawk.export.targets import TARGETS
from mohawk.loading.remote_code import flattened, write_remote_code
from mohawk.measures.consistency import LEFT_ALONE, PATHS
from mohawk.models.formats import bamba, granite
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.mixers import SSMMixer
from tests.models.conftest import tiny_teacher

WRONG = ("missing_keys", "unexpected_keys", "mismatched_keys")
ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
needs_groups = pytest.mark.skipif(
    not bamba.norms_groups_apart(), reason="this transformers norms Bamba's groups together, and the export says so"
)


@pytest.fixture
def make_run(tmp_path, make_llama, tokenizer):
    """A function that makes a finished run's folder, with a teacher whose licence is known."""

    def make(mixer="mamba2", **overrides):
        teacher = make_llama(num_hidden_layers=3, **overrides)
        teacher.save_pretrained(tmp_path / "teacher")
        (tmp_path / "teacher" / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# Teacher\n")
        student = hybrid_from_teacher(teacher, [0, 2], mixer)
        run = tmp_path / "my-run"
        student.save_pretrained(run / "student")
        tokenizer.save_pretrained(run / "student")
        recipe = Recipe.from_dict(
            {"teacher": str(tmp_path / "teacher"), "data": {"train": [str(tmp_path / "texts" / "books.txt")]},
             "student": {"mixer": mixer}, "output": str(run)}
        )  # fmt: skip
        recipe.save(run / "recipe.yaml")
        found = dict(
            tokens=1234, teacher_perplexity=20.0, student_perplexity=25.0, perplexity_ratio=1.25, kl=0.5,
            top1_agreement=0.625,
        )  # fmt: skip
        write_json(
            run / "results.json",
            {"evaluation": {"end_to_end": {"held_out": found}}, "decoding": {"teacher": [], "student": []},
             "parameters": {"teacher": 10, "student": 12}, "dtypes": {"teacher": "float32", "student": "float32"},
             "phases": {}},
        )  # fmt: skip
        return run

    return make


def exported(run, *args, **options):
    console = Console(file=io.StringIO(), width=200)
    return export(run, *args, console=console, **options), console.file.getvalue()


@needs_groups
def test_a_run_becomes_a_stock_bamba_with_card_and_tokenizer(make_run, tokenizer):
    run = make_run(tie_word_embeddings=True)
    folder, screen = exported(run)
    assert folder == run / "export" / "bamba"
    for check in CHECKS.values():
        assert check in screen
    assert screen.count(" ok") == len(CHECKS) + len(LEFT_ALONE) and "differs" not in screen
    assert "vLLM (not checked)" in screen and "transformers (checked)" in screen and "vllm serve" not in screen

    config = json.loads((folder / "config.json").read_text(), parse_constant=pytest.fail)  # JSON has no Infinity
    assert config["architectures"] == ["BambaForCausalLM"] and "time_step_limit" not in config
    assert config["rope_parameters"]["partial_rotary_factor"] == 1.0
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is BambaForCausalLM and not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.time_step_limit == (0.0, float("inf"))
    assert model.generation_config.eos_token_id == 257
    assert AutoTokenizer.from_pretrained(folder)("some words")["input_ids"] == tokenizer("some words")["input_ids"]
    assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "generation_config.json", "MANIFEST.json"}

    card = (folder / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "license: apache-2.0" in front and "base_model" not in front  # a folder is no hub id
    assert "- Licence of the teacher: apache-2.0\n" in card
    assert "- Licence of the package that made it, mohawk: Apache-2.0\n" in card
    assert "2 Mamba-2 and 1 attention layers" in card
    assert "| 25.00 | 20.00 | 1.250 | 0.500 | 62.5% |" in card  # of results.json
    assert "`texts/books.txt`" in card and str(run.parent) not in card  # names of the data, no private paths
    assert "mixer: mamba2" in card and "| full forward |" in card and "| llama.cpp | no |" in card


@pytest.mark.parametrize("mixer", ["discrete_mamba2", "kimi_delta", {0: "discrete_mamba2", 2: "gated_delta"}], ids=str)
def test_a_run_becomes_a_hybrid_with_its_own_code(mixer, make_run):
    run = make_run(mixer)
    folder, screen = exported(run, "hybrid")
    assert screen.count(" ok") == len(CHECKS) + len(PATHS)
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "mohawk_hybrid.HybridForCausalLM"
    card = (folder / "README.md").read_text()
    if isinstance(mixer, dict):
        assert "of 2 Mamba-2 and Gated DeltaNet and 1 attention layers" in card
        assert "tags: [mohawk, hybrid, mamba2, gated-deltanet, custom_code]" in card
    assert "trust_remote_code=True" in card and "- Licence of the code beside the weights, mohawk: Apache-2.0\n" in card
    assert all("SPDX-License-Identifier: Apache-2.0" in path.read_text() for path in folder.glob("*.py"))


@pytest.mark.skipif(not granite.norms_groups_apart(), reason="this transformers norms Granite's groups together")
@pytest.mark.usefixtures("fresh_processes_as_shipped")
def test_a_run_becomes_a_stock_granite(make_run):
    """Its config.json in both styles of rope, and with the names of layers that Granite's checkpoints have."""
    run = make_run(tie_word_embeddings=True, rope_parameters=ROPE)
    folder, screen = exported(run, "granite", pad_expand=True)
    assert folder == run / "export" / "granite" and screen.count(" ok") == len(CHECKS) + len(LEFT_ALONE)
    assert "mamba_expand 2" in screen and "vLLM (not checked)" in screen
    assert "0.32 was run on a CPU" in screen and "(0.33 was not run)" in screen and "no token was computed" in screen
    config = json.loads((folder / "config.json").read_text(), parse_constant=pytest.fail)
    assert config["layer_types"] == ["mamba", "attention", "mamba"] and "time_step_limit" not in config
    assert config["rope_theta"] == 500.0 and config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "GraniteMoeHybridForCausalLM" and not any(info[key] for key in WRONG)
    assert model.config.time_step_limit == (0.0, float("inf"))
    assert "2 Mamba-2 and 1 attention layers" in (folder / "README.md").read_text()


def test_a_gated_delta_student_of_qwen3_becomes_a_stock_qwen3_5(tmp_path, tokenizer):
    """In bfloat16, tied, with grouped queries: what bfloat16 would round of the norms is not, and that is said."""
    student = hybrid_from_teacher(
        tiny_teacher("qwen3", vocab_size=258, use_sliding_window=False, sliding_window=None, tie_word_embeddings=True),
        [0, 2],
        "gated_delta",
    ).to(torch.bfloat16)
    with torch.no_grad():
        student.model.layers[1].self_attn.q_norm.weight[3] = 0.011
        student.model.layers[1].input_layernorm.weight[3] = 0.011  # this one can be moved into q, k and v
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    folder, screen = exported(tmp_path / "student", "qwen3_5")
    assert folder == tmp_path / "student-qwen3_5" and screen.count(" ok") == len(CHECKS) + len(LEFT_ALONE)
    assert "1 norms (model.layers.1.self_attn.q_norm.weight, ...) are kept in float32" in screen
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "Qwen3_5ForCausalLM" and not any(info[key] for key in WRONG)
    card = (folder / "README.md").read_text()
    assert "2 Gated DeltaNet and 2 attention layers" in card and "are kept in float32" in card
    assert "trust_remote_code" not in card and "tags: [mohawk, hybrid, gated-deltanet, qwen3_5_text]" in card


def test_what_a_student_can_be_is_listed(make_run, make_llama, tmp_path, capsys, monkeypatch):
    """For each target yes or no, for each runtime too, and why not; nothing is written."""
    monkeypatch.setattr(bamba, "norms_groups_apart", lambda: True)
    monkeypatch.setattr(granite, "norms_groups_apart", lambda: True)

    def listed(student):
        assert main(["export", str(student), "--list"]) == 0
        found, target = {}, ""
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("--to "):
                target, line = line.removeprefix("--to ").split(": ", 1)
                found[target] = [line]
            else:
                found[target].append(line.strip())
        return found

    run = make_run()
    before = sorted(run.rglob("*"))
    found = listed(run)
    assert sorted(run.rglob("*")) == before
    assert list(found) == list(TARGETS)
    assert [found[name][0].split(",")[0] for name in ("bamba", "granite", "hybrid")] == ["yes"] * 3
    (said,) = found["qwen3_5"]
    assert said.startswith("no; cannot be a Qwen3_5ForCausalLM: its mixers are mamba2, Qwen3.5's are gated_delta")
    assert said.endswith("; `--to bamba` takes it")
    (said,) = found["gguf"]
    assert said.startswith("no; cannot be a GGUF file: its mixers' projections have biases") and "--to" not in said
    runtimes = {name: dict(line.split(": ", 1) for line in lines[1:]) for name, lines in found.items()}
    assert runtimes["granite"]["transformers"].startswith("yes (each export is checked there); ")
    assert runtimes["granite"]["vLLM"].startswith("yes (not checked there); `vllm serve DIR`; 0.32 was run on a CPU: ")
    assert runtimes["bamba"]["vLLM"].startswith("no; removed Bamba after 0.23")
    # what the file is refused for holds for llama.cpp's own converter of these folders too
    for name in ("bamba", "granite"):
        assert runtimes[name]["llama.cpp"] == said.replace("no; cannot be a GGUF file: ", "no; ")

    from mohawk.models.hybrid import HybridForCausalLM

    student = HybridForCausalLM.from_pretrained(run / "student")
    mixer = student.model.layers[0].self_attn
    with torch.no_grad():
        mixer.in_proj.bias[mixer.slices()["B"]] = 0.3
    student.save_pretrained(run / "student")
    assert listed(run)["granite"][1].startswith("with --fold-bias alone: ")

    narrow = make_llama(hidden_size=48, num_attention_heads=3, num_key_value_heads=1, head_dim=24, mlp_bias=True)
    hybrid_from_teacher(narrow, [1]).save_pretrained(tmp_path / "narrow")
    found = listed(tmp_path / "narrow")
    assert found["bamba"][1].startswith("with --pad-expand alone: ")
    assert "its MLPs have biases" in found["granite"][0]

    irregular = tiny_teacher("qwen3", use_sliding_window=False, sliding_window=None)
    hybrid_from_teacher(irregular, [1, 3], "gated_delta").save_pretrained(tmp_path / "irregular")
    found = dict(line.split(": ", 1) for line in listed(tmp_path / "irregular")["qwen3_5"][1:])
    assert found["vLLM"].startswith("yes") and found["transformers"].startswith("yes")
    assert main(["export", str(tmp_path / "irregular")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # after transformers' progress bars
    assert last.startswith("error: cannot be a BambaForCausalLM: its mixers are gated_delta, Bamba's are Mamba-2's")
    assert last.endswith("; `--to qwen3_5` takes it")
    assert found["llama.cpp"].startswith("yes") and "--to gguf" in found["llama.cpp"]
    for runtime in ("SGLang", "MLX"):
        assert found[runtime].startswith("no; ") and "layers 0, 2, counted from 0" in found[runtime]
        assert "mohawk compose RUN --interval N" in found[runtime]

    assert main(["export", str(run), "--list", "--pad-expand"]) == 2
    assert capsys.readouterr().err == "error: --pad-expand is of an export; --list writes none\n"
    make_llama().save_pretrained(tmp_path / "plain")
    found = listed(tmp_path / "plain")
    for name in TARGETS.keys() - {"onnx"}:
        assert found[name] == ["no; it has no mixers: a llama model, which transformers runs as it is"]
    assert TARGETS["onnx"].plain


@needs_groups
def test_a_mismatch_fails_the_export_and_leaves_nothing(make_run, monkeypatch, capsys):
    run = make_run()

    right = bamba.to_bamba

    def wrong(hybrid, **options):
        model = right(hybrid, **options)
        with torch.no_grad():
            model.model.layers[2].mamba.norm.weight[5] *= 1.05  # one channel of one layer by a twentieth
        return model

    monkeypatch.setattr(bamba, "to_bamba", wrong)
    assert main(["export", str(run)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # after transformers' progress bars
    assert last.startswith("error: export: the written folder does not answer as the student") and "kept" in last
    assert "full forward" in last
    assert not any((run / "export").iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM there")
def test_sigterm_leaves_nothing_behind(make_run, monkeypatch, capsys):
    run = make_run()

    def stopped(folder, *arguments, **options):
        (folder / "half").write_text("x")
        assert [path.name for path in (run / "export").iterdir()] == [folder.name]
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # the signal comes at once

    monkeypatch.setattr(export_module, "_write_and_check", stopped)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["export", str(run), "--to", "hybrid"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped"
    assert list((run / "export").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_folder_that_does_not_load_is_one_line(tmp_path, make_llama):
    student = hybrid_from_teacher(make_llama(), [1])
    student.save_pretrained(tmp_path)  # needs mohawk
    with pytest.raises(UserError, match="does not load where mohawk is absent: .*mohawk_hybrid") as error:
        check_export(tmp_path, inputs_for(student.config, None), {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("raise MemoryError", "out of memory; lower batch sizes"),
        ("import torch; torch.empty(1 << 50)", "out of memory (4503599627370496 bytes more were asked for)"),
        ("open('/proc/self/mem', 'rb').read(1)", "a file that was being read or written: Input/output error"),
        ("import os; raise OSError(28, os.strerror(28), '/tmp/x')", "/tmp/x: No space left on device; free disk space"),
    ],
)
def test_what_the_machine_refuses_a_fresh_process_is_not_the_exports_fault(tmp_path, script, line):
    with pytest.raises((MemoryError, OSError)) as caught:
        in_fresh_process(script, [], tmp_path, {})
    assert line_for(caught.value).startswith(line)


def test_a_fresh_process_that_was_killed_says_so(tmp_path):
    with pytest.raises(UserError, match="was killed, as the kernel does where memory runs out"):
        in_fresh_process("import os; os.kill(os.getpid(), 9)", [], tmp_path, {})
    assert in_fresh_process("raise KeyError('a')", [], tmp_path, {}).returncode == 1  # that is the script's own


def test_refusals_say_why_and_what_to_do(make_run, make_llama, tmp_path, capsys):
    assert main(["export", str(make_run("discrete_mamba2"))]) == 2
    assert "mixers are discrete_mamba2" in (said := capsys.readouterr().err) and "--to hybrid" in said
    for mixer, words in (("kimi_delta", "kimi_delta"), ({0: "mamba2", 2: "gated_delta"}, "mamba2 and gated_delta")):
        run = str(make_run(mixer))
        capsys.readouterr()
        for target in ("bamba", "granite", "qwen3_5"):
            assert main(["export", run, "--to", target]) == 2
            *_, said = capsys.readouterr().err.splitlines()
            assert f"its mixers are {words}, " in said and "; `--to hybrid` writes" in said
    make_llama().save_pretrained(tmp_path / "plain")
    assert main(["export", str(tmp_path / "plain")]) == 2
    assert "is a llama model; only hybrids" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "plain"), "--to", "hybrid", "--pad-expand"]) == 2
    assert "of --to bamba" in capsys.readouterr().err


def test_a_transformers_that_norms_groups_together_is_refused_in_one_line(make_run, monkeypatch, capsys):
    monkeypatch.setattr(bamba, "norms_groups_apart", lambda: False)
    run = make_run()
    assert main(["export", str(run)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"error: cannot be a BambaForCausalLM: the installed transformers {transformers.__version__} normalises all 4 "
        "groups of a mixer together, 5.23 and later each alone, as the student does; upgrade transformers; "
        "`--to hybrid` writes the student with its own code"
    )
    assert not (run / "export").exists()


@needs_groups
def test_an_output_of_someone_else_is_left_alone(make_run, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    assert main(["export", str(make_run()), "--output", str(taken)]) == 2
    assert "no export wrote it" in capsys.readouterr().err and [p.name for p in taken.iterdir()] == ["thesis.txt"]


@needs_groups
def test_a_student_is_not_written_over(make_run, capsys):
    run = make_run()
    before = (run / "student" / "config.json").read_text()
    assert main(["export", str(run), "--output", str(run / "student")]) == 2
    assert "no export wrote it" in capsys.readouterr().err
    assert (run / "student" / "config.json").read_text() == before


@needs_groups
def test_a_student_with_a_bias_in_front_of_its_convolution(make_run, monkeypatch):
    run = make_run()
    from mohawk.models.hybrid import HybridForCausalLM

    student = HybridForCausalLM.from_pretrained(run / "student")
    mixer = student.model.layers[0].self_attn
    with torch.no_grad():
        mixer.in_proj.bias[mixer.slices()["B"]] = 0.3
    student.save_pretrained(run / "student")
    with pytest.raises(UserError, match="biases on x, B and C.*--fold-bias"):
        exported(run)
    monkeypatch.setattr(export_module, "_write_and_check", lambda folder, model, *rest: save_state(folder, model))
    folder, screen = exported(run, fold_bias=True, pad_expand=True)
    assert "in the first 3 tokens" in screen and "mamba_expand 2" in screen
    assert "in the first 3 tokens" in (folder / "README.md").read_text()


def save_state(folder, model):
    """Stands in for the written and checked model where only the words around it are tested."""
    bamba.to_bamba(model).save_pretrained(folder)
    return []


def answers_like(batch=2, steps=5, vocab=7):
    torch.manual_seed(0)
    shapes = {"full": (1, 9), "steps": (batch, 24), "padded": (batch, 24), "reloaded": (1, 9)}
    found = {key: torch.randn(*shape, vocab) for key, shape in shapes.items()}
    found["reloaded"] = found["full"].clone()
    for key, rows in (("tokens", 1), ("padded_tokens", batch)):
        found[f"{key}_logits"] = torch.randn(rows, steps, vocab)
        found[key] = found[f"{key}_logits"].argmax(-1)
    return {**found, "same_weights": torch.tensor([1]), **{f"itself_{path}": torch.zeros(()) for path in PATHS}}


def failed(expected, found):
    inputs = {"mask": torch.ones(2, 24, dtype=torch.long)}
    inputs["mask"][1, :9] = 0
    return [row.check for row in compare_answers(inputs, expected, found) if not row.passed]


def test_what_counts_as_a_difference():
    expected = answers_like()
    assert failed(expected, expected) == []
    for key in ("full", "steps", "padded"):
        other = {**expected, key: expected[key] + 0.01}
        assert failed(expected, other) == [CHECKS[key]]
    assert failed(expected, {**expected, "full": expected["full"] * torch.nan}) == [CHECKS["full"]]
    assert failed(expected, {**expected, "same_weights": torch.tensor([0])}) == [CHECKS["reloaded"]]
    padding = expected["padded"].clone()
    padding[1, :9] = 100.0  # at padded positions a model may say anything
    assert failed(expected, {**expected, "padded": padding}) == []
    for path in PATHS:  # of the export against itself
        found = failed(expected, {**expected, f"itself_{path}": torch.tensor(1e-3)})
        assert found == [f"itself, {PATHS[path]}"]


def test_a_student_that_shares_its_exports_fault_is_not_exported(make_run, monkeypatch, capsys):
    """Both start each step from an empty state: they agree with one another, and neither with its full forward."""
    run = make_run()
    monkeypatch.setattr(SSMMixer, "_read_cache", lambda *_: (None, None))
    assert main(["export", str(run), "--to", "hybrid"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: export: the student does not answer as its own full forward does: prefill in chunks")
    assert not (run / "export" / "hybrid").exists()


def test_another_token_is_a_difference_unless_it_was_a_tie():
    expected = answers_like()
    other = {**expected, "tokens": expected["tokens"].clone()}
    second = expected["tokens_logits"][0, 3].topk(2).indices[1]
    other["tokens"][0, 3] = second
    assert failed(expected, other) == [CHECKS["tokens"]]
    best = expected["tokens_logits"][0, 3].max()
    for answers in (expected, other):
        answers["tokens_logits"] = answers["tokens_logits"].clone()
        answers["tokens_logits"][0, 3, second] = best - 1e-7
    other["tokens_logits"][0, 4] += 5  # what follows another token is another text
    assert failed(expected, other) == []


def test_the_copied_code_asks_for_nothing_that_may_be_missing(tmp_path, monkeypatch):
    """As a hub download checks it: each file by itself, here with every optional package gone."""
    auto_map = write_remote_code(tmp_path)
    files = {path.stem: path for path in tmp_path.glob("*.py")}
    assert auto_map["AutoConfig"].split(".")[0] in files
    assert {
        "mohawk_hybrid",
        "mohawk_mixers",
        "mohawk_families",
        "mohawk_ssd_interface",
        "mohawk_causal_conv1d_interface",
    } <= files.keys()
    for missing in ("mohawk", "mamba_ssm", "causal_conv1d", "triton"):
        monkeypatch.setitem(sys.modules, missing, None)
    for path in files.values():
        for relative in check_imports(path):
            assert relative in files, f"{path.name} imports {relative}"
        assert "\nAutoConfig.register" not in path.read_text()


def test_flattening():
    source = (
        "import os\nfrom mohawk.kernels.ssd.interface import (\n    ssd,\n)\nfrom mohawk.models.mixers import A\n"
        "\n\ndef f():\n    import math\n\n"
        "    from mamba_ssm import (\n        a,\n    )\n\n    return a, math\n\n\nAutoConfig.register('x', Y)\n"
    )
    assert flattened(source) == (
        "import os\nfrom .mohawk_ssd_interface import (\n    ssd,\n)\nfrom .mohawk_mixers import A\n\n\ndef f():\n"
        "    import math\n\n"
        "    try:\n        from mamba_ssm import (\n            a,\n        )\n    except ImportError:\n"
        "        raise\n\n"
        "    return a, math\n\n\n"
    )


def test_licences(tmp_path):
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("# No front matter\nlicense: of the text\n")
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text('---\nlanguage: en\nlicense: "llama3.2"\n---\n')
    assert licence_of(str(tmp_path)) == "llama3.2"
    save_file({"x": torch.zeros(1)}, tmp_path / "model.gguf")
    assert licence_of(str(tmp_path / "model.gguf")) == "llama3.2"


@needs_groups
def test_runtimes_are_told_as_they_are(make_llama):
    def told(**changed):
        config = bamba.to_bamba(hybrid_from_teacher(make_llama(num_hidden_layers=4), [1, 2])).config
        for name, value in changed.items():
            setattr(config, name, value)
        found = {note.runtime: note for note in bamba_notes(config)}
        assert [name for name, note in found.items() if note.checked] == ["transformers"]
        return {name: note.text for name, note in found.items()}

    plain = told(mamba_expand=2, mamba_proj_bias=False)
    assert list(plain) == ["transformers", "llama.cpp", "vLLM", "SGLang", "MLX"]
    assert plain["llama.cpp"].startswith("`convert_hf_to_gguf.py DIR` knows Bamba")
    assert plain["vLLM"] == "removed Bamba after 0.23: today's releases do not serve this folder"
    for runtime in ("SGLang", "MLX"):
        assert plain[runtime].startswith("has never had Bamba")
    assert "serve DIR" not in str(plain)

    narrow = told(mamba_expand=1, mamba_proj_bias=True)
    assert "export with --pad-expand" in narrow["llama.cpp"] and "without biases" in narrow["llama.cpp"]
    biased = told(attention_bias=True, mlp_bias=True)["vLLM"]
    assert "removed Bamba after 0.23" in biased and "0.23 leaves out biases in attention and MLP" in biased
    assert "0.23 takes heads of hidden_size / num_attention_heads, not of 5" in told(head_dim=5)["vLLM"]

    ours = {note.runtime: note.text for note in own_notes(hybrid_from_teacher(make_llama(), [1]).config)}
    assert ours["llama.cpp, vLLM, SGLang, MLX"].startswith("have no class for it")
    page = (Path(__file__).parents[3] / "docs" / "export.md").read_text()
    table = page.split("\nA Bamba:\n\n| runtime | runs there |")[1].split("\n\n")[0]
    for words in ("vLLM | no | removed Bamba after 0.23", "SGLang, MLX | no | have never had Bamba", "llama.cpp | yes"):
        assert words in table
