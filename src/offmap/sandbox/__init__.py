"""What stands between a guest that has taken over its VMM, and the host.

- rules: which system calls a thread may make, with which arguments
- policy: the table of them, by kind of thread and by device
- seccomp: filters made of rules; how a violation is reported
- confine: everything else that the process gives up: user, capabilities, namespaces, files
- terminal: puts a terminal back as it was
- broker: the process that keeps what the VMM must not have
- confinement: the steps in their order, for a process with one guest
"""
