"""What somebody gets who can read the host kernel's memory where it is mapped, and nothing else."""
