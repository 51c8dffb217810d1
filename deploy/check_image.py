#!/usr/bin/env python3
"""Checks an image that was built: its configuration, its content, its life until SIGTERM.

``verify_image.sh`` builds the image and calls this with the unpacked content. It runs in the
development environment, whose WebSocket and HTTP clients talk to the service as a user's would.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from csv import reader
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any, Final, Protocol

import httpx
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

UID: Final = 10001
MOST_BYTES: Final = 650_000_000
PACKAGES: Final = "app/lib/python3.11/site-packages"
UNWANTED: Final = (
    *("cc", "c++", "gcc*", "g++*", "clang*", "cpp*", "ld", "as", "make", "rustc", "cargo"),
    *("pip*", "uv", "pytest"),
)
# A market twenty times as fast: a candle of five minutes closes every 15 s.
SPEED: Final = 20
START_S: Final = 60
CANDLE_S: Final = 60
# What SIGTERM may take; Azure kills after 30 s.
STOP_S: Final = 10


class Wrong(Exception):
    """What is not as it must be."""


def demand(fact: object, otherwise: str) -> None:
    if not fact:
        raise Wrong(otherwise)


def say(line: str) -> None:
    print(f"   {line}", flush=True)


# --- how the image is run ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Image:
    """An image's configuration, as engines keep it, and its content in a folder."""

    name: str
    root: Path
    config: Mapping[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        return dict(item.split("=", 1) for item in self.config["Env"])


@dataclass(frozen=True, slots=True)
class Program:
    """Something that runs in the image, and where its standard error goes."""

    name: str
    process: subprocess.Popen[str]
    log: Path


class Engine(Protocol):
    """Runs programs of an image on this machine's loopback, with a read-only root."""

    def command(self, name: str, argv: Sequence[str], settings: Mapping[str, str]) -> list[str]:
        """What runs ``argv`` in the image, under a name; its exit code is the program's."""

    def signal(self, program: Program, number: signal.Signals) -> None:
        """Send a signal to what runs in the image."""


class Docker:
    def __init__(self, image: Image, data: Path) -> None:
        self._image = image
        self._data = data

    def command(self, name: str, argv: Sequence[str], settings: Mapping[str, str]) -> list[str]:
        entry, *rest = argv
        return [
            *("docker", "run", "--rm", f"--name={name}", "--network=host", "--read-only"),
            *("--tmpfs=/tmp", f"--volume={self._data}:/data", f"--entrypoint={entry}"),
            *(f"--env={key}={value}" for key, value in settings.items()),
            *(self._image.name, *rest),
        ]

    def signal(self, program: Program, number: signal.Signals) -> None:
        # Not to `docker run`, which cannot pass SIGKILL on.
        subprocess.run(["docker", "kill", f"--signal={number.name}", program.name], check=False)


class Chroot:
    """What an engine does, by hand: mounts of its own, process number 1, the image's user."""

    ENTER: Final = """
        mount --bind "$ROOT" "$ROOT"
        mount --bind "$DATA" "$ROOT/data"
        mount -t tmpfs tmpfs "$ROOT/tmp"
        mount -t proc proc "$ROOT/proc"
        mount --rbind /dev "$ROOT/dev"
        mount -o remount,bind,ro "$ROOT"
        exec chroot --userspec="$USER_ID:$USER_ID" --groups= "$ROOT" "$@"
    """

    def __init__(self, image: Image, data: Path) -> None:
        self._image = image
        self._data = data

    def command(self, name: str, argv: Sequence[str], settings: Mapping[str, str]) -> list[str]:
        own = {
            "ROOT": str(self._image.root),
            "DATA": str(self._data),
            "USER_ID": self._image.config["User"],
        }
        inside = {**self._image.environment, **settings}
        return [
            *("env", *(f"{key}={value}" for key, value in own.items())),
            *("unshare", "--mount", "--pid", "--fork", "sh", "-ec", self.ENTER, name),
            *("env", "-i", f"--chdir={self._image.config['WorkingDir']}"),
            *(f"{key}={value}" for key, value in inside.items()),
            *argv,
        ]

    def signal(self, program: Program, number: signal.Signals) -> None:
        # unshare itself ignores it; its one child is the program.
        pid = program.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(child), number)


# --- what is in it -------------------------------------------------------------------------------


def check_configuration(image: Image, revision: str) -> None:
    config = image.config
    demand(config["User"] == str(UID), f"it runs as {config['User']!r}, not as {UID}")
    demand(config["Entrypoint"] == ["cb-trade-data"], f"its entry is {config['Entrypoint']}")
    demand(config["Healthcheck"]["Test"][0] == "CMD", "its HEALTHCHECK is none, or needs a shell")
    demand("/data" in config["Volumes"], "/data is no volume")
    labels = config["Labels"]
    for name in ("source", "revision", "version"):
        demand(f"org.opencontainers.image.{name}" in labels, f"it has no label of its {name}")
    told = labels["org.opencontainers.image.revision"]
    demand(told == revision, f"its label says revision {told!r}, not {revision}")
    say(f"user {UID}, exec-form entry, health check, labels of source, revision and version")


def size(folder: Path, unless: Callable[[Path], bool] = lambda _: False) -> int:
    """Bytes of its files, each counted once however many names it has."""
    seen: dict[tuple[int, int], int] = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not unless(Path(parent, name))]
        for name in files:
            found = os.lstat(Path(parent, name))
            seen[found.st_dev, found.st_ino] = found.st_size
    return sum(seen.values())


def package_sizes(packages: Path) -> Counter[str]:
    """Bytes of each distribution, by what it says it installed, bytecode included."""
    sizes: Counter[str] = Counter()
    for record in packages.glob("*.dist-info/RECORD"):
        name, _, version = record.parent.name.removesuffix(".dist-info").partition("-")
        with record.open(newline="") as lines:
            files = {(packages / row[0]).resolve() for row in reader(lines)}
        cached = {
            found
            for path in files
            if path.suffix == ".py"
            for found in (path.parent / "__pycache__").glob(f"{path.stem}.cpython-*.pyc")
        }
        sizes[f"{name} {version}"] = sum(
            path.lstat().st_size for path in files | cached if path.is_file()
        )
    return sizes


def check_content(image: Image, base: Path) -> None:
    packages = image.root / PACKAGES
    tests = [path for path in (image.root / "app").rglob("test*") if path.name in ("test", "tests")]
    demand(not tests, f"tests are in it: {tests[:3]}")
    found = [
        path
        for folder in ("app/bin", "usr/local/bin", "usr/bin")
        for name in UNWANTED
        for path in (image.root / folder).glob(name)
    ]
    demand(not found, f"compilers or installers are in it: {found}")
    unneeded = [
        path
        for folder in (packages, *image.root.glob("usr/**/*-packages"))
        for name in ("pip", "uv", "pytest")
        for path in folder.glob(name)
    ]
    demand(not unneeded, f"packages that nothing runs are in it: {unneeded}")
    for folder in (packages, *image.root.glob("usr/**/lib/python3.11/asyncio")):
        stale = [path for path in folder.rglob("*.py") if not _is_compiled(path)]
        # Some libraries carry files that are no valid Python, such as templates.
        demand(len(stale) < 20, f"{len(stale)} modules have no bytecode, such as {stale[:3]}")

    above = size(image.root) - size(base)
    sizes = package_sizes(packages)
    for name, count in sizes.most_common(15):
        say(f"{count / 1e6:7.1f} MB  {name}")
    rest = sum(sizes.values()) - sum(count for _, count in sizes.most_common(15))
    say(f"{rest / 1e6:7.1f} MB  {len(sizes) - 15} more packages")
    say(f"{above / 1e6:7.1f} MB  above its base in all, of {MOST_BYTES / 1e6:.0f} at most")
    demand(above < MOST_BYTES, f"it has {above / 1e6:.0f} MB above its base")


def _is_compiled(path: Path) -> bool:
    """Whether there is bytecode that Python 3.11 takes for this file: unseen, or by its time and
    size (PEP 552)."""
    cached = path.parent / "__pycache__" / f"{path.stem}.cpython-311.pyc"
    if not cached.is_file():
        return False
    with cached.open("rb") as file:
        _, flags, modified, length = struct.unpack("<4sIII", file.read(16))
    found = path.stat()
    return bool(flags) or (modified, length) == (int(found.st_mtime), found.st_size)


# --- how it lives --------------------------------------------------------------------------------


@contextmanager
def running(
    engine: Engine, name: str, argv: Sequence[str], settings: Mapping[str, str], work: Path
) -> Iterator[tuple[Program, str]]:
    """A program of the image and the address that it says; killed at the end if it still runs."""
    log = work / f"{name}.log"
    name = f"{name}-{os.getpid()}"
    command = engine.command(name, argv, settings)
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)

    program = Program(name, process, log)

    def kill() -> None:
        engine.signal(program, signal.SIGKILL)

    try:
        # Killed, it ends its output.
        watchdog = Timer(START_S, kill)
        watchdog.start()
        try:
            url = _address(process)
        finally:
            watchdog.cancel()
        demand(url, f"{name} did not start within {START_S} s: {log.read_text()[-2000:]}")
        yield program, url
    finally:
        if process.poll() is None:
            kill()
        process.communicate()


def _address(process: subprocess.Popen[str]) -> str:
    """Where it says that it listens; nothing where it ended before."""
    for line in process.stdout or ():
        if " on http" in line:
            return line.rsplit(" ", 1)[-1].strip()
        if line.startswith("{"):
            # One that logs in JSON says it in JSON.
            return str(json.loads(line)["url"])
    return ""


def once(engine: Engine, argv: Sequence[str], settings: Mapping[str, str]) -> str:
    """What a command of the image prints."""
    done = subprocess.run(
        engine.command(f"once-{secrets.token_hex(4)}", argv, settings),
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    if done.returncode:
        raise Wrong(f"{shlex.join(argv[:2])} failed in it: {done.stderr.strip()[-2000:]}")
    return done.stdout.strip()


def check_read_only(engine: Engine) -> None:
    once(engine, ["sh", "-c", "touch /tmp/x /data/x && rm /tmp/x /data/x"], {})
    for folder in ("/", "/app", "/etc", "/var/tmp"):  # noqa: S108 - of the image
        try:
            once(engine, ["touch", f"{folder}/x"], {})
        except Wrong as exc:
            demand("Read-only file system" in str(exc), str(exc))
        else:
            raise Wrong(f"{folder} can be written to")
    say("its root is read-only, /data and /tmp are not")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def settings_for(exchange: str, clock: str) -> dict[str, str]:
    return {
        "HOST": "127.0.0.1",
        "PORT": str(_free_port()),
        "AUTH_SECRET": secrets.token_hex(32),
        "EXCHANGES": "crypto.com",
        "EXCHANGE_ENDPOINTS": json.dumps({"crypto.com": exchange}),
        "BACKFILL_DAYS": "0.5",
        "MARKET_CLOCK": clock,
    }


def check_life(image: Image, engine: Engine, data: Path, work: Path, revision: str) -> None:
    now = time.time_ns() // 1_000_000
    clock = json.dumps({"origin": now, "market": now, "speed": SPEED})
    entry = image.config["Entrypoint"]
    with ExitStack() as stack:
        _, exchange = stack.enter_context(
            running(
                engine,
                "sandbox",
                [*entry, "sandbox", "--port", "0"],
                {"MARKET_CLOCK": clock},
                work,
            )
        )
        settings = settings_for(exchange, clock)
        begun = time.monotonic()
        service, url = stack.enter_context(
            running(engine, "service", [*entry, *image.config["Cmd"]], settings, work)
        )
        say(f"it serves after {time.monotonic() - begun:.1f} s")
        token = once(engine, [*entry, "token", "--subject", "check"], settings)
        bearer = {"Authorization": f"Bearer {token}"}
        with httpx.Client(base_url=url, headers=bearer, timeout=30, trust_env=False) as client:
            check_health(client, revision)
            once(engine, image.config["Healthcheck"]["Test"][1:], settings)
            answer = client.post("/api/v1/coins", json={"coin": "BTC"})
            demand(answer.is_success, f"BTC cannot be added: {answer.text}")
        address = url.replace("http", "ws", 1) + "/ws/data"
        socket_ = stack.enter_context(
            connect(address, additional_headers=bearer, proxy=None, open_timeout=10)
        )
        check_candle(socket_, data)
        check_end(engine, service, socket_)


def check_health(client: httpx.Client, revision: str) -> None:
    until = time.monotonic() + START_S
    while (ready := client.get("/health/ready")).status_code != 200:
        demand(time.monotonic() < until, f"it is not ready after {START_S} s: {ready.text}")
        time.sleep(0.2)
    for answer in (ready, client.get("/health/live")):
        told = answer.json()["revision"]
        demand(told == revision, f"{answer.url} tells revision {told!r}, not {revision}")
    demand(
        f'revision="{revision}"' in client.get("/metrics").text, "/metrics tells another revision"
    )
    say(f"live and ready, and both and the metrics tell revision {revision}")


def check_candle(socket_: ClientConnection, data: Path) -> None:
    """A subscriber is told a closed candle, and it is stored."""
    socket_.send(json.dumps({"type": "subscribe_realtime", "coin": "BTC"}))
    until = time.monotonic() + CANDLE_S
    while True:
        message = json.loads(socket_.recv(timeout=until - time.monotonic()))
        demand(message["type"] != "error", f"it answers {message}")
        if message["type"] == "realtime_data" and message["data"]["closed"]:
            break
    timestamp = message["data"]["timestamp"]
    moment = time.strftime("%Y%m%d%H%M%S", time.gmtime(timestamp / 1000))
    stored = list(data.rglob(f"raw_data/**/{moment}.json"))
    demand(stored, f"the candle of {timestamp} was told and is in no file of {data}")
    demand(stored[0].stat().st_uid == UID, "its files belong to another user")
    say(f"a closed candle of {message['market']} was told, and is stored")


def check_end(engine: Engine, service: Program, socket_: ClientConnection) -> None:
    begun = time.monotonic()
    engine.signal(service, signal.SIGTERM)
    try:
        while True:
            socket_.recv(timeout=STOP_S - (time.monotonic() - begun))
    except ConnectionClosed as exc:
        code = exc.rcvd.code if exc.rcvd else None
        demand(code == 1012, f"SIGTERM closes an open client with {code}, not 1012")
    except TimeoutError:
        raise Wrong(f"an open client was not closed within {STOP_S} s of SIGTERM") from None
    try:
        code = service.process.wait(timeout=STOP_S - (time.monotonic() - begun))
    except subprocess.TimeoutExpired:
        raise Wrong(f"it runs {STOP_S} s after SIGTERM") from None
    seconds = time.monotonic() - begun
    log = service.log.read_text()
    demand(code == 0, f"SIGTERM ends it with exit code {code}: {log[-2000:]}")
    for line in log.splitlines():
        demand(line.startswith("{") and json.loads(line), f"no JSON line in its log: {line[:500]}")
    demand("Traceback" not in log, f"a traceback in its log: {log[-3000:]}")
    say(f"SIGTERM closes clients with 1012 and ends it with 0 after {seconds:.1f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--engine", choices=("docker", "buildah"), required=True)
    parser.add_argument("--name", required=True, help="of the image")
    parser.add_argument("--revision", required=True, help="that it was built of")
    parser.add_argument("--image-json", type=Path, required=True, help="what `inspect` prints")
    parser.add_argument("--root", type=Path, required=True, help="its content")
    parser.add_argument("--base", type=Path, required=True, help="its base's content")
    parser.add_argument("--work", type=Path, required=True, help="where to keep data and logs")
    options = parser.parse_args()
    inspected = json.loads(options.image_json.read_text())
    config = inspected[0]["Config"] if options.engine == "docker" else inspected["Docker"]["config"]
    image = Image(options.name, options.root, config)
    data = options.work / "data"
    data.mkdir()
    try:
        shutil.chown(data, UID, UID)
    except PermissionError:
        # Not root, as with a Docker engine of one's own.
        data.chmod(0o777)
    engine = (Docker if options.engine == "docker" else Chroot)(image, data)
    try:
        check_configuration(image, options.revision)
        check_content(image, options.base)
        check_read_only(engine)
        check_life(image, engine, data, options.work, options.revision)
    except Wrong as exc:
        print(f"check_image: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
