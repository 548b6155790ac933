"""LoRA, by the peft library: --lora_rank (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

Beside every linear layer W, the LM head excepted, stands an adapter of rank r: W x + (alpha / r) B A x with
alpha = 2 r. Only A and B are trained; B starts at 0, so that training starts from the model as it is. A saved
run holds the adapter alone, and names the model that it belongs to.
"""
import json
import warnings
from pathlib import Path

import torch

import common
from common import UserError

TRAINED, START = "default", "start"       # adapters of a policy: what is trained; what it began from, if any


def library():
    try:
        import peft
    except ImportError:
        raise UserError("LoRA needs the peft library: pip install peft") from None
    return peft


def settings_of(path):
    """adapter_config.json of a directory that holds an adapter only; None of any other directory or id."""
    file = Path(path) / "adapter_config.json"
    if not file.exists():
        return None
    with common.readable("an adapter", path):
        settings = json.loads(file.read_text(encoding="utf-8"))
        base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
        if not base or not isinstance(base, str):
            raise ValueError("adapter_config.json names no base model")
        if (Path(base) / "adapter_config.json").exists():
            raise ValueError(f"its base model {base} is an adapter itself: merge that first")
        return settings


def base_path(path):
    """Where the whole weights are: of an adapter, its base model's directory or id; else the path itself."""
    settings = settings_of(path)
    return settings["base_model_name_or_path"] if settings else path


def add(model, rank, kind=None):
    """Freeze the model and put a new adapter into it. kind "SEQ_CLS": a new head is trained too."""
    peft = library()
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=kind)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)                   # of peft's about transformers
            keep(model, peft.get_peft_model(model, settings, TRAINED))
    except (ValueError, RuntimeError) as error:            # Mamba's layers, for one; a rank without end
        if "memory" in str(error):
            raise
        raise UserError(f"no LoRA of rank {rank} for {type(model).__name__} ({error}): lower --lora_rank, or "
                        "leave it out") from None


def change_frozen(model, dtype):
    """Change the type of the frozen weights beside adapters to the one that passes compute in.

    Autocast keeps no cast of a weight without gradient: it would cast all of them at every sampled token. The
    products are the same, and these weights take half the memory. Norms, embeddings, LM head are left alone.
    Passes without autocast, as checks make them, have to come before.
    """
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.to(dtype)


def keep(model, handle):
    """Remember peft's handle of the model, not as a part of it: the handle contains the model."""
    model.__dict__["adapter"] = handle


def load(path, rank, device, dtype):
    """A policy from a saved adapter: to be trained on, where `rank` is its own; with rank 0 merged."""
    peft, base, own = library(), base_path(path), settings_of(path).get("r")
    if not own:
        raise UserError(f"{path} is an adapter, but not LoRA: merge it first (peft's merge_and_unload)")
    if rank and rank != own:
        raise UserError(f"{path} is an adapter of rank {own}: give --lora_rank {own} to train it on, or no "
                        "--lora_rank to merge it into its model and train that")
    policy = common.load_policy(base, device, dtype)
    with common.readable("an adapter", path), warnings.catch_warnings():
        warnings.simplefilter("ignore")                                      # what is lost is said below
        handle = peft.PeftModel.from_pretrained(policy, path, START)         # frozen: the reference
        own = peft.get_peft_model_state_dict(handle, adapter_name=START, save_embedding_layers=False).keys()
        other = [name for name in own ^ peft.load_peft_weights(path, "cpu").keys() if "lora_" in name]
        if other:
            raise ValueError(f"{len(other)} weights are not those of its adapter_config.json: {min(other)}")
        if rank:
            handle.load_adapter(path, TRAINED, is_trainable=True)
            handle.set_adapter(TRAINED)
    keep(policy, handle)
    return policy if rank else merge(policy)


def trained_weights(model):
    """A copy of the weights that are trained, {name: tensor}: all, or those of the adapter."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()
            if weight.requires_grad}


def merge(model):
    """Add the active adapter to the weights, in float32, and take it out of the model, which is returned."""
    change_frozen(model, torch.float32)
    return model.__dict__.pop("adapter").merge_and_unload().requires_grad_(True)


def save(model, path):
    """adapter_config.json, which names the base model, and the adapter's weights."""
    model.adapter.save_pretrained(path, selected_adapters=[TRAINED])
    (Path(path) / "README.md").unlink(missing_ok=True)                # an empty form


class Reference:
    """A policy as it was before training: the same network, its adapter off or put back. No second copy."""

    def __init__(self, policy):
        self.policy = policy

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def __call__(self, **inputs):
        return self.as_before(self.policy, inputs)

    def base_model(self, **inputs):
        return self.as_before(self.policy.base_model, inputs)

    def as_before(self, network, inputs):
        handle = self.policy.adapter
        if START not in handle.peft_config:
            with handle.disable_adapter():
                return network(**inputs)
        handle.set_adapter(START)
        try:
            return network(**inputs)
        finally:
            handle.set_adapter(TRAINED)
