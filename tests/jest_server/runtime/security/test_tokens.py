import json
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from jest_server.domain.errors import TokenExpired, TokenMissing, Unauthenticated
from jest_server.runtime.security import tokens
from jest_server.runtime.security.tokens import Tokens, add_token, new_token, read_tokens

SOON = timedelta(hours=1)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tokens.json"


@pytest.fixture
def looks_at_once(monkeypatch):
    """A file is looked at with every call."""
    monkeypatch.setattr(tokens, "RELOAD_S", 0.0)


def test_a_token_tells_its_tenant(file):
    vision = add_token(file, "v1", "vision", expires_at=datetime.now(UTC) + SOON)
    speech = add_token(file, "s1", "speech", expires_at=None)
    known = Tokens(file)
    assert known.tenant_of(f"Bearer {vision}") == "vision"
    assert known.tenant_of(f"bearer {speech}") == "speech"


def test_the_secret_is_nowhere_in_the_file_and_only_the_owner_reads_it(file):
    token = add_token(file, "v1", "vision", expires_at=None)
    assert token.removeprefix("jest_") not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600


def test_two_tokens_are_never_the_same():
    made = {new_token("t", "vision", expires_at=None)[0] for _ in range(100)}
    assert len(made) == 100
    assert all(len(token) > 40 for token in made)


def test_an_id_is_given_once(file):
    add_token(file, "v1", "vision", expires_at=None)
    with pytest.raises(ValueError, match=r"id 'v1' is taken .*expected one of its own"):
        add_token(file, "v1", "speech", expires_at=None)
    assert [record.tenant for record in read_tokens(file)] == ["vision"]


@pytest.mark.parametrize(
    ("authorization", "error", "message"),
    [
        (None, TokenMissing, "authorization is missing"),
        ("", TokenMissing, "authorization is missing"),
        ("Bearer", Unauthenticated, "not of the form"),
        ("Bearer ", Unauthenticated, "not of the form"),
        ("Basic dXNlcjpwYXNz", Unauthenticated, "not of the form"),
        ("Bearer " + "x" * 600, Unauthenticated, "not of the form"),
        ("Bearer jest_guessed", Unauthenticated, "not known here"),
    ],
)
def test_whoever_shows_no_known_token_is_refused(file, authorization, error, message):
    add_token(file, "v1", "vision", expires_at=None)
    with pytest.raises(error, match=message):
        Tokens(file).tenant_of(authorization)


def test_the_hash_itself_opens_nothing(file):
    add_token(file, "v1", "vision", expires_at=None)
    (record,) = read_tokens(file)
    with pytest.raises(Unauthenticated, match="not known here"):
        Tokens(file).tenant_of(f"Bearer {record.sha256}")


def test_an_expired_token_is_told_so_by_its_id(file):
    token = add_token(file, "v1", "vision", expires_at=datetime.now(UTC) - SOON)
    with pytest.raises(TokenExpired, match="the token 'v1' expired at") as caught:
        Tokens(file).tenant_of(f"Bearer {token}")
    assert token not in str(caught.value)


@pytest.mark.usefixtures("looks_at_once")
def test_tokens_rotate_while_the_server_runs(file):
    old = add_token(file, "old", "vision", expires_at=None)
    known = Tokens(file)
    new = add_token(file, "new", "vision", expires_at=None)
    assert known.tenant_of(f"Bearer {new}") == known.tenant_of(f"Bearer {old}") == "vision"
    file.write_text(json.dumps([entry for entry in json.loads(file.read_text()) if entry["id"] == "new"]))
    with pytest.raises(Unauthenticated, match="not known here"):
        known.tenant_of(f"Bearer {old}")


@pytest.mark.usefixtures("looks_at_once")
def test_a_file_that_went_bad_changes_nothing(file):
    token = add_token(file, "v1", "vision", expires_at=None)
    known = Tokens(file)
    file.write_text("[{")
    assert known.tenant_of(f"Bearer {token}") == "vision"
    file.unlink()
    assert known.tenant_of(f"Bearer {token}") == "vision"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "is not JSON"),
        ("{}", "the whole: .*list"),
        ('[{"id": "a", "tenant": "t"}]', r"0\.sha256: Field required"),
        ('[{"id": "a", "tenant": "a~b", "sha256": "' + "0" * 64 + '"}]', r"0\.tenant"),
        ('[{"id": "a", "tenant": "t", "sha256": "plain secret"}]', r"0\.sha256"),
        ('[{"id": "a", "tenant": "t", "sha256": "' + "0" * 64 + '", "expires_at": "2030-01-01T00:00:00"}]', "timezone"),
        ('[{"id": "a", "tenant": "t", "sha256": "' + "0" * 64 + '", "admin": true}]', r"0\.admin"),
        ('[{"id": "a", "tenant": "t", "sha256": "' + "0" * 64 + '"},'
         ' {"id": "a", "tenant": "u", "sha256": "' + "1" * 64 + '"}]', "'a' stands there more than once"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_stops_the_start(file, content, message):
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        Tokens(file)
    assert str(file) in str(caught.value)
    assert "plain secret" not in str(caught.value)


def test_a_file_that_is_not_there_stops_the_start(file):
    with pytest.raises(ValueError, match=r"tokens\.json cannot be read: No such file"):
        Tokens(file)


@pytest.mark.parametrize(("token_id", "tenant"), [("", "vision"), ("a b", "vision"), ("a", "vis~ion"), ("a", "")])
def test_what_is_no_name_is_refused(file, token_id, tenant):
    with pytest.raises(ValidationError):
        add_token(file, token_id, tenant, expires_at=None)
    assert not file.exists()
