"""The prompt once: rows that answer the same prompt share its computation (prefix sharing, 2410.20305).

    token       p  p  p  p | a  a  a | b  b | c  c  c  c  PAD       one prompt and its answers a, b, c
    position    0  1  2  3 | 4  5  6 | 4  5 | 4  5  6  7            restarts after the prompt
    sees        the prompt before it, and its own answer up to itself

common.read reads rows in this form with the models that `share_prompts` was called for and that keep their
states. Methods see the same log-probs [B, k] as without it; the gradients are the same too.
"""
from types import SimpleNamespace

import torch

import common

AT_ONCE = 8                # answers in a row: attention costs the square of a row's length
SHORTEST = 32              # tokens of the longest prompt of a batch; shorter ones are read as quickly again
FEWER = 0.8                # padded tokens, as a share of those of plain rows, at most
UNFIT = RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError       # of other families


def share_prompts(model):
    """Let common.read share prompts with this model, if its states [B, T, D] stay what they are."""
    own = SimpleNamespace(config=model.config)         # not the model: a circle would keep it in memory

    def share(rows):
        where = worthwhile(own, rows)
        return packed(own, rows, where) if where else None

    if same_states(model):
        model.share = share
    return model


@torch.no_grad()
def same_states(model):
    """Does the model take the mask and the positions? Its states of five short rows are compared."""
    if hasattr(model.config, "attention_layers"):      # GPT-Neo: local attention, by places and not positions
        return False
    words = [(token * 7 + 1) % model.get_input_embeddings().num_embeddings for token in range(24)]
    rows = [(words[:9], words[9:n]) for n in (11, 14, 12)] + [(words[3:8], words[n:]) for n in (20, 17)]
    rows = common.pack(rows, 0).compact().to(model.device)
    try:
        plain = model.base_model(input_ids=rows.input_ids, use_cache=False).last_hidden_state
        inputs, place = packed(model, rows)
        shared = model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[place]
    except torch.OutOfMemoryError:           # of one process, perhaps: the others would wait for it for ever
        raise
    except UNFIT:
        return False
    plain, shared = (states[rows.attention_mask.bool()] for states in (plain, shared))
    most = float(plain.abs().max())                                            # nan: broken weights
    return most < float("inf") and torch.allclose(plain, shared, rtol=1e-3, atol=1e-4 * most)


def worthwhile(model, rows):
    """layout(rows) if it is less work, else None; None beyond the window of a model that sees so far back."""
    text = model.config.get_text_config()
    window = min(getattr(text, name, None) or 10 ** 9 for name in ("sliding_window", "attention_chunk_size"))
    longest = int((rows.attention_mask.sum(1) - rows.lengths).max())
    if longest < SHORTEST or rows.input_ids.shape[1] > window:
        return None
    n, length, place = layout(rows)
    return (n, length, place) if n * length <= FEWER * rows.input_ids.numel() else None


def layout(rows):
    """Where each token stands when every prompt is written once.

    Args: rows, a compact Batch [B, T].
    Returns: number and length of the packed rows; place [B, T], the index of each token in them, flattened
        (of padding 0).
    """
    prompts = (rows.attention_mask.sum(1) - rows.lengths)[:, None]                             # tokens [B, 1]
    columns = torch.arange(rows.input_ids.shape[1], device=prompts.device)
    of_prompt = columns < prompts
    same = rows.input_ids.masked_fill(~of_prompt, -1).unique(dim=0, return_inverse=True)[1]
    ends, home, starts = [], [], []             # tokens of a packed row; row and first column of an answer
    latest = {}                                 # of a prompt: the row of its last answer, answers there
    for prompt, before, after in zip(same.tolist(), prompts[:, 0].tolist(), rows.lengths.tolist()):
        row, count = latest.get(prompt, (None, AT_ONCE))
        if count == AT_ONCE:
            row, count, ends = len(ends), 0, ends + [before]
        home, starts = home + [row], starts + [ends[row]]
        ends[row] += after
        latest[prompt] = row, count + 1
    home, starts = (torch.tensor(values, device=prompts.device)[:, None] for values in (home, starts))
    place = home * max(ends) + torch.where(of_prompt, columns, starts + columns - prompts)
    return len(ends), max(ends), place * rows.attention_mask


def packed(model, rows, where=None):
    """(inputs of the base model, place [B, T] of layout) of a compact Batch; where: layout(rows), if made."""
    n, length, place = where or layout(rows)
    inside = rows.attention_mask.bool()
    columns = torch.arange(rows.input_ids.shape[1], device=place.device).expand_as(place)
    answers = torch.arange(1, len(rows) + 1, device=place.device)[:, None]
    prompts = (rows.attention_mask.sum(1) - rows.lengths)[:, None]
    owners = torch.where(columns < prompts, 0, answers)

    def spread(values, padding):
        flat = values.new_full((n * length,), padding)
        flat[place[inside]] = values[inside]
        return flat.view(n, length)

    owners = spread(owners, -1)                       # 0: the prompt; 1 and up: an answer; -1: padding
    keys, queries = owners[:, None, None, :], owners[:, None, :, None]
    mask = (((keys == 0) | (keys == queries)) & (keys >= 0)).tril()                             # [n, 1, L, L]
    if model.config._attn_implementation != "sdpa":
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    ids, positions = spread(rows.input_ids, 0), spread(columns, 0)
    return dict(input_ids=ids, position_ids=positions, attention_mask=mask), place
