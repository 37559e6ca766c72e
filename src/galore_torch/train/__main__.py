"""`python -m galore_torch.train` is `galore pretrain`: the published commands name a module for torchrun to start."""

import sys

from galore_torch.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
