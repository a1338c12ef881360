"""A mixer's step on a cache: by one call, or operation by operation where that is needed, the same as one forward."""

import pytest
import torch

from mohawk.kernels.decode import c_backend
from mohawk.models import delta_mixer, mixers
from mohawk.models.call import CACHE
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.mixer_names import MIXER_NAMES
from mohawk.models.state_mixer import _says_how_it_decodes
from tests.models.conftest import tiny_teacher

IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=MIXER_NAMES)
def student(request):
    torch.manual_seed(3)
    student = hybrid_from_teacher(tiny_teacher(num_hidden_layers=2), [1], request.param).eval()
    with torch.no_grad():
        for parameter in student.model.layers[1].self_attn.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return student


@pytest.fixture
def calls(monkeypatch):
    """How many steps were one call."""
    made = []
    for module, name in ((mixers, "ssd_decode_step"), (delta_mixer, "delta_decode_step")):
        step = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, step=step, **k: (made.append(1), step(*a, **k))[1])
    return made


def decode(student, modes, masks=None):
    """Logits of IDS, 5 tokens at once and then one by one, with gradients recorded where a mode says so."""
    with torch.no_grad():
        out = student(IDS[:, :5], use_cache=True)
    logits = [out.logits]
    for t, mode in zip(range(5, 9), modes, strict=True):
        with torch.set_grad_enabled(mode):
            mask = None if masks is None else masks[:, : t + 1]
            out = student(IDS[:, t : t + 1], attention_mask=mask, **{CACHE: out[CACHE]})
        logits.append(out.logits.detach())
    return torch.cat(logits, 1)


@torch.no_grad()
def whole(student):
    return student(IDS).logits


@pytest.mark.parametrize("compiler", (True, False))
def test_one_call_is_the_forward(student, calls, compiler, monkeypatch):
    if not compiler:
        monkeypatch.setattr(c_backend, "library", lambda: "there is no C compiler")
    torch.testing.assert_close(decode(student, [False] * 4), whole(student), rtol=1e-4, atol=1e-4)
    assert len(calls) == 4


def test_gradients_between_steps_without(student, calls):
    """The cache's memory that a step without gradients laid out can be written to where they are recorded."""
    torch.testing.assert_close(decode(student, [False, True, False, True]), whole(student), rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


def test_hooks_run(student, calls):
    """Offloaded weights come by hooks: modules that have some are called."""
    mixer = student.model.layers[1].self_attn
    ran = []
    mixer.conv1d.register_forward_pre_hook(lambda *_: ran.append(1))
    torch.testing.assert_close(decode(student, [False] * 4), whole(student), rtol=1e-4, atol=1e-4)
    assert len(ran) == 6 and not calls


class Around(torch.nn.Module):
    """As an adapter is: it has the weight of what it stands for, and computes something else."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    @property
    def weight(self):
        return self.module.weight

    def forward(self, *given, **options):
        return 2 * self.module(*given, **options)


def test_modules_with_adapters_around_them_run(student, calls):
    mixer = student.model.layers[1].self_attn
    for module, _ in mixer.read_by_decode():
        name = next(name for name, child in mixer.named_children() if child is module)
        setattr(mixer, name, Around(module))
        torch.testing.assert_close(decode(student, [False] * 4), whole(student), rtol=1e-4, atol=1e-4)
        assert not calls
        setattr(mixer, name, module)


def test_a_row_that_has_ended(student, calls):
    """Padding behind a row's tokens: its state stays, and the other row goes on as by itself."""
    masks = torch.ones(2, 9, dtype=torch.long)
    masks[1, 6:] = 0
    made = decode(student, [False] * 4, masks)
    torch.testing.assert_close(made[0], whole(student)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made[1, :6], whole(student)[1, :6], rtol=1e-4, atol=1e-4)
    assert len(calls) == 4


@pytest.mark.parametrize("name", MIXER_NAMES)
def test_a_class_that_changes_a_part_decodes_by_its_parts(name):
    """Not by what another class says of a step: its own gate would be passed over."""
    stock = mixers.MIXERS[name]
    assert _says_how_it_decodes(stock)
    for part in ("gate", "recur_step", "_cut"):
        assert not _says_how_it_decodes(type("Own", (stock,), {part: lambda *_: None})), part
    both = {"gate": lambda *_: None, "decode_options": lambda _: {}}
    assert _says_how_it_decodes(type("Own", (stock,), both))
