"""Evaluation: sample the test prompts, score the samples, measure the KL to the initial policy."""
import gc

import torch

import common
from harness import progress, ranks
from harness.loading import load_reference
from harness.stages import check_finite
from tasks import words

SCORES = "gold", "proxy"                                              # of each sample


def check_policy(policy, tokenizer, task, step):
    """UserError in one line for a policy that has become nan, which would crash the sampling."""
    prompt = (task.prompts["train"] + task.prompts["test"])[0]
    with torch.no_grad():
        probe = common.sequence_logps(policy, common.encode(tokenizer, [prompt], [""]).to(policy.device))
    check_finite(probe, step, [prompt], "the policy's log-prob")


def mean_and_error(values):
    """Mean of values [P, n], n samples of each of P independent prompts; its standard error, None of one."""
    means = values.float().mean(1)
    return means.mean().item(), (means.std() / len(means) ** 0.5).item() if len(means) > 1 else None


def held_out(metrics):
    """Of {name: values [n]} of n held-out pairs: {"eval/<name>": mean, "eval/<name>_se": its error}."""
    found = {}
    for name, values in metrics.items():
        found[f"eval/{name}"], (_, error) = values.float().mean().item(), mean_and_error(values[:, None])
        found |= {} if error is None else {f"eval/{name}_se": error}
    return found


def evaluate(config, task, policy, tokenizer, rewards, start=None, ask=str, draw=None):
    """Sample the test prompts and measure; the same prompts and random numbers at every call with one config.

    Args: rewards: {name: RewardModel}. start: what this function returned as samples before training. ask:
        what the policy is asked in place of a prompt; the reference and the rewards see the prompt itself.
        draw: how it answers, in place of ranks.generate (see best_of).
    Returns: metrics: {"eval/<name>": mean, "eval/<name>_se": standard error over prompts, if there are
            several}. gold, fluency if the task has them; proxy, judge; kl = KL(policy || initial policy) in
            nats per sequence: on the policy's own samples, the sum over tokens of the exact KL of the
            next-token distributions; win_rate against `start` by gold, else proxy (a tie counts half),
            win_rate_<name> by the other rewards; length in tokens with EOS; eos_rate; distinct_2 = different
            word pairs over all pairs.
        samples: {"prompts", "responses", and each reward's scores}, lists of eval_prompts * eval_samples.
    """
    n = config.eval_samples
    prompts = task.prompts["test"][:config.eval_prompts]
    with ranks.fork_rng():
        torch.manual_seed(config.seed)
        asked = [ask(prompt) for prompt in prompts]
        batch = (draw or ranks.generate)(policy, tokenizer, asked, n, config.eval_temperature,
                                         max_new_tokens=config.max_new_tokens)
    same = asked == prompts
    prompts = [prompt for prompt in prompts for _ in range(n)]
    plain = None if same else with_prompts(tokenizer, batch, prompts)
    responses, ended = common.decode(tokenizer, batch), common.finished(tokenizer, batch)
    values = {"length": batch.lengths, "eos_rate": ended, "kl": kl_to_reference(config, policy, batch, plain)}
    if task.gold:
        values["gold"] = torch.tensor([task.gold(*row) for row in zip(prompts, responses, ended.tolist())])
    if task.fluent:
        values["fluency"] = torch.tensor([task.fluent(text) for text in responses])
    values |= {name: model(prompts, responses) for name, model in rewards.items()}
    samples = {"prompts": [*map(str, prompts)], "responses": [*map(str, responses)]}
    for name in ("gold", *rewards):
        if name in values:
            samples[name] = values[name].tolist()
            if start:
                before = torch.tensor(start[name])
                wins = (values[name] > before) + 0.5 * (values[name] == before)
                values["win_rate" if "win_rate" not in values else f"win_rate_{name}"] = wins
    metrics = {}
    for name, value in values.items():
        metrics[f"eval/{name}"], error = mean_and_error(value.view(-1, n))
        metrics |= {} if error is None else {f"eval/{name}_se": error}
    bigrams = [pair for text in map(words, responses) for pair in zip(text, text[1:])]
    metrics["eval/distinct_2"] = len(set(bigrams)) / max(len(bigrams), 1)
    return metrics, samples


def best_of(n, reward):
    """In place of ranks.generate: each answer is the one of n samples that has the highest reward."""
    def draw(policy, tokenizer, prompts, answers, temperature, max_new_tokens):
        batch = ranks.generate(policy, tokenizer, prompts, answers * n, temperature,
                               max_new_tokens=max_new_tokens)
        asked = [prompt for prompt in prompts for _ in range(answers * n)]
        scores = reward(asked, common.decode(tokenizer, batch)).view(-1, n)
        return batch[torch.arange(0, len(batch), n) + scores.argmax(1)]
    return draw


def with_prompts(tokenizer, batch, prompts):
    """The responses of the batch, token for token, as answers to other prompts [B]."""
    responses = [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.response_mask)]
    rows = zip(common.prompt_ids(tokenizer, prompts), responses, strict=True)
    return common.pack([*rows], tokenizer.pad_token_id)


@torch.no_grad()
def sequence_kl(models, batches, temperatures=(1.0, 1.0), chunk=256):
    """KL(first model || second) of the next token, summed over each row's response tokens: [B], float32.

    batches: what each model reads; the responses are the same. The whole distributions are compared, so on
    samples of the first model the mean is an unbiased estimate of KL(model || reference), with less variance
    than the mean log-ratio of the sampled tokens (k1), and never below 0.
    """
    with common.compute(models[0]):
        states, heads = zip(*map(common.response_states, models, batches))
        parts = []
        for both in zip(*(s.split(chunk) for s in states)):
            p, q = ((head(s).float() / t).log_softmax(-1)
                    for s, head, t in zip(both, heads, temperatures))                  # log-probs [chunk, V]
            parts.append((p.exp() * (p - q)).sum(-1))
    kls, where = torch.cat(parts), batches[0].response_mask[:, 1:].bool()
    return kls.new_zeros(where.shape).masked_scatter(where, kls).sum(1)


def kl_to_reference(config, policy, batch, plain=None):
    """KL(policy || initial policy) on each of the policy's samples [N]: see sequence_kl.

    The policy is taken at --eval_temperature, as it was sampled; the initial policy at --temperature. Where
    the policy was asked in another form than the reference understands, `plain` holds the same responses to
    the plain prompts, for the reference.
    """
    reference = load_reference(config, policy)
    embeddings = policy.get_input_embeddings().weight.detach()
    known = reference.get_input_embeddings().num_embeddings
    if len(embeddings) > known:                                     # tags, see conditioning.add_tags
        extend_vocabulary(reference, embeddings[known:])
    temperatures, plain = (config.eval_temperature, config.temperature), plain or batch
    kls, parts = torch.zeros(len(batch)), batch.split(config.token_budget)
    own = parts[ranks.number()::ranks.count()]
    passes = ranks.filled(own, lambda: parts[0]) if config.shard else own
    for rows, in progress.over(zip(passes), len(batch), "KL to the initial policy"):
        both = [b[rows].to(policy.device) for b in (batch, plain)]
        found = sequence_kl((policy, reference), both, temperatures).cpu()
        kls[rows] = kls[rows] if ranks.Filler.now else found
    if config.shard:
        del reference
        gc.collect()                              # FSDP's references go in circles: it would stay on the GPU
    return ranks.total(kls)


def extend_vocabulary(model, rows):
    """Let the model read more tokens: rows [n, D] are the input embeddings of those after its last.

    It starts to predict a new token as it predicts an average one (or, where the two are tied, by the same
    rows).
    """
    known = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(known + len(rows), mean_resizing=False)
    head, embeddings = model.get_output_embeddings().weight.data, model.get_input_embeddings().weight.data
    head[known:] = head[:known].mean(0)
    embeddings[known:] = rows


@torch.no_grad()
def probe(run, prompts):
    """One response to each prompt by the policy as it is now: (texts, did each end with EOS? [N]).

    Outside the run's random numbers and counts: the same numbers are drawn at every call.
    """
    config = run.config
    with ranks.fork_rng():
        torch.manual_seed(config.seed)
        batch = common.generate(run.policy, run.tokenizer, prompts, 1, config.eval_temperature,
                                max_new_tokens=config.max_new_tokens)
        ranks.wait(run.policy)
    return common.decode(run.tokenizer, batch), common.finished(run.tokenizer, batch)


def before_and_after(before, after):
    """A table of the metrics, each with its standard error over test prompts."""
    lines = [f"{'':28}{'before':>18}{'after':>18}"]
    for name in after:
        if name.startswith("eval/") and not name.endswith("_se"):
            cells = [f"{row[name]:.3f}" + (f" ± {row[name + '_se']:.3f}" if name + "_se" in row else " " * 8)
                     if name in row else "" for row in (before, after)]
            lines.append(f"{name.removeprefix('eval/'):28}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def texts_of(before, after):
    """Each test prompt with its samples before and after training, and their scores: a list of texts."""
    texts = []
    for i, (prompt, *both) in enumerate(zip(before["prompts"], before["responses"], after["responses"])):
        scores = [f"{name} {before[name][i]:.2f} to {after[name][i]:.2f}" for name in SCORES if name in after]
        lines = [f"{word} {text}" for word, text in zip(("before:", "after: "), both)]
        lines += [f"scores:  {', '.join(scores)}"] if scores else []
        texts.append("\n  ".join([prompt, *lines]) + "\n")
    return texts


def most_changed(before, after, n):
    """Which samples to show: [(label, index)] of the largest gain, the median and the largest loss.

    Of the prompts with n samples each, the first samples are compared, by gold, else by proxy. Without
    scores, or where none changed: the first three prompts, without labels.
    """
    first = range(0, len(before["prompts"]), n)
    name = next((name for name in SCORES if name in after), "")
    change = {i: after[name][i] - before[name][i] for i in first} if name else {}
    if not any(change.values()):
        return [("", i) for i in first[:3]]
    order = sorted(first, key=change.get, reverse=True)
    labels = {order[len(order) // 2]: "median change",
              order[-1]: "largest loss" if change[order[-1]] < 0 else "smallest gain",
              order[0]: "largest gain" if change[order[0]] > 0 else "smallest loss"}
    return [(f"{labels[i]} in {name}, of {len(order)} prompts ({change[i]:+.2f}):\n", i)
            for i in sorted(labels, key=order.index)]
