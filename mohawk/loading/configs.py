"""Where a model lies and what it is, by its configuration alone; what is wrong with it, naming which model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from mohawk.core.extras import explain
from mohawk.core.folders import refuse_damaged
from mohawk.core.hub import hub_or_cache, is_unreachable
from mohawk.core.json_files import parse_json
from mohawk.core.places import home
from mohawk.errors import UserError, as_os_error, causes, file_at, machines_own, shortened
from mohawk.loading.causal import GIVE, check_causal, plain_model
from mohawk.loading.tasks import CAUSAL, OTHERWISE, config_problem

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def said_of(who: str) -> str:
    """What a message about a model begins with: what the model is called, if anything."""
    return f"{who}: " if who else ""


def option_of(who: str, name: str) -> str:
    """A recipe's field beside the one that names a model: `student.revision` of `student.model`. The command line's
    models are in no section."""
    section = who.removesuffix(".model")
    return name if not section or section.startswith("--") else f"{section}.{name}"


def locate(model: str | Path, gguf_file: str | None = None, who: str = "teacher") -> tuple[str, str | None]:
    """Resolve what the user named into what `from_pretrained` takes: (folder or hub id, GGUF file or None).

    `model` is a folder, a `.gguf` file, or a hub id. What looks like a path must exist: a mistyped folder
    would otherwise be asked of the hub. who: what messages call the model. Raises UserError.
    """
    name = str(model).strip()
    if not name:
        raise UserError(f"{said_of(who)}the model is empty; give a local folder, a .gguf file or a hub id")
    path = home(name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"{said_of(who)}{name} is a file; give the folder that holds config.json, or a .gguf file")
        if gguf_file is not None and gguf_file != path.name:
            raise UserError(f"{said_of(who)}{name} is itself a GGUF file; drop gguf_file ({gguf_file})")
        return str(path.parent), path.name
    if path.is_dir():
        if gguf_file is not None:
            if not (path / gguf_file).is_file():
                raise UserError(f"{said_of(who)}{name} holds no {gguf_file}; {_listed(path, '.gguf')}")
        elif not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise UserError(f"{said_of(who)}{name} holds an adapter of peft's alone; {_instead_of_adapter(path)}")
            raise UserError(
                f"{said_of(who)}{name} holds no config.json, so it is no saved Hugging Face model; "
                f"{_listed(path, '.gguf')}"
            )
        refuse_damaged(path, "make it again", f"{said_of(who)}cannot load the weights from the folder ")
        _refuse_outside(path, who)
        return str(path), gguf_file
    if looks_local(name):
        raise UserError(f"{said_of(who)}{name} does not exist (looked for {path.absolute()})")
    return name, gguf_file


def _instead_of_adapter(folder: Path) -> str:
    """What to give in place of an adapter."""
    try:
        kind = parse_json((folder / "adapter_config.json").read_bytes())["peft_type"]
    except (ValueError, KeyError, TypeError):
        kind = None
    if kind in PROMPTS:  # which adds states that stand for no token, and changes no weight
        return f"one of {kind} cannot be merged into a model; give a model without it, or an adapter that can, as LoRA"
    return "merge it into the model that it is for (merge_and_unload), save that, and give its folder"


def _refuse_outside(folder: Path, who: str) -> None:
    """UserError where an index of weights names files that are not in its own folder."""
    for index in sorted(folder.glob("*.index.json")):
        try:
            files = set(parse_json(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # transformers says what is wrong with it
        if outside := sorted(str(file) for file in files if Path(str(file)).name != str(file)):
            raise UserError(
                f"{said_of(who)}{index}: weight_map: got {shortened(repr(outside[0]), 60)}; allowed: names of files in "
                "the same folder; put the weights there, or give another checkpoint"
            )


def looks_local(name: str) -> bool:
    """Whether a missing name was meant as a path: a hub id has one slash and names no folder of ours."""
    parent = home(name).parent
    return (
        name.startswith((".", "/", "~", "\\"))
        or name.count("/") > 1
        or name.lower().endswith(".gguf")
        or (parent != Path(".") and parent.is_dir())
    )


def _listed(folder: Path, suffix: str) -> str:
    found = sorted(p.name for p in folder.glob(f"*{suffix}"))
    if not found:
        return f"it has no {suffix} file either"
    return f"its {suffix} files: {', '.join(found)} (set gguf_file)"


def load_config(
    model: str | Path,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    who: str = "teacher",
    task: str = CAUSAL,
) -> PretrainedConfig:
    """A model's configuration, checked to be a causal language model's, or one for another `task`; of a released
    student (Phi-Mamba, Llamba, MambaInLlama) our own. who: what messages call the model. Raises UserError."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from mohawk.models.families import other_than_decoder

    name, gguf_file = locate(model, gguf_file, who)
    if task == CAUSAL and (released := released_in(name, gguf_file, revision, who)) is not None:
        return released
    if gguf_file is None and (file := Path(name) / "config.json").is_file():
        try:
            given = parse_json(file.read_bytes())
        except ValueError:
            given = None  # said below
        # before transformers', whose own words name no field where it divides by one
        _check_sizes(given if isinstance(given, dict) else {}, name, who)
    try:
        with hub_or_cache(name):
            config = AutoConfig.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code, **gguf_options(gguf_file, who)
            )
    except Exception as error:
        raise load_error(error, name, revision, "configuration", who, gguf_file) from error
    _check_sizes(vars(config.get_text_config()), name, who)
    kind = f"{name} is a {config.model_type} model"
    if task != CAUSAL:
        if (problem := config_problem(config, task, trust_remote_code)) is not None:
            raise UserError(f"{said_of(who)}{kind}: {problem}")
        _check_names(config.get_text_config(), name, who)
        return config
    if (other := other_than_decoder(config) or _ahead(config)) is not None:
        raise UserError(f"{said_of(who)}{kind}: {other}; {_given_instead(other)}")
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not remote and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{said_of(who)}{kind}, which transformers has no causal language model for")
    if not remote:  # whose own code may know others
        _check_names(config.get_text_config(), name, who)
    declared = config.architectures or []
    if not (isinstance(declared, list) and all(isinstance(entry, str) for entry in declared)):
        raise _cannot_be(name, who, "architectures", declared, "a list of names")
    if declared and not any(a.endswith(CAUSAL_HEADS) for a in declared):
        raise UserError(
            f"{said_of(who)}{kind} saved as {', '.join(declared)}, not as a causal language model; "
            "give a checkpoint whose architecture ends in ForCausalLM"
        )
    return config


def _check_sizes(config: Mapping[str, Any], name: str, who: str) -> None:
    """UserError for a size of which no model can be made, by its field."""
    for field, least in SIZES.items():
        value = config.get(field)
        if value is not None and not isinstance(value, (list, tuple)) and not (type(value) is int and value >= least):
            raise _cannot_be(name, who, field, value, f"a whole number of at least {least}")
    for field in WHOLE:
        value = config.get(field)
        if not (value is None or type(value) is int):
            raise _cannot_be(name, who, field, value, "a whole number, or null")
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:  # even without weights that many take minutes to make
        raise _cannot_be(name, who, "num_hidden_layers", layers, f"at most {MOST_LAYERS:,}")


def _check_names(config: PretrainedConfig, name: str, who: str) -> None:
    """UserError for an activation or kind of rotary embedding that transformers does not have, by its field."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for field in ("hidden_act", "hidden_activation", "activation_function"):
        value = getattr(config, field, None)
        if value is not None and not (isinstance(value, str) and value in ACT2FN):
            raise _cannot_be(name, who, field, value, f"what transformers has: {', '.join(sorted(ACT2FN))}")
    ropes, known = getattr(config, "rope_parameters", None) or {}, sorted({"default", *ROPE_INIT_FUNCTIONS})
    # of all layers, or of each kind of layers
    for rope in [ropes, *ropes.values()] if isinstance(ropes, dict) else []:
        kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
        if kind not in known:
            raise _cannot_be(name, who, "rope_type", kind, f"what transformers has: {', '.join(known)}")


def _cannot_be(name: str, who: str, field: str, value: Any, allowed: str) -> UserError:
    return UserError(
        f"{said_of(who)}the configuration of {name} cannot be: {field}: got {shortened(repr(value), 60)}; "
        f"allowed: {allowed}; give a checkpoint with a sound config.json"
    )


@contextmanager
def building(config: PretrainedConfig, name: str | Path, who: str = "teacher") -> Iterator[None]:
    """Within the block, in which a model is made of a configuration alone, what goes wrong is that configuration's.
    Raises UserError."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if machines_own(error) is not None:
            raise
        raise UserError(
            f"{said_of(who)}the configuration of {name} cannot be: no {config.model_type} model can be made of it "
            f"({first_line(error)}); give a checkpoint with a sound config.json"
        ) from error


def check_decoder(model: Any, who: str) -> None:
    """UserError unless a model predicts each next token of a text from those before it.

    Encoders, models with an encoder and a decoder and models of speech or images have an output embedding too, from
    which every loss here would be computed, one token off. What neither class nor configuration says is found by a
    few tokens that the model reads (`mohawk.loading.causal.check_causal`). who: what the message calls it.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    from mohawk.models.families import other_than_decoder

    model = plain_model(model)
    name = type(model).__name__
    if (config := getattr(model, "config", None)) is None:
        raise UserError(f"{who}: {name} has no configuration; give a causal language model of transformers")
    other = other_than_decoder(config) or _ahead(config)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if other is None and name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and name not in causal:
        other = "it fills in masked tokens, each from those around it"
    if other is None and model.get_output_embeddings() is None:  # a body alone, or one that classifies
        other = "it has no output embedding, and so predicts no token"
    if other is not None:
        raise UserError(f"{who}: got {name}: {other}; {_given_instead(other)}")
    check_causal(model, who)


def _given_instead(other: str) -> str:
    """What to give in place of a model that writes no text from left to right."""
    return GIVE if "speech" in other or "image" in other else f"{GIVE}, or say what it is for: {OTHERWISE}"


def _ahead(config: PretrainedConfig) -> str | None:
    from mohawk.models.families import looks_ahead

    return "its attention is not causal: each token sees those behind it too" if looks_ahead(config) else None


def released_in(name: str, gguf_file: str | None, revision: str | None, who: str) -> PretrainedConfig | None:
    """Our configuration of a released student, None for anything that transformers loads itself."""
    from mohawk.models.formats.released import released_config

    if gguf_file is not None:
        return None
    try:
        with hub_or_cache(name):
            found = released_config(name, revision=revision)
    except Exception as error:
        raise load_error(error, name, revision, "configuration", who) from error
    return None if found is None else found[1]


def gguf_options(gguf_file: str | None, who: str) -> dict[str, Any]:
    if gguf_file is None:
        return {}
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(
            explain(error, f"{said_of(who)}{gguf_file}") or f"{said_of(who)}{gguf_file}: {error}"
        ) from error
    return {"gguf_file": gguf_file}


def load_error(
    error: Exception, name: str, revision: str | None, what: str, who: str, gguf_file: str | None = None
) -> BaseException:
    """One line for the causes a user can do something about; anything else passes through unchanged."""
    from huggingface_hub import errors as hub

    if isinstance(error, UserError):
        return error
    if (own := machines_own(error)) is not None:
        made = as_os_error(own) or own
        if isinstance(made, OSError) and made.errno is not None and made.filename is None:
            made.filename = file_at(own) or name  # a read that fails knows no name, and tokenizers' own has none
        return made
    chain = causes(error)
    local = Path(name).exists()
    at = f" at revision {revision}" if revision else ""

    def found(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    if "trust_remote_code" in str(error):
        return UserError(
            f"{said_of(who)}{name} runs Python code of its own to load; if you trust it, set "
            f"{option_of(who, 'trust_remote_code')}: true"
        )
    if "packages that were not found in your environment" in str(error):  # what the checkpoint's own code imports
        return UserError(f"{said_of(who)}{name}: {first_line(error)}")
    if isinstance(error, ImportError):
        return error
    if local and gguf_file is None and (culprit := _damaged_file(Path(name), what, first_line(error))) is not None:
        return UserError(
            f"{said_of(who)}cannot load the {what} from the folder {name}: {culprit}; give a whole checkpoint"
        )
    if "ignore_mismatched_sizes" in str(error):  # whose report names them above
        return UserError(
            f"{said_of(who)}cannot load the {what} of {name}: they have other shapes than its config.json says; give a "
            "checkpoint whose configuration is its own"
        )
    if found(UnpicklingError):
        return UserError(
            f"{said_of(who)}cannot load the {what} of {name}: its .bin file is damaged, or a pickle with more in it "
            "than tensors, which would run code when it is read, so it is refused; give a checkpoint with .safetensors "
            "files"
        )
    # whatever goes wrong with files that are here is the files': a file cut short, shapes of another configuration
    if local and gguf_file is not None:
        return UserError(
            f"{said_of(who)}cannot load the {what} of {Path(name) / gguf_file}: the file is damaged, cut short or of a "
            f"kind that transformers does not read ({first_line(error)})"
        )
    if local:
        return UserError(f"{said_of(who)}cannot load the {what} from the folder {name}: {first_line(error)}")
    if found(hub.GatedRepoError):
        return UserError(f"{said_of(who)}{name} is gated; accept its terms on the hub and run: hf auth login")
    if found(hub.RevisionNotFoundError):
        return UserError(f"{said_of(who)}{name} has no revision {revision} on the hub")
    if found(hub.RepositoryNotFoundError, hub.HFValidationError):
        return UserError(
            f"{said_of(who)}{name} is neither a local folder nor a model on the hub (a private one needs: "
            "hf auth login)"
        )
    if is_unreachable(error):
        return UserError(
            f"{said_of(who)}{name}{at} is no local folder, is not in the hub cache, and the hub cannot be "
            "reached; give a local folder, or run once where the hub can be reached"
        )
    if isinstance(error, (OSError, ValueError)):
        return UserError(f"{said_of(who)}cannot load the {what} of {name}{at}: {first_line(error)}")
    return error


def _damaged_file(folder: Path, what: str, said: str) -> str | None:
    """The first file of a checkpoint that is empty, or no JSON object where one belongs, and what it is instead; of a
    tokenizer also a file that is none. what: `tokenizer`, `weights` or `configuration`, which cannot be loaded. said:
    what transformers says of that."""
    for file in sorted(folder.glob("*")):
        if file.suffix in (".bin", ".safetensors", ".json") and file.is_file() and file.stat().st_size == 0:
            return f"{file.name} is empty"
        index = file.name.endswith(".index.json")
        if index or file.name in (*OBJECTS, *(BESIDE_TOKENIZER if what == "tokenizer" else ())):
            try:
                value = parse_json(file.read_bytes())
            except ValueError as error:
                return f"{file.name} is not JSON ({shortened(str(error))})"
            if not isinstance(value, dict):
                kind = "null" if value is None else f"a JSON {type(value).__name__}"
                return f"{file.name} holds {kind}, not an object"
            if index and (lacks := [key for key in INDEX if not isinstance(value.get(key), dict)]):
                return f"{file.name} has no object {lacks[0]!r}, which an index of weights has"
    return _damaged_tokenizer(folder / "tokenizer.json", said) if what == "tokenizer" else None


def _damaged_tokenizer(file: Path, said: str) -> str | None:
    """What is wrong with a tokenizer.json, by its place in the file where it is no JSON, or what the package tokenizers
    says of it; or that something is with the files beside it, where it can be read. None where there is no such file.
    said: what transformers says."""
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        parse_json(file.read_bytes())
    except ValueError as error:
        return f"{file.name} is not JSON ({shortened(str(error))})"
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers' own, a bare one
        if machines_own(error) is not None:
            raise
        return f"{file.name} is no tokenizer ({shortened(first_line(error).partition(': ')[2])})"
    others = [name for name in ("tokenizer_config.json", *BESIDE_TOKENIZER) if file.with_name(name).is_file()]
    return f"{' or '.join(others)} does not fit {file.name} ({said})" if others else None


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].rstrip().endswith(":"):  # the next one says what
        lines[0] = f"{lines[0].rstrip()} {lines[1].strip()}"
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


# Sizes in a configuration, and the least that each may be.
SIZES = {
    "vocab_size": 1, "hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "intermediate_size": 1, "head_dim": 1,
}  # fmt: skip
WHOLE = ("sliding_window", "max_position_embeddings")  # which transformers reads as a model runs, whatever its class
MOST_LAYERS = 10_000


OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json")  # files that hold one in JSON
BESIDE_TOKENIZER = ("special_tokens_map.json", "added_tokens.json")
INDEX = ("metadata", "weight_map")  # of the weights in several files


# peft's adapters of states in front of a text's
PROMPTS = (
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "CARTRIDGE",
)


CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
