"""A deployment is checked, and undone when it is no good: the script as a process, with an ``az``
that records its calls and a real HTTP server in the place of the deployed service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.processes import completed, market_clock, stack

SCRIPT = Path(__file__).parents[3] / "deploy/deploy.py"
NOON = 1_763_985_600_000  # 2025-11-24T12:00:00Z
OLD, NEW, OLDER = (f"registry.example/service@sha256:{digit * 64}" for digit in "abd")
TLS, NEW_TLS = (f"caddy@sha256:{digit * 64}" for digit in "ec")
# {"alg": "HS256"} and {"exp": 1}: of 1970.
ISSUED = "eyJhbGciOiAiSFMyNTYifQ.eyJleHAiOiAxfQ.c2lnbmVk"
SECRET = 'a secret: with "quotes" # and all'

# Keeps what was asked, and the file that was passed, which is gone afterwards.
AZ = """#!{python}
import json, os, pathlib, sys
here = pathlib.Path(os.environ["AZ_FOLDER"])
if sys.argv[1:3] == ["container", "list"]:
    print((here / "list.json").read_text())
elif sys.argv[1:3] == ["container", "create"]:
    number = len(list(here.glob("create-*")))
    text = pathlib.Path(sys.argv[sys.argv.index("--file") + 1]).read_text()
    (here / f"create-{{number}}.yaml").write_text(text)
    if str(number) in os.environ.get("AZ_FAILS", ""):
        sys.exit("the quota is used up")
elif sys.argv[1:3] == ["container", "delete"]:
    (here / "deleted").touch()
else:
    sys.exit(f"unexpected: {{sys.argv}}")
"""


class World:
    """An Azure in a folder, and the service that it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.never_ready: set[str] = set()
        self.silent: set[str] = set()
        self.targets = True
        self.still: str | None = None
        self.cuts_answers = False
        self._candle = 0
        stub = folder / "az"
        stub.write_text(AZ.format(python=sys.executable))
        stub.chmod(0o755)
        self.deployed(OLD, "old")

    def deployed(self, image: str | None, revision: str = "", **tags: str) -> None:
        groups = [
            {
                "name": "group",
                "tags": {"revision": revision, **tags},
                "containers": [{"name": "service", "image": image}, {"name": "tls", "image": TLS}],
            }
        ]
        (self.folder / "list.json").write_text(json.dumps(groups if image else []))

    def created(self) -> list[dict[str, Any]]:
        return [
            yaml.safe_load(path.read_text()) for path in sorted(self.folder.glob("create-*.yaml"))
        ]

    def images(self) -> list[str]:
        return [g["properties"]["containers"][0]["properties"]["image"] for g in self.created()]

    def answer(self, path: str) -> tuple[int, dict[str, Any]]:
        created = self.created()
        revision = created[-1]["tags"]["revision"] if created else "old"
        revision = self.still or revision
        assert path in ("/health/ready", "/api/v1/coins")
        if path == "/health/ready":
            ready = revision not in self.never_ready
            status = "ready" if ready else "not_ready"
            return 200 if ready else 503, {"status": status, "revision": revision}
        if revision not in self.silent:
            self._candle += 300_000
        target = {"target_id": "crypto.com:BTC:5m", "last_entry": self._candle or None}
        return 200, {"targets": [target] if self.targets else []}

    def environment(self, **environ: str) -> dict[str, str]:
        names = (
            "CONTAINER_GROUP LOCATION IDENTITY_ID IDENTITY_CLIENT_ID REGISTRY_SERVER "
            "REGISTRY_USERNAME REGISTRY_PASSWORD DNS_LABEL STORAGE_CONTAINER STORAGE_ACCOUNT_URL "
            "CERTIFICATE_SHARE CERTIFICATE_ACCOUNT CERTIFICATE_ACCOUNT_KEY RESOURCE_GROUP"
        )
        values = {name: name.lower() for name in names.split()} | {
            "CONTAINER_GROUP": "group",
            "IMAGE": NEW,
            "REVISION": "new",
            "CADDY_IMAGE": NEW_TLS,
            "AUTH_SECRET": SECRET,
            "CHECK_TOKEN": "token",
            "CHECK_URL": self.url,
            "READY_TIMEOUT_S": "0.3",
            "CANDLE_TIMEOUT_S": "0.3",
            "POLL_S": "0.02",
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "AZ_FOLDER": str(self.folder),
            "no_proxy": "127.0.0.1",
        }
        return values | environ

    def run(self, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, SCRIPT],
            env=self.environment(**environ),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = made.answer(self.path)
            self.send_response(status)
            if made.cuts_answers and made.created():
                self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_POST(self) -> None:
            made.targets = True
            self.do_GET()

        def log_message(self, *args: Any) -> None:
            """Says nothing into the tests' output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield made
        server.shutdown()
        thread.join()


def test_a_ready_revision_that_gains_a_candle_stays(world: World) -> None:
    done = world.run()
    assert (done.returncode, world.images()) == (0, [NEW]), done.stderr
    (service, _) = world.created()[0]["properties"]["containers"]
    environment = {item["name"]: item for item in service["properties"]["environmentVariables"]}
    assert environment["AUTH_SECRET"] == {"name": "AUTH_SECRET", "secureValue": SECRET}
    assert SECRET not in done.stdout + done.stderr
    told = {name: world.created()[0]["tags"][f"fallback-{name}"] for name in ("image", "revision")}
    assert told == {"image": OLD, "revision": "old"}


def test_a_revision_that_never_gets_ready_is_replaced_by_the_previous_digest(world: World) -> None:
    world.never_ready = {"new"}
    done = world.run()
    assert (done.returncode, world.images()) == (1, [NEW, OLD])
    assert "revision new is ready did not happen" in done.stdout
    assert f"{OLD} runs again" in done.stderr
    # All of it goes back, not the service alone.
    tls = [group["properties"]["containers"][1]["properties"]["image"] for group in world.created()]
    assert tls == [NEW_TLS, TLS]


def test_what_is_not_ready_itself_is_nothing_to_go_back_to(world: World) -> None:
    older = {"fallback-image": OLDER, "fallback-revision": "older", "fallback-tls-image": TLS}
    world.deployed(OLD, "old", **older)
    world.never_ready = {"old", "new"}
    done = world.run()
    assert (done.returncode, world.images()) == (1, [NEW, OLDER])
    assert f"{OLDER} runs again" in done.stderr


def test_the_same_image_once_more_is_nothing_to_go_back_to(world: World) -> None:
    world.deployed(NEW, "new")
    world.silent = {"new"}
    done = world.run()
    assert (done.returncode, world.images()) == (1, [NEW])
    assert "no previous image" in done.stderr


def test_an_answer_that_is_cut_is_no_answer(world: World) -> None:
    world.cuts_answers = True
    done = world.run()
    assert (done.returncode, world.images()) == (1, [NEW, OLD])
    assert "revision new is ready did not happen" in done.stdout


def test_a_group_that_takes_no_update_is_made_anew(world: World) -> None:
    world.never_ready = {"new"}
    done = world.run(AZ_FAILS="1")
    assert (done.returncode, world.images()) == (1, [NEW, OLD, OLD])
    assert (world.folder / "deleted").exists()
    assert f"{OLD} runs again" in done.stderr


def test_the_readiness_of_the_revision_before_it_is_not_taken_for_the_new_one(world: World) -> None:
    world.still = "old"
    done = world.run()
    assert (done.returncode, world.images()) == (1, [NEW, OLD])


def test_a_ready_revision_without_a_new_candle_is_replaced(world: World) -> None:
    world.silent = {"new"}
    done = world.run()
    assert (done.returncode, world.images()) == (1, [NEW, OLD])
    assert "a target gains a candle did not happen" in done.stdout


def test_an_image_that_azure_refuses_is_replaced(world: World) -> None:
    done = world.run(AZ_FAILS="0")
    assert (done.returncode, world.images()) == (1, [NEW, OLD])
    assert "the quota is used up" in done.stdout


def test_a_rollback_that_fails_says_so(world: World) -> None:
    done = world.run(AZ_FAILS="0,1,2")
    assert done.returncode == 1
    assert "runs again" not in done.stderr
    assert "the quota is used up" in done.stderr


def test_a_first_deployment_that_fails_has_nothing_to_go_back_to(world: World) -> None:
    world.deployed(None)
    world.never_ready = {"new"}
    done = world.run()
    assert (done.returncode, world.images()) == (1, [NEW])
    assert "no previous image" in done.stderr


def test_a_first_deployment_adds_the_coin_that_it_is_checked_by(world: World) -> None:
    world.deployed(None)
    world.targets = False
    assert world.run(CHECK_COIN="BTC").returncode == 0


@pytest.mark.e2e
@pytest.mark.timeout(120)
async def test_a_real_service_is_found_ready_and_gains_a_candle(tmp_path: Path) -> None:
    """What the script asks is what the service answers: a period of its market is 5 s here."""
    clock = market_clock(NOON, 60)
    async with stack(tmp_path, clock, BACKFILL_DAYS="0.1", REVISION="new") as running:
        world = World(tmp_path)
        world.url = running.url
        given = world.environment(
            CHECK_TOKEN=running.token(), CHECK_COIN="BTC", READY_TIMEOUT_S="30",
            CANDLE_TIMEOUT_S="30",
        )  # fmt: skip
        code, output, errors = await completed(
            sys.executable, str(SCRIPT), environment=given, folder=tmp_path, within_s=90
        )
    assert (code, world.images()) == (0, [NEW]), errors
    assert "a target gains a candle: yes" in output


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("IMAGE", "registry.example/service:latest", "IMAGE must be name@sha256:digest"),
        ("AUTH_SECRET", "", "not set: AUTH_SECRET"),
        ("CHECK_URL", "http://example.org", "CHECK_URL must be https"),
        ("CHECK_TOKEN", ISSUED, "CHECK_TOKEN has run out"),
    ],
)
def test_nothing_is_deployed_from_wrong_settings(
    world: World, name: str, value: str, told: str
) -> None:
    done = world.run(**{name: value})
    assert (done.returncode, world.images()) == (1, [])
    assert told in done.stderr
