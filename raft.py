"""RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment
Dong, Xiong, Goyal, Zhang, Chow, Pan, Diao, Zhang, Shum and Zhang, TMLR 2023, https://arxiv.org/abs/2304.06767
and the rejection-sampling rounds of Llama 2: Open Foundation and Fine-Tuned Chat Models
Touvron et al., 2023, https://arxiv.org/abs/2307.09288

The best of K samples has a larger reward than one sample. RAFT trains the policy on its own best of K, and
repeats this. A round has three steps:

    1. sample K responses to each of the round's prompts from the current policy
    2. keep the response with the largest reward of each prompt (local ranking), or the best 1/K of all
       samples (global ranking)
    3. fine-tune the policy on what was kept, by maximum likelihood

One round gains little more with a larger K: E max_K r <= E r + B sqrt(log(K) / 2), for rewards in a range of
B (sec. 3.2). More rounds go further. Best of n has a KL of log n - (n-1)/n nats to the policy at most. A KL
penalty can join the ranking, not the loss: r - kl_coef log(pi/pi_ref) (Eq. 3 to 5).

In Llama 2 every version starts from the initial model again (--restart), the pool holds the best samples of
all rounds (--pool all; with those of the last round alone, skills were lost), and the reward model is trained
further, on labels of new samples (--refresh). Then PPO goes on with the last policy and reward model.

    python raft.py                 # 22 s of one core (at first two minutes more): gold 0.16 to 0.72, KL 7.5
    python raft.py --reproduce     # K, noise in the reward, the Llama 2 rounds; against PPO
    python raft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl

What to look at: `round/best` is the mean reward that the next round's samples (`round/mean`) would have if
fine-tuning were perfect. With --rare "you saw", in the embedded task, one wording of the prompts comes in the
first round only: does a later version still answer it?

Compared with rrhf.py: its SFT term alone, on new samples in every round. The `filter` of
decision_transformer.py is one global round on samples that exist already.
Official code (LMFlow) differs: its default ranking is global, it trains the prompt's tokens too, adds no EOS,
packs texts into blocks, and gives samples with "#" a reward of minus infinity. Llama 2 published neither K
nor the number of prompts. Left out: its margin loss, its safety reward model, a new temperature every round.

Elsewhere:
    log-probs in float32, dropout off, EOS counted, no EOS after a response that was cut off: common.py
    AdamW's betas (0.9, 0.95), eps 1e-8, no weight decay: common.adamw; constant lr, norm 1: harness/config.py
    the reward: trained on the pairs, or --reward; mean 0, deviation 1 on SFT samples: harness/rewards.py
    samples: at --temperature (1), no top-k or top-p; in round 1 from the task's pool: harness/samples.py
    the tiny model, its film reviews and gold, their true reward, which no method sees: tasks/reviews.py
    run.steps: seeds, checkpoints; run.evaluate: samples, KL to the initial policy (tiny: SFT): harness/run.py
"""
import copy
import math
import random
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Optional

import torch

import common
import harness
from harness import Pair, Ranking, UserError, option


@dataclass
class Config(harness.Config):
    LR: ClassVar = {"tiny": 1e-3, "real": 2e-5}     # tiny: tuned, seeds 100 to 102; real: paper's (it decays)
    EPOCHS: ClassVar = {"tiny": 2.0, "real": 2.0}    # the paper's
    epochs: Optional[float] = option(
        None, "passes over the kept samples in every round; the default depends on the model")
    batch_size: int = option(32, "responses per optimizer step")
    rounds: int = option(5, "how often to sample, keep and fine-tune (paper: 10 to 18)", "(0, inf)")
    prompts: int = option(256, "prompts of each round (0: all; paper: 2,048)", "[0, inf)")
    candidates: int = option(8, "K, the samples for each prompt (paper: 8 to 32)", "(0, inf)")
    ranking: Literal["local", "global"] = option(
        "local", "keep the best of each prompt, or the best of all samples")
    share: float = option(0.0, "what part of all samples a global ranking keeps (0: 1/K)", "[0, 1]")
    kl_coef: float = option(0.0, "weight of the KL penalty in the ranking (paper: 0 to 0.1)", "[0, inf)")
    pool: Literal["last", "all"] = option(
        "last", "fine-tune on what the last round kept, or all rounds; in equally many steps")
    restart: bool = option(False, "every round fine-tunes the initial policy again (Llama 2)")
    refresh: bool = option(
        False, "every round has annotators compare new samples, and the reward model learns (Llama 2)")
    rare: str = option(
        "", "prompts that contain this text come in the first round only; they are evaluated apart, too")
    warmup: float = option(0.0, "share of the steps over which the learning rate rises linearly")

    def __post_init__(self):
        super().__post_init__()
        if self.share and self.ranking == "local":
            raise UserError("--share is for --ranking global: a local ranking keeps one sample of a prompt")


def best_of_k(rewards):
    """Index of the largest reward of each prompt, the first of equals. rewards [B, K] -> [B]."""
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be [B, K], not {list(rewards.shape)}")
    return (rewards == rewards.amax(1, keepdim=True)).int().argmax(1)


def kl_best_of_n(n):
    """KL of best of n to the policy that is sampled, in nats. Exact if no two samples tie, else a bound."""
    return math.log(n) - (n - 1) / n


def select(rankings, ranking="local", share=0.0):
    """The samples to fine-tune on: Rankings with one response each.

    local: the best of each prompt. global: of all samples, the best `share`; 0: as many as there are prompts.
    """
    if ranking == "local":
        best = best_of_k(torch.tensor([row.scores for row in rankings], dtype=torch.float64))       # [B, K]
        return [take(row, i) for row, i in zip(rankings, best.tolist())]
    samples = [(score, -i, row, j) for i, row in enumerate(rankings) for j, score in enumerate(row.scores)]
    keep = max(1, round(share * len(samples))) if share else len(rankings)
    ranked = sorted(samples, key=lambda sample: sample[:2], reverse=True)
    return [take(row, j) for _, _, row, j in ranked[:keep]]


def take(row, i):
    """The ranking with its response i alone, and whether that one ended or was cut off."""
    return Ranking(row.prompt, [row.responses[i]], [row.scores[i]], ended=[row.ended[i]])


def prompts_of_round(config, task, turn):
    """Train prompts of round `turn` (from 0), drawn for each; after the first, none that contains --rare."""
    prompts = [p for p in task.prompts["train"] if not (turn and config.rare and config.rare in p)]
    n = min(config.prompts or len(prompts), len(prompts))
    return random.Random(f"prompts {config.seed} {turn}").sample(prompts, n)


def refresh(run, reward, prompts, turn):
    """Annotators compare two samples a prompt; the reward model learns from these and as many older pairs."""
    rng, older, new = random.Random(f"labels {run.config.seed} {turn}"), run.state["labels"], []
    for row in harness.sample_rankings(run, prompts, 2):         # new ones; in round 1 two of the pool's K
        a, b = row.responses
        if a != b:
            prefers_a = run.task.annotate(row.prompt, a, b, rng)
            new.append(Pair(row.prompt, *((a, b) if prefers_a else (b, a))))
    pairs = new + rng.sample(older, min(len(new), len(older)))
    recipe = harness.Recipe(lr=1e-3, batch_size=32, schedule="cosine", seed=run.config.seed)
    harness.train_reward_model(reward.model, reward.tokenizer, pairs, recipe, run.counts)
    run.state |= {"labels": older + new, "rater": reward.model.state_dict()}


def collect(run, reward, reference, turn):
    """Steps 1 and 2 of a round, without gradient (only texts and numbers come out): into run.state["pool"].

    run.state["rewards"]: the mean reward of all samples, and of each prompt's best, without penalty.
    """
    config, state, prompts = run.config, run.state, prompts_of_round(run.config, run.task, turn)
    if config.refresh:
        if "rater" in state:                                          # --resume has restored it
            reward.model.load_state_dict(state["rater"])
        refresh(run, reward, prompts, turn)
    rankings = harness.sample_rankings(run, prompts, config.candidates)        # step 1: lists of K for each
    rankings = harness.scored(run, rankings, reward)                  # the reward reads a cut text as whole
    best = select(rankings)
    state["rewards"] = [sum(sum(row.scores) / len(row.scores) for row in rankings) / len(rankings),
                        sum(row.scores[0] for row in best) / len(best)]
    if config.kl_coef:
        singles = [take(row, i) for row in rankings for i in range(len(row.scores))]
        logps, ref_logps = (harness.response_logps(run, singles, model, counted)[0]          # [N, 1], summed
                            for model, counted in ((run.policy, ""), (reference, "tokens_scored_reference")))
        ratios = iter((logps - ref_logps).squeeze(1).tolist())
        rankings = [row._replace(scores=[score - config.kl_coef * next(ratios) for score in row.scores])
                    for row in rankings]                                                        # Eq. 3 to 5
    kept = select(rankings, config.ranking, config.share)                                           # step 2
    state["pool"] = (state["pool"] if config.pool == "all" else []) + kept


def against_best(run, reward):
    """The policy between the mean of the last round's samples (0) and that of each prompt's best (1).

    By the proxy on test prompts. {} before the first round, or where another reward selected the samples.
    """
    if "rewards" not in run.state or "after" not in run.samples or reward is not run.rewards.get("proxy"):
        return {}
    (mean, best), scores = run.state["rewards"], run.samples["after"]["proxy"]
    proxy = sum(scores) / len(scores)
    metrics = {"eval/round_mean": mean, "eval/round_best": best, "eval/to_best": proxy - best}
    if best - mean > 1e-6:                                                     # with K = 1 they are the same
        metrics["eval/recovered"] = (proxy - mean) / (best - mean)
    return metrics


def rare_skill(run):
    """Gold reward on test prompts that contain --rare, 16 samples each. {} without them."""
    config, task = run.config, run.task
    prompts = [prompt for prompt in task.prompts["test"] if config.rare in prompt]
    if not (config.rare and task.gold and prompts):
        return {}
    prompts = [prompt for prompt in prompts for _ in range(16)]
    texts, ended = harness.probe(run, prompts)
    return {"eval/rare_gold": sum(map(task.gold, prompts, texts, ended.tolist())) / len(prompts)}


def train(run):
    """Rounds of equally many steps. Each round samples and selects, then fine-tunes on the pool."""
    config, policy, task = run.config, run.policy, run.task
    known = isinstance(run.rewards.get("proxy"), common.RewardModel) and config.reward != "gold"
    if config.refresh and not (known and task.annotate and config.reward_noise == "none"):
        raise UserError("--refresh needs annotators, which only the embedded task has, and a reward model "
                        "without noise")
    reward = harness.reward_to_maximise(run)
    reward = replace(reward, model=copy.deepcopy(reward.model)) if config.refresh else reward     # to train
    reference = run.load_reference() if config.kl_coef else None              # the initial policy, frozen
    initial = harness.trained_weights(policy) if config.restart else None
    if config.rounds > 1 and not prompts_of_round(config, task, 1):
        raise UserError(f"--rare {config.rare}: every train prompt has it, so the second round has none")
    run.state |= {"pool": [], "labels": task.pairs.get("train", []) if config.refresh else []}

    # A step is config.batch_size responses. A round: config.epochs passes over what the first round keeps.
    kept = len(prompts_of_round(config, task, 0))
    kept = max(1, round(config.share * kept * config.candidates)) if config.share else kept
    steps = math.ceil(config.epochs * kept / config.batch_size)                            # of a round
    plan = [(turn, i) for turn in range(config.rounds) for i in range(steps)]          # one schedule for all

    optimizer, schedule = common.adamw(policy, config.lr, len(plan), config.schedule, config.warmup)
    run.evaluate()                                                                          # before training
    run.amend(**rare_skill(run))
    for step, (turn, i) in run.steps(plan, policy, optimizer, schedule):
        if i == 0:                                                       # a new round
            collect(run, reward, reference, turn)
            if config.restart and turn:
                policy.load_state_dict(initial, strict=False)            # after the trained policy sampled
                optimizer.state.clear()
        pool = run.state["pool"]
        passes = steps * config.batch_size / len(pool)   # full batches; new order each pass, same each round
        order = harness.shuffled_batches(len(pool), passes, config.batch_size, config.seed)
        rows, means = [pool[j] for j in order[i]], harness.Means()
        for part, batch in run.microbatches(rows):                       # part: n of the rows; batch [n, T]
            losses = -common.sequence_logps(policy, batch)            # step 3: [n], sums, with EOS unless cut
            harness.check_finite(losses, step + 1, [rows[j].prompt for j in part])
            (losses.sum() / len(rows)).backward()                        # the mean over responses, in parts
            means.add({"loss": losses})
            run.counts["tokens_trained"] += int(batch.attention_mask.sum())
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean, best = run.state["rewards"]
        run.log(step, means.result() | {"grad_norm": norm, "round/mean": mean, "round/best": best})
        if run.evaluation_due(step):                            # every --eval_every steps, and after the last
            run.evaluate()
            run.amend(**against_best(run, reward), **rare_skill(run))     # needs the evaluation's samples

    if "rater" in run.state:                                        # what annotators were asked on the way
        run.results["new_labels"] = len(run.state["labels"]) - len(task.pairs.get("train", []))
        reward.model.load_state_dict(run.state["rater"])                 # as the last round left it
        run.save_reward_model(reward)                                   # for ppo.py --reward OUT/reward_model
    if config.candidates > 1 and "eval/proxy" in run.trace[-1]:
        gain = run.trace[-1]["eval/proxy"] - run.trace[0]["eval/proxy"]
        run.results["gain_per_sqrt_log_k"] = gain / math.sqrt(math.log(config.candidates))   # all rounds


if __name__ == "__main__":
    harness.main(Config, train)
