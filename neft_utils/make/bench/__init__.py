"""Speed and memory, ours beside plain TRL."""
