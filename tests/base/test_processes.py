"""Facts of processes, against what Python's system calls say."""

import os
import subprocess
import sys

from dpo.base.processes import find_process, own_pid_namespace


def test_this_process():
    own = find_process(os.getpid())
    assert own is not None
    assert own.state == "R" and own.parent == os.getppid() and own.started > 0


def test_a_child_has_the_namespace_of_its_parent():
    code = "from dpo.base.processes import own_pid_namespace; print(own_pid_namespace())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == own_pid_namespace() and there.startswith("pid:[")


def test_a_name_with_brackets_is_no_field():
    """The name of a process stands in brackets before the fields, and may hold some itself."""
    code = "open('/proc/self/comm', 'w').write('a) R (b'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = find_process(child.pid)
        child.kill()
    assert found is not None and found.parent == os.getpid()


def test_no_process():
    assert find_process(2**22 + 1) is None  # above the greatest id of Linux
