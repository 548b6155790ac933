"""What is wrong with a checkpoint, found before anything is trained: its files, its kind, how it masks."""
import inspect
import json
import tempfile
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

import common
from common import UserError
from harness.adapters import settings_of
from tasks import hub, reviews

POINTER = b"version https://git-lfs"


def check_weights(file):
    """UserError for a file of weights that is a git-lfs pointer, or only a part of itself."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(len(POINTER))
        if head == POINTER:
            raise UserError(f"{file} is a git-lfs pointer of {size} bytes, not the weights: git lfs pull")
        if file.suffix != ".safetensors":
            return
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")                   # of the header, a JSON text
        if size < 8 + length:
            raise UserError(f"{file} is cut off: {size} bytes; download it again")
        try:
            entries = json.loads(stream.read(length))
            whole = 8 + length + max((entry["data_offsets"][1] for name, entry in entries.items()
                                      if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file} is no safetensors file: download it again") from None
    if size < whole:
        raise UserError(f"{file} is cut off: {size} of {whole} bytes; download it again")


def check_checkpoint(path, policy=True):
    """UserError, with what to do, for a directory or id whose model cannot be used here.

    policy: an encoder-decoder or an encoder is refused too, and an adapter is not.
    """
    folder = Path(path)
    if not folder.exists() and (str(path).startswith((".", "/", "~")) or str(path).count("/") > 1):
        raise UserError(f"there is no directory {path}")
    if not folder.exists():
        hub.check_hub(str(path))
    adapter = settings_of(path)
    if adapter and policy:
        for file in folder.glob("adapter_model.*"):
            check_weights(file)
        return check_checkpoint(adapter["base_model_name_or_path"])
    if adapter:
        raise UserError(f"{path} is an adapter, not a whole model: merge it first (peft's merge_and_unload)")
    with common.readable("a model", path):
        settings, _ = PreTrainedConfig.get_config_dict(path)
        if not settings or not isinstance(settings, dict):
            raise ValueError("it has no config.json of a model")
        index = folder / "model.safetensors.index.json"
        index = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {"weight_map": {}}
        shards = sorted({*map(str, index["weight_map"].values())})
    quantised = settings.get("quantization_config")
    if quantised:
        how = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(f"{path} is a quantised checkpoint ({how}): it cannot be trained here; take the "
                        "full-precision one")
    if "auto_map" in settings and settings.get("model_type") not in CONFIG_MAPPING:
        raise UserError(f"{path} needs Python code of its own, which is never run: take a model of a class "
                        "that transformers has")
    with common.readable("a model", path):
        AutoConfig.from_pretrained(path, trust_remote_code=False)
    if policy and settings.get("is_encoder_decoder"):
        raise UserError(f"{path} is an encoder-decoder ({settings.get('model_type')}): these methods train "
                        "decoders (causal language models)")
    if folder.is_dir():
        lost = [shard for shard in shards if not (folder / shard).exists()]
        if lost:
            raise UserError(f"{path} lacks {len(lost)} of its {len(shards)} files of weights: {lost[0]}")
        for file in [*folder.glob("[!.]*.safetensors"), *folder.glob("[!.]*.bin")]:
            check_weights(file)


def inputs(model, batch):
    """What a forward pass over a padded batch takes; a few families (BLOOM) count positions themselves."""
    everything = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
                      position_ids=(batch.attention_mask.cumsum(1) - 1).clamp(min=0))
    return {k: v for k, v in everything.items() if k in inspect.signature(model.forward).parameters}


def check_tokenizer(tokenizer, path):
    """UserError for a directory without the tokenizer's files: transformers makes an empty one then."""
    if len(tokenizer) <= len({*tokenizer.all_special_tokens}):
        raise UserError(f"{path} has no tokenizer: save its files there too (tokenizer.save_pretrained)")


def check_words(tokenizer, path):
    """UserError for a policy that does not know the words of the embedded task."""
    unknown = {*reviews.VOCABULARY} - {*tokenizer.get_vocab()}
    if unknown:
        raise UserError(f"--policy {path} does not know {len(unknown)} words of the film reviews: give "
                        "--data, and --model in place of --policy")


def check_saves(policy, path):
    """UserError for a policy that cannot be saved as it came: said before it is trained."""
    if not getattr(policy.saved_dtype, "is_floating_point", False):
        raise UserError(f"{path}: config.json has the dtype {policy.saved_dtype}: write float32 there")
    with tempfile.TemporaryDirectory() as folder, common.readable("a config that can be saved", path):
        policy.config.save_pretrained(folder)
        policy.generation_config.save_pretrained(folder)


def fit_reward_tokens(tokenizer, model, path):
    """A PAD that the reward model has no embedding of is replaced; UserError for other such tokens."""
    known = model.get_input_embeddings().num_embeddings
    if (tokenizer.pad_token_id or 0) >= known:                          # harmless: masks come from lengths
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    beyond = [token for token, number in tokenizer.get_added_vocab().items() if number >= known]
    special = {getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "cls", "sep")}
    if special & {*beyond}:
        raise UserError(f"the tokenizer of {path} has {sorted(special & {*beyond})[0]!r} as a token that the "
                        "model has no embedding of: they do not belong together")


@torch.no_grad()
def check_model(model, tokenizer, prompt, path):
    """UserError for a policy whose log-probs depend on padding or on later tokens; probed on one prompt."""
    known = model.get_input_embeddings().num_embeddings
    for name in ("bos", "eos", "pad"):
        token = getattr(tokenizer, f"{name}_token_id") or 0
        if token >= known:
            raise UserError(f"the tokenizer of {path} has {name.upper()} as token {token}, the model only "
                            f"{known} embeddings: they do not belong together")
    ids = (common.prompt_ids(tokenizer, [prompt])[0] * 12)[:12]
    changed = ids[:-1] + [(ids[-1] + 1) % known]
    pad, rows = tokenizer.pad_token_id, [(ids[:6], ids[6:]), (ids[:6], changed[6:])]
    padded = common.pack([rows[0], ([pad] * 5 + ids, ids)], pad)[:1].to(model.device)      # PAD on both sides
    dtype, model.compute_dtype = model.compute_dtype, torch.float32
    alone, other = (common.token_logps(model, common.pack([row], pad).to(model.device))[0, -6:]
                    for row in rows)
    model.compute_dtype = dtype
    logits = model(**inputs(model, padded)).logits                     # as in sampling, with PAD on the left
    beside = common.gather_logps(logits, padded.input_ids)[padded.response_mask[:, 1:].bool()]
    if not torch.allclose(alone, beside, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise UserError(f"{path} ({type(model).__name__}) ignores the attention mask: log-probs change by "
                        f"{(alone - beside).abs().max():.2g} nats with the padding of their batch, so it "
                        "cannot be trained here")
    if not torch.allclose(alone[:-1], other[:-1], rtol=1e-3, atol=1e-3, equal_nan=True):
        raise UserError(f"{path} ({type(model).__name__}) sees later tokens: it is no causal language model")
