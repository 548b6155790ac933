"""Where things lie: the task of a run, its initial policy, reference and value model."""
import common


def policy_path(config):
    """Directory or id of the initial policy: --policy, else --model; for tiny, this seed's SFT policy."""
    if config.policy or config.model != "tiny":
        return config.policy or config.model
    from tasks import build
    return build.models(config) / "sft"


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


def test_pool(config):
    """(proxy [P, N], gold [P, N]) of N SFT samples of each test prompt, for best-of-n curves; or None."""
    if config.data != "reviews":
        return None
    from tasks import build
    return build.test_pool(config)
