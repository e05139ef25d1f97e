# docker build -t cnsdiff .                          for GPU nodes (CUDA 13)
# docker build -t cnsdiff --build-arg LOCK=cpu .     for CPU nodes; see docs/dependencies.md
# docker run --read-only --tmpfs /tmp --tmpfs /cache --shm-size 1g \
#     -v "$PWD/data:/app/data" -v "$PWD/runs:/app/runs" cnsdiff launch/torchrun.sh train configs/demo.yaml
# launch/image.sh builds and checks the image without docker.

# All stages have the same Python at the same path, because the environment refers to it.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS python
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Debian's mirrors keep only the newest version of a package, so a pinned version would soon not build.
# With SOURCE_DATE_EPOCH, whatever its value, Python checks bytecode by the hash of its source, so the
# bytecode stays valid in a build that sets all times to one. Logs and caches are removed because they
# differ from build to build.
# hadolint ignore=DL3008
RUN export DEBIAN_FRONTEND=noninteractive SOURCE_DATE_EPOCH=315532800 \
    && apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 tini \
    && find / -xdev -type f -perm /6000 -exec chmod ug-s {} + \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old \
        /var/cache/ldconfig/* /var/log/* /tmp/*


# For wheels that no index has: docker build --build-context wheels=FOLDER
FROM scratch AS wheels


FROM python AS libraries
ARG LOCK=cuda
# PIP_EXTRA_INDEX_URL is an index beside pip's default, for example the one with torch's CPU builds.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS=/wheels
# The constraint is a variable so that it also holds for the packages that a source build needs.
ENV PIP_CONSTRAINT=/requirements/${LOCK}.txt PIP_PYTHON=/opt/cnsdiff/bin/python PIP_USE_PEP517=1 \
    PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_PROGRESS_BAR=off PIP_ROOT_USER_ACTION=ignore \
    PIP_DISABLE_PIP_VERSION_CHECK=1 SOURCE_DATE_EPOCH=315532800 PYTHONHASHSEED=0
# hadolint ignore=DL3008,DL3009
RUN apt-get update && apt-get install -y --no-install-recommends python3-pip \
    && python3 -m venv --without-pip /opt/cnsdiff
COPY requirements/ /requirements/
# The secret holds the certificates of a network that has its own certificate authority.
RUN --mount=type=bind,from=wheels,target=/wheels --mount=type=secret,id=ca \
    if [ -e /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi \
    && pip install "$(grep '^torch==' "/requirements/${LOCK}.txt")" \
    && pip install -r "/requirements/${LOCK}.txt" \
    && if [ "${LOCK}" = cpu ]; then pip install --no-deps -r /requirements/cpu-nodeps.txt; fi
# Only builds and tests need these files. Of torch's programs only the shared memory manager is run.
# Bytecode is an eighth of the image; without it every start would take three times as long.
WORKDIR /opt/cnsdiff/lib/python3.11/site-packages
RUN rm -rf torch/include torch/share/cmake torch/test pyarrow/include \
    && find torch/bin -mindepth 1 ! -name torch_shm_manager -delete \
    && find matplotlib numpy pyarrow sympy -name tests -prune -exec rm -r {} + \
    && python3 -m compileall -q -x py312_ --invalidation-mode unchecked-hash .


FROM libraries AS package
WORKDIR /source
COPY pyproject.toml ./
COPY cnsdiff_dist/ cnsdiff_dist/
COPY launch/k8s/ launch/k8s/
RUN pip install --no-deps --no-build-isolation --root /package . \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /package


FROM python
RUN echo 'cnsdiff:x:1000:1000::/tmp:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'cnsdiff:x:1000:' >> /etc/group \
    && install -d -o 1000 -g 1000 /cache /app/data /app/runs
COPY --from=libraries /opt/cnsdiff /opt/cnsdiff
COPY --from=package /package/opt/cnsdiff /opt/cnsdiff
WORKDIR /app
COPY configs/ configs/
COPY launch/torchrun.sh launch/nightly.sh launch/slurm.sbatch launch/

# HOME and CNSDIFF_CACHE are writable even if the root file system is read-only. The launch script
# finds GPUs with nvidia-smi, which the driver capability "utility" provides.
ENV PATH=/opt/cnsdiff/bin:$PATH HOME=/tmp CNSDIFF_CACHE=/cache PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
STOPSIGNAL SIGTERM
# The check uses http.client because urllib would use a proxy that the environment names.
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s CMD ["/usr/bin/python3", "-IS", "-c", \
    "import http.client, os\nport = os.environ.get('CNSDIFF_HEALTH_PORT')\nif port:\n    probe = http.client.HTTPConnection('127.0.0.1', int(port), timeout=4)\n    probe.request('GET', '/healthz')\n    raise SystemExit(probe.getresponse().status != 200)"]
ENTRYPOINT ["tini", "--"]
CMD ["cnsdiff", "--help"]

# The labels come last because they change with every commit.
ARG CREATED=
ARG REVISION=
ARG SOURCE=
ARG VERSION=
LABEL org.opencontainers.image.title="cnsdiff_dist" \
    org.opencontainers.image.description="Distributed training of recommender embeddings that hold up out of distribution" \
    org.opencontainers.image.created="${CREATED}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.source="${SOURCE}" \
    org.opencontainers.image.version="${VERSION}"
