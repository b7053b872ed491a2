"""What the scripts in launch/ ask before and after a start, and job scripts for Slurm. Trains nothing."""

from dynmoe.launch.command import main

__all__ = ["main"]
