"""Processes that a program started: which they are, and whether they end."""
import os
import re
import signal
import time
from pathlib import Path

import pytest

def children(pid):
    """The numbers of the processes that a process, or a thread of it, has started."""
    found = []
    for path in Path(f'/proc/{pid}/task').glob('*/children'):
        try:
            found += [int(word) for word in path.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):     # the thread has ended meanwhile
            pass
    return found

def descendants(pid):
    """The numbers of the children of a process, their children, and so on."""
    return [found for child in children(pid) for found in (child, *descendants(child))]

def runs_still(pid):
    """Whether a process does anything; one that only waits to be noticed (a zombie) does not."""
    try:
        os.kill(pid, 0)
        return not re.search(r'\) Z ', Path(f'/proc/{pid}/stat').read_text())
    except ProcessLookupError:
        return False
    except FileNotFoundError:     # gone since, or a system without /proc
        return not Path('/proc/self').exists()

def await_end(pids, timeout=30):
    """Wait until these processes are gone; end them, and fail, where they stay."""
    deadline = time.monotonic() + timeout
    while any(map(runs_still, pids)):
        if time.monotonic() > deadline:
            stayed = [pid for pid in pids if runs_still(pid)]
            kill(stayed)
            pytest.fail(f'processes {stayed} outlive the program that started them')
        time.sleep(0.02)

def kill(pids):
    """End processes at once."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
