"""Relative gradient error with bfloat16 hidden states and heads, against float64 on the same rounded inputs."""

from __future__ import annotations

import torch

from benchmarks.harness import Case
from benchmarks.kernels import kd_loss as speed
from benchmarks.own import Own

# Distances of the teacher's hidden states from the student's, and the KL that they give.
DISTANCES = {"KL 0.3": 0.41, "KL 0.03": 0.125, "KL 0.003": 0.0385, "KL 0.0003": 0.0108}
SHAPE = (128, 256, 8192)


def errors(loss, truth, device: str) -> dict[str, float]:
    """The larger of the errors of both gradients at each distance."""
    columns = {}
    for name, distance in DISTANCES.items():
        h, head, th, teacher_head, labels = speed.problem(SHAPE, torch.bfloat16, device, distance)
        grads = []
        for function, dtype in ((loss, torch.bfloat16), (truth, torch.float64)):
            x, w = h.to(dtype).clone().requires_grad_(), head.to(dtype).clone().requires_grad_()
            value = function(x, w, th.to(dtype), teacher_head.to(dtype), labels)
            value.backward()
            grads.append((x.grad.double(), w.grad.double()))
        columns[f"{name[:2]} {value.item():.2g}"] = max(
            ((a - b).norm() / b.norm()).item() for a, b in zip(*grads, strict=True)
        )
    return columns


def cases(device: str, quick: bool, own: Own = ()) -> list[Case]:
    found = []
    peers = {"eager forward KL": (speed.kd_peers.eager_forward_kl, "forward_kl", None)}
    peers |= {"torchtune forward KL": (speed.kd_peers.torchtune_forward_kl, "forward_kl", None)}
    peers |= speed.PEERS
    ours = {f"mohawk {d}": (speed.ours(divergence=d), d, None) for d in ("forward_kl", "jsd")}
    if device == "cpu":
        for d in ("forward_kl", "jsd"):
            ours[f"mohawk {d}, rounded"] = (speed.ours(divergence=d, precision="rounded"), d, None)
    for divergence, table in (("forward_kl", "forward KL"), ("jsd", "JSD")):
        truth = speed.ours(backend="reference", divergence=divergence)
        for name, (loss, kind, needs) in (ours | peers).items():
            if kind == divergence:

                def build(loss=loss, truth=truth):
                    return (lambda whole: errors(loss, truth, device)), None

                found.append(Case(f"{table}, relative gradient error in bfloat16", name, build, needs))
    return found
