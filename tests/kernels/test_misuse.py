"""What the kernels cannot take is said in one line: what, where, what was given, what to do."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mohawk import (
    AttentionMixing,
    DeltaMixing,
    SSDMixing,
    TeacherTopK,
    causal_conv1d,
    gated_delta_rule,
    kd_loss,
    linear_kd_loss,
    mixing_distance,
    mixing_matrix,
    ssd,
)

g = torch.Generator().manual_seed(0)
Q, K = torch.randn(1, 2, 9, 8, generator=g), torch.randn(1, 2, 9, 8, generator=g)
X, B = torch.randn(1, 9, 2, 3, generator=g), torch.randn(1, 9, 2, 4, generator=g)
DECAY, WEIGHT = -torch.rand(1, 9, 2, generator=g), torch.randn(3, 4, generator=g)
LOGITS = torch.randn(4, 7, generator=g)
CALLS = {
    "kd_loss": lambda x: kd_loss(x, LOGITS),
    "linear_kd_loss": lambda x: linear_kd_loss(x, LOGITS, LOGITS @ LOGITS.T),
    "mixing_distance": lambda x: mixing_distance(AttentionMixing(x, K), AttentionMixing(Q, K)),
    "mixing_distance, ssd": lambda x: mixing_distance(SSDMixing(x, B, DECAY), AttentionMixing(Q, K)),
    "mixing_distance, delta": lambda x: mixing_distance(DeltaMixing(x, B, -DECAY, DECAY), AttentionMixing(Q, K)),
    "ssd": lambda x: ssd(x, DECAY, B, B),
    "gated_delta_rule": lambda x: gated_delta_rule(B, B, x, beta=-DECAY, log_decay=DECAY),
    "causal_conv1d": lambda x: causal_conv1d(x, WEIGHT),
}
GIVEN = {
    "kd_loss": LOGITS,
    "linear_kd_loss": LOGITS,
    "mixing_distance": Q,
    "mixing_distance, ssd": B,
    "mixing_distance, delta": B,
    "ssd": X,
    "gated_delta_rule": X,
    "causal_conv1d": X[:, :, 0],
}


def refused(call, match):
    with pytest.raises(ValueError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_without_values(name):
    call, given = CALLS[name], GIVEN[name]
    refused(lambda: call(given.to("meta")), "on the meta device; it must be a dense tensor with values")
    refused(lambda: call(given.numpy()), "is a ndarray; it must be a tensor")
    refused(lambda: call(given.to_sparse()), "torch.sparse_coo; it must be a dense tensor")
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(given)
    refused(lambda: call(fake), "is a FakeTensor; it must be a dense tensor with values")
    if name not in ("kd_loss", "linear_kd_loss"):
        refused(lambda: call(None), "is None; it must be a tensor")


@pytest.mark.parametrize("name", CALLS)
def test_transforms_of_functions(name):
    """Refused, and possible by the reference, as it says."""
    call, given = CALLS[name], GIVEN[name]
    for transform in (
        lambda: torch.func.grad(lambda x: call(x).sum())(given),
        lambda: torch.func.jvp(call, (given,), (given,)),
        lambda: torch.func.vmap(call)(given[None]),
    ):
        refused(transform, r"inside a transform of torch.func \(grad, vmap, jvp\); use torch.autograd")


def test_whatever_stands_beside_the_student_has_values():
    """Labels, ids and normalizer too: without values or inside a transform, one line says which."""
    z, t, y = torch.randn(4, 9), torch.randn(4, 9), torch.arange(4)
    with FakeTensorMode() as mode:
        fake, one = torch.arange(4), mode.from_tensor(torch.ones(()))
    for name, call in (
        ("labels is a FakeTensor", lambda: kd_loss(z, t, fake)),
        ("labels is torch.sparse_coo", lambda: kd_loss(z, t, y.to_sparse())),
        ("normalizer is a FakeTensor", lambda: kd_loss(z, t, normalizer=one)),
        ("normalizer is on the meta device", lambda: kd_loss(z, t, normalizer=torch.ones((), device="meta"))),
        ("TeacherTopK.ids is a FakeTensor", lambda: kd_loss(z, TeacherTopK(fake[:, None], -t[:, :1].abs()))),
        ("the teacher is inside", lambda: torch.func.grad(lambda x: kd_loss(z, x))(t)),
        ("labels is inside", lambda: torch.func.vmap(lambda x: kd_loss(z, t, x))(y.expand(2, 4))),
        (
            "token_weights is inside",
            lambda: torch.func.vmap(lambda x: kd_loss(z, t, token_weights=x))(torch.ones(2, 4)),
        ),
    ):
        with pytest.raises(ValueError, match=name):
            call()


def test_the_reference_under_torch_func():
    x = LOGITS.clone().requires_grad_()
    kd_loss(x, LOGITS.flip(0), backend="reference").backward()
    found = torch.func.grad(lambda x: kd_loss(x, LOGITS.flip(0), backend="reference"))(LOGITS)
    torch.testing.assert_close(found, x.grad)
    x = X.clone().requires_grad_()
    ssd(x, DECAY, B, B).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: ssd(x, DECAY, B, B, backend="reference").sum())(X), x.grad)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_tensors_in_parts(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name, call in CALLS.items():
            if name != "kd_loss":  # which takes them
                part = distribute_tensor(GIVEN[name], mesh, [Shard(0)])
                refused(lambda call=call, part=part: call(part), r"is a DTensor .*x.to_local\(\).*module.unshard\(\)")
    finally:
        dist.destroy_process_group()


def test_numbers():
    teacher = AttentionMixing(Q, K)
    for options, message in (
        ({"softcap": float("inf")}, "softcap must be None or a finite number above 0, got inf"),
        ({"softcap": float("nan")}, "softcap must be None or a finite number above 0, got nan"),
        ({"softcap": True}, "softcap must be"),
        ({"scale": float("nan")}, "scale must be None or a finite number, got nan"),
        ({"scale": torch.tensor(0.3)}, "scale must be None or a finite number"),
        ({"window": True}, "window must be None or a whole number from 1 up, got True"),
        ({"window": 2.0}, "window must be"),
    ):
        refused(lambda options=options: AttentionMixing(Q, K, **options), message)
    refused(lambda: mixing_distance(teacher, teacher, backend="triton"), "student is on cpu; it needs a CUDA or ROCm")
    refused(lambda: kd_loss(LOGITS, LOGITS, backend="triton"), "student is on cpu; it needs a CUDA or ROCm")
    refused(lambda: mixing_matrix(teacher, (0.5, 3)), "rows must be")
    refused(lambda: mixing_matrix(teacher, heads=[0.7]), "heads must be whole numbers")
    refused(lambda: causal_conv1d(X[:, :, 0], WEIGHT.long()), "weight must be floating point")
    refused(lambda: ssd(X, DECAY, B, B, segment_ids=np.zeros((1, 9), dtype=np.int64)), "segment_ids is a ndarray")


@pytest.mark.parametrize("whole", (np.int64, np.int32, np.uint8))
def test_numpys_whole_numbers(whole):
    mine, theirs = AttentionMixing(Q, K, window=whole(3)), AttentionMixing(Q, K, window=3)
    assert mine.window == 3 and type(mine.window) is int
    assert mixing_distance(mine, theirs) == 0
    assert torch.equal(
        mixing_matrix(mine, (whole(1), whole(4)), heads=[whole(1)]), mixing_matrix(theirs, (1, 4), heads=[1])
    )
    labels = torch.tensor([1, 2, 3, 0])
    options = {"ce_weight": 1.0, "ignore_index": whole(3), "vocab_size": whole(5), "temperature": np.float32(2)}
    plain = {"ce_weight": 1.0, "ignore_index": 3, "vocab_size": 5, "temperature": 2.0}
    assert torch.equal(kd_loss(LOGITS, -LOGITS, labels, **options), kd_loss(LOGITS, -LOGITS, labels, **plain))
