"""The main arms on real text, the whole way with a toy chat model: data, proxy, arms, report, mistakes."""
import functools
import json
import pickle
import random
import re
from statistics import fmean

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import experiments.real_text as data
import harness
from conftest import ROOT, killed_after, llama_config
from harness import UserError
from referee import docs, real_text
from referee.__main__ import main
from referee.arms import config_class, method_names
from referee.statistics import t_interval
from tasks import verifiable

ANSWERS = ["is it so, for you?", "the river is wide and you see it", "Well, a b c", "So it is that"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def chatbot(tmp_path_factory):
    """A random chat model that reads letters, and a folder as tasks/verifiable.py writes it."""
    path = tmp_path_factory.mktemp("real") / "chatbot"
    letters = ["<eos>", "\n", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, "?"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>",
                                        model_max_length=256)
    tokenizer.chat_template = ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == "
                               "'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}"
                               "assistant:{% endif %}")
    tokenizer.save_pretrained(path)
    config = llama_config()
    config.vocab_size, config.max_position_embeddings = len(letters), 256
    LlamaForCausalLM(config).save_pretrained(path)
    folder = path.parent / "data"
    folder.mkdir()
    train, test = verifiable.split([f"say {i}" for i in range(24)], 8, seed=0)
    rng = random.Random(0)
    pairs, rated = verifiable.judged(train, [rng.sample(ANSWERS, 4) for _ in train], seed=0)
    for name, rows in (("pairs", pairs), ("rated", rated), ("test", [{"prompt": prompt} for prompt in test])):
        write(folder / f"{name}.jsonl", rows)
    return path, folder


@pytest.fixture
def go(chatbot, tmp_path, monkeypatch, no_traces):
    """Runs `python -m referee real_text` as a trial on the toy, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    model, folder = chatbot

    def run(*words, model=model, data=folder):
        flags = [f"--model={model}"] * bool(model) + [f"--data={data}"] * bool(data)
        main(["real_text", *flags, "--quick", "True", "--seeds", "1", "--device", "cpu", *words])

    return run


# ---------------------------------------------------------------------------------------------- the whole way

def test_the_whole_way(go, chatbot, tmp_path, monkeypatch, capsys):
    """Cut while the proxy is trained, cut in an arm, gone on with; a second seed; the report; the page."""
    pytest.importorskip("peft")
    proxies, started = [], []
    fit, launch = harness.train_reward_model, harness.launch
    monkeypatch.setattr(harness, "launch", lambda train, config, *a: started.append(config) or launch(
        train, config, *a))

    def cut(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "train_reward_model", cut)
    with pytest.raises(KeyboardInterrupt):
        go()
    assert not started and not [*tmp_path.rglob("sizes.json")]
    monkeypatch.setattr(harness, "train_reward_model", lambda *a: proxies.append(1) or fit(*a))
    with killed_after(1):                                                    # DPO's second step
        go()
    path, = (tmp_path / "results").glob("real_text@*.json")
    first = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert {run["arm"] for run in first} == {"SFT", "best of 8"} and len(proxies) == 1
    go("--seeds", "2")
    assert len(proxies) == 2                                                 # one for each seed
    assert len(started) == 2 * len(data.ARMS) + 1                            # DPO was begun twice
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert {(run["arm"], run["seed"]) for run in stored["runs"]} == {
        (arm, seed) for arm in data.ARMS for seed in (0, 1)}
    assert all(run in stored["runs"] for run in first)
    assert path.name.endswith(",model=chatbot,quick=True.json")
    assert str(tmp_path.parent) not in path.read_text(encoding="utf-8") and "/" not in str(stored["config"])

    check_that_arms_of_a_seed_share_everything(started)
    check_runs(stored["runs"])
    said = capsys.readouterr().out
    said = " ".join(said.split())
    assert "gold - SFT" in said and "How small this is: 2 seeds, each with 6 train prompts" in said
    assert re.search(r"prefers the chosen answer in a share of [01]\.\d\d", said)
    assert all(f" {arm} " in said for arm in data.ARMS)
    main(["real_text", "--report"])                                          # runs nothing, without a model
    assert len(started) == 2 * len(data.ARMS) + 1 and "gold - SFT" in capsys.readouterr().out

    assert real_text.block() == "Not run yet: `python -m referee real_text --model DIR --data FOLDER`."
    stored["config"].pop("quick")                                            # as if it were no trial
    path.with_name("real_text@x.json").write_text(json.dumps(stored), encoding="utf-8")
    for name, value in data.QUICK.items():
        monkeypatch.setattr(data, name, value)
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("\n".join(["# a", *docs.MARKS["real text"], ""]), encoding="utf-8")
    docs.write_all()
    text = page.read_text(encoding="utf-8")
    assert "| arm | gold - SFT | seeds |" in text and "How small this is" in text and "No setting was" in text


def check_that_arms_of_a_seed_share_everything(started):
    for seed in (0, 1):
        own = [config for config in started if config.seed == seed]
        assert len({(config.reward, config.test_data, config.model) for config in own}) == 1
        files = {config.data for config in own}
        assert len(files) == 2                                               # pairs and rated answers
        rows = [json.loads(open(file, encoding="utf-8").read()) for file in files]
        assert len({frozenset(row["prompt"] for row in part) for part in rows}) == 1
        test = json.loads(open(own[0].test_data, encoding="utf-8").read())
        assert len(test) == 4                                                # every second of eight
        train = {row["prompt"] for part in rows for row in part}
        assert len(train) == 6 and not train & {row["prompt"] for row in test}
        for kind in verifiable.KINDS.values():
            *known, unseen = (re.escape(text).replace(r"\{\}", "[a-zA-Z0-9]+") for text in kind.wordings)
            assert not [prompt for prompt in train if re.search(unseen, prompt)]
            assert not [row for row in test if re.search("|".join(known), row["prompt"])]
    assert started[0].reward != started[-1].reward
    scale = json.loads(open(f"{started[0].reward}/config.json", encoding="utf-8").read())["reward_scale"]
    assert scale["std"] > 0


def check_runs(runs):
    before = {(run["seed"], run["trace"][0]["eval/gold"]) for run in runs if run["arm"] != "best of 8"}
    assert len(before) == 2                                                  # all begin with one policy
    for run in runs:
        assert {"eval/gold", "eval/proxy", "eval/kl", "eval/length", "seconds"} <= {*run}
        assert run["sizes"]["prompts"] == 6 and run["sizes"]["test"] == 4
        trained = run["arm"] not in ("SFT", "best of 8")
        assert run["arm"] != "SFT" or run["eval/kl"] == pytest.approx(0, abs=1e-6)
        assert (run["tokens_trained"] > 0) == trained and ("eval/win_rate" in run) == (run["arm"] != "SFT")


def test_another_process_cannot_make_the_work(chatbot):
    work = functools.partial(real_text.Work, str(chatbot[0]), {"pairs": []}, True)
    again = pickle.loads(pickle.dumps(work))
    assert again.func is real_text.Work and again.args == work.args


# -------------------------------------------------------------------------------------------- arms and tables

@pytest.mark.parametrize("quick", [False, True])
def test_arm_is_of_no_method_or_has_an_option_that_it_does_not_know(quick):
    known = real_text.constants(quick)
    assert {*known["ARMS"]} == {*data.ARMS} and [*known["ARMS"]][0] == real_text.SFT
    for name, arm in real_text.as_experiments(known)["real text"]["arms"].items():
        assert arm["method"] in (*method_names(), "referee.best_of_n")
        shared = known["SHARED"] | {k: v for k, v in arm.items() if k != "method"}
        config_class(arm["method"])(model="m", data="d", **shared)
        assert known["ARMS"][name]["about"] and known["ARMS"][name].get("rows", "rated") == "rated"
    harness.Recipe(**known["PROXY"])


def test_differences_are_not_paired_within_seeds():
    def arm(**golds):
        return {int(seed[1:]): {"eval/gold": gold} for seed, gold in golds.items()}

    rows = real_text.differences({"SFT": arm(s0=0.1, s1=0.5, s2=0.3), "a": arm(s0=0.2, s1=0.6, s3=0.9),
                                  "b": arm(s4=0.5)})
    assert rows[1:] == [["a", "+0.100 ±0.000", "2"]]


def test_page_says_something_else_of_real_text_than_its_runs():
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    page = " ".join(page.partition("## Real text")[2].split())
    file = ROOT / "results" / "real_text@data=af1b325d,model=SmolLM2-135M-Instruct.json"
    arms = {}
    for run in json.loads(file.read_text(encoding="utf-8"))["runs"]:
        arms.setdefault(run["arm"], {})[run["seed"]] = run
    assert {len(runs) for runs in arms.values()} == {3} and "With three seeds" in page
    mean = {name: {metric: fmean(run[f"eval/{metric}"] for run in runs.values())
                   for metric in ("gold", "length", "eos_rate")} for name, runs in arms.items()}
    sft = arms.pop("SFT")
    gaps = {name: [run["eval/gold"] - sft[seed]["eval/gold"] for seed, run in runs.items()]
            for name, runs in arms.items()}
    assert {name for name, own in gaps.items() if min(own) > 0} == {*gaps} - {"RAFT", "SteerLM"}
    assert "On each seed best of 8, DPO, RRHF, ReMax, PPO and the Decision Transformer had more gold" in page
    assert [name for name, own in gaps.items() if abs(fmean(own)) > t_interval(own)[1]] == [
        "Decision Transformer"] and len(gaps) == 8
    assert "the Decision Transformer's interval alone leaves out 0. It is one of eight" in page
    assert max(mean, key=lambda name: mean[name]["gold"]) == "best of 8"
    assert "Best of 8, which trains nothing, has the highest mean" in page
    assert max(row["length"] for name, row in mean.items() if name not in ("SFT", "DPO")) < 27
    assert min(row["eos_rate"] for name, row in mean.items() if name not in ("SFT", "DPO")) > 0.6
    assert mean["SFT"]["eos_rate"] < 0.45 and "All arms but DPO write shorter answers than SFT" in page
    assert 1.8 < mean["SteerLM"]["eos_rate"] / mean["SFT"]["eos_rate"] < 2 and "nearly twice as often" in page


def test_report_of_nothing(go, tmp_path):
    (tmp_path / "real_text@x.json").write_text("{}", encoding="utf-8")
    for call in (real_text.report, real_text.block):
        with pytest.raises(UserError, match="real_text@x.json lacks best_of_n, config"):
            call(tmp_path)
    (tmp_path / "real_text@x.json").unlink()
    with pytest.raises(UserError, match="^no run is stored: .* --model DIR --data FOLDER makes them$"):
        go("--report")
    assert not [*tmp_path.iterdir()]


# --------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("words, left_out, said", [
    ([], "model", "^real_text needs a chat model and its data: give --model DIR and --data FOLDER"),
    ([], "data", "^real_text needs a chat model and its data: give --model DIR and --data FOLDER"),
    (["--lr", "0.1"], "", "^--lr is not for real_text: experiments/real_text.py"),
    (["--reward", "x"], "", "^--reward is not for real_text"),
    (["--eval_prompts", "0"], "", "^--eval_prompts must be above 0")])
def test_mistake_is_not_one_line(go, words, left_out, said):
    with pytest.raises(UserError, match=said) as error:
        go(*words, **{left_out: ""} if left_out else {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, change, said", [
    ("rated", lambda text: None, "rated.jsonl is missing or damaged: python -m tasks.verifiable"),
    ("pairs", lambda text: text + "{", "pairs.jsonl is missing or damaged"),
    ("pairs", lambda text: text + '["a"]\n', "pairs.jsonl is missing or damaged"),
    ("pairs", lambda text: text.replace('"prompt"', '"question"'), "pairs.jsonl is missing or damaged"),
    ("rated", lambda text: text + '{"prompt": "a\\nClose with a question. Use no capital letters."}\n',
     "rated.jsonl has wordings of instructions that only test prompts may have"),
    ("pairs", lambda text: text.split("\n")[0], "needs two train prompts with pairs, and a test prompt in"),
    ("test", lambda text: '{"prompt": "a\\nClose with a question. Use no capital letters."}\n',
     "needs two train prompts with pairs, and a test prompt in unseen wordings")])
def test_folder_that_was_not_made_for_it(go, chatbot, tmp_path, name, change, said):
    for file in chatbot[1].iterdir():
        (tmp_path / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    file = tmp_path / f"{name}.jsonl"
    text = change(file.read_text(encoding="utf-8"))
    file.unlink() if text is None else file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said) as error:
        go(data=tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "results").exists()


def test_seed_draws_what_others_draw_or_loses_rows(chatbot):
    rows = verifiable.verifiable_rows(chatbot[1])
    every = {row["prompt"] for row in rows["pairs"]}
    found = [verifiable.rows_of_seed(rows, seed, 6) for seed in range(4)]
    assert found[0] == verifiable.rows_of_seed(rows, 0, 6)
    drawn = [frozenset(row["prompt"] for row in part["pairs"]) for part in found]
    assert {len(prompts) for prompts in drawn} == {6} and len({*drawn}) > 1
    for prompts, part in zip(drawn, found):
        assert {row["prompt"] for row in part["rated"]} == prompts and part["test"] == rows["test"]
        assert {row["prompt"] for row in part["others"]} == every - prompts
        assert part["pairs"] == [row for row in rows["pairs"] if row["prompt"] in prompts]
    whole = verifiable.rows_of_seed(rows, 0, 1000)
    assert whole["pairs"] == rows["pairs"] and whole["others"] == []
