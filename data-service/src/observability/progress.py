"""How far a command is."""

from __future__ import annotations

from typing import Final, TextIO

_WIDTH: Final = 30


def show_progress(out: TextIO, done: int, of: int) -> None:
    """A bar, for who looks on; nothing goes into a file or a pipe."""
    if not out.isatty():
        return
    filled = _WIDTH * done // of
    bar = "#" * filled + "." * (_WIDTH - filled)
    end = "\n" if done == of else ""
    out.write(f"\r[{bar}] {done} of {of}{end}")
    out.flush()
