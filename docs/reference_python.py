"""The reference of Python, from signatures and docstrings."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PYTHON_HEAD = """\
# Python

<!-- Written by docs/generate.py from signatures and docstrings. -->

These names are public: `from mohawk import kd_loss`. They are imported when they are first used, so `import mohawk` is
quick, and the losses and kernels need torch alone.

Four modules keep their places as well: `mohawk.teacher_models` ([below](#teachers-to-distil-from)),
`mohawk.models.hybrid`, whose import registers students with transformers, `mohawk.next_tokens` (`next_labels`,
`next_column`, `positions`, `IGNORED`) and `mohawk.phases` (the objectives of [the three phases](#the-three-phases)).
Every other module may move from one version to the next, also where a text below names it.
"""
TEACHERS_HEAD = """\
`from mohawk.teacher_models import Ensemble`. What `KnowledgeDistiller`, `DistillationTrainer` and recipes ask while a
student trains. A teacher of your own is anything that is called as these are: `teacher(batch, watches)` gives a list of
`Answer`s, which cover the batch's rows between them.
"""
GROUPS = {
    "Losses": [
        "kd_loss", "linear_kd_loss", "Head", "TeacherLogits", "TeacherHidden", "TeacherTopK", "TeacherSamples",
        "TeacherMixture", "TeacherTAID", "TAIDSchedule",
    ],
    "Distilling": [
        "KnowledgeDistiller", "DistillationTrainer", "Ramp", "OwnLoss", "Advance", "HiddenMatch", "layer_map",
        "match_hidden", "AttentionMatch", "match_attention", "RelationMatch", "match_relations", "Matching", "OnPolicy",
        "Masking", "RationaleDistiller", "RationaleRouter", "RoutedRationales", "TeacherCache", "CachedRows",
    ],
    "Kernels": [
        "AttentionMixing", "SSDMixing", "DeltaMixing", "mixing_matrix", "mixing_distance", "ssd", "ssd_step",
        "gated_delta_rule", "gated_delta_step", "causal_conv1d",
    ],
    "Models": [
        "hybrid_from_teacher", "HybridConfig", "HybridForCausalLM", "Mamba2Mixer", "DiscreteMamba2Mixer",
        "GatedDeltaMixer", "KimiDeltaMixer", "to_bamba", "from_bamba", "to_granite", "to_qwen3_5", "write_gguf",
        "load_released", "to_released", "save_released",
    ],
    "Runs": ["Recipe", "convert", "Hardware", "DistillRecipe", "distill", "PruneRecipe", "prune"],
    "The three phases": ["MixingObjective", "HiddenObjective", "EndToEndObjective", "next_labels"],
    "Pruning": [
        "MinitronPruner", "Sizes", "measure_importance", "Importance", "Cut", "cut", "keep_layers", "trim_vocabulary",
    ],
}  # fmt: skip
TEACHERS = ["ModelTeacher", "Ensemble", "AverageTeacher", "CachedTeacher", "AlignedTeacher", "Answer"]
# What signatures name and nobody imports: it is handed out, or is a word for types that are known.
TYPES = {
    "Align": '`"spans"` or `"uld"`',
    "Answers": "texts, or their ids: a tensor (b, m) padded with -100 or the tokenizer's padding, or lists; None in a "
    "list: that row has none",
    "CausalLM": "a causal language model of transformers, or peft's model around one",
    "Confidence": '`False`, `True`, `"label"` or `"entropy"`',
    "Dense": "`TeacherLogits` or `TeacherHidden`",
    "Examples": "prompts and responses that both tokenizers have read: a recipe makes them of its pairs",
    "KDParts": "a named tuple of the loss's two terms, `kd` (with its T²) and `ce`, before their weights, detached",
    "LABEL, RATIONALE": '`"[label]"` and `"[rationale]"`',
    "LayerRecord": "what a layer was called with, as the watches of `match_attention` collect it",
    "Mixing": "`AttentionMixing`, `SSDMixing` or `DeltaMixing`",
    "Model": "any class of model: what comes back is of the class of what went in",
    "PerLayer": "`Mapping[int, Sequence[int]]`: for each layer the indices of what is kept",
    "PolicyGradient": '`"normalized"` or `"sum"`',
    "PruneStep": "a step of a pruning: `name`, `kind`, `told` (what the student then is), `round` (from 1)",
    "StateMixer": "the class that all mixers derive from",
    "TargetSection": "the sizes or the budget of a round, as under `prune` in a [recipe](recipes.md)",
    "Task": "what a model is for, as its name says it",
    "TaskName": '`"causal_lm"`, `"masked_lm"`, `"classification"` or `"seq2seq_lm"`',
    "TeacherSource": "any of the sources `Teacher...`",
    "TrimmedVocabulary": "`model`, `tokenizer` and `tokens`: the id that each token had before",
    "Watch": "a context around a model's pass that collects tensors of its layers into a dict",
}


def python() -> str:
    """The reference of the public names."""
    import mohawk

    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted(mohawk.__all__), "put every public name into a group"
    lines = [PYTHON_HEAD]
    for title, names in GROUPS.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += entry(mohawk._PUBLIC[name], name, name)
        if title == "Distilling":
            lines += ["## Teachers to distil from", "", TEACHERS_HEAD]
            for name in TEACHERS:
                module = "aligned" if name == "AlignedTeacher" else "teachers"
                lines += entry(f"mohawk.losses.{module}", name, name)
    lines += ["## Words in signatures", "", "| word | means |", "|---|---|"]
    lines += [f"| {', '.join(f'`{each}`' for each in word.split(', '))} | {means} |" for word, means in TYPES.items()]
    return "\n".join(lines).rstrip("\n") + "\n"


def entry(module: str, name: str, shown: str) -> list[str]:
    import mohawk

    tree = ast.parse(file_of(module).read_text(encoding="utf-8"))
    nodes = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    node = nodes[name]
    lines = [f"### {shown}", "", "```python", signature(node, nodes, shown), "```", ""]
    # A function's own: some list the entries of a table, which the source does not say.
    said = inspect.getdoc(getattr(mohawk, name)) if isinstance(node, ast.FunctionDef) else ast.get_docstring(node)
    lines += markdown(said or "")
    for method in methods(node):
        lines += [f"**`{method.name}`**", "", "```python", signature(method, nodes, method.name, skip=1), "```", ""]
        lines += markdown(ast.get_docstring(method))
    return lines


def file_of(module: str) -> Path:
    """mohawk.kernels.x is kernels/x.py in a checkout."""
    inside = module.split(".")[1:]
    path = ROOT.joinpath(*inside) if inside[0] in ("kernels", "models") else ROOT.joinpath("mohawk", *inside)
    return path.with_suffix(".py")


def methods(node: ast.AST) -> list[ast.FunctionDef]:
    """Public methods with a docstring of their own; a property is told by the class."""
    if not isinstance(node, ast.ClassDef):
        return []
    return [
        item
        for item in node.body
        if isinstance(item, ast.FunctionDef)
        and not item.name.startswith("_")
        and ast.get_docstring(item)
        and not any(ast.unparse(each) in ("property", "cached_property") for each in item.decorator_list)
    ]


def signature(node: ast.AST, nodes: dict[str, ast.AST], shown: str, skip: int = 0) -> str:
    """The call as one writes it, on one line if it is short."""
    returns = ""
    if isinstance(node, ast.FunctionDef):
        given = arguments(node.args, skip)
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    else:
        given = class_arguments(node, nodes)
    given, returns = [each.replace("'", '"') for each in given], returns.replace("'", '"')
    line = f"{shown}({', '.join(given)}){returns}"
    return line if len(line) <= 100 else f"{shown}(\n" + "".join(f"    {each},\n" for each in given) + f"){returns}"


def class_arguments(node: ast.ClassDef, nodes: dict[str, ast.AST]) -> list[str]:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            found = arguments(item.args, 1)
            if found != ["*args", "**kwargs"]:  # what only hands on is described by its base
                return found
    if any("dataclass" in ast.unparse(each) for each in node.decorator_list):
        by_name = any("kw_only=True" in ast.unparse(each) for each in node.decorator_list)
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        return ["*"] * by_name + [ast.unparse(field) for field in fields]
    for base in node.bases:
        if (found := nodes.get(ast.unparse(base))) is not None:
            return class_arguments(found, nodes)
    return ["..."]


def arguments(args: ast.arguments, skip: int) -> list[str]:
    """Each argument with its annotation and default, and the stars between them."""

    def one(arg: ast.arg, default: ast.AST | None) -> str:
        text = arg.arg + (f": {ast.unparse(arg.annotation)}" if arg.annotation else "")
        if default is None:
            return text
        return f"{text} = {ast.unparse(default)}" if arg.annotation else f"{text}={ast.unparse(default)}"

    positional = args.posonlyargs + args.args
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults
    found = [one(arg, default) for arg, default in zip(positional, defaults, strict=True)][skip:]
    if args.vararg:
        found.append(f"*{one(args.vararg, None)}")
    elif args.kwonlyargs:
        found.append("*")
    found += [one(arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return found + ([f"**{one(args.kwarg, None)}"] if args.kwarg else [])


def markdown(docstring: str) -> list[str]:
    """A docstring's text; what stands under `Args:` and the like becomes a list."""
    lines, section = [], False
    for line in docstring.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Yields|Attributes|Returns, raises|Divergences|Metrics):", line):
            section = True
            lines += [f"**{line[:-1]}**", ""]
        elif not section or (line and not line.startswith(" ")):
            section = False
            lines.append(escaped(line))
        elif found := re.match(r" {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*|All others):(?: (.*))?$", line):
            name = found[1] if " others" in found[1] else f"`{found[1]}`"
            lines.append(f"- {name}: {escaped(found[2] or '')}".rstrip())
        elif line.startswith(" " * 8):
            lines.append(f"  {escaped(line.strip())}")
        else:
            lines.append(escaped(line.strip()))
    return [*lines, ""]


def escaped(line: str) -> str:
    """Stars, underscores and brackets outside of code are not Markdown's."""
    pieces = line.split("`")
    pieces[::2] = [re.sub(r"([*<\[\]])|(?<=\W)_|_(?=\W)", lambda f: f"\\{f[0]}", piece) for piece in pieces[::2]]
    return "`".join(pieces)
