"""common.py: batches, log-probabilities, loading and sampling.

Letters are the bug classes that a test would catch. Models are random, of two layers and a
vocabulary of at most 40; most run in float64, so that tolerances can be tight.
"""
import copy
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoModelForCausalLM, BertConfig, BertForSequenceClassification, CohereConfig,
                          CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config,
                          GPT2ForSequenceClassification, GPT2ForTokenClassification, GPT2LMHeadModel,
                          LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification,
                          LlamaForTokenClassification, PreTrainedTokenizerFast)

import common
from common import UserError
from harness.checkpoints import inputs
from harness.rewards import EncoderReward
from conftest import cases, save_toy

CPU = dict(device="cpu", dtype="float32")


# -------------------------------------------------------------------------------------- tokenizers and models

def finish_tokenizer(core, bos, pad, max_length):
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", bos_token=bos, pad_token=pad,
                                   model_max_length=max_length)


def letters(alphabet="abcdefgh", bos=None, pad="<eos>", max_length=64):
    """One token a letter; EOS is 0 and, by default, PAD too. A BOS is put in front by a post-processor."""
    vocab = ["<eos>", *([bos] if bos else []), *([pad] if pad and pad != "<eos>" else []), *alphabet]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    return finish_tokenizer(core, bos, pad, max_length)


def llama_config(vocab=12, **kwargs):
    """Wide initial weights: with the usual 0.02 every distribution is nearly uniform and hides mistakes."""
    return LlamaConfig(**{**dict(vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                 num_attention_heads=2, max_position_embeddings=96, initializer_range=0.4,
                                 eos_token_id=0, pad_token_id=0, bos_token_id=None), **kwargs})


def gpt2_config(vocab=12, **kwargs):
    return GPT2Config(**{**dict(vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=96,
                                initializer_range=0.4, eos_token_id=0, bos_token_id=None, pad_token_id=0),
                         **kwargs})


def build(cls, config, seed=0):
    torch.manual_seed(seed)
    return cls(config).double().eval()


def llama(vocab=12, seed=0, **kwargs):
    return build(LlamaForCausalLM, llama_config(vocab, **kwargs), seed)


def gpt2(vocab=12, seed=0, **kwargs):
    return build(GPT2LMHeadModel, gpt2_config(vocab, **kwargs), seed)


def cohere(vocab=12, seed=0):
    """Its logits are a quarter of what its head makes."""
    return build(CohereForCausalLM, CohereConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        logit_scale=0.25, initializer_range=0.4, pad_token_id=0, eos_token_id=0, bos_token_id=None), seed)


both = pytest.mark.parametrize("make", [llama, gpt2])             # rotary and absolute positions


def unpadded_logps(model, ids, n_prompt, temperature=1.0):
    """The oracle: one row, no padding, no mask, a loop of cross-entropies."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0].double() / temperature
    return torch.stack([-F.cross_entropy(logits[t - 1], torch.tensor(ids[t]))
                        for t in range(n_prompt, len(ids))])


def of_response(batch, values):
    """Per-token values [B, T-1] -> one tensor of response tokens for each row."""
    return [row[mask.bool()] for row, mask in zip(values, batch.response_mask[:, 1:])]


def outcomes():
    """All that three sampling steps can give over EOS = 0 and the letters 1, 2, 3: 13 ended, 27 cut rows."""
    ended = [[*word, 0] for n in range(3) for word in itertools.product((1, 2, 3), repeat=n)]
    return ended + [list(word) for word in itertools.product((1, 2, 3), repeat=3)]


def outcome_batch(prompt=(1, 2)):
    return common.pack([(list(prompt), y) for y in outcomes()], 0)


# ------------------------------------------------------------------------------------------ log-probabilities

class Successor(torch.nn.Module):
    """Puts 0.9 on the successor of every token, without a look at anything else."""
    def __init__(self, vocab=5):
        super().__init__()
        successor = F.one_hot((torch.arange(vocab) + 1) % vocab, vocab).double()
        self.head = torch.nn.Linear(vocab, vocab, bias=False, dtype=torch.float64)
        self.head.weight.data = (successor * 0.9 + (1 - successor) * 0.1 / (vocab - 1)).log().T.contiguous()

    def base_model(self, input_ids, use_cache=False):
        hidden = F.one_hot(input_ids, self.head.in_features).double()
        return SimpleNamespace(last_hidden_state=hidden)

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.head(self.base_model(input_ids).last_hidden_state))

    def get_output_embeddings(self):
        return self.head

    def get_input_embeddings(self):
        return torch.nn.Embedding(self.head.in_features, 1)


def test_a_shift_off_by_one():                                                                             # A
    batch = common.pack([([0], [1, 2, 3]), ([0, 1, 2], [3])], 4)
    for row in of_response(batch, common.token_logps(Successor(), batch)):
        torch.testing.assert_close(row.exp(), torch.full_like(row, 0.9))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_cross_entropy_loop_agrees(temperature):                                                         # A
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 6, 7, dtype=torch.float64), torch.randint(7, (2, 6))
    for b, row in enumerate(common.gather_logps(logits, ids, temperature)):
        for t, value in enumerate(row):
            want = -F.cross_entropy(logits[b, t] / temperature, ids[b, t + 1]).item()
            assert value.item() == pytest.approx(want)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@both
def test_b_probabilities_of_all_responses_sum_to_one(make, temperature):                                   # B
    total = common.sequence_logps(make(4), outcome_batch(), temperature).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-9)


def test_gather_logps_small_cases_from_the_fixtures():
    # by hand: softmax of [1e4, 0, 0] is a point mass; [0, 0, -1e4] is even over two; a naive exp() overflows
    logits = torch.tensor([[[1e4, 0, 0]] * 4, [[0, 0, -1e4]] * 4], dtype=torch.float64)
    ids = torch.tensor([[2, 0, 0, 2], [1, 2, 1, 1]])
    half = math.log(0.5)
    want = torch.tensor([[0, 0, -1e4], [-1e4 + half, half, half]], dtype=torch.float64)
    torch.testing.assert_close(common.gather_logps(logits, ids), want, rtol=1e-12, atol=1e-12)
    three = torch.tensor([[[math.log(1), math.log(2), math.log(5)]] * 2], dtype=torch.float64)
    assert common.gather_logps(three, torch.tensor([[0, 2]])).exp().item() == pytest.approx(5 / 8)
    # at temperature 1/2 the odds are squared: 1, 4, 25
    assert common.gather_logps(three, torch.tensor([[0, 2]]), 0.5).exp().item() == pytest.approx(25 / 30)


def test_gather_logps_against_the_fixtures():
    for case in cases("sequence_logps"):
        given, want = case["inputs"], case["expected"]
        logps = common.gather_logps(torch.tensor(given["logits"], dtype=torch.float64),
                                    torch.tensor(given["input_ids"]), given["temperature"])
        sums = (logps * torch.tensor(given["response_mask"])[:, 1:]).sum(1)
        for got, name in ((logps, "token_logps"), (sums, "sequence_sum")):
            torch.testing.assert_close(got, torch.tensor(want[name], dtype=torch.float64), rtol=1e-9,
                                       atol=1e-9, msg=lambda text: f"{case['id']}: {text}")


def some_batch():
    return common.pack([([3, 4], [5, 6, 7, 0]), ([1, 2, 0, 5, 6], [2, 0]), ([7], [1]),
                        ([2, 2], [3, 3, 3, 3, 0])], 0)


@pytest.mark.parametrize("chunk", [None, 1, 3, 1000])
@pytest.mark.parametrize("make", [llama, gpt2, cohere])
def test_chunked_logps_equal_plain_ones_in_value_and_gradient(make, chunk):
    model, batch, weights = make(), some_batch(), torch.linspace(-1, 1, 9, dtype=torch.float64)
    grads = []

    def plain():                        # without padding on the left, which norms in float32 (Cohere's) round
        rows = batch.compact()
        logps = common.gather_logps(model(**inputs(model, rows)).logits, rows.input_ids, 0.7)
        return logps[rows.response_mask[:, 1:].bool()]

    def chunked():
        logps, where = common.token_logps(model, batch, 0.7, chunk), batch.response_mask[:, 1:].bool()
        assert (logps[~where] == 0).all()
        return logps[where]

    for logps in (chunked, plain):
        model.zero_grad()
        value = logps()
        (value * weights.repeat(2)[:len(value)]).sum().backward()
        grads.append((value.detach(), *(p.grad.clone() for p in model.parameters())))
    assert model.head_is_all == (make is not cohere)        # else this would compare the plain path to itself
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


class Largest(TorchDispatchMode):
    """The most elements that any new tensor had."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_full_logits_are_never_held():
    vocab, rows, length = 5000, 4, 32
    model = llama(vocab, hidden_size=8, intermediate_size=8)
    batch = common.pack([([1] * 8, [2] * (length - 8))] * rows, 0)
    largest, kept = {}, []
    for chunk in (8, 10 ** 6):
        kept.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t)
        with Largest() as meter, hooks:
            common.token_logps(model, batch, chunk=chunk).sum().backward()
        largest[chunk] = meter.numel
        assert sum(kept) < rows * length * vocab / 4               # nor kept in pieces for the backward pass
    assert largest[8] < rows * length * vocab / 4
    assert largest[10 ** 6] > rows * length * vocab / 4            # the meter does see such tensors


def gemma2():
    return build(Gemma2ForCausalLM, Gemma2Config(
        vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.4, pad_token_id=0,
        eos_token_id=0, bos_token_id=None, attn_implementation="eager"))


@pytest.mark.parametrize("make", [cohere, gemma2])
def test_logits_changed_after_the_head_fall_back_with_a_warning(make, capsys):
    model = make()
    ids = [3, 4, 5, 6, 0]
    got = common.token_logps(model, common.pack([(ids[:2], ids[2:])], 0))[0, 1:]
    torch.testing.assert_close(got, unpadded_logps(model, ids, 2))
    assert "warning" in capsys.readouterr().err
    common.token_logps(model, some_batch())
    assert not capsys.readouterr().err                             # once per model


@pytest.mark.parametrize("make", [llama, gpt2, cohere])
def test_a_states_are_of_other_tokens_or_rows_or_their_head_makes_other_logits(make):                      # A
    """Row by row: the first state of a row stands at its prompt's last token, and has not seen the answer."""
    model, rows = make(), [([3, 4], [5, 6, 7, 0]), ([1, 2, 0, 5, 6], [2, 0]), ([7], [1])]
    states, head = common.response_states(model, common.pack(rows, 0))
    want = [model(torch.tensor([x + y]), use_cache=False).logits[0, len(x) - 1:-1] for x, y in rows]
    assert len(states) == 4 + 2 + 1 and states.requires_grad
    torch.testing.assert_close(head(states), torch.cat(want))


# ----------------------------------------------------------------------------------------- pads, EOS, batches

def test_c_eos_is_lost_where_pad_is_eos():                                                                 # C
    tokenizer = letters()
    batch = common.encode(tokenizer, ["ab", "a<eos>b"], ["cd", "cdef"])
    assert batch.lengths.tolist() == [3, 5]                        # two and four letters, and EOS
    assert batch.attention_mask.sum(1).tolist() == [5, 8]          # the EOS inside the prompt is attended to
    logits = torch.randn(2, batch.input_ids.shape[1], 12, dtype=torch.float64, requires_grad=True)
    (common.gather_logps(logits, batch.input_ids) * batch.response_mask[:, 1:]).sum().backward()
    size, counted = logits.grad.abs().sum(-1)[:, :-1], batch.response_mask[:, 1:].bool()
    assert (size[counted] > 0).all() and (size[~counted] == 0).all()
    assert (batch.input_ids[:, 1:][counted] == 0).sum() == 2       # each row's EOS is among them


def test_c_logps_are_right_with_eos_in_the_prompt_and_pad_as_eos():                                        # C
    model, batch = llama(), common.encode(letters(), ["ab", "a<eos>b"], ["cd", "cdef"])
    ids = [[1, 2, 3, 4, 0], [1, 0, 2, 3, 4, 5, 6, 0]]
    for row, got, n_prompt in zip(ids, of_response(batch, common.token_logps(model, batch)), (2, 3)):
        torch.testing.assert_close(got, unpadded_logps(model, row, n_prompt))


def scorer(cls, config):
    return build(cls, config(num_labels=2))


def valuer(cls, config, labels=2):
    """(ValueModel with a head that is not 0, a token classifier of transformers with its base and head)."""
    classifier = build(cls, config(num_labels=labels)).float()
    classifier.base_model.compute_dtype = torch.float32
    model, head = common.ValueModel(classifier.base_model), getattr(classifier, "score", None)
    head = head or classifier.classifier
    model.score.load_state_dict({"weight": head.weight[:1].detach(), "bias": head.bias[:1].detach()})
    return model, classifier


MEASURES = {"token_logps": (common.token_logps, llama), "token_logps, GPT-2": (common.token_logps, gpt2),
            "sequence_logps": (common.sequence_logps, gpt2),
            "scores": (common.sequence_scores, lambda: scorer(LlamaForSequenceClassification, llama_config)),
            "scores, GPT-2": (common.sequence_scores,
                              lambda: scorer(GPT2ForSequenceClassification, gpt2_config)),
            "token_values": (common.token_values,
                             lambda: valuer(LlamaForTokenClassification, llama_config)[0]),
            "token_values, GPT-2": (common.token_values,
                                    lambda: valuer(GPT2ForTokenClassification, gpt2_config)[0])}


@pytest.mark.parametrize("name", MEASURES)
def test_d_value_depends_on_the_other_rows_or_on_pads(name):                                               # D
    function, make = MEASURES[name]
    model = make()
    one, shorter, longer = ([3, 4, 0], [5, 6, 0]), ([7], [0]), ([1, 2, 0, 5, 6, 7], [2, 2, 2, 2, 2, 0])

    def measure(batch, row=0):
        value = function(model, batch)
        of_tokens = function in (common.token_logps, common.token_values)
        return of_response(batch, value)[row] if of_tokens else value[row]

    alone = common.pack([one], 0)
    want = measure(alone)
    assert (want != 0).all()
    for rows, place in (([one, shorter], 0), ([one, longer], 0), ([longer, shorter, one], 2),
                        ([shorter, one, longer], 1)):
        torch.testing.assert_close(measure(common.pack(rows, 0), place), want, rtol=1e-6, atol=1e-6)
    for pads in ((7, 0), (0, 7)):
        padded = common.Batch(*(F.pad(t, pads) for t in alone.tensors()))
        torch.testing.assert_close(measure(padded), want, rtol=1e-6, atol=1e-6)


def test_d_rows_that_are_picked_come_apart_or_out_of_order():                                              # D
    model, batch = gpt2(), some_batch()
    want = common.sequence_logps(model, batch)
    for rows in ([3, 1], [0], [2, 2, 0]):
        picked = batch[rows].to("cpu")
        assert len(picked) == len(rows)
        torch.testing.assert_close(common.sequence_logps(model, picked), want[rows])


valuers = pytest.mark.parametrize("cls, config", [(LlamaForTokenClassification, llama_config),
                                                  (GPT2ForTokenClassification, gpt2_config)])


@valuers
def test_d_value_of_a_prompt_token_depends_on_the_other_rows_or_on_pads(cls, config):                      # D
    """Of prompt tokens too: every real token has the value that it has in a row by itself, without a mask."""
    model, classifier = valuer(cls, config)
    rows = [([3, 4], [5, 6, 0]), ([1, 0, 2, 7, 7], [3]), ([6], [7, 7, 7, 7, 0])]
    batch = common.pack(rows, 0)
    for padded in (batch, common.Batch(*(F.pad(t, (0, 5)) for t in batch.tensors()))):
        got = common.token_values(model, padded)
        assert got.shape == (3, padded.input_ids.shape[1] - 1)
        for (prompt, response), values, mask in zip(rows, got, padded.attention_mask):
            ids = prompt + response
            want = classifier(torch.tensor([ids]), use_cache=False).logits[0, :-1, 0].float()
            first = mask.argmax()
            torch.testing.assert_close(values[first:first + len(ids) - 1], want, rtol=1e-5, atol=1e-5)


@both
def test_e_left_padding_shifts_positions(make):                                                            # E
    model, tokenizer = make(), letters()
    prompts = ["a", "abcdefgh", "hgc"]
    for greedy in (True, False):
        torch.manual_seed(1)
        batch = common.generate(model, tokenizer, prompts, greedy=greedy, max_new_tokens=12)
        assert (batch.attention_mask[:, 0] == 0).any()          # some prompt was padded, or nothing is tested
        for prompt, got, row, mask in zip(prompts, of_response(batch, common.token_logps(model, batch)),
                                          batch.input_ids, batch.attention_mask):
            ids, n_prompt = row[mask.bool()].tolist(), len(prompt)
            torch.testing.assert_close(got, unpadded_logps(model, ids, n_prompt), rtol=1e-5, atol=1e-5)
            if greedy:                                             # generation itself saw the right positions
                best = model(torch.tensor([ids])).logits[0].argmax(-1)
                assert best[n_prompt - 1:-1].tolist() == ids[n_prompt:]


# ------------------------------------------------------------------------------------ parts, values of tokens

@pytest.mark.parametrize("rows, budget, sizes", [
    (7, 10, [2, 2, 2, 1]), (7, 14, [2, 2, 2, 1]), (6, 15, [3, 3]), (7, 35, [7]), (7, 34, [6, 1]),
    (3, 4, [1, 1, 1]), (3, 1, [1, 1, 1]), (1, 10 ** 6, [1])])
def test_split_loses_rows_or_exceeds_the_budget(rows, budget, sizes):
    batch = common.pack([([1, 2], [3, 4, 0])] * rows, 0)
    parts = batch.split(budget)
    assert [len(part) for part in parts] == sizes             # as full as the budget allows, one row at least
    assert torch.cat(parts).tolist() == list(range(rows))
    assert all(len(part) == 1 or batch[part].input_ids.numel() <= budget for part in parts)


@pytest.mark.parametrize("budget", [1, 12, 13, 25, 100])
def test_split_counts_padding_that_compact_removes_or_mixes_lengths(budget):
    rows = [([1] * before, [2] * after) for before, after in [(5, 1), (1, 2), (1, 5), (2, 1), (4, 4), (2, 2)]]
    batch = common.pack(rows, 0)
    parts = batch.split(budget)
    lengths = [len(before) + len(after) for before, after in rows]
    assert sorted(torch.cat(parts).tolist()) == [*range(6)]
    found = [[lengths[i] for i in part] for part in parts]
    assert sum(found, []) == [8, 6, 6, 4, 3, 3]
    assert all(len(part) == 1 or len(part) * part[0] <= budget for part in found)
    assert all((len(part) + 1) * part[0] > budget for part in found[:-1])            # as full as it may be
    assert [batch[part].compact().input_ids.shape for part in parts] == [(len(f), f[0]) for f in found]


def test_compact_loses_a_token_or_keeps_padding_on_the_left():
    rows = [([1, 2, 3], [4]), ([5], [6, 7, 8, 9]), ([1], [2])]
    batch = common.pack(rows, 0)
    compact = batch.compact()
    assert compact.input_ids.shape == (3, 5)
    for i, (before, after) in enumerate(rows):
        n = len(before + after)
        assert compact.input_ids[i, :n].tolist() == before + after
        assert compact.attention_mask[i].tolist() == [1] * n + [0] * (5 - n)
        assert compact.response_mask[i].tolist() == [0] * len(before) + [1] * len(after) + [0] * (5 - n)
    for a, b in zip(batch.tensors()[1:], compact.tensors()[1:]):
        assert (batch.input_ids[a.bool()] == compact.input_ids[b.bool()]).all()      # in the same order
    assert all((a == b).all() for a, b in zip(compact.tensors(), compact.compact().tensors()))


@pytest.mark.parametrize("budget", [1, 10, 20, 30, 10 ** 6])
def test_o_in_parts_loses_rows_or_their_order(budget):                                                     # O
    model, batch, sizes = gpt2(), some_batch(), []

    def spy(part):
        sizes.append(part.compact().input_ids.numel())
        return common.token_logps(model, part, 0.7)

    got = common.in_parts(spy, batch, budget, "cpu")
    want = common.token_logps(model, batch, 0.7)
    torch.testing.assert_close(got, want.detach())
    assert want.requires_grad and not got.requires_grad
    assert len(sizes) == 4 or max(sizes) <= budget           # rows of 7, 7, 6 and 2 tokens
    assert len(sizes) == {1: 4, 10: 4, 20: 2, 30: 1, 10 ** 6: 1}[budget]
    of_rows = common.in_parts(lambda part: common.sequence_logps(model, part, 0.7), batch, budget, "cpu")
    torch.testing.assert_close(of_rows, want.sum(1).detach())    # what has one number a row is joined as well


def test_in_parts_works_on_another_device_than_it_was_told(monkeypatch):
    asked = []
    monkeypatch.setattr(common.Batch, "to", lambda self, device: asked.append((len(self), device)) or self)
    common.in_parts(lambda part: part.lengths, some_batch(), 20, "somewhere")
    assert asked == [(2, "somewhere")] * 2


@valuers
def test_a_value_is_of_another_label_or_position_than_its_state(cls, config):                              # A
    model, classifier = valuer(cls, config, 3)
    batch = some_batch()
    got = common.token_values(model, batch)
    assert got.shape == (4, 9) and got.requires_grad and got.dtype == torch.float32
    known = (batch.attention_mask[:, :-1] & batch.attention_mask[:, 1:]).bool()     # a token is here and next
    want = classifier(**inputs(classifier, batch)).logits[:, :-1, 0]
    torch.testing.assert_close(got[known], want[known])
    assert (got[~known] == 0).all() and known[batch.response_mask[:, 1:].bool()].all()


@valuers
def test_a_value_sees_the_token_that_comes_next(cls, config):                                              # A
    """Entry t stands for what is known before token t + 1 is drawn; the token just drawn, t, must count."""
    model, _ = valuer(cls, config)
    ids = [3, 4, 5, 6, 7, 0]
    whole = common.token_values(model, common.pack([(ids[:2], ids[2:])], 0))[0]
    for t in range(1, len(ids)):
        other = [*ids[:t], 8, *ids[t + 1:]]
        changed = common.token_values(model, common.pack([(other[:2], other[2:])], 0))[0]
        torch.testing.assert_close(changed[:t], whole[:t])
        assert t == len(ids) - 1 or (changed[t:] - whole[t:]).abs().min() > 1e-4


@both
def test_fresh_value_model_does_not_start_at_zero_or_cannot_learn(make, tmp_path):
    make().save_pretrained(tmp_path)
    model, batch = common.load_value_model(tmp_path, **CPU), some_batch()
    values = common.token_values(model, batch)
    assert values.shape == (4, 9) and not values.any()
    values.sum().backward()
    assert model.score.weight.grad.abs().min() > 0                 # zero it is, but not for ever


def test_aa_values_are_left_in_bfloat16(tmp_path):                                                        # AA
    llama().save_pretrained(tmp_path)
    model = common.load_value_model(tmp_path, device="cpu", dtype="bfloat16")
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    got = common.token_values(model, some_batch())
    model.compute_dtype = torch.float32
    want = common.token_values(model, some_batch())
    assert got.dtype == torch.float32
    assert 0 < (got - want).abs().max() < 0.1                      # above 0: bfloat16 was really at work


# ----------------------------------------------------------------------------------------------- KL, sampling

def exact_kl(model, other, prompt=(1, 2)):
    """KL(model || other) over three steps, prefix by prefix from full softmaxes, no code of common.py."""
    def kl_from(prefix, steps):
        ids = torch.tensor([[*prompt, *prefix]])
        p, q = (m(ids, use_cache=False).logits[0, -1].log_softmax(-1) for m in (model, other))
        kl = (p.exp() * (p - q)).sum()
        if steps > 1:
            kl = kl + sum(p[v].exp() * kl_from([*prefix, v], steps - 1) for v in (1, 2, 3))
        return kl

    return kl_from([], 3)


def test_h_step_on_the_penalty_raises_kl():                                                                # H
    policy, reference, batch = llama(4, seed=1), llama(4, seed=2), outcome_batch()
    before = exact_kl(policy, reference).item()
    logps, ref_logps = common.sequence_logps(policy, batch), common.sequence_logps(reference, batch).detach()
    (logps.exp().detach() * (logps - ref_logps).detach() * logps).sum().backward()   # REINFORCE, all outcomes
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter -= 1e-3 * parameter.grad
    assert exact_kl(policy, reference).item() < before


def assert_same_distribution(counts, probabilities):
    """Pearson's chi-square at p = 1e-3; the quantile by Wilson and Hilferty. Rare outcomes share one bin."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    seen = [*counts[~rare].tolist(), counts[rare].sum().item()]
    due = [*expected[~rare].tolist(), expected[rare].sum().item()]
    pairs = [(s, d) for s, d in zip(seen, due) if s or d]
    freedom = len(pairs) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.0902 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert sum((s - d) ** 2 / d for s, d in pairs) < limit


@pytest.mark.parametrize("habit", [{}, {"top_k": 1}, {"repetition_penalty": 3.0, "do_sample": True},
                                   {"top_p": 0.5, "min_new_tokens": 2, "temperature": 0.3}])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_i_samples_follow_another_distribution_than_the_scorer(temperature, habit):                        # I
    model, tokenizer = llama(4, seed=1), letters("abc")
    for name, value in habit.items():                              # what many hub models carry along
        setattr(model.generation_config, name, value)
    torch.manual_seed(0)
    batch = common.generate(model, tokenizer, ["ab"], n=4000, temperature=temperature, max_new_tokens=3)
    places = {tuple(y): i for i, y in enumerate(outcomes())}
    counts = torch.zeros(len(places), dtype=torch.float64)
    for row, mask in zip(batch.input_ids, batch.response_mask):
        counts[places[tuple(row[mask.bool()].tolist())]] += 1
    probabilities = common.sequence_logps(model, outcome_batch(), temperature).exp().detach()
    assert_same_distribution(counts, probabilities)


@both
def test_n_generate_leaves_its_traces_on_the_model(make, monkeypatch):                                     # N
    model, tokenizer = make(), letters()
    model.config.use_cache = False
    model.generation_config.top_k = 7
    settings, config = model.generation_config, copy.deepcopy(model.config.to_dict())
    as_was = copy.deepcopy(settings.to_dict())
    for training in (True, False):
        model.train(training)
        common.generate(model, tokenizer, ["ab", "c"], max_new_tokens=3)
        monkeypatch.setattr(model, "generate", lambda **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            common.generate(model, tokenizer, ["ab", "c"], max_new_tokens=3)
        monkeypatch.undo()
        assert model.training is training and all(m.training is training for m in model.modules())
        assert model.generation_config is settings and settings.to_dict() == as_was
        assert model.config.to_dict() == config


def test_n_generation_runs_with_dropout():                                                                 # N
    model, tokenizer = gpt2(resid_pdrop=0.5, embd_pdrop=0.5).train(), letters()
    one, two = (common.generate(model, tokenizer, ["ab"] * 4, greedy=True, max_new_tokens=8)
                for _ in range(2))
    assert torch.equal(one.input_ids, two.input_ids) and (one.input_ids == one.input_ids[0]).all()


@both
def test_n_tokens_depend_on_the_split_or_the_order_is_lost(make):                                          # N
    model, tokenizer, prompts = make(), letters(), ["abcdef", "a", "hgc", "bb", "hgfedcba"]
    whole = common.generate(model, tokenizer, prompts, n=3, greedy=True, max_new_tokens=8)
    for budget in (1, 30, 60):
        part = common.generate(model, tokenizer, prompts, n=3, greedy=True, max_new_tokens=8, budget=budget)
        assert all(torch.equal(x, y) for x, y in zip(part.tensors(), whole.tensors()))
    inside = whole.attention_mask - whole.response_mask
    texts = [tokenizer.decode(row[mask.bool()]).replace(" ", "")
             for row, mask in zip(whole.input_ids, inside)]
    assert texts == [prompt for prompt in prompts for _ in range(3)]
    answers = common.decode(tokenizer, whole)
    assert len(set(answers)) > 1 and all(len(set(answers[i:i + 3])) == 1 for i in range(0, 15, 3))


def test_n_generate_exceeds_its_budget(monkeypatch):                                                       # N
    model, tokenizer, sizes = llama(), letters(), []
    plain = model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: sizes.append(
        kwargs["input_ids"].shape[0] * (kwargs["input_ids"].shape[1] + 4)) or plain(**kwargs))
    common.generate(model, tokenizer, ["a"] + ["abcdefgh" * 2] * 5, max_new_tokens=4, budget=40)
    assert max(sizes) <= 40                                        # two rows of 16 + 4


# ----------------------------------------------------------------------------------------------- tokenisation

def test_j_tokens_merge_across_the_boundary():                                                             # J
    vocab = {"<eos>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}
    tokenizer = finish_tokenizer(Tokenizer(models.BPE(vocab, [("a", "b")])), None, "<eos>", 64)
    assert tokenizer("cab").input_ids == [3, 4]                    # joined text would merge
    batch = common.encode(tokenizer, ["ca"] * 3, ["b", "bc", "cab"])
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask)]
    assert rows == [[3, 1, 2, 0], [3, 1, 2, 3, 0], [3, 1, 3, 4, 0]]
    assert [text.replace(" ", "") for text in common.decode(tokenizer, batch)] == ["b", "bc", "cab"]


def test_k_bos_is_doubled_or_before_the_response():                                                        # K
    tokenizer = letters(bos="<bos>")
    assert tokenizer("ab").input_ids == [1, 2, 3]                  # the habit is there
    # a chat template writes its BOS into the text
    batch = common.encode(tokenizer, ["ab", "<bos>ab"], ["c", "c"])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 0]] * 2
    assert batch.response_mask.tolist() == [[0, 0, 0, 1, 1]] * 2


def test_k_bos_is_invented_or_missing_bos_fails():                                                         # K
    tokenizer = letters()
    assert tokenizer.bos_token_id is None
    assert common.encode(tokenizer, ["ab"], ["c"]).input_ids.tolist() == [[1, 2, 3, 0]]
    tokenizer.bos_token = "h"                                  # a BOS that the tokenizer never adds by itself
    assert common.encode(tokenizer, ["ab"], ["c"]).input_ids.tolist() == [[1, 2, 3, 0]]


@pytest.mark.parametrize("prompt", ["abcdefgh", "<bos>abcdefgh"])
def test_k_bos_is_cut_from_a_long_prompt(prompt):                                                          # K
    tokenizer = letters(bos="<bos>", max_length=8)
    assert common.prompt_ids(tokenizer, [prompt]) == [[1, 5, 6, 7, 8, 9]]


def test_l_eos_is_doubled_or_survives_a_cut():                                                             # L
    tokenizer = letters(max_length=8)
    batch = common.encode(tokenizer, ["ab", "ab", "a<eos>", "ab"], ["cd", "cd<eos>", "c" * 20, "c" * 5])
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.response_mask)]
    assert rows == [[3, 4, 0], [3, 4, 0], [3] * 6, [3] * 5 + [0]]  # the third is cut, the fourth just fits
    assert common.finished(tokenizer, batch).tolist() == [True, True, False, True]


def test_l_long_prompt_leaves_no_room_for_a_response():                                                    # L
    tokenizer = letters(max_length=8)
    batch = common.encode(tokenizer, ["abcdefgh" * 3], ["abcd"])
    # the last six of the prompt, the first two of the answer
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 7, 8, 1, 2]]
    assert batch.lengths.tolist() == [2]


def test_l_decode_returns_prompt_eos_or_pads():                                                            # L
    tokenizer = letters(pad="<pad>")
    batch = common.encode(tokenizer, ["ab", "a"], ["c", "defg"])
    assert [text.replace(" ", "") for text in common.decode(tokenizer, batch)] == ["c", "defg"]


def test_l_decode_takes_spaces_away(tmp_path):                                                             # L
    tokenizer = common.load_tokenizer(save_toy(tmp_path, letters="ab .?"), 64)
    assert common.decode(tokenizer, common.encode(tokenizer, ["a"], ["a . b ?"])) == ["a . b ?"]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("budget", [1, 40, 90, 10 ** 6])
def test_batches_lose_rows_or_split_prompts(k, budget):
    tokenizer, generator = letters(), torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 9, (17, k + 1), generator=generator).tolist()
    prompts = ["a" * n for n, *_ in sizes]
    responses = [["abcdefgh"[i % 8] * n for n in rest] for i, (_, *rest) in enumerate(sizes)]
    seen = []
    for rows, batch in common.batches(tokenizer, prompts, responses, budget):
        seen += rows
        want = common.encode(tokenizer, [prompts[i] for i in rows for _ in range(k)],
                             sum((responses[i] for i in rows), []))
        assert all(torch.equal(x, y) for x, y in zip(batch.tensors(), want.tensors()))
    assert sorted(seen) == list(range(17))


def test_batches_exceed_the_budget_with_like_items():
    sizes = [batch.input_ids.numel() for _, batch in common.batches(letters(), ["aa"] * 9, [["b"]] * 9, 12)]
    assert sizes == [12, 12, 12]                                   # full, yet not over


def test_batches_exceed_the_budget_with_unlike_items():
    # both items have 13 tokens with EOS; side by side, prompts and responses are 10 + 11 wide, compact 13
    prompts, responses = ["a" * 10, "a" * 2, "a" * 3], [["b" * 2], ["b" * 10], ["b"]]
    for budget, together in ((26, [2, 1]), (25, [1, 1, 1]), (39, [3]), (38, [2, 1])):
        found = [(len(rows), batch.compact().input_ids.numel())
                 for rows, batch in common.batches(letters(), prompts, responses, budget)]
        assert sorted((n for n, _ in found), reverse=True) == together
        assert all(numel <= budget for _, numel in found)


def ragged(seed, n=17):
    """Prompts with one to four responses each, some of them cut off, some empty."""
    rng = random.Random(seed)
    texts = [["".join(rng.choices("abcdefgh", k=rng.randrange(9))) for _ in range(rng.randrange(1, 5))]
             for _ in range(n)]
    prompts = [f"{'abcdefgh'[i % 8]}{'h' * (i % 5)}" for i in range(n)]
    return prompts, texts, [[rng.random() < 0.5 for _ in row] for row in texts]


@pytest.mark.parametrize("budget", [1, 40, 150, 10**6])
def test_ragged_responses_are_lost_or_parted_or_exceed_the_budget(toy, budget):
    tokenizer = common.load_tokenizer(toy, 160)
    prompts, texts, ended = ragged(budget)
    seen, shapes = [], []
    for part, batch in common.batches(tokenizer, prompts, texts, budget, ended=ended):
        k, = {len(texts[i]) for i in part}                                 # one number of responses a batch
        assert len(batch) == len(part) * k and batch.lengths.view(len(part), -1).shape == (len(part), k)
        assert len(part) == 1 or batch.input_ids.numel() <= budget
        assert common.decode(tokenizer, batch) == [text for i in part for text in texts[i]]
        whole = [e or not t for i in part for t, e in zip(texts[i], ended[i])]
        assert common.finished(tokenizer, batch).tolist() == whole
        lead = batch.attention_mask - batch.response_mask
        assert [tokenizer.decode(row[mask.bool()]) for row, mask in zip(batch.input_ids, lead)] == [
            prompts[i] for i in part for _ in range(k)]
        seen += part
        shapes.append(k)
    assert sorted(seen) == list(range(len(prompts)))
    assert len(shapes) == len(prompts) if budget == 1 else budget < 10**6 or shapes == [1, 2, 3, 4]


def test_cut_off_response_is_taught_to_end_or_empty_one_has_no_token(toy):
    tokenizer = common.load_tokenizer(toy, 160)
    texts, ended = ["ab", "ab", "", "", "ab<eos>"], [True, False, True, False, False]
    batch = common.encode(tokenizer, ["c"] * 5, texts, ended)
    assert batch.lengths.tolist() == [3, 2, 1, 1, 3]
    assert common.finished(tokenizer, batch).tolist() == [True, False, True, True, True]
    assert common.encode(tokenizer, ["c"] * 5, texts).lengths.tolist() == [3, 3, 1, 1, 3]
    with pytest.raises(ValueError):
        common.encode(tokenizer, ["c", "c"], ["a", "b"], [True])


def test_p_batch_is_changed_in_place():                                                                    # P
    tokenizer, model, batch = letters(), llama(), some_batch()
    reward = scorer(LlamaForSequenceClassification, llama_config)
    before = [t.clone() for t in batch.tensors()]
    for function in (lambda: common.token_logps(model, batch).sum().backward(),
                     lambda: common.sequence_logps(model, batch, 0.7),
                     lambda: common.sequence_scores(reward, batch),
                     lambda: common.decode(tokenizer, batch), lambda: common.finished(tokenizer, batch),
                     lambda: common.response_states(model, batch), lambda: batch[[2, 0]],
                     lambda: (batch.lengths, batch.last)):
        function()
        assert all(torch.equal(x, y) for x, y in zip(batch.tensors(), before))


def test_p_gather_logps_changes_the_logits():                                                              # P
    logits, ids = torch.randn(1, 4, 5), torch.tensor([[1, 2, 3, 4]])
    before = logits.clone(), ids.clone()
    common.gather_logps(logits, ids, 0.5)
    assert torch.equal(logits, before[0]) and torch.equal(ids, before[1])


# ------------------------------------------------------------------------------------------ bfloat16, loading

def test_aa_bfloat16_logits_are_not_upcast():                                                             # AA
    torch.manual_seed(0)
    logits, ids = 5 * torch.randn(2, 6, 40).bfloat16(), torch.randint(40, (2, 6))
    got = common.gather_logps(logits, ids)
    assert got.dtype == torch.float32
    assert torch.equal(got, common.gather_logps(logits.float(), ids))


def test_aa_bfloat16_drifts_or_differs_between_policy_and_reference(tmp_path):                            # AA
    llama(40, initializer_range=0.15).save_pretrained(tmp_path)
    exact, policy, reference = (common.load(AutoModelForCausalLM, tmp_path, "cpu", dtype)
                                for dtype in ("float32", "bfloat16", "bfloat16"))
    batch = common.pack([([3, 4, 5], [6, 7, 8, 9, 0]), ([30], [31, 32, 0])], 0)
    want, got, again = (common.token_logps(model, batch) for model in (exact, policy, reference))
    assert got.dtype == torch.float32 and all(p.dtype == torch.float32 for p in policy.parameters())
    assert torch.equal(got, again)
    assert 0 < (got - want).abs().max() < 0.02                     # above 0: bfloat16 was really at work


@pytest.mark.parametrize("make, dropout", [(llama, {"attention_dropout": 0.5}),
                                           (gpt2, dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))])
def test_f_dropout_stays_on_after_load(make, dropout, tmp_path):                                           # F
    make(**dropout).save_pretrained(tmp_path)
    batch = some_batch()
    raw = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    # else nothing is tested
    assert not torch.equal(common.token_logps(raw, batch), common.token_logps(raw, batch))
    model = common.load(AutoModelForCausalLM, tmp_path, **CPU)
    assert not model.training
    model.train()
    assert torch.equal(common.token_logps(model, batch), common.token_logps(model, batch))
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_f_dropout_that_a_class_hard_codes_stays_on(tmp_path):                                             # F
    class Dropping(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.norm = torch.nn.Sequential(self.model.norm, torch.nn.Dropout(0.5))

    Dropping(llama().config).save_pretrained(tmp_path)
    model, batch = common.load(Dropping, tmp_path, **CPU).train(), some_batch()
    assert torch.equal(common.token_logps(model, batch), common.token_logps(model, batch))


@both
def test_f_value_model_drops_out_or_starts_off_zero(make, tmp_path):                                       # F
    make().save_pretrained(tmp_path)
    model, batch = common.load_value_model(tmp_path, **CPU).train(), some_batch()
    assert not common.token_values(model, batch).any()
    torch.nn.init.normal_(model.score.weight)                      # zeros would hide a dropout
    assert common.token_values(model, batch).any()
    assert torch.equal(common.token_values(model, batch), common.token_values(model, batch))
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_reference_is_trainable_or_is_the_policy(tmp_path):                                            # F, AJ
    llama().save_pretrained(tmp_path)
    policy, reference = common.load_policy(tmp_path, **CPU), common.load_reference(tmp_path, **CPU)
    for p, q in zip(policy.parameters(), reference.parameters()):
        assert p.requires_grad and not q.requires_grad and p.data_ptr() != q.data_ptr() and torch.equal(p, q)


def test_missing_or_empty_directory_is_a_stack_trace(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match="cannot load a model from .*pass a directory of save_pretrained"):
            common.load(AutoModelForCausalLM, path, **CPU)
        with pytest.raises(UserError, match="cannot load a tokenizer from .*pass a directory"):
            common.load_tokenizer(path, 64)


def test_tokenizer_without_pad_or_eos(tmp_path):
    letters(pad=None).save_pretrained(tmp_path / "no_pad")
    tokenizer = common.load_tokenizer(tmp_path / "no_pad", 64)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0 and tokenizer.model_max_length == 64
    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(UserError, match="EOS"):
        common.load_tokenizer(tmp_path / "no_eos", 64)


# ---------------------------------------------------------------------------------------------- reward models

@pytest.mark.parametrize("cls, config", [(LlamaForSequenceClassification, llama_config),
                                         (GPT2ForSequenceClassification, gpt2_config)])
def test_ai_score_is_read_at_the_wrong_token(cls, config):                                                # AI
    model = scorer(cls, config)
    rows = [([3, 4], [5, 6, 0]), ([1, 0, 2, 7], [3, 0]), ([6], [7, 7])]         # EOS in a prompt; one cut off
    # the row without EOS must have pads: after an EOS, a PAD that is EOS has the very same hidden state
    got = common.sequence_scores(model, common.pack(rows, 0))
    for (prompt, response), score in zip(rows, got):
        hidden = model.base_model(torch.tensor([prompt + response]), use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(score, model.score(hidden).float())
    # PAD is EOS: misses the EOS
    own = model(torch.tensor([rows[0][0] + rows[0][1]]), use_cache=False).logits[0]
    assert (got[0] - own).abs().max() > 1e-3


def reward_directory(path, labels, bos=None):
    config = llama_config(num_labels=len(labels), id2label=dict(enumerate(labels)),
                          label2id={name: i for i, name in enumerate(labels)})
    build(LlamaForSequenceClassification, config).save_pretrained(path)
    letters(bos=bos).save_pretrained(path)
    return path


def test_label_of_a_reward_model_is_guessed_or_wrong(tmp_path):
    labels = ["Helpful", "Honest", "Short"]
    path = reward_directory(tmp_path, labels)
    with pytest.raises(UserError) as error:
        common.load_reward_model(path, 64, **CPU)
    assert all(name in str(error.value) for name in ["--reward_label", *labels])
    prompts, responses = ["abc", "a", "gh"], ["d", "efgh", ""]
    for i, name in enumerate(labels):
        reward = common.load_reward_model(path, 64, **CPU, label=name.lower(), budget=256)
        want = common.sequence_scores(reward.model, common.encode(reward.tokenizer, prompts, responses))[:, i]
        torch.testing.assert_close(reward(prompts, responses), want.detach(), rtol=1e-4, atol=1e-5)
        reward.mean, reward.std = 2.0, 4.0
        torch.testing.assert_close(reward(prompts, responses), (want.detach() - 2) / 4, rtol=1e-4, atol=1e-5)


def test_reward_model_counts_pads_or_forgets_what_it_read(tmp_path):
    for name, bos in (("plain", None), ("bos", "<bos>")):
        reward = common.load_reward_model(reward_directory(tmp_path / name, ["score"], bos), 64, **CPU)
        assert reward.tokens == 0
        reward(["abc", "a"], ["d", "efgh"])
        read = 3 + 1 + 1 + 4 + 2 + 2 * bool(bos)            # prompts, responses, two EOS; BOS if there is one
        assert reward.tokens == read and type(reward.tokens) is int
        reward.budget = 1                                                            # one row at a time
        reward(["abc", "a", "a"], ["d", "efgh", ""])
        assert reward.tokens == 2 * read + 2 + bool(bos)


def test_reward_model_returns_scores_in_the_order_of_length(tmp_path):
    reward = common.load_reward_model(reward_directory(tmp_path, ["score"]), 64, **CPU)
    reward.budget = 20                                             # several batches, sorted by length inside
    prompts, responses = ["abcdefgh", "a", "hgc", "bbbbb"], ["c", "abcdefgh", "", "dd"]
    alone = [reward([p], [r]).item() for p, r in zip(prompts, responses)]
    assert reward(prompts, responses).tolist() == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == 4


def test_d_encoder_score_is_that_of_the_text_alone():                                                  # D, AI
    config = BertConfig(vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=16, initializer_range=0.4, num_labels=1)
    model = build(BertForSequenceClassification, config)
    reward = EncoderReward(model, letters())               # an encoder gets its tokenizer's own right padding
    alone, beside = reward(["ab"], ["c"]), reward(["ab", "abcdefgh"], ["c", "d"])
    assert beside[0].item() == pytest.approx(alone[0].item(), abs=1e-5) and abs(beside[1] - beside[0]) > 1e-3


# ---------------------------------------------------------------------------------------------------- devices

def test_auto_is_bfloat16_on_a_cpu(tmp_path):
    llama().save_pretrained(tmp_path)
    for dtype, expected in (("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        model = common.load_policy(tmp_path, "cpu", dtype)
        assert model.compute_dtype == getattr(torch, expected) and model.dtype == torch.float32


@pytest.mark.parametrize("there, best", [(("cuda", "mps"), "cuda"), (("mps",), "mps"), ((), "cpu")])
def test_auto_takes_a_slower_device_or_a_name_is_not_what_it_says(monkeypatch, there, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    assert common.pick_device("auto").type == best
    for name in ("cuda", "mps", "cpu"):
        if name in (*there, "cpu"):
            assert common.pick_device(name).type == name
        else:
            with pytest.raises(UserError, match=f"--device {name}: there is none on this machine"):
                common.pick_device(name)


# --------------------------------------------------------------------------------------- optimizer, schedule

def test_optimizer_has_other_settings_than_all_scripts_share():
    optimizer, _ = common.adamw(llama(), 0.1, 10)
    group, = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW
    assert group["betas"] == (0.9, 0.95) and group["weight_decay"] == 0
    assert len(group["params"]) == len([*llama().parameters()])


@pytest.mark.parametrize("schedule, warmup, want", [
    ("constant_with_warmup", 0.25, [0, 0.5, 1, 1, 1, 1, 1, 1, 1]), ("constant_with_warmup", 0.0, [1] * 9),
    ("linear", 0.25, [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
    ("cosine", 0.0, [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(9)])])
def test_learning_rate_follows_another_schedule_or_warmup_is_not_a_share_of_the_steps(schedule, warmup, want):
    rates = rates_of(*common.adamw(llama(), 0.1, 8, schedule, warmup), len(want))
    assert rates == pytest.approx([0.1 * rate for rate in want], abs=1e-12)


def rates_of(optimizer, schedule, n):
    """The learning rates of n steps."""
    rates = []
    for _ in range(n):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


CYCLES = {"linear": ([0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], [0, 1, 2 / 3, 1 / 3]),
          "constant_with_warmup": ([0, 0.5, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1])}           # of 8 and of 4 steps


@pytest.mark.parametrize("schedule", CYCLES)
@pytest.mark.parametrize("steps", [[8], [8, 4], [4, 8, 4], [0, 8], [8, 0, 4], [4, 4, 0]])
def test_second_round_goes_on_with_the_first_ones_schedule_or_warms_up_over_another_number_of_steps(
        schedule, steps, recwarn):
    want = {8: CYCLES[schedule][0], 4: CYCLES[schedule][1], 0: []}
    made = common.adamw(llama(), 0.1, steps, schedule, 0.25)
    rates = rates_of(*made, sum(steps))
    assert rates == pytest.approx([0.1 * rate for n in steps for rate in want[n]], abs=1e-12)
    assert not [str(w.message) for w in recwarn if "lr_scheduler" in str(w.message)]
    # one number and a list of it are the same
    assert len(steps) > 1 or rates == rates_of(*common.adamw(llama(), 0.1, steps[0], schedule, 0.25), 8)


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 11])
def test_AF_schedule_of_two_rounds_starts_anew_at_resume(cut, tmp_path):
    straight = rates_of(*common.adamw(llama(), 0.1, [8, 4], "cosine", 0.25), 12)
    first = common.adamw(llama(), 0.1, [8, 4], "cosine", 0.25)
    assert rates_of(*first, cut) == straight[:cut]
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    again = common.adamw(llama(), 0.1, [8, 4], "cosine", 0.25)
    for part, state in zip(again, torch.load(tmp_path / "state.pt", weights_only=True)):
        part.load_state_dict(state)
    assert rates_of(*again, 12 - cut) == straight[cut:]
    assert straight[8] == 0 < straight[7]


@pytest.mark.parametrize("steps", [0, [0], [0, 0]])
def test_no_step_at_all_makes_no_optimizer(steps):
    optimizer, schedule = common.adamw(llama(), 0.1, steps, "cosine", 0.1)                       # --epochs 0
    assert schedule.get_last_lr() == [0.1] and optimizer.state_dict()["state"] == {}


def test_soft_cap_that_small_logits_hide_is_left_out():
    model = gemma2()
    model.config.final_logit_softcapping = 1e4                   # the probe's logits change by less than 1e-6
    assert not common.head_is_all(model, some_batch())


def test_k_bos_of_a_chat_template_is_cut_from_a_long_prompt():
    tokenizer = letters(max_length=8)
    tokenizer.bos_token = "h"                                # written by the template, not by the tokenizer
    assert common.prompt_ids(tokenizer, ["habcdefgabc"]) == [[8, 6, 7, 1, 2, 3]]


def test_aa_samples_are_drawn_in_another_number_format_than_scored(tmp_path):
    llama().save_pretrained(tmp_path)
    model, seen = common.load_policy(tmp_path, "cpu", "bfloat16"), []
    plain = model.generate
    model.generate = lambda **inputs: seen.append(torch.is_autocast_enabled("cpu")) or plain(**inputs)
    common.generate(model, letters(), ["ab"], max_new_tokens=2)
    assert seen == [True]
