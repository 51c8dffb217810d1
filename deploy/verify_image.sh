#!/usr/bin/env bash
# Builds the image, starts it as it is run in production, and proves that it works: what is in it and
# how large, a read-only root, its health, a coin collected from the sandbox exchange, and its end on
# SIGTERM. Prints what it found; exits with 1 at the first thing that is wrong.
#
#   deploy/verify_image.sh [NAME]      (make image)
#
# Takes a Docker engine where one answers. Elsewhere it builds as root with buildah, isolated by
# chroot, on a base that debootstrap makes: the image's own content is the same, its base is Debian's
# Python in the place of Docker's. PYTHON_IMAGE names another base for Docker.
set -euo pipefail
cd "$(dirname "$0")/.."

NAME=${1:-cb-trade-data-service}
REVISION=${REVISION:-$(git rev-parse HEAD)}
PYTHON_IMAGE=${PYTHON_IMAGE:-python:3.11-slim-bookworm}
CERTIFICATES=/etc/ssl/certs/ca-certificates.crt
WORK=$(mktemp -d "${TMPDIR:-/tmp}/cb-trade-image.XXXXXX")
SECONDS=0
# A store of its own: nothing of this machine's is used or left.
BUILDAH=(buildah --storage-driver overlay --root "$WORK/storage" --runroot "$WORK/run")

say() { echo "== $* (${SECONDS} s)"; }

clean() {
    # What the service wrote belongs to its user, whom only the engine or root can be.
    if [[ $ENGINE == docker && -d $WORK/data ]]; then
        docker run --rm --user 0 --volume "$WORK/data:/data" --entrypoint sh "$NAME" \
            -c 'rm -rf /data/* /data/.[!.]*' || true
    fi
    if [[ $ENGINE == buildah ]]; then
        "${BUILDAH[@]}" rm --all >/dev/null 2>&1 || true
        "${BUILDAH[@]}" rmi --all --force >/dev/null 2>&1 || true
    fi
    rm -rf --one-file-system "$WORK" || true
}

install_tools() {
    local missing=()
    for tool in buildah debootstrap; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    ((${#missing[@]} == 0)) && return
    if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
        echo "verify_image: no Docker engine answers; without one it takes root, buildah and debootstrap" >&2
        exit 1
    fi
    say "installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# As much like python:3.11-slim-bookworm as the Dockerfile can tell: a `python` in /usr/local/bin that
# can make a virtual environment.
make_base() {
    local container
    debootstrap --variant=minbase --include=ca-certificates,python3-distutils,python3-venv \
        bookworm "$WORK/base" >"$WORK/debootstrap.log" 2>&1 ||
        { tail -20 "$WORK/debootstrap.log" >&2; exit 1; }
    ln -s /usr/bin/python3.11 "$WORK/base/usr/local/bin/python"
    container=$("${BUILDAH[@]}" from scratch)
    "${BUILDAH[@]}" copy --quiet "$container" "$WORK/base" / >/dev/null
    "${BUILDAH[@]}" commit --quiet --format docker "$container" localhost/python-base >/dev/null
    "${BUILDAH[@]}" rm "$container" >/dev/null
}

with_buildah() {
    local container
    ((EUID == 0)) || { echo "verify_image: building without a Docker engine takes root" >&2; exit 1; }
    install_tools
    say "making the base"
    make_base
    say "building"
    # --format docker: an OCI image has no HEALTHCHECK. The machine's own certificates are trusted
    # while it builds, since its network may have an authority of its own.
    "${BUILDAH[@]}" build --isolation chroot --format docker --layers=false \
        --volume "$CERTIFICATES:$CERTIFICATES:ro" \
        --build-arg "PIP_CERT=$CERTIFICATES" --build-arg "SSL_CERT_FILE=$CERTIFICATES" \
        --build-arg PYTHON_IMAGE=localhost/python-base --build-arg "REVISION=$REVISION" \
        --tag "localhost/$NAME" . >"$WORK/build.log" 2>&1 ||
        { tail -40 "$WORK/build.log" >&2; exit 1; }
    "${BUILDAH[@]}" inspect --type image "localhost/$NAME" >"$WORK/image.json"
    container=$("${BUILDAH[@]}" from "localhost/$NAME")
    ROOT=$("${BUILDAH[@]}" mount "$container")
}

with_docker() {
    local name folder container
    say "building on $PYTHON_IMAGE; ENGINE=buildah takes a base of Debian's"
    docker build --build-arg "PYTHON_IMAGE=$PYTHON_IMAGE" --build-arg "REVISION=$REVISION" \
        --tag "$NAME" .
    docker image inspect "$NAME" >"$WORK/image.json"
    for name in "$NAME" "$PYTHON_IMAGE"; do
        folder=$([[ $name == "$NAME" ]] && echo root || echo base)
        mkdir "$WORK/$folder"
        container=$(docker create "$name")
        docker export "$container" | tar -x -C "$WORK/$folder" --exclude='dev/*'
        docker rm --volumes "$container" >/dev/null
    done
    ROOT=$WORK/root
}

ENGINE=${ENGINE:-$(docker info >/dev/null 2>&1 && echo docker || echo buildah)}
trap clean EXIT
make --no-print-directory setup
"with_$ENGINE"
say "checking"
.venv/bin/python deploy/check_image.py --engine "$ENGINE" --name "$NAME" --revision "$REVISION" \
    --image-json "$WORK/image.json" --root "$ROOT" --base "$WORK/base" --work "$WORK"
say "the image is good"
