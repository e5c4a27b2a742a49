"""What pytest finds by itself where smtpretry is installed: `smtp_server` and `no_wait`, in projects of others."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

BLOCKING = """
    import smtplib, pytest, smtpretry

    def test_blocking(smtp_server, no_wait):
        smtp_server.on("RCPT", "bob@*", "450 4.2.0 retry in 30 seconds", times=1)
        with smtpretry.Blocking(smtp_server.client, no_wait) as smtp:
            smtp.sendmail("app@example.com", ["bob@example.com"], b"Subject: hello\\r\\n\\r\\n")
        assert len(smtp_server.received("bob@example.com")) == 1
        assert no_wait.waits == [30.0]

    def test_each_has_its_own(smtp_server, no_wait):
        assert smtp_server.messages == no_wait.waits == []

    @pytest.mark.smtp_server(tls=True, auth=("app", "secret"))
    class TestMarked:
        def test_of_the_class(self, smtp_server):
            with smtplib.SMTP(smtp_server.hostname, smtp_server.port) as client:
                client.starttls(context=smtp_server.tls_context)
                client.login("app", "secret")

        @pytest.mark.smtp_server(auth=("me", "mine"))
        def test_of_the_nearest(self, smtp_server):
            assert (smtp_server.credentials, smtp_server.tls) == ({"me": "mine"}, True)
"""
ASYNCHRONOUS = """
    import asyncio, smtpretry

    def test_asynchronous(smtp_server, no_wait):
        async def scenario():
            smtp_server.on("MAIL", "451 4.3.0 later", times=1)
            async with smtpretry.RetryingSMTP(smtp_server.client(), no_wait) as smtp:
                await smtp.sendmail("app@example.com", ["bob@example.com"], b"Subject: hello\\r\\n\\r\\n")
                smtp_server.disconnect("421 4.3.2 restarting")
                await smtp.sendmail("app@example.com", ["bob@example.com"], b"Subject: hello\\r\\n\\r\\n")
                port = smtp_server.port
                await smtp_server.stop()
                await smtp_server.start()
                assert smtp_server.port == port
                await smtp.sendmail("app@example.com", ["bob@example.com"], b"Subject: hello\\r\\n\\r\\n")
        asyncio.run(scenario())
        assert len(smtp_server.messages) == 3
"""


@pytest.mark.parametrize(("body", "passed"), [(BLOCKING, 4), (ASYNCHRONOUS, 1)], ids=["blocking", "asynchronous"])
def test_fixtures_are_found(pytester: pytest.Pytester, body: str, passed: int) -> None:
    """The fixtures serve blocking and asynchronous tests, with markers for TLS and AUTH, and need no import."""
    pytester.makepyfile(body)
    pytester.runpytest_subprocess("-W", "error", "--strict-markers").assert_outcomes(passed=passed)


def test_a_script_that_was_not_reached_fails(pytester: pytest.Pytester) -> None:
    """What the server was told and never did is an error at the end of the test."""
    pytester.makepyfile("def test(smtp_server): smtp_server.on('RCPT', '450 4.2.0 later', times=1)")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*scripts that were not reached*"])


def test_an_error_of_the_test_itself_stands_alone(pytester: pytest.Pytester) -> None:
    """A test that failed, was skipped or fails as expected before a script was reached is not an error besides."""
    pytester.makepyfile("""
        import pytest

        @pytest.mark.parametrize("how", [pytest.fail, pytest.skip, pytest.xfail])
        def test(smtp_server, how):
            smtp_server.on("RCPT", "450 4.2.0 later", times=1)
            how("early")

        @pytest.fixture
        def greylisting(smtp_server):
            smtp_server.on("RCPT", "450 4.2.0 later", times=1)

        @pytest.fixture
        def database(greylisting):
            pytest.skip("there is none")

        def test_of_both(database):
            pass
    """)
    pytester.runpytest_subprocess().assert_outcomes(failed=1, skipped=2, xfailed=1)


def test_a_marker_without_names_is_an_error(pytester: pytest.Pytester) -> None:
    """What would have no effect is told."""
    pytester.makepyfile("import pytest\n@pytest.mark.smtp_server('required')\ndef test(smtp_server): pass")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*the marker smtp_server takes names, such as smtp_server(tls=True), not 'required'"])


def test_nothing_is_imported_where_they_are_not_used(pytester: pytest.Pytester) -> None:
    """A run that uses neither fixture imports neither the server nor what it needs, such as aiosmtpd."""
    pytester.makepyfile("""
        import sys

        def test_other(tmp_path):
            assert "smtpretry.testing.plugin" in sys.modules
            assert not {"aiosmtpd", "trustme", "smtpretry.testing.server", "smtpretry.testing.waits"} & sys.modules.keys()
    """)
    pytester.runpytest_subprocess().assert_outcomes(passed=1)
