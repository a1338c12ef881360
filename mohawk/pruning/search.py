"""A budget met in several ways: fewer layers or narrower ones, tried on text after an equal short healing.

`candidates` finds sizes that use up a budget, from configurations alone; `search` ranks them and picks.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from mohawk.core.json_files import read_json, write_json
from mohawk.core.processes import from_first, on_first
from mohawk.core.run_folder import SEARCH
from mohawk.errors import UserError
from mohawk.loading.describe import state_sizes
from mohawk.measures.compare import Comparison, decode_ratio, decode_speed
from mohawk.models.casting import cast
from mohawk.models.cutting.sizes import Sizes, sized_config, sizes_of
from mohawk.models.families import needed_attention
from mohawk.pruning.sizes import (
    WIDTHS,
    empty_model,
    flops_of,
    narrower,
    parameters_of,
    sizes_header,
    sizes_line,
    sizes_row,
    spread,
    unit,
)
from mohawk.runs.kept import Search
from mohawk.runs.sharding import MOST, device_bytes
from mohawk.runs.tables import print_tables

log = logging.getLogger(__name__)

PAIRS = 48  # of steps of a model and of the one that it is cut from, one right after the other
# of a budget's kind
UNITS = {"parameters": "parameters", "nonembedding": "parameters outside embedding and head", "memory": "bytes",
         "flops": "FLOPs a token", "latency": "ms a token", "several": "of the budget that is used most"}  # fmt: skip
Kept = Callable[[int], Sequence[int]]  # how many layers -> which
Each = Callable[[Sizes], tuple[float, ...]]  # sizes -> the cost, or of several budgets the share of each


@dataclass(frozen=True)
class Budget:
    """kind: one of UNITS. value: in that unit. tolerance: share of it that may be left (latency: or exceeded). parts:
    budgets that are met together, of kind several, whose value is 1: a model is within all and uses up one."""

    kind: str
    value: float
    tolerance: float = 0.03
    parts: tuple[Budget, ...] = ()

    @classmethod
    def of(cls, given: dict[str, Any]) -> Budget:
        """From `asdict` of one, as JSON gives it back."""
        parts = tuple(cls.of(part) for part in given.get("parts", ()))
        return cls(given["kind"], given["value"], given["tolerance"], parts)

    @classmethod
    def together(cls, budgets: Sequence[Budget], tolerance: float) -> Budget:
        """One budget of one or several. Raises ValueError where one of several is a latency, which is timed."""
        if len(budgets) == 1:
            return budgets[0]
        if any(budget.kind == "latency" for budget in budgets):
            raise ValueError("latency beside other budgets: it is timed, and never met for sure; give it alone")
        return cls("several", 1.0, tolerance, tuple(budgets))

    def covers(self, other: Budget) -> bool:
        """Whether all that is within the other is within this one."""
        mine, theirs = ({part.kind: part.value for part in one.parts or (one,)} for one in (self, other))
        return all(kind in theirs and theirs[kind] <= value for kind, value in mine.items())

    def exceeded(self, cost: float) -> bool:
        return cost > (1 + (self.tolerance if self.kind == "latency" else 1e-9)) * self.value

    def holds(self, cost: float) -> bool:
        """Whether a cost uses up the budget and does not exceed it."""
        return (1 - self.tolerance) * self.value <= cost and not self.exceeded(cost)

    def told(self, cost: float) -> str:
        if self.kind == "several":
            of = " and ".join(part.told(part.value) for part in self.parts)
            return of if cost == self.value else f"{cost:.1%} of {of}, of the one that it uses most"
        return f"{self.number(cost)} {UNITS[self.kind]}"

    def number(self, cost: float) -> str:
        """A cost without its unit."""
        return f"{cost:.4g}" if self.kind == "latency" else f"{cost:.1%}" if self.parts else f"{cost:,.0f}"


class Costs:
    """What a model of a configuration cut to some sizes costs in a budget's unit; nothing is counted twice.

    Args:
        config: of the model that is cut.
        budget: whose unit it is, or its kind. Of several budgets a cost is the largest share of one. Latency builds the
            model with random weights and times it here beside the one that it is cut from, step by step in turn: it is
            the latter's, measured once, times the median ratio, which other work on the machine changes little.
        context: tokens that the state (memory) and the decoded token (latency) come after.
        dtype: of the weights.
        convert: options of `hybrid_from_teacher`: costs are those of the hybrid that the cut model becomes.
        device: that latency is measured on.
    """

    def __init__(
        self,
        config: Any,
        budget: Budget | str,
        *,
        context: int = 4096,
        dtype: str = "float32",
        convert: dict[str, Any] | None = None,
        device: str | torch.device = "cpu",
    ):
        self.config, self.context, self.convert = config, context, convert
        self.budget = Budget(budget, 1.0) if isinstance(budget, str) else budget
        self.dtype, self.device = getattr(torch, dtype), torch.device(device)
        self._known: dict[tuple[Sizes, tuple[int, ...]], tuple[float, ...]] = {}
        self._whole: PreTrainedModel | None = None  # what latencies are measured beside
        self._milliseconds: float | None = None  # its own, of a token; measured once

    def __call__(self, sizes: Sizes, layers: Sequence[int]) -> float:
        return max(self.each(sizes, layers))

    def each(self, sizes: Sizes, layers: Sequence[int]) -> tuple[float, ...]:
        """The cost, or of several budgets the share of each."""
        key = (sizes, tuple(layers))
        if key not in self._known:
            self._known[key] = self._of(sized_config(self.config, sizes, layers))
        return self._known[key]

    def known(self, sizes: Sizes, layers: Sequence[int]) -> float | None:
        """What has been counted or measured already."""
        found = self._known.get((sizes, tuple(layers)))
        return None if found is None else max(found)

    def of(self, config: Any) -> float:
        """The cost of a model of this configuration."""
        return max(self._of(config))

    def let_go(self) -> None:
        """Free the model that latencies are measured beside; what it took is kept."""
        self._whole = None

    def _of(self, config: Any) -> tuple[float, ...]:
        model = empty_model(config, self.convert)
        model.config.dtype = self.dtype
        if self.budget.kind == "several":
            return tuple(self._counted(part.kind, model) / part.value for part in self.budget.parts)
        if self.budget.kind == "latency":
            return (self._timed(model),)
        return (self._counted(self.budget.kind, model),)

    def _counted(self, kind: str, model: PreTrainedModel) -> float:
        if kind == "flops":
            return flops_of(model, self.context)
        if kind == "memory":
            return float(self._bytes(model))
        total, inside = parameters_of(model)
        return float(total if kind == "parameters" else inside)

    def _bytes(self, model: PreTrainedModel) -> int:
        return parameters_of(model)[0] * self.dtype.itemsize + sum(state_sizes(model, self.context))

    def _timed(self, model: PreTrainedModel) -> float:
        """Milliseconds of a token, of the whole model times what this one takes of it."""
        whole = empty_model(self.config, self.convert)
        whole.config.dtype = self.dtype
        needed = self._bytes(whole) + self._bytes(model)
        if self._whole is None:
            self._whole = self._made(whole, needed)
        if self._milliseconds is None:
            self._milliseconds = 1000 / decode_speed(self._whole, [self.context], PAIRS)[0].tokens_per_s
        return self._milliseconds * decode_ratio(self._made(model, needed), self._whole, self.context, PAIRS)

    def _made(self, model: PreTrainedModel, needed: int) -> PreTrainedModel:
        """A model of this shape with random weights; needed: the bytes of all that is timed."""
        room = device_bytes(self.device)
        if needed > MOST * room:
            raise ValueError(
                f"its decoding is timed beside the whole model's in one process, which takes {needed / 2**30:.1f} GiB, "
                f"and may take {MOST:.0%} of {room / 2**30:.1f} GiB here; give a budget of parameters or memory"
            )
        config = model.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = AutoModelForCausalLM.from_config(config, attn_implementation=needed_attention(config))
        cast(made, self.dtype)
        # pyrefly: ignore[bad-argument-type]  # transformers wraps `to` and loses its parameters
        return made.to(self.device).eval()


def candidates(
    costs: Costs,
    budget: Budget,
    *,
    depths: Sequence[int] | None = None,
    steps: int = 4,
    widths: Sequence[str] = ("all", "ffn"),
    kept: Kept | None = None,
) -> list[Sizes]:
    """Sizes that use up a budget, deep and narrow first.

    Args:
        costs: of models cut from one.
        depths: numbers of layers; None: `steps` of them, from all layers down to as few as use it up at full width.
        widths: of WIDTHS; the way from the whole width to the narrowest. Parameters and memory are met by the neurons
            of the MLPs, which come in the smallest steps.
        kept: which layers stay, where that decides costs (hybrids); by default spread evenly.

    Raises:
        UserError: the model is within the budget as it is, or nothing that can be tried is.
    """
    own = sizes_of(costs.config)
    choice = kept or (lambda count: spread(own.layers, count))

    def of(count: int) -> Sequence[int]:  # kept may know of one number of layers alone
        return range(own.layers) if count == own.layers else choice(count)

    def cost(sizes: Sizes) -> float:
        return costs(sizes, of(sizes.layers))

    def each(sizes: Sizes) -> tuple[float, ...]:
        return costs.each(sizes, of(sizes.layers))

    whole = cost(own)
    if whole <= budget.value:
        raise UserError(f"the model already has {budget.told(whole)}; allowed: a budget below that")
    if wrong := [depth for depth in depths or () if depth > own.layers]:
        raise UserError(f"depths {wrong}: the model has {own.layers} layers; allowed: 1 to {own.layers}")
    tried = sorted(set(depths or _depths(own.layers, steps, lambda n: cost(replace(own, layers=n)), budget)))
    found: list[Sizes] = []
    for depth in reversed(tried):
        for width in widths:
            fitted = _fitted(costs.config, replace(own, layers=depth), width, budget, each, of(depth))
            if fitted is not None and fitted not in found:
                found.append(fitted)
    if not found:
        raise UserError(_why_none(costs.config, budget, own, tried, widths, cost))
    return found


def _depths(layers: int, steps: int, cost: Callable[[int], float], budget: Budget) -> list[int]:
    """Evenly from all layers down to the fewest that use up the budget at full width."""
    low, high = 1, layers
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) >= (1 - budget.tolerance) * budget.value else (middle + 1, high)
    return sorted({round(layers - i * (layers - low) / max(1, steps - 1)) for i in range(steps)})


def _why_none(
    config: Any, budget: Budget, own: Sizes, tried: Sequence[int], widths: Sequence[str], cost: Callable[[Sizes], float]
) -> str:
    """One line: on which side of the budget the models are that were tried."""
    line = f"{budget.told(budget.value)} cannot be reached to within {budget.tolerance:.0%} with {list(tried)} layers"
    others = f"allow other depths and widths ({', '.join(WIDTHS)})"
    most = cost(replace(own, layers=tried[-1]))
    if most < budget.value:
        return f"{line}: at full width they leave {budget.told(most)}, which is too little: allow more layers"
    line += f" and widths {', '.join(widths)}"
    least = min((cost(s) for s in (_narrowest(config, own, tried, width) for width in widths) if s), default=most)
    if budget.exceeded(least):
        return f"{line}; the smallest such model has {budget.told(least)}: raise the budget, or {others}"
    return f"{line}: they are above it or below all of its tolerance: raise the tolerance or the steps, or {others}"


def _narrowest(config: Any, own: Sizes, depths: Sequence[int], width: str) -> Sizes | None:
    path = narrower(config, own, width)
    return replace(path[-1], layers=depths[0], ffn=min(path[-1].ffn, unit(own.ffn))) if path else None


def _fitted(config: Any, full: Sizes, width: str, budget: Budget, each: Each, layers: Sequence[int]) -> Sizes | None:
    """The sizes of so many layers that use up the budget, as evenly narrow as can be; None: there are none."""

    def cost(sizes: Sizes) -> float:
        return max(each(sizes))

    if budget.holds(cost(full)):
        return full
    if cost(full) < budget.value:
        return None
    # every timing takes seconds
    steps = 16 if budget.kind == "latency" else 64
    left = sized_config(config, full, layers)  # which may have no mixer any more
    state = {name: getattr(full, name) for name in ("state_heads", "state_groups", "state_size")}
    if sizes_of(left).state_heads is not None:
        path = narrower(left, full, width, steps)
    else:
        path = [replace(point, **state) for point in narrower(left, sizes_of(left), width, steps)]
    low, high = 0, len(path) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(path[middle]) <= budget.value else (middle + 1, high)
    if budget.kind == "latency":
        near = [point for point in path[max(0, low - 1) : low + 1] if budget.holds(cost(point))]
        return min(near, key=lambda point: abs(cost(point) - budget.value), default=None)
    fitted = [_fit_ffn(full, point, budget, each) for point in path[max(0, low - 2) : low + 3]]
    return min((f for f in fitted if f is not None), key=lambda f: _unevenness(full, f, width), default=None)


def _fit_ffn(full: Sizes, point: Sizes, budget: Budget, each: Each) -> Sizes | None:
    """The point with as many neurons as the budget has room for: its costs are straight lines in them."""
    room = float(full.ffn)
    for least, most in zip(each(replace(point, ffn=1)), each(replace(point, ffn=full.ffn)), strict=True):
        slope = (most - least) / max(1, full.ffn - 1)
        room = min(room, 1 + (budget.value * (1 + 1e-12) - least) / slope) if slope > 0 else room
    if room < 1:
        return None
    neurons, step = min(full.ffn, int(room)), unit(full.ffn)
    while step:  # the roundest number that leaves no more than the tolerance
        fitted = replace(point, ffn=max(1, neurons // step * step))
        if budget.holds(max(each(fitted))):
            return fitted
        step //= 2
    return None


def within(costs: Costs, budget: Budget, sizes: Sizes, layers: Sequence[int]) -> Sizes:
    """The sizes, with as many neurons fewer as it takes to be within a budget of parameters or memory; the same where
    no number of neurons is."""

    if budget.kind == "latency" or not budget.exceeded(costs(sizes, layers)):
        return sizes
    return _fit_ffn(sizes, sizes, replace(budget, tolerance=1.0), lambda one: costs.each(one, layers)) or sizes


def _unevenness(full: Sizes, sizes: Sizes, width: str) -> float:
    """How far apart the shares are that stay of each axis."""
    names = ["ffn"] + ["heads"] * (width != "ffn") + ["hidden"] * (width == "all")
    shares = [math.log(getattr(sizes, name) / getattr(full, name)) for name in names]
    return max(shares) - min(shares)


def search(
    found: Sequence[Sizes],
    costs: Costs,
    budget: Budget,
    *,
    kept: Kept,
    make: Callable[[Sizes], PreTrainedModel],
    heal: Callable[[int, PreTrainedModel], None] | None,
    measure: Callable[[PreTrainedModel], Comparison],
    folder: Path,
    console: Console,
) -> Sizes:
    """The candidate of least KL from the teacher; writes folder/search.json after each one, and goes on from it.

    Args:
        make: a candidate, cut. heal: called with its number and model, trains it in place; None: ranked as cut.
        measure: on held-out text.

    In several processes all take part in healing; what `make` and `measure` give is the same on all.
    """
    path = folder / SEARCH
    state = from_first(lambda: read_json(path, Search)) or {"candidates": [{"sizes": asdict(sizes)} for sizes in found]}
    state |= {"budget": asdict(budget), "unit": UNITS[budget.kind]}
    rows = state["candidates"]
    heal = heal if len(rows) > 1 else None  # one alone needs no ranking
    for number, row in enumerate(rows):
        if "kl" in row:
            continue
        sizes = Sizes(**row["sizes"])
        layers = list(kept(sizes.layers))
        config = sized_config(costs.config, sizes, layers)
        model = make(sizes)
        cost = from_first(functools.partial(costs, sizes, layers))
        row |= {"layers": layers, "parameters": parameters_of(empty_model(config))[0], "cost": cost}
        before = measure(model)
        row |= {"kl_as_cut": before.kl, "perplexity_as_cut": before.student_perplexity}
        if heal is not None:
            heal(number, model)
        after = measure(model) if heal is not None else before
        row |= {"perplexity": after.student_perplexity, "top1_agreement": after.top1_agreement, "kl": after.kl}
        del model
        on_first(lambda: write_json(path, state))
        console.print(
            f"candidate {number + 1} of {len(rows)}: {sizes_line(sizes)}: KL {before.kl:.4f}"
            + (f" as cut, {after.kl:.4f} after light healing" if heal is not None else " as cut"),
            highlight=False,
        )
    best = min(range(len(rows)), key=lambda i: _rank(rows[i]))
    state["picked"] = best
    on_first(lambda: write_json(path, state))
    print_tables([search_table(state)], console)
    return Sizes(**rows[best]["sizes"])


def _rank(row: dict[str, Any]) -> float:
    return row["kl"] if math.isfinite(row["kl"]) else math.inf  # NaN comes last


def search_table(state: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """A finished search as a table of strings, the best candidate first."""
    rows = sorted(enumerate(state["candidates"]), key=lambda item: _rank(item[1]))
    header = ["candidate", *sizes_header(Sizes(**rows[0][1]["sizes"])), "parameters"]
    budget = Budget.of(state["budget"])
    counted = budget.kind in ("parameters", "nonembedding")
    header += [] if counted else [state["unit"]]
    healed = any(row["kl"] != row["kl_as_cut"] for _, row in rows)
    header += ["KL as cut", *["KL healed"] * healed, "perplexity"]
    lines = []
    for number, row in rows:
        line = [f"{number + 1}" + (" (picked)" if number == state["picked"] else "")]
        line += [*sizes_row(Sizes(**row["sizes"])), f"{row['parameters']:,}"]
        if not counted:
            line.append(budget.number(row["cost"]))
        line += [f"{row['kl_as_cut']:.4f}", *[f"{row['kl']:.4f}"] * healed, f"{row['perplexity']:.2f}"]
        lines.append(line)
    how = "after equal light healing" if healed else "as cut"
    return f"Candidates within {budget.told(budget.value)}, {how}", header, lines
