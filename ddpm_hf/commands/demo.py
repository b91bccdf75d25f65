"""Serve a page to try a pipeline in the browser (extra [demo]).

    python training/demo.py --pipeline runs/digits/pipeline

--pipeline is the folder of a saved pipeline, or the name of a repo on the Hub.
"""

import argparse
import sys
from pathlib import Path

from ddpm_hf.arguments import SuggestingParser


def main(arguments: list) -> int:
    """Serve the page as the arguments say, and return the exit status."""
    parser = SuggestingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="Folder of a saved pipeline, or name of a repo on the Hub.")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="Address to serve on; 0.0.0.0 serves other machines too. Default: %(default)s.",
    )
    parser.add_argument("--port", type=int, help="Port to serve on. Default: the first free one from 7860.")
    given = parser.parse_args(arguments)
    try:
        from ddpm_hf.hub.page import build_page, serve
    except ImportError as error:
        print(f'error: the page needs gradio and matplotlib: pip install -e ".[demo]" ({error})', file=sys.stderr)
        return 2
    from ddpm_hf.hub.publish import load_pipeline

    try:
        pipe = load_pipeline(given.pipeline)
        place = Path(given.pipeline)
        title = place.resolve().parent.name if place.name in ("pipeline", "best") else place.name
        serve(build_page(pipe, title), server_name=given.host, server_port=given.port)
    except (ValueError, OSError) as error:  # OSError: the port is taken
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
