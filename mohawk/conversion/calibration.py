"""A start that is fitted to text (`student.init: calibrated`): each mixer, on the teacher's hidden states, to the
output of the attention that it replaces.

The output projection has a closed form. What comes before it (projections, convolution, decays, norm and gate) then
takes some steps of Adam, which need no pass through the teacher: of one layer at a time, the inputs and outputs of its
attention are held for all of the text. The closed form of what the steps have made comes last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mohawk.conversion.readout import Readout, readout_features
from mohawk.core.collectives import shared_from_first
from mohawk.models.families import decoder_layers, mixer_input_norm
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.sharding import fill, reshard, run_in, whole_modules
from mohawk.models.state_mixer import StateMixer
from mohawk.models.teacher_forcing import layer_calls, record

log = logging.getLogger(__name__)

LEARNING_RATE = 3e-3
WARMUP = 0.1  # share of the steps; afterwards the learning rate falls to 0 along a line


@torch.no_grad()
def calibrate(
    student: HybridForCausalLM,
    teacher: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    *,
    steps: int,
    autocast: torch.dtype | None = None,
) -> dict[int, tuple[float, float]]:
    """Fits the mixer of every replaced layer to the teacher's attention output there, over real tokens.

    Memory: the hidden states of all the batches, and the graph of one mixer over one batch.

    Args:
        student, teacher: on one device, or in parts. The teacher is left as it was, the student's mixers are
            overwritten; all processes fit the same, and end with what the first one has.
        batches: packed batches as `mohawk.data.packing.collate` makes them; at least as many tokens as the inner width,
            better ten times as many.
        steps: of Adam for each layer, each on one of the batches in turn; 0: only least squares.
        autocast: dtype of the models' matrix products; the normal equations are summed in float64.

    Returns:
        By layer, the square of the error on `batches` as a share of the output's: of least squares alone, and in the
        end. Where steps brought no less, least squares alone is kept.
    """
    layers, own, replaced = decoder_layers(teacher), decoder_layers(student), student.config.ssm_layers
    batches = [{name: value.to(teacher.device) for name, value in batch.items()} for batch in batches]
    real = [batch["segment_ids"] >= 0 for batch in batches]
    mixers = whole_modules(student, [f"model.layers.{i}.self_attn" for i in replaced])
    errors: dict[int, tuple[float, float]] = {}
    with torch.autocast(teacher.device.type, dtype=autocast, enabled=autocast is not None):
        begun = [run_in(teacher, layer_calls, teacher, batch["input_ids"], batch["position_ids"]) for batch in batches]
        hidden, calls = [first for first, _ in begun], [of_layers for _, of_layers in begun]
        for i in range(replaced[-1] + 1):
            inputs, targets = [], []
            for k in range(len(batches)):
                call = calls[k][i]
                with record(layers[i].self_attn) as attention:
                    after = layers[i](hidden[k], *call.args, **call.kwargs)
                if i in replaced:
                    assert attention.output is not None  # the layer has run
                    inputs.append(mixer_input_norm(own[i])(hidden[k]))
                    targets.append(attention.output)
                hidden[k] = after
            if i in replaced:
                _, mixer = next(mixers)
                assert isinstance(mixer, StateMixer)
                errors[i] = _fit(mixer, inputs, targets, [batch["segment_ids"] for batch in batches], real, steps)
                log.info("layer %d: %.3f of the output's square left by least squares, %.3f in the end", i, *errors[i])
                found = dict(mixer.named_parameters())
                for name, parameter in own[i].self_attn.named_parameters():
                    fill(parameter, shared_from_first(found[name].detach()))
    reshard(teacher)
    return errors


def _fit(
    mixer: StateMixer,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    segments: Sequence[Tensor],
    real: Sequence[Tensor],
    steps: int,
) -> tuple[float, float]:
    """One mixer to its targets: the error of least squares alone, and the one in the end."""

    def solve() -> float:
        readout = Readout()
        for given, target, segment_ids, kept in zip(inputs, targets, segments, real, strict=True):
            readout.add(mixer, readout_features(mixer, given, segment_ids)[kept], target[kept])
        return readout.solve(mixer)

    first = solve()
    if not steps:
        return first, first
    before = {name: value.clone() for name, value in mixer.state_dict().items()}

    def loss(k: int) -> Tensor:
        output, _ = mixer(inputs[k], segment_ids=segments[k])
        target = targets[k][real[k]].float()
        return (output[real[k]].float() - target).square().sum() / target.square().sum().clamp_min(1e-30)

    _descend(mixer, loss, len(inputs), steps)
    last = solve()
    if not last < first:  # nor if it is not a number
        mixer.load_state_dict(before)
        last = first
    return first, last


@torch.enable_grad()
def _descend(mixer: StateMixer, loss: Callable[[int], Tensor], count: int, steps: int) -> None:
    """Steps of Adam on all that a mixer has, each on the loss of one of `count` batches."""
    trains = {parameter: parameter.requires_grad for parameter in mixer.parameters()}
    mixer.requires_grad_(True)
    optimizer = torch.optim.Adam(mixer.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(
                1.0, (step + 1) / (WARMUP * steps), (steps - step) / (steps * (1 - WARMUP))
            )
        optimizer.zero_grad()
        loss(step % count).backward()
        optimizer.step()
    optimizer.zero_grad()
    for parameter, before in trains.items():
        parameter.requires_grad_(before)
