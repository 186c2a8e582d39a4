"""The proof: which pages of a VM the host kernel can reach, by which address, and whether a secret is readable there.

``audit.audit_process`` is the whole of it for one process, ``every_vm`` for a host (``vms`` finds them), ``changes``
for two audits of one. The parts, in the order they are used: ``process`` and ``maps`` (the audited process),
``guest_ram`` (where its guest's RAM is; ``kvm_slots``), ``frames`` (the page frames behind it; ``pagemap``,
``residency``), ``kcore`` and ``vmcoreinfo`` (the kernel's memory and layout), ``walk`` and ``mappings`` (what the
page tables map), ``regions`` and ``kinds`` (its names), ``control`` (the positive control), ``verdict``, ``join`` and
``physical`` (which mapping reaches which page, and where), ``sharers``, ``readable``, ``scan`` and ``canary`` (the
search for planted secrets), ``host`` (facts every result is stamped with). ``intervals`` is what they reckon with,
``reach`` the words of a result.

It imports nothing of our VMM: it must be able to judge other people's.
"""
