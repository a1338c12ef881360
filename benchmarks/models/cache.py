"""What a cached teacher costs and saves: bytes per token beside other formats, what they lose, speed, step time.

1. Bytes per token at two vocabularies. Ours: of the files. DistillKit: computed from its `total_bits()`, with the
   settings its README recommends (16 exact values in bfloat16, six float32 coefficients for the others). Megatron-LM:
   its tensors (float16 values, uint16 and bool ids: vocabularies to 131072) of a real teacher, compressed as it does
   (zstd, level 3), and uncompressed.
2. What the formats lose: SmolLM2-135M-Instruct as the teacher, itself with noise on its weights as the student; the
   loss's rounding beside the same top k unrounded, and the gradient's distance from the dense teacher's.
3. Tokens/s written, with the teacher alone beside it, and read back in random order.
4. A training step of a half-depth student with the teacher online and from each kind of cache.

    python benchmarks/models/cache.py [--rows 32] [--steps 9] [--threads N]
"""

import argparse
import copy
import io
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pages import RESULTS, made_by, put_in_docs  # noqa: E402

SOURCES = {
    "DistillKit": "arcee-ai/DistillKit a61c2e7: distillkit/compression/config.py, monotonic_logprobs.py, README.md",
    "Megatron-LM": "NVIDIA/Megatron-LM d98e8a6: megatron/training/distillation/logits_saver.py, cached_logits_loss.py",
}
KS = (8, 32, 64, 128, 256)
VOCABULARIES = (49152, 151936)
TERMS = [lambda t: t**0, lambda t: t, lambda t: t**2, lambda t: t**3, lambda t: t**4, lambda t: t**0.5]
EXACT = 16  # values that DistillKit keeps as bfloat16 beside the polynomial


def ours_bytes(k: int, vocab: int, length: int = 512, kind: str = "top-k") -> float:
    from mohawk.teacher_cache.layout import Layout

    return Layout(kind, length, vocab, k).row.itemsize / length


def distillkit_bytes(k: int, vocab: int) -> int:
    values = 2 * min(k, EXACT) + (4 * len(TERMS) if k > EXACT else 0)
    return values + -(-k * math.ceil(math.log2(vocab)) // 8)


def megatron_tensors(values, ids) -> bytes:
    """A micro-batch as Megatron-LM serialises it, before compression."""
    import torch

    file = io.BytesIO()
    torch.save({"values": [values.half()], "indices_low": [(ids & 0xFFFF).to(torch.uint16)],
                "bit_17": [(ids >> 16).bool()]}, file)  # fmt: skip
    return file.getvalue()


def zstd(content: bytes) -> int:
    import pyarrow

    return len(pyarrow.Codec("zstd", compression_level=3).compress(content, asbytes=True))


def polynomial(values):
    """DistillKit's: the first EXACT in bfloat16, the rest as least squares have it, float32 coefficients."""
    import torch

    exact, rest = values[:, :EXACT].bfloat16().double(), values[:, EXACT:].double()
    if not rest.shape[1]:
        return exact
    t = torch.arange(rest.shape[1], dtype=torch.float64)
    basis = torch.stack([term(t) for term in TERMS], -1)
    scale = basis.norm(dim=0)  # or the powers would drown the rest
    solved = torch.linalg.lstsq((basis / scale).expand(len(rest), -1, -1), rest[..., None]).solution[..., 0] / scale
    return torch.cat([exact, solved.float().double() @ basis.T], -1)


def losses(teacher, student) -> list[dict]:
    """Of float32 logits (rows, V) of both: what each format at each k makes of the loss and its gradient."""
    import torch

    from mohawk.teacher_cache.layout import decode_logprobs, encode_logprobs

    lp, lq = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    q, exact_gradient = lq.exp(), lq.exp() - lp.exp()
    dense = (lp.exp() * (lp - lq)).sum(-1)

    def coded(x):
        return torch.from_numpy(decode_logprobs(encode_logprobs(x.float()).numpy())).double()

    def bucketed(values, tail, ids):
        """KL over k + 1 buckets and its gradient, the teacher's mass made 1."""
        p = torch.cat([values, tail], -1).log_softmax(-1).exp()
        others = lq.scatter(-1, ids, -torch.inf)
        rest = others.logsumexp(-1, keepdim=True)
        mine = torch.cat([lq.gather(-1, ids), rest], -1)
        kl = (p * (p.log().nan_to_num(neginf=0.0) - mine)).sum(-1)
        gradient = q - p[:, -1:] * (others - rest).exp()
        return kl, gradient.scatter_add(-1, ids, -p[:, :-1])

    def row(name, k, kl, reference, gradient, size):
        error = (kl - reference).abs()
        return {
            "format": name, "k": k, "bytes_per_token": size, "loss_error_mean": error.mean().item(),
            "loss_error_max": error.max().item(), "kl": kl.mean().item(), "dense_kl": dense.mean().item(),
            "gradient_error": ((gradient - exact_gradient).norm() / exact_gradient.norm()).item(),
            "mean_gradient_error": ((gradient - exact_gradient).mean(0).norm() / exact_gradient.mean(0).norm()).item(),
        }  # fmt: skip

    rows, vocab = [], lp.shape[1]
    for k in KS:
        values, ids = lp.topk(k)
        tail = lp.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        reference, _ = bucketed(values, tail, ids)
        kl, gradient = bucketed(coded(values), coded(tail), ids)
        rows.append(row("mohawk", k, kl, reference, gradient, ours_bytes(k, vocab)))
        half = values.half().double()
        kl, gradient = bucketed(half, (1 - half.exp().sum(-1, keepdim=True)).clamp_min(1e-8).log(), ids)
        size = zstd(megatron_tensors(values, ids)) / len(lp)
        rows.append(row("Megatron-LM", k, kl, reference, gradient, size))
        # DistillKit's default takes what is missing for 0: sum over k of p (log p - log q), the mass not made 1
        p = polynomial(values).exp()
        kl = (p * (p.log() - lq.gather(-1, ids))).sum(-1)
        exact = (values.exp() * (values - lq.gather(-1, ids))).sum(-1)
        gradient = (q * p.sum(-1, keepdim=True)).scatter_add(-1, ids, -p)
        rows.append(row("DistillKit, zero", k, kl, exact, gradient, distillkit_bytes(k, vocab)))
        # symmetric_uniform: what is missing is one bucket
        tail = (1 - p.sum(-1, keepdim=True).clamp(1e-8, 1 - 1e-8)).log()
        kl, gradient = bucketed(p.log(), tail, ids)
        rows.append(row("DistillKit, uniform", k, kl, reference, gradient, distillkit_bytes(k, vocab)))
    generator = torch.Generator().manual_seed(0)
    for draws in (12, 50):
        ids = torch.multinomial(lp.exp(), draws, replacement=True, generator=generator)
        gradient = q.scatter_add(-1, ids, torch.full(ids.shape, -1 / draws, dtype=torch.float64))
        size = ours_bytes(draws, vocab, kind="samples")
        rows.append(row("mohawk, samples", draws, dense, dense, gradient, size))
    return rows


def logits_pair(teacher, dataset, count: int):
    """Logits of the teacher and of itself with noise, on the first rows of the data, (positions, V)."""
    import torch

    batch = torch.stack([dataset[i]["input_ids"] for i in range(count)])
    positions = torch.stack([dataset[i]["position_ids"] for i in range(count)])
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        if parameter.dim() == 2:
            noise = torch.randn(parameter.shape, generator=generator) * parameter.std()
            parameter.data += 0.08 * noise
    with torch.inference_mode():
        return [model(batch, position_ids=positions).logits.flatten(0, 1)[::4] for model in (teacher, student)]


def seconds(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def written_and_read(teacher, dataset, rows: int, batch_size: int, autocast, folder: Path) -> list[dict]:
    """Tokens/s of each kind; read twice in random order, the second time counts."""
    import torch

    from mohawk.losses.heads import final_hidden_states
    from mohawk.teacher_cache.reader import CachedRows, TeacherCache
    from mohawk.teacher_cache.writer import write_cache

    tokens = rows * dataset.sequence_length

    @torch.no_grad()
    def alone():
        for start in range(0, rows, batch_size):
            given = [dataset[i] for i in range(start, min(start + batch_size, rows))]
            names = ("input_ids", "position_ids")
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                final_hidden_states(teacher, {name: torch.stack([row[name] for row in given]) for name in names})

    alone()  # warm
    found = [{"kind": "teacher alone", "written_tokens_per_s": tokens / seconds(alone)}]
    for kind, given in (("top-k", {"k": 64}), ("samples", {"draws": 12}), ("hidden", {})):
        options = {"kind": kind, "rows": rows, "batch_size": batch_size, "autocast": autocast, **given}
        took = seconds(lambda options=options, kind=kind: write_cache(folder / kind, teacher, dataset, **options))
        cache = TeacherCache(folder / kind)
        with_text = CachedRows(dataset, cache)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()

        def read(with_text=with_text, order=order):
            for index in order:
                with_text[index]

        read()
        found.append({
            "kind": kind, **given, "bytes_per_token": cache.bytes_per_token, "written_tokens_per_s": tokens / took,
            "read_tokens_per_s": tokens / seconds(read), "megabytes": rows * cache.layout.row.itemsize / 1e6,
        })  # fmt: skip
    return found


def half_depth(teacher):
    """Every second layer of a Llama-shaped model, trainable."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = (teacher.config.num_hidden_layers + 1) // 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[::2]
    student = type(teacher)(config)
    state = teacher.state_dict()
    kept = {}
    for name in student.state_dict():
        parts = name.split(".")
        source = name
        if parts[:2] == ["model", "layers"]:
            source = ".".join([*parts[:2], str(2 * int(parts[2])), *parts[3:]])
        kept[name] = state[source].clone()
    student.load_state_dict(kept)
    return student.float().train()


def steps(teacher, dataset, folder: Path, batch_size: int, count: int, autocast) -> list[dict]:
    """Milliseconds of training steps that take turns: the same rows, with the teacher online or from a cache."""
    import torch
    import torch.nn.functional as F

    from mohawk.data.packing import collate
    from mohawk.kernels.kd.interface import linear_kd_loss
    from mohawk.losses.heads import Head, final_hidden_states
    from mohawk.teacher_cache.reader import CachedRows, TeacherCache

    student = half_depth(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    caches = {kind: TeacherCache(folder / kind) for kind in ("top-k", "samples", "hidden")}
    data = {"online": dataset, **{kind: CachedRows(dataset, cache) for kind, cache in caches.items()}}
    times, found = {name: [] for name in data}, {name: [] for name in data}

    def step(name: str, first: int) -> None:
        begin = time.perf_counter()
        batch = collate([data[name][(first + i) % len(data["top-k"])] for i in range(batch_size)])
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            if name == "online":
                with torch.no_grad():
                    source = Head.of(teacher).teacher(final_hidden_states(teacher, inputs))
            else:
                source = caches[name].teacher(batch)
            head = Head.of(student)
            loss = linear_kd_loss(teacher=source, labels=labels, **head.student(final_hidden_states(student, inputs)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times[name].append(1000 * (time.perf_counter() - begin))
        found[name].append(loss.item())

    for number in range(count + 1):
        for name in data:
            step(name, number * batch_size)
    table = []
    for name, taken in times.items():
        lower, median, upper = statistics.quantiles(taken[1:], n=4)
        online = statistics.median(times["online"][1:])
        table.append({
            "teacher": name, "ms": median, "ms_quartiles": [lower, upper], "saved": 1 - median / online,
            "loss_of_first_step": found[name][0], "losses": found[name],
        })  # fmt: skip
    return table


def tables(result: dict) -> list[str]:
    lines = [
        "Bytes per token:", "",
        "| k | vocabulary | mohawk | DistillKit | Megatron-LM, zstd | Megatron-LM |", "|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for r in result["bytes"]:
        cells = [
            f"{r[name]:.0f}" if r[name] is not None else "-" for name in ("distillkit", "megatron_zstd", "megatron")
        ]
        lines.append(f"| {r['k']} | {r['vocab']:,} | {r['mohawk']:.1f} | {' | '.join(cells)} |")
    lines += ["", "What is lost. The loss is compared with that of the same k unrounded. The gradient is compared with "
              "the dense teacher's, first token by token and then as a mean over tokens: in the mean the noise of "
              "samples goes away and a bias does not.", "",
              "| k or draws | format | bytes per token | loss, mean error | loss, largest | gradient | mean gradient |",
              "|---:|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for r in result["losses"]:
        drawn = "samples" in r["format"]
        error = ["-", "-"] if drawn else [f"{r['loss_error_mean']:.1e}", f"{r['loss_error_max']:.1e}"]
        size = f"{r['bytes_per_token']:.0f}"
        gradients = [f"{100 * r[name]:.2g} %" for name in ("gradient_error", "mean_gradient_error")]
        lines.append(f"| {r['k']} | {r['format']} | {size} | {' | '.join([*error, *gradients])} |")
    lines += ["", "Speed:", "", "| | bytes per token | tokens/s written | tokens/s read |", "|---|---:|---:|---:|"]
    for r in result["speed"]:
        read = f"{r['read_tokens_per_s']:,.0f}" if "read_tokens_per_s" in r else "-"
        size = f"{r['bytes_per_token']:.0f}" if "bytes_per_token" in r else "-"
        lines.append(f"| {r['kind']} | {size} | {r['written_tokens_per_s']:,.0f} | {read} |")
    lines += ["", "A training step of the half-depth student:", "",
              "| teacher | ms, median | quartiles | saved |", "|---|---:|---:|---:|"]  # fmt: skip
    for r in result["steps"]:
        quartiles = " to ".join(f"{ms:,.0f}" for ms in r["ms_quartiles"])
        saved = f"{100 * r['saved']:.0f} %" if r["teacher"] != "online" else "-"
        lines.append(f"| {r['teacher']} | {r['ms']:,.0f} | {quartiles} | {saved} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="of 512 tokens, written and read")
    parser.add_argument("--steps", type=int, default=9, help="timed training steps of each kind")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table and its JSON")
    options = parser.parse_args()
    if options.steps < 2 or options.rows < options.batch_size:
        parser.error("--steps of at least 2 have quartiles, and --rows of at least --batch-size make a batch")
    import torch

    from mohawk.core.devices import machine
    from mohawk.core.precision import autocast_dtype
    from mohawk.data.packing import PackedDataset, load_data
    from mohawk.demo import fetch
    from mohawk.loading.models import load_teacher, load_tokenizer

    if options.threads:
        torch.set_num_threads(options.threads)
    teacher = load_teacher(fetch.smollm2())
    sources = [{"source": str(path)} for path in fetch.proceedings()]
    data = load_data(sources, load_tokenizer(fetch.smollm2()), validation_share=0)
    dataset = PackedDataset(data.train, 512, seed=0)
    rows, autocast = min(options.rows, len(dataset)), autocast_dtype("auto", torch.device("cpu"))
    pair = logits_pair(teacher, dataset, 4)
    result = {"sources": SOURCES, "losses": losses(*pair), "bytes": []}
    measured = {r["k"]: r["bytes_per_token"] for r in result["losses"] if r["format"] == "Megatron-LM"}
    del pair
    for vocab in VOCABULARIES:
        for k in KS:
            fits = vocab <= 1 << 17  # Megatron-LM refuses more
            result["bytes"].append({
                "k": k, "vocab": vocab, "mohawk": ours_bytes(k, vocab), "distillkit": distillkit_bytes(k, vocab),
                "megatron": 5 * k if fits else None, "megatron_zstd": measured[k] if vocab == 49152 else None,
            })  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        result["speed"] = written_and_read(teacher, dataset, rows, options.batch_size, autocast, Path(folder))
        result["steps"] = steps(teacher, dataset, Path(folder), options.batch_size, options.steps, autocast)
    result["about"] = {
        "machine": machine(torch.device("cpu")), "threads": torch.get_num_threads(), "rows": rows,
        "batch_size": options.batch_size, "autocast": str(autocast), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    lines = tables(result)
    print("\n".join(lines))
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "cache.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.results / "cache.md").write_text("\n".join(lines) + "\n")
    if options.results == RESULTS:
        told = made_by(result["about"]["machine"], "models/cache.py")
        put_in_docs("cache", [*lines, "", told])


if __name__ == "__main__":
    main()
