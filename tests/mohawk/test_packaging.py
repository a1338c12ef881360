"""The package as others get it: a wheel, editable, or a plain checkout; with and without neighbours."""

import ast
import email
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import mohawk
from mohawk.core import versions
from mohawk.inspection import doctor
from mohawk.loading.remote_code import LICENCE

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"mohawk": "mohawk", "kernels": "mohawk/kernels", "models": "mohawk/models"}


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Output of a command that must succeed, with no PYTHONPATH of ours."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**env, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def python(code: str, **kwargs) -> str:
    return run(sys.executable, "-c", textwrap.dedent(code), **kwargs)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources, so that building leaves nothing in the repository."""
    target = tmp_path_factory.mktemp("checkout") / "mohawk"
    target.mkdir()
    for name in ("mohawk", "kernels", "models", "recipes", "tests"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(checkout, source, symlinks=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--wheel-dir", folder, source)
    return next(folder.glob("mohawk_distill-*.whl"))


def new_venv(folder: Path, install: list[str | Path]) -> Path:
    """A virtual environment that sees the running one's packages behind its own; returns its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Appended, and its own .pth files are not read: an editable mohawk in there stays out of the way.
    (site / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*pip, "--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall", *install)
    return python


@pytest.fixture(scope="module")
def pythons(checkout, wheel, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("venvs")
    return {
        "wheel": new_venv(folder / "wheel", [wheel]),
        "editable": new_venv(folder / "editable", ["--editable", checkout]),
        "checkout": Path(sys.executable),
    }


def test_wheel_holds_everything_and_nothing_else(wheel, checkout):
    """Every module of every folder, at any depth: a folder that pyproject.toml does not list is dropped in silence."""
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"mohawk/recipes/{path.name}" for path in (checkout / "recipes").glob("*.yaml")}
    tasks = next(path.parent for path in (checkout / "mohawk").rglob("task_data.py"))
    expected |= {path.relative_to(checkout).as_posix() for path in tasks.iterdir() if path.suffix in (".tsv", ".yaml")}
    expected |= {path.relative_to(checkout).as_posix() for path in (checkout / "mohawk").rglob("*.html")}
    expected.add("mohawk/py.typed")  # without it checkers read no types of an installed package
    for folder, inside in PACKAGES.items():
        found = (path.relative_to(checkout / folder) for path in (checkout / folder).rglob("*.py"))
        expected |= {f"{inside}/{path.as_posix()}" for path in found}
    code = {name for name in names if ".dist-info/" not in name}
    assert code == expected
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert f"{versions.COMMAND} = mohawk.__main__:main" in zipfile.ZipFile(wheel).read(entry).decode()


def test_the_wheel_says_what_it_is_called_and_how_it_is_licensed(wheel):
    files = zipfile.ZipFile(wheel)
    info = next(name.partition("/")[0] for name in files.namelist() if ".dist-info/" in name)
    about = email.message_from_bytes(files.read(f"{info}/METADATA"))
    assert (about["Name"], about["License-Expression"]) == ("mohawk-distill", "Apache-2.0")
    assert about["Author"] == "the mohawk developers"
    assert about["Name"] == versions.DISTRIBUTION and about["License-Expression"] == LICENCE
    text = files.read(f"{info}/licenses/LICENSE").decode()
    assert "Apache License" in text and text == (ROOT / "LICENSE").read_text()
    # a wheel brings the dependencies of its own extras under its own name: `mohawk` there would be another project
    assert not [line for line in about.get_all("Requires-Dist") if Requirement(line).name == "mohawk"]


def namesake(site: Path) -> None:
    """The files that the package registry's `mohawk` brings, as far as they matter here."""
    info = site / "mohawk-1.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mohawk\nVersion: 1.1.0\nSummary: Library for Hawk HTTP authorization\n"
    )
    (site / "mohawk").mkdir(exist_ok=True)
    (site / "mohawk" / "sender.py").write_text("class Sender: ...\n")
    (site / "mohawk" / "__init__.py").write_text("from .sender import *\n")


def test_another_project_called_mohawk_is_recognised(monkeypatch, tmp_path):
    before = versions.foreign()
    namesake(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert versions.foreign() == ["mohawk 1.1.0 (Library for Hawk HTTP authorization)", *before]
    assert doctor.namesakes()[0] == (
        "mohawk 1.1.0 (Library for Hawk HTTP authorization) is another project, whose files lie among this one's; run: "
        "pip uninstall mohawk, then install mohawk-distill again (pip install --force-reinstall --no-deps . in its "
        "checkout)"
    )
    # this project as it was installed before it was called mohawk-distill
    (tmp_path / "mohawk-1.1.0.dist-info" / "entry_points.txt").write_text(
        "[console_scripts]\nmohawk = mohawk.cli:main\n"
    )
    assert versions.foreign() == before


@pytest.mark.parametrize("what", ["installed over ours", "uninstalled again"])
def test_a_package_damaged_by_its_namesake_says_so(what, wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    namesake(tmp_path)
    if what == "uninstalled again":
        (tmp_path / "mohawk" / "__init__.py").unlink()
    result = subprocess.run(
        [sys.executable, "-m", "mohawk", "doctor"],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        f"error: mohawk in {tmp_path / 'mohawk'} is damaged: another project's package that is also called mohawk was "
        "installed over it or uninstalled; run: pip uninstall mohawk, then install mohawk-distill again (pip install "
        "--force-reinstall --no-deps . in its checkout)\n"
    )


def test_the_links_lead_to_the_folders_and_can_be_done_without(checkout, tmp_path):
    """git makes text files of links where the system has none; everything is imported all the same."""
    for folder in ("kernels", "models", "recipes"):
        assert (ROOT / "mohawk" / folder).resolve() == ROOT / folder
    copy = tmp_path / "checkout"
    shutil.copytree(checkout, copy, symlinks=True, ignore=shutil.ignore_patterns("tests"))
    for folder in ("kernels", "models", "recipes"):
        (copy / "mohawk" / folder).unlink()
        (copy / "mohawk" / folder).write_text(f"../{folder}")
    code = """
        from importlib.util import find_spec
        from mohawk.schema.files import shipped
        print(find_spec("mohawk.models.hybrid").origin)
        print(shipped("demo"))
    """
    hybrid, demo = python(code, cwd=copy).splitlines()
    assert (Path(hybrid), Path(demo)) == (copy / "models" / "hybrid.py", copy / "recipes" / "demo.yaml")


def test_folders_that_must_not_be_packages():
    for folder in ("kernels", "models", "recipes"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder} would shadow other people's"


USE = """
    import importlib.util, sys
    import mohawk
    from mohawk import Mamba2Mixer, HybridForCausalLM, kd_loss
    from mohawk.kernels.kd.interface import kd_loss as same
    from mohawk.conversion.recipe import Recipe
    from mohawk.schema.files import shipped
    from transformers.utils import is_kernels_available
    assert kd_loss is same
    assert Recipe.load(shipped("demo")).teacher.model
    spec = importlib.util.find_spec("kernels")
    print(mohawk.__file__)
    print(spec.origin if spec else None)
    print(is_kernels_available())
"""


@pytest.mark.parametrize(
    ("where", "neighbour"),
    [("root", "without kernels"), ("root", "with kernels"), ("elsewhere", "without kernels")],
)
@pytest.mark.parametrize("how", ["checkout", "editable", "wheel"])
def test_imports(how, where, neighbour, pythons, checkout, tmp_path):
    environment = {}
    if how == "checkout" and where == "elsewhere":
        environment["PYTHONPATH"] = str(checkout)
    if neighbour == "with kernels":
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [environment.get("PYTHONPATH"), str(fake_kernels(tmp_path / "site"))])
        )
    cwd = checkout if where == "root" else tmp_path
    code = textwrap.dedent(USE)
    file, kernels, available = run(pythons[how], "-c", code, cwd=cwd, **environment).splitlines()
    # from the root, the checkout's own files come first, whatever is installed
    from_checkout = how != "wheel" or where == "root"
    assert Path(file).is_relative_to(checkout) == from_checkout
    if neighbour == "with kernels":
        assert kernels == str(tmp_path / "site" / "kernels" / "__init__.py") and available == "True"
    else:
        assert kernels == "None" and available == "False", "install no `kernels` where the tests run"


def fake_kernels(site: Path) -> Path:
    """Something that transformers takes for Hugging Face's `kernels` package."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    package, info = site / "kernels", site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (package / "__init__.py").write_text(
        f"__version__ = {KERNELS_MIN_VERSION!r}\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n"
        "        raise AttributeError(name)\n"
        "    from unittest.mock import MagicMock\n"
        "    return MagicMock(name=name)\n"
    )
    return site


@pytest.mark.parametrize("how", ["checkout", "editable", "wheel"])
def test_python_m_and_console_script(how, pythons, checkout):
    said = run(pythons[how], "-m", "mohawk", "--version", cwd=checkout)
    assert said == f"mohawk {mohawk.__version__}\n"
    if how != "checkout":
        assert run(pythons[how].parent / "mohawk", "--version") == said


def test_losses_pull_neither_transformers_nor_triton():
    said = python(
        """
        import sys, torch
        before = set(sys.modules)
        import mohawk
        assert set(sys.modules) - before <= {"mohawk"}, sorted(set(sys.modules) - before)
        from mohawk import TeacherTopK, kd_loss, linear_kd_loss
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(sorted(new - sys.stdlib_module_names))
        """
    )
    assert said == "['mohawk']\n"


def test_kernels_work_with_torch_alone():
    said = python(
        """
        import sys
        for name in ("transformers", "triton", "einops", "pydantic", "ruamel", "rich", "datasets"):
            sys.modules[name] = None  # importing it fails
        import torch
        from mohawk import TeacherHidden, kd_loss, linear_kd_loss, ssd
        logits = torch.randn(3, 7, requires_grad=True)
        kd_loss(logits, torch.randn(3, 7)).backward()
        hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
        linear_kd_loss(hidden, head, TeacherHidden(torch.randn(3, 4), head)).backward()
        x = torch.randn(1, 5, 2, 4)
        ssd(x, -torch.rand(1, 5, 2), x, x)
        print(bool(logits.grad.abs().sum() > 0), bool(hidden.grad.abs().sum() > 0))
        """
    )
    assert said == "True True\n"


def test_a_missing_package_is_named():
    said = python(
        """
        import sys
        sys.modules["transformers"] = sys.modules["tqdm"] = None
        import mohawk
        try:
            mohawk.HybridForCausalLM
        except ImportError as error:
            print(error)
        """
    )
    assert said == (
        "mohawk.HybridForCausalLM needs packages that are not installed (tqdm, transformers): "
        "run pip install '.[convert]' in mohawk's checkout\n"
    )


def test_every_public_name_is_there():
    for name in mohawk.__all__:
        assert getattr(mohawk, name).__name__ == name
    assert set(mohawk.__all__) <= set(dir(mohawk))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mohawk.nonsense  # noqa: B018
    with pytest.raises(ImportError):
        from mohawk import nonsense  # noqa: F401


def test_type_checkers_see_the_same_names_from_the_same_modules():
    tree = ast.parse((ROOT / "mohawk" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported == mohawk._PUBLIC
    assert sorted(imported) == sorted(mohawk.__all__)


# Names under which packages are imported that are declared under another; and what comes with a declared package, which
# says in which version
IMPORTED_AS = {
    "lm_eval": "lm-eval",
    "rouge_score": "rouge-score",
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "ruamel": "ruamel-yaml",
}
COME_ALONG = {"huggingface_hub", "pyarrow", "pydantic_core", "tokenizers", "typing_extensions"}
ASKED_FOR = {
    "bitsandbytes",
    "deepspeed",
    "torchao",
    "jinja2",
    "llama_cpp",
    "tomli",
}  # used where they are installed; their absence is said


def imported(folder: Path) -> set[str]:
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    # a file that others run by itself imports its neighbours by their bare names
    return found - sys.stdlib_module_names - {"mohawk"} - {path.stem for path in folder.rglob("*.py")}


def test_what_is_imported_is_declared():
    declared = set(versions.ranges())
    names = {IMPORTED_AS.get(name, name) for folder in PACKAGES for name in imported(ROOT / folder)}
    assert names - declared <= COME_ALONG | ASKED_FOR
    # torch needs typing_extensions itself
    assert imported(ROOT / "kernels") <= {"torch", "triton", "typing_extensions", "mamba_ssm", "causal_conv1d"}


def pins(file: str, python: str, platform: str) -> dict[str, str]:
    """What a constraints file names for one Python and platform."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": platform,
        "platform_system": {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[platform],
        "platform_machine": {"linux": "x86_64", "darwin": "arm64", "win32": "AMD64"}[platform],
    }
    found = {}
    for line in (ROOT / file).read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(environment):
            name = versions.canonicalize_name(pin.name)
            assert name not in found, f"{file} names {name} twice for Python {python} on {platform}"
            assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), line
            found[name] = str(pin.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_constraints_name_a_version_in_the_range_of_everything_declared(python, platform):
    named = pins("constraints.txt", python, platform)
    for _, requirement in versions.declared():
        name = versions.canonicalize_name(requirement.name)
        if name == "triton" and platform != "linux":
            assert name not in named
        else:
            assert named[name] in requirement.specifier, "run: make constraints"
    # GPU libraries come with torch, which says itself in which version: of any other torch these would be wrong
    assert not [name for name in named if name.startswith(("nvidia-", "cuda-"))]


def test_the_lowest_constraints_are_the_lower_bounds():
    said = run(sys.executable, ROOT / ".ci" / "versions.py", "lowest").splitlines()
    file = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    assert [line for line in file if not line.startswith("#")] == said, "run: make constraints"
    lowest = pins("constraints-lowest.txt", "3.10", "linux")
    assert set(lowest) == {versions.canonicalize_name(requirement.name) for _, requirement in versions.declared()}
    for _, requirement in versions.declared():
        bound = lowest[versions.canonicalize_name(requirement.name)]
        assert f">={bound}" in str(requirement.specifier) and bound in requirement.specifier


def test_without_caps_everything_is_asked_for_that_need_not_be_compiled():
    said = [Requirement(line) for line in run(sys.executable, ROOT / ".ci" / "versions.py", "uncapped").splitlines()]
    assert not [each for each in said if "<" in str(each.specifier)]
    every = {requirement.name for _, requirement in versions.declared()}
    assert {each.name for each in said} == every - {"mamba-ssm", "causal-conv1d"}
    assert all(each.specifier.contains("9999") for each in said), "the newest there is, whatever it is"


def test_what_moved_is_a_table(tmp_path):
    here = versions.installed("pytest")
    (tmp_path / "named.txt").write_text(
        f"# a comment\npytest==0.1\nrich=={versions.installed('rich')}\nnot-there==1\n"
        f"torch==0.1 ; python_version < '3'\nruff==0.2 ; python_version > '3'\n"
    )
    script = [sys.executable, ROOT / ".ci" / "versions.py", "moved", tmp_path / "named.txt"]
    rows = [line.split() for line in run(*script).splitlines()]
    assert rows == [
        ["package", "tested", "newest"],
        ["pytest", "0.1", here],
        ["ruff", "0.2", versions.installed("ruff")],
    ]
    (tmp_path / "named.txt").write_text(f"pytest=={here}\n")
    assert run(*script).startswith("nothing moved")


def made(*arguments: str) -> str:
    """What make would run, whatever the make that runs these tests was told."""
    return run("make", "--dry-run", "--no-print-directory", "TORCH=", *arguments, MAKEFLAGS="", MFLAGS="")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_makefile_takes_the_versions_that_are_declared(tmp_path):
    declared = {requirement.name: requirement for _, requirement in versions.declared()}
    tested = pins("constraints.txt", "3.11", "linux")
    # the virtual environment is none, so that everything would be installed
    usual = made("test", f"VENV={tmp_path}/no")
    assert f"torch=={tested['torch']}+cpu" in usual and "--editable '.[test]'" in usual
    for name in ("mamba-ssm", "causal-conv1d"):
        assert f"{name}=={tested[name]}" in usual and tested[name] in declared[name].specifier
    assert "'.[convert]'" in made("demo", f"VENV={tmp_path}/no")
    torch = re.search(r'"(torch>=[^"]*)"', (ROOT / "pyproject.toml").read_text())[1]
    assert Requirement(torch) == declared["torch"] and f"'{torch}'" in made(
        "test", f"VENV={tmp_path}/no", "CONSTRAINTS="
    )
    lowest = made("test", f"VENV={tmp_path}/no", "CONSTRAINTS=constraints-lowest.txt")
    assert f"torch=={pins('constraints-lowest.txt', '3.10', 'linux')['torch']}+cpu" in lowest
    newest = made("test", f"VENV={tmp_path}/no", "CONSTRAINTS=", "UNCAPPED=yes")
    assert "uncapped.txt" in newest and "torch>=" not in newest and "'.[test]'" not in newest


def test_every_supported_python_is_named():
    table = versions._checkout()
    pythons = [f"3.{minor}" for minor in range(9, 17) if f"3.{minor}.1" in SpecifierSet(table["requires-python"])]
    assert pythons == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    named = [each.rpartition(" ")[2] for each in table["classifiers"] if re.search(r"Python :: 3\.\d", each)]
    assert named == pythons
    makefile = (ROOT / "Makefile").read_text()
    assert "(3, 10) <= sys.version_info[:2] < (3, 15)" in makefile
    assert all(f"python{python}" in makefile for python in pythons)
    assert 'target-version = "py310"' in (ROOT / "pyproject.toml").read_text()


def test_an_installed_wheel_knows_the_ranges(pythons, tmp_path):
    code = """
        from mohawk.core import versions
        assert versions._checkout() is None
        for name, tested in sorted(versions.ranges().items()):
            print(name, ",".join(sorted(map(str, tested))))
    """
    said = run(pythons["wheel"], "-c", textwrap.dedent(code), cwd=tmp_path).splitlines()
    ours = {name: ",".join(sorted(map(str, tested))) for name, tested in versions.ranges().items()}
    tests_alone = {"hypothesis", "lightning", "pyrefly", "pytest", "pytest-xdist", "ruff", "setuptools", "trl", "wheel"}
    assert dict(line.split() for line in said) == {
        name: tested for name, tested in ours.items() if name not in tests_alone
    }


# Modules that other people's code imports by an earlier name: where what they hold lies today.
EARLIER_NAMES = {
    "mohawk.phases": "mohawk.conversion.objectives",
    "mohawk.teacher_models": "mohawk.losses.teachers",
    "mohawk.next_tokens": "mohawk.data.next_tokens",
}


@pytest.mark.parametrize("earlier", EARLIER_NAMES)
def test_earlier_names_of_public_modules(earlier):
    there, here = importlib.import_module(EARLIER_NAMES[earlier]), importlib.import_module(earlier)
    later = {"AlignedTeacher"}  # of modules that came afterwards
    names = [name for name in here.__all__ if name not in later]
    assert {name: getattr(there, name) for name in names} == {name: getattr(here, name) for name in names}
    assert all(hasattr(here, name) for name in here.__all__)
