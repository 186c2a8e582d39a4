"""Hidden memory under the slots of a VMM that knows nothing of it.

``start`` puts a seccomp filter (``filter``) on the VMM and runs it in place of this process. A ``supervisor`` process
beside it is told of each KVM call that sets a memory slot, CPUID or registers (``listener``). It stops the VMM
meanwhile (``stopped``) and places memory of a ``source`` at the slot's addresses (``slots``, ``address_space``). It
edits CPUID (``cpuid``), tells the guest of its clock (``clock``) and has the VMM audited (``audits``). docs/wrap.md
says what it can and cannot do.
"""
