"""`mohawk quantize` on a tiny run: what it writes, keeps, measures and refuses."""

import json

import pytest
import torch

from mohawk.cli import main
from mohawk.conversion.recipe import Recipe
from mohawk.core.folders import write_whole
from mohawk.core.json_files import read_json, write_json
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.quantization.formats import FORMATS, round_as_gguf, small_projections
from tests.models.conftest import tiny_teacher
from tests.mohawk.runs.test_page import made_results

FULL = {"use_sliding_window": False, "sliding_window": None}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """A run's folder with a gated_delta student of a tiny Qwen3."""
    folder = tmp_path_factory.mktemp("quantize")
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "bos_token_id": 256, "eos_token_id": 257}
    teacher = tiny_teacher("qwen3", **FULL, **sizes)
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    (folder / "train.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    student = hybrid_from_teacher(teacher, [0, 2], "gated_delta").eval()
    with write_whole(folder / "run" / "student", about={}) as partial:
        student.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    write_json(folder / "run" / "results.json", made_results())
    Recipe.from_dict(
        {
            "teacher": str(folder / "teacher"),
            "student": {"mixer": "gated_delta"},
            "data": {"train": [str(folder / "train.txt")], "validation_share": 0.1, "cache": str(folder / "cache")},
            "evaluation": {"sequence_length": 32, "tokens": 128},
            "precision": "float32",
            "device": "cpu",
            "output": str(folder / "run"),
        }
    ).save(folder / "run" / "recipe.yaml")
    return folder / "run"


def test_torchaos_formats(run, capsys):
    pytest.importorskip("torchao", exc_type=ImportError)
    from mohawk.loading.models import load_teacher

    assert main(["quantize", str(run), "--to", "int8", "int4", "fp8"]) == 0
    assert 'trust_remote_code=True, dtype="auto"' in capsys.readouterr().out
    plain = load_teacher(run / "student").state_dict()
    found = read_json(run / "evaluation" / "quantized.json")
    for name in ("int8", "int4", "fp8"):
        model = load_teacher(run / "quantized" / name, dtype="auto")
        small = small_projections(model)
        assert {place.rpartition(".")[2] for place in small} == {"in_proj_a", "in_proj_b"}
        for called, value in model.state_dict().items():
            place, _, part = called.rpartition(".")
            linear = part == "weight" and isinstance(model.get_submodule(place), torch.nn.Linear)
            rounded = linear and place not in small and place != "lm_head"
            assert (type(value.data) is not torch.Tensor) == rounded, called
            if not rounded:
                assert torch.equal(value, plain[called]), called
                continue
            error = (value.dequantize() - plain[called]).abs()
            if name == "int8":  # half a step of 127 to the largest of a row
                step = plain[called].abs().amax(1, keepdim=True) / 127
            elif name == "int4":  # of 32 weights: 15 steps from end to end
                step = plain[called].unflatten(1, (-1, 32)).abs().amax(2).repeat_interleave(32, 1) / 7
            else:  # 3 bits behind the first
                step = plain[called].abs() / 8 + plain[called].abs().max() * 2**-15
            assert (error <= step * 0.51).all(), called
        assert max(found["formats"][name]["consistency"].values()) < 1e-4
    kls = {name: row["texts"]["held_out"]["kl"] for name, row in found["formats"].items()}
    assert abs(kls["int8"] - kls["as it is"]) < abs(kls["int4"] - kls["as it is"])
    assert found["formats"]["int8"]["bytes"] < found["formats"]["as it is"]["bytes"]
    assert "Quantised, on held-out text" in (run / "report.md").read_text()
    assert "int4" in (run / "report.html").read_text()
    assert "quantized" in json.loads((run / "results.json").read_text())
    assert main(["verify", str(run)]) == 0
    assert main(["generate", str(run / "quantized" / "int8"), "--prompt", "The", "--max-new-tokens", "2"]) == 0


def test_a_gguf_file(run, capsys):
    gguf = pytest.importorskip("gguf")
    from mohawk.loading.models import load_teacher

    assert main(["quantize", str(run), "--to", "gguf-q4_0"]) == 0
    assert "gguf-q4_0" in capsys.readouterr().out
    rows = read_json(run / "evaluation" / "quantized.json")["formats"]
    path = run / "export" / "gguf-q4_0" / "run-q4_0.gguf"
    assert rows["gguf-q4_0"]["bytes"] == path.stat().st_size
    assert rows["gguf-q4_0"]["texts"]["held_out"]["kl"] != rows["as it is"]["texts"]["held_out"]["kl"]
    # what is measured is what is in the file
    model = load_teacher(run / "student")
    round_as_gguf(model, "q4_0")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    down = stored["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == "Q4_0" and stored["blk.0.ssm_alpha.weight"].tensor_type.name == "F32"
    value = torch.from_numpy(gguf.dequantize(down.data, down.tensor_type))
    assert torch.equal(value, model.model.layers[1].mlp.down_proj.weight)


def test_what_is_refused(run, tmp_path, capsys):
    for name, words in {
        "int3": f"got 'int3'; allowed: {', '.join(FORMATS)}",
        "bnb-int8": "bitsandbytes computes on GPUs alone",
        "gguf-q4_k": "llama-quantize makes its other types",
    }.items():
        pytest.importorskip("torchao", exc_type=ImportError)
        assert main(["quantize", str(run), "--to", name]) == 2
        assert words in capsys.readouterr().err
    assert main(["quantize", str(tmp_path), "--to", "gguf-q8_0"]) == 2
    assert "is not a run's folder" in capsys.readouterr().err
