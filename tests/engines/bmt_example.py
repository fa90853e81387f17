"""One process of the test of an example: its script, on the stand-in for CUDA and NCCL."""

import runpy
import sys

from bmt_on_cpu import install

install()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
