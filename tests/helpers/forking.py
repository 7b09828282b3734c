"""Python in processes that need not import what others have imported: for tests that start many.

A server imports once what the Hugging Face libraries import of others, most of what a start takes, and is forked for
each process. Those libraries, which read the environment when they are imported, and hf_oto are imported there as in a
new interpreter. `subprocess.run` is for what is about starting one: its options, its encoding, what an import loads.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from contextlib import ExitStack, suppress

OTHERS = (
    *("torch", "torch._dynamo.convert_frame", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
    *("torch.distributed.tensor", "torch.export", "scipy.optimize", "sklearn.metrics", "pandas", "pyarrow.parquet"),
    *("pyarrow.dataset", "matplotlib.pyplot", "typer", "rich.console", "requests", "yaml", "multiprocess", "dill"),
)


def run(command, *, cwd=None, env=None, timeout=None, check=False, capture_output=False, text=False, **files):
    """`subprocess.run` of a command of this interpreter, whose input is empty."""
    assert command[0] == sys.executable
    wanted = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if capture_output else files
    found, fds = {}, []
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
        for fd, name, file in ((1, "stdout", said), (2, "stderr", complained)):
            where = wanted.pop(name, None)
            if where == subprocess.PIPE:
                found[name], where = file, file
            fds.append(fd if where is None else fds[0] if where == subprocess.STDOUT else where.fileno())
        assert not wanted, wanted
        with start(command, cwd, env, fds) as connection:
            connection.settimeout(timeout)
            try:
                status = int(connection.recv(10))
            except TimeoutError as error:
                raise subprocess.TimeoutExpired(command, timeout) from error
        for name, file in found.items():
            file.seek(0)
            found[name] = file.read().decode() if text else file.read()
    done = subprocess.CompletedProcess(command, status, **found)
    if check:
        done.check_returncode()
    return done


def start(command, cwd, env, fds):
    """A connection that says how the process has ended. When it is closed, the process ends."""
    environment = dict(os.environ if env is None else env)
    asked = {"command": list(map(str, command[1:])), "folder": str(cwd or os.getcwd()), "environment": environment}
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server())
    socket.send_fds(connection, [b"."], fds)
    connection.sendall(json.dumps(asked).encode() + b"\n")
    return connection


@functools.cache
def server():
    """The address of this process's own server, which ends when its input does: with this process."""
    address = os.path.join(tempfile.mkdtemp(), "socket")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    environment["MPLBACKEND"] = "agg"
    command = [sys.executable, __file__, address]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    server.process = process  # whose input stays open
    return address


def run_ranks(count, command, *, env=None, timeout=300):
    """
    `torchrun --nproc-per-node count`, but for its own process: that is given to each rank from which it knows what it
    is, and one that fails ends them all, with what it complained of.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = (os.environ if env is None else env) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    with ExitStack() as ended, tempfile.TemporaryFile() as said:
        running = {}
        for rank in range(count):
            complained = ended.enter_context(tempfile.TemporaryFile())
            own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            connection = ended.enter_context(start(command, None, own, [said.fileno(), complained.fileno()]))
            running[connection] = rank, complained
        while running:
            ready, _, _ = select.select(list(running), [], [], timeout)
            assert ready, "ranks that wait for each other"
            for connection in ready:
                rank, complained = running.pop(connection)
                if status := int(connection.recv(10)):
                    complained.seek(0)
                    raise AssertionError(f"rank {rank} ended with {status}: {complained.read().decode()}")


def serve(address):
    """Import, then fork for whoever connects. Returns in the forked alone, with what was asked for."""
    for name in OTHERS:
        importlib.import_module(name)
    assert threading.active_count() == 1  # or they cannot be forked
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listening, sys.stdin], [], [])
            if sys.stdin in ready:
                os.unlink(address)
                os.rmdir(os.path.dirname(address))
                os._exit(0)
            connection, _ = listening.accept()
            if not os.fork():
                return answer(connection)
            connection.close()
            with suppress(ChildProcessError):  # what has ended meanwhile
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def answer(connection):
    """Fork once more, to send how that ended; if nobody listens any longer, end it."""
    _, fds, _, _ = socket.recv_fds(connection, 1, 2)
    asked = json.loads(connection.makefile().readline())
    child = os.fork()
    if child:
        threading.Thread(target=end_with, args=(connection, child), daemon=True).start()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(BrokenPipeError):
            connection.sendall(f"{status}\n".encode())
        os._exit(0)
    connection.close()
    os.setsid()
    for number, fd in enumerate([os.open(os.devnull, os.O_RDONLY), *fds]):
        os.dup2(fd, number)
        os.close(fd)
    return asked


def end_with(connection, child):
    connection.recv(1)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def interpret(asked):
    """Be the interpreter that this command starts, in that folder and environment."""
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    if encoding := os.environ.get("PYTHONIOENCODING"):
        sys.stdout.reconfigure(encoding=encoding)
        sys.stderr.reconfigure(encoding=encoding)
    first, *rest = asked["command"]
    safe = "PYTHONSAFEPATH" in os.environ
    while first in ("-P", "-W"):
        safe = safe or first == "-P"
        if first == "-W":
            action, _, module = rest.pop(0).partition(":::")
            warnings.filterwarnings(action, module=re.escape(module) + r"\Z" if module else "")
        first, *rest = rest
    sys.path[:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    folder = {"-c": "", "-m": os.getcwd()}.get(first, os.path.dirname(os.path.realpath(first)))
    if not safe:
        sys.path.insert(0, folder)
    if first == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif first == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def leave(well):
    """Without undoing all that was imported, which takes as long as a short script."""
    if well:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    ended_well = []
    atexit.register(leave, ended_well)  # as the first, it comes last
    interpret(serve(sys.argv[1]))
    ended_well.append(True)
