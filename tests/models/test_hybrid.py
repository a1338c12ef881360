"""The student as a transformers model: parity with its teacher, caches, generation, saving."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from mohawk.models.call import CACHE
from mohawk.models.casting import cast
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import HybridConfig
from mohawk.models.packed import positions_of, segments_of
from tests.models.conftest import tiny_teacher

MIXERS = ("mamba2", "discrete_mamba2")
# the first layer matters: caches read their length from it
STUDENTS = (([1, 3], "mamba2"), ([0], "discrete_mamba2"), ("all", "mamba2"))


def student_of(teacher, layers=(1, 3), mixer="mamba2", **options):
    torch.manual_seed(1)
    student = hybrid_from_teacher(teacher, layers, mixer, **options).eval()
    with torch.no_grad():  # away from the symmetric start, so that a wrong index or a skipped term shows
        for name, parameter in student.named_parameters():
            if "self_attn" in name and ("conv1d" in name or name.endswith((".D", "z_bias", "in_proj.bias"))):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return student


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def ids(*shape, seed=0):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def test_nothing_replaced_gives_the_teachers_logits(teacher):
    """A hybrid whose every layer stays attention is the teacher, to the last bit."""
    config = HybridConfig(base_config=copy.deepcopy(teacher.config))
    student = HybridForCausalLM(config).eval()
    student.load_state_dict(teacher.state_dict(), strict=False)
    student.tie_weights()
    x = ids(2, 17)
    torch.testing.assert_close(student(x).logits, teacher(x).logits, rtol=0, atol=0)


@pytest.mark.parametrize("layers, mixer", STUDENTS, ids=str)
def test_full_forward_prefill_with_steps_and_chunked_prefill_agree(teacher, layers, mixer):
    student = student_of(teacher, layers, mixer)
    x = ids(2, 23)
    with torch.no_grad():
        full = student(x, use_cache=False).logits
        for cuts in ((23,), (1, 22), (9, 1, 1, 12), (16, 7), (22, 1), tuple([1] * 23)):
            cache, parts, start = DynamicCache(config=student.config), [], 0
            for length in cuts:
                positions = torch.arange(start, start + length)[None]
                out = student(x[:, start : start + length], **{CACHE: cache}, position_ids=positions)
                parts.append(out.logits)
                start += length
            assert relative(torch.cat(parts, 1), full) < 1e-4, cuts


@pytest.mark.parametrize("layers, mixer", STUDENTS, ids=str)
def test_batched_left_padded_generation_equals_one_by_one(teacher, layers, mixer):
    student = student_of(teacher, layers, mixer)
    prompts = [ids(1, n, seed=n)[0] for n in (3, 11, 7)]
    width = max(len(p) for p in prompts)
    batch = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.cat([torch.zeros(width - len(p)), torch.ones(len(p))]).long() for p in prompts])
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    together = student.generate(batch, attention_mask=mask, **options)[:, width:]
    for prompt, row in zip(prompts, together, strict=True):
        alone = student.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)).long(), **options)
        assert alone[0, len(prompt) :].tolist() == row.tolist()


@pytest.mark.parametrize("mixer", MIXERS)
def test_left_padding_given_one_token_at_a_time_leaves_no_trace(mixer):
    student = student_of(tiny_teacher(), mixer=mixer)
    prompt, padding = ids(1, 5), 3
    padded = torch.nn.functional.pad(prompt, (padding, 0), value=0)
    mask = torch.tensor([[0] * padding + [1] * 5])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = student.new_cache()
    with torch.no_grad():
        for i in range(8):
            out = student(
                padded[:, i : i + 1], attention_mask=mask[:, : i + 1], position_ids=positions[:, i : i + 1],
                **{CACHE: cache},
            )  # fmt: skip
        alone = student(prompt, use_cache=False).logits[:, -1]
    assert relative(out.logits[:, -1], alone) < 1e-5


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_conv_of_one_tap_needs_no_past(mixer):
    student = student_of(tiny_teacher(), mixer=mixer, conv_kernel=1)
    x = ids(2, 11)
    with torch.no_grad():
        full, cache = student(x, use_cache=False).logits, student.new_cache()
        parts = [student(x[:, i : i + 1], **{CACHE: cache}).logits for i in range(11)]
    assert relative(torch.cat(parts, 1), full) < 1e-4


def test_resized_embeddings_are_saved_and_loaded(tmp_path):
    student = student_of(tiny_teacher())
    student.resize_token_embeddings(105)
    student.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path).eval()
    x = torch.tensor([[104, 3, 100]])
    torch.testing.assert_close(again(x).logits, student(x).logits, rtol=0, atol=0)


def test_generation_settings_that_contradict_each_other_do_not_stop_saving(tmp_path, caplog):
    teacher = tiny_teacher()
    teacher.generation_config.temperature, teacher.generation_config.do_sample = 0.6, False
    student = student_of(teacher)
    student.save_pretrained(tmp_path)
    assert "contradict each other" in caplog.text
    assert student.generation_config.temperature == 0.6 and student.generation_config.do_sample
    assert not teacher.generation_config.do_sample


@pytest.mark.parametrize("mixer", MIXERS)
def test_generation_with_the_cache_equals_generation_without(teacher, mixer):
    student = student_of(teacher, [0, 2], mixer)
    options = dict(max_new_tokens=14, do_sample=False, eos_token_id=None, pad_token_id=0)
    x = ids(2, 8)
    assert student.generate(x, **options).tolist() == student.generate(x, use_cache=False, **options).tolist()


def test_beam_search_reorders_states_and_sampling_is_seeded():
    student = student_of(tiny_teacher())
    x = ids(2, 6)
    options = dict(max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    beams = student.generate(x, num_beams=3, do_sample=False, **options)
    assert beams.tolist() == student.generate(x, num_beams=3, do_sample=False, use_cache=False, **options).tolist()
    torch.manual_seed(5)
    first = student.generate(x, do_sample=True, **options)
    torch.manual_seed(5)
    assert first.tolist() == student.generate(x, do_sample=True, **options).tolist()


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_cache_of_a_replaced_layer_does_not_grow(mixer):
    student = student_of(tiny_teacher(), [1, 3], mixer)
    cache = DynamicCache(config=student.config)
    sizes = []
    with torch.no_grad():
        for length in (5, 40):
            student(ids(1, length), **{CACHE: cache})
            layer = cache.layers[1]
            sizes.append(layer.conv_states[0].numel() + layer.recurrent_states[0].numel())
    assert sizes[0] == sizes[1]
    assert cache.layers[1].recurrent_states[0].dtype == torch.float32
    assert cache.layers[0].keys.shape[-2] == 45


@pytest.mark.parametrize("mixer", MIXERS)
def test_save_and_load_are_exact(teacher, mixer, tmp_path):
    student = student_of(teacher, [1, 2], mixer)
    student.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).layer_types == student.config.layer_types
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is HybridForCausalLM
    before, after = student.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]), key
    x = ids(2, 19)
    assert torch.equal(loaded(x).logits, student(x).logits)


@pytest.mark.parametrize("layers, mixer", STUDENTS, ids=str)
def test_packed_documents_do_not_see_each_other(teacher, layers, mixer):
    """A packed row gives each document the logits it has alone: attention, conv and state stop at its border."""
    student = student_of(teacher, layers, mixer)
    lengths = (7, 1, 12, 2)
    documents = [ids(1, n, seed=n) for n in lengths]
    segment_ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = torch.cat(documents, 1)
    with torch.no_grad():
        alone = torch.cat([student(d, use_cache=False).logits for d in documents], 1)
        by_segments = student(packed, segment_ids=segment_ids, use_cache=False).logits
        by_positions = student(packed, position_ids=positions_of(segment_ids), use_cache=False).logits
        by_default = student(packed, segment_ids=segment_ids)  # in eval mode a cache is the default, but not here
    assert relative(by_segments, alone) < 1e-5
    assert relative(by_positions, alone) < 1e-5
    assert torch.equal(by_default.logits, by_segments)
    assert by_default.get(CACHE) is None
    for packing in ({"segment_ids": segment_ids}, {"position_ids": positions_of(segment_ids)}):
        with pytest.raises(ValueError, match="packed rows .* cannot be cached"):
            student(packed, use_cache=True, **packing)


def test_positions_and_segments_are_inverse():
    segment_ids = torch.tensor([[0, 0, 1, 1, 1, 2, -1, -1], [0, 1, 2, 2, 2, 2, 2, 2]])
    positions = positions_of(segment_ids)
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], [0, 0, 0, 1, 2, 3, 4, 5]]
    again = segments_of(positions)
    assert again.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3], [0, 1, 2, 2, 2, 2, 2, 2]]
    assert segments_of(torch.arange(6)[None]) is None


def test_a_teacher_in_bfloat16(teacher, tmp_path):
    """As loading gives it, with buffers in float32 (Gemma 3: rounded). Nothing replaced is the teacher to the last bit,
    and a student is the same when it is saved and loaded, in bfloat16 or made float32 for training."""
    teacher.save_pretrained(tmp_path / "teacher")
    attention = teacher.config._attn_implementation
    options = {"dtype": torch.bfloat16, "attn_implementation": attention}
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", **options).eval()
    x = ids(2, 17)
    plain = HybridForCausalLM(HybridConfig(base_config=copy.deepcopy(teacher.config))).eval()
    cast(plain, torch.bfloat16)
    plain.load_state_dict(teacher.state_dict(), strict=False)
    plain.tie_weights()
    student = hybrid_from_teacher(teacher, [1, 3])
    with torch.no_grad():
        assert torch.equal(plain(x).logits, teacher(x).logits)
        full, cache = student(x, use_cache=False).logits, student.new_cache()
        steps = [student(x[:, start : start + n], **{CACHE: cache}).logits for start, n in ((0, 15), (15, 1), (16, 1))]
        assert relative(torch.cat(steps, 1).float(), full.float()) < 0.05
        for dtype in (torch.bfloat16, torch.float32):
            cast(student, dtype)
            student.save_pretrained(tmp_path / "student")
            options = {"dtype": dtype, "attn_implementation": attention}
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student", **options).eval()
            assert loaded.dtype == dtype and torch.equal(loaded(x).logits, student(x).logits)


def test_labels_give_the_shifted_loss():
    student = student_of(tiny_teacher())
    x = ids(2, 9)
    out = student(x, labels=x)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_no_loss_of_routers_is_added(family):
    """Whatever the teacher's configuration says; whoever asks for it is told."""
    teacher = tiny_teacher(family, output_router_logits=True, router_aux_loss_coef=10.0)
    student, x = student_of(teacher), ids(2, 9)
    out = student(x, labels=x)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    with pytest.raises(ValueError, match="output_router_logits asks for the loss that balances experts"):
        student(x, labels=x, output_router_logits=True)


def test_gradient_checkpointing_changes_no_gradient():
    student = student_of(tiny_teacher()).train()
    x = ids(2, 9)

    def gradients():
        student.zero_grad()
        student(x, labels=x, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    plain = gradients()
    student.gradient_checkpointing_enable()
    again = gradients()
    assert plain.keys() == again.keys() and len(plain) > 20
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-5, atol=1e-7)
