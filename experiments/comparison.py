"""All the substitutes side by side: arms, the settings that are tried, and the situations. Data only.

referee/comparison.py reads it; docs/comparison.md says what is done with it.

An arm of ARMS:
    about   what it needs and does, in a table
    arm     what all its settings share
    grid    the settings that are tried: TRIED of all combinations, the default and others drawn at random
    size    options that are divided by 4 for a quarter of the work (whole numbers stay whole)
    passes  the option that says how often the data are used: more often where there are few
    start   the options of the arm whose policy it starts from
    few     what `arm` and `start` have besides where there are few data
"""
TRIED = 12                                   # settings of each arm, on the validation seeds
SEEDS, SECOND_SEEDS = range(12), range(12, 24)                # to report; and to see whether it holds

DT = {"method": "decision_transformer"}
ROUNDS = {"method": "raft", "restart": True, "refresh": True, "pool": "all"}
PPO = {"method": "ppo"}

UNTRAINED = {                                # nothing to tune
    "SFT": {"method": "dpo", "epochs": 0},
    "SFT, temperature 0.5": {"method": "dpo", "epochs": 0, "eval_temperature": 0.5},
    "best of 16": {"method": "referee.best_of_n", "n": 16, "eval_samples": 2},
}

ARMS = {
    # offline, from people's pairs
    "DPO": dict(
        about="people's pairs of SFT samples", arm={"method": "dpo"},
        grid={"lr": (2.5e-4, 5e-4, 1e-3), "epochs": (1.0, 2.0, 3.0), "beta": (0.05, 0.1, 0.3)}),
    "curriculum": dict(
        about="DPO on texts of writers of known strength, easy pairs first",
        arm={"method": "dpo", "pairs": "strong>weak", "hard_pairs": "strong>medium"},
        grid={"lr": (1e-4, 2.5e-4, 5e-4, 1e-3), "epochs": (1.0, 2.0, 3.0), "beta": (0.05, 0.1, 0.3)}),
    # from samples of the SFT policy that the reward model ranks
    "filter": dict(
        about="SFT on the best tenth or so of the samples", arm=DT | {"objective": "filter", "sources": "D"},
        grid={"lr": (1e-3, 2e-3, 4e-3), "epochs": (2.0, 5.0, 10.0), "share": (0.05, 0.1, 0.2),
              "candidates": (8, 16)}),
    "RWR": dict(
        about="SFT on all samples, weighted by reward", arm=DT | {"objective": "rwr", "sources": "D"},
        grid={"lr": (1e-3, 2e-3, 4e-3), "epochs": (1.0, 2.0), "beta": (0.1, 0.3, 1.0),
              "candidates": (8, 16)}),
    "RRHF": dict(
        about="ranked samples", arm={"method": "rrhf", "sources": "D"},
        grid={"lr": (1.5e-3, 3e-3, 6e-3), "epochs": (2.0, 3.0, 6.0), "candidates": (4, 6, 8)}),
    "PRO": dict(
        about="ranked samples", arm={"method": "pro", "sources": "D"},
        grid={"lr": (1.5e-3, 3e-3, 6e-3), "epochs": (2.0, 4.0, 6.0), "candidates": (3, 5, 8)}),
    "RSO": dict(
        about="pairs of samples, chosen by rejection sampling", arm={"method": "rso"},
        grid={"lr": (2.5e-4, 5e-4, 1e-3), "epochs": (1.0, 2.0, 4.0), "gamma": (0.05, 0.2, 0.5),
              "num_samples": (4, 8)}),
    "DPO, proxy labels": dict(
        about="pairs of samples, labelled by the reward model",
        arm={"method": "rso", "source": "sft"},
        grid={"lr": (2.5e-4, 5e-4, 1e-3), "epochs": (1.0, 2.0, 4.0), "gamma": (0.05, 0.2, 0.5),
              "num_samples": (4, 8)}),
    # conditioned on reward or attributes
    "Decision Transformer": dict(
        about="demonstrations, scored by the reward model", arm=DT,
        grid={"lr": (2e-3, 4e-3, 8e-3), "epochs": (1.0, 2.0, 4.0), "demonstrations": (2048, 4096)},
        size=("demonstrations",)),
    "SteerLM": dict(
        about="demonstrations, rated by people or by a model of their ratings",
        arm={"method": "steerlm", "start": "policy", "predictor_epochs": 2.0},
        grid={"lr": (2e-3, 4e-3, 8e-3), "epochs": (1.0, 2.0, 4.0), "rated": (1024, 2048),
              "demonstrations": (2048, 4096)},
        size=("demonstrations", "rated")),
    # in rounds
    "RAFT": dict(
        about="new samples in each round, SFT on each prompt's best", arm={"method": "raft"},
        grid={"lr": (5e-4, 1e-3, 2e-3), "epochs": (1.0, 2.0), "candidates": (4, 8), "rounds": (4, 5, 8)},
        size=("rounds",), passes="rounds"),
    "Llama 2 rounds": dict(
        about="as RAFT, from the SFT policy on the best of all rounds, reward model refreshed", arm=ROUNDS,
        grid={"lr": (5e-4, 1e-3, 2e-3), "epochs": (2.0, 4.0), "candidates": (4, 8), "rounds": (3, 4, 5)},
        size=("rounds",), passes="rounds", few={"refresh": False}),          # it would ask for new labels
    "RRHF IP-3": dict(
        about="RRHF three times, each on new samples", arm={"method": "rrhf", "sources": "D", "rounds": 3},
        grid={"lr": (1.5e-3, 3e-3, 6e-3), "epochs": (1.0, 2.0, 3.0), "candidates": (3, 4, 6)}),
    # reinforcement learning
    "ReMax": dict(
        about="new samples in each step, greedy baseline", arm={"method": "remax"},
        grid={"lr": (2e-3, 4e-3, 8e-3), "epochs": (5.0, 10.0), "kl_coef": (0.02, 0.05, 0.1)}),
    "PPO": dict(
        about="new samples in each step, value model, four passes over them", arm=PPO,
        grid={"lr": (5e-4, 1e-3, 2e-3), "epochs": (2.0, 4.0), "kl_coef": (0.02, 0.05, 0.1)}),
    "PPO, one pass": dict(
        about="the same, one pass over them", arm=PPO | {"ppo_epochs": 1},
        grid={"lr": (1e-3, 2e-3, 4e-3), "epochs": (5.0, 10.0), "kl_coef": (0.02, 0.05, 0.1)}),
    "rounds, then PPO": dict(
        about="half the time for Llama 2 rounds, half for PPO", arm=PPO, start=ROUNDS | {"rounds": 2},
        grid={"lr": (5e-4, 1e-3, 2e-3), "epochs": (1.0, 2.0), "kl_coef": (0.02, 0.05, 0.1)},
        few={"refresh": False, "rounds": 8}),           # of the start: a round has a quarter of the prompts
}

RECIPES = {                                  # the papers' own: about four times the budget
    "Decision Transformer, its recipe": DT,
    "SteerLM, its recipe": {"method": "steerlm"},
}

DEFAULT = "PPO, its defaults"                # its time is the budget; nothing was chosen, so it has no rank
UNRANKED = (*RECIPES, DEFAULT)

LABELS = {                                   # in tables and figures: less than their recipes have
    "Decision Transformer": "Decision Transformer, less data", "SteerLM": "SteerLM, less data"}

FAMILIES = {                                 # in the figure: a colour each; the first is black
    "nothing is trained": [*UNTRAINED],
    "people's pairs": ["DPO", "curriculum"],
    "SFT samples, ranked by the proxy": ["filter", "RWR", "RRHF", "PRO", "RSO", "DPO, proxy labels"],
    "conditioned": [*LABELS.values(), *RECIPES],
    "new samples in rounds": ["RAFT", "Llama 2 rounds", "RRHF IP-3"],
    "reinforcement learning": ["ReMax", "PPO", "PPO, one pass", "rounds, then PPO"],
}

# README's table
MAIN = [*UNTRAINED, "DPO", "RRHF", "PRO", "RSO", "RAFT", "ReMax", "PPO", *LABELS.values(), *RECIPES]

FEW = 64                                     # prompts of 512: an eighth
SITUATIONS = {
    "clean": ("Annotators agree with gold in about 73% of pairs.", {}),
    "noisy labels": ("A quarter of people's labels are reversed, and their ratings err by four levels.",
                     {"label_noise": 0.25, "rating_noise": 4.0}),
    "little data": ("An eighth of the prompts, pairs, samples, demonstrations and ratings.", {"limit": FEW}),
}
MORE_PASSES = (1, 3, 8)                      # little data: tried on the validation seeds, of each arm
