"""Students as GGUF files, read back with gguf's own reader and held to its own tables of names and keys.

What llama.cpp answers is in test_llama_cpp.py. Where this and the writer agree on what a tensor should be, it is
llama.cpp's converter that both were written after: of the students here it made the same tensors, bit for bit.
"""

import errno
import io
import json

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mohawk.cli import main
from mohawk.errors import UserError
from mohawk.export import gguf_check
from mohawk.export.gguf_check import compared, read_back
from mohawk.export.run import export
from mohawk.export.targets import TARGETS
from mohawk.models.casting import cast
from mohawk.models.formats import gguf as gguf_format
from mohawk.models.formats import gguf_vocabulary as vocabularies
from mohawk.models.formats.bamba import norms_groups_apart, to_bamba
from mohawk.models.formats.gguf import OUTTYPES, architecture, gguf_weights, why_not_gguf, write_gguf
from mohawk.models.formats.gguf_vocabulary import vocabulary
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.hybrid_config import HybridConfig
from tests.models.conftest import tiny_teacher
from tests.models.test_bamba import ROPES

FULL = {"use_sliding_window": False, "sliding_window": None}
WORDS = [
    "Hello, World! it's HE'S 12345 6,789.00\n\n  indented\tTab   \n",
    "naïve café, 北京 привет 😀",
    "x=1;y+=2 // code\r\n",
]


def student_of(family="llama", layers=(0, 2), mixer="mamba2", dtype=torch.float32, **overrides):
    """A tiny student that llama.cpp has, its mixers away from their starting values."""
    gate = {"gate": "output"} if mixer == "mamba2" else {}
    overrides = {**(FULL if family == "qwen3" else {}), **overrides}
    student = hybrid_from_teacher(tiny_teacher(family, **overrides), list(layers), mixer, **gate).eval()
    cast(scrambled(student), dtype)
    return student


def made_of(family, layers, **mixer):
    """One whose mixers have sizes that no teacher's attention gives them."""
    base = tiny_teacher(family, **(FULL if family == "qwen3" else {})).config
    kinds = ["linear_attention" if i in layers else "full_attention" for i in range(base.num_hidden_layers)]
    torch.manual_seed(0)
    return scrambled(HybridForCausalLM(HybridConfig(base_config=base, layer_types=kinds, **mixer)).eval())


def scrambled(student):
    torch.manual_seed(1)
    with torch.no_grad():
        for i in student.config.ssm_layers:
            for parameter in student.model.layers[i].self_attn.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return student


STUDENTS = {
    "llama": lambda: student_of(tie_word_embeddings=True),
    "untied": lambda: student_of(tie_word_embeddings=False, num_key_value_heads=1, layers=(1, 2, 3)),
    "bfloat16": lambda: student_of(dtype=torch.bfloat16),
    "wide heads": lambda: student_of("llama_wide_heads"),
    "MLP biases": lambda: student_of(mlp_bias=True),
    "qwen2": lambda: student_of("qwen2"),
    "phi3": lambda: student_of("phi3", sliding_window=None),
    **{f"{kind} rope": lambda rope=rope: student_of(rope_parameters=rope) for kind, rope in ROPES.items()},
    "groups": lambda: made_of(
        "llama", (0, 2, 3), mixer="mamba2", mixer_num_heads=4, mixer_num_groups=2, mixer_state_size=16
    ),
    "one group": lambda: made_of(
        "llama", (0, 1), mixer="mamba2", mixer_num_heads=4, mixer_head_dim=16, mixer_num_groups=1, mixer_state_size=12,
        mixer_conv_kernel=3,
    ),
    **{
        f"{taps} taps": lambda taps=taps: made_of("llama", (0, 2), mixer="mamba2", mixer_conv_kernel=taps)
        for taps in (1, 2, 16)
    },
    "delta, 1 tap": lambda: made_of("qwen3", (0, 2), mixer="gated_delta", mixer_conv_kernel=1),
    "delta": lambda: student_of("qwen3", mixer="gated_delta"),
    "delta, irregular": lambda: student_of("qwen3", (1, 3), "gated_delta", tie_word_embeddings=True),
    "delta, bfloat16": lambda: student_of("qwen3", mixer="gated_delta", dtype=torch.bfloat16),
    "delta, yarn": lambda: student_of("qwen3", mixer="gated_delta", rope_parameters=ROPES["yarn"]),
    "delta, rounds": lambda: made_of(
        "qwen3", (0, 1, 2), mixer="gated_delta", mixer_num_heads=6, mixer_head_dim=8, mixer_num_groups=2,
        mixer_state_size=8, mixer_conv_kernel=3,
    ),
}  # fmt: skip


def expected_tensors(student):
    """transformers' name -> what llama.cpp wants of it, float32, by the description of its layouts."""
    config, base = student.config, student.config.base_config
    if architecture(config) == "granitehybrid":
        head_dim, found = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads, {}
        stock = to_bamba(student, pad_expand=True)
        for key, value in stock.state_dict().items():
            value = value.float().numpy()
            if ".q_proj." in key or ".k_proj." in key:  # as its converter's `permute`
                value = value.reshape(-1, 2, head_dim // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
            if key.endswith(("A_log", "mamba.D")):
                value = value.reshape(-1, 1)
            if key.endswith("conv1d.weight"):
                value = value.squeeze(1)
            if key.endswith("mamba.norm.weight"):
                value = value.reshape(stock.config.mamba_n_groups, -1)
            found[key] = -np.exp(value) if key.endswith("A_log") else value
        if config.tie_word_embeddings:
            del found["lm_head.weight"]
        return found
    heads, groups, wide = config.mixer_num_heads, config.mixer_num_groups, config.mixer_head_dim
    order = [group * (heads // groups) + turn for turn in range(heads // groups) for group in range(groups)]
    channels = [head * wide + channel for head in order for channel in range(wide)]
    keys, found = 2 * groups * config.mixer_state_size, {}
    for key, value in student.state_dict().items():
        value = value.float().numpy()
        if key.startswith(tuple(f"model.layers.{i}.self_attn." for i in config.ssm_layers)):
            key = key.replace("self_attn", "linear_attn")
            if "in_proj_qkv" in key or "conv1d" in key:
                value = np.concatenate([value[:keys], value[keys:][channels]])
            elif "in_proj_z" in key:
                value = value[channels]
            elif "out_proj" in key:
                value = value[:, channels]
            elif not key.endswith("norm.weight"):
                value = value[order]
        elif "q_proj" in key:
            rows = value.reshape(base.num_attention_heads, -1, value.shape[1])
            value = np.concatenate([rows, 0 * rows], 1).reshape(-1, value.shape[1])
        elif "o_proj" in key:
            value = 2 * value
        if key.endswith("conv1d.weight"):
            value = value.squeeze(1)
        found[key] = -np.exp(value) if key.endswith("A_log") else value
    if config.tie_word_embeddings:
        del found["lm_head.weight"]
    return found


def rounded(key, value, kind):
    """A weight as a type stores it, and by how much it may be off."""
    if kind == "f32":
        return value, 2.0**-22 * np.abs(value) if key.endswith("A_log") else 0  # torch's exp and numpy's
    if kind == "bf16":
        return torch.from_numpy(value.copy()).bfloat16().float().numpy(), 0
    largest = np.abs(value.astype(np.float64)).reshape(*value.shape[:-1], -1, 32).max(-1).repeat(32, -1)
    if kind == "q4_0":  # 16 steps, from the largest to a step short of its negative
        return value, largest / 8 * (1 + 8 / 2**11) + 8 * 2.0**-25
    return value, largest / 127 * (0.5 + 127 / 2**11) + 127 * 2.0**-25  # the scale is a float16


@pytest.mark.skipif(not norms_groups_apart(), reason="this transformers norms Bamba's groups together")
@pytest.mark.parametrize("outtype", OUTTYPES)
@pytest.mark.parametrize("name", STUDENTS)
def test_every_tensor(name, outtype, tmp_path):
    student = STUDENTS[name]()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    write_gguf(student, tmp_path / "x.gguf", outtype)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    arch = {"granitehybrid": "GRANITE_HYBRID", "qwen35": "QWEN35"}[architecture(student.config)]
    known = getattr(gguf.MODEL_ARCH, arch, None)
    if known is None:
        pytest.skip(f"this gguf has no table of {arch}'s names")
    names = gguf.get_tensor_name_map(known, student.config.num_hidden_layers)
    kinds = set()
    for key, value in expected_tensors(student).items():
        key = key.replace(".dt_bias", ".dt_proj.bias")
        tensor = stored.pop(names.get_name(key, try_suffixes=(".weight", ".bias")))
        kind = tensor.tensor_type.name.lower()
        matrix = value.ndim == 2 and "norm" not in key and "conv1d" not in key and key.endswith(".weight")
        blocks = value.shape[-1] % 32 == 0 and not key.endswith(("in_proj_a.weight", "in_proj_b.weight"))
        assert kind == (outtype if matrix and (outtype not in ("q8_0", "q4_0") or blocks) else "f32"), key
        assert tensor.shape.tolist() == list(value.shape[::-1]), key
        wanted, off = rounded(key, value, kind)
        got = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert (np.abs(got - wanted) <= off).all(), key
        kinds.add(kind)
    assert kinds == {"f32", outtype}
    frequencies = stored.pop("rope_freqs.weight", None)
    assert not stored
    if name != "llama3 rope":
        assert frequencies is None
    else:  # what each frequency is divided by, as the paper's formula has it (Llama 3.1: wavelengths of 4 to 16 tokens)
        waves = 2 * np.pi * 10000.0 ** (np.arange(0, 8, 2) / 8)
        smooth = (16 / waves - 1) / (4 - 1)
        factors = np.where(waves < 4, 1, np.where(waves > 16, 4, 1 / ((1 - smooth) / 4 + smooth)))
        np.testing.assert_allclose(frequencies.data, factors, rtol=1e-6)


def fields_of(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_fields_of_a_mamba2_student(tmp_path, tokenizer):
    student = student_of(vocab_size=300, rope_parameters=ROPES["yarn"])
    about = {"general.name": "mine", "general.license": "mit"}
    write_gguf(student, tmp_path / "x.gguf", "q8_0", tokenizer=tokenizer, about=about)
    found, K = fields_of(tmp_path / "x.gguf"), gguf.Keys

    def of(key):
        return found[key.format(arch="granitehybrid")]

    assert of(K.General.ARCHITECTURE) == "granitehybrid" and of(K.General.FILE_TYPE) == 7
    assert of(K.General.NAME) == "mine" and of(K.General.LICENSE) == "mit" and of(K.General.TYPE) == "model"
    assert of(K.General.QUANTIZATION_VERSION) == gguf.GGML_QUANT_VERSION
    assert of(K.LLM.BLOCK_COUNT) == 4 and of(K.LLM.EMBEDDING_LENGTH) == 32 and of(K.LLM.FEED_FORWARD_LENGTH) == 48
    assert of(K.LLM.VOCAB_SIZE) == 300 and of(K.LLM.CONTEXT_LENGTH) == 256
    assert of(K.Attention.HEAD_COUNT) == 4 and of(K.Attention.HEAD_COUNT_KV) == [0, 2, 0, 2]
    assert of(K.Attention.KEY_LENGTH) == of(K.Attention.VALUE_LENGTH) == of(K.Rope.DIMENSION_COUNT) == 8
    assert of(K.Attention.LAYERNORM_RMS_EPS) == pytest.approx(student.config.base_config.rms_norm_eps)
    # 4 heads of 8 channels, a group each, padded to twice the model's width
    assert of(K.SSM.INNER_SIZE) == 64 and of(K.SSM.TIME_STEP_RANK) == 8 and of("{arch}.ssm.group_count") == 8
    assert of(K.SSM.STATE_SIZE) == 8 and of(K.SSM.CONV_KERNEL) == 4
    assert of(K.Rope.FREQ_BASE) == 10000 and of(K.Rope.SCALING_FINETUNED) is True
    assert of(K.Rope.SCALING_TYPE) == "yarn" and of(K.Rope.SCALING_FACTOR) == 4
    assert of(K.Rope.SCALING_ORIG_CTX_LEN) == 16
    assert found["tokenizer.ggml.tokens"][298:] == ["[PAD298]", "[PAD299]"]
    assert found["tokenizer.ggml.token_type"][255:259] == [1, 3, 3, 5]  # normal, <bos> and <eos> control, unused


@pytest.mark.parametrize("layers, interval", [((0, 2), 2), ((0, 1, 2), 4), ((1, 3), None)])
def test_fields_of_a_gated_delta_student(layers, interval, tmp_path):
    student = student_of("qwen3", layers, "gated_delta", rope_parameters=ROPES["linear"])
    write_gguf(student, tmp_path / "x.gguf", "bf16")
    found, K = fields_of(tmp_path / "x.gguf"), gguf.Keys
    of = {key.removeprefix("qwen35."): value for key, value in found.items()}
    assert found[K.General.ARCHITECTURE] == "qwen35" and found[K.General.FILE_TYPE] == 32
    assert "general.quantization_version" not in found and found["tokenizer.ggml.model"] == "none"
    assert of["attention.head_count_kv"] == 2 and of["attention.key_length"] == of["rope.dimension_count"] == 16
    assert of["attention.recurrent_layers"] == [i in layers for i in range(4)]
    assert of.get("full_attention_interval") == interval
    assert of["ssm.inner_size"] == 64 and of["ssm.state_size"] == 16 and of["ssm.conv_kernel"] == 4
    assert of["ssm.group_count"] == of["ssm.time_step_rank"] == 4
    assert of["rope.scaling.type"] == "linear" and of["rope.scaling.factor"] == 2 and of["rope.freq_base"] == 500
    time, height, width, other = of["rope.dimension_sections"]  # 8 pairs, in rounds over the axes
    assert (time, height, width, other) == (3, 3, 2, 0)


def test_why_not():
    def why(student=None, **changed):
        config = (student or student_of()).config
        for name, value in changed.items():
            setattr(config, name, value)
        return why_not_gguf(config)

    assert why() is None
    bias = why(mixer_bias=True)
    assert "projections have biases" in bias and "the default gate, open, is one; a student made with gate: out" in bias
    kept = hybrid_from_teacher(tiny_teacher("llama", attention_bias=True), [0, 2], gate="output")
    assert kept.config.mixer_bias
    assert why(kept).endswith("its teacher's attention has one on its output, which they keep")
    assert "no attention layer is left" in why(student_of(layers=(0, 1, 2, 3)))
    assert "its mixers are discrete_mamba2" in why(student_of(mixer="discrete_mamba2"))
    mixed = hybrid_from_teacher(tiny_teacher(), [0, 2], {0: "mamba2", 2: "kimi_delta"})
    assert "its mixers are mamba2 and kimi_delta, llama.cpp's Bamba's are Mamba-2's" in why(mixed)
    assert "3 times as wide as the model" in why(mixer_head_dim=24)
    assert "cannot be padded" in why(mixer_num_heads=3, mixer_head_dim=7)
    assert "Gemma's embedding is scaled" in why_not_gguf(hybrid_from_teacher(tiny_teacher("gemma"), [1]).config)
    assert "sliding window of 6" in why_not_gguf(hybrid_from_teacher(tiny_teacher("mistral"), [1]).config)

    dynamic = student_of()
    dynamic.config.base_config.rope_parameters["rope_type"] = "dynamic"
    assert "scaled by dynamic, llama.cpp's granitehybrid knows default, linear, llama3, yarn" in why(dynamic)
    yarn = student_of(rope_parameters={**ROPES["yarn"], "attention_factor": 1.5})
    assert "yarn positions have attention_factor" in why(yarn)

    delta = student_of("qwen3", mixer="gated_delta")
    assert why(delta) is None
    assert "keys of 16 and values of 8" in why(delta, mixer_head_dim=8)
    llama3 = student_of("qwen3", mixer="gated_delta", rope_parameters=ROPES["llama3"])
    assert "scaled by llama3, llama.cpp's qwen35 knows default, linear, yarn" in why(llama3)

    with pytest.raises(ValueError, match="outtype: got 'q4_1'; allowed: f32, bf16, q8_0, q4_0"):
        write_gguf(student_of(), "x.gguf", "q4_1")
    with pytest.raises(ValueError, match="cannot be a GGUF file: no attention layer"):
        write_gguf(student_of(layers=(0, 1, 2, 3)), "x.gguf")


def byte_level(*steps, ignore_merges=False):
    """A small tokenizer on bytes, its text cut by these steps."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=alphabet, special_tokens=["<bos>", "<eos>"]
    )
    made.train_from_iterator(WORDS * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>")


def sentencepiece(prepend=True, metaspace=None):
    """One with byte fallback, as Llama 2, Mistral and Phi-3 have it."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if metaspace is None:
        first = [normalizers.Prepend("▁")] if prepend else []
        made.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<bos>", "<eos>", *(f"<0x{i:02X}>" for i in range(256))]
    made.train_from_iterator(
        WORDS * 50, trainers.BpeTrainer(vocab_size=350, show_progress=False, special_tokens=special)
    )
    described = json.loads(made.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if "<0x" not in token["content"]]
    made = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDWISE = pre_tokenizers.ByteLevel(add_prefix_space=False)
TOKENIZERS = {
    "gpt-2": lambda: byte_level(WORDWISE),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), WORDWISE),
    "llama-bpe": lambda: byte_level(split(vocabularies.LLAMA3), BYTES, ignore_merges=True),
    "smaug-bpe": lambda: byte_level(split(vocabularies.LLAMA3), BYTES),
    "qwen2": lambda: byte_level(split(vocabularies.QWEN2), BYTES),
    "seed-coder": lambda: byte_level(split(vocabularies.SEED), BYTES),
    "tekken": lambda: byte_level(split(vocabularies.TEKKEN), BYTES, ignore_merges=True),
}
SENTENCEPIECE = {
    "space in front": lambda: sentencepiece(),
    "none in front": lambda: sentencepiece(prepend=False),
    "metaspace, none": lambda: sentencepiece(metaspace="never"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_byte_level_vocabularies(name):
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    fields = vocabulary(tokenizer, len(tokenizer) + 2)
    of = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    assert of["model"] == "gpt2" and of["pre"] == name
    assert of["tokens"][:-2] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert of["token_type"][:3] == [3, 3, 1] and of["token_type"][-3:] == [4, 5, 5]  # control, normal; user's; unused
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert [merge.split(" ") for merge in of["merges"]] == merges and len(merges) > 50
    assert of["bos_token_id"] == 0 and of["eos_token_id"] == 1 and "padding_token_id" not in of
    assert of["add_bos_token"] is False and of["add_eos_token"] is False
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert fields["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert fields["tokenizer.chat_templates"] == ["tool_use"]


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_vocabularies(name):
    tokenizer = SENTENCEPIECE[name]()
    of = {key.removeprefix("tokenizer.ggml."): value for key, value in vocabulary(tokenizer, len(tokenizer)).items()}
    assert of["model"] == "llama" and of["pre"] == "default" and of["unknown_token_id"] == 0
    assert of["add_space_prefix"] is (name == "space in front")
    assert (
        of["token_type"][:3] == [2, 3, 3]
        and of["token_type"][3:259] == [6] * 256
        and set(of["token_type"][259:]) == {1}
    )
    made = {left + right for left, right in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]}
    scores = dict(zip(of["tokens"], of["scores"], strict=True))
    joined = [token for token in of["tokens"] if token in made]
    assert len(joined) > 20 and [scores[token] for token in joined] == sorted((scores[t] for t in joined), reverse=True)
    assert all(score == 0 for token, score in scores.items() if token not in made)


def test_what_a_tokenizer_adds_by_itself(make_adding):
    of = vocabulary(make_adding("<bos> $A <eos>"), 700)
    assert of["tokenizer.ggml.add_bos_token"] is True and of["tokenizer.ggml.add_eos_token"] is True


@pytest.fixture
def make_adding():
    from tokenizers.processors import TemplateProcessing

    def make(single):
        tokenizer = byte_level(WORDWISE)
        special = [("<bos>", 0), ("<eos>", 1)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
        return tokenizer

    return make


def test_tokenizers_that_llama_cpp_does_not_have(tokenizer):
    def why(tokenizer, size=700):
        with pytest.raises(ValueError) as error:
            vocabulary(tokenizer, size)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "cuts text by [a-z]+; llama.cpp has no name for that among gpt-2, smollm" in why(
        byte_level(split("[a-z]+"), BYTES)
    )
    assert ", taking whole words first; llama.cpp" in why(byte_level(WORDWISE, ignore_merges=True))
    assert "add_prefix_space" in why(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)))
    lower = byte_level(WORDWISE)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert ", after Lowercase; llama.cpp has no name" in why(lower)
    cut = sentencepiece()
    cut.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert "has byte fallback, but the normalizer" in why(cut) and "Whitespace" in why(cut)
    assert "ids up to 257, the model 200 tokens" in why(tokenizer, 200)
    twice = byte_level(WORDWISE)
    twice.add_tokens(["[PAD699]"])  # what the last of 700 is called where the tokenizer has fewer
    assert "1 of the tokenizer's tokens have the text of another one" in why(twice)
    without = byte_level(WORDWISE)
    without.eos_token = None
    assert "has no eos token" in why(without)
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, "a")), eos_token="<eos>"
    )
    assert "is a WordLevel model" in why(words)


@pytest.fixture
def folder(tmp_path):
    """A student's, with a tokenizer that llama.cpp has."""
    tokenizer = TOKENIZERS["smollm"]()
    student_of(vocab_size=600).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def without_llama_cpp(monkeypatch):
    monkeypatch.setattr(gguf_check, "has_llama_cpp", lambda: False)


def exported(*args, **options):
    console = Console(file=io.StringIO(), width=200)
    return export(*args, console=console, **options), console.file.getvalue()


@pytest.mark.parametrize("outtype", [None, *OUTTYPES])
def test_a_student_becomes_a_file(folder, outtype, without_llama_cpp):
    written, screen = exported(folder, "gguf", outtype=outtype)
    outtype = outtype or "f32"
    assert written == folder.parent / f"student-gguf-{outtype}"
    assert {path.name for path in written.iterdir()} == {f"student-{outtype}.gguf", "README.md", "MANIFEST.json"}
    assert fields_of(written / f"student-{outtype}.gguf")["general.name"] == "student"
    assert f"tensors in {outtype}" in screen and screen.count(" ok") == (1 if outtype == "f32" else 2)
    assert "llama.cpp (not checked): as granitehybrid" in screen and "mamba_expand 2: the same function" in screen
    card = (written / "README.md").read_text()
    assert "A GGUF file of 2 Mamba-2 and 2 attention layers" in card and "library_name: gguf" in card
    assert f"llama-server -m student-{outtype}.gguf" in card and "from_pretrained" not in card
    assert f"tensors in {outtype}" in card and "| llama.cpp | no | as granitehybrid" in card


def test_what_is_asked_wrongly(folder, capsys):
    assert main(["export", str(folder), "--to", "gguf", "--pad-expand"]) == 2
    assert "are of --to bamba and --to granite; gguf needs neither" in capsys.readouterr().err
    assert main(["export", str(folder), "--to", "bamba", "--outtype", "q8_0"]) == 2
    assert "--outtype: got 'q8_0' with --to bamba; it is of --to gguf" in capsys.readouterr().err
    with pytest.raises(UserError, match="--outtype: got 'q4_1' with --to gguf; no --to has it"):
        export(folder, "gguf", outtype="q4_1")
    with pytest.raises(SystemExit):
        main(["export", str(folder), "--to", "gguf", "--outtype", "q4_1"])
    assert TARGETS["gguf"].outtypes == tuple(OUTTYPES)


def test_what_is_refused_is_refused_before_weights_are_read(folder, capsys, monkeypatch):
    def never(*args, **options):
        pytest.fail("weights were read")

    monkeypatch.setattr("mohawk.loading.models.load_teacher", never)
    byte_level(split("[a-z]+"), BYTES).save_pretrained(folder)
    assert main(["export", str(folder), "--to", "gguf"]) == 2
    assert "cannot be a GGUF file: the tokenizer cuts text by [a-z]+;" in capsys.readouterr().err
    assert main(["export", str(folder), "--list"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("--to gguf"))
    assert line.startswith("--to gguf: no; cannot be a GGUF file: the tokenizer cuts text by [a-z]+;")

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mixer_bias": True}))
    assert main(["export", str(folder), "--to", "gguf"]) == 2
    assert "its mixers' projections have biases" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", str(folder), "--to", "gguf"]) == 2
    assert "needs the package gguf: run pip install gguf" in capsys.readouterr().err
    assert [path.name for path in folder.parent.iterdir()] == ["student"]


@pytest.mark.parametrize("mixer, target", [("mamba2", "bamba"), ("gated_delta", "qwen3_5")])
def test_a_tokenizer_that_llama_cpp_lacks_is_said_of_every_way_to_it(mixer, target, tmp_path, capsys):
    """The list says of no folder that llama.cpp runs it while it refuses the file for the tokenizer."""
    family = "qwen3" if mixer == "gated_delta" else "llama"
    student_of(family, (0, 1, 2), mixer, vocab_size=600).save_pretrained(tmp_path)

    def of_llama_cpp():
        assert main(["export", str(tmp_path), "--list"]) == 0
        told = capsys.readouterr().out.split(f"--to {target}: ")[1].split("--to ")[0].splitlines()
        return next(line.strip() for line in told if line.strip().startswith("llama.cpp: "))

    TOKENIZERS["qwen2"]().save_pretrained(tmp_path)
    here = of_llama_cpp()  # a Bamba of this width has to be padded for it
    assert here.startswith("llama.cpp: yes") if mixer == "gated_delta" else "--pad-expand" in here
    byte_level(split("[a-z]+"), BYTES).save_pretrained(tmp_path)
    assert of_llama_cpp().startswith("llama.cpp: no; the tokenizer cuts text by [a-z]+; ")


def test_a_full_disk_leaves_nothing(folder, capsys, monkeypatch):
    written, right = [], gguf.GGUFWriter.write_tensor_data

    def full(self, tensor, *args):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(tensor.nbytes)
        right(self, tensor, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    assert main(["export", str(folder), "--to", "gguf"]) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert len(written) == 5 and [path.name for path in folder.parent.iterdir()] == ["student"]


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_a_weight_that_was_written_wrongly_fails_the_export(folder, outtype, capsys, monkeypatch, without_llama_cpp):
    right = gguf.GGUFWriter.write_tensor_data
    seen = []

    def wrong(self, tensor, *args):
        if not seen:  # one bit of the embedding's last byte
            tensor = tensor.copy()
            tensor.view(np.uint8).reshape(-1)[-1] ^= 1 << 6
        seen.append(1)
        right(self, tensor, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", wrong)
    assert main(["export", str(folder), "--to", "gguf", "--outtype", outtype]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"tensors in {outtype}" in last and "nothing was kept" in last
    assert [path.name for path in folder.parent.iterdir()] == ["student"]


def test_reading_back(tmp_path):
    student = student_of()
    write_gguf(student, tmp_path / "x.gguf")
    (row,) = read_back(tmp_path / "x.gguf", student)
    assert row.passed and row.difference == 0
    with torch.no_grad():
        student.model.layers[0].self_attn.D[1] = float("nan")
    (row,) = read_back(tmp_path / "x.gguf", student)
    assert not row.passed
    with pytest.raises(UserError, match="without output.weight; check the disk"):
        read_back(tmp_path / "x.gguf", student_of(tie_word_embeddings=False))
    write_gguf(student_of(tie_word_embeddings=False), tmp_path / "x.gguf")
    with pytest.raises(UserError, match="with output.weight, which the student does not have"):
        read_back(tmp_path / "x.gguf", student_of())


@pytest.mark.parametrize("outtype", ["q8_0", "q4_0"])
def test_small_weights_in_blocks(outtype, tmp_path):
    """A block whose scale is below float16's normal numbers is off by more than half a step: that is allowed for."""
    student = student_of()
    with torch.no_grad():
        student.model.layers[1].mlp.gate_proj.weight.mul_(1e-4)
    write_gguf(student, tmp_path / "x.gguf", outtype)
    assert all(row.passed for row in read_back(tmp_path / "x.gguf", student))


def test_no_second_model_is_made(tmp_path, monkeypatch):
    """What was made of a weight is gone when the next is made."""
    import weakref

    right, alive = gguf_format._granite_hybrid, []

    def made(key, value, config):
        assert sum(one() is not None for one in alive) <= 1
        value = right(key, value, config).clone()
        alive.append(weakref.ref(value))
        return value

    student = student_of(tie_word_embeddings=False)
    count = len([*gguf_weights(student)])
    monkeypatch.setattr(gguf_format, "_granite_hybrid", made)
    write_gguf(student, tmp_path / "x.gguf", "bf16")
    assert len(alive) == 2 * count  # once for its shape, once for the file


def test_answers_are_compared():
    torch.manual_seed(0)
    expected = {"full": torch.randn(9, 7), "steps": torch.randn(6, 7), "tokens_logits": torch.randn(1, 4, 7)}
    expected["tokens"] = expected["tokens_logits"].argmax(-1)
    assert all(row.passed for row in compared(expected, expected, True))
    for key in ("full", "steps", "tokens_logits"):
        other = {**expected, key: expected[key] + 0.01}
        assert [row.passed for row in compared(expected, other, True)].count(False) == 1
        assert all(row.passed for row in compared(expected, other, False))
        assert not all(row.passed for row in compared(expected, {**expected, key: expected[key] * torch.nan}, False))
    tokens = expected["tokens"].clone()
    tokens[0, 2] = (tokens[0, 2] + 1) % 7
    assert [row.same for row in compared(expected, {**expected, "tokens": tokens}, True)][2] == "no, from token 2"
    assert [row.same for row in compared(expected, {**expected, "tokens": tokens}, False)][2] == "the first 2"


def test_a_llama_cpp_that_fails_is_warned_of(folder, tmp_path, monkeypatch, caplog):
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text("raise OSError('libllama.so is too old')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(tmp_path)
    assert gguf_check.has_llama_cpp()
    written, screen = exported(folder, "gguf")
    assert "so it is not checked there: OSError: libllama.so is too old" in caplog.text
    assert "llama.cpp (not checked)" in screen and (written / "student-f32.gguf").is_file()
