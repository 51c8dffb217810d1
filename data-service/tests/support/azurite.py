"""Azurite, the emulator of Azure Blob Storage, as a process of its own."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ACCOUNT: Final = "devstoreaccount1"
# The key that every emulator has; the vendor's documentation publishes it.
KEY: Final = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
MAIN: Final = Path(__file__).parents[1] / "azurite/node_modules/azurite/dist/src/blob/main.js"
START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 10.0
_ASK_EVERY_S: Final = 0.05


class Azurite:
    """One emulator on a loopback port, stopped until ``start``.

    With ``location``, what it holds lasts over ``stop`` and ``start``; else it is in memory, and
    gone when it stops. It has no container at first.
    """

    def __init__(self, location: Path | None = None) -> None:
        self.port = _free_port()
        self._location = location
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The address of its account."""
        return f"http://127.0.0.1:{self.port}/{ACCOUNT}"

    @property
    def connection_string(self) -> str:
        """What ``AZURE_STORAGE_CONNECTION_STRING`` takes."""
        return connection_string(self.url)

    def start(self) -> None:
        """Start it on its port and return once it answers; blocks for a second or so."""
        node = shutil.which("node")
        if node is None or not MAIN.exists():
            raise RuntimeError(
                "Azurite is not set up: run the tests by `make test`, which installs it"
            )
        kept = (
            ["--inMemoryPersistence"]
            if self._location is None
            else ["--location", str(self._location)]
        )
        self._process = subprocess.Popen(
            [
                node, str(MAIN), "--blobHost", "127.0.0.1", "--blobPort", str(self.port),
                "--silent", "--disableTelemetry", "--skipApiVersionCheck", *kept,
            ],
            cwd=self._location or tempfile.gettempdir(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"Azurite did not start on port {self.port}")
            time.sleep(_ASK_EVERY_S)

    def stop(self) -> None:
        """Stop it, keeping what its ``location`` holds. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        # Killed at once, it would forget what it acknowledged.
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT_S)

    def processor_s(self) -> float:
        """How long (s) it has computed so far, where the system tells."""
        if self._process is None:
            return 0.0
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
        try:
            connection.request("GET", f"/{ACCOUNT}?comp=list")
            answer = connection.getresponse()
            return answer.status == 403 and "Azurite" in (answer.getheader("Server") or "")
        except OSError:
            return False
        finally:
            connection.close()


@contextmanager
def running_azurite(location: Path | None = None) -> Iterator[Azurite]:
    """A started emulator, stopped at the end."""
    azurite = Azurite(location)
    azurite.start()
    try:
        yield azurite
    finally:
        azurite.stop()


def connection_string(url: str, key: str = KEY) -> str:
    """The connection string of the emulator's account at ``url``."""
    return f"AccountName={ACCOUNT};AccountKey={key};BlobEndpoint={url};"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
