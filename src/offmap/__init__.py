"""offmap: KVM guests whose memory the host kernel cannot read, and the proof of it."""

__version__ = "0.1.0"
