"""Start a program of this folder for a training: python tests/lab/__main__.py NAME WORDS.

The program ends when its standard input does, whose other end the training holds. So phantoms and
pictures end with the training that asked for them, even where it was killed.
"""
import os
import runpy
import sys
import threading
from pathlib import Path

def follow_input():
    """Wait for the end of standard input, then end this process."""
    while os.read(0, 1):
        pass
    os._exit(1)

if __name__ == '__main__':
    threading.Thread(target=follow_input, daemon=True).start()
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # `tests` and `model` lie there
    del sys.argv[0]
    # With alter_sys, processes that this one spawns find the program's functions in __main__.
    runpy.run_module(f'tests.lab.{sys.argv[0]}', run_name='__main__', alter_sys=True)
