"""Generate many samples of a saved pipeline: `ddpm_hf.commands.sample` as a file; `--help` lists the options."""

import sys

from ddpm_hf.commands.sample import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
