"""Publish a saved pipeline on the Hub, with its model card, in one commit.

    python training/publish.py runs/digits/pipeline --hub_model_id user/digits

The token is that of `hf auth login`, or of HF_TOKEN. A card that someone has edited, here or on the Hub, is kept.
"""

import argparse
import sys
from pathlib import Path

from ddpm_hf.arguments import SuggestingParser

KEPT = (
    "--hub_license applies to cards that nobody has edited, and {card} was edited and is kept; got {licence!r}: write "
    "the licence there"
)


def main(arguments: list) -> int:
    """Publish as the arguments say, and return the exit status."""
    parser = SuggestingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="Folder of the pipeline, such as runs/x/pipeline or runs/x/best.")
    parser.add_argument(
        "--hub_model_id", required=True, help="Repo, 'user/name' or 'name'; it is made if it does not exist."
    )
    parser.add_argument("--hub_revision", help="Branch; it is made if it does not exist. Default: the main one.")
    parser.add_argument(
        "--create_pr", action="store_true", help="Open a pull request instead of writing to the branch."
    )
    parser.add_argument(
        "--hub_private_repo", action="store_true", default=None, help="Make the repo private if it is new."
    )
    parser.add_argument("--hub_license", help="Licence of the weights, by its name on the Hub. Default: not stated.")
    parser.add_argument("--hub_upload_state", action="store_true",
                        help="Upload the newest checkpoint of the run too, in training_state/.")  # fmt: skip
    parser.add_argument("--space", help="Also make this Space, 'user/name' or 'name', with a page to try the pipeline.")
    parser.add_argument("--message", default="Upload pipeline", help="Message of the commit. Default: %(default)s.")
    given = parser.parse_args(arguments)
    # after the options, because they are slow to import
    from huggingface_hub.utils import validate_repo_id

    from ddpm_hf.hub.card import Parts
    from ddpm_hf.hub.publish import Target, open_repo, publish_space, publish_with_patience
    from ddpm_hf.pipeline import card_to_keep, is_own_card

    target = Target(given.hub_model_id, given.hub_revision, given.create_pr, given.hub_private_repo, given.hub_license)
    try:
        if given.space:
            validate_repo_id(given.space)
            if given.create_pr:
                raise ValueError(
                    "--space makes a page of a pipeline on a branch, and --create_pr publishes on none; got both: make "
                    "the page when the pull request is merged"
                )
        Parts(given.pipeline)  # before anything is made on the Hub
        card = given.pipeline / "README.md"
        if given.hub_license and card.exists() and not is_own_card(card.read_text(encoding="utf-8")):
            raise ValueError(KEPT.format(card=card, licence=given.hub_license))
        target = open_repo(target)
        if given.hub_license and card_to_keep(target.repo_id, target.revision):
            raise ValueError(KEPT.format(card=f"the card of {target.repo_id}", licence=given.hub_license))
        run = given.pipeline.resolve().parent if given.hub_upload_state else None
        done = publish_with_patience(given.pipeline, target, given.message, run=run)
        print(f"published: {done['url']}")
        if given.space:
            print(f"page: {publish_space(given.space, target)}")
    except Exception as error:  # the client's own kinds, and those of the HTTP library that it uses
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
