# A worker on a GPU. Build from the repository's root:
#     docker build -f deploy/worker.Dockerfile -t vecfleet-worker .
# Without a GPU: --build-arg PROFILE=cpu
# (and --build-arg TORCH_INDEX=..., where pip finds torch's CPU build).
FROM python:3.11-slim AS build
ARG EXTRAS=worker
ARG PROFILE=gpu
ARG TORCH_INDEX=
WORKDIR /source
RUN python -m venv /opt/vecfleet
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY constraints constraints
RUN ${TORCH_INDEX:+env PIP_INDEX_URL="$TORCH_INDEX"} /opt/vecfleet/bin/pip install \
      "$(grep '^torch==' "constraints/${PROFILE}.txt")"
COPY . .
RUN /opt/vecfleet/bin/pip install -c "constraints/${PROFILE}.txt" ".[${EXTRAS}]" \
 && /opt/vecfleet/bin/vecfleet worker --check

# The CUDA libraries come with torch's wheels; the host brings the driver.
FROM python:3.11-slim
RUN useradd --system --uid 10001 --home-dir /cache vecfleet && install -d -o 10001 /cache
COPY --from=build /opt/vecfleet /opt/vecfleet
ENV PATH=/opt/vecfleet/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
USER 10001
VOLUME /cache
CMD ["vecfleet", "worker"]
