"""What every room stands on: profiles, paths, files, the hub."""
