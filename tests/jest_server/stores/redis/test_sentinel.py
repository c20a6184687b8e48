"""Redis behind Sentinels: real ones, which find a new primary when theirs is killed."""

import shutil

import pytest
import redis as redis_client

from jest_server.domain.errors import StoreUnavailable
from jest_server.local.process import ServerProcess, free_port
from jest_server.stores.redis.connection import connect
from jest_server.stores.redis.embedding_cache import RedisEmbeddingCache
from jest_server.stores.redis.stores import open_redis_stores
from support.certificates import make_authority, needs_openssl, sign
from support.polling import wait_for
from support.servers import needs_redis_server
from support.super_batches import REFERENCE, spec

pytestmark = [needs_openssl, needs_redis_server]


class Watched:
    """A primary, its replica and a Sentinel, all with TLS and passwords; `url` leads to the primary."""

    def __init__(self, folder):
        self._folder = folder
        self.authority = make_authority(folder)
        self._pair = sign(self.authority, folder, "redis")
        self.ports = {name: free_port() for name in ("one", "two", "sentinel")}
        self.processes = {}

    @property
    def url(self):
        """Most of the Sentinels that it names are away."""
        return (
            f"rediss+sentinel://jest:s%40fe@127.0.0.1:1,127.0.0.1:2,127.0.0.1:3,127.0.0.1:{self.ports['sentinel']}/queue/0"
            f"?ssl_ca_certs={self.authority.certificate}&sentinel_username=guard&sentinel_password=watch%2Fful"
        )

    def start(self):
        users = "user default off\nuser jest on >s@fe ~* +@all\nuser link on >linked ~* &* +@all\n"
        watching = f"masteruser link\nmasterauth linked\n{users}"
        self._run("one", watching)
        self._run("two", f"replicaof 127.0.0.1 {self.ports['one']}\n{watching}")
        self._run(
            "sentinel",
            f"sentinel monitor queue 127.0.0.1 {self.ports['one']} 1\nsentinel auth-user queue link\n"
            "sentinel auth-pass queue linked\nsentinel down-after-milliseconds queue 500\n"
            "sentinel failover-timeout queue 3000\nuser default off\nuser guard on >watch/ful ~* &* +@all\n",
            "--sentinel",
        )  # fmt: skip

    def ask(self, name, *command, user="link", password="linked"):
        with redis_client.Redis(
            port=self.ports[name],
            username=user,
            password=password,
            ssl=True,
            ssl_ca_certs=str(self.authority.certificate),
        ) as client:
            return client.execute_command(*command)

    def _run(self, name, lines, *options):
        folder = self._folder / name
        folder.mkdir()
        (folder / "redis.conf").write_text(
            f"bind 127.0.0.1\nport 0\ntls-port {self.ports[name]}\ntls-auth-clients no\ntls-replication yes\n"
            f"dir {folder}\n"
            f"tls-cert-file {self._pair.certificate}\ntls-key-file {self._pair.key}\n"
            f"tls-ca-cert-file {self.authority.certificate}\n{lines}"
        )  # fmt: skip
        self.processes[name] = ServerProcess(name, folder / "log")
        user = {"user": "guard", "password": "watch/ful"} if options else {}

        def ready():
            try:
                return self.ask(name, "PING", **user)
            except redis_client.RedisError:
                return False

        command = [shutil.which("redis-server"), str(folder / "redis.conf"), *options]
        self.processes[name].start(command, ready=ready, timeout_s=20)


@pytest.fixture
async def watched(tmp_path):
    watched = Watched(tmp_path)
    try:
        watched.start()

        async def replicated():
            replicas = watched.ask("sentinel", "SENTINEL", "REPLICAS", "queue", user="guard", password="watch/ful")
            return replicas and watched.ask("one", "INFO", "replication")["connected_slaves"] == 1

        await wait_for(replicated, 30)
        yield watched
    finally:
        for process in watched.processes.values():
            process.kill()


async def test_when_the_primary_is_killed_the_same_store_goes_on_with_the_new_one(watched):
    stores, cache = open_redis_stores(watched.url), RedisEmbeddingCache.from_url(watched.url)
    await stores.jobs.create_job(spec("before"), now_s=1.0)
    await cache.put(REFERENCE, {"key": b"12345678"})
    watched.ask("one", "WAIT", 1, 5000)

    watched.processes["one"].kill()

    async def goes_on():
        try:
            return (await stores.jobs.create_job(spec("after"), now_s=2.0))[0]
        except StoreUnavailable:
            return None

    await wait_for(goes_on, 60)
    assert (await stores.jobs.get_job("before")).spec == spec("before")
    assert await cache.get(REFERENCE, ["key"]) == [b"12345678"]
    await stores.connection.close()
    await cache.close()


async def test_while_no_sentinel_answers_the_queue_is_unavailable():
    stores = open_redis_stores(f"redis+sentinel://127.0.0.1:{free_port()}/queue")
    with pytest.raises(StoreUnavailable, match="the queue does not answer"):
        await stores.connection.ping()
    await stores.connection.close()


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://:secret@host:26379",
        "redis+sentinel://:secret@host:26379/queue/first",
        "redis+sentinel://:secret@/queue",
        "redis+sentinel://:secret@host:port/queue",
        "sentinel://:secret@host:26379/queue",
    ],
)
def test_what_is_no_url_is_refused_without_telling_the_password(url):
    with pytest.raises(ValueError, match="not a Redis URL") as caught:
        connect(url)
    assert "secret" not in str(caught.value)
