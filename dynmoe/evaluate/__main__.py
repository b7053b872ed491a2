"""python -m dynmoe.evaluate RUN [--tasks NAME ...]"""

from dynmoe.cli import run_tool
from dynmoe.evaluate import main

if __name__ == "__main__":
    run_tool(main)
