"""A model spread over processes by torch's FSDP2: its matrices lie in parts, and are whole only while they are used.

Matrices are sharded; norms, biases, decays and convolutions are not: they are small, and keep float32 beside products
in bfloat16. Each decoder layer is gathered by itself, the embedding too, final norm and head together (with the
embedding where it is tied). With a model or tensor that is not sharded every function here does the plain thing, so
that what calls them need not ask.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mohawk.models.casting import cast, exact_scales
from mohawk.models.decoders import decoder

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor, distribute_tensor
else:  # a torch that was built without: nothing is sharded
    DTensor = FSDPModule = ()

T = TypeVar("T")
RUN = "run_sharded"  # a forward method of a sharded model and its layers, which does any work


def is_sharded(what: Tensor | nn.Module) -> bool:
    """Whether a tensor is in parts on several processes, or a model was spread by `shard`."""
    return isinstance(what, (DTensor, FSDPModule))


def shard(model: nn.Module, mesh: Any, *, dtype: torch.dtype | None = None, trains: bool = True) -> None:
    """Spreads a causal LM over the processes of a mesh, in place; one on the meta device gets its memory next, by
    `materialise`.

    Args:
        model: of any architecture that `decoder` finds the layers of; all processes hold the same weights.
        mesh: a DeviceMesh of one dimension, or of two: replicas, and processes that share one (HSDP).
        dtype: of the gathered matrices of layers and head; None: their own. The embedding keeps its own, so that the
            residual stream is what it is without sharding under autocast.
        trains: whether any phase trains it. FSDP settles a gradient's dtype by what requires one now, so all of it
            must, whatever a first phase freezes.

    Gradients are summed over the processes, not averaged, as shares of one loss are.
    """
    model.requires_grad_(trains)
    kept = {p for p in model.parameters() if p.dim() < 2 or p.shape[1] == 1}
    norms = (module for module in model.modules() if "norm" in type(module).__name__.lower())
    kept |= {p for norm in norms for p in norm.parameters(recurse=False)}  # some have a weight for each head

    def group(modules: nn.Module | list[nn.Module], cast: bool, reshard: bool) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=dtype if cast else None,
            reduce_dtype=torch.float32 if trains else None,
            cast_forward_inputs=False,  # what a loss compares with is float32
        )
        # pyrefly: ignore[no-matching-overload]  # torch's overloads know no union
        fully_shard(modules, mesh=mesh, mp_policy=policy, ignored_params=kept, reshard_after_forward=reshard)

    body, layers = decoder(model)
    for layer in layers:
        for experts in _of_several(layer, kept):
            group(experts, False, True)
        group(layer, True, True)
    embedding, head = _embeddings(model)
    norms = [module for module in body.children() if module is not embedding and module not in (layers, head)]
    last = [norm for norm in norms if any(True for _ in norm.parameters())][-1:]
    if head is None or embedding.weight is head.weight:
        group([embedding, *last, *([] if head is None else [head])], False, False)
    else:
        group(embedding, False, True)
        group([*last, head], True, False)
    fully_shard(model, mesh=mesh, ignored_params=kept)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no other sum, and NCCL's premultiplied one is wrong in bfloat16 up to torch 2.13
            module.set_force_sum_reduction_for_comms(True)
    for module in (model, *layers):
        _let_run(module)
    if not any(p.is_meta for p in model.parameters()):
        _make_root(model)


def _of_several(layer: nn.Module, kept: set[nn.Parameter]) -> list[nn.Module]:
    """Modules that hold several matrices as one tensor: a layer's experts. Autocast rounds what it hands to a product
    of matrices, and not what slices are taken of, so that these keep their own dtype."""
    return [
        module
        for module in layer.modules()
        if any(p.dim() > 2 and p not in kept for p in module.parameters(recurse=False))
    ]


def materialise(model: nn.Module, device: torch.device | str) -> None:
    """Gives a model that was made on the meta device its memory, without values; of a sharded one each process its
    part's. Buffers that have values keep them."""
    made = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    model.to_empty(device=device)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in made:
                buffer.copy_(made[name])
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    if is_sharded(model):
        _make_root(model)


def _embeddings(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _run(self: nn.Module, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return work(*args, **kwargs)


def _let_run(module: nn.Module) -> None:
    module.__dict__[RUN] = types.MethodType(_run, module)
    register_fsdp_forward_method(module, RUN)


def _make_root(model: nn.Module) -> None:
    """An empty pass makes the model FSDP's root. Otherwise the layer that is called first would become one."""
    run_in(model, lambda: None)
    reshard(model)


def run_in(module: nn.Module, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """work(*args, **kwargs) as the module's forward: its own matrices are whole in it, and gradients of what it gives
    are summed over the processes after their backward pass, which FSDP follows from tensors, also in lists and dicts.
    Of a frozen model only detached tensors may leave it."""
    if RUN not in module.__dict__ and isinstance(module, FSDPModule):  # which someone else has spread
        _let_run(module)
    run: Any = module.__dict__.get(RUN)
    return work(*args, **kwargs) if run is None else run(work, *args, **kwargs)


def gathers(layer: nn.Module, part: nn.Module) -> nn.Module | None:
    """What of a layer has to run for the matrices of a part of it to be whole; None where they are not in parts."""
    groups = [module for module in layer.modules() if isinstance(module, FSDPModule)]
    return next((group for group in reversed(groups) if any(part is module for module in group.modules())), None)


@contextmanager
def whole_model(model: nn.Module) -> Iterator[None]:
    """Within, all of a sharded model is whole on every process, so that each may run it as often as it likes."""
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        if groups:
            reshard(model)
            embedding, head = _embeddings(model)
            tied = head is None or embedding.weight is head.weight
            within = [module for layer in decoder(model)[1] for module in layer.modules()]
            stay_whole([*within, *([] if tied else [embedding])], False)


@contextmanager
def called_apart(model: nn.Module, idle: Callable[[], Any]) -> Iterator[None]:
    """Within, each process may call a sharded model as often as it likes, a layer of it being whole at a time: one that
    is done does `idle`, which calls it once, until all of them are. All processes must come here."""
    device = next(model.parameters()).device

    def busy(here: bool) -> bool:
        flag = torch.tensor(float(here), device=device)
        dist.all_reduce(flag)
        return bool(flag)

    def tell(*_: Any) -> None:
        busy(True)

    hook = model.register_forward_pre_hook(tell, prepend=True)  # before FSDP's, which gathers what the root itself has
    try:
        yield
    finally:
        hook.remove()
    while busy(False):
        idle()
    reshard(model)


@contextmanager
def whole_head(model: nn.Module) -> Iterator[None]:
    """Within, the head's matrix is whole, outside of a forward pass."""
    head = _embeddings(model)[1] if is_sharded(model) else None
    if not isinstance(head, FSDPModule):
        yield
        return
    head.unshard()
    try:
        yield
    finally:
        head.reshard()


def reshard(model: nn.Module) -> None:
    """Parts again everywhere: a pass leaves the head whole, in the dtype of products, and neither an optimizer nor a
    file may have it so."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def stay_whole(layers: Iterable[nn.Module], whole: bool) -> None:
    """Whether layers stay whole from their forward pass to their backward pass, which in phases 1 and 2 comes next."""
    for layer in layers:
        if isinstance(layer, FSDPModule):
            layer.set_reshard_after_forward(not whole, recurse=False)


def prefetch(module: nn.Module) -> None:
    """Starts to gather a layer that is called soon."""
    if isinstance(module, FSDPModule):
        module.unshard(async_op=True)


# ---- tensors ----


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one process would have it, detached; all processes must ask for a sharded one."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parts_in(tensor: Tensor) -> int:
    """Over how many processes a tensor is spread; 1: each that has it has it whole."""
    return tensor.device_mesh.size(tensor.device_mesh.ndim - 1) if isinstance(tensor, DTensor) else 1


def first_row(tensor: Tensor) -> int:
    """Where in the first dimension of a tensor this process's part of it begins; 0 where it is whole."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    return min(rows, mesh.get_local_rank(mesh.ndim - 1) * -(-rows // parts_in(tensor)))


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Writes whole values, which all processes have, into a tensor, or each process its part of them; or values that
    are in such parts already."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(values)
        return
    if isinstance(values, DTensor) and values.placements == tensor.placements:
        tensor.to_local().copy_(values.to_local())
        return
    here = values.detach().to(device=tensor.to_local().device, dtype=tensor.dtype)
    part = distribute_tensor(here, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.to_local().copy_(part.to_local())


@torch.no_grad()
def copied(
    base: nn.Module, shape: nn.Module, spread: Callable[[nn.Module], None], source: Callable[[str], str] = str
) -> None:
    """Fills a model on the meta device with the weights of another one, in parts where `spread` brings it into them: a
    tensor at a time is whole.

    source: from the name of each of its parameters and buffers to the name in `base`.
    """
    reshard(base)
    theirs = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers())
    device = next(iter(theirs.values())).device
    spread(shape)
    materialise(shape, device)
    for name, tensor in (*shape.named_parameters(), *shape.named_buffers()):
        fill(tensor, whole(theirs[source(name)]))
    exact_scales(shape)


def copy_of(base: nn.Module, spread: Callable[[nn.Module], None], dtype: torch.dtype | None = None) -> Any:
    """A copy of a model in parts, in parts as `spread` brings it into them, a tensor at a time.

    dtype: of its parameters; default the base's.
    """
    plain: Any = base
    with torch.device("meta"):
        shape: Any = type(plain)(copy.deepcopy(plain.config))
    cast(shape, dtype or plain.dtype)
    copied(base, shape, spread)
    shape.generation_config = copy.deepcopy(plain.generation_config)
    return shape.train(base.training)


@torch.no_grad()
def whole_modules(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a model by their names, one after the other, with their weights whole and in their own dtype.

    Of a sharded model each is a copy, which has its weights until the next one is asked for, as all processes must.
    """
    if not is_sharded(model):
        yield from ((name, model.get_submodule(name)) for name in names)
        return
    reshard(model)
    plain: Any = model
    with torch.device("meta"):
        twin = type(plain)(plain.config)
    for name in names:
        own, theirs = twin.get_submodule(name), model.get_submodule(name)
        own.load_state_dict({key: whole(tensor) for key, tensor in theirs.named_parameters()}, assign=True)
        yield name, own
        own.to("meta")


def total_norms(groups: Sequence[Iterable[Tensor]], device: torch.device) -> Tensor:
    """(groups,) on the device: each group's 2-norm over all that the processes hold together, parts, and what each has
    whole and alike."""
    parts: list[list[Tensor]] = [[] for _ in groups]
    alike: list[list[Tensor]] = [[] for _ in groups]
    mesh = None
    for i, tensors in enumerate(groups):
        for tensor in tensors:
            if isinstance(tensor, DTensor):
                parts[i].append(tensor.to_local())
                mesh = tensor.device_mesh
            else:
                alike[i].append(tensor)
    if mesh is None:
        return torch.stack([nn.utils.get_total_norm(tensors).to(device) for tensors in alike])
    squares = torch.stack([_square([part for part in own if part.numel()], device) for own in parts])
    dist.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))
    return (squares + torch.stack([_square(tensors, device) for tensors in alike])).sqrt().float()


def _square(tensors: list[Tensor], device: torch.device) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return nn.utils.get_total_norm(tensors).to(device).double().square() if tensors else zero


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], most: float, norm: Tensor) -> None:
    """Scales gradients whose 2-norm is `norm` down to `most`, as torch's clip_grads_with_norm_ does."""
    parameters = list(parameters)
    if not any(map(is_sharded, parameters)):
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
        return
    factor = torch.clamp(most / (norm + 1e-6), max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            local(parameter.grad).mul_(factor.to(parameter.grad.device))
