"""Redis with TLS, a password and narrow rights, as docs/security.md describes it."""

import shutil

import pytest
import redis as redis_client

from jest_server.domain.errors import StoreUnavailable
from jest_server.domain.jobs import JobSpec
from jest_server.domain.policies import PolicySpec
from jest_server.domain.storage import Lease
from jest_server.local.process import ServerProcess, free_port
from jest_server.stores.redis.embedding_cache import RedisEmbeddingCache
from jest_server.stores.redis.stores import open_redis_stores
from support.certificates import make_authority, needs_openssl, sign
from support.servers import needs_redis_server
from support.super_batches import REFERENCE, decision, queue_one, result_of

pytestmark = [needs_openssl, needs_redis_server]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """host:port and the authority's file of a Redis with two users: queue and cache."""
    folder = tmp_path_factory.mktemp("redis-tls")
    authority = make_authority(folder)
    pair, port = sign(authority, folder, "redis"), free_port()
    (folder / "redis.conf").write_text(
        f'bind 127.0.0.1\nport 0\ntls-port {port}\ntls-auth-clients no\nsave ""\ndir {folder}\n'
        f"tls-cert-file {pair.certificate}\ntls-key-file {pair.key}\ntls-ca-cert-file {authority.certificate}\n"
        "user default off\n"
        "user queue on >queue-secret ~{jest}:* +@all\n"
        "user cache on >cache-secret ~jest:e:* ~jest:l:* +@all\n"
    )  # fmt: skip
    process = ServerProcess("redis with TLS", folder / "redis.log")

    def ready():
        try:
            with redis_client.Redis(
                port=port, username="queue", password="queue-secret", ssl=True, ssl_ca_certs=str(authority.certificate)
            ) as client:
                return client.ping()
        except redis_client.RedisError:
            return False

    process.start([shutil.which("redis-server"), str(folder / "redis.conf")], ready=ready, timeout_s=20)
    yield f"127.0.0.1:{port}", authority.certificate
    process.stop(grace_s=5)


def url(address, user, *, scheme="rediss", trusting=True):
    host, authority = address
    return f"{scheme}://{user}@{host}/0" + (f"?ssl_ca_certs={authority}" if trusting else "")


async def test_the_queue_works_with_the_rights_that_the_documentation_names(address):
    stores = open_redis_stores(url(address, "queue:queue-secret"))
    spec = JobSpec(name="job", policy=PolicySpec(filter_ratio="0.5"))
    assert (await stores.jobs.create_job(spec, now_s=1.0))[1]
    assert (await stores.jobs.get_job("job")).spec == spec
    await stores.jobs.announce_reference(REFERENCE, ttl_s=60)
    await queue_one(stores, "other")
    (claim,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    await stores.queue.release("c", [claim])
    (claim,) = await stores.queue.claim("c", REFERENCE, count=1, block_s=1)
    await stores.queue.complete(claim, result_of(claim))
    await stores.decisions.decide(decision("other"), keep_s=60)
    assert await stores.jobs.delete_job("other")
    await stores.connection.close()


async def test_the_cache_works_with_the_rights_that_the_documentation_names(address):
    cache = RedisEmbeddingCache.from_url(url(address, "cache:cache-secret"))
    values = (await cache.stats()).values  # of the whole Redis, in which another test's queue may lie
    await cache.put(REFERENCE, {"key": b"12345678"})
    assert await cache.get(REFERENCE, ["key", "other"]) == [b"12345678", None]
    taken = await cache.take(REFERENCE, ["key", "other"], owner="me", ttl_s=60)
    assert taken == [b"12345678", Lease.MINE]
    await cache.renew(REFERENCE, ["other"], owner="me", ttl_s=60)
    await cache.release_leases(REFERENCE, ["other"], owner="me")
    assert (await cache.stats()).values == values + 1
    await cache.close()


@pytest.mark.parametrize(
    ("user", "options"),
    [
        ("cache:guessed", {}),
        (":", {}),
        ("queue:queue-secret", {}),
        ("cache:cache-secret", {"trusting": False}),
        ("cache:cache-secret", {"scheme": "redis", "trusting": False}),
    ],
)
async def test_every_other_way_in_is_refused_without_telling_the_password(address, user, options):
    cache = RedisEmbeddingCache.from_url(url(address, user, **options))
    with pytest.raises(StoreUnavailable, match="the cache does not answer") as caught:
        await cache.put(REFERENCE, {"key": b"12345678"})
    assert "secret" not in str(caught.value)
    assert "guessed" not in str(caught.value)
    await cache.close()
