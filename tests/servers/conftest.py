"""What the tests with real servers share: a certificate, and clients that trust it."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import aiosmtplib
import pytest
import trustme

from smtpretry import RetryingSMTP

if TYPE_CHECKING:
    from collections.abc import Callable

    from mta import MailServer
    from rows import Case


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """Sign the servers' certificate, and be trusted by the clients."""
    return trustme.CA()


@pytest.fixture(scope="session")
def certificate(authority: trustme.CA) -> bytes:
    """Make the servers' certificate, with its key."""
    return authority.issue_cert("localhost").private_key_and_cert_chain_pem.bytes()


@pytest.fixture
def new_client(case: Case, server: MailServer, authority: trustme.CA) -> Callable[[], RetryingSMTP]:
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
