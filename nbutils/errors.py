"""`InputError`: what is raised when something that the user gave cannot be used."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used. The message names it and says what is allowed."""


def suggest(name: object, allowed: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest allowed one, and all of them."""
    allowed = list(allowed)
    near = [option for option in allowed if name and option.startswith(str(name))]
    near = near or difflib.get_close_matches(str(name), allowed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(allowed)}"
