"""The proof: which pages of a VM the host kernel can reach, by which address, and whether a secret is readable there.

``audit.audit_process`` is the whole of it. The parts, in the order they are used: ``process`` and ``maps`` (the audited
process), ``guest_ram`` (where its guest's RAM is), ``frames`` (the page frames behind it; ``pagemap``, ``residency``),
``kcore`` and ``vmcoreinfo`` (the kernel's memory and layout), ``walk`` and ``mappings`` (what the page tables map),
``control`` (the positive control), ``verdict``, ``regions`` (names), ``readable``, ``scan`` and ``canary`` (the search
for planted secrets), ``host`` (facts every result is stamped with).

It imports nothing of our VMM: it must be able to judge other people's.
"""
