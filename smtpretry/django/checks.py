"""What ``manage.py check`` says of the backend's options, before the first mail does: `check_options`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.checks import Error
from django.core.mail.backends import smtp
from django.utils.module_loading import import_string

from .backend import EmailBackend
from .options import TAKEN, fault, given, instead_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

_OF_DJANGO = inspect.signature(smtp.EmailBackend).parameters.keys() - {"kwargs"}


def check_options(**_: Any) -> list[Error]:  # noqa: ANN401 - Django's
    """Find the wrong options in ``SMTPRETRY`` and in ``MAILERS`` (Django 6.1): an error for each, with a hint."""
    try:
        errors = [*_wrong("SMTPRETRY", given(), TAKEN)]
    except TypeError as error:
        errors = [Error("SMTPRETRY is no dictionary.", hint=str(error), id="smtpretry.E001")]
    for alias, mailer in getattr(settings, "MAILERS", {}).items():
        if _is_ours(mailer.get("BACKEND", "")):
            errors += _wrong(f"OPTIONS of MAILERS[{alias!r}]", mailer.get("OPTIONS", {}), TAKEN | _OF_DJANGO)
    return errors


def _is_ours(backend: str) -> bool:
    """Whether that is this backend, or takes the same options; what cannot be imported is Django's to tell."""
    try:
        found = import_string(backend)
    except ImportError:
        return False
    return isinstance(found, type) and getattr(found, "__init__", None) is EmailBackend.__init__


def _wrong(where: str, options: Mapping[str, Any], taken: Collection[str]) -> Iterator[Error]:
    for name, value in options.items():
        if name not in taken:
            msg, hint = f"{where} has {name}, which EmailBackend does not take.", instead_of(name, taken)
            yield Error(msg, hint=hint[0].upper() + hint[1:], id="smtpretry.E002")
        elif name in TAKEN and (why := fault(name, value)) is not None:
            yield Error(f"{where} has a wrong {name}.", hint=why, id="smtpretry.E003")
