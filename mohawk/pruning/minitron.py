"""Minitron pruning in plain Python: a model, a target size, a smaller model; to be healed by any training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from mohawk.errors import UserError
from mohawk.loading.causal import plain_model
from mohawk.models.cutting.cuts import Cut, cut, resolve_layers
from mohawk.models.cutting.sizes import Sizes, base_config, check_sizes, sizes_of
from mohawk.pruning.baselines import magnitude_importance, random_importance
from mohawk.pruning.importance import Importance, check_scores, choose, chosen_layers, measure_importance
from mohawk.pruning.search import Budget, Costs, candidates
from mohawk.pruning.sizes import WIDTHS, empty_model, parameters_of

log = logging.getLogger(__name__)

STRATEGIES = ("importance", "magnitude", "random")
WRITTEN = 64, 128  # rows and tokens of calibration text that a teacher writes itself
STEPS = 12  # depths tried on the way down, until one reaches the target


class MinitronPruner:
    """Cuts a model to a number of parameters (arXiv 2407.14679); `mohawk prune` also heals, in rounds.

        pruner = MinitronPruner(teacher, target_params=90_000_000, calibration=batches)
        student = pruner.prune()
        loss = KnowledgeDistiller(teacher, student).compute_loss(input_ids)  # heals it

    Args:
        teacher: a causal LM of a supported family, or a `HybridForCausalLM`; left as it was.
        target_params: how many parameters are left, all of them counted; below 1 a share of those outside embedding and
            head. Met from below, to within `tolerance`.
        strategy: "importance" (activations), "magnitude" (norms of weights) or "random". pruning_strategy: the same, by
            the name that tutorials have for it.
        calibration: text for the importance: packed batches as `mohawk.data.packing.collate` gives them, a tokenizer's
            with an attention mask, or (rows, n) int64 token ids. None: text that the teacher writes itself
            (`written_text`), which ranks units less well than the text it will be used on.
        importance: scores measured before, instead of all that: `Importance.load(path)`.
        target_memory, target_flops: instead of `target_params` or beside it: bytes of weights (in the teacher's dtype)
            and of the state after `context` tokens, and floating-point operations of one token decoded there. The model
            is within all that are given, and uses up one to within `tolerance`.
        sizes: instead of all these: the sizes to cut to.
        depth: layers to keep with `target_params`; None: all of them if the target can be reached by width, else as
            many as it can. Minitron finds that width costs less quality than depth up to 15B parameters;
            benchmarks/results/pruning.md has the opposite for a model of 135M after 49,152 tokens of healing.
        width: what gets narrower: "all" (hidden channels, heads, MLPs), "inner" (heads, MLPs) or "ffn".
        layers: which layers stay where some go: as in `mohawk.pruning.importance.choose`.
        tolerance: share of `target_params` that may be unused.
        seed: of "random".

    Raises:
        ValueError: an unknown or contradictory option, a target that cannot be reached or is above the model's size,
            token ids that are not the model's, or scores of a model of other sizes.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        target_params: float | None = None,
        strategy: str = "importance",
        calibration: Iterable[Mapping[str, Tensor]] | Tensor | None = None,
        *,
        importance: Importance | None = None,
        sizes: Sizes | None = None,
        depth: int | None = None,
        width: str = "all",
        layers: str | Sequence[int] | Tensor = "score",
        tolerance: float = 0.03,
        seed: int = 0,
        pruning_strategy: str | None = None,
        target_memory: float | None = None,
        target_flops: float | None = None,
        context: int = 4096,
    ):
        if pruning_strategy is not None:
            if strategy not in ("importance", pruning_strategy):
                raise ValueError(f"pruning_strategy: got {pruning_strategy!r} beside strategy {strategy!r}; give one")
            strategy = pruning_strategy
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy: got {strategy!r}; allowed: {', '.join(STRATEGIES)}")
        if width not in WIDTHS:
            raise ValueError(f"width: got {width!r}; allowed: {', '.join(WIDTHS)}")
        limits = {"memory": target_memory, "flops": target_flops}
        self.limits = {name: limit for name, limit in limits.items() if limit is not None}
        for name, limit in self.limits.items():
            if not _is_number(limit):
                raise ValueError(f"target_{name}: got {limit!r}; allowed: a number above 0")
        if type(context) is not int or context < 1:
            raise ValueError(f"context: got {context!r}; allowed: a number of tokens, at least 1")
        self.context = context
        if (target_params is None and not self.limits) == (sizes is None):
            raise ValueError("give either target_params or sizes, or target_memory or target_flops for the former")
        own = sizes_of(teacher.config).layers
        if target_params is not None and (not _is_number(target_params) or 1 <= target_params < 1000):
            raise ValueError(
                f"target_params: got {target_params!r}; allowed: a number of parameters, at least 1000, or a share "
                "below 1"
            )
        if not _is_number(tolerance) or tolerance >= 1:
            raise ValueError(f"tolerance: got {tolerance!r}; allowed: a share above 0 and below 1")
        if depth is not None and not (type(depth) is int and 1 <= depth <= own):
            raise ValueError(f"depth: got {depth!r}; allowed: 1 to {own} layers, or None")
        if importance is not None:
            if strategy != "importance" or calibration is not None:
                other = "calibration" if calibration is not None else f"strategy {strategy!r}"
                raise ValueError(f"importance beside {other}: scores are measured already; leave out one of them")
            check_scores(importance, teacher.config)
        if sizes is not None:
            check_sizes(teacher.config, sizes)
            depth = sizes.layers
        if isinstance(layers, Tensor):
            if layers.shape != (own,):
                raise ValueError(f"layers: got scores of shape {tuple(layers.shape)}; allowed: ({own},)")
        elif layers not in ("score", "block"):
            named = len(resolve_layers(layers, own))
            if depth not in (None, named):
                raise ValueError(
                    f"layers: {layers!r} keeps {named}, but {'sizes say' if sizes else 'depth is'} {depth}"
                )
            depth = named
        self.teacher, self.strategy, self.layers, self.seed = teacher, strategy, layers, seed
        self.target_params, self.depth, self.width, self.tolerance = target_params, depth, width, tolerance
        self._calibration, self._sizes = calibration, sizes
        self._importance = importance

    @property
    def importance(self) -> Importance:
        """The teacher's scores, measured once."""
        if self._importance is None:
            if self.strategy == "magnitude":
                self._importance = magnitude_importance(self.teacher)
            elif self.strategy == "random":
                self._importance = random_importance(self.teacher.config, self.seed)
            else:
                text = self._calibration
                if text is None:
                    log.warning("no calibration: importance is measured on %d x %d tokens that the teacher writes "
                                "itself; text of your own ranks units better", *WRITTEN)  # fmt: skip
                    text = written_text(self.teacher, seed=self.seed)
                self._importance = measure_importance(self.teacher, _batches(text, self.teacher.config.vocab_size))
        return self._importance

    @property
    def sizes(self) -> Sizes:
        """The sizes that the model is cut to, searched for once if they were not given."""
        if self._sizes is None:
            self._sizes = self._found()
        return self._sizes

    def cut(self) -> Cut:
        """Which units the model keeps: those with the highest scores, and the layers that were asked for."""
        return choose(self.importance, self.sizes, layers=self.layers)

    def prune(self) -> Any:
        """The smaller model, of the teacher's class, dtype and device; its parameters are trainable."""
        return cut(self.teacher, self.cut()).requires_grad_(True)

    prune_and_create_student = prune  # what tutorials call it

    def _found(self) -> Sizes:
        config, own = self.teacher.config, sizes_of(self.teacher.config)
        kind, value = None if self.target_params is None else "parameters", self.target_params or 0.0
        if self.target_params is not None and self.target_params < 1:
            kind, value = "nonembedding", self.target_params * parameters_of(empty_model(config))[1]
        budgets = [] if kind is None else [Budget(kind, value, self.tolerance)]
        budgets += [Budget(name, limit, self.tolerance) for name, limit in self.limits.items()]
        budget = Budget.together(budgets, self.tolerance)
        dtype = str(self.teacher.dtype).removeprefix("torch.")
        costs = Costs(config, budget, context=self.context, dtype=dtype)
        least = max(1, own.layers // STEPS)
        depths = [self.depth] if self.depth is not None else [*range(own.layers, 0, -least)]
        reasons: list[str] = []
        for depth in depths:
            try:
                return candidates(
                    costs, budget, depths=[depth], widths=[self.width],
                    kept=lambda count: chosen_layers(self.importance, count, self.layers),
                )[0]  # fmt: skip
            except UserError as error:
                reasons.append(str(error))
        tried = "" if len(depths) == 1 else f" (nor with other numbers of layers down to {depths[-1]}: {reasons[-1]})"
        names = ", ".join([*(["target_params"] if kind else []), *(f"target_{name}" for name in self.limits)])
        raise ValueError(f"{names}: {reasons[0]}" + (tried if reasons[-1] != reasons[0] else ""))


def written_text(model: PreTrainedModel, rows: int = WRITTEN[0], length: int = WRITTEN[1], *, seed: int = 0) -> Tensor:
    """(rows, length) int64 ids that a causal LM writes at temperature 1 from its bos token, or from even draws.

    The same for the same seed. Modes, generation settings and random states are left as they were.
    """
    writer, device = plain_model(model), model.device
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(model.config.vocab_size, (rows, 1), generator=generator)
    if (bos := base_config(model.config).bos_token_id) is not None and 0 <= bos < model.config.vocab_size:
        first.fill_(bos)
    own, training = writer.generation_config, model.training
    model.eval()
    writer.generation_config = GenerationConfig()  # which may have a repetition penalty or an end of its own
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            settings = GenerationConfig(max_new_tokens=length - 1, do_sample=True, top_k=0, pad_token_id=0)
            return writer.generate(
                first.to(device), attention_mask=torch.ones_like(first).to(device), generation_config=settings
            )
    finally:
        writer.generation_config = own
        model.train(training)


def _is_number(value: Any) -> bool:
    """Whether it is one above 0 and finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _batches(calibration: Iterable[Mapping[str, Tensor]] | Tensor, vocabulary: int) -> Iterator[Mapping[str, Tensor]]:
    """Batches of calibration text; ValueError for what is none, when it is read."""
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.dtype not in (torch.int64, torch.int32) or calibration.numel() == 0:
            raise ValueError(
                f"calibration: got {calibration.dtype} of shape {tuple(calibration.shape)}; allowed: int64 (rows, n)"
            )
        calibration = ({"input_ids": rows} for rows in calibration.split(8))
    for batch in calibration:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise ValueError(
                f"calibration: got a {type(batch).__name__} in it; allowed: batches with input_ids, a dictionary each, "
                "or one tensor of token ids (rows, n)"
            )
        ids = batch["input_ids"]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            wrong = int(ids.max()) if int(ids.max()) >= vocabulary else int(ids.min())
            raise ValueError(f"calibration: got token {wrong}; allowed: 0 to {vocabulary - 1}, the model's own")
        yield batch
