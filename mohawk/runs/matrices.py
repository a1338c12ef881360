"""Mixing matrices of teacher and student on one piece of text, kept beside the run and drawn."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mohawk.core.folders import why_altered, write_file
from mohawk.core.processes import is_first
from mohawk.core.run_folder import matrices_file, plot_file
from mohawk.errors import is_refusal
from mohawk.kernels.mixing.interface import mixing_matrix
from mohawk.kernels.mixing.operands import AttentionMixing, Mixing
from mohawk.models.families import decoder_layers, mixer_input_norm
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.sharding import is_sharded, reshard, run_in
from mohawk.models.state_mixer import StateMixer
from mohawk.models.teacher_forcing import LayerCall, layer_calls, record, recording_attention
from mohawk.runs.plots import Heads, plot_mixing_matrices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@torch.no_grad()
def layer_mixings(
    teacher: PreTrainedModel, student: PreTrainedModel | None, input_ids: Tensor, layers: list[int]
) -> Iterator[tuple[int, AttentionMixing, Mixing | None]]:
    """What teacher and student mix with in some layers, both given the teacher's hidden states, unmaterialised.

    One layer's queries and keys are alive at a time. The teacher's attention stays in its layers.

    Args:
        teacher, student: on one device; without a student only the teacher's layers are walked.
        input_ids: (1, n) tokens.
        layers: indices, in any order; they come in the model's.

    Yields:
        (index, the teacher's, the student's or None).
    """
    positions = torch.arange(input_ids.shape[1], device=teacher.device)[None]
    own_layers = None if student is None else decoder_layers(student)
    with ExitStack() as recording:
        recording.enter_context(recording_attention(teacher))
        if (
            student is not None
            and own_layers is not None
            and any(not isinstance(own_layers[i].self_attn, StateMixer) for i in layers)
        ):
            recording.enter_context(recording_attention(student))
        hidden, calls = run_in(teacher, layer_calls, teacher, input_ids.to(teacher.device), positions)
        for i, call in enumerate(calls[: max(layers) + 1]):
            layer = decoder_layers(teacher)[i]
            with record(layer.self_attn) as attention:
                after = layer(hidden, *call.args, **call.kwargs)
            if i in layers:
                own = None
                if own_layers is not None:
                    own = run_in(own_layers[i], _student_mixing, own_layers[i], hidden, call)
                yield i, attention.mixing(), own
            hidden = after


def _student_mixing(layer: Any, hidden: Tensor, call: LayerCall) -> Mixing:
    hidden = hidden.to(next(layer.parameters()).dtype)
    if isinstance(layer.self_attn, StateMixer):
        return layer.self_attn.mixing(mixer_input_norm(layer)(hidden))
    with record(layer.self_attn) as attention:
        layer(hidden, *call.args, **call.kwargs)
    return attention.mixing()


def layer_matrices(
    student: HybridForCausalLM, teacher: PreTrainedModel, input_ids: Tensor, layers: list[int]
) -> dict[str, Tensor]:
    """Every head's mixing matrix of some replaced layers, given the teacher's hidden states.

    Args:
        student, teacher: on one device; the teacher's attention stays in its layers.
        input_ids: (1, n) tokens.
        layers: indices of replaced layers.

    Returns:
        {"layer_3.teacher": (h, n, n), "layer_3.student": (h, n, n), ...} in float32 on the CPU.
    """
    found = {}
    for i, theirs, own in layer_mixings(teacher, student, input_ids, layers):
        assert own is not None
        found[f"layer_{i}.teacher"] = mixing_matrix(theirs)[0].float().cpu()
        found[f"layer_{i}.student"] = mixing_matrix(own)[0].float().cpu()
    return found


def save_matrices(
    run: Path, stage: str, student: HybridForCausalLM, teacher: PreTrainedModel, input_ids: Tensor
) -> None:
    """Keeps the matrices of the first, middle and last replaced layer as `matrices/<stage>.safetensors`. All processes
    must ask; the first one writes."""
    replaced = student.config.ssm_layers
    layers = sorted({replaced[0], replaced[len(replaced) // 2], replaced[-1]})
    if not (is_first() or is_sharded(student)):
        return
    matrices = layer_matrices(student, teacher, input_ids, layers)
    for model in (student, teacher):
        reshard(model)
    if not is_first():
        return
    with write_file(matrices_file(run, stage)) as beside:
        save_file({key: value.half().contiguous() for key, value in matrices.items()}, beside)


def saved_matrices(run: Path, stage: str) -> dict[str, Tensor]:
    """What `save_matrices` kept, as float32; empty when there is none, or a damaged one (logged)."""
    path = matrices_file(run, stage)
    if not path.is_file():
        return {}
    try:
        if (problem := why_altered(path)) is None:
            return {key: value.float() for key, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        if is_refusal(error):
            raise
        problem = str(error)
    log.warning("%s is damaged (%s): drawing without it", path, problem)
    return {}


def draw_matrices(run: Path) -> Path | None:
    """Draws one head of each kept layer: teacher, student before and after phase 1; None when none were kept.

    Of each layer the head is drawn whose teacher matrix is the least trivial: the one that least resembles attending
    to one fixed position.
    """
    before, after = saved_matrices(run, "before"), saved_matrices(run, "mixing")
    rows = []
    layers = sorted({int(key.split(".")[0].removeprefix("layer_")) for key in before})
    for key in (f"layer_{i}.teacher" for i in layers):
        teacher = before[key]
        student = key.replace(".teacher", ".student")
        head = int(teacher.mean(1).amax(-1).argmin())  # the smallest share of its favourite column
        later = after[student][head].numpy() if student in after else None
        label = f"{key.removesuffix('.teacher').replace('_', ' ')}, head {head}"
        rows.append(Heads(label, teacher[head].numpy(), before[student][head].numpy(), later))
    return plot_mixing_matrices(rows, plot_file(run, "mixing_matrices"))
