"""Does llama.cpp run an exported student? Greedy tokens and their log probabilities, beside transformers'.

llama.cpp knows Bamba under the name granitehybrid. Its own converter is no package, so the export is written as GGUF
here, in float32, with the `gguf` package and from the layout's description; `xllamacpp` is llama.cpp as a wheel for
CPUs. Neither is needed by anything else:

    pip install gguf xllamacpp
    python benchmarks/llama_cpp.py EXPORTED_FOLDER        # mohawk export RUN --to bamba --pad-expand
    python benchmarks/llama_cpp.py --demo                 # an untrained SmolLM2 hybrid without biases in its mixers
"""

import argparse
import json
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
NEW = 32
PROMPTS = (
    "The most important thing about the state of the nation is",
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal. Now we are engaged in",
)


def write_gguf(folder: Path, path: Path) -> None:
    """An exported Bamba as a float32 GGUF file. Raises ValueError for what llama.cpp's loader does not take."""
    import gguf
    import torch
    from transformers import AutoTokenizer, BambaForCausalLM

    model = BambaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(folder)
    if config.mamba_expand != 2 or config.mamba_proj_bias:
        raise ValueError(f"{folder}: llama.cpp takes mamba_expand 2 and no biases on the mixer's projections")
    head_dim = config.hidden_size // config.num_attention_heads
    inner = config.mamba_expand * config.hidden_size
    attends = [kind != "linear_attention" for kind in config.layers_block_type]

    writer = gguf.GGUFWriter(path, "granitehybrid")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv([config.num_key_value_heads if here else 0 for here in attends])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_scaling_finetuned(True)  # here this means: rotate at all
    writer.add_ssm_conv_kernel(config.mamba_d_conv)
    writer.add_ssm_state_size(config.mamba_d_state)
    writer.add_ssm_group_count(config.mamba_n_groups)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_time_step_rank(config.mamba_n_heads)  # under this key: the number of heads
    _write_vocabulary(writer, tokenizer, config.vocab_size)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GRANITE_HYBRID, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if key.endswith("A_log"):
            value = -torch.exp(value)
        if key.endswith((".A_log", ".mamba.D")):
            value = value[:, None]
        elif key.endswith("conv1d.weight"):
            value = value[:, 0]
        elif key.endswith("mamba.norm.weight"):
            value = value.view(config.mamba_n_groups, -1)
        elif ".q_proj." in key or ".k_proj." in key:  # its rotary embedding turns neighbours, not halves
            value = value.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
        name = names.get_name(key.replace(".dt_bias", ".dt_proj.bias"), try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_vocabulary(writer, tokenizer, vocab_size: int) -> None:
    """A byte-level BPE vocabulary; prompts are given as ids, so how llama.cpp cuts text does not enter."""
    import gguf

    known = {i: token for token, i in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([known.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types(
        [kinds.CONTROL if i in special else kinds.NORMAL if i in known else kinds.UNUSED for i in range(vocab_size)]
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)


def by_transformers(folder: Path, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens and the log probability of each."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]), do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    chosen = out.sequences[0, len(prompt) :]
    logprobs = torch.cat(out.logits).float().log_softmax(-1)
    return chosen.tolist(), logprobs.gather(1, chosen[:, None])[:, 0].tolist()


class LlamaCpp:
    """A GGUF file, loaded into llama.cpp's server."""

    def __init__(self, path: Path, threads: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 1, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup = False
        self.server = xllamacpp.Server(params)

    def greedy(self, prompt: list[int]) -> tuple[list[int], list[float]]:
        """Greedy tokens and the log probability of each."""
        asked = {"prompt": prompt, "max_tokens": NEW, "temperature": -1.0, "logprobs": 1, "ignore_eos": True}
        answer = self.server.handle_completions({**asked, "cache_prompt": False})
        rows = answer["choices"][0]["logprobs"]["content"]
        return [row["id"] for row in rows], [row["logprob"] for row in rows]


def demo_export(folder: Path) -> Path:
    """SmolLM2 with every second layer a mixer whose gate has no bias, exported with --pad-expand. Not trained."""
    from mohawk.demo import fetch
    from mohawk.export.run import export
    from mohawk.loading.models import load_teacher, load_tokenizer
    from mohawk.models.from_teacher import hybrid_from_teacher

    teacher = fetch.smollm2()
    student = hybrid_from_teacher(load_teacher(str(teacher)), "every_second", gate="output")
    student.save_pretrained(folder / "student")
    load_tokenizer(str(teacher)).save_pretrained(folder / "student")
    return export(folder / "student", "bamba", folder / "bamba", pad_expand=True)


def main() -> None:
    from importlib.metadata import version

    from transformers import AutoTokenizer

    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path, nargs="?", help="an exported Bamba")
    options.add_argument("--demo", action="store_true")
    options.add_argument("--threads", type=int, default=2)
    options = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = demo_export(Path(scratch)) if options.demo else options.folder
        write_gguf(folder, Path(scratch) / "student.gguf")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        expected = [by_transformers(folder, prompt) for prompt in prompts]
        llama = LlamaCpp(Path(scratch) / "student.gguf", options.threads)
        rows = []
        for text, prompt, (tokens, logprobs) in zip(PROMPTS, prompts, expected, strict=True):
            got, theirs = llama.greedy(prompt)
            same = next((i for i, (a, b) in enumerate(zip(tokens, got, strict=True)) if a != b), NEW)
            difference = max((abs(a - b) for a, b in zip(logprobs[:same], theirs[:same], strict=True)), default=None)
            rows.append({"prompt": text, "same_tokens": same, "of": NEW, "max_logprob_difference": difference,
                         "continuation": tokenizer.decode(got)})  # fmt: skip
            print(f"{same} of {NEW} tokens the same, log probabilities within {difference}: {tokenizer.decode(got)!r}")
    versions = {name: version(name) for name in ("xllamacpp", "gguf", "transformers", "torch")}
    found = {
        "student": "SmolLM2, untrained" if options.demo else str(options.folder),
        "versions": versions,
        "rows": rows,
    }
    (RESULTS / "llama_cpp.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
