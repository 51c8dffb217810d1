"""Running the application as a process: how it starts, how it stops, and how long that may take.

- While it starts, and from the moment it is asked to stop, a doorman answers in its place.
- A start is given up after ``START_S``, with a line that says what it was waiting for.
- The first SIGTERM or SIGINT asks it to stop. While it starts it then ends at once; nobody was
  served yet. When it runs, intake ends, what has closed is settled, stored and told, clients are
  closed with 1012 and requests get to their end, then the parts end in order. All of that is
  bounded: ``main`` bounds its parts, ``DRAIN_S`` the clients, and ``STOP_S`` everything. A stop
  that was asked for is a success: exit code 0, also while it starts.
- A second signal ends it at once, with the exit code that shells give for the signal. That loses
  nothing: what was acknowledged is stored, and writes are whole or not at all.

The bounds of a stop, in the worst case: 0.1 s until the server notices, 3 s to settle and 0.5 s to
tell (``main``), 2.1 s for clients, 1 s for the doorman, 2 s for the parts (``main``), 0.5 s for
traces (``observability.tracing``), 0.5 s for threads. That is 9.7 s; an orchestrator kills after
ten.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Final

import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from api.doorman import Doorman
from config import Settings
from errors import DataServiceError
from observability.logging import print_event
from observability.tracing import tracing
from signals import Alarm

START_S: Final = 60.0
# How long a start that was given up may take to clean up behind itself.
GIVE_UP_S: Final = 5.0
DRAIN_S: Final = 2
STOP_S: Final = 9.5
# How long threads may take to end once nothing else is left; one that stands in a disk that does
# not answer never does, and the interpreter would wait for it.
THREADS_S: Final = 0.5
MESSAGE_BYTES: Final = 64 * 1024
# Agents pause for longer than the server's own five seconds, and would find it closed.
KEEP_ALIVE_S: Final = 75
NOT_STARTED: Final = 3
CRASHED: Final = 1

log = structlog.get_logger(__name__)


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """One WebSocket connection.

    At a shutdown uvicorn says 1012 also to a client that has just said goodbye itself, and whose
    connection is not quite gone yet. That raises, and would end the shutdown of all the others.
    """

    def shutdown(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()


class Server(uvicorn.Server):
    """Serves ``app`` at ``listener``, which listens; says on standard output where, once it does.

    The lifespan of ``app`` is run here and not by uvicorn, which knows no bound for it. Besides its
    lifespan the application has in its state ``waits_for``, what its start waits for, and
    ``finish``, which ends intake and brings to an end what is under way.
    """

    def __init__(
        self, app: FastAPI, settings: Settings, listener: socket.socket, *, alarm: Alarm
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,  # the application tells of each request itself
                lifespan="off",
                ws=WebSocketProtocol,
                ws_max_size=MESSAGE_BYTES,
                timeout_graceful_shutdown=DRAIN_S,
                timeout_keep_alive=KEEP_ALIVE_S,
                server_header=False,
            )
        )
        self.exit_code = 0
        self._app = app
        self._listener = listener
        self._revision = settings.revision
        self._in_json = settings.log_format == "json"
        self._alarm = alarm
        self._lifespan = AsyncExitStack()
        self._stop_by: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._patience: asyncio.Timeout | None = None

    def ask_to_stop(self) -> None:
        """Stop as soon as possible; for signal handlers, so it only leaves word."""
        self._limit_stop()
        self.should_exit = True
        if self._loop is not None and self._patience is not None:
            self._loop.call_soon_threadsafe(self._give_up_start)

    def serve_and_end(self) -> int:
        """Serve until asked to stop; the exit code."""
        self.run(sockets=[self._listener])
        return self.exit_code

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are none of uvicorn's business here."""
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            with tracing():
                await super().serve(sockets)
            if self.started:
                log.info("stopped")
        except BaseException:
            # Told here: threads may hang before the interpreter comes to do it.
            self.exit_code = self.exit_code or CRASHED
            log.critical("process_crashed", exc_info=True)
            raise
        finally:
            self._alarm.set(
                THREADS_S,
                code=self.exit_code,
                why="a thread stands in a call that does not return, and is cut off",
            )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._alarm.set(
            START_S + GIVE_UP_S, code=NOT_STARTED, why=f"the start hung for {START_S:g} s"
        )
        async with Doorman(self._listener, "starting", revision=self._revision):
            if await self._start():
                await super().startup(sockets)
        self._alarm.stop()
        if self.should_exit:
            self._limit_stop()
        if self.started:
            host, port = self._listener.getsockname()[:2]
            self._announce(f"http://{host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.stopping = True
        async with self._lifespan, Doorman(self._listener, "stopping", revision=self._revision):
            for server in self.servers:
                server.close()
            await self._app.state.finish()
            await super().shutdown(sockets)

    async def _start(self) -> bool:
        """Start the application; whether it did."""
        self._loop = asyncio.get_running_loop()
        patience = self._patience = asyncio.timeout(START_S)
        try:
            async with patience:
                if self.should_exit:
                    return False
                lifespan = self._app.router.lifespan_context(self._app)
                await self._lifespan.enter_async_context(lifespan)
        except TimeoutError:
            if not patience.expired():
                raise
            self._fail(
                f"the start took longer than {START_S:g} s: it was waiting for "
                f"{self._app.state.waits_for}"
            )
            return False
        except DataServiceError as exc:
            self._fail(exc.message)
            return False
        finally:
            self._patience = None
        return True

    def _announce(self, url: str) -> None:
        if self._in_json:
            print_event("serving", logger=__name__, url=url)
        else:
            print(f"cb-trade-data serving on {url}", flush=True)

    def _fail(self, why: str) -> None:
        if self.should_exit:
            return  # it was asked to stop, and what was under way was given up for that
        log.error("not_started", error=why)
        self.should_exit = True
        self.exit_code = NOT_STARTED

    def _limit_stop(self) -> None:
        """Bound the stop, from the moment when it was first asked for."""
        now = time.monotonic()
        if self._stop_by is None:
            self._stop_by = now + STOP_S
        self._alarm.set(
            # A timer of zero would be none.
            max(self._stop_by - now, 0.001),
            code=CRASHED,
            why=f"stopping took longer than {STOP_S:g} s; what hangs is cut off",
        )

    def _give_up_start(self) -> None:
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time())


def listen(settings: Settings) -> socket.socket:
    """A socket that listens where the settings say.

    Raises:
        DataServiceError: it cannot.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(socket.SOMAXCONN)
    except OSError as exc:
        listener.close()
        raise DataServiceError(
            f"HOST, PORT: cannot listen on {settings.host}:{settings.port} "
            f"({exc.strerror}); set PORT to a free one, 0 takes any"
        ) from exc
    return listener
