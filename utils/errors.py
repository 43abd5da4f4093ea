"""Errors as one line of text."""

import contextlib


def one_line(error, most=300):
    """Return an error's text as one line of at most `most` characters; the name of its type where it has no text."""
    return " ".join(str(error).split())[:most] or type(error).__name__


@contextlib.contextmanager
def named(name, kinds=OSError):
    """Context that turns errors of these kinds into a ValueError of one line that begins with `name`."""
    try:
        yield
    except kinds as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"{name}: {reason}") from error
