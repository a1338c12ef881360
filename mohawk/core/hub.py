"""Where the model hub cannot be reached: answers from its cache, or an error at once instead of half a minute later."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mohawk.errors import causes

REMEMBERED = 60  # seconds for which the hub counts as it was found


@contextmanager
def hub_or_cache(name: str | Path = "") -> Iterator[None]:
    """Within the block, what the hub is asked for comes from its cache where it cannot be reached.

    name: what is asked for; where it is a local file or folder, nothing happens.

    huggingface_hub asks six times, with pauses and a warning each, before it gives up on a machine without a network;
    its offline mode answers at once, with the same kind of error. It is left as it is where the hub answers, with
    anything: what breaks off later is asked for again as ever.
    """
    from huggingface_hub import constants

    local = bool(name) and Path(name).expanduser().exists()
    if local or constants.HF_HUB_OFFLINE or _reached(int(time.monotonic() // REMEMBERED)):
        yield
        return
    switches = [(constants, "HF_HUB_OFFLINE")]
    if "datasets" in sys.modules:
        switches.append((sys.modules["datasets"].config, "HF_HUB_OFFLINE"))
    before = [getattr(*switch) for switch in switches]
    for module, name in switches:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)


@functools.lru_cache(maxsize=1)
def _reached(minute: int) -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        if not is_unreachable(error):
            raise
        return False
    return True


def is_unreachable(error: BaseException) -> bool:
    """Whether an error, or what caused it, is that the hub cannot be reached."""
    from huggingface_hub import errors

    # requests, httpx and urllib3 each have their own hierarchy; the module's name is what they share
    network = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
    kinds = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError)
    return any(isinstance(e, kinds) or type(e).__module__.split(".")[0] in network for e in causes(error))
