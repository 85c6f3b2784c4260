#!/usr/bin/env python3
"""`hybrid-ssl push` as a file.

tools/push.py runs/mine user/name --private
"""

import sys

from hybrid_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
