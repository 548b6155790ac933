"""What a survey of RLHF's substitutes says, which claims test it, and what each substitute needs. Data only.

referee/survey.py makes tables of it, in English and in Chinese.
"""
# Claims that only the comparison of all methods can test: {claim: as in EXPERIMENTS, arms of comparison.py}
COMPARED = {
    "RRHF has more gold than PPO, within one budget of time": dict(
        metric="eval/gold", holds=[("RRHF", ">", "PPO")]),
    "and trains fewer MB": dict(metric="state_mb", holds=[("RRHF", "<", "PPO")]),
    "DPO has more gold than PPO, within one budget of time": dict(
        metric="eval/gold", holds=[("DPO", ">", "PPO")]),
    "with the data that fit one budget of time, the Decision Transformer has more gold than PPO": dict(
        metric="eval/gold", holds=[("Decision Transformer, less data", ">", "PPO")]),
    "its own recipe, in more than three times the time, has more gold than PPO": dict(
        metric="eval/gold", holds=[("Decision Transformer, its recipe", ">", "PPO")]),
    "its own recipe, in more than four times the time, has more gold than PPO": dict(
        metric="eval/gold", holds=[("SteerLM, its recipe", ">", "PPO")]),
    "within one budget of time, RSO has more gold than DPO on proxy labels, each with its own settings": dict(
        metric="eval/gold", holds=[("RSO", ">", "DPO, proxy labels")]),
    "within one budget of time, half for rounds and half for PPO give more gold than rounds alone": dict(
        metric="eval/gold", holds=[("rounds, then PPO", ">", "Llama 2 rounds")]),
    "and more than PPO alone": dict(metric="eval/gold", holds=[("rounds, then PPO", ">", "PPO")]),
    "within one budget of time, ReMax has more gold than PPO": dict(
        metric="eval/gold", holds=[("ReMax", ">", "PPO")]),
}

# (in English, in Chinese, its tests). A test is (method, claim, the claim in Chinese). `claim` is the
# text of a claim in experiments/<method>.py; for the method "comparison" one of COMPARED.
STATEMENTS = [
    ("RRHF is slightly above PPO, cheap and stable", "RRHF 略优于 PPO，成本低，训练稳定", [
        ("comparison", "RRHF has more gold than PPO, within one budget of time",
         "在同样的时间预算内，RRHF 的 gold 高于 PPO"),
        ("comparison", "and trains fewer MB", "RRHF 的训练状态（MB）小于 PPO")]),
    ("RRHF's ranking loss alone destroys the model", "RRHF 只用排序损失，模型会崩溃", [
        ("rrhf", "ranking alone destroys the language model: gold falls below SFT's",
         "去掉 SFT 损失，gold 低于 SFT 策略"),
        ("rrhf", "and fluency falls by a tenth or more", "去掉 SFT 损失，流畅度比 SFT 策略低 0.1 以上")]),
    ("RRHF gains from each new round of samples (IP-3)", "RRHF 用训练后的策略重新采样，轮数越多越好（IP-3）", [
        ("rrhf", "sampling again from the trained policy helps: 3 > 2 > 1 (proxy)",
         "按 proxy 计，三轮优于两轮，两轮优于一轮")]),
    ("own samples beat others'", "用自己的样本比用别人的好", [
        ("rrhf", "own samples beat the data's own answers (proxy)",
         "按 proxy 计，用自己的样本训练优于用数据自带的回答"),
        ("rso", "SFT samples beat the data's own pairs, under every loss",
         "三种损失下，用 SFT 策略的样本训练，胜率都高于用数据自带的偏好对训练")]),
    ("DPO is less sensitive and reaches a better reward", "DPO 对超参数不那么敏感，奖励更高", [
        ("dpo", "gold rises above SFT at every beta", "试过的每个 β，gold 都高于 SFT 策略"),
        ("dpo", "on pairs labelled by gold it has more gold than PPO on gold, at equal KL",
         "偏好对由 gold 标注，KL 相等时，gold 高于直接以 gold 为奖励的 PPO"),
        ("comparison", "DPO has more gold than PPO, within one budget of time",
         "在同样的时间预算内，DPO 的 gold 高于 PPO")]),
    ("contrast goes beyond SFT on the strong model; from easy to hard is best",
     "对比后训练能超过只模仿强模型的 SFT；偏好对按由易到难的顺序最好", [
         ("dpo", "where SFT on the strong writer saturates, DPO on strong>weak steps beyond it",
          "模仿强写手的 SFT 饱和以后，再用“强>弱”的偏好对做 DPO，gold 继续上升"),
         ("dpo", "easy to hard beats either kind of pair alone", "由易到难训练，gold 高于只用其中任何一种偏好对"),
         ("dpo", "easy to hard beats the other order", "由易到难训练，gold 高于由难到易")]),
    ("the constraint matters more than the loss", "用参考策略约束训练，比损失函数取哪种形式更重要", [
        ("rso", "hacking: the hinge without a reference wins most by the proxy",
         "没有参考策略的 hinge 损失，按 proxy 的胜率最高（奖励黑客）"),
        ("rso", "but less than the others by the judge", "没有参考策略的 hinge 损失，按 judge 的胜率低于另外两种损失"),
        ("rso", "the two losses with a reference are level (win rate, within 0.05)",
         "有参考策略的两种损失不分高下（胜率相差不到 0.05）")]),
    ("rejection sampling gives two points more", "拒绝采样再提高 2 个百分点", [
        ("rso", "rejection sampling beats SFT samples, under every loss",
         "三种损失下，用拒绝采样选出的样本训练，胜率都高于直接用 SFT 策略的样本训练（2 个百分点即 0.02）"),
        ("comparison",
         "within one budget of time, RSO has more gold than DPO on proxy labels, each with its own settings",
         "在同样的时间预算内，RSO 的 gold 高于用 proxy 标注偏好对的 DPO（两者各用调参选出的设置）")]),
    ("rounds of best-of-n gain, and PPO after them gains again", "多轮拒绝采样微调能提升效果，之后再做 PPO 还能再提升", [
        ("raft", "versions climb: the fifth has more gold than the second (half-way)",
         "第五版（最后一版）的 gold 高于第二版（约在训练的一半处）"),
        ("raft", "PPO adds to the last version", "在最后一版上再做 PPO，gold 更高"),
        ("comparison",
         "within one budget of time, half for rounds and half for PPO give more gold than rounds alone",
         "在同样的时间预算内，一半用于多轮拒绝采样、一半用于 PPO，gold 高于只做多轮拒绝采样"),
        ("comparison", "and more than PPO alone", "同样各用一半时间，gold 高于只做 PPO")]),
    ("ReMax saves memory and time, and is better at 1.3B", "ReMax 省显存、省时间，1.3B 上效果更好", [
        ("remax", "less memory for weights, gradients and optimizer (MB)",
         "权重、梯度、优化器状态的合计大小（MB）小于每批只更新一次的 PPO"),
        ("remax", "less CPU time", "CPU 时间少于每批只更新一次的 PPO"),
        ("remax", "no less gold than PPO with one update a batch, for equal prompts (within 0.1)",
         "提示一样多时，gold 不低于每批只更新一次的 PPO（容许低 0.1）"),
        ("comparison", "within one budget of time, ReMax has more gold than PPO",
         "在同样的时间预算内，ReMax 的 gold 高于 PPO")]),
    ("the Decision Transformer is above PPO", "Decision Transformer 优于 PPO", [
        ("decision_transformer", "it is comparable to PPO (gold, within 0.1)",
         "与 PPO 相当（gold 相差不到 0.1；论文第 2 版的说法）"),
        ("comparison",
         "with the data that fit one budget of time, the Decision Transformer has more gold than PPO",
         "在同样的时间预算内（数据相应减少），Decision Transformer 的 gold 高于 PPO"),
        ("comparison", "its own recipe, in more than three times the time, has more gold than PPO",
         "按论文的做法训练，时间是 PPO 的三倍多，gold 高于 PPO")]),
    ("SteerLM is above RLHF", "SteerLM 优于 RLHF", [
        ("steerlm", "it beats RLHF", "gold 高于 PPO"),
        ("comparison", "its own recipe, in more than four times the time, has more gold than PPO",
         "按论文的做法训练，时间是 PPO 的四倍多，gold 高于 PPO")]),
    ("the reward model is the bottleneck: it agrees with people in 70% of pairs",
     "奖励模型是瓶颈：与人的一致率只有 70% 左右", [
         ("ppo", "while the proxy keeps rising", "没有 KL 惩罚的 PPO，在训练的后一半，proxy 还在上升"),
         ("ppo", "without a penalty gold turns over (it falls in the second half of training)",
          "没有 KL 惩罚的 PPO，在训练的后一半，gold 下降"),
         ("raft", "a reward model refreshed by new labels helps", "多轮拒绝采样时，用新标注更新奖励模型，gold 更高")]),
]

# The substitutes in the survey's order: name, method, (experiment, arm) or None for the default run, and in
# Chinese: reward model? samples? reference policy? value model? form of the data.
EACH_ROUND, BEFORE = "每轮一次", "训练前一次"
SUBSTITUTES = [
    ("RRHF", "rrhf", None, ("打分用；数据有分数时不用", BEFORE, "不用", "不用", "每个提示有多条回答和分数")),
    ("RRHF IP-3", "rrhf", ("sources", "IP-3"),
     ("打分用", "三轮，每轮一次", "不用", "不用", "同上，加每轮的新样本")),
    ("PRO", "pro", None, ("打分用；数据有分数时不用", BEFORE, "不用", "不用", "每个提示有多条回答和排序")),
    ("DPO", "dpo", None, ("不用", "不用", "用，训练前算一次", "不用", "偏好对")),
    ("DPO 课程学习，由易到难", "dpo", ("curriculum", "easy to hard"),
     ("不用", "不用", "用，训练前算一次", "不用", "强弱不同的写手的回答，无需标注")),
    ("RSO", "rso", None, ("用", BEFORE, "用（hinge 除外），训练前算一次", "不用", "提示")),
    ("RAFT", "raft", None, ("用", EACH_ROUND, "不用（设 `--kl_coef` 时才用）", "不用", "提示")),
    ("Llama 2 多轮拒绝采样", "raft", ("Llama 2", "all rounds"),
     ("用，每轮更新", EACH_ROUND, "不用；每轮从初始策略重新训练", "不用", "提示，每轮的新标注")),
    ("ReMax", "remax", None, ("用", "每批，一个提示两条", "用", "不用", "提示")),
    ("PPO", "ppo", None, ("用", "每批，一个提示一条", "用", "用", "提示")),
    ("Decision Transformer", "decision_transformer", None,
     ("打分用；数据有分数时不用", "训练时不用，选等级时用", "不用", "不用", "回答，各有一个分数")),
    ("SteerLM", "steerlm", None, ("不用；用属性预测模型", "不用", "不用", "不用", "回答，部分有多个属性的评分")),
]
