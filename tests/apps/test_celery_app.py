"""examples/celery_app.py, with a real worker, started as its docstring says, and a broker in files."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiosmtplib
import pytest
from programs import EXAMPLES, Program, command, in_real_time, running, until
from support import ANN, APP, BOB, EVE, letter, transactions

from smtpretry import prepare
from smtpretry.testing import ScriptedServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from email.message import EmailMessage

    from celery.result import AsyncResult

SECRET = "between you and me"
SETTINGS = """
import os, time, uuid
from kombu.transport import filesystem
from kombu.utils.json import dumps

def put(self, queue, payload, **_):  # kombu's own can be read before it is written
    path = f"{self.data_folder_out}/{time.monotonic_ns()}_{uuid.uuid4()}.{queue}"
    with open(f"{path}.new", "w") as file:
        file.write(dumps(payload))
    os.rename(f"{path}.new", f"{path}.msg")

filesystem.Channel._put = put
folder = os.path.dirname(__file__)
broker_url = "filesystem://"
broker_transport_options = {
    "data_folder_in": f"{folder}/queue",
    "data_folder_out": f"{folder}/queue",
    "control_folder": f"{folder}/control",
    "polling_interval": 0.01,
}
result_backend = f"file://{folder}/results"
worker_lost_wait = 0.1
"""
OTHER_POLICY = """
import os, tenacity, celery_app, smtpretry
from datetime import timedelta
celery_app.POLICY = eval(f"smtpretry.RetryPolicy({os.environ['POLICY']})")
celery_app.local = celery_app.Local()
app = celery_app.app
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The example, as the application that sends mails imports it, with settings that its workers share."""
    folder = tmp_path_factory.mktemp("celery")
    for name in ("queue", "control", "results"):
        (folder / name).mkdir()
    (folder / "celery_settings.py").write_text(SETTINGS)
    (folder / "other_policy.py").write_text(OTHER_POLICY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELERY_CONFIG_MODULE", "celery_settings")
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("SMTP_HOST", ScriptedServer.hostname)
        patch.syspath_prepend(folder)
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("celery_app")


def secret(*recipients: str) -> EmailMessage:
    """Return a message whose bytes are known beforehand, with a body that nobody else may see."""
    message = letter(*recipients, Message_ID="<1@example.com>", Date="Mon, 01 Jan 2024 00:00:00 +0000")
    message.set_content(SECRET)
    return message


@asynccontextmanager
async def worker(server: ScriptedServer, policy: str = "") -> AsyncIterator[Program]:
    """Start a worker, as the docstring says or with another policy, at its most talkative: it shows no body of a mail."""
    start, env = command("celery_app"), {"CELERY_WORKER_LOGLEVEL": "DEBUG", "CELERY_WORKER_CONCURRENCY": 1}
    env["CELERY_WORKER_WITHOUT_MINGLE"] = 1  # it takes a second
    if policy:
        start = start.replace("-A celery_app", "-A other_policy")
        env |= {"POLICY": policy, "CELERY_WORKER_POOL": "solo"}
        env["CELERY_WORKER_WITHOUT_HEARTBEAT"] = 1  # else a countdown of less than a second lasts one
    async with running(start, SMTP_PORT=server.port, **env) as program:
        await program.says(r"ready\.$")
        yield program
    assert "Task celery_app.deliver[" in program.log
    assert SECRET not in program.log
    assert prepare(secret(ANN)).to_dict()["message"][:16] not in program.log


async def outcome(result: AsyncResult, program: Program) -> Any:
    """What the task returns in the end, or raises."""
    await program.says(rf"{result.id}\] (succeeded|raised)")
    return result.get(timeout=1)


def children(program: Program) -> list[int]:
    pid = program.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@in_real_time
async def test_a_greylisted_recipient_gets_the_mail_later_and_the_others_once(example: Any) -> None:
    """The worker is free while the server wants time; then it offers the same bytes, to those alone who are pending."""
    async with ScriptedServer() as server, worker(server) as program:
        server.on("RCPT", BOB, "450 4.2.0 Greylisted, retry in 1 seconds", times=1)
        result = example.send(secret(ANN, BOB))
        await program.says("retry: Retry in")
        assert await outcome(result, program) == {"accepted": [ANN, BOB], "refused": {}, "uncertain": []}
    assert transactions(server) == [[ANN, BOB], [BOB]]
    assert {who: len(messages) for who, messages in server.mailboxes.items()} == {ANN: 1, BOB: 1}
    assert {message.content for message in server.messages} == {prepare(secret(ANN, BOB)).message}


@in_real_time
async def test_refusals_are_returned_and_raised_where_nobody_has_the_mail(example: Any) -> None:
    """One refusal is in the result; where there is nothing else, the task fails, and the error tells the story."""
    async with ScriptedServer() as server, worker(server) as program:
        server.on("RCPT", EVE, "550 5.1.1 User unknown", times=2)
        partly = example.send(secret(ANN), sender=APP, recipients=[ANN, EVE])
        refused = {EVE: "550 5.1.1 User unknown"}
        assert await outcome(partly, program) == {"accepted": [ANN], "refused": refused, "uncertain": []}
        with pytest.raises(aiosmtplib.SMTPException, match=r"1 attempt in 0 s.*550 5\.1\.1 User unknown"):
            await outcome(example.send(secret(EVE)), program)
    assert re.search(r"raised unexpected: SMTPException\(.smtpretry: 1 attempt", program.log)


@in_real_time
async def test_a_worker_process_that_dies_loses_no_mail(example: Any) -> None:
    """Where the process is killed in the middle of a pass, another one takes the task up."""
    async with ScriptedServer() as server, worker(server) as program:
        stalled = server.fail_at("DATA", "stall", times=1)
        result = example.send(secret(ANN))
        await until(lambda: stalled.used)
        [child] = children(program)
        os.kill(child, signal.SIGKILL)
        assert (await outcome(result, program))["accepted"] == [ANN]
    assert len(server.received(ANN)) == 1


@in_real_time
async def test_a_task_comes_again_as_often_as_the_policy_says(example: Any) -> None:
    """It is the policy that gives up, not Celery after three retries; what it counts goes from task to task."""
    async with ScriptedServer() as server, worker(server, "wait=tenacity.wait_fixed(0.02), max_attempts=6") as program:
        server.on("RCPT", ANN, "451 4.3.0 Not now", times=6)
        server.on("RCPT", BOB, "451 4.3.0 Not now", times=5)
        with pytest.raises(aiosmtplib.SMTPException, match=r"6 attempts.*451 4\.3\.0 Not now"):
            await outcome(example.send(secret(ANN)), program)
        assert (await outcome(example.send(secret(BOB)), program))["accepted"] == [BOB]


@in_real_time
async def test_time_counts_from_the_first_pass(example: Any) -> None:
    """`give_up_after` ends a delivery, however many tasks it took."""
    policy = "wait=tenacity.wait_fixed(0.1), give_up_after=timedelta(seconds=0.5)"
    async with ScriptedServer() as server, worker(server, policy) as program:
        server.on("RCPT", ANN, "451 4.3.0 Not now")
        with pytest.raises(aiosmtplib.SMTPException, match="allows no try after another"):
            await outcome(example.send(secret(ANN)), program)
    assert 2 < len(transactions(server)) < 8


@in_real_time
async def test_no_task_waits_longer_than_brokers_like(example: Any) -> None:
    """Where a server wants the mail in half an hour, the task comes again after a quarter."""
    async with ScriptedServer() as server, worker(server) as program:
        server.on("RCPT", ANN, "450 4.2.0 Greylisted for 1800 seconds", times=1)
        example.send(secret(ANN))
        await program.says("Retry in 900s")


@in_real_time
async def test_what_one_task_learns_of_the_server_holds_for_the_next(
    example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a server asks to be left alone, the next mail of the same worker does not even connect."""
    async with ScriptedServer() as server:
        monkeypatch.setenv("SMTP_PORT", str(server.port))
        server.on("CONNECT", "421 4.3.2 Too busy, try again in 300 seconds", times=1)
        with ThreadPoolExecutor(1) as thread:
            for _ in range(2):
                one_pass = partial(asyncio.run, example.one_pass(prepare(secret(ANN))))
                delivery = await asyncio.get_running_loop().run_in_executor(thread, one_pass)
                assert delivery.pending == [ANN]
                assert server.connections == 1
