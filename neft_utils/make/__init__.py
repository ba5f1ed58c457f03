"""What `make` runs; imported by nothing else."""
