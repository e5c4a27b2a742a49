"""Django's SMTP backend with a retry policy: ``EMAIL_BACKEND = "smtpretry.django.EmailBackend"``.

Needs the extra ``django``. With it in INSTALLED_APPS, ``manage.py smtpretry_worker`` works a queue off.
"""

try:
    import django as _django  # noqa: F401 - the first that would fail
except ImportError as error:
    _message = "smtpretry.django needs Django: install smtpretry with its extra 'django'"
    raise ImportError(_message, name=error.name) from error

from .backend import EmailBackend

__all__ = ["EmailBackend"]
