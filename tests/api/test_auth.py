"""Who is asking: the directory of users by itself, identity from headers, identity from tokens."""

import base64
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import jwt
import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from api import answers, auth
from api.auth import Authenticator, Caller, UserDirectory
from api.errors import ApiError
from api.promises import in_trio
from api.settings import Settings, load
from engine.ledger import Unavailable
from engine.model import UserId

ANN = UserId("0190a3c4-0000-7000-8000-00000000000a")
BEN = UserId("0190a3c4-0000-7000-8000-00000000000b")
CAT = UserId("0190a3c4-0000-7000-8000-00000000000c")
SECRET = "a secret of sixty-four bytes at least, so that HS512 has nothing to say"


class People:
    """The database's part: who exists, who asked for whom; makes those it may make."""

    def __init__(self, *, may_create: bool = True, **names: str) -> None:
        self.names = {UserId(user_id): name for user_id, name in names.items()}
        self.may_create = may_create
        self.is_down = False
        self.asked: list[list[tuple[UserId, str | None]]] = []
        self.failures: list[Exception] = []  # of the next questions
        self.open = trio.Event()
        self.open.set()

    async def introduce(self, strangers: Sequence[tuple[UserId, str | None]]) -> Mapping[UserId, str]:
        self.asked.append(list(strangers))
        await self.open.wait()
        await trio.lowlevel.checkpoint()
        if self.is_down:
            raise Unavailable("the test took it away")
        if self.failures:
            raise self.failures.pop()
        if self.may_create:
            for user_id, wanted in strangers:
                self.names.setdefault(user_id, wanted or f"user_{user_id[-1]}")
        return {user_id: self.names[user_id] for user_id, _ in strangers if user_id in self.names}


@asynccontextmanager
async def directory_of(people: People) -> AsyncIterator[UserDirectory]:
    users = UserDirectory(people.introduce)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(users.run)
        await wait_all_tasks_blocked()
        yield users
        nursery.cancel_scope.cancel()


async def name_of(users: UserDirectory, user_id: UserId, name: str | None) -> str | None:
    async def handling() -> str | None:
        return await users.look_up(user_id, name)

    return await in_trio(handling())


async def look_up(users: UserDirectory, user_id: UserId, name: str | None, into: list[str | None]) -> None:
    try:
        into.append(await name_of(users, user_id, name))
    except Unavailable:
        into.append("Unavailable")


# The directory ----------------------------------------------------------------------------------------


async def test_question_that_fails_is_the_askers_failure_and_nobody_elses() -> None:
    people = People()
    people.failures.append(ValueError("as no database of ours ever failed"))
    async with directory_of(people) as users:
        with pytest.raises(ValueError, match="as no database"):
            await name_of(users, ANN, None)
        assert await name_of(users, ANN, "ann") == "ann"


async def test_strangers_that_come_together_are_one_question() -> None:
    people, found = People(), list[str | None]()
    async with directory_of(people) as users, trio.open_nursery() as nursery:
        for user_id, name in [(ANN, "ann"), (BEN, None), (CAT, "cat")]:
            nursery.start_soon(look_up, users, user_id, name, found)

    assert sorted(map(str, found)) == ["ann", "cat", "user_b"]
    assert len(people.asked) == 1
    assert sorted(people.asked[0], key=str) == [(ANN, "ann"), (BEN, None), (CAT, "cat")]


async def test_strangers_that_come_during_a_question_are_the_next_one() -> None:
    people, found = People(), list[str | None]()
    people.open = trio.Event()
    async with directory_of(people) as users, trio.open_nursery() as nursery:
        nursery.start_soon(look_up, users, ANN, "ann", found)
        await wait_all_tasks_blocked()
        for user_id in (BEN, CAT):
            nursery.start_soon(look_up, users, user_id, None, found)
        await wait_all_tasks_blocked()
        people.open.set()

    assert [sorted(user_id for user_id, _ in asked) for asked in people.asked] == [[ANN], [BEN, CAT]]


async def test_many_requests_of_one_stranger_are_one_introduction_and_the_first_name_counts() -> None:
    people, found = People(), list[str | None]()
    people.open = trio.Event()
    async with directory_of(people) as users, trio.open_nursery() as nursery:
        nursery.start_soon(look_up, users, CAT, None, found)  # keeps the directory busy
        await wait_all_tasks_blocked()
        for name in ("ann", "anna", None):
            nursery.start_soon(look_up, users, ANN, name, found)
            await wait_all_tasks_blocked()
        people.open.set()

    assert people.asked[1] == [(ANN, "ann")]
    assert found[1:] == ["ann", "ann", "ann"]


async def test_question_has_a_bound_and_the_rest_is_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "INTRODUCE_MAX", 2)
    people, found = People(), list[str | None]()
    async with directory_of(people) as users, trio.open_nursery() as nursery:
        for user_id in (ANN, BEN, CAT):
            nursery.start_soon(look_up, users, user_id, None, found)

    assert [len(asked) for asked in people.asked] == [2, 1]
    assert len(found) == 3


async def test_name_that_was_found_is_known_from_then_on() -> None:
    people = People()
    async with directory_of(people) as users:
        assert users.known(ANN) is None
        assert await name_of(users, ANN, "ann") == "ann"
        assert users.known(ANN) == "ann"


async def test_stranger_whom_nobody_may_make_is_none_and_not_remembered() -> None:
    people = People(may_create=False)
    async with directory_of(people) as users:
        assert await name_of(users, ANN, "ann") is None
        people.names[ANN] = "ann"
        assert await name_of(users, ANN, None) == "ann"


async def test_fault_is_told_to_all_who_waited_and_the_directory_goes_on() -> None:
    people, found = People(), list[str | None]()
    people.is_down = True
    async with directory_of(people) as users:
        async with trio.open_nursery() as nursery:
            for user_id in (ANN, BEN):
                nursery.start_soon(look_up, users, user_id, None, found)
        assert found == ["Unavailable", "Unavailable"]

        people.is_down = False
        assert await name_of(users, ANN, "ann") == "ann"


async def test_more_than_may_wait_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "WAITING_USERS_MAX", 2)
    people, found = People(), list[str | None]()
    people.open = trio.Event()
    async with directory_of(people) as users, trio.open_nursery() as nursery:
        nursery.start_soon(look_up, users, ANN, None, found)  # the one that is being asked for
        await wait_all_tasks_blocked()
        for user_id in (BEN, CAT):
            nursery.start_soon(look_up, users, user_id, None, found)
        await wait_all_tasks_blocked()
        assert found == []
        await look_up(users, ANN, None, found)
        assert found == ["Unavailable"]
        people.open.set()

    assert sorted(map(str, found)) == ["Unavailable", "user_a", "user_b", "user_c"]


async def test_memory_has_a_bound_and_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "KNOWN_USERS_MAX", 2)
    users = UserDirectory(People().introduce)
    for user_id, name in [(ANN, "ann"), (BEN, "ben"), (CAT, "cat")]:
        users.learn(user_id, name)

    assert [users.known(user_id) for user_id in (ANN, BEN, CAT)] == [None, "ben", "cat"]


async def test_caller_that_goes_away_leaves_the_others_in_peace() -> None:
    people, found = People(), list[str | None]()
    people.open = trio.Event()
    async with directory_of(people) as users, trio.open_nursery() as nursery:
        nursery.start_soon(look_up, users, ANN, "ann", found)
        await wait_all_tasks_blocked()
        with trio.CancelScope() as gone:
            gone.cancel()
            await look_up(users, BEN, None, [])
        nursery.start_soon(look_up, users, CAT, None, found)
        await wait_all_tasks_blocked()
        people.open.set()

    assert found == ["ann", "user_c"]


# Headers ----------------------------------------------------------------------------------------------


async def caller(headers: Mapping[str, str], chosen: Settings | None = None, people: People | None = None) -> Caller:
    async with directory_of(people or People()) as users:
        return await in_trio(Authenticator(chosen or load({}, None), users).caller(headers))


async def refusal(headers: Mapping[str, str], chosen: Settings | None = None, people: People | None = None) -> str:
    with pytest.raises((ApiError, BaseExceptionGroup)) as caught:
        await caller(headers, chosen, people)
    failure: BaseException = caught.value
    while isinstance(failure, BaseExceptionGroup):
        (failure,) = failure.exceptions
    assert isinstance(failure, ApiError), failure
    assert failure.status_code == (422 if failure.code == "VALIDATION_ERROR" else 401)
    answers.error(failure, "the id of its request")  # whatever it quotes, it can be told
    return failure.code


async def test_header_names_the_caller_in_any_case() -> None:
    assert await caller({"x-user-id": ANN.upper(), "x-user-name": "ann"}) == Caller(ANN, "ann")
    assert await caller({"x-user-id": ANN}) == Caller(ANN, "user_a")


@pytest.mark.parametrize("headers", [{}, {"x-user-id": ""}, {"x-user-name": "ann"}])
async def test_no_header_is_nobody(headers: dict[str, str]) -> None:
    assert await refusal(headers) == "AUTH_REQUIRED"


async def test_header_that_is_no_uuid_is_said_so() -> None:
    assert await refusal({"x-user-id": "ann"}) == "INVALID_X_USER_ID"


async def test_stranger_whom_nobody_may_make_is_nobody() -> None:
    assert await refusal({"x-user-id": ANN}, people=People(may_create=False)) == "AUTH_REQUIRED"


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        ("ann", "ann"),
        ("  ann  ", "ann"),
        ("Zoë".encode().decode("latin-1"), "Zoë"),
        ("Zo\xeb", "Zoë"),
        ("渋谷太郎".encode().decode("latin-1"), "渋谷太郎"),
        ("x" * 50, "x" * 50),
        (("ë" * 50).encode().decode("latin-1"), "ë" * 50),
    ],
)
async def test_name_in_a_header_is_utf_8_or_else_latin_1(sent: str, name: str) -> None:
    assert await caller({"x-user-id": ANN, "x-user-name": sent}) == Caller(ANN, name)


@pytest.mark.parametrize("name", ["", "an", " an ", "x" * 51, "a\x00nn", "a\x1fnn", "ann\x7f"])
async def test_name_that_is_none_is_422(name: str) -> None:
    people = People()

    assert await refusal({"x-user-id": ANN, "x-user-name": name}, people=people) == "VALIDATION_ERROR"
    assert people.asked == []


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["x-user-id", "x-user-name"]), st.text(st.characters(max_codepoint=0xFF))))
async def test_any_headers_are_a_caller_or_an_api_error(headers: dict[str, str]) -> None:
    people = People()
    async with directory_of(people) as users:
        try:
            await in_trio(Authenticator(load({}, None), users).caller(headers))
        except ApiError as failure:
            status_code = failure.status_code
        else:
            status_code = 200
    assert status_code in (200, 401, 422)


# Tokens -----------------------------------------------------------------------------------------------


def by_token(**more: str) -> Settings:
    return load({"AUTH_MODE": "jwt", "JWT_SECRET": SECRET, **more}, None)


def token(key: str = SECRET, algorithm: str = "HS256", **claims: object) -> dict[str, str]:
    whole = {"sub": ANN, "exp": time.time() + 60, **claims}
    made = jwt.encode({name: value for name, value in whole.items() if value is not None}, key, algorithm)
    return {"authorization": f"Bearer {made}"}


async def test_token_names_the_caller() -> None:
    assert await caller(token(name="ann"), by_token()) == Caller(ANN, "ann")
    assert await caller(token(sub=ANN.upper()), by_token()) == Caller(ANN, "user_a")


async def test_token_of_a_clock_that_is_a_little_off_is_good() -> None:
    # PyJWT drops fractions of seconds: of an end at 10.9 it knows 10.
    now = time.time()
    for headers in (token(exp=now), token(iat=now + 2), token(nbf=now + 2)):
        assert await caller(headers, by_token()), headers


async def test_scheme_of_the_header_is_of_either_case() -> None:
    headers = token(name="ann")
    assert await caller({"authorization": headers["authorization"].replace("Bearer", "bEARER")}, by_token())


@pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer ", "Basic YW5uOmFubg==", "Bearer\tx"])
async def test_without_a_token_there_is_nobody(value: str | None) -> None:
    headers = {"x-user-id": str(ANN)} if value is None else {"x-user-id": str(ANN), "authorization": value}

    assert await refusal(headers, by_token()) == "AUTH_REQUIRED"


@pytest.mark.parametrize(
    ("what", "headers"),
    [
        ("over", token(exp=time.time() - 60)),
        ("not yet", token(nbf=time.time() + 60)),
        ("made in the future", token(iat=time.time() + 60)),
        ("without an end", token(exp=None)),
        ("its end is no number", token(exp="tomorrow")),
        ("without a sub", token(sub=None)),
        ("sub is no UUID", token(sub="ann")),
        ("sub is empty", token(sub="")),
        ("another key", token(key="another secret of thirty-two bytes or more")),
        ("unsigned", token(key="", algorithm="none")),
        ("another algorithm", token(algorithm="HS512")),
        ("no token", {"authorization": "Bearer ann"}),
        ("three dots", {"authorization": "Bearer ..."}),
        ("empty parts", {"authorization": "Bearer .."}),
        ("not ASCII", {"authorization": "Bearer \xe4.\xf6.\xfc"}),
    ],
)
async def test_token_that_is_none_is_401(what: str, headers: dict[str, str]) -> None:
    assert await refusal(headers, by_token()) == "INVALID_TOKEN", what


async def test_token_that_was_changed_is_401() -> None:
    head, _, signature = token(name="ann")["authorization"].removeprefix("Bearer ").split(".")
    other = jwt.encode({"sub": BEN, "exp": time.time() + 60}, "x" * 32).split(".")[1]

    assert await refusal({"authorization": f"Bearer {head}.{other}.{signature}"}, by_token()) == "INVALID_TOKEN"


async def test_token_whose_head_is_nested_without_end_is_401() -> None:
    deep = base64.urlsafe_b64encode(b"[" * 9_000).rstrip(b"=").decode()

    assert await refusal({"authorization": f"Bearer {deep}.e30.x"}, by_token()) == "INVALID_TOKEN"


async def test_token_whose_head_quotes_what_no_json_can_hold_is_401_and_can_be_told() -> None:
    head = base64.urlsafe_b64encode(rb'{"alg":"HS256","crit":["\ud800"]}').rstrip(b"=").decode()
    assert await refusal({"authorization": f"Bearer {head}.e30."}, by_token()) == "INVALID_TOKEN"


async def test_token_whose_head_names_no_algorithm_at_all_is_401() -> None:
    payload = base64.urlsafe_b64encode(json.dumps({"sub": ANN, "exp": 9e9}).encode()).rstrip(b"=").decode()
    for head in (b"{}", b'{"alg":null}', b'{"alg":["HS256"]}', b'{"alg":7}', b"null", b"[]"):
        part = base64.urlsafe_b64encode(head).rstrip(b"=").decode()
        assert await refusal({"authorization": f"Bearer {part}.{payload}."}, by_token()) == "INVALID_TOKEN", head


async def test_issuer_is_checked_where_one_is_set() -> None:
    ours = by_token(JWT_ISSUER="https://id.example")

    assert await caller(token(iss="https://id.example"), ours)
    assert await refusal(token(iss="https://evil.example"), ours) == "INVALID_TOKEN"
    assert await refusal(token(), ours) == "INVALID_TOKEN"
    assert await caller(token(iss="https://evil.example"), by_token())


async def test_audience_is_checked_where_one_is_set() -> None:
    ours = by_token(JWT_AUDIENCE="holdfast")

    assert await caller(token(aud="holdfast"), ours)
    assert await caller(token(aud=["shop", "holdfast"]), ours)
    assert await refusal(token(aud="shop"), ours) == "INVALID_TOKEN"
    assert await refusal(token(), ours) == "INVALID_TOKEN"


async def test_token_that_names_an_audience_is_refused_where_we_have_no_name() -> None:
    # RFC 7519, 4.1.3: who does not find itself in `aud` must not take the token.
    assert await refusal(token(aud="shop"), by_token()) == "INVALID_TOKEN"


@pytest.mark.parametrize("name", ["", "an", " an ", "x" * 51, "a\x00nn", "\ud800ann", "ann\udfff"])
async def test_name_in_a_token_that_cannot_be_used_is_no_name(name: str) -> None:
    people = People()

    assert await caller(token(name=name), by_token(), people) == Caller(ANN, "user_a")
    assert people.asked == [[(ANN, None)]]


async def test_name_in_a_token_that_cannot_be_used_keeps_no_known_user_out() -> None:
    async with directory_of(People()) as users:
        users.learn(ANN, "ann")
        assert await in_trio(Authenticator(by_token(), users).caller(token(name="an"))) == Caller(ANN, "ann")


async def test_name_in_a_token_is_text_already() -> None:
    # "ZoÃ«" is what "Zoë" looks like to those who take UTF-8 for Latin-1; in a token it is a name.
    assert await caller(token(name="ZoÃ«"), by_token()) == Caller(ANN, "ZoÃ«")


@pytest.mark.parametrize("name", [None, 7, ["ann"], {}])
async def test_name_in_a_token_that_is_no_text_is_no_name(name: object) -> None:
    assert await caller(token(name=name), by_token()) == Caller(ANN, "user_a")


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=0xFF), max_size=200))
@example("Bearer " + "." * 5_000)
async def test_any_authorization_is_401(value: str) -> None:
    assert await refusal({"authorization": value}, by_token()) in ("AUTH_REQUIRED", "INVALID_TOKEN")


async def test_refusal_says_nothing_of_the_secret() -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        await caller(token(key="another secret of thirty-two bytes or more"), by_token())
    assert SECRET not in repr(caught.value.exceptions)
