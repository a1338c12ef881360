"""The exception that means: the input was wrong, and here is what to do about it."""


class UserError(ValueError):
    """A mistake in what the user gave. The command line prints its text alone and exits with code 2.

    The text is one clear line: what is wrong, where, what was found, what is allowed, what to do. Several
    mistakes found together are several such lines.
    """


class SaidElsewhere(UserError):
    """A UserError that the first of several processes prints: this one ends without a word."""
