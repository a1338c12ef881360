"""`mohawk inspect --matrices`: every head's mixing matrix on a text, as one picture per layer and a page of them."""

from __future__ import annotations

import html
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from mohawk.core.folders import MANIFEST, write_whole
from mohawk.core.places import home
from mohawk.core.precision import pick_device
from mohawk.core.run_folder import PLOTS, has_recipe
from mohawk.data.tokenizers.same_tokenizer import teacher_tokenizer
from mohawk.errors import UserError, is_refusal
from mohawk.inspection.plots import PANEL, HeadPicture, percent, plot_layer
from mohawk.kernels.mixing.interface import mixing_matrix
from mohawk.kernels.mixing.operands import Mixing
from mohawk.loading.configs import load_config
from mohawk.loading.describe import student_folder
from mohawk.loading.models import load_teacher
from mohawk.models.families import FAMILIES, attention_parts, decoder_layers, decoder_shape, mixer_input_norm
from mohawk.models.hybrid_config import HybridConfig
from mohawk.models.state_mixer import StateMixer
from mohawk.runs.binding import check_models
from mohawk.runs.matrices import layer_mixings
from mohawk.schema.kinds import load_run_recipe

INDEX = "index.html"
TOKENS = 256
CHARACTERS = 64  # read of the text for each token that is asked for: no usual text has longer tokens
ENTRIES = 1 << 22  # of a matrix that are whole at a time


@dataclass(frozen=True)
class _Asked:
    """Which models: what `load_config` and `load_teacher` take of the teacher, and the student's folder, if any."""

    teacher: dict[str, Any]
    dtype: str
    tokenizer: str | None
    student: str | None
    device: torch.device


@dataclass(frozen=True)
class _Layer:
    """A line of the page: of every head ‖A‖, ‖S − A‖ and `HeadPicture.rest`; a layer that is not drawn has none."""

    index: int
    mixer: str
    picture: str | None = None
    norms: tuple[float, ...] = ()
    distances: tuple[float, ...] = ()
    rests: tuple[float, ...] = ()

    @property
    def shares(self) -> list[float]:
        pairs = zip(self.distances, self.norms, strict=True)
        return [distance / norm if norm else math.nan for distance, norm in pairs]


def inspect_matrices(
    model: str | Path,
    text: str | Path,
    *,
    teacher: str | Path | None = None,
    output: Path | None = None,
    layers: Sequence[int] | None = None,
    tokens: int | None = None,
    rows: tuple[int, int] | None = None,
    console: Console | None = None,
) -> Path:
    """Draw the mixing matrices of a model on the beginning of a text; returns the page's path.

    Student and teacher get the same input in every layer, the teacher's hidden states, as in phase 1; so a layer's
    distance is its own and not its predecessors'. One head's matrix is computed at a time, in strips of rows.

    Args:
        model: a run's folder (its recipe names the teacher), a student, or a plain Transformer, which is then
            drawn alone unless `teacher` is given.
        text: a file in UTF-8, "-" for standard input.
        teacher: whom to compare with; by default the recipe's.
        output: a folder that appears whole or not at all; one of an earlier call is replaced. By default the run's
            plots/matrices, else ./matrices.
        layers: which to draw; by default all but those whose attention is the teacher's own.
        tokens: at most so many of the text; by default 256, or as many as `rows` needs.
        rows: only the rows i0 to i1 - 1 of every matrix, i1 at most `tokens`.

    Raises:
        UserError: in one line, when any of these does not fit.
    """
    console = console or Console()
    asked = _asked(model, teacher)
    teacher_config, student_config = _configs(asked)
    count = teacher_config.num_hidden_layers
    for i in layers or ():
        if not 0 <= i < count:
            raise UserError(f"--layers: got {i}; the model has layers 0 to {count - 1}")
    wanted = sorted(set(range(count) if layers is None else layers))
    target = _target(model, output)
    input_ids = _token_ids(str(text), asked, tokens, rows)
    rows = rows or (0, input_ids.shape[1])
    source = "standard input" if str(text) == "-" else Path(text).name
    part = f"rows {rows[0]} to {rows[1] - 1} of " if rows[0] else ""
    what = f"{part}the first {rows[1]} tokens of {source}"

    theirs = load_teacher(**asked.teacher, dtype=asked.dtype, device=asked.device)
    student = None if asked.student is None else load_teacher(asked.student, device=asked.device, who="student")
    try:
        with write_whole(target) as folder:
            kept = [i for i in wanted if student is not None and _same_attention(theirs, student, i)]
            drawn = wanted if layers is not None else [i for i in wanted if i not in kept]
            lines = {i: _Layer(i, _mixer(student_config, i, i in kept)) for i in wanted}
            for i, a, s in layer_mixings(theirs, student, input_ids, drawn) if drawn else ():
                heads = [head_picture(a, s, head, rows) for head in range(a.shape[1])]
                lines[i] = line = _Layer(
                    i, lines[i].mixer, f"layer_{i:02}.png", tuple(head.norm for head in heads),
                    *(((), ()) if s is None else zip(*((head.distance, head.rest) for head in heads), strict=True)),
                )  # fmt: skip
                title = f"layer {i} ({line.mixer}), {what}: {_summary(line)}"
                plot_layer(heads, title, rows, folder / str(line.picture))
                console.print(f"layer {i}: {line.mixer}, {_summary(line)}", highlight=False, markup=False)
            page = _page(list(lines.values()), asked, what, rows)
            (folder / INDEX).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: {target} cannot be written ({error.strerror or error})") from error
    console.print(f"written to {target / INDEX}", highlight=False, soft_wrap=True, markup=False)
    return target / INDEX


@torch.no_grad()
def head_picture(teacher: Mixing, student: Mixing | None, head: int, rows: tuple[int, int]) -> HeadPicture:
    """One head of the first batch row: norms of those rows of its matrices, and pictures of them.

    rows: (i0, i1); columns at and after i1, which causal rows do not see, are left out. Where more than PANEL
    positions meet a picture's side, a point is the entry of the largest size among those it stands for.
    """
    first, last = rows
    tall, broad = -(-(last - first) // PANEL), -(-last // PANEL)  # entries a point stands for
    strip = max(1, ENTRIES // (last * tall)) * tall
    squares, pictures, inner = [0.0, 0.0, 0.0], ([], [], []), 0.0
    for start in range(first, last, strip):
        end = min(start + strip, last)
        matrices = [mixing_matrix(m, (start, end), heads=[head])[0, 0, :, :last] for m in (teacher, student) if m]
        if student is not None:
            inner += (matrices[0].double() * matrices[1].double()).sum().item()
            matrices.append(matrices[1] - matrices[0])
        for k, matrix in enumerate(matrices):
            squares[k] += matrix.double().square().sum().item()
            pictures[k].append(_reduced(matrix, tall, broad))
    norms = [math.sqrt(square) for square in squares]
    ends = np.minimum(np.arange(first, last, tall) + tall, last)  # of the rows of each point
    seen = np.arange(0, last, broad) < ends[:, None]
    shown = [np.where(seen, torch.cat(strips).cpu().numpy(), np.nan) for strips in pictures if strips]
    if student is None:
        return HeadPicture(norms[0], shown[0])
    # min over c of |c S - A|^2 is |A|^2 - <S, A>^2 / |S|^2: what no scale of the student's matrix makes up for
    cosine = inner / (norms[0] * norms[1]) if norms[0] * norms[1] else 0.0
    left = 1 - cosine**2
    # below 1e-12 it is the rounding of float32 entries
    rest = (math.sqrt(left) if left > 1e-12 else 0.0) if norms[0] else math.nan
    return HeadPicture(norms[0], shown[0], norms[1], shown[1], norms[2], shown[2], rest)


def _reduced(matrix: Tensor, tall: int, broad: int) -> Tensor:
    """(r, c) -> (r / tall, c / broad), rounded up: of each block the entry farthest from 0, with its sign."""
    matrix = matrix.float()[None]
    if tall == broad == 1:
        return matrix[0]
    high, low = (F.max_pool2d(sign * matrix, (tall, broad), ceil_mode=True)[0] for sign in (1, -1))
    return torch.where(high >= low, high, -low)


def _asked(model: str | Path, teacher: str | Path | None) -> _Asked:
    folder = home(model)
    if has_recipe(folder):
        recipe = load_run_recipe(folder)
        # a run made on a GPU can be looked at without one
        own, device = recipe.teacher, pick_device("cpu" if recipe.device == "cpu" else "auto")
        if own is None:
            raise UserError(f"{model}: the run has no teacher to draw beside its student; give {folder}/student")
        if teacher is not None:
            return _Asked({"model": str(teacher)}, own.dtype, None, student_folder(folder), device)
        check_models(folder, recipe)
        return _Asked({"model": own.model, **own.where}, own.dtype, own.tokenizer, student_folder(folder), device)
    device = pick_device("auto")
    if teacher is not None:
        return _Asked({"model": str(teacher)}, "float32", None, str(model), device)
    if isinstance(_config({"model": str(model)}), HybridConfig):
        raise UserError(f"{model} is a hybrid without its run; name the model it was made from with --teacher")
    return _Asked({"model": str(model)}, "float32", None, None, device)


def _config(where: dict[str, Any]):
    return load_config(**where, who="")


def _configs(asked: _Asked):
    """The teacher's and the student's configuration, which must fit each other."""
    try:
        config = load_config(**asked.teacher)
    except UserError as error:
        hint = "" if asked.student is None else " (--teacher names another)"
        raise UserError(f"{error}{hint}") from error
    name = asked.teacher["model"]
    if config.model_type not in FAMILIES:
        what = "a hybrid" if isinstance(config, HybridConfig) else f"a {config.model_type} model"
        raise UserError(f"{name} is {what}; a teacher's matrices are drawn of {', '.join(FAMILIES)} models")
    if asked.student is None:
        return config, config
    student = _config({"model": asked.student})
    if not isinstance(student, HybridConfig) and student.model_type not in FAMILIES:
        raise UserError(f"{asked.student} is a {student.model_type} model; allowed: a hybrid or {', '.join(FAMILIES)}")
    theirs, own = _sizes(config), _sizes(student)
    if theirs != own:
        raise UserError(
            f"{asked.student} has {own}, but its teacher {name} has {theirs}; give the model it was made from"
        )
    return config, student


def _sizes(config) -> str:
    shape = decoder_shape(config)
    heads = {shape.num_heads, config.mixer_num_heads} if isinstance(config, HybridConfig) else {shape.num_heads}
    return f"{shape.num_layers} layers of width {shape.hidden_size} and {' or '.join(map(str, sorted(heads)))} heads"


def _target(model: str | Path, output: Path | None) -> Path:
    if output is None:
        folder = home(model)
        output = folder / PLOTS / "matrices" if has_recipe(folder) else Path("matrices")
    output = home(output)
    if output.is_dir() and any(output.iterdir()):
        # other folders of ours carry a manifest too, a student's for one
        try:
            files = json.loads((output / MANIFEST).read_bytes())["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            if is_refusal(error):
                raise
            files = {}
        if INDEX not in files:
            raise UserError(f"--output: {output} holds other files; choose another folder")
    elif output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file; give a folder")
    return output


def _token_ids(source: str, asked: _Asked, tokens: int | None, rows: tuple[int, int] | None) -> Tensor:
    """(1, n) ids of the text's beginning."""
    if rows is not None and not 0 <= rows[0] < rows[1]:
        raise UserError(f"--rows: got {rows[0]} {rows[1]}; allowed: two positions, the first below the second")
    if rows is not None and tokens is not None and rows[1] > tokens:
        raise UserError(f"--rows: got {rows[0]} {rows[1]}, but --tokens cuts the text to {tokens}")
    # a row sees nothing after itself, so nothing after the last row is needed
    most = rows[1] if rows is not None else tokens or TOKENS
    text = _read(source, most * CHARACTERS)
    tokenizer = teacher_tokenizer(**asked.teacher, tokenizer=asked.tokenizer)
    ids = tokenizer(text, verbose=False)["input_ids"][:most]
    if len(ids) < 2:
        raise UserError(f"--matrices: {source} is too short: got {len(ids)} of the at least 2 tokens a matrix needs")
    if rows is not None and len(ids) < rows[1]:
        raise UserError(f"--rows: got {rows[0]} {rows[1]}, but {source} has only {len(ids)} tokens")
    return torch.tensor([ids])


def _read(source: str, characters: int) -> str:
    try:
        if source == "-":
            return sys.stdin.read(characters)
        with open(home(source), encoding="utf-8-sig") as file:
            return file.read(characters)
    except UnicodeDecodeError as error:
        raise UserError(f"--matrices: {source} is not text in UTF-8 (byte {error.start}: {error.reason})") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"--matrices: {source} cannot be read ({reason}); give a text file, or - for standard input"
        ) from error


def _same_attention(teacher: nn.Module, student: nn.Module, index: int) -> bool:
    """Whether a layer of the student makes the teacher's matrix of the teacher's input: same norm, queries, keys."""
    theirs, own = decoder_layers(teacher)[index], decoder_layers(student)[index]
    if isinstance(own.self_attn, StateMixer):
        return False
    weights = [_deciding(layer) for layer in (theirs, own)]
    return weights[0].keys() == weights[1].keys() and all(
        torch.equal(value.float(), weights[1][name].float()) for name, value in weights[0].items()
    )


def _deciding(layer: Any) -> dict[str, Tensor]:
    """The weights that an attention layer's matrix depends on, by name."""
    parts = attention_parts(layer.self_attn)
    modules = {"input": mixer_input_norm(layer), "q_norm": parts.query_norm, "k_norm": parts.key_norm}
    found = {"q": parts.q.weight, "q bias": parts.q.bias, "k": parts.k.weight, "k bias": parts.k.bias}
    for where, module in modules.items():
        if module is not None:
            found.update({f"{where} {name}": value for name, value in module.state_dict().items()})
    return {name: value for name, value in found.items() if value is not None}


def _mixer(config, index: int, kept: bool) -> str:
    if isinstance(config, HybridConfig):
        if index in config.ssm_layers:
            return config.mixer_of(index)
        return "attention" if kept else "attention, trained further"
    return "attention"


def _summary(line: _Layer) -> str:
    if not line.distances:
        return f"mean ‖A‖ {np.mean(line.norms):.3g}"
    share, rest = percent(float(np.mean(line.shares))), percent(float(np.mean(line.rests)))
    return f"mean ‖S − A‖ {np.mean(line.distances):.3g}, {share} of ‖A‖; at the best scale {rest}"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }
table { border-collapse: collapse; width: 100% } td, th { padding: .2rem .7rem; text-align: right; white-space: nowrap }
th { border-bottom: 1px solid #d0d7de; font-weight: 600 } .word { text-align: left } .bar { width: 34% }
.bar div { background: #1f6feb; height: .7rem } .kept { color: #656d76 }
"""


def _page(lines: Sequence[_Layer], asked: _Asked, what: str, rows: tuple[int, int]) -> str:
    compared = asked.student is not None
    teacher = html.escape(str(asked.teacher["model"]))
    models = f"Teacher: {teacher}.<br>Student: {html.escape(str(asked.student))}." if compared else f"Model: {teacher}."
    about = [f"{models}<br>Text: {html.escape(what)}."]
    about.append(
        "Row i of a head's matrix says how much of each position j the head mixes into position i. Colour is the "
        "entry on a symmetric logarithmic scale, red above 0 and blue below, which ends at the head's largest entry"
        + (" in the teacher and is the same for its three pictures." if compared else ".")
    )
    tall, broad = -(-(rows[1] - rows[0]) // PANEL), -(-rows[1] // PANEL)
    if tall * broad > 1:
        about[-1] += f" A point is the entry of the largest size among {tall} × {broad} (rows × columns)."
    if not compared:
        even = math.sqrt(sum(1 / i for i in range(rows[0] + 1, rows[1] + 1)))
        about.append(
            f"‖A‖ is the Frobenius norm, in the table its mean over heads: {math.sqrt(rows[1] - rows[0]):.3g} where "
            f"every row attends to one position, {even:.3g} where every row is spread evenly over all it sees."
        )
    else:
        about.append(
            "Both get the teacher's hidden states as input, so a layer's distance is its own and not that of the "
            "layers before it. A is the teacher's matrix, S the student's, ‖·‖ the Frobenius norm; the table has means "
            "over heads, and ‖S − A‖ as a share of ‖A‖, which a student of zeros would have at 100%. This depends "
            "on the student's scale, which what follows the mixer can make up for: a small S leaves about 100%, "
            "whatever its shape. The share at the best scale does not: it is the least ‖c·S − A‖ / ‖A‖ over all "
            "c, √(1 − cos²) of the angle between the matrices: 0% where they are alike but for their scale, 100% where "
            "nothing is. The bars show that one."
        )
        if any(line.picture is None for line in lines):
            about.append(
                "Layers whose attention is the teacher's have its norm, queries and keys, so from the same input they "
                "make the same matrix: they are listed and not drawn (<code>--layers</code> draws them)."
            )
    values = {line.index: np.mean(line.rests if compared else line.norms) for line in lines if line.picture}
    largest = max((value for value in values.values() if math.isfinite(value)), default=0) or 1
    names = (
        ["‖S − A‖", "of ‖A‖", "least to most head", "at the best scale"] if compared else ["‖A‖", "least to most head"]
    )
    head = "".join(f"<th>{name}</th>" for name in names)
    body = []
    for line in lines:
        cells = f'<td>{line.index}</td><td class="word">{html.escape(line.mixer)}</td>'
        if line.picture is None:
            span = len(names) + 2
            body.append(f'<tr class="kept">{cells}<td colspan="{span}" class="word">the teacher\'s own</td></tr>')
            continue
        spread = line.shares if compared else line.norms
        shown = percent if compared else "{:.3g}".format
        numbers = [f"{np.mean(line.distances):.3g}"] if compared else []
        numbers += [shown(float(np.mean(spread))), f"{shown(min(spread))} to {shown(max(spread))}"]
        numbers += [shown(float(values[line.index]))] if compared else []
        cells += "".join(f"<td>{number}</td>" for number in numbers)
        width = 100 * values[line.index] / largest if math.isfinite(values[line.index]) else 0
        cells += f'<td class="bar"><div style="width: {width:.1f}%"></div></td>'
        body.append(f'<tr>{cells}<td><a href="{line.picture}">picture</a></td></tr>')
    paragraphs = "\n".join(f"<p>{paragraph}</p>" for paragraph in about)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Mixing matrices</title>
<style>{STYLE}</style>
<h1>Mixing matrices</h1>
{paragraphs}
<table>
<tr><th>layer</th><th class="word">mixer</th>{head}<th class="bar"></th><th></th></tr>
{chr(10).join(body)}
</table>
</html>
"""
