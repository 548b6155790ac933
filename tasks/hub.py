"""The Hugging Face hub: asked once whether it answers, before calls that would retry for half a minute."""
import functools

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from common import UserError, warn

SECONDS = 5


@functools.cache
def answers():
    """Does the hub answer within SECONDS? Also True in offline mode, where nothing asks it."""
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        HfApi().model_info("gpt2", timeout=SECONDS)
    except HfHubHTTPError:                                             # an answer, though not the wanted one
        return True
    except (OSError, HTTPError):
        return False
    return True


def check_hub(name, file="config.json", kind="model"):
    """UserError where the hub is out of reach and the cache lacks this file of a repository.

    Where the cache has it, the process goes on in offline mode.
    """
    if answers():
        return
    try:
        known = isinstance(try_to_load_from_cache(name, file or "", repo_type=kind), str)
    except HFValidationError:
        raise UserError(f"{name!r} is no name of a {kind} of the hub, and no directory or file") from None
    if not known:
        raise UserError(f"cannot load {name}: the hub does not answer within {SECONDS} seconds. Check the id "
                        "and the network, or give a local directory or file")
    warn(f"the hub does not answer: {name} comes from the cache")
    constants.HF_HUB_OFFLINE = True
