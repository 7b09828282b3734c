"""Scripts in processes of their own that need not import what others have imported: for tests that start many.

A process imports once what the example's scripts do, which takes longer than their runs, and is forked for each. What
libraries read from the environment when they are imported is what it was then; all else is as in a new interpreter.
"""

import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "squad"


@contextmanager
def forking():
    """Gives what can be called as `subprocess.run([sys.executable, script, …], cwd=, env=, check=, stdout=)`."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"{folder}/socket"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        server = subprocess.Popen([sys.executable, __file__, address], env=environment, stdout=subprocess.PIPE)
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"

        def run(command, *, cwd=None, env=None, check=False, stdout=None, stderr=None):
            assert command[0] == sys.executable
            asked = {"script": command[1:], "folder": str(cwd or os.getcwd()), "environment": dict(env or os.environ)}
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(address)
                fds = [1, 2] if stdout is None else [stdout.fileno()] * 2
                socket.send_fds(connection, [b"."], fds)
                connection.sendall(json.dumps(asked).encode())
                connection.shutdown(socket.SHUT_WR)
                status = int(connection.makefile().read())
            if check and status:
                raise subprocess.CalledProcessError(status, command)
            return subprocess.CompletedProcess(command, status)

        try:
            yield run
        finally:
            server.kill()
            server.wait()


def serve(address: str) -> None:
    import datasets  # noqa: F401
    import evaluate  # noqa: F401
    import torch

    sys.path.insert(0, str(EXAMPLES))
    import benchmarks.run_task  # noqa: F401
    import run_squad  # noqa: F401
    from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering, BertTokenizer, Trainer  # noqa: F401

    import hf_oto  # noqa: F401

    torch.set_num_threads(1)  # nothing that is forked may have threads
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listening.accept()
            if not os.fork():
                answer(connection)
                os._exit(0)
            connection.close()
            with suppress(ChildProcessError):  # what has ended meanwhile
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def answer(connection: socket.socket) -> None:
    """Run a script in one more process, and send how it ended."""
    _, fds, _, _ = socket.recv_fds(connection, 1, 2)
    asked = json.loads(connection.makefile().read())
    if not (child := os.fork()):
        status = 1
        try:
            for number, fd in enumerate(fds, start=1):
                os.dup2(fd, number)
            os.environ.clear()
            os.environ.update(asked["environment"])
            os.chdir(asked["folder"])
            sys.argv = asked["script"]
            sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    connection.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


if __name__ == "__main__":
    serve(sys.argv[1])
