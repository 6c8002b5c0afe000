"""Who is asking: an id and a name from the headers, or from a signed token.

`AUTH_MODE=header` trusts `X-User-Id` (a placeholder: for development, or behind a proxy that sets it);
`AUTH_MODE=jwt` wants `Authorization: Bearer` with an HS256 token whose `sub` is the user's UUID, and whose
`name`, where it is one, is what a new user is to be called.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

import jwt
import msgspec
import trio

from api import schemas
from api.errors import ApiError, Detail, invalid
from api.promises import Promise
from api.settings import AuthMode, Settings
from engine.ledger import Unavailable
from engine.model import UserId
from persistence.startup import CLOCK_SKEW_MAX_S
from persistence.usernames import NAME_LENGTH_MAX, NAME_LENGTH_MIN

# Names kept in memory, oldest forgotten first: 231 bytes each, so at most 231 MB. Who is forgotten is looked up again.
KNOWN_USERS_MAX = 1_000_000
INTRODUCE_MAX = 1_000  # users looked up or made by one statement
WAITING_USERS_MAX = 20_000  # callers that wait to be looked up; beyond it 503
OTHER_SITES = frozenset(("cross-site", "same-site"))  # as a browser says of a page (Fetch Metadata, Sec-Fetch-Site)


class Caller(msgspec.Struct, frozen=True, gc=False):
    user_id: UserId
    username: str


Introduce = Callable[[Sequence[tuple[UserId, str | None]]], Awaitable[Mapping[UserId, str]]]
"""Looks up users, and makes those that may be made; the names of those that are users now."""


class UserDirectory:
    """Names by id: from memory, else looked up, many strangers by one statement. `run` it in a nursery."""

    def __init__(self, introduce: Introduce) -> None:
        self._introduce = introduce
        self._names: dict[UserId, str] = {}
        self._waiting: deque[_Stranger] = deque()  # in the order in which they came
        self._lot = trio.lowlevel.ParkingLot()

    def known(self, user_id: UserId) -> str | None:
        return self._names.get(user_id)

    def learn(self, user_id: UserId, username: str) -> None:
        while len(self._names) >= KNOWN_USERS_MAX:
            del self._names[next(iter(self._names))]
        self._names[user_id] = username

    def look_up(self, user_id: UserId, wanted_name: str | None) -> Promise[str | None]:
        """The user's name to come; None where there is no such user, and none may be made.

        Raises, where it is awaited:
            Unavailable: the database is out of reach, or too many strangers wait.
        """
        promise: Promise[str | None] = Promise()
        if len(self._waiting) >= WAITING_USERS_MAX:
            promise.fail(Unavailable("too many users wait to be looked up"))
            return promise
        self._waiting.append((user_id, wanted_name, promise))
        self._lot.unpark()
        return promise

    async def run(self) -> None:
        while True:
            while not self._waiting:
                await self._lot.park()
            some = [self._waiting.popleft() for _ in range(min(len(self._waiting), INTRODUCE_MAX))]
            await self._answer(some)

    async def _answer(self, strangers: "list[_Stranger]") -> None:
        try:
            # Many requests of one stranger at once are one introduction; the first one's name counts.
            wanted = {user_id: wanted_name for user_id, wanted_name, _ in reversed(strangers)}
            names = await self._introduce(list(wanted.items()))
        except Exception as failure:  # noqa: BLE001 - whatever it is, it is theirs who asked, and not everybody's end
            for _, _, promise in strangers:
                promise.fail(failure)
            return
        for user_id, username in names.items():
            self.learn(user_id, username)
        for user_id, _, promise in strangers:
            promise.keep(names.get(user_id))


_Stranger = tuple[UserId, str | None, Promise[str | None]]


class Authenticator:
    """Turns headers into a caller, by the settings' `auth_mode`."""

    def __init__(self, settings: Settings, users: UserDirectory) -> None:
        self._settings = settings
        self._users = users
        self._believes_headers = settings.auth_mode is AuthMode.HEADER

    async def caller(self, headers: Mapping[str, str]) -> Caller:
        """Who is asking; `headers` has lower-case names. Awaits promises only.

        Raises:
            ApiError: 401, 403 for a page that may not speak for its visitor, or 422 for a name that is none.
            Unavailable: a stranger, and the database is out of reach.
        """
        if self._believes_headers and "origin" in headers:
            self._check_page(headers)
        if self._believes_headers and "x-user-name" not in headers:
            # As most callers come: one that is known needs no further look at what it says.
            text = UserId(headers.get("x-user-id", ""))
            username = self._users.known(text)
            if username is not None:
                return Caller(text, username)
        user_id, wanted_name = self._claimed(headers)
        username = self._users.known(user_id)
        if username is None:
            username = await self._users.look_up(user_id, wanted_name)
        if username is None:
            raise _auth_required("No such user.")
        return Caller(user_id, username)

    def _check_page(self, headers: Mapping[str, str]) -> None:
        """Refuse another site's page: its browser sends the visitor's cookies along, and by those a proxy may know him.

        What the browser says of the page is asked, not whether `Host` is its origin's: proxies do not pass that on by
        default. It says so on HTTPS and to this machine alone; for the rest `AUTH_HEADER_TRUSTED` tells the operator.
        """
        if headers.get("sec-fetch-site") in OTHER_SITES and not self._settings.allows_origin(headers["origin"]):
            raise ApiError(403, "ORIGIN_NOT_ALLOWED", "Pages of this origin may not act for their visitors.")

    def _claimed(self, headers: Mapping[str, str]) -> tuple[UserId, str | None]:
        if not self._believes_headers:
            return self._from_token(headers.get("authorization"))
        text = headers.get("x-user-id")
        if not text:
            raise _auth_required("Say who you are: X-User-Id is missing.")
        user_id = schemas.uuid_or_none(text)
        if user_id is None:
            raise ApiError(401, "INVALID_X_USER_ID", "X-User-Id must be a UUID.")
        name = headers.get("x-user-name")
        if name is None:
            return UserId(user_id), None
        wanted_name = _name_or_none(_from_latin_1(name))
        if wanted_name is None:
            limits = f"{NAME_LENGTH_MIN} to {NAME_LENGTH_MAX}"
            raise invalid([Detail("X-User-Name", f"must be {limits} characters, without control characters")])
        return UserId(user_id), wanted_name

    def _from_token(self, authorization: str | None) -> tuple[UserId, str | None]:
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise _auth_required("Say who you are: send Authorization: Bearer <token>.")
        settings = self._settings
        try:
            claims = jwt.decode(
                token,
                settings.jwt_secret,
                algorithms=["HS256"],
                audience=settings.jwt_audience,
                issuer=settings.jwt_issuer,
                leeway=CLOCK_SKEW_MAX_S,  # else a clock that is 0.1 s ahead has one fresh token in ten refused
                options={"require": ["exp", "sub"]},
            )
        except (jwt.PyJWTError, RecursionError) as fault:  # the latter: JSON nested without end, in an unsigned header
            # It may quote the token, of which nobody has checked anything yet.
            raise ApiError(401, "INVALID_TOKEN", f"The token is not valid: {schemas.clean(str(fault))}.") from None
        user_id = schemas.uuid_or_none(claims["sub"])
        if user_id is None:
            raise ApiError(401, "INVALID_TOKEN", "The token is not valid: its sub is no UUID.")
        name = claims.get("name")
        # One that is no name here counts as none: its bearer could not change what another has signed.
        return UserId(user_id), _name_or_none(name) if isinstance(name, str) else None


def _from_latin_1(text: str) -> str:
    """Header text comes as Latin-1, and is UTF-8 more often than not."""
    with suppress(UnicodeError):
        return text.encode("latin-1").decode()
    return text


def _name_or_none(text: str) -> str | None:
    """The name that its bearer asked for, if a user may be called so."""
    name = text.strip()
    # Half a surrogate pair is text to JSON, and to nothing else.
    is_text = name.encode(errors="replace").decode() == name and not schemas.CONTROL.search(name)
    return name if is_text and NAME_LENGTH_MIN <= len(name) <= NAME_LENGTH_MAX else None


def _auth_required(message: str) -> ApiError:
    return ApiError(401, "AUTH_REQUIRED", message)
