"""Folders and files that are complete or invisible: checkpoints, the student of a phase, the final student, figures.

A folder is written beside its place under a `.partial-` name, every file is hashed into MANIFEST.json, which has a hash
of itself too, files and folder are flushed to the disk, and one rename makes it appear. A reader believes a folder only
when its manifest verifies: a kill at any moment, a full disk or a flipped bit costs at most the newest folder. A file
that stands alone, NAME, is written likewise, its sha256 in `.NAME.sha256` beside it.
"""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mohawk.core.run_folder import LOCK, has_lost_sum
from mohawk.core.sums import hashed, sha256_of
from mohawk.errors import UserError, is_refusal, naming

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
PARTIAL = ".partial-"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
WEIGHTS = (".safetensors", ".bin", ".gguf")
CARD = ".md"  # a model card is for people to write in: what is read of a model does not depend on it


class Interrupted(Exception):
    """A signal stopped the run after it saved: it will resume from `path`, the checkpoint of step `step`."""

    def __init__(self, step: int, path: str | os.PathLike):
        super().__init__(f"stopped by a signal at step {step}; the same command resumes from {path}")
        self.step = step
        self.path = Path(path)


@contextmanager
def write_whole(
    path: str | os.PathLike,
    *,
    replace: bool = False,
    about: Mapping[str, Any] | None = None,
    sums: Mapping[str, str] | None = None,
) -> Iterator[Path]:
    """Write the folder `path` so that it appears complete or not at all.

    Yields a temporary folder beside `path` to write into. On leaving the block its files are hashed into
    MANIFEST.json, flushed, and the folder is renamed to `path`; when the block raises, the folder is removed
    and `path` is as it was. A folder at `path` that carries a manifest, or is empty, is replaced; any other
    only with `replace=True`. about: what the manifest says of the folder beside its files, for `about_of`. sums: sha256
    of files by their paths in the folder, which whoever fills it by the end of the block has hashed already.

    Raises:
        UserError: `path` exists and holds files that this function did not write.
        OSError: the disk is full, or the place is not writable.
    """
    path = Path(path)
    if not replace and path.exists() and not _ours(path):
        raise UserError(f"{path}: exists, not written by mohawk; move it away, or choose another output")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(path.parent, of=path.name)  # what a killed process left of this same folder
    partial, old = _hidden(path), None
    partial.mkdir()
    try:
        with naming(path):
            yield partial
        seal(partial, about, sums)
        old = _set_aside(path) if os.path.lexists(path) else None
        os.rename(partial, path)
        fsync(path.parent)
    except BaseException:
        if old is not None and not os.path.lexists(path):
            os.rename(old, path)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if old is not None:
        _delete(old)


@contextmanager
def write_file(path: str | os.PathLike) -> Iterator[Path]:
    """Write the file `path`, making its folder, so that it appears complete or not at all.

    Yields a path beside it to write to. On leaving the block that file is flushed, hashed for `why_altered`, and
    renamed to `path`; when the block raises, `path` is as it was.

    Raises:
        OSError: the disk is full, or the place is not writable.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path):
            yield beside
        fsync(beside)
        digest = hashed(beside)
        # until the rename both are right: a kill in between leaves the old file with its sum
        before = _sums(path) or ([hashed(path)] if path.is_file() else [])
        _write_sums(path, [digest, *before])
        _give_mode(beside, sum_file(path).stat().st_mode)
        os.replace(beside, path)
        fsync(path.parent)
        _write_sums(path, [digest])
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def why_altered(path: str | os.PathLike, content: bytes | None = None) -> str | None:
    """What is wrong with a file that `write_file` wrote, in a few words; None when it is as written, or never had a
    sum: files of earlier versions have none.

    content: what was read of it, if it was.

    Raises:
        OSError: the machine refuses to read it or its sum, which says nothing of what is in it; where `content` is
            given, its sum cannot be read at all.
    """
    path = Path(path)
    try:
        sums = _sums(path)
        if sums is None:
            return "has lost the sum beside it" if has_lost_sum(path) else None
        if not sums:
            return "has a damaged sum beside it"
        digest = hashed(path) if content is None else hashlib.sha256(content).hexdigest()
        return None if digest in sums else "is not as it was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        if content is not None or is_refusal(error):
            raise
        return f"cannot be read ({error.strerror})"


def drop_file(path: str | os.PathLike) -> None:
    """Delete what `write_file` wrote, if it is there."""
    path = Path(path)
    path.unlink(missing_ok=True)
    sum_file(path).unlink(missing_ok=True)


def sum_file(path: Path) -> Path:
    """Where `write_file` keeps a file's sum, in the lines of `sha256sum`."""
    return path.with_name(f".{path.name}.sha256")


def why_incomplete(
    path: str | os.PathLike, *, contents: bool = True, remembered: bool = False, card: bool = True
) -> str | None:
    """None when the folder `path` verifies against its manifest, else what is wrong, in a few words.

    contents: compare hashes too, which reads every file; False only looks for missing and shortened files.
    remembered: hash no file again that was hashed before and has kept its size and times (mohawk.core.sums).
    card: compare a model card too.

    Raises:
        OSError: the machine refuses to read a file, which says nothing of what is in it.
    """
    path = Path(path)
    try:
        files = _manifest(path)["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"no {MANIFEST}" if path.is_dir() else "no such folder"
    except OSError as error:
        return _unreadable(MANIFEST, error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    if not expected:
        return f"{MANIFEST} lists no files"
    expected = {name: entry for name, entry in expected.items() if card or not name.endswith(CARD)}
    for name, (size, _) in expected.items():  # sizes first: they cost nothing
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    if not contents:
        return None
    names = list(expected)
    try:
        digests = sha256_of([path / name for name in names], again=not remembered)
        for name, digest in zip(names, digests, strict=True):
            if digest != expected[name][1] and remembered:  # what is remembered may be damaged itself
                (digest,) = sha256_of([path / name], again=True)
            if digest != expected[name][1]:
                return f"{name} is damaged"
    except OSError as error:
        return _unreadable(Path(error.filename).name if error.filename else "a file", error)
    return None


def _unreadable(name: str, error: OSError) -> str:
    """What is wrong with a file that the disk does not give. Raises the error where the machine refuses to read it."""
    if is_refusal(error):
        raise error
    return f"{name} cannot be read ({error.strerror})"


def is_complete(path: str | os.PathLike) -> bool:
    """Whether every file of the folder `path` is there with the content its manifest promises; a file that was hashed
    before and has kept its size and times is not read again. Raises OSError, as `why_incomplete` does."""
    return why_incomplete(path, remembered=True) is None


def refuse_damaged(path: str | os.PathLike, remedy: str, where: str = "") -> None:
    """UserError where a model's folder is not as its manifest says; one without a manifest is taken as it is, since any
    folder may hold a model. remedy: what to do then. where: in front of all."""
    if not (Path(path) / MANIFEST).exists():
        return
    if (problem := why_incomplete(path, remembered=True, card=False)) is not None:
        raise UserError(f"{where}{path}: {problem}; {remedy}, or delete its {MANIFEST} to use it as it is")


def about_of(path: str | os.PathLike) -> dict[str, Any]:
    """What `write_whole` was told of the folder `path`; empty where it was told nothing, or the manifest is damaged.
    Raises OSError where the machine refuses to read that."""
    about = _known_manifest(path).get("about")
    return about if isinstance(about, dict) else {}


def weights_sum(path: str | os.PathLike) -> str | None:
    """What changes with the weights in the folder `path`, by its manifest; None where it has none, or a damaged one.
    Raises OSError where the machine refuses to read that."""
    try:
        files = _known_manifest(path)["files"]
        sums = [f"{name} {files[name]['sha256']}" for name in sorted(files) if name.endswith(WEIGHTS)]
    except (KeyError, TypeError):
        return None
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def made_of(source: str | os.PathLike) -> dict[str, Any]:
    """What a manifest says of a folder that is made of the weights in `source`; nothing where those have no manifest.
    Raises OSError, as `weights_sum` does."""
    weights = weights_sum(source)
    return {} if weights is None else {"from": weights}


def is_made_of_others(path: str | os.PathLike, source: str | os.PathLike) -> bool:
    """Whether the folder `path` was made of other weights than those in `source`, as far as their manifests say. Raises
    OSError where the machine refuses to read them."""
    told, there = about_of(path).get("from"), weights_sum(source)
    return None not in (told, there) and told != there


def _known_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The manifest of the folder `path`; empty where there is none, or a damaged one. Raises OSError where the machine
    refuses to read it."""
    try:
        manifest = _manifest(Path(path))
    except OSError as error:
        if is_refusal(error):
            raise
        return {}
    except (ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _manifest(path: Path) -> Any:
    """The manifest of the folder `path`, compared with its own sum; those of earlier versions have none. Raises
    OSError, and ValueError or RecursionError where it is damaged."""
    value = json.loads((path / MANIFEST).read_bytes())
    if isinstance(value, dict) and "sha256" in value and value["sha256"] != manifest_sum(value):
        raise ValueError("not as it was written")
    return value


def manifest_sum(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest without its own `sha256`."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def step_of(path: str | os.PathLike) -> int:
    """The N of a folder called checkpoint-N; -1 for any other name."""
    match = CHECKPOINT.fullmatch(Path(path).name)
    return int(match.group(1)) if match else -1


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The checkpoint-N folders in `folder`, complete or not, the newest (highest N) first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if step_of(path) >= 0), key=step_of, reverse=True)


def newest_complete(folder: str | os.PathLike) -> Path | None:
    """The newest checkpoint-N in `folder` whose manifest verifies, or None; logs those passed over.

    Raises:
        OSError: the machine refuses to read one. What the disk has lost (EIO) is passed over where an older checkpoint
            is whole, as what is damaged.
    """
    passed, found, lost = [], None, None
    for path in checkpoints(folder):
        try:
            problem = why_incomplete(path)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            lost, problem = lost or error, f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
        if problem is None:
            found = path
            break
        passed.append(f"{path.name} ({problem})")
    if lost is not None and found is None:  # another time it may be there, which is better than to begin again
        raise lost
    if passed:
        using = f"resuming from {found.name}" if found else "starting from the beginning"
        logger.warning("%s: passed over %s; %s", folder, ", ".join(passed), using)
    return found


def rotate(folder: str | os.PathLike, newest: str | os.PathLike, keep: int = 1) -> None:
    """Delete all but the `keep` newest checkpoints, once `newest` is complete.

    Checkpoints of later steps than `newest` were passed over when the run resumed, so they go too. Each is
    renamed away first: one half deleted is not seen as a checkpoint. One that cannot be deleted is logged.
    """
    older = [path for path in checkpoints(folder) if step_of(path) < step_of(newest)]
    later = [path for path in checkpoints(folder) if step_of(path) > step_of(newest)]
    for path in older[max(keep - 1, 0) :] + later:
        try:
            aside = _set_aside(path)
        except OSError as error:
            logger.warning("could not delete the old checkpoint %s: %s", path, error)
        else:
            _delete(aside)


def _delete(path: Path) -> None:
    """Deletes a folder that is already set aside. Where that fails, a warning is enough: nobody reads the folder."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("could not delete %s: %s", path, error)


def remove_partial(folder: str | os.PathLike, of: str = "") -> None:
    """Remove what killed processes left half written or half deleted in `folder` (only of the name `of`)."""
    for path in Path(folder).glob(f"{PARTIAL}{of + '-' if of else ''}*"):
        logger.info("removing %s, left by a process that was stopped", path)
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Hold `folder` for this process: a second one in it would delete the first one's unfinished checkpoints.

    Raises:
        UserError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(Path(folder) / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is at work here; wait for it, or stop it") from None
        yield  # the kernel lets go when the file is closed, also when the process is killed


def _ours(path: Path) -> bool:
    return path.is_dir() and ((path / MANIFEST).exists() or not any(path.iterdir()))


def seal(folder: Path, about: Mapping[str, Any] | None = None, sums: Mapping[str, str] | None = None) -> None:
    """Hash the files of a folder made here into its manifest and flush all to the disk. Files that a library made
    readable by their owner alone, as safetensors does, become as readable as the folder is: as the umask says."""
    names = sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())
    if not names:
        raise ValueError(f"{folder}: nothing was written into it")
    files = {}
    for name in names:
        _give_mode(folder / name, folder.stat().st_mode)
        fsync(folder / name)
        digest = (sums or {}).get(name) or hashed(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest}
    manifest = folder / MANIFEST
    value = {"files": files} | ({"about": dict(about)} if about else {})
    value = json.loads(json.dumps(value))  # as it will be read
    value["sha256"] = manifest_sum(value)
    manifest.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    fsync(manifest)
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync(path)
    fsync(folder)


def _give_mode(file: Path, like: int) -> None:
    """Give a file the read and write permissions of another one's mode, or of a folder's."""
    if (file.stat().st_mode ^ like) & 0o666:
        os.chmod(file, like & 0o666)


def _sums(path: Path) -> list[str] | None:
    try:
        lines = sum_file(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return None
    return [line.split()[0] for line in lines if line.strip()]


def _write_sums(path: Path, sums: list[str]) -> None:
    target = sum_file(path)
    beside = target.with_name(f"{target.name}.tmp")
    try:
        beside.write_text("".join(f"{digest}  {path.name}\n" for digest in sums), encoding="utf-8")
        fsync(beside)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _set_aside(path: Path) -> Path:
    """Rename `path` to a `.partial-` name: from here on nobody takes it for complete."""
    aside = _hidden(path)
    os.rename(path, aside)
    return aside


def _hidden(path: Path) -> Path:
    return path.parent / f"{PARTIAL}{path.name}-{secrets.token_hex(4)}"


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)
