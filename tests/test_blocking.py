"""`Blocking`: the same client for threads without an event loop, through forks, Ctrl-C and the end of the interpreter."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiosmtplib
import pytest
from support import ANN, APP, BOB, BODY, GREYLISTED, letter

import smtpretry
from smtpretry import Blocking, ClientClosed, Delivery, RetryingSMTP, RetryPolicy, blocking, prepare
from smtpretry.testing import ThreadedServer, no_wait

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 20  # seconds for a process that takes one or two


@pytest.fixture
def server() -> Iterator[ThreadedServer]:
    with ThreadedServer() as running:
        yield running


def test_the_same_face(server: ThreadedServer) -> None:
    """Each method returns what that of RetryingSMTP returns, and retries in the same way."""
    server.on("RCPT", "bob@*", GREYLISTED, times=1)
    policy = no_wait()
    with Blocking(server.client, policy) as smtp:
        assert smtp.connect().code == 220
        assert smtp.is_connected
        assert smtp.send_message(letter(BOB)) == ({}, server.messages and "2.0.0 Ok: queued as 1")
        assert smtp.sendmail(APP, [ANN], BODY)[0] == {}
        assert smtp.deliver(BODY, sender=APP, recipients=[ANN, BOB]).accepted == [ANN, BOB]
        assert smtp.quit().code == 221
        assert not smtp.is_connected
        assert smtp.policy is policy
    assert len(policy.waits) == 1
    assert [message.recipients for message in server.messages] == [[BOB], [ANN], [ANN, BOB]]


def test_it_takes_what_retrying_smtp_takes() -> None:
    """The constructor and the methods have the signatures of RetryingSMTP's, and refuse at once what it refuses."""
    assert inspect.signature(Blocking).parameters.keys() == inspect.signature(RetryingSMTP).parameters.keys()
    for name in ("send_message", "sendmail", "deliver", "enqueue", "connect", "quit", "send_many"):
        ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (Blocking, RetryingSMTP))
        assert ours.keys() == theirs.keys()
        assert not inspect.iscoroutinefunction(getattr(Blocking, name))
    with pytest.raises(TypeError, match="client is an aiosmtplib"):
        Blocking("smtp.example.com")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="policy"):
        Blocking(aiosmtplib.SMTP, 5)  # type: ignore[arg-type]


def test_exceptions_are_those_of_the_client(server: ThreadedServer) -> None:
    """A refusal raises what aiosmtplib raises, with the delivery; a wrong argument raises in the caller's thread."""
    server.on("RCPT", "550 5.1.1 who?")
    with Blocking(server.client) as smtp:
        with pytest.raises(aiosmtplib.SMTPRecipientsRefused) as caught:
            smtp.sendmail(APP, [BOB], BODY)
        assert list(caught.value.delivery.refused) == [BOB]  # type: ignore[attr-defined]
        with pytest.raises(TypeError):
            smtp.send_message()  # type: ignore[call-arg]
        with pytest.raises(ValueError, match="no recipients"):
            smtp.send_message(letter(), recipients=[])
        with pytest.raises(ValueError, match="no queue"):
            smtp.enqueue(letter(BOB))
        for wrong in (0, -1):
            with pytest.raises(ValueError, match="timeout"):
                smtp.send_message(letter(BOB), timeout=wrong)


def test_many_threads_share_one_client(server: ThreadedServer) -> None:
    """Sends of twenty threads go over the connections of one pool, and each arrives once."""
    with Blocking(server.client, max_connections=2) as smtp, ThreadPoolExecutor(20) as threads:
        recipients = [f"{number}@example.com" for number in range(100)]
        list(threads.map(lambda who: smtp.sendmail(APP, who, BODY), recipients))
    assert sorted(server.mailboxes) == sorted(recipients)
    assert len(server.messages) == 100
    assert server.connections <= 2


def test_all_clients_share_one_thread(server: ThreadedServer) -> None:
    """However many clients there are, one daemon thread serves them."""
    with Blocking(server.client) as one, Blocking(server.client) as other:
        one.sendmail(APP, ANN, BODY)
        other.sendmail(APP, BOB, BODY)
        [thread] = [thread for thread in threading.enumerate() if thread.name == "smtpretry"]
        assert thread.daemon


def test_timeout_is_the_patience_of_the_whole_call(server: ThreadedServer) -> None:
    """A call that waits for longer ends with TimeoutError and its delivery, and the next one works."""
    server.on("RCPT", "bob@*", "450 4.2.0 try again in 300 seconds")
    with Blocking(server.client) as smtp:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"0\.2 s") as caught:
            smtp.sendmail(APP, [ANN, BOB], BODY, timeout=0.2)
        assert time.monotonic() - began < 5
        delivery = smtpretry.delivery_of(caught.value)
        assert caught.value.delivery is delivery  # type: ignore[attr-defined]
        assert delivery is not None
        assert (delivery.accepted, delivery.pending) == ([ANN], [BOB])
        assert any("2 recipients accepted" in note for note in caught.value.__notes__)
        server.clear()
        assert smtp.sendmail(APP, [BOB], BODY, timeout=60)[0] == {}
    assert [message.recipients for message in server.messages] == [[ANN], [BOB]]


def test_timeout_in_the_midst_of_a_command(server: ThreadedServer) -> None:
    """A server that never answers is left when the time is over, and the next call takes a new connection."""
    server.fail_at("END_OF_DATA", "stall", times=1)
    with Blocking(server.client) as smtp:
        with pytest.raises(TimeoutError) as caught:
            smtp.sendmail(APP, [BOB], BODY, timeout=0.2)
        assert smtpretry.delivery_of(caught.value) is not None
        assert smtp.sendmail(APP, [ANN], BODY)[0] == {}
    assert server.connections == 2


def test_inside_a_running_loop_it_says_what_to_do(server: ThreadedServer) -> None:
    """In a coroutine each method is a RuntimeError that names the cure, and nothing is left unawaited."""
    smtp = Blocking(server.client)

    async def wrong(call: Any) -> None:
        with pytest.raises(RuntimeError, match=r"RetryingSMTP.*to_thread"):
            call()

    for call in (
        lambda: smtp.sendmail(APP, BOB, BODY),
        lambda: smtp.send_many([letter(BOB)]),
        smtp.__enter__,
        smtp.close,
        smtp.connect,
    ):
        asyncio.run(wrong(call))

    async def right() -> None:
        await asyncio.to_thread(smtp.sendmail, APP, BOB, BODY)

    asyncio.run(right())
    smtp.close()
    assert list(server.mailboxes) == [BOB]


def test_where_greenlets_share_the_thread_of_the_loop(server: ThreadedServer) -> None:
    """Under gevent and eventlet, all run in one thread, and the loop of this client seems to run in each of them."""
    smtp = Blocking(server.client)
    smtp.sendmail(APP, ANN, BODY)
    asyncio._set_running_loop(blocking._loop.begin())
    try:
        smtp.sendmail(APP, BOB, BODY)
    finally:
        asyncio._set_running_loop(None)
    smtp.close()
    assert list(server.mailboxes) == [ANN, BOB]


def test_a_log_that_is_mailed(server: ThreadedServer) -> None:
    """A log handler is locked while it mails what an application logs; what becomes of that mail is logged all the same."""
    server.on("RCPT", BOB, "550 5.1.1 who?")
    smtp = Blocking(server.client)
    raised = list[Exception]()

    class Mails(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                smtp.send_message(letter(BOB, text=record.getMessage()), timeout=PATIENCE)
            except (RuntimeError, aiosmtplib.SMTPException) as error:
                raised.append(error)

    root, handler = logging.getLogger(), Mails(logging.WARNING)
    root.addHandler(handler)
    try:
        root.error("something is wrong")
    finally:
        root.removeHandler(handler)
    smtp.close()
    *about_mail, refused = raised
    assert isinstance(refused, aiosmtplib.SMTPRecipientsRefused)
    assert {str(one).partition(":")[0] for one in about_mail} == {
        "what smtpretry logs of a mail cannot be mailed by smtpretry.Blocking"
    }


@pytest.mark.parametrize("how", ["send_message", "send_many", "left"])
def test_what_is_logged_is_logged_by_the_thread_that_sends(server: ThreadedServer, how: str) -> None:
    """A filter that knows the thread's request, and a handler with a database connection of the thread's, find it."""
    server.on("RCPT", BOB, "550 5.1.1 who?")
    threads = set[str]()

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            threads.add(record.threadName or "")

    def send() -> None:
        with Blocking(server.client) as smtp:
            if how == "send_message":
                with pytest.raises(aiosmtplib.SMTPRecipientsRefused):
                    smtp.send_message(letter(BOB))
                return
            sending = smtp.send_many([letter(BOB), letter(ANN)])
            next(sending)
            if how == "send_many":
                next(sending)
            sending.close()  # type: ignore[attr-defined] # a generator

    logger, handler = logging.getLogger("smtpretry"), Notes()
    logger.addHandler(handler)
    try:
        sender = threading.Thread(target=send, name="the sender")
        sender.start()
        sender.join(PATIENCE)
    finally:
        logger.removeHandler(handler)
    assert threads == {"the sender"}


def test_where_no_thread_can_be_started(server: ThreadedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call for which there is no thread raises, and the next one works where there is one again."""
    blocking._loop.end()

    def start(_: object) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    smtp = Blocking(server.client)
    with monkeypatch.context() as full:
        full.setattr("threading.Thread.start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            smtp.sendmail(APP, ANN, BODY)
    smtp.sendmail(APP, ANN, BODY, timeout=PATIENCE)
    smtp.close()
    assert list(server.mailboxes) == [ANN]


def test_contexts_reach_the_policy(server: ThreadedServer) -> None:
    """What the policy calls, and the hooks, see the context variables of the thread that sends."""
    request, seen = contextvars.ContextVar("request", default=""), list[str]()
    server.on("MAIL", "451 4.3.0 later", times=1)

    at_once = no_wait()

    async def sleep(seconds: float) -> None:
        seen.append(request.get())
        assert at_once.sleep is not None
        await at_once.sleep(seconds)

    with Blocking(server.client, RetryPolicy(sleep=sleep, clock=at_once.clock)) as smtp:
        request.set("order 17")
        smtp.sendmail(APP, BOB, BODY)
    assert seen == ["order 17"]


def test_close_wakes_those_who_wait(server: ThreadedServer) -> None:
    """`close` ends the waits of other threads with ClientClosed and their deliveries; `with` opens it again."""
    script = server.on("RCPT", "450 4.2.0 try again in 300 seconds")
    smtp = Blocking(server.client)
    with ThreadPoolExecutor() as threads:
        sending = threads.submit(smtp.sendmail, APP, [BOB], BODY)
        while not script.used or "RSET" not in server.verbs:
            time.sleep(0.01)
        smtp.close()
        error = sending.exception(PATIENCE)
    assert isinstance(error, ClientClosed)
    assert error.delivery.pending == [BOB]
    server.clear()
    with smtp:
        assert smtp.sendmail(APP, [BOB], BODY)[0] == {}


# Many messages


def messages(*recipients: str) -> Iterator[Delivery]:
    for who in recipients:
        yield prepare(BODY, sender=APP, recipients=[who])


def test_send_many_draws_in_the_thread_that_iterates(server: ThreadedServer) -> None:
    """Messages are drawn in the caller's thread, as they can be sent, outside of any event loop; deliveries come out."""
    drawn = list[str]()

    def drawing() -> Iterator[Delivery]:
        for number in range(50):
            with pytest.raises(RuntimeError, match="no running event loop"):
                asyncio.get_running_loop()
            drawn.append(threading.current_thread().name)
            yield prepare(BODY, sender=APP, recipients=[f"{number}@example.com"])

    server.on("RCPT", "7@*", GREYLISTED, times=1)
    server.on("RCPT", "8@*", "550 5.1.1 who?")
    with Blocking(server.client, no_wait()) as smtp:
        deliveries = list(smtp.send_many(drawing()))
    assert set(drawn) == {threading.current_thread().name}
    assert len(deliveries) == 50
    assert sum(bool(delivery.accepted) for delivery in deliveries) == len(server.messages) == 49


def test_send_many_draws_no_more_than_is_wanted(server: ThreadedServer) -> None:
    """An endless iterable is drawn as fast as it is sent; a loop that is left early closes it, and the client works."""
    drawn = 0

    def endless() -> Iterator[Delivery]:
        nonlocal drawn
        while True:
            drawn += 1
            yield from messages(f"{drawn}@example.com")

    with Blocking(server.client) as smtp:
        for number, _ in enumerate(smtp.send_many(endless()), start=1):
            if number == 10:
                break
        assert drawn < 20
        assert smtp.sendmail(APP, BOB, BODY)[0] == {}


def test_send_many_raises_what_the_messages_raise(server: ThreadedServer) -> None:
    """An error of the iterable comes out when the messages under way have been yielded, with its own type."""

    def failing() -> Iterator[Delivery]:
        yield from messages(ANN, BOB)
        raise KeyError(APP)

    seen = list[Delivery]()
    with Blocking(server.client) as smtp:
        with pytest.raises(KeyError, match=APP):
            seen.extend(smtp.send_many(failing()))
        assert len(seen) in {0, 2}  # list.extend takes them as they come
        assert list(smtp.send_many([])) == []
        with pytest.raises(ValueError, match="concurrency"):
            smtp.send_many([], concurrency=0)
        with pytest.raises(ExceptionGroup, match="1 message could not be sent"):
            list(smtp.send_many([5]))  # type: ignore[list-item]
        with pytest.raises(TypeError):
            smtp.send_many(5)  # type: ignore[arg-type]
        for one in (letter(ANN), "hello", b"hello", *messages(ANN)):
            with pytest.raises(TypeError, match="messages is an iterable of messages: for a single one call"):
                smtp.send_many(one)
    assert sorted(server.mailboxes) == [ANN, BOB]


# Other processes


def in_child(work: Any) -> int:
    """Do it in a fork, and return its exit code: 0 where it raised nothing."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the parent tells
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


@pytest.mark.parametrize("one_client", [True, False], ids=["a client", "a function"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_after_a_fork_both_go_on(server: ThreadedServer, one_client: bool) -> None:
    """A child of a process that has sent sends over its own connection, and the parent's connection stays as it was."""
    others = [Blocking(server.client) for _ in range(5)]  # which have no connection
    smtp = Blocking(server.client() if one_client else server.client)
    smtp.sendmail(APP, "before@example.com", BODY)
    for _ in range(2):
        assert in_child(lambda: smtp.sendmail(APP, "child@example.com", BODY)) == 0
        assert smtp.is_connected
        smtp.sendmail(APP, "parent@example.com", BODY)
    assert [message.connection for message in server.received("parent@example.com")] == [1, 1]
    assert [message.connection for message in server.received("child@example.com")] == [2, 3]
    for one in (smtp, *others):
        one.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_holds_none_of_the_parents_connections(server: ThreadedServer) -> None:
    """What the parent closes is closed for the server, though a child that was forked meanwhile lives on."""
    smtp = Blocking(server.client)
    smtp.sendmail(APP, ANN, BODY)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.read(read, 1)  # until the parent ends it
        os._exit(0)
    try:
        time.sleep(0.2)
        server.fail_at("MAIL", "stall", times=1)
        with pytest.raises(TimeoutError):
            smtp.sendmail(APP, BOB, BODY, timeout=0.2)  # it is closed without QUIT
        deadline = time.monotonic() + PATIENCE
        while server.open_connections and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.open_connections == 0
    finally:
        os.close(write)
        os.waitpid(child, 0)
        os.close(read)
        smtp.close()


def program(server: ThreadedServer, body: str) -> subprocess.Popen[str]:
    """Start a script that has `smtp`, a client for the server."""
    head = f"""
        import os, signal, sys, threading, time, aiosmtplib, smtpretry
        smtp = smtpretry.Blocking(lambda: aiosmtplib.SMTP(
            hostname="127.0.0.1", port={server.port}, local_hostname="client.example"))
        send = lambda who, **how: smtp.sendmail("app@example.com", [who], b"Subject: hello\\r\\n\\r\\n", **how)
    """
    source = textwrap.dedent(head) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(smtpretry.__file__).parents[1],
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        said, complained = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, said, complained


def test_ends_with_the_interpreter(server: ThreadedServer) -> None:
    """A script that closes nothing ends at once and without a word, and the server hears QUIT."""
    assert ended(program(server, "send('bob@example.com')")) == (0, "", "")
    assert server.verbs[-1] == "QUIT"


def test_ends_though_the_server_does_not_answer(server: ThreadedServer) -> None:
    """A server that never answers QUIT and a daemon thread that waits hold up no end; what is not sent is told."""
    server.fail_at("QUIT", "stall")
    server.on("RCPT", "bob@*", "450 4.2.0 try again in 300 seconds")
    body = """
        threading.Thread(target=send, args=["bob@example.com"], daemon=True).start()
        send("ann@example.com")
        time.sleep(0.3)
    """
    began = time.monotonic()
    code, _, complained = ended(program(server, body))
    assert code == 0
    assert "ClientClosed" in complained
    assert "1 pending" in complained
    assert time.monotonic() - began < 8


def test_ctrl_c_before_a_call_has_begun(server: ThreadedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves nothing behind, such as a coroutine that was never awaited; the next call works."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with smtpretry.Blocking(server.client()) as smtp:
        with monkeypatch.context() as patch:
            patch.setattr(blocking._loop.begin(), "call_soon_threadsafe", interrupted)
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                with pytest.raises(KeyboardInterrupt):
                    smtp.sendmail(APP, [ANN], b"")
                gc.collect()
        assert not warned
        assert smtp.sendmail(APP, [ANN], b"")[0] == {}


def test_ctrl_c_wakes_the_caller_and_leaves_the_client_usable(server: ThreadedServer) -> None:
    """KeyboardInterrupt comes at once out of a call that waits, with the delivery; the next call works."""
    script = server.on("RCPT", "bob@*", "450 4.2.0 try again in 300 seconds")
    body = """
        for many in (False, True):
            try:
                if many:
                    list(smtp.send_many([smtpretry.prepare(b"", sender="a@b.c", recipients=["bob@example.com"])]))
                else:
                    send("bob@example.com")
            except KeyboardInterrupt as interrupt:
                delivery = smtpretry.delivery_of(interrupt)
                print(many or delivery.pending, flush=True)
        send("ann@example.com")
        print("sent", flush=True)
    """
    process = program(server, body)
    for number in (1, 2):
        while script.used < number or server.verbs.count("RSET") < number:
            time.sleep(0.01)
        time.sleep(0.1)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == ("['bob@example.com']", "True")[number - 1]
        assert time.monotonic() - began < 2
    code, said, complained = ended(process)
    assert (code, said.strip()) == (0, "sent"), complained
    assert list(server.mailboxes) == [ANN]
