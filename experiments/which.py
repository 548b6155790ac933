"""What the comparison says: which method when, and what surprised us. Data only.

referee/which.py makes the tables. Evidence compares arms of experiments/comparison.py, as the claims of
EXPERIMENTS do. A test holds each of them against the stored runs, so a sentence that they no longer support is
noticed.
"""
GOLD, MB, COST = "eval/gold", "state_mb", "cpu_seconds"
CLEAN, NOISY, LITTLE = "clean", "noisy labels", "little data"

# (you have, in Chinese, use, in Chinese, the arm that this is, [(situation, metric, op, other arm)])
WHICH = [
    ("nothing but the model", "只有模型",
     "sample at temperature 0.5: it costs nothing. Compare every method with it",
     "把采样温度降到 0.5：没有成本。其他方法都应该与它比较",
     "SFT, temperature 0.5", [(CLEAN, GOLD, ">", "SFT")]),
    ("pairs (chosen, rejected) and one evening", "偏好对和一个晚上",
     "`dpo.py --reward none`: no sampling, no reward model", "`dpo.py --reward none`：不采样，也不需要奖励模型",
     "DPO", [(CLEAN, GOLD, ">", "SFT, temperature 0.5")]),
    ("answers of a strong and of weaker models, no labels", "强弱不同的模型的回答，没有标注",
     "`dpo.py` on pairs whose chosen answer is the stronger model's, easy pairs first (`--hard_pairs`)",
     "`dpo.py`：强模型的回答作 chosen，弱模型的作 rejected，由易到难（`--hard_pairs`）",
     "curriculum", [(CLEAN, GOLD, ">", "DPO"), (LITTLE, GOLD, ">", "DPO")]),
    ("a reward model, no time to train", "奖励模型，没有时间训练",
     "best of n: sample 16 answers, keep the one with the highest score",
     "best of n（n 选一）：采样 16 个回答，留下得分最高的一个",
     "best of 16", [(CLEAN, GOLD, ">", "DPO")]),
    ("many answers with one score each, no wish to sample", "大量带分数的回答，不想采样",
     "`decision_transformer.py --objective rwr`: SFT on all of them, weighted by their scores",
     "`decision_transformer.py --objective rwr`：对全部回答做 SFT，按分数加权",
     "RWR", [(CLEAN, GOLD, ">", "RRHF"), (CLEAN, GOLD, ">", "PRO")]),
    ("a reward model and one GPU; you want a simple loop", "奖励模型和一张 GPU，希望流程简单",
     "`raft.py`: it samples, keeps each prompt's best, fine-tunes, and repeats",
     "`raft.py`：采样、择优、微调，如此重复",
     "RAFT", [(CLEAN, GOLD, ">", "RWR"), (CLEAN, COST, "<", "PPO")]),
    ("a reward model; you want the highest reward", "奖励模型，希望奖励尽量高",
     "`ppo.py --ppo_epochs 1`. Watch `kl` and the texts", "`ppo.py --ppo_epochs 1`。要留意 `kl` 和生成的文本",
     "PPO, one pass", [(CLEAN, GOLD, ">", "RAFT"), (CLEAN, COST, "<", "PPO")]),
    ("the same, but PPO does not fit into memory", "同上，但显存放不下 PPO",
     "`remax.py`: it trains no value model", "`remax.py`：不训练价值模型",
     "ReMax", [(CLEAN, MB, "<", "PPO"), (CLEAN, GOLD, ">", "DPO")]),
    ("people's labels, of which many are wrong", "人的标注，其中很多是错的",
     "`dpo.py` on the pairs themselves, not a reward model that was trained on them",
     "`dpo.py`：直接用偏好对，不用由它们训练出的奖励模型",
     "DPO", [(NOISY, GOLD, ">", "RWR"), (NOISY, GOLD, ">", "RRHF")]),
    ("ratings of several attributes; users choose the levels when they ask",
     "多个属性的评分，希望用户提问时能指定等级",
     "`steerlm.py` in place of SFT, with `--quality NAME` for the attribute that means \"better\"",
     "`steerlm.py`，代替 SFT；用 `--quality NAME` 指出哪个属性表示“更好”",
     "SteerLM, its recipe", [(CLEAN, GOLD, ">", "DPO"), (NOISY, GOLD, ">", "DPO")]),
]

# (what surprised us, [(situation, metric, arm, op, other arm, margin of "=")], what explains it)
SURPRISES = [
    ("A lower temperature, which costs nothing, gives a third of what the best method gives",
     [(CLEAN, GOLD, "SFT, temperature 0.5", ">", "SFT"), (CLEAN, GOLD, "PPO, one pass", ">", "SFT")],
     "Gold is -1 for a text that the grammar cannot parse, and at temperature 0.5 nearly all texts parse."),
    ("Where many labels are wrong, maximising the reward model gives less than DPO on the same labels",
     [(NOISY, GOLD, "DPO", ">", "RWR"), (NOISY, GOLD, "DPO", ">", "PPO")],
     "The reward model's order of samples falls more than that of DPO's implicit reward "
     "(`python benchmarks/noisy_labels.py`, below)."),
]
