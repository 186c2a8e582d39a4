"""Reads that it takes to the private keys of a Debian guest's nginx and sshd, on plain and on hidden RAM.

In a disposable host, two guests run: the control on ``anon`` RAM, and one on ``reserved`` RAM. The TLS
key is made in the guest's RAM after its boot, and its file is deleted. The SSH host key is in the image. The image lies
in the host's RAM: so it is in its page cache, where the key can be read whatever the guest's RAM is.
A read is a word of eight bytes. Each key is recovered when it has signed what the public key verifies.

A file of the guest's tmpfs is looked for in the same way, in the guest's page cache.

With ``--plain``, the TLS key on each kind of plain RAM instead, under offmap and under QEMU; with ``--kind``, on these.
Linux 7.3 does not boot as a guest of QEMU 7.2 in an emulated host (docs/qemu.md): there, take another for the guest.
"""

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import add_inside_options, run_in_lab
from offmap.attack.attack import Beforehand, Victim, attack
from offmap.attack.kcore_primitive import KcorePrimitive
from offmap.attack.keys import PublicKey
from offmap.attack.knowledge import known, learn
from offmap.attack.result import AttackResult, Attempt, Outcome
from offmap.attack.target import FileContent, KeyFile, Target, TlsKey
from offmap.compare.kinds import kind_of
from offmap.compare.vm_process import VmProcess
from offmap.compare.vmm_command import GuestSetup, vmm_command
from offmap.errors import OffmapError
from offmap.guests.build import build_image
from offmap.guests.recipe import RootRecipe
from offmap.lab.cpio import newc, regular
from offmap.lab.provision import host_kernel
from offmap.lab.qemu import parse_size
from offmap.patience import scaled

MOST_READS = 200_000
PLAIN = ("anon", "memfd", "hugetlb", "qemu-anon", "qemu-memfd", "qemu-hugetlb")
PACKAGES = ("nginx-light", "openssl", "openssh-server")
SSH_KEY = "/etc/ssh/ssh_host_ed25519_key"
SECRET_FILE = "/tmp/secret"
SECRET_BYTES = 512
SETUP = f"""
cd /tmp
head -c {SECRET_BYTES} /dev/urandom >{SECRET_FILE}
openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -subj /CN=localhost -days 2 2>/dev/null
echo 'events {{}} http {{ access_log off; server {{ listen 443 ssl;
    ssl_certificate /tmp/cert; ssl_certificate_key /tmp/key; }} }}' >conf
mkdir -p /run/sshd
nginx -c /tmp/conf && rm key && /usr/sbin/sshd && sha256sum {SECRET_FILE} && cat cert {SSH_KEY}.pub && echo ready
while :; do sleep 1000; done
"""
READY = re.compile(
    r"(?s)([0-9a-f]{64})  /tmp/secret\r?\n(-----BEGIN CERT.*END CERTIFICATE-----\r?\n)(ssh-[^\n]*\n).*ready"
)
_HOST = "4G"
_GUEST = "256M"
_HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
_BOOT_SECONDS = 240.0


def qemu(kind: str, image: Path, folder: Path) -> list[str]:
    """QEMU with such RAM; its guest is given the command as ``offmap run --exec`` does it (guests/job.py)."""
    size = parse_size(_GUEST)
    ram = {
        "qemu-anon": "memory-backend-ram,share=off",
        "qemu-memfd": "memory-backend-memfd,share=on",
        "qemu-hugetlb": "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
    }
    initrd = folder / "initrd"
    command = newc([regular("exec", f"exec >/dev/ttyS0 2>&1\n{SETUP}".encode(), 0o755)])
    first = (image / "initrd.img").read_bytes()
    initrd.write_bytes(first + bytes(-len(first) % 4) + command)
    words = "root=/dev/vda offmap.overlay=tmpfs"
    setup = GuestSetup(kind_of("qemu-memfd"), image / "vmlinuz", initrd, size, words=words, disk=image / "root.img")
    argv = vmm_command(setup, folder)
    argv[argv.index("-object") + 1] = f"{ram[kind]},id=ram,size={size}"
    argv += ["-device", "virtio-serial-device"]
    for name in ("stdin", "stdout", "stderr", "status"):
        argv += ["-chardev", f"null,id={name}", "-device", f"virtserialport,chardev={name},name={name}"]
    return argv


def start(stack: ExitStack, image: Path, kind: str) -> tuple[int, list[Target]]:
    """A guest with its servers: the PID of its VMM; its TLS key, its file, and its SSH key.

    Raises:
        OffmapError: it did not boot.
    """
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if kind.startswith("qemu-"):
        command = qemu(kind, image, folder)
    else:
        command = [sys.executable, "-m", "offmap", "run", "--image", str(image), "--memory", kind, "--exec", SETUP]
        command += ["--memory-size", _GUEST]
    vmm = stack.enter_context(VmProcess(command, folder))
    said = vmm.wait_for(READY, scaled(_BOOT_SECONDS))
    match = READY.search(said)
    if match is None:
        raise OffmapError(f"the guest on {kind} has no servers: {vmm.complaint()}: {said[-1000:]}")
    digest, *keys = match.groups()
    for name, text in zip(("cert", "ssh"), keys, strict=True):
        (folder / name).write_text(text.replace("\r", ""))
    tls, ssh = (PublicKey(folder / name) for name in ("cert", "ssh"))
    return vmm.pid, [
        TlsKey("nginx", tls),
        FileContent(SECRET_FILE, f"{digest}:{SECRET_BYTES}"),
        KeyFile(SSH_KEY, ssh),
    ]


def show(name: str, result: AttackResult, expected: Outcome, limit: Limit | None) -> None:
    """One figure for the control, and one for the guest on hidden RAM.

    Raises:
        OffmapError: it did not come out as it should.
    """
    control = result.control
    if control is None or control.outcome != Outcome.RECOVERED or result.outcome != expected:
        raise OffmapError(f"{name}: {result.outcome} and not {expected}: {result.reason}")
    for ram, attempt, most in (("anon", control, Limit("ours", MOST_READS)), ("reserved", result.attempt, limit)):
        figure(name, ram, attempt, most)


def figure(name: str, ram: str, attempt: Attempt, limit: Limit | None) -> None:
    facts = {"outcome": attempt.outcome, "stage": attempt.stage, "mapped_pages": attempt.mapped_pages}
    Figure("attack_keys", f"{name}, {ram}", "reads", [attempt.reads], limit=limit, facts=facts).print()


def on_plain_ram(image: Path, knowledge: Beforehand, kinds: Sequence[str]) -> int:
    """Measure the TLS key on these kinds of plain RAM, in the disposable host."""
    for kind in kinds:
        with ExitStack() as stack, KcorePrimitive() as primitive:
            if kind.endswith("hugetlb"):
                _HUGE_PAGES.write_text(str(parse_size(_GUEST) >> 21))
                stack.callback(_HUGE_PAGES.write_text, "0")
            pid, targets = start(stack, image, kind)
            found = attack(primitive, knowledge, Victim(pid, targets[0]), None)
            if found.outcome != Outcome.RECOVERED:
                raise OffmapError(f"{kind}: {found.outcome} and not recovered: {found.reason}")
            figure("TLS key of nginx", kind, found.attempt, Limit("ours", MOST_READS))
    return 0


def inside(image: Path, knowledge: Beforehand) -> int:
    """Measure, in the disposable host."""
    with ExitStack() as stack, KcorePrimitive() as primitive:
        plain, controls = start(stack, image, "anon")
        hidden, targets = start(stack, image, "reserved")
        names = (
            ("TLS key of nginx", Outcome.ENDS),
            ("file in the page cache", Outcome.ENDS),
            ("SSH host key of the image", Outcome.RECOVERED),
        )
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
    parser.add_argument("--host-kernel", default="debian:6.12", help="of the host (default: %(default)s)")
    parser.add_argument("--guest", help="of the guest (default: the host's)")
    parser.add_argument("--plain", action="store_true", help="the TLS key on each kind of plain RAM")
    parser.add_argument("--kind", action="append", choices=PLAIN, help="on this one; can be given again")
    add_inside_options(parser, "--image", "--learnt", "--learnt-guest")
    args = parser.parse_args()
    kinds = args.kind or (PLAIN if args.plain else ())

    def run() -> int:
        if args.inside:
            image = copied(Path(args.image))
            knowledge = Beforehand(known(Path(args.learnt)), known(Path(args.learnt_guest)))
            return on_plain_ram(image, knowledge, kinds) if kinds else inside(image, knowledge)
        kernel = host_kernel(args.host_kernel)
        guest = host_kernel(args.guest or args.host_kernel)
        with tempfile.TemporaryDirectory() as folder:
            image = Path(folder) / "image"
            build_image(RootRecipe(include=PACKAGES), guest, image)
            more = ["--image", str(image), *(f"--kind={kind}" for kind in kinds)]
            for option, one in (("--learnt", kernel), ("--learnt-guest", guest)):
                learnt = Path(folder) / f"{option[2:]}.json"
                learnt.write_text(json.dumps(learn(one.vmlinuz, sorted(one.modules.rglob("kvm.ko*"))).to_json()))
                more += [option, str(learnt)]
            return run_in_lab(__file__, more, memory=_HOST, kernel=kernel, timeout=scaled(900.0))

    return exit_status("attack_keys", run)


if __name__ == "__main__":
    sys.exit(main())
