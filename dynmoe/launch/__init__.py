"""Checks before and after a start, for the scripts in launch/, and job scripts for Slurm. Does no training."""

from dynmoe.launch.command import main

__all__ = ["main"]
