"""Score items, to find anomalies: `ddpm_hf.commands.score` as a file; `--help` lists the options."""

import sys

from ddpm_hf.commands.score import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
