"""Looks reference embeddings up in files that ``jest-server embed`` made; see ``embeddings.format``.

This tier only saves work. Whatever is wrong with it is logged and counted, and what cannot be read counts as absent:
training goes on with embeddings that are computed. Each row has a checksum, so wrong bytes count as absent, too.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from jest_server.runtime.logs import get_logger
from jest_server.stores.embedding_files.folder import EmbeddingFolder
from jest_server.stores.embedding_files.format import space_of
from jest_server.stores.embedding_files.listing import Listing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jest_server.domain.references import ReferenceInfo
    from jest_server.runtime.metrics import EmbeddingFileMetrics

T = TypeVar("T")

FIRST_LISTING_S = 10.0
"""How long the first to ask for a model waits for its files to be listed; until they are, they count as absent."""
PAUSE_S = 30.0
"""How long files are left alone after they did not answer in time."""
_THREADS = 4
"""Of their own, so that reads that hang hold nothing else up."""

_log = get_logger()


class _Space:
    """One model's files, listed again and again while somebody asks."""

    def __init__(self, root: str, reference: ReferenceInfo) -> None:
        self.reference = reference
        self.listing = Listing(EmbeddingFolder(root, space_of(reference)))
        self.listed_at_s: float | None = None
        self.task: asyncio.Task[None] | None = None


class EmbeddingFiles:
    """The embeddings below one URL, of every model."""

    def __init__(
        self, url: str, metrics: EmbeddingFileMetrics, *, refresh_s: float = 60.0, timeout_s: float = 10.0
    ) -> None:
        """Reads nothing yet.

        Args:
            url: What ``jest-server embed --output`` was given.
            metrics: Counts of rows found and of what went wrong.
            refresh_s: How often, at most, new files are looked for.
            timeout_s: What a lookup may take.

        Raises:
            ValueError: If nothing here can read such a URL.
        """
        EmbeddingFolder(url, "")
        self._url = url
        self._metrics = metrics
        self._refresh_s = refresh_s
        self._timeout_s = timeout_s
        self._spaces: dict[str, _Space] = {}
        self._paused_until_s = 0.0
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="embedding-files")

    async def get(self, reference: ReferenceInfo, keys: Sequence[str]) -> list[bytes | None]:
        """Returns ``[2, D]`` f16 bytes or None for each key, in order, as ``EmbeddingCache.get`` does; never raises."""
        nothing: list[bytes | None] = [None] * len(keys)
        if not keys or time.monotonic() < self._paused_until_s:
            return nothing
        space = self._space(reference)
        await self._listed(space)
        listing = space.listing
        if not len(listing.index):
            return nothing
        try:
            async with asyncio.timeout(self._timeout_s):
                values = await self._in_thread(lambda: listing.read(keys, self._problem))
        except TimeoutError:
            self._problem("timeout", f"no answer within {self._timeout_s:g} s; left alone for {PAUSE_S:g} s")
            self._paused_until_s = time.monotonic() + PAUSE_S
            return nothing
        except Exception as error:  # noqa: BLE001 - every kind of object store raises errors of its own
            self._problem("read", repr(error))
            return nothing
        self._metrics.hits.inc(sum(value is not None for value in values))
        return values

    async def close(self) -> None:
        """Waits for no read that hangs."""
        tasks = [space.task for space in self._spaces.values() if space.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _space(self, reference: ReferenceInfo) -> _Space:
        name = space_of(reference)
        space = self._spaces.get(name)
        if space is None or space.reference.embedding_width != reference.embedding_width:
            space = self._spaces[name] = _Space(self._url, reference)
        return space

    async def _listed(self, space: _Space) -> None:
        """Begins a listing if it is time for one; waits for it only if there was none before."""
        never = space.listed_at_s is None
        if space.task is None and (never or time.monotonic() - (space.listed_at_s or 0) >= self._refresh_s):
            space.task = asyncio.create_task(self._list(space))
        if never and space.task is not None:
            await asyncio.wait([space.task], timeout=FIRST_LISTING_S)
            space.listed_at_s = space.listed_at_s or time.monotonic()

    async def _list(self, space: _Space) -> None:
        try:
            before = space.listing
            space.listing = await self._in_thread(lambda: before.refreshed(space.reference, self._problem))
            if space.listing is not before:
                _log.info("embedding files listed", url=before.folder.url, rows=len(space.listing.index))
            self._metrics.rows.set(sum(len(each.listing.index) for each in self._spaces.values()))
        except Exception as error:  # noqa: BLE001 - as above
            self._problem("listing", repr(error))
        finally:
            space.listed_at_s = time.monotonic()
            space.task = None

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _problem(self, kind: str, detail: str) -> None:
        self._metrics.problems.labels(kind).inc()
        _log.warning("embedding files cannot be used", kind=kind, url=self._url, detail=detail)
