"""Decoding under torch.compile with transformers' static cache: the same tokens as eager, one graph for all steps."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, DynamicCache, StaticCache

from mohawk.models.call import CACHE
from mohawk.models.from_teacher import hybrid_from_teacher
from tests.models.conftest import tiny_teacher

NEW = 12
GREEDY = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def student_of(mixer: str):
    """Two layers, attention and Mamba-2: what is compiled grows with the layers."""
    torch.manual_seed(3)
    student = hybrid_from_teacher(tiny_teacher(num_hidden_layers=2), [1], mixer).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "self_attn" in name and ("conv1d" in name or name.endswith((".D", "z_bias", "in_proj.bias"))):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return student


def prompt(*shape):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layers", ([0, 2], [1, 3]))
def test_a_static_cache_where_one_kind_of_attention_is_gone(layers):
    """Gemma 2's layers take turns: replaced are all with a window, or all without."""
    student = hybrid_from_teacher(tiny_teacher("gemma2", num_hidden_layers=4), layers).eval()
    ids, mask = prompt(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    dynamic = student.generate(ids, attention_mask=mask, **GREEDY)
    static = student.generate(ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **GREEDY)
    assert static.tolist() == dynamic.tolist()


def test_a_static_cache_of_a_pure_student(caplog):
    """Nothing grows in it: generate says so, and takes the cache that counts the tokens for it, and no other."""
    student, ids = hybrid_from_teacher(tiny_teacher(num_hidden_layers=2), "all").eval(), prompt(2, 9)
    expected = student.generate(ids, **GREEDY)
    assert not caplog.records
    assert student.generate(ids, cache_implementation="static", **GREEDY).tolist() == expected.tolist()
    assert "cache_implementation='static' changes nothing in a student without attention layers" in caplog.text
    for cache in (StaticCache(student.config, max_cache_len=32), DynamicCache(config=student.config)):
        with pytest.raises(ValueError, match=f"{CACHE}: got {type(cache).__name__}.* give new_cache()"):
            student.generate(ids, **{CACHE: cache}, **GREEDY)
    assert student.generate(ids, **{CACHE: student.new_cache()}, **GREEDY).tolist() == expected.tolist()


def test_speculation_is_refused():
    with pytest.raises(ValueError, match="stateful"):
        student_of("mamba2").generate(prompt(1, 9), prompt_lookup_num_tokens=3, **GREEDY)


@torch.no_grad()
def decode(student, step, ids, cache):
    """Greedy tokens by hand: the prompt eagerly, then single steps through `step`."""
    token = student(ids, **{CACHE: cache}, position_ids=torch.arange(ids.shape[1])[None]).logits[:, -1:].argmax(-1)
    tokens = [token]
    for position in range(ids.shape[1], ids.shape[1] + NEW - 1):
        positions = torch.full((1, 1), position)
        token = step(token, **{CACHE: cache}, position_ids=positions).logits[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2", "gated_delta", "kimi_delta"])
def test_generate_with_a_static_cache_equals_dynamic(mixer):
    student, ids = student_of(mixer), prompt(2, 7)
    dynamic = student.generate(ids, **GREEDY)
    static = student.generate(ids, cache_implementation="static", disable_compile=True, **GREEDY)
    assert static.tolist() == dynamic.tolist()


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2", "gated_delta", "kimi_delta"])
def test_a_step_is_one_graph_and_is_traced_once(mixer):
    student, ids = student_of(mixer), prompt(1, 7)
    expected = student.generate(ids, **GREEDY)[:, 7:]
    counter = CompileCounter()
    step = torch.compile(student, backend=counter, fullgraph=True)
    found = decode(student, step, ids, StaticCache(config=student.config, max_cache_len=32))
    assert found.tolist() == expected.tolist()
    assert counter.frame_count == 1


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile writes C++ for the CPU"
)
def test_a_compiled_step_equals_eager():
    student, ids = student_of("mamba2"), prompt(1, 7)
    expected = student.generate(ids, **GREEDY)[:, 7:]
    step = torch.compile(student, fullgraph=True)
    found = decode(student, step, ids, StaticCache(config=student.config, max_cache_len=32))
    assert found.tolist() == expected.tolist()


def test_generate_compiles_its_steps():
    student, ids = student_of("discrete_mamba2"), prompt(2, 7)
    expected = student.generate(ids, **GREEDY)
    counter = CompileCounter()
    config = CompileConfig(fullgraph=True, backend=lambda graph, inputs, **options: counter(graph, inputs))
    config._compile_all_devices = True  # transformers compiles by itself on GPUs alone
    found = student.generate(ids, cache_implementation="static", compile_config=config, **GREEDY)
    assert found.tolist() == expected.tolist()
    assert counter.frame_count == 1
