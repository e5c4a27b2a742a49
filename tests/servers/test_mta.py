"""Through real servers: what a delivery says of each recipient is what the recipient's mailbox there shows."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from dataclasses import dataclass, field
from datetime import timedelta
from email.message import EmailMessage
from email.utils import make_msgid
from typing import TYPE_CHECKING, Any

import aiosmtplib
import mta
import pytest
import tenacity
import trustme
from mta import PASSWORD, USERNAME, Aiosmtpd, Dovecot, Postfix, Postgrey, Server, Service, require

from smtpretry import RetryingSMTP, RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from smtpretry import Delivery

ANN, BEN, CAT, DAN, EVE = PEOPLE = tuple(f"{name}@{mta.HOME}" for name in ("ann", "ben", "cat", "dan", "eve"))
GHOST = f"ghost@{mta.HOME}"  # has no mailbox
AWAY = "zoe@away.test"  # of another domain: a relay

SOON = timedelta(seconds=20)  # the last attempt: no rule's longer wait fits in before it
EACH_SECOND = RetryPolicy(wait=tenacity.wait_fixed(1), give_up_after=SOON)
TWICE = RetryPolicy(wait=tenacity.wait_fixed(0.1), give_up_after=SOON, max_attempts=2)
AFTER_THE_GREYLIST = RetryPolicy(wait=tenacity.wait_fixed(3), give_up_after=SOON, max_attempts=2)

GREYLIST = "check_policy_service unix:private/postgrey"
SAY_530 = "check_recipient_access static:{530 5.7.0 Authentication required}"
LOGIN = {"smtpd_sasl_auth_enable": "yes"}
ASKING_FOR_LOGIN = LOGIN | {"smtpd_recipient_restrictions": f"permit_sasl_authenticated, {SAY_530}"}
SUBMISSION = LOGIN | {  # as in the master.cf that comes with Postfix
    "smtpd_tls_security_level": "encrypt",
    "smtpd_relay_restrictions": "",
    "smtpd_recipient_restrictions": "permit_sasl_authenticated, reject",
}
MILTER_DOWN = {"smtpd_milters": "unix:private/nobody-listens-here"}


@dataclass(frozen=True, kw_only=True)
class Case(Service):
    """A row: a service of a server, what is sent to it, what it says on the way, and who gets no copy."""

    helpers: tuple[str, ...] = ()  # fixtures: the servers that this service asks
    client: Mapping[str, Any] = field(default_factory=dict)  # arguments of aiosmtplib.SMTP
    username: str | None = USERNAME
    password: str | None = PASSWORD
    policy: RetryPolicy = EACH_SECOND
    clients: int = 1  # one after the other
    messages: int = 1  # from each client
    pause: float = 0.0  # seconds between them
    outage: str = ""  # what the log has to say before the helpers, stopped for the while, are started again
    connected: bool = False  # before the outage
    text: str = "Hello."
    recipients: tuple[str, ...] = (ANN, BEN)
    says: tuple[str, ...]  # patterns, each of a reply, in this order; there may be others in between
    refused: Mapping[str, int] = field(default_factory=dict)  # who, and with which code; everybody else is accepted


CASES = (
    Case(
        name="greylisted",
        settings={"smtpd_recipient_restrictions": GREYLIST},
        helpers=("postgrey",),
        policy=AFTER_THE_GREYLIST,
        says=("450 4.2.0 .*Greylisted, see", "250 2.0.0 Ok: queued"),
    ),
    Case(
        name="greylisted-for-as-long-as-it-says",
        settings={"smtpd_recipient_restrictions": f"{GREYLIST}-with-a-hint"},
        helpers=("postgrey_with_a_hint",),
        policy=TWICE,
        says=("450 4.2.0 .*Greylisted for 2 seconds", "250 2.0.0 Ok: queued"),
    ),
    Case(
        name="greylisted-after-the-body",  # which leaves the transaction open
        settings={"smtpd_end_of_data_restrictions": GREYLIST},
        helpers=("postgrey",),
        recipients=(ANN,),
        policy=AFTER_THE_GREYLIST,
        says=("450 4.2.0 .*Greylisted, see", "250 2.0.0 Ok: queued"),
    ),
    Case(
        name="starttls-then-login-then-greylisted",
        settings=SUBMISSION
        | {"smtpd_recipient_restrictions": f"{GREYLIST}, permit_sasl_authenticated, {SAY_530}, reject"},
        helpers=("dovecot", "postgrey"),
        client={"start_tls": False},
        policy=AFTER_THE_GREYLIST,
        says=(
            "530 5.7.0 Must issue a STARTTLS command first",
            "530 5.7.0 .*Authentication required",
            "235 2.7.0",
            "450 4.2.0 .*Greylisted",
            "250 2.0.0 Ok: queued",
        ),
    ),
    Case(
        name="submission",
        settings=SUBMISSION,
        helpers=("dovecot",),
        client={"start_tls": False},
        recipients=(ANN, AWAY),
        says=("530 5.7.0 Must issue a STARTTLS command first", "554 5.7.1 .*Access denied", "235 2.7.0", "250 2.0.0"),
    ),
    Case(
        name="submission-that-refuses-the-host",
        settings=SUBMISSION | {"smtpd_client_restrictions": "permit_sasl_authenticated, reject"},
        helpers=("dovecot",),
        says=("554 5.7.1 .*Client host rejected: Access denied", "235 2.7.0", "250 2.0.0 Ok: queued"),
    ),
    Case(
        name="submission-without-credentials",
        settings=SUBMISSION,
        helpers=("dovecot",),
        username=None,
        password=None,
        says=("554 5.7.1 .*Access denied",),
        refused={ANN: 554, BEN: 554},
    ),
    Case(
        name="submission-with-the-wrong-password",
        settings=SUBMISSION,
        helpers=("dovecot",),
        password=PASSWORD[::-1],
        says=("554 5.7.1 .*Access denied", "535 5.7.8"),
        refused={ANN: 535, BEN: 535},
    ),
    Case(
        name="tls-from-the-first-byte",
        settings=SUBMISSION | {"smtpd_tls_wrappermode": "yes"},
        helpers=("dovecot",),
        client={"use_tls": True},
        says=("554 5.7.1 .*Access denied", "235 2.7.0", "250 2.0.0 Ok: queued"),
    ),
    Case(
        name="login-offered-only-after-an-optional-starttls",
        settings=ASKING_FOR_LOGIN,
        helpers=("dovecot",),
        says=(
            "220 2.0.0 Ready to start TLS",
            "530 5.7.0 .*Authentication required",
            "235 2.7.0",
            "250 2.0.0 Ok: queued",
        ),
    ),
    Case(
        name="login-offered-only-after-a-starttls-that-was-not-asked-for",
        settings=ASKING_FOR_LOGIN,
        helpers=("dovecot",),
        client={"start_tls": False},
        says=(
            "530 5.7.0 .*Authentication required",
            "220 2.0.0 Ready to start TLS",
            "235 2.7.0",
            "250 2.0.0 Ok: queued",
        ),
    ),
    Case(
        name="relay-deferred-until-login",
        settings=LOGIN | {"smtpd_relay_restrictions": "permit_sasl_authenticated, defer_unauth_destination"},
        helpers=("dovecot",),
        recipients=(ANN, AWAY),
        says=("454 4.7.1 .*Relay access denied", "235 2.7.0", "250 2.0.0 Ok: queued"),
    ),
    Case(
        name="relay-refused-until-login",
        settings=LOGIN | {"smtpd_relay_restrictions": "permit_sasl_authenticated, reject_unauth_destination"},
        helpers=("dovecot",),
        recipients=(ANN, AWAY),
        says=("554 5.7.1 .*Relay access denied", "235 2.7.0", "250 2.0.0 Ok: queued"),
    ),
    Case(
        name="relay-refused-for-good",
        recipients=(ANN, AWAY),
        says=("554 5.7.1 .*Relay access denied", "250 2.0.0 Ok: queued"),
        refused={AWAY: 554},
    ),
    Case(
        name="unknown-recipient",
        recipients=(ANN, GHOST, BEN),
        says=("550 5.1.1 .*User unknown", "250 2.0.0 Ok: queued"),
        refused={GHOST: 550},
    ),
    Case(
        name="two-recipients-at-a-time",
        settings={"smtpd_recipient_limit": "2"},
        recipients=PEOPLE,
        says=("452 4.5.3", *["250 2.0.0 Ok: queued"] * 3),
    ),
    Case(
        name="one-message-every-other-second",
        settings={"smtpd_client_message_rate_limit": "1"},
        messages=2,
        says=("250 2.0.0 Ok: queued", "450 4.7.1 .*too much mail", "250 2.0.0 Ok: queued"),
    ),
    Case(
        name="one-connection-every-other-second",
        settings={"smtpd_client_connection_rate_limit": "1"},
        clients=2,
        says=("250 2.0.0 Ok: queued", "421 4.7.0 .*too many connections", "250 2.0.0 Ok: queued"),
    ),
    Case(
        name="closed-when-idle",
        settings={"smtpd_timeout": "1s"},
        messages=2,
        pause=1.5,
        says=("250 2.0.0 Ok: queued", "421 4.4.2", "250 2.0.0 Ok: queued"),
    ),
    Case(
        name="milter-down",
        settings=MILTER_DOWN,
        client={"start_tls": False},
        policy=TWICE,
        says=("451 4.7.1", "451 4.7.1"),
        refused={ANN: 451, BEN: 451},
    ),
    Case(
        name="milter-down-before-a-starttls-that-has-to-be",
        settings=MILTER_DOWN,
        client={"start_tls": True},
        policy=TWICE,
        says=("454 4.3.0 Try again later", "454 4.3.0 Try again later"),
        refused={ANN: 454, BEN: 454},
    ),
    Case(
        name="too-big",
        settings={"message_size_limit": "2000"},
        text="Hello.\n" * 500,
        says=("552 5.3.4",),
        refused={ANN: 552, BEN: 552},
    ),
    Case(
        name="postscreen",
        program="postscreen",
        policy=TWICE,
        says=("450 4.3.2 Service currently unavailable",),  # for as long as the connection lasts
    ),
    Case(
        name="dovecot-stopped-before-a-session",
        settings=SUBMISSION | {"smtpd_tls_auth_only": "no"},
        helpers=("dovecot",),
        outage="fatal: no SASL authentication mechanisms",  # and it hangs up before the banner
        says=("235 2.7.0", "250 2.0.0 Ok: queued"),
    ),
    Case(
        name="dovecot-stopped-during-a-session",
        settings=SUBMISSION,
        helpers=("dovecot",),
        outage="454 4.7.0 Temporary",
        connected=True,
        says=("454 4.7.0 Temporary authentication failure", "235 2.7.0", "250 2.0.0 Ok: queued"),
    ),
    Case(
        name="aiosmtpd",
        program="aiosmtpd",
        settings={"auth_required": True},
        says=(
            "220 Ready to start TLS",
            "530 5.7.0 Authentication required",
            "235 2.7.0 Authentication successful",
            "250 OK",
        ),
    ),
    Case(
        name="aiosmtpd-that-wants-starttls",
        program="aiosmtpd",
        settings={"auth_required": True, "require_starttls": True},
        client={"start_tls": False},
        recipients=(ANN, AWAY),
        says=(
            "530 Must issue a STARTTLS command first",
            "530 5.7.0 Authentication required",
            "235 2.7.0 Authentication successful",
            "250 OK",
        ),
    ),
    Case(
        name="aiosmtpd-with-the-wrong-password",
        program="aiosmtpd",
        settings={"auth_required": True, "require_starttls": True},
        password=PASSWORD[::-1],
        says=("530 5.7.0 Authentication required", "535 5.7.8 Authentication credentials invalid"),
        refused={ANN: 535, BEN: 535},
    ),
)


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """Sign the servers' certificate, and be trusted by the clients."""
    return trustme.CA()


@pytest.fixture(scope="session")
def certificate(authority: trustme.CA) -> bytes:
    """Make the servers' certificate, with its key."""
    return authority.issue_cert("localhost").private_key_and_cert_chain_pem.bytes()


@pytest.fixture(scope="session")
def postfix(certificate: bytes) -> Iterator[Postfix]:
    """Run one Postfix, with a service for each row of its own."""
    require(Postfix)
    services = [case for case in CASES if case.program != "aiosmtpd"]
    with mta.workplace() as directory, Postfix(directory / "postfix", services, (*PEOPLE, AWAY), certificate) as server:
        yield server


@pytest.fixture(scope="session")
def dovecot(postfix: Postfix) -> Iterator[Dovecot]:
    """Run the keeper of the password."""
    require(Dovecot)
    with Dovecot(postfix) as server:
        yield server


@pytest.fixture(scope="session")
def postgrey(postfix: Postfix) -> Iterator[Postgrey]:
    """Run a greylist that speaks as most do."""
    require(Postgrey)
    with Postgrey(postfix) as server:
        yield server


@pytest.fixture(scope="session")
def postgrey_with_a_hint(postfix: Postfix) -> Iterator[Postgrey]:
    """Run a greylist that says how long it takes."""
    require(Postgrey)
    with Postgrey(postfix, "postgrey-with-a-hint", "--greylist-text=Greylisted for %s seconds") as server:
        yield server


@pytest.fixture
def helpers(case: Case, request: pytest.FixtureRequest) -> list[Server]:
    """Run the servers that the row's own asks."""
    return [request.getfixturevalue(name) for name in case.helpers]


@pytest.fixture
def server(
    case: Case, certificate: bytes, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Postfix | Aiosmtpd]:
    """Run the server that offers the row's service."""
    if case.program == "aiosmtpd":
        with Aiosmtpd(tmp_path / "aiosmtpd", case, certificate) as running:
            yield running
    else:
        yield request.getfixturevalue("postfix")


@pytest.fixture
def new_client(case: Case, server: Postfix | Aiosmtpd, authority: trustme.CA) -> Callable[[], RetryingSMTP]:
    """Give what makes the row's client."""
    tls_context = ssl.create_default_context()
    authority.configure_trust(tls_context)

    def wrapped() -> RetryingSMTP:
        client = aiosmtplib.SMTP(
            hostname="localhost",
            port=server.port(case.name),
            local_hostname="client.test",
            tls_context=tls_context,
            timeout=10,
            **case.client,
        )
        return RetryingSMTP(client, case.policy, username=case.username, password=case.password)

    return wrapped


@contextlib.contextmanager
def stopped(servers: list[Server]) -> Iterator[None]:
    """Stop these servers for as long as the block runs."""
    for server in servers:
        server.stop()
    try:
        yield
    finally:
        for server in servers:
            server.start()


def mail(case: Case) -> EmailMessage:
    """Make a message of the row; its sender is the row's own, so that a greylist has not seen it before."""
    message = EmailMessage()
    message["From"] = f"{case.name}@sender.test"
    message["To"] = ", ".join(case.recipients)
    message["Message-ID"] = make_msgid(domain="sender.test")
    message.set_content(case.text)
    return message


def assert_outcome(case: Case, server: Postfix | Aiosmtpd, message: EmailMessage, delivery: Delivery) -> None:
    """Compare what the delivery says and what the mailboxes hold with what the row expects."""
    expected = [recipient for recipient in case.recipients if recipient not in case.refused]
    assert sorted(delivery.accepted) == sorted(expected)
    assert {recipient: reply.code for recipient, reply in delivery.refused.items()} == case.refused
    copies = {recipient: server.copies(recipient, message["Message-ID"]) for recipient in case.recipients}
    assert copies == {recipient: int(recipient in expected) for recipient in case.recipients}


def assert_said(case: Case, server: Postfix | Aiosmtpd) -> None:
    """Find the row's replies in the server's own log, in their order."""
    replies = server.replies(case.name)
    rest = iter(replies)
    for pattern in case.says:
        assert any(re.match(pattern, reply) for reply in rest), f"no {pattern!r} in its place among {replies}"


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_recipient_ends_as_the_mailbox_on_the_server_shows(
    case: Case, server: Postfix | Aiosmtpd, helpers: list[Server], new_client: Callable[[], RetryingSMTP]
) -> None:
    """Whoever the delivery calls accepted has one copy in the mailbox, whoever it calls refused has none."""

    async def deliver(smtp: RetryingSMTP, message: EmailMessage) -> Delivery:
        if not case.outage:
            return await smtp.deliver(message)
        if case.connected:
            await smtp.connect()
        with stopped(helpers):
            sending = asyncio.create_task(smtp.deliver(message))
            await asyncio.to_thread(mta.wait_until, lambda: server.has_logged(case.name, case.outage), case.outage)
        return await sending

    async def send() -> list[tuple[EmailMessage, Delivery]]:
        sent = []
        for _ in range(case.clients):
            async with new_client() as smtp:
                for number in range(case.messages):
                    await asyncio.sleep(case.pause if number else 0)
                    message = mail(case)
                    sent.append((message, await deliver(smtp, message)))
        return sent

    for message, delivery in asyncio.run(asyncio.wait_for(send(), 60)):
        assert_outcome(case, server, message, delivery)
    assert_said(case, server)


@pytest.mark.parametrize(("promised", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_server_that_is_missing_is_named(
    promised: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a server its tests are skipped with its name, and they fail where it was promised."""
    monkeypatch.setenv("SMTPRETRY_REQUIRE_MTA", promised)
    monkeypatch.setattr(Postgrey, "program", "no-such-server")
    with pytest.raises(outcome, match=r"^no-such-server not installed"):
        require(Postgrey)
