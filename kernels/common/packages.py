"""Packages of GPU kernels that are used where they are installed: whether they can be, found out once."""

import functools
import importlib
import importlib.util
import warnings


@functools.cache
def why_not(module: str) -> str | None:
    """None where `module` can be imported, else the reason in words. Imports it, the first time it is asked.

    A package that is there need not work: its compiled part may be missing, or made for another torch.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # of any kind, from someone else's build; whoever asks is told
        text = " ".join(str(error).split())
        return f"{package} is installed but cannot be imported ({type(error).__name__}: {text})"
    return None


@functools.cache
def usable(module: str) -> bool:
    """Whether `module` can be imported. Warns, once, where its package is installed for nothing."""
    reason = why_not(module)
    if reason is not None and importlib.util.find_spec(module.partition(".")[0]) is not None:
        warnings.warn(f"{reason}; mohawk goes on with torch, which is slower on a GPU", RuntimeWarning, stacklevel=2)
    return reason is None
