"""python -m dynmoe.launch"""

from dynmoe.cli import run_tool
from dynmoe.launch import main

if __name__ == "__main__":
    run_tool(main)
