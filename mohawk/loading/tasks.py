"""What a model is for: writing text from left to right, filling in masked words, telling classes of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mohawk.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TaskName = Literal["causal_lm", "masked_lm", "classification", "seq2seq_lm"]
CAUSAL = "causal_lm"
# transformers' automatic class for each, and what the names of its classes end in
AUTO = {
    CAUSAL: "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
}
ENDS = {"masked_lm": "ForMaskedLM", "classification": "ForSequenceClassification"}
OTHERWISE = "an encoder needs task: masked_lm or classification"  # behind what refuses one as a causal model


def task_in(recipe: Any) -> str:
    """The task of a recipe's models; most kinds of recipes have causal ones alone."""
    return getattr(recipe, "task", CAUSAL)


def auto_class(task: str) -> Any:
    """transformers' automatic class of models for a task. Raises ValueError for a task that has none."""
    import transformers

    if task not in AUTO:
        raise ValueError(f"task: got {task!r}; allowed: {', '.join(AUTO)}")
    return getattr(transformers, AUTO[task])


def config_problem(config: PretrainedConfig, task: str, trust_remote_code: bool = False) -> str | None:
    """Why no model for `task`, which is not causal_lm, can be made of a configuration; None where one can."""
    from transformers.models.auto import modeling_auto

    known = {
        "masked_lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
        "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    }[task]
    remote = trust_remote_code and AUTO[task] in (getattr(config, "auto_map", None) or {})
    if not remote and type(config) not in known:
        return f"transformers has no {AUTO[task]} for it, as task: {task} needs"
    if getattr(config, "is_encoder_decoder", False):
        return f"it is an encoder and a decoder; task: {task} is for encoders"
    return _classes_problem(config) if task == "classification" else None


def check_task(model: Any, who: str, task: str) -> None:
    """UserError unless a model is one for a task other than causal_lm. who: what the message calls it."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None:
        raise UserError(f"{who}: {name} has no configuration; give a model of transformers")
    both = bool(getattr(config, "is_encoder_decoder", False))
    problem = None
    if task == "seq2seq_lm":
        if not both or model.get_output_embeddings() is None:
            problem = "task seq2seq_lm is for an encoder and a decoder with an output embedding, such as T5 or Whisper"
    elif both:
        problem = f"it is an encoder and a decoder; task {task} is for encoders; take seq2seq_lm"
    elif task == "masked_lm" and (model.get_output_embeddings() is None or "Causal" in name):
        problem = "task masked_lm is for models that fill in masked words (saved as ...ForMaskedLM)"
    elif task == "classification":
        if getattr(config, "num_labels", None) is None or not name.endswith(ENDS[task]):
            problem = "task classification is for models that tell classes (saved as ...ForSequenceClassification)"
        else:
            problem = _classes_problem(config)
    if problem is not None:
        raise UserError(f"{who}: got {name}: {problem}")


def _classes_problem(config: Any) -> str | None:
    kind = getattr(config, "problem_type", None)
    if kind not in (None, "single_label_classification"):
        return f"its problem_type is {kind}; task: classification is for one class a text"
    if config.num_labels < 2:
        return f"it tells {config.num_labels} class; task: classification needs two or more (num_labels)"
    return None


def class_names(config: Any) -> dict[str, int]:
    """The number of each class of a model by the name that its configuration gives it."""
    return {str(name): int(i) for i, name in (config.id2label or {}).items()}
