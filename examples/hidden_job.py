"""Run a command in a hidden guest, and trust its output only if the guest's RAM was found hidden.

    sudo python examples/hidden_job.py 'sha256sum' <FILE

Needs an image (offmap image build) and RAM that hides (offmap doctor says which; here: reserved).
"""

import sys

import offmap


def main() -> int:
    """Run it; the exit status is the command's, or 3 if its guest was not found hidden."""
    try:
        result = offmap.run_job(sys.argv[1], memory="reserved", stdin=sys.stdin.buffer.read())
    except offmap.BackendRefused as refusal:
        print(f"no hidden RAM on this host: {refusal}", file=sys.stderr)
        return refusal.exit_status
    except offmap.OffmapError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    if result.audit is None or result.audit.verdict is not offmap.Verdict.HIDDEN:
        print("the guest was not found hidden; its output is withheld", file=sys.stderr)
        return offmap.ExitStatus.UNDETERMINED
    sys.stdout.buffer.write(result.stdout)
    sys.stderr.buffer.write(result.stderr)
    return result.status


if __name__ == "__main__":
    sys.exit(main())
