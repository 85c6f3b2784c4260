#!/usr/bin/env python3
"""`hybrid-ssl evaluate` as a file.

tools/evaluate.py runs/mine --data ./labelled --protocol knn,linear --out runs/mine/evaluation
torchrun --nproc_per_node 2 tools/evaluate.py vit_small_patch16_224 --data ./labelled --random
"""

import sys

from hybrid_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
