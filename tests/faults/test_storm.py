"""500 sends at once over one client, connections that die at random, greylisting: all accounted for, exactly."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import timedelta
from random import Random
from typing import Any

import pytest
import virtual

import faults
from faults import SENDER, Watched
from smtpretry import Status
from smtpretry.testing import ScriptedServer

MANY = 500
DEATHS = {"fin": 0.01, "rst": 0.01, "421": 0.005}  # chances at each command
DEATHS_AFTER = {"fin": 0.02, "rst": 0.02}  # chances that the reply to the final dot is lost


class Lightning:
    """Ends the connections of a server at random moments, always the same for the same seed."""

    def __init__(self, server: ScriptedServer, seed: int) -> None:
        self.server, self.random = server, Random(seed)  # noqa: S311
        self.struck = Counter[str]()

    def strike(self, chances: dict[str, float], where: str) -> None:
        """Perhaps."""
        draw = self.random.random()
        for how, chance in chances.items():
            draw -= chance
            if draw < 0:
                self.struck[where] += 1
                self.server.disconnect(
                    "421 4.3.0 Closing" if how == "421" else "", close="rst" if how == "rst" else "fin"
                )
                return


class Struck(list[Any]):
    """A list that draws lightning: the commands that came, or the messages that were taken."""

    def __init__(self, lightning: Lightning, chances: dict[str, float], where: str) -> None:
        super().__init__()
        self.lightning, self.chances, self.where = lightning, chances, where

    def append(self, item: Any) -> None:
        """Keep it, and perhaps end the connection that it came on."""
        super().append(item)
        self.lightning.strike(self.chances, self.where)


@pytest.mark.parametrize("mode", faults.MODES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_all_accounted_for(seed: int, mode: faults.Mode) -> None:  # noqa: C901 - the accounts
    """In a storm each recipient has its end, the mailboxes hold exactly what is reported, and nothing comes twice."""

    async def scenario() -> None:
        random = Random(seed)  # noqa: S311
        kinds = random.choices(["plain", "grey", "never"], [85, 10, 5], k=MANY * 3)
        async with ScriptedServer() as server:
            lightning = Lightning(server, seed)
            server.commands = Struck(lightning, DEATHS, "before")
            server.messages = Struck(lightning, DEATHS_AFTER, "after")
            for number, kind in enumerate(kinds):
                if kind == "grey":
                    server.on("RCPT", f"grey{number}@example.com", "450 4.2.0 Greylisted", times=1, optional=True)
            server.on("RCPT", "never*", "550 5.1.1 No such user")
            smtp = Watched(server.client(), faults.policy(mode, give_up_after=timedelta(hours=12)))
            sends, rest = [], [f"{kind}{number}@example.com" for number, kind in enumerate(kinds)]
            for number in range(MANY):
                mine, rest = rest[: (size := random.choice([1, 1, 2, 4]))], rest[size:]
                if mine:
                    message = b"Message-ID: <%d@storm>\r\n\r\n" % number
                    sends.append(smtp.deliver(message, sender=SENDER, recipients=mine))
            deliveries = await asyncio.gather(*sends)
            await smtp.aclose()

            taken = Counter[tuple[str, str]]()
            for one in server.messages:
                taken.update((faults.name_of(one), who) for who in one.recipients)
            ends = Counter[str]()
            for delivery in deliveries:
                name = next(word.decode() for word in delivery.message.split() if word.endswith(b"@storm>"))
                for who, outcome in delivery.outcomes.items():
                    copies = taken.pop((name, who), 0)
                    ends[outcome.status.name] += 1
                    if who.startswith("never"):
                        assert (outcome.status, copies) == (Status.REFUSED, 0), who
                        assert outcome.reply is not None
                        assert outcome.reply.code == 550
                    elif outcome.status is Status.UNCERTAIN:
                        assert mode == "raise"
                        assert copies <= 1, who
                    else:
                        assert outcome.status is Status.ACCEPTED, (who, outcome)
                        assert copies == 1 or (copies > 1 and outcome.uncertain and mode == "resend"), who
            assert not taken, "somebody got what was not sent to him"
            assert ends.total() == sum(len(delivery.outcomes) for delivery in deliveries) > MANY
            assert lightning.struck["before"] > 20
            assert lightning.struck["after"] > 5
            assert (ends["UNCERTAIN"] > 0) == (mode == "raise")
            assert server.connections > 25

    virtual.run(scenario())
