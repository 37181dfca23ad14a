# syntax=docker/dockerfile:1
# The image of the pipeline's steps and of every training pod. Its tag is the project's version.
#
#   make build                                          NVIDIA: torch's wheels contain CUDA, the node has the driver
#   make build ACCELERATOR=rocm TORCH_INDEX=<…>
#   make build ACCELERATOR=cpu TORCH_INDEX=<…>
#
# TORCH_INDEX is the package index with torch's wheels for that accelerator: see https://pytorch.org/get-started.
# constraints.txt pins everything installed. kfp warns about a step's image without "python" in its name.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ARG ACCELERATOR=cuda
ARG TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build

# Dependencies first: they change rarely, and make up nearly the whole image.
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch \
    && mkdir components pipelines trainer \
    && pip install --constraint constraints.txt '.[local,vision,speech,graph,mlflow]' \
    && pip uninstall --yes diloco-pipelines
# Fail if the index has given wheels for another accelerator.
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
