"""``python -m robustdebias`` is the same as ``robustdebias``."""

from robustdebias.cli import app

app()
