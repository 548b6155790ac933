"""Where things lie: the task of a run, its initial policy and reference, and what a scorer begins from."""
import contextlib
import hashlib
import math
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig,
                          AutoModelForSequenceClassification)
from transformers.pytorch_utils import Conv1D

import common
from common import UserError
from harness import adapters, ranks, shards
from harness.checkpoints import check_tokenizer
from harness.prompts_once import share_prompts

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
        return fingerprint_of(build.models(config) / "sft")
    return fingerprint_of(policy_path(config))


def fingerprint_of(folder):
    """The same for a directory of weights; None where there are none."""
    folder = Path(folder)
    files = sorted(folder.glob("[!.]*.safetensors")) or sorted(folder.glob("[!.]*.bin"))    # no ._ of macOS
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if size > 2 * MEGABYTE:
                digest.update(str(size).encode() + file.read(MEGABYTE))
                file.seek(-MEGABYTE, 2)
            digest.update(file.read())
    return digest.hexdigest()[:12] if files else None


def commit_of(name):
    """The commit of a model of the hub that the cache has; None for a directory, or where it has none."""
    if Path(name).exists():
        return None
    with contextlib.suppress(HFValidationError):                          # module:function, for one
        found = try_to_load_from_cache(str(name), "config.json")
        return Path(found).parent.name if isinstance(found, str) else None


def load_task(config):
    """The data to train on, and what judges it. The tiny models are built at the first use of a seed."""
    if config.data == "reviews":
        from tasks import build
        return ranks.first_makes(lambda: build.load_task(config))
    from tasks import preferences
    preferences.locate(config.data)                       # a wrong path: before the tiny model is built
    tokenizer = load_tokenizer(config)
    task = preferences.load(config.data, tokenizer, config.limit, config.chat, config.skip_bad_rows,
                            config.columns)
    if config.test_data:
        preferences.use_for_test(task, preferences.load(config.test_data, tokenizer, 0, config.chat,
                                                        config.skip_bad_rows, config.columns))
    return task


def check_embeddings(texts, tokenised, embeddings):
    """UserError for tokens that the model has no embedding of."""
    beyond = [text for text, ids in zip(texts, tokenised) if max(ids, default=0) >= embeddings]
    if beyond:
        raise UserError(f"the tokenizer has tokens that the model has no embedding of, as in {beyond[0]!r}: "
                        "they do not belong together")


def check_vocabulary(tokenizer, prompts, tokenised, embeddings):
    """check_embeddings, and a warning or (if half are unknown) UserError for unknown words."""
    check_embeddings(prompts, tokenised, embeddings)
    unknown = sum(ids.count(tokenizer.unk_token_id) for ids in tokenised) / max(sum(map(len, tokenised)), 1)
    text = (f"{unknown:.0%} of the words of the prompts are unknown to the model (tiny knows only those of "
            "its film reviews): give --model")
    if unknown > 0.5:
        raise UserError(text)
    if unknown > 0.01:
        common.warn(text)


def fit_task(tokenizer, task, embeddings=math.inf):
    """Say what the length limit cuts. Rankings and pairs whose responses are equal after it are left out.

    embeddings: how many tokens the policy has. UserError where the data has others.
    """
    room = tokenizer.model_max_length
    prompts = [p for rows in task.prompts.values() for p in rows]
    tokenised = tokenizer(prompts, add_special_tokens=False).input_ids
    check_vocabulary(tokenizer, prompts, tokenised, embeddings)
    long = sum(len(ids) > room * 3 // 4 for ids in tokenised)
    if long:
        common.warn(f"{long} of {len(prompts)} prompts are longer than {room * 3 // 4} tokens: cut from the "
                    "left (--max_length sets the limit)")
    rows = [row for splits in (task.rankings, task.pairs) for split in splits.values() for row in split]
    texts = dict.fromkeys((row.prompt, text) for row in rows for text in row.responses)
    texts |= dict.fromkeys(row[:2] for split in task.demonstrations.values() for row in split)
    if not texts:
        return
    whole = common.response_ids(tokenizer, [text for _, text in texts])
    check_embeddings([text for _, text in texts], whole, embeddings)
    kept = dict(zip(texts, (tuple(ids[:room - len(p)]) for p, ids in zip(
        common.prompt_ids(tokenizer, [prompt for prompt, _ in texts]), whole))))
    cut = sum(len(ids) < len(before) for ids, before in zip(kept.values(), whole))
    if not cut:
        return
    common.warn(f"{cut} of {len(texts)} answers do not fit into {room} tokens with their prompts: cut, and "
                "not taught to end there (--max_length sets the limit)")
    before = sum(map(len, task.pairs.values()))
    task.pairs = {split: [pair for pair in pairs
                          if kept[pair.prompt, pair.chosen] != kept[pair.prompt, pair.rejected]]
                  for split, pairs in task.pairs.items()}
    task.rankings = {split: [row for row in rankings
                             if len({kept[row.prompt, text] for text in row.responses}) > 1]
                     for split, rankings in task.rankings.items()}
    equal = before - sum(map(len, task.pairs.values()))
    if equal:
        common.warn(f"{equal} of {before} pairs are equal after that: left out")


def load_tokenizer(config, most=math.inf):
    """The initial policy's; prompt and response share --max_length tokens, or `most` if that is less."""
    tokenizer = common.load_tokenizer(policy_path(config), min(config.max_length, most))
    check_tokenizer(tokenizer, policy_path(config))
    return tokenizer


def load_policy(config):
    """The initial policy; with --lora_rank it has an adapter, and nothing else of it is trained."""
    path = policy_path(config)
    if adapters.settings_of(path):
        policy = shards.load(config, lambda *place: adapters.load(path, config.lora_rank, *place))
    else:
        policy = shards.load(config, lambda *place: common.load_policy(path, *place))
        if config.lora_rank:
            adapters.add(policy, config.lora_rank)
    return shared(config, lightened(config, policy))


def shared(config, model):
    """The model, which reads a prompt once for all its answers; not for the short prompts of the reviews."""
    return model if config.data == "reviews" else share_prompts(model)


def lightened(config, model):
    """The model to be trained, with --gradient_checkpointing. UserError where its family cannot do it."""
    if config.gradient_checkpointing:
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # by version
        try:
            enable = getattr(model, f"{name}_checkpointing_enable")
            enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
        except ValueError:
            raise UserError(f"{type(model).__name__} cannot compute activations again: leave out "
                            "--gradient_checkpointing") from None
        model.train()                                 # transformers asks for it; load() has dropout off
    return model


def weights_path(config):
    """Where the whole weights of the initial policy are, if it is an adapter those of its base model."""
    return adapters.base_path(policy_path(config))


def without_scorer(config):
    """The family of the initial policy, if transformers has no class for its reward models; else ""."""
    settings = AutoConfig.from_pretrained(weights_path(config), trust_remote_code=False)
    return settings.model_type if type(settings) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING else ""


def load_scorer(config, labels=1):
    """The initial policy (of an adapter, its base) with a new linear head for scores, to be trained."""
    family = without_scorer(config)
    if family:
        raise UserError(f"transformers has no class for models of scores of the family {family}")
    path = weights_path(config)                             # each process reads all rows that it learns: mean
    model = shards.load(config, lambda *place: common.load(
        AutoModelForSequenceClassification, path, *place, num_labels=labels), mean=True)
    if config.lora_rank:
        adapters.add(model, config.lora_rank, "SEQ_CLS")
    return shared(config, lightened(config, model))


def more_stop_ids(policy, tokenizer):
    """Token ids that end a response by the policy's own generation_config, besides the tokenizer's EOS."""
    ids = policy.generation_config.eos_token_id
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int and 0 <= i < 2 ** 31 for i in ids):
        raise UserError(f"generation_config.json has the eos_token_id {ids}: write token ids there")
    return sorted({*ids} - {tokenizer.eos_token_id})


def saved_dtype(config):
    """The type of the initial policy's weights on disk: trained in float32, they are saved as they came."""
    return AutoConfig.from_pretrained(weights_path(config)).dtype or torch.float32


def fit_positions(model, tokenizer, path):
    """Lower tokenizer.model_max_length to the positions that the model has, and say so."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    first = getattr(getattr(getattr(model, "base_model", None), "embeddings", None), "padding_idx", None)
    if first is not None:                         # RoBERTa and its kind count positions from behind PAD's
        positions -= first + 1
    if positions < tokenizer.model_max_length:
        common.warn(f"{path} has {positions} positions: prompt and response share so many tokens, not "
                    f"{tokenizer.model_max_length}")
        tokenizer.model_max_length = positions


def load_reference(config, policy=None):
    """The initial policy, frozen: a model of its own; of a policy with an adapter the same network."""
    if config.lora_rank and policy is not None:
        return adapters.Reference(policy)
    path = policy_path(config)
    if adapters.settings_of(path):
        model = shards.load(config, lambda *place: adapters.load(path, 0, *place).requires_grad_(False))
    else:
        model = shards.load(config, lambda *place: common.load_reference(path, *place))
    return frozen(config, shared(config, model))


def frozen(config, model):
    """A model that is never trained, the weights of its linear layers in the type that passes compute in.

    Autocast would cast them in every pass. So the products are the same, and the weights take half the
    memory. Embeddings, norms and heads stay in float32; in shards all do, which must have one type.
    """
    for module in () if config.shard else model.base_model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            module.weight.data = module.weight.data.to(model.compute_dtype)
    return model


def load_base(config, policy=None):
    """The model before SFT: of tiny the untrained one, else --model. UserError for another vocabulary."""
    if config.model != "tiny":
        path = config.model
    else:
        from tasks import build
        path = build.models(config) / "base"
    base = shards.load(config, lambda *place: common.load_policy(path, *place))
    sizes = [model.get_input_embeddings().num_embeddings for model in (base, policy or base)]
    if sizes[0] != sizes[1]:
        raise UserError(f"--policy {config.policy} has {sizes[1]} embeddings, the base model {sizes[0]}: "
                        "give --start policy")
    return base


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
