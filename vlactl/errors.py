"""The exceptions that end in one clear message, and the exit codes they end with.

A `UserError` is something the person at the keyboard can change: it carries what is wrong and how
to get out of it, and is printed without a traceback. Anything else that escapes is a bug in
vlactl.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_ENVIRONMENT = 3
EXIT_TRAINING = 4
EXIT_INTEGRITY = 5
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can fix.

    Args:
        message: what is wrong, naming the value that was given and what is allowed.
        hint: the way out: a command, a key to change, or the valid values.
    """

    exit_code: ClassVar[int] = EXIT_USAGE

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class ConfigError(UserError):
    """A configuration, a preset or a command line that cannot be run."""


class EnvironmentNotReadyError(UserError):
    """A missing or unsuitable library, driver, simulator or plugin on this machine."""

    exit_code = EXIT_ENVIRONMENT


class TrainingError(UserError):
    """A run that started and could not go on."""

    exit_code = EXIT_TRAINING


class IntegrityError(UserError):
    """A file that is not what it claims to be: checkpoint, initial states, download."""

    exit_code = EXIT_INTEGRITY


EXIT_CLASSES: dict[int, type[UserError]] = {
    cls.exit_code: cls
    for cls in (ConfigError, EnvironmentNotReadyError, TrainingError, IntegrityError)
}
