"""Train a diffusion model: `ddpm_hf.commands.train` as a file; `--help` lists the options."""

import sys

from ddpm_hf.commands.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
