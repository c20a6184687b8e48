"""Tiles on all cores: each tile is worked on by one thread, from its products to its sums, in buffers of its own.

torch would rather split every single operation among the cores. Then all of them meet after every operation, thousands
of times in a selection, and wait for the one that some other process kept from running: on a busy machine that made
selections twenty times slower, where this way loses what the other process takes. And a sum never depends on the
number of threads.
"""

import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

Tile = TypeVar("Tile")
Result = TypeVar("Result")


class Scratch:
    """One thread's buffers, allocated when first asked for and then used again and again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def empty(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Space of this shape, with whatever was written last under this name."""
        view = self._views.get((name, dtype, shape))
        if view is None:
            view = self._views[name, dtype, shape] = self._space(name, dtype, math.prod(shape)).view(shape)
        return view

    def _space(self, name: str, dtype: torch.dtype, size: int) -> Tensor:
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            # What was a view of the smaller buffer must not keep it.
            self._views = {key: view for key, view in self._views.items() if key[:2] != (name, dtype)}
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self._device)
        return buffer[:size]


_number_of_threads = threading.Lock()


def _split_nothing() -> None:
    """Keep torch from splitting this thread's operations, and no other thread's.

    The number that a thread sets holds for itself and for threads that start later: another one sets it back.
    """
    with _number_of_threads:
        usual = torch.get_num_threads()
        torch.set_num_threads(1)
        restoring = threading.Thread(target=torch.set_num_threads, args=(usual,))
        restoring.start()
        restoring.join()


class Workers:
    """As many threads as torch would use, or the calling one on a GPU. A context: its end ends the threads."""

    def __init__(self, device: torch.device) -> None:
        with _number_of_threads:
            threads = torch.get_num_threads() if device.type == "cpu" else 1
        self._scratches = [Scratch(device) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, "jest-tiles", _split_nothing) if threads > 1 else None

    def run(self, work: Callable[[], Result]) -> Result:
        """Call `work` without gradients in one of the threads, the only place from which `for_each` may be called.

        So that what lies between the tiles is not split either: rows are many, but there is little to do for each.
        """

        def without_gradients() -> Result:
            with torch.no_grad():
                return work()

        return without_gradients() if self._pool is None else self._pool.submit(without_gradients).result()

    def for_each(self, tiles: Iterable[Tile], work: Callable[[Tile, Scratch], None]) -> None:
        """Call `work` on every tile, each in the first thread that is free. Tiles must not share what is written.

        Raises:
            Exception: what `work` raised first, once no thread works any more.
        """
        waiting = list(tiles)
        shared = iter(waiting)  # a list's iterator gives each item to one thread only

        def serve(scratch: Scratch) -> None:
            with torch.no_grad():
                for tile in shared:
                    work(tile, scratch)

        ours, *others = self._scratches[: max(len(waiting), 1)]
        helping = [self._pool.submit(serve, scratch) for scratch in others] if self._pool else []
        try:
            serve(ours)
        finally:
            wait(helping)
        for future in helping:
            future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
