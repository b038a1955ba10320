"""A Python that has imported everything: what tests start with it begins at once.

`python` is an executable to be called as ``sys.executable`` is, with a module, a script or code; it
hands its command line, environment and files to a server, and the fork of that becomes the
program. Signals reach it, and it ends as the program does. One server serves a test process, on the
first demand. Programs whose start is the subject are started with ``sys.executable``.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import threading
from typing import NoReturn

IMPORTED = """
gardo.train gardo.trainer gardo.models.sd3 gardo.evaluate gardo.run.report.curves matplotlib.figure
gardo.run.trackers gardo.run.faults
gardo.evaluation.workflow gardo.evaluation.comparison gardo.evaluation.comparison_report
gardo.rewards.shapes gardo.rewards.judge gardo.rewards.serve.cli gardo.rewards.serve.app uvicorn
diffusers.guiders diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3
transformers.models.clip.modeling_clip transformers.models.t5.modeling_t5 peft accelerate
torch.profiler torch.distributed.run torch.distributed.fsdp
torch.distributed.elastic.rendezvous.c10d_rendezvous_backend
""".split()
"""The costly part of what the programs import."""


class Fork:
    """A program in a fork of the server."""

    def __init__(self, server, argv, files=(0, 1, 2), env=None, cwd=None) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(server))
        request = {
            "argv": [str(a) for a in argv],
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or os.getcwd()),
        }
        data = json.dumps(request).encode()
        socket.send_fds(self._connection, [len(data).to_bytes(8, "big")], list(files))
        self._connection.sendall(data)
        self.pid = self._number()

    def _number(self) -> int:
        data = self._connection.recv(8, socket.MSG_WAITALL)
        if len(data) < 8:
            raise RuntimeError("the server of tests/support/warm.py has ended")
        return int.from_bytes(data, "big", signed=True)

    def wait(self) -> int:
        """Exit code; -N if signal N ended it."""
        code = self._number()
        self._connection.close()
        return code


def server() -> str:
    """The address of this process's server, which is started if there is none yet."""
    if not _started:
        import subprocess
        import tempfile
        from pathlib import Path

        folder = tempfile.mkdtemp(prefix="gardo-warm-")
        address = f"{folder}/socket"
        executable = Path(folder) / "python"
        client = f"'{sys.executable}' -I -S '{Path(__file__).resolve()}' '{address}'"
        executable.write_text(f'#!/bin/sh\nexec {client} "$@"\n')
        executable.chmod(0o755)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        process.stdin.write(address + "\n")
        process.stdin.flush()
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the server of tests/support/warm.py did not start")
        # it ends when this process does, which closes its standard input
        _started.update(address=address, python=str(executable), process=process)
    return _started["address"]


_started = {}


def python() -> str:
    """Path of the executable."""
    server()
    return _started["python"]


def _client(address, argv) -> None:
    fork = Fork(address, argv)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: os.kill(fork.pid, number))
    code = fork.wait()
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _serve(address):
    """Fork for each request; returns the request in the fork."""
    import gc
    import importlib
    import select
    import shutil

    import torch

    for module in IMPORTED:
        importlib.import_module(module)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    threads = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else [0]
    if len(threads) > 1:
        raise RuntimeError(f"tests/support/warm.py: {len(threads)} threads; a fork has one alone")

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    print("ready", flush=True)
    running = {}  # pid by connection
    while True:
        ready, _, _ = select.select([0, listener, woken, *running], [], [])
        if 0 in ready:  # the tests have ended
            for pid in running.values():
                os.kill(pid, signal.SIGKILL)
            shutil.rmtree(os.path.dirname(address))
            os._exit(0)
        if woken in ready:
            os.read(woken, 4096)
        for connection, pid in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                _send(connection, os.waitstatus_to_exitcode(status))
                connection.close()
                del running[connection]
            elif connection in ready:  # its client was killed
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                connection.close()
                del running[connection]
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        head, files, _, _ = socket.recv_fds(connection, 8, 3)
        size = int.from_bytes(head, "big")
        data = connection.recv(size, socket.MSG_WAITALL)
        if len(files) < 3 or len(data) < size:  # its client was killed
            connection.close()
            continue
        request = json.loads(data)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number, file in enumerate(files):
                os.dup2(file, number)
            for file in (*files, woken, wake):
                os.close(file)
            for opened in (listener, connection, *running):
                opened.close()
            return request
        for file in files:
            os.close(file)
        running[connection] = pid
        _send(connection, pid)


def _send(connection, number) -> None:
    try:
        connection.sendall(number.to_bytes(8, "big", signed=True))
    except BrokenPipeError:
        pass  # nobody waits any more


def _become(argv, env, cwd) -> NoReturn:
    """Do what Python does with this command line."""
    ours = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    rest = [p for p in sys.path[1:] if p not in ours]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if argv[0] == "-u":
        argv = argv[1:]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    theirs = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
    first = {"-m": cwd, "-c": ""}.get(argv[0], os.path.dirname(os.path.abspath(argv[0])))
    sys.path[:] = [first, *theirs, *rest]
    code = 1
    try:
        _run(argv)
        code = 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            code = end.code or 0
        else:
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    # the interpreter's clean-up, without the second that it takes to free all modules
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(argv) -> None:
    import runpy

    if argv[0] == "-m":
        sys.argv = argv[1:]
        if not hasattr(sys.modules.get(argv[1]), "__path__"):
            sys.modules.pop(argv[1], None)  # it runs once more, as __main__
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _client(sys.argv[1], sys.argv[2:])
    else:
        _become(**_serve(sys.stdin.readline().strip()))
