"""Pages for people: the report of runs, the token view, dashboards. Reads run directories; does no training."""

from dynmoe.report.command import main

__all__ = ["main"]
