"""The use case of embedding a data set offline: input shard by input shard, each written whole or not at all."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from jest_server.domain.errors import ReferenceModelError
from jest_server.examples.decoding import Example, LeftOut, example_of
from jest_server.examples.preprocessing import ExamplesRefused
from jest_server.examples.shards import UnreadableShard
from jest_server.runtime.logs import get_logger
from jest_server.stores.embedding_files.format import EmbeddingFileError, Manifest, Origin, pack, shard_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    import numpy.typing as npt

    from jest_server.domain.ports import ReferenceModel
    from jest_server.domain.references import ReferenceInfo
    from jest_server.embed.progress import Progress
    from jest_server.examples.options import EmbedOptions
    from jest_server.examples.preprocessing import Preprocessing
    from jest_server.examples.shards import InputShard
    from jest_server.stores.embedding_files.folder import EmbeddingFolder

T = TypeVar("T")

ATTEMPTS = 6
RETRY_S = 1.0
"""Waits between attempts double from here: half a minute for a model that starts again."""
_TOLD_EACH = 10
"""Examples left out that are told one by one, of each shard; the rest are only counted."""

_log = get_logger()


class ShardFailed(Exception):
    """The shard was not written; others may be."""


class Stopped(Exception):
    """Somebody asked to stop; finished shards stay."""


@dataclass
class Summary:
    """What became of the input shards and their examples."""

    written: int = 0
    skipped: int = 0
    """Were there before."""
    failed: int = 0
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass
class OfflinePass:
    """Embeds input shards with one reference model at one version."""

    model: ReferenceModel
    reference: ReferenceInfo
    preprocessing: Preprocessing
    folder: EmbeddingFolder
    options: EmbedOptions
    progress: Progress
    stop: asyncio.Event
    summary: Summary = field(default_factory=Summary)

    async def run(self, shards: Sequence[InputShard]) -> None:
        """Embeds what is not there yet; a shard that cannot be is told and left.

        Raises:
            Stopped: After the batch in hand, if ``stop`` was set.
            PreprocessingError: If the preprocessing does not fit the model.
            ReferenceModelError: If the model is away for long, or was replaced by another.
        """
        for shard in shards:
            try:
                await self._embed(shard)
            except (ShardFailed, UnreadableShard) as error:
                self.summary.failed += 1
                _log.error("input shard failed", source=shard.source, error=str(error))
            self.progress.shard_done()

    async def _embed(self, shard: InputShard) -> None:
        if self.stop.is_set():
            raise Stopped
        origin = Origin(
            model=self.reference.name,
            version=self.reference.version,
            preprocessing_id=self.reference.preprocessing_id,
            width=self.reference.embedding_width,
            source=shard.source,
            source_bytes=await asyncio.to_thread(shard.size),
            key=self.options.key,
            caption=self.options.caption,
        )
        if await asyncio.to_thread(self._is_there, origin):
            self.summary.skipped += 1
            return
        if await self.model.info() != self.reference:
            raise ReferenceModelError("the reference model was replaced by another meanwhile", retryable=False)
        rows = _Rows(shard.source)
        batches = self._batches(shard, rows)
        coming = asyncio.create_task(asyncio.to_thread(next, batches, None))
        try:
            while batch := await coming:
                # While the model embeds one batch, the next is read and decoded.
                coming = asyncio.create_task(asyncio.to_thread(next, batches, None))
                rows.add(batch, await self._embedded(batch))
                self.progress.rows_done(len(batch.keys))
                if self.stop.is_set():
                    raise Stopped
        finally:
            await asyncio.gather(coming, return_exceptions=True)
            batches.close()
        await self._write(origin, rows)

    def _is_there(self, origin: Origin) -> bool:
        try:
            manifest = self.folder.manifest(shard_of(origin.source))
        except EmbeddingFileError as error:
            _log.warning("manifest cannot be used; the shard is made anew", error=str(error))
            return False
        except Exception as error:
            raise ShardFailed(f"its manifest cannot be read in {self.folder.url}: {error!r}") from error
        return manifest is not None and Origin(**manifest.model_dump(include=set(Origin.model_fields))) == origin

    def _batches(self, shard: InputShard, rows: _Rows) -> Generator[_Batch, None, None]:
        """Reads, decodes and preprocesses; runs in a thread."""
        examples = self._examples(shard, rows)
        while some := list(itertools.islice(examples, self.options.batch)):
            yield from self._prepared(some, rows)

    def _examples(self, shard: InputShard, rows: _Rows) -> Iterator[Example]:
        for raw in shard.examples():
            example = example_of(raw, self.options, shard=shard.name)
            if isinstance(example, Example) and example.key in rows.seen:
                example = LeftOut(example.key, "repeated key", "another example of this shard has it")
            if isinstance(example, LeftOut):
                rows.leave_out(example)
            else:
                rows.seen.add(example.key)
                yield example

    def _prepared(self, examples: list[Example], rows: _Rows) -> Iterator[_Batch]:
        """Preprocesses a batch; if that fails, one example after the other, so that one bad one costs itself alone."""
        try:
            yield _Batch([example.key for example in examples], self.preprocessing(examples))
        except ExamplesRefused as error:
            if len(examples) == 1:
                rows.leave_out(LeftOut(examples[0].key, "preprocessing failed", str(error)[:300]))
                return
            for example in examples:
                yield from self._prepared([example], rows)

    async def _embedded(self, batch: _Batch) -> npt.NDArray[np.float16]:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                embedded = await self.model.embed(batch.inputs)
            except ReferenceModelError as error:
                if not error.retryable:
                    raise ShardFailed(
                        f"the reference model refuses a batch that begins with {batch.keys[0]!r}: {error}"
                    ) from error
                if attempt == ATTEMPTS:
                    raise
                _log.warning("inference failed", error=str(error), attempt=attempt)
                await self._pause(RETRY_S * 2 ** (attempt - 1))
            else:
                return embedded.astype(np.float16)
        raise AssertionError("the last attempt returns or raises")

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.stop.wait()
        except TimeoutError:
            return
        raise Stopped

    async def _write(self, origin: Origin, rows: _Rows) -> None:
        left_out = sum(rows.left_out.values())
        if left_out > self.options.max_left_out * (left_out + len(rows.keys)):
            raise ShardFailed(
                f"{left_out} of {left_out + len(rows.keys)} examples cannot be embedded ({dict(rows.left_out)}), "
                f"expected a share of up to {self.options.max_left_out:g} (--max-left-out)"
            )
        await asyncio.to_thread(self._pack_and_write, origin, rows)
        self.summary.written += 1
        self.summary.rows += len(rows.keys)
        self.summary.left_out += rows.left_out
        _log.info("shard written", source=origin.source, rows=len(rows.keys), left_out=left_out)

    def _pack_and_write(self, origin: Origin, rows: _Rows) -> Manifest:
        embeddings = np.concatenate([np.empty((0, 2, origin.width), np.float16), *rows.embeddings])
        manifest, data = pack(origin, rows.keys, embeddings, preprocess=self.preprocessing.name, left_out=rows.left_out)
        try:
            self.folder.write(manifest, data)
        except Exception as error:
            raise ShardFailed(f"cannot be written to {self.folder.url}: {error!r}") from error
        return manifest


@dataclass(frozen=True)
class _Batch:
    keys: list[str]
    inputs: dict[str, npt.NDArray[np.generic]]


@dataclass
class _Rows:
    """What is done of an input shard."""

    source: str
    keys: list[str] = field(default_factory=list)
    embeddings: list[npt.NDArray[np.float16]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, batch: _Batch, embeddings: npt.NDArray[np.float16]) -> None:
        self.keys += batch.keys
        self.embeddings.append(embeddings)

    def leave_out(self, example: LeftOut) -> None:
        self.left_out[example.reason] += 1
        if sum(self.left_out.values()) <= _TOLD_EACH:
            _log.warning(
                "example left out", source=self.source, key=example.key, reason=example.reason, detail=example.detail
            )
