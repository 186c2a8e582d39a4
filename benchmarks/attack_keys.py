"""Reads that it takes to the private keys of a Debian guest's nginx and sshd, on plain and on hidden RAM.

In a disposable host, two guests run: the control on ``anon`` RAM, and one on ``reserved`` RAM. The TLS
key is made in the guest's RAM after its boot, and its file is deleted. The SSH host key is in the image. The image lies
in the host's RAM: so it is in its page cache, where the key can be read whatever the guest's RAM is.
A read is a word of eight bytes. Each key is recovered when it has signed what the public key verifies.
"""

import json
import re
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import add_inside_options, run_in_lab
from offmap.attack.attack import Beforehand, Victim, attack
from offmap.attack.kcore_primitive import KcorePrimitive
from offmap.attack.keys import PublicKey
from offmap.attack.knowledge import known, learn
from offmap.attack.result import AttackResult, Outcome
from offmap.attack.target import KeyFile, Target, TlsKey
from offmap.compare.vm_process import VmProcess
from offmap.errors import OffmapError
from offmap.guests.build import build_image
from offmap.guests.recipe import RootRecipe
from offmap.lab.provision import host_kernel
from offmap.patience import scaled

MOST_READS = 200_000
PACKAGES = ("nginx-light", "openssl", "openssh-server")
SSH_KEY = "/etc/ssh/ssh_host_ed25519_key"
SETUP = f"""
cd /tmp
openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -subj /CN=localhost -days 2 2>/dev/null
echo 'events {{}} http {{ access_log off; server {{ listen 443 ssl;
    ssl_certificate /tmp/cert; ssl_certificate_key /tmp/key; }} }}' >conf
mkdir -p /run/sshd
nginx -c /tmp/conf && rm key && /usr/sbin/sshd && cat cert {SSH_KEY}.pub && echo ready
read word
"""
READY = re.compile(r"(?s)(-----BEGIN CERT.*END CERTIFICATE-----\n)(.*)ready")
_HOST = "4G"
_BOOT_SECONDS = 240.0


def start(stack: ExitStack, image: Path, kind: str) -> tuple[int, list[Target]]:
    """A guest with its servers: the PID of its VMM, and its two keys.

    Raises:
        OffmapError: it did not boot.
    """
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    command = [sys.executable, "-m", "offmap", "run", "--image", str(image), "--memory", kind, "--exec", SETUP]
    vmm = stack.enter_context(VmProcess(command, folder))
    match = READY.search(vmm.wait_for(READY, scaled(_BOOT_SECONDS)))
    if match is None:
        raise OffmapError(f"the guest on {kind} has no servers: {vmm.complaint()}")
    for name, text in zip(("cert", "ssh"), match.groups(), strict=True):
        (folder / name).write_text(text)
    return vmm.pid, [TlsKey("nginx", PublicKey(folder / "cert")), KeyFile(SSH_KEY, PublicKey(folder / "ssh"))]


def show(name: str, result: AttackResult, expected: Outcome, limit: Limit | None) -> None:
    """One figure for the control, and one for the guest on hidden RAM.

    Raises:
        OffmapError: it did not come out as it should.
    """
    control = result.control
    if control is None or control.outcome != Outcome.RECOVERED or result.outcome != expected:
        raise OffmapError(f"{name}: {result.outcome} and not {expected}: {result.reason}")
    for ram, attempt, most in (("anon", control, Limit("ours", MOST_READS)), ("reserved", result.attempt, limit)):
        facts = {"outcome": attempt.outcome, "stage": attempt.stage, "mapped_pages": attempt.mapped_pages}
        Figure("attack_keys", f"{name}, {ram}", "reads", [attempt.reads], limit=most, facts=facts).print()


def inside(image: Path, learnt: Path) -> int:
    """Measure, in the disposable host."""
    kernel = known(learnt)
    knowledge = Beforehand(kernel, kernel)
    with ExitStack() as stack, KcorePrimitive() as primitive:
        plain, controls = start(stack, image, "anon")
        hidden, targets = start(stack, image, "reserved")
        names = ("TLS key of nginx", Outcome.ENDS), ("SSH host key of the image", Outcome.RECOVERED)
        for (name, expected), target, control in zip(names, targets, controls, strict=True):
            result = attack(primitive, knowledge, Victim(hidden, target), Victim(plain, control))
            show(name, result, expected, None)
    return 0


def copied(image: Path) -> Path:
    """The image in the RAM of this (disposable) host."""
    folder = Path(tempfile.mkdtemp())
    for path in image.iterdir():
        with path.open("rb") as source, (folder / path.name).open("wb") as to:
            while piece := source.read(1 << 20):
                if any(piece):
                    to.write(piece)
                else:
                    to.seek(len(piece), 1)  # a hole
            to.truncate(path.stat().st_size)
    return folder


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=1, quick="the same: the reads are counted, not timed")
    add_inside_options(parser, "--image", "--learnt")
    args = parser.parse_args()

    def run() -> int:
        if args.inside:
            return inside(copied(Path(args.image)), Path(args.learnt))
        kernel = host_kernel()
        with tempfile.TemporaryDirectory() as folder:
            image, learnt = Path(folder) / "image", Path(folder) / "learnt.json"
            build_image(RootRecipe(include=PACKAGES), kernel, image)
            learnt.write_text(json.dumps(learn(kernel.vmlinuz, sorted(kernel.modules.rglob("kvm.ko*"))).to_json()))
            return run_in_lab(__file__, ["--image", str(image), "--learnt", str(learnt)], memory=_HOST)

    return exit_status("attack_keys", run)


if __name__ == "__main__":
    sys.exit(main())
