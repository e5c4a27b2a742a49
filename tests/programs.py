"""The examples as programs of their own: started with the command in their docstring, and what they write meanwhile."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import functools
import os
import re
import shlex
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from smtpretry.queues.engine import Engine, SupportsAttempt

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PATIENCE = 20  # seconds for what takes one or two


class Program:
    """A process that runs, and its `log`: what it has written, as far as it was read."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log = ""

    async def says(self, pattern: str) -> re.Match[str]:
        """Wait for the line that this is in."""
        while line := await self._line():
            if found := re.search(pattern, line):
                return found
        raise AssertionError(self.log)

    async def stop(self) -> None:
        """Ask it to end, as `kill` does, and wait until it has."""
        self.process.terminate()
        while await self._line():
            pass
        await self.process.wait()

    async def _line(self) -> str:
        line = (await self.process.stdout.readline()).decode()  # type: ignore[union-attr] # it is a pipe
        self.log += line
        return line


def command(example: str) -> str:
    """Return how the docstring of an example says that it is started."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / f"{example}.py").read_text())) or ""
    return re.search(r"^Start .* with `(.*?)`", docstring, re.MULTILINE)[1]  # type: ignore[index] # each has one


@asynccontextmanager
async def running(command: str, **env: object) -> AsyncIterator[Program]:
    """Run a command from the root of the project until the end of the block; then it and its children are killed."""
    program, *arguments = shlex.split(command)
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name(program),
        *arguments,
        cwd=ROOT,
        env=os.environ | {name: str(value) for name, value in env.items()},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    started = Program(process)
    try:
        async with asyncio.timeout(PATIENCE):
            yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        started.log += (await process.communicate())[0].decode()


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that another process or task brings about, but not for ever."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - it happens to a list
            await asyncio.sleep(0.01)


def in_real_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on a loop of its own whose waits take as long as they say."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


@asynccontextmanager
async def working(engine: Engine, smtp: SupportsAttempt, **options: Any) -> AsyncIterator[asyncio.Task[None]]:
    """Have a worker, in this process."""
    worker = asyncio.create_task(engine.work(smtp, **options))
    try:
        yield worker
    finally:
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker
