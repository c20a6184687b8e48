import asyncio

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from jest_server.cli.app import app
from jest_server.runtime.health_check import serves


@pytest.fixture
async def asked():
    servicer = health.aio.HealthServicer()
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def ask(status):
        await servicer.set("", status)
        return await asyncio.to_thread(serves, f"127.0.0.1:{port}", 5)

    yield ask
    await server.stop(None)


async def test_a_process_that_serves_is_well_and_one_that_drains_is_not(asked):
    assert (await asked(health_pb2.HealthCheckResponse.SERVING))[0]
    well, said = await asked(health_pb2.HealthCheckResponse.NOT_SERVING)
    assert not well
    assert said.endswith("NOT_SERVING")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:1/readyz"])
def test_nobody_there_is_status_1_and_said(address):
    result = CliRunner().invoke(app, ["health", address])
    assert result.exit_code == 1
    assert address in result.output
