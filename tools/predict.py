#!/usr/bin/env python3
"""`hybrid-ssl predict` as a file.

python tools/predict.py runs/labels ./new_images --out predictions
"""

import sys

from hybrid_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
