"""`mohawk quantize`: a run's student with its weights in fewer bits, measured beside the student as it is."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mohawk.core.folders import made_of, write_whole
from mohawk.core.json_files import write_json
from mohawk.core.places import home
from mohawk.core.run_folder import STUDENT, has_recipe, quantized_file, quantized_folder
from mohawk.core.terminal import quiet_torchao
from mohawk.errors import UserError
from mohawk.loading.describe import student_folder
from mohawk.quantization.formats import FORMATS, check_format
from mohawk.runs.report import fingerprint, kept_quantized, report_quantized
from mohawk.runs.tables import print_tables, quantized_tables
from mohawk.schema.kinds import load_run_recipe, trims_vocabulary

if TYPE_CHECKING:
    from mohawk.runs.context import RunContext

AS_IT_IS = "as it is"


def quantize_run(run: str | Path, names: Sequence[str], console: Console | None = None) -> dict[str, Any]:
    """Write the final student of a run in each of these formats, measure each beside the student and put the rows into
    the run's report.

    names: of `FORMATS`. torchao's are folders RUN/quantized/NAME, which transformers loads where torchao is installed;
    GGUF files are made and checked by `mohawk.export.run.export`, and measured with the same weights in transformers.
    Returns what is now in RUN/evaluation/quantized.json. Raises UserError.
    """
    quiet_torchao()
    for name in names:
        check_format(name)
    folder, console = home(run), console or Console()
    if not has_recipe(folder):
        raise UserError(f"{run} is not a run's folder: it holds no recipe.yaml")
    recipe = load_run_recipe(folder)
    student = student_folder(folder)
    if Path(student) != folder / STUDENT:
        raise UserError(f"{run} is not finished: its last student is {student}; go on with it first")
    if trims_vocabulary(recipe):
        raise UserError(
            f"{run}: its student numbers tokens anew (prune.vocabulary), so it cannot be compared with its teacher "
            "token by token"
        )
    _refuse_too_early(folder, names)

    from mohawk.evaluation.run import opened
    from mohawk.loading.models import load_teacher

    context = opened(recipe, folder, console, None)
    model = load_teacher(student, dtype="auto", device=context.device, who="student")
    found = kept_quantized(folder) or {"student": STUDENT, "fingerprint": fingerprint(student)}
    rows = {AS_IT_IS: _row(context, model, _weights_bytes(Path(student)), None)}
    rows |= {name: row for name, row in found.get("formats", {}).items() if name != AS_IT_IS}
    found |= {"dtype": str(model.dtype).removeprefix("torch."), "formats": rows}
    del model
    gc.collect()
    for name in names:
        make = _gguf if FORMATS[name].outtype else _torchao
        rows[name] = make(context, folder, student, name, console)
        gc.collect()
        write_json(quantized_file(folder), found)
    print_tables(quantized_tables(found), console)
    if (report := report_quantized(folder)) is not None:
        console.print(f"report: {report}", highlight=False, soft_wrap=True, markup=False)
    return found


def _refuse_too_early(folder: Path, names: Sequence[str]) -> None:
    """UserError for a GGUF file that this student cannot be, before anything is loaded."""
    files = [name for name in names if FORMATS[name].outtype]
    if files:
        from mohawk.export.run import hybrid_config
        from mohawk.export.targets import TARGETS

        _, config = hybrid_config(folder)
        if reason := TARGETS["gguf"].why_not(config, False):
            raise UserError(f"{files[0]}: {reason}")


def _torchao(context: RunContext, folder: Path, student: str, name: str, console: Console) -> dict[str, Any]:
    """A folder with torchao's weights, measured as it is loaded from there."""
    from transformers import AutoModelForCausalLM

    from mohawk.loading.configs import load_config
    from mohawk.loading.models import load_teacher, load_tokenizer, model_shape
    from mohawk.loading.remote_code import add_code
    from mohawk.models.families import needed_attention
    from mohawk.quantization.formats import kept_modules, quantised_share, torchao_config

    config = load_config(student, who="student")
    kept, attention = kept_modules(model_shape(config, who="student"), name), needed_attention(config)
    tokenizer, target = load_tokenizer(student, who="student"), quantized_folder(folder, name)
    model = AutoModelForCausalLM.from_pretrained(
        student, dtype="auto", quantization_config=torchao_config(name, kept), attn_implementation=attention
    )
    if (share := quantised_share(model)) == 0:
        raise UserError(f"{name}: none of the student's matrices can be stored so; choose another --to")
    with write_whole(target, replace=True, about=made_of(student)) as partial:
        model.save_pretrained(partial)
        add_code(partial, model)
        tokenizer.save_pretrained(partial)
    del model
    gc.collect()
    again = load_teacher(target, dtype="auto", device=context.device, who="student")
    trusted = "auto_map" in json.loads((target / "config.json").read_text(encoding="utf-8"))
    how = "trust_remote_code=True, " * trusted + 'dtype="auto"'
    console.print(
        f"{name}: {target}, {share:.0%} of all parameters; load it with torchao installed and "
        f"AutoModelForCausalLM.from_pretrained({str(target)!r}, {how})",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip
    return _row(context, again, _weights_bytes(target), share)


def _gguf(context: RunContext, folder: Path, student: str, name: str, console: Console) -> dict[str, Any]:
    """A GGUF file by the export, measured as a hybrid with the weights that are in it."""
    from mohawk.export.run import export
    from mohawk.loading.models import load_teacher
    from mohawk.quantization.formats import round_as_gguf

    outtype = FORMATS[name].outtype
    assert outtype is not None
    target = export(folder, "gguf", outtype=outtype, console=console)
    (path,) = target.glob("*.gguf")
    model = load_teacher(student, device=context.device, who="student")
    round_as_gguf(model, outtype)
    _check_rounding(path, model)
    return _row(context, model, path.stat().st_size, None)


def _check_rounding(path: Path, model: Any) -> None:
    """UserError unless the model has the weights that the file has."""
    import gguf
    import numpy as np

    from mohawk.models.formats.gguf import gguf_weights

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for called, weight in gguf_weights(model):
        tensor = stored[called]
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
        if not np.allclose(value, weight.float().cpu().numpy(), rtol=1e-5, atol=1e-7):
            raise UserError(
                f"{path}: {called} has other weights than those measured, because its rows are put in another order "
                "within blocks that share a scale; the file itself is checked and kept, but has no row in the report"
            )


def _row(context: RunContext, model: Any, size: int, quantised: float | None) -> dict[str, Any]:
    """What is kept of one format."""
    from mohawk.measures.compare import TeacherStates, compare
    from mohawk.measures.consistency import inconsistencies, some_tokens

    model = model.to(context.device).eval()
    compared = (item for item in context.texts.items() if isinstance(item[1], TeacherStates))
    texts = {name: asdict(compare(model, states, autocast=None)) for name, states in compared}
    return {
        "bytes": size, "texts": texts, "consistency": inconsistencies(model, some_tokens(model)),
        "quantised": quantised,
    }  # fmt: skip


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
