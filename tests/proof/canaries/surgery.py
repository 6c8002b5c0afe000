"""How a bug is planted: an edit of the product's own source, or of its SQL, in memory.

An edit names what it replaces, to the letter. Where that is not there any more, or there more often than it should be,
nothing is planted, and nothing runs: a canary that has lost its voice must not pass for one that nobody heard.
"""

import inspect
import os
import sys
import textwrap
from collections.abc import Callable, MutableMapping
from typing import Any, Final

from tests.proof.canaries import SONGS

SING: Final = "canary_sings"  # under this name edited source finds `sing`


class Moved(AssertionError):
    """The product is not as the canary expects it: bring the canary up to date."""


def edit(owner: Any, name: str, *changes: tuple[str, str]) -> None:
    """Replace pieces of a function's or a method's source; each must be there once."""
    found = vars(owner).get(name)
    if found is None:
        raise Moved(f"{owner.__name__} has no {name}")
    function = inspect.unwrap(getattr(found, "__func__", found))
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        source = _replaced(source, old, new, 1, f"{owner.__name__}.{name}")
    scope = sys.modules[function.__module__].__dict__
    scope[SING] = sing
    planted: dict[str, Any] = {}
    exec(compile(source, f"<{name}, with a canary>", "exec", dont_inherit=True), scope, planted)
    setattr(owner, name, planted[name])


def reword(texts: MutableMapping[bytes, str], key: bytes, *changes: tuple[str, str, int]) -> None:
    """Replace pieces of a statement's text; each must be there so many times."""
    text = texts[key]
    for old, new, times in changes:
        text = _replaced(text, old, new, times, f"the statement {key.decode()}")
    texts[key] = text


def wrap(owner: Any, name: str, around: Callable[[Any], Any]) -> None:
    """Put a function of ours, made by `around` from the one that is there, in its place."""
    found = vars(owner).get(name)
    if found is None:
        raise Moved(f"{owner.__name__} has no {name}")
    setattr(owner, name, around(found))


def sing() -> None:
    """The bug was met: say so. It survives whatever becomes of this process, and counts over all of them."""
    path = os.environ.get(SONGS)
    if path:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, b".")
        finally:
            os.close(file)


def _replaced(text: str, old: str, new: str, times: int, where: str) -> str:
    count = text.count(old)
    if count != times:
        raise Moved(f"{where} has {old!r} {count} times, not {times}")
    return text.replace(old, new)
