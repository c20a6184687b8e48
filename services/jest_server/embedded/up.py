"""The whole stack on one machine: real parts where they are to be had, named stand-ins where not.

Valkey (from its wheel) or `redis-server` holds the queue and the cache, Triton (from its wheel) the reference model; the
selector and the scorer are processes of their own. A part that dies is started again, on the same port and files.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
