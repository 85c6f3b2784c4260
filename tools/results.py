#!/usr/bin/env python3
"""`hybrid-ssl results` as a file.

python tools/results.py runs/labels runs/labels_random --out tables
"""

import sys

from hybrid_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["results", *sys.argv[1:]]))
