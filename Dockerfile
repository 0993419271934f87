# Rowcast as an image: `docker build --tag rowcast .`. docs/operate.md says how to run it.
FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE requirements.lock ./
COPY daemon daemon
COPY ddl ddl
COPY triggers triggers
COPY web web
COPY systemd systemd
COPY monitoring monitoring
COPY clients/javascript/rowcast.js clients/javascript/rowcast.js
# The versions of the lock file, without the tools for developers that are in it, too.
RUN sed -nE 's/^([A-Za-z0-9._-]+==[^ ;]+).*/\1/p' requirements.lock > constraints.txt \
 && python -m venv /opt/rowcast \
 && /opt/rowcast/bin/pip install --no-cache-dir --constraint constraints.txt '.[email_unsubscribe,nats,ssh]'

FROM python:3.13-slim
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin rowcast
COPY --from=build /opt/rowcast /opt/rowcast
ENV PATH=/opt/rowcast/bin:$PATH \
    ROWCAST_LISTEN=0.0.0.0:8787
USER 10001:10001
EXPOSE 8787
HEALTHCHECK --interval=10s --timeout=10s --start-period=30s CMD ["daemon", "status"]
ENTRYPOINT ["daemon"]
