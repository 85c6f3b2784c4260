#!/usr/bin/env python3
"""`hybrid-ssl tokenizer` as a file: train the tokenizer whose ids BEiT predicts.

python tools/train_tokenizer.py --source ./images --out ./tokenizer
"""

import sys

from hybrid_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["tokenizer", *sys.argv[1:]]))
