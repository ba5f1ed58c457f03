"""What a run is asked: losses, answers, instructions, benchmarks, stability, a judge."""
