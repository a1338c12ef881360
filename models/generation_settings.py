"""A checkpoint's generation settings, as transformers agrees to save them."""

import copy
import logging

from transformers import GenerationConfig

log = logging.getLogger(__name__)


def saveable(settings: GenerationConfig) -> GenerationConfig:
    """A copy that transformers agrees to save.

    It loads settings that contradict each other, as many older checkpoints have them (a temperature without do_sample),
    but refuses to save them. A checkpoint with a temperature is meant for sampling; what else is wrong is dropped.
    """
    settings = copy.deepcopy(settings)
    tokens = {name: getattr(settings, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for candidate in (settings, GenerationConfig.from_dict({**settings.to_dict(), "do_sample": True})):
        try:
            candidate.validate(strict=True)
            return candidate
        except ValueError as error:
            log.warning("the teacher's generation settings contradict each other: %s", str(error).splitlines()[0])
    return GenerationConfig(**tokens)
