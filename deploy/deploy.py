#!/usr/bin/env python3
"""Deploys one image to Azure Container Instances, checks it, and goes back when it is no good.

Takes everything from the environment (README.md beside this file lists it) and needs only ``az``,
logged in, and Python's standard library. Exits with 0 when the new revision is ready and a target
gained a candle; otherwise deploys the image that ran before and exits with 1.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

TEMPLATE = Path(__file__).with_name("aci.yaml")
# What deploy.py works out itself; the rest of the template's names must be in the environment.
DERIVED = {"HOST_NAME"}
BY_DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
REQUEST_TIMEOUT_S = 10


class DeployError(Exception):
    """Why a deployment failed, for whoever reads the run."""


@dataclass(frozen=True, slots=True)
class Release:
    image: str
    revision: str


def say(line: str) -> None:
    print(line, flush=True)


def az(*arguments: str) -> str:
    done = subprocess.run(["az", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeployError(f"az {' '.join(arguments[:2])} failed: {done.stderr.strip()}")
    return done.stdout


def settings(environ: Mapping[str, str]) -> dict[str, str]:
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    names = {*template.get_identifiers(), "RESOURCE_GROUP", "CHECK_TOKEN"} - DERIVED
    missing = sorted(name for name in names if not environ.get(name))
    if missing:
        raise DeployError(f"not set: {', '.join(missing)}")
    values = {name: environ[name] for name in names}
    for name in ("IMAGE", "CADDY_IMAGE"):
        if not BY_DIGEST.fullmatch(values[name]):
            raise DeployError(f"{name} must be name@sha256:digest, not {values[name]!r}")
    values["HOST_NAME"] = f"{values['DNS_LABEL']}.{values['LOCATION']}.azurecontainer.io"
    values["CHECK_URL"] = environ.get("CHECK_URL") or f"https://{values['HOST_NAME']}"
    if not values["CHECK_URL"].startswith(("https://", "http://127.0.0.1:")):
        raise DeployError("CHECK_URL must be https: the check sends a token")
    return values


def running(values: Mapping[str, str]) -> Release | None:
    """What is deployed now. A list tells nothing there from no answer, which `show` does not."""
    for group in json.loads(az("container", "list", "-g", values["RESOURCE_GROUP"], "-o", "json")):
        if group["name"] == values["CONTAINER_GROUP"]:
            images = {item["name"]: item["image"] for item in group["containers"]}
            return Release(images["service"], (group.get("tags") or {}).get("revision", ""))
    return None


def create(values: Mapping[str, str], release: Release) -> None:
    filled = {**values, "IMAGE": release.image, "REVISION": release.revision}
    # A JSON string is a YAML string, whatever is in it.
    quoted = {name: json.dumps(value) for name, value in filled.items()}
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(quoted)
    # Holds secrets: readable by its owner only, and gone afterwards.
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        az("container", "create", "-g", values["RESOURCE_GROUP"], "--file", file.name, "-o", "none")


def ask(values: Mapping[str, str], path: str, body: dict[str, Any] | None = None) -> Any:
    """The answer, also of a service that is not ready; None while there is none."""
    request = urllib.request.Request(  # noqa: S310 - settings() admits https and loopback only
        values["CHECK_URL"] + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {values['CHECK_TOKEN']}",
            "Content-Type": "application/json",
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:  # noqa: S310
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise DeployError(f"{path} refuses CHECK_TOKEN with {error.code}") from error
        try:
            return json.load(error)
        except (OSError, ValueError):
            return None
    except (OSError, ValueError):
        return None


def wait_for(what: str, seconds: float, pause: float, found: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while not found():
        if time.monotonic() >= until:
            raise DeployError(f"{what} did not happen within {seconds:g} s")
        time.sleep(pause)
    say(f"{what}: yes")


def newest(values: Mapping[str, str]) -> dict[str, int] | None:
    """The newest stored candle of each target, by its id; None while nobody says."""
    answer = ask(values, "/api/v1/coins")
    if not isinstance(answer, dict) or "targets" not in answer:
        return None
    return {target["target_id"]: target["last_entry"] or 0 for target in answer["targets"]}


def check(values: Mapping[str, str], release: Release, environ: Mapping[str, str]) -> None:
    pause = float(environ.get("POLL_S", "10"))

    def ready() -> bool:
        answer = ask(values, "/health/ready")
        return (
            isinstance(answer, dict)
            and answer.get("status") == "ready"
            # What was deployed by hand may have no tag that says its revision.
            and release.revision in ("", answer.get("revision"))
        )

    ready_s = float(environ.get("READY_TIMEOUT_S", "600"))
    wait_for(f"revision {release.revision} is ready", ready_s, pause, ready)

    before: dict[str, int] = {}
    coin = environ.get("CHECK_COIN")

    def listed() -> bool:
        found = newest(values)
        if not found:
            if found is not None and coin:
                ask(values, "/api/v1/coins", {"coin": coin})
            return False
        before.update(found)
        return True

    def gained() -> bool:
        found = newest(values) or {}
        return any(newer > before.get(target, 0) for target, newer in found.items())

    candle_s = float(environ.get("CANDLE_TIMEOUT_S", "900"))
    wait_for("a target is collected", ready_s, pause, listed)
    wait_for("a target gains a candle", candle_s, pause, gained)


def deploy(environ: Mapping[str, str]) -> None:
    values = settings(environ)
    release = Release(values["IMAGE"], values["REVISION"])
    previous = running(values)
    say(f"deploying {release.image}; before it: {previous.image if previous else 'nothing'}")
    try:
        create(values, release)
        check(values, release, environ)
    except DeployError as error:
        say(f"failed: {error}")
        if previous is None:
            raise DeployError("there is no previous image to go back to") from error
        say(f"going back to {previous.image}")
        create(values, previous)
        check(values, previous, environ)
        raise DeployError(f"{previous.image} runs again; {release.image} does not") from error


def main() -> int:
    try:
        deploy(os.environ)
    except DeployError as error:
        print(f"deploy: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
