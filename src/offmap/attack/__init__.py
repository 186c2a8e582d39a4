"""What an attacker gets who can read everything that the host kernel maps, and nothing else."""
