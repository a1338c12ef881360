"""Relations between tokens: what queries say of queries, keys of keys and values of values, layer pair by layer pair.

MiniLM (arXiv 2002.10957, section 3.2) compares the softmax of scaled dot products between values beside attention's own
matrix, MiniLM v2 (arXiv 2012.15828, section 3.1) those of queries, keys and values alone, each split anew into relation
heads, so that neither widths nor head counts of student and teacher have to agree. A relation is the matrix of an
attention whose queries and keys are the same tensor: `mixing_distance` compares it strip by strip, and no n x n array
is made.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mohawk.kernels.mixing.interface import mixing_distance
from mohawk.kernels.mixing.operands import AttentionMixing
from mohawk.losses.layers.attention_match import LayerRecord, MixerRecord, check_recorded, check_windows, recorded
from mohawk.models.decoders import layers_config
from mohawk.models.teacher_forcing import AttentionRecord

RELATIONS = {"queries": "query", "keys": "key", "values": "value"}  # and what records call them


class RelationMatch:
    """Mean over layer pairs of sum_i w_i / (A n) sum_a sum_t KL(R^T_{i,a,t} || R^S_{i,a,t}), also over the batch.

    R_{i,a} = softmax(mask(X_a X_a^T / sqrt(d))) (n, n), where X is the queries, keys or values of a layer's attention,
    all heads' channels side by side, and X_a (n, d) is the a-th of A equal parts of them, the relation heads. Only
    tokens that attention itself sees are compared; queries and keys are those behind rotary embedding. It has no
    parameters. MiniLM v2's loss is the default; MiniLM's is queries=0, keys=0 beside `AttentionMatch(loss="kl")`, both
    of the last layers.

    Args:
        pairs: (student layer, teacher layer), from 0. The papers take one: the last layers, or an upper middle one of a
            large teacher.
        queries, keys, values: the weights w_i; 0 leaves a relation out.
        heads: A, which divides the channels of both sides, such as the papers' 48 for 768 and 64 for 1024; None: the
            greatest common divisor of both sides' head counts.

    Raises:
        ValueError: options that do not exist or do not fit together, in one line.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        *,
        queries: float = 1.0,
        keys: float = 1.0,
        values: float = 1.0,
        heads: int | None = None,
    ):
        if not pairs:
            raise ValueError("relation match: got no layer pairs; give one or more (student layer, teacher layer)")
        given = {"queries": queries, "keys": keys, "values": values}
        for name, weight in given.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise ValueError(f"relation match: {name} must be a weight from 0 up, got {weight!r}")
        if not any(given.values()):
            raise ValueError("relation match: queries, keys and values are all 0; give one of them a weight above 0")
        if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int) or heads < 1):
            raise ValueError(f"relation match: heads must be None or a whole number from 1 up, got {heads!r}")
        self.pairs = [tuple(pair) for pair in pairs]
        self.weights = {name: float(weight) for name, weight in given.items() if weight}
        self.heads = heads

    @property
    def student_layers(self) -> list[int]:
        """The student's layers that are compared: what to give `collect_attention`."""
        return sorted({student for student, _ in self.pairs})

    @property
    def teacher_layers(self) -> list[int]:
        """The teacher's layers that are compared."""
        return sorted({teacher for _, teacher in self.pairs})

    def check(self, student: nn.Module, teacher: nn.Module) -> None:
        """Raises ValueError, before anything is run, for what these two models do not have or cannot record."""
        for side, model, layers in (
            ("student", student, self.student_layers),
            ("teacher", teacher, self.teacher_layers),
        ):
            for layer, record in check_recorded(model, layers).items():
                if isinstance(record, MixerRecord):
                    raise ValueError(_no_relations(side, layer))
            config = layers_config(model)
            count, size = getattr(config, "num_attention_heads", None), getattr(config, "head_dim", None)
            if self.heads is None or not isinstance(count, int):
                continue
            size = size if isinstance(size, int) else config.hidden_size // count
            kept = getattr(config, "num_key_value_heads", None) or count
            for name in self.weights:
                self._check_heads(side, name, size * (count if name == "queries" else kept))
        check_windows("relation match", self.pairs, student, teacher)

    def __call__(
        self, student: Mapping[int, LayerRecord], teacher: Mapping[int, LayerRecord], segment_ids: Tensor | None = None
    ) -> Tensor:
        """The mean over pairs of each pair's loss, a scalar in float32, or float64 if either side is.

        Args:
            student, teacher: what `collect_attention(..., values=True)` noted of their forward passes on the same rows.
                The teacher gets no gradient and may lie on another device.
            segment_ids: (b, n), the documents of packed rows, -1 at padding; None: each row one document.

        Raises:
            ValueError: nothing recorded of a layer, or relation heads that do not divide its channels.
        """
        return torch.stack(list(self.losses(student, teacher, segment_ids).values())).mean()

    def losses(
        self, student: Mapping[int, LayerRecord], teacher: Mapping[int, LayerRecord], segment_ids: Tensor | None = None
    ) -> dict[tuple[int, int], Tensor]:
        """Each pair's loss, a scalar; arguments as in `__call__`, which is their mean."""
        found = {}
        for i, j in self.pairs:
            mine, theirs = _attention(student, i, "student"), _attention(teacher, j, "teacher")
            counts = (x.shape[1] for record in (mine, theirs) for x in (record.query, record.key) if x is not None)
            heads = self.heads or math.gcd(*counts)
            terms = []
            for name, weight in self.weights.items():
                s = self._relation(mine, name, heads, "student", segment_ids)
                t = self._relation(theirs, name, heads, "teacher", segment_ids, s.q.device)
                terms.append(weight * mixing_distance(s, t, metric="kl"))
            found[i, j] = torch.stack(terms).sum()
        return found

    def _relation(
        self,
        record: AttentionRecord,
        name: str,
        heads: int,
        side: str,
        segment_ids: Tensor | None,
        device: torch.device | None = None,
    ) -> AttentionMixing:
        """The relation of a layer's queries, keys or values, unmaterialised. device: where a teacher's is compared."""
        x = getattr(record, RELATIONS[name])
        if x is None:
            raise ValueError(f"relation match: no {name} of the {side} were noted; use collect_attention(values=True)")
        x = x if device is None else x.detach().to(device)
        self._check_heads(side, name, x.shape[1] * x.shape[3], heads)
        if x.shape[1] != heads:  # (b, h, n, d): all heads' channels side by side, cut anew
            x = x.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)
        ids = None if segment_ids is None else segment_ids.to(x.device)
        return AttentionMixing(x, x, window=record.window, segment_ids=ids, causal=record.causal)

    def _check_heads(self, side: str, name: str, channels: int, heads: int | None = None) -> None:
        if channels % (heads := heads or self.heads or 1):
            raise ValueError(
                f"relation match: {heads} heads do not divide the {channels} channels of the {side}'s {name}; give a "
                f"divisor, or None"
            )


def _attention(records: Mapping[int, LayerRecord], layer: int, side: str) -> AttentionRecord:
    record = recorded("relation match", records, layer, side)
    if isinstance(record, MixerRecord):
        raise ValueError(_no_relations(side, layer))
    return record


def _no_relations(side: str, layer: int) -> str:
    return (
        f"relation match: layer {layer} of the {side} has a state-space mixer, which has no queries, keys and values; "
        "pair layers with attention"
    )
