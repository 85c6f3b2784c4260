#!/usr/bin/env python3
"""`hybrid-ssl finetune` as a file.

tools/finetune.py classification runs/mine --data ./labelled --out runs/labels
torchrun --nproc_per_node 2 tools/finetune.py detection runs/mine --data ./coco --out runs/boxes
"""

import sys

from hybrid_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
