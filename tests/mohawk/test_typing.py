"""Types as a user's checker sees them: of the installed wheel and of a checkout."""

import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKER = Path(sysconfig.get_path("scripts")) / "pyrefly"

pytestmark = pytest.mark.skipif(not CHECKER.exists(), reason="pyrefly is not installed (the extra `test` brings it)")


@pytest.fixture(scope="module", params=["checkout", "wheel"])
def library(request, tmp_path_factory) -> Path:
    """Where `mohawk` is found: the repository, or what its wheel holds."""
    if request.param == "checkout":
        return ROOT
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("mohawk", "kernels", "models", "recipes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and (path.suffix in (".md", ".toml") or path.name.startswith("LICENSE")):
            shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", folder, source], check=True, timeout=300)
    installed = folder / "installed"
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(installed)
    return installed


def findings(code: str, library: Path, folder: Path) -> list[tuple[int, str]]:
    """(line of the code, rule) of what the checker finds in a user's file."""
    (folder / "use.py").write_text(textwrap.dedent(code).lstrip())
    done = subprocess.run(
        [CHECKER, "check", "--preset", "default", "--python-interpreter-path", sys.executable]
        + ["--search-path", library, "--output-format", "min-text", "use.py"],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    found = re.findall(r"^ERROR use\.py:(\d+):.*\[([a-z-]+)\]$", done.stdout, re.MULTILINE)
    assert done.returncode == (1 if found else 0), done.stdout + done.stderr
    return [(int(line), rule) for line, rule in found]


def test_what_a_loss_returns_is_known_from_return_parts(library, tmp_path):
    code = """
        import torch
        from typing_extensions import assert_type
        from mohawk import kd_loss, linear_kd_loss
        from mohawk.kernels.kd.interface import KDParts

        a, b = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)
        loss = kd_loss(a, b)
        loss.backward()
        loss, parts = kd_loss(a, b, return_parts=True, temperature=2.0)
        loss.backward()
        parts.kd.item()
        assert_type(kd_loss(a, b, return_parts=False), torch.Tensor)
        assert_type(linear_kd_loss(a, b, b, logit_scale=2.0), torch.Tensor)
        assert_type(linear_kd_loss(a, b, b, return_parts="rows"), tuple[torch.Tensor, KDParts])


        def either(asked: bool) -> None:
            assert_type(kd_loss(a, b, return_parts=asked), torch.Tensor | tuple[torch.Tensor, KDParts])
    """
    assert findings(code, library, tmp_path) == []


def test_a_wrong_use_is_found(library, tmp_path):
    code = """
        import torch
        from mohawk import Mamba2Mixer, kd_loss, linear_kd_loss, no_such_name

        a = torch.randn(2, 4)
        kd_loss(a, a, return_parts=True).backward()
        kd_loss(a, a, tempreature=2.0)
        kd_loss(a, a, temperature="hot")
        kd_loss(a, a, logit_scale=2.0)
        linear_kd_loss(a, a, a, inplace=True)
        linear_kd_loss(a, a, a).kd
    """
    assert findings(code, library, tmp_path) == [
        (2, "missing-module-attribute"),
        (5, "missing-attribute"),
        (6, "no-matching-overload"),
        (7, "no-matching-overload"),
        (8, "no-matching-overload"),
        (9, "no-matching-overload"),
        (10, "missing-attribute"),
    ]


def test_students_may_be_adapted(library, tmp_path):
    pytest.importorskip("peft")
    code = """
        import torch
        from mohawk import KnowledgeDistiller, OnPolicy
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        teacher, plain = (AutoModelForCausalLM.from_pretrained(name) for name in "ab")
        student = get_peft_model(plain, LoraConfig())
        sampling = OnPolicy(student, eos_token_id=0)
        distiller = KnowledgeDistiller(teacher, student, temperature="auto", on_policy=sampling)
        distiller.compute_loss(torch.zeros(1, 2, dtype=torch.int64)).backward()
        KnowledgeDistiller(teacher, plain).compute_loss(torch.zeros(1, 2, dtype=torch.int64)).backward()
        KnowledgeDistiller(teacher, torch.nn.Linear(1, 1))
        KnowledgeDistiller(teacher, plain, temperature="hot")
    """
    assert findings(code, library, tmp_path) == [(12, "bad-argument-type"), (13, "bad-argument-type")]


def test_the_overloads_name_every_keyword():
    """They name their common keywords apart from the functions, which could get one more."""
    import inspect

    from mohawk.kernels.kd import interface

    functions = {interface.kd_loss: interface._LogitsOptions, interface.linear_kd_loss: interface._LinearOptions}
    for function, options in functions.items():
        keywords = {
            name: each.annotation
            for name, each in inspect.signature(function).parameters.items()
            if each.kind is each.KEYWORD_ONLY and name != "return_parts"
        }
        named = {**interface._Options.__annotations__, **options.__annotations__}
        assert {name: each.__forward_arg__ for name, each in named.items()} == keywords
