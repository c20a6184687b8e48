"""Wires `jest-server embed`."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from jest_server.domain.errors import ReferenceModelError
from jest_server.embed.offline_pass import OfflinePass, Stopped
from jest_server.embed.progress import Progress
from jest_server.embed.verify import verify
from jest_server.examples.preprocessing import Preprocessing, PreprocessingError, load_function
from jest_server.examples.shards import input_shards
from jest_server.reference.from_settings import reference_model
from jest_server.runtime import logs, metrics
from jest_server.runtime.lifecycle import stop_on_signals
from jest_server.runtime.settings import ScorerSettings
from jest_server.stores.embedding_files.folder import EmbeddingFolder
from jest_server.stores.embedding_files.format import space_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from jest_server.domain.ports import ReferenceModel
    from jest_server.examples.options import EmbedOptions
    from jest_server.examples.preprocessing import Preprocess
    from jest_server.examples.shards import InputShard

_log = logs.get_logger()


class Exit(enum.IntEnum):
    """Exit codes; 2 is for options that cannot be."""

    DONE = 0
    FAILED = 1
    """Some shards could not be embedded, or verification found something."""
    STOPPED = 75
    """Asked to stop before the end: run it again to go on."""


@dataclass(frozen=True)
class Prepared:
    """All that can be known to be right before the model is asked."""

    options: EmbedOptions
    settings: ScorerSettings
    shards: list[InputShard]
    function: Preprocess


def prepare(options: EmbedOptions) -> Prepared:
    """Lists the input shards and imports the preprocessing.

    Raises:
        ValueError: Naming the option that cannot be what it is.
    """
    settings = ScorerSettings()
    logs.configure(process="embed", log_format=settings.log_format, level=settings.log_level)
    try:
        EmbeddingFolder(options.output, "")
    except ValueError as error:
        raise ValueError(f"--output: {error}") from error
    return Prepared(options, settings, input_shards(options), load_function(options.preprocess))


def embed(prepared: Prepared) -> Exit:
    """Embeds a data set, or this process's share of it."""
    return asyncio.run(_embed(prepared))


async def _embed(prepared: Prepared) -> Exit:
    stop = stop_on_signals()
    try:
        model = reference_model(prepared.settings, metrics.ScorerMetrics(CollectorRegistry()))
    except ValueError as error:
        _log.error("cannot embed", error=str(error))
        return Exit.FAILED
    try:
        failed = await _embed_with(model, prepared, stop)
    except Stopped:
        _log.info("stopped; run it again to go on")
        return Exit.STOPPED
    except (PreprocessingError, ReferenceModelError) as error:
        _log.error("cannot embed", error=str(error))
        return Exit.FAILED
    finally:
        await model.close()
    return Exit.FAILED if failed else Exit.DONE


async def _embed_with(model: ReferenceModel, prepared: Prepared, stop: asyncio.Event) -> int:
    """Returns how many shards failed."""
    reference, options = await model.info(), prepared.options
    with Progress(len(prepared.shards)) as progress:
        offline = OfflinePass(
            model,
            reference,
            Preprocessing(options.preprocess, prepared.function, reference),
            EmbeddingFolder(options.output, space_of(reference)),
            options,
            progress,
            stop,
        )
        try:
            await offline.run(prepared.shards)
        finally:
            summary = offline.summary
            _log.info(
                "embedded",
                shards_written=summary.written,
                shards_there_before=summary.skipped,
                shards_failed=summary.failed,
                rows=summary.rows,
                left_out=dict(summary.left_out),
            )
    return summary.failed


def verify_all(output: str, say: Callable[[str], None]) -> Exit:
    """Reads every file again and says what is wrong.

    Raises:
        ValueError: If nothing here can read such a URL.
    """
    verified = verify(output)
    for problem in verified.problems:
        say(f"wrong: {problem}")
    for name in verified.unnamed:
        say(f"not counted: {name}: no manifest names it; left by a run that was killed, or one that is running")
    say(f"{verified.files} files with {verified.rows} rows are right, {len(verified.problems)} are not")
    return Exit.FAILED if verified.problems else Exit.DONE
