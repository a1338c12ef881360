"""Writes what the documentation takes from elsewhere: tables from benchmarks/results/, the reference of recipes from
their schema, that of commands from the command line's grammar, that of Python from docstrings.

    python docs/generate.py            # write the files
    python docs/generate.py --check    # exit with 1, naming them, if files are not as they would be written

The files are checked in, so that they read well where nothing builds them.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

MARK = re.compile(r"(<!-- benchmark: (\S+) -->\n).*?(<!-- end -->)", re.S)
IMAGE = re.compile(r"(!\[[^]]*\]\()([\w.-]+\.png\))")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something would change")
    check = parser.parse_args().check
    changed = [path for path, text in generated().items() if not path.exists() or path.read_text("utf-8") != text]
    for path in changed:
        print(f"{path.relative_to(ROOT)}: {'is not as docs/generate.py writes it' if check else 'written'}")
        if not check:
            path.write_text(generated()[path], encoding="utf-8")
    return 1 if check and changed else 0


def generated() -> dict[Path, str]:
    """The text that each page with generated parts should have."""
    return with_tables() | {
        DOCS / "recipes.md": recipes(),
        DOCS / "commands.md": commands(),
        DOCS / "python.md": python(),
    }


# --- tables of benchmarks ---------------------------------------------------------------------------------------------


def with_tables() -> dict[Path, str]:
    """Pages with marks `<!-- benchmark: NAME -->`, filled from benchmarks/results/NAME.md."""
    pages = {}
    for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        if MARK.search(text):
            pages[page] = MARK.sub(lambda found, page=page: found[1] + table(found[2], page) + found[3], text)
    return pages


def table(name: str, page: Path) -> str:
    """A result's text, with its images found from the page."""
    if name == "summary":
        return "\n".join(summary()) + "\n"
    place = "benchmarks/results/" if page.parent == ROOT else "../benchmarks/results/"
    return IMAGE.sub(rf"\g<1>{place}\g<2>", (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip() + "\n")


def summary() -> list[str]:
    """The README's one table: a line for each thing that was measured, from the results' figures."""
    demo, decode = (json.loads((RESULTS / f"{name}.json").read_text("utf-8")) for name in ("demo", "decode"))
    found, seconds = demo["evaluation"]["end_to_end"], sum(phase["seconds"] for phase in demo["phases"].values())
    tokens = sum(phase["tokens"] for phase in demo["phases"].values())
    told = [f"{found[text]['perplexity_ratio']:.2f} x" for text in ("held_out", "evaluation")]
    kl = [f"{found[text]['kl']:.2f}" for text in ("held_out", "evaluation")]
    last = {model["model"]: model["rows"][-1] for model in decode["models"]}
    context = f"{last['teacher']['context']:,}"
    state = [f"{last[model]['state_bytes'] / 2**20:,.0f}" for model in ("teacher", "hybrid", "pure")]
    speed = [f"{last[model]['ms_per_token']:.0f}" for model in ("teacher", "hybrid", "pure")]
    listed = json.loads((RESULTS / "layer_choice.json").read_text("utf-8"))["rows"]
    recalled = {row["choice"]: row["recall"]["accuracy"] for row in listed if len(row["attention"]) in (15, 30)}

    def kernel(file: str, table: str, *names: str) -> list[dict]:
        rows = json.loads((RESULTS / f"{file}-cpu.json").read_text("utf-8"))["rows"]
        return [next(row for row in rows if row["table"].startswith(table) and row["name"] == name) for name in names]

    loss = kernel("kd_loss", "float32, from hidden", "mohawk forward KL", "eager forward KL", "torchtune forward KL")
    distance = kernel("mixing_distance", "batch 1", "mohawk, n 2048", "eager, n 2048")
    scan = kernel("ssd", "float32", "mohawk", "transformers, Bamba in torch")

    def cost(row: dict) -> str:
        return f"{row['seconds']:.2g} s, {row['mib']:,.0f} MiB"

    return [
        "| measured | mohawk | beside it |",
        "|---|---|---|",
        f"| **quality**: SmolLM2-135M, 15 of 30 attention layers converted, {tokens:,} tokens, {seconds / 60:.0f} "
        f"minutes of training (`make demo`) | perplexity {told[0]} the teacher's on held-out text, {told[1]} on text "
        f"of another source; KL {kl[0]} and {kl[1]} nats | before training: "
        f"{demo['evaluation']['before']['held_out']['perplexity_ratio']:.2f} x and "
        f"{demo['evaluation']['before']['evaluation']['perplexity_ratio']:.2f} x |",
        f"| **looking things up**: 15 of 30 layers chosen by KL, before phase 3 | {recalled['kl']:.0%} of "
        f"{listed[0]['recall']['values']} values recalled from lists | teacher: {recalled['teacher']:.0%} |",
        f"| **state** of one sequence of {context} tokens | {state[1]} MiB with 15 attention layers, {state[2]} MiB "
        f"with none | teacher: {state[0]} MiB |",
        f"| **decoding** a token after {context} | {speed[1]} ms with 15 attention layers, {speed[2]} ms with none "
        f"| teacher: {speed[0]} ms |",
        f"| **distillation loss** from hidden states, vocabulary 49,152, 1,024 rows, with gradients | {cost(loss[0])} "
        f"| eager: {cost(loss[1])}; torchtune: {cost(loss[2])} |",
        f"| **mixing distance**, 8 heads, 2,048 tokens, with gradients | {cost(distance[0])} "
        f"| both matrices built: {cost(distance[1])} |",
        f"| **state-space scan**, 2 x 2,048 tokens, 24 heads, with gradients | {cost(scan[0])} "
        f"| transformers: {cost(scan[1])} |",
        "",
        f"On {', '.join(dict.fromkeys(cpu(each) for each in (demo['machine'], decode['about']['machine'])))} with 2 "
        "cores. Kernels in float32: CPU seconds, peak memory. The demo is one run; students that decode are untrained.",
    ]


def cpu(machine: dict) -> str:
    """The processor's name."""
    return machine["devices"][0].removeprefix("cpu: ").partition(";")[0]


# --- recipes ----------------------------------------------------------------------------------------------------------

RECIPES_HEAD = """\
# Recipes

<!-- Written by docs/generate.py from the schema; edit the fields' descriptions there. -->

A recipe is one YAML file that decides everything about a run. It is checked before anything is loaded: unknown fields,
wrong types, values out of range and contradictions are all reported at once, each with its line.

- Every field can be set on the command line: `--set phases.hidden.tokens=2e6`, `--set data.train.0.source=books.txt`.
- `teacher: path` is short for `teacher: {model: path}`; a text in `data.train` may be a path alone.
- It is YAML 1.2: `1e-4` is a number and `no` is a text. Whole numbers may be written `2e6`.
- Paths may begin with `~`, the home folder.
- "as there" means: the defaults of the table that the link leads to.

`mohawk recipes` lists the recipes that come along:

"""
TITLES = {"Ramp": "A number that changes over a stage"}  # of sections that stand in many places


def recipes() -> str:
    """The reference of all recipe fields."""
    from mohawk.conversion.recipe import Recipe
    from mohawk.distillation.recipe import DistillRecipe
    from mohawk.pruning.recipe import PruneRecipe
    from mohawk.schema.base import Phase
    from mohawk.schema.files import shipped, shipped_names
    from mohawk.schema.kinds import kind_of

    kinds = {
        Recipe: ("A conversion", "conversion", "mohawk convert"),
        DistillRecipe: ("A distillation", "distillation", "mohawk distill"),
        PruneRecipe: ("A pruning", "pruning", "mohawk prune"),
    }
    lines = [RECIPES_HEAD + "| recipe | command | what it is |", "|---|---|---|"]
    for name in shipped_names():
        first = shipped(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        lines.append(f"| `{name}` | `{kinds[kind_of(shipped(name))][2]}` | {first} |")
    seen: dict[type, str] = {Phase: "What all phases and stages share"}
    lines += ["", f"## {seen[Phase]}"]
    sections(Phase, "", "", seen, lines)
    for schema, (title, kind, command) in kinds.items():
        lines += ["", f"## {title}", "", f"Run by `{command}`."]
        sections(schema, "", kind, seen, lines)
    return "\n".join(lines) + "\n"


def sections(schema: type, at: str, kind: str, seen: dict[type, str], lines: list[str]) -> None:
    """A section's table, then those of the sections inside it that were not written yet."""
    inside = []
    base = schema.__mro__[1]
    if base in seen:
        lines += ["", f"All fields of [{seen[base]}](#{slug(seen[base])}), and:"]
    lines += ["", "| field | what | allowed | default |", "|---|---|---|---|"]
    for name, field in schema.model_fields.items():
        if base in seen and same_field(field, base.model_fields.get(name)):
            continue
        sub = next((part for part in parts(field.annotation) if is_section(part)), None)
        path = f"{at}.{name}" if at else name
        allowed = allowed_words(field)
        if sub is not None:
            if sub not in seen:
                seen[sub] = TITLES.get(sub.__name__, f"`{path}` of a {kind}")
                inside.append((sub, path))
            # a union's other members, such as the number that a ramp may replace
            others = [allowed_of(part) for part in typing.get_args(field.annotation) if part_of_union(part)]
            link = f"[{seen[sub]}](#{slug(seen[sub])})"
            many = typing.get_origin(next(iter(plain(field.annotation)))) is list
            allowed = ", or ".join([*others, f"a list of {link}" if many else link])
        cells = (f"`{name}`", field.description or "", allowed, default_of(field, sub))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for sub, path in inside:
        lines += ["", f"### {seen[sub]}"]
        sections(sub, path, kind, seen, lines)


def same_field(one: Any, other: Any) -> bool:
    keys = ("annotation", "default", "description", "metadata")
    return other is not None and all(getattr(one, key) == getattr(other, key) for key in keys)


def parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in typing.get_args(annotation):
        if not isinstance(part, str):
            yield from parts(part)


def plain(annotation: Any) -> list[Any]:
    """Members of a union, None left out."""
    if typing.get_origin(annotation) is Annotated:
        return plain(typing.get_args(annotation)[0])
    members = typing.get_args(annotation) if "Union" in str(typing.get_origin(annotation)) else (annotation,)
    return [member for member in members if member is not type(None)]


def is_section(annotation: Any) -> bool:
    from pydantic import BaseModel

    return isinstance(annotation, type) and typing.get_origin(annotation) is None and issubclass(annotation, BaseModel)


def part_of_union(part: Any) -> bool:
    return part is not type(None) and not isinstance(part, str) and not any(is_section(each) for each in parts(part))


def allowed_words(field: Any) -> str:
    """What a field admits, in the words of its error message."""
    annotation = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return allowed_of(annotation)


def allowed_of(annotation: Any) -> str:
    """A validator's own words where it refuses what is none of them, else the type's and the bounds'."""
    from mohawk.schema.check import _allowed

    null = any(part is type(None) for part in typing.get_args(annotation)[:2] + typing.get_args(annotation)[-1:])
    for part in parts(annotation):
        for extra in getattr(part, "__metadata__", ()):
            try:
                getattr(extra, "func", lambda value: value)(object())
            except ValueError as error:
                return str(error) + ", or null" * null
            except TypeError:
                continue
    words = re.sub(r", at most (1e\+?18|10{6,}(\.0)?|1048576|16777216)\b", "", _allowed(annotation))  # against slips
    return words.replace("4294967296", "2^32").replace("text, not empty", "text").replace(" or null", ", or null")


def default_of(field: Any, sub: Any) -> str:
    from pydantic_core import PydanticUndefined

    value = field.default
    if value is PydanticUndefined:
        return "required"
    if is_section(type(value)):
        return "as there"
    if value is None or isinstance(value, bool):
        return f"`{json.dumps(value)}`"
    if isinstance(value, int) and value >= 1_000_000:
        return f"`{value:,}`"
    if isinstance(value, (list, tuple)):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# --- commands ---------------------------------------------------------------------------------------------------------

COMMANDS_HEAD = """\
# Commands

<!-- Written by docs/generate.py from the commands in mohawk/*/commands.py. -->

`mohawk COMMAND --help` prints the same. `python -m mohawk` is `mohawk`. Exit codes and environment variables are under
[Many GPUs, clusters and interruptions](distributed.md#exit-codes).

| command | what it does |
|---|---|
"""


def commands() -> str:
    """The reference of the command line."""
    from mohawk.cli import parser

    top = parser()
    subs = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    lines = [COMMANDS_HEAD.rstrip("\n")]
    for name, sub in subs.choices.items():
        lines.append(f"| [`mohawk {name}`](#mohawk-{name}) | {cell(sub.description)} |")
    for name, sub in subs.choices.items():
        lines += ["", f"## mohawk {name}", "", sentence(sub.description), "", "```text", usage(name, sub), "```"]
        groups: dict[str, list[argparse.Action]] = {}
        for group in sub._action_groups:
            title = "" if group.title in ("positional arguments", "options", "optional arguments") else group.title
            rows = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
            groups.setdefault(title, []).extend(rows)
        for title, rows in groups.items():
            if rows:
                lines += ["", f"**{title[0].upper()}{title[1:]}**"] if title else []
                lines += ["", "| argument | meaning |", "|---|---|"]
                lines += [f"| {argument(action)} | {cell(helped(action))} |" for action in rows]
    return "\n".join(lines) + "\n"


def usage(name: str, sub: argparse.ArgumentParser) -> str:
    """One line: positional arguments, what is required, and that there are options."""
    words = [f"mohawk {name}"]
    options = False
    for action in sub._actions:
        if not action.option_strings:
            many = " ..." if action.nargs == "+" else ""
            words.append(f"[{action.metavar}]" if action.nargs == "?" else f"{action.metavar}{many}")
        elif action.required:
            words.append(f"{action.option_strings[-1]} {metavar(action)}")
        elif not isinstance(action, argparse._HelpAction):
            options = True
    return " ".join(words + ["[OPTIONS]"] * options)


def argument(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar}`"
    return f"`{' '.join([action.option_strings[-1], *filter(None, [metavar(action)])])}`"


def metavar(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    name = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper())
    return f"{name} ..." if action.nargs == "+" else name


def helped(action: argparse.Action) -> str:
    text = (action.help or "").replace("%%", "%")
    shown = action.default not in (None, False, argparse.SUPPRESS) and action.default != []
    return f"{text}{'; ' * bool(text)}default: {action.default}" if shown and "default" not in text else text


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("{", "\\{").replace("*", "\\*")


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


# --- Python -----------------------------------------------------------------------------------------------------------

PYTHON_HEAD = """\
# Python

<!-- Written by docs/generate.py from signatures and docstrings. -->

These names are public: `from mohawk import kd_loss`. They are imported when they are first used, so `import mohawk` is
quick, and the losses and kernels need torch alone. Other modules may move from one version to the next.
"""
GROUPS = {
    "Losses": [
        "kd_loss", "linear_kd_loss", "Head", "TeacherLogits", "TeacherHidden", "TeacherTopK", "TeacherSamples",
        "TeacherMixture", "TeacherTAID", "TAIDSchedule",
    ],
    "Distilling": [
        "KnowledgeDistiller", "DistillationTrainer", "HiddenMatch", "layer_map", "match_hidden", "AttentionMatch",
        "match_attention", "OnPolicy", "RationaleDistiller", "TeacherCache", "CachedRows",
    ],
    "Kernels": [
        "AttentionMixing", "SSDMixing", "DeltaMixing", "mixing_matrix", "mixing_distance", "ssd", "ssd_step",
        "gated_delta_rule", "gated_delta_step", "causal_conv1d",
    ],
    "Models": [
        "hybrid_from_teacher", "HybridConfig", "HybridForCausalLM", "Mamba2Mixer", "DiscreteMamba2Mixer", "to_bamba",
        "from_bamba", "load_released", "to_released", "save_released",
    ],
    "Runs": ["Recipe", "convert", "DistillRecipe", "distill", "PruneRecipe", "prune"],
    "The three phases": ["MixingObjective", "HiddenObjective", "EndToEndObjective", "next_labels"],
    "Pruning": [
        "MinitronPruner", "measure_importance", "Importance", "Cut", "cut", "keep_layers", "trim_vocabulary",
    ],
}  # fmt: skip


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
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        return [ast.unparse(field) for field in fields]
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


if __name__ == "__main__":
    raise SystemExit(main())
