"""Adding one of each kind takes as many files as CONTRIBUTING.md says: each is added here at run time in those places
alone, and works from end to end."""

import argparse
import io
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mohawk.cli import main, parser
from mohawk.conversion.objectives import MixingObjective
from mohawk.core.command import Command
from mohawk.errors import UserError
from mohawk.export.run import export
from mohawk.export.runtimes import Note
from mohawk.export.targets import TARGETS
from mohawk.inspection import commands as inspection
from mohawk.kernels.kd import gradients, teachers
from mohawk.kernels.kd.divergences import DIVERGENCES, Divergence
from mohawk.kernels.kd.interface import (
    TeacherHidden,
    TeacherLogits,
    TeacherMixture,
    TeacherTAID,
    TeacherTopK,
    kd_loss,
    linear_kd_loss,
)
from mohawk.kernels.mixing.interface import mixing_distance, mixing_matrix
from mohawk.kernels.mixing.metrics import METRICS, Metric
from mohawk.kernels.mixing.operands import AttentionMixing, SSDMixing
from mohawk.losses.label_probability import label_probability
from mohawk.models.families import FAMILIES, Family, decoder_layers
from mohawk.models.from_teacher import hybrid_from_teacher
from mohawk.models.mixer_names import MIXER_NAMES
from mohawk.models.mixers import MIXERS, SSMMixer
from mohawk.models.teacher_forcing import layer_calls, record, recording_attention
from tests.mohawk.export.test_export import needs_groups
from tests.mohawk.runs.test_distributed import place, written  # noqa: F401

ROWS, VOCAB, HIDDEN = 7, 11, 5


@pytest.fixture
def z():
    return torch.randn(ROWS, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture
def t():
    return torch.randn(ROWS, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


HELLINGER = Divergence(
    definition=lambda lp, lq, beta, lam: ((lp / 2).exp() - (lq / 2).exp()).square().sum(-1) / 2,
    text="squared Hellinger distance",
)


def hellinger(z: Tensor, p: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """T^2 * (1 - sum sqrt(p q)), mean over rows, and its gradient in z, by hand."""
    q = torch.softmax(z.detach() / temperature, -1)
    shared = (p * q).sqrt()
    affinity = shared.sum(-1, keepdim=True)
    value = temperature**2 * (1 - affinity).mean()
    return value, temperature * (q * affinity - shared) / 2 / len(z)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_divergence_is_an_entry(backend, z, t, monkeypatch):
    monkeypatch.setitem(DIVERGENCES, "hellinger", HELLINGER)
    options = {"divergence": "hellinger", "temperature": 2.0, "backend": backend}
    loss = kd_loss(z, t, **options)
    loss.backward()
    value, grad = hellinger(z, torch.softmax(t / 2, -1), 2.0)
    torch.testing.assert_close(loss.detach(), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(z.grad, grad, rtol=1e-10, atol=1e-14)


def test_a_divergence_meets_every_teacher(z, t, monkeypatch):
    """Both torch backends agree, and the gradients are those of a difference quotient."""
    monkeypatch.setitem(DIVERGENCES, "hellinger", HELLINGER)
    g = torch.Generator().manual_seed(3)
    hidden, head, own = (torch.randn(n, HIDDEN, dtype=torch.float64, generator=g) for n in (ROWS, VOCAB, VOCAB))
    source = TeacherHidden(torch.randn(ROWS, HIDDEN, dtype=torch.float64, generator=g), head, None, 0.5, 4.0)
    topk = t.log_softmax(-1).topk(3)
    sources = [
        source,
        TeacherMixture([source, TeacherLogits(t)], [1.0, 2.0]),
        TeacherTAID(TeacherLogits(t), 0.4),
        TeacherTopK(topk.indices, topk.values),
    ]
    labels = torch.randint(VOCAB, (ROWS,), generator=g)
    labels[2] = -100
    for one in sources:
        found = []
        for backend in ("reference", "chunked"):
            x, w = hidden.clone().requires_grad_(), own.clone().requires_grad_()
            options = {"divergence": "hellinger", "ce_weight": 0.5, "temperature": 1.5, "backend": backend}
            loss = linear_kd_loss(x, w, one, labels, **options)
            loss.backward()
            found.append((loss.detach(), x.grad, w.grad))
        for got, truth in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name in gradients.DISTRIBUTION | gradients.LOGITS])
def test_gradients_by_hand_are_those_of_the_definitions(name, z, t, monkeypatch):
    def both():
        z.grad = None
        loss = kd_loss(z, t, divergence=name, backend="chunked")
        loss.backward()
        return loss.detach(), z.grad

    by_hand = both()
    for table in (gradients.DISTRIBUTION, gradients.LOGITS):
        monkeypatch.delitem(table, name, raising=False)
    for got, expected in zip(both(), by_hand, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)


def test_a_divergence_without_a_gradient_by_hand_says_where_it_cannot_go(z, t, monkeypatch):
    monkeypatch.setitem(DIVERGENCES, "hellinger", HELLINGER)
    with pytest.raises(ValueError, match="'triton' can't be used"):
        kd_loss(z, t, divergence="hellinger", backend="triton")
    torch.compiler.reset()
    with pytest.raises(Exception, match="'hellinger' has no gradient by hand, so it can't be compiled"):
        torch.compile(lambda z: kd_loss(z, t, divergence="hellinger"), backend="eager")(z)


def test_recipes_and_texts_read_the_tables():
    """Where these have one more before anything else is imported; no torch is needed."""
    script = """
from mohawk.kernels.kd.divergences import DIVERGENCES, Divergence
from mohawk.kernels.mixing.metrics import METRICS
from mohawk.models.mixer_names import MIXER_NAMES
import sys
METRICS["rooted"], MIXER_NAMES["moving_average"] = METRICS["squared"], "an average"
DIVERGENCES["hellinger"] = Divergence(definition=lambda lp, lq, beta, lam: ..., text="squared Hellinger distance")
from pydantic import TypeAdapter, ValidationError
from mohawk.conversion.recipe import MixingPhase, Student
from mohawk.schema.base import Divergence
assert "torch" not in sys.modules
assert Student(mixer="moving_average").mixer == "moving_average" and MixingPhase(metric="rooted").metric == "rooted"
check = TypeAdapter(Divergence).validate_python
assert check("hellinger") == "hellinger" and check("jsd") == "jsd"
try:
    check("hellingre")
except ValidationError as error:
    assert "hellinger" in str(error)
else:
    raise AssertionError
from mohawk.kernels.kd.interface import kd_loss
assert "hellinger: squared Hellinger distance" in kd_loss.__doc__
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.fixture
def forget_sources():
    before = dict(teachers.SOURCES)
    yield
    teachers.SOURCES.clear()
    teachers.SOURCES.update(before)


def test_a_dense_teacher_source_is_a_class(z, t, forget_sources):
    """Logits in eighths, as int8: alone, in a mixture, with TAID, cut, compiled, and for the weighing of tokens."""

    @dataclass(frozen=True, eq=False)
    class TeacherEighths(teachers.Dense):
        codes: Tensor
        step_size: float

        ROWS = {"codes": 1}

        def check(self, student) -> None:
            student.beside("TeacherEighths.codes", self.codes, trailing=1)

        def scores(self, dtype: torch.dtype) -> Tensor:
            return self.codes.to(dtype) * self.step_size

    codes = (t * 8).round().to(torch.int8)
    ours, plain = TeacherEighths(codes, 0.125), TeacherLogits(codes.double() / 8)
    labels = torch.arange(ROWS)
    labels[1] = -100

    def result(source, backend, **options):
        z.grad = None
        loss = kd_loss(z, source, labels, temperature=2.0, ce_weight=0.5, backend=backend, **options)
        loss.backward()
        return loss.detach(), z.grad

    for wrap in (
        lambda one: one,
        lambda one: TeacherTAID(one, 0.5),
        lambda one: TeacherMixture([one, TeacherLogits(t)]),
    ):
        for backend in ("reference", "chunked"):
            for divergence in ("forward_kl", "jsd"):
                got = result(wrap(ours), backend, divergence=divergence)
                expected = result(wrap(plain), "reference", divergence=divergence)
                for a, b in zip(got, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)

    torch.compiler.reset()
    compiled = torch.compile(lambda z: kd_loss(z, ours), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z), kd_loss(z, plain))

    p = torch.softmax(codes.float() / 8, -1)
    expected = p.gather(1, labels.clamp(min=0)[:, None]).squeeze(1).masked_fill(labels < 0, 0)
    torch.testing.assert_close(label_probability(ours, labels), expected)
    with pytest.raises(ValueError, match="TeacherEighths.codes has leading dimensions"):
        kd_loss(z[:3], ours)


def test_another_teacher_source_is_a_class_too(z, forget_sources):
    """One id in each row, smoothed: sum over words of -target * log q is the cross-entropy with label smoothing."""

    @dataclass(frozen=True, eq=False)
    class TeacherSmoothed(teachers.TeacherSource):
        ids: Tensor
        smoothing: float

        ROWS = {"ids": 0}

        def check(self, student) -> None:
            student.beside("TeacherSmoothed.ids", self.ids, trailing=0)

        def compared(self, u: Tensor, divergence) -> Tensor:
            lq = u.log_softmax(-1)
            named = lq.gather(1, self.ids[:, None]).squeeze(1)
            return -(1 - self.smoothing) * named - self.smoothing * lq.mean(-1)

    ids = torch.arange(ROWS) % VOCAB
    labels = ids.clone()
    labels[4] = -100
    expected = torch.nn.functional.cross_entropy(z, labels, label_smoothing=0.1)
    (grad,) = torch.autograd.grad(expected, z)
    for backend in ("reference", "chunked"):
        z.grad = None
        loss = kd_loss(z, TeacherSmoothed(ids, 0.1), labels, backend=backend)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(z.grad, grad, rtol=1e-10, atol=1e-14)
    assert math.isfinite(loss.item())
    with pytest.raises(ValueError, match="one of TeacherLogits, .*TeacherSmoothed"):
        kd_loss(z, "nothing of the kind")
    torch.compiler.reset()
    with pytest.raises(Exception, match="TeacherSmoothed has no gradient by hand, so it can't be compiled"):
        torch.compile(lambda z: kd_loss(z, TeacherSmoothed(ids, 0.1)), backend="eager")(z)
    with pytest.raises(ValueError, match="TeacherTAID takes a dense teacher or a mixture, not TeacherSmoothed"):
        kd_loss(z, TeacherTAID(TeacherSmoothed(ids, 0.1), 0.5))


ROOTED = Metric(
    "||S - A||_F over the root of the number of real tokens",
    lambda s, a, n: (s - a).square().sum((-1, -2)).sqrt() / n**0.5,
    lambda total, size, n: (total.sqrt() / n**0.5, 1 / (total.sqrt() * n**0.5)),
)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_metric_is_an_entry(backend, monkeypatch):
    monkeypatch.setitem(METRICS, "rooted", ROOTED)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 1, 3, 9, 4, dtype=torch.float64, generator=g).unbind(1)
    q, k, qt, kt = q[0], k[0], q[1], k[1]
    q.requires_grad_()
    segments = torch.zeros(1, 9, dtype=torch.long)
    segments[0, 7:] = -1
    student, teacher = (AttentionMixing(*pair, segment_ids=segments) for pair in ((q, k), (qt, kt)))
    loss = mixing_distance(student, teacher, metric="rooted", backend=backend)
    loss.backward()

    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    s, a = ((x @ y.mT / 2).masked_fill(hidden, -math.inf).softmax(-1)[..., :7, :7] for x, y in ((q, k), (qt, kt)))
    expected = (torch.linalg.matrix_norm(s - a) / math.sqrt(7)).mean()
    (grad,) = torch.autograd.grad(expected, q)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(q.grad, grad, rtol=1e-8, atol=1e-12)
    with pytest.raises(ValueError, match="metric must be one of .*rooted, kl, got 'nothing'"):
        mixing_distance(student, teacher, metric="nothing")


class MovingAverage(SSMMixer):
    """A mixer whose decay and gate are constants per head and channel: in_proj rows are [x | B | C | z | a]."""

    label = "Moving average"

    def projection_size(self) -> int:
        return self.conv_size + self.inner_size + self.num_heads

    def slices(self) -> dict[str, slice]:
        d, s = self.inner_size, self.group_size
        ends = {"xBC": (0, d + 2 * s), "x": (0, d), "B": (d, d + s), "C": (d + s, d + 2 * s)}
        ends |= {"z": (d + 2 * s, 2 * d + 2 * s), "decay": (2 * d + 2 * s, None)}
        return {name: slice(*both) for name, both in ends.items()}

    def decay(self, raw: Tensor) -> tuple[Tensor, None]:
        return -torch.nn.functional.softplus(raw.float()), None

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        return y * torch.sigmoid(z)


def test_the_mixers_have_names_and_classes():
    assert list(MIXER_NAMES) == list(MIXERS)


@pytest.mark.parametrize("init", ["attention", "neutral", "random"])
def test_a_mixer_is_a_class_and_a_name(init, make_llama, monkeypatch):
    """It starts from a teacher, learns its matrices, and decodes as it computes whole sequences."""
    monkeypatch.setitem(MIXERS, "moving_average", MovingAverage)
    teacher = make_llama()
    student = hybrid_from_teacher(teacher, [1], "moving_average", init=init)
    assert type(decoder_layers(student)[1].self_attn) is MovingAverage
    ids = torch.randint(258, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = student(ids).logits
        first = student(ids[:, :9], use_cache=True)
        rest = student(ids[:, 9:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=1e-4, atol=1e-4)

    objective = MixingObjective(student, teacher)
    optimizer = torch.optim.AdamW(objective.parameter_groups(3e-3, 0.0))
    losses = []
    zeros = torch.zeros_like(ids)
    inputs = dict(input_ids=ids, position_ids=torch.arange(12).expand(2, 12), segment_ids=zeros, labels=ids)
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(sum(loss.backward() or loss.item() for _, loss in objective.losses(**inputs)))
        optimizer.step()
    assert losses[-1] < losses[0]


def test_a_run_with_a_mixer_of_a_class_and_a_name(place, tmp_path):  # noqa: F811
    """It is planned, trained, evaluated, told of and described, with nothing else that knows it."""
    student = {"ssm_layers": [1], "mixer": "moving_average"}
    phases = {"mixing": {"save_every": 3}, "hidden": None, "end_to_end": {"gradient_accumulation": 1}}
    recipe = written(place, tmp_path / "own", student=student, phases=phases)
    code = (
        "import sys\nfrom mohawk.models import mixer_names\n"
        "mixer_names.MIXER_NAMES['moving_average'] = 'an average over the past'\n"
        "from mohawk.models import mixers\nfrom tests.mohawk.test_extension_points import MovingAverage\n"
        "mixers.MIXERS['moving_average'] = MovingAverage\n"
        "from mohawk.cli import main\nfrom mohawk.export.model_card import model_card\n"
        "from mohawk.models.hybrid import HybridForCausalLM\n"
        "recipe, run = sys.argv[1:]\n"
        "for command in (['convert', recipe, '--dry-run'], ['convert', recipe], ['inspect', run]):\n"
        "    assert main(command) == 0, command\n"
        "config = HybridForCausalLM.from_pretrained(run + '/student').config\n"
        "print(model_card('own', config, config.mixer_kinds, None, [], []))\n"
    )
    given = [sys.executable, "-c", code, str(recipe), str(tmp_path / "own/run")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(given, capture_output=True, text=True, env=env, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 layers become moving_average" in done.stdout and "end_to_end: done" in done.stdout
    assert "of 1 Moving average and 1 attention layers" in done.stdout
    assert "tags: [mohawk, hybrid, moving-average," in done.stdout


def test_a_family_is_an_entry(monkeypatch):
    """Its attention is read correctly, a student comes of it and keeps what attention it has."""
    config = AutoConfig.for_model(
        "helium", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with pytest.raises(ValueError, match="an entry in FAMILIES"):
        hybrid_from_teacher(teacher, [1])
    monkeypatch.setitem(FAMILIES, "helium", Family(models="Helium"))
    ids = torch.randint(3, 61, (2, 10))
    matrices = []
    with torch.no_grad(), recording_attention(teacher):
        state, calls = layer_calls(teacher, ids, torch.arange(10)[None])
        for layer, call in zip(decoder_layers(teacher), calls, strict=True):
            with record(layer.self_attn) as attention:
                state = layer(state, *call.args, **call.kwargs)
            matrices.append(mixing_matrix(attention.mixing()))
    student = hybrid_from_teacher(teacher, [1])
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        whole = teacher(ids, output_attentions=True)
        assert student(ids).logits.isfinite().all()
    for got, expected in zip(matrices, whole.attentions, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    mixing = decoder_layers(student)[1].self_attn.mixing(torch.randn(1, 10, 32))
    assert isinstance(mixing, SSDMixing) and mixing.shape == (1, 4, 10)
    kept = decoder_layers(teacher)[0].state_dict()
    assert all(torch.equal(x, kept[name]) for name, x in decoder_layers(student)[0].state_dict().items())


def test_an_export_target_is_an_entry(make_llama, tmp_path, monkeypatch):
    """On the command line, in what is written, and checked in a fresh process like the others."""

    def write(model, tokenizer, folder, asked):
        TARGETS["hybrid"].write(model, tokenizer, folder, asked)
        (folder / "NOTICE").write_text("ours")

    monkeypatch.setitem(TARGETS, "noticed", replace(TARGETS["hybrid"], text="with a notice", write=write))
    hybrid_from_teacher(make_llama(), [1]).save_pretrained(tmp_path / "student")
    console = Console(file=io.StringIO(), width=200)
    folder = export(tmp_path / "student", "noticed", console=console)
    assert folder == tmp_path / "student-noticed" and (folder / "NOTICE").read_text() == "ours"
    assert "trust_remote_code=True" in (folder / "README.md").read_text() and "differs" not in console.file.getvalue()

    refused = replace(TARGETS["hybrid"], why_not=lambda config, pad_expand: "it has no notice")
    monkeypatch.setitem(TARGETS, "refused", refused)
    with pytest.raises(UserError, match="^it has no notice$"):
        export(tmp_path / "student", "refused")
    assert parser().parse_args(["export", "x", "--to", "refused"]).to == "refused"


@needs_groups
def test_an_export_target_of_a_stock_class_is_an_entry(make_llama, tmp_path, monkeypatch):
    """What is told of it is what the entry says."""
    said = [Note("transformers", True, "stock, and nothing else"), Note("elsewhere", False, "not tried", runs=False)]
    entry = replace(TARGETS["granite"], text="another stock class", notes=lambda config: said)
    monkeypatch.setitem(TARGETS, "stock", entry)
    hybrid_from_teacher(make_llama(), [1]).save_pretrained(tmp_path / "student")
    console = Console(file=io.StringIO(), width=200)
    card = (export(tmp_path / "student", "stock", console=console) / "README.md").read_text()
    assert "stock, and nothing else" in card and "trust_remote_code" not in card
    assert "of 1 Mamba-2 and 1 attention layers" in card and "differs" not in console.file.getvalue()


def test_a_command_is_an_entry_and_a_function(monkeypatch, capsys):
    def add(arguments: argparse.ArgumentParser) -> None:
        arguments.add_argument("word")

    def run(options: argparse.Namespace) -> None:
        if options.word != "please":
            raise UserError("say please")
        print("done")

    monkeypatch.setattr(inspection, "COMMANDS", [*inspection.COMMANDS, Command("ask", "ask nicely", add, run)])
    assert main(["ask", "please"]) == 0 and capsys.readouterr().out == "done\n"
    assert main(["ask", "now"]) == 2 and capsys.readouterr().err == "error: say please\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "ask nicely" in capsys.readouterr().out
