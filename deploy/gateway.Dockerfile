# The gateway: no engine, no index. Build from the repository's root:
#     docker build -f deploy/gateway.Dockerfile -t vecfleet-gateway .
FROM python:3.11-slim AS build
WORKDIR /source
RUN python -m venv /opt/vecfleet
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY . .
RUN /opt/vecfleet/bin/pip install -c constraints/cpu.txt '.[gateway]' \
 && /opt/vecfleet/bin/vecfleet gateway --check --no-keys

FROM python:3.11-slim
RUN useradd --system --uid 10001 --home-dir /nonexistent vecfleet \
 && install -d -o 10001 -m 700 /keys
COPY --from=build /opt/vecfleet /opt/vecfleet
ENV PATH=/opt/vecfleet/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001
EXPOSE 8000
VOLUME /keys
ENV VECFLEET_KEYS_FILE=/keys/keys.json
CMD ["vecfleet", "gateway", "--host", "0.0.0.0", "--port", "8000"]
