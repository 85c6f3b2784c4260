#!/usr/bin/env python3
"""`hybrid-ssl export` as a file.

tools/export.py runs/mine exported
tools/export.py runs/mine encoder.onnx --to onnx
"""

import sys

from hybrid_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
