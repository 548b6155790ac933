"""Proximal Policy Optimization Algorithms
Schulman, Wolski, Dhariwal, Radford and Klimov, 2017, https://arxiv.org/abs/1707.06347
for language models as in Ziegler et al., 2019 (https://arxiv.org/abs/1909.08593) and Stiennon et al., 2020
(https://arxiv.org/abs/2009.01325), with the details of "The N Implementation Details of RLHF with PPO" (Huang et al., 2023).

RLHF maximises E[r(x, y)] - kl_coef KL(pi || pi_ref) over the policy's own samples. Each token is an action. Its reward is
its part of the KL penalty, and for the last token also the score of the whole response:

    r_t = -kl_coef (log pi(y_t) - log pi_ref(y_t)) + [t is last] r(x, y)

A value model predicts what is still to come, and the advantage A_t says how much better the token did than that (GAE,
Eq. 11 and 12). A batch of samples then serves several updates; a clip ends the gain from leaving the policy that sampled:

    L = -min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t),   ratio_t = pi(y_t) / pi_old(y_t)           (L^CLIP)

    python ppo.py                    # 20 s on two cores (two minutes more at first): gold 0.18 to 0.93, KL 4.2 nats
    python ppo.py --reproduce        # over-optimisation, frontier, sensitivity: 27 arms, 20 minutes a seed on one core
    python ppo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data Anthropic/hh-rlhf:harmless-base/train.jsonl.gz

What to look at: `objective/scores` rises and `objective/kl` with it. Then run `--kl_coef 0 --lr 3e-3 --epochs 12`: the proxy
climbs on while gold and grammar collapse. That is reward hacking.

Details that make or break it, marked [n] where they happen; lm.py and common.py see to 2, 3, 4 and 6:
 [1] reward and value model read prompt and response    [9] the value model's head starts at 0
 [2] masks come from lengths, not from a padding token [10] a penalty for a response that does not stop
 [3] position ids skip the padding                     [11] the KL penalty is a reward of each token
 [4] dropout is off; sampling stops at EOS             [12] advantages whitened over the mask; rewards too, if asked
 [5] the learning rate falls linearly to 0             [13] discount 1
 [6] rewards have mean 0, deviation 1 on the reference [14] the value loss is clipped
 [7] rollout, minibatch, microbatch                    [15] the KL coefficient can adapt
 [8] the temperature divides the logits in scoring too
Left out: responses of fixed length (here they end at EOS, as in later work), prompts that end at a full stop (the data's
matter), a seed for each process (there is one), TensorFlow's Adam (PyTorch's first steps are larger; AdamW with betas 0.9
and 0.95 and eps 1e-8, as in all scripts here), a trunk shared by policy and value, an entropy bonus, InstructGPT's
pretraining mix (PPO-ptx). Official code (openai/lm-human-preferences): the same estimators, but it whitens rewards by default
and knows no EOS. Whitening and losses are means over all tokens, so long responses weigh more. TRL's former PPO puts the score
one position after EOS; here it is on EOS.
"""
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal, Optional

import torch

import common
from common import UserError, option


@dataclass
class Config(common.Config):
    LR: ClassVar = {"tiny": 1e-3, "real": 3e-6}      # tiny: tuned on validation seed 100; real: TRL's
    EPOCHS: ClassVar = {"tiny": 4.0, "real": 1.0}    # tiny: tuned likewise
    epochs: Optional[float] = option(None, "passes over the training prompts; the default depends on the model")
    batch_size: int = option(128, "prompts, and so responses, of each rollout")
    minibatch_size: Optional[int] = option(None, "responses of each optimizer step; default: half of --batch_size")
    ppo_epochs: int = option(4, "passes over each rollout (Ziegler et al.: 4)")
    kl_coef: float = option(0.05, "weight of the KL penalty (Stiennon et al. and TRL: 0.05)")
    kl_target: Optional[float] = option(None, "adapt kl_coef to keep the KL near this, in nats (Ziegler et al.: 6)")
    kl_horizon: int = option(10000, "episodes over which kl_coef adapts (Ziegler et al.: 10000)")
    gamma: float = option(1.0, "discount of GAE")
    lam: float = option(0.95, "lambda of GAE")
    clip: float = option(0.2, "how far the ratio may leave 1: epsilon of L^CLIP")
    value_clip: float = option(0.2, "how far a value may move from the old one, likewise")
    vf_coef: float = option(0.1, "weight of the value loss")
    missing_eos_penalty: float = option(1.0, "taken from the score of a response that did not stop")
    whiten_rewards: bool = option(False, "divide the token rewards by their standard deviation (Ziegler et al.: yes)")
    value_model: str = option("", "what the value model starts from: directory or hub id; default: the policy")
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = option("linear", "of the learning rate")
    warmup: float = option(0.0, "share of the steps over which the learning rate rises linearly")

    def __post_init__(self):
        super().__post_init__()
        if self.minibatch_size is None:
            self.minibatch_size = self.batch_size if self.batch_size % 2 else self.batch_size // 2
        self.check(lambda value: value >= 0, "not be negative (it would pay the policy for drifting)", "kl_coef")
        self.check(lambda value: value > 0, "be above 0 (the KL is divided by it)", "kl_target")
        self.check(lambda value: value > 0, "be above 0", "minibatch_size", "ppo_epochs", "kl_horizon", "clip", "value_clip")
        self.check(lambda value: 0 <= value <= 1, "be in [0, 1]", "gamma", "lam")
        if self.kl_target is not None and self.kl_coef == 0:
            raise UserError("--kl_target multiplies --kl_coef: it cannot start from --kl_coef 0")
        if self.batch_size % self.minibatch_size:
            raise UserError(f"--batch_size {self.batch_size} is not a multiple of --minibatch_size {self.minibatch_size}")


# Tensors [B, T] have one entry per predicted token; mask is 1 on response tokens, EOS included. What stands outside the mask
# does not matter.

def masked_mean(x, mask):
    """Mean of x where mask is 1, [B, T] -> scalar: every token weighs the same, in long responses and short. 0 if none."""
    return torch.where(mask.bool(), x, 0).sum() / mask.sum().clamp(min=1)


def masked_whiten(x, mask, shift_mean=True):
    """x [B, T] with deviation 1, and mean 0 if shift_mean, over the mask; biased variance plus 1e-8, as in the official code."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


def kl_penalised_rewards(scores, logps, ref_logps, mask, kl_coef):
    """Token rewards: -kl_coef (log pi - log pi_ref) at each token, and the score at the last one.

    Args: scores [B]; logps, ref_logps, mask [B, T].  Returns: [B, T], 0 outside the mask. They sum to score - kl_coef KL.
    """
    rewards = torch.where(mask.bool(), -kl_coef * (logps - ref_logps), 0)
    rows = mask.any(1).nonzero().squeeze(1)
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    rewards[rows, last[rows]] += scores[rows]
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation: A_t = delta_t + gamma lam A_{t+1}.

    Args: rewards, values, mask [B, T]; a row's mask is one run of ones, and what follows it has the value 0.
    Returns: advantages (not whitened) and returns = advantages + values, both [B, T], 0 outside the mask.
    """
    rewards, values = torch.where(mask.bool(), rewards, 0), torch.where(mask.bool(), values, 0)
    advantages, next_value, next_advantage = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                       # Eq. 12
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]            # Eq. 11
        next_value, advantages[:, t] = values[:, t], next_advantage
    return advantages, advantages + values


def policy_loss(new_logps, old_logps, advantages, mask, clip):
    """L^CLIP, negated, and the share of tokens that the clip holds: two scalars, means over all tokens of the mask."""
    ratio = torch.where(mask.bool(), new_logps - old_logps, 0).exp()
    losses = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.maximum(losses, clipped), mask), masked_mean((clipped > losses).to(losses.dtype), mask)


def value_loss(values, old_values, returns, mask, clip):
    """Half the mean over the mask of the larger squared error: the value's, or that of the value cut to old +- clip."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def adapted_kl_coef(kl_coef, kl, target, episodes, horizon):
    """[15] The next KL coefficient, by a controller whose error is cut at 0.2 (Ziegler et al.); kl and target in nats."""
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * episodes / horizon)


def collect(run, prompts, reward, reference, value_model):
    """Sample a response to each prompt, score it, and work out rewards and advantages of its tokens.

    Returns: batch, scores [B] and ended [B] of the rollout; mask, logps, ref_logps, values, advantages and returns [B, T],
        as the networks have them before any update.
    """
    config, policy, device = run.config, run.policy, run.policy.device

    def of_all(function):                                          # in parts, so that no more than one part is in memory
        return common.in_parts(function, batch, config.token_budget, device)

    batch, responses, ended = common.rollout(run, prompts)                                     # [4] until EOS
    mask = batch.response_mask[:, 1:].to(device)                                               # [2]
    scores = reward(prompts, responses).float()                                                # [1] [6]
    common.check_finite(scores, run.step + 1, prompts, "the reward")

    logps = of_all(lambda part: common.token_logps(policy, part, config.temperature))          # [8]
    ref_logps = of_all(lambda part: common.token_logps(reference, part, config.temperature))
    values = of_all(lambda part: common.token_values(value_model, part))                       # [1]

    penalised = (scores - config.missing_eos_penalty * ~ended).to(device)                      # [10]
    rewards = kl_penalised_rewards(penalised, logps, ref_logps, mask, run.state["kl_coef"])    # [11]
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)                               # [12] keeps the mean
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)                 # [13]
    advantages = masked_whiten(advantages, mask)                                               # [12] not the returns
    return SimpleNamespace(batch=batch, scores=scores, ended=ended, mask=mask, logps=logps, ref_logps=ref_logps,
                           values=values, advantages=advantages, returns=returns)


def update(run, old, rows, value_model, first):
    """One optimizer step on the responses `rows` of a rollout; returns what to log, means over their tokens."""
    config, policy = run.config, run.policy
    seen, tokens = 0.0, old.mask[rows].sum()
    for part in (rows[i] for i in old.batch[rows].split(config.token_budget)):                 # [7] microbatches
        batch, mask = old.batch[part].to(policy.device), old.mask[part]
        new_logps = common.token_logps(policy, batch, config.temperature)                      # [8]
        new_values = common.token_values(value_model, batch)
        pg_loss, clip_fraction = policy_loss(new_logps, old.logps[part], old.advantages[part], mask, config.clip)
        vf_loss = value_loss(new_values, old.values[part], old.returns[part], mask, config.value_clip)      # [14]
        share = mask.sum() / tokens                                # of a microbatch in the mean over the minibatch
        ((pg_loss + config.vf_coef * vf_loss) * share).backward()

        log_ratio = (new_logps - old.logps[part]).detach()
        if first:                                                  # no update yet: the policy is still the one that sampled
            tolerance = 1e-3 if policy.compute_dtype != torch.bfloat16 else 0.1
            assert log_ratio.abs().max() < tolerance, "the ratio is not 1 before the first update of a rollout"
        metrics = {"loss/policy": pg_loss, "loss/value": vf_loss, "policy/clipfrac": clip_fraction,
                   "policy/approxkl": 0.5 * masked_mean(log_ratio ** 2, mask),
                   "val/ratio": masked_mean(log_ratio.exp(), mask)}
        seen = seen + share * torch.stack([value.detach() for value in metrics.values()])
        run.counts["tokens_trained"] += int(batch.attention_mask.sum())
    norm = common.optimizer_step(run.trained, run.optimizer, run.schedule, config)
    return dict(zip(metrics, seen)) | {"grad_norm": torch.tensor(norm, device=policy.device)}


def train(run, plan, reward, reference, value_model):
    """Each step: one rollout, then ppo_epochs passes over it in minibatches. `plan` holds the prompts of every step."""
    config = run.config
    run.trained, run.state = torch.nn.ModuleList([run.policy, value_model]), {"kl_coef": config.kl_coef}
    updates = config.ppo_epochs * sum(-(-len(prompts) // config.minibatch_size) for prompts in plan)   # rounded up
    for step, prompts in common.steps(run, plan, updates=updates):                             # [5]
        old = collect(run, prompts, reward, reference, value_model)
        seen = []
        for _ in range(config.ppo_epochs):
            for rows in torch.randperm(len(prompts)).split(config.minibatch_size):             # [7] minibatches
                seen.append(update(run, old, rows, value_model, first=not seen))

        kl, kl_coef = ((old.logps - old.ref_logps) * old.mask).sum(1).mean().item(), run.state["kl_coef"]
        errors, spread = (x - masked_mean(x, old.mask) for x in (old.returns - old.values, old.returns))
        unexplained = masked_mean(errors ** 2, old.mask) / masked_mean(spread ** 2, old.mask).clamp(min=1e-8)
        common.log(run, step, {
            "objective/scores": old.scores.mean(), "objective/kl": kl, "objective/kl_coef": kl_coef,
            "objective/entropy": masked_mean(-old.logps, old.mask),     # a token's, from the samples: needs no logits
            "val/explained_variance": 1 - unexplained, "eos_rate": old.ended.float().mean(),
        } | {name: torch.stack([metrics[name] for metrics in seen]).mean() for name in seen[0]})
        if config.kl_target is not None:
            run.state["kl_coef"] = adapted_kl_coef(kl_coef, kl, config.kl_target, len(prompts), config.kl_horizon)


def run(config):
    """One training run; returns the metrics after it, and the trace of evaluations."""
    run = common.start(config)
    plan = common.plan_of(run.task.prompts["train"], config)
    value_model = common.load_value_model(config.value_model or common.policy_path(config), config, run.tokenizer)   # [9]
    train(run, plan, common.reward_to_maximise(run), common.load_reference(config), value_model)
    return common.finish(run)


BETAS = [0.05, 0.1, 0.3]

# Around both methods' defaults: lr times 3 or 1/3, weight of the KL times 4 or 1/4, all of the epochs or half of them.
PPO_GRID = {f"PPO lr {lr:.2g}, KL {kl:g}, {n} epochs": {"lr": lr, "kl_coef": kl, "ppo_epochs": n}
            for lr in (3.3e-4, 3e-3) for kl in (0.0125, 0.2) for n in (2, 4)}
DPO_GRID = {f"DPO lr {lr:.2g}, beta {beta:g}, {n} epochs": {"method": "dpo", "lr": lr, "beta": beta, "epochs": n}
            for lr in (1.7e-4, 1.5e-3) for beta in (0.025, 0.4) for n in (1, 2)}

EXPERIMENTS = {
    "over-optimisation": dict(
        question="What does the KL penalty buy, and when does the proxy stop meaning gold?",
        arms={f"KL {kl:g}": {"epochs": 6, "eval_every": 2, "kl_coef": kl} for kl in (0.0, 0.02, 0.2, 2.0)} | {
            "pushed": {"epochs": 12, "eval_every": 4, "kl_coef": 0.0, "lr": 3e-3}},      # KL 0, twice as long, thrice the lr
        claims=[
            dict(claim="without a penalty gold turns over (it falls in the second half of training)",
                 source="Gao et al., sec. 3", paper="plot only:", metric="eval/gold:second_half",
                 holds=[("KL 0", "<", 0.0)]),
            dict(claim="while the proxy keeps rising", source="Gao et al., sec. 3", paper="plot only:",
                 metric="eval/proxy:second_half", holds=[("KL 0", ">", 0.0)]),
            dict(claim="pushed on, gold ends below its start", source="Gao et al., sec. 3", paper="plot only:",
                 metric="eval/gold:change", holds=[("pushed", "<", 0.0)]),
            dict(claim="at the highest proxy reward of all arms", source="ours", paper="-", metric="eval/proxy",
                 holds=[("pushed", ">", f"KL {kl:g}") for kl in (0.0, 0.02, 0.2, 2.0)]),
            dict(claim="the penalty does not move the gold-KL frontier (at equal KL, within 0.1 of the unpenalised run)",
                 source="Gao et al., sec. 3.6", paper="plot only:", metric="eval/gold", at="eval/kl",
                 holds=[(f"KL {kl}", *side) for kl in (0.02, 0.2) for side in (("<", "KL 0", 0.1), (">", "KL 0", -0.1))]),
            dict(claim="no penalty and a large one are both poor", source="InstructGPT, E.7", paper="no number checked:",
                 metric="eval/gold", holds=[("KL 0.2", ">", "KL 0"), ("KL 0.2", ">", "KL 2")]),
        ],
        panels=[dict(x="eval/kl", y=["eval/gold"], best_of_n=True, title="gold reward against KL"),
                dict(x="eval/kl", y=["eval/proxy"], best_of_n=True, title="proxy reward against KL"),
                dict(x="step", y=["eval/gold"], title="gold reward over training")],
    ),
    "frontier": dict(
        question="How much gold does a nat of KL buy: PPO, PPO on the true reward, or DPO?",
        arms={f"DPO beta {beta:g}": {"method": "dpo", "beta": beta} for beta in BETAS} | {
            "PPO": {"eval_every": 2},
            "PPO on gold": {"eval_every": 2, "reward": "gold"},
            "DPO, then PPO": {"start": "DPO beta 0.1"}},
        claims=[
            dict(claim="PPO raises gold", source="Stiennon et al.", paper="no number checked:",
                 metric="eval/gold:change", holds=[("PPO", ">", 0.0)]),
            dict(claim="DPO has more gold than PPO at equal KL", source="DPO, IMDb frontier", paper="plot only:",
                 metric="eval/gold", at="eval/kl", holds=[(f"DPO beta {beta:g}", ">", "PPO") for beta in BETAS]),
            dict(claim="even than PPO on the true reward", source="DPO, IMDb frontier", paper="plot only:",
                 metric="eval/gold", at="eval/kl", holds=[(f"DPO beta {beta:g}", ">", "PPO on gold") for beta in BETAS]),
            dict(claim="PPO adds gold on top of DPO", source="ours", paper="-", metric="eval/gold:change",
                 holds=[("DPO, then PPO", ">", 0.0)]),
        ],
        panels=[dict(x="eval/kl", y=["eval/gold"], best_of_n=True, title="gold reward against KL",
                     arms=[f"DPO beta {beta:g}" for beta in BETAS] + ["PPO", "PPO on gold"])],
    ),
    "sensitivity": dict(
        question="Is PPO touchier than DPO: how far does final gold spread over a grid around the defaults?",
        arms=PPO_GRID | DPO_GRID,
        spreads={"PPO's spread": list(PPO_GRID), "DPO's spread": list(DPO_GRID)},
        claims=[dict(claim="final gold spreads further over PPO's grid (standard deviation of eight settings)",
                     source="folklore; InstructGPT, E.9", paper="-", metric="eval/gold",
                     holds=[("PPO's spread", ">", "DPO's spread")])],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward"), dict(kind="bars", y=["eval/kl"], title="KL")],
    ),
}

if __name__ == "__main__":
    common.main(Config, run, EXPERIMENTS)
