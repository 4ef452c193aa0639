"""`python -m tars_fast.NAME ...` in a fork of a process that has its imports behind it: most of a short command's time.

`python forks.py SOCKET` listens there until its standard input ends. `python forks.py SOCKET -m tars_fast.NAME ...` runs the
command there, with the caller's own output, folder and environment, and ends with its status.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading

PRELOADED = """
tars_fast.train tars_fast.evaluate tars_fast.analyse tars_fast.export tars_fast.plan
datasets matplotlib.figure peft scipy.stats sklearn.feature_extraction.text soundfile torch.utils.tensorboard
transformers.models.auto.modeling_auto transformers.models.qwen2_audio.modeling_qwen2_audio
"""


def serve(address: str) -> None:
    import importlib

    for name in PRELOADED.split():
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        # Children that nobody waits for leave nothing behind.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                answer(connection)
                return
            connection.close()


def answer(connection: socket.socket) -> None:
    """Run what is asked for, and send its exit status; without one it has died."""
    import runpy
    import traceback

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    given, files, _, _ = socket.recv_fds(connection, 2**20, 3)
    while more := connection.recv(2**20):
        given += more
    arguments, folder, environment = json.loads(given)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # What Python knew of the files that were there before, such as whether they can be sought in, is not true of these.
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering=1, closefd=False)  # noqa: SIM115
        for number, mode in enumerate("rww")
    )
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, folder)
    sys.argv = arguments[1:]
    # As where it was never imported; it runs as `__main__`.
    sys.modules.pop(arguments[1], None)
    status: object = 0
    try:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(bytes([status if isinstance(status, int) else 1]))


def ask(address: str, arguments: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        given = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
        sent = socket.send_fds(connection, [given], [0, 1, 2])
        connection.sendall(given[sent:])
        connection.shutdown(socket.SHUT_WR)
        return (connection.recv(1) or b"\1")[0]


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
