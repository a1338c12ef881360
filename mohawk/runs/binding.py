"""What a run is bound to: run.json has its id, its recipe, and hashes of all that it reads.

A run that goes on with other weights, another configuration, tokenizer or text than it began with would be neither the
old run nor a new one: it is refused, by name. Other versions of libraries, and another precision where the recipe
leaves it open, are said. Checkpoints and students carry the run's id and a record of what it is bound to
(`mohawk.core.folders.about_of`), by which a lost run.json is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mohawk.core.folders import MANIFEST, WEIGHTS, about_of, sum_file, weights_sum
from mohawk.core.json_files import parse_json, read_json, write_json
from mohawk.core.lines import sums_of
from mohawk.core.places import home
from mohawk.core.run_folder import (
    ROUNDS,
    RUN_FILE,
    STUDENT,
    SUMMED_LINES,
    evaluation_files,
    left_by_phases,
    summed_files,
)
from mohawk.core.sums import sha256_of
from mohawk.data.source_files import source_content
from mohawk.data.text import tokenizer_key
from mohawk.data.tokenizers.run_tokenizers import run_tokenizers, tokenizer_source
from mohawk.errors import UserError
from mohawk.runs.kept import Bound
from mohawk.schema.base import CheckpointSection, Phase, sections

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "accelerate", "triton")
TOKENIZER = "teacher tokenizer"
ROLES = "teacher special tokens"
ALIGNED = "aligned teacher's tokenizer"
RECORDED = ("inputs", "precision", "versions", "sums")  # of run.json, in the manifests of what a run trained
# What a model's folder is configured by, besides its weights; a generation's settings decide nothing here.
CONFIGURATION = ("config.json", "mamba_config.json", "adapter_config.json")
UNRELATED = ("_name_or_path", "transformers_version")  # in them: who wrote them, and from where


def bound(run: Path) -> dict[str, Any] | None:
    """What run.json says; None for a run of an earlier version, or where it is damaged (logged)."""
    return read_json(run / RUN_FILE, Bound)


def write_bound(run: Path, recipe: Any) -> None:
    """run.json of a run that begins or goes on with this recipe; its id and what it is bound to stay."""
    found = bound(run) or _made_again(run)
    new = found | {"command": type(recipe).__name__, "recipe": recipe.model_dump(mode="json")}
    if new != bound(run):
        write_json(run / RUN_FILE, new)


def record_of(run: Path) -> dict[str, Any]:
    """What a manifest says of the run that it is of: its id, and under `bound` what that is bound to; empty for one
    of an earlier version."""
    found = bound(run)
    if found is None:
        return {}
    return {"run": found["id"], "bound": {name: found[name] for name in RECORDED if name in found}}


def bind(run: Path, recipe: Any, tokenizer: Any, precision: str, *, record: bool) -> None:
    """Compare what a run reads with what it began with; on its first start keep that.

    Fields of the recipe that have changed are not compared here: `mohawk.runs.claim.claimed` decides whether they may
    change, and a run may be measured on another text. precision: as resolved. record: it trains; False: it is only
    measured.

    Raises:
        UserError: a line for each of weights, configuration, tokenizer and text that is another one.
    """
    found = bound(run) or _recorded(run)
    if found is None or (found["inputs"] is None and not record):
        return
    now = dict(inputs_of(recipe, tokenizer))
    if found["inputs"] is None or record and not _begun(run):  # such as one whose first teacher was refused
        write_json(run / RUN_FILE, found | {"inputs": now, "precision": precision, "versions": versions()})
        return
    installed, then = versions(), found["versions"]
    if any(then.get(name) != installed.get(name) for name in ("tokenizers", "transformers")):
        # another version may write down the same tokenizer otherwise, so that hashes decide nothing
        for what in (TOKENIZER, ROLES):
            if found["inputs"].get(what, now[what]) != now.pop(what):
                log.warning("%s: not written down as when the run began, under other versions", what)
    _refuse_changed(run, found["inputs"], now)
    if not record:
        return
    if (before := found["precision"]) not in (None, precision):
        log.warning("precision: %s now, %s when the run began", precision, before)
    for name, version in installed.items():
        if then.get(name, version) != version:
            log.warning("going on with %s %s; the run began with %s", name, version, then[name])


def check_models(run: Path, recipe: Any) -> None:
    """UserError where a run's teacher, or another model that its recipe names, is not the one that it began with."""
    found = bound(run) or _recorded(run)
    if found is not None and found["inputs"] is not None:
        _refuse_changed(run, found["inputs"], dict(models_of(recipe)))


def _refuse_changed(run: Path, then: dict[str, list[str]], now: dict[str, list[str]]) -> None:
    other = [
        f"{run}: {name} ({given}) has changed since the run began ({_difference(name, then[name][1], digest)}); "
        "put back what it was, or choose another output to begin anew"
        for name, (given, digest) in now.items()
        if name in then and then[name][0] == given and then[name][1] != digest
    ]
    if other:
        raise UserError("\n".join(other))


def _difference(name: str, then: str, now: str) -> str:
    if name != ROLES:
        return f"sha256 {then[:10]}, now {now[:10]}"
    old, new = json.loads(then), json.loads(now)
    roles = (role for role in sorted(old.keys() | new.keys()) if old.get(role) != new.get(role))
    return "; ".join(f"{role} {old.get(role)!r}, now {new.get(role)!r}" for role in roles)


def inputs_of(recipe: Any, tokenizer: Any) -> Iterator[tuple[str, list[str]]]:
    """(dotted name, [what the recipe says, hash]) of every model's weights, configuration and code, the tokenizer, and
    every text and cache that a recipe names; of the special tokens' roles JSON in place of a hash."""
    yield from models_of(recipe)
    for at, section in sections(recipe):
        if hasattr(section, "source"):
            yield f"{at} text", [section.source, source_content(section)]
        if isinstance(section, Phase) and (cache := getattr(section, "cache", None)) is not None:
            if (answers := weights_sum(home(cache))) is not None:
                yield f"{at}.cache", [str(cache), answers]
    scores = getattr(getattr(recipe, "calibration", None), "scores", None)
    if scores is not None and (path := home(scores)).is_file():
        yield "calibration.scores", [scores, sha256_of([path])[0]]
    given = str(tokenizer_source(recipe))
    parts = f"{tokenizer_key(tokenizer)} {tokenizer.chat_template}"
    yield TOKENIZER, [given, hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()]
    theirs = None if getattr(recipe, "align", None) is None else run_tokenizers(recipe).teacher
    if theirs is not None:
        parts = f"{tokenizer_key(theirs)} {theirs.chat_template}"
        yield ALIGNED, [recipe.teacher.model, hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()]
    yield ROLES, [given, json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)]


def models_of(recipe: Any) -> Iterator[tuple[str, list[str]]]:
    """As `inputs_of`, of the models alone: `teacher weights`, `teacher configuration` and the like."""
    for at, section in sections(recipe):
        if isinstance(section, CheckpointSection) and section.model is not None:
            for what, digest in _model(section, at).items():
                yield f"{at} {what}", [section.model, digest]


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers, by package."""
    from mohawk import __version__
    from mohawk.core.devices import version

    own = {"mohawk": __version__, "python": platform.python_version()}
    return own | {package: found for package in PACKAGES if (found := version(package))}


def _model(section: CheckpointSection, at: str) -> dict[str, str]:
    """Hashes of a model's weights, configuration and code that is run, or the commit of one on the hub."""
    from mohawk.loading.configs import locate

    assert section.model is not None
    name, gguf_file = locate(section.model, section.gguf_file, at)
    folder = Path(name)
    if not folder.is_dir():
        commit = _commit(name, section.revision)
        return {} if commit is None else {"weights": f"commit {commit}"}
    if gguf_file is not None:
        return {"weights": sha256_of([folder / gguf_file])[0]}
    weights = sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS and path.suffix != ".gguf")
    code = sorted(folder.rglob("*.py")) if section.trust_remote_code else []
    config = {file: _configuration(folder / file, at) for file in CONFIGURATION if (folder / file).is_file()}
    return {
        "weights": _sum_of(weights, folder),
        "configuration": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        **({"code": _sum_of(code, folder)} if code else {}),
    }


def _sum_of(files: list[Path], folder: Path) -> str:
    names = (path.relative_to(folder).as_posix() for path in files)
    lines = [f"{name} {digest}" for name, digest in zip(names, sha256_of(files), strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _configuration(path: Path, at: str) -> Any:
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{at}: {path} cannot be read ({error}); give a checkpoint with a sound one") from error
    return {key: entry for key, entry in value.items() if key not in UNRELATED} if isinstance(value, dict) else value


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of what the hub's cache has, from where the model was just loaded."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _made_again(run: Path) -> dict[str, Any]:
    """What run.json says where there is none: of a new run, of an earlier version's, or of one that lost it."""
    new = {"id": secrets.token_hex(8), "inputs": None, "precision": None, "versions": versions()}
    if not _begun(run):
        return new if _wrote_unsummed(run) else new | {"sums": True}
    found = _recorded(run)
    if found is None:
        log.warning(
            "%s: has no readable %s, and nothing there says what it was made of: teacher, tokenizer and text are not "
            "verified against what the run began with", run, RUN_FILE,
        )  # fmt: skip
        return new | {"id": _earlier_id(run) or new["id"]}
    log.warning("%s: %s is lost; made again of what %s says", run, RUN_FILE, found.pop("path"))
    return found


def _wrote_unsummed(run: Path) -> bool:
    """Whether a run has a file without its sum, as an earlier version wrote them."""
    lines = (run / name for name in SUMMED_LINES)
    return any(not sum_file(path).exists() for path in summed_files(run)) or any(
        path.is_file() and not sums_of(path).exists() for path in lines
    )


def _begun(run: Path) -> bool:
    """Whether a run has made anything of what it reads."""
    work = [*left_by_phases(run), *evaluation_files(run), *run.glob(f"{ROUNDS}/*"), run / STUDENT]
    return any(path.is_dir() or path.suffix == ".json" for path in work)


def _recorded(run: Path) -> dict[str, Any] | None:
    """The id and the record in the newest manifest of a checkpoint or student, and its `path`; None if none has any."""
    written = [path for path in (*left_by_phases(run), run / STUDENT) if (path / MANIFEST).exists()]
    for path in sorted(written, key=_written_at, reverse=True):
        about = about_of(path)
        record = about.get("bound")
        found = {"id": about.get("run"), "path": path} | (record if isinstance(record, dict) else {})
        try:
            TypeAdapter(Bound).validate_python({**found, "command": "", "recipe": {}}, strict=True)
        except ValidationError:  # an earlier version's says nothing, or it is damaged
            continue
        if found["inputs"] is not None:
            return found
    return None


def _written_at(folder: Path) -> tuple[int, str]:
    return (folder / MANIFEST).stat().st_mtime_ns, str(folder)


def _earlier_id(run: Path) -> str | None:
    """The id that a run of an earlier version, whose run.json is lost, gave its students and checkpoints."""
    ids = (about_of(path).get("run") for path in sorted(left_by_phases(run)) if path.is_dir())
    return next((found for found in ids if isinstance(found, str)), None)


def of_this_run(run: Path, about: Mapping[str, Any]) -> bool:
    """Whether a folder's manifest names this run, or none: earlier versions named none."""
    found = bound(run)
    return found is None or about.get("run") in (None, found["id"])
