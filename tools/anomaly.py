#!/usr/bin/env python3
"""`hybrid-ssl anomaly` as a file.

python tools/anomaly.py runs/bottle ./bottle/train/good ./bottle/test --out anomalies
"""

import sys

from hybrid_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["anomaly", *sys.argv[1:]]))
