"""The first process of a disposable host, once its modules are loaded: it starts the agent and outlives it.

It takes in orphans, follows the agent into the host's root file system, and powers the host off when the agent ends.
"""

import os

from offmap.lab.guest import agent, root


def main(port: str) -> None:
    """Run the agent on ``port``; never returns."""
    ready, told = os.pipe()  # the agent says that the root file system is made
    moved, done = os.pipe()  # we say that it is in its place
    child = os.fork()
    if child == 0:
        os.close(ready)
        os.close(done)
        _agent(port, told, moved)
    os.close(told)
    os.close(moved)
    try:
        if os.read(ready, 1):
            root.enter()
            os.write(done, b"x")
        while True:
            pid, status = os.wait()
            if pid == child:
                break
        if status:
            _say(f"the agent ended with status {os.waitstatus_to_exitcode(status)}")
    finally:
        root.power_off()


def _agent(port: str, told: int, moved: int) -> None:
    """In the agent's process: become the agent."""
    status = 1
    try:
        agent.main(port, told, moved)
        status = 0
    except Exception as error:
        _say(str(error))
    finally:
        os._exit(status)


def _say(what: str) -> None:
    os.write(1, f"offmap-lab: {what}\n".encode())  # the console
