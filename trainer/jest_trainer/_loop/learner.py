"""The learner's forward pass over a super-batch, what came of it, and warnings about the first one."""

from __future__ import annotations

import functools
import inspect
import warnings
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import nn

from jest_core import Embeddings
from jest_trainer.outputs import ExampleLosses, PairLosses, check_outputs, warn_of_embeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from jest_core import SelectionPolicy
    from jest_trainer.outputs import LearnerOutputs

Batch = TypeVar("Batch")


class Learner(Generic[Batch]):
    """Runs `embed` on whole super-batches, without gradients.

    The first run is looked at more closely: embeddings that are not normalised, a scale that looks like a logarithm,
    and modules whose running statistics the super-batch has changed each give a warning.

    Args:
        embed: the caller's.
        model: the modules that `embed` runs. Without it those are watched that `embed` refers to by a closure, by a
            global name or as attributes of such an object.
        eval_in_embed: put `model` into eval mode for each run, and each of its modules back afterwards.

    Raises:
        ValueError: `eval_in_embed` is set without a model, or `model` is not a module.
    """

    def __init__(
        self, embed: Callable[[Batch], LearnerOutputs], *, model: nn.Module | None = None, eval_in_embed: bool = False
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        if eval_in_embed and model is None:
            raise ValueError("model must be given: eval_in_embed=True puts it into eval mode")
        self._embed = embed
        self._model = model
        self._eval_in_embed = eval_in_embed
        self._is_first = True

    @torch.no_grad()
    def outputs(self, super_batch: Batch, *, rows: int, policy: SelectionPolicy, world_size: int) -> LearnerOutputs:
        """Return what the learner makes of a super-batch.

        Raises:
            ValueError: it is not what the job's policy wants, or not of `rows` rows.
        """
        watched = self._updating_modules() if self._is_first else {}
        before = {name: _copies(module) for name, module in watched.items()}
        with self._in_eval_mode():
            returned = self._embed(super_batch)
        for found in _row_counts(returned):
            if found != rows:
                raise ValueError(f"embed returned {found} rows for a super-batch with {rows} keys")
        outputs = check_outputs("what embed returned", returned, policy, world_size=world_size)
        if self._is_first:
            self._is_first = False
            _warn_of_updates([name for name, module in watched.items() if _differ(before[name], _own_buffers(module))])
            if isinstance(outputs, Embeddings):
                warn_of_embeddings(outputs)
        return outputs

    @contextmanager
    def _in_eval_mode(self) -> Iterator[None]:
        if not self._eval_in_embed or self._model is None:
            yield
            return
        # By the flag alone: train() and eval() of some modules do more (LoRA layers merge their weights), and modules
        # that are in eval mode on purpose stay in it.
        training = [module for module in self._model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def _updating_modules(self) -> dict[str, nn.Module]:
        """Return the modules that could update buffers of their own, by name."""
        roots = _modules_of(self._embed) if self._model is None else {"": self._model}
        return {
            ".".join(filter(None, (root_name, name))) or "model": module
            for root_name, root in roots.items()
            for name, module in root.named_modules()
            if module.training and _own_buffers(module)
        }


def _modules_of(function: object) -> dict[str, nn.Module]:
    """Return the modules that a function refers to, by name."""
    while isinstance(function, functools.partial):
        function = function.func
    if callable(function):
        function = inspect.unwrap(function)
    referred: dict[str, object] = {}
    owner = getattr(function, "__self__", None)
    if owner is not None:
        referred["self"] = owner
    if inspect.isfunction(function) or inspect.ismethod(function):
        with suppress(ValueError):  # a variable of the closure has no value yet
            variables = inspect.getclosurevars(function)
            referred |= {**variables.globals, **variables.nonlocals}
    else:
        referred[type(function).__name__] = function
    modules: dict[str, nn.Module] = {}
    for name, value in referred.items():
        if isinstance(value, nn.Module):
            modules[name] = value
        elif not isinstance(value, ModuleType | type):
            attributes = getattr(value, "__dict__", {}).items()
            modules |= {f"{name}.{attribute}": item for attribute, item in attributes if isinstance(item, nn.Module)}
    return modules


def _own_buffers(module: nn.Module) -> list[Tensor]:
    return list(module.buffers(recurse=False))


def _copies(module: nn.Module) -> list[Tensor]:
    """Return what a module's own buffers hold; DistributedDataParallel writes also those that do not change."""
    return [buffer.detach().clone() for buffer in _own_buffers(module)]


def _differ(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) != len(after) or any(
        old.dtype != new.dtype or old.device != new.device or not torch.equal(old, new)
        for old, new in zip(before, after, strict=True)
    )


def _warn_of_updates(names: list[str]) -> None:
    if not names:
        return
    others = f" and {len(names) - 1} more modules" if len(names) > 1 else ""
    warnings.warn(
        f"{names[0]}{others} updated running statistics in embed: they count super-batches, also the rows that are not "
        "trained on. Give SelectedBatches model=... and eval_in_embed=True, or call embed in eval mode.",
        stacklevel=2,
    )


def _row_counts(outputs: object) -> list[int]:
    if isinstance(outputs, ExampleLosses):
        return [len(losses) for losses in (outputs.learner, outputs.reference) if losses is not None]
    return [len(outputs)] if isinstance(outputs, Embeddings | PairLosses) else []
