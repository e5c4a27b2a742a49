"""Through Postfix and aiosmtpd: what a delivery says of each recipient is what the mailbox on the server shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mta
import pytest
from mta import PASSWORD, Aiosmtpd, Dovecot, Postfix, Postgrey, require
from rows import AFTER_THE_GREYLIST, ANN, AWAY, BEN, GHOST, PEOPLE, TWICE, Case, check

from smtpretry import NO_REPLY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mta import MailServer, Server

    from smtpretry import RetryingSMTP

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
        says=("250-SIZE 2000",),
        refused={ANN: NO_REPLY, BEN: NO_REPLY},
    ),
    Case(
        name="too-big-for-a-limit-that-is-not-said",
        settings={"message_size_limit": "2000", "smtpd_discard_ehlo_keywords": "size"},
        text="Hello.\n" * 500,
        says=("354 ", "552 5.3.4"),
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
def server(case: Case, certificate: bytes, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MailServer]:
    """Run the server that offers the row's service."""
    if case.program == "aiosmtpd":
        with Aiosmtpd(tmp_path / "aiosmtpd", case, certificate) as running:
            yield running
    else:
        yield request.getfixturevalue("postfix")


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_recipient_ends_as_the_mailbox_on_the_server_shows(
    case: Case, server: MailServer, helpers: list[Server], new_client: Callable[[], RetryingSMTP]
) -> None:
    """Whoever the delivery calls accepted has one copy in the mailbox, whoever it calls refused has none."""
    check(case, server, new_client, helpers)


@pytest.mark.parametrize(("promised", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_server_that_is_missing_is_named(
    promised: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a server its tests are skipped with its name, and they fail where it was promised."""
    monkeypatch.setenv("SMTPRETRY_REQUIRE_MTA", promised)
    monkeypatch.setattr(Postgrey, "program", "no-such-server")
    with pytest.raises(outcome, match=r"^no-such-server not installed"):
        require(Postgrey)
