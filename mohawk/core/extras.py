"""Which packages come with which extra of the installation, and the one line that names those that are missing."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from importlib.util import find_spec

from mohawk.errors import UserError

# What of each extra of pyproject.toml is imported here, by its name there; some of "convert" comes with the others.
EXTRAS = {
    "convert": (
        "accelerate", "datasets", "einops", "gguf", "huggingface_hub", "jinja2", "matplotlib", "numpy", "safetensors",
        "tokenizers", "tqdm", "transformers",
    ),
    "eval": ("lm_eval", "rouge_score", "sacrebleu"),
    "lora": ("peft",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "quantize": ("torchao",),
    "triton": ("triton",),
}  # fmt: skip
WITH = dict.fromkeys(("eval", "lora", "onnx", "quantize"), "convert")  # extras that contain another one
BASE = ("torch", "pydantic", "rich", "ruamel")  # what every installation has


def need(extra: str, what: str) -> None:
    """UserError with all packages of an extra that are not installed; `what` needs them, such as "`mohawk demo`"."""
    if set(missing := _missing(extra)) - {"gguf"}:  # which only models in that format need, and ask for themselves
        raise UserError(_line(what, missing, extra))


def explain(error: ImportError, what: str) -> str | None:
    """The line for an import that failed in `what`: all that its extra would bring, not this package alone.

    None where neither a package of an extra is missing nor one that such a package imports: then it is a mistake of our
    own, or of code that the user brought.
    """
    names, involved = set(), set()  # roots: of what was imported, and of the modules that were in the midst of it
    link: BaseException | None = error
    while link is not None:  # transformers puts an error of its own in front of what failed
        if isinstance(link, ModuleNotFoundError):
            names.add((link.name or "").partition(".")[0])
        for frame, _ in traceback.walk_tb(link.__traceback__):
            involved.add(frame.f_globals.get("__name__", "").partition(".")[0])
        link = link.__cause__
    names = {name for name in names if name and not _installed(name)}
    if base := names.intersection(BASE):
        return _line(what, base, None)
    for extra in reversed(EXTRAS):  # "convert" last: packages of the others import its own
        if (names | involved).isdisjoint(EXTRAS[extra]):
            continue
        if missing := names.union(_missing(extra)):
            return _line(what, missing, extra)
    return None


def _missing(extra: str) -> list[str]:
    return [name for name in EXTRAS[extra] + EXTRAS.get(WITH.get(extra, ""), ()) if not _installed(name)]


def _installed(name: str) -> bool:
    spec = find_spec(name)
    # A folder of that name in the working directory is found too, as a package that comes from nowhere; so does ruamel.
    return spec is not None and (spec.origin is not None or name == "ruamel")


def _line(what: str, missing: Iterable[str], extra: str | None) -> str:
    needs = f"{what} needs packages that are not installed ({', '.join(sorted(missing))})"
    return f"{needs}: run pip install {'.' if extra is None else repr(f'.[{extra}]')} in mohawk's checkout"
