"""What ONNX graphs answer to fixed inputs: run in a process of its own, which has onnxruntime and neither torch nor
this package, since whoever uses the graphs will not have them."""

import sys
from pathlib import Path


class _Absent:
    """An import finder that makes packages look uninstalled."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mohawk", "torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(folder: str, inputs: str, answers: str) -> None:
    """Answers `inputs` (as `parity_probe.probe` is asked) and writes what that returns of them to `answers`."""
    sys.meta_path.insert(0, _Absent())
    import numpy as np
    import onnxruntime
    from safetensors.numpy import load_file, save_file

    asked = load_file(inputs)
    sessions = {}
    for path in Path(folder).glob("*.onnx"):
        sessions[path.name] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    several = sessions["model.onnx"]
    one = sessions.get("step.onnx", several)
    names = [each.name for each in several.get_inputs()][3:]

    def empty(rows):
        """Zeros: of no token where a dimension has only a name, but for the batch's."""
        return {
            each.name: np.zeros([rows, *(0 if isinstance(size, str) else size for size in each.shape[1:])], np.float32)
            for each in several.get_inputs()[3:]
        }

    def run(ids, mask, cache, kept=0):
        session = one if ids.shape[1] == 1 else several
        given = {"input_ids": ids, "attention_mask": mask, "num_logits_to_keep": np.array(kept)}
        logits, *cached = session.run(None, given | cache)
        return logits, dict(zip(names, cached, strict=True))

    def pieces(ids, mask, lengths):
        cache, logits, start = empty(len(ids)), [], 0
        for length in lengths:
            part, cache = run(ids[:, start : start + length], mask[:, : start + length], cache)
            logits.append(part)
            start += length
        return np.concatenate(logits, 1)

    def greedy(name, ids, mask, new):
        cache, chosen, tokens = empty(len(ids)), [], []
        for _ in range(new):
            logits, cache = run(ids, mask, cache, 1)
            chosen.append(logits[:, 0])
            ids = logits[:, 0].argmax(-1)[:, None]
            tokens.append(ids)
            mask = np.concatenate([mask, np.ones_like(ids)], 1)
        return {name: np.concatenate(tokens, 1), f"{name}_logits": np.stack(chosen, 1)}

    batch, mask, new, prefill = asked["batch"], asked["mask"], int(asked["new"]), int(asked["prefill"])
    every, rest = np.ones_like(mask), batch.shape[1] - prefill
    found = {
        "full": run(asked["long"], np.ones_like(asked["long"]), empty(len(asked["long"])))[0],
        "steps": pieces(batch, every, [prefill, *[1] * rest]),
        "padded": pieces(batch, mask, [prefill, *[1] * rest]),
        **greedy("tokens", batch[:1], every[:1], new),
        **greedy("padded_tokens", batch, mask, new),
    }
    whole = run(batch, every, empty(len(batch)))[0]
    for path, lengths in {"steps": [prefill, *[1] * rest], "chunks": [1, 7, 2, batch.shape[1] - 10]}.items():
        off = np.abs(pieces(batch, every, lengths) - whole).max() / np.abs(whole).max()
        found[f"itself_{path}"] = np.array(off, np.float32)
    save_file({key: np.ascontiguousarray(value) for key, value in found.items()}, answers)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        import traceback

        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
