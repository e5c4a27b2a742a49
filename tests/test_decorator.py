"""`retry` around a send call of any library: what it calls again, what it lets through, and what it never does."""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
import smtplib
import socket
import ssl
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import aiosmtplib
import fastapi_mail
import pytest
import tenacity
import virtual
from support import ANN, APP, BOB, BODY, GREYLISTED, LOG_IN, PASSWORD, USER, letter, once, patient, virtually

import smtpretry
from smtpretry import Action, RetryingSMTP, RetryPolicy, Rule
from smtpretry.testing import ScriptedServer, ThreadedServer, no_wait

if TYPE_CHECKING:
    from collections.abc import Callable


class WrapperError(Exception):
    """What a library such as fastapi-mail makes of an SMTP error."""


def failing(*errors: BaseException | Callable[[], BaseException]) -> tuple[Any, list[float]]:
    """Return a coroutine function that raises these, one a call, and then returns "sent"; and when it was called."""
    left, calls = list(errors), list[float]()

    async def send() -> str:
        calls.append(virtual.clock() - virtual.EPOCH)
        if left:
            error = left.pop(0)
            raise error() if callable(error) else error
        return "sent"

    return send, calls


def caused(error: BaseException) -> WrapperError:
    """A wrapped error, as `raise ... from` makes it."""
    wrapper = WrapperError("could not send")
    wrapper.__cause__ = error
    return wrapper


def contextual(error: BaseException) -> WrapperError:
    """A wrapped error, as a `raise` within an `except` makes it."""
    wrapper = WrapperError("could not send")
    wrapper.__context__ = error
    return wrapper


def suppressed(error: BaseException) -> WrapperError:
    """A wrapped error, as `raise ... from None` makes it: for people's eyes only."""
    wrapper = contextual(error)
    wrapper.__suppress_context__ = True
    return wrapper


def refused(code: int, text: str = "no") -> aiosmtplib.SMTPRecipientsRefused:
    """What aiosmtplib raises where every recipient was refused."""
    return aiosmtplib.SMTPRecipientsRefused([aiosmtplib.SMTPRecipientRefused(code, text, ANN)])


TRANSIENT = {
    "aiosmtplib recipients": lambda: refused(450),
    "aiosmtplib recipient": lambda: aiosmtplib.SMTPRecipientRefused(450, "no", ANN),
    "aiosmtplib sender": lambda: aiosmtplib.SMTPSenderRefused(451, "no", APP),
    "aiosmtplib data": lambda: aiosmtplib.SMTPDataError(451, "no"),
    "aiosmtplib connect": lambda: aiosmtplib.SMTPConnectResponseError(421, "busy"),
    "aiosmtplib connect refused": lambda: aiosmtplib.SMTPConnectError("Error connecting"),
    "aiosmtplib connect time-out": lambda: aiosmtplib.SMTPConnectTimeoutError("Timed out"),
    "aiosmtplib helo": lambda: aiosmtplib.SMTPHeloError(421, "busy"),
    "aiosmtplib auth": lambda: aiosmtplib.SMTPAuthenticationError(454, "not now"),
    "aiosmtplib response": lambda: aiosmtplib.SMTPResponseException(450, "no"),
    "aiosmtplib relay denied for now": lambda: refused(454, "4.7.1 Relay access denied"),
    "aiosmtplib malformed": lambda: aiosmtplib.SMTPResponseException(-1, "Malformed SMTP response"),
    "aiosmtplib drop": lambda: aiosmtplib.SMTPServerDisconnected("Connection lost"),
    "aiosmtplib time-out": lambda: aiosmtplib.SMTPReadTimeoutError("Timed out"),
    "smtplib recipients": lambda: smtplib.SMTPRecipientsRefused({ANN: (450, b"no")}),
    "smtplib sender": lambda: smtplib.SMTPSenderRefused(451, b"no", APP),
    "smtplib data": lambda: smtplib.SMTPDataError(451, b"no"),
    "smtplib connect": lambda: smtplib.SMTPConnectError(421, b"busy"),
    "smtplib helo": lambda: smtplib.SMTPHeloError(421, b"busy"),
    "smtplib auth": lambda: smtplib.SMTPAuthenticationError(454, b"not now"),
    "smtplib drop": lambda: smtplib.SMTPServerDisconnected("Connection unexpectedly closed"),
}
FINAL = {
    "aiosmtplib recipients": lambda: refused(550),
    "aiosmtplib sender": lambda: aiosmtplib.SMTPSenderRefused(550, "no", APP),
    "aiosmtplib data": lambda: aiosmtplib.SMTPDataError(554, "no"),
    "aiosmtplib connect": lambda: aiosmtplib.SMTPConnectResponseError(554, "no"),
    "aiosmtplib auth": lambda: aiosmtplib.SMTPAuthenticationError(535, "wrong"),
    "aiosmtplib log-in required": lambda: aiosmtplib.SMTPSenderRefused(530, "5.7.0 Authentication required", APP),
    "aiosmtplib TLS required": lambda: aiosmtplib.SMTPSenderRefused(
        530, "5.7.0 Must issue a STARTTLS command first", APP
    ),
    "aiosmtplib relay denied": lambda: refused(554, "5.7.1 Relay access denied"),
    "aiosmtplib not supported": lambda: aiosmtplib.SMTPNotSupported("SMTPUTF8"),
    "smtplib recipients": lambda: smtplib.SMTPRecipientsRefused({ANN: (550, b"no")}),
    "smtplib data": lambda: smtplib.SMTPDataError(554, b"no"),
    "smtplib auth": lambda: smtplib.SMTPAuthenticationError(535, b"wrong"),
    "smtplib not supported": lambda: smtplib.SMTPNotSupportedError("SMTPUTF8"),
    "unrelated": lambda: KeyError("template"),
    "unrelated ValueError": lambda: ValueError("no recipients"),
    "own time-out": lambda: TimeoutError("the caller's own deadline"),
    "own connection": lambda: ConnectionRefusedError("the database is down"),
}
WRAPS: list[Any] = [lambda error: error, caused, contextual, suppressed, lambda error: caused(contextual(error))]
WRAP_NAMES = ["bare", "from", "within", "from None", "twice"]


@pytest.mark.parametrize("wrap", WRAPS, ids=WRAP_NAMES)
@pytest.mark.parametrize("name", TRANSIENT)
@virtually
async def test_calls_again_where_the_server_says_not_now(name: str, wrap: Any) -> None:
    """A transient error of aiosmtplib or smtplib, itself or wrapped, is followed by a wait and another call."""
    send, calls = failing(wrap(TRANSIENT[name]()))
    assert await smtpretry.retry(policy=patient(wait=tenacity.wait_fixed(60)))(send)() == "sent"
    assert len(calls) == 2
    assert calls[1] >= 60


@pytest.mark.parametrize("wrap", WRAPS, ids=WRAP_NAMES)
@pytest.mark.parametrize("name", FINAL)
@virtually
async def test_lets_through_what_another_call_does_not_change(name: str, wrap: Any) -> None:
    """A final error, and one that is no SMTP error at all, comes out at once, as it is: it can RETRY and FAIL only."""
    error = wrap(FINAL[name]())
    send, calls = failing(error)
    with pytest.raises(type(error)) as caught:
        await smtpretry.retry(policy=patient())(send)()
    assert caught.value is error
    assert len(calls) == 1


@pytest.mark.parametrize("action", [action for action in Action if action not in (Action.RETRY, Action.RECONNECT)])
@pytest.mark.parametrize("code", [450, 550])
@virtually
async def test_an_own_rule_makes_it_neither_log_in_nor_split(code: int, action: Action) -> None:
    """A row that asks for a repair falls to RETRY for a 4xx and to FAIL for a 5xx."""
    send, calls = failing(aiosmtplib.SMTPSenderRefused(code, "no", APP))
    wrapped = smtpretry.retry(policy=patient(rules=(Rule(action=action),)))(send)
    if code == 450 and action is not Action.FAIL:
        assert await wrapped() == "sent"
        assert len(calls) == 2
    else:
        with pytest.raises(aiosmtplib.SMTPSenderRefused):
            await wrapped()
        assert len(calls) == 1


@virtually
async def test_works_without_arguments() -> None:
    """`@smtpretry.retry` alone uses the default policy, and keeps name, documentation, arguments and value."""
    calls = list[tuple[Any, ...]]()

    @smtpretry.retry
    async def send(*args: int, **kwargs: int) -> dict[str, int]:
        """Send it."""
        calls.append((args, kwargs))
        return {"sent": 1}

    assert await send(1, 2, three=3) == {"sent": 1}
    assert calls == [((1, 2), {"three": 3})]
    assert (send.__name__, send.__doc__) == ("send", "Send it.")
    assert asyncio.iscoroutinefunction(send)


def test_works_with_empty_parentheses() -> None:
    """`@smtpretry.retry()` is the same as `@smtpretry.retry`."""

    @smtpretry.retry()
    async def send() -> int:
        return 1

    assert asyncio.run(send()) == 1


def generator() -> Any:
    yield 1


async def asynchronous_generator() -> Any:
    yield 1


@pytest.mark.parametrize("wrong", [5, "send", smtplib.SMTP, generator, asynchronous_generator])
def test_refuses_what_is_no_function(wrong: Any) -> None:
    """Around a class, a generator or what cannot be called it is a TypeError at once."""
    with pytest.raises(TypeError, match="async def"):
        smtpretry.retry(wrong)


@pytest.mark.parametrize("wrong", [5, "patient", tenacity.wait_fixed(5)])
def test_refuses_what_is_no_policy(wrong: Any) -> None:
    """A policy that is none is a TypeError at once, not at the first failure."""

    async def send() -> None:
        pass

    with pytest.raises(TypeError, match="RetryPolicy"):
        smtpretry.retry(policy=wrong)(send)


@virtually
async def test_methods_can_be_wrapped() -> None:
    """In a class it wraps methods, each call with a count of its own."""

    class Mailer:
        def __init__(self) -> None:
            self.calls = 0

        @smtpretry.retry(policy=patient(max_attempts=3))
        async def send(self) -> int:
            self.calls += 1
            if self.calls % 3:
                raise refused(450)
            return self.calls

    mailer = Mailer()
    assert [await mailer.send(), await mailer.send()] == [3, 6]


@virtually
async def test_waits_what_the_policy_and_the_server_say() -> None:
    """The waits are the policy's, or the delay that the server names."""
    send, calls = failing(refused(450), refused(450, "Greylisted for 300 seconds"), refused(450))
    await smtpretry.retry(policy=patient(wait=tenacity.wait_incrementing(10, 10)))(send)()
    assert [later - earlier for earlier, later in itertools.pairwise(calls)] == [
        pytest.approx(wait, abs=0.1) for wait in (10, 300, 30)
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_attempts": 3}, 3),
        ({"stop": tenacity.stop_after_attempt(4)}, 4),
        ({"give_up_after": timedelta(seconds=150)}, 4),
        ({"max_attempts": 1}, 1),
    ],
)
@virtually
async def test_gives_up_as_the_policy_says(settings: dict[str, Any], expected: int) -> None:
    """After the last call the caller gets its error, with a note that tells how often and how long it was tried."""
    send, calls = failing(*[refused(450) for _ in range(50)])
    with pytest.raises(aiosmtplib.SMTPRecipientsRefused) as caught:
        await smtpretry.retry(policy=patient(wait=tenacity.wait_fixed(60), **settings))(send)()
    assert len(calls) == expected
    notes = getattr(caught.value, "__notes__", [])
    assert (f"{expected} attempts" in "".join(notes)) == (expected > 1)


@virtually
async def test_a_named_delay_beyond_the_deadline_ends_it_at_once() -> None:
    """Where the server wants to be left alone for longer than the policy's patience, there is no second call."""
    send, calls = failing(refused(450, "Greylisted for 3000 seconds"))
    with pytest.raises(aiosmtplib.SMTPRecipientsRefused):
        await smtpretry.retry(policy=patient(give_up_after=timedelta(minutes=10)))(send)()
    assert calls == [0]


@virtually
async def test_one_transient_refusal_among_several_is_worth_another_call() -> None:
    """Where all were refused, some for ever and some for now, it is called again."""
    both = aiosmtplib.SMTPRecipientsRefused(
        [aiosmtplib.SMTPRecipientRefused(550, "who?", ANN), aiosmtplib.SMTPRecipientRefused(450, "later", BOB)]
    )
    send, calls = failing(both)
    assert await smtpretry.retry(policy=patient())(send)() == "sent"
    assert len(calls) == 2


@pytest.mark.parametrize(
    "error",
    [
        aiosmtplib.SMTPServerDisconnected("Unexpected EOF received"),
        aiosmtplib.SMTPReadTimeoutError("Timed out"),
        smtplib.SMTPServerDisconnected("Connection unexpectedly closed"),
    ],
    ids=repr,
)
@virtually
async def test_at_most_once_where_the_policy_says_so(error: Exception) -> None:
    """A lost connection does not tell its stage: with on_uncertain="raise" it is not called again, by default it is."""
    send, calls = failing(error)
    with pytest.raises(type(error)):
        await smtpretry.retry(policy=patient(on_uncertain="raise"))(send)()
    assert len(calls) == 1
    send, calls = failing(error)
    assert await smtpretry.retry(policy=patient())(send)() == "sent"


@pytest.mark.parametrize(
    "error",
    [
        aiosmtplib.SMTPConnectError("refused"),
        aiosmtplib.SMTPConnectTimeoutError("Timed out"),
        aiosmtplib.SMTPConnectResponseError(421, "busy"),
        aiosmtplib.SMTPDataError(451, "later"),
    ],
    ids=repr,
)
@virtually
async def test_what_cannot_have_been_taken_is_called_again_all_the_same(error: Exception) -> None:
    """With on_uncertain="raise", a failure to connect and a refusal with a reply are followed by another call."""
    send, _ = failing(error)
    assert await smtpretry.retry(policy=patient(on_uncertain="raise"))(send)() == "sent"


@virtually
async def test_does_not_repeat_what_was_retried_inside() -> None:
    """Around RetryingSMTP, whose errors carry a delivery, it adds no second round of attempts."""
    async with ScriptedServer() as server:
        server.on("RCPT", GREYLISTED)

        @smtpretry.retry(policy=patient())
        async def send() -> None:
            async with RetryingSMTP(server.client(), once()) as smtp:
                await smtp.sendmail(APP, [ANN], BODY)

        with pytest.raises(aiosmtplib.SMTPRecipientsRefused):
            await send()
        assert server.connections == 1


@virtually
async def test_cancelling_ends_it() -> None:
    """Cancelled in the wait or in the call, it ends at once."""
    send, calls = failing(*[refused(450) for _ in range(50)])
    task = asyncio.create_task(smtpretry.retry(policy=patient())(send)())
    await asyncio.sleep(5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(calls) == 1


@virtually
async def test_many_calls_at_once_count_each_for_itself() -> None:
    """Calls of one wrapped function at the same time do not share their counts."""

    @smtpretry.retry(policy=patient(max_attempts=3))
    async def send(left: list[int]) -> str:
        if left:
            raise aiosmtplib.SMTPSenderRefused(left.pop(), "no", APP)
        return "sent"

    assert await asyncio.gather(*[send([450] * (number % 3)) for number in range(30)]) == ["sent"] * 30


# Over real sockets


@virtually
async def test_around_aiosmtplib_send() -> None:
    """aiosmtplib.send, wrapped, gets through a greylisting server and returns what it returns."""
    async with ScriptedServer() as server:
        server.on("RCPT", GREYLISTED, times=2)
        where: dict[str, Any] = {"hostname": server.hostname, "port": server.port, "local_hostname": "client.example"}
        send = smtpretry.retry(policy=patient())(aiosmtplib.send)
        assert await send(letter(), **where) == ({}, "2.0.0 Ok: queued as 1")
        assert server.connections == 3


@virtually
async def test_around_aiosmtplib_cannot_log_in() -> None:
    """530 inside a wrapped call is final: the decorator has no credentials and does not wait for them."""
    async with ScriptedServer(auth=(USER, PASSWORD)) as server:
        where: dict[str, Any] = {"hostname": server.hostname, "port": server.port, "local_hostname": "client.example"}
        with pytest.raises(aiosmtplib.SMTPSenderRefused, match=LOG_IN[4:]):
            await smtpretry.retry(policy=patient())(aiosmtplib.send)(letter(), **where)
        assert server.connections == 1


def test_around_smtplib_in_a_thread() -> None:
    """Smtplib in a thread, wrapped in an async function, gets through too."""

    async def scenario() -> None:
        policy = no_wait()
        async with ScriptedServer() as server:
            server.on("RCPT", "450 4.2.0 Greylisted for 30 seconds", times=1)
            server.on("MAIL", "451 4.3.0 later", times=1)

            def blocking() -> None:
                with smtplib.SMTP(server.hostname, server.port, local_hostname="client.example") as smtp:
                    smtp.sendmail(APP, [ANN], BODY)

            @smtpretry.retry(policy=policy)
            async def send() -> None:
                await asyncio.to_thread(blocking)

            await send()
            assert len(server.messages) == 1
            assert policy.waits == [pytest.approx(63, abs=3.1), 30]

    asyncio.run(scenario())


def test_around_fastapi_mail() -> None:
    """fastapi-mail's send_message, whose errors wrap aiosmtplib's, is called again after a 421 banner."""

    async def scenario() -> None:
        policy = no_wait()
        async with ScriptedServer(auth=(USER, PASSWORD), auth_required=False) as server:
            server.on("CONNECT", "421 4.3.2 busy, try again in 40 seconds", times=1)
            server.on("RCPT", "450 4.2.0 Greylisted for 30 seconds", times=1)
            mailer = fastapi_mail.FastMail(
                fastapi_mail.ConnectionConfig(
                    MAIL_USERNAME=USER,
                    MAIL_PASSWORD=PASSWORD,
                    MAIL_FROM=APP,
                    MAIL_PORT=server.port,
                    MAIL_SERVER=server.hostname,
                    MAIL_STARTTLS=False,
                    MAIL_SSL_TLS=False,
                    USE_CREDENTIALS=False,
                )
            )
            message = fastapi_mail.MessageSchema(
                subject="hello", recipients=[ANN], body="How are you?", subtype=fastapi_mail.MessageType.plain
            )
            await smtpretry.retry(policy=policy)(mailer.send_message)(message)
            assert len(server.received(ANN)) == 1
            assert policy.waits == [40, 30]

    asyncio.run(scenario())


@virtually
async def test_a_certificate_that_does_not_verify_is_final() -> None:
    """An ssl.SSLCertVerificationError, wrapped by aiosmtplib or bare, is not worth another call."""
    for bare in (True, False):
        broken = ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate")
        error: Exception = broken
        if not bare:
            error = aiosmtplib.SMTPConnectError(f"Error connecting: {broken}")
            error.__cause__ = broken
        send, calls = failing(error)
        with pytest.raises(type(error)):
            await smtpretry.retry(policy=patient())(send)()
        assert len(calls) == 1


# Plain functions


def failing_plainly(*errors: BaseException) -> tuple[Any, list[int]]:
    """Return a function that raises these, one a call, and then returns "sent"; and its calls."""
    left, calls = list(errors), list[int]()

    def send() -> str:
        calls.append(1)
        if left:
            raise left.pop(0)
        return "sent"

    return send, calls


@pytest.mark.parametrize("wrap", WRAPS, ids=WRAP_NAMES)
@pytest.mark.parametrize("name", TRANSIENT)
def test_a_plain_function_is_called_again(name: str, wrap: Any) -> None:
    """Around a plain function it waits, and calls it again, where it would around a coroutine function."""
    send, calls = failing_plainly(wrap(TRANSIENT[name]()))
    policy = no_wait(RetryPolicy(wait=tenacity.wait_fixed(60)))
    assert smtpretry.retry(policy=policy)(send)() == "sent"
    assert (len(calls), policy.waits) == (2, [60.0])


@pytest.mark.parametrize("name", FINAL)
def test_a_plain_function_is_not_called_again_in_vain(name: str) -> None:
    """A final error comes out of a plain function at once, as it is."""
    error = FINAL[name]()
    send, calls = failing_plainly(error)
    with pytest.raises(type(error)) as caught:
        smtpretry.retry(policy=no_wait())(send)()
    assert caught.value is error
    assert len(calls) == 1


def test_a_plain_function_gives_up_as_the_policy_says() -> None:
    """After the last call the error has a note that tells how often it was tried."""
    send, calls = failing_plainly(*[refused(450) for _ in range(9)])
    with pytest.raises(aiosmtplib.SMTPRecipientsRefused) as caught:
        smtpretry.retry(policy=no_wait(RetryPolicy(max_attempts=3)))(send)()
    assert len(calls) == 3
    assert "3 attempts" in str(caught.value.__notes__)


def test_a_plain_function_waits_with_time_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a way of its own to wait the policy waits with time.sleep; name, arguments and value are kept."""
    waits = list[float]()
    monkeypatch.setattr("time.sleep", waits.append)
    errors = [smtplib.SMTPDataError(451, b"4.3.0 try again in 300 seconds")]

    @smtpretry.retry
    def send(who: str, *, again: bool = False) -> tuple[str, bool]:
        if errors:
            raise errors.pop()
        return who, again

    assert send(BOB, again=True) == (BOB, True)
    assert (send.__name__, waits) == ("send", [300.0])


def test_who_waits_for_long_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A script that would hang for an hour tells why, and so does a Ctrl-C in the midst of it."""

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    @smtpretry.retry
    def send_order() -> None:
        raise smtplib.SMTPDataError(450, b"4.2.0 Greylisted for 300 seconds")

    monkeypatch.setattr("time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt) as stopped:
        send_order()
    assert stopped.value.__notes__ == [
        "smtpretry: 1 attempt, and another one would have come; last: END_OF_DATA: 450 4.2.0 Greylisted for 300 seconds"
    ]
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert re.fullmatch(
        r"smtp call of .*send_order waits 300 s, until .*: END_OF_DATA: 450 4.2.0 Greylisted for 300 seconds",
        record.message,
    )


def test_a_plain_function_that_returns_a_coroutine_is_a_mistake() -> None:
    """A lambda around a coroutine function cannot be retried: it says so instead of retrying nothing."""

    async def send() -> None:
        pass

    with pytest.raises(TypeError, match="async def"):
        smtpretry.retry(lambda: send())()  # noqa: PLW0108


@virtually
async def test_a_connection_that_was_made_outside_is_named() -> None:
    """Where each call finds a connection lost that the function does not make, the error says what to do."""
    async with ScriptedServer() as server:
        server.fail_at("MAIL", "fin", times=1)
        client = server.client()
        await client.connect()
        with pytest.raises(aiosmtplib.SMTPServerDisconnected) as caught:
            await smtpretry.retry(policy=patient())(client.send_message)(letter(ANN))
        assert "connect within the function" in caught.value.__notes__[0]


@virtually
async def test_a_plain_function_that_returns_a_task_is_a_mistake() -> None:
    """What goes on after the function has returned cannot be retried: it says so, and nothing is sent behind it."""
    send, calls = failing()
    with pytest.raises(TypeError, match="async def"):
        smtpretry.retry(lambda: asyncio.ensure_future(send()))()
    await asyncio.sleep(1)
    assert calls == []


@virtually
async def test_a_static_or_class_method_may_be_below_it() -> None:
    """It may stand above @staticmethod and @classmethod as well as below."""
    errors = [refused(450), refused(450)]

    class Mailer:
        @smtpretry.retry(policy=patient())
        @staticmethod
        async def send(value: int) -> int:
            if errors:
                raise errors.pop()
            return value

        @smtpretry.retry(policy=patient())
        @classmethod
        async def name(cls) -> str:
            return cls.__name__

    assert await Mailer().send(5) == await Mailer.send(5) == 5
    assert await Mailer.name() == "Mailer"


@virtually
async def test_a_plain_function_waits_within_a_running_loop() -> None:
    """Where an asynchronous test calls a plain function, no_wait() waits for it as ever."""
    errors, policy = [smtplib.SMTPDataError(451, b"later")], no_wait()

    @smtpretry.retry(policy=policy)
    def send() -> str:
        if errors:
            raise errors.pop()
        return "sent"

    assert send() == "sent"
    assert len(policy.waits) == 1


@pytest.mark.parametrize("within", [False, True])
def test_a_plain_function_waits_by_a_future(*, within: bool) -> None:
    """`RetryPolicy.sleep` is called in the loop in which it is awaited."""

    def sleep(_: float) -> asyncio.Future[None]:
        return asyncio.ensure_future(asyncio.sleep(0))

    errors: list[Exception] = [
        aiosmtplib.SMTPServerDisconnected("gone"),
        aiosmtplib.SMTPResponseException(451, "later"),
    ]

    @smtpretry.retry(policy=RetryPolicy(sleep=sleep))
    def send() -> str:
        if errors:
            raise errors.pop()
        return "sent"

    async def scenario() -> str:
        return send()

    assert (asyncio.run(scenario()) if within else send()) == "sent"


@pytest.mark.parametrize(
    "error", [smtplib.SMTPRecipientsRefused("boom"), smtplib.SMTPSenderRefused(451, None, APP)], ids=repr
)
def test_an_error_that_somebody_has_put_together_comes_out(error: Exception) -> None:
    """What is no answer of a server, such as a test's side effect, comes out as it is."""

    @smtpretry.retry(policy=no_wait())
    def send() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        send()
    assert caught.value is error


@virtually
async def test_an_object_whose_call_is_asynchronous_is_awaited() -> None:
    """What has an async __call__, and a partial of a coroutine function, is retried as a coroutine function is."""
    errors = [refused(450), refused(450)]

    class Sender:
        async def __call__(self, value: int) -> int:
            if errors:
                raise errors.pop()
            return value

    assert await smtpretry.retry(policy=patient())(Sender())(5) == 5
    errors.append(refused(450))
    assert await smtpretry.retry(policy=patient())(functools.partial(Sender().__call__, 6))() == 6


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def hang(*_: object, **__: object) -> None:
    raise TimeoutError


@pytest.mark.parametrize("trouble", ["refused", "unresolved", "timed out", "wrapped"])
def test_what_smtplib_meets_in_connecting_is_tried_again(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection, an unresolved name and a time-out in smtplib's connect are followed by another call."""
    calls = 0
    if trouble == "timed out":
        monkeypatch.setattr("socket.create_connection", hang)

    @smtpretry.retry(policy=no_wait(RetryPolicy(max_attempts=3)))
    def send() -> None:
        nonlocal calls
        calls += 1
        try:
            smtplib.SMTP("no-such-host.invalid" if trouble == "unresolved" else "127.0.0.1", unused_port())
        except OSError as error:
            if trouble == "wrapped":
                raise WrapperError from error
            raise

    with pytest.raises((OSError, WrapperError)):
        send()
    assert calls == 3


def test_what_others_meet_is_none_of_its_business() -> None:
    """The same OSError from elsewhere, such as a database, and TLS that is not trusted are not tried again."""
    calls = 0

    @smtpretry.retry(policy=no_wait())
    def send() -> None:
        nonlocal calls
        calls += 1
        socket.create_connection(("127.0.0.1", unused_port()))

    with pytest.raises(ConnectionRefusedError):
        send()
    assert calls == 1
    strict = ssl.create_default_context()
    with ThreadedServer(tls="implicit") as server:
        with pytest.raises(ssl.SSLCertVerificationError):
            smtpretry.retry(policy=no_wait())(lambda: smtplib.SMTP_SSL("localhost", server.port, context=strict))()
        assert server.connections == 1


def quitting(server: ThreadedServer) -> None:
    """Send as Flask-Mail does: whatever comes of it, say QUIT, and raise what comes of that."""
    client = smtplib.SMTP(server.hostname, server.port)
    try:
        client.sendmail(APP, [BOB], "Subject: hello\r\n\r\nhello\r\n")
    finally:
        client.quit()


def test_a_failing_quit_hides_no_reason() -> None:
    """After a 421 smtplib has hung up, and QUIT fails: the reason to try again is the 421."""
    policy = no_wait()
    with ThreadedServer() as server:
        server.on("MAIL", "421 4.3.2 busy", times=1)
        smtpretry.retry(policy=policy)(quitting)(server)
        assert len(server.messages) == 1
        assert len(policy.waits) == 1


def test_a_failing_quit_sends_nothing_again() -> None:
    """The server has taken the message before: what QUIT raises comes out, and nobody gets it twice."""
    with ThreadedServer() as server:
        server.fail_at("QUIT", "fin")
        with pytest.raises(smtplib.SMTPServerDisconnected):
            smtpretry.retry(policy=no_wait())(quitting)(server)
        assert len(server.messages) == 1


def test_a_client_that_was_never_connected_is_a_mistake() -> None:
    """What smtplib calls "please run connect() first" comes out at once."""
    policy = no_wait()
    with pytest.raises(smtplib.SMTPServerDisconnected, match="connect"):
        smtpretry.retry(policy=policy)(smtplib.SMTP().noop)()
    assert policy.waits == []
