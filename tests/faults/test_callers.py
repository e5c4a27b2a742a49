"""The caller's own code fails in the midst of a send: what is known is kept, nothing is lost, and nothing comes twice."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal

import pytest
import virtual

import faults
from faults import RECIPIENTS, SENDER, SMALL, copies, probe
from smtpretry import Delivery, Event, RetryingSMTP, Status, prepare
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

How = Literal["raises", "hangs", "is cancelled", "is interrupted"]
ENOUGH = 60  # calls: more than any send here makes
ANN, BOB, CAROL = RECIPIENTS


class MishapError(Exception):
    """What the caller's code raises."""


class Caller:
    """Code of the caller's, of which one call goes wrong."""

    def __init__(self, what: str, number: int, how: How) -> None:
        self.what, self.number, self.how = what, number, how
        self.calls = 0
        self.armed = False
        self.reached = asyncio.Event()

    def step(self, what: str) -> None:
        """Go wrong, where it is the time."""
        if what == self.what and self.armed:
            self.calls += 1
            if self.calls == self.number:
                self.reached.set()
                if self.how == "is cancelled":
                    raise asyncio.CancelledError
                if self.how == "is interrupted":
                    raise KeyboardInterrupt
                raise MishapError

    async def wait(self, what: str) -> None:
        """Go wrong, or hang."""
        try:
            self.step(what)
        except MishapError:
            if self.how == "raises":
                raise
            await asyncio.get_running_loop().create_future()

    def policy(self, mode: faults.Mode) -> Any:
        """Return a policy whose functions are the caller's."""

        def backoff(_: object) -> float:
            self.step("wait")
            return 60.0

        def stop(_: object) -> bool:
            self.step("stop")
            return False

        async def sleep(seconds: float) -> None:
            await self.wait("sleep")
            await asyncio.sleep(seconds)

        return faults.policy(mode, wait=backoff, stop=stop, sleep=sleep)

    def hook(self, _: Delivery | None, __: Event) -> None:
        """Take note of nothing."""
        self.step("hook")

    async def token(self) -> str:
        """Return a token."""
        await self.wait("token")
        return "token"

    async def save(self, _: Delivery) -> None:
        """Store nothing."""
        await self.wait("save")


async def send(smtp: RetryingSMTP, delivery: Delivery, save: Callable[[Delivery], Any]) -> None:
    """Do as a worker does, pass after pass."""
    while (when := delivery.next_at) is not None:
        await asyncio.sleep(when - virtual.clock())
        await smtp.attempt(delivery, save)


def begin(smtp: RetryingSMTP, delivery: Delivery, caller: Caller) -> Awaitable[object]:
    """Begin to send, as a worker does where `save` is what goes wrong; return what to wait for."""
    sending = send(smtp, delivery, caller.save) if caller.what == "save" else smtp.deliver(delivery)
    if caller.how == "is interrupted":
        return sending  # in no task of its own: asyncio would end the loop
    task = asyncio.ensure_future(sending)
    if caller.how == "hangs":
        asyncio.ensure_future(caller.reached.wait()).add_done_callback(lambda _: task.cancel())
    return task


async def scenario(caller: Caller, mode: faults.Mode) -> list[str]:
    """Send, with one call that goes wrong; go on with the same delivery. Return what is wrong."""
    problems = list[str]()
    async with ScriptedServer(token="token", max_recipients=1) as server:

        def client() -> Any:
            caller.step("factory")
            return server.client(timeout=60)

        log_in: Any = {"username": "app", "oauth_token_generator": caller.token}
        smtp = RetryingSMTP(client, caller.policy(mode), **log_in, on_step=caller.hook)
        caller.armed = True
        server.on("RCPT", BOB, "450 4.2.0 Greylisted", times=1, optional=True)
        server.fail_at("END_OF_DATA", "fin", CAROL, act=True, times=1, optional=True)
        delivery = prepare(SMALL, sender=SENDER, recipients=RECIPIENTS)
        try:
            await begin(smtp, delivery, caller)
        except (MishapError, asyncio.CancelledError, KeyboardInterrupt) as error:
            if caller.what == "hook" and caller.how != "is interrupted":
                problems.append(f"the hook's {error!r} has reached the send")
        most = {ANN: 1, BOB: 1, CAROL: 2 if mode == "resend" else 1}
        for who, outcome in delivery.outcomes.items():
            if copies(server, who) and outcome.status is not Status.ACCEPTED and not outcome.uncertain:
                problems.append(f"{who} has it, and that is not known")
        caller.armed = False
        await smtp.deliver(delivery)
        for who, outcome in delivery.outcomes.items():
            if not 1 <= copies(server, who) <= most[who] or outcome.status is Status.REFUSED:
                problems.append(f"{who} has it {copies(server, who)} times, and ended as {outcome.status}")
        server.clear()
        problems += await probe(smtp, server)
        await smtp.aclose()
    return problems


CALLS: list[tuple[str, How]] = [
    *(("hook", how) for how in ("raises", "is cancelled", "is interrupted")),
    *((what, how) for what in ("wait", "stop", "factory") for how in ("raises", "is cancelled")),
    *((what, how) for what in ("sleep", "token", "save") for how in ("raises", "hangs", "is cancelled")),
]


@pytest.mark.parametrize("mode", faults.MODES)
@pytest.mark.parametrize(("what", "how"), CALLS)
def test_every_call_of_the_callers_code(what: str, how: How, mode: faults.Mode) -> None:
    """Whichever call it is that raises, hangs or is cancelled: who has the mail is known, and nobody gets another copy."""
    for number in range(1, ENOUGH):
        caller = Caller(what, number, how)
        problems = virtual.run(scenario(caller, mode))
        assert not problems, f"call {number} of {what} {how}: {problems}"
        if not caller.reached.is_set():
            break
    assert 1 < number < ENOUGH - 1, "the sweep did not come to the end"
