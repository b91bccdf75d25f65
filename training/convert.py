"""Convert a checkpoint of the peer: `ddpm_hf.commands.convert` as a file; `--help` lists the options."""

import sys

from ddpm_hf.commands.convert import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
