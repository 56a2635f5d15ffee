"""One small tree of errors.

::

    DiffalignError              exit status 1
    └── UserError               exit status 2: something the user can mend; the message says how
        ├── ConfigError         (also ValueError)       a configuration field, a name, a combination
        ├── InputError          (also ValueError)       a file or folder that does not hold what it should
        ├── NotFoundError       (also FileNotFoundError) a file, folder or name that is not there
        └── RefusedError        (also RuntimeError)     a run that would train wrongly, or went wrong

Each member also inherits the standard error that it stands for, so callers may catch either.
"""

from __future__ import annotations


class DiffalignError(Exception):
    """Anything that diffalign reports on purpose."""

    exit_status = 1


class UserError(DiffalignError):
    """Something that the user can mend."""

    exit_status = 2


class ConfigError(UserError, ValueError):
    """A configuration field, a name or a combination that cannot be used."""


class InputError(UserError, ValueError):
    """A file or folder that does not hold what it should."""


class NotFoundError(UserError, FileNotFoundError):
    """A file, folder or name that is not there."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class RefusedError(UserError, RuntimeError):
    """A run that would train wrongly, or that went wrong and was stopped."""
