"""What the comparison says: which method when, and what surprised us. Data only.

referee/which.py makes the tables. Evidence compares arms of experiments/comparison.py, as the claims of
EXPERIMENTS do. A test holds each of them against the stored runs, so a sentence that they no longer support
is noticed. "?" says that neither arm is shown to have more. The sentences were written after these runs were
seen.
"""
GOLD, MB, COST = "eval/gold", "state_mb", "cpu_seconds"
CLEAN, NOISY, LITTLE = "clean", "noisy labels", "little data"

# (you have, in Chinese, use, in Chinese, the arm that this is, [(situation, metric, op, other arm)])
WHICH = [
    ("nothing but the model", "只有模型",
     "sample at temperature 0.5: no training. Compare every method with it",
     "把采样温度降到 0.5：不用训练。其他方法都应该与它比较",
     "SFT, temperature 0.5", [(CLEAN, GOLD, ">", "SFT")]),
    ("a few thousand pairs (chosen, rejected); you want neither a reward model nor sampling",
     "几千个偏好对；不想训练奖励模型，也不想采样",
     "`dpo.py --reward none` learns from the pairs directly. Read the texts: fluency fell below our limit on "
     "8 of 24 seeds",
     "`dpo.py --reward none`，直接用偏好对训练。要看生成的文本：24 个种子里有 8 个的流畅度低于调参时的下限",
     "DPO", [(CLEAN, GOLD, ">", "SFT, temperature 0.5")]),
    ("answers of a strong and of weaker models, no labels", "强弱不同的模型的回答，没有标注",
     "`dpo.py` on pairs whose chosen answer is the stronger model's (`--pairs \"STRONG>WEAK\"`; what was "
     "measured has `--hard_pairs \"STRONG>MEDIUM\"`, too). Plain SFT on the stronger model's answers "
     "(`--loss sft`) gave about as much; DPO after it gave more (page of DPO)",
     "`dpo.py`：强模型的回答作 chosen，弱模型的作 rejected（`--pairs \"STRONG>WEAK\"`；"
     "右栏实测的课程学习还加了 `--hard_pairs \"STRONG>MEDIUM\"`）。只用强模型的回答做 SFT"
     "（加 `--loss sft`），效果差不多；在它之后再用 DPO，效果更好（见 DPO 的页面）",
     "curriculum", [(CLEAN, GOLD, ">", "DPO"), (LITTLE, GOLD, ">", "DPO")]),
    ("a reward model, no time to train", "奖励模型，没有时间训练",
     "best of n, wherever you sample (no script here): of 16 answers keep the one with the highest score",
     "best of n（n 选 1）：在你自己的采样代码里实现，本项目没有单独的脚本。每个提示采样 16 个回答，留下得分最高的一个",
     "best of 16", [(CLEAN, GOLD, ">", "DPO")]),
    ("many answers to each prompt and a reward model; no wish to sample again",
     "每个提示有很多回答，有奖励模型，不想再采样",
     "`decision_transformer.py --objective filter --sources S --reward MODEL`: SFT on the best tenth of them",
     "`decision_transformer.py --objective filter --sources S --reward MODEL`：只对最好的十分之一做 SFT",
     "filter", [(CLEAN, GOLD, ">", "RRHF"), (CLEAN, GOLD, ">", "PRO")]),
    ("a reward model; you want a simple loop", "奖励模型，希望流程简单",
     "`raft.py`: it samples, keeps each prompt's best, fine-tunes, and repeats",
     "`raft.py`：采样、择优、微调，如此重复",
     "RAFT", [(CLEAN, GOLD, ">", "RWR"), (CLEAN, GOLD, ">", "filter")]),
    ("a reward model; you want the most gold", "奖励模型，希望 gold 尽量高",
     "`ppo.py --kl_coef 0.1` or `remax.py --lr 4e-3 --kl_coef 0.1`: we could not tell them apart. With the "
     "default `--kl_coef` of PPO one of three validation seeds broke the language. With `--ppo_epochs 1` and "
     "twice the `--lr`, PPO takes half the time. Watch `kl` and read the texts: they became shorter and more "
     "alike",
     "`ppo.py --kl_coef 0.1` 或 `remax.py --lr 4e-3 --kl_coef 0.1`：我们分不出高低。用 PPO 默认的 `--kl_coef` 时，3 个验证种子里"
     "有 1 个崩溃，输出不再通顺。"
     "加 `--ppo_epochs 1` 并把 `--lr` 加倍，PPO 的时间减半。要留意 `kl` 和文本：文本变短了，彼此也更相似",
     "PPO",
     [(CLEAN, GOLD, ">", "best of 16"), (CLEAN, GOLD, "?", "ReMax"), (CLEAN, GOLD, "?", "PPO, one pass")]),
    ("the same, but PPO does not fit into memory", "同上，但显存放不下 PPO",
     "`remax.py --lr 4e-3 --kl_coef 0.1`: it trains no value model. Read the texts: with noisy labels it "
     "broke the language on one seed of twelve",
     "`remax.py --lr 4e-3 --kl_coef 0.1`：不训练价值模型。要看生成的文本：标注噪声大时，12 个种子里有 1 个崩溃，输出不再通顺",
     "ReMax", [(CLEAN, MB, "<", "PPO"), (CLEAN, GOLD, "?", "PPO")]),
    ("labels of which many are wrong", "标注，其中很多是错的",
     "`ppo.py`, with one pass or with four, still had more gold than DPO, but its gold differs much between "
     "seeds: check the reward model on pairs that you trust. DPO was not shown to have more gold than SFT "
     "at temperature 0.5. If you have answers of a strong and of a weaker model, use these: there is no "
     "label to get wrong",
     "`ppo.py`（每批样本用四遍，或加 `--ppo_epochs 1` 只用一遍）的 gold 仍然高于 DPO，但不同种子相差很大：先用可信的偏好对检查奖励模型。DPO 的 gold 没有被证实"
     "高于温度 0.5 的 SFT。如果有强模型和弱模型的回答，就用它们：没有标注，也就没有错标",
     "PPO, one pass",
     [(NOISY, GOLD, ">", "DPO"), (NOISY, GOLD, ">", "SFT, temperature 0.5"), (NOISY, GOLD, "?", "PPO"),
      (NOISY, GOLD, "?", "curriculum")]),
    ("64 prompts and a few hundred pairs", "64 个提示和几百个偏好对",
     "`python -m referee mine` tries several methods. Try `--eval_temperature 0.5` too: at temperature 1 "
     "only the curriculum, which has other data, was shown to have more gold than SFT at 0.5 has",
     "`python -m referee mine` 会试几种方法。再试 `--eval_temperature 0.5`：温度为 1 时，只有 DPO 课程学习"
     "（用的是别的数据）的 gold 被证实高于温度 0.5 的 SFT",
     "SFT, temperature 0.5", [(LITTLE, GOLD, ">", "DPO"), (LITTLE, GOLD, "<", "curriculum")]),
    ("ratings of several attributes; users choose the levels when they ask",
     "多个属性的评分，希望用户提问时能指定等级",
     "`steerlm.py` in place of SFT, with `--quality NAME` for the attribute that means \"better\"",
     "`steerlm.py`，代替 SFT；用 `--quality NAME` 指出哪个属性表示“更好”",
     "SteerLM, its recipe", [(CLEAN, GOLD, ">", "DPO"), (CLEAN, GOLD, ">", "SteerLM, less data")]),
]

# (what surprised us, [(situation, metric, arm, op, other arm, margin of "=")], what explains it)
SURPRISES = [
    ("A lower temperature needs no training and gives nearly a third of what PPO gives. With little data it "
     "has more gold than most methods.",
     [(CLEAN, GOLD, "SFT, temperature 0.5", ">", "SFT"), (CLEAN, GOLD, "PPO, one pass", ">", "SFT"),
      (LITTLE, GOLD, "SFT, temperature 0.5", ">", "DPO"),
      (LITTLE, GOLD, "SFT, temperature 0.5", ">", "RRHF")],
     "The likely word is the one that keeps to the topic and to the grammar. At temperature 0.5 more texts "
     "name what the prompt asks for, and nearly all parse (the table below). Their sentiment stays as it "
     "was. All other arms are sampled at temperature 1; a lower one can be added to them ([dpo](dpo.md))."),
    ("SteerLM by its recipe maximises no reward model and has at least as much gold as PPO. Its training "
     "takes more than four times as long as PPO's. But SFT and PPO's reward model are not counted (about 40 "
     "and 23 seconds here): with them, the two take about as long.",
     [(CLEAN, GOLD, "SteerLM, its recipe", ">", "PPO"),
      (CLEAN, GOLD, "SteerLM, its recipe", "?", "ReMax"),
      (CLEAN, COST, "SteerLM, its recipe", ">", "PPO")],
     "The reward model sees sentiment and little else ([protocol](protocol.md#what-the-proxy-sees)), so what "
     "maximises it gains no topic (the table below). SteerLM's raters give each attribute a number of its "
     "own, and its policy is asked for a high one of each. It has more topic than PPO, and less sentiment. "
     "We made no run with a single attribute, so this reason is not tested. Two of its three attributes are "
     "close to parts of gold."),
    ("Best of 16 trains nothing and has more gold than DPO, RSO, PRO and RRHF.",
     [(CLEAN, GOLD, "best of 16", ">", other) for other in ("DPO", "RSO", "PRO", "RRHF")],
     "RRHF gets less of the proxy than its best candidates have ([rrhf](rrhf.md), column \"proxy - best\"): "
     "a policy that learns from the best samples does not always answer as well as they do. A part of it is "
     "the number of samples: RRHF and RSO had 8, PRO 5. Best of 8 still has 0.14 more gold than RRHF, but "
     "best of 4 is level with PRO. DPO sees no proxy; for it and RSO we tested no reason. Best of 16 "
     "pays at each answer instead."),
    ("SFT on the best tenth of the samples has more gold than the losses that rank them, and takes less "
     "time.",
     [(CLEAN, GOLD, "filter", ">", "RRHF"), (CLEAN, GOLD, "filter", ">", "PRO"),
      (CLEAN, COST, "filter", "<", "RRHF")],
     "It chose from 16 samples of a prompt. Our grids offered the rankings at most 8, and time would have "
     "allowed more. With 8, we could not show in the tuning (below) that filtering is better than RRHF. So "
     "this may be about the number of samples, not about the losses."),
    ("One pass of PPO over its samples takes half the time of four, and we could not show that it has less "
     "gold.",
     [(CLEAN, COST, "PPO, one pass", "<", "PPO"), (CLEAN, GOLD, "PPO, one pass", "?", "PPO")],
     "Its chosen learning rate is twice as high, and it sees a quarter more prompts. Slightly stronger "
     "settings break the language; on seed 8 its fluency fell to 0.82. In the tuning (below) both broke the "
     "language on some seeds: four passes with rate 0.002, 4 epochs and a penalty below 0.1; one pass with "
     "rate 0.004 and a penalty of 0.02, or 10 epochs."),
    ("RAFT has more gold than the Llama 2 rounds, which add the samples of all rounds and new labels.",
     [(CLEAN, GOLD, "RAFT", ">", "Llama 2 rounds"), (CLEAN, "eval/kl", "RAFT", ">", "Llama 2 rounds")],
     "The samples of earlier, weaker rounds stay in the data of the Llama 2 rounds, and keep the policy near "
     "to SFT (KL). With those of the last round alone it goes further and has more gold, although it starts "
     "again from SFT in the same way ([raft](raft.md), \"Llama 2\"). There, new labels made no difference "
     "that we could measure."),
    ("With the data that fit the budget, the Decision Transformer learns next to nothing.",
     [(CLEAN, GOLD, "Decision Transformer, less data", "=", "SFT", 0.1),
      (CLEAN, GOLD, "Decision Transformer, its recipe", ">", "Decision Transformer, less data")],
     "It needs many rows and many steps: 2,875 rows give nothing, eight times as many passes over them half "
     "of the gain, 23,000 rows all of it ([decision_transformer](decision_transformer.md), \"data\"). "
     "Filtering gains from 2,875 rows already."),
]
