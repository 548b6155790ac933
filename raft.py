"""RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment
Dong, Xiong, Goyal, Zhang, Chow, Pan, Diao, Zhang, Shum and Zhang, TMLR 2023, https://arxiv.org/abs/2304.06767
and the rejection-sampling rounds of Llama 2: Open Foundation and Fine-Tuned Chat Models
Touvron et al., 2023, https://arxiv.org/abs/2307.09288

The best of K samples is better than a sample. RAFT makes the policy as good as its own best of K, then starts over:

    1. sample K responses to each of a round's prompts from the policy as it is now
    2. keep the one with the largest reward (local ranking); or the best 1/K of all samples (global ranking)
    3. fine-tune the policy on what was kept, by maximum likelihood; go to 1

The gain of a round is bounded: E max_K r <= E r + sqrt(B^2/2 log K) for rewards in a range of B. So K soon stops paying, and rounds
go on paying. Best of n itself is log n - (n-1)/n nats from the policy at most. A penalty can join the ranking, not the loss:
r - kl_coef log(pi/pi_ref)  (Eq. 3 to 5).

Llama 2 did the same with differences: every version starts from SFT again (--restart), the pool holds the best samples of all
rounds, not of the last (--pool all; with the last alone, skills were lost), the reward model is refreshed with labels on the
policy's new samples (--refresh), and at last PPO goes on from there.

    python raft.py                   # 15 s on two cores (two minutes more at first): gold 0.18 to 0.91, KL 5.3 nats
    python raft.py --reproduce       # K, noise in the reward, the Llama 2 rounds: 19 arms, 10 minutes a seed
    python raft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data Anthropic/hh-rlhf:harmless-base/train.jsonl.gz

What to look at: `round/best` of one round is what `round/mean` of the next would be if fine-tuning took everything in. By default
it makes a third of the way, in 16 steps; the next round goes on from there.

Compared with rrhf.py: its SFT term alone, on new samples every round. A single global round on samples that are at hand is the
`filter` of decision_transformer.py.
Official code (LMFlow) differs: it ranks globally unless told otherwise, trains the prompt's tokens too, adds no EOS, and packs
texts into blocks; it gives samples with "#" a reward of minus infinity. This file trains responses, EOS included, each token with
weight 1. Llama 2 published neither K nor the number of prompts. Left out: its margin loss and its second (safety) reward model, and
the temperature that it tunes anew for each round.
"""
import copy
import math
import random
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Optional

import torch

import common
from common import Pair, UserError, option


@dataclass
class Config(common.Config):
    LR: ClassVar = {"tiny": 5e-4, "real": 2e-5}      # tiny: tuned on validation seed 100; real: the paper's
    EPOCHS: ClassVar = {"tiny": 2.0, "real": 2.0}    # the paper's
    epochs: Optional[float] = option(None, "passes over the kept samples in every round; the default depends on the model")
    batch_size: int = option(32, "responses per optimizer step")
    rounds: int = option(5, "how often to sample, keep the best and fine-tune")
    prompts: int = option(256, "prompts of each round (0: all)")
    candidates: int = option(8, "K, the samples for each prompt (paper: 8 to 32)")
    ranking: Literal["local", "global"] = option("local", "keep the best of each prompt, or the best of all samples")
    share: float = option(0.0, "what part of all samples a global ranking keeps (0: 1/K)")
    kl_coef: float = option(0.0, "weight of the KL penalty in the ranking (paper: 0 to 0.1)")
    pool: Literal["last", "all"] = option("last", "fine-tune on what the last round kept, or all rounds; in equally many steps")
    restart: bool = option(False, "every round fine-tunes the initial policy again (Llama 2), not the last one")
    refresh: bool = option(False, "every round has annotators compare new samples and trains the reward model on (Llama 2)")
    rare: str = option("", "prompts that contain this text come in the first round only; test prompts with it are measured apart")
    warmup: float = option(0.0, "share of the steps over which the learning rate rises linearly")

    def __post_init__(self):
        super().__post_init__()
        self.check(lambda value: value > 0, "be above 0", "rounds", "candidates")
        self.check(lambda value: value >= 0, "not be negative", "prompts", "kl_coef")
        self.check(lambda value: 0 <= value <= 1, "be in [0, 1]", "share")
        if self.share and self.ranking == "local":
            raise UserError("--share is for --ranking global: a local ranking keeps one sample of each prompt")


def best_of_k(rewards):
    """Index of the largest reward of each prompt, the first of equals. rewards [B, K] -> [B]."""
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be [B, K], not {list(rewards.shape)}")
    return (rewards == rewards.amax(1, keepdim=True)).int().argmax(1)


def kl_best_of_n(n):
    """KL of best-of-n to the policy it samples from, in nats: log n - (n-1)/n. Exact if no two samples tie, else a bound."""
    return math.log(n) - (n - 1) / n


def select(rankings, ranking="local", share=0.0):
    """The samples to fine-tune on: Rankings with one response each.

    local: the best of each prompt. global: of all samples, the best `share`; 0: as many as there are prompts.
    """
    if ranking == "local":
        best = best_of_k(torch.tensor([row.scores for row in rankings], dtype=torch.float64))
        return [take(row, i) for row, i in zip(rankings, best.tolist())]
    samples = [(score, -i, row, j) for i, row in enumerate(rankings) for j, score in enumerate(row.scores)]
    keep = max(1, round(share * len(samples))) if share else len(rankings)
    return [take(row, j) for _, _, row, j in sorted(samples, key=lambda sample: sample[:2], reverse=True)[:keep]]


def take(row, i):
    return row._replace(responses=[row.responses[i]], scores=[row.scores[i]], systems=(), ended=[row.ended[i]])


def prompts_of_round(config, task, turn):
    """Train prompts of round `turn` (from 0), drawn anew for each; prompts that contain --rare in the first alone."""
    prompts = [p for p in task.prompts["train"] if not (turn and config.rare and config.rare in p)]
    return random.Random(f"prompts {config.seed} {turn}").sample(prompts, min(config.prompts or len(prompts), len(prompts)))


def refresh(run, rater, prompts, turn):
    """Annotators compare two new samples of each prompt; the reward model is trained on, with these and as many older pairs."""
    rng, older, fresh = random.Random(f"labels {run.config.seed} {turn}"), run.state["labels"], []
    for row in common.sample_rankings(run, prompts, 2):
        a, b = row.responses
        if a != b:
            fresh.append(Pair(row.prompt, *((a, b) if run.task.annotate(row.prompt, a, b, rng) else (b, a))))
    settings = common.Config(lr=1e-3, batch_size=32, schedule="cosine", seed=run.config.seed, device=run.config.device)
    common.train_reward_model(rater.model, rater.tokenizer, fresh + rng.sample(older, min(len(fresh), len(older))), settings)
    run.state |= {"labels": older + fresh, "rater": rater.model.state_dict()}


def collect(run, reward, reference, turn):
    """The round's samples: what is kept of them goes to run.state["pool"], their mean and best rewards to run.state["rewards"]."""
    config, state, prompts = run.config, run.state, prompts_of_round(run.config, run.task, turn)
    if config.refresh:
        if "rater" in state:
            reward.model.load_state_dict(state["rater"])                                         # --resume has restored it
        refresh(run, reward, prompts, turn)
    rankings = common.scored(common.sample_rankings(run, prompts, config.candidates), reward, run.step)
    best = select(rankings)
    state["rewards"] = [sum(sum(row.scores) / len(row.scores) for row in rankings) / len(rankings),
                        sum(row.scores[0] for row in best) / len(best)]
    if config.kl_coef:
        singles = [take(row, i) for row in rankings for i in range(len(row.scores))]
        ratios = common.response_logps(run, singles)[0] - common.response_logps(run, singles, reference)[0]      # [N, 1]
        ratios = iter(ratios.squeeze(1).tolist())
        rankings = [row._replace(scores=[score - config.kl_coef * next(ratios) for score in row.scores]) for row in rankings]
    kept = select(rankings, config.ranking, config.share)
    state["pool"] = (state["pool"] if config.pool == "all" else []) + kept
    if config.restart and turn:
        run.policy.load_state_dict(reference.state_dict())
        run.optimizer.state.clear()


def train(run, reward, reference):
    """Rounds of equally many steps. Each samples, selects, and fine-tunes on the pool."""
    config = run.config
    if config.rounds > 1 and not prompts_of_round(config, run.task, 1):
        raise UserError(f"--rare {config.rare}: every train prompt contains it, so the second round has none")
    run.state |= {"pool": [], "labels": run.task.pairs.get("train", []) if config.refresh else []}
    n = len(prompts_of_round(config, run.task, 0))                     # kept in a round
    n = max(1, round(config.share * n * config.candidates)) if config.share else n
    steps = math.ceil(config.epochs * n / config.batch_size)

    def losses_of(rows, batch):
        return -common.sequence_logps(run.policy, batch), {}                                      # [n], summed over tokens

    for step, (turn, i) in common.steps(run, [(turn, i) for turn in range(config.rounds) for i in range(steps)],
                                        lambda: against_best(run, reward) | rare_skill(run)):
        if i == 0:
            collect(run, reward, reference, turn)
        pool, passes = run.state["pool"], steps * config.batch_size / len(run.state["pool"])
        order = common.epochs(len(pool), replace(config, epochs=passes))
        metrics = common.minimise(run, step, [pool[j] for j in order[i]], losses_of)
        common.log(run, step, metrics | {"round/mean": run.state["rewards"][0], "round/best": run.state["rewards"][1]})


def against_best(run, reward):
    """Where training has brought the policy, between the mean of the last round's samples (0) and that of each prompt's best (1),
    by the proxy on test prompts. {} before the first round, or where another reward selected."""
    if "rewards" not in run.state or "after" not in run.samples or reward is not run.rewards.get("proxy"):
        return {}
    mean, best = run.state["rewards"]
    proxy = run.samples["after"]["proxy"]
    proxy = sum(proxy) / len(proxy)
    metrics = {"eval/round_mean": mean, "eval/round_best": best, "eval/to_best": proxy - best}
    return metrics | ({"eval/recovered": (proxy - mean) / (best - mean)} if best - mean > 1e-6 else {})    # K = 1 leaves no way


def rare_skill(run):
    """Gold reward on test prompts that contain --rare, 16 samples each. {} without them."""
    config, task = run.config, run.task
    prompts = [prompt for prompt in task.prompts["test"] if config.rare in prompt]
    if not (config.rare and task.gold and prompts):
        return {}
    prompts = [prompt for prompt in prompts for _ in range(16)]
    texts, ended = common.probe(run, prompts)
    return {"eval/rare_gold": sum(map(task.gold, prompts, texts, ended.tolist())) / len(prompts)}


def run(config):
    """One training run; returns the metrics after it, and the trace of evaluations."""
    run = common.start(config)
    reward = common.reward_to_maximise(run)
    if config.refresh:
        if not run.task.annotate or not isinstance(reward, common.RewardModel):
            raise UserError("--refresh needs annotators, which only the embedded task has, and a reward model without noise")
        reward = replace(reward, model=copy.deepcopy(reward.model))    # the evaluation keeps the old one
    train(run, reward, common.load_reference(config) if config.kl_coef or config.restart else None)
    metrics, root = common.finish(run), math.sqrt(math.log(config.candidates))
    if root and "eval/proxy" in metrics:
        metrics["gain_per_sqrt_log_k"] = (metrics["eval/proxy"] - run.trace[0]["eval/proxy"]) / root
    return metrics


def in_rounds(k):
    return {"candidates": k, "eval_every": 16}


ROUNDS = {"restart": True, "rare": "villain", "refresh": True, "epochs": 4, "lr": 1e-3, "eval_every": 16}

EXPERIMENTS = {
    "K and rounds": dict(
        question="What do more candidates buy, and does each round reach the best of K of the one before?",
        arms={"SFT": {"epochs": 0}} | {f"K {k}": in_rounds(k) for k in (2, 4, 8, 16)} | {
            "K 8, one round, as many steps": {"rounds": 1, "epochs": 10}, "K 8, KL in the ranking": in_rounds(8) | {"kl_coef": 0.1},
            "K 8, global": in_rounds(8) | {"ranking": "global"}},
        columns={"eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL", "eval/fluency": "fluency", "eval/distinct_2": "distinct-2",
                 "eval/round_mean": "last round's mean", "eval/round_best": "its best of K", "eval/recovered": "share recovered",
                 "tokens_generated": "tokens generated"},
        claims=[
            dict(claim="more candidates, more reward", source="Table of K (T 0.85)", paper="2.18, 2.25, 2.33 for K 8, 16, 32",
                 metric="eval/proxy", holds=[(f"K {2 * k}", ">", f"K {k}") for k in (2, 4, 8)]),
            dict(claim="the same in gold", source="ours", paper="-", metric="eval/gold",
                 holds=[(f"K {2 * k}", ">", f"K {k}") for k in (2, 4, 8)]),
            dict(claim="the gain grows like sqrt(log K): the same per sqrt(log K) for 4 and 16 (within 0.2)", source="sec. 3.2",
                 paper="a bound:", metric="gain_per_sqrt_log_k", holds=[("K 16", "<", "K 4", 0.2), ("K 16", ">", "K 4", -0.2)]),
            dict(claim="after a round the policy is as good as its best of K before (0.8 of the way or more)", source="Figure: rounds",
                 paper="plot only:", metric="eval/recovered", holds=[("K 8, one round, as many steps", ">", 0.8)]),
            dict(claim="rounds pay: five beat one of as many steps", source="sec. 4", paper="10 to 18 rounds to converge", metric="eval/gold",
                 holds=[("K 8", ">", "K 8, one round, as many steps")]),
            dict(claim="a KL penalty in the ranking costs reward", source="Table of KL", paper="2.143 to 2.029", metric="eval/proxy",
                 holds=[("K 8, KL in the ranking", "<", "K 8")]),
            dict(claim="local ranking beats global", source="LMFlow PR 460", paper="reported in", metric="eval/gold",
                 holds=[("K 8", ">", "K 8, global")]),
        ],
        panels=[dict(x="eval/kl", y=["eval/gold"], best_of_n=True, arms=["K 2", "K 4", "K 8", "K 16"],
                     title="gold reward against KL, by rounds"),
                dict(x="step", y=["eval/proxy", "eval/round_best"], arms=["K 8"], title="proxy: policy, and best of K before")],
    ),
    "noise": dict(
        question="Which noise in the reward hurts, and does it hurt PPO more?",
        arms={"RAFT": in_rounds(8), "RAFT, prompt noise": in_rounds(8) | {"reward_noise": "prompt"},
              "RAFT, response noise": in_rounds(8) | {"reward_noise": "response"},
              "global": in_rounds(8) | {"ranking": "global"},
              "global, prompt noise": in_rounds(8) | {"ranking": "global", "reward_noise": "prompt"},
              "PPO": {"method": "ppo"}, "PPO, prompt noise": {"method": "ppo", "reward_noise": "prompt"},
              "PPO, response noise": {"method": "ppo", "reward_noise": "response"}},
        claims=[
            dict(claim="a shift of each prompt's rewards changes nothing under local ranking (gold within 0.000001)", source="App. A.3",
                 paper="exact:", metric="eval/gold",
                 holds=[("RAFT, prompt noise", "<", "RAFT", 1e-6), ("RAFT, prompt noise", ">", "RAFT", -1e-6)]),
            dict(claim="and hurts a global ranking", source="ours", paper="-", metric="eval/gold",
                 holds=[("global, prompt noise", "<", "global")]),
            dict(claim="PPO is hurt by it", source="App. A.3", paper="no number checked:", metric="eval/gold",
                 holds=[("PPO, prompt noise", "<", "PPO")]),
            dict(claim="noise of each response hurts RAFT", source="App. A.3", paper="no number checked:", metric="eval/gold",
                 holds=[("RAFT, response noise", "<", "RAFT")]),
            dict(claim="and PPO", source="App. A.3", paper="no number checked:", metric="eval/gold",
                 holds=[("PPO, response noise", "<", "PPO")]),
        ],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward"), dict(kind="bars", y=["eval/proxy"], title="proxy reward")],
    ),
    "Llama 2": dict(
        question="Do versions climb, are rare skills kept, does PPO add to the last version?",
        arms={"last round": ROUNDS, "all rounds": ROUNDS | {"pool": "all"},
              "all rounds, first version": ROUNDS | {"pool": "all", "rounds": 1},
              "all rounds, reward model frozen": ROUNDS | {"pool": "all", "refresh": False},
              "then PPO": {"method": "ppo", "start": "all rounds"}, "PPO alone": {"method": "ppo"}},
        columns={"eval/gold": "gold", "eval/rare_gold": "gold, rare sub-task", "eval/proxy": "proxy", "eval/judge": "judge",
                 "eval/kl": "KL", "eval/fluency": "fluency", "eval/distinct_2": "distinct-2"},
        claims=[
            dict(claim="versions climb: the fifth beats the first", source="Figure 11", paper="plot only:",
                 metric="eval/gold", holds=[("all rounds", ">", "all rounds, first version")]),
            dict(claim="a pool of the last round alone forgets a rare sub-task", source="sec. 3.2.3", paper="no number:",
                 metric="eval/rare_gold", holds=[("all rounds", ">", "last round")]),
            dict(claim="a reward model refreshed by new labels helps", source="sec. 3.2.1", paper="no number:", metric="eval/gold",
                 holds=[("all rounds", ">", "all rounds, reward model frozen")]),
            dict(claim="PPO adds to the last version", source="Figure 11, read off by others", paper="+6 to +12 points of win rate",
                 metric="eval/gold", holds=[("then PPO", ">", "all rounds")]),
            dict(claim="more than PPO alone reaches", source="ours", paper="-", metric="eval/gold", holds=[("then PPO", ">", "PPO alone")]),
        ],
        panels=[dict(x="step", y=["eval/gold", "eval/rare_gold"], arms=["last round", "all rounds"], title="gold by rounds, all and rare"),
                dict(kind="bars", y=["eval/gold"], title="gold reward")],
    ),
}

if __name__ == "__main__":
    common.main(Config, run, EXPERIMENTS)
