"""How two models' next-token distributions agree, token by token, in sums that texts of any length fit into.

Errors are by windows of text, since tokens of one window are not independent of each other: of a ratio of sums over
windows, by linearisation (Cochran, Sampling Techniques, section 6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mohawk.core.collectives import total
from mohawk.core.processes import from_all

TOP = 5  # entries of both distributions that are compared as sets
DRAFTS = 8  # the most tokens that a draft is followed for
BINS = 15  # of confidence, as in Guo et al., arXiv 1706.04599
FIGURES = (
    "teacher_nll", "student_nll", "kl", "same", "kept", "overlap", "teacher_confidence", "student_confidence",
    "teacher_right", "student_right",
)  # fmt: skip


def token_figures(teacher: Tensor, student: Tensor, targets: Tensor) -> Tensor:
    """FIGURES of each row of logits (rows, vocab), as float64 (rows, figures).

    nll: -log p of the target, nats. kl: KL(teacher || student), nats. same: whether both find the same token most
    probable. kept: the sum of the smaller of both probabilities, 1 - TV, which is how probable it is that a token drawn
    from the student passes as a draft for the teacher (Leviathan et al., arXiv 2211.17192). overlap: the share of the
    TOP most probable that both have. confidence: the largest probability. right: whether its token is the target.
    """
    index, most = targets[:, None], min(TOP, teacher.shape[1])
    tops = [logits.topk(most, -1, sorted=False).indices for logits in (teacher, student)]
    overlap = (tops[0][:, :, None] == tops[1][:, None, :]).sum((1, 2)) / most
    teacher, student = teacher.log_softmax(-1), student.log_softmax(-1)
    (t_top, t_first), (s_top, s_first) = teacher.max(-1), student.max(-1)
    nll = [-logprobs.gather(1, index)[:, 0] for logprobs in (teacher, student)]
    p = teacher.exp()
    # terms of p = 0 are 0, also where the student's log probability is -inf
    kl = torch.where(teacher > -math.inf, p * (teacher - student), 0.0).sum(-1)
    kept = torch.minimum(p, student.exp()).sum(-1)
    columns = (
        *nll, kl, t_first == s_first, kept, overlap, t_top.exp(), s_top.exp(), t_first == targets, s_first == targets,
    )  # fmt: skip
    return torch.stack([column.double() for column in columns], 1)


class Tally:
    """Sums of `token_figures` over batches, of all processes together once they are asked for."""

    def __init__(self) -> None:
        self.tokens = 0.0
        self._sums = torch.zeros(len(FIGURES), dtype=torch.float64)
        self._worst = -math.inf
        self._windows = torch.zeros(4, 4, dtype=torch.float64)  # moments of (1, tokens, log ratio, KL) of a window
        self._drafted = torch.zeros(2, DRAFTS, dtype=torch.float64)  # tokens kept, beginnings
        self._bins = torch.zeros(2, 3, BINS, dtype=torch.float64)  # teacher and student: tokens, confidence, right

    def add(self, figures: Tensor, predicting: Tensor) -> None:
        """One batch's: figures (tokens, figures) of the positions where `predicting` (batch, sequence) holds, in its
        order."""
        figures, predicting = figures.cpu(), predicting.cpu()
        if not len(figures):
            return
        self._sums += figures.sum(0)
        worst = float(figures[:, FIGURES.index("kl")].max())
        self._worst = worst if math.isnan(worst) else max(self._worst, worst)
        of = {name: figures[:, i] for i, name in enumerate(FIGURES)}
        row = predicting.nonzero()[:, 0]
        one = torch.ones_like(of["kl"])
        values = torch.stack([one, of["student_nll"] - of["teacher_nll"], of["kl"]], 1)
        windows = torch.zeros(len(predicting), 3, dtype=torch.float64).index_add_(0, row, values)
        windows = windows[windows[:, 0] > 0]
        windows = torch.cat([torch.ones_like(windows[:, :1]), windows], 1)
        self._windows += windows.T @ windows
        self._drafted += drafted(of["kept"], predicting)
        for i, who in enumerate(("teacher", "student")):
            confidence, right = of[f"{who}_confidence"], of[f"{who}_right"]
            if bool(confidence.isnan().any()):
                self._bins[i] = math.nan  # a broken model's
                continue
            which = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # each bin has its upper end
            self._bins[i] += torch.zeros(3, BINS, dtype=torch.float64).index_add_(
                1, which, torch.stack([one, confidence, right])
            )

    def shared(self, device: torch.device) -> Tally:
        """The sums of all processes; all of them must ask. device: that collectives work on."""
        parts = (self._sums, self._windows, self._drafted, self._bins)
        flat = total(torch.cat([part.flatten() for part in parts]).to(device)).cpu()
        every, start = Tally(), 0
        for name, part in zip(("_sums", "_windows", "_drafted", "_bins"), parts, strict=True):
            setattr(every, name, flat[start : start + part.numel()].view(part.shape))
            start += part.numel()
        worst = from_all(self._worst)
        every._worst = math.nan if any(map(math.isnan, worst)) else max(worst)
        every.tokens = float(every._windows[0, 1])
        return every

    def mean(self, figure: str) -> float:
        """Over all tokens."""
        return float(self._sums[FIGURES.index(figure)]) / self.tokens

    @property
    def worst_kl(self) -> float:
        """The largest KL of a single token."""
        return self._worst

    @property
    def log_ratio_error(self) -> float | None:
        """Standard error of the log of the perplexities' ratio; None of fewer than two windows, NaN where a token's
        is not finite."""
        return self._error(2)

    @property
    def kl_error(self) -> float | None:
        """Standard error of the mean KL; None of fewer than two windows, NaN where a token's is not finite."""
        return self._error(3)

    def _error(self, which: int) -> float | None:
        moments = self._windows
        windows, tokens = float(moments[0, 0]), float(moments[0, 1])
        if windows < 2:
            return None
        ratio = float(moments[0, which]) / tokens
        squares = moments[which, which] - 2 * ratio * moments[1, which] + ratio**2 * moments[1, 1]
        if not math.isfinite(squares):  # max would make 0 of a NaN
            return math.nan
        return math.sqrt(max(0.0, float(squares)) * windows / (windows - 1)) / tokens

    @property
    def accepted(self) -> list[float | None]:
        """Of K = 1 to DRAFTS tokens drafted in a row, how many are kept on average; None where no text is as long."""
        kept, begun = self._drafted.tolist()
        return [a / n if n else None for a, n in zip(kept, begun, strict=True)]

    def calibration_error(self, who: str) -> float:
        """Expected calibration error: over bins of confidence, the mean distance of confidence and accuracy."""
        _, confidence, right = self._bins[("teacher", "student").index(who)]
        return float((confidence - right).abs().sum()) / self.tokens


def drafted(kept: Tensor, predicting: Tensor) -> Tensor:
    """(2, DRAFTS): for K tokens drafted in a row, the expected number that is kept, summed over all beginnings that
    have as many tokens after them, and the number of those.

    kept: (tokens,) how probable it is that the token at each of the `predicting` (batch, sequence) positions is kept.
    Each position's is given the text before it: a draft goes on only after a token that was kept, so that k tokens are
    kept with the product of the first k, and the expected number is the sum of these products.
    """
    alone = torch.zeros(predicting.shape, dtype=torch.float64)
    alone[predicting] = kept
    found = torch.zeros(2, DRAFTS, dtype=torch.float64)
    product, expected, valid = torch.ones_like(alone), torch.zeros_like(alone), torch.ones_like(predicting)
    width = predicting.shape[1]
    for k in range(min(DRAFTS, width)):
        here = slice(0, width - k)  # beginnings that have k further positions in their row
        product = product[:, here] * alone[:, k:]
        valid = valid[:, here] & predicting[:, k:]
        expected = expected[:, here] + product
        found[:, k] = torch.stack([expected[valid].sum(), valid.sum().double()])
    return found


def acceptance_words(accepted: Sequence[float | None]) -> str:
    """How many of 1, 2, ... drafted tokens are kept, in words."""
    return ", ".join(f"{value:.2f} of {k}" for k, value in enumerate(accepted, 1) if value is not None)
