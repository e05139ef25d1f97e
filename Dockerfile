# docker build -t cnsdiff .                          the CUDA build, for GPU nodes
# docker build -t cnsdiff --build-arg LOCK=cpu .     for CPU nodes; see docs/dependencies.md
# docker run cnsdiff train configs/demo.yaml         one process; for several, --entrypoint torchrun
FROM python:3.11-slim

ARG LOCK=cuda
# The host of PyTorch's CPU wheels, or a mirror, goes in PIP_EXTRA_INDEX_URL.
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

WORKDIR /app
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# The libraries are a layer of their own: changing the code does not download them again.
COPY requirements/ requirements/
RUN pip install "$(grep '^torch==' "requirements/${LOCK}.txt")" \
    && pip install -r "requirements/${LOCK}.txt" \
    && if [ "${LOCK}" = cpu ]; then pip install --no-deps -r requirements/cpu-nodeps.txt; fi

COPY pyproject.toml ./
COPY cnsdiff_dist/ cnsdiff_dist/
COPY configs/ configs/
RUN pip install --no-deps --no-build-isolation . && rm -rf build ./*.egg-info \
    && useradd --create-home --uid 1000 cnsdiff && mkdir -p data runs && chown cnsdiff data runs

USER 1000
ENTRYPOINT ["cnsdiff"]
CMD ["--help"]
