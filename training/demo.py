"""Serve a page to try a pipeline: `ddpm_hf.commands.demo` as a file; `--help` lists the options."""

import sys

from ddpm_hf.commands.demo import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
