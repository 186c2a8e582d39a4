"""Calls to Firecracker's API, in a disposable host: ``python -m tests.lab.firecracker_api SOCKET CALLS``.

CALLS is JSON: a list of [method, path, body]. It prints what each that failed was answered, and fails then.
"""

import http.client
import json
import socket
import sys
import time


class _Connection(http.client.HTTPConnection):
    """By a Unix socket, which Firecracker makes when it has started."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        while True:
            self.sock = socket.socket(socket.AF_UNIX)
            try:
                self.sock.connect(self._path)
                return
            except (FileNotFoundError, ConnectionRefusedError):
                self.sock.close()
                time.sleep(0.05)


def main() -> None:
    _, path, calls = sys.argv
    for method, resource, body in json.loads(calls):
        connection = _Connection(path)
        connection.request(method, resource, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status >= 300:
            sys.exit(f"{method} {resource}: {answer.status}: {answer.read().decode()}")
        connection.close()


if __name__ == "__main__":
    main()
