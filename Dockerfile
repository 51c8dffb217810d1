# cb-trade data service.
# Build: docker build -t cb-trade-data-service .
# Run:   docker run --read-only --tmpfs /tmp -p 8000:8000 -v cb-trade-data:/data -e AUTH_SECRET=... \
#            cb-trade-data-service
# What is deployed names its base by digest: --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# For networks with a certificate authority of their own: a bundle that is mounted while it builds.
ARG PIP_CERT
ARG SSL_CERT_FILE
ENV PYC_INVALIDATION_MODE=UNCHECKED_HASH
WORKDIR /build
COPY requirements-bootstrap.lock requirements.lock ./
RUN python -m venv /bootstrap \
    && /bootstrap/bin/pip install --no-cache-dir --require-hashes -r requirements-bootstrap.lock \
    && python -m venv --without-pip /app
# The lock holds the extra otel: traces take an endpoint in the environment and no other image.
# Bytecode is compiled here: the file system of the running container may be read-only. It is never
# compared with its source, whose time an image's layers round to another second. The libraries'
# own tests are a tenth of them, and nothing imports them.
RUN VIRTUAL_ENV=/app /bootstrap/bin/uv pip install --no-cache --require-hashes --compile-bytecode \
        -r requirements.lock \
    && find /app/lib -type d \( -name tests -o -name test \) -prune -exec rm -rf {} +
COPY pyproject.toml README.md ./
COPY data-service/src data-service/src
RUN /bootstrap/bin/uv build --wheel --no-build-isolation --python /bootstrap/bin/python \
        --out-dir /wheels . \
    && VIRTUAL_ENV=/app /bootstrap/bin/uv pip install --no-cache --no-deps --compile-bytecode \
        /wheels/*.whl

FROM ${PYTHON_IMAGE}
# The base brings a pip, which nothing here uses, and its standard library without bytecode.
RUN rm -rf /usr/local/lib/python3.11/site-packages/* /usr/local/lib/python3.11/ensurepip \
        /usr/local/bin/pip* /usr/local/bin/wheel \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash "$(python -c 'import os; print(os.path.dirname(os.__file__))')" \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin service \
    && install --directory --owner 10001 --group 10001 /data
COPY --from=build /app /app
ENV PATH=/app/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0 \
    PORT=8000 \
    STORAGE_ROOT=/data \
    STATE_DIR=/data \
    LOG_FORMAT=json
ARG SOURCE=https://github.com/cyberbuild/cb-trade-data-service
ARG REVISION=unknown
ARG VERSION=0.1.0
ENV REVISION=${REVISION}
LABEL org.opencontainers.image.title="cb-trade data service" \
      org.opencontainers.image.source=${SOURCE} \
      org.opencontainers.image.revision=${REVISION} \
      org.opencontainers.image.version=${VERSION}
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
# Not by urllib, which would ask a proxy that the environment names.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['PORT']), timeout=4); c.request('GET', '/health/live'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["cb-trade-data"]
CMD ["serve"]
