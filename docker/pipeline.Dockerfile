# The pipeline itself, for compose.yaml: the commands, MLflow, Prefect and Caddy, and the environments that builds run in.
#
#   docker build -f docker/pipeline.Dockerfile -t tunegate-pipeline .      # in the project's folder
#
# --build-arg DEVICE=cuda for a machine or a cluster with NVIDIA GPUs, whose driver its container runtime brings in.
# About 6 GB with all environments for a CPU; ENVIRONMENTS=control alone (1 GB) serves the pages and the proxy, and runs no build.
ARG BASE=docker.io/library/python:3.11-slim-bookworm
FROM ${BASE}
ARG ENVIRONMENTS="control train serve"
ARG DEVICE=cpu
RUN apt-get update -q \
    && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends g++ libnuma1 make \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log /var/log/apt \
    && groupadd --gid 65532 tunegate \
    && useradd --uid 65532 --gid tunegate --home-dir /tmp --no-create-home -K UID_MAX=65532 tunegate \
    && mkdir /mlruns && chown 65532:65532 /mlruns
WORKDIR /tunegate
COPY . .
RUN UV_NO_CACHE=1 python3 -m pipeline.environments ${ENVIRONMENTS}
ENV PATH=/tunegate/.venv/control/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp TUNEGATE_HOME=/mlruns PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
CMD ["tunegate", "--help"]
