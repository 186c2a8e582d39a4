"""A guest attacks its VMM through real KVM, beside a guest that is left alone."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from offmap.kvm import Kvm
from offmap.patience import scaled

from .attackers import Vmm, attacked_devices

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("kvm")]

ROUNDS = 16  # for each dot that the attacker says
ENDS = 5
FLAT = 5 << 20  # bytes


@pytest.fixture
def attack(payload: Callable[[str], Path], kvm: Kvm) -> Path:
    """Give the guest that attacks."""
    return payload("attack")


def test_the_attack_gets_nowhere_and_the_guest_beside_it_goes_on(
    attack: Path, payload: Callable[[str], Path], tmp_path: Path
) -> None:
    with Vmm(payload("monitor")) as victim, Vmm(attack, attacked_devices(tmp_path)) as attacker:
        victim.expect(b"U")
        victim.keys(b"f")
        victim.expect(b"F")
        attacker.expect(b"U")
        attacker.expect(b".")
        before = attacker.own_memory()
        for _ in range(3):
            attacker.expect(b".")
            victim.keys(b"a")
            victim.expect(b"a")
        assert attacker.own_memory() - before < FLAT
        assert b"!" not in attacker.output, "it has seen the other guest's memory"
        victim.keys(b"z")
        victim.expect(b"D")  # what it has filled its memory with is there
        _, status, errors = attacker.terminate()
        assert status == 2 and errors.endswith("offmap run: stopped by SIGTERM\n"), errors
        assert "failed unexpectedly" not in errors
        victim.keys(b"q")
        assert victim.ended() == (0, "")


def test_sigterm_ends_it_whatever_it_does(attack: Path, tmp_path: Path) -> None:
    dice = random.Random(1)
    for _ in range(ENDS):
        with Vmm(attack, attacked_devices(tmp_path)) as attacker:
            attacker.expect(b"U")
            time.sleep(dice.random() / 2)  # any moment will do
            seconds, status, errors = attacker.terminate()
            assert status == 2 and errors.endswith("offmap run: stopped by SIGTERM\n"), errors
            assert seconds < scaled(5.0)
