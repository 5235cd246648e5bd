"""`python launch.py SCRIPT ARGUMENTS`: two processes of a program, as torchrun starts them, without its import of torch, which
takes two seconds. When one of them fails the other is ended."""

import os
import socket
import subprocess
import sys


def main(command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environments = [os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = {}
    for environment in environments:
        process = subprocess.Popen([sys.executable, *command], env=environment)
        processes[process.pid] = process
    failed = 0
    while processes:
        pid, status = os.wait()
        processes.pop(pid).returncode = os.waitstatus_to_exitcode(status)
        if status and not failed:
            failed = 1
            for other in processes.values():
                other.terminate()
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
