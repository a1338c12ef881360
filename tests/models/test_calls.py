"""How others call students: either name of the cache, unknown keywords, embeddings, offloading, compilation."""

import subprocess
import sys
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from mohawk.loading.remote_code import add_code
from mohawk.measures.consistency import LEFT_ALONE, PATHS, broken_paths, inconsistencies, some_tokens
from mohawk.models.call import CACHE, HARMLESS
from mohawk.models.mixers import SSMMixer
from tests.models.conftest import tiny_teacher
from tests.models.test_hybrid import ids, relative, student_of

GREEDY = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
LAYERS = {"hybrid": (1, 3), "pure": "all"}
MIXERS = ("mamba2", "discrete_mamba2", "gated_delta", "kimi_delta")


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_way_of_answering_gives_what_one_forward_gives(layers, mixer):
    student = student_of(tiny_teacher(), layers, mixer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a renamed keyword is announced by a warning
        found = inconsistencies(student, some_tokens(student))
    assert found.keys() == PATHS.keys() and max(found.values()) < 5e-6
    assert broken_paths(student, found) is None


@pytest.mark.parametrize(
    "method, wrong, broken",
    [
        ("_read_cache", lambda *_: (None, None), ("chunks", "turns")),  # each call starts from an empty state
        ("_next_window", lambda mixer, window, xBC, real: xBC.new_ones(len(xBC), xBC.shape[2], 4), ("steps", "turns")),
        ("decode", lambda mixer, window, state, xBC, z, raw, real: torch.zeros_like(z), ("steps", "generate")),
    ],
)  # fmt: skip
def test_a_fault_in_any_path_is_named(monkeypatch, method, wrong, broken):
    student = student_of(tiny_teacher(), "all")
    monkeypatch.setattr(SSMMixer, method, wrong)
    found = inconsistencies(student, some_tokens(student))
    line = broken_paths(student, found)
    assert all(PATHS[path] in line for path in broken)
    assert broken_paths(student, {**dict.fromkeys(PATHS, 0.0), "left": float("nan")}).startswith(PATHS["left"])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_the_cache_has_two_names(layers, name):
    """Whichever the installed transformers uses: code written for the other one must not start from nothing."""
    student, x = student_of(tiny_teacher(), layers), ids(2, 9)
    with torch.no_grad():
        full, cache = student(x, use_cache=False).logits, student.new_cache()
        parts = [student(x[:, i : i + 1], **{name: cache}).logits for i in range(9)]
        assert relative(torch.cat(parts, 1), full) < 1e-5
        layer, hidden = student.model.layers[1].self_attn, torch.randn(2, 5, 32)
        cache = student.new_cache()
        parts = [layer(hidden[:, i : i + 1], **{name: cache})[0] for i in range(5)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(hidden)[0], rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="two names of one argument"):
            student(x, cache=cache, past_key_values=cache)
        with pytest.raises(ValueError, match="two names of one argument"):
            layer(hidden, cache=cache, past_key_values=cache)


def test_a_keyword_that_is_not_known_is_an_error_everywhere():
    student, x = student_of(tiny_teacher()), ids(2, 5)
    layer, hidden = student.model.layers[1].self_attn, torch.randn(2, 5, 32)
    calls = (
        lambda **given: student(x, **given),
        lambda **given: student.body(x, **given),
        lambda **given: student(x, labels=x, **given),
        lambda **given: layer(hidden, **given),
    )
    for call in calls:
        for name in ("state_cache", "past_key_value", "inputs", "token_type_ids"):
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
                call(**{name: torch.zeros(1)})
        with pytest.raises(TypeError, match="is_causal"):
            call(is_causal=False)
        call(is_causal=True)
    with pytest.raises(ValueError, match="made_up"):
        student.generate(x, made_up=1, **GREEDY)


def test_harmless_keywords_change_nothing():
    student, x = student_of(tiny_teacher()), ids(2, 5)
    expected = student(x, labels=x)
    given = dict(output_hidden_states=True, output_attentions=False, output_router_logits=False, return_dict=True,
                 cache_position=torch.arange(5))  # fmt: skip
    assert given.keys() <= HARMLESS
    got = student(x, labels=x, **given)
    assert torch.equal(got.logits, expected.logits) and len(got.hidden_states) == 5
    as_tuple = student(x, labels=x, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], expected.logits)
    # the loss's own: a count to divide by, another ignored label
    summed = student(x, labels=x, num_items_in_batch=torch.tensor(1)).loss
    torch.testing.assert_close(summed, expected.loss * 8)
    ignored = x.clone()
    ignored[:, 2] = -1
    assert student(x, labels=ignored, ignore_index=-1).loss.isfinite()


def test_documents_of_a_packed_row_however_they_are_named():
    student, x = student_of(tiny_teacher()), ids(1, 9)
    with torch.no_grad():
        alone = torch.cat([student(part, use_cache=False).logits for part in (x[:, :4], x[:, 4:])], 1)
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        starts = {"cu_seq_lens_q": torch.tensor([0, 4, 9]), "cu_seq_lens_k": torch.tensor([0, 4, 9]),
                  "max_length_q": 5, "max_length_k": 5}  # fmt: skip
        documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
        for given in (
            {"seq_idx": documents},
            {"seq_idx": documents.int(), **starts},
            {"position_ids": positions, **starts},
        ):
            assert relative(student(x, use_cache=False, **given).logits, alone) < 1e-5
        with pytest.raises(ValueError, match="cu_seq_lens_q says where documents begin to attention alone"):
            student(x, use_cache=False, **starts)
        with pytest.raises(ValueError, match=r"attention_mask must be \(batch, tokens\), got \(1, 1, 9, 9\)"):
            student(x, attention_mask=torch.ones(1, 1, 9, 9))


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_generate_from_embeddings_of_the_prompt(layers):
    student, x = student_of(tiny_teacher(), layers), ids(2, 7)
    mask = torch.ones_like(x)
    mask[1, :3] = 0
    expected = student.generate(x, attention_mask=mask, **GREEDY)[:, 7:]
    embedded = student.get_input_embeddings()(x)
    assert student.generate(inputs_embeds=embedded, attention_mask=mask, **GREEDY).tolist() == expected.tolist()


def test_generate_from_embeddings_over_the_edge_of_longrope():
    """At the edge the keys are made anew, from the prompt's embeddings and the tokens since."""
    student = student_of(tiny_teacher("phi4_mini"), (1, 3))
    x = ids(1, 62)
    options = {**GREEDY, "max_new_tokens": 8}
    expected = student.generate(x, **options)[:, 62:]
    embedded = student.get_input_embeddings()(x)
    got = student.generate(inputs_embeds=embedded, attention_mask=torch.ones_like(x), **options)
    assert got.tolist() == expected.tolist()
    uncached = student.generate(x, use_cache=False, **options)[:, 62:]
    assert got.tolist() == uncached.tolist()


@pytest.mark.parametrize("mixer", MIXERS)
def test_offloaded_layers(tmp_path, mixer):
    student = student_of(tiny_teacher(), (1, 3), mixer)
    student.save_pretrained(tmp_path)
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path / "offloaded"
    ).eval()
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    x = ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(offloaded(x).logits, student(x).logits, rtol=0, atol=0)
        hidden = torch.randn(2, 5, 32)
        for i in (1, 3):
            layers = [model.model.layers[i].self_attn for model in (offloaded, student)]
            assert torch.equal(*(layer(hidden)[0] for layer in layers))
    assert offloaded.generate(x, **GREEDY).tolist() == student.generate(x, **GREEDY).tolist()


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_a_compiled_student_answers_without_gradients(layers):
    student, x = student_of(tiny_teacher(), layers), ids(2, 24)
    torch._dynamo.reset()
    compiled = torch.compile(student, backend="aot_eager")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(compiled(x).logits, student(x).logits, rtol=1e-5, atol=1e-5)


def test_a_student_by_path_in_trl(tmp_path):
    """TRL looks for the class in transformers, and then for the configuration's auto_map."""
    from trl.trainer.utils import create_model_from_path

    student = student_of(tiny_teacher())
    student.save_pretrained(tmp_path)
    loaded = create_model_from_path(str(tmp_path), dtype="float32").eval()
    x = ids(2, 5)
    assert torch.equal(loaded(x).logits, student(x).logits)


def test_a_students_folder_says_what_to_do_where_mohawk_is_not_imported(tmp_path):
    """Its code lies beside its weights: transformers asks for trust_remote_code, and with it the student answers."""
    student = student_of(tiny_teacher())
    folder = tmp_path / "student"
    student.save_pretrained(folder)
    add_code(folder, student)
    x = ids(2, 5)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).eval()(x).logits, student(x).logits)  # our class
    source = (
        "import sys, torch\n"
        "sys.modules['mohawk'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"folder, x = {str(folder)!r}, torch.tensor({x.tolist()})\n"
        "try:\n    AutoModelForCausalLM.from_pretrained(folder)\n"
        "except ValueError as error:\n    print('trust_remote_code=True' in str(error))\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "print(model(x).logits.double().sum().item())\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          input="n\n")  # fmt: skip
    assert done.returncode == 0, done.stderr
    asked, total = done.stdout.splitlines()[-2:]
    assert asked.endswith("True")
    assert float(total) == pytest.approx(student(x).logits.double().sum().item(), abs=1e-4)


def test_packed_rows_with_a_mask_or_positions_beside_their_segments():
    """Attention looks for documents in positions alone, where there is no mask: what contradicts them is refused."""
    student, x = student_of(tiny_teacher()), ids(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    ones = torch.ones_like(x)
    with torch.no_grad():
        alone = torch.cat([student(part, use_cache=False).logits for part in (x[:, :5], x[:, 5:])], 1)
        restarting = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
        for given in ({}, {"attention_mask": ones}, {"position_ids": restarting}):
            assert relative(student(x, segment_ids=documents, **given).logits, alone) < 1e-5
        with pytest.raises(ValueError, match="position_ids must restart where segment_ids change"):
            student(x, segment_ids=documents, position_ids=torch.arange(12)[None])
        with pytest.raises(ValueError, match="attention_mask of packed rows must be"):
            student(x, segment_ids=documents, attention_mask=ones[:, :4])
        mask = ones.clone()
        mask[:, [0, 5, 11]] = 0  # in front of both documents and behind the second
        got = student(x, segment_ids=documents, attention_mask=mask).logits
        parts = [student(part, use_cache=False).logits for part in (x[:, 1:5], x[:, 6:11])]
        assert relative(got[mask.bool()], torch.cat(parts, 1)[0]) < 1e-5
        mask[:, 8] = 0
        with pytest.raises(ValueError, match="padding within a document"):
            student(x, segment_ids=documents, attention_mask=mask)
        layer, hidden = student.model.layers[1].self_attn, torch.randn(1, 12, 32)
        expected = layer(hidden, segment_ids=documents)[0]
        assert torch.equal(layer(hidden, seq_idx=documents)[0], expected)
        starts = torch.tensor([0, 5, 12])
        assert torch.equal(layer(hidden, segment_ids=documents, cu_seq_lens_q=starts)[0], expected)
        for call in (lambda: layer(hidden, cu_seq_lens_q=starts),
                     lambda: student(x, position_ids=torch.arange(12)[None], cu_seq_lens_q=starts)):  # fmt: skip
            with pytest.raises(ValueError, match="cu_seq_lens_q says where documents begin to attention alone"):
                call()


def test_a_cache_that_is_to_be_cut_back_is_refused():
    """As speculative decoding asks for: a state cannot be cut, and would silently be that of the cut tokens."""
    student, x = student_of(tiny_teacher()), ids(1, 6)
    cache = student.new_cache()
    student(x, **{CACHE: cache})
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="a state cannot be"):
        student(x[:, :1], **{CACHE: cache})
    with pytest.raises(ValueError, match="a state cannot be"):
        tiny_teacher().generate(x, assistant_model=student, **GREEDY)
    with pytest.raises(ValueError, match="no state for this layer"):
        student.model.layers[1].self_attn(torch.randn(1, 3, 32), cache=DynamicCache())


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_decoder_called_by_itself_knows_padding(mixer):
    student, x = student_of(tiny_teacher(), (1, 3), mixer), ids(2, 9)
    mask = torch.ones_like(x)
    mask[0, :3], mask[1, 7:] = 0, 0
    with torch.no_grad():
        body = student.body(x, attention_mask=mask, use_cache=False).last_hidden_state
        by_place = student.model(x, mask, use_cache=False)
        for got in (by_place, student.model(input_ids=x, attention_mask=mask, use_cache=False)):
            torch.testing.assert_close(got.last_hidden_state[mask.bool()], body[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_windows_shorter_than_the_check_are_asked_what_they_can_keep(family):
    """transformers counts padding within a window, in teacher and student alike."""
    for model in (tiny_teacher(family), student_of(tiny_teacher(family), (1,))):
        found = inconsistencies(model.eval(), some_tokens(model))
        assert tuple(found) == LEFT_ALONE and broken_paths(model, found) is None
