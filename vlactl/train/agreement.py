"""Work that succeeds on all ranks or fails on all of them.

A rank that raised while others wait for it in a collective would leave them waiting. So what a rank
raises is kept until all have tried, and then all of them raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from vlactl.distributed.roles import Ranks
from vlactl.errors import IntegrityError, UserError

T = TypeVar("T")


def together(ranks: Ranks, action: Callable[[], T]) -> list[T]:
    """Let every member act, and agree on whether all succeeded. Called on every member.

    Args:
        ranks: who takes part.
        action: may raise, but not while other members wait for it in a collective.

    Returns:
        What the action returned on each member, in order.

    Raises:
        IntegrityError: it failed somewhere; what the first member that failed had to say.
    """
    value: T | None = None
    failure: tuple[str, str] | None = None
    cause: Exception | None = None
    try:
        value = action()
    except UserError as error:
        cause, failure = error, (error.message, error.hint)
    except Exception as error:
        where = f"rank {ranks.rank}: " if ranks.size > 1 else ""
        cause, failure = error, (f"{where}{describe(error)}", "")
    outcomes = ranks.gather((value, failure))
    for _, failed in outcomes:
        if failed is not None:
            message, hint = failed
            raise IntegrityError(message, hint=hint) from cause
    return [value for value, _ in outcomes]


def describe(error: BaseException) -> str:
    """Kind and first line of an error, without what libraries add about their own code."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
