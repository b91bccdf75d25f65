"""Publish a saved pipeline: `ddpm_hf.commands.publish` as a file; `--help` lists the options."""

import sys

from ddpm_hf.commands.publish import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
