"""The language model's side of every method: batches, loading, log-probabilities, sampling, the optimizer.

Every batch has this form, on which a method may rely:

    input_ids       PAD PAD  w   w   w   w  |  y   y   y  EOS PAD    prompt left-padded, response right-padded
    attention_mask   0   0   1   1   1   1  |  1   1   1   1   0
    response_mask    0   0   0   0   0   0  |  1   1   1   1   0      1 = trained and counted, EOS included
    token_logps      0   0   0   0   0   *  |  *   *   *   0          entry t is log p(input_ids[t + 1])

Masks come from lengths, never from `ids != pad`, because PAD is EOS in many tokenizers. For log-probs, values
and scores, rows are read from column 0 on (compact), so positions are right. Prompt and response are
tokenised apart: a prompt has the same ids before every response. Log-probs are in nats, float32 at least.
"""
import contextlib
import sys
from dataclasses import dataclass

import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

transformers.logging.set_verbosity_error()                # no load reports for the new head of a reward model
transformers.logging.disable_progress_bar()
BROKEN = Exception                     # other libraries raise anything at a broken file, tokenizers just this
FEW_LOGITS, ROOM = 2 ** 22, {"cpu": 2 ** 14, "cuda": 2 ** 16, "mps": 2 ** 14}  # see token_logps, generate
CONTROL = {i: f"\\x{i:02x}" for i in (*range(9), *range(11, 32), *range(127, 160))}   # harmless on a terminal


class UserError(ValueError):
    """A mistake that the user can mend. The scripts print it as one line and exit with status 2."""


def warn(text):
    print(f"warning: {text}".translate(CONTROL), file=sys.stderr)


# ---------------------------------------------------------------------------------------------------- batches

@dataclass
class Batch:
    """Three int64 tensors [B, T], as drawn at the top of this file. Moves and indexes as a whole."""
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    response_mask: torch.Tensor

    def tensors(self):
        return self.input_ids, self.attention_mask, self.response_mask

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, rows):
        return Batch(*(t[rows] for t in self.tensors()))

    def split(self, budget):
        """Row indices of parts that fit a budget of padded tokens, one row at least; long rows first."""
        lengths = self.attention_mask.sum(1)
        left, parts = lengths.argsort(descending=True, stable=True), []
        while len(left):
            n = max(1, budget // max(1, int(lengths[left[0]])))
            parts, left = parts + [left[:n]], left[n:]
        return parts

    def compact(self):
        """The same rows from column 0 on, all padding after them: a causal model then needs no mask."""
        lengths, first = self.attention_mask.sum(1, keepdim=True), self.attention_mask.argmax(1, keepdim=True)
        columns = torch.arange(int(lengths.max()), device=lengths.device)
        places, inside = (columns + first).clamp(max=self.input_ids.shape[1] - 1), (columns < lengths).long()
        return Batch(self.input_ids.gather(1, places), inside, self.response_mask.gather(1, places) * inside)

    def to(self, device):
        return Batch(*(t.to(device) for t in self.tensors()))

    @property
    def lengths(self):
        """Response tokens of each row [B], EOS included."""
        return self.response_mask.sum(1)

    @property
    def last(self):
        """Column of each row's last token [B]."""
        return self.attention_mask.cumsum(1).argmax(1)                        # the first of equal ones


def prompt_ids(tokenizer, prompts):
    """Token ids of each prompt: one BOS if the tokenizer adds it, cut from the left to 3/4 of the context."""
    bos, room, rows = tokenizer.bos_token_id, tokenizer.model_max_length * 3 // 4, []
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    for prompt, ids in zip(prompts, tokenizer(list(prompts), add_special_tokens=False).input_ids):
        lead = [bos] if adds_bos or (bos is not None and ids[:1] == [bos]) else []   # or by the chat template
        ids = lead + (ids[1:] if lead and ids[:1] == lead else ids)[-(room - len(lead)):]
        if not ids:
            raise UserError(f"the prompt {prompt!r} has no tokens: nothing to answer")
        rows.append(ids)
    return rows


class Sampled(str):
    """A response as a policy sampled it: a text with its token `ids`, EOS included unless it was cut off."""
    ids = ()


def response_ids(tokenizer, responses, ended=None):
    """Token ids of each response: those sampled, or its text's and one EOS, if it `ended` [B] by itself."""
    eos, ended = tokenizer.eos_token_id, [True] * len(responses) if ended is None else ended
    tokenised = tokenizer([str(response) for response in responses], add_special_tokens=False).input_ids
    return [response.ids if getattr(response, "ids", ()) else
            ids + [eos] if (whole or not ids) and ids[-1:] != [eos] else ids
            for response, ids, whole in zip(responses, tokenised, ended, strict=True)]


def encode(tokenizer, prompts, responses, ended=None):
    """Prompts and responses [B] as a Batch. A response that does not fit is cut, never below a quarter."""
    rows = zip(prompt_ids(tokenizer, prompts), response_ids(tokenizer, responses, ended), strict=True)
    return pack([(p, ids[:tokenizer.model_max_length - len(p)]) for p, ids in rows], tokenizer.pad_token_id)


def pack(rows, pad):
    """A Batch from (prompt ids, response ids) rows."""
    before, after = max(len(p) for p, _ in rows), max(len(r) for _, r in rows)
    columns = [], [], []
    for prompt, response in rows:
        left, right = before - len(prompt), after - len(response)
        columns[0].append([pad] * left + prompt + response + [pad] * right)
        columns[1].append([0] * left + [1] * (len(prompt) + len(response)) + [0] * right)
        columns[2].append([0] * before + [1] * len(response) + [0] * right)
    return Batch(*(torch.tensor(c) for c in columns))


def decode(tokenizer, batch):
    """Each response as a Sampled text, without prompt, EOS or padding."""
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.response_mask)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    samples = [*map(Sampled, texts)]
    for sample, ids in zip(samples, rows):
        sample.ids = ids
    return samples


def stop_ids(tokenizer):
    """Token ids that end a response: EOS, and those of the model's generation_config (harness/loading.py)."""
    return [tokenizer.eos_token_id, *getattr(tokenizer, "more_stop_ids", [])]


def finished(tokenizer, batch):
    """bool [B]: did the response end by itself, or was it cut off?"""
    return sum(batch.input_ids[torch.arange(len(batch)), batch.last] == i for i in stop_ids(tokenizer)) > 0


def batches(tokenizer, prompts, responses, budget, device="cpu", ended=None):
    """Yield (indices [n], Batch [n*k, T]) that fit a budget of padded tokens, items of like length together.

    responses [N][k]: k texts for each of N prompts; ended [N][k] as in encode. The rows of one prompt stay
    together: `.view(n, k)` splits them. Where k differs between prompts, each batch holds prompts of one k.
    """
    if not prompts:
        return
    ended = ended or [()] * len(prompts)
    flags = [whole for texts, flags in zip(responses, ended) for whole in flags or [True] * len(texts)]
    answers = iter(response_ids(tokenizer, [text for texts in responses for text in texts], flags))
    rows = [[(p, next(answers)[:tokenizer.model_max_length - len(p)]) for _ in texts]
            for texts, p in zip(responses, prompt_ids(tokenizer, prompts))]
    sizes = [(len(group), max(len(p) + len(ids) for p, ids in group)) for group in rows]   # k, longest row
    group = []
    for i in sorted(range(len(prompts)), key=lambda i: sizes[i]) + [None]:
        k, longest = sizes[i] if i is not None else (0, 0)
        if group and (k != sizes[group[0]][0] or (len(group) + 1) * k * longest > budget):
            yield group, pack([row for j in group for row in rows[j]], tokenizer.pad_token_id).to(device)
            group = []
        group.append(i)


# ------------------------------------------------------------------------------------------ log-probabilities

def pick_logps(logits, targets, temperature):
    """log softmax(logits / temperature)[targets]: [..., V], [...] -> [...], float32 or better."""
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    return logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)


def gather_logps(logits, input_ids, temperature=1.0):
    """log p(input_ids[:, t + 1]) at entry t of [B, T-1], nats, float32 or better; of logits / temperature."""
    return pick_logps(logits[:, :-1], input_ids[:, 1:], temperature)


def token_logps(model, batch, temperature=1.0, chunk=None):
    """log p of every response token [B, T-1], 0 elsewhere; many logits [B, T, V] are never held at once.

    Beyond FEW_LOGITS (tokens * V), the LM head reads `chunk` tokens at a time (256), again in the backward
    pass: memory grows with chunk * V. Models that change their logits (soft caps) take the plain path.
    """
    where = batch.response_mask[:, 1:].bool()
    with compute(model):
        states, head = response_states(model, batch)                                      # [N, D]
        targets, vocabulary = batch.input_ids[:, 1:][where], model.get_input_embeddings().num_embeddings
        if chunk is None and len(states) * vocabulary <= FEW_LOGITS:
            logps = pick_logps(head(states), targets, temperature)
        else:
            chunks = zip(*(t.split(chunk or 256) for t in (states, targets)))
            logps = torch.cat([checkpoint(lambda s, t: pick_logps(head(s), t, temperature), *both,
                                          use_reentrant=False) for both in chunks])
        return logps.new_zeros(where.shape).masked_scatter(where, logps)


def response_states(model, batch):
    """States [N, D] that predict the N response tokens of a batch, row by row; the head that makes logits."""
    whole, batch = not head_is_all(model, batch), batch.compact()
    where = batch.response_mask[:, 1:].bool()
    if whole:
        return model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1][where], torch.nn.Identity()
    return read(model, batch)[:, :-1][where], model.get_output_embeddings()


def read(model, rows):
    """Last hidden states [B, T, D] of compact rows. harness/prompts_once.py can let a model share prompts."""
    inputs, place = getattr(model, "share", lambda rows: None)(rows) or (dict(input_ids=rows.input_ids), None)
    with compute(model):
        states = model.base_model(**inputs, use_cache=False).last_hidden_state
    return states if place is None else states.flatten(0, 1)[place]


def sequence_logps(model, batch, temperature=1.0):
    """log p(response | prompt) [B] in nats: the sum over response tokens, EOS included, not a mean."""
    return token_logps(model, batch, temperature).sum(1)


@torch.no_grad()
def in_parts(function, batch, budget, device):
    """function(part) of each part of the batch that fits the budget, without gradient, joined on `device`."""
    parts = batch.split(budget)
    found = torch.cat([function(batch[rows].to(device)) for rows in parts])
    return found[torch.cat(parts).argsort().to(found.device)]                            # rows as they were


@torch.no_grad()
def head_is_all(model, batch):
    """Are the model's logits just head(hidden states)? Checked once per model, on 16 tokens of a batch."""
    if not hasattr(model, "head_is_all"):
        few = dict(input_ids=batch.input_ids[:1, -16:], use_cache=False)
        logits, hidden = model(**few).logits, getattr(model.base_model(**few), "last_hidden_state", None)
        capped = getattr(getattr(model, "config", None), "final_logit_softcapping", None)   # unseen if small
        model.head_is_all = hidden is not None and not capped and torch.allclose(
            logits, model.get_output_embeddings()(hidden), rtol=1e-3, atol=1e-3, equal_nan=True)
        if not model.head_is_all:
            warn(f"{type(model).__name__} changes its logits after the LM head: log-probs hold all of them")
    return model.head_is_all


# ----------------------------------------------------------------------------------------------------- models

def pick_device(name):
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not found.get(name, True):
        raise UserError(f"--device {name}: there is none on this machine; leave it out or say cpu")
    return torch.device(next(kind for kind in found if found[kind]) if name == "auto" else name)


def compute(model):
    """bfloat16 autocast around float32 weights where load() asked for it; else nothing."""
    dtype, cast = getattr(model, "compute_dtype", torch.float32), getattr(model, "autocast", torch.autocast)
    return cast(model.device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


@contextlib.contextmanager
def readable(what, path):
    """UserError in place of whatever from_pretrained raises for a path that it cannot read."""
    try:
        yield
    except BROKEN as error:
        raise UserError(f"cannot load {what} from {str(path)!r} ({' '.join(str(error).split())[:400]}): pass "
                        "a directory of save_pretrained, or check the id and the network") from None


def load(auto_class, path, device="auto", dtype="auto", **head):
    """Any Hugging Face model: float32 weights, every dropout off. UserError where it cannot be loaded whole.

    dtype: of forward passes; auto is bfloat16 autocast on CUDA, else float32. head: num_labels of a new head,
    which is to be trained; without it, weights that the path lacks are an error.
    """
    with readable("a model", path):
        settings = AutoConfig.from_pretrained(path, trust_remote_code=False, **head)
        for name, value in settings.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(settings, name, 0.0)
        model, info = auto_class.from_pretrained(path, config=settings, dtype=torch.float32,
                                                 output_loading_info=True)
        missing = sorted(n for n in info["missing_keys"] if not (head and ("score" in n or "class" in n)))
        if missing:
            raise ValueError(f"it lacks {len(missing)} weights, which would be random: {missing[:3]}")
    if info["unexpected_keys"] and not head and auto_class is not AutoModel:
        warn(f"{path} has weights that are not used: {sorted(info['unexpected_keys'])[:3]}")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0                                     # some classes hard-code a dropout of their own
    device = pick_device(device)
    dtype = dtype if dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    model.compute_dtype = getattr(torch, dtype)
    return model.to(device).eval()


def load_tokenizer(path, max_length, needs_eos=True):
    """The tokenizer of a model. Prompt and response share max_length tokens. PAD is EOS if there is none."""
    with readable("a tokenizer", path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer.model_max_length = min(tokenizer.model_max_length, max_length)
    if needs_eos and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path} has no EOS token, so no response could ever end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token                # harmless: masks come from lengths
    return tokenizer


def load_policy(path, device="auto", dtype="auto"):
    return load(AutoModelForCausalLM, path, device, dtype)


def load_reference(path, device="auto", dtype="auto"):
    """A frozen policy: a model of its own, never the one that is trained."""
    return load_policy(path, device, dtype).requires_grad_(False)


class ValueModel(torch.nn.Module):
    """A base model with a head that starts at 0: one value per token, for every family of models."""

    def __init__(self, base):
        super().__init__()
        self.base_model, self.compute_dtype, self.device = base, base.compute_dtype, base.device
        self.score = torch.nn.Linear(base.get_input_embeddings().embedding_dim, 1, device=self.device)
        self.score.load_state_dict({name: 0 * weight for name, weight in self.score.state_dict().items()})


def load_value_model(path, tokenizer=None, device="auto", dtype="auto"):
    """UserError where the path has another vocabulary than `tokenizer`, whose ids the model will read."""
    if tokenizer and load_tokenizer(path, tokenizer.model_max_length).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"the value model {path} has another tokenizer than the policy: it would misread ids")
    return ValueModel(load(AutoModel, path, device, dtype))


def token_values(model, batch):
    """Value of the state before each next token [B, T-1], float32: entry t has seen input_ids[:, :t + 1]."""
    rows, where = batch.compact(), (batch.attention_mask[:, :-1] & batch.attention_mask[:, 1:]).bool()
    values = model.score(read(model, rows).to(model.score.weight.dtype))[:, :-1, 0].float()     # no bfloat16
    return values.new_zeros(where.shape).masked_scatter(where, values[rows.attention_mask[:, 1:].bool()])


@dataclass
class RewardModel:
    """Scores texts: (model's score - mean) / std, so that SFT samples have mean 0 and deviation 1."""
    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    label: int | slice = 0
    mean: float = 0.0
    std: float = 1.0
    budget: int = 16384
    render: object = list                                      # prompts in the form that this model reads
    tokens: int = 0                                            # read so far, without padding

    @torch.no_grad()
    def __call__(self, prompts, responses):
        """Scores [N] of N prompts and responses, float32 on the CPU; [N, labels] where `label` is a slice."""
        scores = torch.empty(len(prompts), *([self.label.stop] if isinstance(self.label, slice) else []))
        for rows, tokens, logits in self.read(self.render(prompts), [*map(str, responses)]):
            self.tokens += tokens
            scores[rows] = logits[:, self.label].float().cpu()
        return (scores - self.mean) / self.std

    def read(self, prompts, responses):
        """Yield (indices [n], tokens read, scores [n, labels]) of a decoder; harness/rewards.py: encoders."""
        for rows, batch in batches(self.tokenizer, prompts, [[y] for y in responses], self.budget,
                                   self.model.device):
            yield rows, int(batch.attention_mask.sum()), sequence_scores(self.model, batch)


def sequence_scores(model, batch):
    """Scores [B, labels] of a decoder's head at the last response token, which is found by length.

    Hugging Face's own forward takes the last token that is not PAD, and so misses the EOS where PAD is EOS.
    """
    rows = batch.compact()
    states = read(model, rows)[torch.arange(len(rows)), rows.last]
    return model.score(states.to(model.score.weight.dtype)).float()               # bfloat16 would make ties


def load_reward_model(path, max_length, device="auto", dtype="auto", label="", budget=16384):
    """Any sequence-classification model; `label` picks one label of several, UserError if not."""
    model = load(AutoModelForSequenceClassification, path, device, dtype)
    tokenizer = load_tokenizer(path, max_length, needs_eos=hasattr(model, "score"))      # not an encoder
    with readable("a reward model", path):
        labels = {name.lower(): i for i, name in model.config.id2label.items()}
        scale = getattr(model.config, "reward_scale", {"mean": 0, "std": 1})
        mean, std = (float(scale[name]) for name in ("mean", "std"))
    if (len(labels) > 1 or label) and label.lower() not in labels:
        raise UserError(f"the reward model {path} has {len(labels)} labels: pick one with --reward_label, of "
                        f"{', '.join(model.config.id2label.values())}")
    return RewardModel(model, tokenizer, labels.get(label.lower(), 0), mean, std, budget)


# ---------------------------------------------------------------------------------------- sampling, optimizer

@torch.no_grad()
def generate(model, tokenizer, prompts, n=1, temperature=1.0, greedy=False, max_new_tokens=40, budget=None,
             done=lambda rows: None):
    """Sample n responses to each prompt from the model itself: no top-k, no top-p, no repetition penalty.

    Returns a Batch of len(prompts) * n rows on the CPU, in order, n rows of a prompt together. As many are
    sampled at once as fit `budget` padded tokens. After as many new tokens as a row was long, those that have
    not ended are read again and go on. done(n): n more rows are complete. The model stays as it was.
    """
    rows = [(ids, []) for ids in prompt_ids(tokenizer, prompts) for _ in range(n)]
    stops, pad, todo, left = stop_ids(tokenizer), tokenizer.pad_token_id, [*range(len(rows))], max_new_tokens
    mode, settings = model.training, model.generation_config
    model.eval()
    try:
        while todo and left:
            read = {i: rows[i][0] + rows[i][1] for i in todo}
            todo.sort(key=lambda i: -len(read[i]))
            waiting, new = todo, min(left, max(16, len(read[todo[0]])))
            how = {} if greedy else dict(temperature=temperature, top_k=0, top_p=1.0)
            # generate() takes what is not given from model.generation_config, where many models keep a top-k
            model.generation_config = transformers.GenerationConfig(
                max_new_tokens=new, do_sample=not greedy, eos_token_id=stops, pad_token_id=pad, **how)
            while waiting:
                count = max(1, (budget or ROOM[model.device.type]) // (len(read[waiting[0]]) + new))
                part, waiting = waiting[:count], waiting[count:]
                prompt = pack([(read[i], []) for i in part], pad).to(model.device)
                with compute(model):
                    texts = model.generate(input_ids=prompt.input_ids, attention_mask=prompt.attention_mask)
                for i, ids in zip(part, texts[:, prompt.input_ids.shape[1]:].tolist()):
                    rows[i][1].extend(ids[:next((t for t, v in enumerate(ids) if v in stops), len(ids)) + 1])
                done(sum(new == left or rows[i][1][-1] in stops for i in part))
            todo, left = [i for i in todo if rows[i][1][-1] not in stops], left - new
    finally:
        model.train(mode)
        model.generation_config = settings
    return pack(rows, pad)


def adamw(model, lr, steps, schedule="constant_with_warmup", warmup=0.1):
    """AdamW (betas 0.9 and 0.95, no weight decay) and the schedule of its learning rate over so many steps.

    warmup: the share of the steps over which the rate rises from 0. steps: of a list, one schedule for each.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    cycles = steps if isinstance(steps, list) else [steps]
    parts = [transformers.get_scheduler(schedule, optimizer, round(warmup * n), max(n, 1)) for n in cycles]
    ends = [sum(cycles[:i]) for i in range(1, len(cycles))]
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, parts, ends) if ends else parts[0]
