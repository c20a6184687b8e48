"""What trainers ask of a data loader besides its batches, answered by the loader that is wrapped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class LoaderShape:
    """Base of what stands in for a data loader: length, parts and epochs are those of `wrapped`.

    What `wrapped` lacks raises AttributeError, and TypeError for `len()`, as it would there: `hasattr` and progress
    bars see no difference.
    """

    def __init__(self, wrapped: Iterable[Any]) -> None:
        self._wrapped: Any = wrapped

    def __len__(self) -> int:
        try:
            return len(self._wrapped)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__} has no len(): {error}") from error

    @property
    def dataset(self) -> Any:
        """The wrapped loader's."""
        return self._of_wrapped("dataset")

    @property
    def sampler(self) -> Any:
        """The wrapped loader's."""
        return self._of_wrapped("sampler")

    @property
    def batch_sampler(self) -> Any:
        """The wrapped loader's: it samples super-batches."""
        return self._of_wrapped("batch_sampler")

    @property
    def batch_size(self) -> int | None:
        """The wrapped loader's."""
        size: int | None = self._of_wrapped("batch_size")
        return size

    @property
    def num_batches(self) -> int:
        """The wrapped loader's."""
        count: int = self._of_wrapped("num_batches")
        return count

    @property
    def num_samples(self) -> int:
        """The wrapped loader's: the rows that a pass loads, not those that come out."""
        count: int = self._of_wrapped("num_samples")
        return count

    @property
    def set_epoch(self) -> Callable[[int], None]:
        """Call before a pass: it reaches the wrapped loader, its samplers and its dataset, where they have epochs."""
        if isinstance(self._wrapped, LoaderShape):
            return self._wrapped.set_epoch
        batch_sampler = getattr(self._wrapped, "batch_sampler", None)
        parts = [
            self._wrapped,
            getattr(self._wrapped, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
            getattr(self._wrapped, "dataset", None),
        ]
        setters = {id(part): part.set_epoch for part in parts if callable(getattr(part, "set_epoch", None))}
        if not setters:
            kind = type(self._wrapped).__name__
            raise AttributeError(
                f"{type(self).__name__} has no set_epoch: neither {kind} nor a sampler or dataset of it has"
            )

        def set_epoch(epoch: int) -> None:
            for setter in setters.values():
                setter(epoch)

        return set_epoch

    def _of_wrapped(self, name: str) -> Any:
        try:
            return getattr(self._wrapped, name)
        except AttributeError as error:
            raise AttributeError(f"{type(self).__name__} has no {name}: {error}") from error
