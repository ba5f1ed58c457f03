"""Answers of all runs from one vLLM engine."""
