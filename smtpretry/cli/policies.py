"""The policy that an argument names: ``app.mail:policy``."""

from __future__ import annotations

import argparse
import importlib
import sys
from functools import reduce
from pathlib import Path

from smtpretry.policy import RetryPolicy


def add_to(command: argparse.ArgumentParser) -> None:
    """Add ``--policy`` to a command's arguments."""
    command.add_argument(
        "--policy",
        type=_policy,
        default=RetryPolicy(),
        metavar="MODULE:NAME",
        help="your own policy, such as app.mail:policy, or smtpretry:RetryPolicy.queue (what can be called is called)",
    )


def _policy(where: str) -> RetryPolicy:
    module, _, name = where.partition(":")
    if not module or not name:
        msg = f"{where!r} is no module:name, such as app.mail:policy"
        raise argparse.ArgumentTypeError(msg)
    found = _found(module, name)
    if not isinstance(found, RetryPolicy) and callable(found):
        try:
            found = found()
        except Exception as error:
            msg = f"{where}() failed: {type(error).__name__}: {error}"
            raise argparse.ArgumentTypeError(msg) from error
    if not isinstance(found, RetryPolicy):
        msg = f"{where} is no RetryPolicy, its type is {type(found).__name__}"
        raise argparse.ArgumentTypeError(msg)
    return found


def _found(module: str, name: str) -> object:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return reduce(getattr, name.split("."), importlib.import_module(module))
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            msg = f"{module} cannot be imported: {error}"
        else:
            msg = f"there is no module {error.name}: run this where Python finds it, or set PYTHONPATH"
    except AttributeError as error:
        msg = f"{module} has no {name} ({error})"
    except Exception as error:  # noqa: BLE001 - the module is the user's, and may raise anything
        msg = f"{module} cannot be imported: {type(error).__name__}: {error}"
    raise argparse.ArgumentTypeError(msg)
