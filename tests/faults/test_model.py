"""A state machine: whatever is sent, broken, cancelled, closed and sent again over one client, the model knows each end."""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import virtual
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import faults
from faults import SENDER, Watched, name_of, probe
from smtpretry import NO_REPLY, ClientClosed, Delivery, Status

if TYPE_CHECKING:
    from smtpretry.testing import ScriptedServer

# What a recipient's address tells the server to do with it.
KINDS: dict[str, list[tuple[str, str, int | None]]] = {
    "plain": [],
    "grey": [("on", "450 4.2.0 Greylisted", 1)],
    "slow": [("on", "451 4.7.1 Greylisting in action, please come back in 00:02:00", 2)],
    "full": [("on", "452 4.5.3 Too many recipients", 1)],
    "never": [("on", "550 5.1.1 No such user", None)],
    "always": [("on", "450 4.2.1 Try again", None)],
    "drops": [("fail", "fin", 1)],
    "resets": [("fail", "rst", None)],
    "hangs": [("on", "421 4.7.0 Too many errors", None)],
    "slams": [("close", "550 5.7.1 Go away", None)],
}
ENDS = {"never": 550, "always": 450, "resets": NO_REPLY, "hangs": 421, "slams": 550}  # refused so; the others get it
VERBS = ["CONNECT", "EHLO", "STARTTLS", "AUTH", "MAIL", "RCPT", "DATA", "BODY", "END_OF_DATA", "RSET", "QUIT"]
VERBS += ["END_OF_DATA"] * 6  # where the ends are hardest to tell
EXAMPLES = int(os.environ.get("SMTPRETRY_MODEL_EXAMPLES", "40"))
recipients = st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=4)
messages = st.lists(recipients, min_size=1, max_size=4)


class Model(RuleBasedStateMachine):
    """One client, one server, and what each recipient of each message must have come to."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=virtual.VirtualLoop)
        self.number = 0

    def run(self, steps: Any) -> Any:
        """Run it on the loop of this machine."""
        return self.runner.run(steps)

    @initialize(mode=st.sampled_from(faults.MODES), session=st.sampled_from(["clear", "clear", "tls"]))
    def start(self, mode: faults.Mode, session: Any) -> None:
        """Begin."""
        self.mode: faults.Mode = mode
        self.server: ScriptedServer = faults.server_for(faults.Place("MAIL", session=session))
        self.run(self.server.start())
        options = {"username": "app", "password": "secret"} if session == "tls" else {}
        policy = faults.policy(mode, give_up_after=timedelta(hours=1))
        self.smtp = Watched(self.server.client(timeout=60), policy, **options)

    def envelope(self, kinds: list[str]) -> tuple[bytes, list[str]]:
        """Make a message and its recipients, and tell the server what to do with them."""
        self.number += 1
        names = [f"{kind}-{self.number}-{n}@example.com" for n, kind in enumerate(kinds)]
        for who, kind in zip(names, kinds, strict=True):
            for how, what, times in KINDS[kind]:
                if how == "fail":
                    self.server.fail_at("RCPT", what, who, times=times, optional=True)
                else:
                    self.server.on(
                        "RCPT", who, what, times=times, close=True if how == "close" else None, optional=True
                    )
        return b"Message-ID: <%d@model>\r\n\r\nhello\r\n" % self.number, names

    # What may happen

    @rule(envelopes=messages)
    def send(self, envelopes: list[list[str]]) -> None:
        """Send some messages at once, to the end."""

        async def steps() -> None:
            calm = not any(
                script.pattern == "*" and script.used < (script.times or 0) for script in self.server.scripts
            )
            sends = [self.smtp.sendmail(SENDER, who, message) for message, who in map(self.envelope, envelopes)]
            first = len(self.smtp.deliveries)
            results = await asyncio.gather(*sends, return_exceptions=True)
            made = {name_in(delivery): delivery for delivery in self.smtp.deliveries[first:]}
            for result, delivery in zip(results, sorted(made.values(), key=number_of), strict=True):
                error = result if isinstance(result, BaseException) else None
                wrong = list(
                    faults.disagreements(delivery, None if isinstance(result, BaseException) else result, error)
                )
                assert not wrong, wrong
                for who, outcome in delivery.outcomes.items():
                    code = ENDS.get(who.partition("-")[0])
                    expected = (Status.ACCEPTED, 250) if code is None else (Status.REFUSED, code)
                    if calm:
                        assert (outcome.status, outcome.reply and outcome.reply.code) == expected, f"{who}: {outcome}"

        self.run(steps())

    @rule(
        verb=st.sampled_from(VERBS),
        fault=st.sampled_from([fault for fault in faults.FAULTS if fault.kind != "5xx"]),
        times=st.integers(1, 3),
    )
    def break_something(self, verb: str, fault: faults.Fault, times: int) -> None:
        """Let the server fail somewhere, some times, from now on."""
        place = faults.Place(verb)
        if place.takes(fault):
            fault.install(self.server, faults.Place(verb), times)

    @rule(envelopes=messages, seconds=st.sampled_from([0.0, 0.5, 5.0, 45.0, 61.0, 200.0]))
    def cancel(self, envelopes: list[list[str]], seconds: float) -> None:
        """Send some messages, and cancel one of them after some time; the others go on to their ends."""

        async def steps() -> None:
            sends = [
                asyncio.ensure_future(self.smtp.sendmail(SENDER, who, message))
                for message, who in map(self.envelope, envelopes)
            ]
            await asyncio.sleep(seconds)
            sends[0].cancel()
            for result in await asyncio.gather(*sends, return_exceptions=True):
                assert not isinstance(result, (ClientClosed, AssertionError, TypeError))

        self.run(steps())

    @rule(envelopes=messages, rounds=st.integers(1, 60))
    def cancel_in_the_middle(self, envelopes: list[list[str]], rounds: int) -> None:
        """Send some messages, and cancel one after some rounds of the event loop: anywhere."""

        async def steps() -> None:
            sends = [
                asyncio.ensure_future(self.smtp.sendmail(SENDER, who, message))
                for message, who in map(self.envelope, envelopes)
            ]
            for _ in range(rounds):
                await asyncio.sleep(0)
            sends[-1].cancel()
            await asyncio.gather(*sends, return_exceptions=True)

        self.run(steps())

    @rule(envelopes=messages, seconds=st.sampled_from([0.0, 1.0, 30.0]))
    def close(self, envelopes: list[list[str]], seconds: float) -> None:
        """Close the client while it sends, and open it again: who was waiting is told so."""

        async def steps() -> None:
            sends = [
                asyncio.ensure_future(self.smtp.sendmail(SENDER, who, message))
                for message, who in map(self.envelope, envelopes)
            ]
            await asyncio.sleep(seconds)
            await self.smtp.aclose()
            results = await asyncio.gather(*sends, return_exceptions=True)
            await self.smtp.__aenter__()
            for result in results:
                if isinstance(result, ClientClosed):
                    assert result.delivery.pending

        self.run(steps())

    @rule(said=st.sampled_from(["", "421 4.4.2 Idle"]), close=st.sampled_from(["fin", "rst", False]))
    def hang_up(self, said: str, close: Any) -> None:
        """Let the server end all connections, or just say something."""

        async def steps() -> None:
            await asyncio.sleep(0.1)  # for those to be gone that are ending
            self.server.disconnect(said, close=close)

        self.run(steps())

    @rule(seconds=st.sampled_from([1.0, 9.99, 10.01, 12.0, 600.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.run(asyncio.sleep(seconds))

    @rule(seconds=st.sampled_from([10.0, 400.0]), envelopes=messages)
    def restart(self, seconds: float, envelopes: list[list[str]]) -> None:
        """Let the server be away for a while, in the middle of some sends."""

        async def steps() -> None:
            sends = [
                asyncio.ensure_future(self.smtp.sendmail(SENDER, who, message))
                for message, who in map(self.envelope, envelopes)
            ]
            await asyncio.sleep(0.5)
            await self.server.stop()
            await asyncio.sleep(seconds)
            await self.server.start()
            await asyncio.gather(*sends, return_exceptions=True)

        self.run(steps())

    @precondition(lambda self: any(delivery.pending for delivery in self.smtp.deliveries))
    @rule()
    def go_on(self) -> None:
        """Take up what was broken off, as a queue would, and bring it to its end."""

        async def steps() -> None:
            for delivery in self.smtp.deliveries:
                while delivery.next_at is not None:
                    await asyncio.sleep(max(0.0, delivery.next_at - virtual.clock()))
                    await self.smtp.attempt(delivery)

        self.run(steps())
        assert not any(delivery.pending for delivery in self.smtp.deliveries)

    @rule()
    def mend(self) -> None:
        """Let the server be well again, and see that the client is."""
        self.server.clear()
        wrong = self.run(probe(self.smtp, self.server))
        assert not wrong, wrong

    # What must be true at any time

    @invariant()
    def each_end_is_what_the_server_did(self) -> None:
        """Compare every outcome with the mailboxes."""
        if not hasattr(self, "smtp"):
            return
        taken = Counter[tuple[str, str]]()
        for message in self.server.messages:
            taken.update((name_of(message), who) for who in message.recipients)
        for delivery in self.smtp.deliveries:
            for who, outcome in delivery.outcomes.items():
                copies = taken[name_in(delivery), who]
                told = f"{who}: {outcome}, {copies} copies"
                if outcome.status is Status.ACCEPTED:
                    assert copies >= 1, f"lost in silence: {told}"
                elif not outcome.uncertain:
                    assert copies == 0, f"arrived, and not known: {told}"
                if copies > 1:
                    assert (outcome.uncertain, self.mode) == (True, "resend"), f"twice: {told}"
                if outcome.status is Status.UNCERTAIN:
                    assert outcome.uncertain, told
                if outcome.status is Status.REFUSED:
                    assert outcome.reply is not None, told
                    assert not outcome.uncertain, told

    def teardown(self) -> None:
        """End."""

        async def steps() -> None:
            await self.smtp.aclose()
            await self.server.stop()
            if self.server.errors:
                raise self.server.errors[0]

        try:
            if hasattr(self, "smtp"):
                self.run(steps())
        finally:
            self.runner.close()


def name_in(delivery: Delivery) -> str:
    """Return the Message-ID of a delivery."""
    found = re.search(rb"Message-ID: *(\S+)", delivery.message)
    return found[1].decode() if found else ""


def number_of(delivery: Delivery) -> int:
    """Return the number of a message of this model."""
    return int(name_in(delivery).strip("<>").partition("@")[0])


def test_model() -> None:
    """No sequence of sends, faults, cancellations, closings and restarts makes the client report what is not so."""
    run_state_machine_as_test(
        Model,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=12,
            phases=[Phase.generate],  # to shrink takes minutes: add Phase.shrink when there is something to shrink
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
