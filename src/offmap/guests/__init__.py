"""Debian guests for real work: a root file system, a kernel and an initrd that fit together; a command in a guest."""
