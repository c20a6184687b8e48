from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from jest_server.local.process import ServerProcess, ServerStartError
from support.polling import wait_until

PYTHON = sys.executable
SAYS_READY = "import sys, time; open(sys.argv[1], 'w').close(); {rest}time.sleep(600)"


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def server(tmp_path):
    server = ServerProcess("server", tmp_path / "logs" / "server.log")
    yield server
    server.kill()


@pytest.fixture
def start(server, tmp_path):
    """Starts Python code that makes the file it is given when it is ready."""

    def run(code, timeout_s=30.0):
        sign = tmp_path / "ready"
        server.start([PYTHON, "-c", code, sign], ready=sign.exists, timeout_s=timeout_s)

    return run


def test_start_returns_when_the_server_is_ready(server, start, tmp_path):
    start(SAYS_READY.format(rest=""))
    assert (tmp_path / "ready").exists()
    assert server.alive


def test_a_server_that_ends_early_is_told_with_its_last_words(server, start):
    with pytest.raises(ServerStartError, match=r"^server ended with status 3; .*server.log ends with:\nno such thing$"):
        start("import sys; sys.exit(print('no such thing') or 3)")
    assert not server.alive


def test_words_of_an_earlier_run_are_not_repeated(start):
    for words in ("first", "second"):
        with pytest.raises(ServerStartError, match=f"ends with:\n{words}$"):
            start(f"import sys; sys.exit('{words}')")


def test_a_server_that_is_not_ready_in_time_is_ended(server, start):
    with pytest.raises(ServerStartError, match=r"^server was not ready within 0.3 s; .*server.log is empty$"):
        start("import time; time.sleep(600)", timeout_s=0.3)
    assert not server.alive


def test_stop_lets_the_server_end_by_itself(server, start, tmp_path):
    farewell = f"import signal; signal.signal(15, lambda *_: sys.exit(open({str(tmp_path / 'bye')!r}, 'w').close())); "
    start(farewell.replace("import signal", "import sys, signal") + SAYS_READY.format(rest=""))
    server.stop(grace_s=10)
    assert (tmp_path / "bye").exists()


def test_stop_ends_a_server_that_does_not_listen(server, start):
    start("import signal; signal.signal(15, signal.SIG_IGN); " + SAYS_READY.format(rest=""))
    server.stop(grace_s=0.2)
    assert gone(server.pid)


def test_kill_takes_what_the_server_has_started_with_it(server, start):
    start(SAYS_READY.format(rest="import subprocess; subprocess.Popen(['sleep', '600']); "))
    wait_until(lambda: psutil.Process(server.pid).children())
    children = psutil.Process(server.pid).children()
    server.kill()
    wait_until(lambda: all(gone(child.pid) for child in children))


def test_stopping_twice_or_before_the_start_does_nothing(server, start):
    server.stop(grace_s=1)
    server.kill()
    start(SAYS_READY.format(rest=""))
    server.stop(grace_s=10)
    server.stop(grace_s=1)
    assert not server.alive


def test_a_server_outlives_the_thread_that_started_it(server, start):
    thread = threading.Thread(target=start, args=(SAYS_READY.format(rest=""),))
    thread.start()
    thread.join()
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(server.pid).wait(timeout=0.3)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a process to its parent")
def test_a_server_does_not_outlive_a_parent_that_is_killed(tmp_path):
    code = (
        "import sys, time, pathlib\n"
        "from jest_server.local.process import ServerProcess\n"
        "server = ServerProcess('server', pathlib.Path(sys.argv[1]) / 'log')\n"
        "server.start([sys.executable, '-c', 'import time; time.sleep(600)'], ready=lambda: True, timeout_s=5)\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([PYTHON, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    wait_until(lambda: gone(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a process to its parent")
def test_a_server_whose_parent_is_gone_already_is_not_started(tmp_path):
    launcher = Path(sys.modules[ServerProcess.__module__].__file__).with_name("die_with_parent.py")
    done = subprocess.run([PYTHON, launcher, "1", "/bin/echo"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "parent 1 is gone, /bin/echo is not started\n"
