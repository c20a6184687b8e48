"""How many calls a tenant may make: a bucket for each, as the generic cell rate algorithm keeps it (one number)."""

from __future__ import annotations

from jest_server.errors import RateLimited

BURST_S = 2.0
"""Seconds' worth of calls that may come at once."""
_SWEEP_AT = 10_000


class RateLimit:
    """``calls_per_s`` for each tenant on average, and up to two seconds' worth of them at once, but at least one."""

    def __init__(self, calls_per_s: float) -> None:
        self._interval_s = 1 / calls_per_s
        self._burst_s = max(BURST_S, self._interval_s)
        self._paid_until_s: dict[str, float] = {}

    def take(self, tenant: str, *, now_s: float) -> None:
        """Counts one call.

        Args:
            tenant: Whose call it is.
            now_s: Any clock that never goes back.

        Raises:
            RateLimited: If the tenant has used up what it may; the call does not count then.
        """
        if len(self._paid_until_s) > _SWEEP_AT:
            self._paid_until_s = {name: until for name, until in self._paid_until_s.items() if until > now_s}
        paid_until_s = max(self._paid_until_s.get(tenant, now_s), now_s) + self._interval_s
        wait_s = paid_until_s - now_s - self._burst_s
        if wait_s > 1e-9:
            raise RateLimited(
                f"more than {1 / self._interval_s:g} calls a second (JEST_MAX_CALLS_PER_S)", retry_after_s=wait_s
            )
        self._paid_until_s[tenant] = paid_until_s
