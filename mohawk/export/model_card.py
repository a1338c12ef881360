"""README.md of an exported student: where it comes from, what was measured, how to run it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mohawk.core.hub import hub_or_cache
from mohawk.core.json_files import read_json
from mohawk.core.places import home
from mohawk.core.run_folder import RESULTS
from mohawk.errors import is_refusal
from mohawk.export.parity import Row
from mohawk.export.runtimes import Note, needed_transformers
from mohawk.loading.remote_code import LICENCE
from mohawk.runs.kept import Tabled
from mohawk.runs.tables import tables
from mohawk.schema.base import RecipeFile
from mohawk.schema.kinds import load_run_recipe

log = logging.getLogger(__name__)

UNKNOWN = "not known; check the teacher's"
ONNX = """```python
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

folder = Path("{name}")
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
several = onnxruntime.InferenceSession(folder / "model.onnx")  # reads any number of tokens
step = folder / "step.onnx"  # one token, for less; a model of attention alone has none
one = onnxruntime.InferenceSession(step) if step.exists() else several

ids = np.array([tokenizer.encode("The most important thing is").ids])
read, tokens = 0, ids
cache = {{  # zeros, and keys and values of no token; the batch is 1
    each.name: np.zeros([1, *(0 if isinstance(size, str) else size for size in each.shape[1:])], np.float32)
    for each in several.get_inputs() if each.name.startswith("past")
}}
for _ in range(50):
    read += tokens.shape[1]
    given = {{"input_ids": tokens, "attention_mask": np.ones((1, read), np.int64), "num_logits_to_keep": np.array(1)}}
    logits, *cached = (one if tokens.shape[1] == 1 else several).run(None, given | cache)
    cache = dict(zip(cache, cached))
    tokens = logits[:, -1].argmax(-1)[:, None]
    ids = np.concatenate([ids, tokens], 1)
print(tokenizer.decode(ids[0]))
```

`attention_mask` is 0 at padding, wherever that lies; `num_logits_to_keep` says of how many last tokens logits are
wanted, 0 of all."""


def model_card(
    name: str,
    config: Any,
    mixers: Sequence[str],
    run: Path | None,
    rows: Sequence[Row],
    runtimes: Sequence[Note],
    changes: Sequence[str] = (),
    file: str | None = None,
) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        name: title, and the folder in the examples.
        config: the exported model's configuration.
        mixers: names of the student's kinds of mixers.
        run: the run's folder, whose recipe and results are told; None for a student without one.
        rows: what the export doctor found.
        runtimes: where the export runs.
        changes: what the export changed about the student, a sentence each.
        file: the name of the file to run, where the folder holds one for llama.cpp or onnxruntime; config is then the
            student's.
    """
    recipe = load_run_recipe(run) if run else None
    results = read_json(run / RESULTS, Tabled) if run else None
    teacher, licence = teacher_of(config, run)
    remote = file is None and bool(getattr(config, "auto_map", None))  # its code lies beside it
    kind = Path(file).suffix[1:] if file else "custom_code" if remote else config.model_type
    methods = _labels(mixers)
    parts = [
        _front_matter(methods, teacher, licence, kind),
        f"# {name}\n\n{_sentence(config, methods, kind if file else None)}",
        "\n".join(
            f"- {line}"
            for line in (
                f"Teacher: {_public(teacher) if teacher else 'not known'}",
                f"Licence of the teacher: {licence or UNKNOWN}",
                f"Licence of the {'code beside the weights' if remote else 'package that made it'}, mohawk: {LICENCE}",
                *changes,
            )
        ),  # fmt: skip
        f"## Use\n\n{_use(name, file, remote)}{'' if file else _needs(config)}",
    ]
    if results:
        parts += [f"## {title}\n\n{_table(header, cells)}" for title, header, cells in tables(results)]
    if recipe:
        sources = [_public(source.source) for source in recipe.data.train]
        parts.append("## Data\n\nTrained on " + ", ".join(f"`{source}`" for source in sources) + ".")
        parts.append(f"## Recipe\n\n```yaml\n{_recipe(recipe)}\n```")
    cells = [[row.check, f"{row.difference:.1e}", f"{row.tolerance:.1e}", row.same] for row in rows]
    gguf = kind == "gguf"
    read = "read back" if gguf else "loaded in a fresh process without mohawk"
    header = ["check", "max difference" if gguf else "max difference of logits", "allowed", "same tokens"]
    parts.append(
        f"## Parity\n\nThis {'file' if gguf else 'folder'}, {read}, against the student it was made from, float32 on a "
        f"CPU:\n\n{_table(header, cells)}"
    )
    cells = [[note.runtime, "yes" if note.checked else "no", note.text] for note in runtimes]
    parts.append(f"## Runtimes\n\n{_table(['runtime', 'checked', 'notes'], cells, left=3)}")
    return "\n\n".join(parts) + "\n"


def teacher_of(config: Any, run: Path | None) -> tuple[str | None, str | None]:
    """The teacher of a student and the licence that its model card names, as far as they are known."""
    recipe = load_run_recipe(run) if run else None
    about = recipe.teacher if recipe else None
    teacher = (about.model if about else None) if recipe else _base_name(config)
    return teacher, licence_of(teacher, about.revision if about else None) if teacher else None


def licence_of(teacher: str, revision: str | None = None) -> str | None:
    """The licence that the teacher's own model card names, from its folder, the hub's cache or the hub; else None."""
    folder = home(teacher)
    card = (folder.parent if folder.is_file() else folder) / "README.md"
    if not folder.exists():
        from huggingface_hub import hf_hub_download

        try:
            with hub_or_cache():
                card = Path(hf_hub_download(teacher, "README.md", revision=revision))
        except (OSError, ValueError) as error:  # offline, gated, no such repository, no card
            if is_refusal(error):
                raise
            log.info("no model card of %s (%s)", teacher, type(error).__name__)
            return None
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    named = re.search(r"^licen[cs]e:\s*['\"]?([^'\"\n]+)", front.group(1), re.MULTILINE) if front else None
    return named.group(1).strip() if named else None


def _front_matter(methods: Sequence[str], teacher: str | None, licence: str | None, kind: str) -> str:
    lines = [
        f"library_name: {kind if kind in ('gguf', 'onnx') else 'transformers'}",
        "pipeline_tag: text-generation",
        f"license: {licence or 'unknown'}",
        f"tags: [{', '.join(['mohawk', *(['hybrid'] if methods else []), *map(_tag, methods), kind])}]",
    ]
    if teacher and not home(teacher).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", teacher):
        lines.append(f"base_model: {teacher}")
    return "---\n" + "\n".join(lines) + "\n---"


def _labels(mixers: Sequence[str]) -> list[str]:
    """The methods that a student's mixers are, by name."""
    from mohawk.models.mixers import MIXERS

    return list(dict.fromkeys(MIXERS[name].label for name in mixers))


def _tag(label: str) -> str:
    """As hubs write tags: mamba2, gated-deltanet."""
    return label.replace("-", "").replace(" ", "-").lower()


def _sentence(config: Any, methods: Sequence[str], kind: str | None) -> str:
    from mohawk.models.formats.stock import layer_words

    what = {"gguf": "GGUF file", "onnx": "student as ONNX graphs,", None: None}[kind] or config.architectures[0]
    if not methods:
        layers = config.num_hidden_layers
        return f"A {what} of {layers} attention layers, pruned or distilled from a Transformer with the package mohawk."
    kinds = layer_words(config)
    ssm = kinds.count("linear_attention")
    names = " and ".join(methods)
    return (
        f"A {what} of {ssm} {names} and {len(kinds) - ssm} attention layers, "
        "distilled from a Transformer by MOHAWK (https://arxiv.org/abs/2408.10189) with the package mohawk."
    )


def _example(name: str, remote: bool) -> str:
    trust = ", trust_remote_code=True" if remote else ""
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})\n'
        'inputs = tokenizer("The most important thing is", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n```"
    )


def _use(name: str, file: str | None, remote: bool) -> str:
    if file is None:
        return _example(name, remote)
    return _llama_cpp(file) if file.endswith(".gguf") else ONNX.format(name=name)


def _llama_cpp(file: str) -> str:
    lines = [f'llama-completion -m {file} -p "The most important thing is" -n 50', f"llama-server -m {file}"]
    return "```console\n" + "".join(f"$ {line}\n" for line in lines) + "```"


def _needs(config: Any) -> str:
    needed = needed_transformers(config)
    return f"\n\nNeeds transformers {needed}." if needed else ""


def _recipe(recipe: RecipeFile) -> str:
    """The student and its training; where things lay on somebody's disk is nobody's business."""
    from mohawk.schema import yaml_text

    told = recipe.model_dump(mode="json")
    places = ("teacher", "teachers", "data", "evaluation", "device", "output", "report_to")
    stages = [told.get("heal"), told.get("correct"), *told.get("stages", [])]
    for stage in filter(None, stages):  # folders
        stage |= {key: None for key in ("cache", "data", "student") if key in stage}
    return yaml_text.write({key: value for key, value in told.items() if key not in places}).strip()


def _public(source: str) -> str:
    """A hub id as it is; of a path on a disk the last two names."""
    path = Path(source)
    return "/".join(path.parts[-2:]) if path.is_absolute() or source.startswith((".", "~")) else source


def _base_name(config: Any) -> str | None:
    return getattr(getattr(config, "base_config", config), "_name_or_path", "") or None


def _table(header: list[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
