"""Guests to do real work in: a Debian root file system, a kernel and an initrd that suit each other; one command."""
