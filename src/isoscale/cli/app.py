"""All commands together, and how they end: 0 done, 1 the check failed, 2 the user's error, 130 interrupted."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

import typer

from isoscale._base.errors import IsoscaleError, ManyErrors

app = typer.Typer(
    name="isoscale",
    help="Tune a small model once, train any bigger one in fewer bits, and know why every number is what it is.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


_ClickError: type[Exception] = typer.BadParameter.__mro__[2]  # newer typers carry a click of their own


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _as_json(error: IsoscaleError) -> dict[str, object]:
    if isinstance(error, ManyErrors):
        return {"error": error.message, "errors": [_as_json(one) for one in error.errors]}
    value = error.value if isinstance(error.value, str | int) else repr(error.value)  # repr: JSON has no nan
    return {"error": error.message, "key": error.key, "value": value, "place": error.place, "hint": error.hint}


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    """A plan's warning as a sentence; it is about sizes, not about a line of code."""
    if category.__name__ == "PlanWarning":
        print(textwrap.fill(f"note: {message}", 80, subsequent_indent="      "), file=sys.stderr)
    else:
        _warn(message, category, *rest, **more)


_warn = warnings.showwarning


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns (and, as a script, exits with) its exit code."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        code = _run(arguments)
    if arguments is None:
        sys.exit(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    from isoscale.cli import commands  # noqa: F401  (registers every command on `app`)

    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("ISOSCALE_DEBUG") == "1"
    as_json = "--json" in words
    words = [word for word in words if word != "--debug"]
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if main_thread else None
    code = 0
    try:
        result = app(words, standalone_mode=False, prog_name="isoscale")
        code = result if isinstance(result, int) else 0
    except typer.Exit as end:
        code = end.exit_code
    except _ClickError as error:
        if as_json:
            print(json.dumps({"error": str(error)}))
        error.show()  # type: ignore[attr-defined]
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except SystemExit:  # how typer ends when a reader goes away, as in `isoscale plan | head`: no failure
        code = 0
    except IsoscaleError as error:
        if debug:
            raise
        if as_json:
            print(json.dumps(_as_json(error)))
        print(f"isoscale: {error}", file=sys.stderr)
        code = 2
    except OSError as error:
        if debug:
            raise
        reason = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
        if as_json:
            print(json.dumps({"error": reason}))
        print(f"isoscale: {reason}", file=sys.stderr)
        code = 2
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    if code == 130:
        print("\ninterrupted; everything so far is saved (--resume continues)", file=sys.stderr)
    return code
