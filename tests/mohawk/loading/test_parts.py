"""Models in parts from files and into files: what transformers reads and writes."""

import dataclasses
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
from tests.mohawk.loading.test_models import write_gguf

pytestmark = [
    pytest.mark.usefixtures("cheap_training"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


def read(folder, **options):
    """A teacher's parameters, put together again; whether each process read its own parts alone; and how many numbers
    this one took from safetensors or .bin files."""
    mesh = init_device_mesh("cpu", (2,))
    asked, numbers = [], []
    read_in_parts, stored_in = parts.read_in_parts, parts.stored_in

    def noted(*given, **more):
        asked.append(read_in_parts(*given, **more))
        return asked[-1]

    def counting(stored):
        def reads(begin, end):
            values = stored.read(begin, end)
            numbers.append(values.numel())
            return values

        return dataclasses.replace(stored, read=reads)

    parts.read_in_parts = noted
    parts.stored_in = lambda folder: {name: counting(one) for name, one in stored_in(folder).items()}
    try:
        model = load_teacher(folder, spread=lambda one: shard(one, mesh, trains=False), **options)
    except UserError as error:
        return str(error)
    finally:
        parts.read_in_parts, parts.stored_in = read_in_parts, stored_in
    assert is_sharded(model)
    return {name: whole(p) for name, p in model.named_parameters()}, asked[0] is not None, sum(numbers)


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


def as_bin(folder, older=False):
    """In two files, with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"pytorch_model-{1 + i % 2}.bin" for i, name in enumerate(weights)}
    for file in sorted(set(names.values())):
        held = {name: weights[name] for name in names if names[name] == file}
        torch.save(held, folder / file, _use_new_zipfile_serialization=not older)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def as_older_bin(folder):
    as_bin(folder, older=True)


def within_a_larger_model(folder):
    weights = load_file(folder / "model.safetensors")
    named = {name.replace("model.", "model.language_model."): tensor for name, tensor in weights.items()}
    save_file(named | {"model.vision_tower.weight": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})


READ = {
    "variant": ("llama", with_a_variant, {}, True),
    "dtype": ("llama_biased", without_dtype, {"dtype": "auto"}, True),
    "rounded": ("llama_biased", None, {"dtype": "bfloat16"}, True),
    "bin": ("llama", as_bin, {"dtype": "bfloat16"}, True),
    "old bin": ("llama", as_older_bin, {}, False),  # which cannot be mapped
    # experts that are one tensor in memory and many in the files, or another one
    "experts": ("mixtral", None, {}, True),
    "experts in bin": ("qwen3_moe", as_bin, {"dtype": "bfloat16"}, True),
    "renamed experts": ("granitemoe", None, {}, True),
}


def test_what_is_read(tmp_path):
    expected = {}
    for name, (family, changed, options, _) in READ.items():
        tiny_teacher(family).save_pretrained(tmp_path / name)
        if changed is not None:
            changed(tmp_path / name)
        expected[name] = kept(tmp_path / name, **options)
    # as a larger model's text model, which transformers renames where the configuration is the larger one's
    tiny_teacher("llama_biased").save_pretrained(tmp_path / "within")
    expected["within"] = kept(tmp_path / "within")
    within_a_larger_model(tmp_path / "within")
    cases = READ | {"within": ("", None, {}, True)}
    found = in_processes(
        tmp_path, 2, lambda rank: {name: read(tmp_path / name, **options) for name, (*_, options, _) in cases.items()}
    )
    for name, (*_, apart) in cases.items():
        size = sum(tensor.numel() for tensor in expected[name].values())
        for held, alone, numbers in (one[name] for one in found):
            assert alone == apart and held.keys() == expected[name].keys(), name
            for key, tensor in expected[name].items():
                assert held[key].dtype == tensor.dtype and torch.equal(held[key], tensor), (name, key)
            assert numbers < 0.7 * size, (name, numbers, size)  # half, and vectors; two experts of three


def test_gguf_files_are_read_in_parts(tmp_path, make_llama, tokenizer):
    write_gguf(tmp_path / "tiny.gguf", make_llama(), tokenizer)
    # the size of experts is not in what transformers reads of a GGUF file: it takes its own default
    mixture = tiny_teacher(
        "qwen3_moe", vocab_size=258, num_hidden_layers=2, mlp_only_layers=[], moe_intermediate_size=768, num_experts=3
    )
    write_gguf(tmp_path / "experts.gguf", mixture, tokenizer)
    cases = [(tmp_path / f"{name}.gguf", dtype) for name in ("tiny", "experts") for dtype in ("float32", "bfloat16")]
    found = in_processes(tmp_path, 2, lambda rank: [read(path, dtype=dtype) for path, dtype in cases])
    for i, (path, dtype) in enumerate(cases):
        expected = kept(path, dtype=dtype)
        for held, alone, _ in (one[i] for one in found):
            assert alone and held.keys() == expected.keys()
            for name, tensor in expected.items():
                assert held[name].dtype == tensor.dtype and torch.equal(held[name], tensor), name
    assert all(torch.equal(found[0][2][0][name], tensor) for name, tensor in mixture.named_parameters())


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
