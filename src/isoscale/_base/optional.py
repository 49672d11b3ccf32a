"""Optional packages: imported where they are used, and asked for by name when missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from isoscale._base.errors import MissingDependencyError


def need(module: str, extra: str) -> ModuleType:
    """Imports an optional package.

    Args:
        module: the name to import, such as `tokenizers`.
        extra: the extra of isoscale that installs it, such as `text`.

    Raises:
        MissingDependencyError: it is not installed, or is installed and does not import; says what to run.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == top
        reason = "is not installed" if missing else f"is installed but does not import: {error}"
        hint = f'pip install "isoscale[{extra}]"'
        raise MissingDependencyError(f"the package `{top}` {reason}", key=module, hint=hint) from error
