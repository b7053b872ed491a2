"""python -m dynmoe.plan"""

from dynmoe.cli import run_tool
from dynmoe.plan import main

if __name__ == "__main__":
    run_tool(main)
