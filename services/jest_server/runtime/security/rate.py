"""How many calls may come in a second: of a job, of a tenant, of all together.

A bucket for each, as the generic cell rate algorithm keeps it (one number).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from jest_server.domain.errors import RateLimited

if TYPE_CHECKING:
    from jest_server.runtime.settings import ProcessSettings

BURST_S = 2.0
"""Seconds' worth of calls that may come at once."""
_SWEEP_AT = 10_000
_ALL: Final = "all"


class RateLimit:
    """``calls_per_s`` for each name on average, and up to two seconds' worth of them at once, but at least one.

    Args:
        calls_per_s: 0: as many as come.
        setting: What the limit is called where it is set.
        whose: Whose calls it limits, as an error says it; ``{name}`` is put in.
    """

    def __init__(self, calls_per_s: float, *, setting: str, whose: str) -> None:
        self._calls_per_s = calls_per_s
        self._interval_s = 1 / calls_per_s if calls_per_s else 0.0
        self._burst_s = max(BURST_S, self._interval_s)
        self._setting = setting
        self._whose = whose
        self._paid_until_s: dict[str, float] = {}
        self._sweep_at = _SWEEP_AT

    def require_room(self, name: str, *, now_s: float) -> None:
        """Does not count the call.

        Raises:
            RateLimited: If ``name`` has used up what it may.
        """
        wait_s = self._paid_until(name, now_s) - now_s - self._burst_s
        if wait_s > 1e-9:
            raise RateLimited(
                f"more than {self._calls_per_s:g} calls a second of {self._whose.format(name=name)} ({self._setting})",
                {"limit": self._setting},
                retry_after_s=wait_s,
            )

    def count(self, name: str, *, now_s: float) -> None:
        """Counts one call."""
        if not self._calls_per_s:
            return
        if len(self._paid_until_s) > self._sweep_at:
            self._paid_until_s = {name: until for name, until in self._paid_until_s.items() if until > now_s}
            self._sweep_at = max(_SWEEP_AT, 2 * len(self._paid_until_s))
        self._paid_until_s[name] = self._paid_until(name, now_s)

    def _paid_until(self, name: str, now_s: float) -> float:
        """Until when this call would be paid for."""
        return max(self._paid_until_s.get(name, now_s), now_s) + self._interval_s


class CallRates:
    """The limits of one process. A call that one of them refuses counts for none that is asked with it."""

    def __init__(self, settings: ProcessSettings) -> None:
        self._all = RateLimit(settings.max_calls_per_s, setting="JEST_MAX_CALLS_PER_S", whose="all callers together")
        self._tenant = RateLimit(
            settings.max_calls_per_s_per_tenant, setting="JEST_MAX_CALLS_PER_S_PER_TENANT", whose="this tenant"
        )
        self._job = RateLimit(
            settings.max_calls_per_s_per_job, setting="JEST_MAX_CALLS_PER_S_PER_JOB", whose="job {name}"
        )

    def admit(self, tenant: str, *, now_s: float) -> None:
        """Counts one call of a tenant.

        Args:
            tenant: Whose call it is.
            now_s: Any clock that never goes back.

        Raises:
            RateLimited: If the tenant, or all callers together, have used up what they may.
        """
        self._tenant.require_room(tenant, now_s=now_s)
        self._all.require_room(_ALL, now_s=now_s)
        self._tenant.count(tenant, now_s=now_s)
        self._all.count(_ALL, now_s=now_s)

    def admit_to_job(self, job: str, *, now_s: float) -> None:
        """Counts one call of a job, once it is known which job it is for.

        Raises:
            RateLimited: If the job has used up what it may.
        """
        self._job.require_room(job, now_s=now_s)
        self._job.count(job, now_s=now_s)
