"""Names for users who gave none, or one that is taken. `random` comes in from outside."""

from random import Random
from typing import Final

from engine.model import UserId

NAME_LENGTH_MIN: Final = 3
NAME_LENGTH_MAX: Final = 50
# 5 letters of base 32: the first try is free for the first few thousand of one name, and names stay readable.
_SUFFIX_LENGTH: Final = 5
_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz234567"


def default_username(user_id: UserId) -> str:
    """The name of a user who gave none."""
    return "user_" + user_id.replace("-", "")[:12]


def with_suffix(name: str, random: Random) -> str:
    """Another name like this one, within the limit of length."""
    suffix = "_" + "".join(random.choices(_LETTERS, k=_SUFFIX_LENGTH))
    return name[: NAME_LENGTH_MAX - len(suffix)] + suffix
