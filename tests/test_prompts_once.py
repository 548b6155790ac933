"""harness/prompts_once.py: log-probs, scores and gradients equal those of plain rows; when it is used."""
import gc
import weakref

import pytest
import torch
import transformers

import common
import harness
from conftest import settings
from harness import loading, prompts_once
from harness.prompts_once import layout, packed, same_states, share_prompts, worthwhile

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=256)
GROUPED = SIZES | {"num_key_value_heads": 2}
FAMILIES = {"Llama": GROUPED, "Qwen2": GROUPED, "Mistral": GROUPED, "GPTNeoX": SIZES,
            "GPT2": dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256),
            "Gemma": GROUPED | {"head_dim": 8}, "Gemma2": GROUPED | {"head_dim": 8},
            "Phi": SIZES, "Qwen3": GROUPED | {"head_dim": 8}}
OTHERS = {"Bloom": dict(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
          "Mamba": dict(vocab_size=97, hidden_size=32, num_hidden_layers=2),
          # its local attention counts places in the row, not positions
          "GPTNeo": dict(vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, window_size=64,
                         attention_types=[[["global", "local"], 1]], max_position_embeddings=256)}


def model_of(family, sizes, kind="ForCausalLM", **more):
    """A random model of the family in float64, whose weights are large enough to matter."""
    torch.manual_seed(0)
    name = family + ("LMHeadModel" if (family, kind) == ("GPT2", "ForCausalLM") else kind)
    config = getattr(transformers, f"{family}Config")(**sizes, **more)
    model = getattr(transformers, name)(config).double().eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.compute_dtype = torch.float32
    return model


def batch_of(prompts, answers, seed=0):
    """A Batch of random tokens: prompts of these lengths, each with answers of these lengths."""
    rng = torch.Generator().manual_seed(seed)

    def words(n):
        return torch.randint(1, 97, (n,), generator=rng).tolist()

    return common.pack([(prompt, words(n)) for prompt in map(words, prompts) for n in answers], 0)


BATCH = batch_of((40, 50), (5, 9, 3, 12, 7, 6, 8, 4, 10, 11))


def values_and_gradients(model, batch, function=common.sequence_logps):
    model.zero_grad()
    values = function(model, batch)
    (values.flatten() * torch.linspace(-1, 1, values.numel(), dtype=values.dtype)).sum().backward()
    return values.detach(), {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}


def assert_same(plain, shared):
    torch.testing.assert_close(shared[0], plain[0], rtol=0, atol=1e-5)
    assert shared[1].keys() == plain[1].keys() and any(g.abs().max() > 1e-3 for g in plain[1].values())
    for name, gradient in plain[1].items():
        most = 1e-5 * float(gradient.abs().max())                  # RMSNorm computes in float32
        torch.testing.assert_close(shared[1][name], gradient, rtol=0, atol=most, msg=name)


@pytest.mark.parametrize("family, attention", [(family, attention) for family in FAMILIES
                                               for attention in ("sdpa", "eager")
                                               if (family, attention) != ("Gemma2", "sdpa")])
def test_shared_prompt_changes_log_probs_or_gradients(family, attention):
    model = model_of(family, FAMILIES[family], attn_implementation=attention)
    plain, read = values_and_gradients(model, BATCH), []
    share_prompts(model)
    share = model.share
    model.share = lambda rows: read.append(share(rows)) or read[-1]
    assert_same(plain, values_and_gradients(model, BATCH))
    if family != "Gemma2":                               # its soft caps need the whole logits: plain rows
        ids, = {inputs["input_ids"].shape for inputs, _ in read}
        assert ids == (4, 50 + 54) and BATCH.compact().input_ids.shape == (20, 62)         # 8 answers, and 2


@pytest.mark.parametrize("family", OTHERS)
def test_family_that_cannot_share_is_shared_or_fails(family):
    model = model_of(family, OTHERS[family])
    assert not same_states(model) and not hasattr(share_prompts(model), "share")


@pytest.mark.parametrize("broken", ["positions", "answers seen", "prompt unseen"])
def test_check_lets_other_states_pass(broken, monkeypatch):
    def wrong(model, rows):
        inputs, place = packed(model, rows)
        if broken == "positions":
            inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
        else:
            mask = inputs["attention_mask"]
            full = torch.ones_like(mask).tril()
            inputs["attention_mask"] = full if broken == "answers seen" else mask & full.triu(-3)
        return inputs, place

    model = model_of("Llama", GROUPED)
    assert same_states(model)
    monkeypatch.setattr(prompts_once, "packed", wrong)
    assert not same_states(model)


def test_broken_weights_stop_the_check():
    model = model_of("Llama", GROUPED)
    torch.nn.init.constant_(model.model.layers[0].mlp.up_proj.weight, float("nan"))
    assert same_states(model) is False


def test_scores_of_a_reward_model_change():
    model = model_of("Llama", GROUPED, "ForSequenceClassification", num_labels=2, pad_token_id=0)
    plain = values_and_gradients(model, BATCH, common.sequence_scores)
    assert hasattr(share_prompts(model), "share")
    assert_same(plain, values_and_gradients(model, BATCH, common.sequence_scores))


def test_layout_by_hand():
    """Prompts 1 2 (answers 5, 6 7, none) and 3 (answer 8), not in order."""
    rows = common.pack([([1, 2], [5]), ([3], [8]), ([1, 2], [6, 7]), ([1, 2], [])], 0).compact()
    n, length, place = layout(rows)
    assert (n, length) == (2, 5)
    assert place.tolist() == [[0, 1, 2, 0], [5, 6, 0, 0], [0, 1, 3, 4], [0, 1, 0, 0]]
    inputs, _ = packed(model_of("Llama", GROUPED), rows)
    assert inputs["input_ids"].tolist() == [[1, 2, 5, 6, 7], [3, 8, 0, 0, 0]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 2, 3], [0, 1, 0, 0, 0]]
    sees = inputs["attention_mask"][:, 0].int().tolist()
    assert sees[0] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    assert sees[1] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]] + 3 * [[1, 0, 0, 0, 0]]


def test_ninth_answer_lengthens_the_row():
    n, length, place = layout(batch_of((3,), (2,) * 17).compact())
    assert (n, length) == (3, 3 + 8 * 2) and place.max() == 2 * 19 + 3 + 1


@pytest.mark.parametrize("prompts, answers, window, used", [
    ((40,), (10, 10), None, True), ((31,), (10, 10), None, False), ((32,), (1, 1), None, True),
    ((40, 40), (10,), None, False),                      # no prompt occurs twice
    ((40,), (40, 40), None, True), ((32,), (50, 50), None, False),          # 120 of 160, 132 of 164 tokens
    ((40,), (10, 10), 50, True), ((40,), (10, 10), 49, False)])
def test_it_is_used_where_it_saves_little_or_beyond_the_window(prompts, answers, window, used):
    model = model_of("Mistral", GROUPED, sliding_window=window)
    assert (worthwhile(model, batch_of(prompts, answers).compact()) is not None) == used


def test_loaders_share_prompts_of_the_reviews_or_not_those_of_own_data(toy, tmp_path):
    own = settings(toy)
    models = loading.load_policy(own), loading.load_reference(own), loading.load_scorer(own)
    assert all(hasattr(model, "share") for model in models)
    model = loading.load_policy(settings(toy, model="tiny", policy=str(toy), data="reviews"))
    assert not hasattr(model, "share")


def test_training_with_shared_prompts_is_another(toy, tmp_path, monkeypatch):
    """Two steps of each method that compares answers; the prompts are made long enough."""
    monkeypatch.setattr(prompts_once, "SHORTEST", 1)
    monkeypatch.setattr(prompts_once, "FEWER", 10.0)
    import dpo
    weights, shared = [], []
    plain = prompts_once.packed
    for share in (True, False):
        config = settings(toy, dpo.Config, out=str(tmp_path / f"run{share}"), epochs=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(prompts_once, "packed", lambda *args: shared.append(1) or plain(*args))
            if not share:
                patch.setattr(loading, "share_prompts", lambda model: model)
            count = len(shared)
            harness.launch(dpo.train, config)
            assert (len(shared) > count) == share
        path = tmp_path / f"run{share}" / "model.safetensors"
        weights.append(common.load_policy(path.parent, "cpu").state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-4, msg=name)


def test_model_that_shares_prompts_stays_in_memory(toy):
    model = share_prompts(common.load_policy(toy, "cpu"))
    assert hasattr(model, "share")
    left = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("chunk, used", [(50, True), (49, False)])
def test_prompts_are_shared_beyond_a_chunk_of_attention(chunk, used):
    model = model_of("Llama", GROUPED)
    model.config.attention_chunk_size = chunk
    assert (worthwhile(model, batch_of((40,), (10, 10)).compact()) is not None) == used
