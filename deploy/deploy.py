#!/usr/bin/env python3
"""Deploys one image to Azure Container Instances, checks it, and goes back when it is no good.

Takes everything from the environment (README.md beside this file lists it) and needs only ``az``,
logged in, and Python's standard library. Exits with 0 when the new revision is ready and a target
gained a candle; otherwise, whatever went wrong, deploys the images that were good before and exits
with 1. Each group says in its tags what to go back to, should it be no good itself.

Cancelled, it stops at once and goes back to nothing: run it again.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import signal
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
DERIVED = {"HOST_NAME", "FALLBACK_IMAGE", "FALLBACK_REVISION", "FALLBACK_TLS_IMAGE"}
BY_DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
REQUEST_TIMEOUT_S = 10
AZ_TIMEOUT_S = 600
LISTED_S = 120
# A token must outlast a deployment and the way back.
TOKEN_S = 2 * 3600


# What a service that is just starting, or the proxy before it, may answer.
BROKEN_ANSWERS = (OSError, ValueError, http.client.HTTPException)


class DeployError(Exception):
    """Why a deployment failed, for whoever reads the run."""


@dataclass(frozen=True, slots=True)
class Release:
    """What one deployment runs; template and settings are always the newest."""

    image: str
    revision: str
    tls_image: str


@dataclass(frozen=True, slots=True)
class Deployed:
    """What is there now, and what it would have gone back to."""

    release: Release
    fallback: Release | None


def say(line: str) -> None:
    print(line, flush=True)


def az(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["az", *arguments], capture_output=True, text=True, check=False, timeout=AZ_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        told = " ".join(arguments[:2])
        raise DeployError(f"az {told} did not end within {AZ_TIMEOUT_S} s") from error
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
    check_token(values["CHECK_TOKEN"])
    return values


def check_token(token: str) -> None:
    """Notice a token that has run out before it is taken for a revision that is no good."""
    try:
        payload = token.split(".")[1]
        expires = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"]
    except (IndexError, KeyError, TypeError, ValueError):
        return  # it is no token that says so
    if expires < time.time() + TOKEN_S:
        raise DeployError("CHECK_TOKEN has run out, or is about to; make a new one")


def running(values: Mapping[str, str]) -> Deployed | None:
    """What is deployed now. A list tells nothing there from no answer, which `show` does not."""
    for group in json.loads(az("container", "list", "-g", values["RESOURCE_GROUP"], "-o", "json")):
        if group["name"] == values["CONTAINER_GROUP"]:
            images = {item["name"]: item["image"] for item in group["containers"]}
            tags = group.get("tags") or {}
            fallback = None
            if tags.get("fallback-image"):
                fallback = Release(
                    tags["fallback-image"],
                    tags.get("fallback-revision", ""),
                    tags.get("fallback-tls-image") or images["tls"],
                )
            release = Release(images["service"], tags.get("revision", ""), images["tls"])
            return Deployed(release, fallback)
    return None


def fallback_for(
    values: Mapping[str, str], deployed: Deployed | None, wanted: Release
) -> Release | None:
    """What to go back to: what runs now if it is ready, else what that would have gone back to."""
    if deployed is None:
        return None
    if deployed.release.image != wanted.image and is_ready(values, deployed.release):
        return deployed.release
    return deployed.fallback


def create(values: Mapping[str, str], release: Release, fallback: Release | None) -> None:
    filled = {
        **values,
        "IMAGE": release.image,
        "REVISION": release.revision,
        "CADDY_IMAGE": release.tls_image,
        "FALLBACK_IMAGE": fallback.image if fallback else "",
        "FALLBACK_REVISION": fallback.revision if fallback else "",
        "FALLBACK_TLS_IMAGE": fallback.tls_image if fallback else "",
    }
    # A JSON string is a YAML string, but for surrogates, which YAML does not join.
    quoted = {name: json.dumps(value, ensure_ascii=False) for name, value in filled.items()}
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
        except BROKEN_ANSWERS:
            return None
    except BROKEN_ANSWERS:
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


def is_ready(values: Mapping[str, str], release: Release) -> bool:
    answer = ask(values, "/health/ready")
    return (
        isinstance(answer, dict)
        and answer.get("status") == "ready"
        # What was deployed by hand may have no tag that says its revision.
        and release.revision in ("", answer.get("revision"))
    )


def check(values: Mapping[str, str], release: Release, environ: Mapping[str, str]) -> None:
    pause = float(environ.get("POLL_S", "10"))
    ready_s = float(environ.get("READY_TIMEOUT_S", "600"))
    wait_for(
        f"revision {release.revision} is ready", ready_s, pause, lambda: is_ready(values, release)
    )

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
        return any(found.get(target, 0) > newest_before for target, newest_before in before.items())

    candle_s = float(environ.get("CANDLE_TIMEOUT_S", "900"))
    wait_for("a target is collected", LISTED_S, pause, listed)
    wait_for("a target gains a candle", candle_s, pause, gained)


def go_back(values: Mapping[str, str], release: Release, environ: Mapping[str, str]) -> None:
    say(f"going back to {release.image}")
    try:
        create(values, release, release)
    except DeployError as error:
        # A group that has ended with a failure takes no update: it must be made anew.
        say(f"failed: {error}; deleting the group first")
        group = ("-g", values["RESOURCE_GROUP"], "-n", values["CONTAINER_GROUP"])
        az("container", "delete", *group, "--yes", "-o", "none")
        create(values, release, release)
    check(values, release, environ)


def deploy(environ: Mapping[str, str]) -> None:
    values = settings(environ)
    release = Release(values["IMAGE"], values["REVISION"], values["CADDY_IMAGE"])
    fallback = fallback_for(values, running(values), release)
    say(f"deploying {release.image}; to go back to: {fallback.image if fallback else 'nothing'}")
    try:
        create(values, release, fallback)
        check(values, release, environ)
    except Exception as error:
        # Whatever it was: what runs now was not found to be good.
        say(f"failed: {error!r}" if not isinstance(error, DeployError) else f"failed: {error}")
        if fallback is None:
            raise DeployError("there is no previous image to go back to") from error
        go_back(values, fallback, environ)
        raise DeployError(f"{fallback.image} runs again; {release.image} does not") from error


def main() -> int:
    # As an exception, so that the file with the secrets is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        deploy(os.environ)
    except DeployError as error:
        print(f"deploy: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
