"""What a configuration needs before anybody queues for it: memory, traffic, time, and layouts that fit."""

from dynmoe.plan.command import main

__all__ = ["main"]
