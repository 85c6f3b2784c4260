#!/usr/bin/env python3
"""`hybrid-ssl pretrain` as a file, which `accelerate launch` and `torchrun` want.

    accelerate launch tools/pretrain.py recipes/ibot_vitb.yaml data.source=./images
    torchrun --nproc_per_node 2 tools/pretrain.py recipes/quickstart.yaml
"""

import sys

from hybrid_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
