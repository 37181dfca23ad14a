# syntax=docker/dockerfile:1
# The image of the pipeline's steps and of every pod that trains.
#
#   docker build -t diloco-pipelines-python:0.1.0 .                      NVIDIA: torch's wheels bring CUDA, the node the driver
#   docker build -t diloco-pipelines-python:0.1.0-rocm --build-arg ACCELERATOR=rocm --build-arg TORCH_INDEX=<…> .
#   docker build -t diloco-pipelines-python:0.1.0-cpu --build-arg ACCELERATOR=cpu --build-arg TORCH_INDEX=<…> .
#
# TORCH_INDEX is the package index with torch's wheels for that accelerator: https://pytorch.org/get-started names it.
# What is installed is what constraints.txt pins. kfp wants "python" in the name of a step's image.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ARG ACCELERATOR=cuda
ARG TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build

# Dependencies first: they change seldom, and are nearly all of the image.
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch \
    && mkdir components pipelines trainer \
    && pip install --constraint constraints.txt '.[local,vision,speech,graph]' \
    && pip uninstall --yes diloco-pipelines
# A build that was asked for one accelerator and found the wheels of another is none.
RUN python -c "import sys, torch; v = torch.version; \
has = 'rocm' if v.hip else 'cuda' if v.cuda else 'cpu'; \
sys.exit(f'error: ACCELERATOR={sys.argv[1]}, but this torch is for {has}: see TORCH_INDEX' if has != sys.argv[1] else 0)" \
    "$ACCELERATOR"

COPY components components
COPY pipelines pipelines
COPY trainer trainer
RUN pip install --no-cache-dir --no-deps .

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="diloco-pipelines" \
    org.opencontainers.image.description="DiLoCo training over far-apart, elastic workers: pipeline steps and workers" \
    org.opencontainers.image.licenses="Apache-2.0"
# torch.compile (compile_model) calls a compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1
# The user of the pods' security context, with a name (torch and others ask for it). /data is a pod's volume.
RUN useradd --uid 1000 --user-group --no-create-home --home-dir /tmp trainer \
    && install --directory --owner trainer --group trainer /data
USER 1000:1000
WORKDIR /data
CMD ["python", "-m", "trainer", "--help"]
