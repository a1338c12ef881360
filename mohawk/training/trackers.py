"""Experiment trackers: what `report_to` names."""

from collections.abc import Sequence

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from mohawk.errors import UserError


def trackers(names: Sequence[str]) -> list[TrainerCallback]:
    """transformers' callbacks for experiment trackers, which are given a record's numbers without its nesting."""
    try:
        kinds = get_reporting_integration_callbacks(list(names))
    except ValueError as error:
        raise UserError(f"report_to: {error}") from error

    def flat(kind: type[TrainerCallback]) -> type[TrainerCallback]:
        def on_log(self, args, state, control, logs=None, **kwargs):
            numbers = dict(logs or {})
            for group in ("parts", "measured"):
                numbers.update({f"{group}/{name}": value for name, value in (numbers.pop(group, None) or {}).items()})
            numbers = {name: value for name, value in numbers.items() if isinstance(value, (int, float))}
            return kind.on_log(self, args, state, control, logs=numbers, **kwargs)

        return type(kind.__name__, (kind,), {"on_log": on_log})

    try:
        return [flat(kind)() for kind in kinds]
    except (ImportError, RuntimeError) as error:
        raise UserError(f"report_to: {str(error).splitlines()[0]}") from error
