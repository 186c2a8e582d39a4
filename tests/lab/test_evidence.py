"""Evidence of a real kernel and a TPM (in software): accepted as it is, and refused in each way that it must be."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from offmap.audit.canary import new_key
from offmap.audit.evidence.verify import Expected, Verification, verify
from offmap.audit.verdict import Verdict
from offmap.kmod.lab_build import load
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel

from .alias_module import alias_module
from .conftest import RESERVED
from .swtpm import ENVIRONMENT, SCRIPT, tpm_root

pytestmark = [pytest.mark.lab, pytest.mark.slow]

TARGET = str(Path(__file__).with_name("audit_target.py"))
NONCE = "f00d"


class Keys(NamedTuple):
    """Files of the key that signs."""

    private: Path
    public: Path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Give the key that signs."""
    folder, key = tmp_path_factory.mktemp("keys"), Ed25519PrivateKey.generate()
    files = Keys(folder / "key.pem", folder / "key.pub")
    files.private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    files.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return files


@pytest.fixture(scope="module")
def host(lab_kernel: HostKernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    """Give a host with a TPM. It is booted in full: hosts from one snapshot have one boot ID."""
    root, out = tpm_root(), tmp_path_factory.mktemp("out")
    with LabHost.start(lab_kernel, memory="1G", cmdline=RESERVED, out=out, fresh=True) as host:
        host.output(["mount", "-t", "securityfs", "none", "/sys/kernel/security"])
        done = host.output(["sh", str(SCRIPT), str(root)])
        assert done.status == 0, done.stderr.decode()
        for name in ("ak.pub", "other.pub"):
            (out / name).write_bytes(host.output(["cat", f"/tmp/tpm/{name}"]).stdout)
        yield host


def make(host: LabHost, keys: Keys, name: str, *options: str) -> Path:
    """Audit a process on reserved memory with `options`; give its evidence, which is here too."""
    assert host.options.out is not None
    path = host.options.out / name
    key = host.options.out / "private.pem"
    key.write_bytes(keys.private.read_bytes())
    argv = [sys.executable, TARGET, "reserved", new_key(), "4"]
    argv += ["--evidence", str(path), "--evidence-key", str(key), "--nonce", NONCE, *options]
    done = host.output([*ENVIRONMENT, *argv])
    assert done.status == 0, done.stderr.decode()
    return path


@pytest.fixture(scope="module")
def quoted(host: LabHost, keys: Keys) -> Path:
    """Give evidence with a quote."""
    return make(host, keys, "quoted", "--tpm", "0x81010002")


def refusals(found: Verification) -> set[str]:
    assert not found.accepted and found.verdict is None
    return {check.what for check in found.checks if check.result == "refused"}


def test_a_quote_is_accepted_and_no_other(host: LabHost, keys: Keys, quoted: Path) -> None:
    out = quoted.parent
    known = Expected(keys.public, out / "ak.pub", NONCE, policy=quoted)
    found = verify(quoted, known)
    assert found.accepted and found.verdict is Verdict.HIDDEN and found.evidence is not None, found.checks
    facts = found.evidence.host
    assert facts.kernel == host.output(["uname", "-r"]).stdout.decode().strip()
    assert facts.boot_id == host.output(["cat", "/proc/sys/kernel/random/boot_id"]).stdout.decode().strip()
    assert facts.kernel_build_id and facts.modules["kvm"]
    assert any(check.what == "IMA" and "host's word" in check.detail for check in found.checks)
    assert refusals(verify(quoted, Expected(keys.public, out / "ak.pub", "beef"))) == {"nonce"}
    assert refusals(verify(quoted, Expected(keys.public, out / "other.pub", NONCE))) == {"TPM"}


def test_a_module_that_was_not_there(host: LabHost, lab_kernel: HostKernel, keys: Keys, quoted: Path) -> None:
    module = alias_module(lab_kernel)
    assert host.options.out is not None
    (here := host.options.out / module.name).write_bytes(module.read_bytes())
    assert load(host, here) == ""
    path = make(host, keys, "later", "--tpm", "0x81010002")
    ak = quoted.parent / "ak.pub"
    assert refusals(verify(path, Expected(keys.public, ak, NONCE, policy=quoted))) == {"modules", "taint"}
    assert verify(path, Expected(keys.public, ak, NONCE)).accepted


def test_another_boot(host: LabHost, lab_host: LabHost, keys: Keys) -> None:
    here, there = make(host, keys, "here"), make(lab_host, keys, "there")
    assert "boot" in refusals(verify(there, Expected(keys.public, None, NONCE, policy=here)))
