"""Where files that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder of token files and compiled kernels: `$ISOSCALE_CACHE`, else `~/.cache/isoscale`."""
    return Path(os.environ.get("ISOSCALE_CACHE") or Path.home() / ".cache" / "isoscale")
