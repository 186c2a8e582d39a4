"""The proof: which pages of a VM the host kernel can reach, by which address, and whether a secret is readable there.

``audit.audit_process`` audits one process, ``vms`` all of a host; ``changes`` compares two audits of one process. The
parts, in the order they are used: ``process`` (the audited one), ``kvm_list`` (KVM's own list of VMs, with
``kvm_vcpu``, ``tasks`` and ``xarray``), ``guest_ram`` (where its guest's RAM is), ``frames`` (the page frames behind
it; ``pagemap``, ``residency``), ``kcore`` and ``vmcoreinfo`` (the kernel's memory and layout), ``walk`` and
``mappings`` (what the page tables map), ``regions`` and ``kinds`` (its names), ``own_memory`` (the positive control),
``classify``, ``join`` (which mapping reaches which page, and where), ``sharers``, ``scan`` with ``readable``,
``search`` and ``placed`` (the search for planted secrets), ``host`` (facts that every result is stamped with).
``result`` and ``reach`` are the types of a result.

It imports nothing of our VMM: it must be able to judge other people's.
"""
