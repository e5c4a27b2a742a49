"""Through Exim: what a delivery says of each recipient is what the mailbox on the server shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mta
import pytest
from mta import PASSWORD, Exim, require
from rows import ANN, AWAY, BEN, GHOST, PEOPLE, Case, check

from smtpretry import NO_REPLY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from smtpretry import RetryingSMTP

IN_THE_CLEAR = {"start_tls": False}
NOBODY = {"username": None, "password": None}
OK = "250 OK id="
BROKEN_ONCE = "${if bool{ONCE}{${readfile{/no/such/file}}}{RIGHT_PASSWORD}}"

CASES = tuple(
    Case(program="exim", **row)
    for row in (
        {"name": "plain", "says": (OK,)},
        {"name": "in-the-clear", "client": IN_THE_CLEAR, "says": (OK,)},
        {"name": "many-at-once", "recipients": PEOPLE, "messages": 3, "says": (OK, OK, OK)},
        {
            "name": "many-one-at-a-time",
            "settings": {"pipelining_advertise_hosts": ""},
            "recipients": PEOPLE,
            "messages": 3,
            "says": (OK, OK, OK),
        },
        {
            "name": "unknown-recipient",
            "recipients": (ANN, GHOST, BEN),
            "says": ("550 Unrouteable address", OK),
            "refused": {GHOST: 550},
        },
        {
            "name": "nobody-known",
            "recipients": (GHOST, f"other-{GHOST}"),
            "messages": 6,
            "says": ["550 Unrouteable address"] * 12,
            "refused": {GHOST: 550, f"other-{GHOST}": 550},
        },
        {
            "name": "sender-refused",
            "settings": {"acl_smtp_mail": "deny message = 5.7.1 we know you"},
            "messages": 2,
            "says": ("550 5.7.1 we know you", "550 5.7.1 we know you"),
            "refused": {ANN: 550, BEN: 550},
        },
        {
            "name": "sender-deferred",
            "settings": {"acl_smtp_mail": "defer condition = ONCE"},
            "says": ("451 ", OK),
        },
        {
            "name": "second-sender-deferred",  # every command that was sent ahead counts as an error
            "settings": {"acl_smtp_mail": "accept condition = ONCE\n  defer condition = AGAIN"},
            "recipients": PEOPLE,
            "messages": 2,
            "says": (OK, "451 ", OK),
        },
        {
            "name": "first-recipient-deferred",
            "settings": {"acl_smtp_rcpt": "defer message = 4.2.0 Greylisted, try again\ncondition = ONCE"},
            "recipients": PEOPLE,
            "says": ("451 4.2.0 Greylisted", OK, OK),
        },
        {
            "name": "last-recipient-deferred",
            "settings": {"acl_smtp_rcpt": "defer local_parts = eve\ncondition = ONCE"},
            "recipients": PEOPLE,
            "says": ("451 ", OK, OK),
        },
        {
            "name": "only-recipient-deferred",
            "settings": {"acl_smtp_rcpt": "defer condition = ONCE"},
            "recipients": (ANN,),
            "says": ("451 ", OK),
        },
        {
            "name": "data-deferred",
            "settings": {"acl_smtp_predata": "defer condition = ONCE"},
            "says": ("451 ", OK),
        },
        {
            "name": "data-refused",
            "settings": {"acl_smtp_predata": "deny message = 5.7.1 no thanks"},
            "messages": 2,
            "says": ("550 5.7.1 no thanks", "550 5.7.1 no thanks"),
            "refused": {ANN: 550, BEN: 550},
        },
        {
            "name": "body-deferred",
            "settings": {"acl_smtp_data": "defer condition = ONCE"},
            "says": ("354 ", "451 ", OK),
        },
        {
            "name": "body-refused",
            "settings": {"acl_smtp_data": "deny message = 5.7.1 no thanks"},
            "messages": 2,
            "says": ("354 ", "550 5.7.1 no thanks", "354 ", "550 5.7.1 no thanks"),
            "refused": {ANN: 550, BEN: 550},
        },
        {
            "name": "hangs-up-on-one-recipient",
            "settings": {"acl_smtp_rcpt": "drop local_parts = ghost\nmessage = we hang up on ghosts"},
            "recipients": (ANN, GHOST, BEN),
            "says": ("550 we hang up on ghosts", OK),
            "refused": {GHOST: 550},
        },
        {
            "name": "busy-at-the-first-connection",
            "settings": {"acl_smtp_connect": "defer message = 4.3.2 busy\ncondition = ONCE"},
            "says": ("451 4.3.2 busy", OK),
        },
        {
            "name": "one-message-a-connection",  # 421 to the next MAIL, with the connection left open
            "settings": {"smtp_accept_max_per_connection": "1"},
            "messages": 3,
            "says": (OK, "421 too many messages in this connection", OK, "421 too many messages", OK),
        },
        {
            "name": "two-recipients-at-a-time",
            "settings": {"recipients_max": "2"},
            "recipients": PEOPLE,
            "says": ("452 too many recipients", OK, OK, OK),
        },
        {
            "name": "two-recipients-or-nobody",
            "settings": {"recipients_max": "2", "recipients_max_reject": "yes"},
            "recipients": PEOPLE,
            "says": ("552 too many recipients", OK, OK, OK),
        },
        {
            "name": "relay-refused-until-login",
            "recipients": (ANN, AWAY),
            "says": ("550 relay not permitted", "235 ", OK),
        },
        {
            "name": "relay-refused-for-good",
            "recipients": (ANN, AWAY, BEN),
            "says": ("550 relay not permitted", OK),
            "refused": {AWAY: 550},
        }
        | NOBODY,
        {
            "name": "wrong-password",
            "recipients": (AWAY,),
            "password": PASSWORD[::-1],
            "says": ("550 relay not permitted", "535 "),
            "refused": {AWAY: 535},
        },
        {
            "name": "login-broken-for-a-while",
            "settings": {"server_condition": BROKEN_ONCE},
            "recipients": (ANN, AWAY),
            "says": ("550 relay not permitted", "435 ", "235 ", OK),
        },
        {
            "name": "tls-from-the-first-byte",
            "settings": {"tls_on_connect_ports": "THIS_PORT"},
            "client": {"use_tls": True},
            "says": (OK,),
        },
        {
            "name": "too-big",
            "settings": {"message_size_limit": "2000"},
            "text": "Hello.\n" * 500,
            "says": ("250-SIZE 2000",),
            "refused": {ANN: NO_REPLY, BEN: NO_REPLY},
        },
        {
            "name": "too-big-for-a-limit-that-is-not-said",
            "settings": {
                "acl_smtp_mail": "deny message = 552 too big\n  condition = ${if >{$message_size}{2000}}",
            },
            "text": "Hello.\n" * 500,
            "says": ("552 too big",),
            "refused": {ANN: 552, BEN: 552},
        },
        {
            "name": "closed-when-idle",
            "settings": {"smtp_receive_timeout": "1s"},
            "messages": 2,
            "pause": 1.5,
            "says": (OK, "421 ", OK),
        },
    )
)


@pytest.fixture
def server(case: Case, certificate: bytes) -> Iterator[Exim]:
    """Run an Exim with the row's service."""
    require(Exim)
    with mta.workplace() as directory, Exim(directory / "exim", case, (*PEOPLE, AWAY), certificate) as running:
        yield running


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_recipient_ends_as_the_mailbox_on_the_server_shows(
    case: Case, server: Exim, new_client: Callable[[], RetryingSMTP]
) -> None:
    """Whoever the delivery calls accepted has one copy in the mailbox, whoever it calls refused has none."""
    check(case, server, new_client)


@pytest.mark.parametrize(
    ("program", "reason"),
    [("/no/such/exim4", "exim4 not installed: .*SMTPRETRY_EXIM"), ("false", "exim4 not started: ")],
)
def test_an_exim_that_is_missing_or_broken_is_named(program: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tests fail with the reason where it was promised, whether it is not there or does not run."""
    monkeypatch.setenv("SMTPRETRY_REQUIRE_MTA", "1")
    monkeypatch.setenv("SMTPRETRY_EXIM", program)
    with pytest.raises(pytest.fail.Exception, match=f"^{reason}"):
        require(Exim)
