"""Bearer tokens, kept as SHA-256 hashes in a file that may change while the server runs.

A token is 256 random bits, so that a plain hash of it tells nothing and needs no salt. The file is a JSON array:

    [{"id": "2026-11", "tenant": "vision", "sha256": "9f86d0...", "expires_at": "2027-01-31T00:00:00Z"}]

To rotate a token, add the new one, hand it out, and take the old one out or let it expire: a tenant may have several.
"""

from __future__ import annotations

import hmac
import json
import secrets
import tempfile
import threading
import time
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, Field, StringConstraints, TypeAdapter, ValidationError

from jest_server.domain.errors import TokenExpired, TokenMissing, Unauthenticated
from jest_server.domain.frozen_model import FrozenModel
from jest_server.domain.tenants import TenantName
from jest_server.runtime.logs import get_logger

RELOAD_S = 1.0
"""How often, at most, the file is looked at for changes."""
_PREFIX = "jest_"
_RANDOM_BYTES = 32
_LONGEST_TOKEN = 512
_log = get_logger()


class TokenRecord(FrozenModel):
    """What is kept of a token."""

    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """Names the token where the token itself must not be: in logs and to the operator."""
    tenant: TenantName
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    expires_at: AwareDatetime | None = None
    """None: never."""


_RECORDS: TypeAdapter[list[TokenRecord]] = TypeAdapter(Annotated[list[TokenRecord], Field(max_length=10_000)])


def new_token(token_id: str, tenant: str, *, expires_at: datetime | None) -> tuple[str, TokenRecord]:
    """Makes a token: the secret, to be handed out once, and what to keep of it.

    Raises:
        pydantic.ValidationError: If the id or the tenant is no name.
    """
    token = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    return token, TokenRecord(id=token_id, tenant=tenant, sha256=_digest(token), expires_at=expires_at)


def add_token(path: Path, token_id: str, tenant: str, *, expires_at: datetime | None) -> str:
    """Makes a token, adds it to the file, which need not exist yet, and returns the secret.

    Raises:
        ValueError: If the id or the tenant is no name, the id is taken, or the file is no token file.
    """
    token, record = new_token(token_id, tenant, expires_at=expires_at)
    records = read_tokens(path) if path.exists() else []
    if any(known.id == token_id for known in records):
        raise ValueError(f"token file {path}: id {token_id!r} is taken by another token, expected one of its own")
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, delete=False) as file:  # readable by its owner alone
        file.write(_RECORDS.dump_json([*records, record], indent=2))
    Path(file.name).replace(path)
    return token


def read_tokens(path: Path) -> list[TokenRecord]:
    """Reads a token file.

    Raises:
        ValueError: If it cannot be read or is no token file; the message names file, entry, field and expectation.
    """
    try:
        records = _RECORDS.validate_python(json.loads(path.read_text()))
    except OSError as error:
        raise ValueError(f"token file {path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"token file {path}: {where}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"token file {path} is not JSON: {error}") from error
    ids = [record.id for record in records]
    repeated = next((token_id for token_id in ids if ids.count(token_id) > 1), None)
    if repeated is not None:
        raise ValueError(f"token file {path}: id {repeated!r} stands there more than once, expected one token each")
    return records


class Tokens:
    """The tokens of a file, read again when it changes. A file that went bad changes nothing, but is logged.

    Raises:
        ValueError: If the file cannot be used at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._records = read_tokens(path)
        self._looked = time.monotonic()

    def tenant_of(self, authorization: str | None) -> str:
        """Returns the tenant that an ``authorization`` header belongs to.

        Raises:
            TokenMissing: If there is none.
            TokenExpired: If the token is past its time.
            Unauthenticated: If it is not of that form, or the token is not known.
        """
        if not authorization:
            raise TokenMissing("authorization is missing, expected: Bearer TOKEN")
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token or len(token) > _LONGEST_TOKEN:
            raise Unauthenticated("authorization is not of the form: Bearer TOKEN")
        self._refresh()
        digest, found = _digest(token), None
        for record in self._records:  # all of them: how long it takes does not tell which one was close
            if hmac.compare_digest(record.sha256, digest):
                found = record
        if found is None:
            raise Unauthenticated("the token is not known here")
        if found.expires_at is not None and found.expires_at <= datetime.now(UTC):
            raise TokenExpired(f"the token {found.id!r} expired at {found.expires_at.isoformat()}")
        return found.tenant

    def _refresh(self) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._looked < RELOAD_S:
                return
            self._looked = now
            stamp = self._stamp()
            if stamp == self._seen:
                return
            self._seen = stamp
            try:
                self._records = read_tokens(self._path)
            except ValueError as error:
                _log.error("token file is not usable: the tokens read before stay valid", error=str(error))
            else:
                _log.info("token file read again", tokens=len(self._records))

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            state = self._path.stat()
        except OSError:
            return None
        return state.st_mtime_ns, state.st_size, state.st_ino


def _digest(token: str) -> str:
    return sha256(token.encode()).hexdigest()
