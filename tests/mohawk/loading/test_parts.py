"""Models in parts from files and into files: what transformers reads and writes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

import mohawk.loading.parts as parts
from mohawk.core.processes import is_first
from mohawk.errors import UserError
from mohawk.loading.models import load_teacher
from mohawk.models.sharding import is_sharded, shard, whole
from tests.helpers.processes import in_processes
from tests.helpers.tiny_phase import cheap_training  # noqa: F401
from tests.models.conftest import tiny_teacher

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


def read(folder, **options):
    """A teacher's parameters, put together again, and whether each process read its own parts alone."""
    mesh = init_device_mesh("cpu", (2,))
    asked = []
    read_in_parts = parts.read_in_parts

    def noted(*given, **more):
        asked.append(read_in_parts(*given, **more))
        return asked[-1]

    parts.read_in_parts = noted
    try:
        model = load_teacher(folder, spread=lambda one: shard(one, mesh, trains=False), **options)
    except UserError as error:
        return str(error)
    finally:
        parts.read_in_parts = read_in_parts
    assert is_sharded(model)
    return {name: whole(p) for name, p in model.named_parameters()}, asked[0] is not None


def kept(folder, **options):
    return dict(load_teacher(folder, **options).named_parameters())


def with_a_variant(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 0 for name, tensor in weights.items()}, folder / "model.fp16.safetensors")
    save_file({name: tensor * 0 for name, tensor in weights.items()}, folder / "consolidated.safetensors")


def without_dtype(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: x.bfloat16() for name, x in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("family", "changed", "options", "apart"),
    [
        ("llama", with_a_variant, {}, True),
        ("llama_biased", without_dtype, {"dtype": "auto"}, True),
        ("llama_biased", None, {"dtype": "bfloat16"}, True),
        ("mixtral", None, {}, False),  # whose experts are one tensor in memory and many in its files
    ],
)
def test_what_is_read(family, changed, options, apart, tmp_path):
    tiny_teacher(family).save_pretrained(tmp_path / "model")
    if changed is not None:
        changed(tmp_path / "model")
    expected = kept(tmp_path / "model", **options)
    for found, alone in in_processes(tmp_path, 2, lambda rank: read(tmp_path / "model", **options)):
        assert alone == apart and found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_packed_weights_are_refused(tmp_path):
    tiny_teacher("llama").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    for said in in_processes(tmp_path, 2, lambda rank: read(tmp_path / "model")):
        assert "has packed weights, which cannot be in parts" in said and "sharding.kind: none" in said


@pytest.mark.parametrize("family", ["llama", "llama_biased", "gemma2", "mixtral"])
def test_what_is_written_is_an_ordinary_folder(family, tmp_path, monkeypatch):
    """In several files, under the names and with the configuration that save_pretrained writes."""
    monkeypatch.setattr(parts, "FILE_BYTES", 20_000)
    tiny_teacher(family).save_pretrained(tmp_path / "plain", max_shard_size=20_000)

    def write(rank):
        model = tiny_teacher(family)
        shard(model, init_device_mesh("cpu", (2,)))
        folder = tmp_path / "parts" if is_first() else None
        if folder is not None:
            folder.mkdir()
        parts.write_in_parts(model, folder)

    in_processes(tmp_path, 2, write)
    one, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "parts"))
    assert one == other
    index = [
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text())["weight_map"]
        for name in ("plain", "parts")
    ]
    assert index[0].keys() == index[1].keys() and len(set(index[1].values())) > 2
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    shutil.rmtree(tmp_path / "plain")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
