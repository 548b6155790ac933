"""The main arms on a real chat model and real prompts; gold is what a function computes. Data only.

referee/real_text.py reads it; docs/comparison.md says how to run it. The settings are meant for a model of
135 million weights on one core: one to four passes over a hundred prompts, ten to twenty-five minutes an arm
and seed. Equal times were the aim; ReMax and PPO took more than twice as long as the others. LoRA, so that
many runs fit on a disk. What samples makes few rounds or steps, because a core writes only some tens of
tokens a second. Longer to evaluate than to train are best of 8, and the Decision Transformer, which answers
for every level.

What is too small, in all that comes of it:
    settings   nothing was tuned. The learning rates are guesses, so an arm that stays behind may only have
               the wrong one
    steps      some tens of optimizer steps, where the papers make thousands
    proxy      a reward model from a few hundred pairs of a hundred prompts, whose annotators err. It knows
               little, so the arms that maximise it are held back
    data       the prompts of a seed are drawn from one folder, so the seeds are not independent of each other
    answers    at most 40 tokens; the training answers are those that end within what the folder was made with
    test       64 prompts with 2 answers each
    seeds      with 3 seeds an interval is 4.3 standard errors wide, on either side

An arm of ARMS has `about` and the options of its method; `rows` is "rated" where it learns from rated
answers, else it learns from pairs. QUICK replaces these constants in a trial of the whole way (--quick True):
its numbers mean nothing.
"""
PROMPTS = 96                                 # train prompts of a seed, of those that have a pair

SHARED = {"lora_rank": 16, "max_length": 256, "max_new_tokens": 40, "token_budget": 1024, "eval_prompts": 64,
          "eval_samples": 2}

PROXY = {"lr": 5e-4, "epochs": 2.0, "batch_size": 8, "schedule": "linear"}           # once for each seed

DPO = {"method": "dpo"}
ARMS = {
    "SFT": dict(about="the chat model as it came", **DPO, epochs=0.0),
    "best of 8": dict(about="the model, asked 8 times; the proxy chooses", method="referee.best_of_n", n=8,
                      eval_samples=1),
    "DPO": dict(about="pairs of the model's answers, judged by annotators", **DPO, lr=3e-4, epochs=1.0,
                batch_size=8),
    "RRHF": dict(about="4 new answers to each prompt, ranked by the proxy", method="rrhf", sources="D",
                 candidates=4, lr=5e-4, epochs=2.0, batch_size=8),
    "RAFT": dict(about="in 3 rounds, the best of 4 new answers to each of 32 prompts", method="raft",
                 rounds=3, prompts=32, candidates=4, lr=1e-3, epochs=2.0, batch_size=8),
    "ReMax": dict(about="a new answer to each prompt, with a greedy one as its baseline", method="remax",
                  lr=5e-4, epochs=4.0, batch_size=8),
    "PPO": dict(about="a new answer to each prompt, two passes over it, a value model", method="ppo",
                lr=5e-4, epochs=3.0, batch_size=16, minibatch_size=8, ppo_epochs=2),
    "Decision Transformer": dict(about="the rated answers, scored by the proxy in their place", rows="rated",
                                 method="decision_transformer", sources="S", bins=3, validation=0.0,
                                 lr=1e-3, epochs=2.0, batch_size=8),
    "SteerLM": dict(about="the rated answers with their annotators' ratings", rows="rated", method="steerlm",
                    labels="human", quality="obedience", lr=1e-3, epochs=2.0, batch_size=8),
}

QUICK = dict(
    PROMPTS=6, PROXY=PROXY | {"epochs": 1.0},
    SHARED=SHARED | {"lora_rank": 2, "max_new_tokens": 8, "eval_prompts": 3, "eval_samples": 1},
    ARMS={name: arm | {"batch_size": 4} | {k: arm[k] and 1.0 for k in {"epochs"} & {*arm}}
          | {k: 2 for k in {"n", "candidates", "rounds", "minibatch_size", "bins"} & {*arm}}
          | {k: 3 for k in {"prompts"} & {*arm}} for name, arm in ARMS.items()})
