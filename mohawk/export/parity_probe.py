"""What a model answers to fixed inputs: run on the training student here, and on its export in a fresh process.

The fresh process gets this file and consistency.py, not this package: nothing here may import mohawk, and `mohawk` is
made impossible to import before the export is loaded, since whoever uses the export will not have it.
"""

import sys


def probe(model, inputs: dict, consistency) -> dict:
    """Logits and tokens of a causal language model along every path a user takes.

    Args:
        model: in eval mode; any transformers causal language model.
        consistency: the module of that name, however this process came by it.
        inputs: "long" (1, n) ids; "batch" (b, m) ids; "mask" (b, m), 0 where a row is padded on the left; "new", the
            number of tokens to generate; "prefill", how many of m are prefilled.

    Returns:
        float32 logits "full" (1, n, V), "steps" (b, m, V) of a prefill and single steps, "padded" (b, m, V) the same
        of the padded batch, and greedy "tokens" (1, new) and "padded_tokens" (b, new) with the logits that chose them,
        "tokens_logits" and "padded_tokens_logits" (b, new, V); and "itself_" and a path: `consistency.inconsistencies`.
    """
    import torch

    with torch.inference_mode():
        return {
            "full": model(input_ids=inputs["long"], use_cache=False).logits.float(),
            "steps": _steps(consistency, model, inputs["batch"], torch.ones_like(inputs["mask"]), inputs["prefill"]),
            "padded": _steps(consistency, model, inputs["batch"], inputs["mask"], inputs["prefill"]),
            **_generated(model, "tokens", inputs["batch"][:1], None, int(inputs["new"])),
            **_generated(model, "padded_tokens", inputs["batch"], inputs["mask"], int(inputs["new"])),
            **{
                f"itself_{path}": torch.tensor(share)
                for path, share in consistency.inconsistencies(model, inputs["batch"]).items()
            },
        }


def _steps(consistency, model, ids, mask, prefill):
    """Logits (b, m, V) of a prefill and then one token at a time, with the positions that generate() would pass."""
    import torch

    cache, logits = None, []
    bounds = [0, *range(int(prefill), ids.shape[1] + 1)]
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        part, cache = consistency.ask(model, ids[:, start:stop], mask[:, :stop], cache)
        logits.append(part.float())
    return torch.cat(logits, 1)


def _generated(model, name: str, ids, mask, new: int) -> dict:
    import torch

    out = model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, min_new_tokens=new, max_new_tokens=new,
        do_sample=False, temperature=None, top_p=None, top_k=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return {name: out.sequences[:, ids.shape[1] :], f"{name}_logits": torch.stack(out.logits, 1).float()}


class _Absent:
    """An import finder that makes a package look uninstalled."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(folder: str, inputs: str, answers: str, scratch: str, trust: str) -> None:
    """Load `folder` as a user would, answer `inputs`, save and load again, and write all of it to `answers`."""
    sys.meta_path.insert(0, _Absent("mohawk"))
    import consistency
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    def load(path):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", trust_remote_code=trust == "trust", output_loading_info=True
        )
        if wrong := {k: sorted(map(str, info[k]))[:3] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")
                     if info.get(k)}:  # fmt: skip
            raise SystemExit(f"weights do not fit the configuration: {wrong}")
        return model.eval()

    asked = load_file(inputs)
    model = load(folder)
    model.save_pretrained(scratch)
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    found = probe(model.float(), asked, consistency)
    del model
    again = load(scratch)
    kept = again.state_dict()
    same = kept.keys() == saved.keys() and all(torch.equal(kept[k], v) for k, v in saved.items())
    with torch.inference_mode():
        found["reloaded"] = again.float()(input_ids=asked["long"], use_cache=False).logits
    found["same_weights"] = torch.tensor([int(same)])
    save_file({k: v.contiguous() for k, v in found.items()}, answers)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        import traceback

        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
