"""Whose call is being served, and the part of the job names that is theirs.

Inside the server a tenant's job is called `TENANT~JOB`; a client can neither send nor see that name, so what it asks
for by name is its own or does not exist. Without tokens there are no tenants, and names are what they are.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Annotated

from pydantic import StringConstraints

SEPARATOR = "~"
"""In no job name of a client, and nothing that the store gives a meaning."""

TenantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]

_tenant: ContextVar[str] = ContextVar("tenant", default="")


def enter(tenant: str) -> None:
    """Let the rest of this task, which serves one call, act for the tenant."""
    _tenant.set(tenant)


def current() -> str:
    """The tenant whose call is being served; empty where there are none."""
    return _tenant.get()


def prefix() -> str:
    """What the tenant's job names start with inside the server."""
    return _prefix_of(current())


def scoped(job: str) -> str:
    """The name inside the server of a job that the tenant calls `job`."""
    return prefix() + job


def unscoped(job: str) -> str:
    """The name by which the tenant knows one of its jobs."""
    return job.removeprefix(prefix())


def owner_of(job: str) -> str:
    """The tenant whose job the server calls by this name; empty where there are none."""
    return job.rpartition(SEPARATOR)[0]


def prefix_of(job: str) -> str:
    """What the names of all jobs of this job's tenant start with inside the server."""
    return _prefix_of(owner_of(job))


def _prefix_of(tenant: str) -> str:
    return f"{tenant}{SEPARATOR}" if tenant else ""


def unscoped_text(text: str) -> str:
    """Return a text with the names by which the tenant knows its own jobs."""
    return text.replace(prefix(), "") if prefix() else text
