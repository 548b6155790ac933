"""Where things lie: the task of a run, its initial policy, reference and value model."""
import hashlib
from pathlib import Path

import common

MEGABYTE = 2 ** 20


def policy_path(config):
    """Directory or id of the initial policy: --policy, else --model; for tiny, this seed's SFT policy."""
    if config.policy or config.model != "tiny":
        return config.policy or config.model
    from tasks import build
    return build.models(config) / "sft"


def fingerprint(config):
    """12 hex digits for the weights that this seed's runs begin from: its build. None for a model of the hub.

    For the embedded task they are the SFT policy's. Of a large file, size, first and last megabyte count.
    """
    if config.data == "reviews":
        from tasks import build
        folder = build.models(config) / "sft"
    else:
        folder = Path(policy_path(config))
    digest, files = hashlib.sha256(), sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if size > 2 * MEGABYTE:
                digest.update(str(size).encode() + file.read(MEGABYTE))
                file.seek(-MEGABYTE, 2)
            digest.update(file.read())
    return digest.hexdigest()[:12] if files else None


def load_task(config):
    """The data to train on, and what judges it. The tiny models are built at the first use of a seed."""
    if config.data == "reviews":
        from tasks import build
        return build.load_task(config)
    from tasks import preferences
    tokenizer = load_tokenizer(config)
    return preferences.load(config.data, tokenizer, config.limit, config.chat, config.skip_bad_rows)


def load_tokenizer(config):
    return common.load_tokenizer(policy_path(config), config.max_length)


def load_policy(config):
    return common.load_policy(policy_path(config), config.device, config.dtype)


def load_reference(config):
    """A frozen copy of the initial policy."""
    return common.load_reference(policy_path(config), config.device, config.dtype)


def load_base(config):
    """The model before SFT: of tiny the untrained one, else --model."""
    if config.model != "tiny":
        return common.load_policy(config.model, config.device, config.dtype)
    from tasks import build
    return common.load_policy(build.models(config) / "base", config.device, config.dtype)


def demonstrations(config, task, n, rated=0):
    """(rated, unrated): responses with people's ratings of their attributes, and demonstrations without.

    Embedded task: the first n of what the SFT policy was trained on, the first `rated` of them with ratings.
    Of a file: its rated responses, and up to n others. With n = 0: only what the task has ratings of.
    """
    known = task.ratings.get("train", [])
    if config.data == "reviews" and n:
        from tasks import build
        rows = build.demonstrations(config, n, rated)
        return [row for row in rows if row.attributes], [row for row in rows if not row.attributes]
    texts = {row[:2] for row in known}
    return known, [row for row in task.demonstrations.get("train", []) if row[:2] not in texts][:n]


def test_pool(config):
    """(proxy [P, N], gold [P, N]) of N SFT samples of each test prompt, for best-of-n curves; or None."""
    if config.data != "reviews":
        return None
    from tasks import build
    return build.test_pool(config)
