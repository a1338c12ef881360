"""The start of phase 2: each mixer's output projection solved by least squares instead of learned from afar.

Given the teacher's hidden states, a mixer's output is linear in its output projection, so the best one for everything
before it as it stands has a closed form. A few thousand tokens suffice, and gradient steps go on from there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mohawk.models.families import decoder_layers, mixer_input_norm
from mohawk.models.hybrid import HybridForCausalLM
from mohawk.models.sharding import fill, reshard, run_in, whole
from mohawk.models.teacher_forcing import layer_calls, record

RIDGE = 1e-2  # pull towards the projection there was, as a share of the features' mean square


@torch.no_grad()
def solve_output_projections(
    student: HybridForCausalLM,
    teacher: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    *,
    autocast: torch.dtype | None = None,
) -> None:
    """Sets every replaced layer's output projection, and its bias if it has one, to the ridge solution of
    projection(features) ~ the teacher's attention output, over the real tokens of `batches`.

    Args:
        student, teacher: on one device. The teacher is left as it was, the student's projections are overwritten.
        batches: packed batches as `mohawk.data.packing.collate` makes them; at least as many tokens as the inner width,
            better ten times as many.
        autocast: dtype of the models' matrix products; the normal equations are summed in float64.
    """
    layers, replaced = decoder_layers(teacher), student.config.ssm_layers
    gram: dict[int, Tensor] = {}
    moment: dict[int, Tensor] = {}
    for batch in batches:
        batch = {name: value.to(teacher.device) for name, value in batch.items()}
        real = batch["segment_ids"] >= 0
        with torch.autocast(teacher.device.type, dtype=autocast, enabled=autocast is not None):
            hidden, calls = run_in(teacher, layer_calls, teacher, batch["input_ids"], batch["position_ids"])
            for i, call in enumerate(calls[: replaced[-1] + 1]):
                with record(layers[i].self_attn) as attention:
                    after = layers[i](hidden, *call.args, **call.kwargs)
                if i in replaced:
                    layer = decoder_layers(student)[i]
                    features = run_in(layer, _features, layer, hidden, batch["segment_ids"])[real].float()
                    if layer.self_attn.output.bias is not None:
                        features = torch.cat([features, features.new_ones(len(features), 1)], 1)
                    assert attention.output is not None  # the layer has run
                    target = attention.output[real].float()
                    with torch.autocast(teacher.device.type, enabled=False):
                        gram[i] = gram.get(i, 0) + (features.T @ features).double()
                        moment[i] = moment.get(i, 0) + (features.T @ target).double()
                hidden = after
    reshard(student)
    reshard(teacher)
    for i in gram:
        output = decoder_layers(student)[i].self_attn.output
        rows = [whole(output.weight).T] + ([] if output.bias is None else [output.bias[None]])
        start = torch.cat(rows).double()
        ridge = RIDGE * gram[i].diagonal().mean() * torch.eye(len(start), dtype=torch.float64, device=start.device)
        solved = torch.linalg.solve(gram[i] + ridge, moment[i] + ridge @ start)
        fill(output.weight, solved[: output.in_features].T.contiguous())
        if output.bias is not None:
            output.bias.copy_(solved[-1])


def _features(layer: Any, hidden: Tensor, segment_ids: Tensor) -> Tensor:
    """(b, n, h*p) input of the projection out of the mixer."""
    seen = []
    hook = layer.self_attn.output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        layer.self_attn(mixer_input_norm(layer)(hidden), segment_ids=segment_ids)
    finally:
        hook.remove()
    return seen[0]
