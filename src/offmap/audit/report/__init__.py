"""Audits for people and for other programs: each renderer takes ``hosts.HostReport`` and nothing else."""
