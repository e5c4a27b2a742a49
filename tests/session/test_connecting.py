"""Which address is connected to, over which client, with which TLS; and that nothing of it stays open."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiosmtplib
import pytest
import trustme
import virtual
from support import ANN, APP, BOB, BODY, ca_bundle, once, patient, talk, virtually
from test_login import LoopbackSix, six

from smtpretry import RetryingSMTP, RetryPolicy, Status
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "mx.example"
Where = tuple[str, int]


class Second(ScriptedServer):
    """A server on another address."""

    hostname = "127.0.0.2"  # type: ignore[misc]


class Mute:
    """A server that accepts connections and says nothing."""

    async def __aenter__(self) -> Where:
        """Listen on an address of its own."""
        self.server = await asyncio.start_server(self.hold, "127.0.0.3", 0)
        self.writers = list[asyncio.StreamWriter]()
        where: Where = self.server.sockets[0].getsockname()
        return where

    def hold(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Keep it open."""
        self.writers.append(writer)

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        for writer in self.writers:
            writer.transport.abort()
        self.server.close()


def resolve(monkeypatch: pytest.MonkeyPatch, *addresses: Where) -> None:
    """Let the name have these addresses."""
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host != NAME:
            return real(host, port, *args, **kwargs)
        found = []
        for address, its_port in addresses:
            kind = (
                (socket.AF_INET6, (address, its_port, 0, 0))
                if ":" in address
                else (socket.AF_INET, (address, its_port))
            )
            found.append((kind[0], socket.SOCK_STREAM, 6, "", kind[1]))
        return found

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def where(server: ScriptedServer) -> Where:
    """Where it listens."""
    return server.hostname, server.port


def closed_port() -> Where:
    """Return where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.4", 0))
        address: Where = sock.getsockname()
        return address


def client(**options: Any) -> aiosmtplib.SMTP:
    """Return a client for the name."""
    return aiosmtplib.SMTP(**({"hostname": NAME, "port": 25, "local_hostname": "client.example"} | options))


FIRST: dict[str, Callable[[ScriptedServer], object]] = {
    "554": lambda server: server.on("CONNECT", "554 5.7.1 No SMTP service here", close=True),
    "450": lambda server: server.on("CONNECT", "450 4.3.2 later"),
    "421": lambda server: server.on("CONNECT", "421 4.3.2 busy"),
    "stall": lambda server: server.fail_at("CONNECT", "stall"),
    "fin": lambda server: server.fail_at("CONNECT", "fin"),
    "rst": lambda server: server.fail_at("CONNECT", "rst"),
    "garbage": lambda server: server.fail_at("CONNECT", "garbage"),
    "half": lambda server: server.fail_at("CONNECT", "half"),
}


@pytest.mark.parametrize("what", FIRST)
@pytest.mark.parametrize("tls", [False, "implicit"])
@virtually
async def test_an_address_that_does_not_greet_is_skipped(
    what: str, monkeypatch: pytest.MonkeyPatch, *, tls: Any
) -> None:
    """The next address is tried at once, in the same attempt, and is the first one from then on (RFC 5321 §5.1)."""
    async with ScriptedServer(tls=tls) as bad, Second(tls=tls) as good:
        FIRST[what](bad)
        resolve(monkeypatch, where(bad), where(good))
        one = client(use_tls=bool(tls), validate_certs=False)
        async with RetryingSMTP(one, once()) as smtp:
            for number in (1, 2):
                assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
                assert (bad.connections, good.connections) == (1, number)
                await smtp.quit()


@virtually
async def test_a_dead_and_a_mute_address_take_their_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 60 seconds for four addresses, two of which are mute, the others are reached after 30."""
    loop = asyncio.get_running_loop()
    async with Mute() as mute, Mute() as mute2, ScriptedServer() as good:
        resolve(monkeypatch, closed_port(), mute, mute2, where(good))
        async with RetryingSMTP(client(), once()) as smtp:
            assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
        assert loop.time() == pytest.approx(40, abs=1)


@virtually
async def test_no_time_out_is_no_reason_to_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client without a time-out gives a mute address five minutes, where there is another."""
    async with Mute() as mute, ScriptedServer() as good:
        resolve(monkeypatch, mute, where(good))
        async with RetryingSMTP(client(timeout=None), once()) as smtp:
            assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
        assert asyncio.get_running_loop().time() == pytest.approx(300, abs=1)


@pytest.mark.skipif(not six(), reason="this machine has no ::1")
@virtually
async def test_the_families_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one address of a family comes one of the other (RFC 8305 §4)."""
    async with AsyncExitStack() as stack:
        sixes = [await stack.enter_async_context(LoopbackSix()) for _ in range(3)]
        four = await stack.enter_async_context(ScriptedServer())
        for server in sixes:
            server.on("CONNECT", "421 4.3.2 busy", optional=True)
        resolve(monkeypatch, *map(where, sixes), where(four))
        async with RetryingSMTP(client(), once()) as smtp:
            assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
        assert [server.connections for server in (*sixes, four)] == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("banners", "code"),
    [
        (["554 5.7.1 first", "554 5.7.1 second"], 554),
        (["554 5.7.1 first", None], 554),
        ([None, "421 4.3.2 second"], 421),
        ([None, None], -1),
    ],
)
@virtually
async def test_where_no_address_works_the_last_reply_says_why(
    banners: list[str | None], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a server said counts more than that another could not be reached."""
    async with ScriptedServer() as first, Second() as second:
        both = (first, second)
        for server, banner in zip(both, banners, strict=True):
            if banner:
                server.on("CONNECT", banner)
        resolve(
            monkeypatch,
            *(where(server) if banner else closed_port() for server, banner in zip(both, banners, strict=True)),
        )
        async with RetryingSMTP(client(), once()) as smtp:
            delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        said = delivery.outcomes[ANN].reply
        assert said is not None
        assert said.code == code
        if code == -1:
            assert "127.0.0.4" in said.text


@pytest.mark.parametrize("source", ["127.0.0.9", "127.0.0.10"])
@virtually
async def test_the_source_address_is_kept(source: str) -> None:
    """`source_address` is what the server sees, on each connection."""
    async with talk(once(), client={"source_address": (source, 0)}) as (server, smtp):
        await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert [session.transport.get_extra_info("peername")[0] for session in server.sessions] == [source]


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({"hostname": "mx..example"}, "hostname="),
        ({"hostname": "x" * 64 + ".example"}, "hostname="),
        ({"hostname": "127.0.0.1", "port": "99999"}, "port="),  # as a number it is refused earlier
    ],
)
@virtually
async def test_where_no_host_can_be_is_final(options: dict[str, Any], cure: str) -> None:
    """What no name and no port can be is told at once."""
    async with RetryingSMTP(client(**options), patient()) as smtp:
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
    assert len(delivery.attempts) == 1
    assert cure in str(delivery.cure)


@virtually
async def test_the_path_of_a_socket_is_named(tmp_path: Path) -> None:
    """Where nothing listens on a path, the path is told."""
    made = aiosmtplib.SMTP(socket_path=str(tmp_path / "mail.sock"))
    async with RetryingSMTP(made, once()) as smtp:
        assert "mail.sock" in str((await smtp.deliver(BODY, sender=APP, recipients=[ANN])).refused[ANN])


@virtually
async def test_a_name_without_an_address() -> None:
    """A name that does not resolve is what aiosmtplib says it is, after the policy's attempts."""
    async with RetryingSMTP(client(hostname="nowhere.invalid"), patient(max_attempts=2)) as smtp:
        with pytest.raises(aiosmtplib.SMTPConnectError, match=r"nowhere\.invalid on port 25") as caught:
            await smtp.sendmail(APP, [ANN], BODY)
        assert len(caught.value.delivery.attempts) == 2


# Clients made by a function


@pytest.mark.parametrize("asynchronous", [False, True])
@virtually
async def test_the_function_is_called_for_each_connection(*, asynchronous: bool) -> None:
    """A client with a socket of its own is made anew after an idle time-out, a 421 and a QUIT."""
    async with ScriptedServer() as server:
        made = list[socket.socket]()

        def make() -> aiosmtplib.SMTP:
            made.append(socket.create_connection(where(server)))
            return aiosmtplib.SMTP(sock=made[-1], local_hostname="client.example")

        async def make_later() -> aiosmtplib.SMTP:
            await asyncio.sleep(1)
            return make()

        async with RetryingSMTP(make_later if asynchronous else make, patient(), idle_timeout=10) as smtp:
            for _ in range(2):
                assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
            await asyncio.sleep(11)
            server.on("MAIL", "421 4.3.2 Shutting down", times=1)
            assert (await smtp.deliver(BODY, sender=APP, recipients=[BOB])).accepted == [BOB]
            await smtp.quit()
            assert (await smtp.deliver(BODY, sender=APP, recipients=[BOB])).accepted == [BOB]
        assert len(made) == server.connections == 4
        assert all(sock.fileno() == -1 for sock in made)


@pytest.mark.parametrize("error", [ConnectionRefusedError("proxy"), OSError("proxy"), TimeoutError("proxy")])
@virtually
async def test_a_factory_without_a_connection_is_tried_again(error: OSError) -> None:
    """What fails for want of a connection is like a refused one: waited for, and told in the end."""
    async with ScriptedServer() as server:
        errors = [error]

        async def make() -> aiosmtplib.SMTP:
            if errors:
                raise errors.pop()
            return server.client()

        async with RetryingSMTP(make, patient()) as smtp:
            delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert delivery.accepted == [ANN]
        assert len(delivery.attempts) == 2
        assert "proxy" in delivery.attempts[0].steps[0].reply.text


@virtually
async def test_a_factory_that_fails_fails_that_send_alone() -> None:
    """Any other error comes out as it is, with the delivery, and the next send works."""
    async with ScriptedServer() as server:
        errors = [KeyError("no such proxy")]

        async def make() -> aiosmtplib.SMTP:
            if errors:
                raise errors.pop()
            return server.client()

        async with RetryingSMTP(make, patient()) as smtp:
            with pytest.raises(KeyError) as caught:
                await smtp.sendmail(APP, [ANN], BODY)
            assert caught.value.delivery.pending == [ANN]  # type: ignore[attr-defined]
            assert (await smtp.deliver(BODY, sender=APP, recipients=[BOB])).accepted == [BOB]


@virtually
async def test_a_factory_that_hangs_is_given_up_on() -> None:
    """A function that makes no client in time is like a server that does not answer."""

    async def make() -> aiosmtplib.SMTP:
        await asyncio.sleep(1e6)
        raise AssertionError

    async with RetryingSMTP(make, once()) as smtp:
        with pytest.raises(aiosmtplib.SMTPConnectError, match="made none"):
            await smtp.sendmail(APP, [ANN], BODY)
    assert asyncio.get_running_loop().time() == pytest.approx(60, abs=1)


# TLS


def other_key(folder: Path) -> tuple[str, str]:
    """Write a certificate, and the key of another one."""
    authority = trustme.CA()
    certificate, key = authority.issue_cert("a.example"), authority.issue_cert("b.example")
    (folder / "cert.pem").write_bytes(certificate.cert_chain_pems[0].bytes())
    (folder / "key.pem").write_bytes(key.private_key_pem.bytes())
    return str(folder / "cert.pem"), str(folder / "key.pem")


BROKEN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "key": lambda folder: dict(zip(("client_cert", "client_key"), other_key(folder), strict=True)),
    "empty bundle": lambda folder: {"cert_bundle": str(_empty(folder))},
    "no bundle": lambda _: {"cert_bundle": "/nowhere.pem"},
    "a folder": lambda folder: {"cert_bundle": str(folder)},
    "a server's context": lambda _: {"tls_context": ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)},
}


def _empty(folder: Path) -> Path:
    file = folder / "empty.pem"
    file.touch()
    return file


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("tls", [True, "implicit"])
@virtually
async def test_trouble_of_this_side_with_tls_is_final(what: str, tmp_path: Path, *, tls: Any) -> None:
    """What no server can change is told at once, with its cause and where to look, under STARTTLS as well."""
    options = {"validate_certs": True} | BROKEN[what](tmp_path)
    async with talk(tls=tls, client=options) as (server, smtp):
        with pytest.raises((OSError, ValueError)) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
        delivery = caught.value.delivery  # type: ignore[union-attr]
        assert len(delivery.attempts) == 1
        assert "TLS settings do not work" in delivery.story(0)
        assert server.messages == []
        await asyncio.sleep(1)
        assert server.open_connections == 0


@pytest.mark.parametrize("tls", [True, "implicit"])
@virtually
async def test_a_certificate_of_an_unknown_authority_names_the_cure(*, tls: Any) -> None:
    """Its own authority is for `cert_bundle` or `tls_context`: the note says so."""
    async with talk(tls=tls, client={"validate_certs": True}) as (_, smtp):
        with pytest.raises((ssl.SSLError, aiosmtplib.SMTPConnectError)) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
    assert "trust its issuer: cert_bundle=, tls_context=" in caught.value.__notes__[0]


@virtually
async def test_starttls_where_none_is_offered_names_the_cure() -> None:
    """What is raised is aiosmtplib's; the note says what to change."""
    async with talk(client={"start_tls": True}) as (server, smtp):
        with pytest.raises(aiosmtplib.SMTPNotSupported, match="STARTTLS") as caught:
            await smtp.sendmail(APP, [ANN], BODY)
    assert "leave start_tls=True (Django: EMAIL_USE_TLS) out" in caught.value.__notes__[0]
    assert server.connections == 1


@pytest.mark.parametrize(
    ("server", "options", "cure"),
    [
        ({}, {"use_tls": True}, "leave it out"),
        ({"tls": True}, {"use_tls": True}, "leave it out"),
    ],
)
@virtually
async def test_tls_to_a_clear_port_is_told_soon(server: Any, options: Any, cure: str) -> None:
    """TLS spoken to a port that speaks none is told after three tries, with the cure, to the next send at once."""
    async with talk(**server, client=options) as (running, smtp):
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert delivery.outcomes[ANN].status is Status.REFUSED
        assert len(delivery.attempts) == running.connections == 3
        assert cure in delivery.story(0)
        assert len((await smtp.deliver(BODY, sender=APP, recipients=[ANN])).attempts) == 1


@pytest.mark.parametrize("said", [b"220 hello\r\n", b"\x15\x03\x01\x00\x02\x02\x46"])
@virtually
async def test_tls_that_has_worked_is_no_mistake(said: bytes) -> None:
    """A port that spoke TLS and for a while speaks something else, as behind a proxy, is waited for."""
    async with talk(tls="implicit") as (server, smtp):
        await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        await smtp.quit()
        port, ends = server.port, asyncio.get_running_loop().time() + 500

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1000)
            writer.write(said)
            writer.close()

        await server.stop()
        async with await asyncio.start_server(serve, server.hostname, port):
            sending = asyncio.create_task(smtp.deliver(BODY, sender=APP, recipients=[BOB]))
            await asyncio.sleep(ends - asyncio.get_running_loop().time())
        await server.start()
        delivery = await sending
        assert delivery.accepted == [BOB]
        assert len(delivery.attempts) > 3
        assert "use_tls=" not in delivery.story(0)


@pytest.mark.parametrize(("said", "attempts"), [("550 5.7.1 Your address is blocked", 2), ("421 4.7.0 Too many", None)])
@virtually
async def test_what_is_said_in_the_clear_on_a_port_of_tls_is_heard(said: str, attempts: int | None) -> None:
    """Some servers refuse a connection before they begin with TLS: that is no wrong port, and 421 is not for ever."""
    async with talk(client={"use_tls": True}) as (server, smtp):
        server.on("CONNECT", said)
        delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert str(delivery.refused[ANN]) == said
        assert len(delivery.attempts) == (attempts or 7)
        assert "leave it out" not in delivery.story(0)


@pytest.mark.parametrize(
    ("alert", "cure"),
    [(40, "no version or cipher"), (70, "no version or cipher"), (48, "client_cert="), (42, "client_cert=")],
)
@pytest.mark.parametrize("implicit", [True, False])
@virtually
async def test_a_server_that_wants_other_tls_is_told_soon(alert: int, cure: str, *, implicit: bool) -> None:
    """An alert that comes again and again is told after three tries, with what to check."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not implicit:
            for said in (b"220 hello\r\n", b"250-hello\r\n250 STARTTLS\r\n", b"220 go\r\n"):
                writer.write(said)
                await reader.read(1000)
        else:
            await reader.read(1000)
        writer.write(b"\x15\x03\x03\x00\x02\x02" + bytes([alert]))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        made = client(hostname="127.0.0.1", port=server.sockets[0].getsockname()[1], use_tls=implicit)
        async with RetryingSMTP(made, patient()) as smtp:
            delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
    assert len(delivery.attempts) == 3
    assert cure in delivery.story(0)


@virtually
async def test_smtp_to_a_port_that_answers_with_tls_is_told_soon() -> None:
    """A TLS alert or handshake where the banner is due is told after three tries, with the cure."""
    for record in (b"\x15\x03\x01\x00\x02\x02\x46", b"\x16\x03\x03\x00\x7a\x02"):
        async with talk() as (server, smtp):
            server.on("CONNECT", record)
            delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
            assert len(delivery.attempts) == server.connections == 3
            assert "use_tls=True" in delivery.story(0)


@virtually
async def test_silence_on_the_port_of_implicit_tls_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server on port 465 that waits for TLS is told after three tries, with the cure."""
    async with Mute() as mute:
        resolve(monkeypatch, mute)
        async with RetryingSMTP(client(port=465), patient()) as smtp:
            delivery = await smtp.deliver(BODY, sender=APP, recipients=[ANN])
        assert len(delivery.attempts) == 3
        assert "use_tls=True" in delivery.story(0)


@virtually
async def test_one_context_for_all_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The TLS context is built once, in a thread, and again where a file of it has changed."""
    built = list[int]()
    real = ssl.create_default_context

    def build(*args: Any, **kwargs: Any) -> ssl.SSLContext:
        built.append(threading.get_ident())
        return real(*args, **kwargs)

    async with ScriptedServer(tls=True) as server:
        bundle = ca_bundle(server, tmp_path)
        monkeypatch.setattr(ssl, "create_default_context", build)
        make = lambda: server.client(cert_bundle=bundle)  # noqa: E731
        async with RetryingSMTP(make, patient(), max_connections=4) as smtp:
            await asyncio.gather(*[smtp.deliver(BODY, sender=APP, recipients=[ANN]) for _ in range(8)])
            assert server.connections == 4
            assert len(built) == 1
            assert built[0] != threading.get_ident()
            await smtp.quit()
            os.utime(bundle, ns=(1, 1))
            await smtp.deliver(BODY, sender=APP, recipients=[ANN])
            assert len(built) == 2
        assert all(mail.tls for mail in server.messages)


# The name of this side


@pytest.mark.parametrize("tls", [False, True, "implicit"])
@virtually
async def test_no_thread_that_comes_free(monkeypatch: pytest.MonkeyPatch, *, tls: Any) -> None:
    """Where the application uses all threads of asyncio.to_thread, a connection takes no longer than its time-outs."""
    monkeypatch.setattr("asyncio.to_thread", lambda *_: asyncio.sleep(10_000))
    client = {"local_hostname": None, "tls_context": None, "validate_certs": False}
    async with talk(once(), client=client, tls=tls) as (server, smtp):
        delivery = await smtp.deliver(BODY, sender=APP, recipients=ANN)
        assert delivery.accepted == ([] if tls else [ANN])
        assert server.commands[:1] == ([] if tls == "implicit" else ["EHLO [127.0.0.1]"])
        assert virtual.clock() - virtual.EPOCH <= 121


@pytest.mark.parametrize("code", [500, 501, 502, 503, 504, 550])
@virtually
async def test_a_server_that_does_not_take_ehlo_is_said_helo(code: int) -> None:
    """Some that know nothing but HELO say that EHLO is out of sequence, or not implemented."""
    async with talk() as (server, smtp):
        server.on("EHLO", f"{code} 5.5.1 what is that?")
        assert await smtp.sendmail(APP, [ANN], BODY) == ({}, "2.0.0 Ok: queued as 1")
        assert [verb for verb in server.verbs if verb in ("EHLO", "HELO")] == ["EHLO", "HELO"]


@virtually
async def test_where_a_log_in_is_wanted_helo_is_no_way_out() -> None:
    """HELO offers none: what is told is what was said to EHLO."""
    async with talk(client={"username": "app", "password": "secret"}, auth=("app", "secret")) as (server, smtp):
        server.on("EHLO", "550 5.7.1 no")
        assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).refused[ANN].code == 550
        assert "HELO" not in server.verbs


@virtually
async def test_where_tls_is_wanted_helo_is_no_way_out() -> None:
    """HELO offers none: it stays at what was said to EHLO."""
    async with talk(client={"start_tls": True}) as (server, smtp):
        server.on("EHLO", "503 5.5.1 not now")
        assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).refused[ANN].text == "not now"
        assert "HELO" not in server.verbs


@pytest.mark.parametrize("name", ["büro-pc", "rechner im büro", "日本", "my_container", "fe80::1%eth0", "10.0.0.5", ""])
@pytest.mark.parametrize(
    "family", [ScriptedServer, pytest.param(LoopbackSix, marks=pytest.mark.skipif(not six(), reason="no ::1"))]
)
@pytest.mark.parametrize("tls", [False, True])
@virtually
async def test_a_host_name_outside_ascii(
    name: str, family: type[ScriptedServer], monkeypatch: pytest.MonkeyPatch, *, tls: bool
) -> None:
    """A host whose name is none for SMTP says its address (RFC 5321 §4.1.3)."""
    monkeypatch.setattr(socket, "getfqdn", lambda: name)
    async with talk(once(), tls=tls, cls=family, client={"local_hostname": None, "validate_certs": False}) as (
        server,
        smtp,
    ):
        assert (await smtp.deliver(BODY, sender=APP, recipients=[ANN])).accepted == [ANN]
        literal = "[IPv6:::1]" if family is LoopbackSix else "[127.0.0.1]"
        assert set(server.commands[:2]) & {f"EHLO {literal}"}


@pytest.mark.parametrize(
    ("name", "said"),
    [("10.0.0.5", "[10.0.0.5]"), ("fe80::1", "[IPv6:fe80::1]"), ("a_b", "a_b"), ("[10.0.0.5]", "[10.0.0.5]")],
)
@virtually
async def test_an_address_for_a_name_is_a_literal(name: str, said: str) -> None:
    """What is given as the name goes as it is, but for an address, which is none."""
    async with talk(client={"local_hostname": name}) as (server, smtp):
        await smtp.sendmail(APP, [ANN], BODY)
        assert server.commands[0] == f"EHLO {said}"


# What stays open


def sockets(port: int) -> list[str]:
    """Return the states of the connections from here to that port."""
    states = []
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        _, _, remote, state, *_ = line.split()
        if int(remote.rpartition(":")[2], 16) == port:
            states.append(state)
    return states


class Stubborn:
    """A TLS server that says 421 at a stage, and from then on neither reads nor closes."""

    def __init__(self, context: ssl.SSLContext, verb: bytes) -> None:
        self.context, self.verb, self.connections = context, verb, 0

    def serve(self, sock: socket.socket) -> None:
        """Talk in a thread."""
        while True:
            try:
                raw, _ = sock.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.talk, args=(raw,), daemon=True).start()

    def talk(self, raw: socket.socket) -> None:
        """Say 421 to that command."""
        held.append(raw)
        try:
            over_tls = self.context.wrap_socket(raw, server_side=True)
            held.append(over_tls)
            over_tls.sendall(b"220 hello\r\n")
            while True:
                command = over_tls.recv(4096)
                if not command:
                    return
                if command.startswith(self.verb):
                    over_tls.sendall(b"421 4.3.2 Shutting down\r\n")
                    return
                over_tls.sendall(b"250 ok\r\n")
        except OSError:
            return


held = list[socket.socket]()  # what a server keeps open


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="Linux alone shows its sockets there")
@pytest.mark.parametrize("verb", [b"EHLO", b"MAIL", b"RCPT", b"QUIT"])
def test_every_socket_is_closed_at_once(verb: bytes) -> None:
    """A TLS peer that says 421 and neither reads nor closes keeps no socket of ours, not for a moment after `aclose`."""
    authority, server_context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server_context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    server = Stubborn(server_context, verb)

    async def scenario(port: int) -> None:
        loop = asyncio.get_running_loop()
        complaints = list[dict[str, Any]]()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        policy = RetryPolicy(max_attempts=1)
        one = aiosmtplib.SMTP(hostname="127.0.0.1", port=port, use_tls=True, tls_context=trusting, local_hostname="x")
        for _ in range(4):
            async with RetryingSMTP(one, policy) as smtp:
                await smtp.deliver(BODY, sender=APP, recipients=[ANN])
            for _ in range(3):
                await asyncio.sleep(0)
            assert [state for state in sockets(port) if state in {"01", "08"}] == []  # ESTABLISHED, CLOSE_WAIT
        assert complaints == []

    with socket.create_server(("127.0.0.1", 0)) as sock:
        threading.Thread(target=server.serve, args=(sock,), daemon=True).start()
        try:
            asyncio.run(scenario(sock.getsockname()[1]))
        finally:
            sock.shutdown(socket.SHUT_RDWR)
            while held:
                held.pop().close()
    assert server.connections >= 4


@pytest.mark.parametrize(
    ("client", "hint"),
    [
        ({"hostname": "nowhere.invalid", "port": 587}, "check hostname="),
        ({"hostname": "127.0.0.1", "port": 1}, "nothing listens there: check hostname= and port="),
        ({"use_tls": True}, "use_tls=True is for port 465"),
    ],
)
@virtually
async def test_the_first_warning_says_what_to_check(
    client: dict[str, Any], hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong host, a wrong port and TLS where there is none are named at once, in the log and in the note alike."""
    async with ScriptedServer() as server:
        smtp = RetryingSMTP(server.client(**client), once())
        with pytest.raises(aiosmtplib.SMTPConnectError) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
    named(hint, caught.value, caplog)


@pytest.mark.parametrize("how", ["fin", "rst"])
@virtually
async def test_a_hang_up_in_place_of_the_banner_says_what_to_check(how: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As a proxy does whose server is down."""
    async with talk(once()) as (server, smtp):
        server.fail_at("CONNECT", how)
        with pytest.raises(aiosmtplib.SMTPConnectError) as caught:
            await smtp.sendmail(APP, [ANN], BODY)
    named("hung up without a word", caught.value, caplog)


def named(hint: str, error: aiosmtplib.SMTPException, caplog: pytest.LogCaptureFixture) -> None:
    """The hint is in the first warning and in the note, and the error is as it was."""
    [warning, *_] = caplog.messages
    assert warning.startswith("smtp has no connection to ")
    assert hint in warning
    assert hint in error.__notes__[0]
    assert hint not in str(error), "it is aiosmtplib's own"
