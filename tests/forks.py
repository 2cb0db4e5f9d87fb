"""Runs commands as forks of a process that has already imported their modules, which takes seconds, but not started JAX.

A fork has the environment, exit status, signals and output of a new process. test_forks.py compares the two.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTED = (
    *("flax", "jax.experimental.compilation_cache.compilation_cache", "matplotlib.backends.backend_agg", "sklearn.datasets"),
    *("smallbatch_jax.models", "smallbatch_jax.runner.grid", "smallbatch_jax.runner.planning", "smallbatch_jax.data.digits"),
    *(f"smallbatch_jax.study.{name}" for name in ("answer", "claims", "figures", "report")),
)


class Fork:
    """A forked Python process with the interface of `subprocess.Popen`; its output is kept in temporary files.

    Args:
      line: the arguments of `python`: a script of this repository, or "-c" and code, followed by its own arguments.
      environment: all environment variables; JAX has already read its own when it was imported.
      new_session: whether the process starts a new session and so leads a process group.
    """

    def __init__(self, line, environment, new_session=False):
        self.args, self.returncode = list(map(str, line)), None
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self._status, status = os.pipe()
        asked = {"line": self.args, "environment": dict(environment), "new_session": new_session}
        fds = [*(file.fileno() for file in self._files), status]
        message = json.dumps(asked).encode("utf-8", "surrogateescape")
        socket.send_fds(_server(), [struct.pack("i", len(message))], fds)
        _server().sendall(message)
        os.close(status)
        self.pid = self._read(None)

    def _read(self, seconds):
        """Returns the next number (pid, then exit code) that the server sends; None if none arrives within `seconds`."""
        if not select.select([self._status], [], [], seconds)[0]:
            return None
        (said,) = struct.unpack("i", os.read(self._status, 4))
        return said

    def poll(self, seconds=0):
        if self.returncode is None and (code := self._read(seconds)) is not None:
            self.returncode = code
            os.close(self._status)
        return self.returncode

    def wait(self, timeout=None):
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        found = []
        for file in self._files:
            with file:
                file.seek(0)
                found.append(file.read().decode())
        return tuple(found)

    def send_signal(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.wait()
        for file in self._files:
            file.close()


@functools.cache
def _server():
    """Starts the process that forks, which ends when this one does, and returns a socket to it."""
    ours, theirs = socket.socketpair()
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    line = [sys.executable, __file__, str(theirs.fileno())]
    server = subprocess.Popen(line, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
    theirs.close()
    atexit.register(lambda: (ours.close(), server.wait()))
    return ours


def _serve(requests):
    """Forks for each request and reports the exit code of each fork; returns the request, in the fork only."""
    wake, ended = os.pipe()
    os.set_blocking(ended, False)
    signal.set_wakeup_fd(ended)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes up select
    gc.freeze()
    statuses = {}
    while True:
        there = select.select([requests, wake], [], [])[0]
        if wake in there:
            os.read(wake, 1)
            for pid in [pid for pid in statuses if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)]:
                _say(statuses[pid], os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(statuses.pop(pid))
        if requests not in there:
            continue
        head, fds, _, _ = socket.recv_fds(requests, 4, 3)
        if not head:
            os._exit(0)
        asked = json.loads(requests.recv(struct.unpack("i", head)[0], socket.MSG_WAITALL))
        *output, status = fds
        if pid := _fork():
            statuses[pid] = status
            _say(status, pid)
            for fd in output:
                os.close(fd)
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        requests.close()
        for fd, standard in zip(output, (1, 2), strict=True):
            os.dup2(fd, standard)
        for fd in (*fds, *statuses.values(), wake, ended):
            os.close(fd)
        return asked


def _say(status, number):
    with suppress(BrokenPipeError):
        os.write(status, struct.pack("i", number))


def _fork():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's threads are safe to fork
        return os.fork()


def _run(line, environment, new_session):
    """Runs in this process what `python` would run with these arguments."""
    if new_session:
        os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    first, *rest = line
    if first == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[0], sys.argv = str((ROOT / first).parent), line
        runpy.run_path(str(ROOT / first), run_name="__main__")


def _end(status):
    """Ends this process as Python does but without tearing modules down, which saves a fifth of a second."""
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    requests = socket.socket(fileno=int(sys.argv[1]))
    sys.path[0] = str(ROOT)
    for name in IMPORTED:
        __import__(name)
    asked = _serve(requests)
    try:
        _run(**asked)
    except SystemExit as end:
        _end(end.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        _end(1)
    _end(0)
