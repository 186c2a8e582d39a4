"""Boot a kernel as a disposable host, and see which kinds of RAM hide on it. Nothing on this machine changes.

python examples/try_kernel.py debian:6.1
python examples/try_kernel.py ~/linux/arch/x86/boot/bzImage
"""

import sys

import offmap


def main() -> int:
    """Print what doctor says there; the exit status is doctor's."""
    kernel = sys.argv[1]
    try:
        with offmap.lab_host(kernel, cmdline="memmap=256M$0x60000000") as host:
            print(f"{host.release} is up", file=sys.stderr)
            done = host.output([sys.executable, "-m", "offmap", "doctor"])
            warnings = [line for line in host.console.text.splitlines() if "WARNING:" in line or "BUG:" in line]
    except offmap.OffmapError as error:
        print(f"{kernel} is no good as a host: {error}", file=sys.stderr)
        return error.exit_status
    print(done.stdout.decode(), end="")
    for line in warnings:
        print(f"the kernel said: {line}", file=sys.stderr)
    return done.status


if __name__ == "__main__":
    sys.exit(main())
