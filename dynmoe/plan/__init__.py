"""Estimates for a configuration before it is queued: memory, traffic, time, and layouts that fit."""

from dynmoe.plan.command import main

__all__ = ["main"]
