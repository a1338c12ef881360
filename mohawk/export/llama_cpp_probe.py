"""What llama.cpp answers to fixed inputs: run in a process of its own, which a failed assertion would end."""

import sys


def main(path: str, inputs: str, answers: str, text: str) -> None:
    """Load a GGUF file, answer `inputs`, and write all of it to `answers`.

    text: to be turned into tokens, with what the file says is added; empty for a file without a vocabulary.
    """
    import llama_cpp
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    asked = load_file(inputs)
    long, steps = asked["long"].tolist(), asked["steps"].tolist()
    prefill, new = int(asked["prefill"]), int(asked["new"])
    model = llama_cpp.Llama(
        path, n_ctx=max(len(long), len(steps) + new), logits_all=True, n_gpu_layers=0, flash_attn=False, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip

    def logits(*parts: list[int]) -> torch.Tensor:
        model.reset()
        for part in parts:
            model.eval(part)
        return torch.from_numpy(np.array(model.scores[: sum(map(len, parts))], dtype=np.float32))

    found = {"full": logits(long), "steps": logits(steps[:prefill], *([token] for token in steps[prefill:]))}
    tokens, chosen = [], []
    for _ in range(new):
        last = logits(steps)[-1] if not tokens else logits_of(model, tokens[-1])
        chosen.append(last)
        tokens.append(int(last.argmax()))
    found |= {"tokens": torch.tensor([tokens]), "tokens_logits": torch.stack(chosen)[None]}
    if text:
        found["text"] = torch.tensor(model.tokenize(text.encode(), add_bos=True, special=True))
    save_file(found, answers)


def logits_of(model, token: int):
    """The logits after one more token."""
    import torch

    model.eval([token])
    return torch.from_numpy(model.scores[model.n_tokens - 1].copy())


if __name__ == "__main__":
    main(*sys.argv[1:])
