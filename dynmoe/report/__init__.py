"""What people look at: the report of runs, the token view, dashboards. Reads run directories; trains nothing."""

from dynmoe.report.command import main

__all__ = ["main"]
