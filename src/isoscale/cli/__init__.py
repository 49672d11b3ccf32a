"""The command line. One file per command; torch is imported only by commands that compute."""

from isoscale.cli.app import main

__all__ = ["main"]
