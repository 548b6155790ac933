"""--gradient_checkpointing: the same gradients from fewer activations, for all kinds of trained models."""
import pytest
import torch
import transformers

import common
from common import UserError
from conftest import settings, started
from harness import loading


def batch_for(model, tokenizer):
    return common.encode(tokenizer, ["abcdefgh " * 3, "hg"], ["ab cd", "efg abc"]).to(model.device)


def gradients_and_bytes(model, loss_of):
    """Gradients of a pass, and the bytes of activations that it kept for the backward pass."""
    kept = {}
    own = {weight.data_ptr() for weight in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of()
    loss.backward()
    return {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", ["policy", "scorer", "value"])
def test_checkpointing_changes_gradients_or_keeps_as_much(toy, tmp_path, kind, rank):
    if rank:
        pytest.importorskip("peft")
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        config = settings(toy, gradient_checkpointing=on, lora_rank=rank)
        tokenizer = loading.load_tokenizer(config)
        if kind == "policy":
            model, value = loading.load_policy(config), lambda m, b: common.sequence_logps(m, b).sum()
        elif kind == "scorer":
            model, value = loading.load_scorer(config), lambda m, b: common.sequence_scores(m, b).sum()
        else:
            run = started(toy, tmp_path / f"{on}", gradient_checkpointing=on, lora_rank=rank)
            model, value = run.load_value_model(), lambda m, b: common.token_values(m, b).sum()
            torch.nn.init.ones_(model.score.weight)
        for name, weight in model.named_parameters():          # with B = 0, LoRA's A has no gradient
            if "lora_B" in name:
                torch.nn.init.ones_(weight)
        batch = batch_for(model, tokenizer)
        found.append(gradients_and_bytes(model, lambda: value(model, batch)))
    (plain, much), (again, little) = found
    assert little < 0.7 * much, (little, much)
    assert plain.keys() == again.keys() and any(g.abs().max() > 0 for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_family_without_checkpointing_is_a_traceback(toy, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ValueError("it has none")

    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        monkeypatch.setattr(transformers.PreTrainedModel, name, refuse, raising=False)
    with pytest.raises(UserError, match="leave out --gradient_checkpointing"):
        loading.load_policy(settings(toy, gradient_checkpointing=True))
