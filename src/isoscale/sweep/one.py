"""One run inside a worker process: continue what is there, wait for whoever still works on it, report divergence."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

from isoscale._base.errors import CheckpointError, NonFiniteError
from isoscale.config import RunConfig
from isoscale.train import train

POLL = 0.3  # seconds between two looks


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def stop_politely() -> None:
    """Let SIGTERM interrupt as Ctrl-C does, so that a run saves a checkpoint before its worker ends."""
    signal.signal(signal.SIGTERM, _stop)


def run_one(config: RunConfig, folder: Path) -> tuple[float, float, str]:
    """Train, or continue, a run in a folder that a worker taken for dead may still hold.

    Args:
        config: the run.
        folder: its run folder.

    Returns:
        Validation loss (inf when the run diverged), seconds, and what diverged first (else empty).

    Raises:
        IsoscaleError: whatever the run refuses.
    """
    while True:
        try:
            result = train(config, folder, resume=True)
        except NonFiniteError as error:
            return float("inf"), 0.0, error.key
        except CheckpointError as error:
            if error.key != "lock":
                raise
            time.sleep(POLL)
        else:
            loss = result.val_loss
            return (loss if loss == loss else float("inf")), result.seconds, ""
