"""The log of a process, as the settings say."""

import logging

from server.config import Settings
from server.logs import configure, level_of


def set_up_log(settings: Settings, process: str) -> None:
    """`process` is what JSON lines call it."""
    configure(settings.serve.log_format, process, settings.secrets, level_of(settings.serve.log_level))
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it names its plugins at every start
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every byte that clients get wrong
