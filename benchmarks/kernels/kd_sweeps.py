"""Forward KL from hidden states over tokens, over vocabularies, and with the heads of models that people distil: where
it pays and where plain torch is as quick."""

from __future__ import annotations

import torch

from benchmarks.harness import Case
from benchmarks.kernels import kd_loss as speed
from benchmarks.kernels import kd_peers
from benchmarks.own import Own

MODELS = {  # hidden size and vocabulary
    "SmolLM2-135M": (576, 49152),
    "Qwen2.5-0.5B": (896, 151936),
    "Gemma-3-1B": (1152, 262144),
    "Llama-3.2-1B": (2048, 128256),
    "Phi-4-mini": (3072, 200064),
}


def cases(device: str, quick: bool, own: Own = ()) -> list[Case]:
    dtype, models = torch.float32 if device == "cpu" else torch.bfloat16, MODELS
    tokens = {"cpu": (16, 64, 256, 1024, 4096), "cuda": (128, 512, 2048, 8192, 32768)}[device]
    vocabularies = {"cpu": (1000, 8000, 32000, 128000), "cuda": (8000, 32000, 128256, 262144)}[device]
    rows, hidden = {"cpu": (256, 576), "cuda": (8192, 2048)}[device]
    if quick:
        tokens, vocabularies, rows, models = tokens[:2], vocabularies[:1], 16, {}
    along = {
        f"vocabulary 32000, hidden {hidden}": [("tokens", n, (n, hidden, 32000)) for n in tokens],
        f"{rows} tokens, hidden {hidden}": [("vocabulary", v, (rows, hidden, v)) for v in vocabularies],
    }
    losses = {"mohawk": speed.ours(), "eager": kd_peers.eager_forward_kl}
    losses |= {name.split(",")[0]: loss for name, kind, loss in own if kind == "forward_kl"}
    found = []

    def add(table: str, place: str, name: str, loss: speed.Loss | None, shape, **more) -> None:
        def build():
            if loss is None:
                return (lambda whole: 0.0), speed.floor_work(shape, dtype, device)
            return speed.make(loss, speed.truth_of(), shape, dtype, device)

        flops = 8.0 * shape[0] * shape[1] * shape[2]
        floor, against = f"{speed.FLOOR}, {place}", f"eager, {place}" if name == "mohawk" else None
        formula = speed.FORMULA.format(speed.FLOOR_ROWS[device])
        found.append(Case(table, f"{name}, {place}", build, None, floor, formula, against=against, flops=flops, **more))

    for swept, places in along.items():
        for axis, at, shape in places:
            for name, loss in ({speed.FLOOR: None} | losses).items():
                table = f"{str(dtype)[6:]}, forward KL over {axis}: {swept}"
                add(table, f"{'n' if axis == 'tokens' else 'V'} {at}", name, loss, shape, at=at, axis=axis)
    for model, (width, vocab) in models.items():
        for name, loss in ({speed.FLOOR: None} | losses).items():
            table = f"{str(dtype)[6:]}, forward KL with the heads of models, {rows} tokens"
            add(table, model, name, loss, (rows, width, vocab))
    return found
