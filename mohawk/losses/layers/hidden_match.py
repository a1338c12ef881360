"""Feature distillation: which student layer learns from which teacher layer, and the loss between hidden states.

A layer is its index from 0, and its hidden state is what transformers' `output_hidden_states` gives after it:
`hidden_states[layer + 1]`, the last layer's after the model's final norm. `EMBEDDINGS` (-1) is the input of the
first layer, `hidden_states[0]`.

Shapes: b batch, n sequence, H hidden size of the student, H' of the teacher.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mohawk.models.decoders import check_checkpointing, check_layers, decoder, first_tensor

EMBEDDINGS = -1
LAYER_MAPS = ("uniform", "last", "dense_top", "dense_bottom")
# Of dense_bottom: where, of the way through the student (of 12 layers), the source is how far through the teacher (60).
BOTTOM = (((0, 0), (1, 2), (6, 20), (7, 30), (11, 59)), 11, 59)
TOP_HEAVY = "top_heavy was two things; dense_top is what it did (9, 18, ..., 58, 59 of 60), dense_bottom its source's"
LOSSES = ("mse", "cosine")
NORMALISATIONS = ("none", "layer", "unit")


def layer_map(
    kind: str | int | Sequence[Sequence[int]], student_layers: int, teacher_layers: int, *, embeddings: bool = False
) -> list[tuple[int, int]]:
    """Pairs (student layer, teacher layer), counted from 0, for a student of S and a teacher of T layers.

    Args:
        kind:
            - "uniform": every student layer i with j = ceil((i + 1) T / S) - 1, so that both count evenly and end
              together (TinyBERT, arXiv 1909.10351; DistilBERT's every second layer; PKD-skip);
            - "last": the last m = min(S, T) layers of both, (S - m + i, T - m + i) (PKD-last, arXiv 1908.09355);
            - "dense_top": every student layer, the teacher's ever closer together towards its top,
              j = min(ceil(T (1 - (1 - (i + 1) / S)^2)), T - S + i + 1) - 1: 9, 18, 26, ..., 58, 59 of 60 for 12; needs
              S <= T;
            - "dense_bottom": every student layer, the teacher's close together in its lower third, wide apart above: 0,
              2, ..., 20, 30, ..., 59 of 60 for 12, which some call top-heavy; straight lines between these, for other
              depths in proportion; needs S <= T;
            - a whole number k: every k-th student layer, i = k - 1, 2 k - 1, ..., with the teacher's layer of the
              uniform map;
            - explicit pairs [[i, j], ...], -1 meaning the embeddings.
        student_layers, teacher_layers: S and T, 1 or more.
        embeddings: put the pair of embeddings (-1, -1) in front.

    Returns:
        Pairs of int in the student's order (explicit ones: as given).

    Raises:
        ValueError: one line that says what was given and what is allowed.
    """
    S, T = student_layers, teacher_layers
    for name, count in (("student_layers", S), ("teacher_layers", T)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"layer map: {name} must be a whole number from 1 up, got {count!r}")
    front = [(EMBEDDINGS, EMBEDDINGS)] if embeddings else []
    if kind == "uniform":
        return front + [(i, _uniform(i, S, T)) for i in range(S)]
    if kind == "last":
        m = min(S, T)
        return front + [(S - m + i, T - m + i) for i in range(m)]
    if kind == "top_heavy":
        raise ValueError(f"layer map: {TOP_HEAVY}")
    if kind in ("dense_top", "dense_bottom") and S > T:
        raise ValueError(
            f"layer map {kind!r}: the student has {S} layers, the teacher {T}; it needs a student that is not deeper, "
            "take 'uniform'"
        )
    if kind == "dense_bottom":
        return front + list(enumerate(_dense_bottom(S, T)))
    if kind == "dense_top":
        # in whole numbers: T (1 - ((S - i - 1) / S)^2) rounded up
        spread = (-(-T * (S * S - (S - i - 1) ** 2) // (S * S)) for i in range(S))
        return front + [(i, min(j, T - S + i + 1) - 1) for i, j in enumerate(spread)]
    if isinstance(kind, int) and not isinstance(kind, bool):
        if not 1 <= kind <= S:
            raise ValueError(f"layer map: every {kind} layers of a student of {S}; allowed are 1 to {S}")
        return front + [(i, _uniform(i, S, T)) for i in range(kind - 1, S, kind)]
    return front + _explicit(kind, S, T, embeddings)


def _dense_bottom(S: int, T: int) -> list[int]:
    anchors, student, teacher = BOTTOM
    found: list[int] = []
    for i in range(S):
        at = Fraction(i * student, S - 1) if S > 1 else Fraction(student)  # in layers of the source's student
        (a, x), (b, y) = next(pair for pair in pairwise(anchors) if at <= pair[1][0])
        j = math.floor((x + (y - x) * (at - a) / (b - a)) * (T - 1) / teacher + Fraction(1, 2))
        found.append(min(max(j, found[-1] + 1 if found else 0), T - S + i))  # each once, whatever is left
    return found


def _uniform(i: int, S: int, T: int) -> int:
    return -(-(i + 1) * T // S) - 1


def _explicit(pairs, S: int, T: int, embeddings: bool) -> list[tuple[int, int]]:
    allowed = f"{', '.join(LAYER_MAPS)}, a number k (every k-th layer), or pairs [[student, teacher], ...]"
    if isinstance(pairs, str) or not isinstance(pairs, Sequence) or not pairs:
        raise ValueError(f"layer map: got {pairs!r}; allowed: {allowed}")
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"layer map: got the pair {pair!r}; allowed: {allowed}")
        check_layers(f"layer map, student's side of the pair {list(pair)}", pair[:1], S, EMBEDDINGS)
        check_layers(f"layer map, teacher's side of the pair {list(pair)}", pair[1:], T, EMBEDDINGS)
        if (pair[0] == EMBEDDINGS) != (pair[1] == EMBEDDINGS):
            raise ValueError(f"layer map: got the pair {list(pair)}; embeddings (-1) go with embeddings")
    found = [(pair[0], pair[1]) for pair in pairs]
    twice = [pair for i, pair in enumerate(found) if pair in found[:i]]
    if embeddings and (EMBEDDINGS, EMBEDDINGS) in found:
        twice = [(EMBEDDINGS, EMBEDDINGS)]
    if twice:
        raise ValueError(f"layer map: the pair {list(twice[0])} is there twice; give each once")
    return found


@contextmanager
def collect_hidden(model: nn.Module, layers: Collection[int], part: str = "decoder") -> Iterator[dict[int, Tensor]]:
    """Keeps the hidden states of some layers of the model's forward passes within it, and of no others.

    Yields a dict that each forward pass fills (and the next one overwrites): layer -> (b, n, H), with the graph it
    was computed in, exactly the `hidden_states[layer + 1]` of `output_hidden_states`. It stays filled afterwards.

    Args:
        model: any causal LM or encoder of transformers or a hybrid, also behind peft; its layers are found by
            structure.
        layers: from 0; EMBEDDINGS (-1) is the first layer's input.
        part: of a model with an encoder and a decoder, whose layers: "decoder" or "encoder".

    Raises:
        ValueError: a layer that the model does not have; a decoder that is not found; reentrant gradient
            checkpointing.
    """
    body, modules = decoder(model, part)
    where = f"hidden states of {type(model).__name__}"
    check_layers(where, layers, len(modules), EMBEDDINGS)
    check_checkpointing(where, modules)
    kept: dict[int, Tensor] = {}

    def keep_input(module, args, kwargs):
        kept[EMBEDDINGS] = first_tensor(args, kwargs)

    def keeper(layer: int):
        def keep(module, args, output):
            kept[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    def keep_last(module, args, output):  # after the final norm, whatever the model calls it
        hidden = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
        if hidden is None:
            raise ValueError(f"{type(body).__name__} returns no last_hidden_state; its last layer cannot be compared")
        kept[len(modules) - 1] = hidden

    hooks = []
    try:
        for layer in set(layers):
            if layer == EMBEDDINGS:
                hooks.append(modules[0].register_forward_pre_hook(keep_input, with_kwargs=True))
            elif layer == len(modules) - 1:
                hooks.append(body.register_forward_hook(keep_last))
            else:
                hooks.append(modules[layer].register_forward_hook(keeper(layer)))
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


class HiddenMatch(nn.Module):
    """Distance of a student's hidden states from a teacher's, layer pair by layer pair.

    A token's loss is, between s = P(student) and t = teacher after `normalise`,
    - "mse": the mean over the teacher's H' channels of (s - t)^2 (TinyBERT);
    - "cosine": 1 - cos(s, t) (DistilBERT, arXiv 1910.01108),
    in float32 (float64 if either side is), averaged over the real tokens and then over the pairs. Literature that
    sums over layers is this times `len(pairs)`.

    P is a learned linear map H -> H' without bias, one a pair. It trains with the student but is no part of it: as a
    submodule of the objective it is in the run's checkpoints, and the saved student does not have it.

    Args:
        pairs: (student layer, teacher layer), as `layer_map` makes them.
        student_width, teacher_width: H and H'.
        loss: "mse" or "cosine".
        project: None: only where the widths differ; True: always (the identity at the start where they agree);
            False: never, and widths that differ are refused.
        rank: P as a product of two factors through so many channels; None: one whole matrix.
        shared: one P for all pairs but the embeddings', as TinyBERT has it.
        normalise: "none"; "layer": each token to mean 0 and variance 1 over its channels, on both sides; "unit": each
            token to length 1 (PKD, which sums over channels: H' times this mean).

    Raises:
        ValueError: options that do not exist or do not fit together, in one line.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        student_width: int,
        teacher_width: int,
        *,
        loss: str = "mse",
        project: bool | None = None,
        rank: int | None = None,
        shared: bool = False,
        normalise: str = "none",
    ):
        super().__init__()
        for name, value, allowed in (("loss", loss, LOSSES), ("normalise", normalise, NORMALISATIONS)):
            if value not in allowed:
                raise ValueError(f"hidden match: {name} must be one of {', '.join(allowed)}, got {value!r}")
        if not pairs:
            raise ValueError("hidden match: got no layer pairs; give one or more (student layer, teacher layer)")
        project = student_width != teacher_width if project is None else project
        if not project and student_width != teacher_width:
            raise ValueError(
                f"hidden match: the student is {student_width} wide, the teacher {teacher_width}; "
                "comparing them needs a projection, leave project unset"
            )
        if rank is not None and not project:
            raise ValueError(f"hidden match: rank {rank} of no projection, since the widths agree; leave rank unset")
        if rank is not None and not 1 <= rank <= min(student_width, teacher_width):
            most = min(student_width, teacher_width)
            raise ValueError(f"hidden match: rank must be from 1 to {most}, the smaller width, got {rank}")
        self.pairs = [tuple(pair) for pair in pairs]
        self.loss, self.normalise, self.shared = loss, normalise, shared
        self.student_width, self.teacher_width = student_width, teacher_width
        # named by layers, so that a checkpoint of another map does not load
        names = {self._projection_name(pair): None for pair in self.pairs} if project else {}
        self.projections = nn.ModuleDict({name: _projection(student_width, teacher_width, rank) for name in names})

    @property
    def student_layers(self) -> list[int]:
        """The student's layers that are compared: what to give `collect_hidden`."""
        return sorted({student for student, _ in self.pairs})

    @property
    def teacher_layers(self) -> list[int]:
        """The teacher's layers that are compared."""
        return sorted({teacher for _, teacher in self.pairs})

    def forward(
        self,
        student_hidden: Mapping[int, Tensor] | Sequence[Tensor],
        teacher_hidden: Mapping[int, Tensor] | Sequence[Tensor],
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The mean over pairs of each pair's loss, a scalar.

        Args:
            student_hidden, teacher_hidden: transformers' `hidden_states` (all of them, embeddings first), or what
                `collect_hidden` kept; (b, n, H) and (b, n, H'), any float dtypes. The teacher gets no gradient and
                may lie on another device.
            mask: (b, n) bool, the real tokens; None: all.
            weights: (b, n) float, multiplies the loss of the token at that position.
            normalizer: divides each pair's sum over tokens instead of the count of real tokens (gradient
                accumulation: see `kd_loss`).

        Raises:
            ValueError: a layer that is not there, or shapes that do not fit.
        """
        losses = self.losses(student_hidden, teacher_hidden, mask, weights, normalizer)
        return torch.stack(list(losses.values())).mean()

    def losses(
        self, student_hidden, teacher_hidden, mask=None, weights=None, normalizer=None
    ) -> dict[tuple[int, int], Tensor]:
        """Each pair's loss, a scalar; arguments as in `forward`, which is their mean."""
        real = None if mask is None or bool(mask.all()) else mask.flatten().nonzero().squeeze(1)
        losses = {}
        for pair in self.pairs:
            student = _state(student_hidden, pair[0], "student", self.student_width)
            teacher = _state(teacher_hidden, pair[1], "teacher", self.teacher_width).detach()
            _check_tokens(pair, student, teacher, mask, weights)
            student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
            if real is not None:  # padding costs nothing, and what is in it can be anything
                student, teacher = student[real.to(student.device)], teacher[real.to(teacher.device)]
            tokens = self._tokens(pair, student, teacher)
            if weights is not None:
                kept = weights.flatten().to(tokens)
                tokens = tokens * (kept if real is None else kept[real.to(kept.device)])
            losses[pair] = tokens.sum() / (max(1, tokens.numel()) if normalizer is None else normalizer)
        return losses

    def _tokens(self, pair: tuple[int, int], student: Tensor, teacher: Tensor) -> Tensor:
        """(tokens, H) and (tokens, H') -> (tokens,) losses."""
        projection = self._projection(pair)
        if projection is not None:
            device = student.device.type
            # under autocast the product takes its dtype; elsewhere that of the projection, which may be wider
            dtype = student.dtype if torch.is_autocast_enabled(device) else next(projection.parameters()).dtype
            student = projection(student.to(dtype))
        dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        with torch.autocast(student.device.type, enabled=False):
            student, teacher = (self._normalised(x.to(student.device, dtype)) for x in (student, teacher))
            if self.loss == "cosine":
                return 1 - F.cosine_similarity(student, teacher, dim=-1)
            return (student - teacher).square().mean(-1)

    def _normalised(self, hidden: Tensor) -> Tensor:
        if self.normalise == "layer":
            return F.layer_norm(hidden, hidden.shape[-1:])
        return F.normalize(hidden, dim=-1) if self.normalise == "unit" else hidden

    def _projection_name(self, pair: tuple[int, int]) -> str:
        if EMBEDDINGS in pair:
            return "embeddings"
        return "layers" if self.shared else f"student_{pair[0]}_teacher_{pair[1]}"

    def _projection(self, pair: tuple[int, int]) -> nn.Module | None:
        return self.projections[self._projection_name(pair)] if len(self.projections) else None

    def extra_repr(self) -> str:
        return f"pairs={self.pairs}, loss={self.loss}, normalise={self.normalise}"


def _projection(student_width: int, teacher_width: int, rank: int | None) -> nn.Module:
    """(..., H) -> (..., H'). At the start the identity where it can be, else orthogonal, keeping channels' size."""
    if rank is None:
        projection = nn.Linear(student_width, teacher_width, bias=False)
        if student_width == teacher_width:
            nn.init.eye_(projection.weight)
        else:
            # semi-orthogonal keeps the length of a vector (or of its part in the rows' span), which is now
            # spread over other channels than before: the factor keeps their mean square
            nn.init.orthogonal_(projection.weight, max(1.0, teacher_width / student_width) ** 0.5)
        return projection
    down, up = nn.Linear(student_width, rank, bias=False), nn.Linear(rank, teacher_width, bias=False)
    nn.init.orthogonal_(down.weight)
    nn.init.orthogonal_(up.weight, (teacher_width / rank) ** 0.5)
    return nn.Sequential(down, up)


def _check_tokens(pair, student: Tensor, teacher: Tensor, mask: Tensor | None, weights: Tensor | None) -> None:
    where = f"hidden match of layers {pair[0]} (student) and {pair[1]} (teacher)"
    tokens = tuple(student.shape[:2])
    for name, shape in (
        ("the teacher's hidden states", teacher.shape[:2]),
        ("mask", None if mask is None else mask.shape),
        ("weights", None if weights is None else weights.shape),
    ):
        if shape is not None and tuple(shape) != tokens:
            raise ValueError(f"{where}: {name} must be of (batch, sequence) {tokens}, got {tuple(shape)}")


def _state(hidden, layer: int, side: str, width: int) -> Tensor:
    if isinstance(hidden, Mapping):
        found = hidden.get(layer)
        have = ", ".join(map(str, sorted(hidden)))
    else:
        found = hidden[layer + 1] if layer + 1 < len(hidden) else None
        have = f"-1 to {len(hidden) - 2}"
    if found is None:
        raise ValueError(f"hidden match: no hidden state of the {side}'s layer {layer}; there are {have or 'none'}")
    if found.dim() != 3 or found.shape[-1] != width:
        raise ValueError(
            f"hidden match: the {side}'s layer {layer} must be (batch, sequence, {width}), got {tuple(found.shape)}"
        )
    return found
