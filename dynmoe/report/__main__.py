"""python -m dynmoe.report"""

from dynmoe.cli import run_tool
from dynmoe.report import main

if __name__ == "__main__":
    run_tool(main)
