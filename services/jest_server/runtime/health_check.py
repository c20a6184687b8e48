"""One question to a process that may or may not serve, over gRPC or HTTP: for containers' health checks."""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def serves(address: str, timeout_s: float) -> tuple[bool, str]:
    """Return whether the process at a gRPC address, or an http:// URL, serves, and its answer."""
    return _over_http(address, timeout_s) if address.startswith("http://") else _over_grpc(address, timeout_s)


def _over_grpc(address: str, timeout_s: float) -> tuple[bool, str]:
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return False, f"{address}: {error.code().name}: {error.details()}"
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return status == "SERVING", f"{address}: {status}"


def _over_http(url: str, timeout_s: float) -> tuple[bool, str]:
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=timeout_s)
    try:
        connection.request("GET", where.path or "/")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return False, f"{url}: {error!r}"
    finally:
        connection.close()
    return status == http.HTTPStatus.OK, f"{url}: {status}"
