"""How far a run is, for people and for logs."""

from __future__ import annotations

from structlog.testing import capture_logs

from jest_server.embed import progress
from jest_server.embed.progress import Progress


def test_without_a_terminal_lines_of_log_tell_now_and_then(monkeypatch):
    monkeypatch.setattr(progress, "_LOG_S", 0.0)
    with capture_logs() as logs, Progress(2, bar=False) as shown:
        shown.rows_done(10)
        shown.shard_done()
    assert [(line["rows"], line["shards"]) for line in logs] == [(10, "0 of 2"), (10, "1 of 2")]


def test_on_a_terminal_a_bar_tells(capsys):
    with capture_logs() as logs, Progress(2, bar=True) as shown:
        shown.rows_done(1234)
        shown.shard_done()
    assert "1,234 examples" in capsys.readouterr().err
    assert not logs
