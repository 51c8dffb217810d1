"""Signals of the system, for a process that serves: those that stop it, and an alarm of its own.

It imports nothing that takes long, so that a signal is heard from the first moment on.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
from types import FrameType
from typing import Final, NoReturn, Protocol

_STDERR: Final = 2


class IStoppable(Protocol):
    """What can be asked to stop."""

    def ask_to_stop(self) -> None:
        """Leave word that it should stop; called in a signal handler."""


class Alarm:
    """Ends the process at a moment, wherever it stands.

    It is a timer of the system and its signal: it rings also when the event loop hangs, and when
    the interpreter waits for a thread that does not end. It may be set in a signal handler.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self._as_json = as_json
        self._code = 0
        self._line = ""
        signal.signal(signal.SIGALRM, self._ring)
        # The interpreter does this once threads have ended. What it does then hangs nowhere, but
        # gives signals their own effect back, and this one's is to kill.
        atexit.register(self.stop)

    def set(self, seconds: float, *, code: int, why: str) -> None:
        """End the process with ``code`` and a line after ``seconds``, instead of what was set."""
        self._code, self._line = code, self._told(why)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, *_: object) -> NoReturn:
        # Not by the log, which whoever was interrupted may hold; and whatever reads it may be gone,
        # or stand still.
        try:
            os.set_blocking(_STDERR, False)
            os.write(_STDERR, f"{self._line}\n".encode())
        finally:
            os._exit(self._code)

    def _told(self, why: str) -> str:
        if self._as_json:
            return json.dumps({"event": "cut_off", "level": "critical", "reason": why})
        return f"cb-trade-data: {why}"


class StopSignals:
    """What SIGTERM and SIGINT do, from the moment this is made.

    Before there is a server they end the process: nothing is open yet.
    """

    def __init__(self) -> None:
        self._server: IStoppable | None = None
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def stop(self, server: IStoppable) -> None:
        """From now on the first signal asks ``server`` to stop."""
        self._server = server

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._asked:
            os._exit(128 + number)
        self._asked = True
        if self._server is None:
            os._exit(0)
        self._server.ask_to_stop()
