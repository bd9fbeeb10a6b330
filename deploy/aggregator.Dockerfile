# The index's writer and its search process. Build from the repository's root:
#     docker build -f deploy/aggregator.Dockerfile -t vecfleet-aggregator .
FROM python:3.11-slim AS build
WORKDIR /source
RUN python -m venv /opt/vecfleet
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY . .
RUN /opt/vecfleet/bin/pip install -c constraints/cpu.txt '.[aggregator]' \
 && /opt/vecfleet/bin/vecfleet aggregator --check

FROM python:3.11-slim
RUN useradd --system --uid 10001 --home-dir /nonexistent vecfleet \
 && install -d -o 10001 /data
COPY --from=build /opt/vecfleet /opt/vecfleet
ENV PATH=/opt/vecfleet/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001
VOLUME /data
CMD ["vecfleet", "aggregator", "--data", "/data"]
