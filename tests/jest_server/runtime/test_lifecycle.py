import gc
import sys

import pytest

from jest_server.runtime.lifecycle import SWITCH_INTERVAL_S, tune_for_latency


@pytest.fixture
def interpreter():
    """Leaves the interpreter as it was."""
    interval = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)
    gc.unfreeze()


@pytest.mark.usefixtures("interpreter")
def test_a_process_that_answers_switches_often_and_spares_what_stays_for_good():
    tune_for_latency()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
    assert gc.get_freeze_count() > 0
