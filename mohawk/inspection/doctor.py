"""`mohawk doctor`: versions, devices, and which backend each operation uses on this machine, by trying it."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mohawk
from mohawk.core.devices import MODULES, device_rows, error_line, version

if TYPE_CHECKING:
    import torch
    from packaging.specifiers import SpecifierSet
    from rich.console import Console

# What each package is for
PACKAGES = {
    "torch": "everything but checking recipes",
    "transformers": "loading, converting and saving models",
    "accelerate": "training",
    "datasets": "reading text",
    "einops": "rearranging shapes in models and training",
    "safetensors": "weights",
    "gguf": "GGUF checkpoints, such as the demo's",
    "matplotlib": "plots in reports",
    "tqdm": "progress bars",
    "lm-eval": "evaluate --tasks",
    "peft": "LoRA",
    "triton": "GPU kernels",
    "mamba-ssm": "the scan `ssd` on NVIDIA GPUs",
    "causal-conv1d": "the convolution `causal_conv1d` on NVIDIA GPUs",
    "fla-core": "the rule `gated_delta_rule` on GPUs",
}
REPLACES = {
    "mamba-ssm": "ssd",
    "causal-conv1d": "causal_conv1d",
    "fla-core": "gated_delta_rule",
}  # whose kernels run instead of ours, in which operation
OURS = ("ssd", "causal_conv1d")  # of these, what else has Triton kernels of our own


def doctor(console: Console | None = None) -> None:
    """Print the report. Whatever is missing or broken is said in it, never raised."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    rows = operation_rows()
    backends = {operation: backend for operation, backend, _ in rows}
    tested, notes = version_ranges()
    notes += namesakes()
    packages = Table("package", "version", "tested", "for", title="Versions", title_justify="left", title_style="bold")
    packages.add_row("mohawk", mohawk.__version__, "", escape(mohawk.__path__[0]))
    packages.add_row("python", platform.python_version(), tested.get("python", ""), escape(sys.executable))
    for name, purpose in PACKAGES.items():
        use = f"{purpose}: {used(name, backends)}" if name in REPLACES else purpose
        packages.add_row(name, version(name) or "[yellow]missing[/yellow]", tested.get(name, ""), escape(use))
    console.print(packages)
    for note in notes:
        console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)

    devices = Table("device", "what", title="Devices", title_justify="left", title_style="bold")
    for row in device_rows():
        devices.add_row(*map(escape, row))
    console.print(devices)

    operations = Table("operation", "backend", "why", title="Operations", title_justify="left", title_style="bold")
    for row in rows:
        operations.add_row(row[0], row[1], escape(row[2]))
    console.print(operations)

    students = Table("student", "answers", title="Students", title_justify="left", title_style="bold")
    for name, verdict, broken in student_rows():
        students.add_row(name, f"[red]{verdict}[/red]" if broken else verdict)
    console.print(students)


def student_rows() -> list[tuple[str, str, bool]]:
    """(student, verdict, whether it is broken) of tiny ones of each mixer, random, hybrid and pure.

    Each is asked step by step, in chunks, with padding and turn by turn, and held against its own full forward: what an
    untested version of transformers breaks shows here in a second.
    """
    try:
        import torch
        from transformers import LlamaConfig

        from mohawk.measures.consistency import PATHS, broken_paths, inconsistencies, some_tokens
        from mohawk.models.hybrid import HybridForCausalLM
        from mohawk.models.hybrid_config import HybridConfig
        from mohawk.models.mixers import MIXERS
    except ImportError as error:
        return [("none", f"not tried: {error_line(error)}", False)]
    base = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    kinds = {"hybrid": ["linear_attention", "full_attention"], "pure": ["linear_attention"] * 2}
    rows = []
    for mixer in MIXERS:
        for kind, layers in kinds.items():
            try:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    model = HybridForCausalLM(HybridConfig(base_config=base, layer_types=layers, mixer=mixer)).eval()
                found = inconsistencies(model, some_tokens(model))
                broken = broken_paths(model, found)
                fine = f"as in one full forward, {len(PATHS)} ways: differs by at most {max(found.values()):.0e}"
                rows.append((f"{mixer}, {kind}", broken or fine, broken is not None))
            except Exception as error:  # as above: a finding
                rows.append((f"{mixer}, {kind}", f"fails: {error_line(error)}", True))
    return rows


def version_ranges() -> tuple[dict[str, str], list[str]]:
    """Package -> the range that is tested, and a line for each installed version outside it, with what to install."""
    try:
        from mohawk.core import versions

        ranges, outside = versions.ranges(), versions.outside()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "packaging":
            raise
        return {}, ["versions are not checked, since packaging is missing; run: pip install packaging"]
    except importlib.metadata.PackageNotFoundError:
        return {}, [
            "versions are not checked: mohawk-distill is neither installed nor run from a checkout with pyproject.toml"
        ]
    notes = []
    for name, found, tested in outside:
        todo = "use a Python in it" if name == "python" else f"run: pip install '{name}{_range(tested)}'"
        notes.append(f"{name} {found} is outside the range that is tested, {_range(tested)}; {todo}")
    return {name: _range(tested) for name, tested in ranges.items()}, notes


def namesakes() -> list[str]:
    """A line for each package of another project that is installed as `mohawk`, with what to do."""
    try:
        from mohawk.core.versions import foreign
    except ModuleNotFoundError:  # packaging, of which version_ranges speaks
        return []
    return [
        f"{each} is another project, whose files lie among this one's; run: pip uninstall mohawk, then install "
        "mohawk-distill again (pip install --force-reinstall --no-deps . in its checkout)"
        for each in foreign()
    ]


def used(package: str, backends: dict[str, str]) -> str:
    """Whether an operation runs on the kernels of this package, by `operation_rows`, and if not, why."""
    if version(package) is None:
        return "not installed"
    if backends.get(REPLACES[package]) == MODULES[package]:
        return "used"
    try:
        import torch

        if not torch.cuda.is_available():
            return "not used, no GPU"
        importlib.import_module(MODULES[package])
    except Exception as error:  # of any kind, from someone else's build
        return f"not used, cannot be imported: {error_line(error)}"
    return "not used"


def operation_rows() -> list[tuple[str, str, str]]:
    """(operation, backend, why) on the device that `device: auto` means."""
    try:
        import torch
    except ImportError:
        return [(name, "none", "torch is missing; run: pip install torch") for name in _calls]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, call in _calls.items():
        try:
            backend = backend_used(lambda call=call: call(device))
        except Exception as error:  # the report goes on: one broken operation is a finding, not the end of it
            rows.append((name, "[red]fails[/red]", error_line(error)))
        else:
            rows.append((name, backend, _why(name, backend, device)))
    return rows


def backend_used(call: Callable[[], Any]) -> str:
    """The backend that a call of a public operation ends up in, seen by which modules' functions run: those of
    other packages by their name, ours by the BACKEND that they state."""
    call()  # a first time, since what is imported on the way runs too
    ran: set[str] = set()
    ours: set[str] = set()

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            name = frame.f_globals.get("__name__", "")
            ran.add(name)
            if name.startswith("mohawk.kernels."):
                ours.add(frame.f_globals.get("BACKEND", ""))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    for package in (MODULES[name] for name in REPLACES):
        if any(name == package or name.startswith(f"{package}.") for name in ran):
            return package
    # What runs in torch in place has asked the C backend first.
    order = ("triton", "chunked", "in_place", "c", "reference")
    return next((backend for backend in order if backend in ours), "torch")


def _why(operation: str, backend: str, device: torch.device) -> str:
    if backend in (MODULES[name] for name in REPLACES):
        return f"the {backend} package is installed and there is a GPU"
    if backend == "triton":
        return f"there is a GPU, and triton {version('triton')} is installed"
    if backend == "c":
        return "no GPU, and a C compiler: one function in float32, torch in place in other dtypes"
    if device.type == "cpu" and backend == "in_place":
        from mohawk.kernels.decode.c_backend import library

        return f"no GPU, and no C, {library()}: torch on the CPU, in place"
    if device.type == "cpu":
        return "no GPU: torch on the CPU, in bounded memory"
    package = {operation: package for package, operation in REPLACES.items()}.get(operation)
    if package and version(package) is None:
        missing = f"{package} is missing"
        if operation in OURS and version("triton") is None:
            missing = f"{package} and triton are missing"
        return f"there is a GPU, but {missing}, whose kernels this would use; torch on the GPU"
    if package:
        return f"there is a GPU, but {package} is {used(package, {})}; torch on the GPU"
    if version("triton") is None:
        return "there is a GPU, but triton is missing: run pip install '.[triton]' in mohawk's checkout"
    return "there is a GPU, but no GPU kernel for this operation yet; torch on the GPU"


def _kd_loss(device: torch.device) -> None:
    import torch

    mohawk.kd_loss(torch.zeros(2, 8, device=device, requires_grad=True), torch.zeros(2, 8, device=device))


def _linear_kd_loss(device: torch.device) -> None:
    import torch

    student = torch.zeros(2, 4, device=device, requires_grad=True)
    head = torch.zeros(8, 4, device=device)
    mohawk.linear_kd_loss(student, head, mohawk.TeacherHidden(torch.zeros(2, 4, device=device), head))


def _mixing_distance(device: torch.device) -> None:
    import torch

    heads = torch.zeros(1, 2, 16, 4, device=device)
    tokens = torch.zeros(1, 16, 2, 4, device=device)
    student = mohawk.SSDMixing(tokens, tokens.clone().requires_grad_(), torch.zeros(1, 16, 2, device=device))
    mohawk.mixing_distance(student, mohawk.AttentionMixing(heads, heads))


def _ssd(device: torch.device) -> None:
    import torch

    x = torch.zeros(1, 16, 2, 16, device=device)
    mohawk.ssd(x, torch.zeros(1, 16, 2, device=device), x, x)


def _gated_delta_rule(device: torch.device) -> None:
    import torch

    x, gate = torch.zeros(1, 16, 2, 16, device=device), torch.zeros(1, 16, 2, device=device)
    mohawk.gated_delta_rule(x, x, x, beta=gate, log_decay=gate)


def _causal_conv1d(device: torch.device) -> None:
    import torch

    mohawk.causal_conv1d(torch.zeros(1, 16, 8, device=device), torch.zeros(8, 4, device=device))


def _ssd_decode_step(device: torch.device) -> None:
    import torch

    from mohawk.kernels.decode import ssd_decode_step

    new = functools.partial(torch.zeros, device=device)
    x, dt = new(1, 8), new(1, 2)
    ssd_decode_step(new(1, 4, 16).mT, new(1, 2, 4, 4), new(1, 16), x, dt, weight=new(16, 4), A_log=new(2))


def _delta_decode_step(device: torch.device) -> None:
    import torch

    from mohawk.kernels.decode import delta_decode_step

    new = functools.partial(torch.zeros, device=device)
    window, state, gate = new(1, 4, 24).mT, new(1, 2, 4, 4), new(1, 2)
    delta_decode_step(window, state, new(1, 24), new(1, 8), gate, gate, weight=new(24, 4), norm_weight=new(4))


_calls: dict[str, Callable[[torch.device], None]] = {
    "kd_loss": _kd_loss,
    "linear_kd_loss": _linear_kd_loss,
    "mixing_distance": _mixing_distance,
    "ssd": _ssd,
    "gated_delta_rule": _gated_delta_rule,
    "causal_conv1d": _causal_conv1d,
    "ssd_decode_step": _ssd_decode_step,
    "delta_decode_step": _delta_decode_step,
}


def _range(specifiers: SpecifierSet) -> str:
    """The lower bound first, as people write it."""
    return ",".join(sorted(map(str, specifiers), key=lambda each: not each.startswith(">")))
