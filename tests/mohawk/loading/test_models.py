import errno
import json
import os
import pickle
import re

import pytest
import torch

from mohawk.errors import UserError, line_for
from mohawk.loading.configs import load_config, load_error
from mohawk.loading.models import load_teacher, load_tokenizer, without_quantization

IDS = torch.arange(20)[None]


@pytest.fixture
def folder(tmp_path, make_llama, tokenizer):
    make_llama().save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_folder_loads_frozen_and_exact(folder, make_llama, tokenizer):
    teacher = load_teacher(folder)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(teacher(IDS).logits, make_llama()(IDS).logits)
    assert load_teacher(str(folder), dtype="bfloat16").dtype == torch.bfloat16
    assert load_tokenizer(folder)("some text").input_ids == tokenizer("some text").input_ids
    assert load_config(folder).num_key_value_heads == 2


def test_dtype_auto_is_the_checkpoints(tmp_path, make_llama):
    make_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_teacher(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert load_teacher(tmp_path).dtype == torch.float32


@pytest.mark.parametrize("family", ["Qwen2", "Mistral", "Phi"])
def test_other_families_load(tmp_path, family):
    import transformers

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{family}Config")(**shape, **heads, pad_token_id=0)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    assert type(load_teacher(tmp_path)).__name__ == f"{family}ForCausalLM"


def write_gguf(path, model, tokenizer):
    """A float32 GGUF file of a tiny Llama or Qwen3-MoE, with the names and the row order that llama.cpp gives them."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    mixture = config.model_type == "qwen3_moe"
    writer = gguf.GGUFWriter(path, "qwen3moe" if mixture else "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocab)
    writer.add_token_types([1] * 256 + [3] * 2)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)

    def permuted(weight, heads):  # llama.cpp keeps rotary pairs side by side
        return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    if mixture:
        writer.add_key_length(config.head_dim)
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        names = {ours: theirs for ours, theirs in names.items() if not ours.startswith("mlp.")}
        names |= {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp"}
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if ours.endswith("q_proj") and not mixture:
                weight = permuted(weight, config.num_attention_heads)
            if ours.endswith("k_proj") and not mixture:
                weight = permuted(weight, config.num_key_value_heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight)
        if mixture:
            experts = {"up": 1, "down": None, "gate": 0}
            for name, half in experts.items():
                kept = state[f"model.layers.{layer}.mlp.experts.{'down' if half is None else 'gate_up'}_proj"]
                weight = kept if half is None else kept[:, half * kept.shape[1] // 2 :][:, : kept.shape[1] // 2].copy()
                writer.add_tensor(f"blk.{layer}.ffn_{name}_exps.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_loads_and_can_be_saved(tmp_path, make_llama, tokenizer):
    model = make_llama()
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, tokenizer)
    teacher = load_teacher(path)
    torch.testing.assert_close(teacher(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    teacher.save_pretrained(tmp_path / "saved")  # transformers refuses this for a model straight from GGUF
    again = load_teacher(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, teacher(IDS).logits)
    assert torch.equal(load_teacher(tmp_path, gguf_file="tiny.gguf")(IDS).logits, teacher(IDS).logits)


def test_a_gguf_file_in_bfloat16_has_the_positions_of_float32(tmp_path, make_llama, tokenizer):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model := make_llama(), tokenizer)
    teacher = load_teacher(path, dtype="bfloat16")
    assert teacher.dtype == torch.bfloat16
    assert torch.equal(teacher.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_tied_weights_stay_tied_without_quantization(make_llama):
    model = make_llama(tie_word_embeddings=True)
    plain = without_quantization(model)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert torch.equal(plain(IDS).logits, model(IDS).logits)


def test_a_tokenizer_from_elsewhere(folder, tmp_path, tokenizer, make_llama):
    make_llama().save_pretrained(tmp_path / "bare")
    found = load_tokenizer(tmp_path / "bare", tokenizer=folder)
    assert found("text").input_ids == tokenizer("text").input_ids
    with pytest.raises(UserError, match="teacher.tokenizer: .*nowhere does not exist"):
        load_tokenizer(folder, tokenizer=tmp_path / "nowhere")


def test_mistakes_are_told_in_one_line(folder, tmp_path, make_llama):
    from transformers import BertConfig, BertForMaskedLM, ViTConfig

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=64, **shape)).save_pretrained(tmp_path / "bert")
    ViTConfig(**shape).save_pretrained(tmp_path / "vit")
    make_llama().model.save_pretrained(tmp_path / "headless")
    config = json.loads((tmp_path / "headless" / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "headless" / "config.json").write_text(json.dumps(config))
    (tmp_path / "classifier").mkdir()
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "classifier" / "config.json").write_text(json.dumps(config))
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "never-heard-of"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text((folder / "config.json").read_text())
    for given, message in [
        (dict(model=""), "the model is empty"),
        (dict(model=tmp_path / "nowhere"), "nowhere does not exist"),
        (dict(model="./nowhere"), "nowhere does not exist"),
        (dict(model=folder / "config.json"), "config.json is a file; give the folder"),
        (dict(model=tmp_path), "holds no config.json"),
        (dict(model=tmp_path / "gguf"), r"its .gguf files: a.gguf \(set gguf_file\)"),
        (dict(model=tmp_path / "gguf", gguf_file="b.gguf"), "holds no b.gguf; its .gguf files: a.gguf"),
        (dict(model=tmp_path / "gguf" / "a.gguf", gguf_file="b.gguf"), "is itself a GGUF file"),
        (dict(model=folder, dtype="float8"), "teacher.dtype: got 'float8'; allowed: float32"),
        (dict(model=tmp_path / "bert"), "is a bert model: it is an encoder, in which each token sees those behind it"),
        (dict(model=tmp_path / "vit"), "is a vit model: it is no model that writes text"),
        (
            dict(model=tmp_path / "classifier"),
            "saved as LlamaForSequenceClassification, not as a causal language model",
        ),
        (dict(model=tmp_path / "headless"), r"lacks 1 weights \(lm_head.weight\)"),
        (dict(model=tmp_path / "strange"), "cannot load the configuration from the folder"),
        (dict(model=tmp_path / "broken"), "cannot load the configuration from the folder"),
        (dict(model=tmp_path / "weightless"), "cannot load the weights from the folder"),
    ]:
        given["model"] = str(given["model"])
        with pytest.raises(UserError, match=message) as caught:
            load_teacher(**given)
        assert "\n" not in str(caught.value), message


def test_a_released_student_loads_describes_and_generates(tmp_path, tokenizer, capsys):
    """Phi-Mamba, Llamba and MambaInLlama folders are taken wherever a model is."""
    from mohawk.generation.generate import generate
    from mohawk.loading.describe import describe
    from tests.models.test_released import LAYERS, LAYOUTS, saved

    for name in ("hybrid-phi-mamba", "llamba", "mamba-in-llama"):
        folder = saved(tmp_path / name, LAYOUTS[name]())
        loaded = load_teacher(folder)
        assert type(loaded).__name__ == "HybridForCausalLM" and not loaded.training
        assert load_teacher(folder, dtype="bfloat16").dtype == torch.bfloat16
        described = describe(folder)
        assert len(described.layers) == LAYERS
        assert described.parameters == sum(p.numel() for p in loaded.parameters())
    config, state = LAYOUTS["llamba"]()
    vocab = len(tokenizer)
    state = {k: v.repeat(8, 1)[:vocab] if len(v) == 40 else v for k, v in state.items()}
    folder = saved(tmp_path / "words", ({**config, "vocab_size": vocab, "pad_vocab_size_multiple": 1}, state))
    with pytest.raises(UserError, match="tokenizer"):
        generate(folder, "a b", device="cpu")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = generate(folder, "a b", max_new_tokens=4, device="cpu", tokenizer=tmp_path / "tokenizer")
    assert text and text in capsys.readouterr().out


def test_an_option_of_a_released_student_that_we_lack_is_told_in_one_line(tmp_path):
    from tests.models.test_released import llamba, saved

    config, state = llamba()
    config["ssm_cfg"]["activation"] = "silu"
    with pytest.raises(UserError, match=r"cannot load the configuration.*ssm_cfg.activation: got 'silu'"):
        load_teacher(saved(tmp_path, (config, state)))


def test_an_unreachable_hub_is_told(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="is no local folder, is not in the hub cache, and the hub cannot be reached"):
        load_teacher("someone/no-such-model")
    with pytest.raises(UserError, match="neither a local folder nor a model on the hub"):
        load_teacher("not a name")


@pytest.mark.parametrize(
    "cause, message",
    [
        ("GatedRepoError", "is gated; accept its terms"),
        ("RevisionNotFoundError", "has no revision v9"),
        ("RepositoryNotFoundError", "neither a local folder nor a model on the hub"),
    ],
)
def test_what_the_hub_answers_is_told(cause, message):
    from huggingface_hub import errors

    error = OSError("many\nlines")
    error.__cause__ = errors.__dict__[cause].__new__(errors.__dict__[cause])
    told = load_error(error, "someone/model", "v9", "weights", "teacher")
    assert isinstance(told, UserError) and message in str(told)


@pytest.mark.parametrize(
    ("who", "begins", "field"),
    [
        ("teacher", "teacher: ", "teacher.trust_remote_code"),
        ("teachers.1", "teachers.1: ", "teachers.1.trust_remote_code"),
        ("stages.0.student.model", "stages.0.student.model: ", "stages.0.student.trust_remote_code"),
        ("", "", "trust_remote_code"),
    ],
)
def test_remote_code_is_off_unless_asked_for(who, begins, field, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "conf.Mine", "AutoModelForCausalLM": "m.M"}})
    )
    (tmp_path / "conf.py").write_text("raise SystemExit('the code of a stranger ran')\n")
    with pytest.raises(UserError) as caught:
        load_teacher(tmp_path, who=who)
    assert str(caught.value) == (
        f"{begins}{tmp_path} runs Python code of its own to load; if you trust it, set {field}: true"
    )


class Command:
    """What a hostile pickle does when it is read."""

    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize("old", [False, True], ids=["archive", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused_in_our_words(folder, capsys, old):
    (folder / "model.safetensors").unlink()
    if old:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Command()}))
    else:
        torch.save({"a": Command()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        load_teacher(folder)
    assert "its .bin file is damaged, or a pickle with more in it than tensors" in str(caught.value)
    assert "give a checkpoint with .safetensors files" in str(caught.value) and "\n" not in str(caught.value)
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.02, 0.3, 0.7, 0.9999])
def test_a_gguf_file_cut_short(tmp_path, make_llama, tokenizer, share):
    path = tmp_path / "cut.gguf"
    write_gguf(path, make_llama(), tokenizer)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(UserError, match=r"cut.gguf: the file is damaged, cut short or of a kind") as caught:
        load_teacher(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_json_nested_too_deep(folder, name):
    (folder / name).write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    load = load_config if name == "config.json" else load_tokenizer
    words = rf"{name} is not JSON \(nested too deep\); give a whole checkpoint"
    with pytest.raises(UserError, match=f"cannot load the .* from the folder {folder}: {words}"):
        load(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "tokenizer.json is not JSON ("),
        (lambda text: text.replace('"BPE"', '"BPX"'), "tokenizer.json is no tokenizer ("),
        (lambda text: text.replace('"vocab"', '"vocap"'), "tokenizer.json is no tokenizer ("),
        (lambda text: "[]", "tokenizer.json is no tokenizer ("),
    ],
)
def test_a_damaged_tokenizer_is_named(folder, damage, words):
    path = folder / "tokenizer.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    said = str(caught.value)
    assert f"cannot load the tokenizer from the folder {folder}: {words}" in said and "\n" not in said
    assert said.endswith("; give a whole checkpoint")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("special_tokens_map.json", "[]", "special_tokens_map.json holds a JSON list, not an object"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}', "tokenizer_config.json does not fit tokenizer.json ("),
    ],
)
def test_a_file_beside_a_tokenizer_is_named(folder, name, content, words):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(f"the tokenizer from the folder {folder}: {words}")):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("kind", "words"), [("LORA", "merge_and_unload"), ("P_TUNING", "P_TUNING cannot be merged into a model; give")]
)
def test_an_adapter_alone_is_no_model(tmp_path, kind, words):
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "{kind}"}}')
    with pytest.raises(UserError, match=f"{tmp_path} holds an adapter of peft's alone; .*{words}"):
        load_config(tmp_path)


def test_a_full_disk_is_not_the_checkpoints_fault(folder, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/copy")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(OSError, match="No space left on device"):
        load_teacher(folder)


SOUND = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"vocab_size": -5, "hidden_size": 0}, "vocab_size: got -5; allowed: a whole number of at least 1"),
        ({"hidden_size": 0}, "hidden_size: got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads: got 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: got -1"),
        ({"intermediate_size": -1}, "intermediate_size: got -1"),
        ({"head_dim": -3}, "head_dim: got -3"),
        ({"hidden_size": "a"}, "hidden_size: got 'a'"),
        ({"sliding_window": "w"}, "sliding_window: got 'w'; allowed: a whole number, or null"),
        ({"vocab_size": True}, "vocab_size: got True"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers: got 10000000; allowed: at most 10,000"),
        ({"architectures": 5}, "architectures: got 5; allowed: a list of names"),
        ({"hidden_act": "no"}, "hidden_act: got 'no'; allowed: what transformers has: gelu, "),
        (
            {"rope_scaling": {"type": "odd", "factor": 2.0}},
            "rope_type: got 'odd'; allowed: what transformers has: default",
        ),
        ({"pad_token_id": 500}, "no llama model can be made of it (AssertionError: Padding_idx"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["convert", "distill", "inspect"])
def test_a_configuration_of_which_no_model_can_be_made(tmp_path, capsys, wrong, words, kind):
    from mohawk.cli import main

    (tmp_path / "config.json").write_text(json.dumps({**SOUND, **wrong}))
    (tmp_path / "a.txt").write_text("some text")
    recipe = {"teacher": {"model": str(tmp_path)}, "data": {"train": [str(tmp_path / "a.txt")]}, "output": "run"}
    if kind == "distill":
        recipe |= {"student": {"layers": "first:1"}, "stages": [{"tokens": 1e6}]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    line = ["inspect", str(tmp_path)] if kind == "inspect" else [kind, str(tmp_path / "r.yaml"), "--dry-run"]
    assert main(line) == 2
    said = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert words in said and str(tmp_path) in said


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("pytorch_model.bin", "", "pytorch_model.bin is empty; give a whole checkpoint"),
        ("generation_config.json", "[1]", "generation_config.json holds a JSON list, not an object"),
        ("generation_config.json", "null", "generation_config.json holds null, not an object"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"lm_head.weight": "../other/model.safetensors"}}',
            "index.json: weight_map: got '../other/model.safetensors'; allowed: names of files in the same folder",
        ),
        ("model.safetensors.index.json", '{"metadata": {}}', "index.json has no object 'weight_map', which an index"),
        ("model.safetensors.index.json", "[1, 2]", "index.json holds a JSON list, not an object"),
    ],
)
def test_a_damaged_file_beside_the_weights_is_named(tmp_path, make_llama, file, content, words):
    make_llama().save_pretrained(tmp_path)
    if file != "generation_config.json":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(words)):
        load_teacher(tmp_path)


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "intermediate_size"])
def test_a_configuration_of_far_larger_weights_is_refused_before_they_are_allocated(field, tmp_path, make_llama):
    make_llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: 2**30}))
    with pytest.raises(UserError, match=rf"^teacher: .*config.json: .*{2**30}.* larger weights than its files hold"):
        load_teacher(tmp_path)


def test_weights_of_other_shapes_than_the_configuration_says(tmp_path, make_llama):
    make_llama().save_pretrained(tmp_path)
    make_llama(intermediate_size=16).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="^teacher: cannot load the weights of .* other shapes than its config.json"):
        load_teacher(tmp_path)


def test_a_read_that_fails_inside_tokenizers_names_the_model(tmp_path, tokenizer, monkeypatch):
    """Its exception is a bare one, and says no file."""
    tokenizer.save_pretrained(tmp_path)

    def lost(*args, **kwargs):
        raise Exception("Input/output error (os error 5)")  # its own words where a read fails

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lost)
    with pytest.raises(OSError) as error:
        load_tokenizer("none", tokenizer=tmp_path)
    assert line_for(error.value).startswith(f"{tmp_path}: Input/output error; check the disk")
