"""python -m dynmoe.hf export RUN OUT, python -m dynmoe.hf gguf RUN FILE, python -m dynmoe.hf import DIR RUN"""

from dynmoe.cli import run_tool
from dynmoe.hf import main

if __name__ == "__main__":
    run_tool(main)
